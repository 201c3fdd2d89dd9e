"""Large mailboxes in use: what concerns many messages is done in slices, between which mail comes and others synchronise; workers
are killed amid it, and while others read; clients stop reading. Full counts: RELAYMTA_PROVE=1."""

import contextlib
import os
import re
import signal
import smtplib
import socket
from collections.abc import Callable, Iterator

import pytest

from relaymta.store.files import MailFiles
from relaymta.store.rows import MailShard
from tests.conftest import PROVE
from tests.support.daemon import wait_for
from tests.support.imap_large import (
    LmtpLoad,
    Paced,
    Work,
    answered,
    came,
    deliver,
    fill,
    flags_of,
    kill,
    neighbours,
    rest,
    served,
    status_of,
    tombstones,
)
from tests.support.imap_relay import ImapRelay, Session, message
from tests.support.mailboxes import verified
from tests.support.prove import in_prove

MANY = 100_000 if PROVE else 20_000  # messages that one command concerns
FEW = 2000 if PROVE else 300
SAID = re.compile(rb"HIGHESTMODSEQ ([0-9]+)")


@pytest.fixture
def relay(tmp_path) -> Iterator[ImapRelay]:
    with ImapRelay(tmp_path, "delivery.first_retry=1", protocols=("imap", "lmtp")) as relay:
        yield relay
        relay.close_sessions()
        wait_for(lambda: relay.summary() == [], what="the queue to be empty")
        wait_for(lambda: not unfinished(relay), what="what was unfinished to come to its end")
        verified(relay)


def unfinished(relay: ImapRelay) -> list[object]:
    """What is to be taken back or removed, in all shards."""
    found: list[object] = []
    with MailFiles(relay.spool / "mail") as files:
        for number in range(relay.workers):
            rows = files.shard(number).rows
            with rows.reading() as txn:
                found += rows.unfinished(txn)
    return found


class Known:
    """What a client knows of a mailbox by synchronising (RFC 7162): flags by UID, which MODSEQ it has seen."""

    def __init__(self, session: Session, selected: bytes) -> None:
        self.flags = flags_of(answered(session, "UID FETCH 1:* (FLAGS)"))
        self.highest = int(SAID.search(selected)[1])  # type: ignore[index]
        self.rounds = 0

    def hear(self, answer: bytes) -> None:
        """Untagged responses, whatever the command."""
        assert status_of(answer) == "OK", answer[-200:]
        gone, told = tombstones(answer), flags_of(answer)
        assert not gone & told.keys()
        self.flags = {uid: flags for uid, flags in (self.flags | told).items() if uid not in gone}
        self.highest = max(
            [self.highest, *map(int, re.findall(rb"MODSEQ \(([0-9]+)\)", answer)), *map(int, SAID.findall(answer))]
        )
        self.rounds += bool(gone or told)


class Watchers:
    """Two clients that synchronise again and again: one that keeps its session, one that selects the mailbox anew each time."""

    def __init__(self, relay: ImapRelay, name: str, worker: int) -> None:
        self._relay, self._name = relay, name
        self._session = relay.session(name, "ENABLE QRESYNC", worker=worker)
        selected = answered(self._session, "SELECT INBOX")
        (self._validity,) = re.findall(rb"UIDVALIDITY ([0-9]+)", selected)
        self.stays, self.comes = Known(self._session, selected), Known(self._session, selected)

    def stay(self) -> None:
        """What came is asked for by its number: EXISTS says only that there is more."""
        known = self.stays
        known.hear(answered(self._session, "NOOP"))
        known.hear(answered(self._session, f"UID FETCH {max(known.flags, default=0) + 1}:* (FLAGS)"))

    def come(self) -> None:
        session = self._relay.session(self._name, "ENABLE QRESYNC")
        self.comes.hear(answered(session, f"SELECT INBOX (QRESYNC ({self._validity.decode()} {self.comes.highest}))"))
        session.sock.close()

    def check(self) -> dict[int, frozenset[bytes]]:
        """Both know what there is, which is returned."""
        right = flags_of(answered(self._relay.session(self._name, "SELECT INBOX"), "UID FETCH 1:* (FLAGS)"))
        self.stay()
        self.come()
        for known in (self.stays, self.comes):
            assert known.flags == right, _difference(known.flags, right)
            assert known.rounds > 2, "it has synchronised before the end, too"
        return right


