"""Parameters of Postfix: main.cf, the `-o` of master.cf, and defaults, as `postconf` shows them."""

import re
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from relaymta.cli.postfix.defaults import DEFAULTS, default_of_any
from relaymta.cli.postfix.expansion import BadExpansion, expand
from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.lines import DEFAULT, Origin, Place, tokens
from relaymta.errors import ConfigError

__all__ = ["Scope", "Setting", "named_in", "read_main", "split_setting"]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
# Times without a unit are in seconds, but for these.
_IN_DAYS = {"maximal_queue_lifetime", "bounce_queue_lifetime"}
_IN_HOURS = {"delay_warning_time"}


class Setting(NamedTuple):
    """A parameter as it is written: `raw`, with `$name` in it. `lines`: (offset in it, number) of the lines that it has."""

    name: str
    raw: str
    place: Place
    lines: tuple[tuple[int, int], ...] = ()

    def place_of(self, word: str) -> Place:
        """The line of a word of the value."""
        at = self.raw.find(word) if word else -1
        number = max((number for start, number in self.lines if start <= at), default=self.place.line)
        return Place(self.place.path, number)


def split_setting(text: str, place: Place, starts: tuple[tuple[int, int], ...] = ()) -> Setting:
    """`name = value`. `starts`: of the lines of the text. ConfigError, as Postfix refuses it."""
    name, equals, value = text.partition("=")
    if not equals:
        word = text.split(None, 1)[0][:60] if text.strip() else ""  # behind it may be a password
        raise ConfigError([f"{place}: {word!r} ...: missing '=' after attribute name"])
    if not name.strip():
        raise ConfigError([f"{place}: missing attribute name"])
    before = len(name) + 1 + len(value) - len(value.lstrip())
    return Setting(name.strip(), value.strip(), place, tuple((start - before, number) for start, number in starts))


def read_main(files: Files) -> dict[str, Setting]:
    """The parameters of main.cf by name; of one that is given twice the last counts. OSError, ConfigError."""
    found: dict[str, Setting] = {}
    for place, line in files.lines(f"{files.home}/main.cf"):
        setting = split_setting(line.text, place, line.starts)
        found.pop(setting.name, None)
        found[setting.name] = setting
    return found


def named_in(raw: str) -> set[str]:
    """The names that a value refers to."""
    return set(re.findall(r"\$[{(]?\s*([A-Za-z0-9_]+)", raw))


class Scope:
    """The parameters that a program of Postfix sees: `overrides` (`-o` of its line in master.cf), then main.cf, then defaults.
    `host`: the name of the machine, where myhostname is not given."""

    def __init__(self, main: Mapping[str, Setting], overrides: Mapping[str, Setting] | None = None, host: str = "") -> None:
        self.main = main
        self.overrides = overrides or {}
        self.host = host or _own_name()
        self._texts: dict[str, str] = {}
        self._under_way = set[str]()

    def within(self, overrides: Mapping[str, Setting]) -> "Scope":
        """The same with the `-o` of another program."""
        return Scope(self.main, overrides, self.host)

    def setting(self, name: str) -> Setting | None:
        """A parameter as it is given; None: it has its default."""
        return self.overrides.get(name) or self.main.get(name)

    def raw(self, name: str) -> str | None:
        """A value as it is written, or as the default is; None: there is no such parameter."""
        setting = self.setting(name)
        if setting is not None:
            return setting.raw
        if name == "myhostname":
            return self.host
        if name == "mydomain":
            host = self.text("myhostname")
            return host.partition(".")[2] or "localdomain"
        return DEFAULTS.get(name, default_of_any(name))

    def text(self, name: str) -> str:
        """The value, with names replaced. BadExpansion."""
        if name in self._under_way:
            raise BadExpansion("names refer to each other in a circle")
        if name not in self._texts:
            self._under_way.add(name)
            try:
                self._texts[name] = expand(self.raw(name) or "", self.raw, self.text).strip()
            except BadExpansion as error:
                raise error.at(f"{self.place(name)}: {name}") from None
            finally:
                self._under_way.discard(name)
        return self._texts[name]

    def place(self, name: str, word: str = "") -> Place:
        """Where it is given, or a word of it, or DEFAULT. Of a value that is another's name (`$virtual_maps`): where that is."""
        seen = set[str]()
        while name not in seen:
            seen.add(name)
            setting = self.setting(name)
            raw = DEFAULTS.get(name, "") if setting is None else setting.raw
            only = re.fullmatch(r"\$\{?([A-Za-z0-9_]+)\}?", raw)
            if only is None or self.setting(only[1]) is None:
                break
            name = only[1]
        return DEFAULT if setting is None else setting.place_of(word)

    def origin(self, name: str, word: str = "") -> Origin:
        """Where it comes from, for a comment."""
        return Origin(self.place(name, word), name)

    def is_given(self, name: str) -> bool:
        """Whether it is in main.cf or the `-o`."""
        return self.setting(name) is not None

    def is_default(self, name: str) -> bool:
        """Whether it has the value that it would have if it were not given."""
        return not self.is_given(name) or self.text(name) == Scope({}, {}, self.host).text(name)

    def yes(self, name: str) -> bool:
        """Whether a parameter is on."""
        return self.text(name).lower() == "yes"

    def number(self, name: str) -> int | None:
        """A whole number; None: it is none."""
        text = self.text(name)
        return int(text) if text.isdecimal() else None

    def seconds(self, name: str) -> int | None:
        """A time; None: it is none."""
        match = re.fullmatch(r"(\d+)\s*([smhdw]?)", self.text(name).lower())
        if match is None:
            return None
        unit = match[2] or ("d" if name in _IN_DAYS else "h" if name in _IN_HOURS else "s")
        return int(match[1]) * _UNITS[unit]

    def words(self, name: str) -> list[str]:
        """The words of a list."""
        return tokens(self.text(name))

    def given(self) -> Iterator[Setting]:
        """The parameters of main.cf, in their order."""
        yield from self.main.values()


def _own_name() -> str:
    """The name of this machine, as Postfix takes it where myhostname is not given."""
    name = socket.gethostname()
    return name if "." in name else f"{name}.localdomain"
