"""Arguments of IMAP commands about messages: FETCH, STORE, COPY, MOVE, EXPUNGE (RFC 3501 and 9051 6.4; RFC 3516, 4315, 6851,
7162, 8474, 8514); as in `imap_grammar`. `uid`: the command is one of UIDs."""

import re
from functools import lru_cache

from relaymta.proto.imap_command import Copy, Expunge, Fetch, Section, Store
from relaymta.proto.imap_words import NUMBER_MOST, OPEN, WORD, Refused, Words

__all__ = ["copy", "expunge", "fetch", "store", "uid_copy", "uid_expunge", "uid_fetch", "uid_store"]

ITEMS = frozenset(
    (
        "FLAGS",
        "UID",
        "INTERNALDATE",
        "RFC822.SIZE",
        "ENVELOPE",
        "BODY",
        "BODYSTRUCTURE",
        "MODSEQ",
        "EMAILID",
        "THREADID",
        "SAVEDATE",
    )
)
MACROS = {
    "FAST": ("FLAGS", "INTERNALDATE", "RFC822.SIZE"),
    "ALL": ("FLAGS", "INTERNALDATE", "RFC822.SIZE", "ENVELOPE"),
    "FULL": ("FLAGS", "INTERNALDATE", "RFC822.SIZE", "ENVELOPE", "BODY"),
}
WHOLE = {
    "RFC822": Section("RFC822"),
    "RFC822.HEADER": Section("RFC822.HEADER", text="HEADER", peek=True),
    "RFC822.TEXT": Section("RFC822.TEXT", text="TEXT"),
}
PREVIEW = Section("PREVIEW", peek=True)
DEEPEST = 100  # part numbers of a section
SECTIONS = 1000  # of one FETCH
KNOWN_WORDS, KNOWN_OCTETS = 200, 2000  # what is remembered of a FETCH: 256 times as much at most

_SECTION = re.compile(
    r"(BODY|BODY\.PEEK|BINARY|BINARY\.PEEK|BINARY\.SIZE)\["
    r"([1-9][0-9]{0,9}(?>(?:\.[1-9][0-9]{0,9})*))?"
    r"(?:(?:(?<=\[)|(?<=[0-9])\.)(HEADER\.FIELDS\.NOT|HEADER\.FIELDS|HEADER|TEXT|MIME))?"
)
_BEHIND = re.compile(r"\](?:<([0-9]{1,10})\.([0-9]{1,10})>)?")


def fetch(words: Words, uid: bool = False) -> Fetch:
    """FETCH set item-or-macro-or-(items) [(CHANGEDSINCE n [VANISHED])]."""
    words.space()
    numbers = words.numbers()
    words.space()
    kinds, values = words.kinds[words.at : -1], words.values[words.at :]
    parse = _parse_known if len(kinds) <= KNOWN_WORDS and _comes_again(b"".join(values)) else _parse
    return Fetch(numbers, *parse(kinds, tuple(values), words.qresync, uid), uid)


def _comes_again(text: bytes) -> bool:
    """Whether another FETCH may have the same behind its set: not with CHANGEDSINCE, which ends in another number each time."""
    return len(text) <= KNOWN_OCTETS and not text[-1:].isdigit() and text[-8:].upper() != b"VANISHED"


Asked = tuple[tuple[str, ...], tuple[Section, ...], int | None, bool]


def _parse(kinds: bytes, values: tuple[bytes, ...], qresync: bool, uid: bool) -> Asked:
    """What is behind the set: the fields of Fetch from `items` to `vanished`."""
    words = Words(kinds, list(values), qresync=qresync)
    items: dict[str, None] = {"UID": None} if uid else {}
    sections: dict[Section, Section] = {}
    if words.take(OPEN):
        more = True
        while more:
            _item(words, items, sections)
            more = words.more()
    elif words.kinds[words.at] == WORD and words.values[words.at].upper().decode("latin-1") in MACROS:
        items |= dict.fromkeys(MACROS[words.keyword("a macro")])
    else:
        _item(words, items, sections)
    since, vanished = _modifiers(words) if words.kinds[words.at] else (None, False)
    words.end()
    if vanished and not (uid and words.qresync and since is not None):
        raise Refused("VANISHED is allowed with CHANGEDSINCE in UID FETCH after ENABLE QRESYNC (RFC 7162 3.2.6)")
    if since is not None:
        items["MODSEQ"] = None
    return tuple(items), tuple(sections.values()), since, vanished


# A client asks for the same items again and again, and so do all clients of its kind: that costs a third of parsing them.
_parse_known = lru_cache(256)(_parse)


def uid_fetch(words: Words) -> Fetch:
    """UID FETCH."""
    return fetch(words, uid=True)


def _item(words: Words, items: dict[str, None], sections: dict[Section, Section]) -> None:
    value = words.values[words.at] if words.kinds[words.at] == WORD else b""
    name = value.upper().decode("latin-1")
    if name in ITEMS:
        items[name] = None
    elif name in WHOLE:
        sections[WHOLE[name]] = WHOLE[name]
    elif name == "PREVIEW":
        sections.setdefault(PREVIEW, PREVIEW._replace(text=_lazy(words)))
    elif "[" in name:
        found = _section(words, name)
        label = found._replace(peek=True)
        sections[label] = found if sections.get(label, found).peek else found._replace(peek=False)
        if len(sections) > SECTIONS:
            words.expected(f"at most {SECTIONS} sections")
    else:
        words.expected("a FETCH item")
    words.at += 1


