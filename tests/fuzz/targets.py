"""What is fuzzed: each target takes any octets and raises when a kernel, compiled or interpreted, disagrees with its oracle, when
the result depends on how the input was cut, or when anything but a protocol error escapes.

An input is: one octet of options, one for the number of cuts, the cuts (two octets each), and what arrives on the wire.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any
from unicodedata import normalize

from relaymta._speedups.mime import Part, scan
from relaymta.accept.transaction import FIELDS
from relaymta.auth.identity import Identity
from relaymta.filter.judgement import FilterFailure
from relaymta.filter.rspamd import edits_of, object_of
from relaymta.filter.signatures import arc, claims, verify
from relaymta.proto import hook, mailbox, mime_text, reply
from relaymta.proto import policy as policy_replies
from relaymta.proto.attachments import Limits as AttachmentLimits
from relaymta.proto.attachments import parts as attachments_of
from relaymta.proto.authres import without_forged
from relaymta.proto.clamd import LONGEST as LONGEST_OF_CLAMD
from relaymta.proto.clamd import SHOWN, ClamdError, Replies
from relaymta.proto.edits import edited
from relaymta.proto.header import header_end
from relaymta.proto.imap_text import FIELDS as FIELDS_OF_ENVELOPE
from relaymta.proto.imap_text import EnvelopeText
from relaymta.proto.milter import Conversation, smtp_reply
from relaymta.proto.mime import VERSION, Section, body_of, describe, section
from relaymta.proto.mime_text import charset_of, comparable, header_text, in_text, is_text, part_text, text_parts
from relaymta.proto.proxy import LONGEST, BadHeader, parse
from relaymta.proto.sasl import MECHANISMS, Claim, Keys, Malformed, Password, Proof, begin
from relaymta.proto.session import COMMANDS, DATA
from relaymta.proto.sieve import EXTENSIONS, SieveError
from relaymta.proto.sieve import compile as compile_sieve
from relaymta.proto.sieve_message import Message as SieveMessage
from relaymta.proto.sieve_outcome import Answered
from relaymta.proto.sieve_replies import vacation_reply
from relaymta.proto.sieve_run import run as run_sieve
from relaymta.proto.smtp_server import Host, Limits, Offers, ServerSession
from relaymta.proto.spamc import SpamdError, judged
from tests.accept.test_transactions import connected, idle
from tests.fuzz import forms, messages, sendmail
from tests.proto.test_managesieve import Caller as ManageSieveCaller
from tests.speedups import (
    imap_oracle,
    mime_oracle,
    oracle,
    structure_oracle,
    test_imap,
    test_mime,
    test_replies,
    test_search,
    test_smtp,
    test_structure,
    test_text,
)
from tests.speedups.test_smtp import BARE_CR, BARE_LF, NUL
from tests.support import imap as imap_caller
from tests.support import mime_grammar
from tests.support.connection import BIG, DISK_FAILS, Machine
from tests.support.imap_grammar import responses
from tests.support.pop3 import caller

OFFERS = Offers(mechanisms=("PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2"), clear=True)
FILTERED_HEADER = b"From: a@b\r\nX-Spam: 1\r\nSubject: x\r\n y\r\nx-spam: 2\r\n\r\n"
KEYS = Keys(b"salt", b"x" * 32, b"y" * 32, 4096)
KEY = "v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="  # RFC 8463 A.2
OURS = re.compile(rb"(?:X-Signed: \d+\r\n)?Received: from [^\n]*\n(?:[ \t][^\n]*\n)*")  # the fields in front of a message
PARSERS = [parameter.values[0] for parameter in test_smtp.PARSERS]
MIME = [parameter.values[0] for parameter in test_mime.KERNELS]
TEXTS = [parameter.values[0] for parameter in test_text.KERNELS]
STRUCTURES = [parameter.values[0] for parameter in test_structure.KERNELS]
REPLIES = [parameter.values[0] for parameter in test_replies.PARSERS]
SEARCHES = [parameter.values[0] for parameter in test_search.KERNELS]
IMAP = [parameter.values[0] for parameter in test_imap.PARSERS]
SIEVE_REQUIRE = b"require [%b];\n" % b",".join(b'"%b"' % one.encode() for one in EXTENSIONS)
SIEVE_MESSAGE = (
    b"From: ann@a.example\r\nTo: bob@b.example\r\nSubject: =?utf-8?q?=C3=A4?= b\r\nDate: 1 Jan 2026 0:00 -0100\r\n\r\ntext\r\n"
)


def taken_apart(data: bytes) -> tuple[int, list[int], bytes]:
    """Options, cuts and wire of an input."""
    options, count = data[0], data[1] % 8
    cuts = [int.from_bytes(data[2 + 2 * i : 4 + 2 * i], "big") for i in range(count)]
    return options, cuts, data[2 + 2 * count :]


def smtp(data: bytes) -> None:
    """The server parser: message data, normalized message data, commands or a chunk."""
    options, cuts, wire = taken_apart(data)
    for parser in PARSERS:
        (_data, _normalized, _commands, _chunk)[options % 4](parser, cuts, wire)


def _data(parser: type, cuts: list[int], wire: bytes) -> None:
    found = test_smtp.data_run(parser, wire, cuts)
    assert found == test_smtp.data_run(parser, wire, [])
    message, ended, size, flags, waiting = found
    expected = oracle.unstuff(wire)
    assert size == len(message) and ended == (expected is not None)
    if expected is not None:
        assert (message, waiting) == (expected[0], len(expected[1]))
        assert (bool(flags & BARE_LF), bool(flags & BARE_CR)) == oracle.bare(message)
        assert bool(flags & NUL) == (b"\0" in message)


def _normalized(parser: type, cuts: list[int], wire: bytes) -> None:
    found = test_smtp.data_run(parser, wire, cuts, normalize=True)
    assert found == test_smtp.data_run(parser, wire, [], normalize=True)
    expected = oracle.unstuff(wire)
    assert found[1] == (expected is not None)
    if expected is not None:
        assert found[0] == oracle.normalize(expected[0])


def _commands(parser: type, cuts: list[int], wire: bytes) -> None:
    events = test_smtp.command_run(parser, wire, cuts)
    assert events == test_smtp.command_run(parser, wire, [])
    assert len(events) == len(oracle.commands_of(wire, 40))


def _chunk(parser: type, cuts: list[int], wire: bytes) -> None:
    octets = len(wire) // 2
    one = parser(512, 998, False)
    one.chunk(octets, True)
    message = b"".join(event[1] for piece in test_smtp.pieces(wire, cuts) for event in one.feed(piece) if len(event) > 1)
    assert message == wire[:octets]
    assert one.waiting() == len(wire) - octets


def replies(data: bytes) -> None:
    """The reply parser."""
    _, cuts, wire = taken_apart(data)
    wire = wire[:3000]  # below the limits of a line and of lines, which the oracle does not have
    for parser in REPLIES:
        one = parser(4096, 3000)
        found = [reply for piece in test_smtp.pieces(wire, cuts) for reply in one.feed(piece)]
        assert (found, one.end()) == test_replies.oracle(wire)


def session(data: bytes) -> None:
    """A whole server session, in which clients may log in: the same replies for every split, and every accepted message within
    the limits. (Nothing may be pipelined behind DATA, which depends on the split: there it is always cut.)"""
    options, cuts, wire = taken_apart(data)
    behind_data = [match.end() for match in re.finditer(rb"(?i)data[ \t]*\r?\n", wire)]
    limits = Limits(message_size=2000, recipients=5, errors=6, normalize=bool(options & 1), long_lines=bool(options & 2))
    lmtp = bool(options & 4)
    assert _session_run(limits, wire, [*cuts, *behind_data], lmtp) == _session_run(limits, wire, behind_data, lmtp)


def _session_run(
    limits: Limits, wire: bytes, cuts: list[int], lmtp: bool = False
) -> tuple[bytes, list[tuple[str, list[str], bytes]]]:
    one = ServerSession("relay.example", Host(limits, replace(OFFERS, lmtp=lmtp)))
    one.greet()
    out, mails = [], []
    for piece in test_smtp.pieces(wire, cuts):
        out.append(one.receive(piece))
        while one.complete is not None or one.claim is not None or one.behind:
            if one.behind:
                out.append(one.receive(b""))
                continue
            if one.claim is not None:
                good = one.claim == Password("user", "pencil")
                one.host.user = "user" if good else ""
                out.append(one.checked(reply.LOGGED_IN if good else reply.WRONG_CREDENTIALS))
                continue
            mail = one.complete
            assert mail is not None
            message = b"".join(mail.take())
            assert len(message) <= limits.message_size and 0 < len(mail.recipients) <= limits.recipients
            assert oracle.bare(message) == (False, False) and b"\0" not in message
            mails.append((mail.sender, mail.recipients, message))
            out.append(one.finish([b"250 2.1.5 filed\r\n"] * len(mail.recipients) if lmtp else b"250 2.0.0 taken\r\n"))
        if one.closing:
            break
    said = b"".join(out)
    assert said == b"" or said.endswith(b"\r\n")
    return said, mails


def pop3(data: bytes) -> None:
    """A POP3 session: the same replies and deletions for every split, however long the caller takes. (Without STLS, behind which
    nothing may be pipelined.)"""
    options, cuts, wire = taken_apart(data)
    found = _pop3_run(options, wire, cuts, bool(options & 1))
    assert found == _pop3_run(options, wire, [], False)
    said, left, seen = found
    assert said == b"" or said.endswith(b"\r\n")
    assert len(left) == 3 or re.search(rb"(?i)quit", wire)
    assert not seen or re.search(rb"(?i)retr", wire)


def _pop3_run(options: int, wire: bytes, cuts: list[int], slow: bool) -> tuple[bytes, list[int], set[int]]:
    one = caller(b"A: b\r\n\r\n.\r\nc\r\n", b".", b"", login=bool(options & 2), piece=1 if options & 4 else 65536)
    one.mailbox.stuck = {20} if options & 8 else set()
    out = []
    for piece in test_smtp.pieces(wire, cuts):
        out.append(one.session.receive(piece))
        if not slow:
            out.append(one.run())
    out.append(one.run())
    one.drop()
    assert one.session.deletions == () and one.mailbox.session is None
    return b"".join(out), list(one.mailbox.messages), one.mailbox.seen


def imap(data: bytes) -> None:
    """An IMAP session: the parser agrees with its oracle; the same responses, commands and messages for every split, however long
    the caller takes; and all that is said passes the grammar. (Without STARTTLS, behind which nothing may be pipelined.)"""
    options, cuts, wire = taken_apart(data)
    if options & 1:
        for parser in IMAP:
            assert test_imap.run(parser, wire, cuts) == imap_oracle.events(wire, test_imap.LIMIT)
        return
    found = _imap_run(options, wire, cuts, bool(options & 2))
    assert found == _imap_run(options, wire, [], False)
    assert found[0] == b"" or found[0].endswith(b"\r\n")
    assert len(found[2]) == sum(command.arguments.count for command in found[1] if command.name == "APPEND")


def _imap_run(options: int, wire: bytes, cuts: list[int], slow: bool) -> tuple[bytes, list, list]:
    one = imap_caller.caller(login=bool(options & 4), selected=bool(options & 4), append_limit=200)
    if options & 8:
        one.feed(b"e ENABLE IMAP4rev2 UTF8=ACCEPT QRESYNC\r\n")
    out = []
    for piece in test_smtp.pieces(wire, cuts):
        out.append(one.session.receive(piece))
        if not slow:
            out.append(one.run())
    out.append(one.run())
    assert one.session.waiting() <= len(wire)
    said = b"".join(out)
    responses(said, utf8=True)
    return said, one.commands, one.messages


def connection(data: bytes) -> None:
    """A whole connection: what is stored depends neither on the limit of memory, above which message data goes to a file, nor
    (without DATA, behind which nothing may be pipelined) on how the octets were cut; and nothing is left when it ends."""
    options, cuts, wire = taken_apart(data)
    whole = _connection_run(options, wire, cuts, BIG)
    if DISK_FAILS in wire or options & 12:  # the digests of a signer or verifier begin with the whole header
        return
    others = [_connection_run(options, wire, cuts, FIELDS + 1000)]
    if not re.search(rb"(?i)data|starttls", wire):
        others.append(_connection_run(options, wire, [], BIG))
    for other in others:
        long = any(header_end(message) > 900 for _, _, message in whole[1] + other[1]) or reply.HEADER_TOO_LONG in other[0]
        assert whole == other or long  # what goes to a file must have its whole header in its first piece


def _connection_run(options: int, wire: bytes, cuts: list[int], big: int) -> tuple[bytes, list[tuple[str, list[str], bytes]]]:
    relay = {"domains": ["d.example"], "networks": ["127.0.0.0/8"] if options & 1 else []}
    known = {"networks": ["127.0.0.1/32"], "xclient": True, "xforward": True, "normalize": bool(options & 2)}
    rules = {"relay": relay, "network": [known], "accounts": {"answer_after": 0}, "limits": {"message_size": 4 * BIG}}
    machine = Machine(Random(options), bool(options & 4), bool(options & 8), big, **rules)
    machine.logs_in = Identity("ann", connections=1, quotas={"octets": "20000/d"}) if options & 16 else None
    made = connected(machine)
    first = made.transport
    for piece in test_smtp.pieces(wire, cuts):
        if made.transport is None or made.transport.is_closing():
            break
        made.data_received(piece)
        if not options & 32:
            idle(made)
    idle(made)
    said = first.said + (made.transport.said if made.transport not in (None, first) else b"")  # type: ignore[union-attr]
    if options & 64:
        assert made.transport is None or (made.session is not None and made.session.state in (COMMANDS, DATA))
    if made.transport is not None:
        made.connection_lost(None)
    idle(made)
    assert not machine.held() and all(file.kept != file.discarded for file in machine.written)
    found = [(envelope.sender, envelope.recipients, OURS.sub(b"", whole)) for envelope, whole in machine.stored]
    assert said.count(b" queued as ") <= len(found)
    for _, recipients, message in found:
        assert len(recipients) > 0 and len(message) <= 4 * BIG + 2
        assert oracle.bare(message) == (False, False) and b"\0" not in message
    return re.sub(rb"queued as \w+", b"queued", said), found


def sasl(data: bytes) -> None:
    """The mechanisms of AUTH: the first octet chooses one, the lines behind it are the client's responses."""
    exchange, _ = begin(sorted(MECHANISMS)[data[0] % len(MECHANISMS)], lambda user: KEYS)
    try:
        for response in data[1:].split(b"\n"):
            assert isinstance(exchange.send(response), bytes)
    except StopIteration as done:
        assert isinstance(done.value, Claim) and "\0" not in done.value.user
        assert not (isinstance(done.value, Proof) and done.value.good)
    except Malformed as error:
        assert str(error)


