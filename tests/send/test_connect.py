"""Opening a connection: the time for the greeting, implicit TLS, and hosts that are this machine itself."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from relaymta.config import Config, Route
from relaymta.dns import NoSuchName
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.mx import Hosts, NoRoute, mx_hosts, targets
from relaymta.route.ourselves import Ourselves
from relaymta.send.connect import ConnectFailed, Peer, Via, connect
from relaymta.send.session import Session
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with
from tests.support.rows import Row, relay_for
from tests.support.together import together

TALK = b"250 here\r\n"


class Host:
    """A host that greets after `slow` seconds."""

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await asyncio.sleep(self.slow)
        writer.write(b"220 here\r\n")
        while await reader.readline():
            writer.write(TALK)


@pytest.fixture
async def listen() -> AsyncIterator[Any]:
    servers = []

    async def start(host: Host, context: ssl.SSLContext | None = None) -> int:
        servers.append(await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=context))
        port: int = servers[-1].sockets[0].getsockname()[1]
        return port

    yield start
    for server in servers:
        server.close()


def make(core: ClientSession, peer: str) -> Session:
    def nothing(*args: Any) -> None:
        pass

    return Session(core, peer, asyncio.get_running_loop().time, nothing, nothing, nothing)


async def opened(port: int, connecting: float, replies: float, tls: str = "off", ours: Ourselves | None = None) -> Session:
    route = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "route": [{"hosts": ["127.0.0.1:2"]}]}).route[0]
    via = Via(route, "us.test", connecting, replies, tls, ours or Ourselves(set()))
    return await connect(Peer("localhost", "127.0.0.1", port), via, Any, make, 100)  # type: ignore[arg-type]


async def test_the_greeting_may_take_longer_than_the_connection(listen):
    """RFC 5321 4.5.3.2.1: five minutes."""
    session = await opened(await listen(Host(slow=2.0)), connecting=1.0, replies=60.0)
    session.fail("done")


async def test_the_time_for_the_greeting_ends_too(listen):
    with pytest.raises(ConnectFailed) as failed:
        await opened(await listen(Host(slow=60.0)), connecting=60.0, replies=0.2)
    assert failed.value.phase == "connect"
    assert "timed out waiting for the greeting" in str(failed.value)


@pytest.mark.parametrize(
    ("banner", "said"),
    [
        (b" 220 ok\r\n", "localhost: it sent an invalid reply: not a reply: 220 ok"),
        (b"600 x\r\n", "localhost: it sent an invalid reply: not a reply: 600 x"),
        (b"220 cut off", "localhost: the connection was closed"),
        (b"", "localhost: the connection was closed"),
    ],
)
async def test_what_is_no_greeting_is_said_in_words(listen, banner, said):
    class Odd(Host):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(banner)
            writer.close()

    with pytest.raises(ConnectFailed) as failed:
        await opened(await listen(Odd()), connecting=60.0, replies=60.0)
    assert str(failed.value) == said


BEGUN = [  # (replies in turn, the last of which is cut off, phase, what is said)
    ([b"554 5.7.1 go away"], "connect", "554 5.7.1 go away"),
    ([b"554-go\r\naway"], "connect", "554 go away"),
    ([b"421"], "connect", "421"),
    ([b"220 here\r\n", b"550-5.7.1 not\r\n550-5.7.1 you\r\n"], "ehlo", "550 5.7.1 not you"),
    ([b"220 here\r\n", b"451 4.3.0 lat"], "ehlo", "451 4.3.0 lat"),
    ([b"220 here\r\n", b"502 what\r\n", b"554 no HELO"], "ehlo", "554 no HELO"),
    ([b"220-welcome\r\n220-to"], "connect", ""),
    ([b"220 here\r\n", b"250-here\r\n250-SI"], "ehlo", ""),
    ([b"55"], "connect", ""),
]


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("replies", "phase", "said"), BEGUN)
async def test_a_refusal_that_had_begun_counts(listen, replies, phase, said, silent):
    """When the connection ends, and when the time is over (RFC 5321 4.2.1: the code decides)."""

    class Cut(Host):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for number, reply in enumerate(replies):
                if number:
                    await reader.readline()
                writer.write(reply)
            if silent:
                await reader.read()
            writer.close()

    with pytest.raises(ConnectFailed) as failed:
        await opened(await listen(Cut()), connecting=60.0, replies=0.5 if silent else 60.0)
    found = failed.value.said
    assert failed.value.phase == phase
    assert (found.whole if found is not None else "") == said


@pytest.mark.parametrize(
    ("banner", "said"),
    [
        (b"".join(b"220-%s\r\n" % (b"x" * 900) for _ in range(60)) + b"220 here\r\n", "250"),  # 54 kB
        (b"220-" + b"x" * 40_000 + b"\r\n220 here\r\n", "250"),
        (b"".join(b"554-%s\r\n" % (b"x" * 900) for _ in range(60)) + b"554 no\r\n", "554"),
        (b"".join(b"554-%s\r\n" % (b"x" * 900) for _ in range(600)) + b"554 no\r\n", "554"),  # its code counts
        (b"".join(b"220-%s\r\n" % (b"x" * 900) for _ in range(600)) + b"220 here\r\n", "too long"),
        (b"220 " + b"x" * 70_000, "too long"),
        (b"x" * 70_000, "not a reply"),
    ],
)
async def test_a_long_reply_is_read_as_in_other_phases(listen, banner, said):
    class Long(Host):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(banner)
            await reader.readline()
            writer.write(b"250 here\r\n")
            await reader.read()
            writer.close()

    port = await listen(Long())
    if said == "250":
        (await opened(port, connecting=60.0, replies=60.0)).fail("done")
        return
    with pytest.raises(ConnectFailed) as failed:
        await opened(port, connecting=60.0, replies=60.0)
    assert said in str(failed.value)


@pytest.mark.parametrize("tls", ["may", "encrypt"])
async def test_tls_begins_with_the_first_octet_on_port_465(listen, monkeypatch, tls):
    """RFC 8314 3.3; also where TLS is optional."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    port = await listen(Host(), context)
    monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", port)
    session = await opened(port, 30.0, 5.0, tls)
    assert session.transport is not None and session.transport.get_extra_info("ssl_object") is not None
    session.fail("done")


