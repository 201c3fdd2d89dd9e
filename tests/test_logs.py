"""`relaymta logs tail`: of files that grow, are rotated, and are too large; of the journal; of the history."""

import json
import os
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from relaymta.cli import log_source, logs, main, tail
from relaymta.cli.tail import Files
from relaymta.log import USERS

ID, OTHER = "1M8KWQ60M0000", "1M8KWQ60V0000"


def line(event: str = "warning", ts: float = 1_700_000_000, **fields: Any) -> bytes:
    return json.dumps({"event": event, "ts": ts, "worker": 0, **({"text": "x"} if event == "warning" else {}), **fields}).encode()


RECORDS = [
    line("started", pid=1, listeners=["127.0.0.1:25"]),
    line("queued", id=ID, sender="a@b.example", recipients=["c@d.example", "e@f.example"], size=2048, client="192.0.2.1",
         helo="h\x1b[2J", user="ann", application="", message_id=""),
    line("delivered", id=ID, recipients=["c@d.example"], route="r", peer="mx.d.example", reply="250 ok", delay=1, attempt=1),
    line("deferred", id=ID, recipient="e@f.example", route="r", phase="rcpt", peer="", reply="4.4.1 no route", next=0, attempt=1),
    line("queued", id=OTHER, sender="", recipients=["a@b.example"], size=1, client="", helo="", user="", application=""),
    line("rejected", client="192.0.2.9", helo="h", phase="rcpt", sender="x@y.example", recipients=["z@D.Example"],
         reply="550 no"),
    line("warning", text="one\ntwo\u202e"),
    line("site", route="r", state="down", reason="", fault="dns", until=5, ends=7.5),
    line("delivered", id=OTHER),  # of another version: fields are missing
]  # fmt: skip


def run(*words: str, status: int = 0) -> list[str]:
    done = CliRunner().invoke(main, ["logs", "tail", *words])
    assert done.exit_code == status, done.output
    return (done.stdout if not status else done.stderr).splitlines()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "relay.log"
    path.write_bytes(b"".join(one + b"\n" for one in RECORDS) + b'{"event":"cut o')
    return path


