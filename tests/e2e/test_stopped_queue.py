"""`queue hold`, `release`, `delete` and others while no daemon runs, and what the log says of operators' changes."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaymta.disk.shards import shard_numbers
from relaymta.log import find_history
from relaymta.proto.maillog import heard
from tests.e2e.test_privileges import NOBODY, relay_of_nobody, root_only
from tests.support import commands
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.filled import Letter, fill, histories, listed

DATA = b"Subject: x\r\n\r\nhello\r\n"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter."""
    with tempfile.TemporaryDirectory(prefix="relaymta-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def letters(count: int) -> list[Letter]:
    return [("a@b.example", [f"c@d{number % 3}.example"], DATA + b"%d" % number) for number in range(count)]


def cli(spool: Path, *words: str, status: int = 0) -> tuple[str, str]:
    done = commands.run([*words, "--spool", str(spool)], PATIENCE)
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def counts(matched: int, changed: int, dry_run: bool = False, **more) -> dict:
    return {"matched": matched, "changed": changed, "in_flight": 0, "dry_run": dry_run, **more}


def events(spool: Path, ident: str) -> list[tuple[str, str]]:
    return [(event["event"], event["by"]) for event in find_history(spool / "history", ident)]


def test_verbs_change_the_queue_of_a_daemon_that_is_stopped(tmp_path):
    spool, me = tmp_path / "spool", f"operator (uid {os.getuid()})"
    one = fill(spool, letters(4))
    two = fill(spool, letters(3), 1)
    smarthost = ["--set", 'route=[{name="other", hosts=["192.0.2.1:25"]}]']

    def changed(*words: str) -> dict:
        return json.loads(cli(spool, "queue", *words, "--json")[0])

    assert changed("hold", "--domain", "d0.example", "--dry-run") == counts(3, 0, True)
    assert {row["state"] for row in listed(spool)} == {"queued"}
    assert changed("hold", "--domain", "d0.example") == counts(3, 3)
    held = {row["id"]: row["held_for"] for row in listed(spool) if row["state"] == "held"}
    assert held == dict.fromkeys((one[0], one[3], two[0]), "by the operator (queue hold)")
    assert cli(spool, "queue", "release", one[0])[0] == "release: 1 of 1 messages changed\n"
    assert changed("release", "--held") == counts(2, 2)
    assert changed("delete", "--from", "nobody@b.example") == counts(0, 0)
    assert cli(spool, "queue", "delete", one[1], "1ZZZZZZZZZZZZ", status=1) == (
        "delete: 1 of 1 messages changed\n", "no such message in the queue: 1ZZZZZZZZZZZZ\n",
    )  # fmt: skip
    assert changed("flush", "--all") == counts(6, 6, throttled=0, until=0.0)
    assert changed("reroute", one[0], "--to", "other", *smarthost) == counts(1, 1)
    assert "no such route: other" in cli(spool, "queue", "reroute", one[0], "--to", "other", status=1)[1]
    assert "only the daemon knows" in cli(spool, "queue", "hold", "--site", "x", status=69)[1]
    assert changed("bounce", two[2], "--reason", "gone") == counts(1, 1)
    found = {row["id"]: row for row in listed(spool)}
    assert found.keys() > {one[0], one[2], one[3], two[0], two[1]} and found[one[0]]["queues"] == ["other"]
    (dsn,) = found.keys() - {*one, *two}
    assert found[dsn]["recipients"][0]["address"] == "a@b.example" and found[dsn]["sender"] == ""
    assert events(spool, one[0]) == [("held", me), ("released", me), ("rerouted", me)]
    assert events(spool, one[1]) == [("deleted", me)]
    assert [event["cause"] for event in find_history(spool / "history", two[2])] == ["operator"]
    data = {row["id"]: data for row, data in histories(spool)}
    assert data[one[0]] == DATA + b"0" and b"gone" in data[dsn]


def test_a_log_in_the_form_of_postfix_has_them(tmp_path):
    spool, log = tmp_path / "spool", tmp_path / "log"
    (ident,) = fill(spool, letters(1))
    for verb in ("hold", "release", "delete"):
        cli(spool, "queue", verb, ident, "--set", f"log.file={log}", "--set", 'log.format="postfix"')
    lines = [line.partition("postfix/")[2] for line in log.read_text().splitlines()]
    short = [line.partition("]: ")[2] for line in lines if line.startswith("postsuper")]
    assert short == [f"{ident}: placed on hold", f"{ident}: released from hold", f"{ident}: removed"]
    assert all((said := heard(line)) is not None and said.ident == ident for line in log.read_text().splitlines())


def test_who_has_the_shards_keeps_others_from_them(tmp_path):
    """A daemon that is started meanwhile, and a command while a daemon that does not answer runs."""
    spool = tmp_path / "spool"
    fill(spool, letters(1))
    fill(spool, letters(1), 1)
    before = listed(spool)
    with (spool / "shard-1" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, said = cli(spool, "queue", "delete", "--all", status=75)
        assert said == (
            f"{spool}: shard-1 is in use by another relaymta (process {os.getpid()}) (shard-0 is not); nothing was changed\n"
        )
        relay = Relay(tmp_path, f"127.0.0.1:{free_port()}", workers=2)
        started = subprocess.run(relay.command(), capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert started.returncode == 75
        assert f"{spool}/shard-1 is in use by another relaymta (process {os.getpid()})" in started.stderr
    assert [row["id"] for row in listed(spool)] == [row["id"] for row in before]


@root_only
def test_root_leaves_no_file_of_its_own(open_folder):
    relay = relay_of_nobody(open_folder, free_port())
    spool = relay.spool
    fill(spool, letters(2))
    shutil.rmtree(spool / "history", ignore_errors=True)
    for path in (spool, *spool.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = {path for path in spool.rglob("*") if path.name == "lock.mdb"}
    for path in before:
        path.unlink()
    log = open_folder / "log" / "relay.log"
    command = [sys.executable, "-m", "relaymta", "queue", "hold", "--all", "--spool", str(spool), "--set", f"log.file={log}"]
    assert "2 of 2" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert {path.stat().st_uid for path in (spool, log, *spool.rglob("*"))} == {NOBODY}
    assert (spool / "history").is_dir() and log.read_text().count('"held"') == 2


@pytest.mark.parametrize("verb", ["delete", "hold"])
def test_a_process_that_is_killed_leaves_each_message_as_it_was_or_changed(tmp_path, verb):
    spool = tmp_path / "spool"
    idents = fill(spool, letters(4000))
    command = [sys.executable, "-m", "relaymta", "queue", verb, "--all", "--spool", str(spool)]
    with subprocess.Popen(command, start_new_session=True) as process:
        history = spool / "history"
        wait_for(lambda: any(path.stat().st_size for path in history.glob("*")) or process.poll() is not None, what="a change")
        os.killpg(process.pid, signal.SIGKILL)
    rows = {row["id"]: row["state"] for row in listed(spool)}
    assert rows.keys() <= set(idents)
    lines = [line for path in history.glob("*.jsonl") for line in path.read_text().splitlines(True)]
    told = {json.loads(line)["id"] for line in lines if line.endswith("\n")}  # the last one may have been cut off
    changed = {ident for ident in idents if rows.get(ident, "held") == "held"}
    assert told <= changed, "what the log tells of is done"
    held = 0 if verb == "delete" else len(changed)
    found = json.loads("[" + ",".join(cli(spool, "queue", "summary", "--json")[0].splitlines()) + "]")
    assert (sum(one["messages"] for one in found), sum(one["held"] for one in found)) == (len(rows), held)
    assert json.loads(cli(spool, "queue", "delete", "--all", "--json")[0]) == counts(len(rows), len(rows))
    assert not listed(spool) and shard_numbers(spool) == [0]


def test_a_running_relay_logs_who_has_changed_messages(tmp_path):
    me = f"operator (uid {os.getuid()})"
    with Relay(tmp_path, f"127.0.0.1:{free_port()}", 'log.format="json"') as relay:
        relay.send()
        relay.send()  # it waits with the first, since the site is down
        wait_for(lambda: relay.events("deferred") and len(relay.events("queued")) == 2)
        first, second = [event["id"] for event in relay.events("queued")]
        for verb in ("hold", "release", "delete"):
            assert "1 of 1" in relay.cli("queue", verb, first).stdout
        relay.cli("policy", "hold", "--from", "a@b.example", "--for", "1h")
        relay.cli("queue", "flush", second)
        wait_for(lambda: len(relay.events("held")) == 2)
        relay.cli("policy", "remove", "hold", "sender=a@b.example")
        wait_for(lambda: len(relay.events("released")) == 2)
        assert [(one["id"], one["by"]) for one in relay.events("deleted")] == [(first, me)]
        assert [(one["id"], one["by"], one["reason"]) for one in relay.events("held")] == [
            (first, me, "by the operator (queue hold)"), (second, "policy", "hold policy sender=a@b.example"),
        ]  # fmt: skip
        assert [(one["id"], one["by"]) for one in relay.events("released")] == [(first, me), (second, "policy")]
        shown = relay.cli("message", "history", first).stdout
        assert f"held        <c@d.example>, by {me}: by the operator (queue hold)" in shown
        assert f"deleted     <c@d.example>, by {me}" in shown
        wait_for(lambda: find_history(relay.spool / "history", first)[-1]["event"] == "deleted")
        assert f"deleted by the {me}" in relay.cli("message", "find", "--id", first).stdout
        assert "1 of 1" in relay.cli("queue", "reroute", "--all", "--to", "smarthost").stdout
        (moved,) = relay.events("moved") or [None]
        assert moved is None or moved["by"] == me
