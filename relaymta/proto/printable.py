"""Untrusted strings made safe for a terminal: nothing in them moves the cursor, hides or reorders text, or begins a line.

Characters that Unicode does not define as printable are escaped: control characters (C0, DEL, C1), those that set directions or
join (bidi overrides, zero-width characters), line and paragraph separators, white space but the space, lone surrogates.
"""

import re

__all__ = ["encodable", "printable", "printable_json"]

_PLAIN = re.compile(r"[\x20-\x7e]*\Z")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str) -> str:
    """The string as one line, with Python's escapes for characters that are not printable: \\n, \\x1b, \\u202e. Linear time."""
    if _PLAIN.match(text):
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def encodable(text: str) -> str:
    """The string with Python's escapes for lone surrogates, such as octets that are no UTF-8: JSON and msgpack have none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _escaped(char: str) -> str:
    number = ord(char)
    return _SHORT.get(char) or (
        f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
    )


def printable_json(text: bytes) -> bytes:
    """Equivalent lines of JSON (UTF-8), with escapes for characters in strings that are not printable. Linear time."""
    if text.isascii() and b"\x7f" not in text:  # JSON escapes the other control characters itself
        return text
    decoded = text.decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char == "\n" else _escaped_json(char) for char in decoded).encode()


def _escaped_json(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
