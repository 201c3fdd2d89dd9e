"""Where each key of a configuration was given: the line of a file, or the command line."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from relaymta.config.merging import Merged
from relaymta.config.values import Place, dotted
from relaymta.toml import Source, keys_of

__all__ = ["Origin", "Spot"]


class Spot(NamedTuple):
    """A line of a file: the number of the file, and that of the line; (-1, 0): none."""

    file: int
    line: int


NOWHERE = Spot(-1, 0)


class Origin:
    """The files and the options that a configuration was read from. `path`: the configuration file, None without one; `sources`:
    it and the files read after it, which say together what `merged` has; `overrides`: the dotted keys given on the command
    line."""

    def __init__(
        self,
        path: Path | None = None,
        sources: Sequence[Source] = (),
        merged: Merged | None = None,
        overrides: Collection[str] = (),
    ) -> None:
        self._path, self._sources = path, sources
        self._merged = Merged() if merged is None else merged
        self._overrides = list(overrides)
        self._found: tuple[dict[Place, Spot], dict[Place, list[Spot]]] | None = None

    def __eq__(self, other: object) -> bool:
        """Equal to any other: where its values were given does not distinguish a configuration."""
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    @property
    def files(self) -> list[Path]:
        """The files, in the order in which they are read."""
        return [source.path for source in self._sources]

    def is_option(self, key: str) -> bool:
        """Whether a key was given on the command line as a whole."""
        return key in self._overrides

    def is_overridden(self, place: Place) -> bool:
        """Whether the value of a key is that of the command line."""
        key = dotted(place)
        return any(key == given or key.startswith(given + ".") for given in self._overrides)

    def sentence(self, place: Place, what: str, other: Place = ()) -> str:
        """`file:line: key: what`, or where else the key was given; behind that where other files give it, and where `other` is,
        the key that it does not go with, if that is in another file."""
        key = dotted(place)
        if self.is_overridden(place):
            return f"command line: {key}: {what}"
        spot, beside = self.spot(place), NOWHERE if self.is_overridden(other) else self.spot(other)
        if others := self.others(place):
            what += f" (also in {', '.join(map(self.named, others))})"
        if beside.line and beside.file != spot.file:
            what += f" (the other: {self.named(beside)})"
        where = f"{self.named(spot)}: " if spot.line else f"{self._path}: " if self._path else ""
        return f"{where}{key}: {what}" if key else f"{where}{what}"

    def named(self, spot: Spot) -> str:
        """A line as `file:line`."""
        return f"{self._sources[spot.file].path}:{spot.line}"

    def spot(self, place: Place) -> Spot:
        """The line of a key; of the table that it is missing in; NOWHERE where there is none. Of a key that several files give:
        of the one whose value counts."""
        while place:
            if found := self._spots()[0].get(place):
                return found
            place = place[:-1]
        return NOWHERE

    def others(self, place: Place) -> list[Spot]:
        """The lines of a key, or of what it is a part of, in files whose values of it do not count."""
        return self._spots()[1].get(self._merged.several(place), [])

    def shortened(self) -> Iterator[tuple[Place, str]]:
        """A sentence about each list of values that lacks some which an earlier file gives."""
        for place, (last, *earlier) in self._merged.given.items():
            kept = _value(self._sources[last].data, place)
            lists = [_value(self._sources[number].data, place) for number in earlier]
            if isinstance(kept, list) and not self.is_overridden(place):
                lost = [str(one) for values in lists if isinstance(values, list) for one in values if one not in kept]
                if lost:
                    yield place, f"this list takes the place of an earlier one: without {', '.join(dict.fromkeys(lost))}"

    def _spots(self) -> tuple[dict[Place, Spot], dict[Place, list[Spot]]]:
        """The line of every key and table, by place: the first of each; and, for keys that several files give, those whose values
        do not count. What has no line of its own, as `route` where only [route.0] is there, has that of the first below it."""
        if self._found is None:
            found: dict[Place, Spot] = {}
            above: dict[Place, Spot] = {}
            others: dict[Place, list[Spot]] = {}
            for file, source in enumerate(self._sources):
                for place, line in keys_of(source.text):
                    place, spot = self._merged.place(file, place), Spot(file, line)
                    key = self._merged.several(place)
                    if key and self._merged.given[key][0] != file:
                        known = others.setdefault(key, [])
                        known += [spot] if not known or known[-1].file != file else []
                        continue
                    found.setdefault(place, spot)
                    for end in range(1, len(place)):
                        above.setdefault(place[:end], spot)
            self._found = above | found, others
        return self._found


def _value(data: Any, place: Place) -> Any:
    for part in place:
        data = data[part]
    return data
