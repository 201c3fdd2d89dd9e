"""TOML without a schema: files, where each of their keys is, what is wrong with one, in the words of who writes it; and how a
value is written."""

import json
import os
import re
import stat
import tomllib
from collections.abc import Collection, Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, NamedTuple

from relaymta.errors import ConfigError
from relaymta.files import Unreadable, read_text

__all__ = ["CONF_D", "Source", "keys_of", "lay_over", "misnamed", "read_all", "read_toml", "written"]

CONF_D = "conf.d"  # the folder beside a configuration file

Keys = tuple[str | int, ...]

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")
_OPEN = re.compile(r"\s*\[(?!.*\]\s*(#.*)?$)")  # a list that its line does not end
_TOKEN = re.compile(r"""#|"(?>(?:\\.|[^"\\])*)"?|'[^']*+'?|[][{},]|[^][{},\s"'#]+""")
_HEAD = re.compile(r"\s*+(\[\[?)([^\]]+)\]")

_LONE = re.compile("[\ud800-\udfff]")  # surrogates
_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")
_MEANT = re.compile(r"\A[^.].*\.(?!toml\Z)(?i:conf|cfg|toml)\Z")

_TWICE = "this table is given twice"
# Errors of tomllib: (what it says, a pattern of the line or "", what we say instead). The first that matches is used. A NUL in a
# pattern stands at the place of the error.
_SYNTAX = [
    (r"Expected newline", r"\0[,;]\s*(#|$)", "nothing follows a value: remove the comma or semicolon"),
    (r"Expected newline|Invalid statement", r"\0(;|//)", "a comment begins with #"),
    (r"Invalid value", r"\0,", "a comma without a value in front of it"),
    (r"Invalid value", r"^([^=]*|[^=]*=\s*\[.*)\0[\w.:/@*-]", "write each value of a list in quotes"),
    (r"Unclosed array", r"[^\s\[,\"']\0[\w.:/@*-]", "write each value of a list in quotes"),
    (r"Unclosed array", r"\0;", "the values of a list are separated by commas"),
    (r"Illegal character '\\n'|Unterminated string|Expected \"'\"", "", "the closing quote is missing"),
    (r"", "[“”„‘’]", "quotes are written \" or '"),
    (r"Invalid value", r"=\s*(True|TRUE|False|FALSE|yes|no|on|off|Yes|No|On|Off)\s*(#|$)", "write true or false"),
    (r"Invalid value", r"=\s*(#|$)", "the value is missing"),
    (r"Expected newline", r"=\s*0\d+\s*(#|$)", "a number is written without a leading 0"),
    (r"Invalid value|Expected newline", r"=\s*[^\s\"'\[{]", 'write the value in quotes: KEY = "VALUE"'),
    (r"Expected newline", r"=\s*[\"'\[{]", 'something follows the value: a list is written ["A", "B"]'),
    (r"Expected newline", r"^\s*\[", "something follows the name of the table"),
    (r"Expected '='", r"^\s*[\w.-]+\s*:", "write KEY = VALUE, with = instead of :"),
    (r"Invalid statement", r"^\s*=", "the key in front of = is missing"),
    (r"Expected '\]\]'", "", "the closing ]] of the table is missing"),
    (r"Expected '\]'", "", "the closing ] of the table is missing"),
    (r"Unclosed array", "", "a comma or the closing ] of a list is missing here or before"),
    (r"Unclosed inline table", "", "a comma or the closing } is missing"),
    (r"Unescaped '\\'", "", "a backslash: write the value in 'single quotes'"),
    (r"Illegal character", "", "a control character"),
    (r"Cannot (declare|overwrite)", r"^\s*\[", _TWICE),
    (r"Cannot overwrite a value", "", "this key is given twice"),
]


def read_toml(path: Path, several: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """(text, parsed content) of a file. `several`: the names of tables that can be given several times. ConfigError: `file:line:
    key: what`."""
    try:
        text = read_text(path)
    except OSError as error:
        if isinstance(error, Unreadable) and error.line:
            raise ConfigError([f"{path}:{error.line}: {error.why}"]) from None
        raise ConfigError([f"{path}: {error.strerror}"]) from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(path, text, str(error), several)]) from None
    except RecursionError:
        raise ConfigError([f"{path}: lists or tables are nested too deeply"]) from None


class Source(NamedTuple):
    """A file of a configuration: its text, and its parsed content."""

    path: Path
    text: str
    data: dict[str, Any]


