"""What an IMAP command asks for (RFC 3501 and 9051 6, and their extensions): the structs that `imap_grammar` makes.

Names of mailboxes are decoded, in NFC, INBOX in upper case. Flags of the system are spelled as in RFC 9051 2.3.2, keywords as the
client does. Sets of numbers are in order and do not overlap. Times are seconds since 1970, in UTC."""

import datetime
from typing import NamedTuple

import msgspec

__all__ = [
    "STAR",
    "Age",
    "And",
    "Append",
    "Appended",
    "Authenticate",
    "Command",
    "Copy",
    "Create",
    "Day",
    "Enable",
    "Expunge",
    "Fetch",
    "Field",
    "Flagged",
    "Id",
    "Key",
    "List",
    "Login",
    "Mailbox",
    "Modified",
    "Not",
    "Nothing",
    "Numbers",
    "ObjectId",
    "Or",
    "Qresync",
    "Rename",
    "Search",
    "Section",
    "Select",
    "SetQuota",
    "Size",
    "Sort",
    "Status",
    "Store",
    "Text",
    "Thread",
    "Within",
]

STAR = 0xFFFFFFFF  # the largest number


class Numbers(NamedTuple):
    """A sequence set: `ranges` of (first, last); and, if `star` is a number, all from the lesser of that and the largest in use
    up to the largest in use (`*` is STAR). `saved`: it is `$` instead, the result of SEARCH (SAVE) (RFC 9051 6.4.4.1)."""

    ranges: tuple[tuple[int, int], ...]
    star: int | None = None
    saved: bool = False

    def resolved(self, largest: int) -> tuple[tuple[int, int], ...]:
        """The ranges, where `largest` is the largest number in use; 0: there is none, and `*` names nothing."""
        if self.star is None or not largest:
            return self.ranges
        first = min(self.star, largest)
        below = tuple((low, min(high, first - 1)) for low, high in self.ranges if low < first)
        beyond = tuple((max(low, largest + 1), high) for low, high in self.ranges if high > largest)
        return (*below, (first, largest), *beyond)


class Nothing(msgspec.Struct, frozen=True):
    """A command without arguments."""


class Login(msgspec.Struct, frozen=True):
    """LOGIN."""

    user: str
    password: str


class Authenticate(msgspec.Struct, frozen=True):
    """AUTHENTICATE; `initial`: the initial response, as it came (RFC 4959)."""

    mechanism: str
    initial: bytes | None


class Id(msgspec.Struct, frozen=True):
    """ID (RFC 2971): what the client says of itself; names in lower case."""

    fields: dict[str, str | None]


class Enable(msgspec.Struct, frozen=True):
    """ENABLE (RFC 5161): capabilities, in upper case."""

    capabilities: tuple[str, ...]


class Mailbox(msgspec.Struct, frozen=True):
    """A command about one mailbox: DELETE, SUBSCRIBE, UNSUBSCRIBE, GETQUOTAROOT; or about one quota root: GETQUOTA."""

    name: str


class Qresync(NamedTuple):
    """SELECT's QRESYNC (RFC 7162 3.2.5): what the client knows. `uids`: None for all; `numbers`, `at`: message numbers and the
    UIDs that they had, the same many."""

    uidvalidity: int
    modseq: int
    uids: Numbers | None = None
    numbers: Numbers | None = None
    at: Numbers | None = None


class Select(msgspec.Struct, frozen=True):
    """SELECT and EXAMINE. `given`: the name as the client wrote it, if that is not in NFC (OLDNAME: RFC 9051 6.3.2)."""

    name: str
    condstore: bool = False
    qresync: Qresync | None = None
    given: str = ""


class Create(msgspec.Struct, frozen=True):
    """CREATE; `given`: the name as the client wrote it, if it is another than `name` (OLDNAME in the LIST response that tells it:
    RFC 9051 6.3.9.7); `use`: special uses (RFC 6154 3)."""

    name: str
    given: str = ""
    use: tuple[str, ...] = ()


class Rename(msgspec.Struct, frozen=True):
    """RENAME."""

    old: str
    new: str


class List(msgspec.Struct, frozen=True):
    """LIST and LSUB. `patterns`: with the reference in front; ("",): the client asks for the hierarchy delimiter alone. `select`:
    SUBSCRIBED, REMOTE, RECURSIVEMATCH, SPECIAL-USE. `returns`: SUBSCRIBED, CHILDREN, SPECIAL-USE. `status`: STATUS items to
    return. `extended`: the syntax of RFC 5258 was used."""

    patterns: tuple[str, ...]
    select: frozenset[str] = frozenset()
    returns: frozenset[str] = frozenset()
    status: tuple[str, ...] = ()
    extended: bool = False


class Status(msgspec.Struct, frozen=True):
    """STATUS."""

    name: str
    items: tuple[str, ...]


class Append(msgspec.Struct, frozen=True):
    """A message of APPEND, whose literal begins: the `number`-th of the command, from 0. `date`: None for now; `octets`: its
    size; `utf8`: within UTF8 (RFC 6855 4); `binary`: a literal8 (RFC 3516); `plus`: it comes without being asked for (RFC
    7888)."""

    name: str
    number: int
    flags: tuple[str, ...]
    date: int | None
    octets: int
    utf8: bool = False
    binary: bool = False
    plus: bool = False


class Appended(msgspec.Struct, frozen=True):
    """APPEND: all of its `count` messages have arrived."""

    name: str
    count: int


