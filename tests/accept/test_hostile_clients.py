"""Clients that send nothing, or too early; proxied clients; what all of them take, and that it is given back."""

import asyncio
import contextlib
import os
import signal
import smtplib
import socket
import ssl
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

from relaymta.accept import acceptor
from relaymta.accept.acceptor import Acceptor
from relaymta.accept.listening import Listening, client_address
from relaymta.accept.origin import Client
from relaymta.config import Config, Listener
from relaymta.proto.proxy import Header
from relaymta.proto.transaction import Limits as SessionLimits
from relaymta.shm import Shared
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.descriptors import no_descriptors
from tests.support.fake_mx import FakeMx
from tests.support.programs import need

TEXT = "Subject: x\r\n\r\nx\r\n"
V2 = b"\r\n\r\n\x00\r\nQUIT\n"


class Guard(Relay):
    """A relay with a plain listener, one behind a load balancer at 127.0.0.1, one with implicit TLS, and one with both."""

    def __init__(self, folder: Path, smarthost: str, *settings: str, wrap: tuple[str, ...] = ()) -> None:
        self.proxied, self.implicit, self.both = free_port(), free_port(), free_port()
        self.authority = trustme.CA()
        made = self.authority.issue_cert("relay.example")
        pem = b"".join(blob.bytes() for blob in made.cert_chain_pems) + made.private_key_pem.bytes()
        (folder / "relay.example.pem").write_bytes(pem)
        super().__init__(folder, smarthost, *settings, wrap=wrap)

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        listeners = ", ".join(
            f'{{address="127.0.0.1:{port}"{more}}}'
            for port, more in (
                (self.port, ""),
                (self.proxied, ', proxy=["127.0.0.1/32"]'),
                (self.implicit, ', tls="implicit"'),
                (self.both, ', tls="implicit", proxy=["127.0.0.1/32"]'),
            )
        )
        certificate = f'certificate=[{{chain="{self.folder}/relay.example.pem"}}]'
        return [*found[:at], "--set", f"listener=[{listeners}]", "--set", certificate, *found[at + 2 :]]

    def context(self) -> ssl.SSLContext:
        found = ssl.create_default_context()
        self.authority.configure_trust(found)
        return found

    def descriptors(self) -> int:
        (pid,) = self.worker_pids()
        return len(os.listdir(f"/proc/{pid}/fd"))

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Stop the worker, so that all that a client does meanwhile has happened when it is processed."""
        (pid,) = self.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
            time.sleep(0.1)
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


def reach(port: int, source: str = "127.0.0.1") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 10, source_address=(source, 0))
    sock.settimeout(10)
    return sock


def reset(sock: socket.socket) -> None:
    """Close a socket with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def received(sock: socket.socket) -> bytes:
    """The next octets, b"" at the end of the connection."""
    try:
        return sock.recv(1000)
    except ConnectionError:
        return b""


# The identity of a client


