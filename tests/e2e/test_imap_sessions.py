"""IMAP sessions beside each other, on two workers: what one changes the others are told, whatever happens to mailboxes and users
meanwhile."""

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import PROVE
from tests.support.daemon import wait_for
from tests.support.imap_client import Answer
from tests.support.imap_grammar import Response
from tests.support.imap_relay import PASSWORD, ImapRelay, Session, message
from tests.support.mailboxes import verified

MOST = 60  # sessions of a user


@pytest.fixture(scope="module")
def relay(tmp_path_factory) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path_factory.mktemp("sessions"), f"limits.sessions_per_user={MOST}") as relay:
        yield relay
        relay.close_sessions()
        said = [one["text"] for one in relay.events("warning") if one["worker"] >= 0]
        assert [text for text in said if "is being moved" not in text] == []
        verified(relay)


# What sessions are told of each other


class Mirror:
    """A client that believes what it is told: the UID and flags of each message number. It fails where a response does not fit
    what it knows."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.uids: list[int | None] = []
        self.flags: dict[int, set[str]] = {}
        self.do("SELECT INBOX")
        self.do("FETCH 1:* (UID FLAGS)")

    def do(self, command: str) -> None:
        """Run a command."""
        answer = self.session.ok(command)
        by_number = command.split()[0] in ("FETCH", "STORE", "SEARCH")
        assert not (by_number and answer.named("EXPUNGE")), command
        self.take(answer)

    def append(self, subject: str) -> None:
        """Append a message."""
        self.take(self.session.append("INBOX", message(subject)))

    def take(self, answer: Answer) -> None:
        """Believe what is told."""
        assert answer.status == "OK", answer
        for one in answer.untagged:
            self._believe(one)

    def _believe(self, one: Response) -> None:
        if one.name == "EXISTS":
            assert one.number is not None and one.number >= len(self.uids)
            self.uids += [None] * (one.number - len(self.uids))
        elif one.name == "EXPUNGE":
            assert one.number is not None
            uid = self.uids.pop(one.number - 1)
            self.flags.pop(uid or 0, None)
        elif one.name == "FETCH":
            assert one.number is not None
            known, uid = self.uids[one.number - 1], one.data["UID"]
            assert known in (None, uid), "the number of another message"
            self.uids[one.number - 1] = uid
            if "FLAGS" in one.data:
                self.flags[uid] = set(one.data["FLAGS"]) - {"\\Recent"}

    def look(self) -> None:
        """Ask for what it does not know: messages that are new."""
        self.do("NOOP")
        if None in self.uids:
            self.do(f"FETCH {self.uids.index(None) + 1}:* (UID FLAGS)")


def random_changes(mirror: Mirror, chance: random.Random, count: int) -> None:
    for number in range(count):
        known = [uid for uid in mirror.uids if uid is not None]
        numbers = [at for at, uid in enumerate(mirror.uids, 1) if uid is not None]
        match (
            chance.choice(("store", "store", "store by number", "append", "expunge", "noop", "fetch", "idle"))
            if known
            else "append"
        ):
            case "store":
                sign, flag = chance.choice("+-"), chance.choice(("\\Flagged", "\\Seen", "\\Draft", "work", "home"))
                mirror.do(f"UID STORE {','.join(map(str, chance.sample(known, min(3, len(known)))))} {sign}FLAGS ({flag})")
            case "store by number":
                mirror.do(f"STORE {chance.choice(numbers)} +FLAGS (\\Answered)")
            case "append" if len(known) < 30:
                mirror.append(f"new {number}")
            case "expunge":
                uid = chance.choice(known)
                mirror.do(f"UID STORE {uid} +FLAGS (\\Deleted)")
                mirror.do(f"UID EXPUNGE {uid}")
            case "fetch":
                mirror.do("FETCH 1:* (UID FLAGS)")
            case "idle":
                mirror.take(mirror.session.done(mirror.session.idle()))
            case _:
                mirror.look()


def together(*tasks: Callable[[], object]) -> None:
    """Run each in a thread of its own; fails where one does."""
    errors: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("seed", range(30 if PROVE else 3))
def test_what_each_session_is_told_is_what_there_is(relay, user, seed):
    relay.session(user).put("INBOX", *(f"s{number}" for number in range(10)))
    mirrors = [Mirror(relay.session(user, worker=number % 2)) for number in range(4)]
    together(*(lambda one=one, at=at: random_changes(one, random.Random(10 * seed + at), 60) for at, one in enumerate(mirrors)))
    for mirror in mirrors:
        mirror.look()
    fresh = Mirror(relay.session(user))
    for mirror in mirrors:
        assert (mirror.uids, mirror.flags) == (fresh.uids, fresh.flags)


class Cache:
    """A client that synchronizes what it keeps of INBOX as RFC 7162 6 has it. It may be cut off behind any of its commands."""

    def __init__(self, relay: ImapRelay, user: str, worker: int) -> None:
        self.relay, self.user, self.worker = relay, user, worker
        self.flags: dict[int, set[str]] = {}
        self.uidvalidity = self.highest = 0
        self.come_back()

    def come_back(self) -> None:
        """Connect, and learn what has changed meanwhile."""
        self.session = self.relay.session(self.user, "ENABLE QRESYNC", worker=self.worker)
        known = f" (QRESYNC ({self.uidvalidity} {self.highest}))" if self.uidvalidity else ""
        opened = self.do(f"SELECT INBOX{known}")
        (self.uidvalidity,) = (one.code[1] for one in opened.named("OK") if one.code and one.code[0] == "UIDVALIDITY")
        (there,) = (one.data[0] for one in self.do("UID SEARCH ALL").named("SEARCH"))
        if new := set(there) - set(self.flags):  # also those that it has heard of, and not asked for
            self.do(f"UID FETCH {','.join(map(str, new))} (FLAGS)")

    def do(self, command: str) -> Answer:
        answer = self.session.ok(command)
        seen = [0]
        for one in answer.named("FETCH"):
            seen.append(one.data.get("MODSEQ", 0))
            if "FLAGS" in one.data:
                self.flags[one.data["UID"]] = set(one.data["FLAGS"]) - {"\\Recent"}
        for one in answer.named("VANISHED"):
            for low, high in one.data[1]:
                for uid in range(low, high + 1):
                    self.flags.pop(uid, None)
        codes = [one.code[1] for one in (*answer.untagged, answer.last) if one.code and one.code[0] == "HIGHESTMODSEQ"]
        self.highest = codes[-1] if codes else max(self.highest, *seen)  # that of a code, even if it has seen higher ones
        return answer

    def store_silently(self, uid: int, condition: str, sign: str, flag: str) -> None:
        """STORE of a flag, of which it is not told the result."""
        before = self.flags[uid]
        self.flags[uid] = before | {flag} if sign == "+" else before - {flag}
        answer = self.do(f"UID STORE {uid} {condition}{sign}FLAGS.SILENT ({flag})")
        told = [one for one in answer.named("FETCH") if one.data["UID"] == uid and "FLAGS" in one.data]
        if answer.code == "MODIFIED" and not told and uid in self.flags:
            self.flags[uid] = before

    def run(self, chance: random.Random) -> None:
        """Some commands, and away."""
        for _ in range(chance.randint(1, 12)):
            if not self.flags:
                self.come_back()
                continue
            known = chance.choice(list(self.flags))
            match chance.randint(0, 9):
                case 0 | 1:
                    self.store_silently(known, "", chance.choice("+-"), "mine")
                case 2:
                    self.store_silently(known, f"(UNCHANGEDSINCE {self.highest}) ", "+", "\\Seen")
                case _:
                    self.do(chance.choice((
                        "NOOP", "FETCH 1:* (FLAGS)", "FETCH 1:* (MODSEQ)", "SEARCH ALL", f"UID FETCH {known} (UID FLAGS MODSEQ)",
                        f"UID STORE {known} +FLAGS (mine)", "STORE 1 +FLAGS (first)", "FETCH 1 (BODY[HEADER])",
                    )))  # fmt: skip
        self.session.reset()


@pytest.mark.parametrize("seed", range(20 if PROVE else 2))
def test_a_client_that_comes_back_has_missed_nothing(relay, user, seed):
    relay.session(user).put("INBOX", *(f"s{number}" for number in range(10)))
    chance = random.Random(seed)
    mirrors = [Mirror(relay.session(user, worker=number)) for number in range(2)]
    caches = [Cache(relay, user, number) for number in range(2)]
    for _ in range(6):
        together(
            *(lambda one=one: random_changes(one, random.Random(chance.random()), 15) for one in mirrors),
            *(lambda one=one: one.run(random.Random(chance.random())) for one in caches),
        )
        there = Mirror(relay.session(user)).flags
        for cache in caches:
            cache.come_back()
            assert cache.flags == there


def test_two_sessions_change_flags_of_the_same_messages(relay, user):
    a, b = relay.pair(user, 5, "ENABLE CONDSTORE")
    seen: list[int] = []

    def change(session: Session, name: str) -> None:
        for number in range(40):
            session.ok(f"STORE 1:5 +FLAGS ({name}{number % 4})")
            session.ok(f"STORE {number % 5 + 1} -FLAGS ({name}0)")
            if session is a:
                seen.append(session.fetch("1 (MODSEQ)")[1]["MODSEQ"])

    together(lambda: change(a, "a"), lambda: change(b, "b"))
    assert seen == sorted(seen)  # RFC 7162 3.1
    for session in (a, b):
        session.ok("NOOP")
    assert a.flags() == b.flags() and {"a1", "a2", "a3", "b1", "b2", "b3"} <= a.flags()[1]


def test_a_session_of_the_other_worker_is_told(relay, user):
    a, b = relay.pair(user, 2)
    tag = a.idle()
    relay.mail(user, "by SMTP")
    assert a.until("EXISTS")[-1].number == 3
    b.ok("STORE 1 +FLAGS (new)")
    told = a.until("FETCH")
    assert "new" in next(one for one in told if one.name == "FLAGS").data and "new" in told[-1].data["FLAGS"]
    b.ok("MOVE 2 Trash")
    assert a.until("EXPUNGE")[-1].number == 2
    a.done(tag)
    relay.mail(user, "another")
    (exists,) = a.ok("NOOP").named("EXISTS")
    assert exists.number == 3
    assert a.ok("UID FETCH 1 (FLAGS)").names == ["FETCH"]


def test_expunge_while_another_fetches(relay, user):
    a, b = relay.session(user, worker=0), relay.session(user, worker=1)
    a.append("INBOX", message("large", "y" * 200_000))
    for session in (a, b):
        session.ok("SELECT INBOX")
    for _ in range(6):
        b.ok("COPY 1:* INBOX")
        a.ok("NOOP")
    a.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    tag = a.start("FETCH 1:* (UID BODY.PEEK[HEADER] BODY.PEEK[]<0.200000>)")
    told = a.until("FETCH")  # it has begun, and cannot end before it is read
    b.expunge("2:60")
    b.ok("STORE 1:* +FLAGS.SILENT (\\Flagged)")
    answer = a.finish(tag)
    fetched = [one for one in (*told, *answer.untagged) if one.name == "FETCH" and "BODY[HEADER]" in one.data]
    assert (answer.status, answer.code) == ("OK", "EXPUNGEISSUED") and len(fetched) < 64
    assert all(one.number == one.data["UID"] for one in fetched) and not answer.named("EXPUNGE")
    assert {1, *range(61, 65)} <= {one.number for one in fetched}
    assert len(a.ok("NOOP").named("EXPUNGE")) == 59 and a.fetch("2:3 (UID)") == {2: {"UID": 61}, 3: {"UID": 62}}


def test_fifty_sessions_in_idle(relay, user):
    b = relay.session(user)
    b.put("INBOX", "one", "two")
    b.ok("SELECT INBOX")
    sessions = [relay.session(user, "SELECT INBOX", worker=number % 2) for number in range(50)]
    tags = [session.idle() for session in sessions]
    b.put("INBOX", "three")
    b.ok("STORE 1 +FLAGS.SILENT (\\Flagged)")
    b.expunge("2")
    for session in sessions:
        told = session.until("EXPUNGE")
        assert ("EXISTS", 3) in [(one.name, one.number) for one in told] and told[-1].number == 2
    for session, tag in zip(sessions, tags, strict=True):
        session.done(tag)
        assert session.flags() == {1: {"\\Flagged"}, 3: set()}


def test_a_mailbox_is_deleted_while_it_is_selected(relay, user):
    a, b = relay.session(user, "CREATE m", worker=0), relay.session(user, worker=1)
    b.put("m", "one", "two")
    idle = relay.session(user, worker=0)
    for command in (
        "NOOP", "FETCH 1 (BODY[])", "UID FETCH 1 (FLAGS)", "STORE 1 +FLAGS (x)", "SEARCH ALL", "UID SEARCH TEXT one",
        "COPY 1 Sent", "UID MOVE 1 Sent", "EXPUNGE", "CLOSE", "UNSELECT", 'LIST "" m', "STATUS m (MESSAGES)",
    ):  # fmt: skip
        for session in (a, idle):
            session.ok("SELECT m")
        tag = idle.idle()
        b.ok("DELETE m")
        assert idle.until("NO")[-1].code == ("CLOSED", None)
        idle.done(tag)
        b.ok("CREATE m")
        b.put("m", "one", "two")  # of the same name, with the same UIDs: other messages
        b.ok("SELECT m")
        b.ok("STORE 1:2 +FLAGS.SILENT (new)")
        answer = a.command(command)
        assert answer.named("FETCH") == [] and all(one.data[0] == [] for one in answer.named("SEARCH")), command
        assert answer.status == "OK" or answer.code in ("NONEXISTENT", "EXPUNGEISSUED", "CANNOT"), command
        assert answer.status == "OK" or command != "CLOSE"  # which cannot fail (RFC 9051 6.4.1)
        if answer.code in ("NONEXISTENT", "CANNOT"):
            a.ok("NOOP")
        assert a.command("FETCH 1 (UID)").status == "BAD"  # none is selected any more
    assert a.status("Sent", "MESSAGES") == [0]
    a.ok("SELECT m")
    assert a.flags() == {1: {"new"}, 2: {"new"}}


def test_a_mailbox_is_renamed_while_it_is_selected(relay, user):
    a, b = relay.session(user, "CREATE m", worker=0), relay.session(user, worker=1)
    b.put("m", "one", "two")
    a.ok("SELECT m")
    b.ok("RENAME m n/o")
    b.ok("CREATE m")
    b.put("m", "of another")
    b.put("n/o", "three")
    assert [one.number for one in a.ok("NOOP").named("EXISTS")] == [3] and list(a.subjects().values()) == ["one", "two", "three"]
    tag = a.idle()
    b.ok("SELECT n/o")
    b.ok("STORE 3 +FLAGS (x)")
    assert a.until("FETCH")[-1].number == 3
    a.done(tag)
    a.ok("STORE 1 +FLAGS (\\Deleted)")
    a.ok("EXPUNGE")
    assert b.status("m", "MESSAGES") == [1] and b.status("n/o", "MESSAGES") == [2]


# Users


def dismissed(session: Session, command: str = "NOOP") -> None:
    """The session ends with the next command, or has ended already."""
    try:
        answer = session.command(command)
    except EOFError:
        last = session.said[-1]
        assert last.name == "BYE" and last.code and last.code[0] == "UNAVAILABLE", last
        return
    assert (answer.status, answer.code) == ("NO", "UNAVAILABLE"), answer
    assert session.ended().startswith(b"* BYE [UNAVAILABLE] ")


def refused(relay: ImapRelay, name: str) -> str:
    """The response code to a login."""
    session = relay.connect()
    session.greeting()
    answer = session.command(f"LOGIN {name}@local.example {PASSWORD}")
    assert answer.status == "NO"
    return answer.code


def test_a_user_is_disabled(relay, user):
    a, b = relay.pair(user, 1)
    c, d = relay.session(user, "SELECT INBOX", worker=0), relay.session(user, "SELECT INBOX", worker=1)
    d.idle()
    relay.asked("mailbox_change", user, changes={"disabled": True})
    assert refused(relay, user) == "AUTHENTICATIONFAILED"
    dismissed(a, "STORE 1 +FLAGS (x)")
    dismissed(b, "FETCH 1 (BODY[])")
    for silent in (c, d):  # who says nothing hears of it as well
        assert silent.ended().startswith(b"* BYE [UNAVAILABLE] ")
    relay.asked("mailbox_change", user, changes={"disabled": False})
    again = relay.session(user, "SELECT INBOX")
    assert again.flags() == {1: set()}


def test_a_user_is_moved(relay, user):
    a, b = relay.pair(user, 3)
    idle = relay.session(user, "SELECT INBOX", worker=1)
    idle.idle()
    a.ok("STORE 2 +FLAGS (kept)")
    before = a.status("INBOX", "UIDVALIDITY", "UIDNEXT", "MAILBOXID", "HIGHESTMODSEQ")
    relay.asked("mailbox_move", user, shard=1 - relay.homes[user])
    dismissed(a)
    dismissed(b, "UID STORE 1 +FLAGS (lost)")
    with contextlib.suppress(OSError):  # it has heard of it already
        idle.send(b"DONE\r\n")
    assert b"* BYE [UNAVAILABLE] " in idle.ended()
    for worker in (0, 1):
        again = relay.session(user, "SELECT INBOX", worker=worker)
        assert again.flags() == {1: set(), 2: {"kept"}, 3: set()}
        assert again.status("INBOX", "UIDVALIDITY", "UIDNEXT", "MAILBOXID", "HIGHESTMODSEQ") == before
        again.ok(f"STORE 1 +FLAGS (worker{worker})")
        again.ok("STORE 1 FLAGS ()")
        before[-1] += 2


def test_a_user_is_moved_while_sessions_change_mail(relay, user):
    done: list[int] = []
    stop = threading.Event()

    def work(number: int) -> None:
        count = 0
        while not stop.is_set():
            with contextlib.suppress(EOFError, OSError):
                session = relay.connect()
                session.greeting()
                if session.command(f"LOGIN {user}@local.example {PASSWORD}").status != "OK":
                    continue
                while not stop.is_set():
                    count += 1
                    answer = session.append("INBOX", message(f"{number}-{count}"), plus=True)
                    if answer.status != "OK":
                        assert answer.code == "UNAVAILABLE", answer
                        break
                    done.append(answer.last.code[1][1][0][0])
                session.sock.close()

    def move() -> None:
        try:
            for _ in range(4):
                enough = len(done) + 5
                wait_for(lambda: len(done) > enough, what="some messages")  # noqa: B023
                relay.homes[user] = 1 - relay.homes[user]
                relay.asked("mailbox_move", user, shard=relay.homes[user])
        finally:
            stop.set()

    together(move, *(lambda number=number: work(number) for number in range(3)))
    found = relay.session(user, "SELECT INBOX").subjects()
    assert set(done) <= set(found) and len(set(found.values())) == len(found) and len(done) == len(set(done))


def test_a_user_is_deleted(relay, user):
    a, b = relay.pair(user, 1)
    relay.asked("mailbox_delete", user, now=False)
    dismissed(a)
    assert refused(relay, user) == "AUTHENTICATIONFAILED"
    relay.asked("mailbox_change", user, changes={"disabled": False})
    c = relay.session(user, "SELECT INBOX")
    relay.asked("mailbox_delete", user, now=True)
    dismissed(b, "UID FETCH 1 (BODY[])")
    dismissed(c, "CREATE x")
    relay.user(user)
    assert relay.session(user).status("INBOX", "MESSAGES") == [0]


def test_a_user_is_renamed(relay, user):
    a, _ = relay.pair(user, 1)
    relay.quota(user, messages=10)
    relay.asked("mailbox_rename", user, new=f"{user}-new@local.example")
    assert a.ok("GETQUOTAROOT INBOX").named("QUOTAROOT")[0].data == ("INBOX", [f"{user}-new@local.example"])
    a.ok("STORE 1 +FLAGS (x)")
    for name in (user, f"{user}-new"):
        assert relay.session(name, "SELECT INBOX").flags() == {1: {"x"}}


def test_sessions_per_user(relay, user):
    sessions = [relay.session(user) for _ in range(MOST)]
    assert refused(relay, user) == "UNAVAILABLE"
    other = f"{user}-other"
    relay.user(other)
    relay.session(other)
    sessions[0].ok("LOGOUT")
    sessions[1].reset()

    def free() -> Session | None:
        with contextlib.suppress(AssertionError):
            return relay.session(user)
        return None

    wait_for(free, what="a seat")
    wait_for(free, what="another")
    assert refused(relay, user) == "UNAVAILABLE"
