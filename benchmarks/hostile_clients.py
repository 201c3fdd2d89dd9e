"""Hostile clients beside others: `python -m benchmarks.hostile_clients [--seconds N] [--json FILE]`.

The worker's memory for them (at most 50 MB), the time until others get their banner (p99 at most 100 ms), and whether all their
connections are released when they are gone."""

import argparse
import json
import resource
import socket
import tempfile
import threading
import time
from pathlib import Path

import trustme

from benchmarks.backlog import anonymous, worker_of
from benchmarks.run import Relaymta, Sink
from tests.support.daemon import free_port, wait_for
from tests.support.hostile import Crowd

KINDS = {
    "do not read": 20, "do not read, by TLS": 10, "read an octet a second": 20, "half-close": 50, "reset": 20,
    "stop in message data": 20, "speak HTTP": 10, "stop in the PROXY header": 180, "stop in the handshake": 1000,
}  # fmt: skip


class Others:
    """A client that connects every 20 ms: seconds until each banner."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seconds: list[float] = []
        self.refused = 0
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", self.port), 30) as sock:
                self.refused += not sock.recv(200).startswith(b"220")
            self.seconds.append(time.monotonic() - began)
            time.sleep(0.02)

    def close(self) -> None:
        self._stop = True
        self._thread.join()


def run(seconds: int) -> dict[str, float]:
    """Connect them, measure while each acts once a second, and close them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sink = Sink()
    plain, implicit, proxy = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        found = trustme.CA().issue_cert("relay.example")
        chain.write_bytes(b"".join(blob.bytes() for blob in found.cert_chain_pems) + found.private_key_pem.bytes())
        listeners = [
            f'{{address="127.0.0.1:{plain}"}}', f'{{address="127.0.0.1:{implicit}",tls="implicit"}}',
            f'{{address="127.0.0.1:{proxy}",proxy=["127.0.0.1/32"]}}',
        ]  # fmt: skip
        settings = (
            f"listener=[{','.join(listeners)}]", f'certificate=[{{chain="{chain}"}}]', "limits.connections=100000",
            'network=[{networks=["127.0.0.1/32"],connections=100000}]',
        )  # fmt: skip
        relay = Relaymta(Path(folder), sink.port, 1, settings)
        worker = worker_of(relay)
        others = Others(plain)
        time.sleep(2)
        before, quiet = anonymous(worker), len(others.seconds)
        crowd = Crowd(KINDS, plain, implicit, proxy)
        most = 0
        for _ in range(seconds):
            crowd.tick()
            time.sleep(1)
            most = max(most, anonymous(worker) - before)
        others.close()
        crowd.close()
        wait_for(lambda: relay.counter("relaymta_connections ") == 0, 60, "the end of them all")
        relay.close()
    sink.close()
    times, alone = sorted(others.seconds[quiet:]), sorted(others.seconds[:quiet])
    return {
        "clients": sum(KINDS.values()), "MB": most / 1024, "banner p50 ms": times[len(times) // 2] * 1000,
        "banner p99 ms": times[len(times) * 99 // 100] * 1000, "banner p99 ms without them": alone[len(alone) * 99 // 100] * 1000,
        "banners": len(times), "refused": others.refused,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(options.seconds)
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
