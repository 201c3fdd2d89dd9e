"""Delivery into mailboxes beside Debian's Dovecot: `python -m benchmarks.mailboxes [--scale X] [--only PART] [--python PYTHON]`.

lmtp   LMTP in: 50 connections, 8, and both with 20 recipients a message
queue  SMTP in, queue, mailbox: 50 connections; beside it Postfix, which delivers to Dovecot by LMTP
store  the shard alone, by the size of the groups (benchmarks.filing)

All servers of a part run at the same time, with the same users, and are warm (each user has had a message). They get the same
load from the same generator (benchmarks.lmtp_source) in turn: the relay with one worker, log and metrics on; Dovecot with mdbox
and with Maildir. The middle one of three trials counts, by the ratio of CPU to the better of the two. CPU is that of the whole
tree of processes, for each message (us). What lies on disk of the relay is counted at the end.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import dovecot
from benchmarks.dovecot import LOCATIONS, Dovecot
from benchmarks.run import PATH, TRIALS, Postfix, Relaymta, cpu_seconds
from relaymta import control
from relaymta.store.rows import MailShard
from tests.support.daemon import wait_for

__all__ = ["Ours"]

USERS = 1000
DOMAIN = "local.example"
OURS = "relaymta"
ROUTE = f'route=[{{name="here",protocol="mailbox",recipient_domain=["{DOMAIN}"]}}]'


@dataclass(frozen=True)
class Load:
    """One run of the load generator. `fewer`: messages for the peers, which take longer for each."""

    name: str
    connections: int
    messages: int
    fewer: int
    recipients: int = 1

    def count(self, server: str, scale: float) -> int:
        """Messages for a server: as many as there are connections at least."""
        return max(self.connections, int((self.messages if server == OURS else self.fewer) * scale))


LMTP = [
    Load("LMTP, 50 connections", 50, 15_000, 1_500),
    Load("LMTP, 8 connections", 8, 8_000, 1_500),
    Load("LMTP, 50 connections, 20 recipients", 50, 2_000, 150, 20),
    Load("LMTP, 8 connections, 20 recipients", 8, 1_500, 100, 20),
]
QUEUE = [Load("SMTP, queue, mailbox (Postfix and Dovecot), 50 connections", 50, 15_000, 1_500)]


class Ours:
    """The relay with mailboxes of `users`. `protocol`: of its listener. `python`: the interpreter of another build."""

    name = OURS

    def __init__(self, folder: Path, protocol: str, users: int = USERS, python: str = sys.executable) -> None:
        listener = "" if protocol == "smtp" else f',protocol="{protocol}"'
        self.relay = Relaymta(folder, 0, 1, (ROUTE,), listener=listener, python=python)
        self.port, self.protocol = self.relay.port, protocol
        self.sent = self.acknowledged = 0
        self._behind = protocol == "smtp"  # what is acknowledged has yet to be delivered
        try:
            self._create(users)
        except BaseException:
            self.close()
            raise

    def _create(self, users: int) -> None:
        for number in range(users):
            control.ask(
                self.relay.spool / "control.sock",
                "mailbox_create", address=f"u{number}@{DOMAIN}", password="", octets=0, messages=0,
            )  # fmt: skip

    def cpu(self) -> float:
        return cpu_seconds(self.relay.root)

    def filed(self) -> float | None:
        """Recipients delivered so far; None when the replies of the listener have told that."""
        return self.relay.delivered() if self._behind else None

    def close(self) -> None:
        self.relay.close()

    def on_disk(self) -> dict[str, float]:
        """When the relay has ended: messages in mailboxes for each recipient acknowledged; bodies, and their octets, for each
        message."""
        shard = MailShard(self.relay.spool / "mail/shard-0/lmdb", readonly=True)
        with shard.reading() as txn:
            rows = [row for _, row in shard.objects(txn)]
        shard.close()
        octets = sum(row.body.length for row in rows)
        filed = sum(row.references for row in rows)
        return {
            "in mailboxes, of those acknowledged": filed / self.acknowledged,
            "bodies for each message": len(rows) / self.sent,
            "octets for each message": octets / self.sent,
        }


class DovecotAlone:
    """Dovecot, by LMTP."""

    protocol = "lmtp"

    def __init__(self, folder: Path, location: str) -> None:
        self.name = location
        self.sent = self.acknowledged = 0
        self.dovecot = Dovecot(folder, location, USERS, DOMAIN)
        self.port = self.dovecot.lmtp

    def cpu(self) -> float:
        return self.dovecot.cpu()

    def filed(self) -> float | None:
        return None

    def close(self) -> None:
        self.dovecot.close()


class PostfixBefore(DovecotAlone):
    """Postfix, which delivers to Dovecot by LMTP, and knows the users."""

    protocol = "smtp"

    def __init__(self, folder: Path, location: str) -> None:
        for part in ("dovecot", "postfix"):
            (folder / part).mkdir()
        super().__init__(folder / "dovecot", location)
        users = folder / "postfix/users"
        users.write_text("".join(f"u{number}@{DOMAIN} x\n" for number in range(USERS)))
        try:
            self.postfix = Postfix(
                folder / "postfix",
                0,
                f"virtual_mailbox_domains={DOMAIN}\nvirtual_mailbox_maps=texthash:{users}\n"
                f"virtual_transport=lmtp:inet:127.0.0.1:{self.dovecot.lmtp}\n",
            )
        except BaseException:
            super().close()
            raise
        self.port = self.postfix.port

    def cpu(self) -> float:
        return super().cpu() + cpu_seconds(self.postfix.root)

    def filed(self) -> float | None:
        return self.postfix.delivered()

    def close(self) -> None:
        self.postfix.close()
        super().close()


Server = Ours | DovecotAlone


def send(server: Server, connections: int, messages: int, recipients: int, *more: str) -> dict[str, Any]:
    """What the load generator says. It ends the benchmark when not every message was accepted for every recipient."""
    command = [
        sys.executable, "-m", "benchmarks.lmtp_source", str(server.port), "--protocol", server.protocol, "--users", str(USERS),
        "--domain", DOMAIN, "--connections", str(connections), "--messages", str(messages), "--recipients", str(recipients),
        *more,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300)
    said: dict[str, Any] = json.loads(done.stdout or "{}")
    if said.get("recipients") != messages * recipients:
        sys.exit(f"{server.name}: {said or done} instead of {messages} messages")
    server.sent += messages
    server.acknowledged += said["recipients"]
    return said


def warm(server: Server) -> None:
    """A message for each user."""
    start = server.filed()
    send(server, 50, USERS // 4, 4, "--each")
    arrived(server, start, USERS)


def arrived(server: Server, start: float | None, recipients: int) -> None:
    """Wait until these recipients have got what was acknowledged."""
    if start is not None:
        wait_for(lambda: (server.filed() or 0) >= start + recipients, 120, f"the deliveries of {server.name}")


def measure(server: Server, load: Load, messages: int, trial: int) -> dict[str, float]:
    """One load through one server."""
    start, spent = server.filed(), server.cpu()
    said = send(server, load.connections, messages, load.recipients, "--seed", str(trial))
    acknowledged = time.monotonic()
    arrived(server, start, messages * load.recipients)
    seconds = said["seconds"] + time.monotonic() - acknowledged
    time.sleep(0.3)  # for what is done behind the last reply
    cpu = (server.cpu() - spent) / messages * 1e6
    return {
        "rate": messages / said["seconds"], "end to end": messages / seconds, "cpu_us": cpu,
        "cpu us a recipient": cpu / load.recipients, "p50 ms": said["p50 ms"], "p99 ms": said["p99 ms"],
    }  # fmt: skip


def better(row: dict[str, Any]) -> str | None:
    """The location with which Dovecot takes less CPU."""
    return min((name for name in row if name in LOCATIONS), key=lambda name: row[name]["cpu_us"], default=None)


def trials(servers: list[Server], load: Load, scale: float) -> dict[str, Any]:
    """One load through all servers in turn, several times; the middle trial."""
    rows = []
    for trial in range(TRIALS):
        rows.append({server.name: measure(server, load, load.count(server.name, scale), trial) for server in servers})
        print(load.name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
    costs = [row[peer]["cpu_us"] / row[OURS]["cpu_us"] if (peer := better(row)) else row[OURS]["cpu_us"] for row in rows]
    row = rows[costs.index(statistics.median_low(costs))]
    found = {"load": load.name, "recipients": load.recipients, **row}
    if (peer := better(row)) is not None:
        found |= {"better": peer, "fewer": row[peer]["cpu_us"] / row[OURS]["cpu_us"], "fewer in each trial": costs}
    return found


def through(peers: Callable[[Path, str], Server] | None, protocol: str, loads: list[Load], scale: float, python: str) -> Any:
    """Some loads through the relay and through a peer with each location (`peers` makes it; None: there is none)."""
    with tempfile.TemporaryDirectory() as name:
        folders = {which: Path(name) / which for which in (OURS, *LOCATIONS)}
        for folder in folders.values():
            folder.mkdir()
        with ExitStack() as started:
            ours = Ours(folders[OURS], protocol, python=python)
            started.callback(ours.close)
            servers: list[Server] = [ours]
            if peers is not None:
                for location in LOCATIONS:
                    servers.append(peers(folders[location], location))
                    started.callback(servers[-1].close)
            for server in servers:
                warm(server)
            rows = [trials(servers, load, scale) for load in loads]
        return {"rows": rows, "on disk": ours.on_disk()}


def store() -> Any:
    """benchmarks.filing, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.filing"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of messages")
    parser.add_argument("--only", choices=["lmtp", "queue", "store"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter of another build")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by SIGTERM"))  # and the servers with it
    postfix = "" if shutil.which("postfix", path=PATH) else "Postfix is missing: apt-get install postfix"
    lacking = [text for text in (dovecot.lacking(), postfix) if text]
    for text in lacking:
        print(f"{text}; the relay is measured without it", file=sys.stderr)
    parts: dict[str, Callable[[], Any]] = {
        "lmtp": lambda: through(None if dovecot.lacking() else DovecotAlone, "lmtp", LMTP, options.scale, options.python),
        "queue": lambda: through(None if lacking else PostfixBefore, "smtp", QUEUE, options.scale, options.python),
        "store": store,
    }
    found = {name: part() for name, part in parts.items() if options.only in (None, name)}
    print(json.dumps({"cores": os.cpu_count(), "missing": lacking, **found}, indent=1))


if __name__ == "__main__":
    main()
