"""A backup while users change their mail in all ways: what it restores is a state that was, at one moment of each shard."""

import copy
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from relaymta.store.files import MailFiles
from relaymta.store.reading import data_of, pages
from relaymta.store.shown import flags_of
from tests.conftest import PROVE
from tests.e2e.test_lmtp import Client as Lmtp
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.imap_relay import ImapRelay, Session
from tests.support.mailboxes import kept, verified

USERS = ("ann", "ben", "cid", "dot")
FIRST = ("INBOX", "Archive", "Drafts", "Junk", "Sent", "Trash")
State = dict[str, dict[int, tuple[str, frozenset[str]]]]  # by mailbox and UID: subject, flags


@dataclass
class Step:
    """A change: when it was asked for and when it was acknowledged (never: inf), and what there is after it."""

    what: str
    began: float
    state: State
    ended: float = float("inf")


@dataclass
class User:
    """One user, who changes one thing after another, and every change that was asked for. `steps[0]`: what there is at first."""

    name: str
    chance: random.Random
    steps: list[Step] = field(default_factory=lambda: [Step("", 0.0, {name: {} for name in FIRST}, 0.0)])
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def state(self) -> State:
        return self.steps[-1].state

    def subject(self) -> str:
        return f"{self.name}-{next(self.numbers)}"

    def change(self, session: Session, lmtp: Lmtp) -> None:
        """Ask for a change, and wait until it is acknowledged."""
        what = self.chance.choice(
            ("deliver", "deliver", "append", "append_several", "store", "expunge", "copy", "move", "rename")
        )
        after, run = getattr(self, f"_{what}")(copy.deepcopy(self.state), session, lmtp)
        if run is not None:
            self.steps.append(Step(what, time.monotonic(), after))
            run()
            self.steps[-1].ended = time.monotonic()

    # Each: what there will be, and what asks for it; None: there is nothing to be changed

    def _deliver(self, after, session, lmtp):
        subject = self.subject()
        after["INBOX"][self._next(session, "INBOX")] = (subject, frozenset())

        def run():
            (said,) = lmtp.deliver(text_of(subject).decode(), self.name)
            assert said.startswith("250"), said

        return after, run

    def _append(self, after, session, lmtp, count=1):
        name = self.chance.choice(sorted(after))
        subjects, first = [self.subject() for _ in range(count)], self._next(session, name)
        flags = self.chance.choice((frozenset(), frozenset({"\\Seen"}), frozenset({"work", "\\Flagged"})))
        after[name] |= {first + at: (subject, flags) for at, subject in enumerate(subjects)}
        literals = b"".join(b" (%b) {%d+}\r\n%b" % (" ".join(flags).encode(), len(text_of(s)), text_of(s)) for s in subjects)
        return after, lambda: session.ok(f'APPEND "{name}"'.encode() + literals)

    def _append_several(self, after, session, lmtp):
        return self._append(after, session, lmtp, 3)

    def _chosen(self, after, session, most=3):
        """Some messages of a mailbox, which is selected then."""
        name = self.chance.choice(sorted(name for name in after if after[name]) or ["INBOX"])
        uids = sorted(self.chance.sample(sorted(after[name]), min(len(after[name]), self.chance.randint(1, most))))
        session.ok(f'SELECT "{name}"')
        return name, uids, ",".join(map(str, uids))

    def _store(self, after, session, lmtp):
        name, uids, named = self._chosen(after, session)
        flag, sign = self.chance.choice(("\\Seen", "\\Answered", "work", "later")), self.chance.choice("+-")
        for uid in uids:
            subject, flags = after[name][uid]
            after[name][uid] = (subject, flags | {flag} if sign == "+" else flags - {flag})
        return after, (lambda: session.ok(f"UID STORE {named} {sign}FLAGS.SILENT ({flag})")) if uids else None

    def _expunge(self, after, session, lmtp):
        name, uids, named = self._chosen(after, session, 2)
        if not uids:
            return after, None
        marked = copy.deepcopy(after)
        for uid in uids:
            subject, flags = after[name].pop(uid)
            marked[name][uid] = (subject, flags | {"\\Deleted"})

        def mark():
            self.steps.append(Step("mark", time.monotonic(), marked))
            session.ok(f"UID STORE {named} +FLAGS.SILENT (\\Deleted)")
            self.steps[-1].ended = time.monotonic()

        mark()
        return after, lambda: session.ok(f"UID EXPUNGE {named}")

    def _copy(self, after, session, lmtp, verb="COPY"):
        name, uids, named = self._chosen(after, session)
        target = self.chance.choice(sorted(set(after) - {name}))
        first = self._next(session, target)
        after[target] |= {first + at: after[name][uid] for at, uid in enumerate(uids)}
        if verb == "MOVE":
            for uid in uids:
                del after[name][uid]
        return after, (lambda: session.ok(f'UID {verb} {named} "{target}"')) if uids else None

    def _move(self, after, session, lmtp):
        return self._copy(after, session, lmtp, "MOVE")

    def _rename(self, after, session, lmtp):
        name = self.chance.choice(sorted(set(after) - {"INBOX"}))
        new = f"box{next(self.numbers)}"
        after[new] = after.pop(name)
        session.command("UNSELECT")
        return after, lambda: session.ok(f'RENAME "{name}" "{new}"')

    def _next(self, session, name):
        return session.status(f'"{name}"', "UIDNEXT")[0]


