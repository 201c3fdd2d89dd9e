"""Arguments of IMAP commands about the session and about mailboxes: one function for each form, from words to a struct of
`imap_command`. Those about messages are in `imap_messages` and `imap_search`.

A function begins behind the command's name and takes everything to the end. It raises `Refused`, which says what was expected and
where; nothing else, whatever the words are."""

from collections.abc import Callable

from relaymta.proto import mailbox_name
from relaymta.proto.imap_command import (
    Append,
    Appended,
    Authenticate,
    Create,
    Enable,
    Id,
    List,
    Login,
    Mailbox,
    Nothing,
    Qresync,
    Rename,
    Select,
    SetQuota,
    Status,
)
from relaymta.proto.imap_words import CLOSE, OPEN, QUOTED, STREAMED, WORD, Refused, Words
from relaymta.proto.mailbox_list import DELIMITER, canonical

__all__ = [
    "append",
    "appended",
    "authenticate",
    "create",
    "enable",
    "identify",
    "list_",
    "login",
    "lsub",
    "mailbox",
    "nothing",
    "quota",
    "rename",
    "select",
    "set_quota",
    "status",
]

STATUS_ITEMS = frozenset(
    ("MESSAGES", "RECENT", "UIDNEXT", "UIDVALIDITY", "UNSEEN", "DELETED", "DELETED-STORAGE", "SIZE", "HIGHESTMODSEQ", "MAILBOXID",
     "APPENDLIMIT")
)  # fmt: skip
SELECTION = frozenset(("SUBSCRIBED", "REMOTE", "RECURSIVEMATCH", "SPECIAL-USE"))
RETURNS = frozenset(("SUBSCRIBED", "CHILDREN", "SPECIAL-USE", "STATUS"))
USES = {use.lower(): use for use in ("\\All", "\\Archive", "\\Drafts", "\\Flagged", "\\Junk", "\\Sent", "\\Trash", "\\Important")}

PATTERNS = 100  # of one LIST
FIELDS = 30  # of ID (RFC 2971 3.3), with FIELD_NAME octets in a name and FIELD_VALUE in a value
FIELD_NAME = 30
FIELD_VALUE = 1024
NOTHING = Nothing()
OCTETS_MOST = 0x7FFFFFFFFFFFFFFF


def nothing(words: Words) -> Nothing:
    """No arguments."""
    words.end()
    return NOTHING


# The session


def login(words: Words) -> Login:
    """LOGIN user password."""
    words.space()
    user = words.text("a user name")
    words.space()
    found = Login(user, words.text("a password"))
    words.end()
    if not user or "\0" in user:
        raise Refused("expected a user name that is not empty")
    return found


def authenticate(words: Words) -> Authenticate:
    """AUTHENTICATE mechanism [initial response]."""
    words.space()
    mechanism = words.keyword("a mechanism")
    initial = None
    if words.kinds[words.at]:
        words.space()
        initial = words.astring("an initial response")
    words.end()
    return Authenticate(mechanism, initial)


def identify(words: Words) -> Id:
    """ID, of NIL or a list of names and values."""
    words.space()
    fields: dict[str, str | None] = {}
    if words.kinds[words.at] == WORD:
        if words.nstring("NIL or a list") is not None:
            words.expected("NIL or a list")
    else:
        words.open()
        more = not words.take(CLOSE)
        while more:
            name = words.string("the name of a field")
            words.space()
            value = words.nstring("the value of a field")
            if len(fields) >= FIELDS or len(name) > FIELD_NAME or len(value or b"") > FIELD_VALUE:
                raise Refused("more than RFC 2971 3.3 allows")
            fields[name.decode("utf-8", "replace").lower()] = None if value is None else value.decode("utf-8", "replace")
            more = words.more()
    words.end()
    return Id(fields)


def enable(words: Words) -> Enable:
    """ENABLE capability ..."""
    found: list[str] = []
    while words.kinds[words.at] or not found:
        words.space()
        found.append(words.keyword("a capability"))
    return Enable(tuple(found))


# Mailboxes


def mailbox(words: Words) -> Mailbox:
    """One mailbox."""
    words.space()
    found = Mailbox(words.mailbox())
    words.end()
    return found


