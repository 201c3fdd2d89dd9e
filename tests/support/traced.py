"""What strace has written (-f -y -o FILE), in the order in which it happened."""

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["BEGINS", "CALLS", "ENDS", "Syncs", "is_traced", "moments"]

BEGINS, ENDS = "begins", "ends"
CALLS = "openat,pwritev,pwritev2,pwrite64,fdatasync,fsync,write,writev,sendto,sendmsg"


def moments(trace: str) -> Iterator[tuple[str, str]]:
    """(BEGINS, call), and (ENDS, call) with its result, for each call."""
    begun: dict[str, str] = {}
    for line in trace.splitlines():
        thread, _, call = line.partition(" ")
        call = call.strip()
        if "resumed>" in call:
            yield ENDS, begun.pop(thread, "") + call.partition("resumed>")[2]
            continue
        yield BEGINS, call
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        else:
            yield ENDS, call


class Syncs:
    """How far a group commit is, of the store whose folder's path ends in `folder`: "written" (message data), "synced", "named"
    (its folder, too), "pages" (LMDB's, which may be several writes), "committed" (its meta page, by the descriptor that syncs
    each write). Whatever comes next starts again. Since `clear`: `begun`: a write to LMDB has begun; `committed`: one to its
    meta page has ended."""

    def __init__(self, folder: str) -> None:
        self.state = ""
        self.begun = self.committed = False
        body = rf"\(\d+<[^>]*{folder}/bodies/(\d+\.seg|big/[0-9a-f]{{16}})>"
        self._lmdb = re.compile(rf"(pwrite64|pwritev2?|writev?)\((\d+<[^>]*{folder}/lmdb/data\.mdb>)")
        self._opened = re.compile(rf"openat\(.*O_DSYNC.*= (\d+<[^>]*{folder}/lmdb/data\.mdb>)")
        self._written = re.compile(rf"(pwritev2?|pwrite64|write){body}")
        self._synced = re.compile(rf"fdatasync{body}")
        self._named = re.compile(rf"fsync\(\d+<[^>]*{folder}/bodies(/big)?>")
        self._meta = ""

    def clear(self) -> None:
        """What was acknowledged does not count for what comes next."""
        self.state, self.begun, self.committed = "", False, False

    def take(self, when: str, call: str) -> None:
        """Take the next of `moments`."""
        lmdb = self._lmdb.match(call)
        if when == BEGINS:
            self.begun |= lmdb is not None
        elif (opened := self._opened.match(call)) is not None:
            self._meta = opened[1]
        elif lmdb is not None:
            is_meta = lmdb[2] == self._meta
            self.committed |= is_meta
            if self.state in ("synced", "named", "pages"):
                self.state = "committed" if is_meta else "pages"
        elif self._written.match(call):
            self.state = "written"
        elif self._synced.match(call) and self.state == "written":
            self.state = "synced"
        elif self._named.match(call) and self.state == "synced":
            self.state = "named"


def is_traced(pid: int) -> bool:
    """Whether strace is attached to every thread of a process."""
    return all("TracerPid:\t0\n" not in path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status"))