def _difference(found: dict[int, frozenset[bytes]], right: dict[int, frozenset[bytes]]) -> list[object]:
    return [(uid, found.get(uid), right.get(uid)) for uid in found.keys() | right.keys() if found.get(uid) != right.get(uid)][:20]


# Slices


def places(relay: ImapRelay, name: str) -> tuple[set[int], set[int]]:
    """The MODSEQs in a user's INBOX of the slices of the last command about UIDs 1 to MANY, and those of what came later."""
    with MailFiles(relay.spool / "mail") as files:
        user = files.directory.known(f"{name}@local.example")
        rows = files.shard(user.shard).rows
        with rows.reading() as txn:
            mailbox = rows.mailbox(txn, user.ident, "INBOX").mailbox
            records = list(rows.index(txn, mailbox))
            slices = {record.modseq for record in records if record.uid <= MANY}
            return slices or {modseq for modseq, _ in rows.expunged(txn, mailbox)}, {
                record.modseq for record in records if record.uid > MANY
            }


@pytest.mark.parametrize("what", ["EXPUNGE", *in_prove("STORE")])
def test_mail_comes_between_the_slices(relay, what):
    """Of the same mailbox and of others in the shard: each message here is committed for two users at once, and its MODSEQ says
    between which slices that was. Who synchronises meanwhile hears of everything."""
    home = neighbours(relay, "alice", "bob")
    a = relay.session("alice", worker=1 - home)
    fill(a, "INBOX", MANY)
    if what == "EXPUNGE":
        assert status_of(answered(a, "STORE 1:* +FLAGS.SILENT (\\Deleted)")) == "OK"
    watchers = Watchers(relay, "alice", home)
    clients = [served(relay, home) for _ in range(3)]
    subjects: list[str] = []

    def deliver_from(client: smtplib.SMTP, number: int) -> Callable[[], None]:
        def step() -> None:
            subject = f"new {number} {len(subjects)}"
            deliver(client, subject, "alice", "bob")
            subjects.append(subject)

        return step

    with contextlib.ExitStack() as works:
        for step in (watchers.stay, watchers.come, *(deliver_from(one, number) for number, one in enumerate(clients))):
            works.enter_context(Work(step)).more(1)
        for round_ in range(50):
            command = "EXPUNGE" if what == "EXPUNGE" else f"UID STORE 1:{MANY} {'-+'[round_ % 2 == 0]}FLAGS.SILENT (x)"
            assert status_of(answered(a, command)) == "OK"
            slices, others = places(relay, "alice")
            assert len(slices) == MANY // 1000
            if between := [one for one in others if min(slices) < one < max(slices)]:
                break
    assert between, "the command has held up all deliveries"
    found = watchers.check()
    old = {uid: flags for uid, flags in found.items() if uid <= MANY}
    flags = frozenset({b"x"} if round_ % 2 == 0 else ())
    assert old == ({} if what == "EXPUNGE" else dict.fromkeys(range(1, MANY + 1), flags))
    assert len(found) - len(old) == len(subjects)
    for name in ("alice", "bob"):
        assert sorted(came(relay, name)) == sorted(subjects)


