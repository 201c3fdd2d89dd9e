"""The output of all verbs. Unprintable characters are escaped, so that text from outside cannot control a terminal."""

import codecs
import json
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from relaymta.proto.printable import printable, printable_json

__all__ = ["import_all", "say", "say_json", "say_json_lines", "say_message", "table"]

LINE = 1 << 16  # characters of a line of message data that are collected


def say(*lines: str, err: bool = False) -> None:
    """Write each as one line, with unprintable characters (line ends, too) escaped."""
    stream = sys.stderr if err else sys.stdout
    _write(stream, "".join(printable(line) + "\n" for line in lines))


def _write(stream: TextIO, text: str) -> None:
    if not text.isascii():
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # characters that the terminal's encoding lacks
    stream.write(text)
    stream.flush()


def say_json(value: Any) -> None:
    """Write a value as one line of JSON."""
    say_json_lines(json.dumps(value).encode() + b"\n")


def say_json_lines(text: bytes) -> None:
    """Write lines of JSON, with unprintable characters escaped."""
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
        sys.stdout.buffer.write(piece)
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


def import_all() -> None:
    """Import all that the output may need later."""
    import rich.console
    import rich.table
    import rich.text

    with open(os.devnull, "w") as nowhere:  # rich imports parts of itself when it prints
        rich.console.Console(file=nowhere).print(rich.table.Table("x"))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Write rows below the names of their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
