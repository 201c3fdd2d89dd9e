"""The client's side of clamd's protocol (clamd(8)): what is sent, and what its replies say.

All is said in sessions (IDSESSION), where each reply bears the number of its command, counted from 1. Commands are of the `z`
form, whose replies end in NUL. A text is sent in chunks (INSTREAM): four octets of length, big-endian, and the octets; a length
of 0 ends it. Over its StreamMaxLength clamd replies while the text is still being sent, and closes the connection.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from relaymta.proto.printable import printable

__all__ = ["END", "INSTREAM", "MAIL", "PING", "SHOWN", "START", "VERSION", "ClamdError", "Replies", "Reply", "length", "stream"]

START = b"zIDSESSION\0"  # in front of a connection's first command
PING = b"zPING\0"
VERSION = b"zVERSION\0"
INSTREAM = b"zINSTREAM\0"  # then chunks, then END
END = bytes(4)
# In front of each text, as the first line of a mailbox file: clamd takes a text for mail, and decodes what is in it, by what it
# begins with, and knows few header fields. Behind an Authentication-Results field it would look at an attachment in base64 as at
# letters.
MAIL = b"From relaymta\n"

SHOWN = 200  # characters of a name or a sentence
BEGINNING = 64  # octets of what is no reply that are shown
LONGEST = 1024  # octets of a reply without its NUL

_REPLY = re.compile(rb"(\d{1,10}): (?:(PONG)|(ClamAV [^\r\n]*)|stream: (?:(OK)|(\S[^\r\n]*) FOUND)|([^\r\n]*)(?<!\S)ERROR)")
_BEGUN = re.compile(rb"(?:\d{1,10}(?::(?: [^\r\n]*)?)?)?")  # what a reply can begin with
_TOO_LARGE = b"INSTREAM size limit exceeded"

Word = Literal["OK", "FOUND", "PONG", "VERSION", "OVERSIZE", "ERROR"]
_WORDS: tuple[Word, ...] = ("PONG", "VERSION", "OK", "FOUND", "ERROR")  # by group of _REPLY, from 2 on


class ClamdError(Exception):
    """What came is no reply of clamd's to what was asked. str(): how it begins, printable."""


class Reply(NamedTuple):
    """`number`: of the command that it replies to. `word`: OK and FOUND (to INSTREAM), PONG, VERSION; OVERSIZE: the text is
    longer than clamd takes; ERROR: it cannot look. `text`: the signature's name, the version, or what clamd says of the error:
    one line, printable, at most SHOWN characters."""

    number: int
    word: Word
    text: str = ""


def length(chunk: bytes) -> bytes:
    """What goes in front of a chunk. It must not be empty: that would be END."""
    return len(chunk).to_bytes(4, "big")


def stream(pieces: Sequence[bytes]) -> bytes:
    """The whole command that shows clamd a message in one chunk. `pieces`: its text."""
    octets = len(MAIL) + sum(map(len, pieces))
    return b"".join((INSTREAM, octets.to_bytes(4, "big"), MAIL, *pieces, END))


class Replies:
    """The replies of one session. Memory: LONGEST octets beside what is fed."""

    __slots__ = ("_broken", "_count", "_open", "_rest")

    def __init__(self) -> None:
        self._count = 0
        self._open: set[int] = set()
        self._rest = b""
        self._broken: ClamdError | None = None

    @property
    def begun(self) -> bool:
        """Whether a part of a reply is there."""
        return bool(self._rest)

    def asked(self) -> int:
        """A command is sent: its number."""
        self._count += 1
        self._open.add(self._count)
        return self._count

    def feed(self, data: bytes) -> Iterator[Reply]:
        """The replies that `data` completes, in order; then ClamdError, if what follows them is none, now and whenever more
        comes. To be read to its end."""
        if self._broken is not None:
            raise self._broken
        if self._rest:
            data = self._rest + data
        at = 0
        while (end := data.find(0, at)) >= 0:
            yield self._reply(data[at:end])
            at = end + 1
        rest = data[at : at + LONGEST + 1]
        if len(rest) > LONGEST or _BEGUN.fullmatch(rest) is None:
            raise self._no_reply(rest)
        self._rest = rest

    def _reply(self, line: bytes) -> Reply:
        """One without its NUL."""
        match = _REPLY.fullmatch(line) if len(line) <= LONGEST else None
        number = int(match[1]) if match is not None else 0
        if match is None or number not in self._open:
            raise self._no_reply(line)
        self._open.discard(number)
        group = match.lastindex or 0
        text = match[group]
        if text.startswith(_TOO_LARGE) and group == 6:
            return Reply(number, "OVERSIZE", _shown(text))
        return Reply(number, _WORDS[group - 2], _shown(text) if group in (3, 5, 6) else "")

    def _no_reply(self, line: bytes) -> ClamdError:
        shown = printable(line[:BEGINNING].decode("utf-8", "replace"))
        self._broken = ClamdError(f"begins with '{shown}'")
        self._rest = b""
        return self._broken


def _shown(text: bytes) -> str:
    return printable(text[: 4 * SHOWN].decode("utf-8", "replace").strip())[:SHOWN]