@pytest.mark.parametrize(
    ("sent", "peer", "client"),
    [
        ("192.0.2.1", "10.0.0.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "10.0.0.1", "192.0.2.1"),  # RFC 4291 2.5.5.2
        ("2001:db8::1", "10.0.0.1", "2001:db8::1"),
        ("", "10.0.0.1", ""),  # LOCAL, UNKNOWN
        ("0.0.0.0", "10.0.0.1", ""),
        ("::", "10.0.0.1", ""),
        ("::ffff:0.0.0.0", "10.0.0.1", ""),
        ("224.0.0.1", "10.0.0.1", ""),
        ("ff02::1", "10.0.0.1", ""),
        ("255.255.255.255", "10.0.0.1", ""),
        ("127.0.0.1", "127.0.0.2", "127.0.0.1"),
        ("127.0.0.1", "::1", "127.0.0.1"),
        ("127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "10.0.0.1", ""),  # the load balancer's machine
        ("::ffff:127.0.0.1", "10.0.0.1", ""),
        ("::1", "fe80::1%eth0", ""),
    ],
)
def test_the_client_address_in_a_proxy_header(sent, peer, client):
    assert client_address(Header(10, sent), peer) == client


def second(command: int, family: int, body: bytes) -> bytes:
    return V2 + struct.pack(">BBH", 0x20 | command, family, len(body)) + body


@pytest.mark.parametrize(
    ("header", "replies"),
    [
        (b"PROXY TCP4 127.0.0.1 127.0.0.1 1 25\r\n", [220, 250, 250, 250]),
        (b"PROXY TCP6 ::ffff:127.0.0.1 ::1 1 25\r\n", [220, 250, 250, 250]),
        (b"PROXY UNKNOWN\r\n", [220, 250, 250, 550]),
        (b"PROXY UNKNOWN 127.0.0.1 127.0.0.1 1 25\r\n", [220, 250, 250, 550]),
        (b"PROXY TCP4 0.0.0.0 127.0.0.1 1 25\r\n", [220, 250, 250, 550]),
        (second(1, 0x11, bytes([127, 0, 0, 1, 127, 0, 0, 1, 0, 1, 0, 25])), [220, 250, 250, 250]),
        (second(0, 0x00, b""), [220, 250, 250, 550]),  # LOCAL: a health check
        (second(0, 0x11, bytes([127, 0, 0, 1, 127, 0, 0, 1, 0, 1, 0, 25])), [220, 250, 250, 550]),
        (second(1, 0x00, b""), [220, 250, 250, 550]),  # AF_UNSPEC
        (second(1, 0x31, bytes(216)), [220, 250, 250, 550]),  # AF_UNIX
        (second(1, 0x31, bytes(100)), []),
        (second(1, 0x12, bytes(12)), []),  # UDP
        (b"PROXY TCP6 fe80::1%lo ::1 1 25\r\n", []),
    ],
)
def test_a_client_of_unknown_address_has_no_rights(guard, header, replies):
    """The load balancer's own address may relay, but its clients may not."""
    with reach(guard.proxied) as sock:
        sock.sendall(header)
        codes = []
        for command in (b"EHLO me\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b""):
            reply = received(sock)
            if not reply:
                break
            codes.append(int(reply[:3]))
            if command:
                sock.sendall(command)
        assert codes == replies


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_behind_haproxy_a_unix_socket_and_a_health_check_have_no_rights(guard, tmp_path, version):
    """The former has no address, the latter is haproxy's own; and data before the banner is detected through haproxy, too."""
    program, port = need("haproxy"), free_port()
    (tmp_path / "haproxy.cfg").write_text(
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n timeout check 5s\n"
        f"listen smtp\n bind 127.0.0.1:{port}\n bind unix@{tmp_path}/sock\n option smtpchk EHLO checker.example\n"
        f" server relay 127.0.0.1:{guard.proxied} check inter 200ms fall 1 rise 1 {version}\n"
    )
    before = guard.metric('relaymta_connections_total{result="accepted"}')
    balancer = subprocess.Popen([program, "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (tmp_path / "sock").exists())
        wait_for(lambda: guard.metric('relaymta_connections_total{result="accepted"}') > before + 2, what="health checks")
        for family, address, expected in (
            (socket.AF_INET, ("127.0.0.1", port), b"250"),
            (socket.AF_UNIX, f"{tmp_path}/sock", b"550"),
        ):
            with socket.socket(family) as sock:
                sock.settimeout(10)
                sock.connect(address)
                for command in (b"EHLO me\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n"):
                    assert received(sock)[:1] == b"2"
                    sock.sendall(command)
                assert received(sock).startswith(expected)
        with guard.standing_still():
            sock = reach(port)
            sock.sendall(b"EHLO early\r\n")
        with sock:
            assert received(sock)[:3] in (b"554", b"")  # haproxy may pass on the reset first
    finally:
        balancer.terminate()
        balancer.wait()


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Iterator[Guard]:
    with Guard(tmp_path_factory.mktemp("guard"), "127.0.0.1:1") as made:
        yield made


def test_a_client_that_resets_before_accept_is_refused_and_a_drain_does_not_wait_for_silent_ones(peer, tmp_path):
    """A whole dialog has arrived, its first octet urgent, and then a reset: the address can no longer be read."""
    words = b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nBDAT 14 LAST\r\nSubject: x\r\n\r\n"
    with Guard(tmp_path, f"127.0.0.1:{peer.port}", 'relay.networks=["127.0.0.1/32"]') as relay:
        with relay.standing_still():
            for _ in range(3):
                sock = reach(relay.port, "127.0.0.2")
                sock.send(words[:1], socket.MSG_OOB)
                sock.sendall(words[1:])
                time.sleep(0.05)
                reset(sock)
        wait_for(lambda: relay.metric('relaymta_connections_total{result="refused"}') == 3)
        assert relay.metric('relaymta_connections_total{result="accepted"}') == 0
        assert not relay.events("queued")
        relay.send_from("127.0.0.1")
        wait_for(lambda: len(peer.messages) == 1)
        ours = [reach(port) for port in (relay.proxied, relay.implicit, relay.both) for _ in range(5)]
        wait_for(lambda: relay.metric("relaymta_connections") == 15)
        assert relay.stop() == 0
        assert [received(sock) for sock in ours] == [b""] * 15


# Data before the banner


@pytest.mark.parametrize("words", [(b"EHLO x\r\n", b""), (b"", b"E"), (b"EHLO ", b"x"), (b"\x80", b"\xff")])
@pytest.mark.parametrize("listener", ["plain", "proxied"])
def test_a_client_that_sends_before_the_banner_is_rejected(guard, listener, words):
    with guard.standing_still():
        sock = reach(guard.port if listener == "plain" else guard.proxied)
        if listener == "proxied":
            sock.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 1 25\r\n")
        sock.sendall(words[0])
        if words[1]:
            sock.send(words[1], socket.MSG_OOB)
    with sock:
        assert received(sock).startswith(b"554 5.5.1")
        assert received(sock) == b""


def test_a_client_that_sends_with_the_end_of_its_handshake_is_rejected(guard):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = guard.context().wrap_bio(incoming, outgoing, server_hostname="relay.example")
    with reach(guard.implicit) as sock:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(65536))
        tls.write(b"EHLO early\r\n")
        sock.sendall(outgoing.read())  # in one segment: before any banner could arrive
        banner = b""
        while not banner:
            incoming.write(sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                banner = tls.read(1000)
        assert banner.startswith(b"554 5.5.1")


def test_urgent_data_is_data(guard):
    """A filter between the client and the relay sees the same stream."""
    with reach(guard.port) as sock:
        assert received(sock).startswith(b"220")
        sock.sendall(b"NO")
        sock.send(b"O", socket.MSG_OOB)
        sock.sendall(b"P\r\n")
        assert received(sock).startswith(b"250")


# Resources


def silent(relay: Guard, port: int, count: int, source: str) -> list[socket.socket]:
    """Open connections that send nothing, as many as are accepted."""
    found = []
    for _ in range(count):
        sock = socket.socket()
        sock.bind((source, 0))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect(("127.0.0.1", port))
        found.append(sock)
    return found


def ends(socks: list[socket.socket]) -> None:
    """Disconnect in every way."""
    for number, sock in enumerate(socks):
        with contextlib.suppress(OSError):
            way = number % 5
            if way == 1:
                sock.send(b"PROXY TCP4 192.0.2.1 ")
            elif way == 2:
                sock.send(b"\x16\x03\x01\x02\x00\x01\x00garbage\r\n")
            elif way == 3:
                sock.shutdown(socket.SHUT_WR)
            elif way == 4:
                sock.send(b"EHLO x\r\n")
        if number % 2:
            reset(sock)
        else:
            sock.close()


def test_silent_clients_exhaust_neither_connections_nor_descriptors(peer, tmp_path):
    """180 sockets in the PROXY header and 1,000 in the handshake, with 256 descriptors: other clients are served, even where that
    needs files of the spool; and everything is given back."""
    settings = ("limits.connections=100", "limits.connections_per_client=20", 'relay.networks=["127.0.0.9/32"]')
    limit = ("prlimit", "--nofile=256:256")
    with Guard(tmp_path, f"127.0.0.1:{peer.port}", *settings, wrap=limit) as relay:
        relay.send_from("127.0.0.9")
        before = relay.descriptors()
        for _ in range(2):
            ours = silent(relay, relay.proxied, 180, "127.0.0.1")
            for number in range(50):
                ours += silent(relay, relay.implicit, 20, f"127.0.1.{number}")
            ours += silent(relay, relay.both, 50, "127.0.0.1")
            wait_for(lambda: relay.metric("relaymta_connections") > 20)
            relay.send_from("127.0.0.9")
            relay.send_from("127.0.0.9", "Subject: large\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000)
            assert relay.metric("relaymta_connections") <= 60
            assert relay.descriptors() < before + 80
            ends(ours)
            wait_for(lambda: relay.metric("relaymta_connections") == 0, 60)
        wait_for(lambda: len(peer.messages) == 5)
        wait_for(lambda: relay.descriptors() <= before + 2, 60)
        served = []
        for number in range(5):  # every unit was given back: 100 in all, 20 of each client
            served += [reach(relay.port, f"127.0.2.{number}") for _ in range(20)]
            assert all(received(sock).startswith(b"220") for sock in served[-20:])
            with reach(relay.port, f"127.0.2.{number}") as sock:
                assert received(sock).startswith(b"421")
        with reach(relay.port, "127.0.3.1") as sock:
            assert b"Too many connections" in received(sock)
        for sock in served:
            sock.close()


def test_large_messages_leave_the_spool_its_descriptors(peer, tmp_path):
    """60 at once, with 128 descriptors of which 64 are for clients: a small message is accepted meanwhile, and a large one
    afterwards."""
    large, limit = b"Subject: large\r\n\r\n" + b"never the whole of it\r\n" * 60_000, ("prlimit", "--nofile=128:128")
    with Guard(tmp_path, f"127.0.0.1:{peer.port}", 'relay.networks=["127.0.0.1/32"]', wrap=limit) as relay:
        before, ours = relay.descriptors(), []
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=30) as other:
            for _ in range(60):
                ours.append(reach(relay.port))
                assert received(ours[-1]).startswith(b"220")
            for sock in ours:
                sock.sendall(b"EHLO me\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nBDAT %d\r\n" % (len(large) + 1))
                sock.sendall(large)
            refused = 'relaymta_messages_refused_total{reason="store"}'
            wait_for(lambda: relay.metric(refused) + relay.descriptors() - before > 60)
            other.sendmail("a@b.example", ["c@d.example"], TEXT)
            assert relay.metric(refused) > 50
        ends(ours)
        wait_for(lambda: relay.metric("relaymta_connections") == 0, 60)
        relay.send("Subject: large\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000)
        wait_for(lambda: len(peer.messages) == 2)
        wait_for(lambda: relay.descriptors() <= before + 2, 60)


def test_every_way_to_disconnect_before_smtp_releases_once(peer, tmp_path):
    settings = ("limits.connections_per_client=1", 'relay.networks=["192.0.2.0/24"]')
    with Guard(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
        before = relay.descriptors()
        proxy = b"PROXY TCP4 127.0.0.5 127.0.0.1 1 25\r\n"
        hello = b"\x16\x03\x01"
        for port, sent in (
            (relay.proxied, b""), (relay.proxied, b"PROXY "), (relay.proxied, proxy), (relay.proxied, b"nonsense\r\n"),
            (relay.proxied, proxy + b"EHLO x\r\n"), (relay.proxied, V2), (relay.both, b""), (relay.both, proxy),
            (relay.both, proxy + hello), (relay.both, proxy + b"nonsense\r\n"), (relay.implicit, b""), (relay.implicit, hello),
            (relay.implicit, b"nonsense\r\n"), (relay.port, b"STARTTLS\r\n"), (relay.port, b"EHLO x\r\nSTARTTLS\r\n"),
        ):  # fmt: skip
            for end in ("close", "reset", "half", "both"):
                sock = reach(port)
                if port == relay.port:
                    assert received(sock).startswith(b"220")
                sock.sendall(sent)
                time.sleep(0.02)
                with contextlib.suppress(OSError):  # the relay may have closed already
                    if end in ("half", "both"):
                        sock.shutdown(socket.SHUT_WR if end == "half" else socket.SHUT_RDWR)
                        time.sleep(0.02)
                reset(sock) if end == "reset" else sock.close()
                for source in ("127.0.0.1", "127.0.0.5"):  # one connection of each is admitted
                    wait_for(lambda source=source: admitted(relay.port, source), 10, f"a place after {sent!r}, {end}")
        wait_for(lambda: relay.metric("relaymta_connections") == 0)
        wait_for(lambda: relay.descriptors() <= before + 2)


def admitted(port: int, source: str) -> bool:
    with reach(port, source) as sock:
        sock.sendall(b"")
        return received(sock).startswith(b"220")


def test_a_header_and_a_handshake_have_a_deadline(guard):
    began = time.monotonic()
    with reach(guard.proxied) as first, reach(guard.proxied) as dripping:
        for octet in b"PROXY TCP":
            time.sleep(0.3)
            dripping.sendall(bytes([octet]))
        assert received(first) == received(dripping) == b""
        assert time.monotonic() - began > 4
    wait_for(lambda: guard.metric("relaymta_connections") == 0)


def test_a_client_that_half_closes_after_the_dot_gets_its_reply(guard):
    with reach(guard.port) as sock:
        received(sock)
        sock.sendall(b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
        wait_for(lambda: b"354" in received(sock))
        with guard.standing_still():
            sock.sendall(b"Subject: x\r\n\r\nx\r\n.\r\n")
            sock.shutdown(socket.SHUT_WR)
        assert received(sock).startswith(b"250")
        assert received(sock) == b""
        wait_for(lambda: guard.metric("relaymta_connections") == 0)


# The state of a listener


@pytest.mark.parametrize(
    ("calls", "accepts"),
    [
        (["resume", "resume"], True),
        (["resume", "pause"], False),
        (["resume", "pause", "resume"], True),
        (["resume", "close"], False),
        (["resume", "pause", "pause", "resume", "resume"], True),
        (["close", "resume"], False),
    ],
)
async def test_a_listener_is_as_the_last_call_wants(calls, accepts):
    loop, sock = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0))
    arrived: list[socket.socket] = []
    listening = Listening(loop, sock, lambda sock, peer: arrived.append(sock), lambda: None)
    with socket.create_connection(sock.getsockname()):
        for call in calls:
            getattr(listening, call)()
        await asyncio.sleep(0.1)
    assert len(arrived) == accepts
    listening.close()
    for one in arrived:
        one.close()


@pytest.mark.timeout(20)
async def test_a_listener_that_another_process_makes_block_blocks_nothing():
    loop, sock = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0))
    arrived: list[socket.socket] = []
    listening = Listening(loop, sock, lambda sock, peer: arrived.append(sock), lambda: None)
    listening.resume()
    with socket.socket(fileno=os.dup(sock.fileno())) as other, socket.create_connection(sock.getsockname()):
        other.setblocking(True)
        async with asyncio.timeout(10):
            while not arrived:
                await asyncio.sleep(0.01)
        arrived.pop().close()
    listening.close()


async def test_a_listener_without_descriptors_reports_it_once_and_waits():
    reported, arrived = [], []
    loop, sock = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0))
    clients = [socket.create_connection(sock.getsockname()) for _ in range(3)]
    reset(clients.pop())

    def scarce() -> None:
        reported.append(loop.time())
        listening.pause()

    listening = Listening(loop, sock, lambda sock, peer: arrived.append(sock), scarce)
    listening.resume()
    with no_descriptors():
        await asyncio.sleep(0.2)
        assert len(reported) == 1 and arrived == []
        listening.resume()  # needs none
        await asyncio.sleep(0.1)
        assert len(reported) == 2 and arrived == []
    listening.resume()
    await asyncio.sleep(0.1)
    assert len(arrived) >= 2
    listening.close()
    for one in (*arrived, *clients):
        one.close()


@pytest.mark.parametrize("proxy", [[], ["127.0.0.0/8"]])
async def test_descriptors_that_others_use_pause_the_listeners(proxy):
    """Whatever has them, and also where the limit is lowered meanwhile: it is read again."""
    bench = Bench(Listener(address="127.0.0.1:1", proxy=proxy))
    await bench.listen()
    acceptor, at_first = bench.acceptor, bench.acceptor.most
    assert not acceptor.paused
    with no_descriptors():
        acceptor._check()
        assert acceptor.paused and acceptor.most < at_first
        acceptor.freed()
        assert acceptor.paused
    acceptor._check()
    assert not acceptor.paused and acceptor.most == at_first
    bench.acceptor.stop_accepting()


# The counts


class Bench:
    """An acceptor with a stub for intake and endpoint, its limits, and listeners on sockets of its own."""

    def __init__(self, *settings: Listener, connections: int = 100, each: int = 50) -> None:
        limits = {"connections": connections, "connections_per_client": each}
        config = Config.model_validate({"listener": [listener.model_dump() for listener in settings], "limits": limits})
        self.counted: Counter[int] = Counter()
        intake = SimpleNamespace(
            client=lambda address: Client(address, address, False, each, "", "", SessionLimits(), False, "", "", ""),
            counters=SimpleNamespace(
                add=lambda cell, count: self.counted.update({cell: count}), histogram=lambda name: lambda value: None
            ),
            draining=False,
        )
        endpoint = SimpleNamespace(refresh=lambda loop, threads: None, certificates=SimpleNamespace(context=None), chains=None)
        self.limits = Shared.create().limits(0, 1)
        self.acceptor = Acceptor(config, intake, endpoint, self.limits, None)  # type: ignore[arg-type]
        self.config = config
        self.addresses: list[tuple[str, int]] = []

    async def listen(self) -> None:
        for listener in self.config.listener:
            sock = socket.create_server(("127.0.0.1", 0))
            self.addresses.append(sock.getsockname())
            self.acceptor.listen(sock, listener)

    def taken(self) -> tuple[int, int, int, int]:
        """Units of the machine and of the client; connections, and those before SMTP."""
        units = (self.limits.taken("connections"), self.limits.taken("client 127.0.0.1"))
        return (*units, len(self.acceptor.connections), len(self.acceptor.arriving))

    async def end(self) -> None:
        self.acceptor.stop_listening()
        await self.acceptor.drained(5)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0.01)


BALANCED = Listener(address="127.0.0.1:1", proxy=["127.0.0.0/8"])


async def test_the_oldest_before_smtp_is_evicted_and_all_count_from_accept_on():
    bench = Bench(BALANCED, connections=20, each=15)
    await bench.listen()
    first = [socket.create_connection(bench.addresses[0]) for _ in range(8)]
    await turns()
    assert bench.taken() == (8, 8, 8, 8)
    more = [socket.create_connection(bench.addresses[0]) for _ in range(5)]
    await turns()
    assert bench.taken() == (10, 10, 10, 10)
    gone = []
    for sock in (*first, *more):
        sock.settimeout(0.05)
        try:
            gone.append(sock.recv(10) == b"")
        except TimeoutError:
            gone.append(False)
    assert gone == [True] * 3 + [False] * 10
    await bench.end()
    assert bench.taken() == (0, 0, 0, 0)
    for sock in (*first, *more):
        sock.close()


async def test_a_task_before_smtp_that_is_cancelled_before_it_ran_releases():
    bench = Bench(BALANCED)
    await bench.listen()
    client = socket.create_connection(bench.addresses[0])
    await turns()
    assert bench.taken() == (1, 1, 1, 1)
    pair = socket.socketpair()
    pair[0].setblocking(False)
    bench.acceptor._arrived(BALANCED, pair[0], "127.0.0.1")
    assert bench.taken() == (2, 2, 2, 2)
    bench.acceptor.close(bench.acceptor._sockets[0])  # its connections stay
    assert bench.taken() == (2, 2, 2, 2)
    for task in bench.acceptor.arriving.values():  # one of them has not run yet
        task.cancel()
    await turns()
    assert bench.taken() == (0, 0, 0, 0) and pair[0].fileno() == -1
    client.close()
    pair[1].close()
    await bench.end()


async def test_timeouts_are_shorter_under_stress(monkeypatch):
    monkeypatch.setattr(acceptor, "ARRIVAL_SECONDS", 0.5)
    bench = Bench(BALANCED, connections=10)
    await bench.listen()
    clients = [socket.create_connection(bench.addresses[0]) for _ in range(5)]
    await turns()
    bench.acceptor._check()
    assert bench.taken()[3] == 5
    for _ in range(4):
        bench.limits.take("connections", 10)
    await asyncio.sleep(0.1)
    bench.acceptor._check()
    await turns()
    assert bench.taken()[1:] == (0, 0, 0)
    for client in clients:
        client.close()
    await bench.end()


async def test_out_of_descriptors_is_one_pause_and_one_resume():
    bench = Bench(Listener(address="127.0.0.1:2"), BALANCED)
    await bench.listen()
    one = bench.acceptor
    resumed: list[Listening] = []
    for listening in one._sockets:
        plain = listening.resume
        listening.resume = lambda plain=plain, one=listening: (plain(), resumed.append(one))[0]  # type: ignore[method-assign, misc]
    one.scarce()
    for _ in range(5):  # each end of a connection and each check calls it
        one.freed()
    assert resumed == one._sockets and not one.paused
    one.scarce()
    assert one.paused and not any(listening._accepting for listening in one._sockets)
    with no_descriptors():
        one.freed()
        await turns()
        assert one.paused
    one._check()  # no connection has ended, but descriptors are free again
    await turns()
    assert not one.paused
    for address in bench.addresses:
        socket.create_connection(address).close()
    await bench.end()