class Expunge(msgspec.Struct, frozen=True):
    """EXPUNGE, and UID EXPUNGE of some `numbers` alone."""

    numbers: Numbers | None = None


class Section(NamedTuple):
    """A part of a message. `name`: BODY, BINARY, BINARY.SIZE, or RFC822, RFC822.HEADER, RFC822.TEXT, which are `text` "", HEADER
    and TEXT under another name; or PREVIEW (RFC 8970), with `text` LAZY or "".
    `part`: part numbers; `text`: HEADER, HEADER.FIELDS, HEADER.FIELDS.NOT, TEXT, MIME or ""; `fields` of these, as the client
    wrote them; `partial`: (first octet, octets at most); `peek`: \\Seen is not set."""

    name: str
    part: tuple[int, ...] = ()
    text: str = ""
    fields: tuple[str, ...] = ()
    partial: tuple[int, int] | None = None
    peek: bool = False


class Fetch(msgspec.Struct, frozen=True):
    """FETCH and UID FETCH. `items`: FLAGS, UID, INTERNALDATE, RFC822.SIZE, ENVELOPE, BODY, BODYSTRUCTURE, MODSEQ, EMAILID,
    THREADID, SAVEDATE, each once (UID is there in UID FETCH, MODSEQ with CHANGEDSINCE); `vanished`: UIDs that are gone are asked
    for too."""

    numbers: Numbers
    items: tuple[str, ...]
    sections: tuple[Section, ...] = ()
    changed_since: int | None = None
    vanished: bool = False
    uid: bool = False


class Store(msgspec.Struct, frozen=True):
    """STORE and UID STORE. `how`: "+" to add flags, "-" to remove them, "" to replace all."""

    numbers: Numbers
    how: str
    flags: tuple[str, ...]
    silent: bool = False
    unchanged_since: int | None = None
    uid: bool = False


class Copy(msgspec.Struct, frozen=True):
    """COPY, MOVE, UID COPY, UID MOVE."""

    numbers: Numbers
    name: str
    uid: bool = False


class SetQuota(msgspec.Struct, frozen=True):
    """SETQUOTA: limits by resource."""

    root: str
    limits: dict[str, int]


# The keys of SEARCH


class And(NamedTuple):
    """All of `keys`; none: every message."""

    keys: tuple["Key", ...] = ()


class Or(NamedTuple):
    """Either."""

    one: "Key"
    other: "Key"


class Not(NamedTuple):
    """Messages that `key` does not match."""

    key: "Key"


class Flagged(NamedTuple):
    """Messages with a flag or keyword; \\Recent too."""

    flag: str


class Text(NamedTuple):
    """A substring. `where`: BCC, CC, FROM, SUBJECT, TO, BODY, TEXT."""

    where: str
    what: str


class Field(NamedTuple):
    """HEADER: a substring of a field; "": there is such a field."""

    name: str
    what: str


class Day(NamedTuple):
    """A day, whatever the time zone. `which`: INTERNAL (the internal date), SENT (Date:), SAVED (RFC 8514); `how`: "<" before
    that day, "=" on it, ">" on it or later."""

    which: str
    how: str
    day: datetime.date


class Size(NamedTuple):
    """LARGER (more than `octets`) or SMALLER."""

    larger: bool
    octets: int


class Within(NamedTuple):
    """Messages of a sequence set; `uid`: of UIDs."""

    numbers: Numbers
    uid: bool


class Age(NamedTuple):
    """OLDER or YOUNGER (RFC 5032): the internal date is at least, or at most, so many seconds ago."""

    older: bool
    seconds: int


class Modified(NamedTuple):
    """MODSEQ (RFC 7162 3.1.5): it is at least this."""

    modseq: int


class ObjectId(NamedTuple):
    """EMAILID or THREADID (RFC 8474)."""

    which: str
    ident: str


Key = And | Or | Not | Flagged | Text | Field | Day | Size | Within | Age | Modified | ObjectId


class Search(msgspec.Struct, frozen=True):
    """SEARCH and UID SEARCH. `returns`: MIN, MAX, ALL, COUNT, SAVE, of RETURN; None without it. `modseq`: the response has the
    highest MODSEQ (RFC 7162 3.1.5). `refusal`: text and response code of a NO that the search gets instead, and which empties the
    result that it was to SAVE (RFC 9051 6.4.4.1)."""

    key: Key
    returns: frozenset[str] | None = None
    modseq: bool = False
    uid: bool = False
    refusal: tuple[str, bytes] | None = None


class Sort(msgspec.Struct, frozen=True):
    """SORT and UID SORT (RFC 5256). `criteria`: names of imap_sort.CRITERIA, each with whether it is REVERSE; the rest as of
    Search."""

    criteria: tuple[tuple[str, bool], ...]
    key: Key
    modseq: bool = False
    uid: bool = False


class Thread(msgspec.Struct, frozen=True):
    """THREAD and UID THREAD (RFC 5256). `references`: the algorithm is REFERENCES, else ORDEREDSUBJECT; the rest as of Search."""

    references: bool
    key: Key
    modseq: bool = False
    uid: bool = False


Arguments = (
    Nothing | Login | Authenticate | Id | Enable | Mailbox | Select | Create | Rename | List | Status | Appended | Expunge | Fetch
    | Store | Copy | SetQuota | Search | Sort | Thread
)  # fmt: skip


class Command(NamedTuple):
    """A command. `name`: in upper case, with UID in front where it has that; `arguments`: the struct that its row in `imap_verbs`
    makes."""

    tag: str
    name: str
    arguments: Arguments
