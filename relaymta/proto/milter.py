"""The milter protocol of Sendmail and Postfix, version 6, on the MTA's side, without I/O: what is said over one connection.

A frame is its length (4 octets), a letter, and data. The MTA negotiates (`O`), then tells events; to most of them the filter owes
one answer. Its letters:

    C connect   H HELO   M MAIL   R RCPT   T DATA   L a header field   N end of the header   B body   E end of the message
    A the message is over (no answer)   U unknown command   Q quit (no answer)   D macros for the event behind them (no answer)

Events may be told before those in front of them are answered: `due` has what is still to be answered, in order. Once a filter has
said its last word, it may be silent about all that it was told behind that, or not: such a conversation is `spent`.

An event that the filter does not want is not told, but its macros are, as Postfix has it; not those of the end of the header, nor
of events that the filter's version does not know. Data behind an answer that has none (`c`) is ignored, as by Sendmail; Postfix
closes the connection.

There is no specification; https://github.com/avar/sendmail-pmilter/blob/master/doc/milter-protocol.txt describes version 2, and
the include files of libmilter (mfdef.h) name the rest. Macros: https://www.postfix.org/MILTER_README.html#macros
"""

import ipaddress
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from relaymta.proto.address import mail_argument, parse_parameters, rcpt_argument
from relaymta.proto.edits import EDITS_MOST, Append, Change, Edit, Insert, shown, spaced
from relaymta.proto.printable import printable

__all__ = [
    "ACTIONS", "STEPS", "VERSION", "Changes", "Conversation", "MilterError", "Piece", "Progress", "Said", "Terms", "smtp_reply",
]  # fmt: skip

VERSION: Final = 6
ACTIONS: Final = 0x1FF
STEPS: Final = 0x1FFFFF
DATA_MOST: Final = 65535  # octets in a frame: libmilter closes the connection for more
FRAME_MOST: Final = (1 << 20) + 1  # octets of a frame of the filter's
RECIPIENTS_MOST: Final = 100  # that are added
REMOVED_MOST: Final = 1000
CHANGES_MOST: Final = 262144  # octets of all changes of a message, but its body
CHANGE_LEAST: Final = 32  # octets for which each of them counts beside its own, and one that cannot be made
REASON_MOST: Final = 200
ADDRESS_MOST, PARAMETERS_MOST = 1026, 1024  # octets; a path of the dialogue has no more
LISTS_MOST: Final = 16384  # octets of the names of macros for all events
LINES_MOST, LINE_MOST = 20, 480  # of a reply; RFC 5321 4.5.3.1.5 has 512 octets for a line

# Steps (SMFIP_*): by the letter of an event, that it is not told, and that it is not answered.
_NOT_TOLD = {"C": 0x1, "H": 0x2, "M": 0x4, "R": 0x8, "B": 0x10, "L": 0x20, "N": 0x40, "U": 0x100, "T": 0x200}
_NOT_ANSWERED = {
    "L": 0x80, "C": 0x1000, "H": 0x2000, "M": 0x4000, "R": 0x8000, "T": 0x10000, "U": 0x20000, "N": 0x40000, "B": 0x80000,
}  # fmt: skip
_SPACES = 0x100000  # behind the colon of a field all is told and written as it is (SMFIP_HDR_LEADSPC)
_STAGES = "CHMRTEN"  # as SYMLIST numbers them
_SINCE = {"U": 3, "T": 4}  # versions that have these events; all have the others
_WORDS = {"a": "accept", "r": "reject", "t": "tempfail", "d": "discard", "4": "shutdown", "f": "conn_fail"}
_CODE = re.compile(rb"([45][0-5][0-9])(?:[ -]|\Z)")
_ENHANCED = re.compile(rb"([245])\.[0-9]{1,3}\.[0-9]{1,3}(?= |\Z)")
_NOT_SHOWN = re.compile(rb"[^ -~]")


