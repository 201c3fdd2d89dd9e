"""Limits for clients: time, connections, descriptors."""

import contextlib
import itertools
import os
import resource
import socket
import time
from collections.abc import Iterator

from tests.support.daemon import Relay, dialog, heard, wait_for
from tests.support.programs import need


def connect(port: int) -> tuple[socket.socket, bytes]:
    sock = socket.create_connection(("127.0.0.1", port), 10)
    sock.settimeout(60)
    return sock, sock.recv(200)


def test_silent_and_slow_clients_are_disconnected(tmp_path, ledger):
    settings = ["intake.command_timeout=1", "intake.data_timeout=1"]
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", *settings) as relay:
        sock, banner = connect(relay.port)
        assert banner.startswith(b"220")
        assert sock.recv(100).startswith(b"421 4.4.2")
        assert sock.recv(100) == b""
        sock, _ = connect(relay.port)
        sock.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        replies = heard(sock, b"354")
        sock.sendall(b"Subject: unfinished\r\n")
        while piece := sock.recv(1000):
            replies += piece
        assert replies.endswith(b"421 4.4.2 Timed out waiting for you; closing\r\n")
        assert relay.summary() == []


def test_connections_are_limited_for_each_client_and_for_all(tmp_path, ledger):
    settings = ["relay.networks=[]", 'relay.domains=["d"]', "limits.connections_per_client=3"]
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", *settings, workers=2) as relay:
        held = [connect(relay.port) for _ in range(3)]
        assert all(banner.startswith(b"220") for _, banner in held)
        assert connect(relay.port)[1].startswith(b"421 4.7.0 Too many connections from your address")
        held[0][0].close()
        wait_for(lambda: connect(relay.port)[1].startswith(b"220"), what="a free connection")


