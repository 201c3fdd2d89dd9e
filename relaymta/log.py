"""The log: one JSON object a line, one for each change of a message's state, or the same as Postfix has it (docs/log.md).

Records pass through a bounded buffer to a thread, so that a slow disk or pipe never delays mail: what does not fit is dropped and
counted. The thread writes to the log and to the history, each of which drops and counts what it cannot write. The counts are
logged once records can be written again.
"""

import contextlib
import heapq
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import msgspec

from relaymta.log_forms import Render, as_json, as_postfix, for_journal, is_journal, postfix_writer
from relaymta.privileges import append_to
from relaymta.proto.printable import printable_json

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.proto.maillog import Writer

__all__ = ["EVENTS", "USERS", "History", "Log", "find_history", "history_of_user", "record_of", "schema"]

BUFFER = 50_000  # records
USERS = "users"  # the folder of the history of users, in that of messages
LINE_MOST = 4 << 20  # octets of a record that is read

# Every event and the fields it has beside event, ts (seconds, UTC) and worker.
EVENTS: dict[str, tuple[str, ...]] = {
    "started": ("pid", "listeners"),
    "stopped": ("reason",),
    "reloaded": ("applied", "restart"),
    "upgrade": ("state", "program", "pid", "slot", "seconds", "reason"),
    "warning": ("text",),
    "queued": (
        "id",
        "sender",
        "recipients",
        "size",
        "client",
        "helo",
        "user",
        "application",
        "message_id",
        "orig_client",
        "orig_helo",
        "orig_id",
        "unseen",
        "held",
        "tags",
        "traceparent",
        "began",
    ),
    "received": ("id", "sender", "recipients", "size", "client", "helo", "user", "application", "message_id", "stays"),
    "quota_warning": ("user", "filled"),
    "sieve": ("id", "user", "actions", "cause"),
    "changed": ("protocol", "client", "user", "action", "mailbox", "into", "messages"),
    "session": ("protocol", "client", "user", "seconds", "retrieved", "commands", "program"),
    "login": ("client", "user", "good", "reply", "mechanism"),
    "filtered": (
        "id",
        "client",
        "sender",
        "recipients",
        "filter",
        "verdict",
        "action",
        "score",
        "reason",
        "seconds",
        "changes",
    ),
    "rule": ("id", "client", "sender", "recipients", "rule", "verdict", "enforced", "match"),
    "scanned": ("id", "sender", "recipients", "result", "reason"),
    "quarantine": ("id", "sender", "recipients", "result", "by", "reason", "to"),
    "held": ("id", "sender", "recipients", "reason", "by"),
    "released": ("id", "sender", "recipients", "by"),
    "rerouted": ("id", "sender", "recipients", "route", "by"),
    "deleted": ("id", "sender", "recipients", "by"),
    "moved": ("queue", "route", "messages", "by"),
    "abuse": ("account", "check", "watch", "value", "limit", "verdict", "enforced", "reason", "ends"),
    "filter": ("filter", "state", "reason"),
    "audit": ("who", "where", "action", "about", "count", "result", "ids"),
    "rejected": ("client", "helo", "protocol", "phase", "sender", "recipients", "reply"),
    "delivered": (
        "id",
        "recipients",
        "route",
        "peer",
        "address",
        "port",
        "tls",
        "cipher",
        "reply",
        "delay",
        "attempt",
        "users",
        "stays",
        "traceparent",
        "began",
    ),
    "next_host": ("id", "recipients", "route", "phase", "peer", "reply", "attempt", "traceparent"),
    "deferred": (
        "id",
        "recipient",
        "route",
        "phase",
        "peer",
        "reply",
        "cause",
        "next",
        "delay",
        "attempt",
        "traceparent",
        "began",
    ),
    "bounced": (
        "id",
        "sender",
        "recipient",
        "route",
        "phase",
        "peer",
        "reply",
        "cause",
        "dsn",
        "delay",
        "attempt",
        "expired",
        "stays",
        "traceparent",
        "began",
    ),
    # `ends`: seconds; `until`: the same in milliseconds, for one version more.
    "site": ("route", "state", "reason", "fault", "cause", "until", "ends"),
    "shaping": ("site", "tenant", "action", "by", "reply", "until", "ends"),
    "store": ("state", "reason"),
}

# Fields of an event that had another name in 0.1: old -> new. Both are written for one version.
RENAMED: dict[str, dict[str, str]] = {"bounced": {"notice": "dsn"}}

# Fields that an event has only got after 0.1: "" where they are not given.
ADDED = {"message_id", "users", "retrieved", "commands", "program", "mechanism"}

