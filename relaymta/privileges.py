"""What root may touch, how root privileges are dropped, and who is at the other end of a unix socket.

The relay binds its ports as root and runs as `user`. A file in a folder that another user can write may be a link to a file of
root's. So root creates and gives away only files in folders that no other user could have changed; all else is done after root
privileges are dropped.
"""

import contextlib
import difflib
import grp
import os
import pwd
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaymta.errors import ConfigError

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

__all__ = [
    "Peer", "account", "acting_as_owner", "append_to", "become", "give", "group", "owner_of", "peer_of", "roots_alone", "user_of",
]  # fmt: skip

_LINKS = 40  # symbolic links in a path, as the kernel's limit
_ACL = "system.posix_acl_access"
_CREDENTIALS = struct.Struct("iII")  # ucred (unix(7)): process, user, group


class Peer(NamedTuple):
    """Who has opened the other end of a unix socket, or listens there (SO_PEERCRED): the numbers of process, user and group."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: "socket.socket | TransportSocket") -> Peer:
    """Who is at the other end of a unix socket; of a transport: `get_extra_info("socket")`. OSError."""
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))


def account(name: str) -> pwd.struct_passwd:
    """The passwd entry of a user. ConfigError when there is no such user."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise ConfigError([f"user: there is no user {name!r}"]) from None


def group(name: str) -> int:
    """The number of a group. ConfigError when there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        known = difflib.get_close_matches(name, [found.gr_name for found in grp.getgrall()], 1, 0.6)
        meant = f' (did you mean "{known[0]}"?)' if known else ""
        raise ConfigError([f"control.group: there is no group {name!r}{meant}"]) from None


def owner_of(path: Path) -> pwd.struct_passwd:
    """The passwd entry of a file's owner; one without a name has the file's group, and no other group."""
    found = path.stat()
    return user_of(found.st_uid, found.st_gid)


def user_of(uid: int, gid: int) -> pwd.struct_passwd:
    """The passwd entry of a user by number; one without a name has this group, and no other."""
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return pwd.struct_passwd(("", "", uid, gid, "", "", ""))


def become(user: pwd.struct_passwd) -> None:
    """Drop root privileges for good: groups, group, user. ConfigError when any of them is left."""
    groups = os.getgrouplist(user.pw_name, user.pw_gid) if user.pw_name else [user.pw_gid]
    os.setgroups(groups)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    left = os.getresuid() != (user.pw_uid,) * 3 or os.getresgid() != (user.pw_gid,) * 3 or set(os.getgroups()) != set(groups)
    if not left and user.pw_uid != 0:
        try:
            os.setuid(0)
            left = True
        except PermissionError:
            pass
    if left:
        raise ConfigError([f"user: root could not become {user.pw_name or user.pw_uid} for good"])


@contextlib.contextmanager
def acting_as_owner(path: Path) -> Iterator[None]:
    """Touch what is in a folder of another user's with the rights of that user, and then be root again. Without effect for others
    than root. Everything that is used within must have been imported before: the user may not be able to read our files."""
    found = path.stat()
    if os.geteuid() != 0 or found.st_uid == 0:
        yield
        return
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(found.st_gid)
    os.seteuid(found.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def roots_alone(folder: Path, user: pwd.struct_passwd | None = None) -> bool:
    """Whether only root can change what `folder` is and what is in it: all parts of its path belong to root, and neither
    everybody nor `user` can write to it or replace a part of its path. A missing folder counts as the folder it would be created
    in."""
    groups = set(os.getgrouplist(user.pw_name, user.pw_gid)) if user is not None else set()
    last = None
    for path, found in _steps(Path(os.path.abspath(folder))):
        if found is None or found.st_uid != 0:
            return False
        if stat.S_ISDIR(found.st_mode):
            last = _others_write(path, found.st_mode, found.st_gid in groups)
            if last and not found.st_mode & stat.S_ISVTX:  # sticky: others cannot replace what is root's
                return False
    return not last


def _others_write(path: Path, mode: int, member: bool) -> bool:
    listed = mode & stat.S_IWGRP and _ACL in os.listxattr(path)  # then the group bits are the mask of named users' rights
    return bool(mode & stat.S_IWOTH or (mode & stat.S_IWGRP and member) or listed)


def _steps(path: Path) -> Iterator[tuple[Path, os.stat_result | None]]:
    """(path, lstat) of every folder and link on the way to `path`, from / on, with those that links lead through. It ends with
    (path, None) at too many links."""
    links = 0
    here, rest = Path("/"), list(path.parts[1:])
    yield here, here.lstat()
    while rest:
        part = rest.pop(0)
        if part == "..":
            here = here.parent
            continue
        try:
            found = (here / part).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        yield here / part, found
        if not stat.S_ISLNK(found.st_mode):
            here /= part
            continue
        links += 1
        if links > _LINKS:
            yield here, None
            return
        target = Path(os.readlink(here / part))
        here = Path("/") if target.is_absolute() else here
        rest = [*(target.parts[1:] if target.is_absolute() else target.parts), *rest]


def give(folder: Path, user: pwd.struct_passwd) -> None:
    """Make `user` the owner of a folder that only root can change (`roots_alone`), and of all files of root's in it. The content
    of a folder is changed before the folder, so that no other user can interfere meanwhile. Symbolic links and their targets are
    not touched. ConfigError names a file that has other hard links, or belongs to a third user."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _give(descriptor, folder, user)
    finally:
        os.close(descriptor)


def _give(descriptor: int, folder: Path, user: pwd.struct_passwd) -> None:
    with os.scandir(descriptor) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        path, found = folder / name, os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if found.st_uid == user.pw_uid or stat.S_ISLNK(found.st_mode):
            continue
        if found.st_uid != 0:
            raise ConfigError([f"spool: {path} belongs neither to root nor to {user.pw_name}"])
        if stat.S_ISDIR(found.st_mode):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            try:
                if _others_write(path, found.st_mode, member=True):
                    raise ConfigError([f"spool: {path} can be written by other users than root: its content is not given away"])
                _give(inner, path, user)
            finally:
                os.close(inner)
        elif found.st_nlink > 1:
            raise ConfigError([f"spool: {path} is root's and has another name elsewhere (a hard link): it is not given away"])
        else:
            os.chown(name, user.pw_uid, user.pw_gid, dir_fd=descriptor, follow_symlinks=False)
    os.fchown(descriptor, user.pw_uid, user.pw_gid)


def append_to(path: Path, mode: int) -> int:
    """A descriptor to append to a file, which is created with `mode` if it is missing. OSError, also when root would open a link,
    a file with other hard links, or no regular file in a folder that others can write."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    if os.geteuid() != 0 or roots_alone(path.parent):
        return os.open(path, flags, mode)
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(
            0, "not a regular file, or one with other hard links, in a folder that others can write: root does not write to it"
        )
    return descriptor
