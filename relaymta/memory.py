"""How much of the memory that we may use is in use: of the cgroup's limit, or of one that was configured."""

import os
import resource
from pathlib import Path

__all__ = ["REFUSE", "TIGHT", "share"]

TIGHT = 0.8  # from here on texts are not kept in memory
REFUSE = 0.95  # from here on no new mail is taken
_PAGE = resource.getpagesize()


def share(limit: int, workers: int) -> float:
    """This process' part of the memory in use, over its part of `limit` octets for all; with no limit (0), the cgroup's memory
    in use over the cgroup's limit. 0.0 when there is none."""
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
            if line.startswith("inactive_file "):  # pages that the kernel drops when it wants room
                used -= int(line.split()[1])
        return used / int(most)
    except (OSError, ValueError):
        return 0.0
