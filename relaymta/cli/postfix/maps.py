"""Lookup tables of Postfix, as far as their source text is there: type:name (DATABASE_README)."""

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.lines import Place, tokens, without_braces
from relaymta.cli.postfix.patterns import Rule, read_rules

__all__ = ["Entry", "Expressions", "Indexed", "Maps", "Networks", "Static", "Table", "Unreadable", "opened"]

DEEPEST = 10  # tables in tables
INDEXED = ("hash", "btree", "lmdb", "dbm", "sdbm", "cdb", "texthash")
DATABASES = ("ldap", "mysql", "pgsql", "sqlite", "mongodb", "memcache", "tcp", "socketmap", "nis", "nisplus", "netinfo")


class Entry(NamedTuple):
    """A key and its value, and where they are."""

    key: str
    value: str
    place: Place


class Table(Protocol):
    """A lookup table. `spec`: type:name, as it is named at `place`."""

    spec: str
    place: Place

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """The entry for a key; None: there is none. `partial`: the key is a part of an address, which expressions are not asked
        about."""
        ...


class Indexed:
    """Keys and values: of hash:, texthash: and the like, and of inline:. Of a key that is there twice the first counts."""

    def __init__(self, spec: str, place: Place, entries: list[Entry]) -> None:
        self.spec, self.place = spec, place
        self._by_key: dict[str, Entry] = {}
        for entry in entries:
            self._by_key.setdefault(entry.key.lower(), entry)

    @property
    def entries(self) -> list[Entry]:
        """All of them, in their order."""
        return list(self._by_key.values())

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table."""
        return self._by_key.get(key.lower())


class Expressions:
    """Regular expressions, of which the first that matches counts: pcre: and regexp:. `left_out`: those that are not asked about
    addresses."""

    def __init__(self, spec: str, place: Place, rules: list[Rule]) -> None:
        self.spec, self.place, self.rules = spec, place, rules
        self.left_out: set[Place] = set()

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table."""
        rules = () if partial else (rule for rule in self.rules if key == "*" or rule.place not in self.left_out)
        found = next((rule for rule in rules if rule.matches(key)), None)
        return None if found is None else Entry(found.text, found.value, found.place)


class Networks:
    """cidr: networks, the first of which that has an address counts. `rows`: (network, None: one that is not understood; negated;
    entry)."""

    def __init__(self, spec: str, place: Place, rows: list[tuple[str | None, bool, Entry]]) -> None:
        self.spec, self.place, self.rows = spec, place, rows

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table."""
        try:
            address = ipaddress.ip_address(key)
        except ValueError:
            return None
        for text, negated, entry in self.rows:
            network = ipaddress.ip_network(text) if text is not None else None
            if network is not None and network.version == address.version and (address in network) != negated:
                return entry
        return None


class Static:
    """static: the same value for every key."""

    def __init__(self, spec: str, place: Place, value: str) -> None:
        self.spec, self.place, self.value = spec, place, value

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table."""
        return Entry(key, self.value, self.place)


