"""Messages in mbox files: mboxrd (RFC 4155 with reversible quoting), and what mutt, UW-IMAP, Dovecot and procmail write.

A message as we write it:

    From sender Fri Nov 27 21:48:43 2026        date: INTERNALDATE in UTC
    Status: RO                                  O, and R when it is \\Seen
    X-Status: AF                                \\Answered, \\Flagged, D \\Deleted, T \\Draft
    X-Keywords: $Forwarded work
    X-Relaymta-Export: mboxrd                   or "mboxrd, no line end": the message ends without one
    (the message)
    (an empty line)

In the message, ">*From " at the beginning of a line is quoted by one ">" more, and in its header, fields in which programs keep
their state (_NAMES) by "X-Relaymta-": so they are neither taken for ours, nor removed by a program that changes flags.

Read, such fields are taken out wherever they are in the header, and what they say are the flags and keywords: so a message stays
the same when its flags change. In what others have written, ">*From " is assumed to be quoted as we do it.

A line that begins with "From " and ends with a date as asctime writes it begins a message. It is one of the
body when Content-Length: says so, and when an envelope line, or the end of the file, is where the body ends by that: Dovecot
quotes nothing. After the first field that is wrong, none is believed in the rest of the file.
"""

import io
import re
import time
from calendar import timegm
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import BinaryIO, Final

from relaymta.store.formats import FLAGS, MOST, Broken, Stored, atoms, from_disk, seconds_of, to_disk

__all__ = ["read", "write"]

_PIECE = 1 << 16  # octets of a line that are read at once
_LINE_MOST = 1000  # octets of an envelope line

_QUOTED = re.compile(rb"^(?=>*+From )", re.M)
_UNQUOTED = re.compile(rb"^>(?=>*+From )", re.M)

_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DATE = re.compile(
    rf"[ \t](?:{'|'.join(_DAYS)}) +({'|'.join(_MONTHS)}) +(\d\d?) +(\d\d?):(\d\d)(?::(\d\d))?"
    r"((?: +(?:\d\d(?:\d\d)?|[+-]\d\d:?\d\d|[A-Z]{1,5})){1,3})(?: +remote from .*)?\s*\Z".encode()
)
_ZONE = re.compile(rb"([+-])(\d\d):?(\d\d)")
_ZONES: Final = {
    b"EST": -5, b"EDT": -4, b"CST": -6, b"CDT": -5, b"MST": -7, b"MDT": -6, b"PST": -8, b"PDT": -7,  # RFC 5322 4.3
    b"BST": 1, b"WEST": 1, b"CET": 1, b"MET": 1, b"CEST": 2, b"MEST": 2, b"EET": 2, b"EEST": 3, b"MSK": 3, b"JST": 9,
}  # fmt: skip

_SENDER = re.compile(rb"Return-Path: ?<([!-~]{1,500})>\r\n")
_MARK = b"X-Relaymta-Export: mboxrd"
_UNENDED = b", no line end"
_NAMES = rb"(?:Status|X-Status|X-Keywords|X-UID|X-IMAP|X-IMAPbase|Content-Length|Lines|X-Relaymta-Export)[ \t]*:"
_STATE = re.compile(rb"^(" + _NAMES + rb")(.*\n(?:[ \t].*\n)*)", re.I | re.M)
_OURS = re.compile(rb"(?:" + _NAMES + rb".*\n)*?" + _MARK + rb".*\n", re.I)  # what is in front of a message
_OWN = re.compile(rb"^(?=(?:X-Relaymta-)*" + _NAMES + rb")", re.I | re.M)
_OWN_QUOTED = re.compile(rb"^X-Relaymta-(?=(?:X-Relaymta-)*" + _NAMES + rb")", re.I | re.M)
_LENGTH = re.compile(rb"^Content-Length[ \t]*:[ \t]*(\d{1,12})\s*$", re.I | re.M)
_HEADER = re.compile(rb"[!-9;-~]+[ \t]*:")
_EMPTY = re.compile(rb"\n\r?\n")
# UW-IMAP and Dovecot keep the state of the file in a first message that is none.
_FILE = re.compile(rb"^X-IMAP[ \t]*:", re.I | re.M)
_INTERNAL = re.compile(rb"^Subject: DON'T DELETE THIS MESSAGE -- FOLDER INTERNAL DATA\r?$", re.M)

