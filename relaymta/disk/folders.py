"""Folders of a store, whose names are made durable as those of files are."""

import contextlib
import os
from pathlib import Path

__all__ = ["make_folder", "remove_file", "sync_folder"]


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, and those above it, where they are not there; their names are durable then. OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    try:
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()  # or the next start would take its name for durable
        raise


def remove_file(path: Path) -> None:
    """Remove a file that nothing points at, where it is there. One that cannot be removed costs room until the next start, and
    harms nobody."""
    with contextlib.suppress(OSError):
        path.unlink()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
