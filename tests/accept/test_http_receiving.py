"""The body of a request: what of a form is read before it is refused, and what is left when the request is over."""

import asyncio
import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import HttpVersion11, StreamReader
from aiohttp.base_protocol import BaseProtocol
from multidict import CIMultiDict

from relaymta.accept.http import receiving
from relaymta.accept.http.receiving import BETWEEN_MOST, Received, Receiver, without_frames
from relaymta.problems import Problem
from relaymta.reservation import Reservation

MESSAGE = b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n{}\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="f"\r\n%b\r\nabc\r\n'
END = b"--x--\r\n"


class Worker:
    """What a receiver needs of one. `left`: descriptors."""

    def __init__(self, left: int = 10) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = None
        self.intake = SimpleNamespace(queue=SimpleNamespace(full=False, room=1 << 40))
        self.left = left

    def file(self) -> Reservation | None:
        if not self.left:
            return None
        self.left -= 1
        return Reservation(self._back)

    def _back(self) -> None:
        self.left += 1


class Sent:
    """A request. `taken`: octets that were read of it."""

    def __init__(self, body: bytes, most: int = 1 << 30, kind: str = "multipart/form-data; boundary=x", **headers: str) -> None:
        self.body, self.most = body, most
        self.headers = CIMultiDict({"Content-Type": kind} | headers)
        self.taken = 0

    async def receive(self, folder: Any = "/tmp", worker: Worker | None = None) -> Received:
        worker = worker or Worker()
        protocol = BaseProtocol(worker.loop)
        protocol.transport = asyncio.Transport()
        stream = StreamReader(protocol, 1 << 16, loop=worker.loop)
        request: Any = SimpleNamespace(
            headers=self.headers, content=stream, content_length=None, version=HttpVersion11, transport=None
        )
        feeding = asyncio.create_task(self._feed(stream))
        try:
            return await Receiver(worker, str(folder)).receive(request, self.most)  # type: ignore[arg-type]
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, stream: StreamReader) -> None:
        for at in range(0, len(self.body), 4096):
            while stream._size:
                await asyncio.sleep(0)
            stream.feed_data(self.body[at : at + 4096])
            self.taken += 4096
        stream.feed_eof()


@pytest.mark.parametrize("body", [
    b"\n" * 1_000_000 + MESSAGE + END, b"y" * 1000 + b"\r\n" * 1_000_000 + MESSAGE + END,
    FILE % (b"A: b\r\n" * 100_000) + MESSAGE + END, FILE % (b"A: " + b"b" * 1_000_000 + b"\r\n") + MESSAGE + END,
    FILE % b"".join(b"A%d: %b\r\n" % (n, b"b" * 1000) for n in range(100)) + MESSAGE + END,
    MESSAGE + END + b"\n" * 1_000_000, MESSAGE + END + b"y" * 1_000_000,
], ids=["empty lines", "preamble", "fields", "long field", "head", "empty lines behind it", "epilogue"])  # fmt: skip
async def test_what_is_no_part_of_a_form_is_bounded(body):
    """A line takes a microsecond to be skipped: 20 MB took 20 s."""
    sent = Sent(body)
    with pytest.raises(Problem) as caught:
        await sent.receive()
    assert caught.value.status == 400 and sent.taken < 5 * BETWEEN_MOST


async def test_a_little_around_parts_is_skipped():
    part = b'--x\r\nContent-Disposition: form-data; name="f%d"\r\nA: %b\r\n\r\nabc\r\n'
    parts = b"".join(part % (number, b"b" * 5000) for number in range(50))
    found = await Sent(b"some words\r\n\r\n" + parts + MESSAGE + END + b"more words\r\n").receive()
    assert (len(found.parts), found.size, found.body.read(0, 9)) == (50, 152, b"{}")


@pytest.mark.parametrize("most, status", [(len(MESSAGE + END) + 500, 0), (len(MESSAGE + END) + 499, 413)])
async def test_all_octets_of_a_form_count(most, status):
    body = b"y" * 498 + b"\r\n" + MESSAGE + END
    if not status:
        await Sent(body, most).receive()
        return
    with pytest.raises(Problem) as caught:
        await Sent(body, most).receive()
    assert caught.value.status == status


async def test_each_content_encoding_is_seen():
    for more in ("gzip", "identity, gzip", "identity"):
        sent = Sent(MESSAGE + END, **{"Content-Encoding": "identity"})
        sent.headers.add("Content-Encoding", more)
        if more == "identity":
            await sent.receive()
            continue
        with pytest.raises(Problem) as caught:
            await sent.receive()
        assert caught.value.status == 415


async def test_a_file_takes_two_descriptors_as_it_is_mapped(tmp_path):
    worker = Worker(2)
    found = await Sent(b"x" * 100_000, kind="application/json").receive(tmp_path, worker)
    assert worker.left == 0 and found.body.buffer[:3] == b"xxx" and found.body.in_file
    before = set(os.listdir("/proc/self/fd"))
    found.close()
    assert worker.left == 2 and len(before - set(os.listdir("/proc/self/fd"))) == 2
    worker = Worker(1)
    with pytest.raises(Problem) as caught:
        await Sent(b"x" * 100_000, kind="application/json").receive(tmp_path, worker)
    assert (caught.value.status, worker.left) == (503, 1) and "Retry-After" in caught.value.headers


async def test_what_has_failed_holds_no_body(tmp_path):
    """A task that fails is in a frame of its own error."""

    async def fail(received: Received) -> None:
        view = memoryview(received.body.buffer)
        try:
            raise ValueError(len(view))
        except ValueError:
            raise Problem(422, "wrong") from None

    async def answer(received: Received) -> None:
        task = asyncio.create_task(fail(received))
        task.add_done_callback(lambda task: received.close())
        await asyncio.shield(task)

    before = len(os.listdir("/proc/self/fd"))
    gc.collect()
    gc.disable()
    try:
        received = await Sent(b"x" * 100_000, kind="application/json").receive(tmp_path)
        found = None
        try:
            await answer(received)
        except Problem as error:
            found = without_frames(error)
        del received
        assert found is not None and found.detail == "wrong"
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # noqa: ASYNC240
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        gc.enable()


def test_the_bounds_are_what_the_page_says():
    assert (receiving.BETWEEN_MOST, receiving.PARTS_MOST, receiving.JSON_IN_FORM) == (8192, 100, 8 << 20)
