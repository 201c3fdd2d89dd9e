"""50 MB bodies: `python -m benchmarks.large`: throughput beside dd and smtp-sink, memory of many such clients at the same
time, and how small mail is accepted beside them."""

import json
import multiprocessing
import smtplib
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.backlog import anonymous, worker_of
from benchmarks.run import Relaymta, Sink

MEGABYTE = 1 << 20
LINE = b"x" * 76 + b"\r\n"
PIECE = LINE * (MEGABYTE // len(LINE))


def begin(port: int) -> socket.socket:
    """A session behind 354."""
    sock = socket.create_connection(("127.0.0.1", port), 60)
    sock.recv(100)
    for command in (b"EHLO x\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"DATA\r\n"):
        sock.sendall(command)
        sock.recv(1000)
    return sock


def send(port: int, megabytes: int) -> float:
    """Seconds for one message."""
    sock = begin(port)
    began = time.monotonic()
    sock.sendall(b"Subject: large\r\n\r\n")
    for _ in range(megabytes):
        sock.sendall(PIECE)
    sock.sendall(b".\r\n")
    said = sock.recv(200)
    assert said.startswith(b"250"), said
    sock.close()
    return time.monotonic() - began


def stream(port: int) -> None:
    """Send 48 MB messages until ended."""
    while True:
        send(port, 48)


def p99_beside(port: int, clients: int) -> float:
    """p99 in ms of accepting small mail while `clients` send 50 MB each, again and again."""
    streams = [multiprocessing.Process(target=stream, args=(port,), daemon=True) for _ in range(clients)]
    for one in streams:
        one.start()
    time.sleep(1)
    times = []
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.ehlo()
        for _ in range(300):
            began = time.monotonic()
            client.sendmail("a@b.example", ["c@d.example"], b"Subject: x\r\n\r\n" + b"x" * 4000)
            times.append(time.monotonic() - began)
    for one in streams:
        one.terminate()
        one.join()
    return sorted(times)[296] * 1000


def main() -> None:
    sink = Sink()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={folder}/dd", "bs=1M", "count=50", "conv=fdatasync"], check=True, capture_output=True
        )
        found["dd MB/s"] = 50 / (time.monotonic() - began)
        found["smtp-sink MB/s"] = 48 / min(send(sink.port, 48) for _ in range(3))
        relay = Relaymta(Path(folder), sink.port, 1, ("limits.connections_per_client=1000",))
        found["relaymta MB/s"] = 48 / min(send(relay.port, 48) for _ in range(3))
        worker = worker_of(relay)
        time.sleep(2)
        before = anonymous(worker)
        held = [begin(relay.port) for _ in range(200)]
        for _ in range(4):
            for sock in held:
                sock.sendall(PIECE)
        time.sleep(1)
        found["200 clients, RssAnon MB"] = (anonymous(worker) - before) / 1000
        for sock in held:
            sock.close()
        time.sleep(1)
        found["small mail's p99 beside 20, ms"] = p99_beside(relay.port, 20)
        relay.close()
    sink.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
