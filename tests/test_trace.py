"""Who watches, which connections each sees, and what is kept, dropped and switched off."""

import asyncio
from types import SimpleNamespace

import pytest

from relaymta import trace
from relaymta.control.requests import Trace
from relaymta.errors import RelayError
from relaymta.proto import reply
from relaymta.proto.session import ASKED, Host, Limits
from relaymta.proto.smtp_server import ServerSession
from relaymta.proto.transaction import Transaction
from relaymta.trace import Facts, Tracer

FACTS = Facts(client="192.0.2.1", listener="0.0.0.0:25", application="shop")


class Holder:
    """A connection: of a client, or (`out`) to a host."""

    def __init__(self, tracer: Tracer, facts: Facts = FACTS, out: bool = False) -> None:
        self.tap = None
        (tracer.outgoing if out else tracer.incoming)(self, facts)


def wants(**filters) -> Trace:
    return Trace(**({"side": "in"} | filters))


async def texts(watch, pieces: int = 1) -> list[str]:
    return [text for _ in range(pieces) for _, _, _, text in await watch.take(0.05)]


async def test_without_a_trace_nothing_has_a_tap_and_with_one_only_what_may_match():
    tracer = Tracer(3)
    assert Holder(tracer).tap is None
    watch = tracer.open(wants(clients=["192.0.2.0/24"], listener="25"))
    assert Holder(tracer, FACTS._replace(client="198.51.100.1")).tap is None
    assert Holder(tracer, FACTS._replace(client="?")).tap is None
    assert Holder(tracer, FACTS._replace(listener="0.0.0.0:587")).tap is None
    assert Holder(tracer, out=True).tap is None
    holder, session = Holder(tracer), SimpleNamespace(tap=None)
    holder.tap.hold(session)
    holder.tap.said(b"220 x\r\n")
    ((_, connection, kind, text),) = await watch.take(1)
    assert (connection[:2], kind, text) == ("3-", "said", "220 x") and session.tap is holder.tap
    tracer.close(watch)
    assert holder.tap is session.tap is None and not tracer.taps and not tracer.watches and tracer._timer is None


async def test_sites_and_hosts():
    tracer = Tracer(0)
    facts = Facts(names=frozenset(("mx.example", "gmail", "[::1]:2525")), hosts=("mx1.example:25", "192.0.2.1:25"))
    for filters, matches in (
        ({}, True), ({"site": "gmail"}, True), ({"site": "GMAIL"}, True), ({"site": "::1"}, True), ({"site": "mx"}, False),
        ({"host": "MX1.example"}, True), ({"host": "192.0.2.1"}, True), ({"host": "192.0.2.1:26"}, False),
        ({"host": "mx1.example:25", "site": "gmail"}, True), ({"host": "mx1.example", "site": "x"}, False),
    ):  # fmt: skip
        watch = tracer.open(wants(side="out", **filters))
        assert (Holder(tracer, facts, out=True).tap is not None) == matches, filters
        tracer.close(watch)


async def test_two_traces_are_two_and_wrong_or_too_many_are_refused():
    tracer = Tracer(0)
    one, two = tracer.open(wants()), tracer.open(wants(application="other"))
    holder = Holder(tracer)
    holder.tap.event("x")
    assert (await texts(one), await texts(two)) == (["x"], [])
    late = tracer.open(wants())
    tracer.incoming(holder, FACTS)
    holder.tap.event("y")
    assert (await texts(one), await texts(late)) == (["y"], ["y"])
    tracer.close(one)
    holder.tap.closed("gone")
    assert (await texts(one), await texts(late), holder.tap) == ([], ["gone"], None)
    with pytest.raises(RelayError, match="does not appear to be"):
        tracer.open(wants(clients=["x"]))
    while len(tracer.watches) < trace.WATCHES:
        tracer.open(wants())
    with pytest.raises(RelayError, match="8 traces already"):
        tracer.open(wants())


@pytest.mark.parametrize("unit", ["lines", "octets"])
async def test_what_does_not_fit_is_dropped_and_told_in_its_place(monkeypatch, unit):
    monkeypatch.setattr(trace, *(("WAITING", 3) if unit == "lines" else ("WAITING_OCTETS", 6)))
    tracer = Tracer(0)
    watch = tracer.open(wants())
    tap = Holder(tracer).tap
    for number in range(5):
        tap.said(b"25%d\r\n" % number)
    tap.said(b"1\r\n2\r\n3\r\n")
    full = 3 if unit == "lines" else 2
    assert (await texts(watch))[:full] == ["250", "251", "252"][:full]
    dropped = f"{8 - full} lines were dropped here: they came faster than they were read"
    tap.said(b"259\r\n")
    assert await texts(watch) == [dropped, "259"]
    assert await texts(watch) == []
    for _ in range(5):
        tap.said(b"250\r\n")
    assert dropped.replace(str(8 - full), str(5 - full)) in await texts(watch, 2), "also where nothing follows"


