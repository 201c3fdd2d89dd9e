"""A million entries in the suppression list of a running relay: `python -m benchmarks.suppression [ENTRIES] [--sorted] [--off]`.
How long the import takes, how large the file is, how much memory of the machine all processes have of it once each entry was
asked about at RCPT, and what RCPT costs, with a list and (`--off`) without."""

import csv
import json
import random
import re
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.daemon import Relay

REPLIES = (
    "550 5.1.1 <>: Recipient address rejected: User unknown in virtual mailbox table",
    "550 5.1.1 The email account does not exist",
    "550 5.2.1 The email account that you tried to reach is disabled", "550 5.1.1 RESOLVER.ADR.RecipNotFound; not found",
)  # fmt: skip
TOGETHER = 200  # RCPTs that are sent at once
SETTINGS = (
    "suppression.enabled=true",
    "intake.errors=100000000",
    "intake.tarpit=0",
    "log.history=0",
    'network=[{networks=["127.0.0.0/8"],relay=true,application="shop"}]',
)


def addresses(count: int) -> list[str]:
    """As they come: in no order, 28 octets long."""
    drawn = random.Random(7)
    found = [f"user{n:07d}@example-{drawn.randrange(50_000):05d}.test" for n in range(count)]
    drawn.shuffle(found)
    return found


def write(path: Path, found: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["address", "application", "reason", "text", "since", "until"])
        for number, address in enumerate(found):
            writer.writerow([
                address, "shop" if number % 3 else "", "hard-bounce", REPLIES[number % len(REPLIES)], "2026-05-01T09:30:00Z",
                "2099-10-28T09:30:00Z",
            ])  # fmt: skip


def children(pid: int) -> list[int]:
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += children(int(child))
    return found


def proportional(pids: list[int], name: str) -> dict[int, float]:
    """MB of each process's share of a file (Pss of /proc/PID/smaps)."""
    found = {}
    for pid in pids:
        total = 0
        for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text(), flags=re.M):
            if name in part.partition("\n")[0]:
                total += int(re.search(r"^Pss: +(\d+) kB", part, re.M)[1])  # type: ignore[index]
        found[pid] = total / 1000
    return found


def rcpts(relay: Relay, found: list[str]) -> Iterator[bytes]:
    """The replies to RCPT for these, on connections to several workers."""
    clients = [smtplib.SMTP("127.0.0.1", relay.port) for _ in range(8)]
    for client in clients:
        client.ehlo()
    for number, start in enumerate(range(0, len(found), TOGETHER)):
        part, client = found[start : start + TOGETHER], clients[number % len(clients)]
        assert client.sock is not None
        begin = b"RSET\r\nMAIL FROM:<a@b.example>\r\n"
        client.sock.sendall(begin + b"".join(b"RCPT TO:<%s>\r\n" % one.encode() for one in part))
        yield from [client.getreply()[1] for _ in range(len(part) + 2)][2:]
    for client in clients:
        client.close()


def cpu(pids: list[int]) -> float:
    ticks = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(one[11]) + int(one[12]) for one in ticks) / 100


def main() -> None:
    count = next((int(word) for word in sys.argv[1:] if word.isdigit()), 1_000_000)
    found = addresses(count)
    folder = Path(tempfile.mkdtemp(prefix="suppression-"))
    write(folder / "list.csv", sorted(found) if "--sorted" in sys.argv else found)
    settings = [one for one in SETTINGS if "--off" not in sys.argv or not one.startswith("suppression")]
    with Relay(folder, None, *settings, workers=2) as relay:
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "relaymta",
            "suppression",
            "import",
            str(folder / "list.csv"),
            "--spool",
            str(relay.spool),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            most = 0
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                most = max(most, int((re.search(r"VmHWM:\s+(\d+)", status) or [0, 0])[1]))
                time.sleep(0.2)
            assert process.stdout is not None
            said = process.stdout.read().strip()
        print(f"import: {time.monotonic() - began:.1f} s ({said}); the command has {most / 1000:.0f} MB at most")
        stats = json.loads(relay.cli("suppression", "stats", "--json").stdout)
        print(f"file: {stats['octets'] / 1e6:.1f} MB of {stats['entries']} entries")
        assert relay.process is not None
        pids = children(relay.process.pid)
        random.Random(1).shuffle(found)
        before, began = cpu(pids), time.monotonic()
        refused = sum(answer.startswith(b"5.1.8") for answer in rcpts(relay, found))
        print(f"RCPT: {len(found)}, {refused} refused, {(cpu(pids) - before) / len(found) * 1e6:.1f} us of CPU each")
        good = [one.replace("user", "good") for one in found[:300_000]]
        before = cpu(pids)
        taken = sum(answer.startswith(b"2.1.5") for answer in rcpts(relay, good))
        print(f"RCPT of those who are not in it: {taken} taken, {(cpu(pids) - before) / len(good) * 1e6:.1f} us of CPU each")
        shares = proportional(pids, "suppression/data.mdb")
        print(f"memory of it (Pss, MB): {shares}: {sum(shares.values()):.1f} together")
        began = time.monotonic()
        out = relay.cli("suppression", "export", str(folder / "out.csv"))
        lines = (folder / "out.csv").read_bytes().count(b"\n")
        print(f"export: {time.monotonic() - began:.1f} s, {lines} lines {out.stdout}")


if __name__ == "__main__":
    main()
