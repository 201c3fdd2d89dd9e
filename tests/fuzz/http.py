"""The target `http`: octets for the server of the HTTP API and the page, all of whose answers have hostile texts in them."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from relaymta.api import operations
from relaymta.api.access import _digest
from tests.api.serving import Serving, serving, spoken
from tests.api.test_page import answer

STATUSES = {100, 200, 303, 400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 421, 429, 431, 501, 505}
TOKEN, COOKIE, CSRF = b"TOKEN", b"COOKIE", b"CSRF"  # stand in an input for those that are valid


class _Server:
    """Runs for as long as the process."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self._context = serving(Path(tempfile.mkdtemp()))
        self.problems: list[str] = []
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        operations.BODY_SECONDS = 0.1  # for one that never comes
        self.found: Serving = (await self._context.__aenter__())[0]
        self.found.asked.answer = answer
        self.token = self.found.token("fuzz", "all")
        self.access = self.found.server._access
        self.found.server.log.event = self._event  # type: ignore[method-assign]
        token = self.found.server._access._tokens.find(self.token)
        assert token is not None
        self.cookie = self.access.login(token, "fuzz")
        self.session = self.access._sessions[_digest(self.cookie)]

    def _event(self, name: str, **fields: Any) -> None:
        if name == "warning":
            self.problems.append(fields["text"])

    async def say(self, pieces: list[bytes]) -> bytes:
        """What is answered to these octets until the server closes."""
        self.access._failures.clear()
        self.access._sessions[_digest(self.cookie)] = self.session
        self.found.asked.asked.clear()
        return await spoken(self.found.number, *pieces)


_server: list[_Server] = []


def said(data: bytes) -> None:
    """An input: an octet that says in how many pieces it comes, and the octets."""
    if not _server:
        _server.append(_Server())
    one = _server[0]
    count, wire = 1 + data[0] % 3, data[1:]
    for word, value in ((TOKEN, one.token), (COOKIE, one.cookie), (CSRF, one.session.csrf)):
        wire = wire.replace(word, value.encode())
    size = len(wire) // count + 1
    answered = one.runner.run(one.say([wire[at : at + size] for at in range(0, len(wire), size)]))
    problems, one.problems = one.problems, []
    assert not problems, problems
    if answered:
        head = answered.split(b"\r\n", 1)[0].split(b" ")
        assert head[0].startswith(b"HTTP/") and int(head[1]) in STATUSES, answered[:200]
