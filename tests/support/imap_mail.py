"""What tests with IMAP client programs put into mailboxes, and what another session finds there: octets, flags, dates, names."""

import datetime
import hashlib
import imaplib
import re
import ssl
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tests.support.daemon import PATIENCE
from tests.support.imap_servers import Account
from tests.support.messages import ATTACHED, crlf

__all__ = [
    "FOLDERS",
    "MAILS",
    "UNCLOSED",
    "WIRE",
    "Found",
    "Mail",
    "changed",
    "contents",
    "expected",
    "fill",
    "found",
    "message",
    "messages",
    "numbered",
    "quoted",
    "same",
    "session",
]

# Names of mailboxes, and how IMAP4rev1 writes them (RFC 3501 5.1.3).
WIRE = {
    "INBOX": "INBOX",
    "Entwürfe & Ähnliches": "Entw&APw-rfe &- &AMQ-hnliches",
    "Arbeit": "Arbeit",
    "Arbeit/Köln": "Arbeit/K&APY-ln",
    "Süd & Nord": "S&APw-d &- Nord",
}
_NAMES = {wire: name for name, wire in WIRE.items()}

_FETCHED = re.compile(rb'UID (\d+) .*?FLAGS \(([^)]*)\) .*?INTERNALDATE "([^"]*)"', re.DOTALL)
_LISTED = re.compile(rb'\((.*?)\) (?:NIL|"(.)") (?:"(.*)"|(.*))')
# The header lines that mbsync, getmail and mutt add to what they store.
_ADDED = re.compile(
    rb"^(?:X-TUID|Return-Path|X-getmail-retrieved-from-mailbox|Status|X-Status|Content-Length|Lines): .*\r\n", re.MULTILINE
)
_SUBJECT = re.compile(rb"^Subject: ([^\r\n]*)", re.MULTILINE)


class Mail(NamedTuple):
    """A message as it is put in: `date` (INTERNALDATE) in seconds."""

    data: bytes
    flags: tuple[str, ...] = ()
    date: int = 1_700_000_000


class Found(NamedTuple):
    """A message as it is found: short where a test shows it."""

    subject: str
    digest: str  # of its data
    flags: tuple[str, ...]  # sorted, without \\Recent
    date: int


def found(data: bytes, flags: Iterable[str] = (), date: int = 0) -> Found:
    """What there is to compare of a message. Left out: the header lines that mbsync and getmail add."""
    data = _ADDED.sub(b"", data)
    subject = _SUBJECT.search(data)
    flags = tuple(sorted(set(flags) - {"\\Recent"}))
    return Found(subject[1].decode("latin-1") if subject else "", hashlib.sha256(data).hexdigest()[:16], flags, date)


def message(subject: str, body: str = "x\n", more: str = "") -> bytes:
    """An ordinary message; `more`: further header lines."""
    head = "From: Sender <s@x.example>\nTo: bob@local.example\nDate: Tue, 14 Nov 2023 22:13:20 +0000\n"
    return crlf(f"{head}Message-ID: <{subject}@x.example>\nSubject: {subject}\n{more}\n{body}")


def numbered(count: int) -> list[Mail]:
    """So many ordinary messages."""
    flags = ((), ("\\Seen",), ("\\Flagged",), ("\\Answered", "\\Seen"))
    return [Mail(message(f"n{n}", f"{n}\n" * (n % 50)), flags[n % 4], 1_600_000_000 + 61 * n) for n in range(count)]


_BASE64 = "".join("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1\n" for _ in range(40))
_MIXED = (
    "--b\nContent-Type: text/plain; charset=utf-8\n\nhello\n"
    f"--b\nContent-Type: image/png\nContent-Transfer-Encoding: base64\n\n{_BASE64}--b--\n"
)
_ATTACHED = "--o\n\nhello\n--o\nContent-Type: message/rfc822\n\nSubject: inner\nFrom: a@b.example\n\ninner text\n--o--\n"
MAILS = [
    Mail(message("one")),
    Mail(message("two", more="In-Reply-To: <one@x.example>\nReferences: <one@x.example>\n"), ("\\Seen",), 1_700_000_061),
    Mail(message("three", more="In-Reply-To: <two@x.example>\nReferences: <one@x.example> <two@x.example>\n"), ("\\Flagged",)),
    Mail(message("dots", ".\n..\n.dot\nFrom me to you\n>From there\n"), ("\\Answered", "\\Seen"), 1_583_020_800),
    Mail(message("mixed", _MIXED, "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n"), ("\\Seen", "\\Flagged")),
    Mail(message("8-bit", "\xe4\xf6\xfc \xff\n", "Comments: \xc3\xa4\xc3\xb6\n"), ("\\Draft",), 1_711_846_800),
    Mail(message("empty", "")),
    Mail(message("long", "y" * 5000 + "\n" + "\t \n"), ("\\Seen",), 951_782_400),
    Mail(message("large", ("z" * 70 + "\n") * 5000)),
    Mail(message("folded", more="X-Long: a\n\tb\n c\n")),
    Mail(message("attached", _ATTACHED, "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=o\n"), ("\\Seen",)),
]
UNCLOSED = Mail(b"Subject: unclosed\r\n" + ATTACHED)  # the inner parts have no last boundary: programs that parse change it
FOLDERS = {"INBOX": [*MAILS, UNCLOSED], "Entwürfe & Ähnliches": MAILS[:4], "Arbeit/Köln": MAILS[4:7]}


