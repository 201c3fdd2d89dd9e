"""IMAP while processes are killed: what a tagged OK has acknowledged is there, what was refused is not, and what had no answer is
there whole or not at all; no UID ever names two messages, and neither UIDNEXT nor HIGHESTMODSEQ falls."""

import os
import random
import threading
import time

import pytest

from tests.support.daemon import wait_for
from tests.support.imap_relay import ImapRelay, Session
from tests.support.mailboxes import PAUSE, kill_under_load, verified
from tests.support.prove import in_prove

PROVE = os.environ.get("RELAYMTA_PROVE") == "1"
BOXES = ("INBOX", "Archive", "Trash")
KEPT = 30  # messages of a mailbox
LATE = 3.0  # seconds until a command that had no answer is done, or will not be
FLAGS = {"store": "\\Flagged kw", "delete": "\\Deleted"}

State = dict[str, dict[str, frozenset[str]]]  # by mailbox: flags by subject


def different(found: State, expected: State) -> dict[str, tuple[object, object]]:
    """The messages that are not as expected: what was found and what is expected, by mailbox and subject."""
    return {
        f"{box} {subject}": (found[box].get(subject), expected[box].get(subject))
        for box in found
        for subject in sorted(found[box].keys() | expected[box].keys())
        if found[box].get(subject) != expected[box].get(subject)
    }


class Client:
    """One user's client: it changes mail at random in mailboxes (`boxes`), and knows after each answer what there has to be.
    `pause`: seconds between two commands."""

    boxes, pause = BOXES, PAUSE

    def __init__(self, relay: ImapRelay, number: int, stop: threading.Event) -> None:
        self.relay, self.name, self.stop = relay, f"client{number}", stop
        self.random = random.Random(number)
        self.state: State = {box: {} for box in self.boxes}
        self.known: dict[tuple[str, int, int], str] = {}  # subject by mailbox, UIDVALIDITY and UID
        self.highest: dict[tuple[str, int], tuple[int, int]] = {}  # UIDNEXT and HIGHESTMODSEQ by mailbox and UIDVALIDITY
        self.acknowledged = self.lost = self.count = 0
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        relay.user(self.name)
        self.thread.start()

    def _run(self) -> None:
        expected, command = [self.state], b""
        try:
            while not self.stop.is_set():
                try:
                    session = self.relay.session(self.name)
                except (OSError, EOFError, AssertionError):
                    self.stop.wait(0.1)
                    continue
                try:
                    self.state = self.settled(session, expected)
                    assert self.state in expected, (self.name, command, [different(self.state, one) for one in expected])
                    while not self.stop.wait(self.pause):
                        expected = [self.state]
                        after, command = self.plan(session)
                        expected.append(after)
                        if session.command(command).status == "OK":
                            self.state, expected = after, [after]
                            self.acknowledged += 1
                        else:  # not now: the owner is being replaced
                            self.lost += 1
                            break
                except (OSError, EOFError):
                    self.lost += 1
        except BaseException as error:
            self.failure = error

    def settled(self, session: Session, expected: list[State]) -> State:
        """What there is, `expected` being what was before the last command and behind it: that command may still be under way
        at the shard's owner when the worker that has asked it for this is killed."""
        found, until = self.look(session), time.monotonic() + LATE
        while found != expected[-1] and time.monotonic() < until:
            time.sleep(0.2)  # a look costs much
            found = self.look(session)
        return found

    def look(self, session: Session) -> State:
        """What there is, and that no number has gone back."""
        found: State = {}
        for box in self.boxes:
            validity, uidnext, modseq = session.status(box, "UIDVALIDITY", "UIDNEXT", "HIGHESTMODSEQ")
            before = self.highest.get((box, validity), (0, 0))
            assert (uidnext, modseq) >= before and uidnext >= before[0] and modseq >= before[1], (box, before, uidnext, modseq)
            self.highest[box, validity] = uidnext, modseq
            session.ok(f"EXAMINE {box}")
            subjects = session.subjects() if uidnext > 1 else {}
            for uid, subject in subjects.items():
                assert self.known.setdefault((box, validity, uid), subject) == subject
            flags = session.flags() if uidnext > 1 else {}
            found[box] = {subjects[uid]: frozenset(flags[uid]) for uid in subjects}
            assert len(found[box]) == len(subjects)
        return found

    def plan(self, session: Session) -> tuple[State, bytes]:
        """What there is behind a command, and the command."""
        after = {box: dict(messages) for box, messages in self.state.items()}
        box, other = self.random.sample(self.boxes, 2)
        what = self.random.choice(("append", "append", "copy", "move", "store", "delete", "expunge"))
        there = sorted(after[box])
        if len(there) > KEPT:
            what = self.random.choice(("delete", "expunge"))
        if what == "expunge":
            there = [subject for subject in there if "\\Deleted" in after[box][subject]]
        chosen = self.random.sample(there, min(len(there), 3 if what != "expunge" else KEPT))
        if what == "append" or not chosen or (what in ("copy", "move") and set(chosen) & set(after[other])):
            return after, self.appending(after, box)
        session.ok(f"SELECT {box}")
        uids = {subject: uid for uid, subject in session.subjects().items()}
        uid_set = ",".join(str(uids[subject]) for subject in chosen).encode()
        if what == "expunge":
            for subject in chosen:
                del after[box][subject]
            return after, b"UID EXPUNGE %s" % uid_set
        if what in FLAGS:
            for subject in chosen:
                after[box][subject] |= set(FLAGS[what].split())
            return after, b"UID STORE %s +FLAGS.SILENT (%s)" % (uid_set, FLAGS[what].encode())
        for subject in chosen:
            after[other][subject] = after[box][subject]
            if what == "move":
                del after[box][subject]
        return after, b"UID %s %s %s" % (what.upper().encode(), uid_set, other.encode())

    def appending(self, after: State, box: str) -> bytes:
        """An APPEND of one message, or of several, which come together."""
        line = b"APPEND %s" % box.encode()
        for _ in range(self.random.choice((1, 1, 3))):
            self.count += 1
            subject = f"{self.name}-{self.count}"
            after[box][subject] = frozenset({"\\Seen"})
            text = f"Subject: {subject}\r\n\r\n".encode() + b"x" * self.random.choice((10, 3000)) + b"\r\n"
            line += b" (\\Seen) {%d+}\r\n%s" % (len(text), text)
        return line


class Clients:
    """Some of them, as a load (`support.mailboxes.Load`)."""

    def __init__(self, relay: ImapRelay, count: int) -> None:
        self.stop = threading.Event()
        self.clients = [Client(relay, number, self.stop) for number in range(count)]

    def all_at_work(self) -> bool:
        return all(client.acknowledged or client.failure for client in self.clients)

    def end(self) -> None:
        self.stop.set()
        for client in self.clients:
            client.thread.join(60)

    def check(self, relay: ImapRelay) -> None:
        for client in self.clients:
            if client.failure is not None:
                raise client.failure
            assert client.acknowledged > 0
            assert client.look(relay.session(client.name)) is not None


@pytest.mark.parametrize("what", ["group", *in_prove("workers")])
def test_what_was_acknowledged_is_there(tmp_path, what):
    with ImapRelay(tmp_path) as relay:
        clients = Clients(relay, 6)
        wait_for(clients.all_at_work)
        kill_under_load(relay, clients, what, 30 if PROVE else 2)
        clients.check(relay)
        assert sum(client.lost for client in clients.clients) > 0
        verified(relay)
