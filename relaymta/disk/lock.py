"""The lock that makes one process the owner of a shard."""

import fcntl
import os
from pathlib import Path

from relaymta.errors import SpoolBusy

__all__ = ["lock", "locked_shard"]


def lock(path: Path) -> int:
    """Lock the shard in `path` until the returned descriptor is closed. SpoolBusy when another process has it locked."""
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise SpoolBusy(f"{path.absolute()} is in use by another relaymta") from None
    return descriptor


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
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
