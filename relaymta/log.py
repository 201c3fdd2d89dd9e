"""The log: one JSON object a line, one for each change of a message's state (docs/log.md has the schema).

Records are handed to a thread through a bounded buffer, so that a stalled sink never delays mail: what does not fit is
dropped and counted, and the count is logged when the sink takes records again.
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["EVENTS", "Log"]

BUFFER = 50_000

# Every event and the fields it has beside ts (seconds, UTC), v (schema version), event and worker.
EVENTS: dict[str, tuple[str, ...]] = {
    "started": ("pid", "listeners"),
    "stopped": ("reason",),
    "warning": ("text",),
    "queued": ("id", "sender", "recipients", "size", "client", "helo", "application"),
    "rejected": ("client", "helo", "sender", "recipients", "reply"),
    "delivered": ("id", "recipients", "route", "peer", "reply", "delay", "attempt"),
    "deferred": ("id", "recipient", "route", "phase", "peer", "reply", "next", "attempt"),
    "bounced": ("id", "recipient", "route", "phase", "peer", "reply", "notice", "attempt"),
    "site": ("route", "state", "reason", "until"),
    "store": ("state", "reason"),
}


def _record(name: str, fields: tuple[str, ...]) -> type[msgspec.Struct]:
    """The struct of an event: faster to make and to encode than a dictionary, and a wrong field is an error."""
    head: list[Any] = [("ts", float), ("worker", int)]
    tail: list[Any] = [(field, Any) for field in fields]
    return msgspec.defstruct(name, head + tail, tag_field="event", tag=name, gc=False)


_RECORDS = {name: _record(name, fields) for name, fields in EVENTS.items()}
_encode = msgspec.json.Encoder().encode


class Log:
    """Writes records to `file` ("-": standard error). `worker`: which process says so, -1 the supervisor."""

    def __init__(self, file: str, worker: int) -> None:
        self._file = file
        self._worker = worker
        self._descriptor = self._open()
        self._pending: list[msgspec.Struct] = []
        self._wanted = threading.Event()
        self._closing = False
        self.dropped = 0
        self.muted = False  # drop everything: the disk is needed for mail
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def _open(self) -> int:
        if self._file == "-":
            return sys.stderr.fileno()
        Path(self._file).parent.mkdir(parents=True, exist_ok=True)
        return os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def event(self, name: str, **fields: Any) -> None:
        """Log one event. Never blocks, never raises."""
        pending = self._pending
        if self.muted or len(pending) >= BUFFER:
            self.dropped += 1
            return
        pending.append(_RECORDS[name](time.time(), self._worker, **fields))
        if len(pending) == 1:
            self._wanted.set()

    def _write(self) -> None:
        told = 0
        while True:
            self._wanted.wait()
            self._wanted.clear()
            time.sleep(0.02 if not self._closing else 0)  # so that one write takes many records
            batch, self._pending = self._pending, []
            if self.dropped > told:
                lost = f"{self.dropped - told} log records dropped: the log could not take them"
                batch.append(_RECORDS["warning"](time.time(), self._worker, text=lost))
                told = self.dropped
            text = b"".join(_encode(record) + b"\n" for record in batch)
            try:
                while text:
                    text = text[os.write(self._descriptor, text) :]
            except OSError:
                self.dropped += len(batch)
            if self._closing and not self._pending:
                return

    def shares_disk_with(self, path: Path) -> bool:
        """Whether the log is a file on the file system of `path`."""
        return self._file != "-" and os.fstat(self._descriptor).st_dev == path.stat().st_dev

    def give_to(self, uid: int, gid: int) -> None:
        """Let another user own the file: the one we run as from now on."""
        if self._file != "-":
            os.fchown(self._descriptor, uid, gid)

    def reopen(self) -> None:
        """Open the file again (after it was rotated)."""
        if self._file != "-":
            was, self._descriptor = self._descriptor, self._open()
            os.close(was)

    def close(self) -> None:
        """Write what is pending; wait for the sink for two seconds at most."""
        self._closing = True
        self._wanted.set()
        self._thread.join(2)
