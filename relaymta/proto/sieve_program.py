"""What a Sieve script is compiled to: its commands and tests as data."""

from typing import Literal, NamedTuple, TypeAlias

from relaymta.proto.sieve_strings import Text

__all__ = [
    "ALWAYS", "AddressTest", "All", "Any", "Block", "BodyTest", "Constant", "DateTest", "Discard", "EnvelopeTest", "Exists",
    "Fileinto", "FlagTest", "Flags", "HeaderTest", "If", "Keep", "MailboxExists", "Match", "Not", "Redirect", "Reject", "Script",
    "Set", "Size", "Statement", "Stop", "StringTest", "Test", "Texts", "Vacation",
]  # fmt: skip

Texts: TypeAlias = tuple[Text, ...]


class Match(NamedTuple):
    """How values are compared with keys. `kind`: "is", "contains", "matches", "value" or "count"; `relation`: of the last two;
    `comparator`: "i;octet", "i;ascii-casemap" or "i;ascii-numeric"."""

    kind: str
    relation: str
    comparator: str
    keys: Texts


# Tests


class Constant(NamedTuple):
    """true, false."""

    value: bool


class Not(NamedTuple):
    """not."""

    test: "Test"


class All(NamedTuple):
    """allof."""

    tests: "tuple[Test, ...]"


class Any(NamedTuple):
    """anyof."""

    tests: "tuple[Test, ...]"


class Exists(NamedTuple):
    """exists: all of these fields."""

    names: Texts


class Size(NamedTuple):
    """size: over, or under, a number of octets."""

    over: bool
    limit: int


class HeaderTest(NamedTuple):
    """header."""

    names: Texts
    match: Match


class AddressTest(NamedTuple):
    """address. `part`: "all", "localpart", "domain", "user" or "detail"."""

    names: Texts
    part: str
    match: Match


class EnvelopeTest(NamedTuple):
    """envelope. `which`: "from", "to"; `part`: as of AddressTest."""

    which: Texts
    part: str
    match: Match


class StringTest(NamedTuple):
    """string (RFC 5229 5)."""

    sources: Texts
    match: Match


class FlagTest(NamedTuple):
    """hasflag (RFC 5232 4). `names`: of variables; "" is the internal one."""

    names: tuple[str, ...]
    match: Match


class MailboxExists(NamedTuple):
    """mailboxexists (RFC 5490 3.1): all of them."""

    names: Texts


class BodyTest(NamedTuple):
    """body (RFC 5173). `types`: content types; None: the body as it is (:raw)."""

    types: Texts | None
    match: Match


class DateTest(NamedTuple):
    """date, currentdate (RFC 5260 4, 5). `name`: of the field, None: now; `zone`: the offset as `+0100`, None: the date's own."""

    name: Text | None
    zone: Text | None
    part: Text
    match: Match


Test: TypeAlias = (
    Constant | Not | All | Any | Exists | Size | HeaderTest | AddressTest | EnvelopeTest | StringTest | FlagTest | MailboxExists
    | BodyTest | DateTest
)  # fmt: skip
ALWAYS = Constant(True)


# Commands. `line`: where in the script it is, from 1 on.


class If(NamedTuple):
    """if, elsif, else: the first block whose test is true."""

    branches: "tuple[tuple[Test, Block], ...]"
    line: int


class Stop(NamedTuple):
    """stop."""

    line: int


class Keep(NamedTuple):
    """keep. `flags`: None without :flags."""

    flags: Texts | None
    line: int


class Fileinto(NamedTuple):
    """fileinto (RFC 5228 4.1; :copy RFC 3894, :create RFC 5490 3.2)."""

    mailbox: Text
    flags: Texts | None
    copy: bool
    create: bool
    line: int


class Redirect(NamedTuple):
    """redirect."""

    address: Text
    copy: bool
    line: int


class Discard(NamedTuple):
    """discard."""

    line: int


class Reject(NamedTuple):
    """reject, ereject (RFC 5429)."""

    reason: Text
    line: int


class Vacation(NamedTuple):
    """vacation (RFC 5230). `days`: within DAYS_LEAST and DAYS_MOST; `mime`: the reason is a MIME entity; `key`: of this reply,
    the same for each that counts as the same (4.2)."""

    reason: Text
    subject: Text | None
    sender: Text | None
    addresses: Texts
    mime: bool
    days: int
    key: bytes
    line: int


class Set(NamedTuple):
    """set (RFC 5229 4). `modifiers`: in the order in which they are applied."""

    name: str
    value: Text
    modifiers: tuple[str, ...]
    line: int


class Flags(NamedTuple):
    """setflag, addflag, removeflag (RFC 5232 3). `name`: of the variable, "": the internal one."""

    kind: Literal["setflag", "addflag", "removeflag"]
    name: str
    flags: Texts
    line: int


Statement: TypeAlias = If | Stop | Keep | Fileinto | Redirect | Discard | Reject | Vacation | Set | Flags
Block: TypeAlias = tuple[Statement, ...]


class Script(NamedTuple):
    """A script that is valid. `requires`: the extensions that it names; `reads_body`: it looks into the body of messages; without
    that the header is enough to run it."""

    block: Block
    requires: frozenset[str]
    reads_body: bool
