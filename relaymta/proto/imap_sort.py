"""SORT (RFC 5256): what messages are sorted by, and their order. Strings are compared as `mime_text.comparable` (the place of
i;unicode-casemap, RFC 5051), by their first STRING_MOST octets.
"""

import calendar
import re
from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from typing import Any, Final, NamedTuple

from relaymta._speedups.envelopes import elements
from relaymta.proto.mime_envelope import MONTHS, full_year, tokens
from relaymta.proto.mime_text import comparable, header_text

__all__ = ["CRITERIA", "Sortable", "Sorted", "base_subject", "in_order", "sent", "sortable"]

CRITERIA: Final = frozenset(("ARRIVAL", "CC", "DATE", "FROM", "SIZE", "SUBJECT", "TO"))
STRING_MOST: Final = 200  # octets
SUBJECT_MOST: Final = 4000  # octets of a subject that are looked at
RUN: Final = 4096  # keys that are sorted at once: some milliseconds

_PLACES: Final = {"FROM": 2, "TO": 5, "CC": 6}  # in an ENVELOPE
_INVERTED: Final = bytes(range(255, -1, -1))
_BLANK = re.compile(r"[ \t\r\n]+")
_BLOBS = re.compile(r"(?>(?:\[[^\[\]]*+\] *+)*)")
_BLOB = re.compile(r"\[[^\[\]]*+\] *+")
_REPLY = re.compile(r"(?:re|fwd?) *+(?:\[[^\[\]]*+\] *+)?:")
_DATE = re.compile(
    r"([0-9]{1,2})[\s-]+([A-Za-z]{3})[A-Za-z]*[\s-]+([0-9]{2,4})"
    r"\s+([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?\s*([+-][0-9]{4}|[A-Z]{3})?"
)
_ZONES = {"EDT": -400, "EST": -500, "CDT": -500, "CST": -600, "MDT": -600, "MST": -700, "PDT": -700, "PST": -800}


class Sortable(NamedTuple):
    """What of an ENVELOPE messages are sorted by: Date: (None: it has none) and Subject:, as they are in it; the mailbox of the
    first address of From:, To: and Cc:, by these names in upper case."""

    date: bytes | None
    subject: bytes
    mailboxes: dict[str, bytes]


def sortable(envelope: bytes) -> Sortable:
    """The parts of an ENVELOPE, as `mime_envelope.envelope` makes it."""
    places = elements(envelope)
    mailboxes = {name: _string(envelope, places, where, 2) or b"" for name, where in _PLACES.items()}
    return Sortable(_string(envelope, places, 0), _string(envelope, places, 1) or b"", mailboxes)


def _string(envelope: bytes, places: list[int], field: int, number: int = 0) -> bytes | None:
    """A string of a field of an ENVELOPE: the field itself, or one in its addresses; None: it is NIL, or there is none."""
    depth = 0
    for token in tokens(envelope, places[field]) if field < len(places) else ():
        if isinstance(token, str):
            depth += 1 if token == "(" else -1
        elif not number:
            return token
        else:
            number -= 1
        if depth <= 0:
            break
    return None


