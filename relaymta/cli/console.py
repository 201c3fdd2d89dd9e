"""The output of all verbs. Unprintable characters are escaped, so that text from outside cannot control a terminal."""

import codecs
import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO
from unicodedata import combining, east_asian_width

from relaymta.proto.printable import printable, printable_json

__all__ = [
    "OutputFailed",
    "Section",
    "check_streams",
    "give_up",
    "is_screen",
    "record",
    "say",
    "say_json",
    "say_json_lines",
    "say_message",
    "say_sections",
    "screen",
    "table",
    "width",
]

LINE = 1 << 16  # characters of a line of message data that are collected
_LEAST = 12  # columns of a table's column that is narrowed
_LITTLE = 30  # columns that are too few for a sentence
_NUMBER = re.compile(r"-?|[\d.]+( of \d+| ?[kMGT]?B|/s|%)?")  # a cell of a column of numbers


class Section(NamedTuple):
    """A part of what is shown: lines, then a table (without `columns`: none)."""

    lines: Sequence[str] = ()
    columns: Sequence[str] = ()
    rows: Sequence[list[str]] = ()


class OutputFailed(Exception):
    """Output could not be written; the cause is the OSError."""


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputFailed from error


def give_up(error: OutputFailed) -> bool:
    """Write nothing more, since that has failed: say why on standard error, and return True; False: its reader has gone."""
    cause = error.__cause__
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 # or the interpreter would try to write the rest when it ends
    if isinstance(cause, BrokenPipeError):
        return False
    with contextlib.suppress(OSError):
        sys.stderr.write(f"standard output: {cause.strerror if isinstance(cause, OSError) else cause}\n")
    return True


def say(*lines: str, err: bool = False) -> None:
    """Write each as one line, with unprintable characters (line ends, too) escaped. An error message that cannot be written
    (`err`) does not change how the program ends."""
    text = "".join(printable(line) + "\n" for line in lines)
    if not err:
        _write(sys.stdout, text)
        return
    with contextlib.suppress(OutputFailed):
        _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    if not text.isascii():
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # characters that the terminal's encoding lacks
    with _written():
        stream.write(text)
        stream.flush()


