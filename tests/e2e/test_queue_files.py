"""`queue export` and `queue import`: the queue as files and back again, whatever is interrupted, changed, or made by others."""

import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from relaymta.cli.folder import Folder, RootsFolder
from relaymta.ident import format_id, parse_id
from relaymta.proto.envelope import HELD, PERMANENT, TRANSIENT, UNSEEN, Attempt, Envelope, Quarantine, Unseen
from relaymta.queue import wall_ms
from tests.conftest import PROVE
from tests.e2e.test_privileges import NOBODY, relay_of_nobody, root_only
from tests.e2e.test_stopped_queue import cli, letters, open_folder  # noqa: F401
from tests.queue.test_queue import Bench, until
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.filled import fill, histories, listed

BODY = b"Subject: x\r\n\r\nhello\r\n"


async def _varied(folder: Path) -> None:
    """Messages in all states."""
    async with Bench(folder) as bench:
        two = await bench.put(to=("c@d.example", "e@d.example", "f@g.example"))
        for entry in await bench.next(2):
            first = Attempt(wall_ms(), TRANSIENT, "rcpt", "mx.example", 451, "4.7.1", "later\nmuch later", "inside", "policy")
            final = msgspec.structs.replace(first, kind=PERMANENT, code=550)
            results = {index: final if index == 0 else first for index, _ in entry.recipients}
            bench.queue.finish(entry, results, 3_600_000)
        await until(lambda: len(bench.events.outcomes) == 2)
        bench.offered.clear()
        held, policy, free = [await bench.put(b"Subject: %d\r\n\r\n" % n, sender="") for n in range(3)]
        await bench.queue.change_messages("hold", [held])
        await bench.queue.change_messages("policy", [policy], "application=x")
        assert {two, held, policy, free}
        now = bench.queue.clock.now()
        for flags, more in (
            (
                HELD,
                {
                    "quarantine": Quarantine(now, "filter av", "why", 1.5, "x", True),
                    "held_for": "filter av: why",
                },
            ),
            (UNSEEN, {"unseen": Unseen(["av"], 0, 0, True, True, False, "TLSv1.3", "PLAIN", ["SIZE=1"], 7)}),
        ):
            done = asyncio.get_running_loop().create_future()
            envelope = Envelope(
                "ü@b.example", ["c@d.example"], len(BODY), flags | 2, wall_ms(), bench.queue.deadline(), "192.0.2.1", "h.example",
                "shop", "bulk", headers=["X: y"], user="ann", message_id="<1@b>", listener=":25", forwarded={"ADDR": "::1"},
                **more,
            )  # fmt: skip
            bench.queue.submit(bench.queue.ident(), envelope, [BODY], done.set_result)
            assert await done is None