def changed(mail: Mail | Found, *flags: str) -> Found:
    """The message with these flags instead of its own."""
    one = found(*mail) if isinstance(mail, Mail) else mail
    return one._replace(flags=tuple(sorted(set(flags))))


def session(account: Account, *, login: bool = True) -> imaplib.IMAP4:
    """A session of Python's imaplib, as the account says: in the clear, by STARTTLS or by TLS from the first octet."""
    trusted = ssl.create_default_context(cafile=account.ca)
    if account.security == "implicit":
        made: imaplib.IMAP4 = imaplib.IMAP4_SSL(account.host, account.port, ssl_context=trusted, timeout=PATIENCE)
    else:
        made = imaplib.IMAP4(account.host, account.port, timeout=PATIENCE)
        if account.security == "starttls":
            made.starttls(trusted)
    if login:
        made.login(account.user, account.password)
    return made


def quoted(name: str) -> str:
    """A name of WIRE as an argument."""
    return f'"{WIRE.get(name, name)}"'


def expected(folders: Mapping[str, Sequence[Mail | Found]]) -> dict[str, list[Found]]:
    """What `contents` finds where these messages are."""
    return {name: sorted(changed(mail, *mail.flags) for mail in mails) for name, mails in folders.items() if mails}


def same(there: Mapping[str, list[Found]], wanted: Mapping[str, list[Found]]) -> None:
    """Fail, and name each message that is in one of the two only."""
    wrong = []
    for name in sorted({*there, *wanted}):
        has, needs = Counter(there.get(name, [])), Counter(wanted.get(name, []))
        wrong += [f"{name}: missing {one}" for one in (needs - has).elements()]
        wrong += [f"{name}: too much {one}" for one in (has - needs).elements()]
    assert not wrong, "\n".join(wrong)


def fill(account: Account, folders: Mapping[str, list[Mail]]) -> None:
    """Put messages into mailboxes, which are made where they are missing."""
    with session(account) as client:
        for name, mails in folders.items():
            if name != "INBOX":
                client.create(quoted(name))  # it may be there
            for mail in mails:
                date = _date(mail.date)
                status, said = client.append(quoted(name), f"({' '.join(mail.flags)})", date, mail.data)
                assert status == "OK", said


def _date(seconds: int) -> str:
    """An INTERNALDATE of that moment, in a zone that is not UTC."""
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    return datetime.datetime.fromtimestamp(seconds, zone).strftime('"%d-%b-%Y %H:%M:%S %z"')


def contents(account: Account) -> dict[str, list[Found]]:
    """The messages of each mailbox that is not empty, sorted, as a session of its own reads them."""
    with session(account) as client:
        everything = {}
        for name in names(client):
            status, said = client.select(quoted(name), readonly=True)
            assert status == "OK", said
            if said != [b"0"]:
                everything[name] = sorted(one for _, one in messages(client))
        return everything


def names(client: imaplib.IMAP4) -> list[str]:
    """The mailboxes that can be opened."""
    listed = []
    for line in client.list()[1]:
        parts = _LISTED.fullmatch(line) if isinstance(line, bytes) else None
        assert parts, line
        attributes, _, in_quotes, bare = parts.groups()
        if b"\\Noselect" not in attributes:
            wire = (in_quotes or bare).decode()
            listed.append(_NAMES.get(wire, wire))
    return listed


def messages(client: imaplib.IMAP4) -> Iterator[tuple[int, Found]]:
    """UID and contents of the selected mailbox's messages."""
    status, said = client.uid("FETCH", "1:*", "(UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])")
    assert status == "OK", said
    for at, part in enumerate(said):
        if isinstance(part, tuple):
            head, data = part
            items = head + said[at + 1]
            parts = _FETCHED.search(items)
            assert parts and re.search(rb"RFC822\.SIZE %d\b" % len(data), items), items
            uid, flags, date = parts.groups()
            yield int(uid), found(data, flags.decode().split(), int(_moment(date.decode())))


def _moment(date: str) -> float:
    return datetime.datetime.strptime(date.strip(), "%d-%b-%Y %H:%M:%S %z").timestamp()
