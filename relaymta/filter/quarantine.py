"""Why a message is put into the quarantine, as it is stored with the message (queue/quarantine.py keeps it)."""

from relaymta.filter.guard import Finding
from relaymta.node import SiteState
from relaymta.proto.dkim import by_name, split_fields
from relaymta.proto.envelope import Quarantine, held_because
from relaymta.proto.mime_text import header_text
from relaymta.proto.printable import printable

__all__ = ["of_abuse", "of_dmarc", "of_finding"]

SUBJECT_SHOWN = 120  # characters
SUBJECT_READ = 4000  # octets of a field


def of_finding(one: Finding, header: bytes, now: int) -> Quarantine:
    """Because of what a filter or a rule about mail says, or does not. `now`: ms of the queue's clock."""
    return Quarantine(now, one.guard.title, held_because(one.reason), one.score, _subject(header), not one.failure)


def of_dmarc(why: str, header: bytes, now: int) -> Quarantine:
    """As `of_finding`, of DMARC."""
    return Quarantine(now, "DMARC", held_because(why), None, _subject(header), True)


def of_abuse(state: SiteState, now: int) -> Quarantine:
    """Because an account does what it usually does not. It stays until an operator decides: good mail may be among it."""
    return Quarantine(now, state.by, held_because(state.reason), None, "", False)


def _subject(header: bytes) -> str:
    """The first Subject: there is, as it is shown."""
    fields = by_name(split_fields(header)).get(b"subject", [])
    value = fields[0].partition(b":")[2] if fields else b""
    return printable(header_text(value[:SUBJECT_READ]).strip()[:SUBJECT_SHOWN])[:SUBJECT_SHOWN]