def select(words: Words) -> Select:
    """SELECT mailbox [(CONDSTORE), (QRESYNC (...))]."""
    words.space()
    given = words.named()
    name = canonical(given)
    condstore, qresync = False, None
    if words.kinds[words.at]:
        words.space()
        words.open()
        more = True
        while more:
            parameter = words.keyword("a parameter of SELECT")
            if parameter == "CONDSTORE":
                condstore = True
            elif parameter == "QRESYNC":
                if not words.qresync:
                    words.reject("expected ENABLE QRESYNC before (RFC 7162 3.2.5)")
                words.space()
                condstore, qresync = True, _qresync(words)
            else:
                words.reject("expected CONDSTORE or QRESYNC")
            more = words.more()
    words.end()
    return Select(name, condstore, qresync, given if given != name and not given.isascii() else "")


def _qresync(words: Words) -> Qresync:
    words.open()
    uidvalidity = words.number("a UIDVALIDITY", least=1)
    words.space()
    modseq = words.modseq()
    uids = numbers = at = None
    if words.more():
        if words.kinds[words.at] != OPEN:
            uids = words.uids()
            if not words.more():
                return Qresync(uidvalidity, modseq, uids)
        words.open()
        numbers = words.uids()
        words.space()
        at = words.uids()
        words.close()
        if sum(high - low for low, high in numbers.ranges) + len(numbers.ranges) != sum(
            high - low for low, high in at.ranges
        ) + len(at.ranges):
            raise Refused("expected as many message numbers as UIDs")
        words.close()
    return Qresync(uidvalidity, modseq, uids, numbers, at)


def create(words: Words) -> Create:
    """CREATE mailbox [(USE (\\Sent ...))]. A delimiter at the end of the name is not part of it (RFC 9051 6.3.4)."""
    words.space()
    given = words.named()
    use: tuple[str, ...] = ()
    if words.kinds[words.at]:
        words.space()
        words.open()
        if words.keyword("USE") != "USE":
            words.reject("expected USE")
        words.space()
        use = _uses(words)
        words.close()
    words.end()
    given = given.removesuffix(DELIMITER)
    name = _possible(canonical(given))
    return Create(name, given if given != name else "", use)


def _uses(words: Words) -> tuple[str, ...]:
    names = words.flags()
    found = dict.fromkeys(USES.get(name.lower(), "") for name in names)
    if "" in found:
        raise Refused("no such special use", "NO", b"USEATTR")
    return tuple(found)


def rename(words: Words) -> Rename:
    """RENAME mailbox mailbox."""
    words.space()
    old = words.mailbox()
    words.space()
    new = words.mailbox()
    words.end()
    return Rename(old, _possible(new.removesuffix(DELIMITER)))


def _possible(name: str) -> str:
    """The name, which a mailbox may have."""
    why = mailbox_name.problem(name)
    if why is not None:
        raise Refused(why, "NO", b"CANNOT")
    return name


def status(words: Words) -> Status:
    """STATUS mailbox (item ...)."""
    words.space()
    name = words.mailbox()
    words.space()
    items = _status_items(words)
    words.end()
    return Status(name, items)


def _status_items(words: Words) -> tuple[str, ...]:
    return tuple(_options(words, STATUS_ITEMS, "a STATUS item", least=1))


def _options(
    words: Words, known: frozenset[str], what: str, least: int = 0, each: Callable[[str], None] = lambda name: None
) -> dict[str, None]:
    """Names of `known` in parentheses, each once; `each` is called behind each of them."""
    words.open()
    found: dict[str, None] = {}
    if not least and words.take(CLOSE):
        return found
    more = True
    while more:
        name = words.keyword(what)
        if name not in known:
            words.reject(f"expected {what}")
        found[name] = None
        each(name)
        more = words.more()
    return found


def list_(words: Words) -> List:
    """LIST [(selection options)] reference pattern or (patterns) [RETURN (options)] (RFC 5258, 5819, 6154)."""
    words.space()
    select: frozenset[str] = frozenset()
    extended = words.kinds[words.at] == OPEN
    if extended:
        select = frozenset(_options(words, SELECTION, "a selection option"))
        if select and select <= {"RECURSIVEMATCH", "REMOTE"} and "RECURSIVEMATCH" in select:
            raise Refused("expected a selection option beside RECURSIVEMATCH (RFC 5258 3)")
        words.space()
    reference = words.named()
    words.space()
    many = words.kinds[words.at] == OPEN
    patterns = _patterns(words, reference) if many else (_joined(reference, words.pattern()),)
    returns: frozenset[str] = frozenset()
    items: tuple[str, ...] = ()
    if words.kinds[words.at]:
        extended = True
        returns, items = _returns(words)
    words.end()
    return List(patterns, select, returns, items, extended or many)


