"""sendmail(1), mailq(1) and newaliases(1): programs of this machine hand in mail by them.

Cron, PHP and others start it once for each message. So it is run by an interpreter that imports nothing by itself
(`python -I -S`), and imports next to nothing: no `socket` (but its C part), no `re`, nothing of the relay that imports more. It
has no rights of its own: who the user is, the relay learns from the system (accept/user.py), and
`relaymta-drop` takes the message while the relay is down (dropping.py).
"""

from relaymta.sendmail.program import main

__all__ = ["main"]
