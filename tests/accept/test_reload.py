"""What a reload replaces: it is closed after its last use, and older sessions use the current state."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relaymta.auth.dovecot import Dovecot
from relaymta.auth.identity import Identity, Unavailable
from tests.accept.test_backends import dovecot, plain  # noqa: F401 (a fixture)
from tests.accept.test_endpoints import SECRET, Endpoint, scram
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx


def descriptors(endpoint: Endpoint) -> int:
    found = json.loads(endpoint.cli("status", "--json").stdout)
    return sum(len(os.listdir(f"/proc/{row['pid']}/fd")) for row in found["workers"])


def test_reloads_leave_no_connections_to_dovecot(dovecot, tmp_path):  # noqa: F811
    with Endpoint(tmp_path, "127.0.0.1:1", f"accounts.dovecot={dovecot.socket}", "accounts.remember=0") as endpoint:
        assert plain(endpoint, "bob", "builder") == 235
        before = descriptors(endpoint)
        for _ in range(5):
            assert endpoint.cli("reload").stdout.startswith("reloaded")
            assert plain(endpoint, "bob", "builder") == 235
        wait_for(lambda: descriptors(endpoint) <= before, 10, "the connections to be closed")


def test_a_session_that_is_older_than_a_reload_uses_the_current_accounts(tmp_path):
    with FakeMx({}) as peer, Endpoint(tmp_path, f"127.0.0.1:{peer.port}") as endpoint:
        with endpoint.client() as right, endpoint.client() as wrong:
            assert endpoint.cli("reload").stdout.startswith("reloaded")
            endpoint.account("user", "password", "ann", "--password", "battery staple", "--scram")

            def changed() -> bool:
                with endpoint.client() as fresh:
                    return scram(fresh, "ann", "battery staple") == 235

            wait_for(lambda: _quietly(changed))
            assert scram(right, "ann", "battery staple") == 235
            assert _quietly(lambda: scram(wrong, "ann", SECRET) == 235) is False


def _quietly(tried) -> bool:
    """scramp's client verifies the server's signature, too, and raises when that was made with another password."""
    with contextlib.suppress(Exception):
        return bool(tried())
    return False


class Auth:
    """A Dovecot auth service that answers once `answer` is set; it counts its connections."""

    def __init__(self, path: Path, greeting: bytes = b"VERSION\t1\t2\nMECH\tPLAIN\nDONE\n") -> None:
        self.path, self._greeting = str(path), greeting
        self.connected = self.ever = 0
        self.answer = asyncio.Event()

    async def __aenter__(self) -> "Auth":
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connected += 1
        self.ever += 1
        writer.write(self._greeting)
        while line := await reader.readline():
            if line.startswith(b"AUTH"):
                await self.answer.wait()
                writer.write(b"OK\t" + line.split(b"\t")[1] + b"\tuser=bob\n")
        self.connected -= 1
        writer.close()

    async def until(self, connected: int) -> None:
        async with asyncio.timeout(5):
            while self.connected != connected:
                await asyncio.sleep(0.01)


@pytest.fixture
async def auth(tmp_path: Path) -> AsyncIterator[Auth]:
    async with Auth(tmp_path / "auth") as made:
        yield made


async def test_pending_requests_are_answered_before_a_replaced_connection_is_closed(auth):
    ours = Dovecot(auth.path)
    asked = [asyncio.create_task(ours.password("bob", "x", "192.0.2.1")) for _ in range(3)]
    await auth.until(1)
    ours.close()
    ours.close()
    await asyncio.sleep(0.05)
    assert auth.connected == 1
    asked.pop().cancel()
    auth.answer.set()
    assert await asyncio.gather(*asked) == [Identity("bob")] * 2
    await auth.until(0)
    assert await ours.password("bob", "x", "192.0.2.1") == Identity("bob")  # for a session that began before the reload
    await auth.until(0)
    assert auth.ever == 2


async def test_a_dovecot_that_greets_wrongly_or_never_is_disconnected(tmp_path, monkeypatch):
    monkeypatch.setattr("relaymta.auth.dovecot.TIMEOUT", 0.1)
    for number, greeting in enumerate((b"220 hello\n", b"VERSION\t2\t0\n", b"")):
        async with Auth(tmp_path / f"auth{number}", greeting) as other:
            with pytest.raises(Unavailable):
                await Dovecot(other.path).password("bob", "x", "192.0.2.1")
            await other.until(0)
            assert other.ever == 1
