"""Messages in Maildir++: a folder with cur/, new/ and tmp/ is INBOX, and each folder ".Sent.2024" in it another mailbox.

The name of a file ends with its flags (":2,FS"). Small letters are keywords, which the file `dovecot-keywords` of each mailbox
names (a to z are its numbers 0 to 25). Further keywords are in hexadecimal in front of the flags (",K=5": numbers 26 and 28) in
the names that we make, SECONDS.KEY.relaymta; other programs take that for a part of the name.

Names of mailboxes are in modified UTF-7, "." divides levels, and a dot within a level is "&AC4-". A name that would be too long
for a folder is in the file `relaymta-name` of one that is named by its digest. No symbolic link is followed below the folder of
INBOX.
"""

import errno
import os
import re
import stat
import time
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from relaymta.proto.mailbox_name import decode, encode, problem
from relaymta.proto.printable import printable
from relaymta.store.formats import FLAGS, MOST, Broken, Stored, atoms, from_disk, seconds_of, to_disk

__all__ = ["Writer", "folder_of", "folders", "read"]

INBOX: Final = "INBOX"
KEYWORDS = "dovecot-keywords"
LONG_NAME = "relaymta-name"

_LETTERS: Final = {"D": "\\Draft", "F": "\\Flagged", "R": "\\Answered", "S": "\\Seen", "T": "\\Deleted"}  # in order (Maildir)
_PASSED = "$Forwarded"  # what the letter P says
_SMALL = "abcdefghijklmnopqrstuvwxyz"
_KEYWORDS_MOST = 256  # of a mailbox

_FLAGS = re.compile(r"[:;!]2,([A-Za-z]*)[^/]*\Z")
_MORE = re.compile(r"-?\d+\.[\w-]+\.relaymta,K=([0-9a-f]{1,1000})(?::|\Z)", re.ASCII)
_OURS = re.compile(r"-?\d+\.([\w-]+)\.relaymta[,:]", re.ASCII)
_SECONDS = re.compile(r"(-?\d{1,12})(?!\d)", re.ASCII)
_KEY = re.compile(r"[\w-]{1,100}", re.ASCII)
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9]+")

_NAME_MOST = 255  # octets of a file name
_SMALL_FILE = 1 << 16  # octets of dovecot-keywords and relaymta-name
_DAY = 86400
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo without a writer does not block

_KINDS: Final = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a fifo"))
_ERRORS: Final = {errno.ELOOP: "a symbolic link", errno.ENOTDIR: "no directory, or a symbolic link", errno.ENXIO: "a socket"}


def folder_of(root: Path, mailbox: str) -> Path:
    """Where a mailbox is in the Maildir `root`. ValueError: the name cannot be encoded."""
    if mailbox == INBOX:
        return root
    name = "." + ".".join(encode(level).replace(".", "&AC4-") for level in mailbox.split("/"))
    if len(name) > _NAME_MOST:
        name = f".{_NOT_PLAIN.sub('_', mailbox)[:100]}-{sha256(mailbox.encode()).hexdigest()[:32]}"
    return root / name


def folders(root: Path) -> list[tuple[str, Path | Broken]]:
    """The mailboxes of a Maildir and their folders, INBOX first; Broken for those that cannot be read or whose names are not
    allowed. Names that are no modified UTF-7 are taken as they are. Two folders may have the same name. OSError."""
    found: list[tuple[str, Path | Broken]] = [(INBOX, root)] if _is_maildir(root) else []
    for name in sorted(os.listdir(root)):
        path, mailbox = root / name, name
        try:
            if not name.startswith(".") or not _is_maildir(path):
                continue
            if path.is_symlink():
                raise OSError(errno.ELOOP, "")
            mailbox = _mailbox(path)
            reason = problem(mailbox)
        except (OSError, ValueError) as error:
            reason = _reason(error)
        found.append((mailbox, path if reason is None else Broken(printable(name), reason)))
    return found


def _is_maildir(path: Path) -> bool:
    for sub in ("cur", "new"):
        with suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR(os.stat(path / sub).st_mode):
                return True
    return False


def _mailbox(path: Path) -> str:
    """The name of the mailbox in a folder. ValueError: there cannot be one of its name."""
    with _directory(path) as folder:
        try:
            return _content(folder, LONG_NAME, _SMALL_FILE)[0].decode()
        except FileNotFoundError:
            return "/".join(map(_level, path.name[1:].split(".")))


