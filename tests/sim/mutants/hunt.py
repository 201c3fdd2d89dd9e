"""Apply a mutant to a copy of the tree, and look for a seed that fails.

A patch that begins with "Found by MODULE" is of code that the simulator does not run, or of what happens in few of its seeds: the
tests of that module have to fail, or (FILE::TEST) this test of pytest's."""

import os
import re
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
    """What finds a mutant: the first line of the seed's failure, or the last of the module's; "" when nothing does."""
    with tempfile.TemporaryDirectory(prefix="relaymta-mutant-") as folder:
        tree = Path(folder)
        for part in ("relaymta", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "*.c", "mutants"))
        patch = HERE / f"{name}.patch"
        subprocess.run(["patch", "-p1", "-s", "-F0", "-i", str(patch)], cwd=tree, check=True, capture_output=True, text=True)
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        module = re.match(r"Found by (\S+)", patch.read_text())
        if module and "::" in module[1]:
            return _by_pytest(tree, environment, module[1])
        command = [sys.executable, *(["-m", "unittest", module[1]] if module else ["-c", _SCRIPT, str(seeds)])]
        ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        if module:
            last = ran.stderr.strip().rpartition("\n")[2]
            return f"{module[1]}: {last}" if ran.returncode and last.startswith("FAILED") else ""
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return ran.stdout.strip()


def _by_pytest(tree: Path, environment: dict[str, str], test: str) -> str:
    """The line that names the failed test; "" when it does not fail, or cannot be run."""
    shutil.copy(ROOT / "pyproject.toml", tree)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", test]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^FAILED .*$", ran.stdout, re.M)
    return found[0] if ran.returncode == 1 and found else ""
