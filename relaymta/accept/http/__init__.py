"""From the JSON of an HTTP request to message data: models.py reads and checks it, compose.py makes the message data (fields.py
its header, contents.py its attachments)."""
