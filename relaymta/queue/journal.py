"""The event journal of a shard: what has become of messages, for programs that want to know (report/).

The writer thread notes it while it fills a transaction, so each event is of a change that this transaction makes; they are
written before it is committed, and are there only if it is (disk/journal.py). A record is about one message, with those of its
recipients for whom the same has happened; `events` makes an event of each. What is about DSNs of the relay itself is not noted.
"""

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.journal import JournalWriter, Rows, Written
from relaymta.ident import format_id
from relaymta.proto.envelope import DSN, PERMANENT, SUCCESS, Envelope, encode
from relaymta.proto.said import Said
from relaymta.queue.entry import Entry, Outcome, Put

__all__ = ["JOURNAL", "NUMBERED", "Journal", "JournalSettings", "Record", "decode_records", "events", "stamp"]

JOURNAL: Final = b"journal"  # the row in meta: where it ends; and, with more behind it, the rows of its tail
TOGETHER: Final = 256  # events in one frame, about
SHOWN: Final = 500  # characters of a reply

# Why a message was bounced: a reply or a cause that is permanent; its time was over; an operator has bounced it, or deleted it;
# a filter has discarded it; in the quarantine its time was over, or there was no room for it.
REASONS: Final = ("permanent", "expired", "operator", "deleted", "discarded", "quarantine expired", "quarantine displaced")


class JournalSettings(NamedTuple):
    """`octets`: what the journal of one shard may have, 0: events are only numbered; `keep_ms`: for how long its records are
    kept."""

    octets: int
    keep_ms: int


NUMBERED: Final = JournalSettings(0, 0)  # nobody is told now; who is told again later lacks events, and is to know how many


_NO_MORE: dict[str, Any] = {}


class Party(msgspec.Struct, array_like=True, gc=False):
    """A recipient in a record, and the reply or cause: as of Attempt."""

    address: str
    code: int = 0
    enhanced: str = ""
    text: str = ""
    peer: str = ""
    phase: str = ""
    cause: str = ""  # one of CATEGORIES
    in_doubt: bool = False
    reason: str = ""  # one of REASONS


class Record(msgspec.Struct, array_like=True, gc=False):
    """What has become of a message for these recipients. `time`: ms UTC; `about`: of the message, as its envelope has it: sender,
    application, user, tags, Message-ID, traceparent; `attempt`: its number, 0: there was none; `more`: by its kind."""

    kind: str
    time: int
    ident: int
    about: tuple[str, str, str, list[str], str, str]
    parties: list[Party]
    attempt: int = 0
    more: dict[str, Any] = {}


decode_records = msgspec.msgpack.Decoder(list[Record]).decode


