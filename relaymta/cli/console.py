"""What every verb writes goes through here, so that nothing that came from outside can act on a terminal."""

import json
import sys
from typing import Any, TextIO

from relaymta.proto.printable import printable, printable_json

__all__ = ["say", "say_json", "say_json_lines", "say_text", "table"]


def say(*lines: str, err: bool = False) -> None:
    """Write each as one line; what is not printable in it is escaped, a line's end too."""
    stream = sys.stderr if err else sys.stdout
    _write(stream, "".join(printable(line) + "\n" for line in lines))


def _write(stream: TextIO, text: str) -> None:
    if not text.isascii():
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # what this terminal cannot show
    stream.write(text)
    stream.flush()


def say_json(value: Any) -> None:
    """Write a value as one line of JSON."""
    say_json_lines(json.dumps(value).encode() + b"\n")


def say_json_lines(text: bytes) -> None:
    """Write lines of JSON as they are, but for what is not printable in them."""
    sys.stdout.flush()
    sys.stdout.buffer.write(printable_json(text))
    sys.stdout.buffer.flush()


def say_text(text: bytes) -> None:
    """Write a message's text: to a file or pipe as it is, to a terminal as people can read it, line by line."""
    if sys.stdout.isatty():
        say(*text.decode("utf-8", "backslashreplace").removesuffix("\r\n").split("\r\n"))
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
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