def header(data: bytes) -> None:
    """An untrusted header: its signatures, its authors, and forged results."""
    block = data.replace(b"\n", b"\r\n")
    said = claims(block)
    bodies = dict.fromkeys(said.forms(), ("47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=", 0))
    keys = dict.fromkeys(("s._domainkey.d", "._domainkey.", "s._domainkey.d.test"), KEY)
    assert all(one.result != "pass" for one in verify(said, bodies, keys, 1_795_000_000))
    assert arc(said, bodies, keys) in ("none", "fail")
    assert b"relay.example" not in without_forged(block, "relay.example").lower() or b"relay.example" in block.lower()
    try:
        assert said.malformed or all("@" in str(one) or not one.domain for one in mailbox.authors(block, (b"from", b"sender")))
    except mailbox.Malformed as error:
        assert str(error)


def proxy(data: bytes) -> None:
    """A load balancer's header: the same in every split."""
    try:
        found = parse(data)
    except BadHeader as error:
        assert str(error)
        return
    if found is None:
        assert len(data) < LONGEST
        return
    assert parse(data[: found.length]) == found and all(parse(data[:end]) is None for end in range(found.length))


def mime(data: bytes) -> None:
    """Message data: what the kernels find is what their oracles find, and all replies about it are what the grammar allows."""
    for kernel in MIME:
        assert test_mime.found(kernel, data) == mime_oracle.parts(data)
    assert STRUCTURES[0].describe(data) == STRUCTURES[1].describe(data) == structure_oracle.describe(data)
    found = describe(data)
    mime_grammar.envelope(found.envelope)
    mime_grammar.body(found.structure)
    mime_grammar.body(body_of(found.structure), extended=False)
    for wanted in map(Section.parse, (b"", b"1", b"1.MIME", b"2.HEADER", b"1.2.TEXT", b"HEADER.FIELDS (Subject)")):
        slices = section(data, found.parts, wanted)
        assert slices is None or wanted.names or b"".join(slices) in data
    for kernel in TEXTS:
        assert kernel.base64(data) == mime_oracle.base64(data)
        assert kernel.quoted_printable(data) == mime_oracle.quoted_printable(data)
        assert kernel.folded(data, True) == mime_oracle.folded(data, True)
    header_text(data)
    list(text_parts(data))


