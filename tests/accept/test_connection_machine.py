"""Clients that do anything in any order, against a model: what is stored is what was sent in that transaction, nothing else, and
every count is that of what there is, and returns to zero."""

import asyncio
import base64
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from relaymta.accept.connection import Connection
from relaymta.auth.identity import Identity
from relaymta.proto.header import header_end
from relaymta.proto.session import Question
from tests.accept.test_transactions import connected, idle
from tests.conftest import PROVE
from tests.support.asking import Filters, asking
from tests.support.connection import BIG, COMMIT_FAILS, DISK_FAILS, FILTER_FAILS, FILTERED, REFUSED, WRONG, Machine, Transport

SPOILED = (
    b"",
    b"",
    b"",
    b"",
    DISK_FAILS,
    COMMIT_FAILS,
    REFUSED + b": x",
    FILTERED + b": x",
    FILTER_FAILS + b": x",
    b"x\ny",
    b"x" * 1100,
    b"\0",
    b"Received: x\r\n" * 60,
)
WAYS = ("", "signs", "looks", "filters", "signs, filters", "looks, filters", "asks", "looks, asks", "signs, filters, asks")
# What filters say to MAIL and RCPT, sooner or later.
ANSWERS: tuple[bytes | BaseException | None, ...] = (
    None, None, None, None, None, None, b"554 5.7.1 Refused\r\n", b"451 4.7.1 Not now\r\n", b"421 4.7.0 Closing\r\n",
    ValueError("a defect"), asyncio.CancelledError(),
)  # fmt: skip
BELOW = b"X-Below: ours\r\n"  # what filters add to the header
SIZES = (10, 300, BIG, 4 * BIG)
DOMAINS = ("d.example", "d.example", "far.example")
ADDRESSES = ("192.0.2.7", "198.51.100.7", "127.0.0.1", "[UNAVAILABLE]")
ANN = Identity("ann", connections=2)


@dataclass
class Mail:
    """A transaction as its client knows it."""

    number: int
    client: str
    user: str
    recipients: list[str] = field(default_factory=list)
    data: bytes = b""


@dataclass
class Known:
    """A client: what it has been told, and what it sends next. `wire`: commands, each with what is done with its reply's code
    (None: there was none)."""

    made: Connection
    transports: list[Transport]
    address: str = "127.0.0.1"
    user: str = ""
    greeted: bool = False
    secure: bool = False
    mail: Mail | None = None
    wire: list[tuple[bytes, Callable[[int | None], None]]] = field(default_factory=list)
    synchronizes: bool = False  # the last command's reply has to be waited for
    codes: Iterator[int] = field(default_factory=lambda: iter(()))  # of the replies to what was sent, from the next on

    @property
    def alive(self) -> bool:
        return not self.made.gone

    def said(self) -> bytes:
        if isinstance(self.made.transport, Transport) and self.made.transport is not self.transports[-1]:
            self.transports.append(self.made.transport)
        return b"".join(transport.said for transport in self.transports)


