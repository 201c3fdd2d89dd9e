"""One shard of the mailboxes, owned by one process: its files, its writer, and what is done periodically."""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from relaymta.disk.behind import Behind
from relaymta.disk.big import BigFile, read_big
from relaymta.disk.clock import ShardClock
from relaymta.disk.compact import Compactor
from relaymta.disk.folders import make_folder
from relaymta.disk.ident import IdSource
from relaymta.disk.lock import OWNER_SECONDS, lock
from relaymta.disk.operations import Task
from relaymta.disk.readers import Readers
from relaymta.disk.room import Disk
from relaymta.disk.segments import Segments, segment_size_for
from relaymta.errors import StoreError, StoreFull
from relaymta.proto.envelope import Body
from relaymta.store import scripts
from relaymta.store.appending import Appends
from relaymta.store.carry import CarriedMailbox, CarriedMessages, CarriedScripts, CarriedUser, Entry, Part
from relaymta.store.change import Change, Refusal
from relaymta.store.noted import NOTHING, Noted, noted, write_large
from relaymta.store.reading import Bodies, data_of
from relaymta.store.rows import SCHEMA, MailShard, MessageRow
from relaymta.store.writer import File, Filings, Forget, MailWriter, Result, Target

__all__ = ["Shard"]

TICK = 0.05  # seconds
CHECK_TICKS = 20
READERS_TICKS = 1200  # a minute
SIEVED_MOST = 20_000  # users of whom it is remembered whether there is a script

T = TypeVar("T")


