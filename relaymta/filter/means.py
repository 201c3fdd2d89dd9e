"""What filters of one process may use."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relaymta.dns import Resolver
    from relaymta.metrics import Counters
    from relaymta.shm import Named
    from relaymta.triplets import Triplets

__all__ = ["Means"]


class Means(NamedTuple):
    """In a worker all of it, on the command line as far as it is there. `hostname`: ours; `counters`, `named`: where it is
    counted; `warn(text)`: something is wrong; `triplets(stale)`: those of greylisting, see there."""

    hostname: str = ""
    resolver: "Resolver | None" = None
    counters: "Counters | None" = None
    named: "Named | None" = None
    warn: Callable[[str], None] = lambda text: None
    triplets: "Callable[[Callable[[int, int, int], bool]], Triplets] | None" = None
