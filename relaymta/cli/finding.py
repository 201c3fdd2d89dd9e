"""`relaymta message find`: the messages in the queue, and in the history those that have left it, the newest first.

What is in the queue is told by the workers, or read from its files. The history is read from its last line on, so that what is
recent is found at once: an end of a message (delivered, bounced) is read before its beginning, and kept until then.
"""

import heapq
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import islice
from math import inf
from typing import Any

import msgspec

from relaymta.cli.options import fail, missing
from relaymta.cli.peer import Daemon, Offline, asked, when
from relaymta.cli.queue import pages
from relaymta.control.filters import Filter
from relaymta.duration import parse_duration
from relaymta.ident import format_id, parse_id
from relaymta.proto.mime_text import comparable, contains

__all__ = ["Finder", "Search", "moment"]

# What is asked for by --status, from the states of messages in the queue. "delivered", "bounced", "gone" are those of others.
_IN_QUEUE = {"queued": "queued", "in flight": "queued", "unseen": "queued", "deferred": "deferred", "held": "held",
             "quarantined": "held"}  # fmt: skip
_OF_RECIPIENTS = {"delivered": "delivered", "failed": "bounced"}
REMEMBERED = 10_000  # messages whose beginning was read, and may be told of again
_REFUSED = "refused"

Record = dict[str, Any]


class Search:
    """What is looked for. `chosen`: fields of control.filters.Filter; `statuses`: as of --status, none: any; `message_id`: the
    value of Message-ID, with or without its brackets; `subject`: a part of the Subject. "": any."""

    def __init__(
        self, chosen: dict[str, Any], statuses: tuple[str, ...] = (), message_id: str = "", subject: str = ""
    ) -> None:  # fmt: skip
        self.chosen = {name: value for name, value in chosen.items() if value}
        self.statuses = frozenset(statuses)
        self.message_id = message_id.strip().strip("<>")
        self.subject = comparable(subject)

    @cached_property
    def _filter(self) -> Filter:
        return Filter(**self.chosen)

    def concerned(self, record: Record) -> list[dict[str, Any]]:
        """The recipients of a message that are asked for; all of them where none is."""
        found = [one for one in record["recipients"] if self._filter.is_to([one["address"]])]
        return found or record["recipients"]

    def may_suit(self, record: Record) -> bool:
        """Whether a message of the history suits, but for its status."""
        chosen, at = self._filter, record["arrived"] * 1000
        return (
            chosen.is_from(record["sender"])
            and chosen.is_to([one["address"] for one in record["recipients"]])
            and (not chosen.application or record["application"] == chosen.application)
            and (not chosen.newer or at >= chosen.newer)
            and (not chosen.older or at < chosen.older)
            and (not self.message_id or record["message_id"].strip("<>") == self.message_id)
        )

    def has_status(self, record: Record) -> bool:
        """Whether the status is one that is asked for."""
        if not self.statuses:
            return True
        found = {_IN_QUEUE.get(record["state"], record["state"])}
        return bool(self.statuses & (found | self.ends(record)))

    def ends(self, record: Record) -> set[str]:
        """What has become of the recipients that are asked for."""
        return {_OF_RECIPIENTS[one["state"]] for one in self.concerned(record) if one["state"] in _OF_RECIPIENTS}

    @property
    def needs_queue(self) -> bool:
        """Whether messages in the queue may suit, as far as they are not found by the history."""
        return not self.message_id and self.statuses != {"gone"}

    @property
    def needs_history(self) -> bool:
        """Whether messages that have left the queue may suit. (The history has no Subject.)"""
        return not self.subject and (not self.statuses or bool(self.statuses & {"delivered", "bounced", "gone"}))


