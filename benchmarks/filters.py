"""What filters cost: `python -m benchmarks.filters [--starts N] [--pairs N] [--json FILE]`.

Relays with and without filters run side by side, and get the same load (4 kB messages) in turn, as in benchmarks.pairs; what
counts is the CPU of the worker a message. "clamd": every message is shown to a real clamd, which has two signatures; "queued":
likewise, but behind the 250; "others": a filter for unauthenticated clients is configured, and the mail is that of clients that
may relay; "milter": every message is shown to a milter (null_milter.c, on libmilter) that answers each of the 25 events,
"milter, quiet": to one that answers the last alone; both are asked behind the final dot ("message"), or as the dialogue goes
("mail"). "http": every message is shown to a hook that accepts it, without its data and unsigned, or with both. "policy": a
policy service is asked about each recipient (one, or ten). "greylist": the sender is known; "dnsbl": ten lists, whose answers the
resolver has: both, and the relay beside them, with mail of clients that may not relay. "python": hooks look at MAIL, RCPT and
the message, or at the message alone, and let pass what they see. The filter's own CPU is told beside it.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pairs import WARM_UP, Build
from benchmarks.run import Load, cpu_seconds
from tests.support.clamd import clamd
from tests.support.daemon import free_port, wait_for
from tests.support.resolver import nameserver_with

UNTRUSTED = ("relay.networks=[]", 'relay.domains=["d.example"]', "verify.results=false")
LOADS = {True: 3_000, False: 2_000}  # messages of a burst, with sessions reused or not


class Running(NamedTuple):
    """A filter: its process (0: it has none), what is configured for it (TOML), and settings of the relay beside it, too."""

    pid: int
    keys: str
    address: str
    settings: tuple[str, ...] = ()


@contextmanager
def _clamd() -> Iterator[Running]:
    with clamd() as scanner:
        assert scanner.process is not None
        yield Running(scanner.process.pid, f'type="clamd",address=["{scanner.address}"]', scanner.address)


@contextmanager
def null_milter(*words: str) -> Iterator[str]:
    """The address of a running null_milter.c, which is built here."""
    with _milter(*words) as running:
        yield running.address


@contextmanager
def _milter(*words: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        program, path = f"{folder}/null_milter", f"{folder}/socket"
        source = Path(__file__).with_name("null_milter.c")
        subprocess.run(["cc", "-O2", "-o", program, source, "-lmilter", "-lpthread"], check=True)
        process = subprocess.Popen([program, f"unix:{path}", *words])
        try:
            wait_for(lambda: Path(path).exists(), what="the milter")
            Path(path).chmod(0o666)
            yield Running(process.pid, f'type="milter",address=["unix:{path}"]', f"unix:{path}")
        finally:
            process.kill()
            process.wait()


SERVICE = """
import socket, sys, threading
def serve(sock):
    said = b""
    while data := sock.recv(65536):
        said += data
        while b"\\n\\n" in said:
            _, _, said = said.partition(b"\\n\\n")
            sock.sendall(b"action=DUNNO\\n\\n")
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=100)
while True:
    threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()
"""


@contextmanager
def _policy() -> Iterator[Running]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(port)])
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), what="the policy service")
        yield Running(process.pid, f'type="policy",address=["127.0.0.1:{port}"]', f"127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


HOOK = """
import socket, sys, threading
ANSWER = b'HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: 21\\r\\n\\r\\n{"verdict": "accept"}'
def serve(sock):
    said = b""
    while data := sock.recv(65536):
        said += data
        head, end, body = said.partition(b"\\r\\n\\r\\n")
        if end and len(body) >= int(head.lower().partition(b"content-length:")[2].partition(b"\\r")[0]):
            sock.sendall(ANSWER)
            said = b""
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=100)
while True:
    threading.Thread(target=serve, args=listening.accept()[:1], daemon=True).start()
"""


@contextmanager
def _hook(signed: bool = False) -> Iterator[Running]:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", HOOK, str(port)])
    with tempfile.NamedTemporaryFile("w") as secret:
        secret.write("correct horse")
        secret.flush()
        Path(secret.name).chmod(0o644)
        try:
            wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), what="the hook")
            address = f"http://127.0.0.1:{port}/hook"
            keys = f'type="http",address=["{address}"]' + (f',body=true,secret_file="{secret.name}"' if signed else "")
            yield Running(process.pid, keys, address)
        finally:
            process.kill()
            process.wait()


HOOKS = """
from relaymta.hooks import *
async def on_mail(client, envelope):
    return reject("not from there") if envelope.sender.endswith("@forbidden.example") else None
async def on_rcpt(client, envelope, recipient):
    return reject("nobody") if recipient.startswith("nobody@") else None
async def on_message(mail):
    return hold("an invoice") if "invoice" in mail.header.get("subject").lower() else None
"""


@contextmanager
def _hooks(message_only: bool = False) -> Iterator[Running]:
    """Hooks in Python, whose process is the worker's child: its CPU is not told."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "policy.py"
        file.write_text(HOOKS if not message_only else HOOKS.replace("on_mail", "a").replace("on_rcpt", "b"))
        yield Running(0, f'type="python",file="{file}"', "")


