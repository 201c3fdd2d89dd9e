"""Memory use, as a share of `limits.memory` or of the cgroup's limit."""

import os
import resource
from pathlib import Path

__all__ = ["REFUSE", "TIGHT", "share"]

TIGHT = 0.8  # above this share no message data is kept in memory
REFUSE = 0.95  # above this share new mail is temporarily rejected
_PAGE = resource.getpagesize()


def share(limit: int, workers: int) -> float:
    """The memory of this process as a share of its part of `limit` (octets of all `workers`). With no limit (0): the memory of
    the cgroup as a share of its limit; 0.0 when it has none."""
    if limit:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE * workers / limit
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        folder = Path("/sys/fs/cgroup" + os.path.normpath("/" + group))
        while not (folder / "memory.max").exists() and folder != Path("/sys/fs/cgroup"):
            folder = folder.parent
        most = (folder / "memory.max").read_text().strip()
        if most == "max":
            return 0.0
        used = int((folder / "memory.current").read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # page cache, which the kernel frees on demand
                used -= int(line.split()[1])
        return used / int(most)
    except (OSError, ValueError):
        return 0.0
