"""What a reply to one recipient says of the address: the class of a bounce, by its enhanced code alone (RFC 3463, and the
registry of RFC 5248).

Hosts use these codes loosely, and a finer classification also reads the text: it replaces `classify`, with the same arguments and
more classes. What follows from a class is decided elsewhere; here only `HARD` says of which the address itself is bad.
"""

import re
from typing import Final, NamedTuple

__all__ = ["HARD", "Reply", "classify", "parsed"]

# Subject and detail of a permanent failure (5.X.Y) -> its class; then the subjects whose other details have a class in common.
_CODES: Final = {
    "1.1": "bad-mailbox",
    "1.2": "bad-domain",
    "1.3": "bad-mailbox",
    "1.4": "ambiguous",
    "1.6": "moved",
    "1.7": "sender",
    "1.8": "sender",
    "1.10": "null-mx",
    "2.1": "disabled",
    "2.2": "full",
    "2.3": "size",
    "2.4": "mailbox",
    "3.4": "size",
    "4.7": "expired",
}
_SUBJECTS: Final = {
    "1": "address",
    "2": "mailbox",
    "3": "system",
    "4": "network",
    "5": "protocol",
    "6": "content",
    "7": "policy",
}
# The mailbox, or (null-mx, RFC 7505) any mailbox of the domain, takes no mail, and says so of itself. Not bad-domain: a name that
# is not found is also that of a registration that has lapsed, or of a zone that is broken for a day.
HARD: Final = frozenset(("bad-mailbox", "moved", "disabled", "null-mx"))

_REPLY = re.compile(r"\s*+(?:([2-5][0-9]{2})(?:[ \t-]++|\Z))?(?:([245]\.[0-9]{1,3}\.[0-9]{1,3})(?:[ \t]++|\Z))?", re.A)


class Reply(NamedTuple):
    """A reply in its parts; 0 and "" where it has none."""

    code: int
    enhanced: str
    text: str


def parsed(reply: str) -> Reply:
    """A reply as it is logged, `550 5.1.1 text` (what we found out ourselves has no first code), in its parts."""
    found = _REPLY.match(reply)
    assert found is not None
    return Reply(int(found[1] or 0), found[2] or "", reply[found.end() :])


def classify(code: int, enhanced: str, text: str) -> str:
    """The class of a reply that ended a recipient: "transient" where either code says that it may be otherwise later (also when
    the message has expired meanwhile), "other" where nothing is said of the reason. `text` decides nothing yet."""
    kind, _, rest = enhanced.partition(".")
    if 400 <= code < 500 or kind == "4":
        return "transient"
    if kind != "5" or (code and not 500 <= code < 600):
        return "other"
    return _CODES.get(rest) or _SUBJECTS.get(rest.partition(".")[0], "other")
