"""What filters of one process may use."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from relaymta.dns import Resolver
    from relaymta.filter.judgement import Mail
    from relaymta.metrics import Counters
    from relaymta.shm import Named
    from relaymta.triplets import Triplets

__all__ = ["HookMeans", "Means"]


class HookMeans(NamedTuple):
    """What hooks in Python may use. `routes()`: the names of all; `log(text)`: a warning; and what is counted: `took(hook,
    seconds)`; `failed(hook, why)`: one of metrics.HOOK_FAILURES; `raised(place)`: an exception; `dropped(hook)`: it was not
    told."""

    routes: Callable[[], Collection[str]] = lambda: ()
    log: Callable[[str], None] = lambda text: None
    took: Callable[[str, float], None] = lambda hook, seconds: None
    failed: Callable[[str, str], None] = lambda hook, why: None
    raised: Callable[[str], None] = lambda place: None
    dropped: Callable[[str], None] = lambda hook: None


class Means(NamedTuple):
    """In a worker all of it, on the command line as far as it is there. `hostname`: ours; `counters`, `named`: where it is
    counted; `warn(text)`: something is wrong; `matched(mail, rule)`: a rule about mail matches; `triplets(stale)`: those of
    greylisting, see there; `hooks`: what those in Python use."""

    hostname: str = ""
    resolver: "Resolver | None" = None
    counters: "Counters | None" = None
    named: "Named | None" = None
    warn: Callable[[str], None] = lambda text: None
    matched: "Callable[[Mail, str], None]" = lambda mail, rule: None
    hooks: HookMeans = HookMeans()
    triplets: "Callable[[Callable[[int, int, int], bool]], Triplets] | None" = None
