"""Outages: one failure, whatever the number of failed connections, and delivery resumes as soon as the site is found up."""

import asyncio
import os
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import trustme

from relaymta import control
from relaymta.config import Config
from relaymta.log import Log
from relaymta.send.connect import Peer
from relaymta.send.opener import Opener
from tests.conftest import PROVE
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.resolver import nameserver_with
from tests.support.together import together

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


def down(relay: Relay) -> list[dict[str, Any]]:
    """The states of the sites that are down."""
    states: list[dict[str, Any]] = control.ask(relay.spool / "control.sock", "site_states")
    return [state for state in states if state["kind"] == "dead"]


@pytest.fixture(scope="module")
def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(made)
    return made


class Hosts:
    """Of each kind of outage so many smart hosts (`smart`), and so many hosts by MX (`mx`), each kind at domains of its own."""

    def __init__(self, smart: int, mx: int) -> None:
        self.port = free_port()  # of those by MX
        self.addresses: dict[str, list[tuple[str, int]]] = {}
        self.zone: list[str] = []
        routes = []
        for position, kind in enumerate(OUTAGES):
            name, tls = f"smart-{kind}", "encrypt" if kind == "tls" else "may"
            self.addresses[name] = [("127.0.0.1", free_port()) for _ in range(smart)]
            listed = ",".join(f'"{host}:{port}"' for host, port in self.addresses[name])
            routes.append(f'{{name="{name}",recipient_domain=["{name}.test"],tls="{tls}",hosts=[{listed}]}}')
            name = f"mx-{kind}"
            self.addresses[name] = [(f"127.0.{10 + position}.{index + 1}", self.port) for index in range(mx)]
            self.zone += [f"{name}.test. MX 10 mx{index}.{name}.test." for index in range(mx)]
            self.zone += [f"mx{index}.{name}.test. A {address}" for index, (address, _) in enumerate(self.addresses[name])]
        routes.append('{name="tls",recipient_domain=["mx-tls.test"],tls="encrypt"}')
        self.settings = [f"route=[{','.join(routes)}]", f"delivery.port={self.port}"]
        self.names = sorted(self.addresses, key=len, reverse=True)  # "torn" is the begin of another one

    def states(self, relay: Relay) -> dict[str, dict[str, Any]]:
        """The sites that are down, by the name in their domain."""
        return {next(name for name in self.names if name in state["site"]): state for state in down(relay)}


PAIRS = [(1, 1, 2), (2, 2, 1)]
REST = [(3 - workers, smart, mx) for workers, smart, mx in PAIRS]