def text_of(subject: str) -> bytes:
    return f"Subject: {subject}\r\n\r\n{subject * 50}\r\n".encode()


def files_of(relay: Relay) -> dict[str, tuple[int, State]]:
    """The shard of each user, and what the user has, read from the files; every text is the one that was given."""
    found = {}
    with MailFiles(relay.spool / "mail") as files:
        for name in USERS:
            user = files.directory.known(f"{name}@local.example")
            reader = files.shard(user.shard)
            with reader.rows.reading() as txn:
                rows = [(row, reader.rows.state(txn, row.mailbox)) for row in reader.rows.mailboxes(txn, user.ident)]
            state: State = {}
            for row, mailbox in rows:
                if mailbox is None:  # a name that is subscribed
                    continue
                state[row.name] = {}
                for record, message in itertools.chain.from_iterable(pages(reader.rows, row.mailbox)):
                    data = data_of(reader.rows, reader.bodies, message)
                    subject = data.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode()
                    assert data.endswith(text_of(subject))
                    state[row.name][record.uid] = (subject, frozenset(flags_of(record.flags, mailbox)))
            found[name] = (user.shard, state)
    return found


class Clients:
    """All users at once, each by a session and an LMTP client of their own."""

    def __init__(self, relay: ImapRelay, lmtp: int) -> None:
        self.users = [User(name, random.Random(name)) for name in USERS]
        self.failed: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(user, relay.session(user.name, worker=at % 2), lmtp))
            for at, user in enumerate(self.users)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, user: User, session: Session, port: int) -> None:
        try:
            with Lmtp("127.0.0.1", port, timeout=PATIENCE) as lmtp:
                lmtp.lhlo_or_raise()
                while not self._stop.is_set():
                    user.change(session, lmtp)
        except BaseException as error:
            self.failed.append(error)

    def steps(self) -> int:
        return min(len(user.steps) for user in self.users)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def places(user: User, state: State, began: float, ended: float) -> list[int]:
    """Behind which of the user's changes this was what there was: none before `began` is missing, none after `ended` is in it."""
    least = max(at for at, step in enumerate(user.steps) if step.ended < began)
    most = max(at for at, step in enumerate(user.steps) if step.began < ended)
    return [at for at in range(least, most + 1) if user.steps[at].state == state]


def at_one_moment(users: list[User], found: list[list[int]]) -> bool:
    """Whether there was a moment at which each of the users was at one of these places."""
    for chosen in itertools.product(*found):
        latest = max(user.steps[at].began for user, at in zip(users, chosen, strict=True))
        missing = [user.steps[at + 1].ended for user, at in zip(users, chosen, strict=True) if at + 1 < len(user.steps)]
        if latest < min(missing, default=float("inf")):
            return True
    return False