def _lazy(words: Words) -> str:
    """The modifier of PREVIEW (RFC 8970 3.1), if there is one. Its last word is the current one then."""
    if words.kinds[words.at + 1 : words.at + 3] != b" (":
        return ""
    if words.kinds[words.at + 3] != WORD or words.values[words.at + 3].upper() != b"LAZY":
        return ""
    words.at += 2
    words.open()
    if words.keyword("LAZY") != "LAZY":
        words.reject("expected LAZY")
    words.close()
    words.at -= 1
    return "LAZY"


def _section(words: Words, name: str) -> Section:
    """A section, whose first word is `name`, in upper case. Its last word is the current one then."""
    match = _SECTION.match(name)
    if match is None:
        words.expected("a FETCH item")
    kind, numbers, text = match[1], match[2], match[3] or ""
    part = tuple(map(int, numbers.split("."))) if numbers else ()
    fields: tuple[str, ...] = ()
    rest = name[match.end() :]
    if text.startswith("HEADER.FIELDS") and not rest:
        words.at += 1
        words.space()
        fields = _fields(words)
        rest = words.values[words.at].decode("latin-1") if words.kinds[words.at] == WORD else ""
    behind = _BEHIND.fullmatch(rest)
    binary = kind.startswith("BINARY")
    if (
        behind is None
        or len(part) > DEEPEST
        or max(part, default=0) > NUMBER_MOST
        or (binary and text)
        or (text == "MIME" and not part)
        or (text.startswith("HEADER.FIELDS") and not fields)
        or (kind == "BINARY.SIZE" and behind[1])
    ):
        words.expected("a section")
    partial = (int(behind[1]), int(behind[2])) if behind[1] else None
    if partial is not None and not (partial[0] <= NUMBER_MOST and 1 <= partial[1] <= NUMBER_MOST):
        words.expected("a part of a section, of at least one octet")
    return Section(kind.removesuffix(".PEEK"), part, text, fields, partial, kind.endswith(".PEEK") or kind == "BINARY.SIZE")


def _fields(words: Words) -> tuple[str, ...]:
    words.open()
    found = []
    more = True
    while more:
        name = words.text("the name of a header field")
        if not name or not name.isprintable() or not name.isascii() or ":" in name or " " in name:
            words.reject("expected the name of a header field")
        found.append(name)
        more = words.more()
    return tuple(found)


def _modifiers(words: Words) -> tuple[int | None, bool]:
    """(CHANGEDSINCE's mod-sequence, VANISHED)."""
    since, vanished = None, False
    words.space()
    words.open()
    more = True
    while more:
        name = words.keyword("CHANGEDSINCE")
        if name == "CHANGEDSINCE":
            words.space()
            since = words.modseq()
        elif name == "VANISHED":
            vanished = True
        else:
            words.reject("expected CHANGEDSINCE or VANISHED")
        more = words.more()
    return since, vanished


def store(words: Words, uid: bool = False) -> Store:
    """STORE set [(UNCHANGEDSINCE n)] [+|-]FLAGS[.SILENT] flags."""
    words.space()
    numbers = words.numbers()
    words.space()
    unchanged = None
    if words.take(OPEN):
        if words.keyword("UNCHANGEDSINCE") != "UNCHANGEDSINCE":
            words.reject("expected UNCHANGEDSINCE")
        words.space()
        unchanged = words.modseq()
        words.close()
        words.space()
    name = words.keyword("FLAGS, +FLAGS or -FLAGS")
    how = name[0] if name[0] in "+-" else ""
    if name[len(how) :] not in ("FLAGS", "FLAGS.SILENT"):
        words.reject("expected FLAGS, +FLAGS or -FLAGS")
    words.space()
    flags = words.flags() if words.kinds[words.at] == OPEN else _bare_flags(words)
    words.end()
    return Store(numbers, how, flags, name.endswith(".SILENT"), unchanged, uid)


def uid_store(words: Words) -> Store:
    """UID STORE."""
    return store(words, uid=True)


def _bare_flags(words: Words) -> tuple[str, ...]:
    found = {words.flag(): None}
    while words.kinds[words.at]:
        words.space()
        found[words.flag()] = None
    return tuple(found)


def copy(words: Words, uid: bool = False) -> Copy:
    """COPY and MOVE: set mailbox."""
    words.space()
    numbers = words.numbers()
    words.space()
    found = Copy(numbers, words.mailbox(), uid)
    words.end()
    return found


def uid_copy(words: Words) -> Copy:
    """UID COPY and UID MOVE."""
    return copy(words, uid=True)


def expunge(words: Words) -> Expunge:
    """EXPUNGE."""
    words.end()
    return Expunge()


def uid_expunge(words: Words) -> Expunge:
    """UID EXPUNGE set (RFC 4315 2.1)."""
    words.space()
    found = Expunge(words.numbers())
    words.end()
    return found
