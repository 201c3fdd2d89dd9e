"""From the JSON of an HTTP request to message data: models.py reads and checks it, templates.py fills in what is different for
each recipient (templating.py: in processes of their own; exchange.py: what they are told), compose.py makes the message data
(fields.py its header, contents.py its attachments)."""
