"""What a store on disk is made of, whatever it keeps: a shard has one owner (lock.py), a clock that never goes back (clock.py),
ids that are never used again (ident.py), an LMDB environment (environment.py), bodies in segment files (segments.py) that are
compacted (compact.py) and large ones in files (big.py), one writer thread that commits in groups (writer.py), reader threads
(readers.py), and an eye on the room that is left (room.py).

Nothing here knows what a message, a queue or a mailbox is: a store brings its tables, its operations and what they change.
"""
