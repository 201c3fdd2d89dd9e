"""Orphan shards, signals, sockets of systemd, a missing daemon."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from relaymta import control
from tests.e2e.test_stopped_queue import cli
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.filled import fill


def test_fewer_workers_drain_the_shards_of_the_others(tmp_path, ledger):
    relay = Relay(tmp_path, f"127.0.0.1:{free_port()}", "delivery.first_retry=0.5", workers=3)
    with relay:
        for number in range(40):
            relay.send(f"X-Ledger: n{number}\r\n\r\nx\r\n")
        wait_for(lambda: sum(row["messages"] for row in relay.summary()) == 40)
        shards = list(relay.spool.glob("shard-*"))
        assert len(shards) == 3
        assert relay.stop() == 0
    relay.workers, relay.smarthost = 1, f"127.0.0.1:{ledger.port}"
    with relay:
        wait_for(lambda: len(ledger.counts()) == 40, 30, "the mail of orphan shards")
        assert json.loads(relay.cli("status", "--json").stdout)["workers"][0]["shards"] == [0, 1, 2]
        wait_for(lambda: relay.summary() == [])
    assert set(ledger.counts().values()) == {1}


def test_a_rotated_log_is_reopened_by_all(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        relay.send()
        wait_for(lambda: relay.events("delivered"))
        relay.log.rename(tmp_path / "relay.log.1")
        assert relay.process is not None
        relay.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: relay.send() or relay.events("delivered"), what="events in the new file")


def test_status_answers_while_a_worker_dies(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        (pid,) = relay.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        answer = control.begin(relay.spool / "control.sock", "status")
        time.sleep(0.3)  # so that the request has reached the worker
        os.kill(pid, signal.SIGKILL)
        assert [row["ready"] for row in answer()["workers"]] == [False]
        wait_for(lambda: relay.worker_pids() not in ([], [pid]))


QUICK = """
import sys
from relaymta.supervisor import slots
slots.LATE_SECONDS, slots.KILL_SECONDS = 1.0, float(sys.argv[1])
sys.argv = ["relaymta", *sys.argv[5:]]
from relaymta.cli import main
main()
"""


def health(relay: Relay) -> str:
    return relay.monitored("/health")[1].strip()


def test_a_stopped_workers_clients_are_served_by_another_until_it_is_replaced(tmp_path, ledger):
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2, wrap=(sys.executable, "-c", QUICK, "8"))
    with relay:
        first, second = relay.worker_pids()
        os.kill(first, signal.SIGSTOP)
        wait_for(lambda: health(relay) == "workers not ready: 0 (late, its sockets are lent to worker 1)")
        assert relay.worker_pids() == [second], "status does not wait for it"
        assert relay.unready() == ["workers"] and relay.monitored("/livez") == (200, "ok\n")
        for number in range(20):  # the kernel gives half of them to the stopped worker's socket
            relay.send(f"X-Ledger: n{number}\r\n\r\nx\r\n")
        wait_for(lambda: len(relay.worker_pids()) == 2 and first not in relay.worker_pids(), what="its successor")
        wait_for(lambda: health(relay) == "ok")
        assert relay.unready() == []
        wait_for(lambda: len(ledger.counts()) == 20)
        assert any("it is killed" in event["text"] for event in relay.events("warning"))


def test_a_stopped_worker_that_continues_gets_its_sockets_back(tmp_path, ledger):
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2, wrap=(sys.executable, "-c", QUICK, "600"))
    with relay:
        pids = relay.worker_pids()
        os.kill(pids[1], signal.SIGSTOP)
        wait_for(lambda: health(relay) == "workers not ready: 1 (late, its sockets are lent to worker 0)")
        files, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
        fill(elsewhere, [("a@b.example", ["c@d.example"], b"X-Ledger: imported\r\n\r\nx\r\n")], 1)
        cli(elsewhere, "queue", "export", "--all", "--to", str(files), "--delete")
        done = relay.cli("queue", "import", str(files), check=False)
        assert (done.returncode, done.stdout) == (75, ""), "the missing shard may have had it: it is not put into another one"
        os.kill(pids[1], signal.SIGCONT)
        wait_for(lambda: health(relay) == "ok")
        assert relay.cli("queue", "import", str(files)).stdout == "import: 1 message is in the queue\n"
        assert relay.worker_pids() == pids
        for number in range(20):
            relay.send(f"X-Ledger: n{number}\r\n\r\nx\r\n")
        wait_for(lambda: len(ledger.counts()) == 21)
        assert ledger.counts()["imported"] == 1


def test_a_worker_that_cannot_be_executed_is_tried_again(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        (pid,) = relay.worker_pids()
        assert relay.process is not None
        usual = resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (4, usual[1]))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len([e for e in relay.events("warning") if "cannot start a worker" in e["text"]]) > 1)
        resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, usual)
        wait_for(lambda: relay.worker_pids() not in ([], [pid]))
        relay.send("X-Ledger: after\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["after"] == 1)


def test_sighup_reloads(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        assert relay.process is not None
        relay.process.send_signal(signal.SIGHUP)
        relay.send()
        wait_for(lambda: ledger.taken)
        assert relay.process.poll() is None


def test_systemd_is_notified(tmp_path, ledger):
    import socket

    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(20)
        relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}")
        relay.environment = {"NOTIFY_SOCKET": str(path)}
        with relay:
            assert sock.recv(100) == b"READY=1"
            relay.stop()
            assert sock.recv(100) == b"STOPPING=1"


AS_SYSTEMD = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
assert sock.fileno() == 3
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_sockets_are_taken_from_systemd(tmp_path, ledger, workers):
    relay = Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=workers)
    relay.wrap = (sys.executable, "-c", AS_SYSTEMD, str(relay.port))
    with relay:
        for number in range(10):
            relay.send(f"X-Ledger: n{number}\r\n\r\nx\r\n")
        wait_for(lambda: len(ledger.counts()) == 10)
        os.kill(relay.worker_pids()[0], signal.SIGKILL)
        relay.send("X-Ledger: after\r\n\r\nx\r\n")
        wait_for(lambda: ledger.counts()["after"] == 1)


def test_a_socket_of_systemds_without_a_listener_is_an_error(tmp_path):
    relay = Relay(tmp_path, "127.0.0.1:1")
    relay.wrap = (sys.executable, "-c", AS_SYSTEMD, str(free_port()))
    done = subprocess.run(relay.command(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 78
    assert "systemd passes a socket on 127.0.0.1:" in done.stderr


def test_a_missing_daemon_is_reported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "relaymta", "status", "--spool", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 69
    assert "no daemon answers" in done.stderr