def one_of(user: User, state: State) -> bool:
    return any(step.state == state for step in user.steps)


@pytest.fixture(scope="module")
def backups(tmp_path_factory):
    """(users, [(folder, when it was asked for, when it was there)]), and the relay, which still runs."""
    folder = tmp_path_factory.mktemp("backup")
    relay = ImapRelay(folder)
    lmtp = free_port()
    relay.config.write_text(relay.config.read_text() + f'[[listener]]\naddress = "127.0.0.1:{lmtp}"\nprotocol = "lmtp"\n')
    with relay:
        for name in USERS:
            relay.user(name)
        clients, made = Clients(relay, lmtp), []
        try:
            for number in range(8 if PROVE else 2):
                before = clients.steps()
                wait_for(lambda before=before: clients.steps() > before + 20 or clients.failed, what="some changes")
                began = time.monotonic()
                relay.cli("mailbox", "backup", str(folder / f"backup-{number}"))
                made.append((folder / f"backup-{number}", began, time.monotonic()))
        finally:
            clients.end()
        if clients.failed:
            raise clients.failed[0]
        verified(relay)
        yield clients.users, made, relay


def test_what_is_restored_was_there_at_one_moment(backups, tmp_path):
    users, made, relay = backups
    assert {name: state for name, (_, state) in files_of(relay).items()} == {user.name: user.state for user in users}
    verbs = {step.what for user in users for step in user.steps}
    assert verbs >= {"deliver", "append", "append_several", "store", "expunge", "copy", "move", "rename"}
    for folder, began, ended in made:
        (tmp_path / folder.name).mkdir()
        other = kept(tmp_path / folder.name, workers=2)
        other.cli("mailbox", "restore", str(folder))
        verified(other)
        with other:  # what was under way is undone at the start
            wait_for(lambda other=other: not unfinished(other), what="the end of what was under way")
            assert other.stop() == 0
        verified(other)
        found = files_of(other)
        assert {shard for shard, _ in found.values()} == {0, 1}
        for shard in (0, 1):
            here = [user for user in users if found[user.name][0] == shard]
            at = [places(user, found[user.name][1], began, ended) for user in here]
            assert all(at), [(user.name, found[user.name][1]) for user, there in zip(here, at, strict=True) if not there]
            assert at_one_moment(here, at), "of one shard: a change is missing that was over before another one began"


def unfinished(relay: Relay) -> bool:
    """Whether an APPEND of several messages, or a COPY, is neither done nor undone."""
    with MailFiles(relay.spool / "mail") as files:
        for shard in (0, 1):
            reader = files.shard(shard)
            with reader.rows.reading() as txn:
                if any(reader.rows.unfinished(txn)):
                    return True
    return False


def test_one_user_is_restored(backups):
    """Into the running relay: as in the backup, the others as they are."""
    users, made, relay = backups
    before = files_of(relay)
    relay.cli("mailbox", "delete", "--now", "ann@local.example")
    relay.cli("mailbox", "restore", str(made[0][0]), "ann@local.example")
    after = files_of(relay)
    assert one_of(users[0], after["ann"][1]) and after["ann"][1] != before["ann"][1]
    assert places(users[0], after["ann"][1], made[0][1], made[0][2])
    assert {name: after[name] for name in USERS[1:]} == {name: before[name] for name in USERS[1:]}
    verified(relay)


def test_no_file_of_a_backup_is_changed_later(backups):
    """The texts of the oldest backup are whole, whatever has been written since."""
    _, made, relay = backups
    folder = made[0][0]
    assert min(path.stat().st_nlink for path in folder.rglob("*.seg")) > 1
    assert all(not Path(path).is_symlink() for path in folder.rglob("*"))
    assert relay.cli("mailbox", "backup", str(folder), check=False).returncode == 69
