"""Names of mailboxes: modified UTF-7 (RFC 3501 5.1.3), and which names may exist. Levels are divided by "/"."""

import binascii
import re
import unicodedata

__all__ = ["decode", "encode", "problem"]

LEVEL_MOST = 255  # octets
NAME_MOST = 1000  # octets
LEVELS_MOST = 20

_ENCODED = re.compile(r"&|[^\x20-\x7e]+")
_SHIFT = re.compile(r"&([A-Za-z0-9+,]*)-")
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")
# C0, DEL, C1, line and paragraph separators: Net-Unicode without controls (RFC 6855 3)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def encode(name: str) -> str:
    """A name in modified UTF-7. ValueError: it has a lone surrogate. Linear time."""
    return _ENCODED.sub(_shifted, name)


def _shifted(match: re.Match[str]) -> str:
    if match[0] == "&":
        return "&-"
    text = binascii.b2a_base64(match[0].encode("utf-16-be"), newline=False).decode()
    return f"&{text.rstrip('=').replace('/', ',')}-"


def decode(text: str, *, lenient: bool = False) -> str:
    """The name that `text` is in modified UTF-7. ValueError when it is malformed, also by a shift that RFC 3501 does not allow:
    of what represents itself, or two in a row. `lenient`: such shifts are taken. Linear time."""
    name = _SHIFT.sub(_unshifted, text)
    if lenient:
        wrong = _NOT_ASCII.search(text) or "&" in _SHIFT.sub("", text)
    else:
        wrong = encode(name) != text
    if wrong:
        raise ValueError("not modified UTF-7")
    return name


def _unshifted(match: re.Match[str]) -> str:
    text = match[1].replace(",", "/")
    if not text:
        return "&"
    return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True).decode("utf-16-be")


def problem(name: str) -> str | None:
    """Why there may be no mailbox of this name, as a sentence; None: there may be one."""
    try:
        octets = len(name.encode())
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if octets > NAME_MOST:
        return f"the name has more than {NAME_MOST} octets"
    levels = name.split("/")
    if len(levels) > LEVELS_MOST:
        return f"the name has more than {LEVELS_MOST} levels"
    if "" in levels:
        return "the name is empty" if not name else "a level of the name is empty"
    if any(len(level.encode()) > LEVEL_MOST for level in levels):
        return f"a level of the name has more than {LEVEL_MOST} octets"
    if _CONTROL.search(name):
        return "the name has a control character"
    if "*" in name or "%" in name:
        return "the name has a wildcard (* or %)"
    if not unicodedata.is_normalized("NFC", name):
        return "the name is not in Unicode normalization form C"
    return None
