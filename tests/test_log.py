"""The log, and the history of messages, which is kept in addition to it."""

import ast
import json
import os
import re
import resource
import signal
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from relaymta.log import EVENTS, USERS, History, Log, find_history, history_of_user, schema
from relaymta.log_forms import is_journal
from relaymta.proto.maillog import Writer
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


def test_a_line_that_was_cut_hides_no_other(tmp_path):
    whole = [b'{"event":"queued","ts":1,"id":"ONE"}', b'{"event":"delivered","ts":3,"id":"ONE"}']
    (tmp_path / "0.0.jsonl").write_bytes(b"\n".join([whole[0], b'{"event":"deferred","ts":2,"id":"ONE","repl', whole[1], b""]))
    assert [event["event"] for event in find_history(tmp_path, "ONE")] == ["queued", "delivered"]


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


def test_a_record_of_several_lines_is_one_that_is_dropped(tmp_path, file_limit):
    """In the form of Postfix. A warning says how many there are, which is in that form, too."""
    log = Log(str(tmp_path / "log"), 0, form="postfix")
    for number in range(20):
        queued(log, f"A{number}")
    wait(lambda: (tmp_path / "log").read_bytes().count(b"\n") == 40)
    size = (tmp_path / "log").stat().st_size
    file_limit(size + 100)  # of the first line, and a part of the second
    for number in range(3):
        queued(log, f"B{number}", "x" * 100)
        wait(lambda number=number: log.dropped > number)
    file_limit(1 << 30)
    queued(log, "C")
    log.close()
    lines = [line.partition("]: ")[2] for line in (tmp_path / "log").read_text()[size:].splitlines()]
    assert log.dropped == 3 and [line for line in lines if line.startswith(("C", "warning"))] == [
        "C: message-id=<>", "C: from=<a>, size=1, nrcpt=1 (queue active)",
        "warning: 3 log records dropped: they could not be written",
    ]  # fmt: skip


def test_the_history_is_json_whatever_the_form_of_the_log(tmp_path):
    log = Log(str(tmp_path / "log"), 0, History(tmp_path / "history", 0, 1 << 20), form="postfix")
    queued(log, "ONE")
    log.close()
    (event,) = find_history(tmp_path / "history", "ONE")
    assert event["event"] == "queued" and "postfix/qmgr[" in (tmp_path / "log").read_text()


def test_a_defect_of_the_form_of_postfix_costs_no_record_and_not_the_thread(tmp_path, monkeypatch):
    def broken(self, record):
        raise ValueError("ours")

    log = Log(str(tmp_path / "log"), 0, form="postfix")
    monkeypatch.setattr(Writer, "program", broken)
    log.event("next_host", id="ONE", recipients=["\udcff"], route="r", phase="rcpt", peer="p", reply="no", attempt=1)
    log.event("warning", text="after it")
    log.close()
    first, second = [line.partition("]: ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert first.startswith('warning: ValueError: ours: {"event":"next_host"') and second == "warning: after it"


SITE = {"route": "r", "reason": "", "fault": "", "cause": "", "until": 0, "ends": 0}
LEVELED = [
    (6, "login", {"client": "c", "user": "u", "good": True, "reply": "235"}),
    (4, "login", {"client": "c", "user": "u", "good": False, "reply": "535 5.7.8 no"}),
    (4, "warning", {"text": "x"}), (4, "site", SITE | {"state": "down"}), (5, "site", SITE | {"state": "up"}),
    (3, "store", {"state": "full", "reason": ""}), (5, "store", {"state": "ok", "reason": ""}),
    (3, "stopped", {"reason": "a worker"}), (5, "stopped", {"reason": "signal"}),
    (6, "queued", {"id": "A", "sender": "a", "recipients": ["b"], "size": 1, **OF_NOBODY, "client": "192.0.2.1"}),
]  # fmt: skip


@pytest.mark.parametrize("form", ["json", "postfix"])
@pytest.mark.parametrize("journal", [True, False], ids=["journal", "elsewhere"])
def test_lines_for_the_journal_have_their_level_and_no_time(monkeypatch, capfd, form, journal):
    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino if journal else found.st_ino + 1}")
    monkeypatch.setattr("sys.stderr", os.fdopen(2, "w", closefd=False))
    log = Log("-", 0, form=form)
    for _, name, fields in LEVELED:
        log.event(name, **fields)
    log.close()
    lines = capfd.readouterr().err.splitlines()
    levels = [level for level, _, _ in LEVELED]
    assert len(lines) == len(LEVELED) + 2 * (form == "postfix")
    if journal:
        assert [int(line[1]) for line in lines] == levels + [6, 6] * (form == "postfix")
        lines = [re.fullmatch(r"<\d>(.*)", line)[1] for line in lines]  # type: ignore[index]
    if form == "json":
        assert [json.loads(line)["event"] for line in lines] == [name for _, name, _ in LEVELED]
    else:
        assert all(line.startswith("postfix/") is journal and "postfix/" in line for line in lines)


def test_standard_error_that_is_no_stream_of_the_journal(monkeypatch):
    for value in ("", "x", "1:2", ":", f"{os.fstat(2).st_dev}"):
        monkeypatch.setenv("JOURNAL_STREAM", value)
        assert not is_journal(2)
    monkeypatch.delenv("JOURNAL_STREAM")
    assert not is_journal(2)


@cache
def emitted() -> dict[str, set[str]]:
    """The events that the code logs, with the fields that are named where it does."""
    found: dict[str, set[str]] = {}
    for path in (Path(__file__).parents[1] / "relaymta").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = getattr(node, "func", None)
            if getattr(called, "attr", getattr(called, "id", "")) in ("event", "partial") and node.args:
                (name,) = [one.value for one in node.args if isinstance(one, ast.Constant)] or [None]
                if isinstance(name, str) and "event" in ast.unparse(node):
                    found.setdefault(name, set()).update(key.arg for key in node.keywords if key.arg)
    return found


def test_each_event_that_is_logged_is_in_the_schema():
    made = schema()
    definitions = {name: made["$defs"][name] for name in (one["$ref"].rpartition("/")[2] for one in made["anyOf"])}
    assert emitted().keys() == EVENTS.keys() == definitions.keys()
    for name, fields in emitted().items():
        known = definitions[name]["properties"]
        assert fields <= known.keys(), name
        assert {"event", "ts", "worker", *EVENTS[name]} <= known.keys()
        assert definitions[name]["properties"]["event"]["enum"] == [name]
        assert {"event", "ts", "worker"} <= set(definitions[name]["required"])


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
