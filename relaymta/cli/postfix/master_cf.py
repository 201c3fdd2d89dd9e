"""master.cf: the services of Postfix, and the parameters that each has by itself (master(5))."""

from typing import NamedTuple

from relaymta.cli.postfix.files import Files
from relaymta.cli.postfix.lines import Line, Place, tokens_at, without_braces
from relaymta.cli.postfix.main_cf import Setting, split_setting
from relaymta.errors import ConfigError

__all__ = ["Service", "read_master"]

FIELDS = 8
# The services that there are without a master.cf: transports, by their program.
_USUAL = {"smtp": "smtp", "relay": "smtp", "lmtp": "lmtp", "local": "local", "virtual": "virtual", "error": "error",
          "retry": "error", "discard": "discard"}  # fmt: skip


class Service(NamedTuple):
    """A line of master.cf. `limit`: processes at once, None: default_process_limit; `overrides`: its `-o`; `rest`: its other
    arguments."""

    name: str
    kind: str
    limit: int | None
    command: str
    overrides: dict[str, Setting]
    rest: list[str]
    place: Place

    @property
    def label(self) -> str:
        """It as a finding names it."""
        return f"{self.name} {self.kind} {self.command}"


def read_master(files: Files) -> list[Service]:
    """The services of master.cf, of one that is there twice the last; the usual transports where the file is missing. OSError,
    ConfigError."""
    try:
        lines = files.lines(f"{files.home}/master.cf")
    except FileNotFoundError:
        place = Place("master.cf", 0)
        return [Service(name, "unix", None, command, {}, [], place) for name, command in _USUAL.items()]
    found: dict[tuple[str, str], Service] = {}
    for place, line in lines:
        service = _service(line, place)
        found.pop((service.name, service.kind), None)
        found[service.name, service.kind] = service
    return list(found.values())


def _service(line: Line, place: Place) -> Service:
    words = tokens_at(line.text, " \t\r\n")
    if len(words) < FIELDS:
        raise ConfigError([f"{place}: a service has {FIELDS} fields: {line.text.strip()[:60]!r}"])
    name, kind, _, _, _, _, limit, command = (word for word, _ in words[:FIELDS])
    overrides, rest, at = dict[str, Setting](), list[str](), FIELDS
    while at < len(words):
        word, offset = words[at]
        at += 1
        if word == "-o" and at < len(words):
            word, at = f"-o{without_braces(words[at][0])}", at + 1
        if word.startswith("-o"):
            setting = split_setting(word[2:], Place(place.path, line.number_at(offset)))
            overrides[setting.name] = setting
        else:
            rest.append(word)
    processes = int(limit) if limit.isdecimal() else None
    return Service(name, kind, processes, command.rpartition("/")[2], overrides, rest, place)
