"""Apply a mutant to a copy of the tree, and look for a seed that fails."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["MUTANTS", "hunt"]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
MUTANTS = sorted(HERE.glob("*.patch"))

_SCRIPT = """
import sys
from tests.sim.world import Failure, run
for seed in range(1, int(sys.argv[1]) + 1):
    try:
        run(seed)
    except Failure as failure:
        print(str(failure).partition(chr(10))[0])
        break
"""


def hunt(name: str, seeds: int) -> str:
    """The first line of the failure that finds a mutant; "" when none of the first `seeds` does."""
    with tempfile.TemporaryDirectory(prefix="relaymta-mutant-") as folder:
        tree = Path(folder)
        for part in ("relaymta", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.c", "mutants"))
        patch = HERE / f"{name}.patch"
        subprocess.run(["patch", "-p1", "-s", "-F0", "-i", str(patch)], cwd=tree, check=True, capture_output=True, text=True)
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", _SCRIPT, str(seeds)]
        ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return ran.stdout.strip()
