"""The parts of a message as any mail reader may show them, for rules about attachments.

An attacker writes the message, so there is not one reading of it. Delimiters of all boundaries that were declared so far divide
it, wherever they are nested, also those that are longer, within a line, or behind the last one; each piece is a part, whose
fields count wherever its header may end, all of them where there are several. A part that another reader would take to be longer
is read both ways where that matters; what is encoded though it must not be, is taken apart decoded, too. (What IMAP shows is one
reading: mime.py.)

Linear in the length of the message. What is beyond the limits, or would take longer, is not read: the result says so.
"""

import binascii
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from html import unescape
from typing import Final, NamedTuple

from relaymta._speedups.text import base64, quoted_printable
from relaymta.proto.attachment_names import Budget, Parameter, forms, names_of, parameters, readings, values_of
from relaymta.proto.mime_text import decoded
from relaymta.proto.zip_names import NAMES_MOST, zip_names

__all__ = ["ARCHIVE", "DOCUMENT", "IMAGE", "PROGRAM", "TEXT_MOST", "Limits", "Part", "Parts", "kinds_of", "parts"]

PROGRAM: Final = "program"
ARCHIVE: Final = "archive"
DOCUMENT: Final = "document"
IMAGE: Final = "image"
FIRST: Final = 16  # octets
TEXT_MOST: Final = 1 << 18  # octets of text in all
BOUNDARY_MOST: Final = 24  # octets of a boundary, from its first that is no dash, that a delimiter has to have
BOUNDARY_LEAST: Final = 6  # of one that is found within a line, too
BOUNDARIES_SOUGHT: Final = 8  # that are looked for each by itself
DASHES_MOST: Final = 300_000  # pairs of dashes that are no delimiter, where there are more
FIELDS_MOST: Final = 100  # of a part that say what it is
INDENT_MOST: Final = 100  # octets of white space in front of the first field
VALUE_MOST: Final = 1 << 16  # octets of one of them
LINES_MOST: Final = 500_000  # of a text in uuencode
WORK: Final = 4  # times the length of the message, that are read again, and
WORK_LEAST: Final = 1 << 20  # octets
TAR_AT: Final = 257  # where a tar archive has its signature (POSIX.1 ustar)
ISO_AT: Final = 32769  # and an image of a CD (ECMA-119 8.4)

LF, CR, DASH = 10, 13, 45

