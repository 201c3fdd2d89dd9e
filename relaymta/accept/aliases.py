"""The aliases of this machine, in the file form of Sendmail (aliases(5)): to whom mail for its users and functions goes.

    name: target, target ...     a line that begins with a blank goes on with the one before; # begins a line of no meaning

A target is an address, a name (an alias, or who it is at this machine; behind a backslash it is no alias), or :include:/path, a
file of more targets. Programs and files, which others have as targets, too, are refused: mail to them would run as the relay's
user.

What is wrong in the file itself is an error. An included file may be somebody else's: one that is wrong, or not there, is a
warning, and what was read of it before stays in use. Where there is nothing, mail for the aliases that lead there has to wait.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from relaymta.errors import ConfigError
from relaymta.files import Unreadable, read_text
from relaymta.proto.address import comparable, domain_of, plain
from relaymta.proto.transaction import NO_NAMES

__all__ = ["UNKNOWN_ALIAS", "Aliases", "read"]

DEEPEST = 20  # aliases of aliases, files that include files
MOST = 5000  # addresses that an alias leads to, or those of a message's recipients together
PROBLEMS_MOST = 20
INCLUDE = ":include:"
INCLUDED_OCTETS = 1 << 20  # of a file
WAITS = "mail for what leads there waits (451)"
UNKNOWN_ALIAS: Final = -1  # instead of a number of addresses: it is not known now


class _Target(NamedTuple):
    """`word`: an address, or a name; `final`: it is no alias."""

    word: str
    final: bool


_MISSING = _Target("", True)  # those of an included file of which nothing is known


class Aliases:
    """`files`: all that were read; `troubles`: what is wrong with those that are included; `lists`: what these have, by their
    paths. The targets of each name are addresses, and names without a domain that are no aliases."""

    def __init__(
        self, domains: frozenset[str], targets: dict[str, list[str]], files: list[str], troubles: list[str],
        lists: dict[str, list[_Target]],
    ) -> None:  # fmt: skip
        """`domains`: those whose addresses are looked up here."""
        self._domains = domains
        self._unknown = frozenset(name for name, found in targets.items() if _MISSING.word in found)
        self._targets = {name: found for name, found in targets.items() if name not in self._unknown}
        self.files, self.troubles, self.lists = files, troubles, lists

    def leads(self, address: str, named: bool = False) -> int:
        """To how many addresses an address leads; 0: it is no alias; UNKNOWN_ALIAS: one of a list that is not known. `named`: it
        was given as a name, without its domain."""
        found = self._of(address, named)
        if found is None:
            own = named or domain_of(address) in self._domains
            return UNKNOWN_ALIAS if own and _name(address) in self._unknown else 0
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
    included files are `troubles`. `before`: what was read before, with the lists that stay in use where theirs are wrong now."""
    own = frozenset(domain.lower() for domain in domains)
    reader = _Reader(own, before.lists if before is not None else {})
    targets = reader.flat(reader.table(path))
    if reader.problems:
        raise ConfigError(list(dict.fromkeys(reader.problems))[:PROBLEMS_MOST])
    return Aliases(own, targets, reader.files, list(dict.fromkeys(reader.troubles))[:PROBLEMS_MOST], reader.lists)


