"""Delivery to many sites: `python -m benchmarks.sites [--messages N] [--learn SECONDS] [--queued N]`.

many      N messages to N/2 domains of a local zone (unbound) on 200 MX sites, beside the same mail to one smart host: CPU per
          message, DNS queries per domain, and the most connections to one address
trouble   healthy sites beside a dead, a flaky, a slow and a greylisting one, and without them: rate of the healthy
provider  a peer with limits that nobody configured: rate and refusals once they are learned
explain   `message explain` with a large queue, inside the daemon
"""

import argparse
import contextlib
import json
import os
import random
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.run import TRIALS, Relaymta, cpu_seconds
from relaymta import control
from relaymta.ident import format_id
from tests.support.daemon import free_port, wait_for
from tests.support.resolver import nameserver_with

SITES = 200
CLIENTS = 20


class Peer:
    """One of benchmarks.peers."""

    def __init__(self, kind: str, port: int = 0, **options: object) -> None:
        self.port = port or free_port()
        words = [f"{key}={value}" for key, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", str(self.port), kind, *words], stdout=subprocess.PIPE, text=True
        )
        time.sleep(0.7)

    def close(self) -> dict[str, Any]:
        """Stop it; the counts that it printed."""
        self.process.terminate()
        return json.loads(self.process.communicate(timeout=20)[0])  # type: ignore[no-any-return]


def send(port: int, recipients: list[str], size: int = 4096) -> None:
    """One message to each, over CLIENTS connections in turn, pipelined; each waits for its 250 before the next."""
    message = b"Subject: x\r\n\r\n" + (b"x" * 78 + b"\r\n") * (size // 80)
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(CLIENTS)]
    files = [sock.makefile("rb") for sock in socks]

    def expect(number: int, count: int) -> None:
        for _ in range(count):
            while (line := files[number].readline())[3:4] == b"-":
                pass
            assert line[:1] in (b"2", b"3"), line

    for number, sock in enumerate(socks):
        expect(number, 1)
        sock.sendall(b"EHLO source\r\n")
        expect(number, 1)
    for start in range(0, len(recipients), CLIENTS):
        part = recipients[start : start + CLIENTS]
        for number, to in enumerate(part):
            socks[number].sendall(f"MAIL FROM:<a@b.example>\r\nRCPT TO:<{to}>\r\nDATA\r\n".encode())
        for number in range(len(part)):
            expect(number, 3)
            socks[number].sendall(message + b".\r\n")
        for number in range(len(part)):
            expect(number, 1)
    for sock in socks:
        sock.close()


def drain(relay: Relaymta, expected: float, seconds: float = 600) -> None:
    wait_for(lambda: relay.delivered() >= expected, seconds, "all mail to be delivered")


def measured(relay: Relaymta, recipients: list[str], kills: int = 0) -> dict[str, float]:
    """CPU per message and rate."""
    spent, start, began = cpu_seconds(relay.root), relay.delivered(), time.monotonic()
    if kills:
        send_killing(relay, recipients, kills)
        wait_for(lambda: relay.counter("relaymta_queue_messages") == 0, 300, "the queue to be empty")
        time.sleep(2)
    else:
        send(relay.port, recipients)
        drain(relay, start + len(recipients))
    elapsed = time.monotonic() - began
    return {"cpu_us": (cpu_seconds(relay.root) - spent) / len(recipients) * 1e6, "rate": len(recipients) / elapsed}


