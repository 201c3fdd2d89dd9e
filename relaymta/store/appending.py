"""APPEND: messages of a session that come into a mailbox together (MULTIAPPEND, RFC 3502), all of them or none."""

from collections.abc import Callable, Iterator
from functools import partial

from relaymta.disk.big import BigFile, read_big
from relaymta.disk.clock import wall_ms
from relaymta.disk.segments import MEGABYTE, Segments
from relaymta.store import unfinished
from relaymta.store.asked import Copied, Message
from relaymta.store.change import Change, Limits, Refusal
from relaymta.store.noted import Noted, noted, write_large
from relaymta.store.rows import MessageRow, ObjectRow
from relaymta.store.sessions import SLICE, SessionChanges, joined
from relaymta.store.writer import File, MailWriter, Result, Target, Together

__all__ = ["Appends"]

FEW = 16  # messages that are looked at on the loop
OCTETS = 16 * MEGABYTE  # of messages that are filed together, but for a single larger one


class Appends(SessionChanges):
    """A part of shard.Shard."""

    segments: Segments
    writer: MailWriter

    async def file(self, data: list[bytes] | BigFile, targets: list[Target]) -> list[Result]:
        """As of Shard."""
        raise NotImplementedError

    async def append(self, user: int, name: str, messages: list[Message], limits: Limits) -> Copied:
        """Append messages (one at least) to a mailbox of the user's: all of them or none. Once begun it is done, also where the
        caller is cancelled. Refusal (MISSING: there is no such mailbox), StoreError, StoreFull: none is there."""
        if len(messages) == 1:
            return await self._append_one(user, name, messages[0], limits)
        self._check_room()
        return await self._whole(self._append_all(user, name, messages, limits))

    async def _append_one(self, user: int, name: str, message: Message, limits: Limits) -> Copied:
        data = [message.data] if isinstance(message.data, bytes) else message.data
        target = Target(user, name, flags=message.flags, keywords=message.keywords, date=message.date, limits=limits)
        (result,) = await self.file(data, [target])
        if result.filed is None:
            raise Refusal(result.code, result.text)
        return Copied(result.filed.mailbox, result.filed.uidvalidity, [], [result.filed.uid])

    async def _append_all(self, user: int, name: str, messages: list[Message], limits: Limits) -> Copied:
        parts = list(_parts(messages))
        if len(parts) == 1:

            def put(change: Change, files: list[File]) -> Copied:
                owner, mailbox = change.owner(user), change.mailbox(user, name).mailbox
                change.check_room(owner, limits, len(files), sum(file.size for file in files))
                return _put(change, user, mailbox, messages, files)

            return await self._together(messages, put)
        octets = sum(map(_size, messages))
        async with self._undertaking(user, name, limits, len(messages), octets) as (number, target):

            def put_part(part: list[Message], change: Change, files: list[File]) -> Copied:
                copied = _put(change, user, target, part, files)
                unfinished.filed(change, user, number, copied.copies, sum(file.size for file in files))
                return copied

            filed = [await self._together(part, partial(put_part, part)) for part in parts]
        return joined(filed)

    async def _together(self, messages: list[Message], put: Callable[[Change, list[File]], Copied]) -> Copied:
        """File messages by one transaction, in which `put` is called when their data is written."""
        files: list[File] = []
        known = await self.readers.run(self._noted, messages) if len(messages) > FEW else [None] * len(messages)
        try:
            for message, found in zip(messages, known, strict=True):
                files.append(await self._prepared(message, found))
            self._check_room()
        except BaseException:
            for file in files:
                if file.body is not None:
                    self.segments.remove_big(file.ident)
            raise
        return await self.writer.task(lambda change: put(change, files), partial(Together, files))

    def _noted(self, messages: list[Message]) -> list[Noted | None]:
        """Reader thread: what is kept beside the data of those that are small."""
        most = self.segments.big_limit
        return [noted(one.data) if isinstance(one.data, bytes) and len(one.data) <= most else None for one in messages]

    async def _prepared(self, message: Message, known: Noted | None) -> File:
        ident = self._ids.next()
        data = message.data
        if isinstance(data, BigFile) and data.body.length <= self.segments.big_limit:
            data = await self.readers.run(read_big, data)
        if isinstance(data, bytes) and len(data) <= self.segments.big_limit:
            return File(ident, [data], [], noted=known or noted(data))
        path = self.segments.big_path(ident)
        body, found = await self.readers.run(write_large, path, ident, [data] if isinstance(data, bytes) else data)
        return File(ident, None, [], body=body, noted=found)


def _size(message: Message) -> int:
    return len(message.data) if isinstance(message.data, bytes) else message.data.body.length


def _parts(messages: list[Message]) -> Iterator[list[Message]]:
    """What is filed by one transaction each."""
    part: list[Message] = []
    octets = 0
    for message in messages:
        if part and (len(part) == SLICE or octets + _size(message) > OCTETS):
            yield part
            part, octets = [], 0
        part.append(message)
        octets += _size(message)
    yield part


def _put(change: Change, user: int, mailbox: int, messages: list[Message], files: list[File]) -> Copied:
    wall = wall_ms()
    copied = Copied(mailbox, change.state(mailbox).uidvalidity)
    for message, file in zip(messages, files, strict=True):
        assert file.body is not None
        row = MessageRow(file.ident, message.date or wall, wall, file.size)
        copied.copies.append(change.add(user, mailbox, row, message.flags, message.keywords).uid)
        change.put_object(file.ident, ObjectRow(1, file.body, *file.noted))
    return copied
