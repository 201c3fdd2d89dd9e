"""What benchmarks.imap measures: the relay, and Debian's Dovecot, each with LMTP, POP3, and IMAP in clear and over TLS; and the
form of what is found."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trustme

from benchmarks.backlog import anonymous
from benchmarks.dovecot import LOCATIONS, PASSWORD, Dovecot
from benchmarks.imap_client import Session
from benchmarks.lmtp_source import SERIAL, messages_of
from benchmarks.run import Relaymta, cpu_seconds
from relaymta import control
from tests.support.daemon import free_port, wait_for

__all__ = [
    "OURS", "TWO", "USERS", "Figures", "Ours", "Row", "Server", "append", "beside", "better", "fill", "holders", "judged",
    "measured", "memory", "message", "middle", "of_ours", "peak", "processes", "said_by", "spread", "started", "user",
]  # fmt: skip

Figures = dict[str, float]  # of one server
Row = dict[str, Any]  # "what" was measured; Figures by server; of a row with a target, "measured", "at most" and "met"

T = TypeVar("T")

USERS = 100
DOMAIN = "local.example"
OURS = "relaymta"
TWO = "relaymta, two workers"
SIZE = 4096  # of messages
AT_ONCE = 500  # messages of one APPEND (RFC 3502)
_parts = [text.split(SERIAL, 1) for text in messages_of(SIZE)]
_serial = count()


class Server(Protocol):
    """`root`: pid of the process above all others; `lmtp`, `imap`, `imaps`, `pop3`: ports; `trust`: what its certificate is
    verified with."""

    name: str
    root: int
    lmtp: int
    imap: int
    imaps: int
    pop3: int
    trust: ssl.SSLContext

    def cpu(self) -> float:
        """CPU seconds of all its processes, those that have ended included."""

    def close(self) -> None: ...


class Certificate:
    """One for localhost. `chain`: file with it and its key; `trust`: the context of clients."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.chain = folder / "localhost.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(self.chain))
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)


class Ours:
    """The relay with mailboxes, log and metrics on; what it keeps is synced before it is acknowledged."""

    def __init__(self, folder: Path, certificate: Certificate, workers: int, python: str) -> None:
        self.name = OURS if workers == 1 else TWO
        self.trust = certificate.trust
        self.lmtp, self.imap, self.imaps, self.pop3 = (free_port() for _ in range(4))
        listeners = [
            f'{{address="127.0.0.1:{self.lmtp}",protocol="lmtp"}}',
            f'{{address="127.0.0.1:{self.imap}",protocol="imap",auth_in_clear=true}}',
            f'{{address="127.0.0.1:{self.imaps}",protocol="imap",tls="implicit"}}',
            f'{{address="127.0.0.1:{self.pop3}",protocol="pop3",auth_in_clear=true}}',
        ]
        settings = (
            f"listener=[{','.join(listeners)}]", f'certificate=[{{chain="{certificate.chain}"}}]',
            f'route=[{{name="here",protocol="mailbox",recipient_domain=["{DOMAIN}"]}}]',
            "limits.connections=30000", "limits.connections_per_client=30000",
        )  # fmt: skip
        self._start = partial(Relaymta, folder, 0, workers, settings, python=python)
        self.relay = self._start()
        self.root = self.relay.root
        try:
            for number in range(USERS):
                control.ask(
                    self.relay.spool / "control.sock",
                    "mailbox_create", address=user(number), password=PASSWORD, octets=0, messages=0,
                )  # fmt: skip
        except BaseException:
            self.close()
            raise

    def cpu(self) -> float:
        return cpu_seconds(self.root)

    def restart(self) -> None:
        """The same mail, and a memory in which nothing is."""
        self.relay.close()
        self.relay = self._start()
        self.root = self.relay.root

    def close(self) -> None:
        self.relay.close()


WITH_TLS = """
ssl = yes
ssl_cert = <{chain}
ssl_key = <{chain}
auth_mechanisms = plain scram-sha-256
service imap-login {{
  inet_listener imaps {{
    port = {imaps}
    ssl = yes
  }}
}}
"""


class Peer(Dovecot):
    """Dovecot that speaks TLS and SCRAM as well: it is told so when it runs."""

    def __init__(self, folder: Path, location: str, certificate: Certificate) -> None:
        super().__init__(folder, location, USERS, DOMAIN)
        self.name, self.trust, self.imaps = location, certificate.trust, free_port()
        with (folder / "dovecot.conf").open("a") as file:
            file.write(WITH_TLS.format(chain=certificate.chain, imaps=self.imaps))
        self.process.send_signal(signal.SIGHUP)
        try:
            wait_for(self._secure, 30, f"TLS of {self.name}")
        except BaseException:
            self.close()
            raise

    def _secure(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.imaps), 5):
                return True
        except OSError:
            return False


@contextmanager
def started(names: list[str], python: str = sys.executable) -> Iterator[list[Server]]:
    """Servers by name: OURS, TWO, or one of LOCATIONS; their mail lies in one temporary folder."""
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        folder = Path(base)
        certificate = Certificate(folder)
        servers: list[Server] = []
        for number, name in enumerate(names):
            own = folder / str(number)
            own.mkdir()
            if name in LOCATIONS:
                servers.append(Peer(own, name, certificate))
            else:
                servers.append(Ours(own, certificate, 2 if name == TWO else 1, python))
            stack.callback(servers[-1].close)
        yield servers


