"""`relaymta mailbox export` and `import`: a user's mail as Maildir++ or mbox."""

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from relaymta.cli.console import say
from relaymta.cli.mail_files import as_owner, check_empty, failed
from relaymta.cli.options import Configuration, fail
from relaymta.cli.peer import Daemon, answered, asked, counted, daemon, spool_of
from relaymta.disk.shards import MAIL
from relaymta.errors import StoreError
from relaymta.proto.mailbox_list import canonical
from relaymta.proto.mailbox_name import decode, problem
from relaymta.store import maildir, mbox
from relaymta.store.change import Refusal
from relaymta.store.directory import User
from relaymta.store.files import MailFiles
from relaymta.store.formats import FLAGS, Broken, Stored, atoms
from relaymta.store.reading import ShardReader, data_of, pages
from relaymta.store.rows import INBOX, MailboxRow, MessageRow
from relaymta.store.shown import flags_of

__all__ = ["export", "import_from"]

MARK = "relaymta-export.json"  # in a folder whose export has not ended
SUFFIX, PART = ".mbox", ".part"
TOGETHER, OCTETS_TOGETHER = 200, 4 << 20  # messages of one request
NAME_MOST = 255  # octets of a file name
MOST = 60 << 20  # octets of a message: a request has at most 64 MB


class _Complaints:
    """What could not be read, named on standard error as it is found."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, place: str, reason: str) -> None:
        self.count += 1
        say(f"{place}: {reason}", err=True)

    def end(self) -> None:
        """End the program (65) when there were any."""
        if self.count:
            say(f"{counted(self.count, 'message or mailbox was', 'messages or mailboxes were')} left out", err=True)
            sys.exit(65)


# Export


def export(read: Configuration, address: str, folder: Path, form: str) -> None:
    """Export a user's mailboxes into a folder, which is new, or has an export of them that was interrupted."""
    _, spool = spool_of(read)
    folder, wrong = folder.absolute(), _Complaints()
    with _opened(spool) as files:
        with as_owner(spool):
            user = answered(lambda: files.directory.known(address))
            reader = answered(lambda: files.shard(user.shard))
            mailboxes = _mailboxes(reader, user)
        _begin(folder, {"user": user.address, "format": form})
        try:
            count = sum(_EXPORTS[form](Source(spool, reader, row, wrong), folder) for row in mailboxes)
            (folder / MARK).unlink()
        except OSError as error:
            failed(error, folder)
    say(f"{user.address}: {counted(count, 'message', 'messages')} in {folder}")
    wrong.end()


def _begin(folder: Path, mark: dict[str, str]) -> None:
    try:
        if not (folder / MARK).exists():
            check_empty(folder, "an export needs a new one")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(folder)
            (folder / MARK).write_text(json.dumps(mark) + "\n")
            return
        _check_own(folder)
        if json.loads((folder / MARK).read_text()) != mark:
            fail(69, f"{folder} has another export that was interrupted ({(folder / MARK).read_text().strip()})")
    except OSError as error:
        failed(error, folder)


def _check_own(folder: Path) -> None:
    """End the program (77) where others could prepare links in a folder."""
    found = folder.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode):
        fail(77, f"{folder} is not a folder of yours that only you can write to: name a new one")


def _mailboxes(reader: ShardReader, user: User) -> list[MailboxRow]:
    with reader.rows.reading() as txn:
        return [row for row in reader.rows.mailboxes(txn, user.ident) if row.mailbox]


@contextmanager
def _opened(spool: Path) -> Iterator[MailFiles]:
    """The mailboxes, opened with the rights of the spool's owner."""
    with as_owner(spool):
        files = answered(lambda: MailFiles(spool / MAIL))
    with files:
        yield files


class Source:
    """A mailbox that is exported. What is read in the spool is read with the rights of its owner."""

    def __init__(self, spool: Path, reader: ShardReader, row: MailboxRow, wrong: _Complaints) -> None:
        self._spool = spool
        self._reader = reader
        self.row = row
        self.wrong = wrong

    def messages(self) -> Iterator[tuple[str, MessageRow, list[str]]]:
        """(a key for good, row, names of flags) of each."""
        found = pages(self._reader.rows, self.row.mailbox)
        while True:
            with as_owner(self._spool):
                page = next(found, None)
                with self._reader.rows.reading() as txn:
                    state = self._reader.rows.state(txn, self.row.mailbox)
            if page is None or state is None:
                return
            for record, message in page:
                yield f"{state.uidvalidity}-{record.uid}", message, flags_of(record.flags, state)

    def stored(self, key: str, message: MessageRow, names: list[str]) -> Stored | None:
        """A message; None when it is gone, or cannot be read, which is said."""
        try:
            with as_owner(self._spool):
                data = data_of(self._reader.rows, self._reader.bodies, message)
        except Refusal:  # expunged meanwhile
            return None
        except StoreError as error:
            self.wrong(f"{self.row.name}, UID {key.partition('-')[2]}", str(error))
            return None
        flags = [name for name in names if name in FLAGS]
        return Stored(data, message.date / 1000, flags, atoms([name for name in names if name not in FLAGS]))


def _to_maildir(source: Source, folder: Path) -> int:
    count = 0
    try:
        with maildir.Writer(folder, source.row.name) as writer:
            for key, message, names in source.messages():
                if key in writer:
                    count += 1
                elif (stored := source.stored(key, message, names)) is not None:
                    count += writer.write(key, stored)
    except ValueError as error:
        source.wrong(source.row.name, str(error))
    return count


