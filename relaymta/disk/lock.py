"""The lock that makes one process the owner of a shard."""

import fcntl
import os
import time
from pathlib import Path

from relaymta.errors import SpoolBusy

__all__ = ["OWNER_SECONDS", "lock", "locked_shard"]

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
    raise SpoolBusy(f"{path.absolute()} is in use by another relaymta")


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
