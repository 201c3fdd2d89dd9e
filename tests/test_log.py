"""The log, and the history of messages, which is kept in addition to it."""

import json
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relaymta.log import USERS, History, Log, find_history, history_of_user
from tests.support.daemon import wait_for

OF_NOBODY = {"client": "", "helo": "", "user": "", "application": "", "message_id": ""}


def test_history_is_bounded_by_octets(tmp_path):
    history = History(tmp_path / "history", 0, 80_000)
    for number in range(2000):
        history.write(b'{"event":"queued","ts":%d,"id":"ID%05d"}\n' % (number, number))
    used = sum(path.stat().st_size for path in (tmp_path / "history").iterdir())
    assert 60_000 < used <= 80_000
    assert [event["ts"] for event in find_history(tmp_path / "history", "ID01999")] == [1999]
    assert find_history(tmp_path / "history", "ID00000") == []
    again = History(tmp_path / "history", 0, 80_000)
    again.write(b'{"event":"queued","ts":5000,"id":"ID05000"}\n')
    assert find_history(tmp_path / "history", "ID05000")


def test_only_events_of_messages_are_kept_in_order(tmp_path):
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "history", 0, 1 << 20))
    log.event("warning", text="not about a message")
    log.event("queued", id="ONE", sender="a", recipients=["b"], size=1, **OF_NOBODY)
    link = {"address": "192.0.2.1", "port": 25, "tls": "", "cipher": ""}
    log.event("delivered", id="ONE", recipients=["b"], route="r", peer="p", reply="ok", delay=0.1, attempt=1, **link)
    log.close()
    assert [event["event"] for event in find_history(tmp_path / "history", "ONE")] == ["queued", "delivered"]
    assert (tmp_path / "log").read_text().count("\n") == 3


def session(ts: float, user: str, pad: int = 0) -> bytes:
    return b'{"event":"session","ts":%r,"user":"%b","client":"%b"}\n' % (ts, user.encode(), b"c" * pad)


def of_user(folder: Path, user: str, since: float = 0.0) -> list[float]:
    return [one["ts"] for one in history_of_user(folder, lambda name: name == user, lambda name: name == user, since)]


def test_the_history_of_a_user_is_in_the_order_of_time_over_processes_and_files(tmp_path):
    users = [History(tmp_path / USERS, worker, 8 * 4096) for worker in (0, 1, 10)]
    mail = History(tmp_path, 1, 8 * 4096)
    for number in range(300):
        users[number % 3].write(session(number, "ann" if number % 2 else "bob", 200))
        if number % 50 == 0:
            mail.write(b'{"event":"delivered","ts":%d.5,"id":"A","recipients":["x","ann"]}\n' % number)
            mail.write(b'{"event":"delivered","ts":%d.6,"id":"B","recipients":["x"],"users":"","route":"ann"}\n' % number)
            mail.write(b'{"event":"queued","ts":%d.7,"id":"C","recipients":["ann"],"user":"ann"}\n' % number)
    assert len(list((tmp_path / USERS).iterdir())) > 20  # ten files or so have gone
    found = of_user(tmp_path, "ann")
    assert found == sorted(found) and {ts for ts in found if ts % 1} == {number + 0.5 for number in range(0, 300, 50)}
    assert found[-1] == 299 and len([ts for ts in found if not ts % 1]) > 100
    assert of_user(tmp_path, "ann", 290.5) == [291, 293, 295, 297, 299]
    assert of_user(tmp_path, "ann", time.time() + 100) == [] and of_user(tmp_path / "none", "ann") == []


def test_records_that_are_cut_off_or_no_records_are_passed_over(tmp_path):
    (tmp_path / USERS).mkdir()
    (tmp_path / USERS / "0.0.jsonl").write_bytes(
        session(1, "ann") + b'{"event":"sess' + b"\n" + b"\0" * 5000 + b"\n[1]\n\n" + session(2, "ann") + session(3, "ann")[:-5]
    )
    (tmp_path / USERS / "1.0.jsonl").write_bytes(b"")
    assert of_user(tmp_path, "ann") == [1, 2]


