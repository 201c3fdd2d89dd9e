"""Seeds of the simulator: nothing is lost, doubled, stuck or miscounted, and a seed is the same run each time."""

import os
import subprocess
import sys

import pytest

from tests.conftest import PROVE
from tests.sim.world import run

SEEDS = 20_000 if PROVE else 40
TOGETHER = 100 if PROVE else 20  # seeds of one test


@pytest.mark.parametrize("first", range(1, SEEDS + 1, TOGETHER))
def test_seeds(first: int) -> None:
    for seed in range(first, first + TOGETHER):
        run(seed)


@pytest.mark.parametrize("seed", [7, 11])
def test_a_seed_is_the_same_run_each_time(seed: int) -> None:
    first, second = run(seed), run(seed, closely=True)
    assert first.trace == second.trace
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    script = f"from tests.sim.world import run; print(run({seed}).digest.hexdigest())"
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first.digest.hexdigest()