class Shard(Appends):
    """Shard `number` in `folder` (SPOOL/mail). `told(touched)` is called on the loop after each commit, with the MODSEQ of each
    mailbox that it has changed. SpoolBusy when another process owns the shard."""

    def __init__(self, folder: Path, number: int, told: Callable[[dict[int, int]], None] = lambda touched: None) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._told = told
        self.number = number
        self.path = folder / f"shard-{number}"
        make_folder(self.path)
        self._lock = lock(self.path, OWNER_SECONDS)
        self.rows = MailShard(self.path / "lmdb")
        seen, highest, self._schema = map(self.rows.meta, (b"seen", b"highest", b"schema"))
        self.clock = ShardClock(seen)
        self._ids = IdSource(number, highest, self.clock.now)
        bodies = self.path / "bodies"
        make_folder(bodies)
        self.segments = Segments(bodies, segment_size_for(self.path))
        self.segments.load(self.rows.segments())
        self.bodies: Bodies = self.segments
        self.disk = Disk(self.path, self.rows.used)
        self.behind = Behind(self.rows.readers_behind)
        self.usage = (0, 0, 0)  # octets of segments, live ones of them, and bodies, large ones included
        self.readers = Readers(self._loop, "mail-reader")
        self.writer = MailWriter(self._loop, self.rows, self.segments, self.clock, self.disk.ballast, self._committed)
        self._compactor = Compactor(self.rows, self.segments, self.writer, self.rows.points_at, self.readers.start)
        self._sieved: dict[int, bool] = {}  # by user, as of `has_script`: what no group has changed since it was read
        self._ticks = 0
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Begin to commit. Returns when messages can be filed."""
        self.writer.start()
        await self.readers.run(self.disk.check)
        await self.readers.run(self._sweep)
        if self._schema != SCHEMA:  # not written again, so that an existing shard starts on a full disk
            await self.task(lambda change: change.set_meta(b"schema", SCHEMA))
        await self._take_back_all()
        self._tick()

    def _sweep(self) -> None:
        """Reader thread: remove the files of large bodies that no object points at; before anything is filed."""
        with self.rows.reading() as txn:
            for ident, _ in self.segments.big_files():
                row = self.rows.object(txn, ident)
                if row is None or row.body.segment:
                    self.segments.remove_big(ident)

    async def stop(self) -> None:
        """Commit what is pending and close; what is asked for meanwhile is refused."""
        if self._recent:
            await self._write_recent()
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await self._end_changes()
        await self.readers.close()  # first: large messages that are being written are submitted then
        await self.writer.close()
        self.segments.close()
        self.rows.close()
        os.close(self._lock)

    async def file(self, data: list[bytes] | BigFile, targets: list[Target]) -> list[Result]:
        """File a message, `data` in pieces or a large one's file; the result for each target, when that is durable. StoreError:
        nothing is filed. Once begun it is done, also where the caller is cancelled. StoreFull while there is no more room than is
        kept for deletes."""
        return list((await self._file(self._ids.next(), data, targets)).results)

    def is_small(self, data: list[bytes]) -> bool:
        """Whether a message is kept among others, not in a file of its own."""
        return sum(map(len, data)) <= self.segments.big_limit

    def submit(self, data: list[bytes], targets: list[Target], done: Callable[[File], None]) -> None:
        """As `file`, of a message that `is_small`: `done(file)` is called when it is durable, or has an `error`. StoreError,
        StoreFull: it is not called."""
        self._check_room()
        self.writer.submit(File(self._ids.next(), data, targets, done, noted=noted(b"".join(data))))

    async def _file(self, ident: int, data: list[bytes] | BigFile | None, targets: list[Target]) -> File:
        """File a message, or (None) another copy of the object `ident`; errors as of `file`."""
        self._check_room()
        future = self._loop.create_future()
        done = partial(_resolve, future)
        if isinstance(data, BigFile) and data.body.length <= self.segments.big_limit:
            data = [await self.readers.run(read_big, data)]
        if data is None or (not isinstance(data, BigFile) and self.is_small(data)):
            self.writer.submit(File(ident, data, targets, done, noted=NOTHING if data is None else noted(b"".join(data))))
        else:
            writing = self.readers.submit(write_large, self.segments.big_path(ident), ident, data)
            writing.add_done_callback(lambda written: self._submit_large(written, ident, targets, done))
            await asyncio.shield(writing)
        file: File = await future  # a caller who is cancelled cancels it: then nobody is told
        if file.error is not None:
            raise file.error
        return file

    def _submit_large(
        self, written: "asyncio.Future[tuple[Body, Noted]]", ident: int, targets: list[Target], done: Callable[[File], None]
    ) -> None:
        if not written.cancelled() and written.exception() is None:
            self.writer.submit(File(ident, None, targets, done, *written.result()))

    def forget(self, queue_id: int, recipients: list[int]) -> None:
        """The queue has ended these recipients of a message: see Forget."""
        self.writer.submit(Forget(queue_id, recipients))

    async def task(self, run: Callable[[Change], T], kind: type[Task] = Task) -> T:
        """Run a change on the writer thread; its result once it is durable. Refusal, or StoreError when the commit failed. `run`
        may be called again, after a transaction that failed. `kind`: Task or Step."""
        self._check_open()
        return await self.writer.task(run, kind)

    def _check_open(self) -> None:
        if self._closing:
            raise StoreError(f"{self.path} is being closed")

    def _check_room(self) -> None:
        self._check_open()
        if self.disk.full:
            raise StoreFull("there is no room for mail")

    def has_script(self, user: int) -> bool:
        """On the loop: whether a Sieve script is run for a user, by the last commit that was reported. lmdb.Error, StoreError."""
        found = self._sieved.get(user)
        if found is None:
            if len(self._sieved) >= SIEVED_MOST:
                self._sieved.clear()
            with self.rows.reading() as txn:
                found = self._sieved[user] = scripts.active_ident(self.rows, txn, user) > 0
        return found

    def data(self, message: MessageRow) -> bytes:
        """Reader thread: as `reading.data_of`."""
        return data_of(self.rows, self.bodies, message)

    # Users who come and go

    async def take(self, user: int, part: Part) -> list[int]:
        """Put a part of a user who comes from elsewhere (carry.py); the objects of its messages. Refusal, StoreError: not all of
        it is there."""
        if isinstance(part, CarriedMessages):
            return await self._take_messages(user, part)

        def change(change: Change) -> None:
            if isinstance(part, CarriedUser):
                change.take_user(user, part.uidvalidity)
            elif isinstance(part, CarriedMailbox):
                change.take_mailbox(user, part.row, part.state, part.expunged)
            elif isinstance(part, CarriedScripts):
                change.scripted.add(user)
                scripts.take(change.shard, change.txn, user, part.scripts, part.replies)
            else:
                for queue_id, recipient, attempt in part.rows:
                    change.done(queue_id, recipient, user, self.clock.now(), attempt)

        await self.task(change)
        return []

    async def _take_messages(self, user: int, part: CarriedMessages) -> list[int]:
        taken: list[int] = []
        entries = part.entries
        while len(taken) < len(entries):
            start = len(taken)
            large = (place for place in range(start, len(entries)) if self._is_large(entries[place].data))
            end = next(large, len(entries))  # in the order of UIDs: a large one is filed later than what is asked for with it
            taken += await self._take_together(user, part.name, entries[start : max(end, start + 1)])
        return taken

    def _is_large(self, data: bytes | BigFile | None) -> bool:
        return isinstance(data, BigFile) or len(data or b"") > self.segments.big_limit

    async def _take_together(self, user: int, name: str, entries: list[Entry]) -> list[int]:
        filing = []
        for entry in entries:
            ident = self._ids.next() if entry.data is not None else entry.object
            place = entry.uid, entry.modseq
            target = Target(user, name, entry.prefix, entry.flags, date=entry.date, saved=entry.saved, place=place)
            filing.append(self._file(ident, [entry.data] if isinstance(entry.data, bytes) else entry.data, [target]))
        files = await asyncio.gather(*filing, return_exceptions=True)
        for file in files:
            if isinstance(file, BaseException):
                raise file
            if file.results[0].filed is None:
                raise Refusal(file.results[0].code, file.results[0].text)
        return [file.ident for file in files if isinstance(file, File)]

    def _committed(self, group: Filings) -> None:
        """On the loop, after a group. What one of those who waited for it raises must not keep the others from being told."""
        for user in group.scripted:
            self._sieved.pop(user, None)
        for operation in (*group.files, *group.together, *group.tasks, *group.moves):
            _tell(operation, self._loop)
        if group.touched:
            self._told(group.touched)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK, self._tick)  # first, so that an exception below does not stop the ticks
        self._ticks += 1
        self._compactor.tick()
        if self._ticks % CHECK_TICKS == 0:
            self.readers.start(self._look, lambda result: None)
        if self._ticks % READERS_TICKS == 0:
            self.readers.start(self.rows.forget_dead_readers, lambda result: None)

    def _look(self) -> None:
        """Reader thread, each second."""
        self.disk.check()
        self.behind.look()
        octets, live, _ = self.segments.usage()
        self.usage = octets, live, self.rows.bodies()


def _tell(operation: Any, loop: asyncio.AbstractEventLoop) -> None:
    done = operation.done
    if done is None:
        if isinstance(operation, Task) and operation.error is not None:
            loop.call_exception_handler({"message": "a task of the mailboxes failed", "exception": operation.error})
        return
    try:
        done(operation)
    except Exception as error:
        loop.call_exception_handler({"message": "an operation of the mailboxes could not be reported", "exception": error})


def _resolve(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)
