"""What a mail reader may show as the name of an attachment: parameters of Content-Type and Content-Disposition (RFC 2045 5.1,
RFC 2183, RFC 2231), as they are written and as they are written wrong, and the forms of a name under which a file is opened.

An attacker writes them, so all readings of a field count that a reader may have, and none is an error. A field that is as the RFC
has it has one. Linear in the length of a field: READ octets of a value and OCCURRENCES of parameters in all fields are read.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from relaymta.proto.mime_text import decoded, header_text

__all__ = ["OCCURRENCES", "READ", "Budget", "Parameter", "forms", "names_of", "parameters", "readings", "values_of"]

READ: Final = 2048  # octets of a parameter's value that are read
OCCURRENCES: Final = 2000  # parameters that are not as the RFC has them, of all fields
PIECES: Final = 500  # parameters of a field: of more of them the first and the last so many are read
FORMED: Final = 64  # characters that are normalized together

_PLAIN = re.compile(
    rb"[ \t\r\n]*+(?:;[ \t\r\n]*+(?>(?:([!#$&'*+.0-9A-Z^_`a-z{|}~%-]++)[ \t\r\n]*+=[ \t\r\n]*+"
    rb'(?:"([^"\\;\r\n\x00]*+)"|([^\x00-\x20;"()\\\x7f]++)))?)|\Z)'
)
_ANY = re.compile(rb"(filename|name|boundary|charset)[ \t\r\n]*+(?>(?:\*[ \t]*+([0-9]{1,6}))?)[ \t]*+(\*)?[ \t\r\n]*+=", re.I)
_PIECE = re.compile(rb"([^*]++)(?>(?:\*([0-9]{1,6}))?)(\*)?\Z")
_QUOTED = re.compile(rb'"((?>(?:[^"\\]++|\\.)*))("?)', re.S)
_QUOTED_PAIR = re.compile(rb"\\(.)", re.S)
_FOLD = re.compile(rb"[\r\n]++[ \t]*+")
_LINE_END = re.compile(rb"[\r\n]++")
_COMMENT = re.compile(rb"\([^()]*+\)")
_WORD_END = re.compile(rb"[\x00-\x20;]")
_SIMPLE = re.compile(r"[\w\- ()+,=&'@#\[\]{}!~^$.]*+", re.A)
_BARE = re.compile(rb"[A-Za-z0-9_-][A-Za-z0-9_\-+,()@ .]*+(?<![. ])")
_NO_CONTROLS: Final = dict.fromkeys([*range(32), *range(127, 160)])


class Budget:
    """What may still be read of all fields of a message."""

    __slots__ = ("excessive", "left")

    def __init__(self, left: int = OCCURRENCES) -> None:
        self.left = left
        self.excessive = False

    def take(self) -> bool:
        """Whether one more may be read."""
        self.left -= 1
        if self.left < 0:
            self.excessive = True
        return self.left >= 0


class Parameter(NamedTuple):
    """A parameter, or a piece of one. `name`: lower case, without the asterisks of RFC 2231; `number`: of the piece, -1: it is
    whole; `extended`: it has an asterisk at the end; `value`: one reading of it, without quotes."""

    name: bytes
    number: int
    extended: bool
    value: bytes


def parameters(value: bytes, budget: Budget) -> list[Parameter]:
    """The parameters of a field's value, in order; each reading of one is one. What is in front of the first `;` is no parameter
    where the field is as the RFC has it."""
    at = value.find(b";")
    if at < 0 and b"=" not in value:
        return []
    found: list[Parameter] = []
    end = len(value)
    if b"=" in value[:at]:
        at = -1
    while 0 <= at < end and (match := _PLAIN.match(value, at)) is not None:
        name, quoted, token = match.groups()
        if name is not None:
            text = token if quoted is None else quoted
            if b"*" in name:
                piece = _PIECE.match(name.lower())
                if piece is None or len(text) > READ:
                    break
                number = -1 if piece[2] is None else int(piece[2])
                found.append(Parameter(piece[1], number, piece[3] is not None, text))
            elif len(text) > READ or (token and token.startswith(b"'")):
                break
            else:
                found.append(Parameter(name.lower(), -1, False, text))
        at = match.end()
    if at == end:
        budget.excessive = budget.excessive or len(found) > 2 * PIECES
        return found if len(found) <= 2 * PIECES else found[:PIECES] + found[-PIECES:]
    return list(_loose(value, budget))


def _loose(value: bytes, budget: Budget) -> Iterator[Parameter]:
    """Every reading of what may be a parameter, wherever it is: within quotes, in comments, without a `;` in front."""
    if len(value) > READ:
        budget.excessive = budget.excessive or value.count(b"=") > READ
    for match in _ANY.finditer(value):
        if not budget.take():
            return
        number = -1 if match[2] is None else int(match[2])
        text = value[match.end() : match.end() + READ].lstrip(b" \t\r\n")
        if len(text) == READ and not _QUOTED.match(text) and not _WORD_END.search(text):
            budget.excessive = True
        for one in dict.fromkeys(_loose_values(text)):
            yield Parameter(match[1].lower(), number, match[3] is not None, one)


def _loose_values(text: bytes) -> Iterator[bytes]:
    """What readers may take for the value at the beginning of `text`."""
    to_semicolon = text.partition(b";")[0]
    if text.startswith((b'"', b"'")):
        quoted = _QUOTED.match(text)
        if quoted is not None:
            yield from _unfolded(_QUOTED_PAIR.sub(rb"\1", quoted[1]))
            yield from _unfolded(quoted[1])
            yield from _unfolded(text[1:].partition(b'"')[0])
            yield from _unfolded(text[1:].partition(b";")[0].strip(b" \t\r\n"))
        else:
            yield from _unfolded(text[1:].partition(b"'")[0])
    word = _WORD_END.search(text)
    yield text[: word.start()] if word else text
    bare = to_semicolon.replace(b'"', b"").strip(b" \t\r\n")
    yield from _unfolded(bare)
    if b"(" in bare:
        yield from _unfolded(_COMMENT.sub(b"", bare).strip(b" \t\r\n"))
    if b"\\" in bare:
        yield from _unfolded(_QUOTED_PAIR.sub(rb"\1", bare))


def _unfolded(text: bytes) -> Iterator[bytes]:
    if b"\r" in text or b"\n" in text:
        yield _LINE_END.sub(b"", text)
        yield _FOLD.sub(b"", text)
        yield _LINE_END.split(text, 1)[0]
    else:
        yield text


def values_of(found: Iterable[Parameter], name: bytes) -> list[bytes]:
    """The values of a parameter, each reading of it, with pieces joined and escapes undone; for `boundary` and `charset`."""
    values: list[bytes] = []
    pieces: list[Parameter] = []
    for one in found:
        if one.name == name:
            if one.number >= 0:
                pieces.append(one)
            elif one.extended:
                values += [unquote_to_bytes(one.value.rpartition(b"'")[2]), one.value]
            else:
                values.append(one.value)
    if pieces:
        values += [joined for _, joined, _ in _joined(pieces)]
    return list(dict.fromkeys(values))


def names_of(found: Iterable[Parameter], keys: tuple[bytes, ...] = (b"filename", b"name")) -> list[str]:
    """What the parameters say to be names, each form of each reading: text, perhaps with controls."""
    simple: list[str] = []
    names: dict[str, None] = {}
    pieces: dict[bytes, list[Parameter]] = {}
    for one in found:
        if one.name not in keys:
            continue
        if one.number < 0 and not one.extended and _BARE.fullmatch(one.value):
            simple.append(one.value.decode())
            continue
        if one.number >= 0:
            pieces.setdefault(one.name, []).append(one)
        elif one.extended:
            names.update(dict.fromkeys(_extended(one.value)))
        else:
            names.update(dict.fromkeys(readings(one.value)))
    for some in pieces.values():
        for charset, joined, raw in _joined(some):
            names[decoded(joined, charset)] = None
            names.update(dict.fromkeys(readings(raw)))
    return simple + [form for name in names for form in forms(name)]


def readings(value: bytes) -> Iterator[str]:
    """What a value may be shown as: as it is written, with encoded words decoded, with escapes undone."""
    yield decoded(value, "")
    if b"=?" in value:
        yield header_text(value)
    if b"%" in value:
        yield decoded(unquote_to_bytes(value), "")


def _extended(value: bytes) -> Iterator[str]:
    """The same of an extended value (RFC 2231 4): charset'language'text."""
    charset, first, rest = value.partition(b"'")
    _, second, text = rest.partition(b"'")
    if first and second:
        yield decoded(unquote_to_bytes(text), charset)
    elif first:
        yield decoded(unquote_to_bytes(rest), charset)
    yield from readings(value)


def _joined(pieces: list[Parameter]) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Pieces of a parameter (RFC 2231 3) put together: by their numbers, up to the first that is missing, as they come; of two
    with the same number the first and the last. Charset, octets, octets with their escapes."""
    first: dict[int, Parameter] = {}
    for one in pieces:
        first.setdefault(one.number, one)
    last = {one.number: one for one in pieces}
    orders = [[some[number] for number in sorted(some)] for some in (first, last)]
    whole = [one for at, one in enumerate(orders[0]) if one.number == at]
    for order in dict.fromkeys(map(tuple, [*orders, pieces, whole])):
        if order:
            yield _join(order)