_STATUS: Final = {"R": "\\Seen", "r": "\\Answered"}
_X_STATUS: Final = {"A": "\\Answered", "F": "\\Flagged", "D": "\\Deleted", "T": "\\Draft"}


def write(file: BinaryIO, stored: Stored) -> None:
    """Append a message. ValueError, and nothing is written, when a keyword is no atom. OSError."""
    if atoms(stored.keywords) != stored.keywords:
        raise ValueError(f"not keywords: {stored.keywords}")
    text = to_disk(stored.data)
    header = _header(text)
    text = _OWN.sub(b"X-Relaymta-", header) + text[len(header) :]
    ended = not text or text.endswith(b"\n")
    status = "RO" if "\\Seen" in stored.flags else "O"
    extra = "".join(letter for letter, flag in _X_STATUS.items() if flag in stored.flags)
    sender = _SENDER.match(stored.data)
    file.writelines(
        (
            b"From %b %b\n" % (sender[1] if sender else b"MAILER-DAEMON", _asctime(seconds_of(stored.date))),
            f"Status: {status}\nX-Status: {extra}\nX-Keywords: {' '.join(stored.keywords)}\n".encode(),
            _MARK if ended else _MARK + _UNENDED,
            b"\n",
            _QUOTED.sub(b">", text) if b"From " in text else text,
            b"\n" if ended else b"\n\n",
        )
    )


def _asctime(seconds: int) -> bytes:
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(seconds)
    return f"{_DAYS[weekday]} {_MONTHS[month - 1]} {day:2} {hour:02}:{minute:02}:{second:02} {year:04}".encode()


def read(file: BinaryIO, most: int = MOST) -> Iterator[Stored | Broken]:
    """The messages of a file, in their order, each read when it is asked for; a message of more than `most` octets in the file is
    Broken. Dates without a zone are taken as UTC. Linear time; memory for one message, some six times its length. OSError."""
    first = True
    for part in _parts(file, most):
        if part.date is None:
            yield Broken(f"line {part.line}", "no mbox: there is no envelope line (From sender date) here")
        elif (text := part.ended(most)) is None:
            yield Broken(f"line {part.line}", f"a message of more than {most} octets")
        elif not (first and _is_internal(text)):
            yield _stored(part.date, text, not part.inside)
        first = False


class _Part:
    """A message under way. `line`: number of its first line; `date`: of its envelope, None for what is in front of the first one;
    `text`: behind the envelope, dropped when it is too long; `length`: octets; `inside`: an envelope line is taken for a part of
    the body, since Content-Length: says so."""

    __slots__ = ("body_end", "date", "inside", "length", "line", "text")

    def __init__(self, line: int, date: int | None) -> None:
        self.line, self.date, self.text, self.length = line, date, bytearray(), 0
        self.inside, self.body_end = False, -1

    def add(self, piece: bytes, most: int) -> None:
        """A line, or a further piece of one."""
        self.length += len(piece)
        if self.date is not None and self.length <= most + 2:  # with the empty line
            self.text += piece
        elif self.text:
            self.text = bytearray()

    def goes_on(self) -> bool:
        """Whether an envelope line that follows is in the body, as Content-Length: says."""
        if self.body_end < 0:
            self.body_end = _body_end(self.text)
        return self.length < self.body_end

    def is_wrong(self, piece: bytes, begins: bool, most: int) -> bool:
        """Whether Content-Length: turns out to be wrong. `piece`: what follows; `begins`: it is an envelope line."""
        if not self.inside:
            return False
        too_long = self.length + len(piece) > most + 2
        if piece and not begins:
            return too_long
        return (too_long or not piece) if self.goes_on() else bool(self.text[self.body_end :].strip())

    def ended(self, most: int) -> bytearray | None:
        """Its text without the empty line behind it; None when it is too long."""
        text = self.text
        if self.length > len(text):
            return None
        for end in (b"\n\r\n", b"\n\n"):
            if text.endswith(end):
                del text[1 - len(end) :]
                break
        else:
            if bytes(text[:3]) in (b"\n", b"\r\n"):
                text.clear()
        return text if len(text) <= most else None


