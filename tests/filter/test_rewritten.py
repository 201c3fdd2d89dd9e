"""The body that a filter writes: what becomes of its octets, and of its file, whatever happens meanwhile."""

import asyncio
import errno
import gc
import os
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.accept.large import ROOM, Large
from relaymta.disk.big import BigBody
from relaymta.errors import StoreError
from relaymta.filter import rewritten
from relaymta.filter.judgement import FilterFailure
from relaymta.filter.rewritten import PIECES, TOGETHER, Rewritten
from relaymta.reservation import Reservation
from tests.queue.test_queue import until

LINE = b"a line of a body, as it is said to be written.\r\n"


class Desk:
    """Makes bodies with files in a folder, written by its threads. `given_back`: how many descriptors were."""

    def __init__(self, folder: Path, threads: int = 4) -> None:
        self.folder = folder
        self.threads = ThreadPoolExecutor(threads)
        self.made: list[BigBody] = []
        self.given_back = 0

    def body(self, memory: int = 0, most: int = 1 << 40) -> Rewritten:
        return Rewritten(self.large, memory, most, self.thread, Reservation(self._give))

    def large(self) -> Large:
        return Large(self.file, [], changes=True)

    def file(self, room: int) -> BigBody:
        self.made.append(BigBody(self.folder / f"{len(self.made):016x}", len(self.made), room))
        return self.made[-1]

    def thread(self, work: Callable[..., Any], *arguments: Any) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def _give(self) -> None:
        self.given_back += 1

    @property
    def files(self) -> list[str]:
        return os.listdir(self.folder)

    @property
    def descriptors(self) -> list[str]:
        """What this process has open in the folder, removed or not."""
        found = []
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{number}"))
        return [name for name in found if name.startswith(str(self.folder))]

    async def gone(self) -> None:
        """Wait until nothing is left."""
        await until(lambda: self.given_back == 1)
        assert self.files == [] and self.descriptors == []


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.threads.shutdown()


