"""The folder of an export. Files in it are complete, or have a name that begins with a dot; no symbolic link is followed.

Root becomes the owner of the spool where no daemon runs, who may not use that folder. So root has a child, which stays root,
open its files, and gets their descriptors.
"""

import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relaymta.disk.folders import make_folder

__all__ = ["Folder", "RootsFolder", "open_folder"]

REQUEST = 4096  # octets


class Folder:
    """A folder, made when it is missing and `make`; its name is durable then. `descriptor`: it is open already. All methods:
    OSError."""

    def __init__(self, path: Path, make: bool, descriptor: int = -1) -> None:
        if make:
            make_folder(path)
        self.path = path
        self.descriptor = descriptor if descriptor >= 0 else os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def reserve(self, alone: bool) -> bool:
        """Have the folder, until it is closed, for this process alone, or with others that have it so; False when another one has
        it. Where there are no such locks nobody has it."""
        try:
            fcntl.flock(self.descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def create(self, name: str) -> int:
        """A descriptor of a new file `.NAME.part`; one that an interrupted export has left is replaced."""
        part = f".{name}.part"
        try:
            os.unlink(part, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(part, flags, 0o600, dir_fd=self.descriptor)

    def place(self, name: str, force: bool) -> None:
        """Give what `create` has made its name. FileExistsError unless `force`."""
        part, here = f".{name}.part", self.descriptor
        if force:
            os.rename(part, name, src_dir_fd=here, dst_dir_fd=here)
        else:
            os.link(part, name, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=False)
            os.unlink(part, dir_fd=here)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            pass

    def sync(self) -> None:
        """Make the names durable."""
        os.fsync(self.descriptor)

    def open(self, name: str) -> int:
        """A descriptor to read a regular file."""
        found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.descriptor)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise OSError(errno.EINVAL, "no regular file")
        return found

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        try:
            os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> Iterator[str]:
        """The names in it, in no order."""
        with os.scandir(self.descriptor) as found:
            for entry in found:
                yield entry.name

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)


class RootsFolder(Folder):
    """A folder that a child of this process uses with the rights that this process has now."""

    def __init__(self, path: Path, make: bool) -> None:
        super().__init__(path, make)
        self._asked, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._child = os.fork()
        if not self._child:
            self._asked.close()
            try:
                _serve(Folder(path, False, self.descriptor), answers)  # not by its name, which may be another one's now
            finally:
                os._exit(0)
        answers.close()

    def _ask(self, *words: Any) -> list[int]:
        self._asked.send(json.dumps(words).encode())
        answer, descriptors, _, _ = socket.recv_fds(self._asked, REQUEST, 1)
        number, text = json.loads(answer)
        if number:
            raise OSError(number, text)
        return list(descriptors)

    def create(self, name: str) -> int:
        """As of Folder."""
        return self._ask("create", name)[0]

    def place(self, name: str, force: bool) -> None:
        """As of Folder."""
        self._ask("place", name, force)

    def remove(self, name: str) -> None:
        """As of Folder."""
        self._ask("remove", name)

    def open(self, name: str) -> int:
        """As of Folder."""
        return self._ask("open", name)[0]

    def has(self, name: str) -> bool:
        """As of Folder."""
        found = self._ask("has", name)
        for one in found:
            os.close(one)
        return bool(found)

    def close(self) -> None:
        """Close it, and end the child."""
        super().close()
        self._asked.close()
        os.waitpid(self._child, 0)


def _serve(folder: Folder, requests: socket.socket) -> None:
    """Do what is asked for until the other end is closed."""
    while request := requests.recv(REQUEST):
        op, *words = json.loads(request)
        descriptors = []
        try:
            found = getattr(folder, op)(*words)
            if op in ("create", "open"):
                descriptors = [found]
            elif op == "has" and found:
                descriptors = [folder.descriptor]
            answer = [0, ""]
        except OSError as error:
            answer = [error.errno or errno.EIO, error.strerror or str(error)]
        socket.send_fds(requests, [json.dumps(answer).encode()], descriptors)
        for one in descriptors:
            if one != folder.descriptor:
                os.close(one)


def open_folder(path: Path, make: bool) -> Folder:
    """A folder for this process, whatever it becomes. OSError."""
    return RootsFolder(path, make) if os.geteuid() == 0 else Folder(path, make)
