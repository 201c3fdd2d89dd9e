"""What filters of one process may use."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relaymta.dns import Resolver
    from relaymta.filter.judgement import Mail
    from relaymta.metrics import Counters
    from relaymta.shm import Named
    from relaymta.triplets import Triplets

__all__ = ["Means"]


class Means(NamedTuple):
    """In a worker all of it, on the command line as far as it is there. `hostname`: ours; `counters`, `named`: where it is
    counted; `warn(text)`: something is wrong; `matched(mail, rule)`: a rule about mail matches; `triplets(stale)`: those of
    greylisting, see there."""

    hostname: str = ""
    resolver: "Resolver | None" = None
    counters: "Counters | None" = None
    named: "Named | None" = None
    warn: Callable[[str], None] = lambda text: None
    matched: "Callable[[Mail, str], None]" = lambda mail, rule: None
    triplets: "Callable[[Callable[[int, int, int], bool]], Triplets] | None" = None
