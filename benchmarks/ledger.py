"""Every message accounted for: `python -m benchmarks.ledger [--seconds N]`.

The load, the sink and the ledger are those of `relaymta bench`: what was lost, altered or delivered twice, and how long
acceptance (final dot to 250) and delivery (final dot to the sink) took.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from relaymta.bench.ledger import State
from relaymta.bench.load import Load
from relaymta.bench.peers import PEERS, Relaymta
from relaymta.bench.trial import Interrupted, Setup
from relaymta.bench.trial import run as run_bench

CONNECTIONS = 50
SIZE = "4k"


class Counted(Relaymta):
    """The relay; `last`: its counters at the end."""

    last: dict[str, float]

    def close(self) -> None:
        """Read them, and stop it."""
        Counted.last = {name: self.counter(f"relaymta_{name}_total") for name in ("commits", "commit_operations", "syncs")}
        super().close()


def percentile(values: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def run(seconds: float) -> dict[str, float]:
    """Load for `seconds`, wait until all is delivered, compare."""
    PEERS["counted"] = Counted
    load = Load(connections=CONNECTIONS, seconds=seconds, ramp=0.0, size=SIZE)
    with tempfile.TemporaryDirectory() as folder:
        found = run_bench(Setup(load, "counted", folder=Path(folder), grace=60), lambda progress: None, Interrupted())
    sent, account, last = found.sent, found.account, Counted.last
    accepted = [serial for serial, state in enumerate(sent.states) if state == State.ACCEPTED]
    replies = [sent.answered[serial] - sent.dotted[serial] for serial in accepted]
    arrived = [account.first[serial] - sent.dotted[serial] for serial in accepted if account.first[serial]]
    assert found.relay_cpu is not None
    return {
        "messages": len(accepted),
        "lost": account.lost + account.queued,
        "altered": account.altered,
        "duplicated": account.duplicated + account.repeated,
        "accept p50 ms": percentile(replies, 0.5),
        "accept p99 ms": percentile(replies, 0.99),
        "end to end p50 ms": percentile(arrived, 0.5),
        "end to end p99 ms": percentile(arrived, 0.99),
        "rate": len(accepted) / (found.loaded - found.began),
        "cpu_us": found.relay_cpu / len(accepted) * 1e6,
        "messages per commit": last["commit_operations"] / 2 / last["commits"],
        "body syncs per commit": last["syncs"] / last["commits"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    found = run(parser.parse_args().seconds)
    print(json.dumps(found, indent=1))
    sys.exit("messages were lost or altered" if found["lost"] or found["altered"] else 0)


if __name__ == "__main__":
    main()
