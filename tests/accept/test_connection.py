"""One connection, one loop turn at a time: its bounds, its identity, and that it leaves nothing."""

import asyncio
import base64
import gc
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.accept.connection import Connection
from relaymta.accept.endpoint import Endpoint, _recipients
from relaymta.accept.line import LINGER, OUTPUT_SECONDS, UNSENT
from relaymta.accept.origin import Origin
from relaymta.auth.identity import Identity
from relaymta.config import Listener
from relaymta.control.requests import Trace
from relaymta.metrics import index
from relaymta.proto import reply
from relaymta.proto.session import Host, Session
from relaymta.proto.transaction import Limits, Transaction
from relaymta.trace import Tracer
from relaymta.trace import Watch as TraceWatch
from relaymta.watch import Watched
from tests.accept.test_transactions import connected, idle
from tests.support.connection import BIG, COMMIT_FAILS, Machine, Transport

EHLO = b"EHLO client.example\r\n"
LOGIN = b"AUTH PLAIN " + base64.b64encode(b"\0ann\0secret") + b"\r\n"
MESSAGE = b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT 2 LAST\r\nhi"
CLIENT = "client 127.0.0.1"
LISTENER = Listener(address="127.0.0.1:25")
PROXY = {"networks": ["127.0.0.1/32"], "xclient": True}


def machine(**settings: Any) -> Machine:
    return Machine(Random(1), **{"intake": {"errors": 100_000, "tarpit": 0}} | settings)


def say(made: Connection, data: bytes) -> list[str]:
    """Send data, run the loop until it is idle, and return the last line of each reply."""
    transport = made.transport
    assert isinstance(transport, Transport)
    before = len(transport.said)
    made.data_received(data)
    idle(made)
    said = transport.said[before:]
    if isinstance(made.transport, Transport) and made.transport is not transport:
        said += made.transport.said
    return [line for line in said.decode().split("\r\n") if line[3:4] == " "]


