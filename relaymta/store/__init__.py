"""5'. It stays: mailboxes. shard.py is one shard, owned by one process; rows.py its tables, blocks.py the index of a mailbox;
change.py what happens in a transaction, writer.py the group commit; sessions.py what sessions change, in slices, and watching.py
who is told.
"""
