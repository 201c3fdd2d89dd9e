"""The list as CSV (RFC 4180), for people and other programs.

    address,application,reason,text,since,until,by

The first line names the columns, in any order; `address` (or `email`) is the only one that has to be there, others are ignored. A
first line that is an address alone begins a file of addresses. Times are RFC 3339 in UTC or days; "": now, and for ever.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, BinaryIO, Final

from relaymta.proto.suppression import REASONS, listed, listed_application

__all__ = ["COLUMNS", "Wrong", "read_rows", "written"]

COLUMNS: Final = ("address", "application", "reason", "text", "since", "until", "by")
FIELD_MOST: Final = 4000  # characters
_ADDRESS: Final = ("address", "email", "email address", "recipient")  # names of the column elsewhere
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z", re.A)

Row = dict[str, Any]


class Wrong(ValueError):
    """A line that is no entry; a sentence."""


def read_rows(file: BinaryIO, name: str, default: Row, wrong: Callable[[str], object]) -> Iterator[Row]:
    """The entries in a file, UTF-8 with or without a byte order mark, as arguments of the request `suppression_put`; a value that
    a line lacks is that of `default`. Memory does not depend on its length. `wrong(text)` is called for each line that is none,
    with `NAME:LINE: what`; octets that are not UTF-8 make a line wrong."""
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    columns: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong(f"{name}:{number}: {error}")
            continue
        if not any(field.strip() for field in fields):
            continue
        try:
            if columns is None:
                columns, first = _columns(fields)
                if not first:
                    continue
            yield _row(columns, fields, default)
        except Wrong as error:
            wrong(f"{name}:{number}: {error}")
            if columns is None:
                return


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
    values = ((name, " ".join(value.split())) for name, value in zip(columns, fields, strict=False))
    given = {name: value for name, value in values if name in COLUMNS and value}
    for name, value in given.items():
        if not value.isprintable() or len(value) > FIELD_MOST:
            raise Wrong(f"{name}: not UTF-8, too long, or with characters that cannot be printed: {value[:60]!r}")
    try:
        address = listed(given.pop("address", ""))
        listed_application(given.get("application", ""))
    except ValueError as error:
        raise Wrong(str(error)) from None
    if (reason := given.get("reason", REASONS[0])) not in REASONS:
        raise Wrong(f"reason: {reason[:60]!r} is none of {', '.join(REASONS)}")
    times: Row = {name: _time(name, given[name]) for name in ("since", "until") if name in given}
    return {**default, **given, **times, "address": address}


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
