"""Logical lines of Postfix's files: what main.cf, master.cf and tables have in common (postconf(5), master(5), postmap(1))."""

from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["DEFAULT", "Line", "Origin", "Place", "logical_lines", "tokens", "tokens_at", "without_braces"]

BLANKS = " \t\r\n"


class Place(NamedTuple):
    """Where something is written: a file as it is shown, and the line; 0: the file as a whole."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


class Origin(NamedTuple):
    """Where a value comes from, for a comment: a place, and the parameter or service that it is there."""

    place: Place
    name: str = ""

    def __str__(self) -> str:
        if self.place == DEFAULT:
            return f"Postfix's default of {self.name}" if self.name else ""
        return f"{self.place} {self.name}".rstrip()


DEFAULT = Place("default", 0)  # what is written nowhere


class Line(NamedTuple):
    """A logical line. `number`: of the first line of text that it has; `starts`: (offset in the text, number) of each of them."""

    number: int
    text: str
    starts: tuple[tuple[int, int], ...] = ()

    def number_at(self, offset: int) -> int:
        """The number of the line in which a character of the text is."""
        return max((number for start, number in self.starts if start <= offset), default=self.number)


def logical_lines(text: str) -> Iterator[Line]:
    """The logical lines of a file: a line that begins with white space continues the one before it; empty lines and those whose
    first character is `#` are left out, also between the two. A continuation of nothing is left out, as by Postfix."""
    parts, starts = "", list[tuple[int, int]]()
    for at, line in enumerate(text.split("\n"), 1):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        if line[0] not in BLANKS:
            if starts:
                yield Line(starts[0][1], parts, tuple(starts))
            parts, starts = "", []
        elif not starts:
            continue
        starts.append((len(parts), at))
        parts += line.rstrip("\r")
    if starts:
        yield Line(starts[0][1], parts, tuple(starts))


def tokens(text: str, separators: str = BLANKS + ",") -> list[str]:
    """The words of a list. What is in braces is one word."""
    return [word for word, _ in tokens_at(text, separators)]


def tokens_at(text: str, separators: str = BLANKS + ",") -> list[tuple[str, int]]:
    """As `tokens`, each with the offset at which it begins."""
    found, word, depth = list[tuple[str, int]](), "", 0
    for at, char in enumerate(text + separators[0]):
        if char in separators and (not depth or at == len(text)):
            if word:
                found.append((word, at - len(word)))
            word = ""
            continue
        depth = max(0, depth + (char == "{") - (char == "}"))
        word += char
    return found


def without_braces(word: str) -> str:
    """The text within `{ ... }`; another word as it is."""
    return word[1:-1].strip() if word.startswith("{") and word.endswith("}") else word