# Fields that are left out where there is nothing to say.
LEFT_OUT = {
    "orig_client",
    "orig_helo",
    "orig_id",
    "unseen",
    "held",
    "to",
    "stays",
    "expired",
    "ids",
    "tags",
    "traceparent",
    "began",
}

# The types of fields that are no strings, in all events.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("pid", "slot", "size", "filled", "messages", "changes", "port", "attempt", "count"), int),
    **dict.fromkeys(("seconds", "value", "limit", "ends", "until", "delay", "next", "began"), float),
    **dict.fromkeys(("good", "enforced", "stays", "expired"), bool),
    **dict.fromkeys(("listeners", "applied", "restart", "recipients", "unseen", "to", "ids", "tags"), list[str]),
    **dict.fromkeys(("users", "actions"), list[str] | str),
    **dict.fromkeys(("retrieved", "commands"), int | str),
    "score": float | None,
}


def _record(name: str, fields: tuple[str, ...]) -> type[msgspec.Struct]:
    """The struct of an event. It is faster to create and encode than a dictionary, and an unknown field is an error."""
    head: list[Any] = [("ts", float), ("worker", int)]
    types = {field: TYPES.get(field, str) for field in fields}
    tail: list[Any] = [(field, types[field]) for field in fields if field not in ADDED and field not in LEFT_OUT]
    tail += [(field, types[field], "") for field in fields if field in ADDED]
    tail += [(field, types[field] | msgspec.UnsetType, msgspec.UNSET) for field in fields if field in LEFT_OUT]
    renamed = RENAMED.get(name, {})
    tail += [(old, types[new], "") for old, new in renamed.items()]

    def fill(record: Any) -> None:
        for old, new in renamed.items():
            setattr(record, old, getattr(record, new))

    namespace = {"__post_init__": fill} if renamed else {}
    return msgspec.defstruct(name, head + tail, tag_field="event", tag=name, gc=False, namespace=namespace)


# Events about one message: its history. About users whose mail is kept here, and no message: likewise.
_OF_MESSAGES = frozenset(name for name, fields in EVENTS.items() if "id" in fields)

_OF_USERS = frozenset(name for name, fields in EVENTS.items() if "user" in fields and "id" not in fields)

_RECORDS = {name: _record(name, fields) for name, fields in EVENTS.items()}
_KEPT = frozenset(_RECORDS[name] for name in _OF_MESSAGES)
_KEPT_OF_USERS = frozenset(_RECORDS[name] for name in _OF_USERS)
_NEWLINE = 0x0A


_Record = Union[tuple(_RECORDS.values())]  # type: ignore[valid-type] # noqa: UP007 # as many as there are


