"""What the RFCs say: pure code, no I/O, no clock. Limits and times come in as arguments."""