_EMPTY: Final = 1 << 62  # a place behind everything
_FIELD = re.compile(rb"content-(type|disposition|transfer-encoding|name|description)[ \t]*+:")
_VALUE = re.compile(rb"[^\r\n]*+(?>(?:[\r\n]++[ \t][^\r\n]*+)*)")
_FIELDS = re.compile(rb"(?>(?:[!-9;-~]++[ \t]*+:[^\r\n]*+(?>(?:[\r\n]++[ \t]++[^\r\n \t][^\r\n]*+)*)(?:\r*+\n|\r))*)")
_DASHES = re.compile(rb"-*+")
_TYPE = re.compile(
    rb"([^\x00-\x20\x7f-\xff()<>@,;:\\\"/\[\]?=]++)[ \t\r\n\"]*+/[ \t\r\n\"]*+([^\x00-\x20\x7f-\xff()<>@,;:\\\"/\[\]?=]++)"
)
_COMMENT = re.compile(rb"\([^()]*+\)")
_BASE64 = re.compile(rb"[ \t\r\n]*+[A-Za-z0-9+/]{8}[A-Za-z0-9+/=\r\n \t]*+\Z")
_BEGIN = re.compile(rb"begin(-base64)?[ \t]++[0-7]{3,6}[ \t]++([^\r\n]++)")
_YENC = re.compile(rb"=ybegin[ \t][^\r\n]{0,300}?name=([^\r\n]*+)[\r\n]*+(?>(?:=ypart[^\r\n]*+[\r\n]*+)?)")
_YENC_ESCAPE = re.compile(rb"=(.)", re.S)
_TAG = re.compile(r"<[^<>]*+>")
_WITHIN_TEXT: Final = (b"\nbegin", _BEGIN), (b"\n=ybegin ", _YENC), (b"\rbegin", _BEGIN), (b"\r=ybegin ", _YENC)
_NOT_MESSAGES: Final = ("message/delivery-status", "message/disposition-notification", "message/feedback-report")
_NO_YENC: Final = bytes((octet - 42) & 255 for octet in range(256))
_PROGRAMS: Final = (
    b"MZ", b"ZM", b"\x7fELF", b"#!", b"\xca\xfe\xba\xbe", b"\xbe\xba\xfe\xca", b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf",
    b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe",
)  # fmt: skip
_ARCHIVES: Final = (
    b"PK\3\4", b"PK\5\6", b"PK\7\x08", b"PK00PK\3\4", b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0",
    b"MSCF", b"ISc(", b"\x60\xea",
)  # fmt: skip
_ARCHIVES_WITHIN: Final = (b"ustar", TAR_AT), (b"**ACE**", 7), (b"CD001", ISO_AT)
_DOCUMENTS: Final = (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"%PDF", b"{\\rt")
_IMAGES: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ZIP_NAMES: Final = (
    ".zip", ".zipx", ".jar", ".docx", ".docm", ".xlsx", ".xlsm", ".xlsb", ".pptx", ".pptm", ".odt", ".ods", ".odp", ".apk",
    ".xpi", ".war", ".ear", ".epub", ".appx", ".msix",
)  # fmt: skip
_CONTENT_TYPES: Final = "[Content_Types].xml"


class Limits(NamedTuple):
    """What is read of a message: levels of parts within parts, parts, names within an archive."""

    depth: int = 20
    parts: int = 1000
    archived: int = NAMES_MOST


class _Reading(NamedTuple):
    """Octets of a part as a reader may see them: octets[start:end], to be undone."""

    octets: bytes
    start: int
    end: int
    undo: Callable[[bytes], bytes]

    def first(self) -> bytes:
        """The first FIRST octets, decoded; of the beginning only, where that has so many."""
        return self._beginning(4 * FIRST)[:FIRST]

    def begun(self) -> bytes:
        """The beginning, as much as tells what kind it is."""
        return self._beginning(4 * TAR_AT)

    def _beginning(self, size: int) -> bytes:
        for some in (size, 64 * size):
            if self.start + some < self.end:
                found = self.undo(self.octets[self.start : self.start + some])
                if 4 * len(found) >= size:
                    return found
        return self.whole()

    def whole(self) -> bytes:
        """All of it, decoded."""
        return self.undo(self.octets[self.start : self.end])


