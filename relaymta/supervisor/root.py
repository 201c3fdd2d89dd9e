"""What only root can do for `user`, before root privileges are dropped."""

import os
import socket
from pathlib import Path
from pwd import struct_passwd

from relaymta import privileges
from relaymta.config import Config
from relaymta.errors import ConfigError
from relaymta.sockets import control_socket, remove_socket

__all__ = ["drop_root", "group_of", "make_folder", "prepare_as_root"]


def prepare_as_root(config: Config) -> tuple[socket.socket | None, socket.socket | None]:
    """Do what only root can do for `user`: make it the owner of the spool and of the log file, if only root can change their
    folders; and create the control socket and that of the HTTP API, if only root can change their folders."""
    if os.geteuid() != 0 or not config.user:
        return None, None
    user = privileges.account(config.user)
    spool, control, group = Path(config.spool), config.control_path, group_of(config)
    if privileges.roots_alone(spool, user):
        make_folder(spool)
        _give_spool(spool, user)
    _give_log(config.log.file, user)
    found = control_socket(control, user, group) if privileges.roots_alone(control.parent, user) else None
    path = config.admin_path
    if path is None or not privileges.roots_alone(path.parent, user):
        return found, None
    try:
        return found, control_socket(path, user, group, "admin.socket")
    except BaseException:
        if found is not None:
            remove_socket(found, control)
        raise


def group_of(config: Config) -> int | None:
    """The number of the group that may use the control socket; None for that of the relay's user."""
    return privileges.group(config.control.group) if config.control.group else None


def drop_root(config: Config) -> None:
    if os.geteuid() == 0 and config.user:
        privileges.become(privileges.account(config.user))


def make_folder(spool: Path) -> None:
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"spool: {spool}: {error.strerror}"]) from None


def _give_spool(spool: Path, user: struct_passwd) -> None:
    try:
        privileges.give(spool, user)
    except OSError as error:
        raise ConfigError([f"spool: {error.filename or spool}: {error.strerror}"]) from None


def _give_log(file: str, user: struct_passwd) -> None:
    """Create the log file and make `user` its owner, if only root can change its folder."""
    path = Path(file)
    if file == "-" or not privileges.roots_alone(path.parent, user):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            return
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
        try:
            if os.fstat(descriptor).st_nlink == 1:
                os.fchown(descriptor, user.pw_uid, user.pw_gid)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError([f"log.file: {file}: {error.strerror or error}"]) from None
