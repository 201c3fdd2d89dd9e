"""The target `form`: bodies of requests of the HTTP injection API with files beside the JSON, as they come from the network."""

import asyncio
import contextlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
from aiohttp import HttpVersion11, StreamReader, multipart
from aiohttp.base_protocol import BaseProtocol
from multidict import CIMultiDict

from relaymta.accept.http import receiving
from relaymta.accept.http.compose import compose
from relaymta.accept.http.models import Wrong, parse
from relaymta.accept.http.receiving import Receiver
from relaymta.problems import Problem
from relaymta.reservation import Reservation
from tests.support.http_messages import check

MOST = 3000  # octets of a request
SECONDS = 5.0
receiving.IN_MEMORY = 256  # so that parts go into the file
Outcome = tuple[int | bytes, str]


class _Worker:
    """What a worker has beside the receiver; it runs for as long as the process."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self.threads = ThreadPoolExecutor(1)
        self.intake = SimpleNamespace(queue=SimpleNamespace(full=False, room=1 << 40))
        self.files = 0
        self.receiver = Receiver(self, tempfile.gettempdir())  # type: ignore[arg-type]

    def file(self) -> Reservation:
        self.files += 1
        return Reservation(self._back)

    def _back(self) -> None:
        self.files -= 1


_worker: list[_Worker] = []


def form(data: bytes) -> None:
    """An input: an octet that says in how many pieces it comes, the rest of the line of the type, and the body."""
    if not _worker:
        _worker.append(_Worker())
    one = _worker[0]
    kind, _, body = data[1:].partition(b"\n")
    found = [one.runner.run(_received(one, kind, pieces)) for pieces in ([body], _cut(body, 2 + data[0]))]
    # One that is too large, and wrong as well, is refused for what is seen first.
    assert found[0] == found[1] or (len(body) > MOST and any(status == 413 for status, _ in found)), found
    assert (
        one.files == 0 and one.receiver._octets == 0 and not vars(multipart).get("__warningregistry__", {}).keys() - {"version"}
    )


def _cut(body: bytes, count: int) -> list[bytes]:
    size = len(body) // count + 1
    return [body[at : at + size] for at in range(0, len(body), size)]


async def _received(one: _Worker, kind: bytes, pieces: list[bytes]) -> Outcome:
    """The digest of what came, or the status of the problem; and the size of the message, or what is wrong with it."""
    protocol = BaseProtocol(one.loop)
    protocol.transport = asyncio.Transport()  # without one, the connection is closed
    stream = StreamReader(protocol, 1 << 16, loop=one.loop)
    headers = CIMultiDict({"Content-Type": "multipart/form-data; boundary=" + kind.decode("latin-1")})
    request: Any = SimpleNamespace(
        headers=headers, content=stream, content_length=None, version=HttpVersion11, transport=None
    )  # fmt: skip
    feeding = one.loop.create_task(_feed(stream, pieces))
    try:
        received = await asyncio.wait_for(one.receiver.receive(request, MOST), SECONDS)
    except Problem as problem:
        assert json.loads(msgspec.json.encode(problem.details))["detail"].isprintable()
        return problem.status, ""
    finally:
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feeding
    try:
        assert received.size <= MOST
        parts = {name: part.read(0, part.size) for name, part in received.parts.items()}
        assert all(len(octets) == received.parts[name].size for name, octets in parts.items())
        assert all(bytes(part.buffer[:]) == parts[name] for name, part in received.parts.items() if part.size)
        return received.digest, _composed(received)
    finally:
        received.close()


async def _feed(stream: StreamReader, pieces: list[bytes]) -> None:
    for piece in pieces:
        stream.feed_data(piece)
        await asyncio.sleep(0)
    stream.feed_eof()


def _composed(received: receiving.Received) -> str:
    """The message of a form."""
    try:
        found = parse(received.body.buffer if received.body.size else b"")
        if found.batch is not None:
            return "a batch"
        composed = compose(found, received.parts)
    except Wrong as error:
        assert error.detail.isprintable() and error.field.isprintable()
        return error.detail
    whole = b"".join(composed.pieces)
    assert len(whole) == composed.size
    check(whole, composed.utf8)
    return str(composed.size)
