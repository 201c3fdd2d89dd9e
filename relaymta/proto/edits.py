"""Changes to a message's header as data, applied at once by a pure function.

What a filter asks for is untrusted: whatever octets it sends, a change adds one field or alters one, never the end of the header,
another field or a line of the body. What it does not touch stays as it is, octet for octet, lines that are no field included.

A header is what `header_end` finds: fields, and the empty line behind them if there is one. Its fields are those of `shown`.
"""

import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from relaymta.proto.header import LONGEST_LINE, header_end

__all__ = [
    "EDITS_MOST", "MOST", "Append", "Change", "Edit", "Edited", "Insert", "edited", "shown", "spaced", "subject_edits", "without",
]  # fmt: skip

MOST: Final = 65536  # octets by which a header grows
EDITS_MOST: Final = 1000  # edits that write a field

# Around a name may be what other parsers ignore there (as in `proto.dkim.name_of`). The names that are found are as many as the
# lines that are not folded: nothing that is matched has the beginning of another one in it.
_START: Final = re.compile(
    rb"\r\n(?![ \t])(?>(?:[\0-\x08\x0b\x0c\x0e-\x1f\x7f]*+([!-9;-~]++)(?>(?:[\0-\x09\x0b\x0c\x0e-\x20\x7f]|\r\n(?=[ \t]))*):)?)"
)
_UNFOLDED: Final = re.compile(rb"\r\n(?![ \t])")
_IN_NAMES: Final = bytes(octet for octet in range(33, 127) if octet != 0x3A)  # RFC 5322 3.6.8
_WHITE: Final = re.compile(rb"[ \t]*+")
_SPACES: Final = re.compile(r"\s+")
_CODE_MOST: Final = 75 - len("=?utf-8?q??=")  # octets of an encoded word (RFC 2047 2) for its text
_RECODED_MOST: Final = 4096  # octets of encoded words that are written anew: in the worst charset they become ten times as long
_SUBJECT: Final = b"Subject"
_UNKNOWN: Final = sys.maxsize


class Insert(NamedTuple):
    """A field at a position of the message as it is delivered and as the edits before have made it. As Sendmail and Postfix
    count, what is put in front of the header (Received, Authentication-Results) is one field; a removed field keeps its place. 0:
    above all; 1: right below the first, which is what is put in front if nothing is above that; n: right below the n-th; where no
    field of the header follows: at its end."""

    at: int
    name: bytes
    value: bytes


class Append(NamedTuple):
    """A field at the end of the header."""

    name: bytes
    value: bytes


class Change(NamedTuple):
    """Another value for a field of the header as it was shown. `instance` counts the fields of this name, in any case, from 1 on
    (0 is 1). The value b"" removes it; a later change puts it back in its place. Beyond the last instance nothing is removed, and
    a field is added at the end, which is an instance from then on. Fields of `Insert` and `Append` are not counted."""

    name: bytes
    instance: int
    value: bytes


Edit = Insert | Append | Change


class Edited(NamedTuple):
    """The message is written as `above`, what is put in front of the header, `header`, body. Where `header` is b"", an empty line
    has to be between what is put in front and the body; nowhere else, since `header` has its own. `dropped`: edits that were not
    applied."""

    above: bytes
    header: bytes
    dropped: int


def spaced(value: bytes) -> bytes:
    """A value with exactly one space in front of it, as it is written behind the colon. b"" stays b""."""
    return b" " + value.lstrip(b" \t\r\n\0") if value else value


def edited(header: bytes, edits: Sequence[Edit], most: int | None = None) -> Edited:
    """A header (b"": none) with these changes made, in order. Values are the octets behind the colon. LF and CRLF are folds in
    them, and a line behind one that does not begin with a space or tab gets a tab; CR, NUL and empty lines are left out; lines of
    more than 998 octets are folded at a blank. An edit is dropped whose name is none (RFC 5322 3.6.8), that cannot be folded, or
    by which the header would grow by more than `most` octets (None: MOST); and of those that write a field all behind the first
    EDITS_MOST. The same object where the header is not changed; where it is, a last line without an end gets one. Linear in the
    length of header and edits."""
    if not edits:
        return Edited(b"", header, 0)
    end = header_end(header)
    draft = _Draft(header[:end], MOST if most is None else most)
    plain = _are_plain(edits)
    dropped = written = 0
    for edit in edits:
        name, value = edit.name, edit.value
        if not plain and (not name or name.translate(None, _IN_NAMES)):
            dropped += 1
        elif not value and isinstance(edit, Change):
            draft.remove(name, edit.instance)
        else:
            field = name + b":" + value
            safe = field if plain and len(field) <= LONGEST_LINE else _safe(field)
            written += 1
            if safe is None or written > EDITS_MOST or not draft.write(edit, safe):
                dropped += 1
    above, below = draft.written()
    return Edited(above, header if below is None else below + header[end:], dropped)