class MilterError(Exception):
    """An answer that makes no sense; the connection cannot be used any more."""


class Terms(NamedTuple):
    """What was agreed upon: version, actions (SMFIF_*) and steps (SMFIP_*); `macros`: the names that the filter asked for, by the
    letter of an event, where it has asked."""

    version: int
    actions: int
    steps: int
    macros: dict[str, frozenset[str]]


class Said(NamedTuple):
    """The answer to an event: accept, reject, tempfail, discard, shutdown, conn_fail, and, to R and E, continue: to others
    nothing follows from that. `reply`: a whole SMTP reply, for a refusal that has its own; b"" for others."""

    event: str
    word: str
    reply: bytes = b""


_TAKEN, _DONE = Said("R", "continue"), Said("E", "continue")
_C = 0x63
_CONTINUES = re.compile(rb"(?>(?:\x00\x00\x00\x01c)+)")


class Piece(NamedTuple):
    """Of a new body."""

    octets: bytes


class Progress(NamedTuple):
    """It is still at work."""


@dataclass(slots=True)
class Changes:
    """What a filter wants to have changed of a message. `added`: recipients with their parameters; `sender` as well;
    `quarantine`: why the message is to be held; `dropped`: changes that cannot be made."""

    edits: list[Edit] = field(default_factory=list)
    added: list[tuple[str, str]] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    sender: tuple[str, str] | None = None
    quarantine: str | None = None
    replaced: bool = False
    dropped: int = 0


