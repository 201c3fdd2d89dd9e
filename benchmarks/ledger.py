"""Every message accounted for: `python -m benchmarks.ledger [--seconds N]`.

A generator and a sink of our own, which share no code with the relay: each message has an id and a hash; the ledger shows
what was lost, altered or delivered twice, and how long acceptance (final dot to 250) and delivery (final dot to the sink's) took.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import uvloop

from benchmarks.run import Relaymta, cpu_seconds
from tests.support.daemon import free_port, wait_for
from tests.support.source import Source

CONNECTIONS = 50
SIZE = 4096


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def run(seconds: float) -> dict[str, float]:
    """Load for `seconds`, wait until all is delivered, compare."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        taken = folder / "taken"
        sink = subprocess.Popen([sys.executable, "-m", "tests.support.sink", str(port), str(taken)])
        relay = Relaymta(folder, port)
        try:
            source = Source(lambda: relay.port, CONNECTIONS, SIZE)
            spent, began = cpu_seconds(relay.root), time.monotonic()
            until = began + seconds
            uvloop.run(source.run(lambda: time.monotonic() > until))
            elapsed = time.monotonic() - began
            wait_for(lambda: relay.counter("relaymta_queue_messages") == 0, 60, "the queue to drain")
            cpu = cpu_seconds(relay.root) - spent
            commits, operations, syncs = (
                relay.counter(f"relaymta_{which}_total") for which in ("commits", "commit_operations", "syncs")
            )
        finally:
            relay.close()
            sink.terminate()
            sink.wait()
        records = [json.loads(line) for line in taken.read_text().splitlines()]
    return account(source, records) | {
        "rate": len(source.acknowledged) / elapsed,
        "cpu_us": cpu / len(source.acknowledged) * 1e6,
        "messages per commit": operations / 2 / commits,
        "body syncs per commit": syncs / commits,
    }


def account(source: Source, records: list[tuple[str, str, list[str], float]]) -> dict[str, float]:
    """Compare the ledgers of the generator and the sink."""
    digests = {ident: digest for ident, digest, _, _ in records}
    counts = Counter(ident for ident, *_ in records)
    accepted = [acked - source.sent_at[ident] for ident, acked in source.acknowledged_at.items()]
    delivered = [at - source.sent_at[ident] for ident, _, _, at in records]
    return {
        "messages": len(source.acknowledged),
        "lost": sum(ident not in digests for ident in source.acknowledged),
        "altered": sum(digests.get(ident, digest) != digest for ident, digest in source.acknowledged.items()),
        "duplicated": sum(count - 1 for count in counts.values()),
        "accept p50 ms": percentile(accepted, 0.5),
        "accept p99 ms": percentile(accepted, 0.99),
        "end to end p50 ms": percentile(delivered, 0.5),
        "end to end p99 ms": percentile(delivered, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    found = run(parser.parse_args().seconds)
    print(json.dumps(found, indent=1))
    sys.exit("messages were lost or altered" if found["lost"] or found["altered"] else 0)


if __name__ == "__main__":
    main()