@pytest.mark.parametrize("listener", ["127.0.0.1:{}", "0.0.0.0:{}"])
async def test_a_host_that_is_this_one_by_its_address_is_not_spoken_to(listen, listener):
    port = await listen(Host(slow=60.0))
    with pytest.raises(NoRoute) as failed:
        await opened(port, 60.0, 60.0, ours=Ourselves(set(), [listener.format(port)]))
    assert (failed.value.enhanced, failed.value.permanent) == ("5.4.6", True)


@pytest.mark.parametrize(
    ("address", "listeners", "ours"),
    [
        ("127.0.0.1", ["127.0.0.1:25"], True),
        ("::ffff:127.0.0.1", ["127.0.0.1:25"], True),
        ("0.0.0.0", ["127.0.0.1:25"], True),
        ("127.0.0.2", ["127.0.0.1:25"], False),
        ("127.0.0.2", ["0.0.0.0:25"], True),
        ("127.0.0.1", ["127.0.0.1:26"], False),
        ("127.0.0.1", ["0.0.0.0:26", "[::]:25"], False),
        ("192.0.2.1", ["0.0.0.0:25"], False),
        ("192.0.2.1", ["localhost:25"], False),
        ("127.0.0.1", ["localhost:25"], True),
        ("mail.example", ["0.0.0.0:25"], False),
        ("127.1", ["127.0.0.1:25"], True),
        ("2130706433", ["0.0.0.0:25"], True),
        ("::ffff:0.0.0.0", ["127.0.0.1:25"], True),
        ("127.0.0.1", ["[::ffff:127.0.0.1]:25"], True),
        ("::1", ["[0:0:0:0:0:0:0:1]:25"], True),
        ("::", ["[::1]:25"], True),
    ],
)
def test_which_addresses_are_ours(address, listeners, ours):
    assert Ourselves(set(), listeners).at(address, 25) == ours


@pytest.mark.parametrize(
    ("address", "port", "listeners", "loop"),
    [  # an MX on port 25: Postfix 3.7 (smtp_find_self) takes its own addresses for a loop there, and on no other port
        ("127.0.0.1", 25, ["192.0.2.1:2525"], True),
        ("127.1.2.3", 25, ["192.0.2.1:2525"], True),
        ("::1", 25, [], True),
        ("0.0.0.0", 25, [], True),
        ("::ffff:127.0.0.1", 25, [], True),
        ("127.0.0.1", 10025, ["127.0.0.1:25"], False),
        ("127.0.0.1", 10025, ["127.0.0.1:10025"], True),
        ("192.0.2.1", 25, ["127.0.0.1:25"], False),
    ],
)
def test_which_mail_exchangers_are_ours(address, port, listeners, loop):
    assert Ourselves(set(), listeners).is_exchange(address, port) == loop


