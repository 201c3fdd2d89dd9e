"""1. Receiving mail: sockets, SMTP server sessions, and `intake`, the only way for a message into the queue."""
