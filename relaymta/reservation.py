"""Units of limits, held by one owner."""

from collections.abc import Callable

__all__ = ["Reservation"]


class Reservation:
    """Units that were taken from a limit. They are given back once: by `give_back`, at the end of a `with` block, or when the
    object is dropped. `keep` makes them its owner's for good."""

    __slots__ = ("_give",)

    def __init__(self, give: Callable[[], object]) -> None:
        """`give()` gives the units back."""
        self._give: Callable[[], object] | None = give

    @property
    def held(self) -> bool:
        """Whether the units are still to be given back."""
        return self._give is not None

    def give_back(self) -> None:
        """Give the units back. Further calls do nothing."""
        give, self._give = self._give, None
        if give is not None:
            give()

    def keep(self) -> None:
        """Never give the units back."""
        self._give = None

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()

    __del__ = give_back
