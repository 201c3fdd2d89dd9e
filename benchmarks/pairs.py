"""Another build of the relay beside this one: `python -m benchmarks.pairs PYTHON [--pairs N] [--scale X] [--json FILE]`.

PYTHON is the interpreter of the other build's .venv (a checkout in which `make build` was run). Both relays run, and get the
same load in turn, in bursts of a second, the one and the other first; a pair is one burst through each. What counts is the
median of the ratios (this / the other) of the workers' CPU per message: a shared machine is slow at times, and then for both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.run import Load, Relaymta, Sink
from tests.support.daemon import wait_for

WARM_UP = 2  # bursts before it counts


class Build:
    """A relay of one build, and the sink behind it."""

    def __init__(self, python: str, folder: Path) -> None:
        folder.mkdir()
        self.sink = Sink()
        self.relay = Relaymta(folder, self.sink.port, python=python)
        children = subprocess.run(["pgrep", "-P", str(self.relay.root)], check=True, capture_output=True, text=True).stdout
        self.workers = children.split()

    def _spent(self) -> int:
        """CPU of the workers' threads (ns)."""
        tasks = [task for pid in self.workers for task in Path(f"/proc/{pid}/task").iterdir()]
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)

    def burst(self, load: Load) -> float:
        """CPU per message (us) of one load."""
        before, expected = self._spent(), self.relay.delivered() + load.messages
        subprocess.run(load.command(self.relay.port), check=True, timeout=600)
        wait_for(lambda: self.relay.delivered() >= expected, 300, load.name)
        return (self._spent() - before) / load.messages / 1000

    def close(self) -> None:
        self.relay.close()
        self.sink.close()


def beside(other: str, load: Load, pairs: int) -> dict[str, Any]:
    """The pairs of one load."""
    with tempfile.TemporaryDirectory() as folder:
        builds = [Build(sys.executable, Path(folder) / "this"), Build(other, Path(folder) / "other")]
        try:
            rows = []
            for number in range(-WARM_UP, pairs):
                spent = {build: build.burst(load) for build in (builds if number % 2 else builds[::-1])}
                if number >= 0:
                    rows.append([spent[build] for build in builds])
        finally:
            for build in builds:
                build.close()
    ratios = [this / that for this, that in rows]
    return {"load": load.name, "pairs": rows, "median ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the other build's interpreter")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of messages")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    arguments = parser.parse_args()
    loads = [
        Load("sessions reused, 4 kB", int(4_000 * arguments.scale)),
        Load("one connection a message, 4 kB", int(2_500 * arguments.scale), reuse=False),
    ]
    found = [beside(arguments.python, load, arguments.pairs) for load in loads]
    for row in found:
        low, _, high = statistics.quantiles(row["ratios"], n=4)
        this, that = (statistics.median(pair[side] for pair in row["pairs"]) for side in (0, 1))
        print(
            f"{row['load']}: median of the ratios {row['median ratio']:.3f} (quartiles {low:.3f} and {high:.3f}; "
            f"{this:.0f} us, the other {that:.0f} us)"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