class Finder:
    """A search, which is made once."""

    def __init__(self, peer: Daemon | Offline, search: Search) -> None:
        self._peer = peer
        self._search = search
        self._earliest = inf  # of the events that were read
        self._begins = 0.0  # the time of the first event there is, once all have been read
        self._has_history = True

    def find(self, most: int) -> Iterator[Record]:
        """The newest messages that suit, `most` at most, the newest first. `state`: of a message in the queue as `queue list` has
        it; "delivered", "bounced" (to one recipient at least), "gone" (deleted, or discarded), or "unknown" (a worker that may
        have it does not answer). Times are seconds UTC; `subject`: None where it was not read."""
        inside = self._queued(most) if self._search.needs_queue else []
        known = {record["id"] for record in inside}
        outside = self._left(known) if self._search.needs_history else iter(())
        return islice(heapq.merge(inside, outside, key=lambda record: -record["arrived"]), most)

    def notes(self, found: int, most: int) -> Iterator[str]:
        """What an answer that has been read does not have, one sentence each. `found`: so many messages, of `most` at most."""
        since = self._search.chosen.get("newer", 0) / 1000
        if self._search.subject:
            yield "only messages in the queue were searched, since the log has no Subject"
        elif self._search.needs_history and not self._has_history:
            yield "only messages in the queue were searched: there is no history (log.history)"
        elif since < self._begins < inf and (since or not found):
            yield f"the history begins {when(self._begins)}: what was accepted before and has left the queue is not found"
        if found >= most:
            yield "there may be older ones: --limit"

    # The queue

    def _queued(self, most: int) -> list[Record]:
        found = heapq.nlargest(most, self._of_pages(), key=lambda record: parse_id(record["id"]))
        return sorted(found, key=lambda record: -record["arrived"])

    def _of_pages(self) -> Iterator[Record]:
        decode = msgspec.json.Decoder().decode
        for shard, idents, lines in pages(self._peer, self._search.chosen):
            rows = [_of_row(decode(line)) for line in lines]
            chosen = [pair for pair in zip(idents, rows, strict=True) if self._search.has_status(pair[1])]
            yield from self._of_subject(shard, chosen) if self._search.subject else (row for _, row in chosen)

    def _of_subject(self, shard: int, rows: list[tuple[int, Record]]) -> Iterator[Record]:
        at = 0
        while at < len(rows):
            found = asked(self._peer, "subjects", shard=shard, idents=[ident for ident, _ in rows[at:]])
            if not found:  # the worker does not answer
                return
            for subject, (_, record) in zip(found, rows[at:], strict=False):
                if subject is not None and contains(subject, self._search.subject):
                    yield record | {"subject": subject}
            at += len(found)

    # The history

    def _left(self, known: set[str]) -> Iterator[Record]:
        """The messages of the history that suit, but for those that are known."""
        for record in self._of_history():
            if record["id"] in known or not self._search.may_suit(record):
                continue
            settled = record if record["state"] else self._settled(record)
            if settled is not None and self._search.has_status(settled):
                yield settled

    def _settled(self, record: Record) -> Record | None:
        """A message whose end is not in the history, with its state; None where that cannot suit."""
        wanted = self._search.statuses
        if wanted and "gone" not in wanted and not wanted & self._search.ends(record):
            return None  # what is in the queue with another status was found there
        row = asked(self._peer, "message", ident=record["id"])
        if row is None:
            return record | {"state": "unknown" if missing() else "gone"}
        return record | _of_row(row) | {"message_id": record["message_id"]}

    def _of_history(self) -> Iterator[Record]:
        """The messages whose beginning is in the history. `state`: "" where their end is not."""
        fates: dict[str, _Fate] = {}
        begun: OrderedDict[str, None] = OrderedDict()
        for event in self._events():
            self._earliest = min(self._earliest, event.ts)
            if event.id in begun:  # what came by LMTP, and filters that judged it before
                continue
            note = _NOTES.get(event.event)
            if note is not None:
                note(fates.setdefault(event.id, _Fate()), event)
                continue
            why = _beginning(event)
            if why is None:
                continue
            begun[event.id] = None
            if len(begun) > REMEMBERED:
                begun.popitem(last=False)
            fate = fates.pop(event.id, _Fate())
            if why != _REFUSED:
                yield _of_event(event, fate, why)
        self._begins = self._earliest

    def _events(self) -> "Iterator[_Event]":
        """The events of messages, the last first."""
        chosen = self._search.chosen
        if "ident" in chosen:
            found = asked(self._peer, "history", ident=format_id(chosen["ident"]))
            return iter([msgspec.convert(event, _Event) for event in reversed(found)])
        workers: dict[int, list[tuple[int, str, int]]] = {}
        files = asked(self._peer, "history_files")
        self._has_history = bool(files)
        for name, octets in files:
            worker, number, _ = name.split(".")
            workers.setdefault(int(worker), []).append((int(number), name, octets))
        streams = [self._backwards(sorted(files, reverse=True), chosen.get("newer", 0) / 1000) for files in workers.values()]
        return heapq.merge(*streams, key=lambda event: -event.ts)

    def _backwards(self, files: list[tuple[int, str, int]], since: float) -> "Iterator[_Event]":
        """The events of one process, the last first, up to those before `since` (seconds UTC)."""
        decode = msgspec.json.Decoder(_Event).decode
        for _, name, end in files:
            while end and (text := asked(self._peer, "history_piece", name=name, end=end)):
                end, latest = end - len(text), 0.0
                for line in reversed(text.split(b"\n")):
                    try:
                        event = decode(line)
                    except msgspec.DecodeError:  # cut off, or being written
                        continue
                    latest = max(latest, event.ts)
                    yield event
                if 0 < latest < since:
                    return