class Journal:
    """Notes on the writer thread, within a transaction; `files` writes them."""

    def __init__(self, files: JournalWriter, clock: ShardClock) -> None:
        self.files = files
        self._clock = clock
        self._noted: list[tuple[Any, ...]] = []  # records, in the transaction under way

    @classmethod
    def opened(
        cls, folder: Path, rows: Rows, clock: ShardClock, settings: JournalSettings, brim: Callable[[], bool]
    ) -> "Journal":
        """The journal in a folder. `rows`: of the store; `brim()`: as of JournalWriter."""
        return cls(JournalWriter(folder, rows, clock.now(), settings.octets, settings.keep_ms, brim), clock)

    def mark(self) -> int:
        """What is noted so far, for `undo`."""
        return len(self._noted)

    def undo(self, mark: int) -> None:
        """Forget what was noted behind a mark."""
        del self._noted[mark:]

    def write(self, now: int) -> Written | None:
        """As `JournalWriter.write`, of what was noted."""
        noted, self._noted = self._noted, []
        first, count = 0, 0
        for at, record in enumerate(noted, 1):
            count += len(record[4])
            if count >= TOGETHER or at == len(noted):
                self._stage(noted[first:at], count)
                first, count = at, 0
        return self.files.write(now)

    def _stage(self, records: list[tuple[Any, ...]], count: int) -> None:
        try:
            self.files.add(encode(records) if self.files.keeps else b"", count)
        except Exception:  # a defect: what cannot be encoded has no event, and must not fail the group
            traceback.print_exc()

    def forget(self, rows: Rows) -> None:
        """As `JournalWriter.forget`."""
        self._noted = []
        self.files.forget(rows)

    def _note(
        self, kind: str, ident: int, envelope: Envelope, parties: Sequence[Sequence[Any]], moment: int, attempt: int = 0,
        more: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        about = (
            envelope.sender, envelope.application, envelope.user, envelope.tags, envelope.message_id, envelope.traceparent,
        )  # fmt: skip
        self._noted.append((kind, moment, ident, about, parties, attempt, more or _NO_MORE))

    def accepted(self, puts: Iterable[Put]) -> None:
        """These messages come into the queue."""
        for put in puts:
            envelope = put.envelope
            if not envelope.flags & DSN and not put.replaces and put.restored is None:
                parties = [(address,) for address in envelope.recipients]
                more = {"size": envelope.size, "client": envelope.client}
                self._note("accepted", put.ident, envelope, parties, envelope.arrived, 0, more)

    def ended(self, outcome: Outcome) -> None:
        """An outcome is recorded, of which each recipient has come to one of three ends."""
        entry = outcome.entry
        if entry.envelope.flags & DSN:
            return
        try:
            if outcome.success:
                self._delivered(entry)
            else:
                self._each(outcome, entry)
        except Exception:  # a defect must not end the thread each time that it starts, and stop all mail
            traceback.print_exc()

    def _delivered(self, entry: Entry) -> None:
        peer, (code, text), *_ = entry.route if isinstance(entry.route, tuple) else ("", (0, b""))
        shown = text[:SHOWN].decode("utf-8", "replace")
        parties = [(address, code, "", shown, peer) for _, address in entry.recipients]
        self._note("delivered", entry.ident, entry.envelope, parties, wall_ms(), entry.attempts + 1)

    def _each(self, outcome: Outcome, entry: Entry) -> None:
        late = {id(attempt) for _, attempt, expired in outcome.failed if expired}
        kinds: dict[str, list[tuple[Any, ...]]] = {}
        addresses = entry.envelope.recipients
        for index, one in outcome.results.items():
            kind = "delivered" if one.kind == SUCCESS else "bounced" if one.kind == PERMANENT else "deferred"
            party: tuple[Any, ...] = (addresses[index], one.code, one.enhanced, one.text[:SHOWN], one.peer, one.phase)
            if kind != "delivered":
                because = one.because
                why = "expired" if id(one) in late else "operator" if because == "operator" else "permanent"
                party += (because, one.in_doubt, why if kind == "bounced" else "")
            kinds.setdefault(kind, []).append(party)
        for kind, parties in kinds.items():
            more: dict[str, Any] = {"next": self._clock.wall(outcome.retry_at)} if kind == "deferred" else {}
            if kind == "bounced":
                more = {"recipients": len(addresses)}
            self._note(kind, entry.ident, entry.envelope, parties, wall_ms(), entry.attempts + 1, more)

    def changed(self, kind: str, ident: int, envelope: Envelope, reason: str = "", more: dict[str, Any] | None = None) -> None:
        """A message is "held" or "released", or "bounced" otherwise than by an outcome (`reason`: one of REASONS), for those of
        its recipients who have not come to an end."""
        if envelope.flags & DSN:
            return
        addresses = _pending(envelope)
        parties = (
            [(address, 0, "", "", "", "", "", False, reason) for address in addresses] if reason else [(a,) for a in addresses]
        )
        if kind == "held":
            more = {"reason": envelope.held_for}
        elif kind == "bounced":
            more = {"recipients": len(envelope.recipients)}
        self._note(kind, ident, envelope, parties, wall_ms(), 0, more)

    def complained(self, ident: int, envelope: Envelope, addresses: Sequence[str], more: dict[str, Any]) -> None:
        """Recipients have complained of a message, which need not be in the queue any more. `more`: what the event says beyond
        what all say: strings and numbers by name."""
        self._note("complained", ident, envelope, [(address,) for address in addresses], wall_ms(), 0, more)


def _pending(envelope: Envelope) -> list[str]:
    """The recipients that a message still waits for."""
    everyone, places = envelope.recipients, envelope.placements
    if not places or any(place.indexes is None for place in places):
        return everyone
    return [everyone[index] for index in sorted({index for place in places for index in place.indexes or ()})]


# What is read


@functools.lru_cache(1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def stamp(milliseconds: int) -> str:
    """A time as RFC 3339 has it, in UTC."""
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


def events(number: int, records: list[Record]) -> Iterator[dict[str, Any]]:
    """The events of records, the first of which has this number: one for each recipient, as a webhook's JSON has them
    (docs/webhooks.md)."""
    for record in records:
        yield from events_of(number, record)
        number += len(record.parties)


def events_of(number: int, record: Record) -> Iterator[dict[str, Any]]:
    """As `events`, of one record."""
    message, moment = format_id(record.ident), stamp(record.time)
    sender, application, user, tags, message_id, traceparent = record.about
    for at, party in enumerate(record.parties):
        found: dict[str, Any] = {
            "id": f"{message}-{number + at}", "event": record.kind, "time": moment, "message": message, "sender": sender,
            "recipient": party.address, "application": application, "user": user, "message_id": message_id, "tags": tags,
        }  # fmt: skip
        if traceparent:
            found["traceparent"] = traceparent
        yield found | _OF_KIND.get(record.kind, _other)(record, party)


def _other(record: Record, party: Party) -> dict[str, Any]:
    return record.more


def _reply(party: Party) -> dict[str, Any]:
    enhanced, text = party.enhanced, party.text
    if party.code and not enhanced:
        said = Said(party.code, text.encode(), "final")
        enhanced, text = said.enhanced, said.text
    return {"code": party.code, "enhanced": enhanced, "text": text}


def _delivered(record: Record, party: Party) -> dict[str, Any]:
    return {"attempt": record.attempt, "peer": party.peer, "reply": _reply(party)}


def _deferred(record: Record, party: Party) -> dict[str, Any]:
    why = {"phase": party.phase, "cause": party.cause, "in_doubt": party.in_doubt, "next": stamp(record.more["next"])}
    return _delivered(record, party) | why


def _bounced(record: Record, party: Party) -> dict[str, Any]:
    why = {"reason": party.reason, "phase": party.phase, "cause": party.cause}
    return why | _delivered(record, party) | record.more


_OF_KIND: Final[dict[str, Callable[[Record, Party], dict[str, Any]]]] = {
    "delivered": _delivered, "deferred": _deferred, "bounced": _bounced,
}  # fmt: skip
