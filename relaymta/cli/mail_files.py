"""What `relaymta mailbox` does with the files of mailboxes. (Apart from mailbox.py, since it imports the store.)"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

from relaymta import __version__
from relaymta.cli.console import say
from relaymta.cli.options import Configuration, fail
from relaymta.cli.peer import Daemon, answered, asked, counted, daemon, spool_of, unused_spool
from relaymta.disk.big import BigFile
from relaymta.disk.lock import locked_shard
from relaymta.disk.segments import open_verified
from relaymta.disk.shards import MAIL
from relaymta.errors import RelayError, SpoolBusy, StoreError
from relaymta.privileges import acting_as_owner
from relaymta.store.backup import copy_shard, renumber
from relaymta.store.carry import Carried
from relaymta.store.directory import REMOVING, User, row_of
from relaymta.store.files import MailFiles, import_all
from relaymta.store.repair import repair
from relaymta.store.shown import shown
from relaymta.store.verify import contradictions

__all__ = [
    "as_owner",
    "backup",
    "check_empty",
    "check_writable",
    "collect",
    "failed",
    "mail_files",
    "missing_addresses",
    "restore",
    "show",
    "sync_file",
    "users",
    "verify",
]

if TYPE_CHECKING:
    from relaymta.config import Config

TOGETHER = 500  # users of a page
TRIES = 5
MARK = "relaymta-backup.json"  # the last file of a backup


@contextmanager
def mail_files(read: Configuration) -> Iterator[MailFiles]:
    """The mailboxes of the spool, whether the relay runs or not, with the rights of the spool's owner."""
    _, spool = spool_of(read)
    with as_owner(spool), answered(lambda: MailFiles(spool / MAIL)) as files:
        yield files


@contextmanager
def as_owner(spool: Path) -> Iterator[None]:
    """As `privileges.acting_as_owner`: what the relay's user can write, such as links, must not lead root elsewhere."""
    import_all()
    with acting_as_owner(spool):
        yield


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
    _, spool = spool_of(read)
    folder = folder.absolute()
    check_empty(folder, "a backup needs a new one")
    check_writable(folder)
    with as_owner(spool):
        made = answered(lambda: _steady_copy(spool / MAIL))
    try:
        answered(lambda: collect(spool, made, folder, "directory"))
        answered(lambda: _mark(folder))
    finally:
        with as_owner(spool):
            shutil.rmtree(made, ignore_errors=True)
    with answered(lambda: MailFiles(folder)) as files:
        say(f"{folder} is a backup of {counted(files.directory.count(), 'user', 'users')}")


def _mark(folder: Path) -> None:
    """Write what says that a backup is complete."""
    try:
        mark = folder / MARK
        mark.write_text(json.dumps({"version": __version__, "created": round(time.time())}) + "\n")
        sync_file(mark)
        sync_file(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}") from None


def check_empty(folder: Path, why: str) -> None:
    """End the program (69) unless a folder is new or empty."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            fail(69, f"{folder} is not empty: {why}")
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 74, f"{folder}: {error.strerror}")


def failed(error: OSError, folder: Path) -> NoReturn:
    """End the program (77, 74) since something in a folder cannot be read or written."""
    fail(77 if isinstance(error, PermissionError) else 74, f"{error.filename or folder}: {error.strerror or error}")


def check_writable(folder: Path) -> None:
    """Make a folder, and end the program (77, 74) where nothing can be written to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        failed(error, folder)


