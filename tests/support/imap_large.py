"""Large mailboxes in tests: filled in no time, what is said of them read by regular expressions, and work that goes on beside."""

import contextlib
import os
import re
import signal
import smtplib
import threading
from collections.abc import Callable

from relaymta.store.files import MailFiles
from relaymta.store.reading import data_of, pages
from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, wait_for
from tests.support.imap_relay import ImapRelay, Session, message
from tests.support.mailboxes import Load

__all__ = [
    "LmtpLoad", "Paced", "Work", "answered", "came", "deliver", "fill", "flags_of", "kill", "neighbours", "rest", "served",
    "status_of", "tombstones",
]  # fmt: skip

_FETCHED = re.compile(rb"^\* [0-9]+ FETCH \((.*)\)\r$", re.MULTILINE)
_END = re.compile(rb"(?<![^\n])raw (OK|NO \[[A-Z]+\]|[A-Z]+) [^\n]*\n(?:\* BYE [^\n]*\n)?\Z")
_VANISHED = re.compile(rb"^\* VANISHED (?:\(EARLIER\) )?([0-9:,]+)\r$", re.MULTILINE)


def answered(session: Session, command: str) -> bytes:
    """All that the server says to a command, without the grammar, which would take longer than the server. EOFError, OSError."""
    session.send(f"raw {command}\r\n".encode())
    return rest(session)


def rest(session: Session) -> bytes:
    """What is said to the end of the command `raw`, and a BYE that has come with it. EOFError, OSError."""
    said = bytearray()
    while not _END.search(said, max(len(said) - 1000, 0)):
        piece = session.sock.recv(1 << 18)
        if not piece:
            raise EOFError(bytes(said[-300:]))
        said += piece
    return bytes(said)


def status_of(answer: bytes) -> str:
    """The status of an answer, with its code where it is not OK."""
    found = _END.search(answer, max(len(answer) - 1000, 0))
    assert found, answer[-300:]
    return found[1].decode()


def flags_of(answer: bytes) -> dict[int, frozenset[bytes]]:
    """The flags that FETCH responses tell, by UID, without \\Recent."""
    found = {}
    for items in _FETCHED.findall(answer):
        uid, flags = re.search(rb"UID ([0-9]+)", items), re.search(rb"FLAGS \(([^)]*)\)", items)
        if uid and flags:
            found[int(uid[1])] = frozenset(flags[1].split()) - {rb"\Recent"}
    return found


def tombstones(answer: bytes) -> set[int]:
    """The UIDs that VANISHED responses tell."""
    found: set[int] = set()
    for uids in _VANISHED.findall(answer):
        for part in uids.split(b","):
            first, _, last = part.partition(b":")
            found.update(range(int(first), int(last or first) + 1))
    return found


def fill(session: Session, name: str, count: int) -> None:
    """Put so many messages into a mailbox that is empty, of 500 with subjects and lengths of their own; it is selected then."""
    first = min(count, 500)
    texts = (message(f"m{number}", f"body {number} {'x' * (number % 7) * 100}") for number in range(first))
    session.ok(f"APPEND {name}".encode() + b"".join(b" {%d+}\r\n%s" % (len(text), text) for text in texts))
    session.ok(f"SELECT {name}")
    there = first
    while there < count:
        more = min(there, count - there)
        assert status_of(answered(session, f"COPY 1:{more} {name}")) == "OK"
        assert status_of(answered(session, "NOOP")) == "OK"
        there += more


def neighbours(relay: ImapRelay, *names: str) -> int:
    """Users whose mailboxes are in one shard: its number."""
    for name in names:
        relay.user(name)
        if relay.homes[name] != relay.homes[names[0]]:
            relay.asked("mailbox_move", name, shard=relay.homes[names[0]])
            relay.homes[name] = relay.homes[names[0]]
    return relay.homes[names[0]]