class Stop:
    """Holds the first call of a function in its thread until `go`; `done`: when it has done its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, done: bool = False) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def stopped(*arguments: Any, **named: Any) -> Any:
            first = not self.reached.is_set()
            result = original(*arguments, **named) if done or not first else None
            if first:
                self.reached.set()
                assert self.go.wait(60)
            return result if done or not first else original(*arguments, **named)

        monkeypatch.setattr(owner, name, stopped)

    async def wait(self) -> None:
        await until(self.reached.is_set)


async def content(new: Rewritten) -> bytes:
    """Its octets, as a filter would be shown them."""
    head = b"Subject: x\r\n\r\n"
    text = new.text(head)
    whole = b"".join([piece async for piece in text.pieces()])
    assert whole.startswith(head) and len(whole) == text.size == len(head) + new.octets
    return whole.removeprefix(head)


def oracle(octets: bytes) -> bytes:
    """Message data, as one would make it of octets that have all come."""
    data = re.sub(rb"\r\n|\r|\n", b"\r\n", octets.replace(b"\0", b" "))
    return data if not data or data.endswith(b"\r\n") else data + b"\r\n"


# What is written becomes message data


@pytest.mark.parametrize(
    ("pieces", "made"),
    [
        ([], b""),
        ([b"", b""], b""),
        ([b"a\r\n"], b"a\r\n"),
        ([b"a"], b"a\r\n"),
        ([b"a\r"], b"a\r\n"),
        ([b"a\n"], b"a\r\n"),
        ([b"a\r\r\n"], b"a\r\n\r\n"),
        ([b"a\r", b"\r", b"\n"], b"a\r\n\r\n"),
        ([b"a\r", b"", b"\nb"], b"a\r\nb\r\n"),
        ([b"\n"], b"\r\n"),
        ([b"\r"], b"\r\n"),
        ([b"a\r\n", b"\n"], b"a\r\n\r\n"),
        ([b"a\r", b"b"], b"a\r\nb\r\n"),
        ([b"a\r", b"\0"], b"a\r\n \r\n"),
        ([b"a\n\r\nb\r\xff\0"], b"a\r\n\r\nb\r\n\xff \r\n"),
        ([b".\r\n.", b"\n"], b".\r\n.\r\n"),
    ],
)
@pytest.mark.parametrize("memory", [0, 100])
async def test_lines_end_with_crlf_and_there_is_no_nul(desk, pieces, made, memory):
    assert oracle(b"".join(pieces)) == made
    new = desk.body(memory)
    for piece in pieces:
        await new.write(piece)
    await new.end()
    assert await content(new) == made and new.octets == len(made) and new.eight_bit == (b"\xff" in made)
    assert (new.large is None) == (memory > 0 or not made) == (desk.given_back == 1)
    new.discard()
    await desk.gone()


def test_any_split_gives_the_same_message_data(tmp_path, monkeypatch):
    monkeypatch.setattr(rewritten, "TOGETHER", 5)
    monkeypatch.setattr(rewritten, "PIECES", 3)
    desk = Desk(tmp_path, 1)

    async def written(pieces: list[bytes], memory: int) -> None:
        desk.given_back = 0
        new = desk.body(memory)
        for piece in pieces:
            await new.write(piece)
        await new.end()
        expected = oracle(b"".join(pieces))
        assert await content(new) == expected
        assert (new.octets, new.eight_bit) == (len(expected), not expected.isascii())
        assert (new.large is None) == (len(expected) <= memory) and new.place.held == (new.large is not None)
        assert new.body == (expected if new.large is None else b"")
        new.discard()
        await desk.gone()

    octets = st.text("\r\n\0a.\xe9", max_size=12).map(lambda text: text.encode("latin-1"))
    with asyncio.Runner() as runner:

        @given(st.lists(octets, max_size=12), st.sampled_from([0, 1, 6, 30, 1000]))
        @settings(deadline=None, max_examples=200)
        def check(pieces: list[bytes], memory: int) -> None:
            runner.run(written(pieces, memory))

        check()
    desk.threads.shutdown()


async def test_a_piece_that_is_message_data_is_not_copied(desk):
    new = desk.body()
    piece = LINE * 1000 + b"half a line, and a CR\r"
    await new.write(piece)
    other = b"\n" + LINE
    await new.write(other)
    assert new._pieces[0] is piece and new._pieces[1] is other
    new.discard()
    await desk.gone()


@pytest.mark.parametrize("memory", [0, 1000])
@pytest.mark.parametrize("short", [b"aaaaaaaa\r\n", b"aaaaaaaa\r", b"aaaaaaaa\n", b"aaaaaaaa", b"\n\n\n\n\n", b"\r\r\r\r\r\n"])
async def test_as_many_octets_as_there_may_be_and_none_more(desk, short, memory):
    """Counted as they are stored: with the end of the last line."""
    octets = len(oracle(short))
    new = desk.body(memory, octets)
    await new.write(short)
    await new.end()
    assert new.octets == octets and await content(new) == oracle(short)
    new.discard()
    await desk.gone()
    desk.given_back, new = 0, desk.body(memory, octets - 1)
    for _ in range(2):
        with pytest.raises(FilterFailure, match=rf"^writes a body of more than {octets - 1} octets$"):
            await new.write(short)
    with pytest.raises(FilterFailure):
        await new.end()
    new.discard()
    await desk.gone()


async def test_what_is_too_large_is_not_written_further(desk):
    new = desk.body(0, 3 * TOGETHER)
    with pytest.raises(FilterFailure) as raised:
        while True:
            await new.write(LINE * 1000)
    assert raised.value.reason == "protocol" and desk.made[0].length <= 3 * TOGETHER
    new.discard()
    await desk.gone()


# Memory and files


async def test_it_stays_in_memory_up_to_a_bound_and_then_all_of_it_is_in_a_file(desk):
    for octets, file in ((len(LINE), False), (1000, False), (1001, True), (3 * TOGETHER, True)):
        desk.given_back = 0
        new, whole = desk.body(1000), (LINE * (octets // len(LINE) + 1))[: octets - 2] + b"\r\n"
        for at in range(0, octets, 333):
            await new.write(whole[at : at + 333])
        await new.end()
        assert (new.large is not None) == file and new.octets == octets and await content(new) == whole
        assert len(desk.files) == file and new.place.held == file
        if new.large is not None:
            assert new.large.body_octets == octets and not desk.made[-1].submitted
        new.discard()
        new.discard()
        await desk.gone()


@pytest.mark.parametrize("piece", [LINE * 1365, b"\n" * 65_535, b"a line\n", b"\r\n"], ids=["large", "LF", "small", "tiny"])
async def test_memory_is_bounded(desk, piece):
    """Also by that of many small pieces; and threads write many of them together."""
    octets = 50_000_000 if len(piece) > 1000 else 300_000
    new = desk.body(262_144)
    writes, thread = 0, desk.thread

    def counted(*what: Any) -> "asyncio.Future[Any]":
        nonlocal writes
        writes += 1
        return thread(*what)

    new._thread = counted
    tracemalloc.start()
    try:
        for _ in range(octets // len(piece)):
            await new.write(piece)
        await new.end()
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # other threads are counted, too
    finally:
        tracemalloc.stop()
    assert new.octets >= octets - len(piece) and writes <= new.octets // TOGETHER + 2
    assert desk.made[0].length == new.octets
    new.discard()
    await desk.gone()


async def test_many_small_pieces_in_memory_are_few(desk):
    new = desk.body(1 << 20)
    for _ in range(PIECES):
        await new.write(b"abc\r\n")
    (first,) = new._pieces
    for _ in range(PIECES, 100_000):
        await new.write(b"abc\r\n")
    assert len(new._pieces) < PIECES + 100_000 // PIECES + 2
    assert new._pieces[0] is first, "it was copied again"
    await new.end()
    assert new.body == b"abc\r\n" * 100_000
    new.discard()
    await desk.gone()


# Failures


async def test_a_file_that_cannot_be_made(desk, monkeypatch):
    monkeypatch.setattr(desk, "file", lambda room: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")))
    new = desk.body()
    with pytest.raises(OSError, match="too many"):
        await new.write(b"x" * TOGETHER)
    with pytest.raises(StoreError):
        await new.write(b"y")
    with pytest.raises(StoreError):
        await new.end()
    assert desk.given_back == 0
    new.discard()
    await desk.gone()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
@pytest.mark.parametrize("at_end", [False, True], ids=["in the middle", "by its last octets"])
async def test_a_full_disk_leaves_nothing(small_disk, at_end):
    desk = Desk(small_disk)
    new = desk.body()
    if at_end:
        desk.file(2 * ROOM).write([b"x" * 900_000])
        await new.write(b"x" * 200_000)
    with pytest.raises(OSError, match="No space left"):
        while not at_end:
            await new.write(LINE * 1000)
        await new.end()
    with pytest.raises(StoreError):
        await new.end()
    new.discard()
    if at_end:
        desk.made[0].discard()
    await desk.gone()
    assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks
    desk.threads.shutdown()


async def test_a_file_that_cannot_be_removed_gives_its_descriptor_back_without_a_word(desk, monkeypatch):
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
    new = desk.body()
    await new.write(LINE)
    await new.end()
    assert new.large is not None
    monkeypatch.setattr(new.large, "discard", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "it cannot")))
    new.discard()
    await until(lambda: desk.given_back == 1)
    del new
    gc.collect()
    assert not said
    desk.made[0].discard()


# Discarded and cancelled at any time


@pytest.mark.parametrize("written", [0, 10, TOGETHER, 3 * TOGETHER + 1])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("memory", [0, TOGETHER])
async def test_nothing_is_left_of_what_is_discarded(desk, written, ended, memory):
    new = desk.body(memory)
    for at in range(0, written, 65_535):
        await new.write(b"x" * min(65_535, written - at))
    if ended:
        await new.end()
    new.discard()
    new.discard()
    await desk.gone()
    with pytest.raises(StoreError):
        await new.write(b"x")
    with pytest.raises(StoreError):
        await new.end()
    assert desk.files == []


@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize("fails", [False, True], ids=["", "that fails"])
@pytest.mark.parametrize("call", ["write", "open"])
async def test_a_write_under_way_has_its_descriptor_to_itself(desk, monkeypatch, call, cancelled, fails):
    """Another file must not have its number before the thread has returned; then nothing is left."""
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: said.append(context))
    stop = Stop(monkeypatch, os, call)
    if fails:
        write = BigBody.write

        def failing(file: BigBody, buffers: list[bytes]) -> None:
            write(file, buffers)
            raise OSError(errno.EIO, "it cannot")

        monkeypatch.setattr(BigBody, "write", failing)
    new = desk.body()
    task = asyncio.ensure_future(new.write(b"x" * TOGETHER))
    await stop.wait()
    if cancelled:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        with pytest.raises(StoreError):  # there would be a gap
            await new.write(b"y")
    new.discard()
    await asyncio.sleep(0.02)
    assert desk.given_back == 0 and (call == "open" or (len(desk.files) == len(desk.descriptors) == 1))
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    stop.go.set()
    await desk.gone()
    for other in others:
        assert os.readlink(f"/proc/self/fd/{other}") == "/dev/null"
        os.close(other)
    if not cancelled:
        found = (await asyncio.gather(task, return_exceptions=True))[0]
        assert (found is None) != fails
        with pytest.raises(StoreError):
            await new.write(b"y")
    del task, new
    gc.collect()
    assert not said


@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_write_that_no_thread_has_begun_makes_no_file(tmp_path, cancelled):
    desk, go = Desk(tmp_path, 1), threading.Event()
    busy = desk.thread(go.wait, 60)
    new = desk.body()
    task = asyncio.ensure_future(new.write(b"x" * TOGETHER))
    await asyncio.sleep(0)
    if cancelled:
        task.cancel()
    new.discard()
    await asyncio.sleep(0)
    go.set()
    await busy
    await desk.gone()
    await asyncio.gather(task, return_exceptions=True)
    assert desk.made == []
    desk.threads.shutdown()


async def test_the_last_write_is_cancelled_as_any_other(desk, monkeypatch):
    stop = Stop(monkeypatch, os, "write")
    new = desk.body()
    await new.write(LINE)
    task = asyncio.ensure_future(new.end())
    await stop.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(StoreError):  # else it would be taken for whole
        await new.end()
    new.discard()
    stop.go.set()
    await desk.gone()


async def test_a_reader_that_is_cancelled_hinders_nobody(desk, monkeypatch):
    new = desk.body()
    await new.write(LINE * 10_000)
    await new.end()
    stop = Stop(monkeypatch, os, "pread")
    reader = asyncio.ensure_future(content(new))
    await stop.wait()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    text = new.text(b"")
    new.discard()
    await asyncio.sleep(0.02)
    assert len(desk.descriptors) == 1
    stop.go.set()
    await desk.gone()
    with pytest.raises(OSError, match="closed"):
        [piece async for piece in text.pieces()]
