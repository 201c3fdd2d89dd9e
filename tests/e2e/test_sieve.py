"""Sieve scripts of users in the running relay: mail by SMTP and LMTP, what is sent on, and what a kill leaves."""

import json
import re
from pathlib import Path

import pytest

from relaymta.store.files import MailFiles
from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.mailboxes import LOCAL, Load, create, kept, kill_under_load, shown, verified
from tests.support.prove import in_prove

ROUNDS = 30 if PROVE else 2


def put(relay: Relay, name: str, text: str, folder: Path) -> None:
    """Give a user an active script, by the command."""
    file = folder / f"{name}.sieve"
    file.write_text(text)
    relay.cli("sieve", "put", "--activate", f"{name}@local.example", str(file))


def to_outside(peer: FakeMx) -> str:
    return f'{LOCAL},{{name="out",hosts=["127.0.0.1:{peer.port}"],tls="off"}}'


@pytest.fixture
def peer():
    with FakeMx({}) as peer:
        yield peer


def test_scripts_file_redirect_reply_reject_and_discard(tmp_path, peer):
    with kept(tmp_path, workers=2, routes=to_outside(peer)) as relay:
        create(relay, "alice", "bob", "carol", "dave")
        put(relay, "alice", 'require ["fileinto", "mailbox"]; if header :contains "subject" "list" '
            '{ fileinto :create "Lists/all"; }', tmp_path)  # fmt: skip
        put(relay, "bob", 'require ["vacation", "copy"]; redirect :copy "bob@far.example"; vacation "I am away";', tmp_path)
        put(relay, "carol", 'require "reject"; reject "not at this address";', tmp_path)
        put(relay, "dave", "discard;", tmp_path)
        everyone = [f"{name}@local.example" for name in ("alice", "bob", "carol", "dave")]
        text = "From: s@x.example\r\nTo: bob@local.example\r\nSubject: a list\r\n\r\nx\r\n"
        relay.send(text, "s@x.example", *everyone)
        wait_for(lambda: len(peer.messages) == 3, what="what is sent", seconds=PATIENCE)
        relay.send(text, "s@x.example", everyone[1])
        wait_for(lambda: len(peer.messages) == 4, what="the second copy")
        wait_for(lambda: relay.summary() == [], what="an empty queue")
        assert shown(relay, "alice")["Lists/all"] == ["a list"] and shown(relay, "alice")["INBOX"] == []
        assert shown(relay, "bob")["INBOX"] == ["a list"] * 2
        assert shown(relay, "carol")["INBOX"] == shown(relay, "dave")["INBOX"] == []
        sent = sorted((sender, to[0]) for sender, to, _ in peer.messages)
        assert sent == [("", "s@x.example")] * 2 + [("s@x.example", "bob@far.example")] * 2
        told = b"\n".join(data for sender, _, data in peer.messages if not sender)
        assert b"I am away" in told and b"Auto-Submitted: auto-replied" in told
        assert b"not at this address" in told and b"carol@local.example" in told
        assert all(data.startswith(b"Delivered-To: bob@local.example\r\n") for sender, _, data in peer.messages if sender)
        said = {one["user"]: one["actions"] for one in relay.events("sieve")}
        assert said["dave@local.example"] == ["line 1: discard"] and said["carol@local.example"] == ["line 1: reject"]
        assert relay.stop() == 0
    verified(relay)


def test_a_redirect_in_a_circle_ends(tmp_path, peer):
    with kept(tmp_path, routes=to_outside(peer)) as relay:
        create(relay, "alice", "bob")
        put(relay, "alice", 'redirect "bob@local.example";', tmp_path)
        put(relay, "bob", 'redirect "alice@local.example";', tmp_path)
        relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: shown(relay, "alice")["INBOX"] == ["x"], what="the end of the circle")
        wait_for(lambda: relay.summary() == [], what="an empty queue")
        assert shown(relay, "bob")["INBOX"] == [] and peer.messages == []


def test_a_redirect_to_an_alias_reaches_all_that_it_stands_for(tmp_path, peer):
    with kept(tmp_path, routes=to_outside(peer)) as relay:
        create(relay, "alice", "bob", "carol")
        relay.cli("mailbox", "alias", "team@local.example", "bob@local.example", "x@far.example")
        relay.cli("mailbox", "alias", "away@local.example", "y@far.example")
        put(relay, "alice", 'redirect "team@local.example";', tmp_path)
        put(relay, "carol", 'redirect "away@local.example";', tmp_path)
        relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "alice@local.example", "carol@local.example")
        wait_for(lambda: relay.summary() == [], what="an empty queue")
        assert sorted(to for _, to, _ in peer.messages) == [["x@far.example"], ["y@far.example"]]
        assert shown(relay, "bob")["INBOX"] == ["x"]