def managesieve(data: bytes) -> None:
    """A ManageSieve session: the same replies and scripts for every split. (Without STARTTLS, behind which nothing may be
    pipelined.)"""
    options, cuts, wire = taken_apart(data)
    found = _managesieve_run(options, wire, cuts)
    assert found == _managesieve_run(options, wire, [])
    assert found[0] == b"" or found[0].endswith(b"\r\n")


def _managesieve_run(options: int, wire: bytes, cuts: list[int]) -> tuple[bytes, dict[str, bytes], str, bool, int]:
    one = ManageSieveCaller(login=bool(options & 1))
    said = b"".join([one.feed(piece) for piece in test_smtp.pieces(wire, cuts)])
    return said, one.scripts, one.active, one.session.closing, one.session.errors


def sieve(data: bytes) -> None:
    """A Sieve script, with all extensions required or none: an error that says where, or a script that runs over a message, which
    is what is behind an octet 255 or a fixed one."""
    text, _, message = data[1:].partition(b"\xff")
    if data[:1] > b"\x7f":
        text = SIEVE_REQUIRE + text
    try:
        script = compile_sieve(text)
    except SieveError as error:
        lines = text.split(b"\n")
        assert 1 <= error.line <= len(lines) and 1 <= error.column <= len(lines[error.line - 1]) + 1 and error.what
        return
    made = run_sieve(script, SieveMessage(message or SIEVE_MESSAGE), sender="ann@a.example", recipient="bob+x@b.example")
    assert made.actions and bool(made.error) == bool(made.line)
    for action in made.actions:
        if isinstance(action, Answered):
            reply_header = vacation_reply(action, hostname="b.example", ident="x", seconds=1).partition(b"\r\n\r\n")[0]
            assert reply_header.count(b"\r\n") == reply_header.count(b"\n") == reply_header.count(b"\r")
            assert not re.search(rb"(?im)^bcc:", reply_header)


