"""Every parser of ours that reads untrusted input, and the worst inputs for it, of any length: what docs/security.md
lists, `benchmarks/hostile.py` measures and `tests/test_linear.py` holds to linear time."""

import contextlib
import io
import struct
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple

from relaymta._speedups import text
from relaymta._speedups.replies import Replies
from relaymta.accept import alias_text, once
from relaymta.auth.identity import Identity
from relaymta.config import Config
from relaymta.dns import NoData
from relaymta.filter import dmarc, rspamd, signatures, spf
from relaymta.filter.judgement import FilterFailure
from relaymta.proto import (
    address,
    addressees,
    arf,
    attachments,
    authres,
    clamd,
    dkim,
    dsn,
    edits,
    header,
    hook,
    mailbox,
    mailbox_name,
    managesieve_server,
    milter,
    mime,
    mime_text,
    policy,
    proxy,
    sasl,
    sieve,
    sieve_run,
    spamc,
)
from relaymta.proto.envelope import Attempt, Body, Envelope, encode
from relaymta.proto.imap_command import Numbers, Or, Qresync, Text
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import Batch, Program
from relaymta.proto.imap_resync import resync
from relaymta.proto.imap_text import FIELDS, EnvelopeText, MessageText, Stored
from relaymta.proto.imap_uids import NoSuchNumber, Shared
from relaymta.proto.imap_view import Changes, Mailbox, View
from relaymta.proto.imap_words import Words
from relaymta.proto.managesieve_grammar import Broken, Reader
from relaymta.proto.pop3_maildrop import Wanted
from relaymta.proto.secrets import secrets
from relaymta.proto.sieve_message import Message as SieveMessage
from relaymta.proto.smtp_client import LINE_LIMIT, LINES_LIMIT, Said
from relaymta.proto.smtp_server import Host, Limits, Offers, ServerSession
from relaymta.proto.submitted import submitted
from relaymta.route.shaping import Shaping
from relaymta.store import mbox
from relaymta.store.rows import MessageRow, ObjectRow
from relaymta.toml import keys_of
from tests.support import imap_worst, pop3

__all__ = ["PARSERS", "Parser"]


class Parser(NamedTuple):
    """`call` parses `worst[...](n)`, some n octets; `limit`: how much it reads at most, in words ("": no limit), and `most` in
    octets (0: no limit); `refused`: input that the relay refuses before."""

    name: str
    call: Callable[[bytes], object]
    worst: dict[str, Callable[[int], bytes]]
    limit: str = ""
    most: int = 0
    refused: Callable[[bytes], bool] = lambda data: False

    def seconds(self, data: bytes, least: float, repeats: int, clock: Callable[[], float]) -> float:
        """CPU time of a call, by `clock`: the least of several, each of as many calls as take `least` seconds."""
        count, best = 1, float("inf")
        for _ in range(repeats):
            while True:
                began = clock()
                for _ in range(count):
                    self.call(data)
                took = clock() - began
                if took >= least:
                    break
                count *= 2
            best = min(best, took / count)
        return best


