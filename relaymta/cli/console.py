"""The output of all verbs. Unprintable characters are escaped, so that text from outside cannot control a terminal."""

import json
import sys
from typing import Any, TextIO

from relaymta.proto.printable import printable, printable_json

__all__ = ["say", "say_json", "say_json_lines", "say_message", "table"]


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


def say_message(data: bytes) -> None:
    """Write message data: unchanged to a file or pipe; to a terminal line by line, with unprintable characters escaped."""
    if sys.stdout.isatty():
        say(*data.decode("utf-8", "backslashreplace").removesuffix("\r\n").split("\r\n"))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Write rows below the names of their columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(soft_wrap=True, markup=False, emoji=False).print(table)
