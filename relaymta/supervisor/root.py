"""What only root can do for `user`, before root privileges are dropped."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from pwd import struct_passwd
from typing import NamedTuple

from relaymta import privileges
from relaymta.config import Config
from relaymta.errors import ConfigError
from relaymta.sockets import control_socket, local_socket, remove_socket

__all__ = ["Opened", "drop_root", "group_of", "make_folder", "prepare_as_root"]


class Opened(NamedTuple):
    """The unix sockets that only root could make; None: the relay's user makes it."""

    control: socket.socket | None = None
    admin: socket.socket | None = None
    local: socket.socket | None = None

    def discard(self, config: Config) -> None:
        """Close them, after a start that has failed."""
        for sock, path in zip(self, (config.control_path, config.admin_path, config.local_path), strict=True):
            if sock is not None and path is not None:
                remove_socket(sock, path)


def prepare_as_root(config: Config) -> Opened:
    """Do what only root can do for `user`: make it the owner of the spool and of the log file, if only root can change their
    folders; and create the control socket, that of the HTTP API and that of sendmail(1), if only root can change their
    folders."""
    opened = Opened()
    if os.geteuid() != 0 or not config.user:
        return opened
    user = privileges.account(config.user)
    spool, group = Path(config.spool), group_of(config)
    if privileges.roots_alone(spool, user):
        make_folder(spool)
        _give_spool(spool, user)
    _give_log(config.log.file, user)
    made: list[tuple[str, Path | None, Callable[[Path], socket.socket]]] = [
        ("control", config.control_path, lambda path: control_socket(path, user, group)),
        ("admin", config.admin_path, lambda path: control_socket(path, user, group, "admin.socket")),
        ("local", config.local_path, lambda path: local_socket(path, user)),
    ]
    try:
        for name, path, make in made:
            if path is not None and privileges.roots_alone(path.parent, user):
                opened = opened._replace(**{name: make(path)})
    except BaseException:
        opened.discard(config)
        raise
    return opened


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
