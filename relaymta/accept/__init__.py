"""1. Mail comes in: sockets, sessions, and the one entry (`intake`) that makes a message safe before it is acknowledged."""
