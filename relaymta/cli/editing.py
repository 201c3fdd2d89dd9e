"""Files that verbs edit: locked, replaced atomically, with owner and mode kept."""

import contextlib
import fcntl
import os
import pwd
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from relaymta.cli.options import fail
from relaymta.errors import ConfigError

__all__ = ["give_to", "locked", "replace_file"]


@contextlib.contextmanager
def locked(path: Path, user: str) -> Iterator[None]:
    """Hold the lock (flock) of the file that is at `path` now, which the last holder may have replaced. A missing file is
    created."""
    while True:
        try:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                give_to(descriptor, user)
            except FileExistsError:
                descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            fail(74, f"{path}: {error.strerror}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str, user: str = "", check: Callable[[Path], object] = lambda path: None) -> None:
    """Replace a file (the target of a symbolic link) atomically, with owner and mode as before. A new file is readable by its
    owner only, who is `user` if root creates it. `check(path)` is called with the new file before it is renamed; its ConfigError,
    and OSError, end the program."""
    fresh = None
    try:
        path = path.resolve()
        before = path.stat() if path.exists() else None
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        fresh = Path(name)
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            _hand_over(descriptor, before, user)
            os.fsync(descriptor)
        check(fresh)
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, UnicodeEncodeError, ConfigError) as error:
        if fresh is not None:
            fresh.unlink(missing_ok=True)
        fail(74, f"{path}: {getattr(error, 'strerror', None) or error}")


def _hand_over(descriptor: int, before: os.stat_result | None, user: str) -> None:
    """Set owner and mode of a new file: those of the file it replaces, or else the relay's user as its owner."""
    if before is None:
        give_to(descriptor, user)
        return
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)  # PermissionError: else the relay might be unable to read it
    os.fchmod(descriptor, before.st_mode & 0o7777)


def give_to(descriptor: int, user: str) -> None:
    """If root runs this, make the relay's user the owner of a file."""
    if user and os.geteuid() == 0:
        try:
            os.fchown(descriptor, pwd.getpwnam(user).pw_uid, -1)
        except KeyError:
            fail(78, f"user: there is no user {user!r}")
