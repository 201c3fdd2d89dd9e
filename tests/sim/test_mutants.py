"""The simulator finds each defect that is brought back on purpose."""

import pytest

from tests.conftest import PROVE
from tests.sim.mutants.hunt import MUTANTS, hunt

SEEDS = 2000


@pytest.mark.skipif(not PROVE, reason="hunting takes minutes: make prove")
@pytest.mark.parametrize("name", [path.stem for path in MUTANTS])
def test_a_mutant_is_found(name: str) -> None:
    found = hunt(name, SEEDS)
    assert found, f"no seed up to {SEEDS} finds it"
    print(found)