def search(data: bytes) -> None:
    """SEARCH: an octet of options, what is sought up to a line end, and a message behind it. What the kernels tell of its rows
    and data is what the code that they ask decides; a part is searched in pieces as it is at once; of rows that are none both
    kernels say the same."""
    octets, _, message = data[1:].partition(b"\n")
    sought = comparable(octets.decode("utf-8", "replace"))
    if not sought:
        return
    row, envelope = test_search.row_of(message), EnvelopeText(describe(message).envelope, str)
    there = comparable("".join(text_parts(message)))[data[0] :][: 1 + data[0] % 9]
    prefix = (test_search.PREFIX, b"", b"X: =?utf-8?q?=41?=\r\n", b"no end")[data[0] & 3]
    for kernels in SEARCHES:
        test_search.agree(kernels, message, sought, prefix)
        for some in filter(None, (there, normalize("NFD", there)[: 1 + data[0] % 3])):  # a letter without its mark
            test_search.agree(kernels, message, some, prefix)
        finder = test_search.needle(kernels, sought)
        for name, place in FIELDS_OF_ENVELOPE.items():
            yes, ask = kernels[2].envelopes(finder, [(b"", row)], b"\1", place, VERSION)
            assert ask == b"\1" or yes == bytes([envelope.has(name, sought)])
    damaged = row[: data[0]] + message[: data[0] & 7] + row[data[0] :]
    for one, there in ((message, message), (row[: data[0]], message), (damaged, message), (row, message[: -1 - data[0] % 8])):
        assert _of_row(SEARCHES[0], one, there, sought) == _of_row(SEARCHES[1], one, there, sought)
    _search_in_pieces(message, sought, 16 + data[0] % 64)


