"""Which mount a folder is in: what kind of file system, and which part of it."""

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["IN_LAYERS", "IN_MEMORY", "Mount", "mount_of"]

IN_LAYERS = frozenset({"overlay", "aufs", "fuse.fuse-overlayfs"})  # file systems of containers, which end with them
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
# Volumes without a name of Docker, Podman and containerd; an emptyDir of Kubernetes.
_UNNAMED = re.compile(r"/volumes/(?:[0-9a-f]{64}(?:/_data)?|kubernetes\.io~empty-dir/[^/]+)$")


class Mount(NamedTuple):
    """A mount (proc_pid_mountinfo(5)): the type of its file system, such as "ext4", and the folder there that it shows, which is
    "/" unless it is a bind mount."""

    kind: str
    root: str

    @property
    def unnamed(self) -> bool:
        """Whether this is a volume that was made for one container or pod, and that the next one will not have."""
        return _UNNAMED.search(self.root) is not None


def mount_of(path: Path) -> Mount | None:
    """The mount that a folder is in. One that does not exist yet would be made in its nearest parent that does; symbolic links
    are followed. None where that cannot be found out: the way is closed to us, or /proc does not tell."""
    folder = Path(os.path.realpath(path))
    try:
        number = _number(next(one for one in (folder, *folder.parents) if one.exists()))
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            fields = next((line.split() for line in lines if line.startswith(f"{number} ")), None)
    except OSError:
        return None
    return Mount(fields[fields.index("-", 6) + 1], fields[3]) if fields is not None else None


def _number(folder: Path) -> int:
    """The number of the mount that a folder is in. It is exact where paths are not: a mount may be hidden by another one."""
    descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    finally:
        os.close(descriptor)
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("mnt_id:")), -1)
