"""`relaymta fsck` finds what is wrong with a queue that was really damaged, and mends what can be; and what a start says then."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from tests.e2e.test_snapshot import Load
from tests.e2e.test_stopped_queue import cli, letters
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.filled import fill, histories, listed

LARGE = b"Subject: large\r\n\r\n" + b"0123456789abcde\r\n" * 80_000


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    fill(tmp_path / "spool", [*letters(6), ("a@b.example", ["c@d0.example"], LARGE)])
    cli(tmp_path / "spool", "queue", "hold", "--domain", "d1.example")
    return tmp_path / "spool"


def checked(spool: Path, *words: str, status: int) -> list[dict]:
    return [json.loads(line) for line in cli(spool, "fsck", "--json", *words, status=status)[0].splitlines()]


def segment(spool: Path) -> Path:
    return next((spool / "shard-0" / "bodies").glob("*.seg"))


def big(spool: Path) -> Path:
    return next((spool / "shard-0" / "bodies" / "big").iterdir())


def tables(spool: Path, change: Callable) -> None:
    """Change rows behind the queue's back."""
    with lmdb.open(str(spool / "shard-0" / "lmdb"), map_size=1 << 30, max_dbs=16) as env:
        names = ("message", "due", "held", "expiry", "wake", "recipient", "queue", "segment")
        opened = {name: env.open_db(name.encode(), create=False) for name in names}
        with env.begin(write=True) as txn:
            change(txn, opened)


def first(txn, table) -> bytes:
    cursor = txn.cursor(db=table)
    assert cursor.first()
    return bytes(cursor.key())


def flipped(spool: Path) -> None:
    path = segment(spool)
    path.write_bytes(path.read_bytes().replace(b"hello\r\n2", b"hellx\r\n2"))


def cut(spool: Path) -> None:
    os.truncate(segment(spool), segment(spool).stat().st_size - 3)


