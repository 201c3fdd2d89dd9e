"""Why a message is put into the quarantine, as it is stored with the message (queue/quarantine.py keeps it)."""

from relaymta.filter.guard import Finding
from relaymta.node import SiteState
from relaymta.proto.envelope import Quarantine, held_because
from relaymta.proto.subject import subject

__all__ = ["of_abuse", "of_dmarc", "of_finding"]

SUBJECT_SHOWN = 120  # characters


def of_finding(one: Finding, header: bytes, now: int) -> Quarantine:
    """Because of what a filter or a rule about mail says, or does not. `now`: ms of the queue's clock."""
    return Quarantine(now, one.guard.title, held_because(one.reason), one.score, subject(header, SUBJECT_SHOWN), not one.failure)


def of_dmarc(why: str, header: bytes, now: int) -> Quarantine:
    """As `of_finding`, of DMARC."""
    return Quarantine(now, "DMARC", held_because(why), None, subject(header, SUBJECT_SHOWN), True)


def of_abuse(state: SiteState, now: int) -> Quarantine:
    """Because an account does what it usually does not. It stays until an operator decides: good mail may be among it."""
    return Quarantine(now, state.by, held_because(state.reason), None, "", False)
