"""Opening a connection: the time for the greeting, implicit TLS, and hosts that are this machine itself."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme

from relaymta.config import Config
from relaymta.dns import NoSuchName
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.mx import Hosts, NoRoute, mx_hosts, targets
from relaymta.route.ourselves import Ourselves
from relaymta.send.connect import ConnectFailed, Peer, Via, connect
from relaymta.send.session import Session
from tests.support.daemon import Relay, wait_for

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
    ],
)
def test_which_addresses_are_ours(address, listeners, ours):
    assert Ourselves(set(), listeners).at(address, 25) == ours


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


async def test_an_address_literal_of_this_host_is_a_loop():
    hosts = await mx_hosts(Answers(), "[127.0.0.1]", set())  # type: ignore[arg-type]
    with pytest.raises(NoRoute) as failed:
        await targets(Answers(), hosts, "4", lambda address: address == "127.0.0.1")  # type: ignore[arg-type]
    assert failed.value.enhanced == "5.4.6"


@pytest.mark.parametrize("how", ["literal", "smart host"])
def test_mail_to_ourselves_does_not_go_round(tmp_path, how):
    relay = Relay(tmp_path, None)
    relay.settings = (f"delivery.port={relay.port}",)
    if how == "smart host":
        relay.smarthost = f"localhost:{relay.port}"
    with relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "", "x@[127.0.0.1]")
        (bounced,) = wait_for(lambda: relay.events("bounced"))
        assert "loop" in bounced["reply"]
        assert len(relay.events("queued")) == 1