class _Reader:
    """Reads the files, and collects what is wrong with them: `problems` in the first one, `troubles` by those that are included.
    `lists`: what these have, by their paths: each is read once."""

    def __init__(self, domains: frozenset[str], before: dict[str, list[_Target]]) -> None:
        self._domains = domains
        self._before = before
        self.problems: list[str] = []
        self.troubles: list[str] = []
        self.files: list[str] = []
        self.lists: dict[str, list[_Target]] = {}
        self._including: set[str] = set()  # names whose targets are not those of the first file alone

    def table(self, path: str) -> dict[str, list[_Target]]:
        """The targets of each name, as they are written."""
        found: dict[str, list[_Target]] = {}
        for place, line in self._lines(path, "local.aliases"):
            name, colon, value = _divided(line)
            if not colon or not name or "@" in name or any(one.isspace() for one in name):
                self.problems.append(f"{place}: {line[:80]!r} is not of the form `name: target, target`")
            elif name.lower() in found:
                self.problems.append(f"{place}: {name!r} is there twice")
            else:
                found[name.lower()] = self._own(name.lower(), value, place, path)
        return found

    def _own(self, name: str, value: str, place: str, path: str) -> list[_Target]:
        """The targets in a line of the first file."""
        if not any(word.lower().startswith(INCLUDE) for word in _words(value)):
            return self._bounded(self._targets(value, place, [path]), place)
        self._including.add(name)
        found: dict[_Target, None] = {}
        for one in self._targets(value, place, [path]):
            found[one] = None
            if len(found) > MOST:  # each of the files has less
                self.troubles.append(f"{place}: leads to more than {MOST} addresses; {WAITS}")
                return [_MISSING]
        return list(found)

    def _lines(self, path: str, what: str) -> Iterator[tuple[str, str]]:
        """(place, line) of each logical line."""
        self.files.append(path)
        try:
            lines = _text(path, INCLUDED_OCTETS if len(self.files) > 1 else 0).splitlines()
        except OSError as error:
            self.problems.append(f"{what}: {path}: {error.strerror}")
            return
        place, text = "", ""
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            if line[0] in " \t":
                text += " " + line.strip()
                continue
            if text:
                yield place, text
            place, text = f"{path}:{number}", line.strip()
        if text:
            yield place, text

    def _targets(self, value: str, place: str, way: list[str]) -> Iterator[_Target]:
        """The targets in a list of them, those of included files among them. `way`: the files that lead there."""
        for word in dict.fromkeys(_words(value)):
            if word.lower().startswith(INCLUDE):
                yield from self._included(word[len(INCLUDE) :].strip(), place, way)
            elif word.startswith(("|", "/")):
                what = "a program" if word[0] == "|" else "a file"
                instead = "keep it in a mailbox, or send it on to a host that does this"
                self.problems.append(f"{place}: {word[:80]!r}: no mail is given to {what}: {instead}")
            elif "@" in word:
                address = plain(word)
                if address is None:
                    self.problems.append(f"{place}: {word[:80]!r} is no address")
                elif domain_of(word) in self._domains:
                    yield _Target(comparable(word).rpartition("@")[0], False)
                else:
                    yield _Target(address, True)
            elif not word.isprintable() or any(one in word for one in ' "<>,:;()'):
                self.problems.append(f"{place}: {word[:80]!r} is neither an address nor a name")
            else:
                yield _Target(word.removeprefix("\\").lower(), word.startswith("\\"))

    def _included(self, path: str, place: str, way: list[str]) -> Iterator[_Target]:
        if not path.startswith("/"):
            self.problems.append(f"{place}: {INCLUDE}{path}: expected the whole path of a file")
        elif path in way:
            self.problems.append(f"{place}: a circle: {' -> '.join([*way[way.index(path) :], path])}")
        elif len(way) > DEEPEST:
            self.problems.append(f"{place}: files include others more than {DEEPEST} deep")
        else:
            if path not in self.lists:
                self.lists[path] = self._list(path, place, way)
            yield from self.lists[path]

    def _list(self, path: str, place: str, way: list[str]) -> list[_Target]:
        """The targets in an included file; where something is wrong with it, those that it had before."""
        outside, self.problems = self.problems, []
        try:
            inner = (one for where, line in self._lines(path, place) for one in self._targets(line, where, [*way, path]))
            found = self._bounded(inner, place)
            if not self.problems:
                return found
            before = self._before.get(path, [_MISSING])
            instead = WAITS if _MISSING in before else "what was read before stays in use"
            self.troubles += [f"{one}; {instead}" for one in self.problems]
            return before
        finally:
            self.problems = outside

    def _bounded(self, targets: Iterator[_Target], place: str) -> list[_Target]:
        """Targets, each once; a problem where there are more than MOST: lists of lists may grow without end."""
        found: dict[_Target, None] = {}
        for one in targets:
            found[one] = None
            if len(found) > MOST:
                self.problems.append(f"{place}: leads to more than {MOST} addresses")
                break
        return list(found)

    def flat(self, table: dict[str, list[_Target]]) -> dict[str, list[str]]:
        """What each name leads to in the end."""
        done: dict[str, list[str]] = {}
        for name in table:
            self._flatten(name, table, done, [])
        return done

    def _flatten(self, name: str, table: dict[str, list[_Target]], done: dict[str, list[str]], way: list[str]) -> list[str]:
        if name in done:
            return done[name]
        if name in way:
            circle = way[way.index(name) :]
            return self._wrong(circle, f"a circle: {' -> '.join([*circle, name])}")
        if len(way) > DEEPEST:
            return self._wrong(way, f"{way[0]} leads to others more than {DEEPEST} deep")
        found: dict[str, None] = {}
        for word, final in table[name]:
            if final or word == name or word not in table:  # `root: root, ann@x.example`: also root's own
                found[word] = None
            else:
                found |= dict.fromkeys(self._flatten(word, table, done, [*way, name]))
                self._including |= {name} if word in self._including else set()
        if len(found) > MOST:
            found = dict.fromkeys(self._wrong([name], f"{name} leads to more than {MOST} addresses"))
        elif not found and not table[name] and not self.problems:
            found = dict.fromkeys(self._wrong([name], f"{name} leads to nobody"))
        done[name] = list(found)
        return done[name]

    def _wrong(self, names: Iterable[str], what: str) -> list[str]:
        """What there is instead of the addresses of an alias that is wrong: a list that one of `names` includes may be the
        reason."""
        if self._including.isdisjoint(names):
            self.problems.append(f"local.aliases: {what}")
            return []
        self.troubles.append(f"local.aliases: {what}; {WAITS}")
        return [_MISSING.word]


def _text(path: str, most: int) -> str:
    """The text of a file of at most so many octets (0: any number). OSError: it is no such file, as of `read_text`. A pipe, which
    whoever may write an included file could put in its place, keeps nobody waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable(path, "is not a plain file")
        if most and found.st_size > most:
            raise Unreadable(path, f"has more than {most} octets")
        return read_text(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _divided(line: str) -> tuple[str, str, str]:
    """(name, colon, value) of a line; the name may be in quotes."""
    if line.startswith('"'):
        name, quote, rest = line[1:].partition('"')
        rest = rest.lstrip()
        return (name, ":", rest[1:]) if quote and rest.startswith(":") else (line, "", "")
    name, colon, value = line.partition(":")
    return name.strip(), colon, value


def _words(value: str) -> Iterator[str]:
    """The parts between commas outside of quotes; those around a part are taken away."""
    word, inside, at = "", False, 0
    while at <= len(value):
        one = value[at] if at < len(value) else ","
        at += 1
        if one == "\\" and inside and at < len(value):
            word += value[at - 1 : at + 1]
            at += 1
        elif one == "," and (not inside or at > len(value)):
            word = word.strip()
            if word[:1] == word[-1:] == '"' and len(word) > 1:
                word = word[1:-1]
            if word:
                yield word
            word = ""
        else:
            inside ^= one == '"'
            word += one
