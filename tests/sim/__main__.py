"""Run seeds: `python -m tests.sim SEED [LAST] [--trace] [--closely]`."""

import sys
import time

from tests.sim.world import Failure, World, run


def main(arguments: list[str]) -> int:
    """Run the seeds from the first to the last; the number of those that failed."""
    seeds = [int(word) for word in arguments if word.isdigit()]
    began, failed = time.time(), 0
    for seed in range(seeds[0], (seeds[1] if len(seeds) > 1 else seeds[0]) + 1):
        try:
            world: World = run(seed, "--closely" in arguments)
        except Failure as failure:
            failed += 1
            print(failure if len(seeds) == 1 or "--trace" in arguments else str(failure).partition("\n")[0])
        else:
            if len(seeds) == 1:
                if "--trace" in arguments:
                    print(world.story(1_000_000))
                messages = len(world.ledger.messages)
                print(f"seed {seed}: {world.stage.stepped} steps, {messages} messages, {world.digest.hexdigest()[:16]}")
    print(f"{failed} failed, {time.time() - began:.1f} s")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
