"""DSNs (RFC 3464): made on the writer thread, in the group that records the failure which they report."""

import traceback
from collections.abc import Callable
from typing import Any

from relaymta.disk.clock import ShardClock, wall_ms
from relaymta.disk.ident import IdSource
from relaymta.disk.segments import Segments
from relaymta.errors import StoreError
from relaymta.ident import format_id
from relaymta.proto.dsn import failure_dsn
from relaymta.proto.envelope import DSN, EIGHT_BIT, SMTPUTF8, Envelope
from relaymta.proto.header import header_end
from relaymta.queue.entry import Entry, Put
from relaymta.queue.group import Assign

__all__ = ["Dsns", "data_of"]

HEADER_MOST = 128 * 1024  # octets of the original message in which its header is looked for


def data_of(segments: Segments, entry: Entry) -> list[bytes]:
    """An entry's message data, from memory or disk. StoreError when it cannot be read."""
    data = entry.data
    if data is not None:
        return data
    body = entry.envelope.body
    if body is None:
        raise StoreError(f"message {format_id(entry.ident)} has no body")
    return [segments.read(entry.ident, body)]


class Dsns:
    """Makes DSNs. `hostname`: their reporting MTA. `assign(envelope, attempts)`: the queues of their recipient. `sign(data)`:
    header fields to prepend to their message data."""

    def __init__(
        self,
        segments: Segments,
        clock: ShardClock,
        ids: IdSource,
        hostname: str,
        max_age_ms: int,
        assign: Assign,
        sign: Callable[[bytes], bytes],
    ) -> None:
        self._segments = segments
        self._clock = clock
        self._ids = ids
        self._hostname = hostname
        self.max_age_ms = max_age_ms
        self._assign = assign
        self._sign = sign

    def make(self, entry: Entry, failed: list[tuple[str, Any, bool]]) -> Put | None:
        """The DSN about `failed` recipients; a plain one when an exception is raised while the original header is handled or the
        DSN is signed. A defect there must not end the thread each time it starts, and stop all mail."""
        for plain in (False, True):
            try:
                return self._dsn(entry, failed, plain)
            except Exception:
                traceback.print_exc()
        return None  # the event `bounced` is logged without a DSN

    def _dsn(self, entry: Entry, failed: list[tuple[str, Any, bool]], plain: bool) -> Put:
        """Make the DSN about `failed` recipients. `plain`: without the original header and without signatures."""
        envelope = entry.envelope
        header = b""
        if not plain:
            try:
                start = b"".join(data_of(self._segments, entry))[:HEADER_MOST]
                header = start[: header_end(start)]
            except StoreError:
                pass
        ident = self._ids.next()
        data = failure_dsn(
            envelope,
            failed,
            header,
            hostname=self._hostname,
            ident=format_id(ident),
            original_ident=format_id(entry.ident),
            seconds=wall_ms() // 1000,
        )
        flags = DSN | (0 if envelope.sender.isascii() else SMTPUTF8) | (EIGHT_BIT if not data.isascii() else 0)
        data = data if plain else self._sign(data) + data
        dsn = Envelope(
            sender="",
            recipients=[envelope.sender],
            size=len(data),
            flags=flags,
            arrived=wall_ms(),
            deadline=self._clock.now() + self.max_age_ms,
            application=envelope.application,
            message_id=f"<{format_id(ident)}@{self._hostname}>",
        )
        return Put(ident, dsn, self._assign(dsn, 0), [data], None)
