"""Outages: one failure, whatever the number of failed connections, and delivery resumes as soon as the site is found up."""

import asyncio
import json
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from relaymta.config import Config
from relaymta.log import Log
from relaymta.send.connect import Peer
from relaymta.send.opener import Opener
from tests.conftest import PROVE
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with

MESSAGE = "Subject: x\r\n\r\nx\r\n"
MESSAGES = 12  # to each site, so that all connections of a new pool are tried
HOUR = 3600  # the schedule's first step: mail that is delivered sooner was, because its host was found up


class Broken(FakeMx):
    """A host in an outage: it accepts connections, and then calls `what`."""

    def __init__(self, what: Callable[[socket.socket], None], port: int, host: str = "127.0.0.1") -> None:
        self.what = what
        super().__init__({}, port, host=host)

    def _talk(self, sock: socket.socket) -> None:
        self.what(sock)


def silent(sock: socket.socket) -> None:
    time.sleep(0.5)


def busy(sock: socket.socket) -> None:
    sock.sendall(b"421 4.3.2 not now\r\n")
    sock.recv(100)


def unwilling(sock: socket.socket) -> None:
    sock.sendall(b"450 4.3.2 not now\r\n")
    sock.recv(100)


def torn(sock: socket.socket) -> None:
    sock.sendall(b"220 half a ban")
    time.sleep(0.1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def torn_greeting(sock: socket.socket) -> None:
    sock.sendall(b"220 fake\r\n")
    sock.recv(100)
    sock.sendall(b"250-fake\r\n250-PIPE")


def without_tls(sock: socket.socket) -> None:
    sock.sendall(b"220 fake\r\n")
    sock.recv(100)
    sock.sendall(b"250-fake\r\n250 STARTTLS\r\n")
    sock.recv(100)
    sock.sendall(b"220 go\r\n")
    sock.recv(100)
    sock.sendall(b"this is no handshake\r\n")
    time.sleep(0.1)


# The failures of the hosts of each domain. None: nothing listens.
OUTAGES: dict[str, Callable[[socket.socket], None] | None] = {
    "refused": None,
    "silent": silent,
    "busy": busy,
    "unwilling": unwilling,
    "torn": torn,
    "torn-greeting": torn_greeting,
    "tls": without_tls,
}


def states(relay: Relay) -> dict[str, dict[str, Any]]:
    """The sites that are down, by the name in their domain."""
    rows = [json.loads(line) for line in relay.cli("shaping", "active", "--json").stdout.splitlines()]
    return {next(name for name in sorted(OUTAGES, key=len, reverse=True) if name in row["site"]): row for row in rows}


@pytest.fixture(scope="module")
def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(made)
    return made


def smart_hosts(number: int, stack: ExitStack, folder: Path) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """The `number` smart hosts of each domain, and the settings for them."""
    hosts = {name: [("127.0.0.1", free_port()) for _ in range(number)] for name in OUTAGES}
    routes = []
    for name, addresses in hosts.items():
        listed = ",".join(f'"{host}:{port}"' for host, port in addresses)
        tls = "encrypt" if name == "tls" else "may"
        routes.append(f'{{name="{name}",recipient_domain=["{name}.test"],tls="{tls}",hosts=[{listed}]}}')
    return hosts, [f"route=[{','.join(routes)}]"]


def mail_exchangers(number: int, stack: ExitStack, folder: Path) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """As `smart_hosts`, but by MX."""
    port, hosts, zone = free_port(), {}, []
    for position, name in enumerate(OUTAGES):
        hosts[name] = [(f"127.0.{10 + position}.{index + 1}", port) for index in range(number)]
        zone += [f"{name}.test. MX 10 mx{index}.{name}.test." for index in range(number)]
        zone += [f"mx{index}.{name}.test. A {address}" for index, (address, _) in enumerate(hosts[name])]
    nameserver = stack.enter_context(nameserver_with(folder, zone))
    routes = 'route=[{name="tls",recipient_domain=["tls.test"],tls="encrypt"}]'
    return hosts, [routes, f"delivery.port={port}", f'delivery.nameservers=["{nameserver}"]']


PAIRS = [(1, smart_hosts, 1), (2, smart_hosts, 2), (2, mail_exchangers, 1), (1, mail_exchangers, 2)]
REST = [(3 - workers, where, number) for workers, where, number in PAIRS]


@pytest.mark.parametrize(
    ("workers", "where", "number"),
    PAIRS + (REST if PROVE else []),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_outage_is_one_failure_and_ends_when_the_host_is_up(tmp_path, context, workers, where, number):
    """All kinds of outages at the same time, each at a domain of its own."""
    with ExitStack() as stack:
        hosts, settings = where(number, stack, tmp_path)
        settings += [f"delivery.first_retry={HOUR}", "queue.max_age=90d"]
        relay = stack.enter_context(Relay(tmp_path, None, *settings, workers=workers))
        with ExitStack() as outage:
            for name, what in OUTAGES.items():
                for host, port in hosts[name] if what is not None else ():
                    outage.enter_context(Broken(what, port, host))
            for name in OUTAGES:
                for _ in range(MESSAGES):
                    relay.send(MESSAGE, "a@b.example", f"c@{name}.test")
            wait_for(lambda: len(states(relay)) == len(OUTAGES), what="all sites to be down")
            relay.cli("queue", "flush", "--all")  # all mail at once, over as many connections as the window allows
            wait_for(lambda: len(states(relay)) == len(OUTAGES), what="all sites to be down again")
            time.sleep(4)  # in which they are probed
            for name, state in states(relay).items():
                assert state["value"] <= 2, f"{name}: {state['value']} failures of two waves"
                assert state["until"] - state["since"] <= 2 * HOUR * 1.2
            # Another worker may start a new wave first, and charges a message of its own.
            deferred = [event["recipient"].partition("@")[2] for event in relay.events("deferred")]
            assert all(deferred.count(f"{name}.test") <= 3 * workers for name in OUTAGES), deferred
        peers = {
            name: [
                stack.enter_context(FakeMx({}, port, host=host, tls=context if name == "tls" else None))
                for host, port in addresses
            ]
            for name, addresses in hosts.items()
        }
        for name, found in peers.items():
            wait_for(lambda found=found: sum(len(p.messages) for p in found) == MESSAGES, 30, f"all mail for {name}")
        wait_for(lambda: states(relay) == {}, what="nothing to be down any more")
        wait_for(lambda: relay.summary() == [])
        assert relay.events("bounced") == []


def test_five_connections_lost_at_once_delay_the_rest_by_a_second(tmp_path):
    """With messages under way on all of them. Those are deferred by the schedule, which begins with two seconds."""
    port = free_port()

    class Slow(dict[str, bytes]):
        def get(self, key: str, default: Any = None) -> Any:
            time.sleep(0.05)
            return default

    with Relay(tmp_path, f"127.0.0.1:{port}", "delivery.first_retry=2") as relay:
        with FakeMx({"DOT": Slow()}, port) as peer:
            threads = [threading.Thread(target=lambda: [relay.send() for _ in range(20)]) for _ in range(5)]
            for thread in threads:
                thread.start()
            wait_for(lambda: peer.most_open == 5)
            for thread in threads:
                thread.join()
        first = {data for _, _, data in peer.messages}
        wait_for(lambda: any(event["state"] == "down" for event in relay.events("site")))
        time.sleep(1)
        with FakeMx({}, port) as again:
            wait_for(lambda: relay.summary() == [] and len(relay.events("delivered")) == 100, 15, "the rest")
            assert len(first | {data for _, _, data in again.messages}) == 100
        assert len([event for event in relay.events("site") if event["state"] == "down"]) <= 2


def test_mail_that_a_reply_deferred_keeps_its_schedule(tmp_path):
    """A message that was deferred by 450 is not due sooner because its host was down meanwhile."""
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", f"delivery.first_retry={HOUR}") as relay:
        with FakeMx({"RCPT": {"late@d.example": b"450 4.2.1 later\r\n"}}, port):
            relay.send(MESSAGE, "a@b.example", "late@d.example")
            wait_for(lambda: relay.events("deferred"))
        relay.send(MESSAGE, "a@b.example", "now@d.example")
        wait_for(lambda: relay.events("site"))
        with FakeMx({}, port) as peer:
            wait_for(lambda: peer.messages)
            time.sleep(1)
            assert [to for _, to, _ in peer.messages] == [["now@d.example"]]
            (row,) = relay.summary()
            assert (row["messages"], row["parked"]) == (1, False)


@pytest.mark.parametrize("what", ["all", "a worker"])
def test_queues_that_slept_when_a_process_died_wake_when_the_site_is_up(tmp_path, what):
    """Without new mail for the site."""
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", f"delivery.first_retry={HOUR}", workers=2) as relay:
        for _ in range(8):
            relay.send()
        wait_for(lambda: "smarthost" in relay.cli("shaping", "active").stdout)
        wait_for(lambda: relay.summary()[0]["parked"])
        time.sleep(0.3)
        if what == "all":
            relay.kill()
            relay.start()
        else:
            os.kill(relay.worker_pids()[0], signal.SIGKILL)
        with FakeMx({}, port) as peer:
            wait_for(lambda: len(peer.messages) == 8, what="all mail")


def test_another_connection_is_opened_beside_stalled_ones(tmp_path):
    """Connections accepted before the host was restarted are never answered; new ones are."""

    class Stuck(FakeMx):
        def _talk(self, sock: socket.socket) -> None:
            if self.connections <= 5:
                time.sleep(3600)
            super()._talk(sock)

    with Stuck({}) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.connect_timeout=300") as relay:
        for _ in range(MESSAGES):
            relay.send()
        wait_for(lambda: len(peer.messages) == MESSAGES)
        assert relay.events("deferred") == []


def test_a_suspended_site_is_not_probed(tmp_path):
    with Relay(tmp_path, f"127.0.0.1:{(port := free_port())}", f"delivery.first_retry={HOUR}") as relay:
        relay.send()
        wait_for(lambda: relay.events("deferred"))
        relay.cli("site", "suspend", "smarthost", "--for", "1h", "--reason", "maintenance")
        with FakeMx({}, port) as peer:
            time.sleep(5)
            assert peer.connections == 0
            relay.cli("site", "resume", "smarthost")
            wait_for(lambda: peer.messages)


def test_two_workers_probe_as_often_as_one(tmp_path):
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", f"delivery.first_retry={HOUR}", workers=2) as relay:
        for _ in range(8):
            relay.send()
        wait_for(lambda: "smarthost" in relay.cli("shaping", "active").stdout)
        with Broken(busy, port) as peer:
            time.sleep(8)
            assert 1 <= peer.connections <= 5, "every two seconds"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("refusal", [b"535 5.7.8 no\r\n", b"535\r\n", b"454 4.7.0 not now\r\n"])
def test_a_host_that_rejects_the_login_is_not_tried_again_and_again(tmp_path, context, refusal, workers):
    """Or accounts would be locked."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "password").write_text("wrong")
    with FakeMx({}, tls=server, auth=(b"PLAIN", lambda line: refusal)) as peer:
        login = f'tls="verify",username="me",password_file="{tmp_path / "password"}"'
        route = f'route=[{{hosts=["localhost:{peer.port}"],{login}}}]'
        relay = Relay(tmp_path, None, route, f"delivery.first_retry={HOUR}", workers=workers)
        relay.environment["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
        with relay:
            relay.send()
            wait_for(lambda: relay.events("deferred"))
            for _ in range(8):
                relay.send()
            time.sleep(6)
            assert peer.commands.count("AUTH") == 1


BANNERS = [
    # the first octets from a smart host, and whether they are a greeting (RFC 5321 3.1)
    (b"220 here\r\n", True),
    (b"220-here\r\n220 I am\r\n", True),
    (b"421 4.3.2 not now\r\n", False),
    (b"554 5.3.2 no\r\n", False),
    (b"220", False),
    (b"", False),
    (b"x" * 200_000, False),
]


@pytest.mark.parametrize("implicit", ["", "encrypt", "may"], ids=["plain", "TLS", "optional TLS"])
@pytest.mark.parametrize(("banner", "greets"), BANNERS)
async def test_a_smart_host_is_up_when_it_greets(monkeypatch, context, banner, greets, implicit):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(banner)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context if implicit else None)
    port = server.sockets[0].getsockname()[1]
    if implicit:
        monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", port)
    monkeypatch.setattr("relaymta.send.opener.PROBE_EVERY", 0.01)
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}]})
    opener = Opener(config, Any, Quiet(), Any, Any)  # type: ignore[arg-type]
    opener._down["h"] = "refused"
    probe = asyncio.ensure_future(opener._probe(Peer("localhost", "127.0.0.1", port), "h", implicit or "encrypt"))
    await asyncio.wait([probe], timeout=5 if greets else 0.3)
    assert probe.done() == greets
    assert opener._down == ({} if greets else {"h": "refused"})
    probe.cancel()
    server.close()


class Quiet(Log):
    def __init__(self) -> None:
        pass

    def event(self, event: str, **fields: Any) -> None:
        pass