class Union:
    """unionmap: what several tables have, joined by commas."""

    def __init__(self, spec: str, place: Place, tables: "list[Table]") -> None:
        self.spec, self.place, self.tables = spec, place, tables

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table."""
        found = [entry for entry in (table.get(key, partial) for table in self.tables) if entry is not None]
        return Entry(key, ",".join(entry.value for entry in found), found[0].place) if found else None


class Unreadable:
    """A table whose content is not there: a database, a service, or a file that is missing. `why`: a sentence."""

    def __init__(self, spec: str, place: Place, why: str) -> None:
        self.spec, self.place, self.why = spec, place, why

    def get(self, key: str, partial: bool = False) -> Entry | None:
        """As of Table: nothing is known."""
        return None


class Maps:
    """The tables of a parameter, each of which is asked about one key before the next key is looked up."""

    def __init__(self, tables: list[Table]) -> None:
        self.tables = tables

    def find(self, key: str, partial: bool = False) -> Entry | None:
        """The first entry for a key."""
        return next((entry for entry in (table.get(key, partial) for table in self.tables) if entry is not None), None)

    def flat(self) -> Iterator[Table]:
        """The tables, those within others by themselves."""
        yield from _flat(self.tables)

    @property
    def entries(self) -> list[Entry]:
        """The keys and values of all tables that have keys, in their order; of a key only the first."""
        found: dict[str, Entry] = {}
        for table in self.flat():
            for entry in table.entries if isinstance(table, Indexed) else ():
                found.setdefault(entry.key.lower(), entry)
        return list(found.values())

    @property
    def rules(self) -> list[Rule]:
        """The regular expressions of all tables, in their order."""
        return [rule for table in self.flat() if isinstance(table, Expressions) for rule in table.rules]

    @property
    def unreadable(self) -> list[Unreadable]:
        """Those whose content is not known."""
        return [table for table in self.flat() if isinstance(table, Unreadable)]

    def __bool__(self) -> bool:
        return bool(self.tables)


def _flat(tables: list[Table]) -> Iterator[Table]:
    for table in tables:
        if isinstance(table, Union):
            yield from _flat(table.tables)
        else:
            yield table


def opened(files: Files, spec: str, place: Place, depth: int = 0) -> Table:
    """A table by its type:name. `depth`: of the tables that it is in."""
    while spec.startswith("proxy:"):
        spec = spec.removeprefix("proxy:")
    kind, colon, name = spec.partition(":")
    if not colon:
        return Unreadable(spec, place, "it is no type:name, and Postfix does not take it")
    try:
        if kind in INDEXED:
            return Indexed(spec, place, _pairs(files, name))
        if kind in ("pcre", "regexp"):
            return Expressions(spec, place, read_rules(files, name, kind))
        if kind == "cidr":
            return Networks(spec, place, _networks(files, name))
    except OSError as error:
        return Unreadable(spec, place, f"{files.shown(name)}: {error.strerror}")
    if kind == "static":
        return Static(spec, place, without_braces(name))
    if kind == "inline":
        return Indexed(spec, place, [_inline(word, place) for word in tokens(without_braces(name))])
    if kind == "unionmap" and depth < DEEPEST:
        return Union(spec, place, [opened(files, word, place, depth + 1) for word in tokens(without_braces(name))])
    what = "a database or service" if kind in DATABASES else f"a table of type {kind}"
    return Unreadable(spec, place, f"{what} is not read")


def _inline(word: str, place: Place) -> Entry:
    key, _, value = without_braces(word).partition("=")
    return Entry(key.strip(), value.strip(), place)


def _pairs(files: Files, name: str) -> list[Entry]:
    """The lines of a text file, as postmap(1) reads them: a key, white space, a value. Lines without a value are left out."""
    found = []
    for place, line in files.lines(name):
        end = _key_end(line.text)
        key, value = line.text[:end], line.text[end:].strip()
        if key and value:
            found.append(Entry(key, value, place))
    return found


def _key_end(text: str) -> int:
    """Where the key of a line ends: at the first white space that is not within quotes."""
    quoted, skip = False, False
    for at, char in enumerate(text):
        if skip:
            skip = False
        elif char == "\\":
            skip = True
        elif char == '"':
            quoted = not quoted
        elif char.isspace() and not quoted:
            return at
    return len(text)


_IF = re.compile(r"(if|endif)\b", re.I)


def _networks(files: Files, name: str) -> list[tuple[str | None, bool, Entry]]:
    """The rows of a cidr table. Those within if ... endif have None as their network: they depend on more than one."""
    found: list[tuple[str | None, bool, Entry]] = []
    depth = 0
    for place, line in files.lines(name):
        word = _IF.match(line.text)
        if word is not None:
            depth = max(0, depth + (1 if word[1].lower() == "if" else -1))
            continue
        bare = line.text.lstrip("! \t")
        pattern, *rest = bare.split(None, 1)
        negated = line.text[: len(line.text) - len(bare)].count("!") % 2 == 1
        try:
            network: str | None = str(ipaddress.ip_network(pattern.strip("[]").replace("]/", "/")))
        except ValueError:
            network = None
        found.append((None if depth else network, negated, Entry(pattern, "".join(rest).strip(), place)))
    return found
