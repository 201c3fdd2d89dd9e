"""Users who are moved to another shard, there and back, while they read and change their mail and others send them some: nothing
is lost or there twice, no session is told that a part is all, and whoever was told BYE logs in again and goes on."""

import contextlib
import os
import poplib
import re
import signal
import smtplib
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.conftest import PROVE
from tests.e2e.test_imap_kills import Client, State
from tests.support.daemon import PATIENCE, wait_for
from tests.support.imap_client import Answer
from tests.support.imap_large import LmtpLoad, Paced, Work, answered, deliver, fill, flags_of, rest, served, status_of
from tests.support.imap_relay import PASSWORD, ImapRelay, Session, message
from tests.support.mailboxes import shown, verified
from tests.support.prove import in_prove

PAUSE = 0.0 if PROVE else 0.2  # seconds between two sessions of a reader: while a client settles what was interrupted, all go on
MOVING, GONE = "NO [UNAVAILABLE]", b"* BYE [UNAVAILABLE] "
# A session is ended with the command, or before it comes, when it is looked at
DISMISSED = re.compile(rb"(?:raw NO \[UNAVAILABLE\] .*\r\n)?\* BYE \[UNAVAILABLE\] .*\r\n")


class Moving(ImapRelay):
    def move(self, name: str, times: int = 1) -> None:
        """Move a user to the other shard; once more: and back."""
        for _ in range(times):
            self.homes[name] = 1 - self.homes[name]
            self.asked("mailbox_move", name, shard=self.homes[name])


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[Moving]:
    folder = tmp_path_factory.mktemp("moves")
    with Moving(folder, "delivery.first_retry=1", protocols=("imap", "pop3", "lmtp")) as relay:
        yield relay
        relay.close_sessions()
        wait_for(lambda: relay.summary() == [], what="the queue to be empty")
        verified(relay)


def entered(relay: Moving, name: str) -> Session | None:
    """A session that has selected INBOX; None: the user has just been moved."""
    with contextlib.suppress(EOFError, OSError):
        session = relay.connect()
        session.greeting()
        for command in (f"LOGIN {name}@local.example {PASSWORD}", "SELECT INBOX"):
            answer = session.command(command)
            if answer.status != "OK":
                assert answer.code == "UNAVAILABLE", answer
                return None
        return session
    return None


def pop3(relay: Moving, name: str) -> poplib.POP3:
    client = poplib.POP3("127.0.0.1", relay.ports["pop3"], timeout=PATIENCE)
    client.user(f"{name}@local.example")
    client.pass_(PASSWORD)
    return client


# All at once


class Moved(Client):
    """A client that looks at what it has put itself, and takes NO [UNAVAILABLE] for an end."""

    boxes, pause = ("Archive", "Trash", "Sent"), PAUSE / 4

    def look(self, session: Session) -> State:
        session.ok = lambda command: _unless_dismissed(session, command)  # type: ignore[method-assign]
        found = super().look(session)
        assert len(self.highest) == len(self.boxes)  # no mailbox has had two UIDVALIDITYs
        return found


def _unless_dismissed(session: Session, command: str | bytes) -> Answer:
    answer = session.command(command)
    if answer.code == "UNAVAILABLE":
        raise EOFError
    assert answer.status == "OK", answer
    return answer