DAMAGED = {  # -> words, messages that are lost
    "bytes flipped in a segment": (flipped, "does not match its checksum", 1),
    "a segment cut short": (cut, "does not match its checksum", 1),
    "a segment missing": (lambda spool: segment(spool).unlink(), "No such file or directory", 6),
    "a large body missing": (lambda spool: big(spool).unlink(), "No such file or directory", 1),
    "a large body cut short": (lambda spool: os.truncate(big(spool), 70_000), "does not match its checksum", 1),
    "a large body overwritten": (lambda spool: big(spool).write_bytes(bytes(100)), "is not where its row says", 1),
    "a row that cannot be read": (
        lambda spool: tables(spool, lambda txn, of: txn.put(first(txn, of["message"]), b"\xc1", db=of["message"])),
        "its row cannot be read", 1,
    ),
    "no row in the schedule": (
        lambda spool: tables(spool, lambda txn, of: txn.delete(first(txn, of["due"]), db=of["due"])), "is not in the schedule", 0,
    ),
    "a schedule without messages": (
        lambda spool: tables(spool, lambda txn, of: txn.put(first(txn, of["due"])[:-1] + b"\xff", b"", db=of["due"])),
        "which is not in the queue", 0,
    ),
    "a history of nobody": (
        lambda spool: tables(spool, lambda txn, of: txn.put(bytes(10), b"\x92\x00\x90", db=of["recipient"])),
        "the table recipient has message", 0,
    ),
    "nothing held": (lambda spool: tables(spool, lambda txn, of: txn.drop(of["held"], delete=False)), "whether it is held", 0),
    "no expiry": (lambda spool: tables(spool, lambda txn, of: txn.drop(of["expiry"], delete=False)), "when it expires", 0),
    "no wake": (lambda spool: tables(spool, lambda txn, of: txn.drop(of["wake"], delete=False)), "would not be looked at", 0),
    "no queues": (lambda spool: tables(spool, lambda txn, of: txn.drop(of["queue"], delete=False)), "its queue is missing", 0),
    "no segments": (
        lambda spool: tables(spool, lambda txn, of: txn.drop(of["segment"], delete=False)), "has message data and no row", 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named_and_mended(spool, what):
    damage, words, lost = DAMAGED[what]
    before, aside = listed(spool), spool.parent / "aside"
    assert checked(spool, status=0) == []
    damage(spool)
    found = checked(spool, status=1)
    assert any(words in fault["text"] for fault in found), found
    assert len({fault["id"] for fault in found if fault["what"] == "data"}) == lost
    assert checked(spool, status=1) == found, "it has changed nothing"
    said = checked(spool, "--repair", "--to", str(aside), status=0)
    assert [one for one in said if one["what"] != "note"] == found
    assert all(one["what"] == "note" for one in checked(spool, status=0)), "the file of a message that is not there any more"
    left = {row["id"]: row for row in listed(spool)}
    gone = {row["id"] for row in before} - left.keys()
    assert {fault["id"] for fault in found if fault["id"]} == gone and len(gone) == lost
    assert {path.name for path in aside.iterdir()} == {f"{ident}.damaged.{kind}" for ident in gone for kind in ("eml", "json")}
    for row in before:
        if row["id"] in left:
            now = left[row["id"]]
            assert (now["state"], now["recipients"], now["queues"]) == (row["state"], row["recipients"], row["queues"])
    if what == "a large body overwritten":
        assert (aside / f"{gone.copy().pop()}.damaged.eml").read_bytes() == bytes(100)
    if what == "bytes flipped in a segment":
        (ident,) = gone
        assert b"hellx" in (aside / f"{ident}.damaged.eml").read_bytes()
        assert json.loads((aside / f"{ident}.damaged.json").read_text())["id"] == ident
    assert len(histories(spool)) == len(left), "all of them can be read"
    assert json.loads(cli(spool, "queue", "delete", "--all", "--json")[0])["changed"] == len(left)
    assert all(one["what"] == "note" for one in checked(spool, status=0))


def test_files_without_a_message_are_noted(spool):
    path = big(spool).with_name(f"{7:016x}")
    path.write_bytes(b"x")
    out, _ = cli(spool, "fsck")
    assert out == (
        f"shard 0: note: {path} has no message: the next start removes it\n7 messages in 1 shard: the queue is sound\n"
    )


def overwritten(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: 2 * 4096] + os.urandom(len(data) - 2 * 4096))


BROKEN = {
    "cut short": (lambda file: os.truncate(file, file.stat().st_size // 8192 * 4096), "it is cut short: page "),
    "empty": (lambda file: file.write_bytes(b""), "neither of its meta pages can be read"),
    "no database": (lambda file: file.write_bytes(b"x" * 100_000), "neither of its meta pages can be read"),
    "its pages overwritten": (overwritten, " is overwritten"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_of_lmdb_is_named_by_every_command_and_at_a_start(spool, what):
    damage, words = BROKEN[what]
    file = spool / "shard-0" / "lmdb" / "data.mdb"
    damage(file)
    (found,) = checked(spool, status=1)
    assert found["what"] == "file" and str(file) in found["text"] and words in found["text"]
    assert "move this folder away" in found["text"]
    assert checked(spool, "--repair", "--to", str(spool.parent / "aside"), status=1) == [found], "nothing is done to it"
    if what == "its pages overwritten":  # LMDB may notice, or not before the page is read
        return
    for verb in ("list", "summary", "hold"):
        words_of = ["--all"] if verb == "hold" else []
        _, err = cli(spool, "queue", verb, *words_of, status=69)
        assert f"{file} is damaged: {words}" in err and "move this folder away" in err
    relay = Relay(spool.parent, f"127.0.0.1:{free_port()}")
    started = subprocess.run(relay.command(), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert started.returncode == 75
    assert f"worker 0 did not start: {file} is damaged: {words}" in started.stderr and "internal error" not in started.stderr


def test_while_the_relay_runs_under_load_its_queue_is_sound(tmp_path, ledger):
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as relay:
        load = Load(relay)
        try:
            wait_for(lambda: len(load.taken) > 100, 60, "load")
            for _ in range(3):
                assert relay.cli("fsck", "--json").stdout == ""
        finally:
            load.stop()
        done = relay.cli("fsck", "--repair", "--to", str(tmp_path / "aside"), check=False)
        assert done.returncode == 69 and "the relay is running: stop it first" in done.stderr
        wait_for(lambda: not relay.summary())
        relay.stop()
        assert "0 messages in 1 shard: the queue is sound" in relay.cli("fsck").stdout