class _Event(msgspec.Struct):
    """What is read of a record of the log."""

    event: str
    ts: float
    id: str = ""
    sender: str = ""
    recipients: list[str] = []
    recipient: str = ""
    size: int = 0
    client: str = ""
    application: str = ""
    message_id: str = ""
    reply: str = ""
    result: str = ""
    by: str = ""
    reason: str = ""
    filter: str = ""
    action: str = ""
    rule: str = ""
    verdict: str = ""
    enforced: bool = False


class _Fate:
    """What became of a message, as far as the history tells: its recipients' (state, reply), and why it went otherwise ("")."""

    __slots__ = ("recipients", "why")

    def __init__(self) -> None:
        self.recipients: dict[str, tuple[str, str]] = {}
        self.why = ""


def _delivered(fate: _Fate, event: _Event) -> None:
    for address in event.recipients:
        fate.recipients.setdefault(address, ("delivered", event.reply))


def _bounced(fate: _Fate, event: _Event) -> None:
    fate.recipients.setdefault(event.recipient, ("failed", event.reply))


def _deferred(fate: _Fate, event: _Event) -> None:
    fate.recipients.setdefault(event.recipient, ("pending", event.reply))


def _left_quarantine(fate: _Fate, event: _Event) -> None:
    if event.result in ("deleted", "expired", "displaced"):
        fate.why = fate.why or f"{event.result} from the quarantine ({event.by}: {event.reason})"


def _scanned(fate: _Fate, event: _Event) -> None:
    if event.result == "discarded":
        fate.why = fate.why or f"discarded: {event.reason}"


def _deleted(fate: _Fate, event: _Event) -> None:
    fate.why = fate.why or f"deleted by the {event.by}"


_NOTES: dict[str, Callable[[_Fate, _Event], None]] = {
    "delivered": _delivered,
    "bounced": _bounced,
    "deferred": _deferred,
    "quarantine": _left_quarantine,
    "deleted": _deleted,
    "scanned": _scanned,
}


def _beginning(event: _Event) -> str | None:
    """Of an event with which a message begins: "", or why there is none behind it (_REFUSED: its client knows). Others: None."""
    if event.event in ("queued", "received"):
        return ""
    what = {"filtered": event.action, "rule": event.verdict if event.enforced else ""}.get(event.event)
    if what in ("reject", "tempfail"):
        return _REFUSED
    if what != "discard":
        return None
    return f"discarded by {'filter' if event.filter else 'rule'} {event.filter or event.rule}" + f": {event.reason}" * bool(
        event.reason
    )


def _of_event(event: _Event, fate: _Fate, why: str) -> Record:
    ends = dict.fromkeys(event.recipients, ("pending", "")) | fate.recipients
    states = {state for state, _ in ends.values()}
    why = why or fate.why
    return {
        "id": event.id,
        "state": "gone" if why else "" if "pending" in states else "bounced" if "failed" in states else "delivered",
        "arrived": event.ts,
        "sender": event.sender,
        "recipients": [{"address": one, "state": state, "reply": reply} for one, (state, reply) in ends.items()],
        "size": event.size,
        "client": event.client,
        "application": event.application,
        "message_id": event.message_id,
        "subject": None,
        "why": why,
    }


def _of_row(row: dict[str, Any]) -> Record:
    """A message in the queue, from its row of `queue list`."""
    return {
        **{name: row[name] for name in ("id", "state", "arrived", "sender")},
        "recipients": [{"address": one["address"], "state": one["state"], "reply": one["last"]} for one in row["recipients"]],
        **{name: row[name] for name in ("size", "client", "application")},
        "message_id": "",
        "subject": row["quarantine"]["subject"] if row["quarantine"] else None,
        "why": row["held_for"],
    }


_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d))?\Z")


def moment(option: str, text: str) -> float:
    """The point in time (seconds UTC) of an option: a duration before now ("2h"), a time of day ("09:30": the last one), a day or
    a point in time ("2026-11-27", "2026-11-27 09:30:00Z"), or "@" and seconds since 1970. Without a zone it is local time. Ends
    the program (64) where it is none of these."""
    try:
        if text.startswith("@"):
            return datetime.fromtimestamp(float(text[1:]), UTC).timestamp()
        if re.match(r"[\d.]+\s*\w*\Z", text):
            return time.time() - parse_duration(text)
        clock, now = _CLOCK.match(text), datetime.now()
        if clock is None:
            return datetime.fromisoformat(text).timestamp()
        at = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=int(clock[3] or 0), microsecond=0)
        return (at if at <= now else at - timedelta(days=1)).timestamp()
    except (ValueError, OverflowError, OSError):
        fail(64, f'{option} {text}: expected a duration ("2h"), a time of day ("09:30"), or a day and time ("2026-11-27 09:30")')