class Reader:
    """Sessions in IDLE, each until it is told BYE, or has heard much or nothing. `byes`, `new`: how often BYE and EXISTS were
    told."""

    def __init__(self, relay: Moving, name: str, load: LmtpLoad) -> None:
        self._relay, self._name, self._load = relay, name, load
        self.byes = self.new = 0
        self.known: dict[int, bytes] = {}

    def step(self) -> None:
        there = len(self._load.acknowledged)
        session = entered(self._relay, self._name)
        if session is None:
            return
        with contextlib.suppress(EOFError, OSError), session.sock:
            self._look(answered(session, "UID FETCH 1:* (FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])"), there)
            session.sock.settimeout(3)
            tag = session.start("IDLE")
            for _ in range(30):
                said = session.response()
                if said.name == "BYE":
                    assert said.code and said.code[0] == "UNAVAILABLE", said
                    self.byes += 1
                    return
                assert said.tag in ("*", "+", tag) and said.name in ("", "EXISTS", "RECENT", "FETCH", "OK", "NO"), said
                assert said.name != "NO" or said.tag == tag, said  # an untagged one says that the mailbox is deleted
                self.new += said.name == "EXISTS"

    def _look(self, answer: bytes, there: int) -> None:
        found = re.findall(rb"FETCH \(UID ([0-9]+) .*\r\nSubject: (.*)\r\n", answer)
        for uid, subject in found:
            assert self.known.setdefault(int(uid), subject) == subject, "a UID has named two messages"
        assert status_of(answer) == MOVING or (status_of(answer) == "OK" and len(found) >= there), (status_of(answer), len(found))


class Fetcher:
    """Sessions of POP3. `listed`: how many were told of a whole maildrop."""

    def __init__(self, relay: Moving, name: str, load: LmtpLoad) -> None:
        self._relay, self._name, self._load = relay, name, load
        self.listed = 0
        self._known: dict[bytes, bytes] = {}

    def step(self) -> None:
        there = len(self._load.acknowledged)
        with contextlib.suppress(poplib.error_proto, OSError):
            client = pop3(self._relay, self._name)
            uidls = [line.split()[1] for line in client.uidl()[1]]
            assert len(uidls) >= there and len(set(uidls)) == len(uidls), (len(uidls), there)
            self.listed += 1
            for number in {1, len(uidls)} if uidls else ():
                subject = next(line for line in client.retr(number)[1] if line.startswith(b"Subject: "))
                assert self._known.setdefault(uidls[number - 1], subject) == subject, "a UIDL has named two messages"
            client.quit()


def test_a_user_in_use_is_moved(relay):
    stop = threading.Event()
    clients = [Moved(relay, number, stop) for number in range(2)]
    names = [client.name for client in clients]
    loads = [LmtpLoad(relay, names[:1], 1), Paced(relay, names, 2, first=1)]
    reader, fetcher = Reader(relay, names[0], loads[0]), Fetcher(relay, names[0], loads[0])

    def more() -> None:
        enough = [client.acknowledged + 5 for client in clients]
        there = len(loads[0].acknowledged) + 5

        def is_enough() -> bool:
            gone_on = all(client.acknowledged >= count for client, count in zip(clients, enough, strict=True))
            return (gone_on and len(loads[0].acknowledged) >= there) or any(client.failure for client in clients)

        wait_for(is_enough, what="some commands and deliveries")

    try:
        with Work(reader.step, PAUSE) as reading, Work(reader.step, PAUSE), Work(fetcher.step, PAUSE) as fetching:
            for round_ in range(24 if PROVE else 4):
                more()
                if round_ % 3 == 0:
                    reading.more(1)
                    fetching.more(1)
                relay.move(names[0] if round_ % 3 else names[1])
            more()
            reading.more(2)
            fetching.more(2)
    finally:
        stop.set()
        for load in loads:
            load.end()
        for client in clients:
            client.thread.join(PATIENCE)
    for client in clients:
        if client.failure is not None:
            raise client.failure
        session = relay.session(client.name)
        assert client.look(session) == client.state and client.lost > 0
    assert reader.byes > 0 and reader.new > 0 and fetcher.listed > 0
    wait_for(lambda: relay.summary() == [], what="the queue to be empty")
    for load in loads:
        load.check()


# Of a session that was there before


COMMANDS = (
    "NOOP", "FETCH 1:* (FLAGS)", "UID FETCH 1:* (BODY[])", "UID SEARCH ALL", "SORT (SUBJECT) UTF-8 ALL", 'LIST "" "*"',
    "STATUS INBOX (MESSAGES)", "SELECT Archive", "UID STORE 1:* +FLAGS (\\Deleted)", "UID COPY 1:* Archive",
    "UID MOVE 1:* Archive", "EXPUNGE", "CLOSE", "APPEND INBOX {4+}\r\nx\r\n\r\n", "CREATE new", "RENAME INBOX old",
)  # fmt: skip


