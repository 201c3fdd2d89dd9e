"""Reading mail by IMAP and POP3 beside Debian's Dovecot: `python -m benchmarks.imap [--only PART] [--servers NAMES] [--quick]`.

small    8 sessions, each of a user: NOOP, FETCH, STORE, SELECT, APPEND of 4 kB; the same over TLS
workers  the same with two workers beside one, 32 sessions: users and connections are with either worker
login    a login and a logout; others' commands during 200 logins a second with SCRAM; POP3: login, UIDL, 10 RETR, QUIT
large    a mailbox of 100,000 messages: SELECT, FETCH, SEARCH, STORE (benchmarks.imap_many)
idle     memory of a session in IDLE; from a delivery to EXISTS; 100 sessions on one mailbox (benchmarks.imap_many)

All servers of a part run at the same time and are warm. They get the same commands from the same generator
(benchmarks.imap_client) in turn: the relay with one worker, log and metrics on, all synced; Dovecot with mdbox and with Maildir,
which does not sync flags, and gathers what it tells a session in IDLE for half a second. CPU is that of the whole tree of
processes. Of some trials, for each server the one with the middle CPU counts. "measured" is the relay's share of the better of
mdbox and Maildir, where nothing else is said, and "at most" its target.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, repeat

import uvloop

from benchmarks import dovecot, imap_many
from benchmarks.dovecot import PASSWORD
from benchmarks.imap_client import Refused, Session, all_paced, at_once, imap_session, logged_in, pop3_session, with_scram
from benchmarks.imap_servers import (
    OURS,
    TWO,
    Figures,
    Row,
    Server,
    append,
    beside,
    better,
    fill,
    judged,
    measured,
    middle,
    spread,
    started,
    user,
)

TRIALS = 3
SMALL = 50  # messages in a small mailbox
MINE, OTHER, TARGET = b"INBOX", b"Other", b"Target"  # two of SMALL messages, and one that is appended to


@dataclass(frozen=True)
class Operation:
    """A command that is measured. `share`: of Dovecot's CPU, at most; `commands`: without end, a session's own; `holds`: what
    each answer has in it."""

    name: str
    share: float
    count: int
    commands: Callable[[], Iterator[bytes]]
    holds: bytes = b""


def of_each(*commands: bytes) -> Callable[[], Iterator[bytes]]:
    """Each command for each UID of a small mailbox."""
    return lambda: cycle([command % uid for command in commands for uid in range(1, SMALL + 1)])


def appending() -> Iterator[bytes]:
    for number in cycle(range(64)):
        yield append(TARGET, range(number, number + 1))


OPERATIONS = [
    Operation("NOOP", 1 / 3, 20_000, lambda: repeat(b"NOOP")),
    Operation("UID FETCH FLAGS of one", 1 / 3, 20_000, of_each(b"UID FETCH %d (FLAGS)"), b"FETCH ("),
    Operation("UID FETCH BODY.PEEK[] of 4 kB", 1 / 2, 12_000, of_each(b"UID FETCH %d (BODY.PEEK[])"), b" BODY[] {"),
    Operation(
        "UID STORE of a flag", 1.25, 12_000, of_each(rb"UID STORE %d +FLAGS (\Flagged)", rb"UID STORE %d -FLAGS (\Flagged)"),
        b"FETCH (",
    ),
    Operation("SELECT of a small mailbox", 2 / 3, 12_000, lambda: cycle([b"SELECT " + OTHER, b"SELECT " + MINE]), b" EXISTS"),
    Operation("APPEND of 4 kB", 1 / 3, 4_000, appending, b"[APPENDUID "),
]  # fmt: skip


class Clients:
    """Sessions on one server, one for each of some users, in clear or over TLS."""

    def __init__(self, server: Server, sessions: list[Session]) -> None:
        self.server, self._sessions = server, sessions
        self._streams = {operation.name: [operation.commands() for _ in sessions] for operation in OPERATIONS}

    @classmethod
    async def of(cls, server: Server, users: range, secure: bool) -> "Clients":
        """Log in; each user gets two small mailboxes, and one for APPEND."""
        port, trust = (server.imaps, server.trust) if secure else (server.imap, None)
        sessions = [await logged_in(port, user(number), PASSWORD, trust) for number in users]
        for session in sessions:
            for name in (OTHER, TARGET):
                await session.command(b"CREATE " + name)
            for name in (OTHER, MINE):
                await fill(session, name, SMALL)
            await session.command(b"SELECT " + MINE)
        return cls(server, sessions)

    async def _times(self, operation: Operation, count: int) -> list[float]:
        times: list[float] = []
        each = max(1, count // len(self._sessions))
        streams = (islice(stream, each) for stream in self._streams[operation.name])
        await asyncio.gather(*(s.each(part, times, operation.holds) for s, part in zip(self._sessions, streams, strict=True)))
        return times

    async def measured(self, operation: Operation, count: int) -> Figures:
        """One operation by all sessions at the same time; afterwards INBOX is selected."""
        await self._times(operation, count // 10)  # warm
        found = await measured(self.server, self._times(operation, count))
        for session in self._sessions:
            await session.command(b"SELECT " + MINE)
        return found


async def trials(clients: dict[str, Clients], operation: Operation, scale: float) -> dict[str, Figures]:
    """One operation, by all clients in turn, several times."""
    found: dict[str, list[Figures]] = {name: [] for name in clients}
    for _ in range(TRIALS):
        for name, some in clients.items():
            found[name].append(await some.measured(operation, int(operation.count * scale)))
    return {name: middle(of) for name, of in found.items()}


async def small(options: argparse.Namespace) -> list[Row]:
    """In clear and over TLS; what TLS adds, beside what it adds with Dovecot (us)."""
    rows = []
    with started(options.servers, options.python) as servers:
        clear = {server.name: await Clients.of(server, range(8), False) for server in servers}
        secure = {server.name: await Clients.of(server, range(8, 16), True) for server in servers}
        for operation in OPERATIONS:
            found = await trials(clear, operation, options.scale)
            rows.append(beside(operation.name, found, operation.share))
            with_tls = await trials(secure, operation, options.scale)
            for name, figures in with_tls.items():
                figures["cpu us more than in clear"] = figures["cpu us"] - found[name]["cpu us"]
            more = with_tls[OURS]["cpu us more than in clear"] if OURS in with_tls else None
            what = f"{operation.name}, TLS: us more than in clear"
            rows.append(judged(what, with_tls, more, better(with_tls, "cpu us more than in clear")))
    return rows


async def workers(options: argparse.Namespace) -> list[Row]:
    """Two workers beside one; nothing else is compared."""
    rows: list[Row] = []
    if OURS not in options.servers:
        return rows
    with started([OURS, TWO], options.python) as servers:
        clients = {server.name: await Clients.of(server, range(32), False) for server in servers}
        for operation in OPERATIONS:
            found = await trials(clients, operation, options.scale)
            more = found[TWO]["cpu us"] / found[OURS]["cpu us"]
            rows.append(judged(f"{operation.name}: two workers, of one's CPU", found, more, 1.3))
    return rows


def passed(until: float) -> bool:
    """Whether it is later (time.perf_counter)."""
    return time.perf_counter() > until


async def scram(server: Server, seconds: float) -> Figures:
    """What 8 sessions see, 400 commands a second together, without and with 200 logins a second."""
    sessions = [await logged_in(server.imap, user(number), PASSWORD) for number in range(8)]
    for session in sessions:
        await session.command(b"SELECT INBOX")
    logins = [partial(with_scram, server.imap, user(number), PASSWORD) for number in range(8)]
    for log_in in logins:
        await log_in()  # now the client has the salted passwords, too
    found: Figures = {}
    for begun, name in ((0, "before"), (8, "meanwhile")):
        until = time.perf_counter() + seconds
        ended = partial(passed, until)
        load = asyncio.ensure_future(all_paced(logins[:begun], 25, ended))
        others = await all_paced([partial(session.command, b"UID FETCH 1 (FLAGS)") for session in sessions], 50, ended)
        found |= {f"others' {key} {name}": value for key, value in spread(others).items()}
        found["logins a second"] = len(await load) / seconds
    for session in sessions:
        session.close()
    return found


async def login(options: argparse.Namespace) -> list[Row]:
    """Logins, and sessions of POP3."""

    async def sessions(work: Callable[[Server, int], Awaitable[None]], count: int) -> dict[str, Figures]:
        found: dict[str, list[Figures]] = {server.name: [] for server in servers}
        for _ in range(TRIALS + 1):
            for server in servers:
                of = int(count * options.scale * (5 if server.name == OURS else 1))
                found[server.name].append(await measured(server, at_once(8, max(16, of), partial(work, server))))
        return {name: middle(of[1:]) for name, of in found.items()}  # the first was for warmth

    rows = []
    with started(options.servers, options.python) as servers:
        for server in servers:
            for number in range(8):
                session = await logged_in(server.imap, user(number), PASSWORD)
                await fill(session, MINE, 20)
                session.close()
        found = await sessions(lambda server, number: imap_session(server.imap, user(number), PASSWORD), 400)
        rows.append(beside("a login and a logout", found, 1 / 8))
        found = await sessions(lambda server, number: pop3_session(server.pop3, user(number), PASSWORD), 200)
        rows.append(beside("POP3: login, UIDL, 10 RETR, QUIT", found, 1 / 6))
        found = {server.name: await scram(server, 10 * options.scale) for server in servers}
        ours = found.get(OURS)
        more = None if ours is None else ours["others' p99 ms meanwhile"] - ours["others' p99 ms before"]
        rows.append(judged("200 logins a second with SCRAM: others' p99, ms more", found, more, 20))
    return rows


def table(rows: list[Row]) -> str:
    """The rows that have a target."""
    lines = []
    for row in rows:
        if "met" in row:
            missed = f"missed by {row['measured'] / row['at most']:.2f} x" if row["at most"] > 0 else "missed"
            lines.append(f"{row['what']:75} {row['measured']:10.3f} <= {row['at most']:8.3f}  {'met' if row['met'] else missed}")
    return "\n".join(lines)


PARTS: dict[str, Callable[[argparse.Namespace], Coroutine[None, None, list[Row]]]] = {
    "small": small, "workers": workers, "login": login, "large": imap_many.large, "idle": imap_many.idle,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of operations")
    parser.add_argument("--messages", type=int, default=100_000, help="in the large mailbox")
    parser.add_argument("--sessions", type=int, default=10_000, help="in IDLE (Dovecot: 200 at most, over TLS 50)")
    parser.add_argument("--quick", action="store_true", help="a quick try: --scale 0.05 --messages 3000 --sessions 200")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--servers", default=f"{OURS},mdbox,Maildir", help="some of these, with commas (default: all)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of another build of the relay")
    options = parser.parse_args()
    if options.quick:
        options.scale, options.messages, options.sessions = 0.05, 3000, 200
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))  # and the servers with it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lacking = dovecot.lacking()
    options.servers = [name for name in options.servers.split(",") if name == OURS or not lacking]
    if lacking:
        print(f"{lacking}; the relay is measured without it", file=sys.stderr)
    found: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    for name, part in PARTS.items():
        if options.only in (None, name):
            try:
                found[name] = uvloop.run(part(options))
            except Refused as error:  # the others may do
                failed[name] = str(error)
    print(table([row for rows in found.values() for row in rows]), file=sys.stderr)
    print(json.dumps({"cores": os.cpu_count(), "missing": lacking, "failed": failed, **found}, indent=1))
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
