"""The simulator finds each defect that is brought back on purpose."""

import subprocess

import pytest

from tests.conftest import PROVE
from tests.sim.mutants.hunt import MUTANTS, ROOT, hunt
from tests.support.programs import need

SEEDS = 2000


@pytest.mark.parametrize("path", MUTANTS, ids=lambda path: path.stem)
def test_a_mutant_fits_the_code(path) -> None:
    command = [need("patch"), "-p1", "-F0", "--dry-run", "-d", str(ROOT), "-i", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not PROVE, reason="hunting takes minutes: make prove")
@pytest.mark.parametrize("name", [path.stem for path in MUTANTS])
def test_a_mutant_is_found(name: str) -> None:
    found = hunt(name, SEEDS)
    assert found, f"no seed up to {SEEDS} finds it"
    print(found)
