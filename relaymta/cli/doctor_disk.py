"""What `relaymta doctor` checks of disks and files: room, kind of file system, and who may read and write what."""

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from relaymta.cli.doctor_scene import Row, Scene, first_of
from relaymta.cli.peer import size
from relaymta.config import Config
from relaymta.disk.room import FLOOR_MOST, FLOOR_SHARE
from relaymta.errors import ConfigError

__all__ = ["disks", "permissions"]

ENTRIES = 20_000  # files and folders of the spool whose rights are looked at
LOG_FLOOR = 64 << 20  # octets free, where a log is
FEW_INODES, SHARE_OF_INODES = 10_000, 5  # left, and per cent of all
_MOUNTS = Path("/proc/self/mountinfo")
_REMOTE = re.compile(r"(nfs|cifs|smb|9p|ceph|glusterfs|lustre|afs|fuse\.(sshfs|glusterfs|s3fs|rclone))")
_PASSING = {
    "tmpfs": "it is memory: what it holds is lost at the next boot",
    "ramfs": "it is memory: what it holds is lost at the next boot",
    "overlay": "it is that of a container: what it holds is lost with it",
}


class _FileSystem(NamedTuple):
    place: str
    kind: str


def disks(scene: Scene) -> list[Row]:
    """The file systems of the spool and of the log."""
    config = scene.config
    places = [("spool", _existing(Path(config.spool)))]
    if config.log.file != "-":
        places.append(("log", _existing(Path(config.log.file).parent)))
    rows, seen = [], set[int]()
    for what, path in places:
        device = path.stat().st_dev
        if device not in seen:
            rows.append(_disk(what, path))
        seen.add(device)
    return rows


def _existing(path: Path) -> Path:
    """The folder, or the one in which it would be made."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def _disk(what: str, path: Path) -> Row:
    name, stats, found = f"disk of the {what}", os.statvfs(path), _mounted(path)
    total, free = stats.f_frsize * stats.f_blocks, stats.f_frsize * stats.f_bavail
    floor = min(total * FLOOR_SHARE // 100, FLOOR_MOST if what == "spool" else LOG_FLOOR)
    where = f"{path} ({found.kind} at {found.place})"
    room = f"{size(free)} of {size(total)} free"
    if stats.f_flag & os.ST_RDONLY:
        cure = f"see `dmesg` for why, mend it (fsck), and `mount -o remount,rw {found.place}`"
        return name, "wrong", f"{where} is read-only: {cure}"
    if what == "spool" and _REMOTE.match(found.kind):
        return name, "wrong", f"{where} is on another machine, where locks and syncs do not hold: put the spool on a local disk"
    if free < floor:
        does = f"below the floor of {size(floor)} mail is refused" if what == "spool" else "soon nothing is logged"
        return name, "wrong", f"{where}: {room}, and {does}: make room, or enlarge it"
    if stats.f_files and not stats.f_favail:
        return name, "wrong", f"{where} has no inode left: delete files, or make it anew with more (mkfs -N)"
    if what == "spool" and found.kind in _PASSING:
        return name, "warning", f"{where}: {_PASSING[found.kind]}; put the spool on a disk (or a volume)"
    if what == "spool" and free < 2 * floor:
        return name, "warning", f"{where}: {room}, and below {size(floor)} mail is refused: make room, or enlarge it"
    if stats.f_files and stats.f_favail < min(FEW_INODES, stats.f_files * SHARE_OF_INODES // 100):
        return name, "warning", f"{where} has {stats.f_favail} inodes left: delete files, or make it anew with more (mkfs -N)"
    return name, "ok", f"{where}: {room}"


def _mounted(path: Path) -> _FileSystem:
    """The file system that a path is on, as /proc/self/mountinfo has it (proc_pid_mountinfo(5))."""
    real = os.path.realpath(path)
    best = _FileSystem("", "unknown")
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            words, kind = left.split(), right.split()
            place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
            inside = real == place or real.startswith(place.rstrip("/") + "/")
            if inside and len(place) >= len(best.place):  # of several at one place the last one is seen
                best = _FileSystem(place, kind[0])
    return best


def permissions(scene: Scene) -> list[Row]:
    """Whether the relay's user can use the spool, the log, keys, accounts and password files; and whether others can."""
    from relaymta.supervisor import checks

    config, user = scene.config, scene.user
    name = user.pw_name if user is not None and user.pw_name else "the user of this command"
    problems = checks.unusable_places(config, set(scene.by_root))
    problems += checks.unreadable_secrets(config)
    for check in (checks.check_files, checks.check_program):
        try:
            check(config.model_copy(update={"certificate": []}))  # these have a row each
        except ConfigError as error:
            problems += error.problems
    if "spool" not in scene.by_root:
        problems += _foreign(config)
    if problems:
        found = first_of(problems, "relaymta config check")
        closed = "Permission denied" in found or "not writable" in found
        cure = f": let {name} have it (`chown {name}`, `chmod u+rw`: docs/privileges.md)" if closed else ""
        return [("permissions", "wrong", found + cure)]
    notes = checks.changeable_files(config) + checks.exposed_secrets(config) + checks.closed_socket(config)
    if notes:
        return [("permissions", "warning", first_of(notes, "relaymta config check"))]
    return [("permissions", "ok", f"{name} can use the spool, the log, and the files of keys and passwords")]


def _foreign(config: Config) -> Iterator[str]:
    """What is in the spool and cannot be used by the current user: left by a relay of another user, or by root. What lies deep
    in a large spool is not looked at."""
    folders, left = deque([config.spool]), ENTRIES
    while folders and left > 0:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in islice(entries, left):
                left -= 1
                is_folder = entry.is_dir(follow_symlinks=False)
                if not entry.is_symlink() and not os.access(entry.path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
                    yield f"{entry.path} is not writable"
                elif is_folder:
                    folders.append(entry.path)
