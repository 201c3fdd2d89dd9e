"""Responses of an IMAP server (RFC 3501 and 9051 7, 9, and extensions), as octets ready to be written, CRLF included.

`utf8`: ENABLE IMAP4rev2 or UTF8=ACCEPT is in force: names of mailboxes and strings are UTF-8; else names are in modified UTF-7,
and what is not ASCII is a literal. An empty string is always "", never {0}, for which a widespread client waits (RFC 9051 4.3
allows both). A response code is given without brackets."""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from relaymta.proto import mailbox_name
from relaymta.proto.imap_command import Section

__all__ = [
    "appenduid",
    "astring",
    "bye",
    "capability",
    "continuation",
    "copyuid",
    "data",
    "date_time",
    "enabled",
    "esearch",
    "exists",
    "expunge",
    "fetch",
    "flags",
    "flags_item",
    "highestmodseq",
    "identity",
    "internaldate",
    "list_",
    "literal_header",
    "lsub",
    "mailbox",
    "mailboxid",
    "modified",
    "modseq",
    "namespace",
    "nstring",
    "number_set",
    "object_id",
    "permanentflags",
    "quota",
    "quotaroot",
    "recent",
    "savedate",
    "search",
    "section",
    "size",
    "status",
    "string",
    "tagged",
    "uid",
    "uidnext",
    "uidvalidity",
    "untagged",
    "vanished",
]

# Response codes that have no arguments (RFC 9051 7.1, 5530, 4315, 7162, 3516, 9208)
ALREADYEXISTS: Final = b"ALREADYEXISTS"
AUTHENTICATIONFAILED: Final = b"AUTHENTICATIONFAILED"
AUTHORIZATIONFAILED: Final = b"AUTHORIZATIONFAILED"
CANNOT: Final = b"CANNOT"
CLIENTBUG: Final = b"CLIENTBUG"
CLOSED: Final = b"CLOSED"
EXPUNGEISSUED: Final = b"EXPUNGEISSUED"
INUSE: Final = b"INUSE"
LIMIT: Final = b"LIMIT"
NOMODSEQ: Final = b"NOMODSEQ"
NONEXISTENT: Final = b"NONEXISTENT"
NOPERM: Final = b"NOPERM"
NOTSAVED: Final = b"NOTSAVED"
OVERQUOTA: Final = b"OVERQUOTA"
PRIVACYREQUIRED: Final = b"PRIVACYREQUIRED"
READ_ONLY: Final = b"READ-ONLY"
READ_WRITE: Final = b"READ-WRITE"
SERVERBUG: Final = b"SERVERBUG"
TOOBIG: Final = b"TOOBIG"
TRYCREATE: Final = b"TRYCREATE"
UNAVAILABLE: Final = b"UNAVAILABLE"
UNKNOWN_CTE: Final = b"UNKNOWN-CTE"
USEATTR: Final = b"USEATTR"

_QUOTABLE = re.compile(rb"[^\x00\r\n]{1,1000}")
_TEXT = re.compile(r"[^\x20-\x7e]")
_FIELD_ATOM = re.compile(r"[!#$&'+,\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+")
_MONTHS = b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
_EPOCH = datetime.datetime(1970, 1, 1)
_FIRST, _LAST = -62135596800, 253402300799

Ranges = Iterable[tuple[int, int]]


# Status responses


def tagged(tag: str, status: str, text: str, code: bytes = b"") -> bytes:
    """The response that ends a command: `status` OK, NO or BAD; `tag` "*" where the command had none."""
    if not text or not text.isascii() or not text.isprintable():
        text = _TEXT.sub("?", text) or "Done"
    if code:
        return b"%b [%b] %b\r\n" % (f"{tag} {status}".encode(), code, text.encode())
    if text[0] == "[":  # it would be taken for a response code
        text = f"?{text[1:]}"
    return f"{tag} {status} {text}\r\n".encode()


def untagged(status: str, text: str, code: bytes = b"") -> bytes:
    """`* OK`, `* NO`, `* BAD`."""
    return tagged("*", status, text, code)


