"""How many octets of large messages are in memory while they are given to mailboxes."""

from collections import deque
from collections.abc import Callable
from functools import partial

from relaymta.reservation import Reservation

__all__ = ["Filing"]

MOST_OCTETS = 64 << 20


class Filing:
    """They take their turns in the order in which they came. `most`: octets at once, or one message of any size; `octets`: of
    those whose turn it is."""

    def __init__(self, most: int = MOST_OCTETS) -> None:
        self.octets = 0
        self._most = most
        self._waiting: deque[tuple[int, Callable[[Reservation], None]]] = deque()

    def take(self, octets: int, begin: Callable[[Reservation], None]) -> None:
        """Call `begin(place)` when it is the turn of a message of so many octets, which lasts until the place is given back. It
        must not raise."""
        self._waiting.append((octets, begin))
        self._next()

    def _next(self) -> None:
        while self._waiting and (not self.octets or self.octets + self._waiting[0][0] <= self._most):
            octets, begin = self._waiting.popleft()
            self.octets += octets
            begin(Reservation(partial(self._leave, octets)))

    def _leave(self, octets: int) -> None:
        self.octets -= octets
        self._next()
