"""What the files of a configuration say together: a key has the value of the last file that gives it, tables that can be given
several times follow each other."""

from typing import Any

from pydantic import BaseModel

from relaymta.config.values import Place, is_list, model_of
from relaymta.toml import Source

__all__ = ["Merged", "merge_files"]


class Merged:
    """`data`: the content of all files, which are numbered as they are read. `given`: the numbers of the files that give a key,
    for each that several give: the one whose value counts first, then the others. `moved`: how many rows of a table that can be
    given several times stand before those of a file."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.given: dict[Place, list[int]] = {}
        self.moved: dict[tuple[int, Place], int] = {}

    def place(self, number: int, place: Place) -> Place:
        """The place in `data` of what is at `place` in a file."""
        for end in range(1, len(place)):
            index, moved = place[end], self.moved.get((number, place[:end]), 0)
            if moved and isinstance(index, int):
                return (*place[:end], index + moved, *place[end + 1 :])
        return place

    def several(self, place: Place) -> Place:
        """The key that several files give, of those that a place is in; () where there is none."""
        return next((place[:end] for end in range(1, len(place) + 1) if place[:end] in self.given), ())


def merge_files(model: type[BaseModel], sources: list[Source]) -> Merged:
    """What files say together, of which each is parsed and not checked otherwise. A key whose value is no table where there must
    be one, in any of the files, has that value, so that the check finds it."""
    merged = Merged()
    merged.data = _table(merged, model, (), [(number, source.data) for number, source in enumerate(sources)])
    return merged


def _table(merged: Merged, model: type[BaseModel], place: Place, parts: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    names = dict.fromkeys(name for _, part in parts for name in part)
    types = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: _value(merged, types.get(name), (*place, name), [(n, part[name]) for n, part in parts if name in part])
        for name in names
    }


def _value(merged: Merged, annotation: Any, place: Place, given: list[tuple[int, Any]]) -> Any:
    table, several = model_of(annotation), is_list(annotation)
    decides = given[-1]
    if table is not None:
        decides = next((pair for pair in given if not isinstance(pair[1], list if several else dict)), (-1, None))
    if decides[0] >= 0:
        if len(given) > 1:
            merged.given[place] = [decides[0], *(number for number, _ in given if number != decides[0])]
        return decides[1]
    if not several:
        assert table is not None
        return _table(merged, table, place, given)
    rows: list[Any] = []
    for number, value in given:
        merged.moved[number, place] = len(rows)
        rows += value
    return rows