def check_streams() -> None:
    """Standard error that is closed takes nothing; standard output that is closed takes no output (OutputFailed)."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 # until the program ends
    if sys.stdout is None:
        raise OutputFailed from OSError(errno.EBADF, os.strerror(errno.EBADF))


def say_json(value: Any) -> None:
    """Write a value as one line of JSON."""
    say_json_lines(json.dumps(value).encode() + b"\n")


def say_json_lines(text: bytes) -> None:
    """Write lines of JSON, with unprintable characters escaped."""
    with _written():
        sys.stdout.flush()
        sys.stdout.buffer.write(printable_json(text))
        sys.stdout.buffer.flush()


def say_message(pieces: Iterable[bytes]) -> None:
    """Write message data: unchanged to a file or pipe; to a terminal line by line, with unprintable characters escaped."""
    sys.stdout.flush()
    if sys.stdout.isatty():
        _show_message(pieces)
        return
    for piece in pieces:
        with _written():
            sys.stdout.buffer.write(piece)
    with _written():
        sys.stdout.buffer.flush()


def _show_message(pieces: Iterable[bytes]) -> None:
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decode(piece)).split("\r\n")
        say(*lines)
        if len(rest) > LINE:  # the start of a line that has no end yet
            whole = len(rest) - rest.endswith("\r")
            _write(sys.stdout, printable(rest[:whole]))
            rest = rest[whole:]
    rest += decode(b"", final=True)
    if rest:
        say(rest)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Write rows below a title ("": none) and the names of their columns, one a line. On a terminal they are made to fit: long
    cells are cut ("..."), and the last column is continued below itself, or below the row."""
    cells = [[printable(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(_columns_of(cell) for cell in column) for column in zip(*cells, strict=True)]
    right = [all(_NUMBER.fullmatch(row[n]) for row in cells[1:]) for n in range(len(columns))]
    room = width()
    below = False  # the last column, where little room is left for it
    if room:
        left = room - sum(widths[:-1]) - 2 * (len(widths) - 1)
        below = widths[-1] > _LITTLE > left
        widths[-1] = 0 if below else min(widths[-1], max(_LEAST, left))
        while sum(widths) + 2 * (len(widths) - 1 - below) > room and max(widths[:-1], default=0) > _LEAST:
            longest = max(range(len(widths) - 1), key=widths.__getitem__)
            widths[longest] -= 1
    lines = [printable(title)] if title else []
    for number, row in enumerate(cells):
        shown = "  ".join(_padded(_cut(cell, widths[n]), widths[n], right[n]) for n, cell in enumerate(row[:-1]))
        if below:
            lines += [shown.rstrip(), *("  " + part for part in _folded(row[-1], room - 2) if number and part)]
            continue
        first, *more = _folded(row[-1], widths[-1]) if room else [row[-1]]
        first = _padded(first, widths[-1], True) if right[-1] else first
        lines.append((shown + "  " + first if shown else first).rstrip())
        lines += [" " * (_columns_of(shown) + 2) + part for part in more]
    _write(sys.stdout, "".join(line + "\n" for line in lines))


@contextlib.contextmanager
def screen() -> Iterator[Callable[[list[Section]], None]]:
    """The alternate screen of the terminal, until the context ends; gives a function that shows sections on it, as far as they
    fit. With NO_COLOR (no-color.org) without colours."""
    from rich.console import Console
    from rich.live import Live

    terminal = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
    with _written(), Live(console=terminal, screen=True, auto_refresh=False, transient=True) as live:
        yield lambda sections: live.update(_page(sections, terminal.size.height), refresh=True)


def _page(sections: list[Section], height: int) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    left = height
    for section in sections:
        for line in section.lines[: max(0, left)]:
            parts.append(Text(printable(line), no_wrap=True, overflow="ellipsis"))
            left -= 1
        if section.columns and left > 1:
            shown = Table(box=None, expand=True, padding=(0, 1, 0, 0), header_style="bold reverse")
            for number, name in enumerate(section.columns):
                right = all(_NUMBER.fullmatch(row[number]) for row in section.rows)
                last = number == len(section.columns) - 1
                shown.add_column(
                    Text(printable(name)), justify="right" if right and not last else "left", no_wrap=True, overflow="ellipsis",
                    ratio=1 if last else None,
                )  # fmt: skip
            rows = section.rows[: left - 1]
            for row in rows:
                shown.add_row(*(Text(printable(cell)) for cell in row))
            parts.append(shown)
            left -= 1 + len(rows)
    return Group(*parts)


def say_sections(sections: list[Section]) -> None:
    """Write sections as lines and tables."""
    for section in sections:
        say(*section.lines)
        if section.columns:
            table("", list(section.columns), list(section.rows))


def record(*parts: str) -> None:
    """Write one record of a list: one line, unless it is wider than the terminal. Then each part has lines of its own, those
    behind the first indented."""
    text = [printable(part) for part in parts if part]
    room = width()
    if not room or _columns_of("  ".join(text)) <= room:
        _write(sys.stdout, "  ".join(text) + "\n")
        return
    lines = _folded(text[0], room) + ["  " + line for part in text[1:] for line in _folded(part, room - 2)]
    _write(sys.stdout, "".join(line + "\n" for line in lines))


def is_screen(err: bool = False) -> bool:
    """Whether standard output (`err`: error) is a terminal on which a screen can be shown."""
    return (sys.stderr if err else sys.stdout).isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def width() -> int:
    """The columns of the terminal that is written to; 0: it is a file or a pipe, where no line is too long."""
    return max(40, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 0


def _columns_of(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def _padded(text: str, columns: int, right: bool) -> str:
    blanks = " " * max(0, columns - _columns_of(text))
    return blanks + text if right else text + blanks


def _cut(text: str, columns: int) -> str:
    """The text, or as much of its beginning as leaves room for "..."."""
    if _columns_of(text) <= columns:
        return text
    text = text[:columns]
    while _columns_of(text) > columns - 3:
        text = text[:-1]
    return text + "..."


def _folded(text: str, columns: int) -> list[str]:
    """The text in lines of so many columns, broken at blanks where there are some. Linear time."""
    lines: list[str] = []
    begin = 0
    while (end := _end(text, begin, columns)) < len(text):
        at = text.rfind(" ", begin, end + 1)
        at = at if at > begin else end
        lines.append(text[begin:at].rstrip())
        begin = at
        while text[begin : begin + 1].isspace():
            begin += 1
    return [*lines, text[begin:]]


def _end(text: str, begin: int, columns: int) -> int:
    """Where what fits into so many columns ends; one character at least does."""
    if text.isascii():
        return min(begin + columns, len(text))
    used, end = 0, begin
    while end < len(text) and (used := used + _columns_of(text[end])) <= columns:
        end += 1
    return max(end, min(begin + 1, len(text)))