async def test_an_undecided_connection_is_shown_from_its_beginning_once_it_matches(monkeypatch):
    monkeypatch.setattr(trace, "UNDECIDED", 3)
    tracer = Tracer(0)
    watch = tracer.open(wants(application="post", sender="ann@b.example", recipient="c@d.example"))
    holder = Holder(tracer)
    tap, who = holder.tap, ["192.0.2.1", "", ""]
    tap.who = lambda: tuple(who)
    session = SimpleNamespace(exchange=None, host=SimpleNamespace(domain=""))

    def says(verb: bytes, argument: bytes) -> None:
        tap.heard(session, (0, int.from_bytes(verb, "big"), argument))

    tap.said(b"220 x\r\n")
    says(b"EHLO", b"x")
    who[1:] = "post", "ann"
    tap.said(b"235 x\r\n")
    says(b"MAIL", b"FROM:<bob@b.example>")
    says(b"RCPT", b"TO:<c@d.example>")
    says(b"MAIL", b"FROM:<ann@b.example>")
    says(b"RCPT", b"TO:<e@d.example>")
    assert await texts(watch) == [] and 0 < tracer.undecided < 1000
    says(b"RCPT", b"TO:<c@d.example>")
    assert await texts(watch) == [
        "5 lines before these were not kept", "RCPT TO:<c@d.example>", "MAIL FROM:<ann@b.example>", "RCPT TO:<e@d.example>",
        "RCPT TO:<c@d.example>",
    ]  # fmt: skip
    assert tracer.undecided == 0
    says(b"MAIL", b"FROM:<bob@b.example>")
    assert await texts(watch) == ["MAIL FROM:<bob@b.example>"], "to its end"
    other = Holder(tracer)
    other.tap.said(b"220 x\r\n")
    other.tap.closed("gone")
    assert await texts(watch) == [] and tracer.undecided == 0


async def test_the_lines_of_all_undecided_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(trace, "UNDECIDED_OCTETS", 1000)
    tracer = Tracer(0)
    tracer.open(wants(application="none"))
    holders = [Holder(tracer) for _ in range(50)]
    for holder in holders:
        for _ in range(20):
            holder.tap.event("x" * 50)
            assert tracer.undecided <= 1000
    for holder in holders:
        holder.tap.closed("gone")
    assert tracer.undecided == 0


async def test_only_one_connection_is_followed_the_first_that_says_something():
    tracer = Tracer(0)
    watch = tracer.open(wants(only_one=True))
    one, two = Holder(tracer), Holder(tracer)
    two.tap.event("first")
    assert one.tap is None and Holder(tracer).tap is None
    two.tap.event("second")
    assert await texts(watch) == ["first", "second"]


async def test_what_nobody_reads_is_switched_off_and_goes_on_once_it_is_read(monkeypatch):
    tracer = Tracer(0)
    holders: list[Holder] = []
    tracer.join_in = lambda: [tracer.incoming(holder, FACTS) for holder in holders] and None
    watch = tracer.open(wants())
    holders.append(Holder(tracer))
    holders[0].tap.event("before")
    tracer._tick()
    assert not watch.asleep
    monkeypatch.setattr(trace, "ASLEEP", 0.0)
    tracer._tick()
    assert watch.asleep and holders[0].tap is None and Holder(tracer).tap is None and tracer.watches == [watch]
    assert (await texts(watch)) == ["before", "nothing was read for 0 s, so nothing was traced; from here on it is again"]
    holders[0].tap.event("after")
    assert await texts(watch) == ["after"]
    tracer.close(watch)
    await asyncio.sleep(0)
    assert tracer._timer is None and holders[0].tap is None


async def test_a_command_that_waits_for_filters_is_shown_once():
    class Asking(Transaction):
        asks = frozenset(("MAIL", "RCPT", "DATA"))

    class Choosy(Host):
        def begin(self, session, sender, size, smtputf8):
            return Asking(sender, smtputf8, self.limits)

    tracer = Tracer(0)
    watch = tracer.open(wants())
    session = ServerSession("mx.example", Choosy(Limits()))
    session.greet()
    Holder(tracer).tap.hold(session)
    for line in (b"EHLO x", b"MAIL FROM:<a@b.example>", b"RCPT TO:<c@d.example>", b"DATA", b"x\r\n."):
        session.receive(line + b"\r\n")
        while session.state == ASKED:
            session.answered(None)
            session.receive(b"")
    session.store()
    session.finish(reply.RESET)
    for line in (b"MAIL FROM:<a@b.example>", b"RCPT TO:<c@d.example>", b"BDAT 3 LAST", b"x\r"):
        session.receive(b"x\r\n" if line == b"x\r" else line + b"\r\n")
        while session.state == ASKED:
            session.answered(b"550 5.7.1 no\r\n" if line.startswith(b"BDAT") else None)
            session.receive(b"")
    envelope = ["MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>"]
    assert await texts(watch) == [
        "EHLO x", *envelope, "DATA", "<3 octets of message data>", *envelope, "BDAT 3 LAST", "<3 octets of message data>",
    ]  # fmt: skip


async def test_what_ends_a_connection_quotes_no_secret():
    """As when a host says the password in what is no reply."""
    tracer = Tracer(0)
    watch = tracer.open(wants(side="out"))
    tap = Holder(tracer, out=True).tap
    tap.hide(("tea for two",))
    tap.closed("closed by us: what about tea for two")
    assert await texts(watch) == ["closed by us: what about ***"]
