"""Files that hold messages to be sent: those of the drop folder, where sendmail(1) puts what it cannot hand over, and those of
the pickup folder, where other programs put theirs. Everything here blocks: it is for a thread.
"""

import contextlib
import errno
import fcntl
import heapq
import itertools
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from relaymta.proto.addressees import addresses, fields, header_octets, recipients
from relaymta.proto.mailbox import Malformed, authors

__all__ = ["BAD", "Broken", "Converted", "Folder", "Identity", "Message", "opened_drop", "opened_pickup"]

BAD = "bad"  # the folder for what cannot be sent
REASON = b".reason"
NAME_MOST = 255  # octets of a name (NAME_MAX of Linux)
COMMANDS_MOST = 4 << 20  # octets of the commands of a dropped message
HEADER_MOST = 256 << 10  # octets of the header of a message that is picked up
NUMBERED = 20  # files of one name in BAD; what is put there later has the time in its name
AT_ONCE, OF_ONE = 1000, 500  # names that are returned at once, and of files of one user
LOOKED_AT = 20_000  # files of which it is asked for that whose they are
PIECE = 65536
BAD_SETTLED_SECONDS = 2.0
LEFT_OVER_SECONDS = 86_400.0  # after this a file that was not completed is removed
_HAS_X = (b"x-sender", b"x-receiver")


class Broken(Exception):
    """A file is no message that could be sent; str() says why. `user`: whose it is, None: nobody's who could be told."""

    user: int | None = None


class Identity(NamedTuple):
    """What tells a file from another one that has, or had, the same name."""

    inode: int
    changed: int  # st_mtime_ns
    size: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        return cls(found.st_ino, found.st_mtime_ns, found.st_size)


class Message(NamedTuple):
    """An open file with a message. `user`: whose file it is; `mail`, `rcpts`: the commands, without line ends; `head`: what comes
    before the rest of the file, which has `octets` from `at` on; `converts`: its lines may end otherwise than with CRLF; `since`:
    when it was put there, by the system's clock (seconds); `key`: as of Flow.file, "": it may be sent again."""

    descriptor: int
    user: int
    mail: bytes
    rcpts: list[bytes]
    head: bytes
    at: int
    octets: int
    converts: bool
    identity: Identity
    since: float
    key: str = ""


class Converted:
    """A message with CRLF for each line end, and blanks for NUL, whatever it has, piece by piece. A CR before CRLF belongs to it;
    another one alone is a line end in the body, and a blank in the header, where what follows it would be another field.
    `in_header`: the first piece is the beginning of the message, else of its body."""

    def __init__(self, in_header: bool) -> None:
        self._cr = b""  # CRs at the end of the piece before, two at most
        self._in_header = in_header
        self._begins = in_header  # a line begins with the next piece

    def take(self, piece: bytes, last: bool) -> bytes:
        """What the next piece becomes. `last`: no other follows."""
        piece, self._cr = self._cr + piece, b""
        if not last and piece.endswith(b"\r"):
            at = len(piece) - (2 if piece.endswith(b"\r\r") else 1)
            piece, self._cr = piece[:at], piece[at:]
        text = piece.replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n")
        header, text = self._divided(text) if self._in_header else (b"", text)
        return (header.replace(b"\r", b" ") + text.replace(b"\r", b"\n")).replace(b"\n", b"\r\n").replace(b"\0", b" ")

    def _divided(self, text: bytes) -> tuple[bytes, bytes]:
        """What of a piece with LF belongs to the header, and what behind it."""
        if self._begins and text.startswith(b"\n"):
            end = 0
        else:
            end = text.find(b"\n\n") + 1 or len(text)
        self._in_header = end == len(text)
        if text:
            self._begins = text.endswith(b"\n")
        return text[:end], text[end:]


def _with_empty_line(start: bytes) -> bytes:
    """The beginning of a message with an empty line behind its header, also where that is ended by a text which is none."""
    end = header_octets(start)
    return start if start.startswith(b"\r\n", end) or end in (0, len(start)) else start[:end] + b"\r\n" + start[end:]


