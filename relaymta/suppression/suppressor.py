"""What becomes of events of delivery: entries of the list."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from relaymta.proto.bounce_class import HARD, classify, parsed
from relaymta.proto.suppression import listed, listed_application
from relaymta.suppression.entries import Changed, Entry, Suppressions

__all__ = ["Suppressor", "Terms"]

EVENTS: Final = {"bounced": "hard-bounce", "complained": "complaint"}
BY: Final = "relay"  # who has added what is added by itself
ABOUT_ONE: Final = ("rcpt", "route")  # phases whose failure is the recipient's own
ABOUT_ALL: Final = ("data", "final")  # and those of a message as a whole
_RANK: Final = {"hard-bounce": 0, "complaint": 1, "unsubscribe": 2, "manual": 2}


class Terms(NamedTuple):
    """Whether recipients are added by themselves, and for how many seconds (0: for ever)."""

    hard_bounces: bool = True
    complaints: bool = True
    hard_bounce_seconds: int = 0
    complaint_seconds: int = 0


class Suppressor:
    """Adds recipients whose address is bad, and those who have complained. `entries()`: the list, as it is open at the time;
    `warn(text)`: it is full."""

    def __init__(self, entries: Callable[[], Suppressions], terms: Terms, warn: Callable[[str], object]) -> None:
        self._entries = entries
        self._warn = warn
        self._full = False
        self.terms = terms

    def take(self, events: Iterable[Mapping[str, Any]]) -> Changed:
        """Add the recipients of events that say so, in one transaction. An event has "event" ("bounced", "complained"; others add
        nothing), "recipient", "application" ("": the entry is about all mail), "reply" as it is logged, "time" (ms UTC); perhaps
        "class", which counts in place of `bounce_class.classify`; "expired": the message was too old; "phase" of the attempt and
        how many "recipients" the message has: a reply to MAIL, or to the data for several, need not be about this one. What is
        malformed adds nothing. Events may come again. An entry of an operator, or a complaint, is not replaced by a bounce.
        StoreError, also where the disk is full: nothing is added, and they are to come again. That there are as many entries as
        there may be is no error: `left_out`."""
        found = {(entry.application, entry.address): entry for entry in map(self._entry, events) if entry is not None}
        if not found:
            return Changed()
        entries = self._entries()
        changed = entries.put(list(found.values()), _yields)
        if changed.left_out and not self._full:
            self._warn(f"the suppression list is full ({entries.most} entries): further recipients are not added to it")
        self._full = bool(changed.left_out)
        return changed

    def _entry(self, event: Mapping[str, Any]) -> Entry | None:
        reason = EVENTS.get(str(event.get("event", "")))
        terms, reply = self.terms, str(event.get("reply") or "")
        if reason == "hard-bounce":
            wanted, seconds = terms.hard_bounces and self._is_hard(event, reply), terms.hard_bounce_seconds
        else:
            wanted, seconds = reason == "complaint" and terms.complaints, terms.complaint_seconds
        if reason is None or not wanted:
            return None
        try:
            address, since = listed(str(event.get("recipient") or "")), int(event.get("time") or 0) // 1000
            application = listed_application(str(event.get("application") or ""))
        except (ValueError, TypeError):
            return None
        text = without_address(reply, address)
        return Entry(application, address, reason, text, since, since + seconds if seconds else 0, BY)

    def _is_hard(self, event: Mapping[str, Any], reply: str) -> bool:
        if event.get("expired"):
            return False
        phase = event.get("phase") or "rcpt"
        if phase not in ABOUT_ONE and not (phase in ABOUT_ALL and event.get("recipients", 1) == 1):
            return False
        known = event.get("class")
        return (str(known) if known else classify(*parsed(reply))) in HARD


def without_address(reply: str, address: str) -> str:
    """A reply without the recipient's address in it, which the entry has: so that many have the same one."""
    found = reply.lower().find(address)
    if found < 0 or len(reply.lower()) != len(reply):
        return reply
    start, end = found, found + len(address)
    if reply[start - 1 : start] == "<" and reply[end : end + 1] == ">":
        start, end = start - 1, end + 1
    return f"{reply[:start]}<>{reply[end:]}"


def _yields(there: Entry, new: Entry) -> bool:
    """Whether an entry is replaced by one that is made by itself."""
    if not there.holds(new.since):
        return True
    if _RANK[there.reason] != _RANK[new.reason]:
        return _RANK[there.reason] < _RANK[new.reason]
    return new.since >= there.since and (not new.until or (bool(there.until) and new.until >= there.until))
