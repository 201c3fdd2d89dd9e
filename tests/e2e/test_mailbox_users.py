"""What operators do with users whose mail is kept here: delete, rename, move, back up, restore, verify; while mail comes in, and
when processes are killed meanwhile."""

import json
import os
import signal
import smtplib
import subprocess
import sys
import time

import pytest

from relaymta import control
from relaymta.control import frames
from relaymta.store.files import MailFiles
from tests.support.daemon import Relay, wait_for
from tests.support.mailboxes import Load, create, kept, shown, verified
from tests.support.prove import in_prove


def listed(relay: Relay) -> dict[str, dict[str, object]]:
    rows = [json.loads(line) for line in relay.cli("mailbox", "list", "--json").stdout.splitlines()]
    return {row["user"].partition("@")[0]: row for row in rows}


def code(relay: Relay, name: str) -> int:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=30) as client:
        client.ehlo()
        client.mail("s@x.example")
        return client.rcpt(f"{name}@local.example")[0]


def test_a_deleted_user_can_come_back_until_the_mail_is_removed(tmp_path):
    with kept(tmp_path, workers=2) as relay:
        create(relay, "alice", "bob")
        relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "bob@local.example", "alice@local.example")
        wait_for(lambda: shown(relay, "bob")["INBOX"] == ["x"], what="delivery")
        relay.cli("mailbox", "alias", "team@local.example", "alice@local.example", "bob@local.example")
        found = relay.cli("mailbox", "delete", "bob@local.example", check=False)
        assert found.returncode == 69 and "team@local.example would lead to nobody" in found.stderr
        relay.cli("mailbox", "alias", "team@local.example", "alice@local.example")
        relay.cli("mailbox", "delete", "bob@local.example")
        assert code(relay, "bob") == 550 and listed(relay)["bob"]["state"] == "deleted"
        for words, sentence in (
            (("create", "bob@local.example"), "bob@local.example was deleted: `relaymta mailbox enable` brings the user back"),
            (("alias", "team@local.example", "bob@local.example"), "nobody has bob@local.example"),
            (("move", "bob@local.example", "0"), "bob@local.example is deleted"),
        ):
            found = relay.cli("mailbox", *words, check=False)
            assert found.returncode == (1 if words[0] == "create" else 69) and sentence in found.stderr
        relay.cli("mailbox", "enable", "bob@local.example")
        assert code(relay, "bob") == 250 and shown(relay, "bob")["INBOX"] == ["x"]
        relay.cli("mailbox", "delete", "--now", "bob@local.example")
        assert code(relay, "bob") == 550 and list(listed(relay)) == ["alice"]
        create(relay, "bob")
        assert shown(relay, "bob")["INBOX"] == []
        verified(relay)
        assert relay.stop() == 0
    verified(relay)


def test_a_renamed_user_keeps_the_old_address(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice", "bob")
        relay.cli("mailbox", "rename", "alice@local.example", "anna@local.example")
        relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: shown(relay, "anna")["INBOX"] == ["x"], what="delivery")
        for words, status, sentence in (
            (("show", "alice@local.example"), 1, "it is an address of anna@local.example"),
            (("rename", "anna@local.example", "bob@local.example"), 1, "bob@local.example exists already"),
            (("rename", "anna@local.example", "anna@other.example"), 69, "no route keeps mail for other.example"),
            (("move", "anna@local.example", "3"), 69, "there is no shard 3 (there are 0 to 0)"),
        ):
            found = relay.cli("mailbox", *words, check=False)
            assert (found.returncode, sentence in found.stderr) == (status, True), found
        found = relay.cli("mailbox", "move", "anna@local.example", "0")
        assert (found.stdout, found.stderr) == ("anna@local.example is in shard 0 already\n", "")