FLOODS = {
    "EHLO": (b"EHLO x\r\n" * 32_000, 32_000, b"250 ENHANCEDSTATUSCODES\r\n"),
    "NOOP": (b"NOOP\r\n" * 40_000, 40_000, b"250 2.0.0 Ok\r\n"),
    "RCPT": (b"MAIL FROM:<a@b>\r\n" + b"RCPT TO:<a@b>\r\n" * 15_000, 15_000, b"550 5.7.1 "),
    "BDAT": (b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n" + b"BDAT 0\r\n" * 32_000, 32_000, b"250 2.0.0 Ok\r\n"),
    "mail": (b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT 2 LAST\r\nhi" * 4_000, 4_000, b"queued as"),
    "loop": (
        (b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT 780 LAST\r\n" + b"Received: x\r\n" * 60) * 400, 400, b"554 5.4.6"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_unsent_replies_are_bounded_and_sent_once_the_client_reads(name):
    wire, count, answer = FLOODS[name]
    of = machine()
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    made.data_received(EHLO)
    idle(made)
    transport.reads = False
    made.data_received(wire[: len(wire) // 2])
    while of.steps.turns or of.steps.threads or of.steps.timers:
        of.steps.step()
    assert transport.paused and transport.most_owed < 4 * UNSENT
    made.data_received(wire[len(wire) // 2 :])  # had been received already
    assert transport.most_owed < 4 * UNSENT and made.session is not None
    transport.reads = True
    transport.read()
    idle(made)
    assert transport.said.count(answer) == count + (name in ("EHLO",)) and not transport.paused
    assert transport.most_owed < 4 * UNSENT and made.session.parser.waiting() == 0


def test_a_flooding_client_does_not_starve_the_others():
    of = machine()
    flooding, other = connected(of), connected(of)
    flooding.data_received(EHLO + b"NOOP\r\n" * 40_000)
    other.data_received(EHLO)
    assert isinstance(flooding.transport, Transport) and isinstance(other.transport, Transport)
    assert flooding.transport.said.count(b"250 2.0.0 Ok") <= 200 and b"250 ENHANCEDSTATUSCODES" in other.transport.said


def test_hundreds_of_rejected_messages_in_one_segment_do_not_recurse():
    made = connected(machine())
    assert isinstance(made.transport, Transport)
    made.transport.limits = (1 << 30, 1 << 30)  # as if each reply were sent at once
    made.data_received(EHLO + FLOODS["loop"][0])
    idle(made)
    assert made.transport.said.count(b"554 5.4.6") == 400


@pytest.mark.parametrize("way", ["blocked", "closed", "timed out"])
def test_a_client_that_does_not_read_is_disconnected(way):
    of = machine()
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    idle(made)
    transport.reads = False
    made.data_received(EHLO * (1000 if way == "blocked" else 1) + (b"QUIT\r\n" if way == "closed" else b""))
    while of.steps.turns:
        of.steps.step()
    patience = of.config.intake.command_timeout
    if way != "closed":
        made.check(of.steps.now + patience - 1)
        assert not transport.is_closing()
        made.check(of.steps.now + patience + 1)
    if way != "blocked":
        later = of.steps.now + patience + 1
        made.check(later)
        made.check(later + LINGER - 1)
        assert not of.steps.turns
        made.check(later + LINGER + 1)
    while of.steps.turns:
        of.steps.step()
    assert transport.closed and transport.owed and not of.held()


@pytest.mark.parametrize("end", ["closes", "sends without end", "stays"])
def test_a_client_that_sends_on_behind_the_last_reply_is_read_and_dropped(monkeypatch, end):
    """Else the kernel resets the connection, and the reply may be lost."""
    monkeypatch.setattr("relaymta.accept.line.LINGER_OCTETS", 10_000)
    of = machine()
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    idle(made)
    transport.reads = False
    made.data_received(b"BDAT many\r\n" + MESSAGE)
    while of.steps.turns:
        of.steps.step()
    assert transport.said.count(b"501 ") == 1 and transport.ending and not transport.closing and made.gone
    for _ in range(10):
        made.data_received(MESSAGE * 10)
    assert not transport.closing and not transport.paused and not of.stored
    if end == "closes":
        transport.reads = True
        transport.read()
    elif end == "sends without end":
        made.data_received(b"x" * 10_000)
        assert transport.closing
        transport.abort()
    else:
        made.check(of.steps.now)
        made.check(of.steps.now + LINGER - 1)
        assert not transport.closing
        made.check(of.steps.now + LINGER + 1)
    while of.steps.turns:
        of.steps.step()
    assert transport.closed and not of.held()


def test_a_client_that_sends_and_never_reads_is_disconnected():
    """What it sends does not prolong that: over TLS some of it still arrives after reading has stopped."""
    of = machine()
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    idle(made)
    transport.reads = False
    made.data_received(EHLO * 1000)
    while of.steps.turns:
        of.steps.step()
    began = of.steps.now
    while not transport.is_closing() and of.steps.now < began + 2 * OUTPUT_SECONDS:
        of.steps.now += 10
        of.time = of.steps.now
        made.data_received(b"NOOP\r\n")
        made.check(of.steps.now)
    assert transport.is_closing() and of.steps.now <= began + OUTPUT_SECONDS + 20
    idle(made)
    assert not of.held() and transport.most_owed < 4 * UNSENT


@pytest.mark.parametrize("waits", ["tarpit", "login", "nothing", "message", "message data", "sent at once"])
def test_a_drain_waits_for_messages_only(waits):
    of = machine(intake={"errors": 100, "tarpit": 5})
    of.logs_in = Identity("ann", connections=1)
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    say(made, EHLO)
    envelope = b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n"
    wrong = b"WRONG\r\n" * 5
    wire = {
        "tarpit": wrong, "login": LOGIN, "nothing": b"", "message": envelope + b"BDAT 2 LAST\r\nhi",
        "message data": envelope + b"BDAT 9\r\nhi", "sent at once": wrong + envelope + b"BDAT 2 LAST\r\nhi",
    }[waits]  # fmt: skip
    made.data_received(wire)
    of.intake.draining = True
    made.drain()
    kept = waits in ("message", "message data")
    assert transport.is_closing() != kept and transport.said.count(b"500 ") == wire.count(b"WRONG")
    assert transport.said.endswith(reply.SHUTTING_DOWN) != kept
    if waits == "message data":
        made.data_received(b"1234567BDAT 0 LAST\r\n")
    idle(made)
    assert transport.said.endswith(reply.SHUTTING_DOWN) and transport.closed and not of.held()
    assert len(of.stored) == kept and transport.said.count(b"queued as") == kept


@pytest.mark.parametrize("wire", [b"x\ny\r\n.\r\n", b"RSET\r\n", b""], ids=["rejected", "aborted", "in TLS"])
def test_a_session_that_a_drain_let_go_on_is_closed_once_it_has_no_message(wire):
    of = machine()
    made = connected(of)
    say(made, EHLO)
    envelope = b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n"
    made.data_received(b"STARTTLS\r\n" if not wire else envelope + (b"BDAT 0\r\n" if wire == b"RSET\r\n" else b"DATA\r\n"))
    of.intake.draining = True
    made.drain()
    idle(made)
    made.check(of.steps.now)
    assert isinstance(made.transport, Transport) and made.transport.closing != bool(wire)
    transport = made.transport
    if wire:
        say(made, wire)
        made.check(of.steps.now)
    idle(made)
    assert transport.said.endswith(reply.SHUTTING_DOWN) and transport.closed and not of.held() and not of.stored


def test_a_late_reply_is_not_taken_for_that_to_the_next_message():
    of = machine()
    made = connected(of)
    envelope = b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n"
    say(made, EHLO + envelope)
    assert made.session is not None
    first = made.session.transaction
    assert first is not None
    assert say(made, b"BDAT 2 LAST\r\nhi")[0].startswith("250 2.0.0 Ok: queued")
    made.data_received(envelope + b"BDAT 2 LAST\r\nho")
    made.answer(first, b"250 2.0.0 Ok: queued as an earlier one\r\n")
    idle(made)
    assert isinstance(made.transport, Transport)
    assert made.transport.said.count(b"queued as") == len(of.stored) == 2 and b"earlier" not in made.transport.said


@pytest.mark.parametrize(
    ("lines", "code"), [(None, "451"), ("other@d.example\n", "550"), ("@d.example\n", "250")], ids=["unread", "absent", "listed"]
)
def test_a_recipient_map_that_was_never_read_lets_nobody_pass(tmp_path, lines, code):
    recipients = tmp_path / "recipients"
    if lines is not None:
        recipients.write_text(lines)
    of = machine()
    watched = Watched([str(recipients)], lambda: _recipients(str(recipients)))
    watched.refresh()
    of._parts = SimpleNamespace(recipients=watched)
    of.recipient_exists = lambda *asked: Endpoint.recipient_exists(of, *asked)
    said = say(connected(of), EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n")
    assert said[-1].startswith(code)


def test_a_message_whose_header_cannot_be_looked_at_gets_a_reply(monkeypatch):
    of = machine()
    of.verifier = of
    monkeypatch.setattr(of, "look", lambda data: 1 // 0)
    made = connected(of)
    wire = b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT 2 LAST\r\nhi"
    assert say(made, EHLO + wire)[-1].startswith("451 ")
    made.connection_lost(None)
    assert not of.held() and not of.stored


@pytest.mark.parametrize("behind", [b"", b"NOOP\r\n" * 2000], ids=["idle", "behind"])
def test_a_client_that_half_closes_gets_its_replies_and_is_closed(behind):
    of = machine()
    made = connected(of)
    transport = made.transport
    assert isinstance(transport, Transport)
    say(made, EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nDATA\r\n")
    made.data_received(b"Subject: x\r\n\r\nx\r\n.\r\n" + behind)
    assert made.eof_received()
    idle(made)
    assert b"queued as" in transport.said and transport.said.count(b"250 2.0.0 Ok\r\n") == behind.count(b"NOOP")
    assert transport.closed and not of.held()


def test_a_half_close_over_tls_closes_the_connection():
    """Otherwise asyncio logs a warning on stderr, as often as a client likes."""
    of = machine()
    made = connected(of)
    say(made, EHLO + b"STARTTLS\r\n")
    say(made, EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nDATA\r\n")
    made.data_received(b"Subject: x\r\n\r\nx\r\n.\r\n")
    assert made.waits and not made.eof_received()


def test_an_http_request_is_logged_and_counted():
    of = machine()
    made = connected(of)
    assert say(made, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + EHLO + b"MAIL FROM:<a@b>\r\n") == [
        "220 relay.example ESMTP relaymta", reply.NOT_SMTP.decode().strip(),
    ][1:]  # fmt: skip
    assert [event["reply"] for event in of.events] == [reply.NOT_SMTP.decode().strip()]
    assert of.cells.get(index("relaymta_connections_total", "refused")) == 1 and made.transport is None


MAIL = b"MAIL FROM:<a@b>\r\nRCPT TO:<x@far.example>\r\n"
TRUSTED = {"domains": ["d.example"], "networks": ["127.0.0.0/8", "192.0.2.0/24"]}


@pytest.mark.parametrize(
    ("words", "address", "relays"),
    [
        ([b"ADDR=192.0.2.7"], "192.0.2.7", True),
        ([b"ADDR=198.51.100.7"], "198.51.100.7", False),
        ([b"ADDR=[UNAVAILABLE]"], "0.0.0.0", False),
        ([b"ADDR=[TEMPUNAVAIL]"], "0.0.0.0", False),
        ([b"ADDR="], "0.0.0.0", False),
        ([b"NAME=host.example"], "0.0.0.0", False),
        ([b"PROTO=SMTP HELO=x"], "0.0.0.0", False),
        ([b"ADDR=192.0.2.7", b"HELO=x"], "192.0.2.7", True),  # one list in two commands, as Postfix sends it
        ([b"ADDR=192.0.2.7", b"ADDR=[UNAVAILABLE]"], "0.0.0.0", False),
        ([b"NAME=x", b"ADDR=192.0.2.7"], "192.0.2.7", True),
        ([b"ADDR=[UNAVAILABLE]", b"LOGIN=ann"], "0.0.0.0", True),
        ([b"LOGIN=ann", b"LOGIN=[UNAVAILABLE]"], "0.0.0.0", False),
        ([b"LOGIN=ann", b"ADDR=198.51.100.7"], "198.51.100.7", False),
        ([b"ADDR=198.51.100.7 LOGIN=ann", b"ADDR=198.51.100.7"], "198.51.100.7", False),  # the next client of the same address
        ([b"ADDR=192.0.2.7 LOGIN=ann", b"ADDR=192.0.2.7 NAME=x"], "192.0.2.7", True),
        ([b"ADDR=198.51.100.7", b"LOGIN=ann", b"HELO=x"], "198.51.100.7", True),
        ([b"ADDR=IPV6:fe80::1%eth0"], "fe80::1", False),
        ([b"ADDR=IPV6:::ffff:192.0.2.7"], "192.0.2.7", True),
    ],
)
def test_a_proxys_rights_are_not_its_clients(words, address, relays):
    of = machine(network=[PROXY], relay=TRUSTED)
    made = connected(of)
    assert say(made, EHLO + MAIL)[-1].startswith("250")  # the proxy itself may relay
    say(made, b"RSET\r\n")
    for word in words:
        assert say(made, b"XCLIENT " + word + b"\r\n") == ["220 relay.example ESMTP relaymta"]
    assert say(made, EHLO + MAIL)[-1][:3] == ("250" if relays else "550")
    say(made, b"RSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT 2 LAST\r\nhi")
    ((envelope, data),) = of.stored
    assert envelope.client == address
    assert (f"[IPv6:{address}]" if ":" in address else f"[{address}]").encode() in data
    say(made, b"QUIT\r\n")
    assert not of.held()


def test_the_connections_of_a_content_filter_are_counted_apart_from_its_hosts():
    of = machine(listener=[{"address": "127.0.0.1:25"}, {"address": "127.0.0.1:10025", "filtered": True}], relay=TRUSTED)

    def arrives(listener: int) -> bytes | None:
        return Connection(of, of.config.listener[listener]).enter(of.intake.client("127.0.0.1"))

    for listener in (0, 1):
        count = next(count for count in range(1000) if arrives(listener) is not None)
        assert count == 200 and arrives(listener) == reply.TOO_MANY_FROM_CLIENT
    for made in list(of.connections):
        made.release()
    assert not of.held()


def test_what_a_content_filter_gives_back_may_use_the_reserve_of_a_full_disk():
    """Otherwise a queue that is full of what waits for the filter could not drain."""
    of = machine(listener=[{"address": "127.0.0.1:25"}, {"address": "127.0.0.1:10025", "filtered": True}], relay=TRUSTED)

    def answers(listener: int) -> list[str]:
        made = connected(of, listener)
        return [line[:3] for line in say(made, EHLO + b"MAIL FROM:<a@b>\r\nRSET\r\nMAIL FROM:<a@b> SIZE=1000\r\nQUIT\r\n")[1::2]]

    assert answers(0) == answers(1) == ["250", "250"]
    of.full, of.room, of.reserve = True, 0, 1001
    assert answers(0) == ["452", "452"] and answers(1) == ["250", "250"]
    of.reserve = 1000
    assert answers(1) == ["250", "452"]
    of.reserve = 0
    assert answers(1) == ["452", "452"]


@pytest.mark.parametrize("address", [b"192.0.2.7", b"[UNAVAILABLE]"])
def test_a_proxys_xforward_is_not_its_clients(address):
    of = machine(network=[PROXY | {"xforward": True}, {"networks": ["192.0.2.9/32"], "xforward": True}])
    made = connected(of)
    said = b"XFORWARD ADDR=10.0.0.1 HELO=inside\r\n"
    assert say(made, EHLO + said)[-1][:3] == "250"
    say(made, b"XCLIENT ADDR=" + address + b" HELO=outside PROTO=ESMTP\r\n")
    say(made, MESSAGE)
    assert b"XFORWARD" not in made.session.receive(EHLO)
    assert say(made, said + MESSAGE)[0][:3] == "500"
    assert [envelope.forwarded for envelope, _ in of.stored] == [{}, {}]
    say(made, b"XCLIENT ADDR=192.0.2.9 HELO=filter PROTO=ESMTP\r\n")
    assert say(made, said + MESSAGE)[0][:3] == "250"
    assert of.stored[-1][0].forwarded == {"ADDR": "10.0.0.1", "HELO": "inside"}


@pytest.mark.parametrize(
    ("normalized", "assumed", "code"),
    [("192.0.2.7", "192.0.2.7", "250"), ("127.0.0.1", "192.0.2.7", "550"), ("192.0.2.7", "", "550")],
)
@pytest.mark.parametrize("tls", [False, True])
def test_message_data_is_checked_by_the_rules_by_which_it_was_normalized(normalized, assumed, code, tls):
    of = machine(network=[PROXY], intake={"normalize_networks": [normalized + "/32"], "errors": 1000})
    made = connected(of)
    say(made, EHLO)
    say(made, b"XCLIENT ADDR=%s\r\n" % (assumed.encode() or b"[UNAVAILABLE]"))
    if tls:
        say(made, EHLO + b"STARTTLS\r\n")
    say(made, EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nDATA\r\n")
    assert say(made, b"Subject: x\r\n\r\nline\n.\nMAIL FROM:<evil@x>\r\n.\r\n")[-1][:3] == code
    assert not of.stored or b"\r\nline\r\n.\r\nMAIL" in of.stored[0][1]


@pytest.mark.parametrize(
    ("steps", "user", "counted"),
    [
        ([LOGIN], "ann", 1),
        ([LOGIN, b"STARTTLS\r\n"], "", 0),
        ([LOGIN, b"STARTTLS\r\n", EHLO + LOGIN], "ann", 1),
        ([LOGIN, b"XCLIENT ADDR=192.0.2.7\r\n"], "", 0),
        ([LOGIN, b"XCLIENT ADDR=192.0.2.7\r\n", EHLO + LOGIN], "ann", 1),
        ([LOGIN, b"XCLIENT ADDR=[UNAVAILABLE]\r\n", EHLO + LOGIN, b"STARTTLS\r\n", EHLO + LOGIN], "ann", 1),
        ([LOGIN, b"XCLIENT LOGIN=bob\r\n"], "bob", 0),
        ([LOGIN, b"XCLIENT ADDR=127.0.0.1\r\n"], "", 0),  # the proxy's own address
        ([b"STARTTLS\r\n", EHLO + LOGIN, b"XCLIENT HELO=x\r\n"], "", 0),
    ],
)
def test_authentication_ends_with_starttls_and_xclient(steps, user, counted):
    of = machine(network=[PROXY])
    of.logs_in = Identity("ann", connections=2, senders=("ann@s.example",))
    made = connected(of)
    say(made, EHLO)
    for step in steps:
        assert say(made, step)[-1][:3] in ("220", "235", "250")
    assert made.session is not None
    assert made.rights is not None and (made.rights.user, made.rights.login is not None) == (user, bool(user))
    assert of.counts["logged in as ann"] == counted
    # The rights agree: only an authenticated user relays from here, and ann only with her own senders.
    replies = say(made, EHLO + b"MAIL FROM:<ann@s.example>\r\nRCPT TO:<x@far.example>\r\nRSET\r\nMAIL FROM:<z@s.example>\r\n")
    assert [line[:3] for line in replies[1:]] == ["250", "250" if user else "550", "250", "550" if user == "ann" else "250"]
    say(made, b"QUIT\r\n")
    assert not of.held()


def test_connections_of_an_account_are_limited():
    of = machine(network=[PROXY])
    of.logs_in = Identity("ann", connections=1)
    first, second = connected(of), connected(of)
    assert say(first, EHLO + LOGIN)[-1].startswith("235")
    assert say(second, EHLO + LOGIN)[-1] == "454 4.7.0 Too many connections of ann (limit connections 1); try again later"
    assert second.session is not None and second.rights is not None and (second.rights.user, second.rights.login) == ("", None)
    say(first, b"STARTTLS\r\n")
    assert say(second, LOGIN)[-1].startswith("235")


@pytest.mark.parametrize(
    ("quotas", "rates", "expected"),  # of an account, of its client; their use
    [
        ({"messages": "9/h", "recipients": "3/h"}, {}, {"account ann messages": 1, "account ann recipients": 3}),
        ({}, {"message_rate": "9/h", "recipient_rate": "3/h"}, {f"{CLIENT} message_rate": 1, f"{CLIENT} recipient_rate": 3}),
        ({"recipients": "3/h"}, {"recipient_rate": "9/h"}, {f"{CLIENT} recipient_rate": 3, "account ann recipients": 3}),
    ],
)  # fmt: skip
def test_a_rejected_recipient_takes_nothing_from_quotas(quotas, rates, expected):
    of = machine(limits=rates)
    of.logs_in = Identity("ann", quotas=quotas)
    made = connected(of)
    replies = say(made, EHLO + LOGIN)
    replies = say(made, b"MAIL FROM:<a@b>\r\n" + b"RCPT TO:<a@d.example>\r\n" * 8)
    assert [line[:3] for line in replies] == ["250"] * 4 + ["452"] * 5
    say(made, b"RSET\r\nMAIL FROM:<a@b>\r\n" + b"RCPT TO:<a@d.example>\r\n" * 4)  # nor does a message without recipients
    assert of.used == expected


def test_a_message_above_a_quota_stays_held():
    of = machine()
    identity = Identity("ann", quotas={"recipients": "1/h", "octets": "1/d"}, hold=True)
    transaction = Transaction("a@b", False, Limits())
    origin = Origin.of(of.intake.client("127.0.0.1"), identity, LISTENER)
    session = Session("relay.example", Host())
    why = "quota: recipients 1/h of ann is used up"
    for held in ("", why, why):
        assert of.intake.accept_recipient(origin, "a@d.example", transaction, session) is None and transaction.held == held
    with of.intake.quotas.units() as units:
        assert units.account(identity, "octets", 2, transaction) is None
    assert transaction.held == why, "the first reason is the one that is told"


@pytest.mark.parametrize("outcome", ["stored", "not stored", "quota used up"])
def test_octets_of_a_message_that_is_not_stored_are_given_back(outcome):
    of = machine()
    of.logs_in = Identity("ann", quotas={"octets": "100/d" if outcome == "quota used up" else "9000/d"})
    made = connected(of)
    spoil = COMMIT_FAILS if outcome == "not stored" else b"x"
    message = b"Subject: x\r\n\r\n" + spoil + b"y" * 100
    code = say(made, EHLO + LOGIN + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT %d LAST\r\n" % len(message) + message)[-1][
        :3
    ]
    assert code == {"stored": "250", "not stored": "451", "quota used up": "452"}[outcome]
    assert of.used["account ann octets"] == sum(len(data) for _, data in of.stored)


@pytest.mark.parametrize("size", [10, 3 * BIG], ids=["small", "large"])
@pytest.mark.parametrize("step", ["prepend", "sign", "verify", "cancel", "admit"])
def test_a_transaction_ends_with_a_reply_whatever_fails_inside(monkeypatch, step, size):
    error = asyncio.CancelledError() if step == "cancel" else ValueError("a bug")
    relay = {"domains": ["d.example"], "networks": ["127.0.0.0/8"] if step == "sign" else []}
    of = Machine(Random(1), step == "sign", step in ("verify", "cancel"), relay=relay, intake={"errors": 100})

    def fails(*arguments: object) -> None:
        raise error

    async def fails_later(*arguments: object) -> None:
        raise error

    made = connected(of)
    message = b"Subject: x\r\n\r\n" + b"line\r\n" * (size // 6)
    made.data_received(EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT %d\r\n" % len(message) + message)
    idle(made)
    for owner, name in {
        "prepend": [(of.intake, "prepend")], "sign": [(of, "sign"), (of, "finish")], "admit": [(of.intake, "admit")],
    }.get(step, []):  # fmt: skip
        monkeypatch.setattr(owner, name, fails)
    if step in ("verify", "cancel"):
        monkeypatch.setattr(of, "check", fails_later)
    made.data_received(b"BDAT 0 LAST\r\nNOOP\r\n")
    idle(made)
    assert isinstance(made.transport, Transport) and made.session is not None and made.session.transaction is None
    refused = step != "prepend" or size == 10  # a large one has got its fields before
    assert (b"\r\n451 4." in made.transport.said) == refused and made.transport.said.endswith(reply.NOOP)
    made.connection_lost(None)
    idle(made)
    assert not of.held() and len(of.stored) != refused and all(file.kept != file.discarded for file in of.written)


def test_a_closed_connection_is_no_work_for_the_garbage_collector():
    of = machine()
    gc.collect()
    gc.disable()
    try:
        known = {id(one) for one in gc.get_objects() if isinstance(one, Connection)}  # other tests'
        for after in (b"", EHLO, EHLO + b"MAIL FROM:<a@b>\r\n", EHLO + MESSAGE):
            made = connected(of)
            made.data_received(after)
            idle(made)
            made.connection_lost(None)
            idle(made)
            del made
            left = [one for one in gc.get_objects() if isinstance(one, Connection) and id(one) not in known]
            assert not left, after
    finally:
        gc.enable()


def test_a_client_that_is_refused_while_it_is_traced_gets_its_reply():
    of = machine(limits={"connections": 1})
    tracer = of.tracer = Tracer(0)
    tracer._incoming.append(watch := TraceWatch(tracer, Trace(side="in")))
    assert connected(of).tap is not None
    refused = Connection(of, of.config.listener[0])
    assert refused.enter(of.intake.client("127.0.0.1")) == reply.TOO_MANY_CONNECTIONS
    assert [text for *_, text in watch._lines][-2:] == [reply.TOO_MANY_CONNECTIONS.decode().strip(), "refused"]
    assert refused.tap is None and len(tracer.taps) == 1
