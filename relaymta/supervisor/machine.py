"""What all workers of a machine share and the supervisor keeps: site states, the use of rates, the keys of TLS tickets; and OAuth
tokens, which only the supervisor exchanges.

Owner of it all is `Machine`. States are changed by `set_site_state` alone: in memory and in the workers at once, on disk by one
task (`_write_site_states`) that stores the last change of each state, all at a time.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import xxhash

from relaymta.accept.tickets import OCTETS as TICKET_OCTETS
from relaymta.config import OAuth
from relaymta.errors import RelayError, StoreError
from relaymta.log import Log
from relaymta.node import (
    DEAD,
    TOKEN,
    SiteState,
    SiteStates,
    Store,
    check_storable,
    keep_profiles,
    keep_rates,
    keep_table,
    kept_rates,
    kept_table,
)
from relaymta.route.shaping import shipped_text
from relaymta.send.oauth import Exchanges
from relaymta.shm import Shared
from relaymta.supervisor.lessons import Lessons
from relaymta.supervisor.outages import Outages
from relaymta.supervisor.slots import Slots

__all__ = ["Machine"]

TRIPLETS, LESSONS = "triplets", "lessons"  # tables of node/
TICKETS_SECONDS = 12 * 3600.0  # lifetime of the keys of TLS session tickets
SETTLE_SECONDS = 10.0  # for what was learned to be stored
WRITE_AGAIN_SECONDS = 10.0  # after the disk has failed
TOKEN_KEPT_MS = 400 * 86_400_000  # no provider accepts a refresh token that was unused for so long
RATES_SECONDS = 60.0  # interval of storing rates and quotas: a crash loses at most that much of their use


class Table(Protocol):
    """What is stored as a whole. `changed`: since the last `dump`."""

    changed: bool

    async def dump(self) -> bytes:
        """All of it."""


class Machine:
    """`path`: the folder of what is kept across restarts; `secret`: the spool's; `tickets`: the keys of TLS tickets, where
    another program had them before. `in_use`: the shared memory has what was counted already. StoreError when the folder cannot
    be opened."""

    def __init__(
        self, path: Path, shared: Shared, workers: int, log: Log, slots: Slots, secret: bytes, tickets: bytes = b"",
        in_use: bool = False,
    ) -> None:  # fmt: skip
        self._path = path
        self._slots = slots
        self._log = log
        self._unwritten: dict[tuple[str, str, str], tuple[SiteState, bool]] = {}  # the last change of each: whether it holds
        self._waiting: list[asyncio.Future[None]] = []  # for the next write
        self._stopping = asyncio.Event()
        self._exchanges = Exchanges(self._kept_token, self._keep_token)
        self._writing: asyncio.Task[None] | None = None
        self.tickets = tickets or os.urandom(TICKET_OCTETS)
        self.changed: Callable[[SiteState | None, tuple[str, str, str]], None] = lambda state, key: None
        self._store = Store(path)
        self.states = SiteStates(self._store.load())
        self.outages = Outages(self.states.of(DEAD))
        self._client_rates = shared.client_rates(workers)
        self._storing = threading.Lock()  # a thread of the last period may still store them while `stop` does
        self._triplets = shared.triplets(secret, lambda *times: False)
        if not in_use:
            self._client_rates.restore(kept_rates(path))
            self._triplets.restore(kept_table(path, TRIPLETS))
        self._tables: dict[str, Table] = {}
        self.lessons = Lessons(kept_table(path, LESSONS))
        self.keep(LESSONS, self.lessons)
        self._triplets_stored = 0  # the hash of what was stored last
        self._record_profiles()
        self._periodic: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Store and renew periodically from now on; nothing changes where that is done already."""
        if any(not task.done() for task in self._periodic):
            return
        loop = asyncio.get_running_loop()
        self._periodic = [loop.create_task(one) for one in (self._store_rates_periodically(), self._renew_tickets_periodically())]

    async def settle(self) -> None:
        """Store everything now, and nothing more until `start`: another program is to read it. StoreError."""
        await self._pause()
        await self._exchanges.over(SETTLE_SECONDS)  # a refresh token that was rotated has to be read, too
        self._store_counted(await self._changed())
        if self._writing is not None:
            done, _ = await asyncio.wait({self._writing}, timeout=SETTLE_SECONDS)
            if not done:
                raise StoreError(f"{self._path}: what was learned about sites cannot be stored")

    async def leave(self) -> None:
        """End, without storing anything: another program does that now."""
        await self._pause()
        await self._exchanges.close()
        self._store.close()

    async def _pause(self) -> None:
        for task in self._periodic:
            task.cancel()
        await asyncio.gather(*self._periodic, return_exceptions=True)

    async def stop(self) -> None:
        for task in self._periodic:
            task.cancel()
        self._store_counted(await self._changed())
        await self._exchanges.close()
        self._stopping.set()
        if self._writing is not None:
            await self._writing
        self._store.close()

    def _record_profiles(self) -> None:
        try:
            if keep_profiles(self._path, shipped_text()):
                self._log.event("warning", text="the provider profiles have changed: `relaymta shaping diff` shows how")
        except OSError as error:  # such as a full disk; the relay works without this record
            self._log.event("warning", text=f"{self._path}: {error.strerror}: the provider profiles in use are not recorded")

    async def _store_rates_periodically(self) -> None:
        while True:
            await asyncio.sleep(RATES_SECONDS)
            try:
                await asyncio.to_thread(self._store_counted, await self._changed())
            except Exception as error:  # a defect: the next period stores all the same
                self._log.event("warning", text=f"node: internal error: {error!r}: what was counted is not stored")

    async def _renew_tickets_periodically(self) -> None:
        while True:
            await asyncio.sleep(TICKETS_SECONDS)
            self.tickets = os.urandom(TICKET_OCTETS)
            for _, channel in self._slots.ready():
                channel.notify("tickets", keys=self.tickets)

    def keep(self, name: str, table: Table) -> None:
        """Store a table each minute, and at the end."""
        self._tables[name] = table

    def kept(self, name: str) -> bytes:
        """What was stored of a table before. Blocks."""
        return kept_table(self._path, name)

    async def _changed(self) -> list[tuple[str, bytes]]:
        """The tables that have changed, as they are now."""
        return [(name, await table.dump()) for name, table in self._tables.items() if table.changed]

    def _store_counted(self, tables: list[tuple[str, bytes]]) -> None:
        """Store what workers count and note in shared memory, and these tables. Blocks."""
        with self._storing:
            self._store_rates()
            self._store_triplets()
            for name, octets in tables:
                self._store_table(name, octets)

    def _store_triplets(self) -> None:
        """Store what greylisting knows, where there is any: a crash loses what it has learned since."""
        if not self._triplets.rows_used():
            return
        octets = self._triplets.dump()
        hashed = xxhash.xxh3_64_intdigest(octets)
        if hashed == self._triplets_stored:
            return
        try:
            keep_table(self._path, TRIPLETS, octets)
            self._triplets_stored = hashed
        except OSError as error:
            self._log.event("warning", text=f"node: {error.strerror}: what greylisting knows is not stored")

    def _store_table(self, name: str, octets: bytes) -> None:
        try:
            keep_table(self._path, name, octets)
        except OSError as error:
            self._tables[name].changed = True  # it is tried again
            self._log.event("warning", text=f"node: {error.strerror}: what is known of {name} is not stored")

    def _store_rates(self) -> None:
        """Store the use of quotas and the counts of failed login attempts, which continue after a restart. Blocks."""
        try:
            keep_rates(self._path, self._client_rates.rows())
        except OSError as error:
            self._log.event("warning", text=f"node: {error.strerror}: the use of quotas is not stored")

    async def site_state(self, state: dict[str, Any] | None, key: list[str]) -> None:
        """A worker has learned, or (state None) forgotten a site state."""
        try:
            kind, site, about = key
            self.set_site_state(None if state is None else msgspec.convert(state, SiteState), (kind, site, about))
        except (RelayError, ValueError) as error:
            self._log.event("warning", text=f"a site state of a worker was refused: {error}")

    async def token(self, oauth: dict[str, Any], refused: str) -> tuple[str, float]:
        """A worker needs an access token: see `Exchanges.get`."""
        return await self._exchanges.get(OAuth.model_validate(oauth), refused)

    def _kept_token(self, name: str) -> str:
        state = self.states.get(TOKEN, name)
        return state.reply if state is not None else ""

    async def _keep_token(self, name: str, token: str) -> None:
        """Store a refresh token; it is durable on return, if the disk works. The one before it is replaced by the same commit."""
        now = time.time_ns() // 1_000_000
        state = SiteState(TOKEN, name, "", now, now + TOKEN_KEPT_MS, "automatic", "", token)
        self.set_site_state(state, state.key)
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append(stored)
        await stored

    def known_by_workers(self) -> list[SiteState]:
        """The states that workers have copies of: refresh tokens are nobody else's."""
        return [state for state in self.states if state.kind != TOKEN]

    def set_site_state(self, state: SiteState | None, key: tuple[str, str, str]) -> bool:
        """Add a state, or (None) remove the one with this key; send the change to all workers and have it stored. Whether
        anything changed. RelayError when the state cannot be stored."""
        if state is None:
            self.outages.changed(None, key)
            forgotten = self.states.forget(*key)
            if forgotten is None:
                return False
            self._unwritten[key] = (forgotten, False)
        else:
            check_storable(state)
            self.outages.changed(state, key)
            dropped = self.states.learn(state)
            self._unwritten |= {one.key: (one, False) for one in dropped} | {key: (state, True)}
        if key[0] != TOKEN:
            self.changed(state, key)
            self._slots.notify("site_state", state=None if state is None else msgspec.to_builtins(state), key=list(key))
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_site_states())
        return True

    async def _write_site_states(self) -> None:
        """Store pending changes, all at a time. While the disk fails they are in effect, and are tried again until the relay
        stops."""
        failed = False
        while self._unwritten and not (failed and self._stopping.is_set()):
            batch, self._unwritten = self._unwritten, {}
            waiting, self._waiting = self._waiting, []
            batch |= {state.key: (state, False) for state in self.states.sweep()}
            learned = [state for state, holds in batch.values() if holds]
            before, failed = failed, False
            try:
                await asyncio.to_thread(self._store.write, learned, [state for state, holds in batch.values() if not holds])
            except StoreError as error:
                failed = True
                self._unwritten = batch | self._unwritten
                if not before:
                    self._log.event("warning", text=f"node: {error}: what was learned about sites is not stored; tried again")
            except Exception as error:  # what cannot be encoded: without it, others are stored
                self._log.event("warning", text=f"node: internal error: {error!r}: {len(batch)} states are not stored")
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            if failed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_AGAIN_SECONDS):
                        await self._stopping.wait()
        self._writing = None