@pytest.mark.parametrize("times", [1, 2])
def test_a_session_of_a_user_who_was_moved_meanwhile_ends(relay, user, times):
    """Also when the user is back where the session thinks: the mailboxes there are others."""
    relay.session(user).put("INBOX", "one", "two")
    relay.session(user, "SELECT INBOX").ok("UID STORE 1 +FLAGS (\\Deleted kept)")
    sessions = [relay.session(user, "SELECT INBOX", worker=number % 2) for number in range(len(COMMANDS))]
    idle = [relay.session(user, "SELECT INBOX", worker=worker) for worker in (0, 1)]
    for session in idle:
        session.idle()
    items = ("UIDVALIDITY", "UIDNEXT", "MAILBOXID", "HIGHESTMODSEQ", "MESSAGES")
    before = relay.session(user).status("INBOX", *items)
    relay.move(user, times)
    for session, command in zip(sessions, COMMANDS, strict=True):
        with contextlib.suppress(OSError):
            session.send(b"raw " + command.encode() + b"\r\n")
        said = session.ended()
        assert DISMISSED.fullmatch(said), (command, said)
    for session in idle:
        with contextlib.suppress(OSError):  # it has heard of it already
            session.send(b"DONE\r\n")
        said = session.ended()
        assert said.count(GONE) == 1 and b"deleted" not in said and b"OK" not in said, said
    for worker in (0, 1):
        again = relay.session(user, "SELECT INBOX", worker=worker)
        assert again.status("INBOX", *items) == before
        assert again.flags() == {1: {"\\Deleted", "kept"}, 2: set()}
    assert set(again.listed('LIST "" "*"')) >= {"INBOX", "Archive"} and "new" not in again.listed('LIST "" "*"')


@pytest.mark.parametrize("times", [1, 2])
def test_a_client_that_reads_slowly_is_not_told_that_a_part_is_all(relay, user, times):
    count = 100
    a = relay.session(user)
    a.append("INBOX", message("large", ("y" * 70 + "\r\n") * 3000), plus=True)
    a.ok("SELECT INBOX")
    while (there := len(a.fetch("1:* (UID)"))) < count:
        a.ok(f"COPY 1:{min(there, count - there)} INBOX")
        a.ok("NOOP")
    slow = [relay.session(user, "SELECT INBOX", worker=worker) for worker in (0, 1)]
    for session in slow:
        session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        session.send(b"raw UID FETCH 1:* (BODY.PEEK[])\r\n")
        assert session.sock.recv(100).startswith(b"* 1 FETCH")
    relay.move(user, times)
    for session in slow:
        said = rest(session) + session.ended()
        assert said.count(b" FETCH (") < count - 1, "it had read all before the move: it was no slow client"
        assert status_of(said) == MOVING and GONE in said and b"deleted" not in said, said[-300:]
    assert len(relay.session(user, "SELECT INBOX").flags()) == count


@pytest.mark.parametrize(
    "command", ["UID SEARCH SUBJECT m", *in_prove("UID FETCH 1:* (FLAGS ENVELOPE)", "UID SORT (SUBJECT) UTF-8 ALL")]
)
def test_what_is_read_of_a_user_who_is_moved_is_whole_or_refused(relay, user, command):
    """A client that is told OK takes what is missing for expunged."""
    count = 20_000 if PROVE else 4000
    fill(relay.session(user), "INBOX", count)
    found: list[tuple[str, bool]] = []

    class Reading:
        session: Session | None = None

        def step(self) -> None:
            self.session = self.session or entered(relay, user)
            if self.session is not None:
                try:
                    answer = answered(self.session, command)
                except (EOFError, OSError):
                    self.session = None
                    return
                told = len(flags_of(answer)) or len(re.findall(rb" [0-9]+", answer.partition(b"\r\n")[0]))
                found.append((status_of(answer), told == count))

    with Work(Reading().step), Work(Reading().step), Work(Reading().step):
        for round_ in range(10 if PROVE else 4):
            enough = len(found) + 4
            wait_for(lambda: len(found) >= enough, what="some answers")  # noqa: B023
            relay.move(user, 1 + round_ % 2)
    assert {status for status, _ in found} <= {"OK", MOVING}
    assert ("OK", True) in found and ("OK", False) not in found


