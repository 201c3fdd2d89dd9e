"""Hostile clients of the mailboxes beside one who reads mail, on one worker: `python -m benchmarks.hostile_mail [NAME ...]
[--messages N] [--seconds N] [--json FILE]`.

For each attack: the worker's memory (at most 64 MB more in all), how long another session's commands take with it and without it
(p99 at most 50 ms on an idle machine), and by how much LMDB's file grows while nothing but reading is done."""

import argparse
import base64
import contextlib
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.backlog import anonymous
from relaymta import control
from tests.e2e.test_lmtp import Client as Lmtp
from tests.support.daemon import free_port
from tests.support.imap_relay import PASSWORD, ImapRelay, Session

MEMORY_MOST, P99_MOST = 64 << 10, 50.0  # kB, ms
TOGETHER = 500  # messages of one APPEND
EVIL = [f"evil{number}" for number in range(4)]


def reads_mail(port: int, times: "multiprocessing.Queue[list[float]]", stop: "multiprocessing.synchronize.Event") -> None:
    """Another user's session, in a process of its own: every 10 ms a command."""
    with socket.create_connection(("127.0.0.1", port), 600) as sock:
        session, took = Session(sock), list[float]()
        session.greeting()
        session.ok(f"LOGIN good@local.example {PASSWORD}")
        session.ok("SELECT INBOX")
        commands = [
            "NOOP", "UID FETCH 1:* (FLAGS)", "UID FETCH 1:5 (BODY.PEEK[])", 'LIST "" "*"', "UID SEARCH SUBJECT x",
            "UID SEARCH TEXT x", "UID FETCH 1:* (ENVELOPE BODY.PEEK[HEADER])",
        ]  # fmt: skip
        while not stop.is_set():
            for command in commands:
                began = time.monotonic()
                session.send(f"x {command}\r\n".encode())
                drain(session)
                took.append(time.monotonic() - began)
                time.sleep(0.01)
        times.put(took)