class Part:
    """A part, as it may be taken. `names`: all that a reader may show, each in all `forms`; `types`: media types that it may be
    taken to have, lower case, "" where its header has none; `depth`: how many parts it is nested in. The other attributes are
    made when they are asked for; then they take time linear in its length."""

    __slots__ = ("_archive", "_charsets", "_kinds", "_readings", "_walk", "depth", "names", "types")

    def __init__(self, walk: "_Walk", depth: int, names: tuple[str, ...], types: tuple[str, ...], charsets: list[bytes]) -> None:
        self._walk = walk
        self.depth = depth
        self.names = names
        self.types = types
        self._charsets = charsets
        self._readings: list[_Reading] = []  # the first: of most readers
        self._kinds: frozenset[str] | None = None
        self._archive: tuple[tuple[str, ...], bool] | None = None

    @property
    def first(self) -> bytes:
        """The first 16 octets, decoded, as most readers see them."""
        return self._readings[0].first() if self._readings else b""

    @property
    def octets(self) -> bytes:
        """All octets, decoded, as most readers see them."""
        return self._readings[0].whole() if self._readings else b""

    @property
    def is_text(self) -> bool:
        """Whether it is of type text."""
        return any(one.startswith("text/") or not one for one in self.types)

    def beginning(self, most: int) -> bytes:
        """The first octets, decoded, as most readers see them: `most` of them."""
        if not self._readings:
            return b""
        one = self._readings[0]
        return one.undo(one.octets[one.start : min(one.end, one.start + 3 * most)])[:most]

    @property
    def kinds(self) -> frozenset[str]:
        """Of PROGRAM, ARCHIVE, DOCUMENT, IMAGE those that it is by its first octets, in any reading. An OOXML file is both an
        archive and a document."""
        if self._kinds is None:
            found = set[str]()
            for one in self._readings:
                found |= kinds_of(one.begun())
                if one.end - one.start > ISO_AT and not found:
                    found |= kinds_of(one.undo(one.octets[one.start : one.start + 2 * ISO_AT]))
            if ARCHIVE in found and _CONTENT_TYPES in self._listed(found)[0]:
                found.add(DOCUMENT)
            self._kinds = frozenset(found)
        return self._kinds

    @property
    def archived(self) -> tuple[str, ...]:
        """The names within it, where it is a zip archive or has one behind something else, each in all `forms`."""
        return self._listed(self.kinds)[0]

    @property
    def unlisted(self) -> bool:
        """Whether there may be more names within it than `archived` has: the archive has more than the limit, or names that are
        too long, or archives of the whole message take too long to read."""
        return not self._listed(self.kinds)[1]

    def _listed(self, kinds: set[str] | frozenset[str]) -> tuple[tuple[str, ...], bool]:
        if self._archive is None:
            self._archive = (), True
            if kinds & {PROGRAM, ARCHIVE} or not kinds or any(name.lower().endswith(_ZIP_NAMES) for name in self.names):
                names: dict[str, None] = {}
                whole = True
                for one in self._readings:
                    if not self._walk.work(one.end - one.start):
                        whole = False
                        break
                    some, all_of_them = zip_names(one.whole(), self._walk.limits.archived)
                    names.update(dict.fromkeys(some))
                    whole = whole and all_of_them
                self._archive = tuple(names), whole
        return self._archive

    def texts(self, most: int = TEXT_MOST) -> Iterator[str]:
        """The text of a part of type text, up to `most` octets, in each charset that it names, in each reading; of HTML also
        without its tags and with its character references undone. Of another type: nothing."""
        if not self.is_text:
            return
        for one in self._readings:
            octets = one.undo(one.octets[one.start : min(one.end, one.start + 3 * most)])[:most]
            for charset in self._charsets or [b""]:
                text = decoded(octets, charset)
                yield text
                if "text/html" in self.types:
                    yield _shown(text)


class Parts(NamedTuple):
    """The parts of a message: the message itself first, each in front of those in it. `excessive`: it goes beyond the limits, or
    has more of something than can be read in linear time, so there may be parts and names that are not here."""

    parts: tuple[Part, ...]
    excessive: bool

    def texts(self, most: int = TEXT_MOST) -> list[str]:
        """What `Part.texts` gives, of all parts, `most` characters of all their first readings together."""
        found: list[str] = []
        for one in self.parts:
            size = 0
            for text in one.texts(most):
                found.append(text)
                size = max(size, len(text))
            most -= size
            if most <= 0:
                break
        return found


def parts(header: bytes, body: bytes, limits: Limits = Limits()) -> Parts:  # noqa: B008
    """The parts of a message: `header` up to and with its empty line, `body` what is behind it. Nothing is an error."""
    walk = _Walk(limits, len(header) + len(body))
    walk.message(header, body)
    return Parts(tuple(walk.parts), walk.excessive or walk.budget.excessive)


def kinds_of(octets: bytes) -> set[str]:
    """The kinds that octets are by how they begin (those up to 32,774 tell)."""
    found = set[str]()
    if octets.startswith(_PROGRAMS):
        found.add(PROGRAM)
    if octets.startswith(_ARCHIVES) or any(octets.startswith(some, at) for some, at in _ARCHIVES_WITHIN):
        found.add(ARCHIVE)
    if octets.startswith(_DOCUMENTS):
        found.add(DOCUMENT)
    if octets.startswith(_IMAGES) or (octets.startswith(b"RIFF") and octets[8:12] == b"WEBP"):
        found.add(IMAGE)
    return found


