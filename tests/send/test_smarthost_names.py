"""The names of smart hosts: who is asked for them, all of their addresses, and what is not there."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from relaymta.config import Config, Route
from relaymta.dns import DnsFailure, NoData, NoSuchName
from relaymta.route.shaping import Shaping
from relaymta.route.sites import Site
from relaymta.send import opener as opening
from relaymta.send.connect import ConnectFailed, Peer
from relaymta.send.opener import Opener
from relaymta.send.session import Link
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need
from tests.support.resolver import nameserver_with
from tests.support.rows import Row, relay_for

ZONE = [
    "good.test. A 127.0.0.1", "two.test. AAAA 2001:db8::1", "two.test. A 127.0.0.77", "two.test. A 127.0.0.1",
    "alias.test. CNAME good.test.", "empty.test. MX 10 good.test.",
]  # fmt: skip


FOUND = ["good.test", "good.test.", "GOOD.test", "alias.test", "two.test", "localhost", "localhost."]
NOT_FOUND = {
    "gone.test": "it does not exist",
    "empty.test": "it has no address of IPv6 or IPv4",
    "servfail.example": "servfail",
}
BOTH = "gone.test and good.test"


class Sent(NamedTuple):
    nameserver: str
    hosts: dict[str, tuple[FakeMx, Row]]


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sent]:
    """One relay with a route to each of FOUND and NOT_FOUND and to BOTH, and one message under way to each."""
    folder = tmp_path_factory.mktemp("names")
    with ExitStack() as stack:
        nameserver = stack.enter_context(nameserver_with(folder, ZONE))
        found = {}
        for number, host in enumerate([*FOUND, *NOT_FOUND, BOTH]):
            peer = stack.enter_context(FakeMx({}))
            # Each smart host has a port of its own, since a relay remembers which ones are down.
            places = [f"gone.test:{free_port()}", f"good.test:{peer.port}"] if host == BOTH else [f"{host}:{peer.port}"]
            found[host] = peer, Row(f"row-{number}", *places)
        settings = [f'delivery.nameservers=["{nameserver}"]', "delivery.connect_timeout=2", "delivery.first_retry=3600"]
        stack.enter_context(relay_for(folder, [row for _, row in found.values()], *settings))
        for _, row in found.values():
            row.send()
        yield Sent(nameserver, found)


@pytest.mark.parametrize("host", FOUND)
def test_our_name_servers_are_asked_for_smart_hosts(sent, host):
    """All addresses are tried, and names in /etc/hosts and localhost go on working."""
    peer, row = sent.hosts[host]
    wait_for(lambda: peer.messages)
    (event,) = wait_for(lambda: row.events("delivered"))
    assert (event["peer"], event["address"]) == (host.rstrip("."), "127.0.0.1")
    assert not row.events("deferred") and not [text for text in row.warnings(f":{peer.port}") if "smart host" in text]


@pytest.mark.parametrize("host", NOT_FOUND)
def test_a_smart_host_that_is_not_found_is_a_temporary_failure(sent, host):
    """Postfix 3.7: "Don't bounce mail after a host lookup problem with a relayhost"."""
    _, row = sent.hosts[host]
    (deferred,) = wait_for(lambda: row.events("deferred"))
    assert deferred["reply"].startswith("4.4.3 ") and host in deferred["reply"] and sent.nameserver in deferred["reply"]
    assert NOT_FOUND[host] in deferred["reply"].lower() or NOT_FOUND[host] in deferred["reply"]
    assert deferred["cause"] == "dns"
    assert (row.events("site")[0]["cause"], row.events("site")[0]["fault"]) == ("dns", "dns")


def test_the_next_smart_host_is_used_while_a_name_cannot_be_looked_up(sent):
    peer, row = sent.hosts[BOTH]
    wait_for(lambda: peer.messages)
    assert not row.events("deferred")
    wait_for(lambda: any("is down" in text for text in row.warnings("smart host gone.test:")), what="the warning")


# Without sockets


class Names:
    """A resolver of smart hosts."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    async def host(self, name: str, families: str) -> list[str]:
        self.asked.append((name, families))
        found = self.answers.get(name, NoSuchName(name))
        if isinstance(found, Exception):
            raise found
        return list(found)


class Log:
    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append(fields["text"])


class Opened(str):
    """Stands for a session."""

    core = SimpleNamespace(features=SimpleNamespace(chunking=False))
    link = Link()


def made(names: Names, monkeypatch: pytest.MonkeyPatch, up: set[str], **delivery: Any) -> tuple[Opener, Log, list[str]]:
    """An opener for which only the addresses `up` can be reached; those that were tried."""
    tried: list[str] = []

    async def connect(peer: Peer, *args: Any) -> Opened:
        tried.append(peer.address)
        if peer.address not in up:
            raise ConnectFailed("connect", f"{peer.name}: refused", category="refused")
        return Opened(f"{peer.name} {peer.address} {peer.port}")

    monkeypatch.setattr(opening, "connect", connect)
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "delivery": delivery})
    log = Log()
    return Opener(config, names, log, None, None), log, tried  # type: ignore[arg-type]


def site(*hosts: str, **keys: Any) -> Site:
    return Site("s", Route(hosts=list(hosts), **keys), None)


