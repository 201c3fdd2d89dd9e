"""What `relaymta mailbox` does with the files of mailboxes. (Apart from mailbox.py, since it imports the store.)"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta import __version__
from relaymta.cli.console import say
from relaymta.cli.options import Configuration, fail
from relaymta.cli.peer import Daemon, answered, asked, counted, daemon, spool_of, unused_spool
from relaymta.disk.shards import MAIL
from relaymta.errors import RelayError, StoreError
from relaymta.privileges import owner_of
from relaymta.store.backup import copy_shard, renumber
from relaymta.store.carry import Carried
from relaymta.store.directory import User
from relaymta.store.files import MailFiles
from relaymta.store.repair import repair
from relaymta.store.shown import row_of, shown
from relaymta.store.verify import contradictions

__all__ = ["backup", "check_empty", "missing_addresses", "restore", "show", "users", "verify"]

if TYPE_CHECKING:
    from relaymta.config import Config

TOGETHER = 500  # users of a page
MARK = "relaymta-backup.json"  # the last file of a backup


@contextmanager
def mail_files(read: Configuration) -> Iterator[MailFiles]:
    """The mailboxes of the spool, whether the relay runs or not."""
    _, spool = spool_of(read)
    with answered(lambda: MailFiles(spool / MAIL)) as files:
        yield files


def missing_addresses(config: "Config") -> Iterator[str]:
    """A sentence for each address that a domain with mailboxes must have (RFC 5321 4.5.1, RFC 2142), and nobody has. None where
    the mailboxes cannot be read, or are not there yet."""
    try:
        with MailFiles(Path(config.spool) / MAIL) as files:
            for domain in config.local_domains:
                for name in ("postmaster", "abuse"):
                    address = f"{name}@{domain}"
                    if not domain.startswith(".") and files.directory.find(address, config.mailboxes.subaddress) is None:
                        yield f"nobody has {address}, as somebody must: `relaymta mailbox alias {address} ADDRESS`"
    except (RelayError, OSError):
        return


def users(read: Configuration) -> Iterator[list[dict[str, Any]]]:
    """All users as the command line shows them, in pages."""
    with mail_files(read) as files:
        found = files.users()
        while page := answered(lambda: [row_of(user) for user in islice(found, TOGETHER)]):
            yield page


def show(read: Configuration, address: str, messages: bool) -> dict[str, Any]:
    """A user, with addresses and mailboxes; `messages`: with the first messages of each."""
    with mail_files(read) as files:
        return answered(lambda: _shown(files, address, messages))


def _shown(files: MailFiles, address: str, messages: bool) -> dict[str, Any]:
    user = files.directory.known(address)
    mailboxes = shown(files.shard(user.shard), user.ident, messages)
    return row_of(user) | {"addresses": files.directory.owned(user.ident)} | mailboxes


# Backup and restore


def backup(read: Configuration, folder: Path) -> None:
    """Back up all mailboxes into a new folder."""
    peer, spool = spool_of(read)
    folder = folder.absolute()
    check_empty(folder, "a backup needs a new one")
    made = Path(asked(peer, "mailbox_back_up")) if peer is not None else answered(lambda: _copied(spool / MAIL))
    try:
        answered(lambda: _collect(made, folder))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    with answered(lambda: MailFiles(folder)) as files:
        say(f"{folder} is a backup of {counted(files.directory.count(), 'user', 'users')}")


def check_empty(folder: Path, why: str) -> None:
    """End the program (69) unless a folder is new or empty."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            fail(69, f"{folder} is not empty: {why}")
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 74, f"{folder}: {error.strerror}")


