"""Attempts by site, as one worker counts them for /metrics: the supervisor takes them now and then, and adds them up."""

from relaymta.metrics import SITE_RESULTS
from relaymta.proto.envelope import PERMANENT, SUCCESS, TRANSIENT

__all__ = ["Tally"]

MOST = 2000  # sites between two times that they are taken; the others' attempts are counted under ""
_PLACE = {SUCCESS: 0, TRANSIENT: 1, PERMANENT: 2}  # in SITE_RESULTS


class Tally:
    """Counts of one worker since they were taken last."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}

    def add(self, site: str, kind: str, recipients: int) -> None:
        """An attempt at a site ("": unknown) has this result for so many recipients."""
        found = self._counts.get(site)
        if found is None:
            if len(self._counts) >= MOST:
                site = ""
            found = self._counts.setdefault(site, [0] * len(SITE_RESULTS))
        found[_PLACE[kind]] += recipients

    def take(self) -> list[tuple[str, list[int]]]:
        """(site, counts by SITE_RESULTS) of all that have any, which are counted from 0 again."""
        taken, self._counts = self._counts, {}
        return list(taken.items())