def test_events_are_shown_one_a_line(log):
    at = "2023-11-14 22:13:20Z"
    assert run("--set", f"log.file={log}", "-n", "20") == [
        f"{at}  started     pid=1 listeners=127.0.0.1:25",
        f"{at}  queued      {ID}  <a@b.example> to <c@d.example> +1, 2.0 kB from 192.0.2.1 (h\\x1b[2J), logged in as ann",
        f"{at}  delivered   {ID}  to <c@d.example> by mx.d.example: 250 ok",
        f"{at}  deferred    {ID}  to <e@f.example>: 4.4.1 no route; next attempt -",
        f"{at}  queued      {OTHER}  <> to <a@b.example>, 1 B",
        f"{at}  rejected    192.0.2.9 (h) at rcpt, from <x@y.example> to <z@D.Example>: 550 no",
        f"{at}  warning     one\\ntwo\\u202e",
        f"{at}  site        route=r state=down fault=dns ends=7.5",
        f"{at}  delivered   id={OTHER}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["-n", "2"], [7, 8]), (["-n", "0"], []), (["--id", ID.lower(), "-n", "1"], [3]), (["--id", ID], [1, 2, 3]),
        (["--event", "queued", "--event", "site"], [1, 4, 7]), (["--from", "A@b.example"], [1]), (["--from", "<>"], [4]),
        (["--to", "c@d.example"], [1, 2]), (["--domain", "D.example"], [1, 2, 5]),
        (["--domain", "f.example", "--event", "queued"], [1]),
        (["--to", "nobody@d.example"], []), ([], list(range(9))),
    ],
)  # fmt: skip
def test_what_is_selected(log, options, found):
    assert [json.loads(one) for one in run("--set", f"log.file={log}", "--json", *options)] == [
        json.loads(RECORDS[n]) for n in found
    ]


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--event", "queud"], 64, 'no such event: queud (did you mean "queued"?); docs/log.md has all of them'),
        (["--id", "x"], 64, "not a message id"), (["--id", ""], 64, "--id: it is empty"),
        (["--to", "x"], 64, "is not an address"), (["-n", "-1"], 64, "-1"),
        (["--domain", "a@b"], 64, "a domain has no @"), (["--set", "log.format=postfix", "--json"], 64, "--json: log.format is"),
        (["--set", "log.file={folder}"], 74, "Is a directory"), (["--set", "log.file=-"], 1, "no log to read"),
    ],
)  # fmt: skip
def test_what_is_wrong(log, options, status, says, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no journalctl
    options = [one.format(folder=tmp_path) for one in options]
    assert says in "\n".join(run("--set", f"log.file={log}", "--spool", str(tmp_path / "spool"), *options, status=status))


def test_a_log_that_is_not_there_yet_is_said_to_be_so(tmp_path):
    done = CliRunner().invoke(main, ["logs", "tail", "--set", f"log.file={tmp_path}/none"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", f"there is no {tmp_path}/none yet\n")


def test_lines_of_other_forms_are_shown_unless_something_is_selected(log):
    text = f"Nov 29 14:00:00 host postfix/qmgr[1]: {ID}: from=<a@b.example>, size=1, nrcpt=1 (queue active)"
    log.write_text(f"Traceback (most recent call last):\n{text}\n{line().decode()}\n")
    assert run("--set", f"log.file={log}")[:2] == ["Traceback (most recent call last):", text]
    assert run("--set", f"log.file={log}", "--id", ID) == run("--set", f"log.file={log}", "--from", "a@b.example") == [text]
    assert len(run("--set", f"log.file={log}", "--json")) == 1


# Files


def last(files: Files, count: int = 1 << 20) -> list[bytes]:
    return files.last(count, lambda line: 0.0)


LINES = st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=12)


@given(LINES, st.binary(max_size=8).map(lambda rest: rest.replace(b"\n", b"")), st.integers(1, 9), st.integers(0, 14))
def test_the_last_lines_are_those_of_the_file(tmp_path_factory, lines, rest, block, count):
    path = tmp_path_factory.mktemp("tail") / "log"
    path.write_bytes(b"".join(one + b"\n" for one in lines) + rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK", block)
        files = Files(lambda: [[path]])
        assert last(files, count) == (lines[-count:] if count else [])
        patch.setattr(tail, "PAUSE", 0)
        looks = files.follow()
        assert list(next(looks)) == [], "a line that has no end is not shown"
        with path.open("ab") as file:
            file.write(b"end\nx\n\nrest")
        assert list(next(looks)) == [rest + b"end", b"x", b""]
        looks.close()


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(tail, "LINE_MOST", 100_000)
    path = tmp_path / "log"
    path.write_bytes(b"one\n" + b"x" * 400_000 + b"\ntwo\n" + b"y" * 300_000 + b"\n")
    files = Files(lambda: [[path]])
    assert last(files) == [b"one", b"two"]
    path.write_bytes(b"z" * 300_000 + b"\nthree\n")
    assert last(files) == [b"three"]
    looks = followed(files, monkeypatch)
    with path.open("ab") as file:
        file.write(b"w" * 250_000)
        file.flush()
        assert list(next(looks)) == []
        file.write(b"w\nfour\n")
        file.flush()
        assert list(next(looks)) == [b"four"]


def test_memory_is_bounded(tmp_path):
    """Of a log of 30 MB, with lines that are too long."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        for _ in range(3):
            file.write((line(text="y" * 1000) + b"\n") * 1000 + b"x" * 9_000_000)
        file.write(b"\n" + line() * 3 + b"\n")
    tracemalloc.start()
    try:
        done = logs.Wanted(frozenset(["queued"]), "", logs.Filter(), False)
        assert Files(lambda: [[path]]).last(10, done.time) == []
        assert tracemalloc.get_traced_memory()[1] < 3 * tail.LINE_MOST
    finally:
        tracemalloc.stop()


def followed(files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(tail, "PAUSE", 0)
    looks = files.follow()
    assert list(next(looks)) == []
    return looks


def append(path: Path, *lines: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(one + b"\n" for one in lines))


def test_a_file_that_is_rotated_is_read_to_its_end_and_then_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append(path, b"before")
    files = Files(lambda: [[path]])
    last(files, 0)
    now = [100.0]
    monkeypatch.setattr(tail.time, "monotonic", lambda: now[0])
    looks = followed(files, monkeypatch)
    append(path, b"1")
    path.rename(tmp_path / "log.1")
    append(tmp_path / "log.1", b"2")
    assert list(next(looks)) == [b"1", b"2"]
    append(path, b"3")
    append(tmp_path / "log.1", b"late")
    assert sorted(next(looks)) == [b"3", b"late"]
    now[0] += tail.GRACE + 1
    assert list(next(looks)) == []
    append(tmp_path / "log.1", b"nobody writes there any more")
    append(path, b"4")
    assert list(next(looks)) == [b"4"]
    path.write_bytes(b"")  # copytruncate
    assert list(next(looks)) == []
    append(path, b"5")
    assert list(next(looks)) == [b"5"]
    path.unlink()
    assert list(next(looks)) == []
    append(path, b"6")
    assert list(next(looks)) == [b"6"]


def test_a_rotation_between_the_end_and_what_follows_it(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append(path, b"a long line of the file before")
    files = Files(lambda: [[path]])
    assert len(last(files)) == 1
    path.rename(tmp_path / "log.1")
    append(path, b"new")
    monkeypatch.setattr(tail, "PAUSE", 0)
    assert list(next(files.follow())) == [b"new"]


def test_the_history_of_all_processes_is_in_the_order_of_time(tmp_path, monkeypatch):
    folder = tmp_path / "history"
    (folder / USERS).mkdir(parents=True)
    times = list(range(300))
    places = [folder / "0", folder / "1", folder / "10", folder / USERS / "0"]
    chosen = random.Random(1)
    for ts in times:
        place = chosen.choice(places)
        append(place.with_name(f"{place.name}.{ts // 100 + 9}.jsonl"), line(ts=ts))
    found = run("--spool", str(tmp_path), "-n", "250", "--json")
    assert [json.loads(one)["ts"] for one in found] == times[-250:]
    files = Files(lambda: log_source._history(folder))
    last(files, 0)
    looks = followed(files, monkeypatch)
    append(folder / "0.11.jsonl", line(ts=301))
    append(folder / "0.12.jsonl", line(ts=302))  # the next one
    append(folder / USERS / "5.0.jsonl", line(ts=303))  # of a process that is new
    assert sorted(json.loads(one)["ts"] for one in next(looks)) == [301, 302, 303]


# The journal


JOURNALCTL = """#!{python}
import json, sys, time
options = sys.argv[1:]
open({seen!r}, "a").write(json.dumps(options) + "\\n")
entries = [json.loads(text) for text in open({entries!r})]
after = [one.partition("=")[2] for one in options if one.startswith("--after-cursor=")]
if after:
    entries = entries[int(after[0]) + 1:]
elif "--lines=0" in options:
    entries = []
for number, entry in (reversed(list(enumerate(entries))) if "--reverse" in options else enumerate(entries)):
    found = {{"__CURSOR": str(entry["cursor"]), "__REALTIME_TIMESTAMP": "1700000000000000", "MESSAGE": entry["message"]}}
    print(json.dumps(found), flush=True)
sys.exit({status})
"""


def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[Any], status: int = 0) -> Path:
    """A journalctl that has these lines (or lists of octets: it writes what is not UTF-8 so); what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    seen, entries = tmp_path / "seen", tmp_path / "entries"
    entries.write_text("".join(json.dumps({"cursor": n, "message": one}) + "\n" for n, one in enumerate(lines)))
    program = folder / "journalctl"
    program.write_text(JOURNALCTL.format(python=sys.executable, seen=str(seen), entries=str(entries), status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return seen


def test_the_end_of_the_journal_is_read(tmp_path, monkeypatch):
    lines = [one.decode() for one in RECORDS[:4]] + ["Started relaymta.service.", list(RECORDS[4]), None]
    seen = journal(tmp_path, monkeypatch, lines)
    found = run("--unit", "relaymta@2.service", "-n", "3")
    assert len(found) == 3 and found[1] == "Started relaymta.service." and OTHER in found[2]
    assert len(run("--unit", "x", "--json")) == 5
    assert len(run("--unit", "x", "--id", ID, "-n", "2")) == 2
    said = f"postfix/qmgr[1]: {ID}: from=<a@b.example>, size=1, nrcpt=1 (queue active)"
    journal(tmp_path, monkeypatch, [said, "x"])
    monkeypatch.setattr(log_source, "syslog_heads", lambda: lambda ts: f"Nov 14 22:13:{ts - 1_700_000_000:02.0f} host ")
    assert run("--unit", "x", "--from", "a@b.example") == [f"Nov 14 22:13:00 host {said}"]
    (options, *_) = map(json.loads, seen.read_text().splitlines())
    assert options[:2] == ["--unit", "relaymta@2.service"] and "--reverse" in options and "--all" in options


def test_the_journal_is_followed_from_where_its_end_was(tmp_path, monkeypatch):
    journal(tmp_path, monkeypatch, ["one", "two", "three"])
    source = log_source.Journal("x")
    assert source.last(1, lambda line: 0.0) == [b"three"]
    journal(tmp_path, monkeypatch, ["one", "two", "three", "four", "five"])
    assert [next(iter(look)) for look in source.follow()] == [b"four", b"five"]
    source = log_source.Journal("x")
    assert source.last(0, lambda line: 0.0) == []
    journal(tmp_path, monkeypatch, ["one", "two", "three", "four", "five", "six"])
    assert [next(iter(look)) for look in source.follow()] == [b"six"]
    journal(tmp_path, monkeypatch, [])
    source = log_source.Journal("x")
    assert source.last(0, lambda line: 0.0) == [] and list(source.follow()) == []


def test_a_journal_that_cannot_be_read_is_said_so(tmp_path, monkeypatch):
    journal(tmp_path, monkeypatch, [], status=1)
    assert run("--unit", "x", status=74) == ["journalctl has ended with status 1"]


def test_no_journalctl(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("--unit", "x", status=69) == ["journalctl is not installed"]
    assert log_source._unit(tmp_path / "control.sock") == ""


def test_times_stay_as_they_are_where_lines_follow():
    now = time.time()
    assert logs._utc(now)[-1] == "Z" and len(logs._utc(now)) == 20