def _to_mbox(source: Source, folder: Path) -> int:
    name = INBOX if source.row.name == INBOX else maildir.folder_of(folder, source.row.name).name[1:]
    path, part = folder / (name + SUFFIX), folder / (name + SUFFIX + PART)
    if len(os.fsencode(part.name)) > NAME_MOST:
        source.wrong(source.row.name, "the name is too long for a file: export it as Maildir")
        return 0
    part.unlink(missing_ok=True)
    count = 0
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "wb") as file:
        for key, message, names in source.messages():
            stored = source.stored(key, message, names)
            if stored is not None:
                mbox.write(file, stored)
                count += 1
    part.rename(path)
    return count


_EXPORTS = {"maildir": _to_maildir, "mbox": _to_mbox}


# Import


def import_from(read: Configuration, address: str, path: Path, mailbox: str) -> None:
    """Import a Maildir, an mbox file or a folder of such files. A message that is in its mailbox, with the same date, is left
    out, so that an import that was interrupted can be repeated."""
    if mailbox and (reason := problem(mailbox)):
        fail(64, f"--mailbox: {reason}")
    if not (path.is_file() or path.is_dir()):  # a fifo would be waited for, and a device may have no end
        fail(65, f"{path} is neither a file nor a folder: write what is to be imported to a file first")
    peer = daemon(read)
    _, spool = spool_of(read)
    wrong = _Complaints()
    put = there = 0
    with _opened(spool) as files:
        with as_owner(spool):
            user = answered(lambda: files.directory.known(address))
        try:
            for name, messages in _sources(path, mailbox, wrong):
                if reason := problem(name):
                    wrong(str(path), f"mailbox {name[:60]!r}: {reason}")
                    continue
                with as_owner(spool):
                    known = answered(lambda: _known(files, user, name))  # noqa: B023 (called at once)
                new, old = _put(peer, user, name, messages, known, wrong)
                put, there = put + new, there + old
        except OSError as error:
            failed(error, path)
    say(f"{user.address}: {counted(put, 'message', 'messages')} imported" + (f", {there} were there already" if there else ""))
    wrong.end()


def _sources(path: Path, mailbox: str, wrong: _Complaints) -> Iterator[tuple[str, Iterable[Stored]]]:
    """(mailbox, its messages) of what is imported."""
    if not path.is_dir():
        with path.open("rb") as file:
            yield _below("", mailbox or INBOX), _good(str(path), mbox.read(file, MOST), wrong)
    elif (path / "cur").is_dir():
        yield from _folders(path, mailbox, wrong)
    else:
        files = sorted(one for one in path.iterdir() if one.suffix == SUFFIX)
        if not files:
            fail(65, f"{path} is neither a Maildir (it has no cur/) nor a folder of {SUFFIX} files")
        for one in files:
            if not one.is_file():
                wrong(str(one), "not a file")
                continue
            name = "/".join(decode(level, lenient=True) for level in one.stem.split("."))
            with one.open("rb") as file:
                yield _below(mailbox, name), _good(str(one), mbox.read(file, MOST), wrong)


def _folders(path: Path, mailbox: str, wrong: _Complaints) -> Iterator[tuple[str, Iterable[Stored]]]:
    for name, folder in maildir.folders(path):
        if isinstance(folder, Broken):
            wrong(folder.place, folder.reason)
        else:
            read = (found for _, found in maildir.read(folder, MOST))
            yield _below(mailbox, name), _good(str(folder), read, wrong)


def _below(mailbox: str, name: str) -> str:
    """A mailbox of what is imported, below the one that --mailbox names, which gets INBOX."""
    name = canonical(name)
    return name if not mailbox else mailbox if name == INBOX else f"{mailbox}/{name}"


def _good(path: str, read: Iterator[Stored | Broken], wrong: _Complaints) -> Iterator[Stored]:
    for found in read:
        if isinstance(found, Broken):
            wrong(f"{path}: {found.place}", found.reason)
        else:
            yield found


def _known(files: MailFiles, user: User, name: str) -> Counter[tuple[bytes, int]]:
    """The messages of a mailbox by what tells them apart. Where the user is now: the user may have been moved."""
    reader = files.shard(files.directory.known(user.address).shard)
    with reader.rows.reading() as txn:
        row = reader.rows.mailbox(txn, user.ident, name)
    found: Counter[tuple[bytes, int]] = Counter()
    for page in pages(reader.rows, row.mailbox) if row is not None and row.mailbox else ():
        for _, message in page:
            try:
                found[sha256(data_of(reader.rows, reader.bodies, message)).digest(), message.date // 1000] += 1
            except (StoreError, Refusal):
                continue
    return found


def _put(
    peer: Daemon, user: User, name: str, messages: Iterable[Stored], known: Counter[tuple[bytes, int]], wrong: _Complaints
) -> tuple[int, int]:
    """How many messages were put into a mailbox, and how many were there."""
    batch: list[Any] = []
    octets = put = there = 0
    for stored in messages:
        key = sha256(stored.data).digest(), int(stored.date)
        if known[key]:  # one of them is this one
            known[key] -= 1
            there += 1
            continue
        if batch and (len(batch) >= TOGETHER or octets + len(stored.data) > OCTETS_TOGETHER):
            put += _sent(peer, user, name, batch, wrong)
            batch, octets = [], 0
        batch.append((stored.flags, stored.keywords, int(stored.date * 1000), stored.data))
        octets += len(stored.data)
    return put + _sent(peer, user, name, batch, wrong), there


def _sent(peer: Daemon, user: User, name: str, batch: list[Any], wrong: _Complaints) -> int:
    """How many messages of a batch are there now; those that are refused are named."""
    if not batch:
        return 0
    refused = [reason for reason in asked(peer, "mailbox_import", address=user.address, name=name, messages=batch) if reason]
    for reason in refused:
        wrong(name, reason)
    return len(batch) - len(refused)
