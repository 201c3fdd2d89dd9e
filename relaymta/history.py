"""The history of messages (`log.History` writes it), read from its last line on, a piece at a time, so that whoever searches it
takes little of the process that reads: no line is parsed here."""

import contextlib
import os
import re
from pathlib import Path

from relaymta.errors import RelayError

__all__ = ["PIECE", "history_files", "history_piece"]

PIECE = 1 << 20  # octets
LONGEST = 8 << 20  # octets of a line
_NAME = re.compile(r"\d{1,9}\.\d{1,18}\.jsonl\Z")


def history_files(folder: Path) -> list[tuple[str, int]]:
    """(name, octets) of each file there is now: `WORKER.NUMBER.jsonl`. Those of a worker follow each other by their numbers."""
    found = []
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as the oldest
            if _NAME.match(path.name):
                found.append((path.name, path.stat().st_size))
    return sorted(found)


def history_piece(folder: Path, name: str, end: int) -> bytes:
    """The lines of a file that lie in front of the octet `end`, where a line begins (or, the first time, where the file ends): as
    many as PIECE octets hold, or one that is longer; b"" where there are none, or where the file is gone. RelayError for what is
    no name of such a file; OSError."""
    if not _NAME.match(name):
        raise RelayError(f"no file of the history: {name}")
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return b""
    try:
        for octets in (PIECE, LONGEST):
            start = max(0, end - octets)
            data = os.pread(descriptor, end - start, start)
            begins = 0 if not start else data.find(b"\n", 0, len(data) - 1) + 1
            if not start or begins:
                break
        return data[begins:]
    finally:
        os.close(descriptor)