def _shown(text: str) -> str:
    """HTML without tags, and with its character references undone."""
    text = _TAG.sub("", text)
    try:
        return unescape(text)
    except ValueError:  # a number that is too long
        return text


class _Boundaries:
    """The boundaries that were declared, and where their delimiters are in octets that are read from front to back."""

    def __init__(self, walk: "_Walk", octets: bytes, known: dict[bytes, int] | None = None) -> None:
        self.walk = walk
        self.octets = octets
        self.depths: dict[bytes, int] = dict(known or {})  # by boundary without dashes in front, cut: of the parts between
        self.whole: set[bytes] = set()
        self.needles: dict[bytes, int] = {}  # what is looked for, and where the next one is
        self.keys: dict[bytes, bytes] = {}  # by needle
        for key in self.depths:
            self._seek(key)

    def add(self, boundary: bytes, depth: int) -> None:
        """One more, of parts that are so deep."""
        boundary = boundary.rstrip(b" \t\r\n")
        self.whole.add(boundary.lstrip(b"-"))
        key = boundary.lstrip(b"-")[:BOUNDARY_MOST]
        if key not in self.depths:
            self.depths[key] = depth
            self._seek(key)

    def _seek(self, key: bytes) -> None:
        if len(key) >= BOUNDARY_LEAST:
            self.needles[b"--" + key] = -1
            self.keys[b"--" + key] = key
            return
        for end in (b"\n--", b"\r--"):
            self.needles[end + key] = -1
            self.keys[end + key] = key

    def next(self, start: int, end: int) -> tuple[int, bytes, int]:
        """The first delimiter from `start` on that begins in front of `end`: where it is (_EMPTY: nowhere), its key, and where
        that ends."""
        octets = self.octets
        if len(self.needles) > 2 * BOUNDARIES_SOUGHT:
            return self._among_dashes(start, end)
        best, found = _EMPTY, b""
        low = max(start - 1, 0)
        for needle, at in self.needles.items():
            if at < low:
                at = octets.find(needle, low)
                if not low and needle[:1] != b"-" and octets.startswith(needle[1:]):
                    at = 0
                self.needles[needle] = at = at if at >= 0 else _EMPTY
            if at < best or (at == best and len(needle) > len(found)):
                best, found = at, needle
        if best >= end:
            return _EMPTY, b"", 0
        shift = best == 0 and found[:1] != b"-" and octets.startswith(found[1:])
        return best, self.keys[found], best + len(found) - shift

    def _among_dashes(self, start: int, end: int) -> tuple[int, bytes, int]:
        """The same where there are many boundaries."""
        octets, depths = self.octets, self.depths
        sizes = sorted({len(key) for key in depths}, reverse=True)
        at = octets.find(b"--", start, end)
        while at >= 0:
            match = _DASHES.match(octets, at)
            stop = at if match is None else match.end()
            lined = not at or octets[at - 1] in b"\r\n"
            for size in sizes:
                key = octets[stop : stop + size]
                if key in depths and (lined or size >= BOUNDARY_LEAST):
                    return at, key, stop + size
            self.walk.dashes -= 1
            if self.walk.dashes < 0:
                self.walk.excessive = True
                break
            at = octets.find(b"--", stop, end)
        return _EMPTY, b"", 0

    def line(self, at: int, stop: int) -> tuple[int, bytes]:
        """Behind a delimiter: where its line ends, and the boundary in it, with what follows, without dashes in front."""
        octets = self.octets
        end = octets.find(b"\n", stop, stop + 1000)
        bare = octets.find(b"\r", stop, stop + 1000 if end < 0 else end)
        end = end if bare < 0 or octets[bare + 1 : bare + 2] == b"\n" else bare
        if end < 0:
            end = bare if bare >= 0 else stop
        line = octets[at:end].strip(b" \t\r\n")
        return end, line.lstrip(b"-")

    def ends(self, at: int) -> int:
        """Where the part in front of a delimiter ends."""
        front = self.octets[max(0, at - 100) : at + 1]
        front = front[:-1].rstrip(b"-") if self.octets[at] == DASH else front
        begin = max(0, at - 100)
        if front.endswith(b"\r\n"):
            return begin + len(front) - 2
        if self.octets[at] != DASH and front.endswith((b"\n", b"\r")):
            return at - (self.octets[at] == LF and self.octets[max(0, at - 1)] == CR)
        return begin + len(front) - front.endswith((b"\n", b"\r"))