def send_killing(relay: Relaymta, recipients: list[str], kills: int) -> None:
    """As `send`, but half-way through each of `kills` parts a worker is killed; what it had not acknowledged is sent again."""
    acknowledged: set[int] = set()
    waiting = list(range(len(recipients)))

    def client(numbers: list[int]) -> None:
        for number in numbers:
            while number not in acknowledged:
                with contextlib.suppress(OSError, smtplib.SMTPException), smtplib.SMTP("127.0.0.1", relay.port) as smtp:
                    smtp.sendmail("a@b.example", [recipients[number]], "Subject: x\r\n\r\n" + "x" * 4000)
                    acknowledged.add(number)

    threads = [threading.Thread(target=client, args=(waiting[n::CLIENTS],)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for kill in range(kills):
        wait_for(lambda kill=kill: len(acknowledged) > (kill + 0.5) * len(recipients) / kills, 300)  # type: ignore[misc]
        children = subprocess.run(["pgrep", "-P", str(relay.root)], capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(random.choice(children)), signal.SIGKILL)
    for thread in threads:
        thread.join()


def many(messages: int, workers: int, kills: int = 0, chunking: int = 0) -> dict[str, Any]:
    """Many domains on few sites, beside one smart host. `kills`: so many times a worker dies meanwhile; `chunking`: 1 for peers
    that have it."""
    domains = messages // 2
    recipients = [f"x@d{n % domains}.test" for n in range(messages)]
    random.shuffle(recipients)
    records = [f"d{n}.test. MX 10 mx{n % SITES}.pool{n % SITES}.test." for n in range(domains)]
    records += [f"mx{n}.pool{n}.test. A 127.0.{1 + n // 250}.{1 + n % 250}" for n in range(SITES)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "one").mkdir()
        (folder / "many").mkdir()
        peer = Peer("open", chunking=chunking)
        relay = Relaymta(folder / "one", peer.port, workers)
        one = measured(relay, recipients)
        relay.close()
        peer.close()
        peer = Peer("open", chunking=chunking)
        with nameserver_with(folder, records) as nameserver:
            settings = (
                f'delivery.nameservers=["{nameserver}"]',
                f"delivery.port={peer.port}",
                'site=[{hosts=[".test"],connections=5}]',
            )
            relay = Relaymta(folder / "many", 0, workers, settings)
            found = measured(relay, recipients, kills)
            opened = relay.counter('relaymta_sessions_total{result="opened"}')
            queries = relay.counter('relaymta_dns_lookups_total{result="query"}')
            relay.close()
        seen = peer.close()
    return {
        "messages": messages, "domains": domains, "sites": SITES, "workers": workers, "cpu us": found["cpu_us"],
        "cpu us, one smart host": one["cpu_us"], "rate": found["rate"], "rate, one smart host": one["rate"],
        "kills": kills, "chunking": chunking,
        "arrived": seen["messages"], "connections": opened, "DNS queries per domain": queries / domains,
        "most connections to a site (limit 5)": seen["most open"],
    }  # fmt: skip


def middle(messages: int, workers: int, chunking: int = 0) -> dict[str, Any]:
    """The middle one of TRIALS runs, by the CPU beside one smart host's."""
    rows = sorted((many(messages, workers, chunking=chunking) for _ in range(TRIALS)), key=beside_one)
    return rows[TRIALS // 2] | {"CPU ratio of each trial": [beside_one(row) for row in rows]}


def beside_one(row: dict[str, Any]) -> float:
    """CPU of many domains over one smart host's."""
    return float(row["cpu us"] / row["cpu us, one smart host"])


def trouble(messages: int) -> dict[str, Any]:
    """Healthy sites with and without troubled neighbours."""
    healthy = [f"x@good{n % 20}.test" for n in range(messages)]
    bad = [f"x{n}@{kind}.test" for n in range(messages // 50) for kind in ("dead", "flaky", "slow", "grey")]
    addresses = {"dead": "127.0.2.1", "flaky": "127.0.2.2", "slow": "127.0.2.3", "grey": "127.0.2.4"}
    records = [f"good{n}.test. A 127.0.1.{n + 1}" for n in range(20)] + [f"{k}.test. A {a}" for k, a in addresses.items()]
    port = free_port()
    found: dict[str, Any] = {"messages to healthy sites": messages, "to troubled ones": len(bad)}
    with tempfile.TemporaryDirectory() as name, nameserver_with(Path(name), records) as nameserver:
        peers = [Peer("open", port, host=f"127.0.1.{n + 1}") for n in range(20)]
        peers += [Peer(kind, port, host=addresses[kind]) for kind in ("flaky", "slow", "grey")]
        for label, with_trouble in (("without", False), ("with", True)):
            folder = Path(name) / label
            folder.mkdir()
            settings = (f'delivery.nameservers=["{nameserver}"]', f"delivery.port={port}", "delivery.first_retry=5",
                        "queue.max_age=60")  # fmt: skip
            relay = Relaymta(folder, 0, 1, settings)
            if with_trouble:
                send(relay.port, bad, 1000)
            mixed = measured(relay, healthy) if not with_trouble else beside(relay, healthy, folder)
            found[f"rate of the healthy {label} trouble"] = mixed["rate"]
            if with_trouble:
                wait_for(lambda relay=relay: relay.counter("relaymta_queue_messages") == 0, 300, "all mail to end")  # type: ignore[misc]
            relay.close()
        for peer in peers:
            peer.close()
    return found


def beside(relay: Relaymta, healthy: list[str], folder: Path) -> dict[str, float]:
    """The rate at which mail to healthy sites is delivered, by the log."""
    began = time.monotonic()
    send(relay.port, healthy)
    log = folder / "relay.log"
    wait_for(lambda: sum("@good" in line and '"delivered"' in line for line in log.read_text().splitlines()) >= len(healthy), 300)
    return {"rate": len(healthy) / (time.monotonic() - began)}


def provider(seconds: float) -> dict[str, Any]:
    """60 s of learning (or a third of `seconds`), then the rest."""
    rate, learning = 20, min(60.0, seconds / 4)
    with tempfile.TemporaryDirectory() as name:
        peer = Peer("limited", connections=10, rate=rate, messages=20)
        relay = Relaymta(Path(name), peer.port, 1, ("delivery.first_retry=1",))
        began = time.monotonic()
        send(relay.port, ["x@y.example"] * int(rate * (seconds + 60)), 1000)
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        states = control.ask(relay.spool / "control.sock", "site_states")
        relay.close()
        seen = peer.close()
    marks = [mark for mark in seen["marks"] if began + learning <= mark[0] <= began + seconds]
    took = marks[-1][0] - marks[0][0]
    messages, refused = marks[-1][1] - marks[0][1], marks[-1][2] - marks[0][2]
    return {
        "seconds": took, "learning": learning, "share of the permitted rate": messages / took / rate,
        "refused share": refused / max(1, messages + refused), "evidence": [state["reply"] for state in states],
    }  # fmt: skip


def explain(queued: int) -> dict[str, Any]:
    """How long `explain` takes in the daemon while much is queued for a site that is down."""
    from benchmarks.backlog import fill

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uvloop.run(fill(folder / "spool", queued, 3600.0))
        relay = Relaymta(folder, free_port())
        idents = control.ask(relay.spool / "control.sock", "page", shard=0, after=0, chosen={})["ids"]
        times = []
        for ident in random.sample(idents, min(200, len(idents))):
            began = time.monotonic()
            assert control.ask(relay.spool / "control.sock", "explain", ident=format_id(ident))["waits"]
            times.append((time.monotonic() - began) * 1000)
        relay.close()
    return {"queued": queued, "p50 ms": sorted(times)[len(times) // 2], "most ms": max(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--learn", type=float, default=240.0, help="seconds of the provider's run")
    parser.add_argument("--queued", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["many", "trouble", "provider", "explain"])
    options = parser.parse_args()
    parts = {
        "many": lambda: [
            *(middle(options.messages, workers) for workers in (1, 2)),
            many(options.messages // 4, 2, kills=5),
            many(options.messages, 1, chunking=1),
        ],
        "trouble": lambda: trouble(options.messages),
        "provider": lambda: provider(options.learn),
        "explain": lambda: explain(options.queued),
    }
    print(json.dumps({name: part() for name, part in parts.items() if options.only in (None, name)}, indent=1))


if __name__ == "__main__":
    main()
