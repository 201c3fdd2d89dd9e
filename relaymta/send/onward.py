"""Messages that deliveries send: what recipients' Sieve scripts redirect, their replies, what an alias leads to elsewhere. They
come into the queue by the commit that records the outcome of the message at hand, so that a crash neither loses nor doubles them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from relaymta.disk.big import BigFile
from relaymta.disk.folders import remove_file
from relaymta.errors import store_error
from relaymta.ident import format_id
from relaymta.proto.envelope import EIGHT_BIT, SMTPUTF8, UTF8_HEADER, Body, Envelope, Onward
from relaymta.proto.header import header_end
from relaymta.queue import Entry, Put, Queue, wall_ms

__all__ = ["Outbox"]

LIKE_BEFORE = EIGHT_BIT | SMTPUTF8 | UTF8_HEADER  # flags that a redirected message has like the one at hand


class Outbox:
    """Messages that are sent on account of an entry with this data. `expanded`: as of send.local.Store."""

    def __init__(
        self, queue: Queue, entry: Entry, data: list[bytes] | BigFile, expanded: Callable[[list[str]], list[str]]
    ) -> None:
        self._queue = queue
        self._entry = entry
        self._data = data
        self._expanded = expanded
        self._made: list[Put] = []

    async def make(self, messages: Sequence[Onward]) -> list[Put]:
        """What to give `Queue.finish` for these messages: all that can fail of them is done. StoreError: they cannot be stored
        now."""
        puts: list[Put] = []
        try:
            for one in messages:
                make = _redirected if one.data is None else _made
                puts.append(await make(self._queue, self._entry, self._data, one, self._expanded([one.recipient, *one.others])))
        except BaseException:
            self.drop(puts)
            raise
        self._made += puts
        return puts

    def drop(self, puts: Sequence[Put] | None = None) -> None:
        """These do not come into the queue, or none (None)."""
        for put in self._made if puts is None else puts:
            if put.data is None:
                _remove(self._queue.segments.big_path(put.ident))


async def _made(queue: Queue, entry: Entry, _: object, message: Onward, recipients: list[str]) -> Put:
    """A message of our own, signed as a DSN is."""
    ident, data = queue.ident(), message.front + (message.data or b"")
    data = await asyncio.get_running_loop().run_in_executor(None, queue.sign, data) + data
    flags = (0 if data.isascii() else EIGHT_BIT) | _wide(data[: header_end(data)])
    return _put(queue, entry, message, recipients, ident, [data], len(data), flags, f"<{format_id(ident)}>")


async def _redirected(queue: Queue, entry: Entry, data: list[bytes] | BigFile, message: Onward, recipients: list[str]) -> Put:
    """The message at hand, with some header fields in front."""
    ident, flags = queue.ident(), entry.envelope.flags & LIKE_BEFORE | _wide(message.front)
    pieces = None if isinstance(data, BigFile) else [message.front, *data]
    if pieces is not None and sum(map(len, pieces)) <= queue.big_limit:
        size = sum(map(len, pieces))
        return _put(queue, entry, message, recipients, ident, pieces, size, flags, entry.envelope.message_id)
    body = await _written(queue, ident, message.front, queue.stream(entry) if pieces is None else _each(pieces[1:]))
    put = _put(queue, entry, message, recipients, ident, None, body.length, flags, entry.envelope.message_id)
    put.envelope.body = body
    return put


def _wide(header: bytes) -> int:
    """The flags of a message with this header, or part of it: addresses of ours in it may be in UTF-8."""
    return 0 if header.isascii() else EIGHT_BIT | SMTPUTF8 | UTF8_HEADER


def _put(
    queue: Queue,
    entry: Entry,
    message: Onward,
    recipients: list[str],
    ident: int,
    data: list[bytes] | None,
    size: int,
    flags: int,
    message_id: str,
) -> Put:
    wide = 0 if message.sender.isascii() and all(map(str.isascii, recipients)) else SMTPUTF8
    envelope = Envelope(
        sender=message.sender,
        recipients=recipients,
        size=size,
        flags=flags | wide,
        arrived=wall_ms(),
        deadline=queue.deadline(),
        application=entry.envelope.application,
        message_id=message_id,
    )
    return Put(ident, envelope, queue.assign(envelope, 0), data, None)


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def _written(queue: Queue, ident: int, front: bytes, pieces: AsyncIterator[bytes]) -> Body:
    """A large message's file. StoreError: there is none."""
    loop = asyncio.get_running_loop()
    try:
        file = await loop.run_in_executor(None, queue.big_body, ident)
        await loop.run_in_executor(None, file.write, [front])
        async for piece in pieces:
            await loop.run_in_executor(None, file.write, [piece])
        return await loop.run_in_executor(None, file.finish, [])
    except BaseException as error:
        _remove(queue.segments.big_path(ident))
        if isinstance(error, OSError):
            raise store_error(error) from None
        raise


def _remove(path: Path) -> None:
    """Remove a large message's file, on a thread, whatever becomes of the caller: what was cancelled may still write to it. What
    fails is left to the queue's sweep."""
    asyncio.get_running_loop().run_in_executor(None, remove_file, path)