def test_who_synchronises_hears_of_each_of_several_changes(relay):
    """Each slice has a MODSEQ above all that was told before: one for the whole command would hide later slices from those who
    have synchronised between."""
    relay.user("alice")
    a = relay.session("alice", worker=0)
    fill(a, "INBOX", MANY)
    watchers = Watchers(relay, "alice", 1)
    load = LmtpLoad(relay, ["alice"], 1)
    try:
        with Work(watchers.stay) as staying, Work(watchers.come) as coming:
            for how in ("+FLAGS.SILENT (x)", "-FLAGS.SILENT (x)", "FLAGS.SILENT (\\Seen y)", "-FLAGS.SILENT (\\Seen)"):
                assert status_of(answered(a, f"UID STORE 1:{MANY} {how}")) == "OK"
            assert status_of(answered(a, f"UID STORE 1:{MANY // 2} +FLAGS.SILENT (\\Deleted)")) == "OK"
            assert status_of(answered(a, "EXPUNGE")) == "OK"
            assert status_of(answered(a, f"UID MOVE {MANY // 2 + 1}:{MANY - 1000} Archive")) == "OK"
            staying.more(1)
            coming.more(1)
    finally:
        load.end()
    found = watchers.check()
    assert {uid: flags for uid, flags in found.items() if uid <= MANY} == dict.fromkeys(
        range(MANY - 999, MANY + 1), frozenset({b"y"})
    )
    assert a.status("Archive", "MESSAGES") == [MANY // 2 - 1000]
    load.check()


# Workers that are killed


# What is done in slices: the mailbox in which they are seen, by which item of STATUS, and what that says of how many are done.
SLICED: dict[str, tuple[str, str, Callable[[int], int]]] = {
    "EXPUNGE": ("INBOX", "DELETED", lambda found: MANY - found),
    "STORE 1:* +FLAGS.SILENT (\\Deleted)": ("INBOX", "DELETED", lambda found: found),
    "COPY 1:* Archive": ("Archive", "MESSAGES", lambda found: found),
    "MOVE 1:* Archive": ("Archive", "MESSAGES", lambda found: found),
}


@pytest.mark.parametrize(
    "command", ["EXPUNGE", *in_prove("COPY 1:* Archive", "STORE 1:* +FLAGS.SILENT (\\Deleted)", "MOVE 1:* Archive")]
)
def test_the_owner_is_killed_between_the_slices(relay, command):
    """COPY is all or nothing; of the others what is not done can be done again. Mail that was acknowledged meanwhile is there."""
    box, item, done = SLICED[command]
    home = neighbours(relay, "alice", "bob")
    a, look = relay.session("alice", worker=1 - home), relay.session("alice", worker=1 - home)
    fill(a, "INBOX", MANY)
    if command == "EXPUNGE":
        assert status_of(answered(a, "STORE 1:* +FLAGS.SILENT (\\Deleted)")) == "OK"
    owner = relay.worker_pids()[home]
    load = Paced(relay, ["alice", "bob"], 2)
    try:
        a.send(b"raw " + command.encode() + b"\r\n")
        wait_for(lambda: done(look.status(box, item)[0]) > 0, what="the first slice")
        os.kill(owner, signal.SIGKILL)
        status = status_of(rest(a))
        assert status in ("OK", "NO [UNAVAILABLE]")
        wait_for(lambda: len(pids := relay.worker_pids()) == 2 and owner not in pids, what="its successor")
        wait_for(lambda: not unfinished(relay), what="what was unfinished to come to its end")
        (part,) = (done(found) for found in look.status(box, item))
        if "COPY" in command:
            assert part == (MANY if status == "OK" else 0)
        relay.changed_workers()
        again = relay.session("alice", "SELECT INBOX", worker=1 - home)
        there = {uid for uid in flags_of(answered(again, "UID FETCH 1:* (FLAGS)")) if uid <= MANY}
        assert len(there) == MANY - (part if command.startswith(("EXPUNGE", "MOVE")) else 0)
        numbered = f"UID {command.replace('1:*', f'1:{MANY}')}" if "1:*" in command else command
        assert status_of(answered(again, numbered)) == "OK"
        (whole,) = (done(found) for found in look.status(box, item))
        assert whole == (part + MANY if "COPY" in command else MANY)
    finally:
        load.end()
    wait_for(lambda: relay.summary() == [], what="the queue to be empty")
    load.check()


def test_sessions_of_another_worker_go_on_while_the_owner_is_killed(relay):
    """Reading has no error and misses nothing; a change waits for the new owner, or is refused, and what was acknowledged is
    there; a session in IDLE hears of what comes behind that."""
    home = neighbours(relay, "alice", "bob")
    fill(relay.session("alice"), "INBOX", FEW)
    fetching, searching, changing, idle = (relay.session("alice", "SELECT INBOX", worker=1 - home) for _ in range(4))
    bodies = re.compile(rb"FETCH \(UID ([0-9]+) BODY\[\] \{([0-9]+)\}\r\n")

    def read(answer: bytes) -> dict[bytes, bytes]:
        assert status_of(answer) == "OK"
        return {match[1]: answer[match.end() : match.end() + int(match[2])] for match in bodies.finditer(answer)}

    right = read(answered(fetching, f"UID FETCH 1:{FEW} (BODY.PEEK[])"))
    found = re.search(rb"\* SEARCH [0-9 ]+\r", answered(searching, f'UID SEARCH UID 1:{FEW} BODY "body 8"'))
    assert len(right) == FEW and found
    statuses: set[str] = set()
    stored: list[int] = []
    put: list[str] = []

    def fetch() -> None:
        assert read(answered(fetching, f"UID FETCH 1:{FEW} (BODY.PEEK[])")) == right

    def search() -> None:
        assert found[0] in answered(searching, f'UID SEARCH UID 1:{FEW} BODY "body 8"')

    def change() -> None:
        number = len(stored) % FEW + 1
        statuses.add(status_of(answered(changing, f"UID STORE {number} +FLAGS.SILENT (x{len(stored) % 40})")))
        stored.append(number)
        text = message(f"put-{len(stored)}").decode()
        status = status_of(answered(changing, f"APPEND INBOX {{{len(text)}+}}\r\n{text}"))
        put.extend([f"put-{len(stored)}"] * (status == "OK"))
        statuses.add(status)

    idle.idle()
    load = Paced(relay, ["alice", "bob"], 2)
    try:
        with Work(fetch) as one, Work(search) as two, Work(change) as three:
            for _ in range(8 if PROVE else 2):
                for work in (one, two, three):
                    work.more(1)
                kill(relay, home)
            for work in (one, two, three):
                work.more(2)
    finally:
        load.end()
    assert statuses <= {"OK", "NO [UNAVAILABLE]"}
    wait_for(lambda: relay.summary() == [], what="the queue to be empty")
    load.check()
    subjects = came(relay, "alice")
    assert set(put) <= set(subjects)
    told = idle.until("EXISTS")
    while told[-1].number != FEW + len(subjects):
        told = idle.until("EXISTS")
    assert {one.name for one in idle.said[-len(told) :]} <= {"EXISTS", "RECENT", "FETCH", "FLAGS", "OK"}


# Clients that do not read


def test_clients_that_stop_reading_hold_up_nothing(relay):
    """No reader keeps an old state of LMDB: its file does not grow by what others write meanwhile. Memory is bounded, and others
    are answered. What the clients asked for they have when they go on reading."""
    count = MANY // 4
    relay.user("alice")
    home = relay.homes["alice"]
    a = relay.session("alice")
    fill(a, "INBOX", count)
    path = relay.spool / f"mail/shard-{home}/lmdb"

    def rounds(number: int) -> None:
        for _ in range(number):
            for how in "+-":
                assert status_of(answered(a, f"UID STORE 1:{count // 2} {how}FLAGS.SILENT (x)")) == "OK"

    rounds(3)
    before = memory(relay)
    slow = []
    for worker in (0, 1):
        for items in ("FLAGS", "FLAGS ENVELOPE", "BODY.PEEK[]"):
            session = relay.session("alice", "SELECT INBOX", worker=worker)
            session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            session.send(b"".join(b"%b UID FETCH 1:* (%b)\r\n" % (tag, items.encode()) for tag in (b"one", b"two", b"raw")))
            assert session.sock.recv(100).startswith(b"* 1 FETCH")
            slow.append(session)
    rounds(1)
    size = (path / "data.mdb").stat().st_size
    rows = MailShard(path, readonly=True)
    try:
        rounds(12 if PROVE else 6)
        last = rows.env.info()["last_txnid"]
        assert [reader for reader in readers(rows) if last - reader > 100] == []
    finally:
        rows.close()
    assert (path / "data.mdb").stat().st_size <= size * 1.1 + (1 << 20)
    for worker in (0, 1):
        assert relay.session("alice", worker=worker).status("INBOX", "MESSAGES") == [count]
    assert memory(relay) - before < 24 << 20
    for session in slow:
        session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        said = rest(session)
        assert status_of(said) == "OK" and said.count(b"\ntwo OK") == 1 and said.count(b" FETCH (UID") > 3 * count - 10


def readers(rows: MailShard) -> list[int]:
    """The transactions that readers of an environment, in any process, see now."""
    found = (line.split()[2] for line in rows.env.readers().splitlines()[1:])
    return [int(one) for one in found if one != "-"]


def memory(relay: ImapRelay) -> int:
    """Octets of the workers that are theirs."""
    total = 0
    for pid in relay.worker_pids():
        with open(f"/proc/{pid}/status") as status:
            total += next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
    return total