def test_without_free_descriptors_connections_wait_and_mail_flows(tmp_path, ledger):
    wrap = (need("prlimit"), "--nofile=300:300")
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", wrap=wrap) as relay:
        served, waiting = [], []
        for _ in range(200):
            sock = socket.create_connection(("127.0.0.1", relay.port), 10)
            (served if greeted(relay, sock) else waiting).append(sock)
            if len(waiting) == 5:
                break
        assert len(waiting) == 5 and 100 < len(served) < 200
        wait_for(lambda: relay.metric("relaymta_listeners_paused") == 1)
        served[0].settimeout(60)
        served[0].sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        heard(served[0], b"354")
        served[0].sendall(b"X-Ledger: tight\r\n\r\nx\r\n.\r\n")
        wait_for(lambda: ledger.counts()["tight"] == 1)
        for sock in served[: len(served) // 2]:
            sock.close()
        for sock in waiting:
            sock.settimeout(60)
            assert sock.recv(200).startswith(b"220")
        wait_for(lambda: relay.metric("relaymta_listeners_paused") == 0)


def greeted(relay: Relay, sock: socket.socket) -> bool:
    """Whether a connection is served, or waits because its listener is paused."""
    sock.settimeout(0.3)
    while True:
        try:
            assert sock.recv(200).startswith(b"220")
            return True
        except TimeoutError:
            if relay.metric("relaymta_listeners_paused") == 1:
                return False


def test_under_stress_silent_clients_are_disconnected_sooner(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", "limits.connections=10", "intake.command_timeout=20") as relay:
        began = time.monotonic()
        few = [connect(relay.port)[0] for _ in range(4)]
        time.sleep(4)
        many = [connect(relay.port)[0] for _ in range(4)]
        for sock in few:
            sock.settimeout(60)
            assert sock.recv(100).startswith(b"421 4.4.2")
        assert time.monotonic() - began < 20, "before the timeout: they have been silent for a fifth of it"
        assert all(sock.fileno() > 0 for sock in many)


def test_a_network_has_settings_of_its_own(tmp_path, ledger):
    networks = 'network=[{networks=["127.0.0.2/32"], application="shop", message_size=1000, relay=false}]'
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", networks, 'relay.domains=["d"]') as relay:
        replies = b""
        with socket.create_connection(("127.0.0.1", relay.port), 10, source_address=("127.0.0.2", 0)) as sock:
            sock.settimeout(10)
            sock.recv(200)
            sock.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@elsewhere>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
            while b"354" not in replies:
                replies += sock.recv(1000)
            sock.sendall(b"X-Ledger: shop\r\n\r\nx\r\n.\r\nQUIT\r\n")
            while piece := sock.recv(1000):
                replies += piece
        assert b"SIZE 1000" in replies
        assert b"550 5.7.1" in replies
        (queued,) = wait_for(lambda: relay.events("queued"))
        assert queued["application"] == "shop"
        assert wait_for(lambda: relay.events("delivered"))[0]["route"] == "smarthost//shop"
        assert b"SIZE 52428800" in dialog(relay.port, b"EHLO x\r\nQUIT\r\n")


def test_messages_rejected_after_their_data_are_counted_and_logged(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", "limits.message_size=10000") as relay:
        open_mail = b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
        replies = dialog(relay.port, b"EHLO x\r\n" + open_mail, b"bare\nfeed\r\n.\r\n", open_mail, b"y" * 70 + b"\r\n",
                         b"z" * 10000, b"\r\n.\r\n", open_mail, b"Received: x\r\n" * 101 + b"\r\n.\r\n", b"QUIT\r\n")  # fmt: skip
        refused = [line for line in replies.split(b"\r\n") if line[:2] in (b"55", b"54")]
        assert len(refused) == 3
        events = wait_for(lambda: len(found := relay.events("rejected")) == 3 and found)
        assert [event["reply"].encode() for event in events] == refused
        assert all(event["sender"] == "a@b" and event["recipients"] == ["c@d"] and event["helo"] == "x" for event in events)
        assert {(event["phase"], event["protocol"]) for event in events} == {("data", "ESMTP")}
        assert relay.metric('relaymta_messages_refused_total{reason="content"}') == 3


def test_a_worker_that_runs_out_of_descriptors_closes_nobody_and_blames_no_site(tmp_path, ledger):
    """The limit of the running worker is lowered (prlimit(1)), so that nothing can be opened: no connection, no file."""
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", "delivery.idle=1") as relay:
        held, banner = connect(relay.port)
        assert banner.startswith(b"220")
        (pid,) = relay.worker_pids()
        connected = sockets(pid)
        relay.send("X-Ledger: before\r\n\r\nx\r\n")
        wait_for(lambda: relay.events("delivered") and sockets(pid) == connected)
        with out_of_descriptors(pid):
            waiting = [socket.create_connection(("127.0.0.1", relay.port), 10) for _ in range(50)]
            wait_for(lambda: relay.metric("relaymta_listeners_paused") == 1)
            held.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
            heard(held, b"354")
            held.sendall(b"X-Ledger: meanwhile\r\n\r\nx\r\n.\r\n")
            assert heard(held, b"250 2.", b"4", b"5").startswith(b"250 2.")
            wait_for(lambda: any("descriptor" in event["text"] for event in relay.events("warning")))
            held.sendall(b"NOOP\r\n")  # it is a second later by now, and more than one attempt
            assert heard(held, b"250").startswith(b"250")
            assert relay.worker_pids() == [pid], "`relaymta status` is answered"
            assert [refusal(sock) for sock in waiting] == [None] * 50
            assert relay.metric("relaymta_listeners_paused") == 1
            assert ledger.counts()["meanwhile"] == 0
        for sock in waiting:
            sock.settimeout(60)
            assert sock.recv(200).startswith(b"220")
        wait_for(lambda: relay.metric("relaymta_listeners_paused") == 0)
        wait_for(lambda: ledger.counts()["meanwhile"] == 1)
        assert relay.events("site") == relay.events("deferred") == []
        for sock in (held, *waiting):
            sock.close()
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@contextlib.contextmanager
def out_of_descriptors(pid: int) -> Iterator[None]:
    """Lower a process' limit so that none is left for it."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = next(number for number in itertools.count() if number not in used)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def sockets(pid: int) -> set[str]:
    """A process' sockets."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {link for link in found if link.startswith("socket:")}


def refusal(sock: socket.socket) -> bytes | None:
    """What a client has been told, b"" where it was disconnected; None: it waits."""
    sock.setblocking(False)
    try:
        return sock.recv(200)
    except BlockingIOError:
        return None
