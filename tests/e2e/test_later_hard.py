"""Filters behind the queue that change what they look at, and workers that die over it: with the real programs."""

import contextlib
import os
import signal
from pathlib import Path

import dkim

from tests.support.clamd import clamd
from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import DkimKey, acting

LARGE = "a line of text that is long enough\r\n" * 40_000


def sockets(pid: int) -> int:
    """How many a process has."""
    found = 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(one).startswith("socket:")
    return found


ACTS = {
    "nothing": "",
    "header": "X-Act: add X-New=new\r\nX-Act: insert 0 X-Top=top\r\nX-Act: change 1 Subject=other\r\n",
    "small": "X-Act: body 2000\r\n",
    "large": "X-Act: body 3000000\r\n",
}


def test_what_filters_change_in_the_queue_is_signed_as_it_is_delivered(tmp_path):
    """Case 7. Two milters at stage "queued"; a body in memory and one in a file, which become the one and the other."""
    key = DkimKey(tmp_path)
    with acting() as one, acting() as two, FakeMx({}) as peer:
        filters = ",".join(
            f'{{name="{name}", type="milter", stage="queued", address=["{milter.address}"]}}'
            for name, milter in (("one", one), ("two", two))
        )
        signing = f'dkim=[{{domain="b.example", selector="s", key="{key.path}"}}]'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", f"filter=[{filters}]", signing) as relay:
            for word, acts in ACTS.items():
                for body in ("\r\nbegins with an empty line\r\n", LARGE):
                    peer.messages.clear()
                    relay.send(f"From: a@b.example\r\nSubject: {word}\r\n{acts}\r\n{body}")
                    wait_for(lambda: peer.messages, what=f"{word}, {len(body)}")
                    [(_, _, data)] = peer.messages
                    assert dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode()), (word, len(body), data[:800])
                    assert data.count(b"DKIM-Signature:") == 1 and data.count(b"\nReceived:") == 1
                    assert data.count(b"X-New:") == (2 if word == "header" else 0)
            assert not relay.events("warning")[2:]
            wait_for(lambda: not relay.summary())
    assert not (tmp_path / "stderr").read_bytes()


def test_a_message_over_which_a_worker_dies_again_and_again_is_quarantined(tmp_path):
    with clamd() as scanner, FakeMx({}) as peer:
        virus = f'filter=[{{name="virus", type="clamd", stage="queued", timeout=60, address=["{scanner.address}"]}}]'
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", virus) as relay:
            scanner.send(signal.SIGSTOP)
            [pid] = relay.worker_pids()
            before = sockets(pid)
            relay.send()
            for _ in range(2):
                [pid] = wait_for(relay.worker_pids)
                wait_for(lambda pid=pid: sockets(pid) > before, what="the scan")
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda pid=pid: relay.worker_pids() and relay.worker_pids() != [pid])
            assert "a worker died twice while filters looked at it" in relay.cli("queue", "list", "--held").stdout
            scanner.send(signal.SIGCONT)
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            relay.cli("queue", "release", "--all")
            wait_for(lambda: len(peer.messages) == 2)
