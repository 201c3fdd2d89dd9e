"""10,000 idle connections: `python -m benchmarks.idle [--connections N]`: memory of each, and latency of others' mail."""

import argparse
import json
import resource
import smtplib
import socket
import tempfile
import time
from pathlib import Path

from benchmarks.backlog import anonymous, worker_of
from benchmarks.run import Relaymta, Sink


def run(connections: int) -> dict[str, float]:
    """Open them, measure, send 500 messages beside them, close."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sink = Sink()
    with tempfile.TemporaryDirectory() as folder:
        relay = Relaymta(Path(folder), sink.port, 1, ("limits.connections_per_client=100000", "limits.connections=100000"))
        worker = worker_of(relay)
        before = anonymous(worker)
        held = []
        for _ in range(connections):
            sock = socket.create_connection(("127.0.0.1", relay.port), 20)
            sock.recv(100)
            sock.sendall(b"EHLO idle.example\r\n")
            sock.recv(1000)
            held.append(sock)
        time.sleep(1)
        each = (anonymous(worker) - before) / connections
        times = []
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.ehlo()
            for _ in range(500):
                began = time.monotonic()
                client.sendmail("a@b.example", ["c@d.example"], b"Subject: x\r\n\r\n" + b"x" * 4000)
                times.append(time.monotonic() - began)
        times.sort()
        for sock in held:
            sock.close()
        relay.close()
    sink.close()
    return {"connections": connections, "kB each": each, "p50 ms": times[250] * 1000, "p99 ms": times[495] * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    print(json.dumps(run(parser.parse_args().connections)))


if __name__ == "__main__":
    main()
