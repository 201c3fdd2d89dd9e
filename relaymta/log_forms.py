"""How records of the log become lines: as JSON, as Postfix has them, and for systemd's journal (docs/log.md)."""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from relaymta.proto.maillog import Writer

__all__ = ["Render", "as_json", "as_postfix", "for_journal", "is_journal", "postfix_writer", "syslog_heads"]

Render = Callable[
    [list[msgspec.Struct]], list[bytes]
]  # of each record its line (in the form of Postfix: its lines), with the end

_encode = msgspec.json.Encoder().encode
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def as_json(records: list[msgspec.Struct]) -> list[bytes]:
    """Records as lines of JSON. Lone surrogates in them (octets that are not UTF-8) are replaced."""
    try:
        return [_encode(record) + b"\n" for record in records]
    except UnicodeEncodeError:
        return [_encode(_sound(msgspec.to_builtins(record))) + b"\n" for record in records]


def _sound(value: Any) -> Any:
    """A value with lone surrogates, which cannot be encoded, replaced by "?"."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {key: _sound(part) for key, part in value.items()}
    return [_sound(part) for part in value] if isinstance(value, (list, tuple)) else value


def as_postfix(writer: "Writer") -> Render:
    """Renders records by `writer`. One that it cannot write, which is a defect, is a warning that has it as JSON."""

    def lines(record: Any) -> bytes:
        try:
            text = writer.lines(record.__struct_config__.tag, record)
        except Exception as error:
            given = as_json([record])[0].decode().rstrip()
            text = writer.lines("warning", SimpleNamespace(ts=record.ts, text=f"{type(error).__name__}: {error}: {given}"))
        return text.encode("utf-8", "replace")

    return lambda records: [lines(record) for record in records]


def postfix_writer(in_journal: bool) -> "Writer":
    """The writer of this process. The journal has times and the name of the host of its own."""
    from relaymta.proto.maillog import Writer  # where it is wanted

    return Writer((lambda ts: "") if in_journal else syslog_heads(), os.getpid())


def syslog_heads() -> Callable[[float], str]:
    """A function that gives what a line of syslog begins with: a time (seconds UTC) in the time zone of the machine, and the name
    of this host, with the blank behind it."""
    host = (os.uname().nodename.partition(".")[0] or "localhost").replace(" ", "_")
    known = 0, ""

    def head(ts: float) -> str:
        nonlocal known
        second = int(ts)
        if known[0] != second:
            now = time.localtime(second)
            text = f"{_MONTHS[now.tm_mon - 1]} {now.tm_mday:2} {now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02} {host} "
            known = second, text
        return known[1]

    return head


# Systemd's journal

ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6  # sd-daemon(3)
_LEVELS: dict[str, Callable[[Any], int]] = {
    "warning": lambda record: WARNING,
    "started": lambda record: NOTICE,
    "reloaded": lambda record: NOTICE,
    "stopped": lambda record: NOTICE if record.reason in ("signal", "upgraded") else ERROR,
    "upgrade": lambda record: WARNING if record.state in ("unchanged", "gone back") else NOTICE,
    "audit": lambda record: NOTICE if record.result == "done" else WARNING,
    "login": lambda record: INFO if record.good else WARNING,
    "abuse": lambda record: NOTICE if record.verdict == "cleared" else WARNING,
    "filter": lambda record: WARNING if record.state == "down" else NOTICE,
    "site": lambda record: WARNING if record.state == "down" else NOTICE,
    "store": lambda record: {"ok": NOTICE, "slow": WARNING}.get(record.state, ERROR),
}


def is_journal(descriptor: int) -> bool:
    """Whether what is written there comes into systemd's journal (JOURNAL_STREAM of systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    found = os.fstat(descriptor)
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


def for_journal(render: Render) -> Render:
    """Renders as `render` does, each line with its level in front."""

    def lines(records: list[msgspec.Struct]) -> list[bytes]:
        found = []
        for record, text in zip(records, render(records), strict=True):
            level = _LEVELS.get(str(record.__struct_config__.tag))
            prefix = b"<%d>" % (level(record) if level is not None else INFO)
            found.append(prefix + text[:-1].replace(b"\n", b"\n" + prefix) + b"\n")
        return found

    return lines
