"""`relaymta mailbox export` and `import`: a user's mail as Maildir++ or mbox."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from relaymta.cli.console import say
from relaymta.cli.mail_files import check_empty
from relaymta.cli.options import Configuration, fail
from relaymta.cli.peer import Daemon, answered, asked, counted, daemon, spool_of
from relaymta.disk.shards import MAIL
from relaymta.errors import StoreError
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
    with answered(lambda: MailFiles(spool / MAIL)) as files:
        user = answered(lambda: files.directory.known(address))
        mark = {"user": user.address, "format": form}
        _begin(folder, mark)
        reader = answered(lambda: files.shard(user.shard))
        try:
            count = sum(_EXPORTS[form](reader, row, folder, wrong) for row in _mailboxes(reader, user))
            (folder / MARK).unlink()
        except OSError as error:
            _failed(error, folder)
    say(f"{user.address}: {counted(count, 'message', 'messages')} in {folder}")
    wrong.end()


def _begin(folder: Path, mark: dict[str, str]) -> None:
    try:
        if not (folder / MARK).exists():
            check_empty(folder, "an export needs a new one")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / MARK).write_text(json.dumps(mark) + "\n")
        elif json.loads((folder / MARK).read_text()) != mark:
            fail(69, f"{folder} has another export that was interrupted ({(folder / MARK).read_text().strip()})")
    except OSError as error:
        _failed(error, folder)


def _failed(error: OSError, folder: Path) -> NoReturn:
    fail(77 if isinstance(error, PermissionError) else 74, f"{error.filename or folder}: {error.strerror or error}")


def _mailboxes(reader: ShardReader, user: User) -> list[MailboxRow]:
    with reader.rows.reading() as txn:
        return [row for row in reader.rows.mailboxes(txn, user.ident) if row.mailbox]


def _stored(reader: ShardReader, row: MailboxRow, wrong: _Complaints) -> Iterator[tuple[int, MessageRow, list[str]]]:
    """(UID, row, names of flags) of the messages of a mailbox."""
    for page in pages(reader.rows, row.mailbox):
        with reader.rows.reading() as txn:
            state = reader.rows.state(txn, row.mailbox)
        if state is None:
            return
        for record, message in page:
            yield record.uid, message, flags_of(record.flags, state)


def _message(reader: ShardReader, message: MessageRow, names: list[str], place: str, wrong: _Complaints) -> Stored | None:
    try:
        data = data_of(reader.rows, reader.bodies, message)
    except Refusal:  # expunged meanwhile
        return None
    except StoreError as error:
        wrong(place, str(error))
        return None
    flags = [name for name in names if name in FLAGS]
    return Stored(data, message.date / 1000, flags, atoms([name for name in names if name not in FLAGS]))


def _to_maildir(reader: ShardReader, row: MailboxRow, folder: Path, wrong: _Complaints) -> int:
    count = 0
    try:
        with maildir.Writer(folder, row.name) as writer:
            for uid, message, names in _stored(reader, row, wrong):
                key = f"{row.mailbox}-{uid}"
                if key in writer:
                    count += 1
                elif (stored := _message(reader, message, names, f"{row.name}, UID {uid}", wrong)) is not None:
                    count += writer.write(key, stored)
    except ValueError as error:
        wrong(row.name, str(error))
    return count


def _to_mbox(reader: ShardReader, row: MailboxRow, folder: Path, wrong: _Complaints) -> int:
    name = INBOX if row.name == INBOX else maildir.folder_of(folder, row.name).name[1:]
    path, part = folder / (name + SUFFIX), folder / (name + SUFFIX + PART)
    count = 0
    with part.open("wb") as file:
        for uid, message, names in _stored(reader, row, wrong):
            stored = _message(reader, message, names, f"{row.name}, UID {uid}", wrong)
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
    peer = daemon(read)
    _, spool = spool_of(read)
    wrong = _Complaints()
    with answered(lambda: MailFiles(spool / MAIL)) as files:
        user = answered(lambda: files.directory.known(address))
        reader = answered(lambda: files.shard(user.shard))
        put = there = 0
        try:
            for name, messages in _sources(path, mailbox, wrong):
                if reason := problem(name):
                    wrong(str(path), f"mailbox {name[:60]!r}: {reason}")
                    continue
                new, old = _put(peer, user, name, messages, answered(lambda: _known(reader, user, name)))  # noqa: B023
                put, there = put + new, there + old
        except OSError as error:
            _failed(error, path)
    say(f"{user.address}: {counted(put, 'message', 'messages')} imported" + (f", {there} were there already" if there else ""))
    wrong.end()


def _sources(path: Path, mailbox: str, wrong: _Complaints) -> Iterator[tuple[str, Iterable[Stored]]]:
    """(mailbox, its messages) of what is imported."""
    if not path.is_dir():
        with path.open("rb") as file:
            yield mailbox or INBOX, _good(str(path), mbox.read(file, MOST), wrong)
    elif (path / "cur").is_dir():
        yield from _folders(path, mailbox, wrong)
    else:
        files = sorted(one for one in path.iterdir() if one.suffix == SUFFIX)
        if not files:
            fail(65, f"{path} is neither a Maildir (it has no cur/) nor a folder of {SUFFIX} files")
        for one in files:
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
    return name if not mailbox else mailbox if name == INBOX else f"{mailbox}/{name}"


def _good(path: str, read: Iterator[Stored | Broken], wrong: _Complaints) -> Iterator[Stored]:
    for found in read:
        if isinstance(found, Broken):
            wrong(f"{path}: {found.place}", found.reason)
        else:
            yield found


def _known(reader: ShardReader, user: User, name: str) -> Counter[tuple[bytes, int]]:
    """The messages of a mailbox by what tells them apart."""
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


def _put(peer: Daemon, user: User, name: str, messages: Iterable[Stored], known: Counter[tuple[bytes, int]]) -> tuple[int, int]:
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
            asked(peer, "mailbox_import", address=user.address, name=name, messages=batch)
            batch, octets = [], 0
        batch.append((stored.flags, stored.keywords, int(stored.date * 1000), stored.data))
        octets += len(stored.data)
        put += 1
    if batch:
        asked(peer, "mailbox_import", address=user.address, name=name, messages=batch)
    return put, there