def _of_row(kernels: Any, row: bytes, message: bytes, sought: str) -> list[Any]:
    finder, found = test_search.needle(kernels, sought), list[Any]()
    for say in (
        lambda: kernels[0].objects([row]),
        lambda: kernels[0].bodies([row]),
        lambda: kernels[0].undescribed([row], VERSION),
        lambda: kernels[2].envelopes(finder, [(row, row)], b"\1", 1, VERSION),
        lambda: finder.texts([(row, row, message)], b"\1", True, VERSION),
    ):
        try:
            found.append(say())
        except ValueError as error:
            found.append(str(error))
    return found


def _search_in_pieces(message: bytes, sought: str, size: int) -> None:
    """Parts whose charset has no state, and where not so many combining characters follow each other that they are divided."""
    for part in scan(message):
        charset = charset_of(message, part)
        if not is_text(message, part) or not mime_text._has_ascii(charset):
            continue
        text = part_text(message, part)
        if mime_text._marked().search(text) or text != _as_utf_8(message, part, charset):
            continue
        kept = mime_text.WHOLE, mime_text.PIECE
        mime_text.WHOLE, mime_text.PIECE = 0, size  # type: ignore[misc]
        try:
            shown = comparable(text)
            assert in_text(message, part, sought) == (sought in shown)
            assert not shown or in_text(message, part, shown)
        finally:
            mime_text.WHOLE, mime_text.PIECE = kept  # type: ignore[misc]


