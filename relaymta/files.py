"""Files that an operator has written: configuration, maps, recipients, accounts, passwords, keys. Every one is read here, so that
what editors put at the beginning of a file is understood everywhere, and what is no UTF-8 is named everywhere."""

import codecs
import errno
import os
from pathlib import Path

__all__ = ["Unreadable", "read_octets", "read_secret", "read_text", "text_of"]

# Marks at the beginning of a file: UTF-32 before UTF-16, whose mark is the beginning of it.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_HELP = "save it as UTF-8"


class Unreadable(OSError):
    """A file that can be read but not be used. `strerror`: why, for an operator; `line`: where, 0 for the whole file."""

    def __init__(self, path: str | os.PathLike[str], why: str, line: int = 0) -> None:
        super().__init__(errno.EILSEQ, why if not line else f"line {line}: {why}", os.fspath(path))
        self.why, self.line = why, line


def read_octets(path: str | os.PathLike[str]) -> bytes:
    """The content of a file without a byte order mark. OSError; its `strerror` says why for an operator, also when the file is
    UTF-16 or UTF-32."""
    return _unmarked(Path(path).read_bytes(), path)


def _unmarked(data: bytes, path: str | os.PathLike[str]) -> bytes:
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise Unreadable(path, f"this is {name}: {_HELP}")
    return data.removeprefix(codecs.BOM_UTF8)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file without a byte order mark; each line ends with a single LF. OSError, as of `read_octets`, also for
    octets that are not UTF-8 and for NUL."""
    return text_of(Path(path).read_bytes(), path)


def text_of(data: bytes, path: str | os.PathLike[str]) -> str:
    """The text of a file whose octets were read. OSError, as of `read_text`."""
    data = _unmarked(data, path)
    at = data.find(b"\0")
    if at >= 0:
        if at < 4 and data[:64].count(b"\0") * 4 >= len(data[:64]):  # the other octets of letters, without a mark before them
            raise Unreadable(path, f"this looks like UTF-16: {_HELP}")
        raise Unreadable(path, "a NUL octet", _line(data, at))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(path, f"not UTF-8: {_HELP}", _line(data, error.start)) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_secret(path: str | os.PathLike[str]) -> str:
    """The password or token in a file, without white space around it. OSError, as of `read_text`, also when it is empty or has
    several lines."""
    text = read_text(path).strip()
    if not text:
        raise Unreadable(path, "is empty")
    if "\n" in text:
        raise Unreadable(path, "has more than one line: it holds one password or token")
    return text


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1
