"""Another build of the relay beside this one: `python -m benchmarks.pairs PYTHON [--pairs N] [--scale X] [--json FILE]`.

PYTHON is the interpreter of the other build's .venv (a checkout in which `make build` was run). Each pair is one load through a
fresh relay of either build, in turn the one and the other first; what counts is the median of the ratios (this / the other) of
CPU per message: a machine that is shared is slow at times, and then for both.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.run import Load, Relaymta, Sink, measure


def once(python: str, load: Load) -> float:
    """CPU per message (us) of one load through a fresh relay."""
    with tempfile.TemporaryDirectory() as folder:
        sink = Sink()
        try:
            relay = Relaymta(Path(folder), sink.port, python=python)
            try:
                measure(relay, Load("warm-up", min(1000, load.messages), load.size, load.reuse))
                return measure(relay, load)["cpu_us"]
            finally:
                relay.close()
        finally:
            sink.close()


def beside(other: str, load: Load, pairs: int) -> dict[str, Any]:
    """The pairs of one load."""
    rows = []
    for number in range(pairs):
        order = (sys.executable, other) if number % 2 else (other, sys.executable)
        spent = {python: once(python, load) for python in order}
        rows.append((spent[sys.executable], spent[other]))
        print(f"{load.name}: {rows[-1][0]:.0f} us, the other {rows[-1][1]:.0f} us", flush=True)
    ratios = [this / that for this, that in rows]
    return {"load": load.name, "pairs": rows, "median ratio": statistics.median(ratios), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the other build's interpreter")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of messages")
    parser.add_argument("--json", metavar="FILE", help="write what was measured to this file")
    arguments = parser.parse_args()
    loads = [
        Load("sessions reused, 4 kB", int(20_000 * arguments.scale)),
        Load("one connection a message, 4 kB", int(10_000 * arguments.scale), reuse=False),
    ]
    found = [beside(arguments.python, load, arguments.pairs) for load in loads]
    for row in found:
        print(f"{row['load']}: median of the ratios {row['median ratio']:.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