def _as_utf_8(message: bytes, part: Part, charset: bytes) -> str:
    """The text of a part, in UTF-8 where its charset is ASCII: such a text is ISO-8859-1 in pieces from the first octet on that
    is not UTF-8."""
    if mime_text._codec(charset[:40].decode("latin-1")) != "ascii":
        return part_text(message, part)
    return mime_text._UNDO[part.encoding](message[part.body : part.end]).decode("utf-8", "replace")


def clamd(data: bytes) -> None:
    """Replies of clamd: the same for every split, to commands that were sent, each once."""
    options, cuts, wire = taken_apart(data)
    found, broken = _clamd_run(options % 8, test_smtp.pieces(wire, cuts))
    assert (found, broken) == _clamd_run(options % 8, [wire]) == _clamd_run(options % 8, [bytes([octet]) for octet in wire])
    assert len(found) == len({one.number for one in found}) == sum(0 < one.number <= options % 8 for one in found)
    assert all(len(one.text) <= SHOWN and one.text.isprintable() for one in found)
    assert broken or len(found) == wire.count(0)


def _clamd_run(asked: int, parts: list[bytes]) -> tuple[list[Any], bool]:
    one, found = Replies(), list[Any]()
    for _ in range(asked):
        one.asked()
    try:
        for part in parts:
            found.extend(one.feed(part))
            assert len(one._rest) <= LONGEST_OF_CLAMD
    except ClamdError as error:
        assert str(error).isprintable()
        return found, True
    return found, False


def milter(data: bytes) -> None:
    """Answers of a milter to all of a session with one message: the same for every split; what it wants changed makes no other
    header, and what it says is a reply."""
    options, cuts, wire = taken_apart(data)
    found = _milter_run(options, test_smtp.pieces(wire, cuts))
    assert found == _milter_run(options, [wire]) == _milter_run(options, [bytes([octet]) for octet in wire])
    above, header, _ = edited(FILTERED_HEADER, found[1].edits)
    assert header_end(header) == len(header) and b"\0" not in above + header
    for _, answer in [smtp_reply(wire), *((one.word, one.reply) for one in found[0] if getattr(one, "reply", b""))]:
        lines = answer.split(b"\r\n")
        assert lines.pop() == b"" and all(re.fullmatch(rb"[45]\d\d[ -][45]\.[\d.]+ [!-~][ -~]*", line) for line in lines), answer
        assert max(map(len, lines)) <= 510 and len(lines) <= 20


def _milter_run(options: int, parts: list[bytes]) -> tuple[Any, ...]:
    one, told = Conversation(), {"i": "ID"}
    one.negotiate()
    events = list[Any]()
    if not options & 1:
        one.feed(b"\0\0\0\x0dO\0\0\0\6\0\0\1\xff\0\x10" + bytes([options & 0x84]) + b"\0")
        one.connect("x", "192.0.2.1", 0, told)
        one.mail("a@b", (), told)
        one.rcpt("c@d", (), told)
        one.header(b"A: b\r\n\r\n", told)
        one.end(told)
    for part in parts:
        events += one.feed(part)
        assert len(one._buffer) <= len(b"".join(parts))
    return events, one.changes, one.last, one.spent, list(one.due), one.error is None, one.terms


