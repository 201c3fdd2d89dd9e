"""BODY of a message (RFC 9051 7.5.2, RFC 3501 7.4.2), made from its BODYSTRUCTURE (_speedups/structure.py)."""

import re
from array import array
from collections.abc import Iterator

__all__ = ["MESSAGE", "MULTIPART", "body_of"]

MULTIPART, MESSAGE = 1, 2  # kinds of _speedups.mime (C integers there)

_TOKEN = re.compile(rb'\(|\)|"(?>(?:[^"\\]++|\\.)*)"|\{(\d+)\}\r\n|[A-Za-z0-9]++', re.S)
_MESSAGES = (b'"rfc822"', b'"global"')


def body_of(structure: bytes) -> bytes:
    """BODY, of what `bodystructure` has made: without extension data. ValueError: it has not made that."""
    return _Shortener(structure).all()


class _Shortener:
    """Copies the elements that BODY has, in one pass over the tokens."""

    def __init__(self, structure: bytes) -> None:
        self._structure = structure
        self._starts, self._ends = array("Q"), array("Q")  # of the tokens, of which a structure may have 100,000
        for start, end in _tokens(structure):
            self._starts.append(start)
            self._ends.append(end)
        self._at = 0
        self._out: list[bytes] = []

    def all(self) -> bytes:
        try:
            self._body()
        except IndexError:
            raise ValueError("not a structure of ours") from None
        return b"".join(self._out)

    def _token(self, offset: int = 0) -> bytes:
        at = self._at + offset
        return self._structure[self._starts[at] : self._ends[at]]

    def _body(self) -> None:
        self._at += 1
        self._out.append(b"(")
        if self._token() == b"(":
            while self._token() == b"(":
                self._body()
            self._out.append(b" ")
            self._copy(1)
        elif self._token() == b'"message"' and self._token(1) in _MESSAGES:
            self._copy(8)
            self._out.append(b" ")
            self._body()
            self._out.append(b" ")
            self._copy(1)
        else:
            self._copy(8 if self._token() == b'"text"' else 7)
        self._out.append(b")")
        while self._token() != b")":
            self._skip()
        self._at += 1

    def _copy(self, count: int) -> None:
        """Copy `count` elements, each a string, a number or a list."""
        start = self._starts[self._at]
        for _ in range(count):
            self._skip()
        self._out.append(self._structure[start : self._ends[self._at - 1]])

    def _skip(self) -> None:
        depth = 0
        while True:
            token = self._token()
            depth += (token == b"(") - (token == b")")
            self._at += 1
            if not depth:
                break


def _tokens(structure: bytes) -> Iterator[tuple[int, int]]:
    """Where the tokens are."""
    at = 0
    while at < len(structure):
        if structure[at] == 32:
            at += 1
            continue
        match = _TOKEN.match(structure, at)
        if match is None:
            raise ValueError("not a structure of ours")
        end = match.end() + int(match[1] or 0)
        yield at, end
        at = end
