"""The suppression list: recipients to whom no mail of an application, or of any, is to be sent any more, with reason and end.

An LMDB environment of its own in the spool (`suppression/`), which many processes use at the same time: workers look addresses up
at RCPT (`lookup.py`), the supervisor writes what operators change (`entries.py`), and whoever follows the events of delivery what
they say (`suppressor.py`). LMDB's lock for writers is one of the file: a process that dies with it keeps nobody waiting, and
leaves nothing of what it had not committed.
"""

from relaymta.suppression.asked import address_of, counted, done, entries_of, rows_of
from relaymta.suppression.entries import FOLDER, MOST, Changed, Counts, Entry, Page, Suppressions, row_of
from relaymta.suppression.lookup import Lookup
from relaymta.suppression.suppressor import Suppressor, Terms

__all__ = [
    "FOLDER", "MOST", "Changed", "Counts", "Entry", "Lookup", "Page", "Suppressions", "Suppressor", "Terms", "address_of",
    "counted", "done", "entries_of", "row_of", "rows_of",
]  # fmt: skip