@contextmanager
def _greylist() -> Iterator[Running]:
    """Who is new is let pass, so that it is known soon."""
    with _resolver() as dns:
        keys = 'type="greylist",delay=1,verdicts={new="accept",early="accept"}'
        yield Running(0, keys, "", (*UNTRUSTED, dns))


@contextmanager
def _dnsbl() -> Iterator[Running]:
    lists = ",".join(f'{{zone="l{n}.test",codes=["127.0.0.2"]}}' for n in range(10))
    with _resolver() as dns:
        yield Running(0, f'type="dnsbl",lists=[{lists}]', "", (*UNTRUSTED, dns))


@contextmanager
def _resolver() -> Iterator[str]:
    """The setting of a nameserver that knows no names."""
    with tempfile.TemporaryDirectory() as folder, nameserver_with(Path(folder), []) as server:
        yield f'delivery.nameservers=["{server}"]'


def measured(filter: Running, keys: str, load: Load, starts: int, pairs: int) -> dict[str, Any]:
    """The CPU a message of a relay with a filter (`keys`: more of its table) and of one without, and of the filter (us)."""
    filtered = (f'filter=[{{name="one",{filter.keys}{keys}}}]' if filter.keys else keys, *filter.settings)
    rows: list[list[float]] = []
    own: list[float] = []
    for start in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            order = ["with", "without"] if start % 2 else ["without", "with"]
            sides = {
                name: Build(sys.executable, Path(folder) / name, filtered if name == "with" else filter.settings)
                for name in order
            }
            try:
                for number in range(-WARM_UP, pairs):
                    found = {}
                    for name in order if number % 2 else order[::-1]:
                        before = cpu_seconds(filter.pid) if filter.pid else 0.0
                        found[name] = sides[name].burst(load)
                        if name == "with" and number >= 0:
                            now = cpu_seconds(filter.pid) if filter.pid else 0.0
                            own.append((now - before) / load.messages * 1e6)
                    if number >= 0:
                        rows.append([found["with"], found["without"]])
            finally:
                for side in sides.values():
                    side.close()
    with_, without = (statistics.median(row[side] for row in rows) for side in (0, 1))
    return {
        "load": load.name, "with": with_, "without": without, "more": statistics.median(a - b for a, b in rows),
        "ratio": statistics.median(a / b for a, b in rows), "filter": statistics.median(own), "pairs": rows,
    }  # fmt: skip


def _rules() -> Iterator[Running]:
    yield Running(0, "", "")


RULES = ",".join(
    f'{{name="r{n}",{condition},enforce=true}}'
    for n, condition in enumerate([
        'attachment=["*.exe","*.js","*.scr","type:program","archive:*.exe"]', 'attachment=["structure:excessive"]',
        'header=["Subject: (?i)invoice [0-9]+"]', 'body=["BEGIN [A-Z ]*PRIVATE KEY"]', 'body=["(?i)bitcoin.{0,40}wallet"]',
        *(f'header=["X-Field-{n}: ^[a-z]+$"]' for n in range(10)), *(f'attachment=["*.e{n}","name{n}*"]' for n in range(5)),
    ])
)  # fmt: skip

_QUIET = partial(_milter, "quiet")
CASES: dict[str, tuple[Callable[[], AbstractContextManager[Running]], str]] = {
    "clamd": (_clamd, ""),
    "queued": (_clamd, ',stage="queued"'),
    "others": (_clamd, ',clients="unauthenticated"'),
    "policy": (_policy, ""),
    "policy, ten recipients": (_policy, ""),
    "http": (_hook, ""),
    "http, signed, with the data": (partial(_hook, True), ""),
    "python": (_hooks, ""),
    "python, the message alone": (partial(_hooks, True), ""),
    "python, on the loop": (_hooks, ',isolation="loop"'),
    "greylist": (_greylist, ""),
    "dnsbl": (_dnsbl, ""),
    "rules": (contextmanager(_rules), f"mail_rule=[{RULES}]"),
    "milter": (_milter, ',stage="message"'),
    "milter, mail": (_milter, ',stage="mail"'),
    "milter, quiet": (_QUIET, ',stage="message"'),
    "milter, quiet, mail": (_QUIET, ',stage="mail"'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4, help="how often both relays are started (default: 4)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each start (default: 5)")
    parser.add_argument("--only", metavar="WORD", default="", help="measure those alone whose name begins with it")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        sys.exit("it reads /proc")
    found = []
    for what, (run, keys) in CASES.items():
        if not what.startswith(arguments.only):
            continue
        with run() as filter:
            for reuse, messages in LOADS.items():
                to = 10 if "ten" in what else 1
                load = Load("sessions reused" if reuse else "one connection a message", messages, reuse=reuse, recipients=to)
                row = {"what": what} | measured(filter, keys, load, arguments.starts, arguments.pairs)
                found.append(row)
                print(
                    f"{what}, {row['load']}: {row['with']:.0f} us with, {row['without']:.0f} without: {row['more']:+.0f} us, "
                    f"{row['ratio']:.3f} x; the filter itself {row['filter']:.0f} us",
                    flush=True,
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
