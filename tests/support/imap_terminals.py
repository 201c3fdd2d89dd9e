"""What the responses of an IMAP server are made of (RFC 9051 9): strings, numbers, sets, flags, names; see imap_grammar.py."""

import base64
import re
from collections.abc import Callable
from typing import TypeVar

__all__ = ["ATOM", "FLAG", "NZ", "TAG", "NotIMAP", "Terminals"]

T = TypeVar("T")

ATOM = rb"[!#$&'+,\-./0-9:;<=>?@A-Z\[^_`a-z|}~]+"
ASTRING = rb"[!#$&'+,\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+"
TAG = rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+"
NZ = rb"[1-9][0-9]*"
FLAG = rb"\\(?!Recent\b)" + ATOM + rb"|" + ATOM


class NotIMAP(Exception):
    """Octets that no server may send, and where."""


class Terminals:
    """The octets of a server, read from the first on. `utf8`: strings may be UTF-8; `rev2`: IMAP4rev2 is enabled."""

    def __init__(self, octets: bytes, utf8: bool, rev2: bool) -> None:
        self.octets, self.utf8, self.rev2 = octets, utf8, rev2
        self.at = 0

    # Terminals

    def fail(self, what: str) -> NotIMAP:
        return NotIMAP(f"expected {what} at {self.octets[self.at : self.at + 60]!r} behind {self.octets[: self.at][-60:]!r}")

    def maybe(self, form: bytes) -> bytes | None:
        match = re.compile(form, re.I).match(self.octets, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match[0]

    def take(self, form: bytes, what: str = "") -> bytes:
        found = self.maybe(form)
        if found is None:
            raise self.fail(what or repr(form))
        return found

    def literally(self, text: bytes) -> None:
        self.take(re.escape(text), repr(text))

    def number(self, least: int = 0, most: int = 0xFFFFFFFF) -> int:
        found = int(self.take(rb"0|[1-9][0-9]*", "a number"))
        if not least <= found <= most:
            raise self.fail(f"a number from {least} to {most}")
        return found

    def many(self, one: Callable[[], T], least: int = 0) -> list[T]:
        """In parentheses, with one blank between two."""
        self.literally(b"(")
        if not least and self.maybe(rb"\)"):
            return []
        found = [one()]
        while self.maybe(rb" "):
            found.append(one())
        self.literally(b")")
        return found

    def quoted(self) -> bytes:
        found = self.take(rb'"(?:[^"\\\r\n\0]|\\["\\])*"', "a quoted string")
        if not found.isascii():
            if not self.utf8:
                raise self.fail("a quoted string of ASCII")
            found.decode("utf-8")
        return re.sub(rb'\\(["\\])', rb"\1", found[1:-1])

    def literal(self, binary: bool = False) -> bytes:
        size = int(self.take(rb"~?\{[0-9]+\}\r\n" if binary else rb"\{[0-9]+\}\r\n", "a literal").strip(b"~{}\r\n"))
        found = self.octets[self.at : self.at + size]
        self.at += size
        if size == 0 or len(found) < size or (not binary and b"\0" in found):
            raise self.fail("a literal of so many octets without NUL, one at least")
        return found

    def string(self, binary: bool = False) -> bytes:
        return self.quoted() if self.octets[self.at : self.at + 1] == b'"' else self.literal(binary)

    def nstring(self, binary: bool = False) -> bytes | None:
        return None if self.maybe(rb"NIL(?![!#$&'+,\-.0-9:;<=>?@A-Z\[\]^_`a-z|}~])") else self.string(binary)

    def astring(self) -> bytes:
        return self.maybe(ASTRING) or self.string()

    def mailbox(self) -> str:
        octets = self.astring()
        if self.utf8:
            name = octets.decode("utf-8")
        else:
            if not octets.isascii() or re.search(rb"[\x00-\x1f\x7f]", octets):
                raise self.fail("a name in modified UTF-7")
            name = re.sub(r"&([^-]*)-", _unshifted, octets.decode())
        if name.upper() == "INBOX" and name != "INBOX":
            raise self.fail("INBOX in upper case")
        return name

    def numbers(self) -> list[tuple[int, int]]:
        """A set without `*`."""
        text = self.take(NZ + rb"(?::" + NZ + rb")?(?:," + NZ + rb"(?::" + NZ + rb")?)*", "a set of numbers")
        found = []
        for part in text.split(b","):
            low, _, high = part.partition(b":")
            found.append((int(low), int(high or low)))
            if high and not int(low) < int(high) <= 0xFFFFFFFF:
                raise self.fail("a range that goes up")
        return found

    def flag(self) -> str:
        return self.take(FLAG, "a flag").decode()


def _unshifted(match: re.Match[str]) -> str:
    if not match[1]:
        return "&"
    text = match[1].replace(",", "/")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode("utf-16-be")