def _copied(mail: Path) -> Path:
    """As the daemon's `mailbox_back_up`, while none runs."""
    folder = mail / f"backup-{time.time_ns()}"
    with MailFiles(mail) as files:
        try:
            files.directory.copy(folder / "directory")
            for number in files.shards():
                copy_shard(files.shard(number).rows, mail / f"shard-{number}" / "bodies", folder / f"shard-{number}")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _collect(made: Path, folder: Path) -> None:
    """Give the files of a backup in the spool names in `folder`, or copy them where that is on another file system."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(made.rglob("*")):
            new = folder / path.relative_to(made)
            if path.is_dir():
                new.mkdir(mode=0o700, exist_ok=True)
            else:
                _take(path, new)
        (folder / MARK).write_text(json.dumps({"version": __version__, "created": round(time.time())}) + "\n")
        _sync_all(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}") from None


def _take(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, new)
    new.chmod(0o600)


def _sync_all(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def restore(read: Configuration, folder: Path, address: str) -> None:
    """Restore all mailboxes from a backup into a spool that has none, or one user into the running relay."""
    folder = folder.absolute()
    if not (folder / MARK).is_file():
        fail(65, f"{folder} is no complete backup (there is no {MARK})")
    if address:
        _restore_user(daemon(read), folder, address)
    else:
        spool = unused_spool(read)
        answered(lambda: _restore_all(folder, spool))


def _restore_all(folder: Path, spool: Path) -> None:
    mail, made = spool / MAIL, spool / f"{MAIL}.restoring"
    if (mail / "directory" / "data.mdb").exists():
        with MailFiles(mail) as files:
            if count := files.directory.count():
                raise RelayError(f"{mail} has {counted(count, 'user', 'users')} already: restore into another spool, or one user")
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(folder, made, ignore=lambda path, names: [MARK] if Path(path) == folder else [])
        with MailFiles(made) as files:
            count, shards = files.directory.count(), files.shards()
        for number in shards:
            renumber(made / f"shard-{number}", int(time.time()))
        owner = owner_of(spool)
        for path in [made, *made.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.chown(path, owner.pw_uid, owner.pw_gid)
        _sync_all(made)
        if mail.exists():
            mail.rename(spool / f"{MAIL}.before-{time.time_ns()}")
        made.rename(mail)
        _sync(spool)
    except OSError as error:
        raise StoreError(f"{error.filename or spool}: {error.strerror}") from None
    say(f"{counted(count, 'user is', 'users are')} restored; all mailboxes have new UIDVALIDITYs, so clients load them again")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _restore_user(peer: Daemon, folder: Path, address: str) -> None:
    with answered(lambda: MailFiles(folder)) as files:
        user = answered(lambda: files.directory.known(address))
        ident, shard = asked(peer, "mailbox_begin_restore", address=user.address)
        carried = Carried(answered(lambda: files.shard(user.shard)), user.ident, int(time.time()))
        parts, count = carried.parts(), 0
        while (part := answered(lambda: next(parts, None))) is not None:
            objects = asked(peer, "mailbox_restore", ident=ident, shard=shard, part=part)
            carried.put(part, objects)
            count += len(objects)
        row = User(ident, user.address, shard, user.octets, user.messages, user.secret, user.disabled)
        refused = asked(peer, "mailbox_end_restore", user=row, addresses=files.directory.owned(user.ident))
    say(f"{user.address} is restored with {counted(count, 'message', 'messages')}")
    if refused:
        say(f"these addresses belong to others now: {', '.join(refused)}", err=True)


# Verification


def verify(read: Configuration, mends: bool) -> None:
    """Say what is wrong with the mailboxes; `mends`: correct what can be."""
    peer, spool = spool_of(read)
    if mends and peer is not None:
        fail(75, "the relay is running: stop it first")
    if mends:
        for sentence in answered(lambda: list(repair(spool / MAIL))):
            say(sentence)
    wrong = 0
    with answered(lambda: MailFiles(spool / MAIL)) as files:
        shards = files.shards()
        placed: dict[int, set[int]] = {number: set() for number in shards}
        for user in answered(lambda: list(files.users())):
            placed.setdefault(user.shard, set()).add(user.ident)
        for number in shards:
            known = placed[number] if peer is None else None  # users come and go while the relay runs
            for sentence in answered(lambda: _wrong(files, number, known)):  # noqa: B023 (called at once)
                wrong += 1
                say(f"shard {number}: {sentence}")
    if wrong:
        say(f"{counted(wrong, 'contradiction', 'contradictions')}", err=True)
        sys.exit(65)
    say(f"{counted(len(shards), 'shard', 'shards')}: nothing is wrong")


def _wrong(files: MailFiles, number: int, known: set[int] | None) -> list[str]:
    reader = files.shard(number)
    return list(contradictions(reader.rows, reader.bodies, known))