def user(number: int) -> str:
    """The address of a user, by which he logs in with PASSWORD, too."""
    return f"u{number % USERS}@{DOMAIN}"


def message(number: int) -> bytes:
    """A message of its own; `number` says which of the texts."""
    before, behind = _parts[number % len(_parts)]
    return b"%s%012d%s" % (before, next(_serial), behind)


def append(mailbox: bytes, numbers: range) -> bytes:
    """APPEND of some messages, all at once (RFC 3502)."""
    return b"APPEND %s" % mailbox + b"".join(b" {%d+}\r\n%s" % (len(text), text) for text in map(message, numbers))


async def fill(session: Session, mailbox: bytes, messages: int) -> None:
    """Put messages into a mailbox."""
    for first in range(0, messages, AT_ONCE):
        await session.command(append(mailbox, range(first, min(messages, first + AT_ONCE))))


def processes(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory(server: Server) -> int:
    """Anonymous memory of all its processes, kB."""
    return sum(map(anonymous, processes(server.root)))


async def peak(server: Server, work: Awaitable[T]) -> tuple[T, float]:
    """The result of some work, and how many MB more than before all processes of a server had meanwhile, at most."""
    before = most = memory(server)
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=0.02)
        most = max(most, memory(server))
    return task.result(), (most - before) / 1024


def said_by(spool: Path, *command: str) -> Figures:
    """A command of the relay's CLI: when its first line comes, and the end; its CPU until then; the most anonymous memory that it
    has."""
    began = time.perf_counter()
    line = [sys.executable, "-m", "relaymta", *command, "--spool", str(spool)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process, ThreadPoolExecutor(1) as other:
        most = other.submit(_most, process.pid)
        assert process.stdout
        lines = int(bool(process.stdout.readline()))
        first, spent = time.perf_counter() - began, cpu_seconds(process.pid)
        lines += sum(1 for _ in process.stdout)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
        seconds = time.perf_counter() - began
    if status:
        sys.exit(f"{' '.join(command)}: status {status}")
    return {
        "first line ms": first * 1000, "first line cpu ms": spent * 1000, "s": seconds, "cpu s": used.ru_utime + used.ru_stime,
        "MB": most.result() / 1024, "lines": lines,
    }  # fmt: skip


def _most(pid: int) -> int:
    """RssAnon of a process until its end, kB at most."""
    found = 0
    with suppress(OSError, StopIteration):  # it has ended
        while True:
            found = max(found, anonymous(pid))
            time.sleep(0.02)
    return found


def holders(server: Server) -> dict[int, int]:
    """The process that has the server's end of each connection, by the port of the client's end."""
    inodes = {}
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        inodes[f"socket:[{fields[9]}]"] = int(fields[2].rpartition(":")[2], 16)
    found = {}
    for pid in processes(server.root):
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                port = inodes.get(os.readlink(f"/proc/{pid}/fd/{name}"))
            except FileNotFoundError:
                continue
            if port:
                found[port] = pid
    return found


def spread(times: list[float]) -> Figures:
    """p50 and p99 of seconds."""
    times = sorted(times)
    return {"p50 ms": times[len(times) // 2] * 1000, "p99 ms": times[int(len(times) * 0.99)] * 1000}


async def measured(server: Server, work: Awaitable[list[float]]) -> Figures:
    """What each of some operations cost; `work` does them, and returns the seconds of each."""
    spent, own, began = server.cpu(), time.process_time(), time.perf_counter()
    times = await work
    seconds, own = time.perf_counter() - began, time.process_time() - own
    await asyncio.sleep(0.3)  # for what is done behind the last answer
    return {
        "cpu us": (server.cpu() - spent) / len(times) * 1e6, "a second": len(times) / seconds, **spread(times),
        "generator's cpu us": own / len(times) * 1e6,
    }  # fmt: skip


def middle(trials: list[Figures]) -> Figures:
    """The trial with the middle CPU."""
    return sorted(trials, key=lambda one: one["cpu us"])[(len(trials) - 1) // 2]


def better(found: dict[str, Figures], key: str = "cpu us") -> float | None:
    """The lower value of Dovecot's; None when it was not measured."""
    return min((figures[key] for name, figures in found.items() if name in LOCATIONS), default=None)


def of_ours(what: str, figures: Figures, value: float | None = None, most: float | None = None) -> Row:
    """A row about the relay alone."""
    return judged(what, {OURS: figures}, value, most)


def judged(what: str, found: dict[str, Figures], value: float | None, most: float | None) -> Row:
    """A row, printed as well. `value`: None when it was not measured."""
    row: Row = {"what": what, **found}
    if value is not None and most is not None:
        row |= {"measured": value, "at most": most, "met": value <= most}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def beside(what: str, found: dict[str, Figures], share: float) -> Row:
    """A row about CPU: of ours, the share of Dovecot's, and the most that it may be."""
    peer = better(found)
    return judged(what, found, found[OURS]["cpu us"] / peer if OURS in found and peer else None, share)
