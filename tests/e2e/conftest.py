"""A ledger sink in a thread of its own, and relays whose smart host it is; users of relays that keep mail."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import sink
from tests.support.daemon import Relay
from tests.support.imap_relay import ImapRelay


class SinkThread:
    """A running ledger sink."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, list[str]]] = []
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        self._ready.wait(10)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        server = await sink.serve(0, lambda ident, digest, to: self.taken.append((ident, digest, to)))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()

    def counts(self) -> Counter[str]:
        """How many times each ledger id has arrived."""
        return Counter(ident for ident, _, _ in self.taken)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)


@pytest.fixture
def ledger() -> Iterator[SinkThread]:
    made = SinkThread()
    yield made
    made.close()


@pytest.fixture
def relay(tmp_path: Path, ledger: SinkThread) -> Iterator[Relay]:
    with Relay(tmp_path, f"127.0.0.1:{ledger.port}") as running:
        yield running


_count = itertools.count()


@pytest.fixture
def user(relay: ImapRelay) -> Iterator[str]:
    """A new user, where the module's `relay` is an ImapRelay, whose sessions are closed at the end."""
    name = f"user{next(_count)}"
    relay.user(name)
    yield name
    relay.close_sessions()