class Undecided(Filters):
    """Filters that answer anything, at any time."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random = random
        self.now = 0

    async def ask(self, question: Question) -> bytes | None:
        self.asked.append(question)
        self.now += 1
        try:
            for _ in range(self.random.choice((0, 0, 1, 5, 30))):
                await asyncio.sleep(0)
            answer = self.random.choice(ANSWERS)
            if isinstance(answer, BaseException):
                raise answer
        finally:
            self.now -= 1
        return answer


Word = tuple[object, ...]  # a method of Clients, and its arguments
_DATA = st.tuples(st.just("say_data"), st.sampled_from(SIZES), st.sampled_from(SPOILED))
_CHUNK = st.tuples(st.just("chunk"), st.sampled_from(SIZES), st.sampled_from(SPOILED), st.booleans())
_RCPT = st.tuples(st.just("rcpt"), st.sampled_from("xyz"), st.sampled_from(DOMAINS))
_SINGLE = st.one_of(
    st.tuples(st.just("greet"), st.sampled_from((b"EHLO", b"EHLO", b"HELO"))),
    st.just(("mail",)),
    _RCPT,
    _DATA,
    _CHUNK,
    st.tuples(st.just("say"), st.sampled_from((b"RSET", b"RSET", b"NOOP", b"QUIT", b"WRONG", b"VRFY", b"GET / HTTP/1.1"))),
    st.tuples(st.just("log_in"), st.sampled_from(("right", "right", WRONG))),
    st.tuples(st.just("xclient"), st.sampled_from(ADDRESSES), st.booleans()),
    st.tuples(st.just("starttls"), st.sampled_from((True, True, True, False))),
)
_BEGUN: list[Word] = [("greet", b"EHLO"), ("mail",), ("rcpt", "x", "d.example")]
_LAST: list[Word] = [("chunk", 10, b"", True)]
WORDS = st.one_of(
    st.builds(lambda word: [word], _SINGLE),
    st.builds(lambda rcpt, data: [*_BEGUN, rcpt, data], _RCPT, _DATA),
    st.builds(lambda chunks, last: [*_BEGUN, *chunks, *last], st.lists(_CHUNK, max_size=3), st.sampled_from(([], _LAST))),
)


class Clients(RuleBasedStateMachine):
    """Some clients of one worker. A number names each message."""

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Known] = []
        self.mails: dict[int, Mail] = {}
        self.acknowledged: set[int] = set()
        self.unknown: set[int] = set()  # sent as a whole, but the reply was lost
        self.of: Machine = None  # type: ignore[assignment]
        self.asking: Undecided | None = None
        self.stack = ExitStack()

    @precondition(lambda self: self.of is None)
    @rule(seed=st.integers(0, 1 << 32), way=st.sampled_from(WAYS), tarpit=st.sampled_from((0, 5)))
    def start(self, seed: int, way: str, tarpit: int) -> None:
        configured: dict[str, Any] = {
            "relay": {"domains": ["d.example"], "networks": ["127.0.0.0/8"] if "signs" in way else []},
            "network": [{"networks": ["127.0.0.1/32"], "xclient": True, "long_lines": False}],
            "intake": {"errors": 30, "tarpit": tarpit, "long_line_networks": []},
            "accounts": {"answer_after": 0},
            "limits": {"message_size": 10 * BIG, "recipient_rate": "60/h"},
        }
        self.random, self.relays, self.filters = Random(seed), "signs" in way, "filters" in way
        self.of = Machine(self.random, "signs" in way, "looks" in way, filters=self.filters, **configured)
        self.of.logs_in = ANN
        if "asks" in way:
            self.ask()

    def ask(self) -> None:
        self.asking = Undecided(self.random)
        self.stack.enter_context(asking(self.of, self.asking))

    started = precondition(lambda self: self.of is not None)

    @started
    @precondition(lambda self: sum(one.alive for one in self.known) < 3)
    @rule()
    def connect(self) -> None:
        made = connected(self.of)
        assert isinstance(made.transport, Transport)
        self.known.append(Known(made, [made.transport]))

    # What a client may say next

    def greet(self, one: Known, verb: bytes) -> None:

        def greeted(code: int | None) -> None:
            if code == 250:
                one.greeted, one.mail = True, None

        one.wire.append((verb + b" client.example\r\n", greeted))

    def mail(self, one: Known) -> None:
        number = len(self.mails) + 1
        self.mails[number] = Mail(number, "", "")

        def begun(code: int | None) -> None:
            if code == 250:
                one.mail = self.mails[number]
                one.mail.client, one.mail.user = one.address, one.user

        one.wire.append((b"MAIL FROM:<%d@s.example>\r\n" % number, begun))

    def rcpt(self, one: Known, to: str, domain: str) -> None:

        def accepted(code: int | None) -> None:
            if code == 250:
                assert one.mail is not None and (domain == "d.example" or one.mail.user or self.relays)
                one.mail.recipients.append(f"{to}@{domain}")

        one.wire.append((f"RCPT TO:<{to}@{domain}>\r\n".encode(), accepted))

    def say_data(self, one: Known, size: int, spoiled: bytes) -> None:
        """DATA alone; the message data follows once 354 is there."""

        def ready(code: int | None) -> None:
            one.synchronizes = False
            if code == 354:
                assert one.mail is not None
                mail = one.mail
                mail.data = self.message(mail, size, spoiled) + b"..dots\r\n.x\r\n"
                one.wire.append((re.sub(rb"(?m)^\.", b"..", mail.data) + b".\r\n", lambda code: self.ended(one, mail, code)))

        one.wire.append((b"DATA\r\n", ready))
        one.synchronizes = True

    def message(self, mail: Mail, size: int, spoiled: bytes) -> bytes:
        spoil = spoiled + b"\r\n" if spoiled else b""
        header = b"Subject: %d\r\n" % mail.number
        line = b"line of mail %d\r\n" % mail.number
        inside = spoiled.startswith((b"X-", b"Received"))
        return header + (spoil if inside else b"") + b"\r\n" + line * (size // len(line) + 1) + (b"" if inside else spoil)

    def chunk(self, one: Known, size: int, spoiled: bytes, last: bool) -> None:
        """What it contains is known when it is sent only: it is the next piece of the transaction of then."""
        number = max(self.mails, default=0)
        piece = self.message(Mail(number, "", ""), size, spoiled) if not last or size > 10 else b"the end"

        def taken(code: int | None) -> None:
            mail = one.mail
            if mail is not None and mail.recipients:
                mail.data += piece
                if last:
                    self.ended(one, mail, code)
                else:
                    assert code in (250, None)
            elif code is not None:
                assert code in (503, 554, 421)
                one.mail = None

        one.wire.append((b"BDAT %d%s\r\n" % (len(piece), b" LAST" if last else b"") + piece, taken))

    def ended(self, one: Known, mail: Mail, code: int | None) -> None:
        one.mail = None
        if code == 250:
            self.acknowledged.add(mail.number)
        elif code is None:
            self.unknown.add(mail.number)

    def say(self, one: Known, what: bytes) -> None:

        def done(code: int | None) -> None:
            if what == b"RSET" and code == 250:
                one.mail = None

        one.wire.append((what + b"\r\n", done))

    def log_in(self, one: Known, password: str) -> None:

        def checked(code: int | None) -> None:
            if code == 235:
                assert password == "right" and not one.user
                one.user = "ann"

        one.wire.append((b"AUTH PLAIN " + base64.b64encode(b"\0ann\0" + password.encode()) + b"\r\n", checked))

    def xclient(self, one: Known, address: str, login: bool) -> None:

        def assumed(code: int | None) -> None:
            if code == 220:
                assert one.mail is None
                one.address, one.user = address.replace("[UNAVAILABLE]", "0.0.0.0"), "bob" if login else ""

        one.wire.append((f"XCLIENT ADDR={address}{' LOGIN=bob' if login else ''}\r\n".encode(), assumed))

    def starttls(self, one: Known, works: bool) -> None:

        def secured(code: int | None) -> None:
            one.synchronizes = False
            if code == 220:
                one.secure, one.greeted, one.user, one.mail = True, False, "", None

        self.of.certificates.context = object() if works else None
        one.wire.append((b"STARTTLS\r\n", secured))
        one.synchronizes = True

    # How it is said

    @started
    @precondition(lambda self: any(one.alive for one in self.known))
    @rule(which=st.integers(0, 2), words=st.lists(WORDS, min_size=1, max_size=8), cuts=st.integers(0, 4), reads=st.booleans())
    def talk(self, which: int, words: list[list[Word]], cuts: int, reads: bool) -> None:
        """One client says these words, pipelined as far as it may be."""
        alive = [one for one in self.known if one.alive]
        one = alive[which % len(alive)]
        for name, *arguments in (word for several in words for word in several):
            getattr(self, name)(one, *arguments)
            if one.synchronizes:
                self.send(one, cuts, False, reads)
                if not one.alive:
                    return
        self.send(one, cuts, False, reads)

    @started
    @precondition(lambda self: any(one.alive for one in self.known))
    @rule(which=st.integers(0, 2), words=st.lists(WORDS, min_size=1, max_size=4), cuts=st.integers(0, 4))
    def talk_and_vanish(self, which: int, words: list[list[Word]], cuts: int) -> None:
        """The connection is lost while that is sent."""
        alive = [one for one in self.known if one.alive]
        one = alive[which % len(alive)]
        for name, *arguments in (word for several in words for word in several):
            if one.synchronizes:
                self.send(one, cuts, False, True)
                if not one.alive:
                    return
            getattr(self, name)(one, *arguments)
        self.send(one, cuts, True, True)

    def send(self, one: Known, cuts: int, lost: bool, reads: bool) -> None:
        """All that one client has to say, in pieces; `lost`: the connection ends somewhere in it."""
        before, random, wire = len(one.said()), self.random, one.wire
        one.wire = []
        octets = b"".join(command for command, _ in wire)
        if lost:
            octets = octets[: random.randrange(len(octets) + 1)]
        edges = sorted({0, len(octets), *(random.randrange(len(octets) + 1) for _ in range(cuts))})
        for start, end in pairwise(edges):
            transport = one.made.transport
            if not isinstance(transport, Transport) or transport.closing:
                break
            transport.reads = reads
            one.made.data_received(octets[start:end])
            for _ in range(random.randrange(6)):
                self.of.steps.step()
        if lost and one.made.transport is not None:
            one.made.connection_lost(None) if random.random() < 0.5 else one.made.transport.abort()
        idle(one.made)
        one.codes = iter([int(line[:3]) for line in one.said()[before:].split(b"\r\n") if line[3:4] == b" "])
        for _, reply_to in wire:
            code = next(one.codes, None)
            assert code is not None or not one.alive  # each command has its reply
            reply_to(code)
        assert (next(one.codes, None) is None) if one.alive else one.made.transport is None
        if not one.alive:
            one.user, one.mail, one.wire, one.synchronizes = "", None, [], False

    @started
    @rule(which=st.integers(0, 2), seconds=st.sampled_from((1, 100, 1000)))
    def time_passes(self, which: int, seconds: int) -> None:
        self.of.steps.now += seconds
        self.of.time = self.of.steps.now
        for one in self.known:
            one.made.check(self.of.steps.now)
            idle(one.made)
            if not one.alive:
                one.user, one.mail, one.wire, one.synchronizes = "", None, [], False

    # What holds

    @invariant()
    def what_is_stored_was_sent_and_counts_are_those_of_what_there_is(self) -> None:
        if self.of is None:
            return
        seen = set()
        for envelope, data in self.of.stored:
            number = int(envelope.sender.partition("@")[0])
            mail = self.mails[number]
            assert number not in seen and number in self.acknowledged | self.unknown
            seen.add(number)
            assert envelope.recipients == list(dict.fromkeys(mail.recipients)) and envelope.size == len(data)
            assert (envelope.user, envelope.client) == (mail.user, mail.client)
            sent = mail.data if mail.data.endswith(b"\r\n") else mail.data + b"\r\n"
            front = data.removesuffix(sent)
            assert front != data and b"line of mail" not in front and front.count(b"Received: from") == 1
            signed = re.search(rb"X-Signed: (\d+)", front)
            below = front.endswith((b"\r\n" + BELOW, b"\r\n" + BELOW + b"\r\n"))
            header = sent[: header_end(sent)]
            added = (len(BELOW) + 2 * (not header)) * (below and self.relays)
            assert signed is None or int(signed[1]) == len(sent) + added
            shown = re.search(rb"X-Filter: (\d+)\r\n", front)
            assert (shown is not None) == self.filters == below, front
            assert not self.filters or not any(word in header for word in (FILTERED, FILTER_FAILS))
            results = len(signed[0]) + 2 if signed is not None and not self.relays else 0
            assert shown is None or int(shown[1]) == results + len(header or b"\r\n") + len(sent) - len(header)
        assert self.acknowledged <= seen
        alive = [one for one in self.known if one.alive]
        held = self.of.held()
        assert held["connections"] == held["connections_in_set"] == len(alive)
        assert held["logged in as ann"] == sum(one.user == "ann" for one in alive)
        assert held["files"] <= sum(one.mail is not None for one in alive)
        assert self.asking is None or not self.asking.now  # nothing is waited for between two of these steps

    def teardown(self) -> None:
        self.stack.close()
        if self.of is None:
            return
        for one in self.known:
            if one.made.transport is not None:
                one.made.connection_lost(None)
            idle(one.made)
        assert not self.of.held()
        assert all(file.kept != file.discarded for file in self.of.written)


TestClients = Clients.TestCase
TestClients.settings = settings(max_examples=1500 if PROVE else 60, stateful_step_count=40, deadline=None)
