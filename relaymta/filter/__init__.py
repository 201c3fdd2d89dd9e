"""2. Is it wanted: our own mail is signed with DKIM, once, before it is stored; that of unauthenticated clients is verified."""
