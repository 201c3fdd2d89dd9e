"""Another build of the relay beside this one: `python -m benchmarks.pairs PYTHON [--starts N] [--pairs N] [--json FILE]`.

PYTHON is the interpreter of the other build's .venv (a checkout in which `make build` was run). Both relays run, and get the
same load in turn, in bursts of a second, the one and the other first; a pair is one burst through each. A shared machine is
slow at times, and then for both. Two starts of one build differ, too (addresses of memory, hashes of strings), and the one
that was started first has been up to 9 % slower than its like. So both are started anew for every few pairs, the one and the
other first. What counts is the geometric mean of two medians over the starts, those that began with the one and those that
began with the other, of the median ratio (this / the other) of the workers' CPU per message in the pairs of a start.
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

    def __init__(self, python: str, folder: Path, settings: tuple[str, ...] = ()) -> None:
        folder.mkdir()
        self.sink = Sink()
        self.relay = Relaymta(folder, self.sink.port, python=python, settings=settings)
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


def one_start(other: str, load: Load, pairs: int, this_first: bool) -> list[list[float]]:
    """Both builds started anew, and their pairs of one load: CPU per message (us) of this and of the other."""
    with tempfile.TemporaryDirectory() as folder:
        pythons = {"this": sys.executable, "other": other}
        order = list(pythons) if this_first else list(pythons)[::-1]
        started = {name: Build(pythons[name], Path(folder) / name) for name in order}
        builds = [started[name] for name in pythons]
        try:
            rows = []
            for number in range(-WARM_UP, pairs):
                spent = {build: build.burst(load) for build in (builds if number % 2 else builds[::-1])}
                if number >= 0:
                    rows.append([spent[build] for build in builds])
        finally:
            for build in builds:
                build.close()
    return rows


def beside(other: str, load: Load, starts: int, pairs: int) -> dict[str, Any]:
    """The pairs of one load, and the median ratio of each start."""
    rows = [one_start(other, load, pairs, number % 2 == 0) for number in range(starts)]
    ratios = [statistics.median(this / that for this, that in start) for start in rows]
    ratio = statistics.geometric_mean([statistics.median(ratios[0::2]), statistics.median(ratios[1::2])])
    return {"load": load.name, "pairs": rows, "ratio": ratio, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the other build's interpreter")
    parser.add_argument("--starts", type=int, default=10, help="how often both are started, an even number (default: 10)")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of each start (default: 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of messages")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    arguments = parser.parse_args()
    loads = [
        Load("sessions reused, 4 kB", int(4_000 * arguments.scale)),
        Load("one connection a message, 4 kB", int(2_500 * arguments.scale), reuse=False),
    ]
    found = [beside(arguments.python, load, arguments.starts, arguments.pairs) for load in loads]
    for row in found:
        low, _, high = statistics.quantiles(row["ratios"], n=4)
        this, that = (statistics.median(pair[side] for start in row["pairs"] for pair in start) for side in (0, 1))
        print(
            f"{row['load']}: ratio in {len(row['ratios'])} starts {row['ratio']:.3f} "
            f"(quartiles {low:.3f} and {high:.3f}; {this:.0f} us, the other {that:.0f} us)"
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
