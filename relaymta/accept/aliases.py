"""The aliases of this machine, in the file form of Sendmail (aliases(5)): to whom mail for its users and functions goes.

    name: target, target ...     a line that begins with a blank goes on with the one before; # begins a line of no meaning

A target is an address, a name (an alias, or who it is at this machine; behind a backslash it is no alias), or :include:/path, a
file of more targets. Programs and files, which others have as targets, too, are refused: mail to them would run as the relay's
user.

What is wrong in the file itself is an error. An included file may be somebody else's: one that is wrong, or not there, is a
warning, and what was read of it before stays in use. Where there is nothing, mail for the aliases that lead there has to wait.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from relaymta.accept.alias_text import Include, Target, Wrong, divided, lines, targets
from relaymta.accept.included import DEEPEST, MISSING, MOST, REPEATED, WAITS, Lists, Troubles, circle, plain_file, too_much
from relaymta.errors import ConfigError
from relaymta.files import read_text
from relaymta.proto.address import domain_of
from relaymta.proto.transaction import NO_NAMES

__all__ = ["MOST", "UNKNOWN_ALIAS", "Aliases", "read"]

TOGETHER = 1_000_000  # addresses of all aliases without lists, and of those with lists; each counts as often as it is there
WAY = 10 * DEEPEST  # names in a row; from DEEPEST on they are too many, whoever follows them
PROBLEMS_MOST = 20
_UNKNOWN = [MISSING.word]  # instead of the addresses of an alias that leads to a list of which nothing is known
UNKNOWN_ALIAS: Final = -1  # instead of a number of addresses: it is not known now


class Aliases:
    """`files`: all that were read; `troubles`: what is wrong with those that are included; `lists`: what these have, by their
    paths. The targets of each name are addresses, and names without a domain that are no aliases."""

    def __init__(
        self, domains: frozenset[str], targets: dict[str, list[str]], files: list[str], troubles: list[str],
        lists: dict[str, list[Target]],
    ) -> None:  # fmt: skip
        """`domains`: those whose addresses are looked up here."""
        self._domains = domains
        self._unknown = frozenset(name for name, found in targets.items() if found == _UNKNOWN)
        self._targets = {name: found for name, found in targets.items() if name not in self._unknown}
        self.files, self.troubles, self.lists = files, troubles, lists

    def leads(self, address: str, named: bool = False) -> int:
        """To how many addresses an address leads; 0: it is no alias; UNKNOWN_ALIAS: one of a list that is not known. `named`: it
        was given as a name, without its domain."""
        if not named and domain_of(address) not in self._domains:
            return 0
        name = _name(address)
        found = self._targets.get(name)
        if found is None:
            return UNKNOWN_ALIAS if name in self._unknown else 0
        return max(len(found), 1)

    def expanded(self, recipients: list[str], names: Mapping[str, bool] = NO_NAMES) -> list[str]:
        """A message's recipients, with aliases replaced by what they lead to, each address once. The same list when there is
        none. `names`: as of `Transaction.names`."""
        found: list[str] = []
        changed = False
        for address in recipients:
            targets = self._of(address, address in names)
            changed |= targets is not None
            found += [address] if targets is None else targets
            if targets is not None and names.get(address) and domain_of(address) not in self._domains:
                found.append(address)
        return list(dict.fromkeys(found)) if changed else recipients

    def _of(self, address: str, named: bool) -> list[str] | None:
        domain = domain_of(address)
        if domain not in self._domains and not named:
            return None
        targets = self._targets.get(_name(address))
        return None if targets is None else [one if "@" in one else f"{one}@{domain}" for one in targets]


def _name(address: str) -> str:
    return address.rpartition("@")[0].lower()


def read(path: str, domains: Iterable[str], before: Aliases | None = None) -> Aliases:
    """The aliases in a file. ConfigError names each line that is wrong in itself (PROBLEMS_MOST at most), and circles; those of
    included files are `troubles`. `before`: what was read before, with the lists that stay in use where theirs are wrong now.
    Blocks, as of `Lists.read`."""
    own = frozenset(domain.lower() for domain in domains)
    troubles = Troubles()
    problems = _Problems()
    table = _table(path, own, problems)
    lists = Lists(own, before.lists if before is not None else {}, troubles)
    lists.read(table.included)
    flat = _Flat(table, lists, problems, troubles).all()
    problems.end()
    return Aliases(own, flat, [path, *lists.files], troubles.all, lists.found)


class _Problems:
    """What is wrong in the operator's own file."""

    def __init__(self) -> None:
        self._all: dict[str, None] = {}

    def add(self, what: str) -> None:
        """ConfigError with the last one that is named: there may be very many."""
        self._all[what] = None
        if len(self._all) >= PROBLEMS_MOST:
            raise ConfigError([*self._all, "local.aliases: there may be more: only so many are named"])

    def end(self) -> None:
        if self._all:
            raise ConfigError([*self._all])

    def __bool__(self) -> bool:
        return bool(self._all)


