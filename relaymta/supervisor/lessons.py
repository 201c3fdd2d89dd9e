"""Which texts filters have learned, as spam or as none (filter/lessons.py): for the whole machine, and across restarts.

On the loop: changed by `learned` alone, copied by `dump`.
"""

from collections import OrderedDict

from relaymta.filter.lessons import KEY

__all__ = ["Lessons"]

MOST = 100_000  # texts; beyond that those learned first are forgotten, and filters say themselves that they know them
_ROW = KEY + 1


class Lessons:
    """See above. `octets`: what `dump` has returned before; b"", or what is none: nothing is known."""

    def __init__(self, octets: bytes) -> None:
        self._learned: OrderedDict[bytes, bool] = OrderedDict()
        for at in range(0, len(octets) - _ROW + 1, _ROW):
            self._learned[octets[at : at + KEY]] = bool(octets[at + KEY])
        self.changed = False

    def known(self, keys: list[bytes], spam: bool) -> list[bool]:
        """Of each key, whether it was last learned as this."""
        return [self._learned.get(key) is spam for key in keys]

    def learned(self, key: bytes, spam: bool) -> None:
        """A filter has learned it."""
        self._learned.pop(key, None)
        self._learned[key] = spam
        self.changed = True
        if len(self._learned) > MOST:
            self._learned.popitem(last=False)

    async def dump(self) -> bytes:
        """All of it, to be stored."""
        self.changed = False
        return b"".join(key + bytes([spam]) for key, spam in self._learned.items())
