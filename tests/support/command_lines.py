"""The `relaymta` command lines that pages have: in blocks of code, where they are to be run as they are written, and in their
text, where some are named without what belongs to them. How pages write them: docs/cli.md, "How these pages write commands"."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

from relaymta.cli import VERBS

__all__ = ["Block", "Line", "blocks", "command_lines", "outside_of_code"]

BAR = "\x01"  # a bar between alternatives, which is no pipe
PROGRAM = "relaymta"
ENDS = {"|", "||", "&&", ";", "&", "(", ")", "\n"}  # of a simple command
# Programs that run another: how many words of their own follow, for each of their options.
WRAPPERS = {"sudo": {"-u": 1}, "xargs": {"-n": 1}, "exec": {}, "time": {}, "timeout": {}, "nice": {"-n": 1}, "if": {}, "!": {}}
NUMBERED = {"timeout"}  # whose first argument is not the program yet
READERS = {
    "jq",
    "awk",
    "grep",
    "head",
    "tail",
    "less",
    "wc",
    "xargs",
    "column",
    "sort",
    "uniq",
    "diff",
    "tee",
}  # of what it writes
# What stands for a value: something of its kind.
VALUES = {
    "ID": "1000000000000", "ADDRESS": "ann@example.org", "DOMAIN": "example.org", "SHARD": "1", "N": "1", "SIZE": "5G",
    "DURATION": "1h", "KEY=VALUE": "workers=1", "HOST:PORT": "127.0.0.1:25", "TARGET": "bob@example.org",
    "NEW": "bob@example.org", "FILTER": "--held",
}  # fmt: skip


class Line(NamedTuple):
    """A command line: where it is, and its words behind `relaymta`. `whole`: it is one to be run, with all that it needs."""

    page: str
    number: int
    words: tuple[str, ...]
    whole: bool


class Block(NamedTuple):
    """A line of code: its number, and its text without what indents or fences it."""

    number: int
    text: str


def blocks(text: str) -> list[Block]:
    """The lines of indented and fenced code of a page, those that end with a backslash with the one behind."""
    return list(_continued(_coded(text)))


def outside_of_code(text: str, inline: bool = True) -> str:
    """A page without its code: blocks are empty lines, and (`inline`) code within the text is blanks."""
    coded = {number for number, _ in _coded(text)}
    lines = ["" if number in coded else line for number, line in enumerate(text.split("\n"), 1)]
    rest = "\n".join(lines)
    return re.sub(r"`[^`]+`", lambda found: re.sub(r"[^\n]", " ", found[0]), rest) if inline else rest


def command_lines(path: Path) -> list[Line]:
    """All that a page has, in each of their forms: of `a|b` both, with and without what is in brackets."""
    text, found = path.read_text(encoding="utf-8"), []
    asked = 0  # the last line of a session: a command behind "$ ", or what it has said
    for number, line in blocks(text):
        if line.startswith("$ "):
            asked = number
        elif asked and number <= asked + 1:
            asked = number
            continue
        line = line.removeprefix("$ ")
        if not line.startswith("#"):
            shown = _without_remark(line)
            whole = not re.search(r"\S\|\S", shown)  # else: what verbs there are
            found += [Line(path.name, number, words, whole) for words in _commands(shown)]
    rest = outside_of_code(text, inline=False)
    for inline in re.finditer(r"`([^`]+)`", rest):
        number = rest.count("\n", 0, inline.start()) + 1
        found += [Line(path.name, number, words, False) for words in _commands(" ".join(inline[1].split()))]
    return found


def _coded(text: str) -> Iterator[Block]:
    fenced, begins = False, True  # begins: an indented line would be code
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fenced = not fenced
        elif fenced or (stripped and line.startswith("    ") and begins):
            yield Block(number, stripped)
        else:
            begins = not stripped


def _continued(lines: Iterator[Block]) -> Iterator[Block]:
    begun: Block | None = None
    for line in lines:
        whole = line if begun is None else Block(begun.number, begun.text + " " + line.text)
        begun = Block(whole.number, whole.text[:-1].rstrip()) if whole.text.endswith("\\") else None
        if begun is None:
            yield whole


def _without_remark(line: str) -> str:
    """A command without what stands beside it: behind two blanks, as in a table of commands."""
    quoted = ""
    for at, character in enumerate(line):
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "\"'":
            quoted = character
        elif line.startswith("  ", at):
            return line[:at]
    return line


def _commands(text: str) -> Iterator[tuple[str, ...]]:
    """The words behind `relaymta` of each of its commands in a line of shell, in all of their forms."""
    if PROGRAM not in text:
        return
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from _commands(inner)
    text = re.sub(r"\$\([^()]*\)", "VALUE", text)
    words = shlex.shlex(re.sub(r"(?<=\S)\|(?=\S)", BAR, text), posix=True, punctuation_chars="|&;()<>\n")
    words.whitespace = " \t"
    words.whitespace_split = True
    try:
        every = list(words)
    except ValueError:  # quotes that do not end: no line of shell
        return
    piped = False
    for simple, end in _simple(every):
        own = _behind_program(simple)
        if own is not None:
            yield from _forms(own)
        elif piped and simple and simple[0] not in READERS:
            yield ("|", *simple)  # which is an alternative, and should be written with another bar
        piped = end == "|" and (own is not None or piped)


def _simple(words: list[str]) -> Iterator[tuple[list[str], str]]:
    """The simple commands, without where their output goes, each with what ends it."""
    simple: list[str] = []
    skip = False
    for word in [*words, ";"]:
        if word in ENDS:
            yield simple, word
            simple = []
        elif set(word) <= set("<>&"):
            if simple and simple[-1].isdigit():
                simple.pop()
            skip = not word.endswith("&")
        elif skip:
            skip = False
        else:
            simple.append(word)


def _behind_program(words: list[str]) -> list[str] | None:
    """What follows `relaymta`, where that is the program of a simple command or (before a verb of it) the one that it runs."""
    for at, (one, behind) in enumerate(pairwise(words), 1):
        if one.rpartition("/")[2] == PROGRAM and behind in VERBS:
            return words[at:]
    at = 0
    while at < len(words):
        word = words[at].rpartition("/")[2]
        if word == PROGRAM:
            return words[at + 1 :]
        if re.match(r"\w+=", words[at]):
            at += 1
        elif word in WRAPPERS:
            at += 1
            while at < len(words) and words[at].startswith("-"):
                at += 1 + WRAPPERS[word].get(words[at], 0)
            at += word in NUMBERED
        else:
            return None
    return None


def _forms(words: list[str]) -> Iterator[tuple[str, ...]]:
    """A synopsis in all of its forms: each of the alternatives; with nothing in brackets, each of them, and all."""
    fixed: list[tuple[int, str]] = []  # (which bracket it is in, 0: none; word)
    inside, brackets = 0, 0
    for word in words:
        if word.startswith("[") and not inside:
            brackets += 1
            inside, word = brackets, word[1:]
        ends = bool(inside) and word.endswith("]")
        word = word[:-1] if ends else word
        if word == "..." and fixed and fixed[-1][1].startswith("--"):
            word = "VALUE"
        if word and word != "...":
            fixed.append((inside, word))
        inside = 0 if ends else inside
    chosen = [set[int](), *({number} for number in range(1, brackets + 1)), set(range(1, brackets + 1))]
    done = set()
    for some in chosen:
        rows = [word.split(BAR) for number, word in fixed if not number or number in some]
        for form in product(*rows):
            values = tuple(VALUES.get(word, word) for word in form)
            if values not in done:
                done.add(values)
                yield values