def shown(header: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a header as edits count them: their names as they are written, and the whole fields with their folds, without
    the CRLF at their end. Blanks, folds and control characters around a name are no part of it. A line that is no field is none,
    and no part of one."""
    names, lines = _split(_core(header[: header_end(header)])[0])
    return [(name, line) for name, line in zip(names, lines, strict=True) if name]


def without(header: bytes, names: Collection[bytes]) -> bytes:
    """A header without the fields of these names (in lower case), their folded lines included; the same object if there are none.
    Names are those of `shown`. Linear in the length of the header."""
    wanted, lower = frozenset(names), header.lower()
    for name in _shortest(wanted):
        if name in lower:
            break
    else:
        return header
    end = header_end(header)
    core, tail = _core(header[:end])
    found, lines = _split(core)
    kept = [line for name, line in zip(found, lines, strict=True) if not name or name.lower() not in wanted]
    return header if len(kept) == len(lines) else _joined(kept, tail) + header[end:]


def subject_edits(header: bytes, template: str) -> list[Edit]:
    """Edits by which a header has exactly one Subject, as `template` has it: `[SPAM] {subject}`. The words of the first Subject
    that is not empty are kept octet for octet, encoded words (RFC 2047) included; without one the template has none. A Subject
    that is as the template already does not get it twice. What is not ASCII in the template becomes encoded words. No line is
    longer than 998 octets: a word that is as long is divided, an encoded word into shorter ones."""
    fields = [field for name, field in shown(header) if name.lower() == b"subject"]
    found = [field.partition(b":")[2].strip() for field in fields]
    words = next(filter(None, found), b"")
    front, given, behind = template.partition("{subject}")
    if not given:
        front += " "
    marked = words if _is_marked(words, front, behind) else _marked(words, front, behind)
    edits: list[Edit] = []
    if (marked != found[0] or any(len(line) > LONGEST_LINE for line in fields[0].split(b"\r\n"))) if fields else marked:
        value = b" " + marked
        edits.append(Change(_SUBJECT, 1, value if _safe(_SUBJECT + b":" + value) is not None else _refolded(marked)))
    edits += [Change(_SUBJECT, instance, b"") for instance in range(2, len(fields) + 1)]
    return edits


class _Draft:
    """A header that is being changed."""

    def __init__(self, block: bytes, most: int) -> None:
        self._block, self._tail = _core(block)
        self._begins = bool(block)
        self._lines: list[bytes | None] = []  # None: removed. Empty until they are needed: most changes do without
        self._names: list[bytes] = []
        self._fields: list[int] = []  # which lines are fields
        self._last = _UNKNOWN  # how many, and 1 for what is put in front of the header
        self._added: list[bytes | None] = []
        # As the added fields follow each other: their indices, and the number of fields, as above, that are in front of them.
        self._order: list[int] = []
        self._behind: list[int] = []
        self._instances: dict[bytes, list[int]] | None = None  # by name: indices of lines; -1, -2 ... of added fields
        self._room = most
        self._changed = False  # the header itself, not what is above it

    def write(self, edit: Edit, field: bytes) -> bool:
        """Make a change that writes this field. False: it does not fit."""
        if isinstance(edit, Change):
            places, at = self._places(edit.name), edit.instance - 1 if edit.instance > 0 else 0
            if at < len(places):
                return self._replace(places[at], field)
            if not self._add(field, len(self._order), self._last):
                return False
            places.append(-len(self._added))
            return True
        if isinstance(edit, Insert):
            return self._add(field, *self._position(edit.at))
        return self._add(field, len(self._order), self._last)

    def remove(self, name: bytes, instance: int) -> None:
        """Remove a field, if it is there."""
        places, at = self._places(name), instance - 1 if instance > 0 else 0
        if at < len(places):
            self._replace(places[at], None)

    def written(self) -> tuple[bytes, bytes | None]:
        """The fields above all others, and the header with what is added to it; None: it is not changed."""
        first = bisect_right(self._behind, 0)
        above = [field for index in self._order[:first] if (field := self._added[index]) is not None]
        if not self._changed:
            return _joined(above, 1), None
        if self._last == _UNKNOWN and self._block:
            self._lines = [self._block]  # nothing is added within it
        lines: list[bytes | None] = []
        done = 0
        for index, behind in zip(self._order[first:], self._behind[first:], strict=True):
            if behind > 1:
                until = self._fields[behind - 2] + 1 if behind < self._last else len(self._lines)
                lines += self._lines[done:until]
                done = until
            lines.append(self._added[index])
        lines += self._lines[done:]
        kept = [line for line in lines if line is not None]
        return _joined(above, 1), _joined(kept, self._tail if self._begins or not kept else 2)

    def _add(self, field: bytes, index: int, behind: int) -> bool:
        """Add a field behind so many that were added, and so many fields in all others."""
        growth = len(field) + 2
        if growth > self._room:
            return False
        self._room -= growth
        self._order.insert(index, len(self._added))
        self._behind.insert(index, behind)
        self._added.append(field)
        if behind:
            self._changed = True
        return True

    def _replace(self, place: int, field: bytes | None) -> bool:
        texts = self._lines
        if place < 0:
            texts, place = self._added, ~place
        old = texts[place]
        growth = 0 if field is None else len(field) + 2
        if old is not None:
            growth -= len(old) + 2
        if growth > self._room:
            return False
        self._room -= growth
        texts[place] = field
        self._changed = True
        return True

    def _position(self, at: int) -> tuple[int, int]:
        """Where an `Insert` goes: how many added fields are in front of it, and how many others."""
        behind = self._behind
        if at <= 0:
            return 0, 0
        if at == 1:
            return (1, 0) if behind and not behind[0] else (0, 1)
        if self._last == _UNKNOWN:
            self._split()
            behind = self._behind
        if not behind or at >= behind[-1] + len(behind):
            index = len(behind)
        else:
            index = bisect_left(range(len(behind)), at, key=lambda index: behind[index] + index)
        return index, min(at - index, self._last)

    def _split(self) -> None:
        names, lines = _split(self._block)
        self._lines = [*lines]
        self._names = names
        self._fields = [at for at, name in enumerate(names) if name]
        self._last = last = len(self._fields) + 1
        if self._behind:
            self._behind = [min(behind, last) for behind in self._behind]

    def _places(self, name: bytes) -> list[int]:
        """Where the instances of a name are."""
        instances = self._instances
        if instances is None:
            if self._last == _UNKNOWN:
                self._split()
            self._instances = instances = {}
            for at, known in enumerate(self._names):
                if known:
                    instances.setdefault(known.lower(), []).append(at)
        return instances.setdefault(name.lower(), [])


@lru_cache(16)
def _shortest(names: frozenset[bytes]) -> list[bytes]:
    """Names of which each name contains one: what is looked for first."""
    return [name for name in names if not any(other in name for other in names if other != name)]


def _are_plain(edits: Sequence[Edit]) -> bool:
    """Whether nothing has to be left out of any edit or to be folded but long lines."""
    names, values = [edit.name for edit in edits], [edit.value for edit in edits]
    return all(names) and not b"".join(names).translate(None, _IN_NAMES) and not _is_unsafe(b"".join(values))


def _is_unsafe(value: bytes) -> bool:
    return b"\n" in value or b"\r" in value or b"\0" in value


def _core(block: bytes) -> tuple[bytes, int]:
    """A header without the CRLFs at its end, and their number: 0 (its last line has no end), 1 or 2."""
    if block.endswith(b"\r\n\r\n"):
        return block[:-4], 2
    if block == b"\r\n":
        return b"", 2
    return (block[:-2], 1) if block.endswith(b"\r\n") else (block, 0)


def _split(core: bytes) -> tuple[list[bytes], list[bytes]]:
    """The lines of a header (as of `_core`), each with the folded ones behind it, in two lists: the name of the field that it is,
    b"" for none, and the line."""
    return (_START.findall(b"\r\n" + core), _UNFOLDED.split(core)) if core else ([], [])


def _joined(lines: list[bytes], tail: int) -> bytes:
    """A header of these lines and that many CRLFs at its end. The last line has one at least."""
    return b"\r\n".join([*lines, b"", b""] if tail == 2 else [*lines, b""])


def _safe(field: bytes) -> bytes | None:
    """A field without the CRLF at its end, whose name is one, with a value that is safe; None: it has a line that is too long and
    cannot be folded."""
    if len(field) <= LONGEST_LINE and not _is_unsafe(field):
        return field
    first, *others = field.translate(None, b"\r\0").split(b"\n")
    lines = [first, *[line if line[0] in b" \t" else b"\t" + line for line in others if line.strip()]]
    if max(map(len, lines)) > LONGEST_LINE:
        lines = [part for line in lines for part in _folded(line)]
        if max(map(len, lines)) > LONGEST_LINE:
            return None
    return b"\r\n".join(lines)


def _folded(line: bytes) -> Iterator[bytes]:
    """A line in lines of at most 998 octets, divided in front of a blank. The last one is longer if that is not possible."""
    if len(line) > LONGEST_LINE:
        line = line.rstrip(b" \t")
    start = 0
    while len(line) - start > LONGEST_LINE:
        match = _WHITE.match(line, start)
        assert match is not None
        until = start + LONGEST_LINE + 1
        at = max(line.rfind(b" ", match.end(), until), line.rfind(b"\t", match.end(), until))
        if at < 0:
            break
        yield line[start:at]
        start = at
    yield line[start:]


def _is_marked(words: bytes, front: str, behind: str) -> bool:
    """Whether a Subject begins and ends as a template does, as it is shown."""
    if not words:
        return not front.strip() and not behind.strip()
    from relaymta.proto.mime_text import header_text  # where it is needed: most workers do without it

    text = f" {' '.join(header_text(words).split())} "
    return text.startswith(_blanks(f" {front}")) and text.endswith(_blanks(f"{behind} "))


def _blanks(text: str) -> str:
    """Text with one space for each run of white space."""
    return _SPACES.sub(" ", text)


def _marked(words: bytes, front: str, behind: str) -> bytes:
    """A Subject as a template has it."""
    if not words:
        return _literal(f"{front}{behind}", False, False)
    left, right = _literal(front, False, words.startswith(b"=?")), _literal(behind, words.endswith(b"?="), False)
    return _beside(_beside(left, words, front[-1:].isspace()), right, behind[:1].isspace())


def _beside(left: bytes, right: bytes, blank: bool) -> bytes:
    """Two parts of a value, with a blank between them, which encoded words always have (RFC 2047 5)."""
    between = blank or left.endswith(b"?=") or right.startswith(b"=?")
    return left + b" " + right if left and right and between else left + right


def _literal(text: str, left: bool, right: bool) -> bytes:
    """Text of a template, without white space around it. What is not ASCII is in encoded words, from its first word to its last;
    the blank between it and an encoded word beside it (`left`, `right`) is in them, since none is shown between two of them."""
    words = text.split()
    coded = [at for at, word in enumerate(words) if not word.isascii()]
    if not coded:
        return " ".join(words).encode()
    first, last = coded[0], coded[-1] + 1
    middle = " ".join(words[first:last])
    if left and not first and text[:1].isspace():
        middle = f" {middle}"
    if right and last == len(words) and text[-1:].isspace():
        middle = f"{middle} "
    return b" ".join([*(word.encode() for word in words[:first]), *_encoded(middle), *(word.encode() for word in words[last:])])


def _encoded(text: str) -> list[bytes]:
    """Text as encoded words (RFC 2047, 4.2 and 5) in UTF-8."""
    words, word = [], ""
    for char in text:
        octets = char.encode("utf-8", "replace")
        code = "_" if char == " " else char if char.isascii() and char.isalnum() else "".join(f"={octet:02X}" for octet in octets)
        if len(word) + len(code) > _CODE_MOST:
            words.append(word)
            word = ""
        word += code
    return [f"=?utf-8?q?{word}?=".encode() for word in [*words, word] if word]


def _refolded(value: bytes) -> bytes:
    """A value of Subject whose lines are not too long, with one blank between its words."""
    lines, line = [], _SUBJECT + b":"
    for word in _short(value.split()):
        if len(line) + len(word) >= LONGEST_LINE:
            lines.append(line)
            line = b""
        line += b" " + word
    return b"\r\n".join([*lines, line])[len(_SUBJECT) + 1 :] or b" "


def _short(words: list[bytes]) -> Iterator[bytes]:
    """Words, those that are too long for a line in several: an encoded word in encoded words, of which as much is shown; others,
    and what is above _RECODED_MOST, between characters."""
    room = _RECODED_MOST
    for word in words:
        if len(word) < LONGEST_LINE:
            yield word
            continue
        if word.startswith(b"=?") and word.endswith(b"?=") and len(word) <= room:
            from relaymta.proto.mime_text import header_text

            room -= len(word)
            yield from _encoded(header_text(word))
            continue
        at = 0
        while at < len(word):
            end = at + LONGEST_LINE - 1
            for _ in range(3):  # a character has 4 octets at most
                end -= end < len(word) and word[end] & 0xC0 == 0x80
            yield word[at:end]
            at = end