def sent(date: bytes | None) -> int | None:
    """The time that Date: names, in seconds since 1970, UTC (RFC 5256 2.2); None: it names none."""
    match = _DATE.search(date[:200].decode("latin-1")) if date is not None else None
    if match is None:
        return None
    day, month, year, hour, minute, second, zone = match.groups()
    full = full_year(year)
    number = MONTHS.get(month.lower(), 0)
    if not number or full < 1 or not 1 <= int(day) <= calendar.monthrange(full, number)[1]:
        return None
    if int(hour) > 23 or int(minute) > 59 or int(second or 0) > 60:
        return None
    offset = int(zone) if zone and zone[0] in "+-" else _ZONES.get(zone or "", 0)
    minutes = (abs(offset) // 100 * 60 + abs(offset) % 100) * (1 if offset >= 0 else -1)
    return calendar.timegm((full, number, int(day), int(hour), int(minute), int(second or 0))) - minutes * 60


def base_subject(subject: bytes) -> tuple[str, bool]:
    """The base subject (RFC 5256 2.1) of a Subject:, `comparable`, and whether it is one of a reply or a forwarded message. In
    linear time."""
    text = _BLANK.sub(" ", comparable(header_text(subject[:SUBJECT_MOST]))).strip(" ")
    start, end, replies = 0, len(text), False
    while True:
        end, trailing = _without_trailers(text, start, end)
        start, leading = _without_leaders(text, start, end)
        replies = replies or trailing or leading
        if not (end - start > 5 and text.startswith("[fwd:", start, end) and text.endswith("]", start, end)):
            return text[start:end], replies
        start, end, replies = start + 5, end - 1, True


def _without_trailers(text: str, start: int, end: int) -> tuple[int, bool]:
    """2.1 (2): the end, and whether a `(fwd)` was removed."""
    removed = False
    while end > start:
        if text[end - 1] == " ":
            end -= 1
        elif text.endswith("(fwd)", start, end):
            end, removed = end - 5, True
        else:
            break
    return end, removed


def _without_leaders(text: str, start: int, end: int) -> tuple[int, bool]:
    """2.1 (3) to (5): the start, and whether a `re:` or `fwd:` was removed. Blobs go where a reply is behind them, or else
    something that is not empty."""
    removed = False
    while start < end:
        if text[start] == " ":
            start += 1
            continue
        blobs = _BLOBS.match(text, start, end)
        behind = blobs.end() if blobs is not None else start
        if reply := _REPLY.match(text, behind, end):
            start, removed = reply.end(), True
            continue
        if behind < end:
            return behind, removed
        return _last_blob(text, start, end), removed
    return start, removed


def _last_blob(text: str, start: int, end: int) -> int:
    """Where the last of the blobs begins that are all there is."""
    return max((blob.start() for blob in _BLOB.finditer(text, start, end)), default=start)


def in_order(items: Sequence[int], key: Callable[[int], Any]) -> list[int]:
    """As `sorted`, which lets no other thread run until it is done: in runs, which are merged."""
    if len(items) <= RUN:
        return sorted(items, key=key)
    runs = [sorted(items[start : start + RUN], key=key) for start in range(0, len(items), RUN)]
    return list(merge(*runs, key=key))


class Sorted:
    """Messages in the order of SORT. `criteria`: names of CRITERIA, each with whether it is REVERSE; messages that are equal by
    all of them are in the order in which they are added."""

    def __init__(self, criteria: Sequence[tuple[str, bool]]) -> None:
        firsts: dict[str, bool] = {}  # a criterion that comes again decides nothing
        for name, reverse in criteria:
            firsts.setdefault(name, reverse)
        self._criteria = tuple(firsts.items())
        self._runs: list[list[bytes]] = []
        self._run: list[bytes] = []
        self._count = 0

    @property
    def needs_envelope(self) -> bool:
        """Whether `add` needs more than dates and sizes."""
        return any(name not in ("ARRIVAL", "SIZE") for name, _ in self._criteria)

    def add(self, envelope: bytes, arrival: int, size: int) -> None:
        """A message. `arrival`: its internal date, ms."""
        parts = sortable(envelope) if envelope else Sortable(None, b"", {})
        key = [_component(name, reverse, parts, arrival, size) for name, reverse in self._criteria]
        key.append(self._count.to_bytes(4, "big"))
        self._count += 1
        self._run.append(b"".join(key))
        if len(self._run) >= RUN:
            self._end_run()

    def _end_run(self) -> None:
        self._run.sort()
        self._runs.append(self._run)
        self._run = []

    def order(self) -> Iterator[int]:
        """All messages, as the numbers, from 0, in which they were added."""
        self._end_run()
        return (int.from_bytes(key[-4:], "big") for key in merge(*self._runs))


def _component(name: str, reverse: bool, parts: Sortable, arrival: int, size: int) -> bytes:
    """A part of a key, so that keys are compared octet by octet."""
    if name == "SIZE":
        found = size.to_bytes(8, "big")
    elif name == "ARRIVAL":
        found = (arrival + (1 << 62)).to_bytes(8, "big")
    elif name == "DATE":
        time = sent(parts.date)
        found = ((arrival // 1000 if time is None else time) + (1 << 62)).to_bytes(8, "big")
    else:
        text = base_subject(parts.subject)[0] if name == "SUBJECT" else comparable(header_text(parts.mailboxes.get(name, b"")))
        found = text.encode("utf-8", "replace").replace(b"\0", b"")[:STRING_MOST] + b"\0"
    return found.translate(_INVERTED) if reverse else found