def _steady_copy(mail: Path) -> Path:
    """A copy of all mailboxes in a folder of the spool; made again when a user was moved or removed meanwhile."""
    for _ in range(TRIES):
        folder = mail / f"backup-{time.time_ns()}"
        try:
            with MailFiles(mail) as files:
                before = _placed(files)
                missing = {shard for shard, _ in before.values()} - set(files.shards())
                if missing:
                    raise StoreError(f"shards {', '.join(map(str, sorted(missing)))} of the mailboxes are missing in {mail}")
                files.directory.copy(folder / "directory")
                for number in files.shards():
                    copy_shard(files.shard(number).rows, mail / f"shard-{number}" / "bodies", folder / f"shard-{number}")
                after = _placed(files)
            if all(moving < 0 and after.get(user) == (shard, moving) for user, (shard, moving) in before.items()):
                return folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(1)
    raise StoreError("users are being moved or removed; try again")


def _placed(files: MailFiles) -> dict[int, tuple[int, int]]:
    """(shard, shard to which it is moved) of each user."""
    return {user.ident: (user.shard, user.moving) for user in files.users() if user.deleted != REMOVING}


def collect(spool: Path, made: Path, folder: Path, one: str) -> None:
    """Give the files of a copy in the spool names in `folder`, or copy them where that is on another file system; synced. `one`:
    of its environments."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with as_owner(spool):
            found = sorted((path, path.is_dir()) for path in made.rglob("*"))
        if not {(made / one / "data.mdb", False), (made / one / "lmdb" / "data.mdb", False)}.intersection(found):
            raise StoreError(f"{made} was removed while it was collected")
        for path, is_folder in found:
            new = folder / path.relative_to(made)
            if is_folder:
                new.mkdir(mode=0o700, exist_ok=True)
                continue
            with as_owner(spool):
                source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _take(source, new)
            finally:
                os.close(source)
        _sync_all(folder)
    except OSError as error:
        raise StoreError(f"{error.filename or folder}: {error.strerror}") from None


def _take(source: int, new: Path) -> None:
    try:
        # With a descriptor of a folder, though the path is absolute: else this is link(2), which does not follow.
        os.link(f"/proc/self/fd/{source}", new, src_dir_fd=source, follow_symlinks=True)
    except OSError:  # another file system, or one without hard links
        _copy(source, new)


def _copy(source: int, new: Path) -> None:
    target = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(source, "rb", closefd=False) as one, open(target, "wb") as other:
        shutil.copyfileobj(one, other, 1 << 20)


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
        _restore_user(daemon(read), spool_of(read)[1], folder, address)
    else:
        spool = unused_spool(read)
        answered(lambda: _restore_all(folder, spool))


def _restore_all(folder: Path, spool: Path) -> None:
    mail, made = spool / MAIL, spool / f"{MAIL}.restoring"
    if (mail / "directory" / "data.mdb").exists():
        with MailFiles(mail) as files:
            if count := files.directory.count():
                raise RelayError(f"{mail} has {counted(count, 'user', 'users')} already: restore into another spool, or one user")
    busy = locked_shard(spool)
    if busy is not None:
        raise SpoolBusy(f"{busy} is in use by another relaymta")
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        with as_owner(spool):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(mode=0o700)
        for path in sorted(folder.rglob("*")):
            new = made / path.relative_to(folder)
            if path.is_dir():
                with as_owner(spool):
                    new.mkdir(mode=0o700)
            elif path != folder / MARK:
                _restore_file(spool, path, new)
        with as_owner(spool):
            count = _renumbered(made)
            _sync_all(made)
            if mail.exists():
                mail.rename(spool / f"{MAIL}.before-{time.time_ns()}")
            made.rename(mail)
            sync_file(spool)
    except OSError as error:
        raise StoreError(f"{error.filename or spool}: {error.strerror}") from None
    say(f"{counted(count, 'user is', 'users are')} restored; all mailboxes have new UIDVALIDITYs, so clients load them again")


def _restore_file(spool: Path, path: Path, new: Path) -> None:
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with as_owner(spool):
            _copy(source, new)
    finally:
        os.close(source)


def _renumbered(made: Path) -> int:
    """Give all mailboxes of a copy new UIDVALIDITYs, and remove what no user of its directory has; the number of users."""
    with MailFiles(made) as files:
        count, shards = files.directory.count(), files.shards()
    for _ in repair(made, read_bodies=False):
        pass
    for number in shards:
        renumber(made / f"shard-{number}", int(time.time()))
    return count


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _staged(spool: Path) -> Iterator[Callable[[BigFile], BigFile]]:
    """Copies large messages of a backup into the spool, where the relay can read them. There is one at a time."""
    folder = spool / MAIL / f"backup-{time.time_ns()}"  # what is left of such the relay removes

    def stage(file: BigFile) -> BigFile:
        os.close(open_verified(Path(file.path), file.ident, file.body))  # here it can be left out
        new = folder / f"{file.ident:016x}"
        try:
            with as_owner(spool):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(mode=0o700)
            _restore_file(spool, Path(file.path), new)
        except OSError as error:
            raise StoreError(f"{error.filename or new}: {error.strerror}") from None
        return file._replace(path=str(new))

    try:
        yield stage
    finally:
        with as_owner(spool):
            shutil.rmtree(folder, ignore_errors=True)


def _restore_user(peer: Daemon, spool: Path, folder: Path, address: str) -> None:
    with _staged(spool) as stage, answered(lambda: MailFiles(folder)) as files:
        user = answered(lambda: files.directory.known(address))
        ident, shard, uidvalidity = asked(peer, "mailbox_begin_restore", address=user.address)
        damaged: list[str] = []
        carried = Carried(answered(lambda: files.shard(user.shard)), user.ident, uidvalidity, damaged.append, stage)
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
    if damaged:
        say(*damaged, f"{counted(len(damaged), 'message was', 'messages were')} left out", err=True)
        sys.exit(65)


# Verification


def verify(read: Configuration, mends: bool) -> None:
    """Say what is wrong with the mailboxes; `mends`: correct what can be."""
    peer, spool = spool_of(read)
    if mends and peer is not None:
        fail(75, "the relay is running: stop it first")
    with as_owner(spool):
        if mends:
            for sentence in answered(lambda: list(repair(spool / MAIL))):
                say(sentence)
        wrong, shards = _verified(spool / MAIL, offline=peer is None)
    if wrong:
        say(f"{counted(wrong, 'contradiction', 'contradictions')}", err=True)
        sys.exit(65)
    say(f"{counted(len(shards), 'shard', 'shards')}: nothing is wrong")


def _verified(mail: Path, offline: bool) -> tuple[int, list[int]]:
    """How many contradictions were said, and the shards."""
    wrong = 0
    with answered(lambda: MailFiles(mail)) as files:
        shards = files.shards()
        placed, on_the_way = answered(lambda: _expected(files, shards))
        for number, users in sorted(placed.items()):
            if number not in shards:
                wrong += 1
                say(f"shard {number} is missing, with {counted(len(users), 'user', 'users')}")
                continue
            known = (users, on_the_way) if offline else None  # users come and go while the relay runs
            for sentence in answered(lambda: _wrong(files, number, known)):  # noqa: B023 (called at once)
                wrong += 1
                say(f"shard {number}: {sentence}")
    return wrong, shards


def _expected(files: MailFiles, shards: list[int]) -> tuple[dict[int, set[int]], set[int]]:
    """The users that the directory places in each shard; those of whom it is not known where they are until what was begun has
    ended."""
    placed: dict[int, set[int]] = {number: set() for number in shards}
    on_the_way: set[int] = set()
    for user in files.users():
        placed.setdefault(user.shard, set()).add(user.ident)
        if user.moving >= 0 or user.deleted == REMOVING:
            on_the_way.add(user.ident)
    return placed, on_the_way


def _wrong(files: MailFiles, number: int, known: tuple[set[int], set[int]] | None) -> list[str]:
    reader = files.shard(number)
    users, free = known if known is not None else (None, set())
    return list(contradictions(reader.rows, reader.bodies, users, free))
