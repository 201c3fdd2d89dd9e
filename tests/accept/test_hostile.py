"""Clients that do not read, half-close, reset or use another protocol: what they cost, and that they leave nothing."""

import contextlib
import http.client
import socket
from pathlib import Path

import pytest

from tests.accept.test_endpoints import Endpoint
from tests.e2e.test_lmtp import Kept
from tests.e2e.test_mailboxes import create, shown
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.hostile import Crowd

PATIENCE = 3
KINDS = {
    "do not read": 20, "do not read, by TLS": 10, "read an octet a second": 10, "half-close": 10, "reset": 10,
    "stop in message data": 10, "speak HTTP": 5,
}  # fmt: skip


def anonymous(pid: int) -> int:
    """MB of a process's anonymous memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) // 1024


def banner(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        return sock.recv(200)


def test_hostile_clients_take_little_and_leave_nothing(tmp_path):
    most = sum(KINDS.values()) + 5
    # The limit is the number of clients, to see whether each place is released; no load shedding on a slow machine.
    network = f'network=[{{networks=["127.0.0.1/32"],connections={most}}}]'
    patience = (f"intake.command_timeout={PATIENCE}", f"intake.data_timeout={PATIENCE}", "intake.shed_lag=0")
    with FakeMx({}) as peer, Endpoint(tmp_path, f"127.0.0.1:{peer.port}", network, *patience) as endpoint:
        (pid,) = endpoint.worker_pids()
        assert banner(endpoint.port).startswith(b"220")
        before = anonymous(pid)
        crowd = Crowd(KINDS, endpoint.port, endpoint.implicit)
        for _ in range(3):
            crowd.tick()
            assert banner(endpoint.port).startswith(b"220")
            assert anonymous(pid) - before <= 50
        endpoint.send("Subject: in the middle of it\r\n\r\nx\r\n")
        # Clients that do not read, or stop in the middle, are disconnected, whether or not they disconnect themselves.
        gauge = "relaymta_connections"
        wait_for(lambda: endpoint.metric(gauge) == 0, 60, "the end of them all")
        crowd.close()
        with contextlib.ExitStack() as stack:  # every place was released
            for _ in range(most):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 30))
                assert sock.recv(200).startswith(b"220")
            assert banner(endpoint.port).startswith(b"421 4.7.0 Too many connections from your address")
        wait_for(lambda: len(peer.messages) == 1)
        wait_for(lambda: not list((endpoint.spool / "shard-0/bodies/big").iterdir()))
        assert len(endpoint.events("queued")) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "EHLO"])
def test_an_http_client_queues_nothing(tmp_path_factory, relays, method):
    """Such as a web page, or a program that fetches given URLs."""
    body = b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nBDAT 2 LAST\r\nhi\r\nQUIT\r\n"
    client = http.client.HTTPConnection("127.0.0.1", relays.port, timeout=30)
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        client.request(method, "/", body=body)
        client.getresponse()
    client.close()
    with socket.create_connection(("127.0.0.1", relays.port), 30) as sock:
        sock.recv(200)
        with contextlib.suppress(ConnectionError):
            sock.sendall(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sock.sendall(body)
        assert b"".join(iter(lambda: _octets(sock), b"")).startswith(b"421 4.7.0 This is an SMTP server")
    assert relays.cli("queue", "summary", "--json").stdout == "" and not relays.events("queued")
    refused = wait_for(lambda: [one for one in relays.events("rejected") if one["reply"].startswith("421 4.7.0 This is")])
    assert {(one["phase"], one["protocol"]) for one in refused} == {("connect", "")}
    assert relays.metric('relaymta_rejections_total{phase="connect",reply="4xx"}') >= 1


def _octets(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


@pytest.fixture(scope="module")
def relays(tmp_path_factory):
    with FakeMx({}) as peer, Endpoint(tmp_path_factory.mktemp("http"), f"127.0.0.1:{peer.port}") as endpoint:
        yield endpoint


def test_a_tls_client_on_a_plain_port_is_rejected_at_once(relays):
    hello = bytes.fromhex("16030100a5010000a10303") + bytes(154)
    with socket.create_connection(("127.0.0.1", relays.port), 30) as sock:
        sock.recv(200)
        for octet in hello[:3]:
            with contextlib.suppress(ConnectionError):
                sock.sendall(bytes([octet]))
        assert b"".join(iter(lambda: _octets(sock), b"")).startswith(b"421 4.7.0 ")


def test_hostile_clients_of_lmtp_take_little_leave_nothing_and_nothing_of_theirs_is_filed(tmp_path):
    kinds = {kind: count for kind, count in KINDS.items() if kind not in ("do not read, by TLS", "speak HTTP")}
    network = f'network=[{{networks=["127.0.0.1/32"],connections={sum(kinds.values()) + 5}}}]'
    with Kept(tmp_path, network, f"intake.command_timeout={PATIENCE}", f"intake.data_timeout={PATIENCE}") as relay:
        create(relay, "alice")
        (pid,) = relay.worker_pids()
        before = anonymous(pid)
        crowd = Crowd(kinds, relay.lmtp, lmtp="alice")
        for _ in range(3):
            crowd.tick()
            assert anonymous(pid) - before <= 50
            with relay.client() as client:
                assert client.deliver("Subject: in the middle of it\r\n\r\nx\r\n", "alice")[0].startswith("250")
        wait_for(lambda: relay.metric("relaymta_connections") == 0, 60, "the end of them all")
        crowd.close()
        wait_for(lambda: not list((relay.spool / "shard-0/bodies/big").iterdir()))
        assert shown(relay, "alice")["INBOX"] == ["in the middle of it"] * 3 and relay.summary() == []