async def test_a_host_is_down_when_none_of_its_addresses_can_be_reached(monkeypatch):
    names = Names({"a.test.": ["2001:db8::1", "192.0.2.1"], "b.test": ["192.0.2.2"]})
    opener, log, tried = made(names, monkeypatch, {"192.0.2.1", "192.0.2.2"})
    assert await opener.open(site("a.test.:587", "b.test"), None) == "a.test 192.0.2.1 587"
    assert tried == ["2001:db8::1", "192.0.2.1"] and not log.events and [name for name, _ in names.asked] == ["a.test."]
    opener, log, tried = made(names := Names(names.answers), monkeypatch, {"192.0.2.2"})
    assert await opener.open(site("a.test.:587", "b.test", ip="4 6"), None) == "b.test 192.0.2.2 25"
    assert opener.down(site("a.test.:587", "b.test").route) == {"a.test.:587": "a.test: refused"}
    assert len(log.events) == 1 and names.asked == [("a.test.", "46"), ("b.test", "46")]
    opener.close()


@pytest.mark.parametrize(
    ("error", "nameservers", "tried"),
    [
        (NoSuchName("x"), ["192.0.2.53"], []),
        (NoData("x"), ["192.0.2.53"], []),
        (DnsFailure("x A: timeout"), ["192.0.2.53"], []),
        (NoSuchName("x"), [], ["x.test"]),  # getaddrinfo(3) may know it otherwise (nsswitch.conf)
        (DnsFailure("x A: timeout"), [], ["x.test"]),
    ],
)
async def test_a_name_that_is_not_found_is_never_permanent(monkeypatch, error, nameservers, tried):
    opener, _, seen = made(Names({"x.test": error}), monkeypatch, set(), nameservers=nameservers)
    with pytest.raises(ConnectFailed) as failed:
        await opener.open(site("x.test"), None)
    assert seen == tried
    if not tried:
        assert (failed.value.category, failed.value.enhanced, failed.value.fault) == ("dns", "4.4.3", "dns")
        assert "192.0.2.53" in str(failed.value) and "192.0.2.53" not in failed.value.public


async def test_the_probe_looks_the_name_up_again(monkeypatch):
    names = Names({"a.test": ["192.0.2.1"], "b.test": ["192.0.2.2"]})
    opener, log, _ = made(names, monkeypatch, {"192.0.2.2"})
    monkeypatch.setattr(opening, "PROBE_EVERY", 0.01)
    greeted: list[str] = []

    async def greets(peer: Peer, tls: str) -> bool:
        greeted.append(peer.address)
        return peer.address == "192.0.2.9"

    monkeypatch.setattr(opening, "_greets", greets)
    await opener.open(site("a.test", "b.test"), None)
    names.answers["a.test"] = ["192.0.2.8", "192.0.2.9"]
    while opener._down:
        await asyncio.sleep(0.01)
    assert greeted[-2:] == ["192.0.2.8", "192.0.2.9"] and log.events[-1] == "smart host a.test:25 can be reached again"


def test_limits_of_a_site_apply_to_a_name_with_a_dot_at_its_end():
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "site": [{"hosts": ["a.test"], "connections": 3}]})
    assert Shaping(config).shape(site("A.test.:587")).connections.value == 3


# resolv.conf


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a resolv.conf of its own needs root")
def test_a_changed_resolv_conf_is_noticed_by_a_running_relay(tmp_path: Path):
    """In a mount namespace of its own. The mail waits for an hour, and is sent at once when the name servers are right."""
    conf = tmp_path / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    able = subprocess.run(["unshare", "-m", "mount", "--bind", conf, "/etc/resolv.conf"], capture_output=True, check=False)
    if able.returncode:
        pytest.skip("no mount namespaces here")
    mount = ["unshare", "-m", "sh", "-c", f'mount --bind {conf} /etc/resolv.conf && exec "$@"', "sh"]
    port = free_port()
    with FakeMx({}, port) as peer:
        relay = Relay(tmp_path, None, f"delivery.port={port}", "delivery.first_retry=3600", wrap=tuple(mount))
        with relay:
            relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "x@mail.test")
            wait_for(lambda: relay.events("deferred"))
            with nameserver_at_port_53(tmp_path) as address:
                conf.write_text(f"nameserver {address}\n")
                wait_for(lambda: peer.messages)
            wait_for(lambda: any("resolv.conf has changed" in event["text"] for event in relay.events("warning")))


@contextmanager
def nameserver_at_port_53(folder: Path) -> Iterator[str]:
    """A name server that resolv.conf can name, which knows no ports: its address."""
    conf = folder / "unbound53.conf"
    conf.write_text(
        'server:\n  interface: 127.0.0.53@53\n  do-daemonize: no\n  chroot: ""\n  username: ""\n  pidfile: ""\n'
        f'  use-syslog: no\n  access-control: 127.0.0.0/8 allow\n  directory: "{folder}"\n  local-zone: "test." static\n'
        '  local-data: "mail.test. A 127.0.0.1"\n'
    )
    process = subprocess.Popen([need("unbound"), "-c", str(conf)], stderr=(folder / "unbound53.err").open("wb"))
    try:
        yield "127.0.0.53"
    finally:
        process.terminate()
        process.wait()
