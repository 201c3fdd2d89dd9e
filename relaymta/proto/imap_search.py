"""Arguments of SEARCH (RFC 3501 and 9051 6.4.4; RFC 4731, 5032, 5182, 6855, 7162, 8474, 8514); as in `imap_grammar`."""

import re
from collections.abc import Callable
from typing import Final

from relaymta.proto.imap_command import (
    Age,
    And,
    Day,
    Field,
    Flagged,
    Key,
    Modified,
    Not,
    ObjectId,
    Or,
    Search,
    Size,
    Sort,
    Text,
    Thread,
    Within,
)
from relaymta.proto.imap_sort import CRITERIA
from relaymta.proto.imap_words import CLOSE, NUMBER_MOST, OPEN, QUOTED, WORD, Refused, Words

__all__ = ["CHARSETS", "search", "sort", "thread", "uid_search", "uid_sort", "uid_thread"]

KEYS: Final = 500
DEPTH: Final = 20
CHARSETS: Final = (b"US-ASCII", b"UTF-8")
RETURNS: Final = frozenset(("MIN", "MAX", "ALL", "COUNT", "SAVE"))
ALGORITHMS: Final = frozenset(("REFERENCES", "ORDEREDSUBJECT"))
CRITERIA_MOST: Final = 20
OCTETS_MOST: Final = 0x7FFFFFFFFFFFFFFF  # number64 (RFC 9051 9)

_OBJECT_ID = re.compile(r"[A-Za-z0-9_-]{1,255}")
_NEW = And((Flagged("\\Recent"), Not(Flagged("\\Seen"))))
# Keys without arguments
_PLAIN: dict[str, Key] = {
    "ALL": And(),
    "NEW": _NEW,
    "OLD": Not(Flagged("\\Recent")),
    "RECENT": Flagged("\\Recent"),
    "SAVEDATESUPPORTED": And(),
}
for _name in ("Answered", "Deleted", "Draft", "Flagged", "Seen"):
    _PLAIN[_name.upper()] = Flagged("\\" + _name)
    _PLAIN["UN" + _name.upper()] = Not(Flagged("\\" + _name))


def search(words: Words, uid: bool = False) -> Search:
    """SEARCH [RETURN (options)] [CHARSET name] key ..."""
    words.space()
    returns = _returns(words) if _next(words) == "RETURN" else None
    try:
        key = _keys(words)
    except Refused as refused:
        if refused.status == "NO" and returns is not None and "SAVE" in returns:
            return Search(And(), returns, uid=uid, refusal=(refused.text, refused.code))
        raise
    return Search(key, returns, _asks_modseq(key), uid)


def _keys(words: Words) -> Key:
    """[CHARSET name] key ..."""
    if _next(words) == "CHARSET":
        if words.accept:
            words.expected("no CHARSET after ENABLE UTF8=ACCEPT (RFC 6855 3)")
        words.at += 1
        words.space()
        _charset(words)
    return _all_keys(words)


def _all_keys(words: Words) -> Key:
    keys = [_key(words, 0)]
    while words.kinds[words.at]:
        words.space()
        keys.append(_key(words, 0))
    return keys[0] if len(keys) == 1 else And(tuple(keys))


def uid_search(words: Words) -> Search:
    """UID SEARCH."""
    return search(words, uid=True)


def sort(words: Words, uid: bool = False) -> Sort:
    """SORT (criterion ...) charset key ... (RFC 5256)."""
    words.space()
    words.open()
    criteria = [_criterion(words)]
    while words.more():
        criteria.append(_criterion(words))
        if len(criteria) > CRITERIA_MOST:
            raise Refused(f"more than {CRITERIA_MOST} sort criteria", "NO", b"LIMIT")
    words.space()
    _charset(words)
    key = _all_keys(words)
    return Sort(tuple(criteria), key, _asks_modseq(key), uid)


def _criterion(words: Words) -> tuple[str, bool]:
    name = words.keyword("a sort criterion")
    reverse = name == "REVERSE"
    if reverse:
        words.space()
        name = words.keyword("a sort criterion")
    if name not in CRITERIA:
        words.reject("expected a sort criterion")
    return name, reverse


def uid_sort(words: Words) -> Sort:
    """UID SORT."""
    return sort(words, uid=True)


def thread(words: Words, uid: bool = False) -> Thread:
    """THREAD algorithm charset key ... (RFC 5256)."""
    words.space()
    algorithm = words.keyword("REFERENCES or ORDEREDSUBJECT")
    if algorithm not in ALGORITHMS:
        words.reject("expected REFERENCES or ORDEREDSUBJECT")
    words.space()
    _charset(words)
    key = _all_keys(words)
    return Thread(algorithm == "REFERENCES", key, _asks_modseq(key), uid)


def uid_thread(words: Words) -> Thread:
    """UID THREAD."""
    return thread(words, uid=True)


def _asks_modseq(key: Key) -> bool:
    if isinstance(key, And):
        return any(map(_asks_modseq, key.keys))
    if isinstance(key, Or):
        return _asks_modseq(key.one) or _asks_modseq(key.other)
    return _asks_modseq(key.key) if isinstance(key, Not) else isinstance(key, Modified)


