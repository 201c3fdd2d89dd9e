"""Lists of domains and of networks, as match_list(3) reads them: patterns, `!pattern`, `/file` and type:table."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.lines import Place, tokens
from relaymta.cli.postfix.maps import Expressions, Indexed, Static, Table, Unreadable, opened

__all__ = ["Item", "MatchList", "read_list"]


class Item(NamedTuple):
    """A member of a list: a pattern, or a table whose keys are. `negated`: what matches it is not in the list."""

    negated: bool
    pattern: str
    table: Table | None
    place: Place


class MatchList:
    """A list; the first item that matches decides. `parents`: whether a domain in it matches what is below it, too; `stand_in`: a
    domain that is in it for those that are not known, "" for none."""

    def __init__(self, items: list[Item], parents: bool = False) -> None:
        self.items, self.parents, self.stand_in = items, parents, ""

    def match(self, name: str) -> Place | None:
        """Where the item is by which a domain is in the list; None: it is not."""
        name = name.lower()
        if name == self.stand_in:
            return next(item.place for item in self.items if item.table in self.opaque)
        found = [(at, self.items[at].place) for at in (self._patterns.get(key) for key in self._keys(name)) if at is not None]
        for at, item in self._tables:
            entry = next(
                (one for one in (item.table.get(key, key != name) for key in self._keys(name) if item.table) if one), None
            )
            found += [(at, entry.place)] if entry is not None else []
        if not found:
            return None
        first, place = min(found)
        return None if self.items[first].negated else place

    @cached_property
    def _patterns(self) -> dict[str, int]:
        """Where the first item with each pattern is."""
        found: dict[str, int] = {}
        for at, item in enumerate(self.items):
            if item.table is None:
                found.setdefault(item.pattern, at)
        return found

    @cached_property
    def _tables(self) -> list[tuple[int, Item]]:
        return [(at, item) for at, item in enumerate(self.items) if item.table is not None]

    dotted = False  # whether ".example" in it matches what is below

    def _keys(self, name: str) -> Iterator[str]:
        yield name
        rest = name
        while (self.parents or self.dotted) and "." in rest[1:]:
            rest = rest[rest.index(".", 1) :]
            yield rest[1:] if self.parents else rest
            if self.parents:
                rest = rest[1:]

    def names(self) -> Iterator[tuple[str, Place]]:
        """The patterns and keys in it, in lower case, negated ones, too, each with its place."""
        if self.stand_in:
            yield self.stand_in, next(item.place for item in self.items if item.table in self.opaque)
        for item in self.items:
            if item.table is None:
                yield item.pattern, item.place
            elif isinstance(item.table, Indexed):
                yield from ((entry.key.lower(), entry.place) for entry in item.table.entries)

    @property
    def opaque(self) -> list[Table]:
        """Tables in it whose members are not known one by one."""
        return [item.table for item in self.items if isinstance(item.table, Unreadable | Expressions | Static)]

    @property
    def unreadable(self) -> list[Unreadable]:
        """Tables in it that could not be read."""
        return [item.table for item in self.items if isinstance(item.table, Unreadable)]

    def __bool__(self) -> bool:
        return bool(self.items)


class DomainList(MatchList):
    """A list of domains in which ".example" means what is below, where `parents` does not hold."""

    dotted = True


def read_list(files: Files, text: str, place: Place, parents: bool | None = None) -> MatchList:
    """A list. `parents`: of domains, whether one in it matches what is below it; None: of strings, which match as they are."""
    items = list(_items(files, text, place, False, set()))
    return MatchList(items) if parents is None else DomainList(items, parents)


def _items(files: Files, text: str, place: Place, negated: bool, read: set[tuple[str, bool]]) -> Iterator[Item]:
    """`read`: the files that were read, and whether negated: a second time their members would decide nothing."""
    for word in tokens(text):
        bare = word.lstrip("!")
        no = negated != ((len(word) - len(bare)) % 2 == 1)
        if bare.startswith("/"):
            if (bare, no) not in read:
                read.add((bare, no))
                yield from _of_file(files, bare, place, no, read)
        elif ":" in bare and not bare.startswith("["):
            yield Item(no, bare, opened(files, bare, place), place)
        elif bare:
            yield Item(no, bare.lower(), None, place)


def _of_file(files: Files, path: str, place: Place, negated: bool, read: set[tuple[str, bool]]) -> Iterator[Item]:
    try:
        lines = files.lines(path)
    except OSError as error:
        yield Item(negated, path, Unreadable(path, place, f"{files.shown(path)}: {error.strerror}"), place)
        return
    for at, line in lines:
        yield from _items(files, line.text, at, negated, read)