class Conversation:
    """See above. Methods that tell something return the frames to write, without such as the filter does not want. `last`: the
    word that has ended the message, or the session (at C and H); `error`: an answer that made no sense: nothing behind it is
    read; `unshown`: header fields that were too long."""

    __slots__ = (
        "_buffer",
        "_needs",
        "_room",
        "_skipped",
        "changes",
        "due",
        "error",
        "last",
        "skips",
        "spent",
        "terms",
        "unshown",
    )

    def __init__(self) -> None:
        self.terms: Terms | None = None
        self.due: deque[str] = deque()
        self.changes = Changes()
        self.last: Said | None = None
        self.error: MilterError | None = None
        self.skips = self.spent = False
        self.unshown = 0
        self._skipped: dict[bytes, list[int]] = {}  # by name, in lower case: the instances that were not shown
        self._room = CHANGES_MOST
        self._buffer = bytearray()
        self._needs = 0  # octets in `_buffer`, until there is anything to be read in it

    # What the filter is told

    def negotiate(self) -> bytes:
        """The first frame of all."""
        self.due.append("O")
        return _frame(b"O", b"".join(number.to_bytes(4) for number in (VERSION, ACTIONS, STEPS)))

    def connect(self, host: str, address: str, port: int, macros: Mapping[str, str]) -> bytes:
        """A client. `host`: its verified name, else its address in brackets; `port`: 0 if it is unknown."""
        try:
            family = b"6" if ipaddress.ip_address(address).version == 6 else b"4"
            told = family + port.to_bytes(2) + address.encode() + b"\0"
        except ValueError:
            told = b"U"
        return self._told("C", _octets(host) + b"\0" + told, macros)

    def helo(self, name: str, macros: Mapping[str, str]) -> bytes:
        """EHLO or HELO."""
        return self._told("H", _octets(name) + b"\0", macros)

    def mail(self, sender: str, parameters: Sequence[str], macros: Mapping[str, str]) -> bytes:
        """MAIL: a message begins."""
        self.changes, self.last, self.skips, self.unshown, self._room = Changes(), None, False, 0, CHANGES_MOST
        self._skipped = {}
        return self._told("M", _arguments(sender, parameters), macros)

    def rcpt(self, recipient: str, parameters: Sequence[str], macros: Mapping[str, str]) -> bytes:
        """RCPT."""
        return self._told("R", _arguments(recipient, parameters), macros)

    def data(self, macros: Mapping[str, str]) -> bytes:
        """DATA."""
        return self._told("T", b"", macros)

    def header(self, head: bytes, macros: Mapping[str, str]) -> list[bytes]:
        """All fields of a header, as `edits.shown` has them, and its end. Folds are LF; behind the colon one space is left out,
        unless it was agreed that none is."""
        steps = self.terms.steps if self.terms is not None else 0
        frames: list[bytes] = []
        if not steps & 0x20:
            eaten, nul = not steps & _SPACES, b"\0" in head
            parts: list[bytes] = []
            hidden: set[int] = set()
            for name, line in shown(head):
                value = line[line.index(b":", len(name)) + 1 :]
                if nul or b"\r" in value:
                    value = value.replace(b"\r\n", b"\n").partition(b"\0")[0]
                if eaten and value[:1] == b" ":
                    value = value[1:]
                octets = len(name) + len(value) + 2
                if octets > DATA_MOST:
                    hidden.add(len(parts) // 6 + self.unshown)
                    self.unshown += 1
                else:
                    parts += ((octets + 1).to_bytes(4), b"L", name, b"\0", value, b"\0")
            if hidden:
                self._skipped = _instances(head, hidden)
            if parts:
                frames.append(b"".join(parts))
            if not steps & 0x80:
                self.due.extend("L" * (len(parts) // 6))
        if not steps & 0x40:
            frames.append(self._told("N", b"", macros))
        return frames

    def body(self, octets: bytes) -> list[bytes]:
        """More of the body; none, where the filter does not want it."""
        steps = self.terms.steps if self.terms is not None else 0
        if steps & 0x10 or self.skips or self.last is not None:
            return []
        pieces = [octets[at : at + DATA_MOST] for at in range(0, len(octets), DATA_MOST)]
        if not steps & 0x80000:
            self.due.extend("B" * len(pieces))
        return [part for piece in pieces for part in ((len(piece) + 1).to_bytes(4) + b"B", piece)]

    def end(self, macros: Mapping[str, str]) -> bytes:
        """The end of the message, to which there always is an answer."""
        return self._told("E", b"", macros)

    def unknown(self, line: bytes) -> bytes:
        """An unknown command."""
        return self._told("U", line[: DATA_MOST - 1].replace(b"\0", b"") + b"\0", {})

    def abort(self) -> bytes:
        """The message is over, whatever has become of it. Nothing may be due."""
        assert not self.due
        self.last = None
        return _frame(b"A")

    def quit(self) -> bytes:
        """The connection is closed behind this."""
        return _frame(b"Q")

    def _told(self, letter: str, data: bytes, macros: Mapping[str, str]) -> bytes:
        """An event, behind its macros."""
        terms, octet = self.terms, letter.encode()
        assert terms is not None
        if terms.version < 4 and terms.version < _SINCE.get(letter, 0):
            return b""
        wanted = terms.macros.get(letter)
        told = [
            f"{name}\0{value}\0"
            for name, value in macros.items()
            if name and value and "\0" not in value and (wanted is None or name in wanted)
        ]
        front = _frame(b"D", octet + _octets("".join(told))) if told else b""
        if len(front) > DATA_MOST:
            front = b""
        if terms.steps & _NOT_TOLD.get(letter, 0) or len(data) > DATA_MOST:
            return front
        if not terms.steps & _NOT_ANSWERED.get(letter, 0):
            self.due.append(letter)
        return front + _frame(octet, data)

    # What it answers

    def feed(self, data: bytes) -> list[Said | Piece | Progress]:
        """Take octets from the filter. Look at `error` then."""
        events: list[Said | Piece | Progress] = []
        if self.error is not None or self.spent:
            return events
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needs:
                return events
            data = bytes(self._buffer)
            self._buffer.clear()
        at, size = 0, len(data)
        try:
            while size - at >= 4 and not self.spent:
                length = int.from_bytes(data[at : at + 4])
                if not 0 < length <= FRAME_MOST:
                    raise MilterError(f"begins with {_begin(data[at : at + 64])}")
                end = at + 4 + length
                if end > size:
                    break
                octet = data[at + 4]
                if octet == _C and self.due and self.due[0] != "O" and (run := _CONTINUES.match(data, at)) is not None:
                    at += 5 * self._go_on((run.end() - at) // 5, events)
                    continue
                self._answer(octet, data[at + 5 : end], events)
                at = end
        except MilterError as error:
            self.error = error
            return events
        if at < size and not self.spent:
            self._buffer += data[at:]
            self._needs = 4 if size - at < 4 else 4 + int.from_bytes(data[at : at + 4])
        return events

    def _answer(self, octet: int, data: bytes, events: list[Said | Piece | Progress]) -> None:
        """One frame."""
        letter, due = chr(octet), self.due[0] if self.due else ""
        if not due:
            raise MilterError(f"says {_begin(letter.encode('latin-1'))}, which nobody has asked for")
        if due == "O":
            self._agree(letter, data)
        elif letter == "c":
            self._go_on(1, events)
        elif letter == "p":
            events.append(Progress())
        elif letter in _WORDS:
            self._say(Said(self.due.popleft(), _WORDS[letter]), events)
        elif letter == "y":
            word, reply = smtp_reply(data.partition(b"\0")[0])
            self._say(Said(self.due.popleft(), word, reply), events)
        elif letter == "s" and due == "B":
            self.skips = True
            self.due.popleft()
        elif letter in _CHANGES and due == "E":
            self._change(letter, data, events)
        else:
            raise MilterError(f"says {_begin(letter.encode('latin-1'))} as an answer to {due}")

    def _go_on(self, count: int, events: list[Said | Piece | Progress]) -> int:
        """So many events, or all that are due, are answered: it may go on. Most answers are that. How many."""
        due = self.due
        count = min(count, len(due))
        answered = due if count == len(due) else [due.popleft() for _ in range(count)]
        for event in answered:
            if event == "E":
                self.last = _DONE
                events.append(_DONE)
            elif event == "R":
                events.append(_TAKEN)
        if answered is due:
            due.clear()
        return count

    def _say(self, said: Said, events: list[Said | Piece | Progress]) -> None:
        if said.event in "CH" and said.word == "discard":
            raise MilterError(f"discards at {said.event}, where there is no message")
        events.append(said)
        if said.event in "RU" and said.word in ("reject", "tempfail"):
            return
        self.last = said
        self.spent = bool(self.due)

    def _agree(self, letter: str, data: bytes) -> None:
        if letter != "O" or len(data) < 12:
            raise MilterError(f"begins with {_begin(letter.encode('latin-1') + data)}")
        version, actions, steps = (int.from_bytes(data[at : at + 4]) for at in (0, 4, 8))
        beyond = (("actions", actions & ~ACTIONS), ("steps", steps & ~STEPS))
        too_much = [f"{what} {bits:#x}" for what, bits in beyond if bits]
        if not 2 <= version <= VERSION:
            too_much.insert(0, f"version {version}")
        if too_much:
            offered = f"version 2 to {VERSION}, actions {ACTIONS:#x}, steps {STEPS:#x}"
            raise MilterError(f"wants {', '.join(too_much)}, beyond {offered}")
        self.due.popleft()
        self.terms = Terms(version, actions, steps, _lists(data[12:]))

    def _change(self, letter: str, data: bytes, events: list[Said | Piece | Progress]) -> None:
        assert self.terms is not None
        needed, change = _CHANGES[letter]
        if not self.terms.actions & needed:
            raise MilterError(f"says {letter!r}, though it has not asked to be allowed that")
        if letter == "b":
            self.changes.replaced = True
            if data:
                events.append(Piece(data))
            return
        if letter == "q":  # it is never dropped: the message would not be held
            self._quarantine(data)
        elif len(data) + CHANGE_LEAST <= self._room and change(self, data):
            self._room -= len(data) + CHANGE_LEAST
        else:
            self.changes.dropped += 1
            self._room -= CHANGE_LEAST

    # Each takes the data of a frame; False: the change cannot be made. MilterError: the frame is none.

    def _add(self, data: bytes) -> bool:
        name, value = _texts(data, 2)
        return self._edit(Append(name, self._value(value)))

    def _insert(self, data: bytes) -> bool:
        at, (name, value) = _number(data), _texts(data[4:], 2)
        return self._edit(Insert(at, name, self._value(value)))

    def _replace(self, data: bytes) -> bool:
        at, (name, value) = _number(data), _texts(data[4:], 2)
        for skipped in self._skipped.get(name.lower(), ()):  # it counts what it was shown
            at = max(at, 1) + (skipped <= max(at, 1))
        return self._edit(Change(name, at, self._value(value)))

    def _value(self, value: bytes) -> bytes:
        """What stands behind the colon: where spaces were agreed upon (some filters still leave it out), and there is one, as it
        is."""
        assert self.terms is not None
        return value if self.terms.steps & _SPACES and value[:1] in (b" ", b"\t", b"\n", b"\r") else spaced(value)

    def _edit(self, edit: Edit) -> bool:
        if len(self.changes.edits) >= EDITS_MOST:
            return False
        self.changes.edits.append(edit)
        return True

    def _add_recipient(self, data: bytes) -> bool:
        found, parameters = _address(rcpt_argument, b"TO:", data), _parameters(data)
        if not found or "@" not in found or not found.isascii() or parameters is None:
            return False
        if len(self.changes.added) >= RECIPIENTS_MOST:
            return False
        self.changes.added.append((found, parameters))
        return True

    def _remove_recipient(self, data: bytes) -> bool:
        found = _address(rcpt_argument, b"TO:", data)
        if not found or len(self.changes.removed) >= REMOVED_MOST:
            return False
        self.changes.removed.append(found)
        return True

    def _change_sender(self, data: bytes) -> bool:
        found, parameters = _address(mail_argument, b"FROM:", data), _parameters(data)
        if found is None or not found.isascii() or parameters is None:
            return False
        self.changes.sender = found, parameters
        return True

    def _quarantine(self, data: bytes) -> bool:
        reason = data.partition(b"\0")[0][: 4 * REASON_MOST]  # Postfix does without the NUL, here and in a reply
        self.changes.quarantine = printable(reason.decode("utf-8", "replace"))[:REASON_MOST]
        return True


# By letter: the action that must have been agreed upon (one of these bits), and what is done.
_CHANGES: Final[dict[str, tuple[int, Callable[[Conversation, bytes], bool]]]] = {
    "h": (0x1, Conversation._add),
    "i": (0x1 | 0x10, Conversation._insert),
    "m": (0x10, Conversation._replace),
    "b": (0x2, lambda conversation, data: True),
    "+": (0x4, Conversation._add_recipient),
    "2": (0x80, Conversation._add_recipient),
    "-": (0x8, Conversation._remove_recipient),
    "e": (0x40, Conversation._change_sender),
    "q": (0x20, Conversation._quarantine),
}


def smtp_reply(text: bytes) -> tuple[str, bytes]:
    """A refusal in a filter's words ("550 5.7.1 a text", lines divided by CRLF, "%%" for "%"): "reject" or "tempfail", and the
    whole reply, of lines of ASCII of at most 512 octets, with an enhanced status code (RFC 2034). Where the codes make no sense,
    the reply has 451 if the first begins with a 4, and otherwise 550."""
    lines = text.replace(b"%%", b"%").replace(b"\r\n", b"\n").rstrip(b"\r\n").split(b"\n", LINES_MOST)[:LINES_MOST]
    codes = [match[1] if (match := _CODE.match(line)) is not None else b"" for line in lines]
    code = codes[0]
    if not code or codes.count(code) < len(codes):
        code = b"451" if code[:1] == b"4" else b"550"
    texts = [line[4:] if _CODE.match(line) is not None else line for line in lines]
    enhanced = code[:1] + b".7.1"
    match = _ENHANCED.match(texts[0])
    if match is not None and match[1] == code[:1]:
        enhanced = match[0]
    written = []
    for line in texts:
        found = _ENHANCED.match(line)
        rest = line[found.end() + 1 :] if found is not None else line
        written.append(enhanced + b" " + (_NOT_SHOWN.sub(b"?", rest[:LINE_MOST]).strip() or b"Refused"))
    *first, last = written
    answer = b"".join(code + b"-" + line + b"\r\n" for line in first) + code + b" " + last + b"\r\n"
    return "reject" if code.startswith(b"5") else "tempfail", answer


def _frame(letter: bytes, data: bytes = b"") -> bytes:
    return (len(data) + 1).to_bytes(4) + letter + data


def _octets(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _arguments(address: str, parameters: Sequence[str]) -> bytes:
    return _octets(f"<{address}>\0" + "".join(f"{one}\0" for one in parameters))


def _begin(data: bytes) -> str:
    return f"'{printable(data[:64].decode('utf-8', 'replace'))}'"


def _instances(head: bytes, places: set[int]) -> dict[bytes, list[int]]:
    """Of the fields at these places of a header (from 0 on): by name, in lower case, which instances they are, from 1 on."""
    counts: dict[bytes, int] = {}
    found: dict[bytes, list[int]] = {}
    for place, (written, _) in enumerate(shown(head)):
        name = written.lower()
        counts[name] = counts.get(name, 0) + 1
        if place in places:
            found.setdefault(name, []).append(counts[name])
    return found


def _lists(data: bytes) -> dict[str, frozenset[str]]:
    """The names of macros that a filter asks for (SMFIR_SETSYMLIST), with braces where they have more than one letter. As for
    Postfix, the last list for an event counts, and others than we know of are ignored."""
    if len(data) > LISTS_MOST:
        raise MilterError(f"asks for macros in {len(data)} octets")
    found: dict[str, frozenset[str]] = {}
    at = 0
    while at < len(data):
        stage, end = _number(data[at : at + 4]), data.find(b"\0", at + 4)
        if end < 0:
            raise MilterError("leaves out the end of a text")
        if stage < len(_STAGES):
            names = data[at + 4 : end].decode("ascii", "replace").replace(",", " ").split()
            words = (name.strip("{}") for name in names)
            found[_STAGES[stage]] = frozenset(word if len(word) == 1 else f"{{{word}}}" for word in words if word)
        at = end + 1
    return found


def _number(data: bytes) -> int:
    if len(data) < 4:
        raise MilterError("leaves out a number")
    return int.from_bytes(data[:4])


def _texts(data: bytes, count: int) -> list[bytes]:
    """So many texts, each up to its NUL."""
    found = data.split(b"\0", count)
    if len(found) <= count:
        raise MilterError("leaves out the end of a text")
    return found[:count]


def _address(parse: Callable[[bytes], tuple[str, str] | None], word: bytes, data: bytes) -> str | None:
    """The address at the beginning, with its brackets or without, as MAIL and RCPT have it. None: it is none."""
    (text,) = _texts(data, 1)
    text = text.strip()
    if not text or len(text) > ADDRESS_MOST:
        return None
    found = parse(word + (text if text.startswith(b"<") else b"<" + text + b">"))
    return found[0] if found is not None and not found[1] else None


def _parameters(data: bytes) -> str | None:
    """Those behind an address; "" if there are none. None: they are no ESMTP parameters."""
    behind = data.partition(b"\0")[2]
    if not behind:
        return ""
    (text,) = _texts(behind, 1)
    if len(text) > PARAMETERS_MOST or not text.isascii():
        return None
    found = " ".join(text.decode().split())
    return found if parse_parameters(found) is not None else None