def read_all(path: Path, several: Collection[str] = ()) -> list[Source]:
    """The configuration file `path`, and those that are read after it: conf.d/*.toml beside it, without hidden ones, in the order
    of the octets of their names. ConfigError, as of `read_toml`, with what is wrong in each of them, or with the folder: it may
    not be read, or (where others can write beside it, as in /tmp) belongs to somebody else than root, the owner of the file, and
    us."""
    found, problems = [], []
    try:
        paths = [path, *_drop_ins(path)]
    except ConfigError as error:
        paths, problems = [path], error.problems
    for one in paths:
        try:
            if one != path and not stat.S_ISREG(one.stat().st_mode):  # reading a pipe might never end
                raise ConfigError([f"{one}: not a plain file"])
            found.append(Source(one, *read_toml(one, several)))
        except OSError as error:
            problems.append(f"{one}: {error.strerror}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def _drop_ins(path: Path) -> list[Path]:
    folder = path.parent / CONF_D
    try:
        names = os.listdir(folder)
        owner, beside = folder.stat().st_uid, path.parent.stat()
        if beside.st_mode & stat.S_IWOTH and owner not in (0, os.geteuid(), path.stat().st_uid):
            raise ConfigError([f"{folder}: another user's, and others can write to {path.parent}: it is not read"])
    except FileNotFoundError as error:
        if folder.is_symlink():
            raise ConfigError([f"{folder}: {error.strerror}"]) from None
        return []
    except OSError as error:
        raise ConfigError([f"{folder}: {error.strerror}"]) from None
    return [folder / name for name in sorted(names, key=os.fsencode) if name.endswith(".toml") and not name.startswith(".")]


def misnamed(path: Path) -> list[Path]:
    """The files in conf.d beside a configuration file that are not read and look as if they should be."""
    try:
        names = sorted(os.listdir(path.parent / CONF_D))
    except OSError:
        return []
    return [path.parent / CONF_D / name for name in names if _MEANT.search(name)]


def _syntax_problem(path: Path, text: str, error: str, several: Collection[str]) -> str:
    lines = text.split("\n")
    match = re.search(r"\(at line (\d+), column (\d+)\)", error)
    at = int(match[1]) if match else _unclosed(lines, "'" if "'" in error else '"')
    line = lines[at - 1]
    what = re.sub(r"\s*\(at (?:line \d+, column \d+|end of document)\)", "", error)
    column = int(match[2]) - 1 if match else len(line)
    marked = f"{line[:column]}\0{line[column:]}"
    at_place = ((says, looks, marked if r"\0" in looks else line, ours) for says, looks, ours in _SYNTAX)
    what = next((ours for says, looks, shown, ours in at_place if re.match(says, what) and re.search(looks, shown)), what)
    table = re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line)
    if what == _TWICE and table is not None and table[1] in several:
        what = f"write [[{table[1]}]] in double brackets each time: there can be several"
    found = table[1] if table is not None else next((place for place, number in keys_of(text) if number == at), ())
    key = found if isinstance(found, str) else ".".join(map(str, found))
    return f"{path}:{at}: {key}: {what}" if key else f"{path}:{at}: {what}"


def _unclosed(lines: list[str], quote: str) -> int:
    """The line at which a text probably begins that the end of the file ends: the first with an odd number of quotes; or the
    last."""
    for number, line in enumerate(lines, 1):
        if re.sub(r"(^|\s)#.*", "", line).count(quote) % 2:
            return number
    return max((number for number, line in enumerate(lines, 1) if line.strip()), default=1)


def lay_over(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key. ConfigError when a part of it is not a table."""
    *tables, last = key.split(".")
    for table in tables:
        inner = data.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {key}: {table} is not a table"])
        data = inner
    data[last] = value


def written(value: Any) -> str:
    """A value in one line of TOML: a text, number, boolean, point in time, list, or table. ValueError for a text that is not
    Unicode (lone surrogates: octets of a command line that are not UTF-8)."""
    match value:
        case str():
            if _LONE.search(value):
                raise ValueError(f"{value!r}: not UTF-8")
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the rest of JSON's strings is TOML
        case bool():
            return "true" if value else "false"
        case datetime() | date() | time():
            return value.isoformat()
        case list():
            return "[" + ", ".join(map(written, value)) + "]"
        case dict():
            pairs = (f"{key if _BARE.match(key) else written(key)} = {written(inner)}" for key, inner in value.items())
            return "{ " + ", ".join(pairs) + " }"
    return repr(value)


def keys_of(text: str) -> Iterator[tuple[Keys, int]]:
    """(path, such as ("listener", 0, "address"); line number) of every key and table of a TOML file, in order, and of every value
    of a list that is written in several lines. Lines within multi-line texts may add entries, which are harmless."""
    counts: dict[Keys, int] = {}
    table: Keys = ()
    inside: _List | None = None
    for number, line in enumerate(text.split("\n"), 1):
        head = _HEAD.match(line)
        if head is not None:
            table, inside = _table(head, counts), None
            yield table, number
            continue
        key = _KEY.match(line)
        column = key.end() if key is not None else 0
        if key is not None:
            place = (*table, *_parts(key[1]))
            yield place, number
            inside = _List(place) if _OPEN.match(line, column) else None
        if inside is not None:
            for place in inside.values(line, column):
                yield place, number
            if not inside.depth:
                inside = None


def _parts(name: str) -> Keys:
    return tuple(part.strip().strip("\"'") for part in name.split("."))


def _table(head: re.Match[str], counts: dict[Keys, int]) -> Keys:
    """The path of a table. `counts`: how many there are of each that can be given several times, up to here."""
    *above, last = _parts(head[2])
    place: Keys = ()
    for part in above:  # [route.oauth] belongs to the last [[route]]
        place = (*place, part)
        if place in counts:
            place = (*place, counts[place] - 1)
    place = (*place, last)
    if head[1] == "[[":
        counts[place] = counts.get(place, 0) + 1
        place = (*place, counts[place] - 1)
    return place


class _List:
    """A list that is read line by line. `depth`: of the brackets and braces that are open."""

    def __init__(self, place: Keys) -> None:
        self._place = place
        self._index = 0  # of its next value
        self._expected = False  # that value has not begun
        self.depth = 0

    def values(self, line: str, column: int) -> Iterator[Keys]:
        """The paths of the values that begin in a line, from `column` on."""
        for token in _TOKEN.finditer(line, column):
            mark = token[0]
            if mark == "#":
                return
            self.depth += (mark in "[{") - (mark in "]}")
            if not self.depth:
                return
            if self._expected and self.depth == 1 + (mark in "[{") and mark not in ",]":
                yield (*self._place, self._index)
                self._index, self._expected = self._index + 1, False
            self._expected = self._expected or (self.depth == 1 and mark in "[,")