def _level(text: str) -> str:
    try:
        level = decode(text, lenient=True)
    except ValueError:
        level = text
    if "/" in level:
        raise ValueError("a level of the name has a slash")
    return unicodedata.normalize("NFC", level)


def read(path: Path, most: int = MOST) -> Iterator[tuple[str, Stored | Broken]]:
    """(name of its file in the folder, message) of each message in new/ and cur/ of one folder, in the order of the seconds in
    their names, each read when it is asked for; keywords in the order of their numbers. Broken: what is no file, or not readable,
    or has more than `most` octets. Memory for the names of all and one message. OSError: of the folder itself."""
    with ExitStack() as stack:
        folder = stack.enter_context(_directory(path))
        try:
            known = _known(folder)
        except (OSError, ValueError) as error:
            known = {}
            yield KEYWORDS, Broken(KEYWORDS, _reason(error))
        names: list[tuple[str, int, str]] = []
        for sub in ("new", "cur"):
            try:
                number = stack.enter_context(_directory(sub, folder))
                names += ((sub, number, name) for name in os.listdir(number) if not name.startswith("."))
            except FileNotFoundError:
                pass
            except OSError as error:
                yield sub, Broken(sub, _reason(error))
        names.sort(key=_order)
        for sub, number, name in names:
            place = f"{sub}/{name}"
            try:
                yield place, _stored(number, name, most, known)
            except (OSError, ValueError) as error:
                yield place, Broken(printable(place), _reason(error))


def _order(entry: tuple[str, int, str]) -> tuple[int, int, str, str, str]:
    """Names of a second in the order of numbers that are not padded, whatever their flags are."""
    sub, _, name = entry
    seconds = _SECONDS.match(name)
    unique = re.split("[:,]", name, maxsplit=1)[0]
    return int(seconds[1]) if seconds else 0, len(unique), unique, name, sub


def _stored(folder: int, name: str, most: int, known: dict[int, str]) -> Stored:
    """OSError, ValueError: the message cannot be read."""
    data, found = _content(folder, name, most)
    letters = match[1] if (match := _FLAGS.search(name)) else ""
    flags = {flag for letter, flag in _LETTERS.items() if letter in letters}
    bits = sum(1 << number for number, letter in enumerate(_SMALL) if letter in letters)
    if more := _MORE.match(name):
        bits |= int(more[1], 16) << len(_SMALL)
    words = [known[number] for number in sorted(known) if bits >> number & 1] if bits else []
    if "P" in letters:
        words.append(_PASSED)
    return Stored(from_disk(data), float(_date(name, found)), [flag for flag in FLAGS if flag in flags], atoms(words))


