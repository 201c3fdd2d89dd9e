"""Memory use, as a share of `limits.memory` or of the cgroup's limit.

Pages of files are not counted, although a process or cgroup is charged for them while they are mapped or cached: whoever lists a
queue maps all of its tables (LMDB), and the kernel frees such pages when memory is needed.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from relaymta.errors import is_scarce

__all__ = ["REFUSE", "TIGHT", "limit", "share"]

TIGHT = 0.8  # above this share no message data is kept in memory
REFUSE = 0.95  # above this share new mail is temporarily rejected
T = TypeVar("T")
_CGROUPS = Path("/sys/fs/cgroup")
# What is freed on demand, in memory.stat (cgroup v2). Files in tmpfs are not among it.
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")


def share(limit: int, workers: int) -> float:
    """The memory of this process as a share of its part of `limit` (octets of all `workers`). With no limit (0): the memory of
    the cgroup as a share of its limit, or of one above it; 0.0 when none has one. OSError: no descriptor is left to look."""
    return anonymous() * workers / limit if limit else max(map(_of_cgroup, _cgroups()))


def anonymous(process: int | str = "self") -> int:
    """The octets of a process that are its own and of no file; 0 when it has ended but was not waited for. OSError when it does
    not exist, or no descriptor is left. Shared memory is left out: ours is 3 MB for all processes, and tables of a spool in tmpfs
    would count."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def limit(process: int | str = "self") -> tuple[int, float]:
    """The lowest limit of the cgroups that a process is in, octets, 0 where none has one; and the memory of the fullest of them
    as a share of its limit. OSError: as of `share`."""
    folders = _cgroups(process)
    limits = [most for folder in folders if (most := _limit_of(folder))]
    return min(limits, default=0), max(map(_of_cgroup, folders))


def _limit_of(folder: Path) -> int:
    return _found(lambda: int((folder / "memory.max").read_text()), 0)  # there may be none ("max"), or no such cgroup


def _cgroups(process: int | str = "self") -> list[Path]:
    """The folders of a process' cgroup and of all above it: the limit of each holds."""
    group = _found(lambda: Path(f"/proc/{process}/cgroup").read_text().rpartition("::")[2].strip(), "")
    folder = Path(str(_CGROUPS) + os.path.normpath("/" + group))
    return [folder, *(above for above in folder.parents if above.is_relative_to(_CGROUPS))]


def _of_cgroup(folder: Path) -> float:
    return _found(lambda: _share_of(folder), 0.0)


def _share_of(folder: Path) -> float:
    most = (folder / "memory.max").read_text().strip()
    if most == "max":
        return 0.0
    used = int((folder / "memory.current").read_text())
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return (used - sum(int(counts.get(name, 0)) for name in _RECLAIMABLE)) / int(most)


def _found(read: Callable[[], T], otherwise: T) -> T:
    """What `read` finds; `otherwise`, where there is no such file or number. OSError: no descriptor is left to look."""
    try:
        return read()
    except (OSError, ValueError) as error:
        if is_scarce(error):
            raise
        return otherwise