def kill(relay: ImapRelay, worker: int) -> None:
    """Kill a worker; its successor is there when this returns."""
    pid = relay.worker_pids()[worker]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(pids := relay.worker_pids()) == relay.workers and pid not in pids, what="its successor")
    relay.changed_workers()


def served(relay: ImapRelay, worker: int, kind: type[smtplib.SMTP] = smtplib.LMTP) -> smtplib.SMTP:
    """A client of the relay's LMTP listener, or (smtplib.SMTP) of its SMTP listener, which this worker serves."""
    port = relay.ports["lmtp"] if kind is smtplib.LMTP else relay.port
    while True:
        client = kind("127.0.0.1", port, timeout=PATIENCE)
        client.ehlo()
        assert client.sock is not None
        if relay.serves(worker, client.sock):
            return client
        client.close()


def deliver(client: smtplib.SMTP, subject: str, *names: str) -> None:
    """A message that these users have (or, by SMTP, will have) when this returns. SMTPException."""
    client.sendmail("s@x.example", [f"{name}@local.example" for name in names], f"Subject: {subject}\r\n\r\nx\r\n")
    if isinstance(client, smtplib.LMTP):
        replies = [client.getreply() for _ in names[1:]]  # which `sendmail` does not read
        assert [reply for reply in replies if reply[0] != 250] == []


def came(relay: ImapRelay, name: str) -> list[str]:
    """The subjects of all messages in a user's INBOX but those of `fill`."""
    subjects: dict[int, str] = {}  # by object: many messages have the same
    found: list[str] = []
    with MailFiles(relay.spool / "mail") as files:
        user = files.directory.known(f"{name}@local.example")
        shard = files.shard(user.shard)
        with shard.rows.reading() as txn:
            row = shard.rows.mailbox(txn, user.ident, "INBOX")
        assert row is not None
        for page in pages(shard.rows, row.mailbox):
            for _, one in page:
                if one.object not in subjects:
                    match = re.search(rb"^Subject: (.*)\r$", data_of(shard.rows, shard.bodies, one), re.MULTILINE)
                    subjects[one.object] = match[1].decode() if match else ""
                found.append(subjects[one.object])
    return [subject for subject in found if not re.fullmatch("m[0-9]+", subject)]


class Paced(Load):
    """A load that leaves the relay time for what is tested beside it, to users with many other messages."""

    def deliver(self, client: smtplib.SMTP, to: list[str], text: str) -> list[str]:
        self._stop.wait(0.02 if PROVE else 0.05)
        return super().deliver(client, to, text)

    def found(self, name: str) -> list[str]:
        assert isinstance(self.relay, ImapRelay)
        return came(self.relay, name)


class LmtpLoad(Paced):
    """Comes by LMTP: what is acknowledged is in the mailbox."""

    def client(self) -> smtplib.SMTP:
        assert isinstance(self.relay, ImapRelay)
        return smtplib.LMTP("127.0.0.1", self.relay.ports["lmtp"], timeout=PATIENCE)

    def deliver(self, client: smtplib.SMTP, to: list[str], text: str) -> list[str]:
        found = []
        for name in to:
            with contextlib.suppress(smtplib.SMTPDataError, smtplib.SMTPRecipientsRefused):
                found += super().deliver(client, [name], text)
        return found


class Work:
    """`step()` again and again on a thread of its own, with so many seconds between, within `with`, which raises what it has
    raised. `count`: how many steps have ended."""

    def __init__(self, step: Callable[[], object], pause: float = 0.0) -> None:
        self.count = 0
        self._step, self._pause, self._stop = step, pause, threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                self._step()
                self.count += 1
        except BaseException as error:
            self._failure = error

    def more(self, count: int) -> None:
        """Wait for so many more steps."""
        enough = self.count + count
        wait_for(lambda: self.count >= enough or self._failure is not None, what="more steps")

    def __enter__(self) -> "Work":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._failure is not None and error[0] is None:
            raise self._failure
