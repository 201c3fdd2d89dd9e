"""Mail that stays: from SMTP through the queue into mailboxes, and what becomes of it when processes are killed."""

import json
import re
import smtplib
import subprocess
from pathlib import Path

import pytest

from relaymta.control import program
from relaymta.ident import parse_id
from relaymta.store.files import MailFiles
from relaymta.store.rows import DONE, FILED, MailShard
from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.mailboxes import LOCAL, Load, create, kept, kill_under_load, shown, verified
from tests.support.programs import need
from tests.support.prove import in_prove
from tests.support.traced import BEGINS, CALLS, Syncs, moments

ROUNDS = 30 if PROVE else 2  # of kills


def replies(relay: Relay, *recipients: str, sender: str = "s@x.example") -> list[tuple[int, str]]:
    with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
        client.ehlo()
        client.mail(sender)
        return [(code, text.decode()) for code, text in map(client.rcpt, recipients)]


@pytest.mark.parametrize("workers", [*in_prove(1), 2])
def test_mail_is_filed_and_shown(tmp_path, workers):
    with kept(tmp_path, workers=workers) as relay:
        create(relay, "alice", "bob")
        relay.cli("mailbox", "alias", "team@local.example", "alice@local.example", "bob@local.example")
        relay.send("Subject: one\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
        relay.send("Subject: two\r\n\r\nx\r\n", "s@x.example", "alice+detail@local.example", "team@local.example")
        relay.send("Subject: large\r\n\r\n" + "x" * 70 + "\r\n" * 1_200_000, "s@x.example", "bob@local.example")
        wait_for(lambda: len(relay.events("delivered")) == 3, what="delivery")
        assert sorted(shown(relay, "alice")["INBOX"]) == ["one", "two", "two"]
        assert sorted(shown(relay, "bob")["INBOX"]) == ["large", "two"]
        assert relay.summary() == []
        delivered = relay.events("delivered")[0]
        assert (delivered["peer"], delivered["route"], delivered["reply"]) == ("mailbox", "here", "250 2.1.5 filed")
        listed = [json.loads(line) for line in relay.cli("mailbox", "list", "--json").stdout.splitlines()]
        assert [row["user"] for row in listed] == ["alice@local.example", "bob@local.example"]
        assert {row["shard"] for row in listed} == set(range(workers))
        text = relay.cli("mailbox", "show", "--messages", "alice@local.example").stdout
        assert "INBOX: 3 messages, 3 unseen" in text and text.count("  two") == 2
        found = json.loads(relay.cli("mailbox", "show", "--messages", "--json", "alice@local.example").stdout)
        assert [row["subject"] for row in found["mailboxes"][2]["list"]] == shown(relay, "alice")["INBOX"]
        assert relay.stop() == 0
    with relay:
        assert sorted(shown(relay, "alice")["INBOX"]) == ["one", "two", "two"]


def test_unknown_and_disabled_users_are_rejected_at_rcpt(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice", "bob")
        relay.cli("mailbox", "disable", "bob@local.example")
        found = replies(
            relay,
            "alice@local.example",
            "alise@local.example",
            "bob@local.example",
            "ALICE+x@LOCAL.example",
            "x@elsewhere.example",
        )
        assert [code for code, _ in found] == [250, 550, 550, 250, 250]
        assert [text[:5] for _, text in found][1:3] == ["5.1.1", "5.2.1"]
        relay.cli("mailbox", "alias", "@local.example", "alice@local.example")
        assert [code for code, _ in replies(relay, "anybody@local.example", "bob@local.example")] == [250, 550]
        relay.cli("mailbox", "enable", "bob@local.example")
        assert [code for code, _ in replies(relay, "bob@local.example")] == [250]


def test_an_alias_of_addresses_elsewhere_is_replaced_when_the_message_is_accepted(tmp_path):
    with FakeMx({}) as peer:
        routes = f'{LOCAL},{{name="out",hosts=["127.0.0.1:{peer.port}"],tls="off"}}'
        with kept(tmp_path, routes=routes) as relay:
            create(relay, "alice")
            relay.cli("mailbox", "alias", "both@local.example", "alice@local.example", "ann@far.example")
            relay.send("Subject: x\r\n\r\nx\r\n", "s@x.example", "both@local.example")
            wait_for(lambda: len(relay.events("delivered")) == 2, what="delivery")
            assert shown(relay, "alice")["INBOX"] == ["x"]
            assert [recipients for _, recipients, _ in peer.messages] == [["ann@far.example"]]


@pytest.mark.parametrize(("over", "event", "code"), [("defer", "deferred", "452 4.2.2"), ("refuse", "bounced", "552 5.2.2")])
def test_a_full_user_hurts_nobody_else(tmp_path, over, event, code):
    with kept(tmp_path, f"mailboxes.over_quota={over}", "queue.max_age=1h") as relay:
        create(relay, "alice", "bob")
        relay.cli("mailbox", "create", "--quota", "1k", "carol@local.example")
        everybody = [f"{name}@local.example" for name in ("alice", "carol", "bob")]
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.helo()  # without SIZE it is known when it is filed
            assert client.sendmail("", everybody, "Subject: x\r\n\r\n" + "x" * 70 + "\r\n" * 600) == {}
        found = wait_for(lambda: relay.events(event), what=event)
        assert found[0]["recipient"] == "carol@local.example" and found[0]["reply"].startswith(code)
        assert [shown(relay, name)["INBOX"] for name in ("alice", "bob", "carol")] == [["x"], ["x"], []]
        if over == "defer":
            explained = relay.cli("message", "explain", found[0]["id"]).stdout
            assert "452 4.2.2 the mailbox is full" in explained and "cure: raise the quota" in explained
            assert "filed" in relay.cli("message", "history", found[0]["id"]).stdout
            relay.cli("mailbox", "quota", "carol@local.example", "none")
            relay.cli("queue", "flush", "--all")
            wait_for(lambda: shown(relay, "carol")["INBOX"] == ["x"], what="the retry")
            assert [shown(relay, name)["INBOX"] for name in ("alice", "bob")] == [["x"], ["x"]]


@pytest.mark.parametrize(("over", "text"), [("defer", "452 4.2.2"), ("refuse", "552 5.2.2")])
def test_a_full_user_is_known_at_rcpt(tmp_path, over, text):
    with kept(tmp_path, f"mailboxes.over_quota={over}", workers=2) as relay:
        create(relay, "alice", "dave")
        create(relay, "bob", "carol", octets=1024)  # one in each shard
        relay.cli("mailbox", "alias", "poor@local.example", "bob@local.example", "carol@local.example")
        relay.cli("mailbox", "alias", "all@local.example", "bob@local.example", "carol@local.example", "alice@local.example")
        for _ in range(4):  # connections are spread over both workers
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
                client.ehlo()
                for size, codes in ((2000, "GFFFG"), (0, "GGGGG")):
                    client.mail("s@x.example", (f"SIZE={size}",))
                    found = [client.rcpt(f"{name}@local.example") for name in ("alice", "bob", "carol", "poor", "all")]
                    said = ["G" if code == 250 else "F" for code, _ in found]
                    assert "".join(said) == codes
                    assert all(f"{code} {reply.decode()}".startswith(text) for code, reply in found if code != 250)
                    client.rset()
        relay.send("Subject: x\r\n\r\n" + "x" * 500, "s@x.example", "carol@local.example")
        wait_for(lambda: relay.events("delivered"), what="delivery")
        relay.cli("mailbox", "quota", "carol@local.example", "100")
        assert [code for code, _ in replies(relay, "carol@local.example", "poor@local.example")] == [int(text[:3]), 250]


SENTENCES = [
    (("create", "eve@other.example"), 69, 'no route keeps mail for other.example (did you mean "local.example"?)'),
    (("create", "alice@local.example"), 1, "alice@local.example exists already"),
    (("create", "--quota", "5GG", "x@local.example"), 64, 'expected a size such as "5G", "none" or "default"'),
    (("create", "nobody"), 64, "is not an address"),
    (("create", ""), 64, "it is empty"),
    (("create", "a b@local.example"), 64, "'a b@local.example' is not an address"),
    (("create", "@local.example"), 64, "'@local.example' is not an address"),
    (("alias", "a@local.example", "x\r\nDATA@far.example"), 64, "is not an address"),
    (("alias", "a@local.example", "root"), 64, "'root' is not an address"),
    (("alias", "@far.example", "alice@local.example"), 69, "no route keeps mail for far.example"),
    (("alias", "a@local.example", "a@local.example"), 69, "a@local.example would be an alias of itself"),
    (
        ("alias", "a@local.example", "alise@local.example"),
        69,
        'nobody has alise@local.example (did you mean "alice@local.example"?)',
    ),
    (("alias", "a@local.example"), 64, "to which addresses?"),
    (("alias", "--remove", "nothing@local.example"), 1, "no such alias: nothing@local.example"),
    (("show", "alise@local.example"), 1, 'no such mailbox user: alise@local.example (did you mean "alice@local.example"?)'),
    (("disable", "alise@local.example"), 1, "no such mailbox user: alise@local.example"),
    (("quota", "alice@local.example", "lots"), 64, "expected a size"),
    (("quota", "alice@local.example", ""), 64, "OCTETS: it is empty"),
    (("quota", "alice@local.example", "99999999999999G"), 64, 'expected at most "1073741824G"'),
    (("quota", "alice@local.example", "1G", "--messages", "9" * 30), 64, "is not in the range"),
    (("create", "--quota", "", "x@local.example"), 64, "--quota: it is empty"),
    (("create", b"a\xff@local.example"), 64, "is not an address"),
    (("alias", "@", "alice@local.example"), 64, "is not an address"),
    (("alias", "a@local.example", ""), 64, "TARGETS: it is empty"),
    (("alias", "known@local.example", "alice@local.example", "far@far.example"), 0, ""),
    (("create", "known@local.example"), 1, "known@local.example is an alias of alice@local.example, far@far.example"),
    (
        ("show", "known@local.example"),
        1,
        "no such mailbox user: known@local.example (it is an alias of alice@local.example, far@",
    ),
    (("rename", "alice@local.example", "bad"), 64, "'bad' is not an address"),
    (("backup", ""), 64, "it is empty"),
    (("export", "alice@local.example", ""), 64, "it is empty"),
    (("import", "alice@local.example", ""), 64, "it is empty"),
    (("restore", ".", ""), 64, "ADDRESS: it is empty"),
]


def test_mistakes_are_named(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "alice")
        for words, status, sentence in SENTENCES:
            found = relay.cli("mailbox", *words, check=False)
            assert (found.returncode, sentence in found.stderr, "Traceback" in found.stderr) == (status, True, False), found
    found = relay.cli("mailbox", "create", "x@local.example", check=False)
    assert found.returncode == 69 and "needs the running daemon" in found.stderr


PASSWORDS = [
    (b"", "there is none on standard input"),
    (b"a\0b\n", "it has a NUL"),
    (b"\xff\xfe\n", "or is not UTF-8"),
    (b"x" * 100_000, "it has more than 1000 characters"),
]


def test_what_cannot_be_a_password_is_named_and_not_shown(tmp_path):
    with kept(tmp_path) as relay:
        create(relay, "a")
        for given, sentence in PASSWORDS:
            command = [*program("relaymta.cli"), "mailbox", "password", "a@local.example", "--spool", str(relay.spool)]
            found = subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE)
            assert (found.returncode, sentence in found.stderr.decode(), b"xxx" in found.stderr) == (64, True, False), found


def test_a_quota_of_octets_leaves_that_of_messages_alone(tmp_path):
    with kept(tmp_path) as relay:
        relay.cli("mailbox", "create", "--messages", "2", "alice@local.example")
        relay.cli("mailbox", "quota", "alice@local.example", "1G")
        for number in range(2):
            relay.send(f"Subject: {number}\r\n\r\n", "s@x.example", "alice@local.example")
        wait_for(lambda: len(relay.events("delivered")) == 2, what="delivery")
        assert [code for code, _ in replies(relay, "alice@local.example")] == [452]
        assert "is none" in relay.cli("mailbox", "quota", "alice@local.example", "0", "--messages", "-1").stdout
        assert [code for code, _ in replies(relay, "alice@local.example")] == [250]


def test_without_a_mailbox_route_there_are_no_mailboxes(tmp_path):
    with Relay(tmp_path, "127.0.0.1:9") as relay:
        found = relay.cli("mailbox", "create", "a@b.example", check=False)
        assert found.returncode == 69 and 'no route has protocol = "mailbox"' in found.stderr
        assert not (relay.spool / "mail").exists()


def test_strace_shows_that_a_message_leaves_the_queue_when_its_mailbox_has_it(tmp_path):
    """In this order: the queue's syncs, 250, the store's syncs, the queue's commit of the outcome, and only then the commit by
    which the store forgets what it has filed."""
    trace = tmp_path / "trace"
    wrap = (need("strace"), "-f", "-y", "-s", "60", "-o", str(trace), "-e", f"trace={CALLS}")
    relay = Relay(tmp_path, None, f"route=[{LOCAL}]", wrap=wrap)
    count = 3
    with relay:
        create(relay, "alice")
        for number in range(count + 1):  # the end of the last one may be missing from the trace
            relay.send(f"Subject: {number}\r\n\r\nx\r\n", "s@x.example", "alice@local.example")
            wait_for(lambda: len(relay.events("delivered")) == number + 1, what="delivery")  # noqa: B023
            wait_for(lambda: not _remembered(relay.spool), what="the store to forget it")
    queue, store = Syncs("spool/shard-0"), Syncs("mail/shard-0")
    steps: list[str] = []
    for when, call in moments(trace.read_text()):
        queue.take(when, call)
        store.take(when, call)
        if when == BEGINS and "queued as" in call and re.match(r"(write|sendto|sendmsg|writev)\(", call):
            assert queue.state == "committed", f"{call} in state {queue.state}"
            steps.append("queued")
            queue.clear()
            store.clear()
        elif steps and steps[-1] == "queued":
            assert not queue.begun, "the queue was changed before the mailbox had the message"
            if store.state == "committed":
                steps.append("filed")
                store.clear()
        elif steps and steps[-1] == "filed":
            assert not store.begun, "the store was changed before the queue had recorded the outcome"
            if queue.committed:
                steps.append("ended")
        elif steps and steps[-1] == "ended" and store.committed:
            steps.append("forgotten")
            queue.clear()
    assert steps[: 4 * count] == ["queued", "filed", "ended", "forgotten"] * count


@pytest.mark.parametrize("what", [*in_prove("group"), "workers"])
def test_nothing_is_lost_or_filed_twice_when_processes_are_killed(tmp_path, what):
    users = [f"u{number}" for number in range(8)]
    relay = kept(tmp_path, "delivery.first_retry=1", workers=2).start()
    create(relay, *users)
    load = Load(relay, users, 4)
    kill_under_load(relay, load, what, ROUNDS)
    try:
        wait_for(lambda: len(relay.worker_pids()) == 2, what="both workers")
        relay.cli("queue", "release", "--all")  # what was probed when a worker was killed again
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: relay.summary() == [], what="the queue to be empty")
        load.check()
        assert len(load.acknowledged) > 20
        assert relay.stop() == 0
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()
    verified(relay)


