"""Commands of ManageSieve (RFC 5804 4), out of octets in any pieces: words, numbers, quoted strings, literals.

`Reader.feed` takes octets, `Reader.next` gives the next command. Each octet is looked at a few times, however they come; what a
command has is bounded by `most` octets, a literal beyond that is skipped up to SKIPPED_MOST.
"""

import re
from typing import Final, NamedTuple

from relaymta.proto import managesieve_reply as reply

__all__ = ["Broken", "Command", "Reader", "String", "Word"]

SKIPPED_MOST: Final = 1 << 20  # octets of a literal that is too long, and is read nevertheless
TOKENS_MOST: Final = 8  # of a command: more than any takes
SHOWN = 64  # octets of the beginning of a line

_LITERAL = re.compile(rb"(?:\A|(?<=[ ]))\{([0-9]{1,19})(\+?)\}\Z")
_TOKEN = re.compile(rb'(?:"(?P<quoted>(?>(?:[^"\\\x00\r\n]++|\\["\\])*))"|(?P<word>[A-Za-z0-9*=+/._-]++))(?:[ ]++|\Z)')


class String(bytes):
    """A quoted string or a literal."""


class Word(bytes):
    """A word or a number, without quotes."""


class Command(NamedTuple):
    """All tokens of a command, its name first; `start`: how it began."""

    tokens: list[String | Word]
    start: bytes


class Broken(NamedTuple):
    """What is no command, and the response to it. `fatal`: what follows cannot be told apart from it. `start`: how it began."""

    answer: bytes
    start: bytes
    fatal: bool = False


class Reader:
    """`most`: octets of a command, its literals with it."""

    __slots__ = ("_broken", "_literal", "_searched", "_size", "_start", "_tokens", "buffer", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.buffer = bytearray()
        self._searched = 0  # octets of it without a line end
        self._forget()

    def _forget(self) -> None:
        """A command begins."""
        self._tokens: list[String | Word] = []
        self._literal = -1  # octets of the literal that is being read; -1: a line is
        self._size = 0  # octets of the command so far
        self._start = b""
        self._broken = b""  # the response to it, when it has ended

    def feed(self, data: bytes) -> None:
        """Octets of the client."""
        self.buffer += data

    def next(self) -> Command | Broken | None:
        """The next command; None until it is there as a whole."""
        while True:
            if self._literal >= 0:
                if not self._read_literal():
                    return None
                continue
            line = self._line()
            if line is None:
                return self._too_long() if len(self.buffer) + self._size > self.most else None
            found = self._segment(line)
            if found is not None:
                self._forget()
                return found

    def _line(self) -> bytes | None:
        end = self.buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self.buffer)
            return None
        line = bytes(self.buffer[: end + 1])
        del self.buffer[: end + 1]
        self._searched = 0
        return line

    def _too_long(self) -> Broken:
        return Broken(reply.TOO_LONG, self._start or bytes(self.buffer[:SHOWN]), True)

    def _read_literal(self) -> bool:
        """Read a literal, or skip it as far as it is there; whether it has ended."""
        if self._broken:
            there = min(self._literal, len(self.buffer))
            del self.buffer[:there]
            self._literal -= there
            if self._literal:
                return False
        elif len(self.buffer) < self._literal:
            return False
        else:
            self._tokens.append(String(self.buffer[: self._literal]))
            del self.buffer[: self._literal]
        self._literal = -1
        self._searched = 0
        return True

    def _segment(self, line: bytes) -> Command | Broken | None:
        """A line, or the part of a command between two literals; None when a literal follows."""
        self._start = self._start or line[:SHOWN]
        self._size += len(line)
        if self._size > self.most:
            return Broken(reply.TOO_LONG, self._start, True)
        if not line.endswith(b"\r\n"):
            self._broken = self._broken or reply.BARE_LF
        text = line.rstrip(b"\r\n")
        announced = _LITERAL.search(text)
        if announced is not None and not announced.start() and self._tokens:  # a blank is between two literals
            self._broken = self._broken or reply.BAD_SYNTAX
        self._add(text[: announced.start()] if announced is not None else text)
        if announced is None:
            return Broken(self._broken, self._start) if self._broken else Command(self._tokens, self._start)
        if len(self._tokens) >= TOKENS_MOST:
            return self._too_long()
        if not announced[2]:
            return Broken(reply.NOT_SYNCHRONISING, self._start, True)
        self._literal = int(announced[1])
        if self._size + self._literal > self.most:
            if self._literal > SKIPPED_MOST:
                return Broken(reply.LITERAL_TOO_LONG, self._start, True)
            self._broken = self._broken or reply.SCRIPT_TOO_LONG
        else:
            self._size += self._literal
        return None

    def _add(self, text: bytes) -> None:
        """The tokens of a line, up to its literal."""
        if self._broken:
            return
        at = len(text) - len(text.lstrip(b" "))
        if self._tokens and text and not at:  # a literal is followed by a blank
            self._broken = reply.BAD_SYNTAX
            return
        while at < len(text):
            if len(self._tokens) >= TOKENS_MOST:
                self._broken = reply.BAD_ARGUMENTS
                return
            found = _TOKEN.match(text, at)
            if found is None:
                self._broken = reply.BAD_SYNTAX
                return
            quoted = found["quoted"]
            self._tokens.append(Word(found["word"]) if quoted is None else String(_unescaped(quoted)))
            at = found.end()


def _unescaped(quoted: bytes) -> bytes:
    """What a quoted string means, whose escaped characters are all there are behind backslashes."""
    return b"\\".join(part.replace(b"\\", b"") for part in quoted.split(b"\\\\"))