class Folder:
    """One of the two folders. `names`: how its files end; `drops`: it is the drop folder, which counts only if it
    belongs to the user of this process."""

    def __init__(self, path: str, ends: str, opened: Callable[[int], Message], drops: bool) -> None:
        self.path = Path(path)
        self._ends = ends
        self._opened = opened
        self.drops = drops
        self._descriptor = -1
        self._bad_stamp: tuple[int, int] | None = None  # of BAD, when what is there was counted
        self._bad_count = 0

    def place(self, name: str) -> str:
        """The path of a file, to be shown."""
        return f"{self.path}/{os.fsencode(name).decode('utf-8', 'backslashreplace')}"

    def begin(self, busy: bool = False) -> bool:
        """Whether the folder is there, and this process the one that empties it from now on (until `end`). `busy`: some of its
        files are being taken, so that another folder in its place is not looked at yet. OSError: it is not of the right kind;
        where nothing can be removed, each message would be sent again and again. A pickup folder that cannot be opened is an
        OSError, too."""
        if self._descriptor >= 0:
            if busy or self._is_same():
                return True
            self.end()
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            if self.drops:  # the default: many machines have none
                return False
            raise
        try:
            self._check(os.fstat(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another program has it
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _check(self, found: os.stat_result) -> None:
        """PermissionError: nothing may be taken from the folder."""
        own = os.geteuid()
        if self.drops and found.st_uid != own:
            raise PermissionError(errno.EACCES, "it does not belong to the user of the relay: nothing is taken from it")
        if not os.access(self.path, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "the relay may not remove files from it: nothing is taken from it")
        if found.st_mode & stat.S_ISVTX and own not in (0, found.st_uid):
            raise PermissionError(
                errno.EACCES, "it is sticky: the relay may not remove files of others: nothing is taken from it"
            )

    def _is_same(self) -> bool:
        """Whether the folder is still the one that was opened."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def end(self) -> None:
        """Leave the folder to others."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def names(self, later: Mapping[str, float], now: float) -> tuple[list[tuple[str, int]], set[str], bool]:
        """The files that are complete and due, and whose they are, AT_ONCE at most, and OF_ONE of a user: those that are not in
        `later` first, by name, then those that are due (by it and `now`) for the longest time; the names of all that are
        complete; and whether more of them are due. What was never completed is removed from a drop folder. OSError."""
        found = set()
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self._remove_left_over(entry.name)
                elif entry.name.endswith(self._ends):
                    found.add(entry.name)
        due = [(at, name) for name in found if (at := later.get(name, 0.0)) <= now]
        chosen: list[tuple[str, int]] = []
        of: Counter[int] = Counter()
        for _, name in heapq.nsmallest(LOOKED_AT, due):
            owner = self._owner(name)
            of[owner] += 1
            if of[owner] <= OF_ONE:
                chosen.append((name, owner))
            if len(chosen) == AT_ONCE:
                break
        return chosen, found, len(due) > len(chosen)

    def _owner(self, name: str) -> int:
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_uid
        except OSError:  # it is gone
            return -1

    def _remove_left_over(self, name: str) -> None:
        """By the time that no user can set. Files of a pickup folder are those of others."""
        with contextlib.suppress(OSError):
            if self.drops and name.endswith(self._ends):
                found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
                if stat.S_ISREG(found.st_mode) and time.time() - found.st_ctime > LEFT_OVER_SECONDS:
                    os.unlink(name, dir_fd=self._descriptor)

    def open(self, name: str) -> Message:
        """A file of it. Broken; OSError: it cannot be read now. FileNotFoundError: it is gone."""
        found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise Broken("it is not a plain file")
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise Broken("it has another name, too (a hard link)")
            # No user can set the time of the last change of the inode: a file that is the same in all else was put there anew.
            kind, named = "drop" if self.drops else "pickup", os.fsencode(name).hex()
            try:
                message = self._opened(descriptor)
            except Broken as error:
                error.user = found.st_uid if self.drops else None
                raise
            return message._replace(key=f"{kind} {named} {found.st_ino} {found.st_ctime_ns} {found.st_size}")
        except BaseException:
            os.close(descriptor)
            raise

    def remove(self, name: str, identity: Identity) -> None:
        """The message is in the queue: remove the file, for good, unless the name is that of another file now. OSError."""
        if Identity.of(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)) == identity:
            os.unlink(name, dir_fd=self._descriptor)
            os.fsync(self._descriptor)

    def put_aside(self, name: str, reason: str, identity: Identity | None = None) -> None:
        """Move a file into BAD, with a file beside it that says why. What is there keeps its name, and its reason. `identity`:
        of the file that is meant. OSError; FileNotFoundError: it is gone, also if another one has its name now."""
        found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        if identity is not None and Identity.of(found) != identity:
            raise FileNotFoundError(errno.ENOENT, "another file has its name now")
        bad = self._bad()
        try:
            free, beside = _free(bad, os.fsencode(name), reason)
            try:
                os.rename(os.fsencode(name), free, src_dir_fd=self._descriptor, dst_dir_fd=bad)
            except BaseException:
                os.unlink(beside, dir_fd=bad)
                raise
            os.fsync(bad)
        finally:
            os.close(bad)
        os.fsync(self._descriptor)

    def bad_files(self) -> int:
        """How many messages are in BAD. It is looked through only where it has changed. OSError."""
        try:
            found = os.stat(BAD, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return 0
        stamp = found.st_ino, found.st_mtime_ns
        if stamp != self._bad_stamp:
            descriptor = os.open(BAD, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
            try:
                with os.scandir(descriptor) as entries:
                    self._bad_count = sum(not os.fsencode(entry.name).endswith(REASON) for entry in entries)
            finally:
                os.close(descriptor)
            # What changes in the same tick of the kernel's clock does not change the time of the folder.
            self._bad_stamp = stamp if time.time() - found.st_mtime > BAD_SETTLED_SECONDS else None
        return self._bad_count

    def _bad(self) -> int:
        """A descriptor of BAD. OSError: it is not a folder of ours."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(BAD, 0o700, dir_fd=self._descriptor)
        descriptor = os.open(BAD, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._descriptor)
        if os.fstat(descriptor).st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError(errno.EACCES, f"{BAD}/ does not belong to the user of the relay")
        return descriptor


def _free(bad: int, name: bytes, reason: str) -> tuple[bytes, bytes]:
    """A name like this one that is free in `bad`, and that of a new file beside it with the reason. OSError."""
    for number in itertools.count(1):
        if number == 1:
            free = name
        else:  # so that both names fit, and no two of the names beside are the same; many of a name need no long search
            more = b".%d" % (number if number < NUMBERED else time.time_ns())
            free = name[: NAME_MOST - len(REASON) - len(more)] + more
        beside = free[: NAME_MOST - len(REASON)] + REASON
        with contextlib.suppress(FileNotFoundError):
            os.stat(free, dir_fd=bad, follow_symlinks=False)
            continue
        with contextlib.suppress(FileExistsError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(beside, flags, 0o600, dir_fd=bad)
            break
    try:
        with open(descriptor, "wb") as file:
            file.write(reason.encode("utf-8", "backslashreplace") + b"\n")
    except BaseException:
        os.unlink(beside, dir_fd=bad)
        raise
    return free, beside


def opened_drop(descriptor: int) -> Message:
    """A dropped message (sendmail/dropping.py): its commands, then the message data to the end of the file. Broken."""
    found = os.fstat(descriptor)
    lines: list[bytes] = []
    at = 0
    for line in _lines(descriptor):
        at += len(line)
        verb = line[:10].upper()
        if verb.startswith(b"BDAT "):
            break
        wanted = b"RCPT TO:" if lines else b"MAIL FROM:"
        if not verb.startswith(wanted[:10]) or b"\r" in line[:-2]:
            raise Broken("it is not a message that sendmail has dropped")
        lines.append(line[:-2])
    else:
        raise Broken("it is not complete")
    words = line[:-2].split(b" ")
    if len(lines) < 2 or len(words) != 3 or not words[1].isdigit() or len(words[1]) > 15 or int(words[1]) != found.st_size - at:
        raise Broken("it is not complete")
    return Message(
        descriptor, found.st_uid, lines[0], lines[1:], b"", at, found.st_size - at, False, Identity.of(found), found.st_ctime
    )  # fmt: skip


def _lines(descriptor: int) -> Iterator[bytes]:
    """The lines with which a file begins, with CRLF; what is behind COMMANDS_MOST octets is none. Broken: one is too long."""
    rest, read = b"", 0
    while read < COMMANDS_MOST and (piece := os.read(descriptor, PIECE)):
        read += len(piece)
        rest += piece
        *lines, rest = rest.split(b"\r\n")
        yield from (line + b"\r\n" for line in lines)
        if len(rest) > PIECE:
            raise Broken("a line of it is too long")


def opened_pickup(descriptor: int) -> Message:
    """A message as a file, with any line ends. X-Sender and X-Receiver, or else From, and To, Cc and Bcc, say who sends it
    to whom. Broken."""
    found = os.fstat(descriptor)
    start = b""
    while len(start) < HEADER_MOST and (piece := os.read(descriptor, PIECE)):
        start += piece
        if b"\n\n" in start or b"\n\r\n" in start:
            break
    if not start:
        raise Broken("it is empty")
    if start.endswith(b"\r"):  # of CRLF, perhaps
        start += os.read(descriptor, 1)
    text = _with_empty_line(Converted(True).take(start, True))
    end = header_octets(text)
    if not end:
        raise Broken("it does not begin with a header")
    if end == len(text) and len(start) >= HEADER_MOST:
        raise Broken("its header is too long")
    header = text[:end] if text.endswith(b"\r\n", 0, end) else text[:end] + b"\r\n"
    given = fields(header, _HAS_X)
    receivers = [address for name, value in given if name == _HAS_X[1] for address in addresses(value)]
    envelope = [_sender(header, given), *(dict.fromkeys(receivers) or recipients(header))]
    if len(envelope) == 1:
        raise Broken("it names no recipient (X-Receiver, or To, Cc, Bcc)")
    for address in envelope:
        if any(one < 33 or one in b"<>\x7f" for one in address):
            raise Broken(f"{address[:200]!r} is no address")
    utf8 = b"" if all(map(bytes.isascii, envelope)) else b" SMTPUTF8"
    mail, *rcpts = (b"<" + address + b">" for address in envelope)
    octets = max(0, found.st_size - len(start))
    rest = _without(header) + text[end:]
    return Message(
        descriptor, found.st_uid, b"MAIL FROM:" + mail + utf8, [b"RCPT TO:" + one for one in rcpts], rest, len(start), octets,
        True, Identity.of(found), found.st_ctime,
    )  # fmt: skip


def _sender(header: bytes, given: list[tuple[bytes, bytes]]) -> bytes:
    """The sender of a message with this header: that of X-Sender (empty: the null sender), or the first one of Sender or From.
    Broken."""
    for name, value in given:
        if name == _HAS_X[0]:
            return next(iter(addresses(value)), b"")
    try:
        found = authors(header, (b"sender",)) or authors(header, (b"from",))
    except Malformed as error:
        raise Broken(f"From or Sender: {error}") from None
    if not found:
        raise Broken("it has neither X-Sender nor From")
    return str(found[0]).encode()


def _without(header: bytes) -> bytes:
    """A header without X-Sender and X-Receiver."""
    kept, drops = [], False
    for line in header.split(b"\r\n")[:-1]:
        if line[:1] not in (b" ", b"\t"):
            drops = line.partition(b":")[0].strip().lower() in _HAS_X
        if not drops:
            kept.append(line + b"\r\n")
    return b"".join(kept)
