"""The ledger: every message that was sent beside every copy that has arrived.

Both are kept in files, too, so that a sink on another machine can be compared later. Times are those of CLOCK_MONOTONIC; the head
of a file says how far that is from the time of day, and from which boot it is.
"""

import contextlib
import json
import os
import struct
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from relaymta.bench.messages import Recipients, digest_of_address
from relaymta.errors import RelayError

__all__ = ["Account", "Arrival", "Arrivals", "Sent", "State", "account", "arrivals_of", "head_of", "read_head"]

ROW = struct.Struct("=QQQQdIB3x")  # run, serial, digest, recipient, time, octets, answered
EXAMPLES = 10  # messages of a kind that are named
_KINDS = ("sent", "arrived")


class State(IntEnum):
    """What has become of a message that was to be sent."""

    UNSENT = 0  # the connection failed before the final dot, or there was no time
    ACCEPTED = 1  # 250
    REJECTED = 2  # 5xx
    DEFERRED = 3  # 4xx before the final dot
    IN_DOUBT = 4  # 4xx, or no reply, after the final dot


class LedgerError(RelayError):
    """A file that is no ledger."""


def head_of(kind: str, **more: Any) -> dict[str, Any]:
    """The head of a ledger's file."""
    return {"relaymta bench": kind, "boot": _boot(), "offset": time.time() - time.monotonic(), **more}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_head(file: BinaryIO, kind: str, path: Path) -> dict[str, Any]:
    """The head of a file, which is to be of this kind ("sent" or "arrived"). LedgerError."""
    try:
        found = json.loads(file.readline(65536))
        if found["relaymta bench"] != kind:
            raise ValueError
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise LedgerError(f"{path}: not a ledger of messages that {'were sent' if kind == 'sent' else 'have arrived'}") from None
    return found  # type: ignore[no-any-return]


# What was sent


class Sent:
    """The messages of one run, by their serial. Times: 0, it has not come to that."""

    def __init__(self, run: int, recipients: Recipients) -> None:
        self.run = run
        self.recipients = recipients
        self.intended = array("d")  # when it was due
        self.dotted = array("d")  # when its final dot was written
        self.answered = array("d")
        self.digests = array("Q")
        self.states = bytearray()
        self.names: list[bytes] = []  # what the relay calls it, where it says so
        self.refused: dict[int, set[int]] = {}  # serial -> the numbers of recipients that the relay refused
        self.replies: dict[bytes, int] = {}  # other replies than 250 to the dot, and how often

    def __len__(self) -> int:
        return len(self.states)

    def add(self, intended: float, digest: int) -> int:
        """A new message; its serial. `_next` of the generator is the same number."""
        self.intended.append(intended)
        self.dotted.append(0.0)
        self.answered.append(0.0)
        self.digests.append(digest)
        self.states.append(State.UNSENT)
        self.names.append(b"")
        return len(self.states) - 1

    def count(self, state: State) -> int:
        """How many are in a state."""
        return self.states.count(state)

    def note_reply(self, reply: bytes) -> None:
        """Count a reply that refuses; of replies with different texts only the first 20."""
        if reply in self.replies or len(self.replies) < 20:
            self.replies[reply] = self.replies.get(reply, 0) + 1

    def write(self, path: Path) -> None:
        """Write it to a file. OSError."""
        head = head_of(
            "sent", run=self.run, count=len(self), each=self.recipients.each,
            refused={str(serial): sorted(numbers) for serial, numbers in self.refused.items()},
        )  # fmt: skip
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for column in (self.intended, self.dotted, self.answered, self.digests):
                column.tofile(file)
            file.write(self.states)
            file.write(
                json.dumps([[one.decode("ascii", "replace") for one in self._addresses(n)] for n in range(len(self))]).encode()
            )

    def _addresses(self, serial: int) -> list[bytes]:
        return self.recipients.of(serial) if self.recipients.each > 1 else []

    @staticmethod
    def read(path: Path) -> "tuple[Sent, dict[str, Any]]":
        """What `write` has written, and the head. OSError, LedgerError."""
        with path.open("rb") as file:
            head = read_head(file, "sent", path)
            try:
                count, each = int(head["count"]), int(head["each"])
                sent = Sent(int(head["run"]), Recipients(each))
                for column in (sent.intended, sent.dotted, sent.answered, sent.digests):
                    column.fromfile(file, count)
                sent.states = bytearray(file.read(count))
                named = json.loads(file.read())
                sent.refused = {int(serial): set(numbers) for serial, numbers in head["refused"].items()}
            except (ValueError, KeyError, TypeError, EOFError, AttributeError):
                raise LedgerError(f"{path}: it is cut off or damaged") from None
        if len(sent.states) != count or len(named) != count:
            raise LedgerError(f"{path}: it is cut off or damaged")
        sent.names = [b""] * count
        sent.recipients = _Named(each, named)
        return sent, head


class _Named(Recipients):
    """Recipients as a file names them."""

    def __init__(self, each: int, named: list[list[str]]) -> None:
        super().__init__(each)
        self._named = named

    def of(self, serial: int) -> list[bytes]:
        return [address.encode() for address in self._named[serial]] or [b""]


# What has arrived


class Arrival(NamedTuple):
    """A copy of a message, for one recipient, at the sink. `answered`: 250 was written; False: the connection ended before that,
    so that the relay has to try again."""

    run: int
    serial: int
    digest: int
    recipient: int
    at: float
    octets: int
    answered: bool


