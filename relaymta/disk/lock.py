"""The lock that makes one process the owner of a shard."""

import fcntl
import os
import time
from pathlib import Path

from relaymta.errors import SpoolBusy
from relaymta.proto.printable import printable

__all__ = ["OWNER_SECONDS", "TRY_SECONDS", "all_unlocked", "lock", "locked_shard"]

OWNER_SECONDS = 5.0  # a process that was killed has its locks until its last write to the disk has ended
TRY_SECONDS = 0.005


def lock(path: Path, seconds: float = 0.05) -> int:
    """Lock the shard in `path` until the returned descriptor is closed. SpoolBusy when another process has it locked, and does
    not end within `seconds`, for which this blocks; where one only looks (`locked_shard`) that takes a moment."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            if time.monotonic() > until:
                break
            time.sleep(TRY_SECONDS)
    os.close(descriptor)
    raise SpoolBusy(f"{path.absolute()} is in use by another relaymta{_holder(path / 'lock')}")


def all_unlocked(shards: list[Path], seconds: float = OWNER_SECONDS) -> None:
    """SpoolBusy unless no process has one of these shards, or each that has ends within `seconds`, for which this blocks. It says
    which are locked, and that others are not."""
    until = time.monotonic() + seconds
    while locked := [path for path in shards if _is_locked(path)]:
        if time.monotonic() > until:
            names = ", ".join(path.name for path in locked)
            free = [path.name for path in shards if path not in locked]
            others = f" ({', '.join(free)} {'is' if len(free) == 1 else 'are'} not)" if free else ""
            who = _holder(locked[0] / "lock")
            use = f"{'is' if len(locked) == 1 else 'are'} in use by another relaymta{who}"
            raise SpoolBusy(f"{locked[0].parent.absolute()}: {names} {use}{others}; nothing was changed")
        time.sleep(TRY_SECONDS)


def _holder(path: Path) -> str:
    """Which process has locked a file, as words in brackets, as far as the kernel tells."""
    try:
        found = path.stat()
        key = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        rows = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        pid = next((row[4] for row in rows if len(row) > 5 and row[1] == "FLOCK" and row[5] == key), "")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid else []
    except OSError:
        return ""
    if not pid or pid == "0":
        return ""
    verb = b" ".join(words[next((n + 1 for n, w in enumerate(words) if w.endswith(b"relaymta")), len(words)) :][:2])
    return f" (process {pid}{': relaymta ' + printable(verb.decode('utf-8', 'replace').strip()) if verb.strip() else ''})"


def locked_shard(spool: Path) -> Path | None:
    """A shard that a process has locked now; None when there is none, or that cannot be found out."""
    return next((path.absolute() for path in sorted(spool.glob("shard-*")) if _is_locked(path)), None)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