def test_a_large_message_is_redirected_whole(tmp_path, peer):
    with kept(tmp_path, routes=to_outside(peer)) as relay:
        create(relay, "alice")
        put(relay, "alice", 'redirect "ann@far.example";', tmp_path)
        body = "Subject: large\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000
        relay.send(body, "s@x.example", "alice@local.example")
        wait_for(lambda: len(peer.messages) == 1, what="the copy")
        assert peer.messages[0][2].endswith(body.encode()) and shown(relay, "alice")["INBOX"] == []
        wait_for(lambda: not list((relay.spool / "shard-0/bodies/big").iterdir()), what="the files to go")


def test_the_commands(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        wrong = tmp_path / "wrong.sieve"
        wrong.write_text('require "fileinto";\nif true {\n  filinto "x";\n}\n')
        found = relay.cli("sieve", "put", "alice@local.example", str(wrong), check=False)
        assert found.returncode == 65
        assert found.stderr.strip().endswith('wrong.sieve:3:3: unknown command "filinto" (did you mean "fileinto"?)')
        put(relay, "alice", "keep;\n", tmp_path)
        rows = [json.loads(line) for line in relay.cli("sieve", "list", "--json", "alice@local.example").stdout.splitlines()]
        assert [(row["script"], row["active"]) for row in rows] == [("alice", True)]
        assert relay.cli("sieve", "get", "alice@local.example").stdout == "keep;\n"
        assert relay.cli("sieve", "remove", "alice@local.example", "alice", check=False).returncode != 0
        assert relay.cli("sieve", "get", "alice@local.example", "other", check=False).returncode == 1


@pytest.mark.parametrize("what", [*in_prove("group"), "worker"])
def test_nothing_is_lost_or_filed_twice_when_processes_are_killed(tmp_path, what, peer):
    with kept(tmp_path, workers=2, routes=to_outside(peer)) as relay:
        create(relay, "alice", "bob")
        for name in ("alice", "bob"):
            put(relay, name, f'require "copy"; redirect :copy "{name}@far.example";', tmp_path)
        load = Load(relay, ["alice", "bob"], 4)
        kill_under_load(relay, load, what, ROUNDS)
        wait_for(lambda: all(row["messages"] == row["held"] for row in relay.summary()), seconds=4 * PATIENCE)
        relay.cli("queue", "release", "--all")  # what was probed when a worker was killed again
        wait_for(lambda: relay.summary() == [], what="an empty queue", seconds=4 * PATIENCE)
        load.check()
        redirected = {(to[0].partition("@")[0], _subject(data)) for _, to, data in peer.messages}
        assert [pair for pair in load.acknowledged if pair not in redirected] == []
        assert relay.stop() == 0
    verified(relay)


def _subject(data: bytes) -> str:
    found = re.search(rb"^Subject: (\S+)", data, re.M)
    assert found is not None
    return found[1].decode()


def test_scripts_stay_with_the_user_who_is_moved_and_are_gone_with_the_user(tmp_path):
    with kept(tmp_path, workers=2) as relay:
        create(relay, "alice")
        put(relay, "alice", 'require ["fileinto", "mailbox"]; fileinto :create "Box";', tmp_path)
        with MailFiles(relay.spool / "mail") as files:
            shard = files.directory.known("alice@local.example").shard
        relay.cli("mailbox", "move", "alice@local.example", str(1 - shard))
        relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: shown(relay, "alice").get("Box") == ["x"], what="the message")
        relay.cli("mailbox", "delete", "--now", "alice@local.example")
        assert relay.stop() == 0
    verified(relay)


def test_a_dsn_for_an_alias_goes_to_where_it_leads_elsewhere(tmp_path, peer):
    peer.rules["RCPT"] = {"nobody@far.example": b"550 5.1.1 no such user\r\n"}
    with kept(tmp_path, routes=to_outside(peer)) as relay:
        create(relay, "alice")
        relay.cli("mailbox", "alias", "list@local.example", "alice@local.example", "owner@far.example")
        relay.cli("mailbox", "alias", "away@local.example", "owner@far.example")
        relay.send("Subject: x\r\n\r\nx\r\n", "list@local.example", "nobody@far.example")
        relay.send("Subject: x\r\n\r\nx\r\n", "away@local.example", "nobody@far.example")
        wait_for(lambda: len(peer.messages) == 2, what="both DSNs")
        wait_for(lambda: relay.summary() == [], what="an empty queue")
        assert [(sender, to) for sender, to, _ in peer.messages] == [("", ["owner@far.example"])] * 2
        assert all(b"multipart/report" in data and b"nobody@far.example" in data for _, _, data in peer.messages)
        assert len(shown(relay, "alice")["INBOX"]) == 1