def record_of(line: bytes) -> Any:
    """The record that a line of JSON is, as a struct with its fields. msgspec.DecodeError: it is not as the schema says."""
    return msgspec.json.decode(line, type=_Record)


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a record. Later versions may add fields and events, so there may be more in a record than it
    names."""
    found = msgspec.json.schema(_Record)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "relaymta: a record of the log", **found}


class History:
    """The events of messages, or those of users, kept in `folder` in addition to the log: FILES files for each worker, `octets`
    in all at most, of which the oldest is removed when a new one is begun. Used by the log's thread only."""

    FILES = 8

    def __init__(self, folder: Path, worker: int, octets: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._worker = worker
        self._most = max(4096, octets // self.FILES)
        numbers = [int(path.suffixes[0][1:]) for path in folder.glob(f"{worker}.*.jsonl")]
        self._number = max(numbers, default=0)
        self._descriptor = self._open()
        self._size = os.fstat(self._descriptor).st_size

    def _open(self) -> int:
        path = self._folder / f"{self._worker}.{self._number}.jsonl"
        return append_to(path, 0o600)

    def write(self, text: bytes) -> int:
        """Append lines; when the file is full, begin another and remove the oldest. The octets written; OSError."""
        if self._size + len(text) > self._most and self._size:
            self._begin_another()
        written = os.write(self._descriptor, text)
        self._size += written
        return written

    def _begin_another(self) -> None:
        """OSError: it could not be opened, and nothing has changed."""
        full = self._descriptor
        self._number += 1
        try:
            self._descriptor, self._size = self._open(), 0
        except OSError:
            self._number -= 1
            raise
        os.close(full)
        with contextlib.suppress(OSError):  # no descriptor is left for the folder: the next time
            for path in self._folder.glob(f"{self._worker}.*.jsonl"):
                if int(path.suffixes[0][1:]) <= self._number - self.FILES:
                    path.unlink(missing_ok=True)


def find_history(folder: Path, ident: str) -> list[dict[str, Any]]:
    """All events about a message that `folder` still has, in the order of their times. `ident`: the message's id as text. Records
    of the version before get the new names of fields, too."""
    wanted = f'"id":"{ident}"'.encode()
    found: list[dict[str, Any]] = []
    for path in folder.glob("*.jsonl"):
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
                position = text.find(wanted)
                while position >= 0:
                    start, end = text.rfind(b"\n", 0, position) + 1, text.find(b"\n", position)
                    with contextlib.suppress(msgspec.DecodeError):  # cut off, or being written
                        found.append(msgspec.json.decode(text[start : end if end >= 0 else len(text)]))
                    position = text.find(wanted, position + 1)
        except (OSError, ValueError):  # removed or empty
            continue
    for event in found:
        for old, new in RENAMED.get(event["event"], {}).items():
            if old in event:
                event.setdefault(new, event[old])
    return sorted(found, key=lambda event: float(event["ts"]))


class _About(msgspec.Struct):
    """Whom a record is about."""

    event: str
    ts: float
    user: Any = ""
    users: Any = ""
    recipients: Any = ""
    recipient: Any = ""


# The fields of the events in the history of a user: logins, and addresses.
_LOGINS = {**dict.fromkeys(_OF_USERS, "user"), "sieve": "user"}
_ADDRESSES = {
    "delivered": ("users", "recipients"), "received": ("recipients",), "deferred": ("recipient",), "bounced": ("recipient",),
}  # fmt: skip


def history_of_user(
    folder: Path, is_login: Callable[[str], bool], is_address: Callable[[str], bool], since: float = 0.0
) -> Iterator[dict[str, Any]]:
    """The events of a user that `folder` still has, in the order of their times: mail for the user, logins and sessions, and
    what they have done. `is_login(name)`, `is_address(recipient)`: whether that is the user; `since`: seconds UTC. All records
    are read, a line of each process at a time. Files that may not be read: OSError."""
    about = msgspec.json.Decoder(_About)

    def matches(found: _About) -> bool:
        if found.event in _LOGINS:
            return is_login(found.user)
        named = (getattr(found, field) for field in _ADDRESSES.get(found.event, ()))
        return any(is_address(one) for value in named for one in ((value,) if isinstance(value, str) else value) if one)

    def read(paths: Iterable[Path]) -> Iterator[tuple[float, dict[str, Any]]]:
        for line in _lines_of(paths, since):
            try:
                found = about.decode(line)
                if found.ts >= since and matches(found):
                    yield found.ts, msgspec.json.decode(line)
            except msgspec.DecodeError:  # cut off, or being written
                continue

    writers: dict[tuple[Path, str], list[tuple[int, Path]]] = {}  # by folder and process
    for path in (*folder.glob("*.jsonl"), *(folder / USERS).glob("*.jsonl")):
        worker, number = path.name.split(".")[:2]
        writers.setdefault((path.parent, worker), []).append((int(number), path))
    streams = [read([path for _, path in sorted(paths)]) for paths in writers.values()]
    return (event for _, event in heapq.merge(*streams, key=lambda pair: pair[0]))


def _lines_of(paths: Iterable[Path], since: float) -> Iterator[bytes]:
    """The lines of files, without those that were last written before `since`."""
    for path in paths:
        try:
            file = path.open("rb")
        except FileNotFoundError:  # removed meanwhile, as the oldest
            continue
        with file:
            if os.fstat(file.fileno()).st_mtime >= since:
                while line := file.readline(LINE_MOST):
                    yield line


class _Sink:
    """Where records are written: the log, or the history. `write(octets)` returns how many were written, or raises OSError. Used
    by the log's thread only, but for reading `dropped`."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write
        self._cut = False  # the last line is incomplete
        self.dropped = 0  # records

    def write(self, lines: list[bytes], warnings: list[bytes]) -> bool:
        """Write records, each in lines, then warnings (records that are not counted); what cannot be written is dropped. Whether
        all were written."""
        text = printable_json(b"".join(lines + warnings))
        if self._cut and text:
            text = b"\n" + text
        try:
            while text:
                written = self._write(text)
                self._cut = text[written - 1] != _NEWLINE
                text = text[written:]
        except OSError:
            missing = text.count(b"\n") - sum(line.count(b"\n") for line in warnings)
            for line in reversed(lines):
                self.dropped += missing > 0
                missing -= line.count(b"\n")
        return not text


class Log:
    """The log of one process. `file`: path, "-" for standard error. `worker`: the number of the process in each record, -1 for
    the supervisor. `history`, `users`: get the events of messages, and those of users, too. `form`: "json" or "postfix"."""

    def __init__(
        self, file: str, worker: int, history: History | None = None, users: History | None = None, form: str = "json"
    ) -> None:
        self._file = file
        self._worker = worker
        self._descriptor = self._open()
        in_journal = file == "-" and is_journal(self._descriptor)
        self._writer: Writer | None = postfix_writer(in_journal) if form == "postfix" else None
        self._render: Render = as_json if self._writer is None else as_postfix(self._writer)
        if in_journal:
            self._render = for_journal(self._render)
        self._log = _Sink(lambda text: os.write(self._descriptor, text))
        kept = ((history, _KEPT), (users, _KEPT_OF_USERS))
        self._kept = [(_Sink(one.write), records) for one, records in kept if one is not None]
        self._pending: deque[msgspec.Struct] = deque()  # one thread appends, the other takes from the front
        self._wanted = threading.Event()
        self._closing = False
        self._refused = 0  # records that the buffer had no room for
        self.follow: Callable[[list[Any]], None] | None = None  # gets all records, once they are written; on the log's thread
        self.muted = False  # drop all records: the disk space is needed for mail
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """The number of records that are missing in the log."""
        return self._refused + self._log.dropped

    @property
    def history_dropped(self) -> int:
        """The number of records that could not be written to the history, which are in the log."""
        return sum(sink.dropped for sink, _ in self._kept)

    def routes(self, config: "Config") -> None:
        """The configuration has these routes from now on: what delivers is named by them in the form of Postfix."""
        if self._writer is not None:
            programs = {"lmtp": "lmtp", "mailbox": "virtual"}
            self._writer.programs = {one.label: programs[one.protocol] for one in config.route if one.protocol in programs}

    def _open(self) -> int:
        if self._file == "-":
            return sys.stderr.fileno()
        Path(self._file).parent.mkdir(parents=True, exist_ok=True)
        return append_to(Path(self._file), 0o640)

    def event(self, name: str, **fields: Any) -> None:
        """Log an event with the fields that EVENTS names; a wrong field is a TypeError. Never blocks; drops the record if the
        buffer is full."""
        pending = self._pending
        if self.muted or len(pending) >= BUFFER:
            self._refused += 1
            return
        pending.append(_RECORDS[name](time.time(), self._worker, **fields))
        if len(pending) == 1:
            self._wanted.set()

    def _write(self) -> None:
        reported, render = (0, 0), self._render
        while True:
            self._wanted.wait()
            self._wanted.clear()
            time.sleep(0.02 if not self._closing else 0)  # so that one write takes many records
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            if self._pending:  # appended meanwhile, to a buffer that was not empty: nobody else wakes us
                self._wanted.set()
            lines = as_json(batch) if self._kept or render is as_json else []
            for sink, records in self._kept:
                sink.write([line for line, record in zip(lines, batch, strict=True) if type(record) in records], [])
            missing = self.dropped, self.history_dropped
            if self._log.write(lines if render is as_json else render(batch), render(self._lost(missing, reported))):
                reported = missing
            if self.follow is not None:
                self.follow(batch)
            if self._closing and not self._pending:
                return

    def _lost(self, missing: tuple[int, int], reported: tuple[int, int]) -> list[msgspec.Struct]:
        """The warnings about records that were dropped since the last ones. Both: in the log, and in the history."""
        what = ("log records dropped: they could not be written", "records of the history dropped: they could not be written")
        new = [(now - before, text) for now, before, text in zip(missing, reported, what, strict=True) if now > before]
        return [_RECORDS["warning"](time.time(), self._worker, text=f"{count} {text}") for count, text in new]

    def shares_disk_with(self, path: Path) -> bool:
        """Whether the log is a file on the file system of `path`."""
        return self._file != "-" and os.fstat(self._descriptor).st_dev == path.stat().st_dev

    def reopen(self) -> None:
        """Open the file again, after it was rotated. If that fails the old file stays in use, and a warning is logged there."""
        if self._file == "-":
            return
        try:
            was, self._descriptor = self._descriptor, self._open()
        except OSError as error:
            self.event("warning", text=f"log.file: {self._file}: {error.strerror or error}: the old file stays in use")
        else:
            os.close(was)

    def close(self) -> None:
        """Write pending records, for two seconds at most."""
        self._closing = True
        self._wanted.set()
        self._thread.join(2)
