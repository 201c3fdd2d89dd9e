"""The file form of Sendmail's aliases (aliases(5)): lines, and the targets in them. It takes linear time, and keeps no more of a
text than its lines."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from relaymta.proto.address import LONGEST_LOCAL, comparable, domain_of, plain

__all__ = ["Include", "Target", "Wrong", "divided", "lines", "targets"]

_INCLUDE = ":include:"
_LONGEST_PATH = 4096  # octets (PATH_MAX)
_SHOWN = 80  # characters of what is wrong
_PIECE = re.compile(r'[^",\\]++|["\\,]')


class Target(NamedTuple):
    """`word`: an address, or a name; `final`: it is no alias."""

    word: str
    final: bool


class Include(NamedTuple):
    """A file of more targets."""

    path: str


class Wrong(NamedTuple):
    """What stands in place of a target, and why it is none."""

    why: str


def lines(path: str, text: str) -> Iterator[tuple[str, str]]:
    """(place, line) of each logical line: one that begins with a blank goes on with the one before."""
    place, parts = "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or line[0] == "#":
            continue
        if line[0] in " \t":
            parts.append(stripped)
            continue
        if any(parts):
            yield place, " ".join(parts)
        place, parts = f"{path}:{number}", [stripped]
    if any(parts):
        yield place, " ".join(parts)


def divided(line: str) -> tuple[str, str, str]:
    """(name, colon, value) of a line; the name may be in quotes."""
    if line.startswith('"'):
        name, quote, rest = line[1:].partition('"')
        rest = rest.lstrip()
        return (name, ":", rest[1:]) if quote and rest.startswith(":") else (line, "", "")
    name, colon, value = line.partition(":")
    return name.strip(), colon, value


def targets(value: str, domains: frozenset[str]) -> Iterator[Target | Include | Wrong]:
    """The targets in a list of them. `domains`: those whose addresses are names here."""
    for word in _words(value):
        if word[: len(_INCLUDE)].lower() == _INCLUDE:
            yield _include(word[len(_INCLUDE) :].strip())
        elif word[0] in "|/":
            what = "a program" if word[0] == "|" else "a file"
            instead = "keep it in a mailbox, or send it on to a host that does this"
            yield Wrong(f"{word[:_SHOWN]!r}: no mail is given to {what}: {instead}")
        elif "@" in word:
            yield _address(word, domains)
        elif len(word) > LONGEST_LOCAL:
            yield Wrong(f"{word[:_SHOWN]!r}...: a name of more than {LONGEST_LOCAL} characters")
        elif not word.isprintable() or any(one in word for one in ' "<>,:;()'):
            yield Wrong(f"{word[:_SHOWN]!r} is neither an address nor a name")
        else:
            yield Target(word.removeprefix("\\").lower(), word[0] == "\\")


def _include(path: str) -> Include | Wrong:
    if not path.startswith("/") or "\0" in path:
        return Wrong(f"{_INCLUDE}{path[:_SHOWN]}: expected the whole path of a file")
    if len(path.encode("utf-8", "surrogateescape")) > _LONGEST_PATH:
        return Wrong(f"{_INCLUDE}{path[:_SHOWN]}...: a path of more than {_LONGEST_PATH} octets")
    return Include(path)


def _address(word: str, domains: frozenset[str]) -> Target | Wrong:
    address = plain(word)
    if address is None:
        return Wrong(f"{word[:_SHOWN]!r} is no address")
    if domain_of(word) in domains:
        return Target(comparable(word).rpartition("@")[0], False)
    return Target(address, True)


def _words(value: str) -> Iterator[str]:
    """The parts between commas outside of quotes; those around a part are taken away."""
    if '"' not in value:
        yield from filter(None, map(str.strip, value.split(",")))
        return
    parts, inside, escaped = list[str](), False, False
    for found in _PIECE.finditer(value + ","):
        piece = found[0]
        if piece == "," and (not inside or found.end() > len(value)):  # a quote that is not closed goes to the end
            word = "".join(parts).strip()
            if word[:1] == word[-1:] == '"' and len(word) > 1:
                word = word[1:-1]
            if word:
                yield word
            parts = []
            continue
        inside ^= piece == '"' and not escaped
        escaped = piece == "\\" and inside and not escaped
        parts.append(piece)
