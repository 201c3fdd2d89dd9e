"""IMAP sessions when workers are killed or the relay stops, and clients that behave badly."""

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaymta.store.rows import ID, MailShard
from tests.conftest import PROVE
from tests.support.daemon import wait_for
from tests.support.imap_relay import PASSWORD, ImapRelay, message
from tests.support.mailboxes import shown, verified


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("clients")) as relay:
        yield relay
        relay.close_sessions()
        said = [one["text"] for one in relay.events("warning") if one["worker"] >= 0]
        assert said == []
        verified(relay)


# Workers


def test_the_owner_of_the_mailboxes_is_killed(tmp_path):
    """Sessions of the other worker read all the time; what they were told is done, and what is told in IDLE goes on."""
    with ImapRelay(tmp_path) as relay:
        relay.user("alice")
        home = relay.homes["alice"]
        a, b = relay.session("alice", worker=1 - home), relay.session("alice", worker=1 - home)
        lost = relay.session("alice", "SELECT INBOX", worker=home)
        a.put("INBOX", *(f"s{number}" for number in range(20)))
        for session in (a, b):
            session.ok("SELECT INBOX")
        tag = b.idle()
        appended: list[int] = []
        flagged: set[int] = set()
        answers = []
        for round_ in range(5 if PROVE else 2):
            os.kill(relay.worker_pids()[home], signal.SIGKILL)
            for number in range(40):
                assert a.fetch("UID FETCH 1:20 (FLAGS)").keys() >= set(range(1, 21))
                assert len(a.fetch("7 (BODY.PEEK[])")[7]["BODY[]"]) > 50
                uid = number % 20 + 1
                answer = a.command(f"UID STORE {uid} +FLAGS.SILENT (round{round_})")
                answers.append((answer.status, answer.code))
                if answer.status == "OK":
                    flagged.add(uid)
                answer = a.append("INBOX", message(f"{round_}-{number}"), plus=True)
                answers.append((answer.status, answer.code))
                if answer.status == "OK":
                    appended.append(answer.last.code[1][1][0][0])
            wait_for(lambda: len(relay.worker_pids()) == 2, what="its successor")
            assert all(f"round{round_}" in a.flags()[uid] for uid in flagged)
            flagged.clear()
        assert set(answers) <= {("OK", ""), ("OK", "APPENDUID"), ("NO", "UNAVAILABLE")}
        assert len([one for one in answers if one[0] == "NO"]) < 20  # what waits is asked of the successor
        assert lost.ended() == b""
        found = a.subjects()
        a.ok("NOOP")
        assert set(appended) <= set(a.subjects()) and len(set(a.subjects().values())) == len(a.subjects()), found
        (last,) = a.put("INBOX", "the last")
        told = b.until("EXISTS")
        while told[-1].number != len(a.subjects()):
            told = b.until("EXISTS")
        assert b.done(tag).status == "OK" and b.fetch("* (UID)").popitem()[1]["UID"] == last
        relay.changed_workers()
        relay.close_sessions()
        verified(relay)
        assert relay.stop() == 0


def test_a_client_that_synchronises_hears_of_what_was_repaired(tmp_path):
    with ImapRelay(tmp_path) as relay:
        relay.user("alice")
        a = relay.session("alice", "ENABLE QRESYNC")
        a.put("INBOX", *(f"s{number}" for number in range(1, 9)))
        a.ok("SELECT INBOX")
        a.expunge("2")
        validity, modseq = a.status("INBOX", "UIDVALIDITY", "HIGHESTMODSEQ")
        relay.close_sessions()
        assert relay.stop() == 0
        rows = MailShard(relay.spool / f"mail/shard-{relay.homes['alice']}/lmdb")
        with rows.env.begin(write=True) as txn:
            ((user, _),) = rows.users(txn)
            mailbox = rows.mailbox(txn, user, "INBOX").mailbox
            txn.delete(ID.pack(rows.message(txn, mailbox, 5).object), db=rows.tables["object"])
        rows.close()
        assert relay.cli("mailbox", "verify", check=False).returncode == 65
        relay.cli("mailbox", "verify", "--repair", check=False)
        verified(relay)
        relay.start()
        b = relay.session("alice", "ENABLE QRESYNC")
        told = b.ok(f"SELECT INBOX (QRESYNC ({validity} {modseq} 1:8))")
        (vanished,) = told.named("VANISHED")
        assert vanished.data == (True, [(2, 2), (5, 5)]) and [one.number for one in told.named("EXISTS")] == [6]
        assert b.flags().keys() == {1, 3, 4, 6, 7, 8} and b.status("INBOX", "HIGHESTMODSEQ")[0] > modseq
        relay.close_sessions()
        assert relay.stop() == 0


