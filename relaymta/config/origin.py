"""Where each key of a configuration was given: the line of the file, or the command line."""

from collections.abc import Collection
from pathlib import Path

from relaymta.config.values import Place, dotted
from relaymta.toml import keys_of

__all__ = ["Origin"]


class Origin:
    """The file and the options that a configuration was read from. `path`: None without a file; `text`: its content;
    `overrides`: the dotted keys given on the command line."""

    def __init__(self, path: Path | None = None, text: str = "", overrides: Collection[str] = ()) -> None:
        self._path, self._text = path, text
        self._overrides = list(overrides)
        self._lines: dict[Place, int] | None = None

    def __eq__(self, other: object) -> bool:
        """Equal to any other: where its values were given does not distinguish a configuration."""
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def is_option(self, key: str) -> bool:
        """Whether a key was given on the command line as a whole."""
        return key in self._overrides

    def sentence(self, place: Place, what: str) -> str:
        """`file:line: key: what`, or where else the key was given."""
        key = dotted(place)
        if any(key == given or key.startswith(given + ".") for given in self._overrides):
            return f"command line: {key}: {what}"
        line = self.line(place)
        where = f"{self._path}:{line}: " if line else f"{self._path}: " if self._path else ""
        return f"{where}{key}: {what}" if key else f"{where}{what}"

    def line(self, place: Place) -> int:
        """The line of a key; of the table that it is missing in; 0 where there is none."""
        if self._lines is None:
            self._lines = _positions(self._text)
        while place:
            if found := self._lines.get(place, 0):
                return found
            place = place[:-1]
        return 0


def _positions(text: str) -> dict[Place, int]:
    """The line number of every key and table of a TOML file, by path: the first of each. What has no line of its own, as `route`
    where only [route.0] is there, has that of the first below it."""
    found: dict[Place, int] = {}
    above: dict[Place, int] = {}
    for place, number in keys_of(text):
        found.setdefault(place, number)
        for end in range(1, len(place)):
            above.setdefault(place[:end], number)
    return above | found