@pytest.mark.parametrize(
    ("names", "ours"),
    [
        (["us.test", "US.test.", "out.us.test", "xn--bcher-kva.test"], True),
        (["other.test", "test", "localhost", "localhost.localdomain", "us", "x.us.test", ""], False),
    ],
)
def test_which_names_are_ours(names, ours):
    """The host name, and those of sources; not what many hosts call themselves."""
    config = Config.model_validate(
        {
            "hostname": "Us.test.",
            "listener": [{"address": "127.0.0.1:1"}],
            "source": [
                {"name": "one", "address": "192.0.2.1", "hostname": "out.us.test"},
                {"name": "two", "address": "192.0.2.2", "hostname": "bücher.test"},
                {"name": "three", "address": "192.0.2.3"},
            ],
        }
    )
    made = Ourselves.of(config)
    assert [made.greeted(name) for name in names] == [ours] * len(names)
    assert not Ourselves({"localhost", "localhost.localdomain"}).greeted("localhost.localdomain")


@pytest.mark.parametrize(
    ("by_name", "said", "loop"), [(True, "US.test", True), (True, "peer.test", False), (False, "us.test", False)]
)
async def test_a_peer_that_replies_with_our_name_is_ourselves_behind_a_proxy(listen, by_name, said, loop):
    """As Postfix 3.7: "host replied to HELO/EHLO with my own hostname"; on other ports than that of SMTP it may be a content
    filter."""

    class Named(Host):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 here\r\n")
            while await reader.readline():
                writer.write(f"250-{said}\r\n250 PIPELINING\r\n".encode())

    port = await listen(Named())
    route = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}]})
    via = Via(
        Route(), "us.test", 60.0, 60.0, "off", Ourselves.of(route.model_copy(update={"hostname": "us.test"})), None, by_name
    )
    try:
        session = await connect(Peer("localhost", "127.0.0.1", port), via, Any, make, 100)  # type: ignore[arg-type]
    except NoRoute as error:
        assert loop and (error.enhanced, error.category) == ("5.4.6", "loop") and "our own name" in str(error)
    else:
        assert not loop
        session.fail("done")


class Answers:
    """A resolver of addresses."""

    def __init__(self, **answers: str) -> None:
        self.answers = answers

    def now(self) -> float:
        return 0.0

    async def addresses(self, host: str, families: str) -> list[str]:
        if host not in self.answers:
            raise NoSuchName(host)
        return [self.answers[host]]


@pytest.mark.parametrize(
    ("pairs", "left"),
    [
        (((10, "other"), (20, "us"), (30, "last")), ["other"]),
        (((10, "other"), (10, "us")), []),
        (((10, "us"), (20, "other")), []),
        (((10, "gone"), (20, "us")), []),
    ],
)
async def test_a_mail_host_that_is_this_one_hides_those_not_preferred_to_it(pairs, left):
    """RFC 5321 5.1."""
    resolver = Answers(other="192.0.2.1", us="127.0.0.1", last="192.0.2.2")
    ours = Ourselves(set(), ["127.0.0.1:25"])
    try:
        found = [t.host for t in await targets(resolver, Hosts(pairs, 0.0), "4", lambda address: ours.at(address, 25))]  # type: ignore[arg-type]
    except NoRoute as error:
        assert error.enhanced == "5.4.6"
        found = []
    assert found == left


@pytest.mark.parametrize(("alias", "left"), [("us", ["other"]), ("other", None)])
async def test_a_mail_host_that_is_an_alias_of_this_one(alias, left):
    """A CNAME in an MX record is not allowed (RFC 2181 10.3), and found all the same."""
    resolver = Answers(other="192.0.2.1", us="192.0.2.9")
    hosts = Hosts(((10, "other"), (20, "us")), 0.0)
    try:
        found = await targets(resolver, hosts, "4", alias=lambda host: host == alias)  # type: ignore[arg-type]
    except NoRoute as error:
        assert (error.enhanced, left) == ("5.4.6", None)
    else:
        assert [target.host for target in found] == left


async def test_an_address_literal_of_this_host_is_a_loop():
    hosts = await mx_hosts(Answers(), "[127.0.0.1]", set())  # type: ignore[arg-type]
    with pytest.raises(NoRoute) as failed:
        await targets(Answers(), hosts, "4", lambda address: address == "127.0.0.1")  # type: ignore[arg-type]
    assert failed.value.enhanced == "5.4.6"


