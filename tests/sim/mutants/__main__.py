"""`python -m tests.sim.mutants [NAME ...] [--seeds N]`: for each mutant, the seed that finds it and after how many steps."""

import sys

from tests.sim.mutants.hunt import MUTANTS, hunt


def main(arguments: list[str]) -> int:
    """Hunt the mutants of these names, or all; how many were not found."""
    seeds = int(arguments[arguments.index("--seeds") + 1]) if "--seeds" in arguments else 2000
    names = [word for word in arguments if not word.startswith("--") and not word.isdigit()] or [path.stem for path in MUTANTS]
    missed = 0
    for name in names:
        found = hunt(name, seeds)
        missed += not found
        print(f"{name}: {found or 'NOT FOUND'}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