class _Table(NamedTuple):
    """What is written in the first file: the targets of each name, and the places of the files that it includes."""

    entries: dict[str, list[Target | Include]]
    included: dict[str, str]


def _table(path: str, domains: frozenset[str], problems: _Problems) -> _Table:
    found = _Table({}, {})
    try:
        text = _text(path)
    except OSError as error:
        problems.add(f"local.aliases: {path}: {error.strerror}")
        return found
    for place, line in lines(path, text):
        name, colon, value = divided(line)
        if not colon or not name or "@" in name or len(name.split(None, 1)) > 1:
            problems.add(f"{place}: {line[:80]!r} is not of the form `name: target, target`")
        elif name.lower() in found.entries:
            problems.add(f"{place}: {name[:80]!r} is there twice")
        else:
            found.entries[name.lower()] = _own(value, domains, place, found, problems)
    return found


def _own(value: str, domains: frozenset[str], place: str, table: _Table, problems: _Problems) -> list[Target | Include]:
    """The targets in a line of the first file."""
    found: dict[Target | Include, None] = {}
    for one in targets(value, domains):
        if isinstance(one, Wrong):
            problems.add(f"{place}: {one.why}")
            continue
        if isinstance(one, Include):
            table.included.setdefault(one.path, place)
        found[one] = None
        if len(found) > MOST:
            problems.add(f"{place}: leads to more than {MOST} addresses")
            break
    return list(found)


class _Flat:
    """What each name leads to in the end. `including`: those whose targets are not those of the first file alone."""

    def __init__(self, table: _Table, lists: Lists, problems: _Problems, troubles: Troubles) -> None:
        self._table, self._lists, self._problems, self._troubles = table.entries, lists, problems, troubles
        self._done: dict[str, list[str]] = {}
        self._heights: dict[str, int] = {}
        self._including: set[str] = set()
        self._counted = {False: 0, True: 0}  # addresses of those that include nothing, and of the others

    def all(self) -> dict[str, list[str]]:
        for name in self._table:
            self._flatten(name, {})
        return self._done

    def _flatten(self, name: str, way: dict[str, None]) -> list[str]:
        """The addresses of a name. `way`: the names that lead there."""
        if name in self._done:
            return self._done[name]
        if name in way:
            found = list(way)
            return self._wrong(found[found.index(name) :], f"a circle: {circle(way, name)}")
        if len(way) > WAY:
            return self._wrong(way, f"{next(iter(way))} leads to others more than {DEEPEST} deep")
        way[name] = None
        words = self._words(name)
        found, wrong = self._gathered(name, words, way)
        del way[name]
        if not wrong and not found and not words and not self._problems:
            wrong = f"{name} leads to nobody"
        self._done[name] = self._wrong([name], wrong) if wrong else found
        return self._done[name]

    def _words(self, name: str) -> list[Target]:
        """The targets of a name, and of the files that it includes: REPEATED + 1 at most."""
        words: list[Target] = []
        for one in self._table[name]:
            if isinstance(one, Target):
                words.append(one)
            else:
                self._including.add(name)
                words += self._lists.targets(one.path)
            if len(words) > REPEATED:
                break
        return words

    def _gathered(self, name: str, words: list[Target], way: dict[str, None]) -> tuple[list[str], str]:
        """The addresses that these lead to, and why they are too many, "" if they are not."""
        gathered: dict[str, None] = {}
        counted, height = 0, 1
        for word, final in words:
            if final or word == name or word not in self._table:  # `root: root, ann@x.example`: also root's own
                gathered[word] = None
                counted += 1
            else:
                alias = self._flatten(word, way)
                self._including |= {name} if word in self._including else set()
                height = max(height, 1 + self._heights.get(word, 1))
                if len(words) == 1 and height <= DEEPEST:
                    self._heights[name] = height
                    return alias, ""  # the same list: it takes no more room
                counted += len(alias) + 1
                if counted <= REPEATED:
                    gathered |= dict.fromkeys(alias)
            if what := too_much(len(gathered), counted):
                return [], f"{name} leads to {what}"
        self._heights[name] = height
        if height > DEEPEST:
            return [], f"{name} leads to others more than {DEEPEST} deep"
        including = name in self._including
        self._counted[including] += counted
        if self._counted[including] > TOGETHER:
            return [], f"{name} leads to too many addresses: with the aliases before it more than {TOGETHER}"
        return _UNKNOWN if MISSING.word in gathered else list(gathered), ""

    def _wrong(self, names: Iterable[str], what: str) -> list[str]:
        """What there is instead of the addresses of an alias that is wrong: a list that one of `names` includes may be the
        reason."""
        if self._including.isdisjoint(names):
            self._problems.add(f"local.aliases: {what}")
            return []
        self._troubles.add(f"local.aliases: {what}; {WAITS}")
        return _UNKNOWN


def _text(path: str) -> str:
    """The text of the first file, of any length. OSError: it is no such file, as of `read_text`."""
    descriptor = plain_file(path)
    try:
        return read_text(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