def test_a_relay_that_stops_says_bye(tmp_path):
    with ImapRelay(tmp_path) as relay:
        relay.user("alice")
        sessions = [relay.session("alice", "SELECT INBOX", worker=number % 2) for number in range(4)]
        tags = [session.idle() for session in sessions[:2]]
        unknown = relay.connect()
        unknown.greeting()
        assert relay.stop() == 0
        for session in (*sessions, unknown):
            assert session.ended().startswith(b"* BYE [UNAVAILABLE] "), tags


# Clients


def test_two_hundred_commands_are_answered_in_order(relay, user):
    a, _ = relay.pair(user, 5)
    commands = [
        "NOOP", "UID FETCH 1:* (FLAGS)", "UID STORE 2 +FLAGS.SILENT (x)", "STATUS Sent (MESSAGES)", "UID SEARCH ALL",
        'LIST "" "*"', "UID COPY 3 Sent", "CAPABILITY", "FETCH 1 (BODY.PEEK[])", "APPEND Sent {5+}\r\nA: b\n",
    ]  # fmt: skip
    sent = [f"p{number} {commands[number % 10]}\r\n".encode() for number in range(200)]
    a.sock.sendall(b"".join(sent))
    tags = []
    while len(tags) < 200:
        found = a.response()
        if found.tag != "*":
            assert found.name == "OK", found
            tags.append(found.tag)
    assert tags == [f"p{number}" for number in range(200)] and a.status("Sent", "MESSAGES") == [40]
    for octet in b"".join(sent[:20]):
        a.sock.sendall(bytes([octet]))
    assert a.until("p19")[-1].name == "OK"


def test_literals_that_end_early(relay, user):
    for announced, sent in ((b"{100}", 50), (b"{100+}", 50), (b"{2000000}", 1_500_000), (b"{2000000+}", 1_500_000)):
        a = relay.session(user)
        a.send(b"x1 APPEND INBOX (\\Seen) %b\r\n" % announced)
        if b"+" not in announced:
            assert a.response().tag == "+"
        a.send(b"y" * sent)
        if announced == b"{100}":
            a.sock.shutdown(socket.SHUT_WR)
            assert a.ended() == b""
        a.reset()
    early = relay.connect()
    early.greeting()
    early.send(b"x1 LOGIN {5}\r\n")
    assert early.response().tag == "+"
    early.send(b"ab")
    early.reset()
    a = relay.session(user, "SELECT INBOX")
    a.send(b"x1 SEARCH SUBJECT {10}\r\n")
    assert a.response().tag == "+"
    b = relay.session(user)
    b.put("INBOX", "meanwhile")  # nothing is told amid a command
    time.sleep(0.2)
    assert select.select([a.sock], [], [], 0)[0] == []
    a.send(b"01234")
    a.send(b"56789 UNSEEN\r\n")
    assert [one.name for one in a.until("x1")] == ["SEARCH", "EXISTS", "RECENT", "OK"]
    assert a.status("INBOX", "MESSAGES") == [1]
    wait_for(lambda: not list(relay.spool.glob("shard-*/bodies/big/*")), what="the files to go")