def bye(text: str, code: bytes = b"") -> bytes:
    """The last response of a connection."""
    return tagged("*", "BYE", text, code)


def continuation(text: bytes) -> bytes:
    """`+`, and a text or a challenge in base64."""
    return b"+ %b\r\n" % text


# What the caller says of its own accord
STILL_HERE: Final = untagged("OK", "Still here")
TIMEOUT: Final = bye("Nothing was said for too long")
SHUTTING_DOWN: Final = bye("Shutting down; try again in a moment", UNAVAILABLE)
OVERLOADED: Final = bye("Overloaded; try again in a moment", UNAVAILABLE)
TOO_MANY_CONNECTIONS: Final = bye("Too many connections; try again later", UNAVAILABLE)
TOO_MANY_FROM_CLIENT: Final = bye("Too many connections from your address; try again later", UNAVAILABLE)
TOO_MANY_SESSIONS: Final = bye("Too many sessions of this user; close one, or try again later", LIMIT)


# Response codes with arguments


def appenduid(uidvalidity: int, uids: Ranges) -> bytes:
    """RFC 4315 3."""
    return b"APPENDUID %d %b" % (uidvalidity, number_set(uids))


def copyuid(uidvalidity: int, sources: Ranges, copies: Ranges) -> bytes:
    """RFC 4315 3; both in the order in which they were copied."""
    return b"COPYUID %d %b %b" % (uidvalidity, number_set(sources), number_set(copies))


def uidnext(uid: int) -> bytes:
    """The next UID, as a response code."""
    return b"UIDNEXT %d" % uid


def uidvalidity(number: int) -> bytes:
    """UIDVALIDITY, as a response code."""
    return b"UIDVALIDITY %d" % number


def highestmodseq(number: int) -> bytes:
    """RFC 7162 3.1.2.1."""
    return b"HIGHESTMODSEQ %d" % number


def mailboxid(ident: str) -> bytes:
    """RFC 8474 4.2."""
    return b"MAILBOXID (%b)" % ident.encode()


def modified(numbers: Ranges) -> bytes:
    """RFC 7162 3.1.3: which messages a conditional STORE has left alone."""
    return b"MODIFIED %b" % number_set(numbers)


def permanentflags(names: Iterable[str]) -> bytes:
    """The flags that the client can change for good, `\\*` among them, as a response code."""
    return b"PERMANENTFLAGS (%b)" % " ".join(names).encode()


# Parts of responses


def string(octets: bytes, utf8: bool = False) -> bytes:
    """A string: quoted where it can be, else a literal. NUL, which no string has, becomes a blank."""
    if not octets:
        return b'""'
    octets = octets.replace(b"\0", b" ")
    if _QUOTABLE.fullmatch(octets) and (octets.isascii() or (utf8 and _is_utf8(octets))):
        return b'"%b"' % octets.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return literal_header(len(octets)) + octets


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def nstring(octets: bytes | None, utf8: bool = False) -> bytes:
    """A string, or NIL."""
    return b"NIL" if octets is None else string(octets, utf8)


def literal_header(octets: int) -> bytes:
    """What precedes so many octets, at least one."""
    return b"{%d}\r\n" % octets


def data(octets: bytes, binary: bool = False) -> bytes:
    """What a section holds. NUL is allowed in BINARY alone (RFC 3516 4.2); elsewhere it becomes 0x80, which RFC 9051 4.3 leaves
    no better choice for."""
    if not octets:
        return b'""'
    if b"\0" not in octets:
        return literal_header(len(octets)) + octets
    return b"~" + literal_header(len(octets)) + octets if binary else literal_header(len(octets)) + octets.replace(b"\0", b"\x80")


def astring(text: str) -> bytes:
    """The name of a header field: as it is, or quoted."""
    return text.encode() if _FIELD_ATOM.fullmatch(text) else string(text.encode(), utf8=True)


def mailbox(name: str, utf8: bool) -> bytes:
    """The name of a mailbox, in the encoding of the session."""
    return string((name if utf8 else mailbox_name.encode(name)).encode(), utf8)