def _patterns(words: Words, reference: str) -> tuple[str, ...]:
    words.open()
    found = [_joined(reference, words.pattern())]
    while words.more():
        found.append(_joined(reference, words.pattern()))
        if len(found) > PATTERNS:
            raise Refused(f"more than {PATTERNS} patterns", "NO", b"LIMIT")
    return tuple(found)


def _joined(reference: str, pattern: str) -> str:
    return canonical(reference + pattern) if pattern else ""


def _returns(words: Words) -> tuple[frozenset[str], tuple[str, ...]]:
    """RETURN (options): these, and the STATUS items among them."""
    items: list[tuple[str, ...]] = []

    def behind(name: str) -> None:
        if name == "STATUS":
            words.space()
            items.append(_status_items(words))

    words.space()
    if words.keyword("RETURN") != "RETURN":
        words.reject("expected RETURN")
    words.space()
    found = _options(words, RETURNS, "a return option", each=behind)
    return frozenset(found) - {"STATUS"}, items[-1] if items else ()


def lsub(words: Words) -> List:
    """LSUB reference pattern (RFC 3501 6.3.9)."""
    words.space()
    reference = words.named()
    words.space()
    pattern = _joined(reference, words.pattern())
    words.end()
    return List((pattern,), frozenset(("SUBSCRIBED",)))


# Quota (RFC 9208)


def quota(words: Words) -> Mailbox:
    """GETQUOTA root."""
    words.space()
    found = Mailbox(words.text("a quota root"))
    words.end()
    return found


def set_quota(words: Words) -> SetQuota:
    """SETQUOTA root (resource limit ...)."""
    words.space()
    root = words.text("a quota root")
    words.space()
    words.open()
    limits: dict[str, int] = {}
    more = not words.take(CLOSE)
    while more:
        resource = words.keyword("a resource")
        words.space()
        limits[resource] = words.number("a limit", OCTETS_MOST)
        more = words.more()
    words.end()
    return SetQuota(root, limits)


# APPEND (RFC 3501 6.3.11, 3502, 3516, 4466, 6855)


def append(words: Words, octets: int, plus: bool, binary: bool) -> Append | None:
    """APPEND, up to a literal of so many octets that begins here: that message; None: the literal is the name of the mailbox.
    `words`: all that has come, the literals of earlier messages among them."""
    if words.kinds[words.at :] == b" \0":
        return None
    words.space()
    name = words.mailbox()
    number = words.kinds.count(STREAMED)
    if number:
        _behind_message(words)
    words.space()
    flags: tuple[str, ...] = ()
    date = None
    if words.kinds[words.at] == OPEN:
        flags = words.flags()
        words.space()
    if words.kinds[words.at] == QUOTED:
        date = words.date_time()
        words.space()
    utf8 = words.kinds[words.at] == WORD
    if utf8:
        _utf8(words)
    if words.kinds[words.at]:
        words.expected("a message as a literal")
    return Append(name, number, flags, date, octets, utf8, binary, plus)


def _utf8(words: Words) -> None:
    if words.keyword("a message as a literal") != "UTF8":
        words.reject("expected a message as a literal")
    if not words.accept:
        words.reject("expected ENABLE UTF8=ACCEPT before (RFC 6855 4)")
    words.space()
    words.open()


def _behind_message(words: Words) -> None:
    """Go behind the last message, and the parenthesis of its UTF8."""
    words.at = words.kinds.rindex(STREAMED) + 1
    if words.kinds[words.at - 2] == OPEN:
        words.close()


def appended(words: Words) -> Appended:
    """APPEND, all of it."""
    if STREAMED not in words.kinds:
        append(words, 0, False, False)
        words.at = len(words.kinds) - 1
        words.expected("a message as a literal")
    words.space()
    name = words.mailbox()
    _behind_message(words)
    words.end()
    return Appended(name, words.kinds.count(STREAMED))