def _next(words: Words) -> str:
    """The next word, in upper case, where it is one."""
    return words.values[words.at].upper().decode("latin-1") if words.kinds[words.at] == WORD else ""


def _returns(words: Words) -> frozenset[str]:
    words.at += 1
    words.space()
    words.open()
    found = set()
    more = not words.take(CLOSE)
    while more:
        name = words.keyword("MIN, MAX, ALL, COUNT or SAVE")
        if name not in RETURNS:
            words.reject("expected MIN, MAX, ALL, COUNT or SAVE")
        found.add(name)
        more = words.more()
    words.space()
    return frozenset(found or ("ALL",))


def _charset(words: Words) -> None:
    if words.astring("a charset").upper() not in CHARSETS:
        raise Refused("the charset is not supported", "NO", b"BADCHARSET (%b)" % b" ".join(CHARSETS))
    words.space()


def _key(words: Words, depth: int) -> Key:
    words.count += 1
    if words.count > KEYS or depth > DEPTH:
        what = f"more than {KEYS} search keys" if words.count > KEYS else f"search keys nested deeper than {DEPTH}"
        raise Refused(what, "NO", b"LIMIT")
    if words.take(OPEN):
        keys = [_key(words, depth + 1)]
        while words.more():
            keys.append(_key(words, depth + 1))
        return keys[0] if len(keys) == 1 else And(tuple(keys))
    name = _next(words)
    if name in _PLAIN:
        words.at += 1
        return _PLAIN[name]
    if name in _NESTING:
        words.at += 1
        words.space()
        return _NESTING[name](words, depth + 1)
    if name in _WITH_ARGUMENTS:
        words.at += 1
        words.space()
        return _WITH_ARGUMENTS[name](words, name)
    if not name or name[0] not in "0123456789*$":
        words.expected("a search key")
    return Within(words.numbers(), False)


def _not(words: Words, depth: int) -> Key:
    return Not(_key(words, depth))


def _or(words: Words, depth: int) -> Key:
    one = _key(words, depth)
    words.space()
    return Or(one, _key(words, depth))


def _text(words: Words, name: str) -> Key:
    return Text(name, words.text("a text to search for"))


def _field(words: Words, name: str) -> Key:
    field = words.text("the name of a header field")
    words.space()
    return Field(field, words.text("a text to search for"))


def _keyword(words: Words, name: str) -> Key:
    found = Flagged(words.atom("a keyword"))
    return found if name == "KEYWORD" else Not(found)


def _day(words: Words, name: str) -> Key:
    which = "SENT" if name.startswith("SENT") else "SAVED" if name.startswith("SAVED") else "INTERNAL"
    how = {"BEFORE": "<", "ON": "=", "SINCE": ">"}[name.removeprefix("SENT").removeprefix("SAVED")]
    return Day(which, how, words.date())


def _size(words: Words, name: str) -> Key:
    return Size(name == "LARGER", words.number("a size", OCTETS_MOST))


def _age(words: Words, name: str) -> Key:
    return Age(name == "OLDER", words.number("a number of seconds", NUMBER_MOST, least=1))


def _uid(words: Words, name: str) -> Key:
    return Within(words.numbers(), True)


def _modseq(words: Words, name: str) -> Key:
    """MODSEQ [entry type] n: there is one mod-sequence for all flags of a message, whichever the entry names."""
    if words.kinds[words.at] == QUOTED:
        if not words.string("an entry").lower().startswith(b"/flags/"):
            words.reject("expected an entry (/flags/...)")
        words.space()
        if words.keyword("priv, shared or all") not in ("PRIV", "SHARED", "ALL"):
            words.reject("expected priv, shared or all")
        words.space()
    return Modified(words.modseq())


def _object_id(words: Words, name: str) -> Key:
    ident = words.text("an object id")
    if not _OBJECT_ID.fullmatch(ident):
        words.reject("expected an object id")
    return ObjectId(name, ident)


_NESTING: dict[str, Callable[[Words, int], Key]] = {"NOT": _not, "OR": _or}
_WITH_ARGUMENTS: dict[str, Callable[[Words, str], Key]] = {
    **dict.fromkeys(("BCC", "BODY", "CC", "FROM", "SUBJECT", "TEXT", "TO"), _text),
    **dict.fromkeys(("BEFORE", "ON", "SINCE", "SENTBEFORE", "SENTON", "SENTSINCE", "SAVEDBEFORE", "SAVEDON", "SAVEDSINCE"), _day),
    **dict.fromkeys(("KEYWORD", "UNKEYWORD"), _keyword),
    **dict.fromkeys(("LARGER", "SMALLER"), _size),
    **dict.fromkeys(("OLDER", "YOUNGER"), _age),
    **dict.fromkeys(("EMAILID", "THREADID"), _object_id),
    "HEADER": _field,
    "UID": _uid,
    "MODSEQ": _modseq,
}