def _parts(file: BinaryIO, most: int) -> Iterator[_Part]:
    pieces = iter(partial(file.readline, _PIECE), b"")
    part, number = _Part(0, None), 0
    begins = believes = True  # at the beginning of a line; Content-Length: was right so far
    while True:
        piece = next(pieces, b"")
        date = _envelope(piece) if begins and piece.startswith(b"From ") else None
        if believes and part.is_wrong(piece, date is not None, most):
            again = iter(partial(io.BytesIO(part.text).readline, _PIECE), b"")
            pieces = chain(again, (piece,) if piece else (), pieces)
            part, number, begins, believes = _Part(part.line, part.date), part.line, True, False
            continue
        number += begins
        begins = piece.endswith(b"\n")
        if piece and (date is None or (believes and part.goes_on())):
            part.inside |= date is not None
            if part.line or piece.strip():
                part.line = part.line or number
                part.add(piece, most)
            continue
        if part.line:
            yield part
        if not piece:
            return
        part = _Part(number, date)


def _body_end(text: bytearray) -> int:
    """Where a message's body ends as Content-Length: says; 0 without one."""
    ours = _OURS.match(text)
    header = _header(text, ours.end() if ours else 0)
    said = _LENGTH.search(header)
    if said is None:
        return 0
    begin = (ours.end() if ours else 0) + len(header)
    end = _EMPTY.match(text, begin - 1)
    return end.end() + int(said[1]) if end else 0


def _envelope(line: bytes) -> int | None:
    """The date of an envelope line (seconds UTC); None when it is no envelope line."""
    if len(line) > _LINE_MOST or (match := _DATE.search(line, 4)) is None:
        return None
    month, day, hour, minute, second, rest = match.groups()
    year = offset = None
    for word in rest.split():
        if (zone := _ZONE.fullmatch(word)) is not None:
            offset = int(zone[1] + b"1") * (int(zone[2]) * 3600 + int(zone[3]) * 60)
        elif word.isdigit():
            year = int(word) if len(word) == 4 else int(word) + (1900 if int(word) >= 70 else 2000)
        else:
            offset = _ZONES.get(word, 0) * 3600 if offset is None else offset
    if not year or not 1 <= int(day) <= 31 or int(hour) > 23 or int(minute) > 59 or int(second or 0) > 60:
        return None
    numbers = (year, _MONTHS.index(month.decode()) + 1, int(day), int(hour), int(minute), int(second or 0))
    return timegm(numbers) - (offset or 0)


def _stored(date: int, text: bytearray, quoted: bool) -> Stored:
    """The message of a file's text. `quoted`: as "From " at the beginning of a line is."""
    ours = _OURS.match(text)
    begin = ours.end() if ours else 0
    front, header = bytes(text[:begin]), _header(text, begin)
    rest = bytes(text[begin + len(header) :])
    said: dict[bytes, list[bytes]] = {b"status": [], b"x-status": [], b"x-keywords": [], b"x-relaymta-export": []}
    for match in (*_STATE.finditer(front), *_STATE.finditer(header)):
        if (name := match[1][:-1].strip().lower()) in said:
            said[name].append(match[2])
    status, extra, keywords, mark = (b"".join(values) for values in said.values())
    header = _STATE.sub(b"", header)
    if mark:
        header = _OWN_QUOTED.sub(b"", header)
    data = header + rest
    if _UNENDED in mark:
        data = data.removesuffix(b"\r\n" if mark.endswith(b"\r\n") else b"\n")
    if quoted and b">From " in data:
        data = _UNQUOTED.sub(b"", data)
    return Stored(from_disk(data), float(date), _flags(status, extra), atoms(keywords.decode("utf-8", "replace").split()))


def _header(text: bytes | bytearray, begin: int = 0) -> bytes:
    """The header that a text has at `begin`, behind our fields, without the empty line that ends it."""
    if not _HEADER.match(text, begin):
        return b""
    end = _EMPTY.search(text, begin)
    return bytes(text[begin : end.start() + 1] if end else text[begin:])


def _is_internal(text: bytearray) -> bool:
    """Whether a file's first message is its state as UW-IMAP and Dovecot keep it."""
    header = b"" if _OURS.match(text) else _header(text)
    return _INTERNAL.search(header) is not None and _FILE.search(header) is not None


def _flags(status: bytes, extra: bytes) -> list[str]:
    found = {flag for letter, flag in _STATUS.items() if letter.encode() in status}
    found |= {flag for letter, flag in _X_STATUS.items() if letter.encode() in extra}
    return [flag for flag in FLAGS if flag in found]