def same(before: list, after: list) -> None:
    """Two results of `histories`, but for a moment between two readings of the clock."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return round(value, 1)
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items() if key not in ("next", "expires", "since")}
        return [rounded(one) for one in value] if isinstance(value, list) else value

    assert [(rounded(row), data) for row, data in before] == [(rounded(row), data) for row, data in after]
    for (old, _), (new, _) in zip(before, after, strict=True):
        assert all(abs(old[key] - new[key]) < 0.05 for key in ("next", "expires")), (old, new)


def test_an_export_that_is_imported_gives_the_same_queue(tmp_path):
    spool, files = tmp_path / "spool", tmp_path / "files"
    asyncio.run(_varied(spool))
    large = b"Subject: large\r\n\r\n" + b"0123456789abcde\r\n" * 200_000
    fill(spool, [("a@b.example", ["c@d.example"], large), *letters(3)], 1)
    before = histories(spool)
    states = {row["state"] for row, _ in before}
    assert states == {"queued", "deferred", "held", "unseen"} and len(before) == 11
    route = ["--set", 'route=[{name="mx", hosts=["192.0.2.1:25"]}]']
    found = json.loads(cli(spool, "queue", "export", "--all", "--to", str(files), "--delete", "--json", *route)[0])
    assert (found["matched"], found["exported"], found["deleted"], found["in_flight"]) == (11, 11, 11, 0)
    assert not listed(spool)
    names = {path.name for path in files.iterdir()}
    assert names == {f"{row['id']}.{suffix}" for row, _ in before for suffix in ("eml", "json")}
    assert all((files / f"{row['id']}.eml").read_bytes() == data for row, data in before)
    elsewhere = tmp_path / "elsewhere"
    fill(elsewhere, [])
    for target in (spool, elsewhere):  # the other has one shard
        out, err = cli(target, "queue", "import", str(files), *route)
        assert (out, err) == ("import: 11 messages are in the queue\n", "")
        same(before, histories(target))
        again = json.loads(cli(target, "queue", "import", str(files), "--json", *route)[0])
        assert again == {"imported": 0, "there": 11, "before": 0, "wrong": 0}
        same(before, histories(target))
    gone = before[0][0]["id"]
    cli(elsewhere, "queue", "delete", gone)
    _, err = cli(elsewhere, "queue", "import", str(files / f"{gone}.json"))
    assert err == f"{gone} was imported before, and has left the queue: skipped (--again imports it)\n"
    assert len(listed(elsewhere)) == 10
    cli(elsewhere, "queue", "import", str(files / f"{gone}.eml"), "--again", *route)
    same(before, histories(elsewhere))
    json_of = json.loads(next(files.glob("*.json")).read_text())
    cli(spool, "queue", "export", json_of["id"], "--to", str(tmp_path / "back"), "--delete", *route)
    assert cli(spool, "queue", "import", str(tmp_path / "back"), *route)[0] == "import: 1 message is in the queue\n", (
        "back and forth"
    )


def test_files_that_exist_are_not_replaced_and_damaged_mail_is_named(tmp_path):
    spool, files = tmp_path / "spool", tmp_path / "files"
    first, second = fill(spool, letters(2))
    files.mkdir()
    (tmp_path / "victim").write_text("mine")
    (files / f"{first}.eml").symlink_to(tmp_path / "victim")
    _, err = cli(spool, "queue", "export", "--all", "--to", str(files), "--delete", status=73)
    assert f"{first}.json or .eml exists already: {first} is not exported" in err
    assert [row["id"] for row in listed(spool)] == [first] and (files / f"{second}.json").exists()
    cli(spool, "queue", "export", "--all", "--to", str(files), "--force")
    assert (tmp_path / "victim").read_text() == "mine" and not (files / f"{first}.eml").is_symlink()
    segment = next((spool / "shard-0" / "bodies").glob("*.seg"))
    segment.write_bytes(segment.read_bytes().replace(b"hello", b"hallo"))
    out, err = cli(spool, "queue", "export", first, "--to", str(tmp_path / "more"), "--delete", status=65)
    assert (
        "does not match its checksum" in err
        and out == f"export: 0 of 1 messages are in {tmp_path}/more, and 0 of them not in the queue any more\n"
    )
    assert [row["id"] for row in listed(spool)] == [first] and not list((tmp_path / "more").iterdir())


LOOKED = msgspec.structs.asdict(Unseen(["av"], 0, 0, True, False, True))
HOSTILE = {
    "not json": lambda found: b"{",
    "a list": lambda found: b"[]",
    "deep": lambda found: b'{"id": "%s", "x": ' % found["id"].encode() + b"[" * 100_000,
    "newer": lambda found: found | {"version": 2, "more": 1},
    "no version": lambda found: {key: value for key, value in found.items() if key != "version"},
    "unknown key": lambda found: found | {"to": "x"},
    "a path": lambda found: found | {"id": "../../../etc/passwd"},
    "a far future": lambda found: found | {"id": "FZZZZZZZZZZZZ"},
    "no recipients": lambda found: found | {"recipients": []},
    "an injection": lambda found: found | {"recipients": [{"address": "c@d.example>\r\nRCPT TO:<e@f.example"}]},
    "a sender with options": lambda found: found | {"sender": "a@b.example> SIZE=1"},
    "a nul": lambda found: found | {"client": "\x00"},
    "a wrong type": lambda found: found | {"size": "1"},
    "a wrong size": lambda found: found | {"size": 7},
    "a wrong sum": lambda found: found | {"sha256": "0" * 64},
    "no waits": lambda found: found | {"waits": []},
    "waits for nobody": lambda found: found | {"waits": [found["waits"][0] | {"recipients": [5]}]},
    "waits for nobody at all": lambda found: found | {"waits": [found["waits"][0] | {"recipients": []}]},
    "unknown flag": lambda found: found | {"flags": ["root"]},
    "a number that no row can hold": lambda found: found | {"flags": ["unseen"], "unseen": {**LOOKED, "announced": 10**30}},
    "fields behind the message": lambda found: found | {"flags": ["unseen"], "unseen": {**LOOKED, "above": 1000}},
    "a command for filters": lambda found: found | {"flags": ["unseen"], "unseen": {**LOOKED, "parameters": ["X\r\nRSET"]}},
    "infinity": lambda found: found | {"arrived": 1e400},
}
SAID = {"a far future": "$.id: it is of the future", "newer": "$.version: a newer relaymta", "unknown key": "unknown field `to`",
        "an injection": "$.recipients[...].address", "a sender with options": "$.sender", "waits for nobody": "$.waits",
        "unknown flag": "$.flags", "a nul": "$.client", "a wrong type": "$.size", "no recipients": "$.recipients",
        "a number that no row can hold": "$.unseen.announced", "fields behind the message": "$.unseen",
        "a command for filters": "$.unseen.parameters"}  # fmt: skip


def test_hostile_and_broken_files_are_named_and_the_rest_goes_on(tmp_path):
    spool, files = tmp_path / "spool", tmp_path / "files"
    idents = fill(spool, letters(len(HOSTILE) + 5))
    cli(spool, "queue", "export", "--all", "--to", str(files), "--delete")
    bad = dict(zip(HOSTILE, idents, strict=False))
    for what, ident in bad.items():
        path = files / f"{ident}.json"
        broken = HOSTILE[what](json.loads(path.read_text()))
        text = broken if isinstance(broken, bytes) else json.dumps(broken).encode()
        if what == "a far future":
            (files / f"{ident}.eml").rename(files / "FZZZZZZZZZZZZ.eml")
            path.unlink()
            path = files / "FZZZZZZZZZZZZ.json"
            bad[what] = "FZZZZZZZZZZZZ"
        path.write_bytes(text)
    rest = idents[len(HOSTILE) :]
    missing, linked, fifo, bare, good = rest
    (files / f"{missing}.eml").unlink()
    (files / f"{linked}.json").rename(tmp_path / "away")
    (files / f"{linked}.json").symlink_to(tmp_path / "away")
    (files / f"{fifo}.eml").unlink()
    os.mkfifo(files / f"{fifo}.eml")
    (files / f"{bare}.eml").write_bytes((files / f"{bare}.eml").read_bytes().replace(b"\r\nhello", b"\nhelloo"))
    (files / "1ZZZZZZZZZZZZ.eml").write_bytes(BODY)
    out, err = cli(spool, "queue", "import", str(files), status=65)
    count = len(HOSTILE) + 5
    assert out == f"import: 1 message is in the queue; {count} left out, since something is wrong with them\n"
    assert [row["id"] for row in listed(spool)] == [good]
    lines = dict(line.removeprefix(f"{files}/").split(": ", 1) for line in err.splitlines())
    assert len(lines) == count and all(name.startswith((*bad.values(), *rest, "1Z")) for name in lines), err
    for what, words in SAID.items():
        assert words in lines[f"{bad[what]}.json"].replace("[0]", "[...]"), (what, lines[f"{bad[what]}.json"])
    assert lines[f"{missing}.eml"] == "No such file or directory" and "symbolic links" in lines[f"{linked}.json"]
    assert lines[f"{fifo}.eml"] == "no regular file" and "CR or LF alone" in lines[f"{bare}.eml"]
    assert lines["1ZZZZZZZZZZZZ.eml"] == "there is no 1ZZZZZZZZZZZZ.json: its export was interrupted"


def test_another_message_with_the_same_id_is_not_taken_for_it(tmp_path):
    spool, files = tmp_path / "spool", tmp_path / "files"
    (ident,) = fill(spool, letters(1))
    cli(spool, "queue", "export", ident, "--to", str(files))
    path = files / f"{ident}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sender": "other@b.example"}))
    _, err = cli(spool, "queue", "import", str(files), status=65)
    assert err == f"{path}: $.id: another message in the queue has it\n"


def test_a_folder_is_used_by_one_export_at_a_time(tmp_path):
    """The second one would take the files of the first for its own, and remove those of what has left the queue."""
    spool, files = tmp_path / "spool", tmp_path / "files"
    fill(spool, letters(2))
    cli(spool, "queue", "export", "--all", "--to", str(files))
    other = Folder(files, True)
    assert other.reserve(True)
    for words, who in (
        (["export", "--all", "--to", str(files), "--force"], "export or import"),
        (["import", str(files)], "export"),
    ):
        _, err = cli(spool, "queue", *words, status=75)
        assert err == f"{files} is in use by another {who}; nothing was changed\n"
    other.close()
    reader = Folder(files, False)
    assert reader.reserve(False)
    cli(spool, "queue", "export", "--all", "--to", str(files), "--force", status=75)
    cli(spool, "queue", "import", str(files))
    reader.close()


@root_only
@pytest.mark.parametrize("octets", [200_000, 3 << 20])
def test_an_import_ends_where_mail_is_refused_for_lack_of_room(tmp_path, octets):
    disk, files = tmp_path / "disk", tmp_path / "files"
    body = b"Subject: x\r\n\r\n" + b"0123456789abcde\r\n" * (octets // 17)
    count = (24 << 20) // octets
    fill(tmp_path / "spool", [("a@b.example", ["c@d.example"], body)] * count)
    cli(tmp_path / "spool", "queue", "export", "--all", "--to", str(files))
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=True)  # its floor is 2 MB
    try:
        fill(disk / "spool", [])
        out, err = cli(disk / "spool", "queue", "import", str(files), status=74)
        taken = len(listed(disk / "spool"))
        assert out == f"import: {taken} messages are in the queue\n" and 0 < taken < count
        assert err.startswith("the relay has no room for more mail; the rest was not looked at") and err.count("\n") == 1
        cli(disk / "spool", "fsck")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_name_of_a_new_folder_is_durable(tmp_path, monkeypatch):
    """Or a power cut behind the deletes would leave no way to the files."""
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    Folder(tmp_path / "a" / "b", True).close()
    assert {path.stat().st_ino for path in (tmp_path, tmp_path / "a")} <= synced


@pytest.mark.parametrize("verb", ["export", "import"])
def test_kill_9_loses_and_doubles_nothing(tmp_path, verb):
    spool, files = tmp_path / "spool", tmp_path / "files"
    idents = fill(spool, letters(1500 if PROVE else 500))
    export = ["queue", "export", "--all", "--to", str(files), "--delete"]
    if verb == "import":
        cli(spool, *export)
    words = export if verb == "export" else ["queue", "import", str(files)]
    history = spool / "history"
    shutil.rmtree(history, ignore_errors=True)
    command = [sys.executable, "-m", "relaymta", *words, "--spool", str(spool)]
    with subprocess.Popen(command, start_new_session=True) as process:
        wait_for(lambda: any(path.stat().st_size for path in history.glob("*")) or process.poll() is not None, what="a change")
        os.killpg(process.pid, signal.SIGKILL)
    here = {row["id"] for row in listed(spool)}
    complete = {path.stem for path in files.glob("*.json")}
    assert here | complete == set(idents)
    assert all((files / f"{ident}.eml").exists() and json.loads((files / f"{ident}.json").read_text()) for ident in complete)
    if verb == "export":
        cli(spool, *export, "--force")
        assert not listed(spool) and {path.stem for path in files.glob("*.json")} == set(idents)
    else:
        assert complete == set(idents)
        cli(spool, "queue", "import", str(files))
        assert sorted(row["id"] for row in listed(spool)) == idents


def test_with_a_running_relay(tmp_path, ledger):
    """What is imported is delivered once, also if the import is repeated."""
    files = tmp_path / "files"
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}", workers=2) as relay:
        relay.cli("policy", "hold", "--domain", "d.example", "--for", "1h")
        large = "Subject: large\r\n\r\n" + "0123456789abcde\r\n" * 100_000
        for number in range(6):
            relay.send(f"X-Ledger: {number}\r\n{large if number == 5 else 'Subject: x'}\r\n\r\nx\r\n")
        wait_for(lambda: sum(row["held"] for row in relay.summary()) == 6)

        def rows() -> list[str]:
            return relay.cli("queue", "list", "--json").stdout.splitlines()

        before = rows()
        out = json.loads(relay.cli("queue", "export", "--all", "--to", str(files), "--delete", "--json").stdout)
        assert (out["exported"], out["deleted"]) == (6, 6) and relay.summary() == []
        assert large.encode() in (files / f"{json.loads(before[5])['id']}.eml").read_bytes()
        for times in range(2):
            done = relay.cli("queue", "import", str(files))
            assert done.stdout.startswith(f"import: {0 if times else 6} messages are in the queue"), done
        assert rows() == before
        assert len(relay.events("deleted")) == 6 and len(relay.events("queued")) == 12
        relay.cli("policy", "remove", "hold", "recipient_domain=d.example")
        wait_for(lambda: len(relay.events("delivered")) == 6)
        done = relay.cli("queue", "import", str(files))
        assert done.stdout == "import: 0 messages are in the queue; 6 skipped\n"
        assert done.stderr.count("was imported before, and has left the queue") == 6
    assert ledger.counts() == {str(number): 1 for number in range(6)}


async def test_what_is_in_flight_or_has_changed_stays(tmp_path):
    async with Bench(tmp_path) as bench:
        flying, tried, free, gone = [await bench.put() for _ in range(4)]
        found = {ident: known for ident, known, _ in await bench.queue.records([flying, tried, free, gone])}
        entries = {entry.ident: entry for entry in await bench.next(4)}
        for ident in (free, gone, tried):
            if ident == free:
                bench.queue.put_back(entries[ident])
            elif ident == gone:
                bench.queue.finish(entries[ident], None)
            else:
                bench.queue.finish(entries[ident], {0: Attempt(wall_ms(), TRANSIENT, "rcpt", "mx", 451, "", "x")}, 3_600_000)
        await until(lambda: len(bench.events.outcomes) == 2)
        bench.queue.entries.paused = True
        results = await bench.queue.delete_unchanged(found)
        assert results == {flying: "in flight", tried: "changed", free: "deleted", gone: "gone"}
        left = await bench.queue.records([flying, tried, free, gone])
        assert [bool(record) for _, _, record in left] == [True, True, False, False]
        bench.queue.finish(entries[flying], None)


@root_only
def test_root_writes_where_only_root_may_and_leaves_nothing_in_the_spool(open_folder):  # noqa: F811
    relay = relay_of_nobody(open_folder, free_port())
    spool, files = relay.spool, open_folder / "files"
    fill(spool, letters(2))
    for path in (spool, *spool.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    log = ["--set", f"log.file={open_folder}/log/relay.log"]
    for words in (["export", "--all", "--to", str(files), "--delete"], ["import", str(files)]):
        subprocess.run(
            [sys.executable, "-m", "relaymta", "queue", *words, "--spool", str(spool), *log], check=True, timeout=PATIENCE
        )
    assert {path.stat().st_uid for path in files.iterdir()} == {0} and len(list(files.iterdir())) == 4
    assert {path.stat().st_uid for path in (spool, *spool.rglob("*"))} == {NOBODY}


def test_the_folder_that_a_child_uses_says_what_is_wrong(tmp_path):
    here = tmp_path / "here"
    folder = RootsFolder(here, True)
    here.rename(tmp_path / "moved")  # whoever may, while root works in it
    here.mkdir()
    try:
        os.close(folder.create("x"))
        folder.place("x", False)
        os.close(folder.create("x"))
        with pytest.raises(FileExistsError):
            folder.place("x", False)
        folder.place("x", True)
        with pytest.raises(FileNotFoundError):
            folder.open("y")
        os.close(folder.open("x"))
        assert folder.has("x") and not folder.has("y") and list(folder.names()) == ["x"]
        assert not list(here.iterdir())
    finally:
        folder.close()


def test_large_messages_take_little_memory(tmp_path):
    spool, files = tmp_path / "spool", tmp_path / "files"
    data = b"Subject: large\r\n\r\n" + b"0123456789abcde\r\n" * (12 << 20 >> 4)
    (ident,) = fill(spool, [("a@b.example", ["c@d.example"], data)])

    def most() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (250 << 20, 250 << 20))

    for words in (["export", ident, "--to", str(files), "--delete"], ["import", str(files)]):
        command = [sys.executable, "-m", "relaymta", "queue", *words, "--spool", str(spool)]
        subprocess.run(command, check=True, timeout=PATIENCE, preexec_fn=most)
    assert [data for _, data in histories(spool)] == [data] and format_id(parse_id(ident)) == ident