ZONE = [
    "name.test. MX 10 us.test.",  # the host name, whose address is not ours
    "us.test. A 192.0.2.1",
    "alias.test. MX 10 other.test.",
    "other.test. CNAME us.test.",
    "address.test. MX 10 a.test.",
    "a.test. A 127.0.0.1",
    "any.test. MX 10 b.test.",
    "b.test. A 0.0.0.0",
    "mapped.test. MX 10 c.test.",
    "c.test. AAAA ::ffff:127.0.0.1",
    "number.test. MX 10 127.0.0.1.",
    "bare.test. A 127.0.0.1",
    "source.test. MX 10 out.test.",
    "backup.test. MX 10 d.test.",
    "backup.test. MX 20 us.test.",
    "d.test. A 127.0.0.1",
]


def test_mail_to_ourselves_does_not_go_round(tmp_path):
    """RFC 5321 5.1: 5.4.6 at the first attempt, whatever leads back to us."""
    recipients = [f"x@{record.partition(' ')[0].rstrip('.')}" for record in ZONE if " MX 10 " in record]
    recipients += ["x@bare.test", "x@[127.0.0.1]", "x@[0.0.0.0]", "x@[IPv6:::ffff:127.0.0.1]"]
    with nameserver_with(tmp_path, ZONE) as nameserver:
        relay = Relay(tmp_path, None)
        relay.settings = (
            f"delivery.port={relay.port}", f'delivery.nameservers=["{nameserver}"]', "hostname=us.test",
            'source=[{name="x",address="127.0.0.1",hostname="out.test"}]',
        )  # fmt: skip
        with relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "", *recipients)
            wait_for(lambda: len(relay.events("bounced")) == len(recipients), what="all to bounce")
            for event in relay.events("bounced"):
                assert "5.4.6" in event["reply"] and "loop" in event["reply"], event
                assert (event["cause"], event["attempt"]) == ("loop", 1)
            assert len(relay.events("queued")) == 1 and not relay.events("deferred")


def test_a_smart_host_that_is_this_host_is_a_loop_and_another_port_is_none(tmp_path):
    """At another port there is a content filter (it gives our name in its greeting, as a second instance on the machine does)."""
    hosts = ["127.0.0.1", "localhost", "localhost.", "0.0.0.0", "[::ffff:127.0.0.1]", "us.test"]
    reply = b"250-relay.example\r\n250 8BITMIME\r\n"
    with FakeMx({"EHLO": reply}) as peer, nameserver_with(tmp_path, ["us.test. A 127.0.0.1"]) as nameserver:
        port = free_port()
        rows = {host: Row(f"row-{number}", f"{host}:{port}") for number, host in enumerate(hosts)}
        filtered = Row("filtered", f"127.0.0.1:{peer.port}")
        relay = relay_for(tmp_path, [*rows.values(), filtered], f'delivery.nameservers=["{nameserver}"]')
        relay.port = port
        with relay:
            for row in (*rows.values(), filtered):
                row.send()

            def check(row: Row) -> None:
                (bounced,) = wait_for(lambda: row.events("bounced"))
                assert "5.4.6" in bounced["reply"] and bounced["cause"] == "loop" and bounced["attempt"] == 1
                assert len(row.events("queued")) == 1

            together({host: lambda row=row: check(row) for host, row in rows.items()})  # type: ignore[misc]
            wait_for(lambda: peer.messages)
            wait_for(lambda: len(relay.events("queued")) == len(rows) + 1)


def test_a_proxy_before_us_is_a_loop_too(tmp_path):
    """The address of the MX is a proxy's that hands the connection to our listener."""
    relay = Relay(tmp_path, None)
    with Forwarder(relay.port) as port, nameserver_with(tmp_path, ["d.test. MX 10 m.test.", "m.test. A 127.0.0.1"]) as nameserver:
        relay.settings = (f"delivery.port={port}", f'delivery.nameservers=["{nameserver}"]', "hostname=us.test")
        with relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "", "x@d.test")
            (bounced,) = wait_for(lambda: relay.events("bounced"))
            assert "5.4.6" in bounced["reply"] and "our own name" in bounced["reply"]
            assert len(relay.events("queued")) == 1


class Forwarder:
    """A TCP proxy on a port of its own to another."""

    def __init__(self, to: int) -> None:
        self._to = to
        self._server = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self._server.getsockname()[1])

    def __exit__(self, *exc: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := one.recv(65536):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)
