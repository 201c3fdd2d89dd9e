"""The protocols: pure code, no I/O, no clock. Limits and times are arguments."""