def test_what_was_filed_of_messages_that_have_ended_is_forgotten(tmp_path):
    """As kills of the queue and the store at the same time leave it: notes that the queue has had no time to remove."""
    with kept(tmp_path, workers=2) as relay:
        create(relay, "alice")
        create(relay, "carol", octets=1024)
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.helo()
            client.sendmail("", ["carol@local.example"], "Subject: x\r\n\r\n" + "x" * 70 + "\r\n" * 600)
        (deferred,) = wait_for(lambda: relay.events("deferred"), what="deferred")
        assert relay.stop() == 0
        waiting = parse_id(deferred["id"])
        with MailFiles(relay.spool / "mail") as files:
            users = {user.address.partition("@")[0]: user for user in files.directory.users(0, 10)}
        notes = {(waiting, 0, users["carol"].ident)}  # filed, though the queue does not know it
        past = {(waiting - number, recipient, users["alice"].ident) for number in range(1, 1200) for recipient in (0, 7)}
        for name, rows in (("carol", notes), ("alice", past)):
            shard = MailShard(relay.spool / f"mail/shard-{users[name].shard}/lmdb")
            with shard.env.begin(write=True) as txn:
                for row in rows:
                    txn.put(DONE.pack(*row), FILED.pack(1, 0), db=shard.tables["done"])
            shard.close()
        relay.start()
        wait_for(lambda: sum(map(_remembered, (relay.spool, relay.spool), (0, 1))) == 1, what="the notes to go")
        relay.cli("mailbox", "quota", "carol@local.example", "none")
        relay.cli("queue", "flush", "--all")
        wait_for(lambda: relay.summary() == [], what="the queue to be empty")
        assert shown(relay, "carol")["INBOX"] == []  # what is noted is not filed again


def _remembered(spool: Path, number: int = 0) -> int:
    """How many recipients a shard remembers to have filed."""
    shard = MailShard(spool / f"mail/shard-{number}/lmdb", readonly=True)
    try:
        with shard.reading() as txn:
            return int(txn.stat(shard.tables["done"])["entries"])
    finally:
        shard.close()
