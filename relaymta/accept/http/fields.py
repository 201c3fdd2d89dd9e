"""Header fields of a message that is composed here: folded (RFC 5322 2.2.3), with encoded words (RFC 2047) and encoded
parameters (RFC 2231) where a value is not ASCII or would be read otherwise. What is read back is the value, character by
character.

A line end in a value is ValueError: it would begin another field. Who calls has checked that before, with an answer for the
client.
"""

import re
from collections.abc import Iterable, Iterator
from email import base64mime, quoprimime
from email.utils import encode_rfc2231

__all__ = ["addresses", "disposition", "structured", "unstructured"]

LINE = 78  # characters of a line, where it can be folded (RFC 5322 2.1.1)
_ENCODED_LINE = 76  # of one with an encoded word (RFC 2047 2)
_QUOTED = "=?utf-8?q?"  # what an encoded word begins with
_AROUND = len(_QUOTED) + 2
_IN_BASE64 = 45  # octets in 60 characters: of an encoded word of 72
_IN_QUOTED = 60  # characters
_WORD = 900  # characters of a word that is not folded
_SECTION = 60  # characters of a part of a parameter (RFC 2231 3)

_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*\Z")
_SIMPLE = re.compile(r"[A-Za-z0-9!#$&+._()@-]+(?: [A-Za-z0-9!#$&+._()@-]+)*\Z")
_SPECIAL = re.compile(r'(["\\])')
_SECTIONS = re.compile(rf"(?:%[0-9A-F]{{2}}|[^%]){{1,{_SECTION // 3}}}")
_LINE_END = re.compile(r"[\r\n\0]")


def unstructured(name: str, value: str) -> bytes:
    """A field of text, CRLF included."""
    if _LINE_END.search(value):
        raise ValueError("a line end in a value")
    if value.isascii() and _is_plain(value):
        if len(value) < LINE - 2 - len(name):
            return f"{name}: {value}\r\n".encode()
        folded = _folded(name, value)
        if folded is not None:
            return folded
    return _checked(f"{name}: " + "\r\n ".join(_encoded(value, len(name) + 2)) + "\r\n")


def structured(name: str, value: str) -> bytes:
    """A field of ASCII that is folded, but not encoded, CRLF included."""
    folded = _folded(name, value) if value.isascii() and not _LINE_END.search(value) else None
    if folded is None:
        raise ValueError(f"{name} cannot be sent as it is")
    return folded


def addresses(name: str, mailboxes: Iterable[tuple[str, str]]) -> bytes:
    """A list of mailboxes (address, display name), CRLF included. Not ASCII if an address is not (RFC 6532)."""
    line, lines = f"{name}:", []
    for number, (address, shown) in enumerate(mailboxes):
        if number:
            line += ","
        text = _mailbox(address, shown, len(line) + 1)
        first = text.partition("\r\n")[0]
        if number and len(line) + 1 + len(first) >= LINE:
            lines.append(line)
            line, text = "", _mailbox(address, shown, 1)
        line += " " + text
        if "\r\n" in text:
            before, _, line = line.rpartition("\r\n")
            lines.append(before)
    return _checked("\r\n".join([*lines, line]) + "\r\n")


def disposition(word: str, filename: str) -> bytes:
    """Content-Disposition: with a file's name (RFC 2183, RFC 2231), CRLF included."""
    if len(filename) <= LINE // 2 and _SIMPLE.match(filename):
        return f'Content-Disposition: {word}; filename="{filename}"\r\n'.encode()
    encoded = encode_rfc2231(filename, "utf-8")  # utf-8''NAME
    if len(encoded) <= _SECTION:
        return _checked(f"Content-Disposition: {word};\r\n filename*={encoded}\r\n")
    sections = _SECTIONS.findall(encoded)
    parameters = "".join(f";\r\n filename*{number}*={section}" for number, section in enumerate(sections))
    return _checked(f"Content-Disposition: {word}{parameters}\r\n")


def _checked(field: str) -> bytes:
    """A field whose only line ends are those of folds."""
    if "\0" in field or not field.count("\r\n") == field.count("\n") == field.count("\r") == field.count("\r\n ") + 1:
        raise ValueError("a line end in a value")
    return field.encode()


def _is_plain(value: str) -> bool:
    """Whether nothing in a value of ASCII is read otherwise: an encoded word, or white space around it."""
    return "=?" not in value and value[:1] != " " and value[-1:] != " "


def _folded(name: str, value: str) -> bytes | None:
    """A field that is folded where it has one space between words. None: a line would be too long."""
    line, lines, before = f"{name}:", [], ""  # (never behind the name: a program may keep that space)
    for word in value.split(" "):
        if len(line) + 1 + len(word) > LINE and word and before:
            lines.append(line)
            line = ""
        line += " " + word
        before = word
        if len(line) > _WORD + LINE:
            return None
    return ("\r\n".join([*lines, line]) + "\r\n").encode()


def _encoded(text: str, before: int) -> list[str]:
    """Encoded words, one a line, the first behind `before` characters. Each has whole characters (RFC 2047 5)."""
    data = text.encode()
    quoted = quoprimime.header_encode(data, "utf-8").removeprefix(_QUOTED).removesuffix("?=")
    room = max(_ENCODED_LINE - before - _AROUND, 12)
    if len(quoted) <= base64mime.header_length(data):
        return [f"{_QUOTED}{word}?=" for word in _words_quoted(quoted, min(room, _IN_QUOTED))]
    return [base64mime.header_encode(word, "utf-8") for word in _words_of(data, min(room * 3 // 4 - 2, _IN_BASE64))]


def _words_quoted(quoted: str, first: int) -> Iterator[str]:
    """A text in the Q encoding, cut between its characters; the first piece has `first` characters of the encoding at most."""
    at, limit = 0, first
    while len(quoted) - at > limit:
        end = at + limit
        while "=" in quoted[end - 2 : end] or (quoted[end] == "=" and quoted[end + 1] in "89AB"):  # in the middle of one
            end -= 1
        yield quoted[at:end]
        at, limit = end, _IN_QUOTED
    yield quoted[at:]


def _words_of(data: bytes, first: int) -> Iterator[bytes]:
    """UTF-8, cut between its characters; the first piece has `first` octets at most."""
    at, limit = 0, first
    while len(data) - at > limit:
        end = at + limit
        while data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[at:end]
        at, limit = end, _IN_BASE64
    yield data[at:]


def _mailbox(address: str, name: str, before: int) -> str:
    """name-addr or addr-spec (RFC 5322 3.4), folded between encoded words only."""
    if _LINE_END.search(name) or _LINE_END.search(address):
        raise ValueError("a line end in a value")
    if not name:
        return address
    if not name.isascii() or "=?" in name:
        return "\r\n ".join(_encoded(name, before)) + f"\r\n <{address}>"
    if not _ATOMS.match(name):
        name = '"' + _SPECIAL.sub(r"\\\1", name) + '"'
    return f"{name} <{address}>"