class Reading:
    """It, while the block runs; `seconds` then: how long each command took."""

    def __init__(self, port: int) -> None:
        self._times: multiprocessing.Queue[list[float]] = multiprocessing.Queue()
        self._stop = multiprocessing.Event()
        self._process = multiprocessing.Process(target=reads_mail, args=(port, self._times, self._stop))
        self.seconds: list[float] = []

    def __enter__(self) -> "Reading":
        self._process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self.seconds = sorted(self._times.get(timeout=600))
        self._process.join()

    def share(self, per_mille: int) -> float:
        """The time within which so many of a thousand commands were done, ms."""
        return self.seconds[min(len(self.seconds) * per_mille // 1000, len(self.seconds) - 1)] * 1000


class Stage(NamedTuple):
    relay: ImapRelay
    lmtp: int
    messages: int
    stop: threading.Event

    def session(self, number: int = 0, *commands: str) -> Session:
        return self.relay.session(EVIL[number % len(EVIL)], *commands)

    def again(self, session: Session, *commands: str) -> None:
        """These commands, until it is over."""
        while not self.stop.is_set():
            for command in commands:
                session.send(f"x {command}\r\n".encode())
                drain(session)

    def together(self, *works: Callable[[], None]) -> None:
        threads = [threading.Thread(target=quietly, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def quietly(work: Callable[[], None]) -> None:
    with contextlib.suppress(OSError, EOFError, AssertionError):
        work()


def drain(session: Session) -> None:
    """Read up to a tagged response, without looking at it."""
    tail = b""
    while b"\r\nx " not in b"\r\n" + tail or not tail.endswith(b"\r\n"):
        piece = session.sock.recv(1 << 16)
        if not piece:
            raise EOFError
        tail = (tail + piece)[-200:]


# What is hostile

HEAD = b"From: a@x.example\r\nMIME-Version: 1.0\r\n"
WORD = b"=?utf-8?q?" + b"=C3=A4" * 9 + b"?="
BOUNDARY = b"Content-Type: multipart/mixed; boundary=%b\r\n\r\n"
ITEMS = ("ENVELOPE", "BODYSTRUCTURE", "BODY", "PREVIEW", "BODY.PEEK[HEADER.FIELDS (SUBJECT X)]", "BINARY.SIZE[1]")
LOOKS = (
    *(f"UID FETCH 1:* ({item})" for item in ITEMS), "UID SEARCH TEXT nothing", "UID SEARCH HEADER X y", "UID SEARCH SUBJECT zz",
    "UID SORT (SUBJECT DATE FROM) UTF-8 ALL", "UID THREAD REFERENCES UTF-8 ALL", "UID THREAD ORDEREDSUBJECT UTF-8 ALL",
)  # fmt: skip
TEXTS = {
    "200 nested multiparts": b"".join(BOUNDARY % str(n).encode() + b"--%d\r\n" % n for n in range(200)) + b"\r\nx\r\n",
    "200 nested messages": b"Content-Type: message/rfc822\r\n\r\n" * 200 + b"\r\nx\r\n",
    "a header of 5 MB": b"X: " + b"y" * 70 + b"\r\n" + b"X-%d: y\r\n" % 1 * 470_000 + b"\r\nb\r\n",
    "10,000 parts": BOUNDARY % b"b" + b"--b\r\n\r\nx\r\n" * 9_998 + b"--b--\r\n",
    "10,000 parts of base64": BOUNDARY % b"b"
    + b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\neHh4eA==\r\n" * 9_998 + b"--b--\r\n",
    "10,000 parts of 40 MB": BOUNDARY % b"b"
    + (b"--b\r\nContent-Type: text/plain; name=" + b"n" * 40 + b"\r\n\r\n" + b"a line of words\r\n" * 230 + b"\r\n") * 9_998,
    "base64 of 40 MB": b"Content-Transfer-Encoding: base64\r\n\r\n"
    + base64.encodebytes(b"\xc3\xa4x " * 14_000).replace(b"\n", b"\r\n") * 520,
    "encoded words": b"Subject: " + (WORD + b"\r\n ") * 14_000 + b"\r\n\r\nx\r\n",
    "many addresses": b"To: " + b'"a\\"b" <c@d.example>,\r\n ' * 40_000 + b"<e@f.example>\r\n\r\nx\r\n",
    "brackets in Subject": b"Subject: " + b"[a] re: " * 120_000 + b"\r\n\r\nx\r\n",
    "many references": b"References: " + b"<a@b>\r\n " * 100_000 + b"\r\n\r\nx\r\n",
    "HTML": b"Content-Type: text/html\r\n\r\n" + b"<!-- <a <script <" * 60_000,
}  # fmt: skip


def texts(what: str, count: int) -> Callable[[Stage], None]:
    """Several messages of a kind, and everything that looks into them."""

    def attack(stage: Stage) -> None:
        data, name = HEAD + TEXTS[what], f"m{list(TEXTS).index(what)}"
        for number in range(len(EVIL)):
            session = stage.session(number)
            session.command(f"CREATE {name}")
            for _ in range(count):
                session.append(name, data, plus=True)
        works = [(lambda n=n: stage.again(stage.session(n, f"SELECT {name}"), *LOOKS)) for n in range(2 * len(EVIL))]
        stage.together(*works)

    return attack


LINE = "a line of some words, as they are in mail, für jedermann\r\n"
BODIES = {
    "8bit; charset=utf-8": LINE.encode() * 680_000,
    "8bit; charset=iso-8859-1": LINE.encode("latin-1") * 690_000,
    "base64; charset=utf-8": base64.encodebytes(LINE.encode() * 19_000).replace(b"\n", b"\r\n") * 26,
    "quoted-printable; charset=utf-8": LINE.replace("ü", "=C3=BC").encode() * 640_000,
}


def large_bodies(stage: Stage) -> None:
    """All users look into texts of 40 MB, by two sessions each."""
    for number in range(len(EVIL)):
        session = stage.session(number)
        session.command("CREATE large")
        for what, body in BODIES.items():
            encoding, charset = what.split("; ")
            head = f"Content-Type: text/plain; {charset}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n"
            session.append("large", HEAD + head.encode() + body, plus=True)
    looks = ("UID SEARCH BODY nothing", "UID SEARCH TEXT anything")
    stage.together(*((lambda n=n: stage.again(stage.session(n, "SELECT large"), *looks)) for n in range(2 * len(EVIL))))


def half_literals(stage: Stage) -> None:
    for number in range(60):
        if number % 2:
            stage.session(number).send(b"x SELECT {65000+}\r\n" + b"y" * 32_000)
        else:
            session = stage.relay.connect()
            session.greeting()
            session.send(b"x LOGIN {4096}\r\n" + b"y" * 2048)
    stage.stop.wait()


def long_lines(piece: bytes) -> Callable[[Stage], None]:
    def attack(stage: Stage) -> None:
        def work(number: int) -> None:
            session = stage.session(number)
            while not stage.stop.is_set():
                session.send(b"x SEARCH " + piece * (10_000_000 // len(piece)) + b"\r\n")
                session.response()
                if session.said[-1].name == "BYE":
                    session = stage.session(number)

        stage.together(*((lambda n=n: work(n)) for n in range(8)))

    return attack


def slow_readers(stage: Stage) -> None:
    """Who ask for all of it, and read an octet a second."""
    sessions = [stage.session(number, "SELECT star") for number in range(20)]
    for session in sessions:
        session.send(b"x UID FETCH 1:* (FLAGS ENVELOPE BODYSTRUCTURE BODY.PEEK[])\r\n" * 100)
    while not stage.stop.wait(1):
        for session in sessions:
            session.sock.recv(1)


def on_the_large(sessions: int, *commands: str) -> Callable[[Stage], None]:
    def attack(stage: Stage) -> None:
        def work(number: int) -> None:
            stage.again(stage.session(0, f"SELECT {('star', 'chain')[number % 2]}"), *commands)

        stage.together(*((lambda n=n: work(n)) for n in range(sessions)))

    return attack


def many_mailboxes(stage: Stage) -> None:
    session = stage.session(3)
    for start in range(0, 9_900, 100):
        session.send(b"".join(b"x CREATE box/%d\r\n" % number for number in range(start, start + 100)))
        for _ in range(100):
            session.response()
    listing = ('LIST "" "*" RETURN (STATUS (MESSAGES UNSEEN SIZE))', 'LIST "" "*%*a*%"', 'LSUB "" "*"', "RENAME box bax")
    stage.together(*((lambda n=n: stage.again(stage.session(3), *listing[n % 4 : n % 4 + 1])) for n in range(12)))


def appends(stage: Stage) -> None:
    def work(number: int) -> None:
        session = stage.session(number)
        session.command("CREATE heap")
        data = HEAD + b"Subject: x\r\n\r\n" + b"y" * (100, 200_000, 900_000)[number % 3]
        while not stage.stop.is_set():
            session.append("heap", data, plus=bool(number % 2))

    stage.together(*((lambda n=n: work(n)) for n in range(20)))


def many_sessions(stage: Stage) -> None:
    for number in range(len(EVIL) * 95):
        stage.session(number, "SELECT INBOX").send(b"i IDLE\r\n")
    stage.stop.wait()


def changed(stage: Stage, name: str, what: str, script: str, text: bytes = b"") -> None:
    path = stage.relay.spool / "control.sock"
    control.ask(path, "sieve_change", address=f"{name}@local.example", what=what, name=script, text=text)


def sieve(script: bytes, octets: int) -> Callable[[Stage], None]:
    """All users have this script, and get messages of so many octets."""

    def attack(stage: Stage) -> None:
        for name in EVIL:
            changed(stage, name, "put_script", "s", script)
            changed(stage, name, "activate_script", "s")
        text = "Subject: " + "a" * 900 + "\r\n\r\n" + ("a" * 900 + "\r\n") * (octets // 902)

        def work() -> None:
            with Lmtp("127.0.0.1", stage.lmtp, timeout=600) as client:
                client.lhlo_or_raise()
                while not stage.stop.is_set():
                    client.deliver(text, *EVIL)

        stage.together(*[work] * 4)
        for name in EVIL:
            changed(stage, name, "activate_script", "")

    return attack


STARS = b'require ["body", "fileinto"];\r\nif body :matches "%b" { discard; }\r\n' % (b"*a?" * 15_000 + b"b")
ATTACKS: dict[str, Callable[[Stage], None]] = {
    "half literals": half_literals,
    "lines of 10 MB": long_lines(b"y"),
    "parentheses": long_lines(b"("),
    "bodies of 40 MB": large_bodies,
    **{what: texts(what, 2 if len(data) > 1 << 21 else 10) for what, data in TEXTS.items()},
    "slow readers": slow_readers,
    "ten searches": on_the_large(10, "UID SEARCH TEXT nothing", "UID SEARCH NOT FROM zzz"),
    "SORT": on_the_large(4, "UID SORT (SUBJECT FROM DATE) UTF-8 ALL"),
    "THREAD": on_the_large(4, "UID THREAD REFERENCES UTF-8 ALL", "UID THREAD ORDEREDSUBJECT UTF-8 ALL"),
    "FETCH of flags": on_the_large(10, "UID FETCH 1:* (FLAGS)", "UID SEARCH RETURN (ALL) UNSEEN", "STATUS star (SIZE)"),
    "STORE": on_the_large(4, "UID STORE 1:* +FLAGS.SILENT (a)", "UID STORE 1:* -FLAGS.SILENT (a)"),
    "10,000 mailboxes": many_mailboxes,
    "APPEND": appends,
    "380 sessions": many_sessions,
    "Sieve, :matches": sieve(STARS, 1_000_000),
    "Sieve, 40 MB": sieve(b'require "body";\r\nif body :contains "nothing" { discard; }\r\n', 40_000_000),
}


def fill(stage: Stage) -> None:
    """Mailboxes in which all messages answer the first one, and each the one before it."""
    session = stage.session(0)
    for name in ("star", "chain"):
        session.ok(f"CREATE {name}")
        for start in range(0, stage.messages, TOGETHER):
            out = [f"APPEND {name}".encode()]
            for number in range(start, min(start + TOGETHER, stage.messages)):
                to = 0 if name == "star" else max(number - 1, 0)
                data = b"Message-ID: <%d@x>\r\nReferences: <%d@x>\r\nSubject: Re: all\r\nFrom: a%d@x\r\n\r\nx\r\n" % (
                    number,
                    to,
                    number,
                )
                out.append(b" {%d+}\r\n%b" % (len(data), data))
            session.ok(b"".join(out))


def measured(stage: Stage, attack: Callable[[Stage], None], seconds: float) -> dict[str, float]:
    """One attack."""
    pid, shard = stage.relay.worker_pids()[0], stage.relay.spool / "mail" / "shard-0" / "lmdb" / "data.mdb"
    with Reading(stage.relay.ports["imap"]) as quiet:
        time.sleep(seconds / 2)
    before, size, most = anonymous(pid), shard.stat().st_blocks, 0
    stage.stop.clear()
    thread = threading.Thread(target=quietly, args=(lambda: attack(stage),))
    thread.start()
    with Reading(stage.relay.ports["imap"]) as reading:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.05)
            most = max(most, anonymous(pid) - before)
    stage.stop.set()
    stage.relay.close_sessions()
    thread.join()
    time.sleep(1)
    return {
        "MB": most / 1024, "MB left": (anonymous(pid) - before) / 1024,
        "LMDB grows by MB": (shard.stat().st_blocks - size) / 2048,
        "p50 ms": reading.share(500), "p99 ms": reading.share(990), "most ms": reading.share(1000),
        "p99 ms without": quiet.share(990), "most ms without": quiet.share(1000),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = {name: run for name, run in ATTACKS.items() if not options.names or any(word in name for word in options.names)}
    found, lmtp = {}, free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = ("limits.connections_per_client=10000", "limits.message_size=60M", "limits.connections=10000")
        relay = ImapRelay(Path(folder), *settings, workers=1)
        relay.config.write_text(relay.config.read_text() + f'[[listener]]\naddress = "127.0.0.1:{lmtp}"\nprotocol = "lmtp"\n')
        with relay:
            stage = Stage(relay, lmtp, options.messages, threading.Event())
            for name in ("good", *EVIL):
                relay.user(name)
            relay.session("good").put("INBOX", *(f"s{number}" for number in range(100)))
            if any(word in name for name in chosen for word in ("slow", "search", "SORT", "THREAD", "FETCH", "STORE")):
                fill(stage)
            for name, attack in chosen.items():
                found[name] = measured(stage, attack, options.seconds)
                print(name, {key: round(value, 1) for key, value in found[name].items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps(found))
    return int(any(row["MB"] * 1024 > MEMORY_MOST or row["p99 ms"] > P99_MOST for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