def policy(data: bytes) -> None:
    """Replies of a policy service: the same for every split; what it says makes one line of a reply, and one field."""
    _, cuts, wire = taken_apart(data)
    found = _policy_run(test_smtp.pieces(wire, cuts))
    assert found == _policy_run([wire]) == _policy_run([bytes([octet]) for octet in wire])
    for action in found[0]:
        assert action.word.isprintable() and action.text.isprintable()
        if action.word in ("REJECT", "5xx", "DEFER", "DEFER_IF_PERMIT", "DEFER_IF_REJECT", "4xx"):
            answer = policy_replies.refusal(action, action.text)
            assert re.fullmatch(rb"([45])\d\d \1\.[\d.]+ [!-~][ -~]*\r\n", answer) and len(answer) <= 512, answer
        if (field := policy_replies.field(action.text)) is not None:
            above, header, _ = edited(FILTERED_HEADER, [field])
            assert header == FILTERED_HEADER and header_end(above + header) == len(above + header)
        if (address := policy_replies.recipient(action.text)) is not None:
            assert address.isprintable() and "@" in address and not set(address) & set("<>\\")


def _policy_run(parts: list[bytes]) -> tuple[list[policy_replies.Action], str]:
    one, found = policy_replies.Replies(), list[policy_replies.Action]()
    for part in parts:
        found += one.feed(part)
    assert one.error is None or str(one.error).isprintable()
    return found, str(one.error or "")


def spamd(data: bytes) -> None:
    """Answers of spamd, rspamd and HTTP hooks: a verdict or a failure; what they want changed makes no other header."""
    options, _, wire = taken_apart(data)
    with contextlib.suppress(SpamdError):
        found = judged(wire)
        assert all(rule.isprintable() for rule in found.rules)
    with contextlib.suppress(FilterFailure):
        wanted = edits_of(object_of(wire), FILTERED_HEADER, "rewrite subject" if options & 1 else "")
        assert len(wanted) <= 200
        header = edited(FILTERED_HEADER, wanted).header
        assert (b"\r\n" + header).endswith(b"\r\n\r\n") and header_end(header) == len(header)
    for answer in (wire, b'{"verdict":"accept","changes":[{"do":"add","name":"X","value":"' + wire + b'"}]}'):
        with contextlib.suppress(hook.HookError):
            changes = hook.wanted(hook.said(answer), FILTERED_HEADER)
            above, header, _ = edited(FILTERED_HEADER, changes.edits)
            assert (b"\r\n" + header).endswith(b"\r\n\r\n") and header_end(header) == len(header) and not above
            assert all(address.isascii() and address.isprintable() for address in (*changes.added, *changes.removed))


def attachments(data: bytes) -> None:
    """The parts of a message for rules: nothing is an error, limits hold; within another message it has the same names."""
    header, line, body = data[2:].partition(b"\r\n\r\n")
    limits = AttachmentLimits(depth=3 + data[0] % 8, parts=5 + data[1], archived=10)
    found = attachments_of(header + line, body, limits)
    assert 1 <= len(found.parts) <= limits.parts
    for one in found.parts:
        assert one.depth <= limits.depth + 1 and len(one.first) <= 16 and one.first == one.octets[: len(one.first)]
        assert all(one.names) and all(one.archived) and one.kinds <= {"program", "archive", "document", "image"}
        assert isinstance(one.unlisted, bool)
    assert all(isinstance(text, str) for text in found.texts(1000))
    bare = data[2:].replace(b"\r\n", b"")
    if found.excessive or not line or header[:2] == b"\r\n" or b"\r" in bare or b"\n" in bare:
        return
    again = attachments_of(b"Content-Type: message/rfc822\r\n\r\n", data[2:], AttachmentLimits(50, 5000))
    names = {name for one in found.parts if one.depth for name in one.names}
    assert again.excessive or names <= {name for one in again.parts for name in one.names}


def http(data: bytes) -> None:
    """Requests to the HTTP API and the page: an answer with a status that is expected, and no defect in the log."""
    from tests.fuzz.http import said  # which starts a server

    said(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "smtp": smtp,
    "replies": replies,
    "session": session,
    "pop3": pop3,
    "imap": imap,
    "connection": connection,
    "sasl": sasl,
    "header": header,
    "proxy": proxy,
    "mime": mime,
    "search": search,
    "sieve": sieve,
    "managesieve": managesieve,
    "clamd": clamd,
    "spamd": spamd,
    "milter": milter,
    "policy": policy,
    "attachments": attachments,
    "http": http,
    "message": messages.message,
    "template": messages.template,
    "form": forms.form,
    "sendmail": sendmail.sendmail,
}