@pytest.mark.parametrize("place", ["imap", "imaps"])
def test_a_client_that_sends_on_reads_why_it_was_refused(relay, user, place):
    """A literal of 20 MB that is refused: more than is dropped of a command. The client sends all of it, and reads then."""
    for begin in (b"x1 LOGIN", b"x1 APPEND none"):
        session = relay.connect(place)
        session.greeting()
        if b"APPEND" in begin:
            session.ok(f"LOGIN {user}@local.example {PASSWORD}")
        session.send(begin + b" {%d+}\r\n" % (20 << 20))
        for _ in range(20):
            session.send(b"x" * (1 << 20))
        assert [one.name for one in (session.response(), session.response())] == ["BAD" if b"LOGIN" in begin else "NO", "BYE"]
        assert session.ended() == b""


def test_twenty_errors(relay, user):
    a = relay.session(user)
    for number in range(19):
        assert a.command(f"BLURDY {number}").status == "BAD"
        a.ok("NOOP")
    assert a.command("FETCH 1 UID").status == "BAD"
    assert a.ended() == b"* BYE Too many errors\r\n"
    before = relay.connect()
    before.greeting()
    for _ in range(20):
        assert before.command("SELECT INBOX").status == "BAD"
    assert before.ended() == b"* BYE Too many errors\r\n"


@pytest.mark.skipif(not PROVE, reason="it takes a minute")
def test_silence_before_the_login(relay):
    silent, busy = relay.connect(), relay.connect()
    for session in (silent, busy):
        session.greeting()
    began = time.monotonic()
    with contextlib.suppress(EOFError, OSError):
        while time.monotonic() - began < 90:
            busy.command("NOOP")
            time.sleep(1)
    assert 55 < time.monotonic() - began < 80
    assert silent.ended().startswith(b"* BYE ")


def memory(relay: ImapRelay) -> int:
    """Octets of the workers that no file can give back."""
    total = 0
    for pid in relay.worker_pids():
        status = Path(f"/proc/{pid}/status").read_text()
        total += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    return total


def test_a_client_that_does_not_read_what_it_asked_for(relay, user):
    a = relay.session(user, worker=0)
    for subject in ("large", "larger"):
        a.append("INBOX", message(subject, "y" * (300_000 if subject == "large" else 2_000_000)))
    a.ok("SELECT INBOX")
    a.ok("COPY 1 INBOX")
    for _ in range(5):
        a.ok("COPY 1,3:* INBOX")
    a.ok("NOOP")
    everything = len(a.fetch("1:* (UID)"))
    assert everything > 60
    before = memory(relay)
    greedy = []
    for worker in (0, 1):
        session = relay.session(user, "SELECT INBOX", worker=worker)
        session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        session.send(b"x1 FETCH 1:* (FLAGS BODY.PEEK[])\r\n")
        greedy.append(session)
    for number in range(20):  # others are served, of both workers, by each command
        assert relay.session(user, worker=number % 2).status("INBOX", "MESSAGES") == [everything]
        time.sleep(0.02)
    assert memory(relay) - before < 8 << 20
    a.expunge(f"5:{everything}")  # its changes are not held up
    greedy[0].reset()
    told = greedy[1].until("x1")
    assert [one.number for one in told if one.name == "FETCH"][:4] == [1, 2, 3, 4] and told[-1].name == "OK"


def test_what_the_log_and_the_metrics_say(relay, user):
    before = relay.metric('relaymta_imap_results_total{result="bad"}')
    a = relay.session(user)
    a.ok('ID ("name" "a client")')
    a.command("BLURDY")
    a.ok("SELECT INBOX")
    a.ok("LOGOUT")
    said = relay.ended_session(user)
    assert (said["protocol"], said["program"], said["client"]) == ("imap", "a client", "127.0.0.1") and said["commands"] >= 1
    assert relay.metric('relaymta_imap_results_total{result="bad"}') >= before
    assert json.loads(relay.cli("mailbox", "show", "--json", f"{user}@local.example").stdout)["mailboxes"]
    assert shown(relay, user)["INBOX"] == []
