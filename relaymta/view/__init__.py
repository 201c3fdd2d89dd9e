"""6. It is read: users log in and read their mail. access.py is what a session may ask of the mailboxes; pop3.py the connection
of a POP3 client.
"""