def number_set(ranges: Ranges) -> bytes:
    """Numbers, of which there is one at least, as a set."""
    return b",".join([b"%d" % low if low == high else b"%d:%d" % (low, high) for low, high in ranges])


def date_time(seconds: int) -> bytes:
    """A time (seconds since 1970), in UTC, quoted; of the years that four digits can say."""
    days, second = divmod(min(max(seconds, _FIRST), _LAST), 86400)
    return b'"%b %02d:%02d:%02d +0000"' % (_date(days), second // 3600, second // 60 % 60, second % 60)


@lru_cache(1024)
def _date(days: int) -> bytes:
    """The date so many days after that of the epoch."""
    when = _EPOCH + datetime.timedelta(days)
    return b"%2d-%b-%04d" % (when.day, _MONTHS[when.month - 1], when.year)


# Of the session


def capability(names: Iterable[str]) -> bytes:
    """`* CAPABILITY`."""
    return f"* CAPABILITY {' '.join(names)}\r\n".encode()


def enabled(names: Iterable[str]) -> bytes:
    """`* ENABLED`, also when there are none (RFC 9051 7.2.1)."""
    return " ".join(["* ENABLED", *names]).encode() + b"\r\n"


def identity(fields: Mapping[str, str]) -> bytes:
    """`* ID`; no fields: NIL."""
    if not fields:
        return b"* ID NIL\r\n"
    return b"* ID (%b)\r\n" % b" ".join(string(part.encode()) for pair in fields.items() for part in pair)


# Of mailboxes


def _extended(utf8: bool, oldname: str, childinfo: Sequence[str]) -> bytes:
    items = []
    if childinfo:
        items.append(b'"CHILDINFO" (%b)' % b" ".join(b'"%b"' % option.encode() for option in childinfo))
    if oldname:
        items.append(b'"OLDNAME" (%b)' % mailbox(oldname, utf8))
    return b" (%b)" % b" ".join(items) if items else b""


def list_(attributes: Iterable[str], name: str, utf8: bool, oldname: str = "", childinfo: Sequence[str] = ()) -> bytes:
    """`* LIST`; `oldname`: what it was called (RFC 9051 6.3.9.7); `childinfo`: selection options that a mailbox below meets (RFC
    5258 3.5). The name "": the hierarchy delimiter alone was asked for."""
    return b'* LIST (%b) "/" %b%b\r\n' % (
        " ".join(attributes).encode(), mailbox(name, utf8), _extended(utf8, oldname, childinfo),
    )  # fmt: skip


def lsub(attributes: Iterable[str], name: str, utf8: bool) -> bytes:
    """`* LSUB`."""
    return b'* LSUB (%b) "/" %b\r\n' % (" ".join(attributes).encode(), mailbox(name, utf8))


def namespace() -> bytes:
    """`* NAMESPACE` (RFC 2342): personal mailboxes, without a prefix."""
    return b'* NAMESPACE (("" "/")) NIL NIL\r\n'


def status(name: str, items: Mapping[str, int | str | None], utf8: bool) -> bytes:
    """`* STATUS`. A str is an object id; None is NIL."""
    found = [b"%b %b" % (item.encode(), _status_value(value)) for item, value in items.items()]
    return b"* STATUS %b (%b)\r\n" % (mailbox(name, utf8), b" ".join(found))


def _status_value(value: int | str | None) -> bytes:
    if value is None:
        return b"NIL"
    return b"%d" % value if isinstance(value, int) else b"(%b)" % value.encode()


def flags(names: Iterable[str]) -> bytes:
    """`* FLAGS`."""
    return b"* FLAGS (%b)\r\n" % " ".join(names).encode()


def exists(count: int) -> bytes:
    """`* n EXISTS`."""
    return b"* %d EXISTS\r\n" % count


def recent(count: int) -> bytes:
    """`* n RECENT` (RFC 3501 7.3.2; not in IMAP4rev2)."""
    return b"* %d RECENT\r\n" % count


def quota(root: str, usage: Mapping[str, tuple[int, int]]) -> bytes:
    """`* QUOTA`: (used, limit) by resource; STORAGE is in units of 1024 octets (RFC 9208 5.1)."""
    found = " ".join(f"{resource} {used} {limit}" for resource, (used, limit) in usage.items())
    return b"* QUOTA %b (%b)\r\n" % (string(root.encode(), utf8=True), found.encode())


def quotaroot(name: str, roots: Iterable[str], utf8: bool) -> bytes:
    """`* QUOTAROOT`."""
    return b" ".join([b"* QUOTAROOT", mailbox(name, utf8), *(string(root.encode(), utf8=True) for root in roots)]) + b"\r\n"


# Of messages


def expunge(number: int) -> bytes:
    """`* n EXPUNGE`."""
    return b"* %d EXPUNGE\r\n" % number


def vanished(uids: Ranges, earlier: bool = False) -> bytes:
    """`* VANISHED` (RFC 7162 3.2.10), of one UID at least."""
    return b"* VANISHED %b%b\r\n" % (b"(EARLIER) " if earlier else b"", number_set(uids))


def search(numbers: Iterable[int], modseq: int | None = None) -> bytes:
    """`* SEARCH`; `modseq`: the highest of those found, where it was searched for (RFC 7162 3.1.5), and something was found."""
    found = b"".join([b" %d" % number for number in numbers])
    return b"* SEARCH%b%b\r\n" % (found, b"" if modseq is None else b" (MODSEQ %d)" % modseq)


def esearch(
    tag: str,
    uids: bool,
    least: int | None = None,
    most: int | None = None,
    every: Sequence[tuple[int, int]] = (),
    count: int | None = None,
    modseq: int | None = None,
) -> bytes:
    """`* ESEARCH` (RFC 4731 3): MIN, MAX, ALL, COUNT, MODSEQ, as far as they are given; ALL only where something was found."""
    found = [b"* ESEARCH (TAG %b)%b" % (string(tag.encode()), b" UID" if uids else b"")]
    for name, value in ((b"MIN", least), (b"MAX", most), (b"COUNT", count), (b"MODSEQ", modseq)):
        if value is not None:
            found.append(b"%b %d" % (name, value))
    if every:
        found.append(b"ALL " + number_set(every))
    return b" ".join(found) + b"\r\n"


def fetch(number: int, items: Iterable[bytes]) -> bytes:
    """`* n FETCH`, of items like those below, one at least."""
    return b"* %d FETCH (%b)\r\n" % (number, b" ".join(items))


def flags_item(names: Iterable[str]) -> bytes:
    """FLAGS of a message."""
    return b"FLAGS (%b)" % " ".join(names).encode()


def uid(number: int) -> bytes:
    """UID of a message."""
    return b"UID %d" % number


def size(octets: int) -> bytes:
    """RFC822.SIZE."""
    return b"RFC822.SIZE %d" % octets


def internaldate(seconds: int) -> bytes:
    """INTERNALDATE."""
    return b"INTERNALDATE " + date_time(seconds)


def savedate(seconds: int | None) -> bytes:
    """SAVEDATE (RFC 8514)."""
    return b"SAVEDATE " + (b"NIL" if seconds is None else date_time(seconds))


def modseq(number: int) -> bytes:
    """MODSEQ of a message."""
    return b"MODSEQ (%d)" % number


def object_id(which: str, ident: str | None) -> bytes:
    """EMAILID or THREADID (RFC 8474 5)."""
    return b"%b %b" % (which.encode(), b"NIL" if ident is None else b"(%b)" % ident.encode())


def section(asked: Section) -> bytes:
    """What precedes the data of a section: its name as FETCH tells it, the offset of a partial one behind it (RFC 9051 7.5.2)."""
    if asked.name.startswith("RFC822"):
        return asked.name.encode()
    text = ".".join([*map(str, asked.part), *([asked.text] if asked.text else [])]).encode()
    if asked.fields:
        text += b" (%b)" % b" ".join(map(astring, asked.fields))
    origin = b"" if asked.partial is None else b"<%d>" % asked.partial[0]
    return b"%b[%b]%b" % (asked.name.encode(), text, origin)
