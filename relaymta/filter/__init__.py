"""2. Is it wanted: our own mail is signed here, once, before it is made safe; that of strangers is held to what it says it is."""
