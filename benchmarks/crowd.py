"""A million messages wait for one site: `python -m benchmarks.crowd [--messages N] [--only PART]`.

priority  bulk mail of one tenant on two workers, for a site that takes one connection: how soon does an express message begin,
          and how many messages of the first tenant go before each of a second tenant's ten
explain   how much slower delivery is while `message explain` is called ten times a second
delete    how long accepting a message takes while the million are deleted, and before
list      how long `queue list --json` takes, on two workers, while nothing is delivered and while 100 messages a second are
reroute   how long `queue reroute` takes, on two workers, from a host that is down to another
"""

import argparse
import json
import re
import smtplib
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.backlog import fill
from benchmarks.run import Relaymta
from benchmarks.sites import Peer
from relaymta import control
from relaymta.ident import format_id
from relaymta.proto.envelope import QueueName
from tests.support.daemon import free_port

MESSAGE = "Subject: x\r\n\r\n" + "x" * 4000
SETTINGS = (
    'site=[{hosts=["127.0.0.1"],connections=1}]',
    'network=[{networks=["127.0.0.2/32"],application="alerts",priority="express"},'
    '{networks=["127.0.0.3/32"],application="second",priority="bulk"}]',
)


def spooled(folder: Path, messages: int, shards: int, due: float, port: int) -> None:
    """Messages of the tenant "first", class bulk, due within `due` seconds after 15."""
    for shard in range(shards):
        name = QueueName(f"127.0.0.1:{port}", "", "first", "bulk")
        uvloop.run(fill(folder / "spool", messages // shards, due, shard, name))


def submit(port: int, source: str, senders: list[str]) -> dict[str, float]:
    """Messages from an address of ours, over one connection: when each was acknowledged."""
    taken = {}
    with smtplib.SMTP("127.0.0.1", port, source_address=(source, 0)) as client:
        for sender in senders:
            client.sendmail(sender, ["c@d.example"], MESSAGE)
            taken[sender] = time.monotonic()
    return taken


def priority(messages: int, rounds: int = 100) -> dict[str, Any]:
    """Express messages and a second tenant's beside a million of the first."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spooled(folder, messages, 2, 0.0, port)
        peer = Peer("order", port, delay=0.005)
        relay = Relaymta(folder, port, 2, SETTINGS)
        time.sleep(25)  # until they are due
        express: dict[str, float] = {}
        second: dict[str, float] = {}
        for number in range(rounds):
            express |= submit(relay.port, "127.0.0.2", [f"alert-{number}@a.example"])
            if number % 10 == 5:
                second |= submit(relay.port, "127.0.0.3", [f"second-{number}-{n}@a.example" for n in range(10)])
            time.sleep(0.5)
        time.sleep(10)
        left = relay.counter("relaymta_queue_messages")
        relay.close()
        seen = peer.close()
    order = [(at, re.sub("^.*<(.*)>.*$", r"\1", sender)) for at, sender in seen["order"]]
    began = {sender: at for at, sender in order}
    waits = sorted(began[sender] - at for sender, at in express.items())
    return {
        "queued": messages, "left": left, "most connections": seen["most open"], "express": len(waits),
        "express begins after, p50 s": waits[len(waits) // 2],
        "express begins after, p99 s": waits[int(len(waits) * 0.99)],
        "express begins after, most s": waits[-1],
        "of the first tenant before each of the second's": sorted(between(order, second)),
    }  # fmt: skip


def between(order: list[tuple[float, str]], second: dict[str, float]) -> list[int]:
    """For each message of the second tenant: how many of the first began since it was acknowledged, or since the one of the
    second before it began."""
    found = []
    since = 0.0
    for at, sender in order:
        if sender in second:
            start = max(since, second[sender])
            found.append(sum(start < when < at and other == "a@b.example" for when, other in order))
            since = at
    return found


def explain(messages: int, seconds: float = 2.0) -> dict[str, Any]:
    """Delivery of a backlog, in slices with and without calls of `message explain`, alternately."""
    port = free_port()
    rates: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spooled(folder, messages, 1, 5.0, port)
        peer = Peer("open", port)
        relay = Relaymta(folder, port, 1)
        time.sleep(20)
        asking = False
        while relay.counter("relaymta_queue_messages") > messages / 4:
            asking = not asking
            page = control.ask(relay.spool / "control.sock", "page", shard=0, after=0, chosen={})
            idents = [format_id(ident) for ident in page["ids"]]
            start, began, asked = relay.delivered(), time.monotonic(), 0
            while time.monotonic() < began + seconds:
                if asking:
                    control.ask(relay.spool / "control.sock", "explain", ident=idents[asked % len(idents)])
                    asked += 1
                time.sleep(0.1)
            rates[asking].append((relay.delivered() - start) / (time.monotonic() - began))
        relay.close()
        peer.close()
    without, with_ = (sorted(rates[key])[len(rates[key]) // 2] for key in (False, True))
    return {
        "queued": messages, "slices": len(rates[True]), "median rate": without, "median rate while asked": with_,
        "slower by": 1 - with_ / without,
    }  # fmt: skip


def delete(messages: int) -> dict[str, Any]:
    """Accepting while a million messages are deleted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spooled(folder, messages, 1, 3600.0, 1)
        peer = Peer("open")
        relay = Relaymta(folder, peer.port, 1)
        time.sleep(3)
        before = accepting(relay, lambda: time.sleep(20))
        began = time.monotonic()
        during = accepting(relay, lambda: command(relay, "queue", "delete", "--app", "first"))
        took = time.monotonic() - began
        left = sum(row["messages"] for row in control.ask(relay.spool / "control.sock", "summary"))
        relay.close()
        peer.close()
    return {"deleted": messages, "left": left, "s": took, "accept before ms": before, "accept while deleting ms": during}


def command(relay: Relaymta, *words: str) -> tuple[float, bytes]:
    """A command of the CLI: seconds, and its output."""
    began = time.monotonic()
    line = [sys.executable, "-m", "relaymta", *words, "--spool", str(relay.spool)]
    said = subprocess.run(line, check=True, capture_output=True).stdout
    return time.monotonic() - began, said


def listing(messages: int) -> dict[str, Any]:
    """`queue list --json`, without and with other mail being accepted and delivered."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spooled(folder, messages, 2, 3600.0, 1)
        peer = Peer("open")
        relay = Relaymta(folder, peer.port, 2)
        time.sleep(3)
        seconds, said = command(relay, "queue", "list", "--json")
        before = accepting(relay, lambda: time.sleep(seconds))
        during = accepting(relay, lambda: command(relay, "queue", "list", "--json"))
        relay.close()
        peer.close()
    return {"listed": said.count(b"\n"), "s": seconds, "accept before ms": before, "accept while listing ms": during}


def reroute(messages: int) -> dict[str, Any]:
    """A million messages for a host that is down are rerouted to another one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spooled(folder, messages, 2, 3600.0, 1)
        peer = Peer("open")
        routes = f'route=[{{name="dead",hosts=["127.0.0.1:1"]}},{{name="other",hosts=["127.0.0.1:{peer.port}"]}}]'
        relay = Relaymta(folder, 0, 2, (routes,))
        time.sleep(3)
        seconds, said = command(relay, "queue", "reroute", "--app", "first", "--to", "other", "--json")
        start, began = relay.delivered(), time.monotonic()
        time.sleep(10)
        rate = (relay.delivered() - start) / (time.monotonic() - began)
        relay.close()
        peer.close()
    return json.loads(said) | {"s": seconds, "delivered a second behind it": rate}


def accepting(relay: Relaymta, work: Any) -> dict[str, float]:
    """Time from the final dot to its 250 while `work()` runs, milliseconds."""
    done = threading.Event()
    times: list[float] = []

    def client() -> None:
        with smtplib.SMTP("127.0.0.1", relay.port) as smtp:
            smtp.ehlo()
            while not done.is_set():
                smtp.mail("a@b.example")
                smtp.rcpt("c@d.example")
                smtp.docmd("DATA")
                began = time.monotonic()
                smtp.send((MESSAGE + "\r\n.\r\n").encode())
                assert smtp.getreply()[0] == 250
                times.append((time.monotonic() - began) * 1000)
                time.sleep(0.01)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    times.sort()
    return {"messages": len(times), "p50": times[len(times) // 2], "p99": times[int(len(times) * 0.99)], "most": times[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["priority", "explain", "delete", "list", "reroute"])
    options = parser.parse_args()
    parts = {"priority": priority, "explain": explain, "delete": delete, "list": listing, "reroute": reroute}
    print(json.dumps({n: part(options.messages) for n, part in parts.items() if options.only in (None, n)}, indent=1))


if __name__ == "__main__":
    main()