def _date(name: str, found: os.stat_result) -> int:
    """When a file's message came: its mtime; when nobody has set that, or it lies in the future, the seconds in its name."""
    mtime = int(found.st_mtime_ns // 1_000_000_000)
    seconds = _SECONDS.match(name)
    return mtime if seconds is None or 0 < mtime < time.time() + _DAY else seconds_of(int(seconds[1]))


def _known(folder: int) -> dict[int, str]:
    """The keywords of a folder by their numbers. OSError, ValueError: they cannot be read."""
    known: dict[int, str] = {}
    with suppress(FileNotFoundError):
        for line in _content(folder, KEYWORDS, _SMALL_FILE)[0].decode("utf-8", "replace").splitlines():
            number, _, word = line.partition(" ")
            if number.isascii() and number.isdigit() and len(number) < 4 and int(number) < _KEYWORDS_MOST and word:
                known.setdefault(int(number), word)
    return known


def _content(folder: int, name: str, most: int) -> tuple[bytes, os.stat_result]:
    """What a file in a folder has. OSError; ValueError: it is no file, or has more than `most` octets."""
    number = os.open(name, _FILE, dir_fd=folder)
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(next((what for test, what in _KINDS if test(found.st_mode)), "no file"))
        if found.st_size > most:
            raise ValueError(f"more than {most} octets")
        return os.read(number, found.st_size), found
    finally:
        os.close(number)


@contextmanager
def _directory(path: str | Path, folder: int | None = None) -> Iterator[int]:
    """The descriptor of a directory; of one within `folder`, it is no symbolic link."""
    number = os.open(path, _DIRECTORY if folder is None else _DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield number
    finally:
        os.close(number)


def _reason(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return "not UTF-8" if isinstance(error, UnicodeError) else str(error)
    return _ERRORS.get(error.errno or 0) or error.strerror or str(error)


class Writer:
    """Writes the messages of a mailbox to the Maildir `root`. What was written before, by an export that was interrupted, is not
    written again. One at a time for each folder. OSError of all methods."""

    def __init__(self, root: Path, mailbox: str) -> None:
        """The folder of the mailbox, made if it is not there; ValueError when there can be none of its name."""
        if wrong := problem(mailbox):
            raise ValueError(wrong)
        path = folder_of(root, mailbox)
        made = [one for one in (root.absolute(), *root.absolute().parents) if not one.exists()]
        self._paths = (path, root, *(one.parent for one in made))
        for one in (root, path, *(path / sub for sub in ("cur", "new", "tmp"))):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as stack:
            self._folder = stack.enter_context(_directory(path))
            self._cur, new, self._tmp = (stack.enter_context(_directory(sub, self._folder)) for sub in ("cur", "new", "tmp"))
            self._there = {match[1] for sub in (self._cur, new) for name in os.listdir(sub) if (match := _OURS.match(name))}
            try:
                self._known = _known(self._folder)
            except ValueError as error:
                raise OSError(errno.EINVAL, str(error), str(path / KEYWORDS)) from None
            if path != root:
                self._replace("maildirfolder", b"")
            if path != root and _mailbox(path) != mailbox:
                self._replace(LONG_NAME, mailbox.encode())
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        """Whether the message of a key is there."""
        return key in self._there

    def write(self, key: str, stored: Stored) -> bool:
        """Write a message; False when it is there. `key`: names it for good within its mailbox (letters, digits, - and _, at most
        100). It is safe after `close`. ValueError, and nothing is written: the key, or a keyword, is none."""
        if not _KEY.fullmatch(key) or atoms(stored.keywords) != stored.keywords:
            raise ValueError(f"no key or no keywords: {key!r} {stored.keywords}")
        if key in self._there:
            return False
        bits = self._bits(stored.keywords)
        seconds = seconds_of(stored.date)
        name = f"{seconds}.{key}.relaymta"
        more = bits >> len(_SMALL)
        letters = "".join(letter for letter, flag in _LETTERS.items() if flag in stored.flags)
        letters += "".join(letter for number, letter in enumerate(_SMALL) if bits >> number & 1)
        self._put(name, to_disk(stored.data), seconds)
        final = f"{name},K={more:x}:2,{letters}" if more else f"{name}:2,{letters}"
        os.rename(name, final, src_dir_fd=self._tmp, dst_dir_fd=self._cur)
        self._there.add(key)
        return True

    def close(self) -> None:
        """Sync the directories."""
        with self._stack:
            os.fsync(self._cur)
            for path in self._paths:
                with _directory(path) as number:
                    os.fsync(number)

    def _bits(self, keywords: list[str]) -> int:
        """The numbers of keywords as bits. New ones are in the file of the folder before a message has them."""
        numbers = {word.lower(): number for number, word in self._known.items()}
        new = [word for word in keywords if word.lower() not in numbers]
        free = (number for number in range(_KEYWORDS_MOST) if number not in self._known)
        added = dict(zip(free, new, strict=False))
        if len(added) < len(new):
            raise ValueError(f"more than {_KEYWORDS_MOST} keywords")
        if added:
            known = self._known | added
            self._replace(KEYWORDS, "".join(f"{number} {word}\n" for number, word in sorted(known.items())).encode())
            self._known = known
            numbers |= {word.lower(): number for number, word in added.items()}
        return sum(1 << numbers[word.lower()] for word in keywords)

    def _replace(self, name: str, data: bytes) -> None:
        """Write a file of the folder."""
        self._put(name, data)
        os.rename(name, name, src_dir_fd=self._tmp, dst_dir_fd=self._folder)

    def _put(self, name: str, data: bytes, mtime: int | None = None) -> None:
        """A new file in tmp/, synced. What an interruption has left of it is replaced."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._tmp)
        number = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._tmp)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(number, view) :]
            if mtime is not None:
                os.utime(number, (mtime, mtime))
            os.fsync(number)
        except BaseException:
            os.unlink(name, dir_fd=self._tmp)
            raise
        finally:
            os.close(number)