def test_events_of_users_are_kept_apart_from_those_of_messages(tmp_path):
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "h", 0, 1 << 20), History(tmp_path / "h" / USERS, 0, 1 << 20))
    queued(log, "ONE")
    log.event("login", client="c", user="ann", good=True, reply="235")
    log.event("sieve", id="ONE", user="ann", actions="keep", cause="")
    log.event("warning", text="x")
    log.close()
    kept = [[record["event"] for record in records(tmp_path / "h" / place / "0.0.jsonl")] for place in ("", USERS)]
    assert kept == [["queued", "sieve"], ["login"]]


def queued(log: Log, ident: str, sender: str = "a") -> None:
    log.event("queued", id=ident, sender=sender, recipients=["b"], size=1, **OF_NOBODY)


def wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines() if line]


def warnings(file: Path) -> list[str]:
    return [record["text"] for record in records(file) if record["event"] == "warning"]


def test_a_record_that_arrives_while_others_are_taken_is_written(tmp_path):
    class Busy(deque):
        """While the log's thread takes the first of several records, another arrives."""

        def popleft(self):
            if len(self) > 1 and not arrived:
                arrived.append(True)
                log.event("warning", text="meanwhile")
            return super().popleft()

    arrived: list[bool] = []
    log = Log(str(tmp_path / "log"), 0)
    log._pending = Busy()
    log.event("warning", text="first")
    log.event("warning", text="second")
    wait_for(lambda: (tmp_path / "log").read_text().count("\n") == 3, what="the record that arrived meanwhile")
    assert arrived
    log.close()


def test_a_full_disk_under_the_history_takes_nothing_from_the_log(tmp_path):
    history = History(tmp_path / "history", 0, 1 << 20)
    disk, history._descriptor = history._descriptor, os.open("/dev/full", os.O_WRONLY)
    log = Log(str(tmp_path / "log"), 0, history)
    for number in range(20):
        queued(log, f"A{number}")
    wait(lambda: log.history_dropped == 20)
    history._descriptor = disk
    queued(log, "B")
    log.close()
    assert [record["id"] for record in records(tmp_path / "log") if "id" in record] == [*(f"A{n}" for n in range(20)), "B"]
    assert sum(int(text.split()[0]) for text in warnings(tmp_path / "log") if "history" in text) == 20
    assert log.dropped == 0
    assert [len(find_history(tmp_path / "history", ident)) for ident in ("A3", "B")] == [0, 1]


def test_a_full_disk_under_the_log_takes_nothing_from_the_history(tmp_path):
    log = Log("/dev/full", 0, History(tmp_path / "history", 0, 1 << 20))
    for number in range(20):
        queued(log, f"A{number}")
        wait(lambda number=number: log.dropped > number)
    log._file = str(tmp_path / "log")
    log.reopen()
    queued(log, "B")
    log.close()
    assert all(find_history(tmp_path / "history", f"A{number}") for number in range(20)) and log.history_dropped == 0
    assert [record.get("id") for record in records(tmp_path / "log")] == ["B", None]
    lost = warnings(tmp_path / "log")
    assert len(lost) == 1 and int(lost[0].split()[0]) == log.dropped == 20, "all that were lost, not those of the last attempt"


@pytest.fixture
def file_limit():
    """Sets the greatest size of a file; a write beyond it fails, or is short."""
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda octets: resource.setrlimit(resource.RLIMIT_FSIZE, (octets, was[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, was)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path, file_limit):
    """The disk is full in the middle of a line; then there is space again."""
    log = Log(str(tmp_path / "log"), 0)
    queued(log, "A", "x" * 500)
    wait(lambda: (tmp_path / "log").stat().st_size > 500)
    file_limit(1000)
    queued(log, "B", "x" * 800)
    wait(lambda: log.dropped > 0)
    file_limit(1 << 30)
    queued(log, "C")
    log.close()
    lines = (tmp_path / "log").read_bytes().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], *lines[2:])] == ["queued", "queued", "warning"]
    assert len(lines) == 4 and log.dropped == 1 and lines[3].count(b"1 log records dropped") == 1