def _join(order: tuple[Parameter, ...]) -> tuple[bytes, bytes, bytes]:
    charset = b""
    octets = []
    for at, one in enumerate(order):
        value = one.value
        if not at and one.extended and value.count(b"'") >= 2:
            charset, _, value = value.split(b"'", 2)
        octets.append(unquote_to_bytes(value) if one.extended else value)
    return charset, b"".join(octets)[: 4 * READ], b"".join([one.value for one in order])[: 4 * READ]


def forms(name: str) -> list[str]:
    """The forms of a name under which it may be shown or opened, itself first: without controls, marks of direction and of no
    width; in compatibility form (NFKC); the last component of a path; without trailing dots and blanks, and what follows a colon
    (a stream of NTFS) or NUL. Empty ones are left out."""
    if _SIMPLE.fullmatch(name) and not name.endswith((".", " ")) and not name.startswith(" "):
        return [name] if name else []
    found = {name: None}
    if "\0" in name:
        found[name.partition("\0")[0]] = None
    if not name.isprintable():
        plain = name.translate(_NO_CONTROLS)
        found[plain] = None
        if not plain.isascii():
            found["".join([one for one in plain if unicodedata.category(one) not in ("Cf", "Mn", "Zl", "Zp")])] = None
    for one in [one for one in found if not one.isascii()]:
        found["".join([unicodedata.normalize("NFKC", piece) for piece in _pieces(one)])] = None
    for one in list(found):
        found[one.replace("\\", "/").rstrip("/").rpartition("/")[2]] = None
    for one in list(found):
        if ":" in one:
            found[one.partition(":")[0]] = None
    for one in list(found):
        found[one.strip(" \t\r\n").rstrip(". \t\r\n\xa0")] = None
    return [one for one in found if one]


def _pieces(name: str) -> Iterator[str]:
    """A name in pieces, counted from its end, since normalizing takes the square of the marks in a row."""
    start = len(name) % FORMED
    if start:
        yield name[:start]
    for at in range(start, len(name), FORMED):
        yield name[at : at + FORMED]