def test_a_backup_into_a_place_that_cannot_be_written_is_refused_before_it(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        (tmp_path / "file").write_text("")
        for place, sentence in (("file/new", "Not a directory"), ("file", "File exists")):
            for words in (["backup"], ["export", "alice@local.example"]):
                found = relay.cli("mailbox", *words, str(tmp_path / place), check=False)
                assert (found.returncode, found.stdout) == (74 if place == "file/new" else 64, ""), found
                assert place == "file" or sentence in found.stderr
        relay.cli("mailbox", "backup", str(tmp_path / "new"))


def test_a_user_is_no_alias(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice", "bob")
        for words, status, sentence in (
            (["bob@local.example"], 1, "alice@local.example is a user, and so no alias"),
            (["--remove"], 1, "no such alias: alice@local.example (it is a user)"),
        ):
            found = relay.cli("mailbox", "alias", "alice@local.example", *words, check=False)
            assert (found.returncode, sentence in found.stderr) == (status, True), found
        assert list(listed(relay)) == ["alice", "bob"]


def test_a_message_larger_than_a_request_is_moved_and_restored(tmp_path):
    """From file to file: no frame between processes (64 MB) could hold it."""
    octets = frames.LIMIT + (1 << 20)
    with kept(tmp_path, f"limits.message_size={2 * octets}", workers=2) as relay:
        create(relay, "alice")
        line = "y" * 70 + "\r\n"
        relay.send("Subject: large\r\n\r\n" + line * (octets // len(line)), "s@x.example", "alice@local.example")
        relay.send("Subject: small\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: sorted(shown(relay, "alice")["INBOX"]) == ["large", "small"], what="delivery")
        had = shown(relay, "alice")
        relay.cli("mailbox", "move", "alice@local.example", str(1 - listed(relay)["alice"]["shard"]))
        assert shown(relay, "alice") == had
        assert len(list(relay.spool.glob("mail/shard-*/bodies/big/*"))) == 1
        verified(relay)
        relay.cli("mailbox", "backup", str(tmp_path / "backup"))
        relay.cli("mailbox", "delete", "--now", "alice@local.example")
        relay.cli("mailbox", "restore", str(tmp_path / "backup"), "alice@local.example")
        assert shown(relay, "alice") == had and not list((relay.spool / "mail").glob("backup-*"))
        verified(relay)


@pytest.mark.parametrize("what", ["group", "source", *in_prove("target")])
def test_a_move_that_was_interrupted_goes_on(tmp_path, what):
    relay = kept(tmp_path, "delivery.first_retry=1", workers=2).start()
    try:
        create(relay, "alice")
        here = int(str(listed(relay)["alice"]["shard"]))
        text = "Subject: {}\r\n\r\n" + ("y" * 70 + "\r\n") * 12_000
        for number in range(40):
            relay.send(text.format(number), "s@x.example", "alice@local.example")
        wait_for(lambda: len(shown(relay, "alice")["INBOX"]) == 40, what="delivery")
        pids = relay.worker_pids()
        words = ["mailbox", "move", "alice@local.example", str(1 - here), "--spool", str(relay.spool)]
        moving = subprocess.Popen([sys.executable, "-m", "relaymta", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for(lambda: listed(relay)["alice"]["state"] != "active" or moving.poll() is not None, what="the move to begin")
        time.sleep(0.05)
        if what == "group":
            relay.kill()
            relay.start()
        else:
            os.kill(pids[here if what == "source" else 1 - here], signal.SIGKILL)
        moving.communicate(timeout=60)
        wait_for(lambda: len(relay.worker_pids()) == 2, what="both workers")
        wait_for(lambda: listed(relay)["alice"]["state"] == "active", 60, "the move to go on")
        assert listed(relay)["alice"]["shard"] in (here, 1 - here)
        assert sorted(map(int, shown(relay, "alice")["INBOX"])) == list(range(40))
        relay.send("Subject: 40\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: "40" in shown(relay, "alice")["INBOX"], what="delivery after the move")
        verified(relay)
        assert relay.stop() == 0
        verified(relay)
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()


def test_a_backup_under_load_is_a_state_that_was(tmp_path):
    users = [f"u{number}" for number in range(4)]
    (tmp_path / "a").mkdir()
    relay = kept(tmp_path / "a", workers=2).start()
    backups = []
    try:
        create(relay, *users)
        relay.cli("mailbox", "alias", "all@local.example", *(f"{name}@local.example" for name in users))
        relay.send("Subject: large\r\n\r\n" + ("y" * 70 + "\r\n") * 30_000, "s@x.example", "u0@local.example")
        load = Load(relay, users, 3)
        try:
            for number in range(2):
                before = dict(load.acknowledged)
                time.sleep(0.5)
                relay.cli("mailbox", "backup", str(tmp_path / f"backup-{number}"))
                backups.append((before, tmp_path / f"backup-{number}"))
        finally:
            load.end()
        found = relay.cli("mailbox", "backup", str(tmp_path / "backup-0"), check=False)
        assert found.returncode == 69 and "is not empty" in found.stderr
        found = relay.cli("mailbox", "restore", str(tmp_path / "backup-0"), check=False)
        assert found.returncode == 75 and "the relay is running" in found.stderr
        found = relay.cli("mailbox", "restore", str(tmp_path / "backup-0"), "u0@local.example", check=False)
        assert found.returncode == 1 and "u0@local.example exists already" in found.stderr
        had = shown(relay, "u0")["INBOX"]
        relay.cli("mailbox", "delete", "--now", "u1@local.example", check=False)
        relay.cli("mailbox", "alias", "--remove", "all@local.example")
        relay.cli("mailbox", "delete", "--now", "u0@local.example")
        relay.cli("mailbox", "restore", str(tmp_path / "backup-1"), "u0@local.example")
        again = shown(relay, "u0")["INBOX"]
        assert again == had[: len(again)] and {subject for name, subject in backups[1][0] if name == "u0"} <= set(again)
        assert not list((relay.spool / "mail").glob("backup-*"))
        assert min(path.stat().st_nlink for path in (tmp_path / "backup-0").rglob("*.seg")) > 1
        verified(relay)
        assert relay.stop() == 0
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()
    for number, (before, folder) in enumerate(backups):
        (tmp_path / f"new-{number}").mkdir()
        other = kept(tmp_path / f"new-{number}", workers=2)
        assert "4 users are restored" in other.cli("mailbox", "restore", str(folder)).stdout
        verified(other)
        found = other.cli("mailbox", "restore", str(folder), check=False)
        assert found.returncode == 69 and "has 4 users already" in found.stderr
        with other:
            there = {(name, subject) for name in users for subject in shown(other, name)["INBOX"]}
            assert set(before) <= there
            other.send("Subject: later\r\n\r\nx\r\n", "s@x.example", "all@local.example")
            for name in users:
                wait_for(lambda other=other, name=name: "later" in shown(other, name)["INBOX"], what="delivery")
            verified(other)
            assert other.stop() == 0


def test_what_is_damaged_is_named(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        for number in range(3):
            relay.send(f"Subject: {number}\r\n\r\n{'x' * 500}\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: len(shown(relay, "alice")["INBOX"]) == 3, what="delivery")
        assert relay.stop() == 0
    (segment,) = (relay.spool / "mail" / "shard-0" / "bodies").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[300] ^= 1
    segment.write_bytes(data)
    found = relay.cli("mailbox", "verify", check=False)
    assert found.returncode == 65 and "does not match its checksum" in found.stdout and "1 contradiction" in found.stderr
    messages = relay.cli("mailbox", "show", "--messages", "alice@local.example").stdout
    assert "does not match its checksum" in messages
    found = relay.cli("mailbox", "show", "alice@other.example", check=False)
    assert found.returncode == 1


def test_addresses_that_a_domain_must_have_are_named(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        relay.cli("mailbox", "alias", "abuse@local.example", "alice@local.example")
        (tmp_path / "r.toml").write_text(
            f'hostname = "mx.local.example"\nspool = "{relay.spool}"\n[[listener]]\naddress = "127.0.0.1:{relay.port}"\n'
            '[[route]]\nname = "here"\nprotocol = "mailbox"\nrecipient_domain = ["local.example"]\n'
        )
        found = relay.cli("config", "check", "-c", str(tmp_path / "r.toml")).stdout
        assert "nobody has postmaster@local.example" in found and "abuse@" not in found
        relay.cli("mailbox", "alias", "postmaster@local.example", "alice@local.example")
        assert "nobody has" not in relay.cli("config", "check", "-c", str(tmp_path / "r.toml")).stdout


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    import lmdb

    with kept(tmp_path) as relay:
        create(relay, "alice")
    for path, table in ((relay.spool / "mail/shard-0/lmdb", b"meta"), (relay.spool / "mail/directory", b"meta")):
        environment = lmdb.open(str(path), max_dbs=16)
        with environment.begin(write=True) as txn:
            database = environment.open_db(table, txn)
            before = txn.get(b"schema", db=database)
            txn.put(b"schema", b"99", db=database)
        environment.close()
        found = relay.cli("mailbox", "show", "alice@local.example", check=False)
        assert found.returncode == 69 and "was written by a newer relaymta" in found.stderr and "Traceback" not in found.stderr
        with pytest.raises((AssertionError, TimeoutError)):
            relay.start()
        assert "was written by a newer relaymta" in (tmp_path / "stderr").read_text() + relay.log.read_text()
        environment = lmdb.open(str(path), max_dbs=16)
        with environment.begin(write=True) as txn:
            txn.put(b"schema", before, db=environment.open_db(table, txn))
        environment.close()


def uidvalidities(relay: Relay, name: str) -> list[int]:
    with MailFiles(relay.spool / "mail") as files:
        user = files.directory.known(f"{name}@local.example")
        rows = files.shard(user.shard).rows
        with rows.reading() as txn:
            return [rows.state(txn, row.mailbox).uidvalidity for row in rows.mailboxes(txn, user.ident)]


def test_a_name_that_comes_back_has_higher_uidvalidities(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        for _ in range(3):
            before = max(uidvalidities(relay, "alice"))
            relay.cli("mailbox", "delete", "--now", "alice@local.example")
            create(relay, "alice")
            assert min(uidvalidities(relay, "alice")) > before


def test_a_lost_file_of_a_shard_costs_what_was_in_it_alone(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        relay.send("Subject: lost\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: shown(relay, "alice")["INBOX"] == ["lost"], what="delivery")
        assert relay.stop() == 0
    (segment,) = (relay.spool / "mail/shard-0/bodies").glob("*.seg")
    segment.unlink()
    with relay:
        assert any(f"{segment} is missing" in event["text"] for event in relay.events("warning"))
        relay.send("Subject: new\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: shown(relay, "alice")["INBOX"][1:] == ["new"], what="delivery")
        assert relay.cli("mailbox", "verify", check=False).returncode == 65
        assert relay.stop() == 0
    assert "corrected" in relay.cli("mailbox", "verify", "--repair").stdout
    with relay:
        assert shown(relay, "alice")["INBOX"] == ["new"]
        verified(relay)


def test_a_move_that_cannot_end_is_taken_back_and_hurts_nobody_else(tmp_path):
    relay = kept(tmp_path, "delivery.first_retry=1", workers=2)
    with relay:
        create(relay, "alice", "bob")
        for name in ("alice", "bob"):
            relay.send(f"Subject: {name}\r\n\r\n{'x' * 500}\r\n", "s@x.example", f"{name}@local.example")
            wait_for(lambda name=name: shown(relay, name)["INBOX"] == [name], what="delivery")
        home = int(str(listed(relay)["alice"]["shard"]))
        assert relay.stop() == 0
    (segment,) = (relay.spool / f"mail/shard-{home}/bodies").glob("*.seg")
    data = bytearray(segment.read_bytes())
    data[300] ^= 1
    segment.write_bytes(data)
    with relay:
        move = ("mailbox", "move", "alice@local.example", str(1 - home))
        found = wait_for(  # READY is said when the first worker has its shard: the other one's may have no owner yet
            lambda: (tried := relay.cli(*move, check=False)) and "nobody owns" not in tried.stderr and tried, what="owners"
        )
        assert found.returncode == 69 and "checksum" in found.stderr and listed(relay)["alice"]["state"] == "moving"
        wait_for(lambda: any("cannot be moved" in event["text"] for event in relay.events("warning")), what="a warning")
        relay.send("Subject: meanwhile\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        relay.cli("mailbox", "move", "bob@local.example", str(home))
        relay.cli("mailbox", "move", "alice@local.example", str(home))
        assert listed(relay)["alice"]["state"] == "active"
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: "meanwhile" in shown(relay, "alice")["INBOX"], what="delivery")
        assert relay.stop() == 0


def test_a_restored_user_gets_no_address_of_others(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice", "bob", "carol")
        relay.cli("mailbox", "alias", "sales@local.example", "alice@local.example")
        relay.cli("mailbox", "alias", "info@local.example", "alice@local.example")
        relay.cli("mailbox", "backup", str(tmp_path / "backup"))
        relay.cli("mailbox", "delete", "--now", "alice@local.example")
        relay.cli("mailbox", "alias", "sales@local.example", "bob@local.example")
        relay.cli("mailbox", "alias", "info@local.example", "bob@local.example", "carol@local.example")
        found = relay.cli("mailbox", "restore", str(tmp_path / "backup"), "alice@local.example")
        assert "these addresses belong to others now: info@local.example, sales@local.example" in found.stderr
        with MailFiles(relay.spool / "mail") as files:
            assert [user.address for user in files.directory.find("sales@local.example").users] == ["bob@local.example"]


def test_what_an_interrupted_restore_has_left_is_removed_at_the_next_start(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        ident, shard, _ = control.begin(relay.spool / "control.sock", "mailbox_begin_restore", address="bob@local.example")()
        control.begin(relay.spool / "control.sock", "mailbox_restore", ident=ident, shard=shard, part=["CarriedUser", 7])()
        assert relay.stop() == 0
    assert "is not in the directory" in relay.cli("mailbox", "verify", check=False).stdout
    with relay:
        wait_for(lambda: shard_users(relay) == 1, 30, "the rest to be removed")
        assert relay.stop() == 0
    verified(relay)


def shard_users(relay: Relay) -> int:
    with MailFiles(relay.spool / "mail") as files:
        rows = files.shard(0).rows
        with rows.reading() as txn:
            return sum(1 for _ in rows.users(txn))
