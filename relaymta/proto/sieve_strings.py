"""Strings of a Sieve script: characters by their numbers (RFC 5228 2.4.2.4, "encoded-character") and references to variables
(RFC 5229 3). Strings are octets, in UTF-8 as a rule: comparisons are of octets (RFC 5228 2.7.2).

Limits (RFC 5229 6): VARIABLES_MOST variables, with names of NAME_MOST characters; a value is cut to VALUE_MOST characters, and a
string in which variables are replaced to STRING_MOST octets. Match variables go up to ${32}.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple

__all__ = ["MATCHES_MOST", "NAME_MOST", "VARIABLES_MOST", "Text", "clipped", "decoded_characters", "text_of", "variable_name"]

VARIABLES_MOST: Final = 128
NAME_MOST: Final = 64
VALUE_MOST: Final = 4000
STRING_MOST: Final = 65_536
MATCHES_MOST: Final = 32

_ENCODED = re.compile(
    rb"\$\{(?:(?P<hex>(?i:hex)):(?P<octets>[ \t\r\n]*+[0-9A-Fa-f]{1,2}(?>(?:[ \t\r\n]++[0-9A-Fa-f]{1,2})*))"
    rb"|(?i:unicode):(?P<numbers>[ \t\r\n]*+[0-9A-Fa-f]++(?>(?:[ \t\r\n]++[0-9A-Fa-f]++)*)))[ \t\r\n]*+\}"
)
_IDENTIFIER = rb"[A-Za-z_][A-Za-z0-9_]*+"
_NAME = re.compile(_IDENTIFIER + rb"\Z")
_REFERENCE = re.compile(
    rb"\$\{(?:(?P<space>" + _IDENTIFIER + rb"\.(?>(?:(?:[0-9]++|" + _IDENTIFIER + rb")\.)*))?(?:(?P<number>[0-9]++)|(?P<name>"
    + _IDENTIFIER + rb")))\}"
)  # fmt: skip


class Text(NamedTuple):
    """A string. `raw`: as it is written, without references replaced; `pieces`: octets, names of variables, and numbers of match
    variables, in order; (): it is `raw`, a constant."""

    raw: bytes
    pieces: tuple[bytes | str | int, ...] = ()

    @property
    def constant(self) -> bytes | None:
        """Its value, if that does not depend on variables."""
        return None if self.pieces else self.raw

    def expanded(self, value: Callable[[str | int], bytes]) -> bytes:
        """The string with variables replaced by their values, cut to STRING_MOST octets."""
        if not self.pieces:
            return self.raw
        found: list[bytes] = []
        room = STRING_MOST
        for piece in self.pieces:
            part = (piece if isinstance(piece, bytes) else value(piece))[:room]
            found.append(part)
            room -= len(part)
        return b"".join(found)


def text_of(value: bytes, variables: bool) -> Text:
    """A string of a script; `variables`: references in it are replaced. ValueError: a reference that is an error."""
    if not variables or b"${" not in value:
        return Text(value)
    pieces: list[bytes | str | int] = []
    at = 0
    for match in _REFERENCE.finditer(value):
        if match["space"]:
            raise ValueError(f"unknown namespace of variables {match['space'][:NAME_MOST].decode()!a}")
        if match.start() > at:
            pieces.append(value[at : match.start()])
        pieces.append(_numbered(match["number"]) if match["number"] else match["name"].decode().lower())
        at = match.end()
    if not pieces:
        return Text(value)
    if at < len(value):
        pieces.append(value[at:])
    return Text(value, tuple(pieces))


def _numbered(digits: bytes) -> int:
    """The number of a match variable. ValueError: there is none with this number."""
    digits = digits.lstrip(b"0") or b"0"
    if len(digits) > 2 or int(digits) > MATCHES_MOST:
        raise ValueError(f"match variables go up to ${{{MATCHES_MOST}}}")
    return int(digits)


def variable_name(value: bytes) -> str:
    """The name of a variable, in lower case. ValueError: it is none, or that of a match variable or of a namespace."""
    if not _NAME.match(value):
        raise ValueError("not the name of a variable")
    if len(value) > NAME_MOST:
        raise ValueError(f"the name of a variable has more than {NAME_MOST} characters")
    return value.decode().lower()


def decoded_characters(value: bytes) -> bytes:
    """A string with ${hex:...} and ${unicode:...} replaced. ValueError: there is no such character."""
    return _ENCODED.sub(_decoded, value) if b"${" in value else value


def _decoded(match: re.Match[bytes]) -> bytes:
    if match["hex"]:
        return bytes([int(pair, 16) for pair in match["octets"].split()])
    found = []
    for digits in match["numbers"].split():
        digits = digits.lstrip(b"0") or b"0"
        number = int(digits, 16) if len(digits) <= 6 else 0x110000
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise ValueError(f"there is no character {digits[:10].decode()} in Unicode")
        found.append(chr(number))
    return "".join(found).encode()


def clipped(value: bytes) -> bytes:
    """The value of a variable, cut to VALUE_MOST characters."""
    if len(value) <= VALUE_MOST:
        return value
    text = value[: 4 * VALUE_MOST].decode("utf-8", "surrogateescape")
    return text[:VALUE_MOST].encode("utf-8", "surrogateescape")