@pytest.mark.parametrize(("workers", "smart", "mx"), PAIRS + (REST if PROVE else []))
def test_an_outage_is_one_failure_and_ends_when_the_host_is_up(tmp_path, context, workers, smart, mx):
    """All kinds of outages at the same time, of smart hosts and of hosts by MX, each at a domain of its own."""
    hosts = Hosts(smart, mx)
    with ExitStack() as stack:
        nameserver = stack.enter_context(nameserver_with(tmp_path, hosts.zone))
        settings = [
            *hosts.settings,
            f'delivery.nameservers=["{nameserver}"]',
            f"delivery.first_retry={HOUR}",
            "queue.max_age=90d",
        ]
        relay = stack.enter_context(Relay(tmp_path, None, *settings, workers=workers))
        with ExitStack() as outage:
            for name, addresses in hosts.addresses.items():
                what = OUTAGES[name.partition("-")[2]]
                for host, port in addresses if what is not None else ():
                    outage.enter_context(Broken(what, port, host))
            for name in hosts.names:
                for _ in range(4):  # some to each worker
                    relay.send_all(MESSAGES // 4, MESSAGE, f"c@{name}.test")
            wait_for(lambda: len(hosts.states(relay)) == len(hosts.names), what="all sites to be down")
            relay.cli("queue", "flush", "--all")  # all mail at once, over as many connections as the window allows
            wait_for(lambda: len(hosts.states(relay)) == len(hosts.names), what="all sites to be down again")
            time.sleep(4)  # in which they are probed
            for name, state in hosts.states(relay).items():
                assert state["value"] <= 2, f"{name}: {state['value']} failures of two waves"
                assert state["until"] - state["since"] <= 2 * HOUR * 1.2, name
            # Another worker may start a new wave first, and charges a message of its own.
            deferred = [event["recipient"].partition("@")[2] for event in relay.events("deferred")]
            assert all(deferred.count(f"{name}.test") <= 3 * workers for name in hosts.names), deferred
        peers = {
            name: [
                stack.enter_context(FakeMx({}, port, host=host, tls=context if name.endswith("-tls") else None))
                for host, port in addresses
            ]
            for name, addresses in hosts.addresses.items()
        }
        for name, found in peers.items():
            wait_for(lambda found=found: sum(len(p.messages) for p in found) == MESSAGES, 30, f"all mail for {name}")
        wait_for(lambda: down(relay) == [], what="nothing to be down any more")
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


@pytest.mark.parametrize("what", ["all", "a worker"])
def test_queues_that_slept_when_a_process_died_wake_when_the_site_is_up(tmp_path, what):
    """Without new mail for the site."""
    port = free_port()
    with Relay(tmp_path, f"127.0.0.1:{port}", f"delivery.first_retry={HOUR}", workers=2) as relay:
        for _ in range(8):
            relay.send()
        wait_for(lambda: [state["site"] for state in down(relay)] == ["smarthost"])
        wait_for(lambda: relay.summary()[0]["parked"])
        time.sleep(0.3)
        if what == "all":
            relay.kill()
            relay.start()
        else:
            os.kill(relay.worker_pids()[0], signal.SIGKILL)
        with FakeMx({}, port) as peer:
            wait_for(lambda: len(peer.messages) == 8, what="all mail")


# What the host of a site does, all at the same time on one relay: each function is a check of one site, which has the name of the
# function, the host 127.0.0.1:`port` and the domain `site`.test.


def of_site(relay: Relay, event: str, site: str) -> list[dict[str, Any]]:
    """The events of a site's route."""
    return [row for row in relay.events(event) if row["route"] == site]


def mail_that_a_reply_deferred_keeps_its_schedule(relay: Relay, site: str, port: int) -> None:
    """A message that was deferred by 450 is not due sooner because its host was down meanwhile."""
    late, now = f"late@{site}.test", f"now@{site}.test"
    with FakeMx({"RCPT": {late: b"450 4.2.1 later\r\n"}}, port):
        relay.send(MESSAGE, "a@b.example", late)
        wait_for(lambda: of_site(relay, "deferred", site))
    relay.send(MESSAGE, "a@b.example", now)
    wait_for(lambda: of_site(relay, "site", site))
    with FakeMx({}, port) as peer:
        wait_for(lambda: peer.messages)
        time.sleep(1)
        assert [to for _, to, _ in peer.messages] == [[now]]
        (row,) = [row for row in relay.summary() if site in row["queue"]]
        assert (row["messages"], row["parked"]) == (1, False)


def another_connection_is_opened_beside_stalled_ones(relay: Relay, site: str, port: int) -> None:
    """Connections accepted before the host was restarted are never answered; new ones are."""

    class Stuck(FakeMx):
        def _talk(self, sock: socket.socket) -> None:
            if self.connections <= 5:
                time.sleep(3600)
            super()._talk(sock)

    with Stuck({}, port) as peer:
        for _ in range(MESSAGES):
            relay.send(MESSAGE, "a@b.example", f"c@{site}.test")
        wait_for(lambda: len(peer.messages) == MESSAGES)
        assert of_site(relay, "deferred", site) == []


def a_suspended_site_is_not_probed(relay: Relay, site: str, port: int) -> None:
    relay.send(MESSAGE, "a@b.example", f"c@{site}.test")
    wait_for(lambda: of_site(relay, "deferred", site))
    control.ask(relay.spool / "control.sock", "suspend", site=site, about="", seconds=HOUR, reason="maintenance")
    with FakeMx({}, port) as peer:
        time.sleep(5)
        assert peer.connections == 0
        assert control.ask(relay.spool / "control.sock", "clear", kind="", site=site, about="", resume=True)
        wait_for(lambda: peer.messages)


def all_workers_together_probe_every_two_seconds(relay: Relay, site: str, port: int) -> None:
    for _ in range(8):
        relay.send(MESSAGE, "a@b.example", f"c@{site}.test")
    wait_for(lambda: site in [state["site"] for state in down(relay)])
    began = time.monotonic()
    with Broken(busy, port) as peer:
        time.sleep(8)
        wait_for(lambda: peer.connections)
        assert peer.connections <= (time.monotonic() - began) / 2 + 1


CHECKS = [
    mail_that_a_reply_deferred_keeps_its_schedule,
    another_connection_is_opened_beside_stalled_ones,
    a_suspended_site_is_not_probed,
    all_workers_together_probe_every_two_seconds,
]
REFUSALS = {"permanent": b"535 5.7.8 no\r\n", "permanent, without text": b"535\r\n", "temporary": b"454 4.7.0 not now\r\n"}


def a_host_that_rejects_the_login_is_not_tried_again_and_again(relay: Relay, site: str, peer: FakeMx) -> None:
    """Or accounts would be locked."""
    relay.send(MESSAGE, "a@b.example", f"c@{site}.test")
    wait_for(lambda: of_site(relay, "deferred", site))
    time.sleep(1)  # until the other worker has heard of it
    for _ in range(8):
        relay.send(MESSAGE, "a@b.example", f"c@{site}.test")
    time.sleep(5)
    assert peer.commands.count("AUTH") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_sites_whose_hosts_are_down_stalled_or_unwilling(tmp_path, workers):
    """All of CHECKS, and each of REFUSALS of a login."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "password").write_text("wrong")
    login = f'tls="verify",username="me",password_file="{tmp_path / "password"}"'
    checks: dict[str, Callable[[Relay], None]] = {}
    routes = []
    with ExitStack() as stack:
        for check in CHECKS:
            site, port = check.__name__.replace("_", "-"), free_port()
            checks[site] = partial(check, site=site, port=port)
            routes.append(f'{{name="{site}",recipient_domain=["{site}.test"],hosts=["127.0.0.1:{port}"]}}')
        for number, (kind, refusal) in enumerate(REFUSALS.items()):
            site, answer = f"login-{number}", partial(_always, refusal)
            peer = stack.enter_context(FakeMx({}, tls=server, auth=(b"PLAIN", answer)))
            checks[f"login, {kind}"] = partial(a_host_that_rejects_the_login_is_not_tried_again_and_again, site=site, peer=peer)
            routes.append(f'{{name="{site}",recipient_domain=["{site}.test"],hosts=["localhost:{peer.port}"],{login}}}')
        settings = (f"route=[{','.join(routes)}]", f"delivery.first_retry={HOUR}", "delivery.connect_timeout=300")
        relay = Relay(tmp_path, None, *settings, workers=workers)
        relay.environment["SSL_CERT_FILE"] = str(tmp_path / "ca.pem")
        with relay:
            together({name: partial(check, relay) for name, check in checks.items()})


def _always(answer: bytes, line: bytes) -> bytes:
    return answer


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
    served = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(writer)
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
    async with asyncio.timeout(60):
        while not probe.done() and (greets or len(served) < 3):  # the second probe has ended when the third begins
            await asyncio.sleep(0.01)
    assert probe.done() == greets
    assert opener._down == ({} if greets else {"h": "refused"})
    probe.cancel()
    server.close()


class Quiet(Log):
    def __init__(self) -> None:
        pass

    def event(self, event: str, **fields: Any) -> None:
        pass