class Arrivals:
    """The file that a sink writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._file.write(json.dumps(head_of("arrived")).encode() + b"\n")
        self._rows: list[bytes] = []

    def note(self, arrival: Arrival) -> None:
        """Keep one, until `flush`."""
        self._rows.append(ROW.pack(*arrival))

    def flush(self) -> None:
        """Write those that were kept. OSError."""
        if self._rows:
            self._file.write(b"".join(self._rows))
            self._rows.clear()


def arrivals_of(path: Path) -> tuple[Iterator[Arrival], dict[str, Any]]:
    """The rows of a sink's file, and its head. What is cut off at its end is passed over. OSError, LedgerError."""
    with path.open("rb") as file:
        head = read_head(file, "arrived", path)
        rows = file.read()
    whole = len(rows) - len(rows) % ROW.size
    return (Arrival(*row) for row in ROW.iter_unpack(rows[:whole])), head


class Counter:
    """How many rows a sink has written, while it writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._head = 0

    def __call__(self) -> int:
        with contextlib.suppress(OSError):
            if not self._head:
                with self._path.open("rb") as file:
                    self._head = len(file.readline())
            return (os.stat(self._path).st_size - self._head) // ROW.size
        return 0


# Both


@dataclass
class Account:
    """What the comparison shows. Copies are counted by recipient, everything else by message."""

    offered: int = 0
    accepted: int = 0
    rejected: int = 0
    deferred: int = 0
    in_doubt: int = 0
    unsent: int = 0
    expected: int = 0  # copies: recipients of accepted messages
    arrived: int = 0  # copies of these
    queued: int = 0  # copies that are still in the relay's queue
    lost: int = 0  # copies
    altered: int = 0
    duplicated: int = 0  # copies that came again although the sink had said 250
    repeated: int = 0  # copies that came again since the sink had not answered
    foreign: int = 0  # copies of other runs, or of no message that was sent
    arrived_in_doubt: int = 0  # of the messages in doubt: those that have arrived
    checked: bool = True  # there was a sink to compare with
    queue_known: bool = True  # it is known what is in the relay's queue
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: "array[float]" = field(default_factory=lambda: array("d"), repr=False)  # by serial: when all of its copies were there

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, altered, or duplicated without a reason."""
        return not (self.lost or self.altered or self.duplicated)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {name: value for name, value in vars(self).items() if name != "first"} | {"sound": self.sound}

    def name(self, kind: str, what: str) -> None:
        """Keep an example."""
        named = self.examples.setdefault(kind, [])
        if len(named) < EXAMPLES:
            named.append(what)


def account(sent: Sent, arrivals: Iterator[Arrival] | None, queued: set[bytes] | None, shift: float = 0.0) -> Account:
    """Compare. `arrivals`: None, there was no sink. `queued`: the names of the messages in the relay's queue, None: not known.
    `shift`: seconds to add to the sink's times."""
    found = Account(
        offered=len(sent), accepted=sent.count(State.ACCEPTED), rejected=sent.count(State.REJECTED),
        deferred=sent.count(State.DEFERRED), in_doubt=sent.count(State.IN_DOUBT), unsent=sent.count(State.UNSENT),
    )  # fmt: skip
    found.checked, found.queue_known = arrivals is not None, queued is not None
    found.first = array("d", bytes(8 * len(sent)))
    if arrivals is None:
        return found
    copies = _Copies(sent, found)
    for arrival in arrivals:
        copies.take(arrival, shift)
    _missing(sent, copies, found, queued or set())
    return found


class _Copies:
    """The copies that have come of each recipient of each message. `marks`: 1, it has come; 2: the sink has said 250."""

    def __init__(self, sent: Sent, found: Account) -> None:
        self.sent, self.found = sent, found
        self.each = sent.recipients.each
        self.marks = bytearray(len(sent) * self.each)

    def take(self, arrival: Arrival, shift: float) -> None:
        """Note one."""
        sent, found, serial = self.sent, self.found, arrival.serial
        if arrival.run != sent.run or serial >= len(sent):
            found.foreign += 1
            return
        number = self._number(serial, arrival.recipient)
        if number is None:
            found.foreign += 1
            found.name("foreign", f"{serial}: for a recipient that it was not sent to")
            return
        if arrival.digest != sent.digests[serial]:
            found.altered += 1
            found.name("altered", self._named(serial, number))
        place = serial * self.each + number
        mark = self.marks[place]
        if mark & 2:
            found.duplicated += 1
            found.name("duplicated", self._named(serial, number))
        elif mark:
            found.repeated += 1
        else:
            found.first[serial] = max(found.first[serial], arrival.at + shift)
        self.marks[place] = mark | (3 if arrival.answered else 1)

    def _number(self, serial: int, recipient: int) -> int | None:
        """Which recipient this is: of a message with one recipient that one, since a relay may rewrite it."""
        if self.each == 1:
            return 0
        for number, address in enumerate(self.sent.recipients.of(serial)):
            if digest_of_address(address) == recipient:
                return number
        return None

    def _named(self, serial: int, number: int) -> str:
        name = self.sent.names[serial].decode("latin-1")
        return f"{self.sent.run:016x}-{serial:x}" + (f" ({name})" if name else "") + (f" recipient {number}" * (self.each > 1))


def _missing(sent: Sent, copies: _Copies, found: Account, queued: set[bytes]) -> None:
    each = copies.each
    for serial, state in enumerate(sent.states):
        marks = copies.marks[serial * each : serial * each + each]
        if state == State.IN_DOUBT:
            found.arrived_in_doubt += any(marks)
        if state != State.ACCEPTED:
            continue
        refused = sent.refused.get(serial, ())
        missing = [number for number, mark in enumerate(marks) if not mark and number not in refused]
        found.expected += each - len(refused)
        found.arrived += each - len(refused) - len(missing)
        if not missing:
            continue
        found.first[serial] = 0.0
        if sent.names[serial] and sent.names[serial] in queued:
            found.queued += len(missing)
            continue
        found.lost += len(missing)
        for number in missing:
            found.name("lost", copies._named(serial, number))