def times(piece: bytes, front: bytes = b"", end: bytes = b"") -> Callable[[int], bytes]:
    """As many of a piece as make n octets."""
    return lambda n: front + piece * (n // len(piece)) + end


# From:, Sender: and other addresses

_ADDRESS_LISTS = {
    "quoted pairs": times(b"\\a", b'"'),
    "a comment of quoted pairs": times(b"\\a", b"("),
    "folded quoted pairs": times(b"\\a\r\n ", b'"'),
    "comments within comments": times(b"("),
    "closed comments": times(b"()", b"", b" a@b.test"),
    "strings": times(b'""'),
    "angles": times(b"<"),
    "dots": times(b"a.", b"", b"a@b.test"),
    "a long domain": times(b"a.", b"a@", b"test"),
    "ats": times(b"@"),
    "commas": times(b","),
    "addresses": times(b"a@b.test,"),
    "in UTF-8": times("ä@ö.test,".encode()),
    "a route": times(b"@a,", b"<"),
    "groups": times(b"a:;,"),
    "encoded words": times(b"=?a?q?a?= "),
    "beginnings of encoded words": times(b"=?"),
    "white space": times(b" "),
    "folds": times(b"\r\n "),
    "half a literal": times(b"[", b"a@"),
}

_FROMS = {"short fields in UTF-8": times("From:a@ä.ö\r\n".encode())}


def _addresses(value: bytes) -> None:
    with contextlib.suppress(mailbox.Malformed):
        mailbox.addresses(value)


def _authors(block: bytes) -> None:
    with contextlib.suppress(mailbox.Malformed):
        mailbox.authors(block, (b"from", b"sender"))


_PATHS = {
    "an atom": times(b"a", b"FROM:<", b"@b.test>"),
    "dots": times(b"a.", b"FROM:<", b"@b.test>"),
    "hyphens": times(b"a-", b"FROM:<a@", b">"),
    "labels": times(b"a.", b"FROM:<a@", b">"),
    "quotes": times(b'"', b"FROM:<"),
    "quoted pairs": times(b"\\a", b'FROM:<"', b'"@b.test>'),
    "a route": times(b"@a,", b"FROM:<", b"@a:a@b.test>"),
    "half a route": times(b"@a,", b"FROM:<"),
    "blanks": times(b" ", b"FROM:"),
    "blanks behind it": times(b" ", b"FROM:<a@b.test>", b"x"),
    "without brackets": times(b"a@", b"FROM:"),
    "routes": times(b"@a:", b"FROM:<", b"a@b.test>"),
    "words": times(b'"a".', b"FROM:<", b"a@b.test>"),
    "dots alone": times(b".", b"FROM:<", b"@b.test>"),
    "comments": times(b"(a)", b"FROM:<", b"a@b.test>"),
    "half a comment": times(b"(", b"FROM:<a@b.test", b">"),
    "backslashes": times(b"\\", b"FROM:<", b"@b.test>"),
    "blanks in it": times(b" ", b"FROM:<a", b"@b.test>"),
    "closing brackets": times(b">", b"FROM:<a@b.test"),
    "opening brackets": times(b"<", b"FROM:", b"a@b.test>"),
}


def _to(generators: dict[str, Callable[[int], bytes]]) -> dict[str, Callable[[int], bytes]]:
    return {name: lambda n, make=make: b"TO:" + make(n)[5:] for name, make in generators.items()}  # type: ignore[misc]


def _domain(text: bytes) -> None:
    with contextlib.suppress(address.DomainError):
        address.normalize_domain(text.decode("utf-8", "replace"))


# Headers

_BLOCKS = {
    "short fields": times(b"a:\r\n"),
    "one long field": times(b"x", b"a:"),
    "folds": times(b"\r\n ", b"a:"),
    "white space": times(b" ", b"a:", b"\r\n"),
    "no colons": times(b"aaa\r\n"),
    "colons": times(b":"),
    "bare CRs": times(b"\r"),
    "bare LFs": times(b"\n"),
    "a long name": times(b"a"),
    "white space in front of the colon": times(b" ", b"a", b":"),
    "hops": times(b"Received:\r\n"),
    "froms": times(b"From:\r\n"),
    "authors": times(b"From:a@b.test\r\n"),
}
_RESULTS = {
    **_BLOCKS,
    "comments": times(b"()", b"Authentication-Results:", b"x"),
    "comments within comments": times(b"(", b"Authentication-Results:"),
    "quoted pairs": times(b"\\a", b"Authentication-Results:("),
    "a string": times(b"\\a", b'Authentication-Results:"'),
    "blanks": times(b" ", b"Authentication-Results:"),
    "combining marks": times("\u0323\u0301".encode(), b'Authentication-Results:"', b'"'),
    "many": times(b"Authentication-Results:a\r\n"),
    "many with marks": times(b'Authentication-Results:"' + "\u0301\u0323".encode() * 190 + b'"\r\n'),
    "blanks of many": times(b"Authentication-Results:   (a)  x\r\n"),
}

_TAGS = {
    **_BLOCKS,
    "tags": times(b"X-Spam:\r\n"),
    "names of tags": times(b"x-spam"),
    "folds in front of a colon": times(b"\r\n ", b"A: b\r\nX-Spam", b":\r\n"),
    "control characters": times(b"\x0b", b"A: b\r\n", b"X-Spam:\r\n"),
    "lines of control characters": times(b"\x0b\r\n", b"X-Spam: b\r\n"),
}
_SUBJECTS = {
    **_TAGS,
    "Subjects": times(b"Subject:a\r\n"),
    "words": times(b"a ", b"Subject:", b"\r\n"),
    "long words": times(b"a" * 999 + b" ", b"Subject:", b"\r\n"),
    "one word": times(b"a", b"Subject:", b"\r\n"),
    "encoded words": times(b"=?a?q?a?= ", b"Subject:", b"\r\n"),
    "one encoded word": times(b"=FF", b"Subject:=?a?q?", b"?=\r\n"),
    "beginnings of encoded words": times(b"=?", b"Subject:", b"\r\n"),
    "octets within characters": times(b"\x80", b"Subject:", b"\r\n"),
}
_FIELD_VALUES = {
    "LFs": times(b"\n"), "CRs": times(b"\r"), "NULs": times(b"\0"), "blanks": times(b" ", b"", b"a"), "letters": times(b"a"),
    "words": times(b"a "), "long words": times(b"a" * 997 + b" "), "empty lines": times(b" \n"), "lines": times(b"a\n"),
    "long lines": times(b"a" * 500 + b" " + b"a" * 500 + b"\n", b"", b"a"),
    "blanks and a word": times(b" " * 997 + b"a", b"", b"b"),
}  # fmt: skip


def _edits(kind: str) -> Callable[[bytes], object]:
    """All edits there may be, of this kind, to a header; as many as it has four octets."""
    make: dict[str, Callable[[int], edits.Edit]] = {
        "inserts": lambda at: edits.Insert(at * 7919 % 5000, b"X-Spam", b" Yes"),
        "inserts at one place": lambda at: edits.Insert(2, b"X-Spam", b" Yes"),
        "changes": lambda at: edits.Change(b"a", at % 500, b" Yes" if at % 2 else b""),
        "new names": lambda at: edits.Change(b"a%d" % at, 1, b" Yes"),
    }
    all_of_them = [make[kind](at) for at in range(edits.EDITS_MOST)]
    return lambda block: edits.edited(block, all_of_them[: max(1, len(block) // 4)])


def _edited_values(value: bytes) -> None:
    edits.edited(b"A: b\r\n\r\n", [edits.Append(b"X", value), edits.Insert(2, b"X", value), edits.Change(b"a", 1, value)])


_SIGNED = b"v=1; a=rsa-sha256; d=d.test; s=s; h=from; bh=" + b"A" * 43 + b"=; b="
_KEY = (  # RFC 6376 C.2
    "v=DKIM1; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDwIRP/UC3SBsEmGqZ9ZJW3/DkMoGeLnQg1fWn7/zYtIxN2SnFCjxOCKG9v3b4jYfcTNh5ijSs"
    "q631uBItLa7od+v/RtdC2UzJ1lWT947qR+Rcac2gbto/NMqJ0fzfVjH4OuKhitdY9tf6mcwGjaNBcWToIMmPSPDdQPNUYckcQ2QIDAQAB"
)
_SIGNATURES = {
    **_BLOCKS,
    "signatures": times(b"DKIM-Signature:" + _SIGNED + b"AA==\r\n", b"From: a@d.test\r\n"),
    "tags": times(b"a=;", b"DKIM-Signature:", b"\r\n"),
    "blanks within b=": times(b" ", b"DKIM-Signature:" + _SIGNED + b"A", b"!\r\n"),
    "folds within b=": times(b"\r\n ", b"DKIM-Signature:" + _SIGNED + b"A", b"!\r\n"),
    "blanks within h=": times(b" ", b"DKIM-Signature:v=1; a=rsa-sha256; d=d.test; s=s; bh=A; b=A; h=from", b"x\r\n"),
    "names": times(b"a:", b"DKIM-Signature:" + _SIGNED + b"AA==;h=from:", b"a\r\nFrom: a@d.test\r\n"),
    "octets of i=": times(b"=41", b"DKIM-Signature:" + _SIGNED + b"AA==;i=@d.test", b"\r\nFrom: a@d.test\r\n"),
    "a domain": times("\u00e9.".encode(), b"DKIM-Signature:" + _SIGNED + b"AA==;i=@", b"d.test\r\nFrom: a@d.test\r\n"),
    "a copy": times(b"b=A|\r\n\t", b"DKIM-Signature:" + _SIGNED + b"AA==;z=", b"\r\nFrom: a@d.test\r\n"),
    "authors that are none": lambda n: (
        (b"From: " + b")" * 8180 + b"\r\n") * (n // 8188) + b"From: " + b"(" * (n % 8188) + b"\r\n"
    ),
    "comments that do not end": times(b"(", b"From: a@", b"\r\n"),
    "strings": times(b'""', b"From: a@", b"\r\n"),
    "encoded words": times(b"=?a?q?", b"From: a@", b"\r\n"),
    "blanks around an @": times(b" a @", b"From: <", b"\r\n"),
    "seals": times(b"ARC-Seal:i=1;" + _SIGNED + b"AA==; cv=none\r\n"),
    "comments of results": times(
        b"()", b"ARC-Seal:i=1;" + _SIGNED + b"AA==; cv=none\r\nARC-Authentication-Results:", b"i=1;\r\n"
    ),
    "results of chains": times(b"ARC-Authentication-Results:i=1;i=1;" + b"i" * 50 + b"\r\n", b"ARC-Seal:i=1; a=rsa-sha256\r\n"),
}


def _verify(block: bytes) -> None:
    """All verification of an untrusted header but SPF and DMARC."""
    claimed = signatures.claims(authres.without_forged(block, "relay.test"))
    bodies = dict.fromkeys(claimed.forms(), ("A" * 43 + "=", 0))
    keys: signatures.Keys = {"s._domainkey.d.test": _KEY}
    signatures.verify(claimed, bodies, keys, 1_795_000_000)
    signatures.arc(claimed, bodies, keys)


# Answers of the DNS


class _Answers:
    """A resolver with one answer for all names of a type."""

    def __init__(self, **known: list[Any]) -> None:
        self.known = known

    async def values(self, name: str, kind: str) -> list[Any]:
        found = self.known.get(kind)
        if not found:
            raise NoData(name)
        return found

    async def txt(self, name: str) -> list[str]:
        return await self.values(name, "TXT")


def _now(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine that never waits."""
    with contextlib.suppress(StopIteration):
        while True:
            work.send(None)


def _spf(**others: Callable[[bytes], list[Any]]) -> Callable[[bytes], None]:
    """SPF with a long policy, or with a short one whose queries have long answers."""

    def check(answer: bytes) -> None:
        known = {kind: make(answer) for kind, make in others.items()}
        known.setdefault("TXT", [answer.decode()])
        _now(spf.check(_Answers(**known), "192.0.2.1", "a@b.test", "h.test"))  # type: ignore[arg-type]

    return check


def _hosts(answer: bytes) -> list[Any]:
    return [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(len(answer) // 16)]


_POLICIES = {
    "hosts": times(b"a ", b"v=spf1 "),
    "networks": times(b"ip4:1.1.1.1 ", b"v=spf1 "),
    "modifiers": lambda n: b"v=spf1 " + b" ".join(b"x%d=y" % k for k in range(n // 8)),
    "macros": times(b"%{l}", b"v=spf1 exists:"),
    "reversed macros": times(b"%{l99r-}", b"v=spf1 exists:", b".b.test"),
    "digits": times(b"9", b"v=spf1 ip4:1.1.1.1/"),
    "blanks": times(b" ", b"v=spf1"),
    "colons": times(b":", b"v=spf1 a"),
    "a long name": times(b"a.", b"v=spf1 a:", b"test"),
}
_RECORDS = {
    "tags": times(b"a=b;", b"v=DMARC1;p=reject;"),
    "blanks": times(b" ", b"v=DMARC1;p=reject;", b"x"),
    "blanks in front": times(b" ", b"v", b"=DMARC1"),
    "reports": times(b"mailto:a@b.test,", b"v=DMARC1;p=reject;rua="),
}
_KEYS = {
    "tags": times(b"a=;", b"v=DKIM1;"),
    "a key": times(b"A", b"v=DKIM1;p="),
    "blanks": times(b" ", b"v=DKIM1;p=A", b"!"),
}


def _dmarc(record: bytes) -> None:
    answers = _Answers(TXT=[record.decode()])
    _now(dmarc._check(answers, "a.b.test", ("b.test", "fail"), [("b.test", "temperror")]))  # type: ignore[arg-type]


def _key(record: bytes) -> None:
    block = b"DKIM-Signature:" + _SIGNED + b"AA==\r\nFrom: a@d.test\r\n"
    claimed = signatures.claims(block)
    bodies = dict.fromkeys(claimed.forms(), ("A" * 43 + "=", 0))
    signatures.verify(claimed, bodies, {"s._domainkey.d.test": record.decode()}, 1_795_000_000)


# Sessions

_EHLO = b"EHLO a.test\r\n"
_ENVELOPE = _EHLO + b"MAIL FROM:<a@b.test>\r\nRCPT TO:<a@b.test>\r\n"
_SESSIONS = {
    "commands": times(b"NOOP\r\n", _EHLO),
    "empty lines": times(b"\r\n"),
    "line feeds": times(b"\n"),
    "a line without an end": times(b"a"),
    "recipients": times(b"RCPT TO:<a@b.test>\r\n", _ENVELOPE),
    "senders": times(b"MAIL FROM:<a@b.test>\r\nRSET\r\n", _EHLO),
    "parameters": times(b"MAIL FROM:<a@b.test>" + b" A=b" * 100 + b"\r\n", _EHLO),
    "XCLIENT": times(b"XCLIENT NAME=" + b"+41" * 100 + b"\r\n", _EHLO),
    "XFORWARD": times(b"XFORWARD HELO=" + b"+41" * 100 + b" NAME=+20" * 50 + b"\r\n", _EHLO),
    "AUTH": times(b"AUTH PLAIN " + b"AAAA" * 50 + b"\r\n", _EHLO),
    "message data": times(b"x" * 60 + b"\r\n", _ENVELOPE + b"DATA\r\n"),
    "dots": times(b"..\r\n", _ENVELOPE + b"DATA\r\n"),
    "line feeds in message data": times(b"\n", _ENVELOPE + b"DATA\r\n"),
    "carriage returns in message data": times(b"\r", _ENVELOPE + b"DATA\r\n"),
    "a chunk": lambda n: _ENVELOPE + b"BDAT %d\r\n" % n + b"\r" * n,
    "chunks": times(b"BDAT 1\r\nx", _ENVELOPE),
}


def _session(normalize: bool) -> Callable[[bytes], None]:
    def talk(wire: bytes) -> None:
        limits = Limits(message_size=1 << 30, recipients=1 << 20, errors=1 << 20, normalize=normalize, long_lines=True)
        offers = Offers(mechanisms=("PLAIN",), clear=True, xclient=True, xforward=True)
        one = ServerSession("relay.test", Host(limits, offers))
        one.greet()
        start = wire.find(b"DATA\r\n") + 6  # nothing may follow that in the same piece
        if start >= 6:
            one.receive(wire[:start])
        for at in range(start if start >= 6 else 0, len(wire), 65536):
            one.receive(wire[at : at + 65536])

    return talk


_POP3 = {
    "commands": times(b"NOOP\r\n"),
    "messages": times(b"RETR 1\r\n"),
    "tops": times(b"TOP 1 9999999999\r\n"),
    "deletions": times(b"DELE 1\r\nRSET\r\n"),
    "line feeds": times(b"\n"),
    "carriage returns": times(b"\r"),
    "a line without an end": times(b"a"),
    "a long line": times(b"a", b"", b"\r\n"),
    "arguments": times(b"LIST" + b" 1" * 120 + b"\r\n"),
}
_MESSAGES = {
    "header lines": times(b"a\n"),
    "blanks": times(b" "),
    "carriage returns": times(b"\r"),
    "lines of the body": times(b"a\r\n", b"\r\n"),
    "empty lines of the body": times(b"\n", b"\n"),
    "dots": times(b".\r\n", b"\r\n"),
}


def _pop3(wire: bytes) -> None:
    one = pop3.caller(b"a: b\r\n\r\n.\r\n")
    for at in range(0, len(wire), 65536):
        one.feed(wire[at : at + 65536])


def _top(message: bytes) -> None:
    one = Wanted(1, 1, 1 << 30)
    for at in range(0, len(message), 16384):
        one.feed(message[at : at + 16384])


def _sasl(mechanism: str) -> Callable[[bytes], None]:
    keys = sasl.Keys(b"salt", b"x" * 32, b"y" * 32, 4096)

    def respond(response: bytes) -> None:
        exchange, _ = sasl.begin(mechanism, lambda user: keys)
        with contextlib.suppress(StopIteration, sasl.Malformed):
            exchange.send(response)
            exchange.send(response)

    return respond


_RESPONSES = {
    "NULs": times(b"\0"),
    "octets": times(b"x"),
    "commas": times(b",", b"n"),
    "names": times(b"=2C", b"n,a=", b",\1auth=Bearer x\1\1"),
    "attributes": times(b"a=b\1", b"n,,\1", b"\1"),
    "attributes of SCRAM": times(b"a=b,", b"n,,n=user,r=x,"),
    "a token": times(b"x", b"user=a\1auth=Bearer ", b"\1\1"),
}


def _proxy(data: bytes) -> None:
    with contextlib.suppress(proxy.BadHeader):
        proxy.parse(data)


# Replies of others

_REPLIES = {
    "lines": times(b"250-a\r\n"),
    "replies": times(b"250 a\r\n"),
    "line feeds": times(b"\n"),
    "a line without an end": times(b"2"),
    "codes": times(b"250-5.1.1 " + b"5.1.1 " * 20 + b"\r\n"),
}


def _replies(wire: bytes) -> None:
    Replies(LINE_LIMIT, LINES_LIMIT).feed(wire)


_CLAMD = {
    "replies": lambda n: b"".join(b"%d: stream: OK\0" % (number + 1) for number in range(n // 20)),
    "names": lambda n: b"".join(b"%d: stream: %b FOUND\0" % (number + 1, b"a " * 450) for number in range(n // 1000)),
    "errors": lambda n: b"".join(b"%d: %b ERROR\0" % (number + 1, b"ERROR" * 190) for number in range(n // 1000)),
    "without an end": times(b"x", b"1: "),
    "digits": times(b"1"),
    "NULs": times(b"\0"),
}


_POLICY = {
    "replies": times(b"action=\n\n"),
    "attributes": times(b"a=\n"),
    "actions": times(b"action=DUNNO\n\n"),
    "a name": times(b"a"),
    "a value": times(b"x", b"action="),
    "carriage returns": times(b"\r", b"action="),
    "blanks": times(b"action=" + b" " * 900 + b"x\n\n"),
    "controls": times(b"action=WARN " + b"\1" * 900 + b"\n\n"),
    "digits": times(b"action=" + b"1" * 900 + b"\n\n"),
    "a field": times(b"action=PREPEND " + b"x" * 900 + b":\n\n"),
    "an address": times(b"action=REDIRECT " + b"<" * 900 + b"\n\n"),
    "a refusal": times(b"action=REJECT " + b"5.1.1 " * 150 + b"\n\n"),
}


_MILTER = {
    "answers": times(b"\0\0\0\1c"),
    "work": times(b"\0\0\0\1p", b"\0\0\0\1c" * 5),
    "fields": times(b"\0\0\0\x06hX\0y\0", b"\0\0\0\1c" * 5),
    "addresses": times(b"\0\0\0\x07+<a@b\0", b"\0\0\0\1c" * 5),
    "one address": lambda n: b"\0\0\0\1c" * 5 + (n + 2).to_bytes(4) + b"+" + b"<" * n + b"\0",
    "a body": lambda n: b"\0\0\0\1c" * 5 + (n + 1).to_bytes(4) + b"b" + b"x" * n,
    "lines": lambda n: (n + 2).to_bytes(4) + b"y" + b"550\r\n" * (n // 5) + b"\0",
    "macros": times(b"\0\0\0\1i\0"),
    "names of macros": times(b"a ", b"\0\0\0\1", b"\0"),
    "parameters": lambda n: b"\0\0\0\1c" * 5 + (n // 2 * 2 + 8).to_bytes(4) + b"2<a@b>\0" + b"A " * (n // 2) + b"\0",
    "blanks": lambda n: b"\0\0\0\1c" * 5 + (n + 2).to_bytes(4) + b"-" + b" " * n + b"\0",
}


def _milter(wire: bytes) -> None:
    """In pieces of every length, as they come; and as the terms of a filter."""
    for terms in (b"\0\0\0\x0dO\0\0\0\6\0\0\1\xff\0\0\0\0", b""):
        one, at, size = milter.Conversation(), 0, 1
        one.negotiate()
        one.feed(terms or (len(wire) + 13).to_bytes(4) + b"O\0\0\0\6\0\0\1\xff\0\0\0\0")
        if terms:
            for told in (one.connect("x", "192.0.2.1", 0, {}), one.mail("a@b", (), {}), one.rcpt("c@d", (), {})):
                assert told
            one.header(b"\r\n", {})
            one.body(b"x")
            one.end({})
        while at < len(wire):
            one.feed(wire[at : at + size])
            at, size = at + size, size % 100 + 1


def _policy(wire: bytes) -> None:
    """In pieces of every length, as they come; and what follows from the actions."""
    one, at, size = policy.Replies(), 0, 1
    while at < len(wire):
        for action in one.feed(wire[at : at + size]):
            policy.field(action.text)
            policy.recipient(action.text)
            if action.word in ("REJECT", "4xx"):
                policy.refusal(action, action.text)
        at, size = at + size, size % 100 + 1


def _clamd(wire: bytes) -> None:
    """In pieces of every length, as they come."""
    one, at, size = clamd.Replies(), 0, 1
    for _ in range(len(wire) // 20):
        one.asked()
    with contextlib.suppress(clamd.ClamdError):
        while at < len(wire):
            for _ in one.feed(wire[at : at + size]):
                pass
            at, size = at + size, size % 100 + 1


def _spamd(wire: bytes) -> None:
    with contextlib.suppress(spamc.SpamdError):
        spamc.judged(wire)


def _rspamd(wire: bytes) -> None:
    with contextlib.suppress(FilterFailure):
        rspamd.edits_of(rspamd.object_of(wire), _HEADER_OF_FILTERED)


def _hook(wire: bytes) -> None:
    with contextlib.suppress(hook.HookError):
        hook.wanted(hook.said(wire), _HEADER_OF_FILTERED)


_HEADER_OF_FILTERED = b"X-Spam: x\r\n" * 1000 + b"\r\n"
_SPAMD = {
    "rules": times(b"A,", b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; 1 / 2\r\n\r\n"),
    "blanks": times(b" ", b"SPAMD/1.1 0 EX_OK\r\nSpam:"), "lines": times(b"Spam: True\r\n", b"SPAMD/1.1 0 EX_OK\r\n"),
    "digits": times(b"1", b"SPAMD/1.1 0 EX_OK\r\nSpam: True ; "), "odd": times(b"\xff"),
}  # fmt: skip
_RSPAMD = {
    "lists": times(b"[", b'{"a":'), "symbols": times(b'"A":{},', b'{"symbols":{', b'"B":{}}}'),
    "removals": times(b'"x-spam":0,', b'{"milter":{"remove_headers":{', b'"X-Spam":0}}}'),
    "names": lambda n: b'{"milter":{"remove_headers":{%b"X-Spam":0}}}' % b"".join(b'"x-%d":0,' % at for at in range(n // 9)),
    "additions": times(b'"x",', b'{"milter":{"add_headers":{"X-A":[', b'"x"]}}}'),
}  # fmt: skip
_CHANGES = b'{"verdict":"accept","changes":['
_HOOK = {
    "lists": times(b"[", b'{"verdict":'), "reason": times(b"\\u0007", b'{"verdict":"accept","reason":"', b'"}'),
    "removals": times(b'{"do":"remove","name":"x-spam"},', _CHANGES, b'{"do":"remove","name":"X-Spam"}]}'),
    "removed and back": times(
        b'{"do":"remove","name":"x-spam"},{"do":"replace","name":"x-spam","value":"x","instance":7},', _CHANGES,
        b'{"do":"remove","name":"X-Spam"}]}',
    ),
    "addresses": times(b"(a)", _CHANGES + b'{"do":"set_sender","address":"', b'"}]}'),
}  # fmt: skip

_shaping = Shaping(Config.model_validate({"listener": [{"address": "127.0.0.1:2525"}]}))
_SAID = {
    "words": times(b"too many "),
    "digits": times(b"4.7.650 "),
    "spaces": times(b" "),
    "brackets": times(b"[TSS0"),
    "unusual rates": times(b"unusual rat"),
}


def _rule(text: bytes) -> None:
    for code in ("421 4.7.0 ", "451 4.7.500 ", "450 4.2.2 "):
        _shaping.rule("mx.google.com", code + text.decode())


def _dsn(block: bytes) -> None:
    envelope = Envelope("a@b.test", ["c@d.test"], 1, 0, 0, 0)
    attempt = Attempt(0, "permanent", "rcpt", "mx", 550, "5.1.1", block[:500].decode("utf-8", "replace"))
    dsn.failure_dsn(envelope, [("c@d.test", attempt, False)], block, hostname="h", ident="i", original_ident="o", seconds=0)


def _relaxed(data: bytes) -> None:
    body = dkim.BodyHash(True)
    body.feed(data)
    body.finish()


_BODIES = {
    "white space": times(b" "),
    "empty lines": times(b"\r\n"),
    "blank lines": times(b" \r\n"),
    "bare CRs": times(b"\r"),
    "bare LFs": times(b"\n"),
    "text": times(b"ab  c\r\n"),
}
_signature = dkim.Signature("d.test", "s", "rsa-sha256")
_someone = Identity("x", senders=("@b.test", "@.c.test"))


def _parameters(text: bytes) -> None:
    address.parse_parameters(text.decode("utf-8", "surrogateescape"))


_MAILBOX_NAMES = {
    "ampersands": times(b"&"), "shifts": times(b"&AOk-"), "a shift": times(b"AOkA", b"&", b"-"),
    "its beginning": times(b"A", b"&"), "beginnings": times(b"&AA"), "a letter": times(b"a"),
}  # fmt: skip


def _mailbox_name(text: bytes) -> None:
    for lenient in (False, True):
        with contextlib.suppress(ValueError):
            mailbox_name.decode(text.decode(), lenient=lenient)


_ENVELOPE = b"From a@b.test Fri Nov 27 21:48:43 2026\n"
_MBOXES = {
    "no mbox": times(b"From "), "lines": times(b"From \n"), "empty messages": times(_ENVELOPE), "a line": times(b"\0", _ENVELOPE),
    "quotes": times(b">", _ENVELOPE), "quoted": times(b">From \n", _ENVELOPE), "dates": times(b" Fri Nov 27 21:48", b"From "),
    "empty lines": times(b"\n", _ENVELOPE), "state": times(b"Status: R\n", _ENVELOPE),
    "folds": times(b" R\n", _ENVELOPE + b"Status:\n"),
    "blanks": times(b" ", _ENVELOPE + b"Status", b"\n"), "keywords": times(b" a", _ENVELOPE + b"X-Keywords:", b"\n"),
    "marks": times(b"X-Relaymta-Export: mboxrd\n", _ENVELOPE),
    "prefixes": times(b"X-Relaymta-", _ENVELOPE + b"X-Relaymta-Export: mboxrd\n"),
}  # fmt: skip


def _mbox(text: bytes) -> None:
    for _ in mbox.read(io.BytesIO(text)):
        pass


_TYPES = {
    "types in parentheses": times(b"(", b"Content-Type: ", b"\r\n\r\n"),
    "closed comments": times(b"()", b"Content-Type: ", b"\r\n\r\n"),
    "a string": times(b'\\"', b'Content-Type: a/b; c="'),
    "strings": times(b';a="";', b"Content-Type: a/b"),
    "parameters": times(b";a=b", b"Content-Type: a/b", b"\r\n\r\n"),
    "comments in parameters": times(b";a(", b"Content-Type: a/b"),
    "no parameters": times(b";=", b"Content-Disposition: a"),
    "tags": times(b"a,", b"Content-Language: ", b"\r\n\r\n"),
    "folds": times(b"\r\n ", b"Content-Type: a/b; boundary=", b"x\r\n\r\n"),
}
_TREES = {
    "dashes": times(b"-", b"Content-Type: multipart/mixed; boundary=a\r\n\r\n"),
    "half delimiters": times(b"--\r\n", b"Content-Type: multipart/mixed; boundary=a\r\n\r\n"),
    "delimiters": times(b"--a\r\n", b"Content-Type: multipart/mixed; boundary=a\r\n\r\n"),
    "blanks behind them": times(b" ", b"Content-Type: multipart/mixed; boundary=a\r\n\r\n--a", b"x\r\n"),
    "nested": times(b"Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\n"),
    "in a deep tree": times(
        b"--99 --\r\n",
        b"".join(b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (n, n) for n in range(9)),
    ),
    "of each depth": lambda n: b"".join(
        b"Content-Type: multipart/mixed; boundary=%d\r\n\r\n--%d\r\n" % (k, k) for k in range(n // 50)
    ),
    "a digest": times(b"--a\r\n\r\n", b"Content-Type: multipart/digest; boundary=a\r\n\r\n"),
    "attached messages": times(b"Content-Type: message/rfc822\r\n\r\n"),
    "a boundary": lambda n: b'Content-Type: multipart/mixed; boundary="%b"\r\n\r\n--%b\r\n' % (b"a" * (n // 2), b"a" * (n // 2)),
    "empty lines": times(b"\r\n"),
    "line feeds": times(b"\n", b"\n"),
    "NULs": times(b"\0"),
}
_ENCODED = {
    "padding": times(b"="), "equals signs": times(b"=\r\n"), "octets": times(b"=00"), "letters": times(b"QUJD"),
    "half": times(b"Q="),
    "blanks": times(b" "), "blanks behind equals signs": times(b" ", b"=", b"x"), "line ends": times(b"\r\n"),
    "CRs": times(b"\r"),
}  # fmt: skip
_SHOWN = {
    "encoded words": times(b"=?utf-8?q?=C3=A4?= "), "beginnings": times(b"=?"), "questions": times(b"?"),
    "halves": times(b"=?a?q?"),
    "charsets": times(b"=?x?b?eA==?=\r\n "), "characters": times("\u00e4\u0300".encode()), "folds": times(b"\r\n "),
    "marks": lambda n: "\u0345\u0316".encode() * (n // 8) + "\u0316\u0345".encode() * (n // 8),
    "ligatures": times("\ufdfa".encode()),
    "backslashes": times(b"\\"), "stars": times(b"=?a*"),
}  # fmt: skip
_SECTIONS = {
    "numbers": times(b"1."),
    "names": times(b"a ", b"HEADER.FIELDS (", b"a)"),
    "quotes": times(b'"\\"" ', b"HEADER.FIELDS ("),
}


def _search(data: bytes) -> None:
    assert not mime_text.in_header(data, "nowhere")


def _section(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        mime.Section.parse(text)


# Sets of message numbers and UIDs, 8 octets a range; and what is done with a mailbox of 10,000

_MANY = 10_000
_EVEN = struct.pack(f"<{_MANY}I", *range(2, 2 * _MANY + 2, 2))
_BIGGEST = 0xFFFFFFFF


def _ends(end: Callable[[int, int], tuple[int, int]]) -> Callable[[int], bytes]:
    """As many ranges as make n octets: `end` of each, and of how many."""
    return lambda n: b"".join(struct.pack("<II", *end(at, n // 8)) for at in range(n // 8))


_UID_SETS = {
    "numbers": _ends(lambda at, count: (2 * at + 1, 2 * at + 1)),
    "from the last on": _ends(lambda at, count: (2 * (count - at), 2 * (count - at))),
    "one number": _ends(lambda at, count: (7, 7)),
    "ranges within ranges": _ends(lambda at, count: (at + 1, 2 * count - at)),
    "ranges that overlap": _ends(lambda at, count: (at + 9, at + 1)),
    "all": _ends(lambda at, count: (1, 0)),
    "four billion": _ends(lambda at, count: (1, _BIGGEST)),
}


def _view() -> View:
    mailbox = Mailbox(7, 2 * _MANY + 2, 5)
    return View(Shared(), "box", mailbox, _EVEN, condstore=True, qresync=True)


_selected = _view()


def _numbers(data: bytes) -> Numbers:
    text = b",".join(b"%d:%d" % ends for ends in struct.iter_unpack("<II", data)).replace(b":0", b":*")
    return Words(b"a", [text]).numbers() if text else Numbers(())


def _set(data: bytes) -> None:
    chosen = _numbers(data)
    for by_uid in (True, False):
        with contextlib.suppress(NoSuchNumber):
            _selected.targets(chosen, by_uid)


def _resync(data: bytes) -> None:
    chosen = _numbers(data)
    for _ in resync(_selected, Qresync(7, 1, chosen, chosen, chosen), b"", None):
        pass


def _advance(data: bytes) -> None:
    """Of n octets of records the first half are new messages; as many of those that were there have changed or gone."""
    count = len(data) // 24
    view, uids = _view(), range(2, 2 * min(count, _MANY) + 2, 2)
    flagged = [uid for at, uid in enumerate(uids) if at % 2]
    gone = [(uid, uid) for at, uid in enumerate(uids) if not at % 2]
    new = range(2 * _MANY + 2, 2 * _MANY + 2 + count)
    records = b"".join(struct.pack("<IIQQ", uid, 0, uid % 32, 6) for uid in (*flagged, *new))
    for _ in view.advance(Changes(6, new.stop, _MANY - len(gone) + count, [], records, gone), True):
        pass


def _found(data: bytes) -> None:
    """What was found comes in slices from the last one on."""
    found = Found({"MIN", "MAX", "COUNT", "ALL", "SAVE"})
    for uid in range(len(data) // 24, 0, -1):
        found.add(struct.pack("<IIQQ", uid, 0, 0, uid))
    for _ in found.esearch(b"A", _selected, True, True):
        pass


_SEARCH_TEXTS = {
    "a letter": times(b"a"),
    "half of it": lambda n: b"a" * (n // 4) + b"b" + b"a" * (n - n // 4 - 1),
    "periods": times(b"ab"),
    "words": times(b"abcabd"),
    "capitals": times("\u00c4A".encode()),
    "ligatures": times("\ufb03".encode()),
    "marks": times("\u0323\u0301".encode()),
}


def _searched(data: bytes) -> None:
    """The first quarter of a text is looked for in the rest, and in front of a letter that it does not have."""
    text = data.decode("utf-8", "replace")
    sought = text[: len(text) // 4]
    program = Program(Or(Text("BODY", sought + "z"), Text("BODY", "z" + sought)), _selected, 0)
    batch = Batch(struct.pack("<IIQQ", 2, 0, 0, 1))
    message = b"Content-Type: text/plain; charset=utf-8\r\n\r\n" + data
    batch.bodies = [MessageText(b"", message)]
    program.run(batch)
    rows = encode(MessageRow(1, 1, 1, 1)), encode(ObjectRow(1, Body(1, 1, 1, len(message)), mime.describe(message)))
    batch.bodies = Stored([(*rows, message)], lambda _, __, data: MessageText(b"", data))
    program.run(batch)


def _in_envelope(octets: bytes) -> None:
    found = EnvelopeText(octets, str)
    for name in FIELDS:
        found.has(name, "\u00e4")
    found.sent()


_ENVELOPES = {
    "parentheses": times(b"("), "lists": times(b"(NIL NIL NIL NIL)", b'(NIL "\xc3\xa4" ('), "quotes": times(b'"'),
    "backslashes": times(b"\\", b'("'), "literals": times(b" {1}\r\na", b"("), "digits": times(b"1", b"({"),
    "NIL": times(b" NIL", b"(NIL"), "days": times(b"1 ", b'("', b'"'), "months": times(b"Nov ", b'("', b'"'),
    "blanks": times(b" ", b'("1', b'"'), "encoded words": times(b"=?utf-8?q?=C3=A4?= ", b'(NIL "', b'"'),
    "addresses": times(b'(NIL NIL "\xc3\xa4" "b")', b"(NIL NIL ("),
}  # fmt: skip


# ManageSieve, and Sieve scripts

_MANAGESIEVE = {
    "commands": times(b"NOOP\r\n"),
    "strings": times(b'NOOP "a"\r\n'),
    "quoted pairs": times(b'NOOP "' + b'\\"' * 100 + b'"\r\n'),
    "half a string": times(b"\\", b'NOOP "', b"\r\n"),
    "quotes": times(b'"', b"NOOP ", b"\r\n"),
    "words": times(b" a", b"NOOP", b"\r\n"),
    "blanks": times(b" ", b"NOOP", b"\r\n"),
    "literals": times(b"NOOP {1+}\r\na\r\n"),
    "empty literals": times(b" {0+}\r\n", b"NOOP"),
    "a literal": lambda n: b"NOOP {%d+}\r\n" % n + b"x" * n + b"\r\n",
    "braces": times(b" {", b"NOOP", b"1+}\r\n"),
    "digits": times(b"1", b"NOOP {", b"+}\r\n"),
    "line feeds": times(b"\n"),
    "carriage returns": times(b"\r"),
    "a line without an end": times(b"a"),
}
_SCRIPTS = {
    "commands": times(b"keep;\n"),
    "blocks": times(b"if true {", b"", b""),
    "tests": times(b"if not true {}\n"),
    "nested tests": times(b"anyof(", b"if ", b""),
    "else": times(b"elsif false {}\n", b"if true {}\n"),
    "strings": times(b'"a",', b'require ["fileinto"]; if header ["b",', b'"c"] "d" {}'),
    "a string": times(b"a", b'redirect "', b'";'),
    "quoted pairs": times(b'\\"', b'redirect "', b'";'),
    "half a string": times(b"\\\\", b'redirect "'),
    "quotes": times(b'"'),
    "comments": times(b"/**/"),
    "half a comment": times(b"/*", b"/"),
    "hashes": times(b"#\n"),
    "texts": times(b"text:\r\n.\r\n"),
    "a text of dots": times(b"..\r\n", b"redirect text:\r\n", b".\r\n;"),
    "half a text": times(b".\r.", b"redirect text:\r\n"),
    "blanks": times(b" "),
    "digits": times(b"1", b"if size :over ", b" {}"),
    "tags": times(b":a ", b"keep "),
    "brackets": times(b"["),
    "encoded characters": times(b"${hex:41}", b'require "encoded-character"; redirect "', b'";'),
    "variables": times(b"${a}", b'require ["variables", "fileinto"]; fileinto "', b'";'),
    "half a variable": times(b"${", b'require ["variables", "fileinto"]; fileinto "', b'";'),
    "require": times(b'require "copy";\n'),
}


def _managesieve(wire: bytes) -> None:
    """By a session before the login, whose errors are no end, and by its reader after it."""
    one = managesieve_server.ServerSession("relay.test", Offers(mechanisms=("PLAIN",), clear=True))
    reader = Reader(managesieve_server.AFTER_LOGIN)
    for at in range(0, len(wire), 65536):
        one.receive(wire[at : at + 65536])
        while one.behind:
            one.receive(b"")
    for at in range(0, len(wire), 1024):
        reader.feed(wire[at : at + 1024])
        while (found := reader.next()) is not None:
            if isinstance(found, Broken) and found.fatal:
                return


_SORTING = sieve.compile(
    b'require ["body", "date", "envelope", "fileinto", "variables", "relational"];'
    b'if header :contains ["subject", "to", "x", "a"] "nowhere" {} if address :domain ["from", "to", "sender"] "no.test" {}'
    b'if header :matches "subject" "*a*b*" { fileinto "${1}"; } if date :value "ge" "date" "hour" "9" {}'
    b'if body :content "text" :contains "nowhere" {} if body :raw :contains "nowhere" {} if exists ["list-id", "nothing"] {}'
)


def _sorted(message: bytes) -> None:
    sieve_run.run(_SORTING, SieveMessage(message), sender="a@b.test", recipient="c@d.test", seconds=1)


def _script(text: bytes) -> None:
    with contextlib.suppress(sieve.SieveError):
        sieve.compile(text)


_ATTACHED = b'Content-Type: multipart/mixed; boundary="abcdefgh"\r\n\r\n'
_ATTACHMENTS = {
    "parts": times(b"--abcdefgh\r\n\r\nx\r\n", _ATTACHED),
    "names": times(b'--abcdefgh\r\nContent-Type: a/b; name="=?a?q?a?=\r\n b\r\n\r\nx\r\n', _ATTACHED),
    "parameters": times(b"; name=a", b"Content-Type: a/b"),
    "broken parameters": times(b' name="a', b"Content-Type: a/b"),
    "pieces": times(b"; name*1=a", b"Content-Type: a/b"),
    "fields": times(b"Content-Type: a/b\r\n"),
    "fields within a line": times(b"content-type:", b"x"),
    "fields within a line of a part": times(b"content-type:", _ATTACHED + b"--abcdefgh\r\nx"),
    "boundaries": times(b"; boundary=abcdefg", b"Content-Type: multipart/mixed"),
    "dashes": times(b"-", _ATTACHED),
    "lines of dashes": times(b"--\n", b"Content-Type: multipart/mixed\r\n\r\n"),
    "nearly delimiters": times(b"--abcdefg", _ATTACHED),
    "messages": times(b"Content-Type: message/rfc822\r\n\r\n"),
    "no ends of headers": times(b"--abcdefgh\r\nA: b\r\n", _ATTACHED),
    "uuencode": times(b"\nbegin 644 a", b"\r\n\r\n"),
    "yEnc": times(b"=ybegin ", b"\r\n\r\n"),
    "headers of zip": times(b"PK\3\4", b"Content-Type: a/b\r\n\r\nPK\3\4"),
    "in base64": times(b"UEsD", b"Content-Transfer-Encoding: base64\r\n\r\n"),
    "marks": times("\u0316\u0300".encode(), b'Content-Type: a/b; name="'),
    "tags": times(b"<", b"Content-Type: text/html\r\n\r\n"),
    "references": times(b"&#1;", b"Content-Type: text/html\r\n\r\n"),
    "CRs": times(b"\r", _ATTACHED + b"--abcdefgh"),
}


def _attachments(data: bytes) -> None:
    header, line, body = data.partition(b"\r\n\r\n")
    found = attachments.parts(header + line, body)
    for part in found.parts:
        _ = part.first, part.kinds, part.archived
    found.texts()


_MIXED = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
_PARTS = {
    "dashes": times(b"\r\n--"),
    "delimiters": times(b"--b\r\n"),
    "many boundaries": lambda n: b"".join(b"--b\r\nContent-Type: multipart/x; boundary=%d\r\n\r\n" % at for at in range(n // 50)),
    "messages": times(b"Content-Type: message/rfc822\r\n\r\n", b"--b\r\n"),
    "boundaries": times(b' boundary="', b"--b\r\nContent-Type: multipart/x;"),
    "folds": times(b"\r\n ", b"--b\r\nContent-Type: multipart/x;"),
    "blanks": times(b" ", b"--b"),
    "types": times(b"Content-Type:\r\n", b"--b\r\n"),
}


def _report(data: bytes) -> None:
    with contextlib.suppress(arf.NotAReport):
        arf.parse(data)


def _parsers() -> Iterable[Parser]:
    whole = "128 kB, 5000 lines: refused"
    yield Parser("proto.mailbox.addresses", _addresses, _ADDRESS_LISTS, "8 kB, 250 domains: refused", 8000)
    fields = {name: lambda n, make=make: b"From: " + make(n) + b"\r\n" for name, make in _ADDRESS_LISTS.items()}
    yield Parser(
        "proto.mailbox.authors", _authors, {**_BLOCKS, **_FROMS, **fields}, "8 kB of all fields: refused", 8000, header.too_long
    )
    yield Parser("proto.addressees.addresses", addressees.addresses, _ADDRESS_LISTS)
    yield Parser("proto.addressees.header_octets", addressees.header_octets, _BLOCKS)
    to = {name: lambda n, make=make: b"To: " + make(n) + b"\r\n" for name, make in _ADDRESS_LISTS.items()}
    yield Parser("proto.addressees.recipients", addressees.recipients, {**_BLOCKS, **to})
    yield Parser("proto.header.header_end", header.header_end, _BLOCKS)
    yield Parser("proto.header.count_received", header.count_received, _BLOCKS)
    yield Parser("proto.header.field_names", header.field_names, _BLOCKS)
    yield Parser("proto.header.begun", header.begun, {**_BLOCKS, "From_ lines": times(b"From x\r\n"), ">": times(b">")})
    ids = {"folds": times(b"\r\n ", b"Message-ID:"), "names": times(b"\r\nmessage-id")}
    yield Parser("proto.header.message_id", header.message_id, {**_BLOCKS, **ids})
    lists = {name: lambda n, make=make: b"To: " + make(n) + b"\r\n\r\n" for name, make in _ADDRESS_LISTS.items()}
    bccs = {"Bccs": times(b"Bcc: x\r\n y\r\n"), "names": times(b"To:"), "short": times(b"To: a\r\n")}
    edited: Callable[[bytes], object] = lambda block: submitted(block, "d.test")  # noqa: E731
    worst = {**_BLOCKS, **_FROMS, **lists, **bccs}
    yield Parser("proto.submitted.submitted", edited, worst, "16 kB, 64 fields of addresses: not completed")
    yield Parser("proto.header.fields", header.fields, _BLOCKS, whole, refused=header.too_long)
    yield Parser("proto.dkim.split_fields", dkim.split_fields, _BLOCKS, whole, refused=header.too_long)
    yield Parser("proto.dkim.canonical_field", dkim.canonical_field, _BLOCKS, whole, refused=header.too_long)
    yield Parser("proto.dkim.BodyHash", _relaxed, _BODIES)
    sign: Callable[[bytes], object] = lambda block: _signature.unsigned(dkim.split_fields(block), "bh", 1)  # noqa: E731
    yield Parser("proto.dkim.Signature", sign, _BLOCKS, whole, refused=header.too_long)
    forged: Callable[[bytes], object] = lambda block: authres.without_forged(block, "relay.test")  # noqa: E731
    yield Parser("proto.authres.without_forged", forged, _RESULTS, whole, refused=header.too_long)
    bound = "64 kB and 1000 fields that are added"
    for kind in ("inserts", "inserts at one place", "changes", "new names"):
        yield Parser(f"proto.edits.edited ({kind})", _edits(kind), _BLOCKS, bound)
    yield Parser("proto.edits.edited (values)", _edited_values, _FIELD_VALUES, bound)
    tags = frozenset((b"x-spam", b"x-spam-score"))
    yield Parser("proto.edits.without", lambda block: edits.without(block, tags), _TAGS)
    yield Parser("proto.edits.subject_edits", lambda block: edits.subject_edits(block, "[SPAM] {subject}"), _SUBJECTS)
    sets = "5 signatures, 10 ARC sets; 200 names of each, in 500 fields"
    yield Parser("filter.signatures", _verify, _SIGNATURES, sets, refused=header.too_long)
    yield Parser("filter.signatures (a key)", _key, _KEYS, "4096 octets, RSA of 4096 bits", 4000)
    yield Parser(
        "filter.spf (a policy)", _spf(), _POLICIES, "10,240 octets, 800 terms, 50 macros, 122 questions: permerror", 10000
    )
    short = {"records": times(b"x")}
    hosts: Callable[[bytes], list[Any]] = lambda answer: ["v=spf1 " + " ".join(f"a:{n}.test" for n in range(10))]  # noqa: E731
    yield Parser("filter.spf (addresses)", _spf(TXT=hosts, A=_hosts), short, "500 in all: permerror")
    mx: Callable[[bytes], list[Any]] = lambda answer: [(n, f"m{n}.test") for n in range(len(answer) // 16)]  # noqa: E731
    yield Parser("filter.spf (MX)", _spf(TXT=lambda answer: ["v=spf1 mx -all"], MX=mx), short, "10: permerror")
    names: Callable[[bytes], list[Any]] = lambda answer: [f"p{n}.test" for n in range(len(answer) // 16)]  # noqa: E731
    yield Parser("filter.spf (PTR)", _spf(TXT=lambda answer: ["v=spf1 ptr -all"], PTR=names, A=_hosts), short, "the first 10")
    texts: Callable[[bytes], list[Any]] = lambda answer: ["x"] * (len(answer) // 16) + ["v=spf1 -all"]  # noqa: E731
    yield Parser("filter.spf (TXT)", _spf(TXT=texts), short, "2 policies and 2 others")
    yield Parser("filter.dmarc", _dmarc, _RECORDS, "4096 octets: no record; 5 authors", 4000)
    form: Callable[[bytes], object] = lambda text: address.plain(text[len("FROM:<") :].strip(b">").decode())  # noqa: E731
    yield Parser("proto.address.plain", form, _PATHS, "1024 characters", 2000)
    yield Parser("proto.address.mail_argument", address.mail_argument, _PATHS, "a line of 2048 octets, a path of 1024", 2000)
    yield Parser("proto.address.rcpt_argument", address.rcpt_argument, _to(_PATHS), "a line of 2048 octets, a path of 1024", 2000)
    words = {
        "keywords": times(b"a=b "),
        "one": times(b"a"),
        "different ones": lambda n: b" ".join(b"a%d" % k for k in range(n // 7)),
    }
    yield Parser("proto.address.parse_parameters", _parameters, words, "a line of 2048 octets", 2000)
    labels = {
        "labels": times(b"a."),
        "dots": times(b"."),
        "hyphens": times(b"-"),
        "in UTF-8": times("ä".encode()),
        "one": times(b"a"),
    }
    yield Parser("proto.address.normalize_domain", _domain, labels, "253 octets", 240)
    literal: Callable[[bytes], object] = lambda text: address.literal_address(text.decode())  # noqa: E731
    yield Parser(
        "proto.address.literal_address", literal, {"colons": times(b":", b"[IPv6:", b"]"), "digits": times(b"1", b"[", b"]")}
    )
    may: Callable[[bytes], object] = lambda text: _someone.may_send_as(text.decode())  # noqa: E731
    yield Parser("accept.identity.may_send_as", may, {"ats": times(b"@"), "an atom": times(b"a", b"", b"@b.test")})
    yield Parser("proto.smtp_server", _session(False), _SESSIONS, "a command of 2048 octets (12,288 of AUTH)")
    yield Parser("proto.smtp_server (normalizing)", _session(True), _SESSIONS, "a command of 2048 octets (12,288 of AUTH)")
    yield Parser("proto.pop3_server", _pop3, _POP3, "a command of 255 octets (12,288 of AUTH)")
    yield Parser("proto.pop3_maildrop.Wanted", _top, _MESSAGES, "-")
    yield Parser("proto.managesieve_server", _managesieve, _MANAGESIEVE, "a command of 8 kB, 68 kB after the login")
    yield Parser("proto.sieve.compile", _script, _SCRIPTS, "64 kB, 15 deep", 65_000)
    subjects = {f"subject of {name}": lambda n, make=make: b"Subject: " + make(n) + b"\r\n" for name, make in _SHOWN.items()}
    dates = {"dates": times(b"Date: 1 Jan 2026 0:00 +0000\r\n"), "a date": times(b"1 ", b"Date: ", b"\r\n")}
    worst = {**_TREES, **_TYPES, **{f"to {name}": lists[name] for name in _ADDRESS_LISTS}, **_BLOCKS, **subjects, **dates}
    yield Parser("proto.sieve_run", _sorted, worst, "1 MB of a header, 64 MB of a body; 10,000 steps, 128 MB of comparisons")
    for row in imap_worst.rows(times):
        yield Parser(*row)
    for mechanism in sorted(sasl.MECHANISMS):
        yield Parser(f"proto.sasl {mechanism}", _sasl(mechanism), _RESPONSES, "12,288 octets in base64", 9000)
    first = {"version 1": times(b"x", b"PROXY TCP4 "), "digits": times(b"1", b"PROXY TCP4 1.1.1.1 1.1.1.1 ", b" 1\r\n")}
    yield Parser("proto.proxy.parse", _proxy, first, "2064 octets", 2000)
    yield Parser("proto.smtp_client (replies)", _replies, _REPLIES, "a line of 4096 octets, 200 lines")
    yield Parser(
        "proto.smtp_client.Said", lambda text: Said(550, text, "rcpt"), {**_SAID, "codes": times(b"5.1.1 x\n")}, "as above"
    )
    yield Parser("proto.clamd.Replies", _clamd, _CLAMD, "1024 octets of a reply")
    yield Parser("proto.policy.Replies", _policy, _POLICY, "16,384 octets of a reply")
    yield Parser(
        "proto.milter.Conversation",
        _milter,
        _MILTER,
        "1 MB of an answer, 256 kB of changes but the body, 16 kB of names of macros",
    )
    yield Parser("proto.spamc.judged", _spamd, _SPAMD, "65,536 octets")
    yield Parser("filter.rspamd", _rspamd, _RSPAMD, "1 MB; 200 changes")
    yield Parser("proto.hook", _hook, _HOOK, "1 MB; 200 changes")
    yield Parser("proto.hook.fields", lambda header: hook.written({"header": hook.fields(header)}), _BLOCKS, "5,000 fields")
    keys: Callable[[bytes], object] = lambda text: sum(1 for _ in keys_of(text.decode()))  # noqa: E731
    worst = {
        "open lists": times(b"y=[\n"), "blanks": times(b" ", b"["), "quotes": times(b'\\"', b'y=[\n"'),
        "values": times(b"1,", b"y=[\n"), "dots": times(b". a", b"a"), "brackets": times(b"]", b"y=["),
        "tables": times(b"[[a.b]]\n"), "braces": times(b"{", b"y=[\n"),
    }  # fmt: skip
    yield Parser("toml.keys_of", keys, worst, "the operator's own files")
    yield Parser("route.shaping.rule", _rule, _SAID, "500 characters; expressions of the configuration are the operator's", 4000)
    yield Parser("proto.dsn.failure_dsn", _dsn, _BLOCKS, "64 kB of the header, 4096 characters of a reply")
    yield Parser("proto.mailbox_name.decode", _mailbox_name, _MAILBOX_NAMES)
    bound = "1 MB of a header, 1000 fields, 10,000 addresses, 10,000 parts, 100 deep"
    worst = {**_TREES, **_TYPES, **{f"to {name}": lists[name] for name in _ADDRESS_LISTS}, **_BLOCKS}
    yield Parser("proto.mime.describe", mime.describe, worst, bound)
    yield Parser("proto.mime.Section.parse", _section, _SECTIONS, "64 kB of a command")
    bound = "20 deep, 1000 parts; 1000 names of an archive; 2000 parameters that are not valid; 256 kB of text"
    yield Parser("proto.attachments.parts", _attachments, _ATTACHMENTS, bound)
    front = b"Content-Type: multipart/report; boundary=b\r\n\r\n--b\r\nContent-Type: message/feedback-report\r\n\r\n"
    said = front + b"Feedback-Type: abuse\r\n"
    worst = {
        **_TREES, "fields": times(b"A: b\r\n", said), "recipients": times(b"Original-Rcpt-To: <a@b.example>\n", said),
        "folded": times(b"\r\n a", said), "routes": times(b"Original-Rcpt-To: " + b"<" * 500 + b"\n", said),
        "addressees": times(b"<a@b.example>,", said + b"--b\nContent-Type: text/rfc822-headers\n\nTo: "),
        "parts": times(b"--b\r\n\r\n", said), "messages": times(b"--b\nContent-Type: message/rfc822\n\nTo: a@b\n\n", said),
    }  # fmt: skip
    lines = "20,000 lines of delimiters and headers of parts"
    yield Parser("accept.once.without_boundaries", lambda body: once.without_boundaries(_MIXED, body), _PARTS, lines)
    yield Parser("proto.arf.parse", _report, worst, "1 MB; 100 recipients; 1000 characters of a field")
    pieces = {
        "begin": b"-----BEGIN PRIVATE KEY-----", "base64": b"MIIEowIBAAKCAQEA7bq1Zt9sX0",
        "ids": b" AKIAQ3EGRT5VX2LMB7WN",
        "pairs": b" AKIAQ3EGRT5VX2LMB7WN wJalrXUtnFEMI/K7MDENG/bPxRfiCYzK8mPq2RvT", "cards": b"4111 1111 1111 1111 12 ",
        "digits": b"4111111111111112", "quoted": b"> -----BEGIN RSA PRIVATE KEY-----\r\n> ", "tokens": b"-ghs_eyJhbGci.",
        "jwk": b'"kty":"EC","d":"', "putty": b"PuTTY-User-Key-File-3 Private-Lines: 9 ", "urls": b"http://4111111111111111/",
    }  # fmt: skip
    worst = {name: times(piece) for name, piece in pieces.items()}
    yield Parser("proto.secrets.secrets", lambda data: secrets(data.decode("latin-1")), worst, "256 kB of text")
    yield Parser("_speedups.text.base64", text.base64, _ENCODED, "-")
    yield Parser("_speedups.text.quoted_printable", text.quoted_printable, _ENCODED, "-")
    yield Parser("proto.mime_text.in_header", _search, _SHOWN, "1 MB of a header")
    yield Parser("proto.imap_uids (sets)", _set, _UID_SETS, "64 kB a command")
    yield Parser("proto.imap_resync", _resync, _UID_SETS, "64 kB a command")
    records = {"records": times(bytes(24))}
    yield Parser("proto.imap_view.advance", _advance, records, "the mailbox; some 200 kB of a reply at once")
    yield Parser("proto.imap_text.EnvelopeText", _in_envelope, _ENVELOPES)
    yield Parser("proto.imap_program (texts)", _searched, _SEARCH_TEXTS, "a message; 64 kB a command, 500 keys")
    yield Parser("proto.imap_found", _found, records, "the mailbox")
    alias = {
        "names": times(b"a\n"), "in one line": times(b"a,"), "quotes": times(b'"'), "quoted commas": times(b'",'),
        "escaped quotes": times(b'\\"', b'"'), "backslashes": times(b"\\"), "folds": times(b" a\n"),
        "blank folds": times(b" ,\n"), "comments": times(b"#\n"), "a long name": times(b"a"), "wrong": times(b"<\n"),
        "comments of addresses": times(b"(" * 500 + b"@x,"), "addresses": times(b"U@Relay.example\n"),
        "includes": times(b":include:/a//./a\n"), "a long path": times(b"/.", b":include:"),
    }  # fmt: skip
    yield Parser("accept.alias_text", _aliases, alias, "1 MiB of an included file, 4 MiB of all; the operator's own file")
    yield Parser("store.mbox.read", _mbox, _MBOXES, "64 MB of a message; the operator's own files")


def _aliases(data: bytes) -> int:
    domains = frozenset(["relay.example"])
    lines = alias_text.lines("/etc/aliases", data.decode())
    return sum(1 for _, line in lines for _ in (alias_text.divided(line), *alias_text.targets(line, domains)))


PARSERS = list(_parsers())
