"""Where each key of a configuration was given: the line of the file, or the command line."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from relaymta.config.values import Place, dotted

__all__ = ["Origin", "key_at"]

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")
_HEAD = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")


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
            found = self._lines.get(place, 0) or self._lines.get((*place, 0), 0)
            if found:
                return found
            place = place[:-1]
        return 0


def key_at(text: str, line: int) -> str:
    """The dotted key that is given in a line of a TOML file; "" where there is none."""
    return next((dotted(place) for place, number in _keys(text) if number == line), "")


def _positions(text: str) -> dict[Place, int]:
    """The line number of every key and table of a TOML file, by path: the first of each."""
    found: dict[Place, int] = {}
    for place, number in _keys(text):
        found.setdefault(place, number)
    return found


def _keys(text: str) -> Iterator[tuple[Place, int]]:
    """(path, line number) of every key and table of a TOML file, in order. Lines within multi-line values may add entries, which
    are harmless."""
    counts: dict[str, int] = {}
    table: Place = ()
    for number, line in enumerate(text.split("\n"), 1):
        head = _HEAD.match(line)
        if head is not None:
            name = head[2].strip()
            parts: Place = tuple(part.strip().strip("\"'") for part in name.split("."))
            if head[1] == "[[":
                parts = (*parts, counts.get(name, 0))
                counts[name] = counts.get(name, 0) + 1
            elif parts[0] in counts:  # [route.oauth]: it belongs to the last [[route]]
                parts = (parts[0], counts[str(parts[0])] - 1, *parts[1:])
            table = parts
            yield table, number
            continue
        key = _KEY.match(line)
        if key is not None:
            yield (*table, *(part.strip().strip("\"'") for part in key[1].split("."))), number
