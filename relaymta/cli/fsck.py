"""`relaymta fsck`: is the queue sound? And its repair."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.folder import Folder, open_folder
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, loaded
from relaymta.cli.peer import Daemon, GivenPath, answered, as_json, connect, counted
from relaymta.disk.clock import ShardClock
from relaymta.disk.environment import MOVE
from relaymta.disk.lock import all_unlocked, lock
from relaymta.disk.shards import shard_numbers
from relaymta.disk.tree import damage
from relaymta.ident import format_id
from relaymta.privileges import become, owner_of
from relaymta.queue.offline import import_all
from relaymta.queue.repair import left_of, repair
from relaymta.queue.store import Store
from relaymta.queue.verify import DATA, FILE, NOTE, Fault, faults
from relaymta.route.table import RouteTable

__all__ = ["fsck"]


@click.command()
@click.option("--repair", "mend", is_flag=True, help="Put right what can be; the relay must be stopped.")
@click.option(
    "--to", "folder", default=None, type=GivenPath(file_okay=False, path_type=Path), metavar="DIR",
    help="With --repair: the folder for messages that are damaged; made if missing.",
)  # fmt: skip
@as_json
@configured
def fsck(read: Configuration, mend: bool, folder: Path | None, as_json: bool) -> None:
    """Check the queue: every message's rows, schedule, recipients and data. Counts, and files without a message, too. All message
    data is read, and nothing is changed. Exit status 1 when something is wrong.

    While the relay runs, counts and the files of LMDB are left out, since they change. With --repair, and the relay stopped, the
    schedule and counts are made anew; messages that are damaged are moved to DIR, as far as they can be read (ID.damaged.eml,
    ID.damaged.json); nothing is deleted."""
    if mend and folder is None:
        fail(64, "--repair needs --to DIR, where damaged messages are moved to")
    peer = connect(read)
    running = isinstance(peer, Daemon)
    if running and mend:
        fail(69, "the relay is running: stop it first")
    config = loaded(read, ANY_LISTENER)
    spool = Path(peer.ask("status")["spool"]) if isinstance(peer, Daemon) else peer.spool
    check = _Check(spool, running, as_json, RouteTable(config).assign)
    if mend and folder is not None:
        try:
            check.aside = open_folder(folder.absolute(), True)
        except OSError as error:
            fail(77 if isinstance(error, PermissionError) else 73, f"{folder}: {error.strerror}")
    owner = owner_of(spool)
    if os.geteuid() != owner.pw_uid:
        import_all()
        answered(lambda: become(owner))
    answered(check.run)
    if check.found[DATA] + check.found["rows"] + check.found[FILE]:
        sys.exit(1)


class _Check:
    """A check of all shards. `found`: how many faults of each kind are left; `aside`: where damaged messages go, if any may."""

    def __init__(self, spool: Path, running: bool, as_json: bool, assign: Any) -> None:
        self._spool, self._running, self._json, self._assign = spool, running, as_json, assign
        self.found: Counter[str] = Counter()
        self.aside: Folder | None = None

    def run(self) -> None:
        """Check them one after the other, and say what is wrong. SpoolBusy; StoreError."""
        numbers = shard_numbers(self._spool)
        paths = [self._spool / f"shard-{number}" for number in numbers]
        if not self._running:
            all_unlocked(paths)
        messages = 0
        for number, path in zip(numbers, paths, strict=True):
            if (path / "lmdb" / "data.mdb").exists():
                with self._locked(path):
                    messages += self._shard(number, path)
        if not self._json:
            wrong = self.found[DATA] + self.found["rows"] + self.found[FILE]
            what = f"{counted(wrong, 'fault', 'faults')}" if wrong else "the queue is sound"
            say(f"{counted(messages, 'message', 'messages')} in {counted(len(numbers), 'shard', 'shards')}: {what}")

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        if self._running:
            yield
            return
        descriptor = lock(path)
        try:
            yield
        finally:
            os.close(descriptor)

    def _shard(self, number: int, path: Path) -> int:
        """Check one shard, and repair it if that is wanted; how many messages it has."""
        file = path / "lmdb" / "data.mdb"
        why = "" if self._running else damage(file)
        if why:
            self._tell(number, Fault(0, FILE, f"{file} is damaged: {why}: {MOVE}"))
            return 0
        store = Store(path / "lmdb", readonly=self.aside is None)
        try:
            damaged: list[int] = []
            before, broken = Counter(self.found), False
            for fault in faults(store, path / "bodies", not self._running):
                broken = broken or fault.what != NOTE
                self._tell(number, fault)
                if fault.what == DATA and fault.ident not in damaged[-1:]:
                    damaged.append(fault.ident)
            if broken and self.aside is not None:
                self._mend(number, path, store, damaged)
                self.found = before + self._left(number, path, store)
            with store.reading() as txn:
                return int(txn.stat(store.tables["message"])["entries"]) + len(store.fresh)
        finally:
            store.close()

    def _tell(self, number: int, fault: Fault) -> None:
        self.found[fault.what] += 1
        if self._json:
            say_json(
                {"shard": number, "what": fault.what, "id": format_id(fault.ident) if fault.ident else "", "text": fault.text}
            )
        else:
            say(f"shard {number}: {'note: ' if fault.what == NOTE else ''}{fault.text}")

    def _mend(self, number: int, path: Path, store: Store, damaged: list[int]) -> None:
        clock, folder = ShardClock(store.meta(b"seen")), self.aside
        assert folder is not None
        for ident in dict.fromkeys(damaged):
            name = format_id(ident)
            text, data = left_of(store, clock, path / "bodies", ident)
            for suffix, pieces in ((".damaged.eml", data), (".damaged.json", iter((text,)))):
                descriptor = folder.create(name + suffix)
                try:
                    for piece in pieces:
                        view = memoryview(piece)
                        while view:
                            view = view[os.write(descriptor, view) :]
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                folder.place(name + suffix, True)
        folder.sync()
        repair(store, clock, path / "bodies", set(damaged), self._assign)
        moved = (
            f"; {counted(len(set(damaged)), 'damaged message is', 'damaged messages are')} in {folder.path}" if damaged else ""
        )
        if not self._json:
            say(f"shard {number} is repaired{moved}")

    def _left(self, number: int, path: Path, store: Store) -> Counter[str]:
        """Say what is wrong after a repair."""
        self.found = Counter()
        for fault in faults(store, path / "bodies", True):
            self._tell(number, fault)
        return self.found