class _Walk:
    """A walk through a message."""

    def __init__(self, limits: Limits, size: int) -> None:
        self.limits = limits
        self.parts: list[Part] = []
        self.excessive = False
        self.budget = Budget()
        self.dashes = DASHES_MOST
        self.left = WORK * size + WORK_LEAST

    def work(self, octets: int) -> bool:
        """Whether so many octets may be read once more."""
        self.left -= octets
        return self.left >= 0

    def message(self, header: bytes, body: bytes) -> None:
        """All parts of a message."""
        stream = _Stream(self, body, {})
        described = _described(header, self.budget)
        stream.begin(described, 0, [0], b"")
        stream.run(0)

    def again(self, octets: bytes, depth: int, known: dict[bytes, int], header: bool) -> None:
        """What is in octets that were encoded: a message, or a multipart's body."""
        if depth > self.limits.depth:
            self.excessive = True
            return
        if not self.work(len(octets)):
            self.excessive = True
            return
        stream = _Stream(self, octets, known)
        stream.run(stream.header(0, depth, b"") if header else 0)


class _Described(NamedTuple):
    """What the fields of a part say. `undo`: how its octets may be decoded; `encoded`: they are, `uu`: perhaps in uuencode."""

    names: tuple[str, ...]
    types: tuple[str, ...]
    boundaries: list[bytes]
    charsets: list[bytes]
    undo: list[Callable[[bytes], bytes]]
    encoded: bool
    guess: bool


_NOTHING: Final = _Described((), ("",), [], [], [bytes], False, False)


def _described(header: bytes, budget: Budget) -> _Described:
    low = header.lower()
    at = low.find(b"content-")
    if at < 0:
        return _NOTHING
    names: dict[str, None] = {}
    types: list[str] = []
    boundaries: list[bytes] = []
    charsets: list[bytes] = []
    encodings: list[bytes] = []
    described: list[bytes] = []
    count = 0
    while at >= 0:
        match = _FIELD.match(low, at)
        if match is None or (at and low[at - 1] not in b"\r\n" and (at > INDENT_MOST or low[:at].strip(b" \t\r\n"))):
            at = low.find(b"content-", at + 8)
            continue
        count += 1
        end = _VALUE.match(header, match.end()).end()  # type: ignore[union-attr]
        if count > FIELDS_MOST or end - match.end() > VALUE_MOST:
            budget.excessive = True
            end = min(end, match.end() + VALUE_MOST)
            if count > FIELDS_MOST:
                break
        value = header[match.end() : end].strip(b" \t\r\n")
        what = match[1]
        if what == b"transfer-encoding":
            encodings.append(value[:100].lower())
        elif what == b"description":
            described.append(value[:1000])
        elif what == b"name":
            names.update(dict.fromkeys(form for text in readings(value[:1000]) for form in forms(text)))
        else:
            found = parameters(value, budget)
            if found:
                names.update(dict.fromkeys(names_of(found)))
            if what == b"type":
                types += _types(value)
                boundaries += _of_type(found, b"boundary", types)
                charsets += values_of(found, b"charset") if found else []
        at = low.find(b"content-", end)
    if not names and described:
        names.update(dict.fromkeys(form for one in described for text in readings(one) for form in forms(text)))
    undo, encoded, guess = _undone(tuple(encodings))
    return _Described(tuple(names), tuple(dict.fromkeys(types)) or ("",), boundaries, charsets[:4], undo, encoded, guess)


