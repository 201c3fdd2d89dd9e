"""The list as CSV (RFC 4180), for people and other programs.

    address,application,reason,text,since,until,by

The first line names the columns, in any order; `address` (or `email`) is the only one that has to be there, others are ignored. A
first line that is an address alone begins a file of addresses. Times are RFC 3339 in UTC or days; "": now, and for ever.

An entry is one line; only in a column that is ignored a field may have line ends. So a quote that is not closed costs the
line that it is in, and none behind it.
"""

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final

from relaymta.proto.suppression import REASONS, listed, listed_application

__all__ = ["COLUMNS", "Wrong", "read_rows", "written"]

COLUMNS: Final = ("address", "application", "reason", "text", "since", "until", "by")
FIELD_MOST: Final = 4000  # characters
LINE_MOST: Final = 64 << 10  # characters of a line, and of what is read together
_ADDRESS: Final = ("address", "email", "email address", "recipient")  # names of the column elsewhere
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z", re.A)
_NOT_UTF8 = re.compile("[\ud800-\udfff]")

Row = dict[str, Any]


class Wrong(ValueError):
    """A line that is no entry; a sentence."""


def read_rows(file: BinaryIO, name: str, default: Row, wrong: Callable[[str], object]) -> Iterator[Row]:
    """The entries in a file, UTF-8 with or without a byte order mark, as arguments of the request `suppression_put`; a value that
    a line lacks is that of `default`. Memory depends neither on its length nor on that of a line. `wrong(text)` is called for
    each line that is none, with `NAME:LINE: what`; octets that are not UTF-8 make a line wrong."""
    lines = _Lines(file)
    columns: list[str] | None = None
    while lines.begin():
        try:
            fields = _fields(lines, columns)
            if not any(field.strip() for field in fields):
                continue
            if columns is None:
                columns, first = _columns(fields)
                if not first:
                    continue
            yield _row(columns, fields, default)
        except Wrong as error:
            wrong(f"{name}:{lines.number}: {error}")
            lines.back()
            if columns is None:
                return


class _Lines:
    """The lines of a file, a record at a time. `number`: that of the record's first line."""

    def __init__(self, file: BinaryIO) -> None:
        self._text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        self._again: deque[str | None] = deque()  # lines that were read, and are read once more
        self._record: list[str | None] = []
        self.number = 1

    def begin(self) -> bool:
        """Go on to the record behind the one before; False: there are no more."""
        self.number += len(self._record)
        self._record = [self._next()]
        return self._record[0] != ""

    @property
    def first(self) -> str:
        """The record's first line. Wrong: it is too long."""
        line = self._record[0]
        if line is None:
            raise Wrong(f"more than {LINE_MOST} characters")
        return line

    def record(self) -> Iterator[str]:
        """The record's lines, as far as they are asked for."""
        line: str | None = self.first
        size = 0
        while line and size <= LINE_MOST:
            yield line
            size += len(line)
            line = self._next()
            self._record.append(line)

    def back(self) -> None:
        """The record has only its first line; those behind it are looked at again."""
        self._again.extendleft(reversed(self._record[1:]))
        del self._record[1:]

    def _next(self) -> str | None:
        """The next line, "": there is none, None: it is too long."""
        if self._again:
            return self._again.popleft()
        line = piece = self._text.readline(LINE_MOST)
        while len(piece) == LINE_MOST and piece[-1] not in "\r\n":
            piece = self._text.readline(LINE_MOST)
        return line if piece is line else None


def _fields(lines: _Lines, columns: list[str] | None) -> list[str]:
    """The fields of a record. Wrong."""
    line = lines.first
    if '"' not in line:
        return line.rstrip("\r\n").split(",")
    if (columns is None or len(columns) == 1) and _is_address(line.strip()):
        return [line.strip()]  # `"john doe"@example.org`: no field in quotes, but an address
    try:
        fields = next(csv.reader(lines.record(), strict=True))
    except csv.Error as error:
        raise Wrong("a quote that is not closed" if "end of data" in str(error) else str(error)) from None
    for name, field in zip(columns or (), fields, strict=False):
        if name in COLUMNS and not {"\r", "\n"}.isdisjoint(field):
            raise Wrong(f"{name}: a line end in it, or a quote that is not closed")
    return fields


def _is_address(text: str) -> bool:
    try:
        return bool(listed(text))
    except ValueError:
        return False


def _columns(fields: list[str]) -> tuple[list[str], bool]:
    """(The columns that the first line names, whether it is an entry itself). Wrong."""
    names = [field.strip().lower() for field in fields]
    names = ["address" if name in _ADDRESS else name for name in names]
    if names.count("address") == 1:
        return names, False
    if len(fields) == 1 and "@" in fields[0]:
        return ["address"], True
    raise Wrong(f"the first line names the columns, {','.join(COLUMNS)}: `address` has to be among them, once")


def _row(columns: list[str], fields: list[str], default: Row) -> Row:
    if len(fields) > len(columns):
        raise Wrong(f"{len(fields)} fields, and {len(columns)} columns")
    values = ((name, _value(name, field)) for name, field in zip(columns, fields, strict=False))
    given = {name: value for name, value in values if name in COLUMNS and value}
    try:
        address = listed(given.pop("address", ""))
        listed_application(given.get("application", ""))
    except ValueError as error:
        raise Wrong(str(error)) from None
    if (reason := given.get("reason", REASONS[0])) not in REASONS:
        raise Wrong(f"reason: {reason[:60]!r} is none of {', '.join(REASONS)}")
    times: Row = {name: _time(name, given[name]) for name in ("since", "until") if name in given}
    return {**default, **given, **times, "address": address}


def _value(name: str, field: str) -> str:
    """A field without what is around it; of an address and an application it is what the list may have, else one line. Wrong."""
    if name == "address":
        value, wrong = field.strip(), _NOT_UTF8.search(field) is not None
    elif name == "application":
        value, wrong = field.strip(" \t"), _NOT_UTF8.search(field) is not None
    else:
        value = " ".join(field.split())
        wrong = not value.isprintable()
    if name in COLUMNS and (wrong or len(value) > FIELD_MOST):
        raise Wrong(f"{name}: not UTF-8, too long, or with characters that cannot be printed: {value[:60]!r}")
    return value


def _time(name: str, text: str) -> int:
    """A point in time, or the beginning of a day, in seconds UTC. Wrong."""
    try:
        found = datetime.fromisoformat(f"{text}T00:00:00Z" if _DAY.match(text) else text)
        if found.tzinfo is None:
            raise ValueError
        seconds = int(found.timestamp())
    except (ValueError, OverflowError):
        seconds = -1
    if not 0 < seconds < 1 << 32:
        raise Wrong(f'{name}: {text[:60]!r} is no day and no time such as "2026-05-01T09:30:00Z"')
    return seconds


def written(rows: Iterable[Row], head: bool = True) -> bytes:
    """Rows as lines of CSV, behind one with the names of the columns. `read_rows` reads the same of them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    if head:
        writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_shown_time(row[name]) if name in ("since", "until") else row[name] for name in COLUMNS])
    return out.getvalue().encode("utf-8", "replace")


def _shown_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds else ""
