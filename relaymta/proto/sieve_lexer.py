"""Tokens of a Sieve script (RFC 5228 8.1), and what is wrong with a script.

Line ends may be LF alone; in strings they are CRLF. Linear in the length of the script.
"""

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["END", "IDENTIFIER", "NUMBER", "STRING", "TAG", "Problem", "SieveError", "Token", "tokens"]

IDENTIFIER: Final = "identifier"
TAG: Final = "tag"
NUMBER: Final = "number"
STRING: Final = "string"
END: Final = "end"

NUMBER_MOST = 0x7FFFFFFFFFFFFFFF
SHOWN = 40  # characters of what is wrong that an error shows
_MULTIPLES = {b"K": 1 << 10, b"M": 1 << 20, b"G": 1 << 30}
_MARK = b"\xef\xbb\xbf"  # byte order mark, which some editors put in front

_NAME = rb"[A-Za-z_][A-Za-z0-9_]*+"
_TOKEN = re.compile(
    rb"(?P<space>(?>(?:[ \t\r\n]++|#[^\n]*+)+))|(?P<comment>/\*)|(?P<text>(?i:text):[ \t]*+(?:#[^\n]*+|\r?)\n)"
    rb"|(?P<identifier>" + _NAME + rb")|:(?P<tag>" + _NAME + rb")|(?P<number>[0-9]++[KMGkmg]?)(?![A-Za-z0-9_])"
    rb'|"(?P<string>(?>(?:[^"\\]++|\\.)*))"|(?P<special>[\[\](){},;])',
    re.S,
)
_LAST_LINE = re.compile(rb"^\.\r?(?:\n|\Z)", re.M)
_STUFFED = re.compile(rb"^\.\.", re.M)
_QUOTED = re.compile(rb"\\(.)", re.S)
_BARE_LF = re.compile(rb"(?<!\r)\n")


class Problem(Exception):
    """Something is wrong at an octet of the script; str() says what."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at


class SieveError(ValueError):
    """A script that is not valid. `line`, `column`: where, from 1 on, in characters; `what`: why, as a phrase. str():
    `line 3:14: WHAT`."""

    def __init__(self, line: int, column: int, what: str) -> None:
        super().__init__(f"line {line}:{column}: {what}")
        self.line = line
        self.column = column
        self.what = what


class Token(NamedTuple):
    """`kind`: IDENTIFIER and TAG (`value`: in lower case), NUMBER, STRING, END, or a special character; `at`: its offset."""

    kind: str
    value: bytes
    at: int

    @property
    def number(self) -> int:
        """The value of a number."""
        factor = _MULTIPLES.get(self.value[-1:].upper(), 1)
        digits = (self.value if factor == 1 else self.value[:-1]).lstrip(b"0")
        found = int(digits or b"0") * factor if len(digits) < 20 else NUMBER_MOST + 1
        if found > NUMBER_MOST:
            raise Problem(self.at, "the number is too large")
        return found

    def __str__(self) -> str:
        if self.kind == END:
            return "the end of the script"
        if self.kind == STRING:
            return "a string"
        return f'"{":" * (self.kind == TAG)}{self.value.decode("utf-8", "replace")[:SHOWN]}"'


def tokens(text: bytes) -> Iterator[Token]:
    """The tokens of a script, and END. Raises Problem."""
    nul = text.find(b"\0")
    if nul >= 0:
        raise Problem(nul, "a NUL, which is not allowed")
    at, end = len(_MARK) if text.startswith(_MARK) else 0, len(text)
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise Problem(at, _wrong(text, at))
        kind, start = match.lastgroup or "", at
        at = match.end()
        if kind == "comment":
            at = text.find(b"*/", at) + 2
            if at < 2:
                raise Problem(start, "a comment that does not end")
        elif kind == "text":
            last = _LAST_LINE.search(text, at)
            if last is None:
                raise Problem(start, 'a text that does not end: a line with "." alone is missing')
            value = _STUFFED.sub(b".", text[at : last.start()])
            yield Token(STRING, _BARE_LF.sub(b"\r\n", value), start)
            at = last.end()
        elif kind == STRING:
            yield Token(STRING, _BARE_LF.sub(b"\r\n", _QUOTED.sub(rb"\1", match[kind])), start)
        elif kind == "special":
            yield Token(match[kind].decode(), match[kind], start)
        elif kind != "space":
            yield Token(kind, match[kind].lower(), start)
    yield Token(END, b"", end)


def _wrong(text: bytes, at: int) -> str:
    """What is wrong with the text at `at`, where no token is."""
    one = text[at : at + 1]
    if one == b'"':
        return "a string that does not end"
    if one.isdigit():
        return "a number with letters behind it that are not K, M or G"
    if one == b":":
        return "a colon without the name of an argument behind it"
    shown = text[at : at + 4].decode("utf-8", "replace")[:1]
    return f"unexpected character {shown!a}"
