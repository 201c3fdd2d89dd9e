"""TOML without a schema: files, where each of their keys is, and what is wrong with one, in the words of who writes it."""

import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from relaymta.errors import ConfigError
from relaymta.files import Unreadable, read_text

__all__ = ["keys_of", "lay_over", "read_toml"]

_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"))*)\s*=""")
_HEAD = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]")

_TWICE = "this table is given twice"
# Errors of tomllib: (what it says, a pattern of the line or "", what we say instead). The first that matches is used.
_SYNTAX = [
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


def _syntax_problem(path: Path, text: str, error: str, several: Collection[str]) -> str:
    lines = text.split("\n")
    match = re.search(r"\(at line (\d+), column \d+\)", error)
    at = int(match[1]) if match else _unclosed(lines, "'" if "'" in error else '"')
    line = lines[at - 1]
    what = re.sub(r"\s*\(at (?:line \d+, column \d+|end of document)\)", "", error)
    what = next((ours for says, looks, ours in _SYNTAX if re.match(says, what) and re.search(looks, line)), what)
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


def keys_of(text: str) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """(path, such as ("listener", 0, "address"); line number) of every key and table of a TOML file, in order. Lines within
    multi-line values may add entries, which are harmless."""
    counts: dict[str, int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        head = _HEAD.match(line)
        if head is not None:
            name = head[2].strip()
            parts: tuple[str | int, ...] = tuple(part.strip().strip("\"'") for part in name.split("."))
            if head[1] == "[[":
                parts = (*parts, counts.get(name, 0))
                counts[name] = counts.get(name, 0) + 1
            elif parts[0] in counts:  # [route.oauth]: it belongs to the last [[route]]
                parts = (parts[0], counts[str(parts[0])] - 1, *parts[1:])
            table = parts
            yield table, number
            continue
        key = _KEY.match(line)
        if key is not None:
            yield (*table, *(part.strip().strip("\"'") for part in key[1].split("."))), number
