"""What operators read of a running shard: `inspect` and `listing` on its reader threads."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from relaymta.control.filters import Filter
from relaymta.disk.clock import ShardClock
from relaymta.disk.ident import IdSource
from relaymta.disk.segments import Segments
from relaymta.proto.envelope import Placement, QueueName
from relaymta.queue import exported, inspect, listing, raw
from relaymta.queue.lifecycle import Lifecycle
from relaymta.queue.quarantine import Keeper
from relaymta.queue.readers import Readers
from relaymta.queue.store import Store

__all__ = ["View"]


class View:
    """Queries of one shard; all methods are called on the loop."""

    def __init__(
        self, store: Store, segments: Segments, clock: ShardClock, ids: IdSource, readers: Readers, entries: Lifecycle,
        quarantine: Keeper,
    ) -> None:  # fmt: skip
        self._quarantine = quarantine
        self._store = store
        self._segments = segments
        self._clock = clock
        self._ids = ids
        self._readers = readers
        self._entries = entries

    async def summary(self) -> list[dict[str, Any]]:
        """One row for each queue that holds mail, as `inspect.summary` makes them."""
        return await self._readers.run(inspect.summary, self._store, self._clock)

    async def page(self, chosen: Filter, after: int, at_site: Callable[[QueueName, str], bool]) -> dict[str, Any]:
        """The next messages above id `after`, as `listing.page` returns them. `at_site(name, site)`: whether a queue's mail is
        delivered to a site. Without `chosen.until` only the messages that exist now match, not what is accepted or generated
        while the pages are read: pass the answer's "until" with each further page."""
        chosen = chosen if chosen.until else replace(chosen, until=self._ids.next())
        rows = await self._readers.run(inspect.chosen_queues, self._store, chosen, at_site) if chosen.by_queue else None
        keep = self._quarantine.keep_ms
        return await self._readers.run(listing.page, self._store, self._clock, self._entries, chosen, after, rows, keep)

    async def shape(self) -> list[dict[str, Any]]:
        """How old the mail in each queue is, as `inspect.shape` makes it."""
        return await self._readers.run(inspect.shape, self._store)

    async def names(self) -> list[QueueName]:
        """The names of all queues."""
        return await self._readers.run(inspect.names, self._store)

    async def message(self, ident: int) -> dict[str, Any] | None:
        """Everything about one message, as `listing.message` makes it; None when it is not in this shard."""
        keep = self._quarantine.keep_ms
        return await self._readers.run(listing.message, self._store, self._clock, self._entries, ident, keep)

    async def places(self, ident: int) -> list[tuple[QueueName, Placement]]:
        """The queues in which a message waits, each with its placement."""
        return await self._readers.run(inspect.places, self._store, self._clock, ident)

    async def raw(self, ident: int) -> AsyncGenerator[bytes, None]:
        """A message's data in pieces, verified before the first; none when it is not in this shard. StoreError when it is
        damaged."""
        steps = raw.pieces(partial(raw.find, self._store, self._segments, ident))
        while (piece := await self._readers.run(next, steps, None)) is not None:
            yield piece

    async def subjects(self, idents: list[int]) -> list[str | None]:
        """As `raw.subjects`."""
        return await self._readers.run(raw.subjects, idents, partial(raw.find, self._store, self._segments))

    async def records(self, idents: list[int]) -> list[tuple[int, str, bytes]]:
        """As `exported.records`."""
        return await self._readers.run(exported.records, self._store, self._clock, idents)

    def watch_totals(self, then: Callable[[inspect.Totals], None]) -> None:
        """Count the shard's messages and octets on a reader thread, then call `then(totals)` on the loop."""
        self._readers.read_rows(
            lambda: inspect.totals(self._store, self._segments, self._clock), lambda totals, mark: then(totals)
        )