def _of_type(found: list[Parameter], name: bytes, types: list[str]) -> list[bytes]:
    """Boundaries; that of a multipart without one is empty."""
    values = values_of(found, name)[:100]
    return values or ([b""] if types and types[-1].startswith("multipart/") else [])


def _types(value: bytes) -> tuple[str, ...]:
    """The media types that a value may be read as."""
    front = value[:1000].partition(b";")[0]
    if len(front) <= 100 and b"(" not in front:
        return _type(front)
    return _type(front[:100]) + _type(_COMMENT.sub(b"", value[:1000])[:100])


@lru_cache(256)
def _type(value: bytes) -> tuple[str, ...]:
    match = _TYPE.search(value)
    return () if match is None else ((match[1] + b"/" + match[2]).lower().decode("latin-1"),)


@lru_cache(256)
def _undone(encodings: tuple[bytes, ...]) -> tuple[list[Callable[[bytes], bytes]], bool, bool]:
    """How a part may be decoded, whether it is encoded, and whether it may be, in base64, though no field says so."""
    undo: list[Callable[[bytes], bytes]] = []
    guess = False
    for one in dict.fromkeys(encodings):
        if b"base64" in one:
            undo.append(base64)
        elif b"quoted" in one:
            undo.append(quoted_printable)
        else:
            undo.append(bytes)
            guess = guess or not one.startswith((b"7bit", b"8bit", b"binary"))
    undo = list(dict.fromkeys(undo))
    return undo or [bytes], any(one is not bytes for one in undo), guess