# While the move is under way


def test_mail_of_a_user_who_is_being_moved_is_read_and_not_changed(relay, user):
    """The worker that the user is moved to stops amid the move."""
    home = relay.homes[user]
    a, b, idle = (relay.session(user, worker=home) for _ in range(3))
    a.put("INBOX", "one", "two")
    for session in (a, b, idle):
        session.ok("SELECT INBOX")
    idle.idle()
    by_lmtp, by_smtp = served(relay, home), served(relay, home, smtplib.SMTP)
    target = relay.worker_pids()[1 - home]
    moving = threading.Thread(target=relay.move, args=(user,))
    os.kill(target, signal.SIGSTOP)
    try:
        moving.start()
        wait_for(lambda: a.command("STORE 1 +FLAGS (x)").code == "UNAVAILABLE", what="the move to begin")
        assert a.subjects() == {1: "one", 2: "two"} and a.searched("SUBJECT two") == [2]
        for command in ("STORE 2 +FLAGS (y)", "EXPUNGE 1", "COPY 1 Archive", "MOVE 1 Archive", "CREATE new", "DELETE Archive"):
            answer = a.command(command.replace("EXPUNGE 1", "UID STORE 1 -FLAGS (x)"))
            assert (answer.status, answer.code) == ("NO", "UNAVAILABLE"), (command, answer)
        answer = b.append("INBOX", message("three"), plus=True)
        assert (answer.status, answer.code) == ("NO", "UNAVAILABLE")
        with pytest.raises(smtplib.SMTPDataError) as refused:
            deliver(by_lmtp, "lmtp", user)
        assert 400 <= refused.value.smtp_code < 500
        deliver(by_smtp, "smtp", user)  # safe in the queue
    finally:
        os.kill(target, signal.SIGCONT)
    moving.join(PATIENCE)
    for session in (a, b):
        with contextlib.suppress(OSError):
            session.send(b"raw NOOP\r\n")
        assert DISMISSED.fullmatch(session.ended())
    said = idle.ended()
    assert said.splitlines()[-1].startswith(GONE) and said.count(b"* BYE") == 1 and b"deleted" not in said, said
    deliver(by_lmtp, "lmtp again", user)
    wait_for(lambda: len(shown(relay, user)["INBOX"]) == 4, what="the delivery of what was deferred")
    again = relay.session(user, "SELECT INBOX")
    assert sorted(again.subjects().values()) == ["lmtp again", "one", "smtp", "two"]
    assert {word for flags in again.flags().values() for word in flags} <= {"x"}  # of the wait
    assert "new" not in again.listed('LIST "" "*"') and again.status("Archive", "MESSAGES") == [0]


# POP3


def test_a_pop3_session_of_a_user_who_is_moved_removes_nothing(relay, user):
    relay.mail(user, "one", "two", "three")
    for times in (1, 2):
        client = pop3(relay, user)
        before = client.uidl()[1]
        client.dele(2)
        assert b"Subject: one" in client.retr(1)[1]
        relay.move(user, times)
        with pytest.raises(poplib.error_proto, match="-ERR"):
            client.retr(3)
        with pytest.raises(poplib.error_proto, match="-ERR"):
            client.quit()
        client = wait_for(lambda: usable(relay, user), what="the maildrop")
        assert client.uidl()[1] == before and [b"Subject: two" in client.retr(2)[1]] == [True]
        client.quit()


def usable(relay: Moving, name: str) -> poplib.POP3 | None:
    try:
        return pop3(relay, name)
    except poplib.error_proto:  # the seat of the session before
        return None
