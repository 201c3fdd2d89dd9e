"""Clients that do not read, half-close, reset or speak something else: what they cost, and that nothing of it stays."""

import contextlib
import http.client
import json
import socket
from pathlib import Path

import pytest

from tests.accept.test_front_door import Door
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.hostile import Crowd

PATIENCE = 3
KINDS = {
    "do not read": 20, "do not read, by TLS": 10, "read an octet a second": 10, "half-close": 10, "reset": 10,
    "stop in a text": 10, "speak HTTP": 5,
}  # fmt: skip


def anonymous(pid: int) -> int:
    """MB of a process's own memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) // 1024


def banner(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 30) as sock:
        return sock.recv(200)


def test_hostile_clients_cost_little_harm_nobody_and_leave_nothing(tmp_path):
    most = sum(KINDS.values()) + 5
    # As many at once as there are, so that it is seen whether each gives its place back; a slow machine is not "overloaded".
    network = f'network=[{{networks=["127.0.0.1/32"],connections={most}}}]'
    patience = (f"intake.command_timeout={PATIENCE}", f"intake.data_timeout={PATIENCE}", "intake.shed_lag=0")
    with FakeMx({}) as peer, Door(tmp_path, f"127.0.0.1:{peer.port}", network, *patience) as door:
        (pid,) = door.worker_pids()
        assert banner(door.port).startswith(b"220")
        before = anonymous(pid)
        crowd = Crowd(KINDS, door.port, door.implicit)
        for _ in range(3):
            crowd.tick()
            assert banner(door.port).startswith(b"220")
            assert anonymous(pid) - before <= 50
        door.send("Subject: in the middle of it\r\n\r\nx\r\n")
        # Who does not read is ended, whether or not it goes itself; so is who stops in the middle.
        gauge = "relaymta_connections"
        wait_for(lambda: door.metric(gauge) == 0, 60, "the end of them all")
        crowd.close()
        with contextlib.ExitStack() as stack:  # every place is free again
            for _ in range(most):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", door.port), 30))
                assert sock.recv(200).startswith(b"220")
            assert banner(door.port).startswith(b"421 4.7.0 Too many connections from your address")
        wait_for(lambda: len(peer.messages) == 1)
        assert not list((door.spool / "shard-0/bodies/big").iterdir())
        assert len(door.events("queued")) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "OPTIONS", "EHLO"])
def test_a_client_of_http_queues_nothing(tmp_path_factory, relays, method):
    """As from a web page, or a program that fetches what it is told to."""
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
    assert json.loads(relays.cli("queue", "summary", "--json").stdout) == [] and not relays.events("queued")
    wait_for(lambda: any(event["reply"].startswith("421 4.7.0 This is") for event in relays.events("rejected")))


def _octets(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionError:
        return b""


@pytest.fixture(scope="module")
def relays(tmp_path_factory):
    with FakeMx({}) as peer, Door(tmp_path_factory.mktemp("http"), f"127.0.0.1:{peer.port}") as door:
        yield door


def test_a_client_that_expects_tls_is_told_at_once(relays):
    hello = bytes.fromhex("16030100a5010000a10303") + bytes(154)
    with socket.create_connection(("127.0.0.1", relays.port), 30) as sock:
        sock.recv(200)
        for octet in hello[:3]:
            with contextlib.suppress(ConnectionError):
                sock.sendall(bytes([octet]))
        assert b"".join(iter(lambda: _octets(sock), b"")).startswith(b"421 4.7.0 ")