class _Stream:
    """Octets that parts are in, read from front to back."""

    def __init__(self, walk: _Walk, octets: bytes, known: dict[bytes, int]) -> None:
        self.walk = walk
        self.octets = octets
        self.boundaries = _Boundaries(walk, octets, known)
        self.hits: list[tuple[int, bytes]] = []  # delimiters: where, and the boundary; b"": some reader sees none
        self.open: list[tuple[Part, _Described, list[int], bytes, int]] = []  # parts that end at the next delimiter
        self.pending: list[tuple[Part, _Described, list[int], bytes, int, int]] = []
        self.empty = [-1, -1, -1]  # where the next empty lines are
        self.digests: set[bytes] = set()

    def run(self, at: int) -> None:
        """Read all from `at` on."""
        size = len(self.octets)
        while self.boundaries.needles:
            hit, key, stop = self.boundaries.next(at, size)
            if hit == _EMPTY:
                break
            end, line = self.boundaries.line(hit, stop)
            closing = line not in self.boundaries.whole and line.endswith(b"--") and line[:-2] in self.boundaries.whole
            boundary = line[:-2] if closing else line
            before = self.boundaries.ends(hit)
            self.hits.append((before, boundary if boundary in self.boundaries.whole else b""))
            self._end(before)
            at = max(end, stop)
            if closing:
                continue
            at = self.header(end, self.boundaries.depths[key], boundary, key in self.digests)
            if len(self.walk.parts) >= self.walk.limits.parts:
                self.walk.excessive = True
                break
        self._end(size)
        for one in self.pending:
            self._decoded(*one)

    def header(self, start: int, depth: int, boundary: bytes, digest: bool = False) -> int:
        """Begin the part whose header is at `start`; where to look for delimiters next."""
        octets, size = self.octets, len(self.octets)
        if octets.startswith(b"\r\n", start):
            start += 2
        elif start < size and start and octets[start] in b"\r\n":
            start += 1
        begin = start
        while begin < size and octets[begin] in b"\r\n" and begin - start < 100:  # some skip empty lines in front
            begin += 1
        end = min(self._empty(b"\n\r\n", 0, begin), self._empty(b"\n\n", 1, begin), self._empty(b"\n\r\r\n", 2, begin))
        cut = self.boundaries.next(start, min(end, size))[0] if self.boundaries.needles else _EMPTY
        strict = min(end, cut, size)
        area = octets[begin : strict + (strict == end)]
        bodies = [begin if begin > start else 0, self._body(strict)] if begin > start else [self._body(strict)]
        fields = _FIELDS.match(area)
        early = fields.end() if fields else 0
        if early < len(area):
            bodies.append(begin + early)
        inner = begin + early if strict in (cut, size) else self._body(strict)
        bare = area.find(b"\r\r")
        if bare >= 0:
            bodies.append(begin + bare + 2)
        described = _described(area, self.walk.budget)
        if digest and described.types == ("",):
            described = described._replace(types=("message/rfc822",))
        return self.begin(described, depth, [min(one, size) for one in bodies], boundary, strict, inner)

    def _empty(self, what: bytes, number: int, at: int) -> int:
        at = max(at - 1, 0)
        if self.empty[number] < at:
            found = self.octets.find(what, at)
            self.empty[number] = found if found >= 0 else _EMPTY
        return self.empty[number]

    def _body(self, at: int) -> int:
        """Behind the empty line at `at`."""
        octets = self.octets
        return octets.find(b"\n", at + 1) + 1 or len(octets) if octets[at : at + 1] == b"\n" else at

    def begin(
        self, described: _Described, depth: int, bodies: list[int], boundary: bytes, search: int = 0, inner: int = 0
    ) -> int:
        """Begin a part with a header that was read; where to look for delimiters next."""
        walk = self.walk
        if depth > walk.limits.depth:
            walk.excessive = True
            return search
        for one in described.boundaries:
            self.boundaries.add(one, depth + 1)
            if "multipart/digest" in described.types:
                self.digests.add(one.rstrip(b" \t\r\n").lstrip(b"-")[:BOUNDARY_MOST])
        part = Part(walk, depth, described.names, described.types, described.charsets)
        walk.parts.append(part)
        self.open.append((part, described, bodies, boundary, len(self.hits)))
        nested = any(one.startswith("message/") and one not in _NOT_MESSAGES for one in described.types)
        nested = nested or any(name.lower().endswith(".eml") for name in described.names)
        if nested and not (described.encoded and len(described.undo) == 1):
            if len(walk.parts) >= walk.limits.parts:
                walk.excessive = True
            else:
                return self.header(inner, depth + 1, boundary)
        return search

    def _end(self, end: int) -> None:
        """The parts that are open end here."""
        for part, described, bodies, boundary, hit in self.open:
            self._readings(part, described, bodies, end)
            self.pending.append((part, described, bodies, boundary, hit, end))
        self.open.clear()

    def _readings(self, part: Part, described: _Described, bodies: list[int], end: int) -> None:
        undo = described.undo
        for start in dict.fromkeys(bodies):
            start = min(start, end)
            for one in undo:
                part._readings.append(_Reading(self.octets, start, end, one))
            if described.guess and base64 not in undo and _BASE64.match(self.octets, start, min(end, start + 200)):
                part._readings.append(_Reading(self.octets, start, end, base64))

    def _decoded(self, part: Part, described: _Described, bodies: list[int], boundary: bytes, hit: int, end: int) -> None:
        """What is in a part decoded; and the part as it is to a reader who sees other delimiters."""
        longer = self._longer(boundary, hit, end)
        if (
            longer > end
            and (described.encoded or bytes in described.undo)
            and not part.types[0].startswith(("multipart/", "message/"))
        ):
            if self.walk.work(longer - end):
                self._readings(part, described, bodies, longer)
            else:
                self.walk.excessive = True
        if any(one.startswith("text/") or not one for one in part.types) or described.guess:
            self._within_text(part)
        if not described.encoded:
            return
        message = any(one.startswith("message/") for one in part.types) or any(
            name.lower().endswith(".eml") for name in part.names
        )
        multipart = bool(described.boundaries)
        for undo in described.undo if message or multipart else ():
            if undo is not bytes:
                octets = undo(self.octets[bodies[0] : max(end, longer)])
                self.walk.again(octets, part.depth + 1, self._known(described, part.depth), message)

    def _known(self, described: _Described, depth: int) -> dict[bytes, int]:
        return {one.rstrip(b" \t\r\n").lstrip(b"-")[:BOUNDARY_MOST]: depth + 1 for one in described.boundaries}

    def _longer(self, boundary: bytes, hit: int, end: int) -> int:
        """Where the part ends for a reader who knows only the boundary in front of it."""
        for at, found in self.hits[hit:]:
            if found and found == boundary:
                return at
        return len(self.octets)

    def _within_text(self, part: Part) -> None:
        """Parts within a text, in uuencode or yEnc."""
        for one in part._readings[:4]:
            octets, at, end = one.octets, one.start, one.end
            if one.undo is not bytes:
                if not self.walk.work(end - at):
                    self.walk.excessive = True
                    return
                octets = one.whole()
                at, end = 0, len(octets)
            for mark, pattern in _WITHIN_TEXT if octets.find(b"begin", at, end) >= 0 else ():
                if octets.startswith(mark[1:], at) or octets.find(mark, at, end) >= 0:
                    self._begun(part, mark, pattern, _Reading(octets, at, end, bytes))

    def _begun(self, part: Part, mark: bytes, pattern: re.Pattern[bytes], text: _Reading) -> None:
        octets, at, end, _ = text
        without: set[bytes] = set()  # ends that are not there from here on
        start = at if octets.startswith(mark[1:], at) else octets.find(mark, at, end) + 1
        while start > 0 or start == at:
            stop = start
            match = pattern.match(octets, start, end)
            if match is not None:
                if len(self.walk.parts) >= self.walk.limits.parts:
                    self.walk.excessive = True
                    return
                yenc = pattern is _YENC
                last = b"\n=yend" if yenc else b"\n====" if match[1] else b"\nend"
                stop = -1 if last in without else octets.find(last, match.end(), end)
                if stop < 0:
                    without.add(last)
                    stop = octets.find(mark, match.end(), end)
                    stop = end if stop < 0 else stop
                undo = _from_yenc if yenc else base64 if match[1] else _from_uu
                self._add(part, match[1] if yenc else match[2], _Reading(octets, match.end(), stop, undo))
            start = octets.find(mark, stop, end) + 1
            if not start:
                break

    def _add(self, part: Part, value: bytes, reading: _Reading) -> None:
        """A part within the text of another."""
        names = tuple(form for text in readings(value[:1000]) for form in forms(text))
        found = Part(self.walk, part.depth + 1, names, ("application/octet-stream",), [])
        found._readings.append(reading)
        self.walk.parts.append(found)


def _from_uu(octets: bytes) -> bytes:
    """What octets are in uuencode, up to a line that is none."""
    found = []
    at = 0
    for _ in range(LINES_MOST):
        while at < len(octets) and octets[at] in b"\r\n":
            at += 1
        end = octets.find(b"\n", at)
        line = octets[at : len(octets) if end < 0 else end].rstrip(b"\r")
        if not line or line == b"end":
            break
        size = ((line[0] - 32 & 63) * 4 + 5) // 3
        try:
            found.append(binascii.a2b_uu(line[: size + 1]))
        except binascii.Error:
            break
        if end < 0:
            break
        at = end + 1
    return b"".join(found)


def _from_yenc(octets: bytes) -> bytes:
    """What octets are in yEnc."""
    octets = octets.translate(None, b"\r\n")
    if b"=" in octets:
        octets = _YENC_ESCAPE.sub(lambda match: bytes([match[1][0] - 64 & 255]), octets)
    return octets.translate(_NO_YENC)
