"""Channels between processes: answers in pieces, late and refused ones, and a connection of the command line."""

import asyncio
import os
import socket
import struct
import threading
from contextlib import aclosing

import pytest
import uvloop

from relaymta import control
from relaymta.control import Answer, Channel, Late, Refused, converse, frames
from relaymta.control.frames import Frame, Frames, pack
from relaymta.errors import RelayError


class Pair:
    """Two ends; `self.far` answers."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.gone: list[str] = []
        self.made = 0
        self.ended = 0
        self.stuck = asyncio.Event()
        self.near = Channel(ours, self.handle, lambda: self.gone.append("near"))
        self.far = Channel(theirs, self.handle, lambda: self.gone.append("far"))

    async def handle(self, op, args, descriptors):
        if op == "held":
            for descriptor in descriptors:
                os.close(descriptor)
            return len(descriptors)
        return await getattr(self, op)(**args)

    async def echo(self, value):
        return value

    async def count(self, upto, size=1):
        async def numbers():
            try:
                for number in range(upto):
                    self.made += 1
                    yield bytes([number % 256]) * size
            finally:
                self.ended += 1

        return numbers()

    async def rows(self, upto):
        return list(range(upto))

    async def never(self):
        await self.stuck.wait()

    async def wrong(self):
        raise KeyError("x")

    async def refused(self):
        raise RelayError("we cannot")

    async def unsendable(self):
        return object()

    async def large(self):
        return bytes(frames.LIMIT)

    async def half(self):
        async def numbers():
            yield b"1"
            raise RelayError("the disk is gone")

        return numbers()


@pytest.fixture
async def pair():
    found = Pair()
    yield found
    found.near.close()
    found.far.close()


async def test_answers_and_sentences(pair):
    assert await pair.near.ask("echo", value={"a": [1, b"x", None]}) == {"a": [1, b"x", None]}
    for op, sentence in (
        ("refused", "^we cannot$"), ("wrong", "^internal error: KeyError: 'x'$"), ("unsendable", "cannot be sent"),
        ("large", "octets are too many"), ("no_such", "internal error"),
    ):  # fmt: skip
        with pytest.raises(Refused, match=sentence):
            await pair.near.ask(op)
    with pytest.raises(RelayError, match="too many"):
        await pair.near.ask("echo", value=bytes(frames.LIMIT))
    assert await pair.near.ask("echo", value=1) == 1
    assert pair.gone == []


async def test_descriptors_arrive_with_their_own_request_also_behind_others(pair):
    """One read brings what waits: requests without descriptors, and the first with some."""
    reading, writing = os.pipe()
    pair.near.notify("held")
    asked = [asyncio.ensure_future(pair.near.ask("held", descriptors)) for descriptors in (None, [reading, writing], None)]
    assert [await one for one in asked] == [0, 2, 0]
    os.close(reading)
    os.close(writing)


async def test_a_late_answer_is_late_and_the_channel_goes_on(pair):
    with pytest.raises(Late, match=r"no answer to never within 0\.05 s"):
        await pair.near.ask("never", None, 0.05)
    pair.stuck.set()
    assert await pair.near.ask("echo", value=1) == 1
    assert isinstance(Late("x"), ConnectionError)


async def test_nothing_is_asked_of_an_end_that_reads_nothing(pair, monkeypatch):
    monkeypatch.setattr(control, "BACKLOG", 1 << 20)
    asyncio.get_running_loop().remove_reader(pair.far._socket.fileno())
    with pytest.raises(Late):
        await pair.near.ask("echo", None, 0.05, value=bytes(4 << 20))
    with pytest.raises(Late, match="does not take"):
        await pair.near.ask("echo", value=1)


async def test_a_list_of_any_length_arrives_whole(pair):
    for count in (0, 1, frames.ROWS_TOGETHER, frames.ROWS_TOGETHER + 1, 20_000):
        assert await pair.near.ask("rows", upto=count) == list(range(count))


async def test_each_piece_of_a_long_list_gets_the_whole_time(pair, monkeypatch):
    granted, real = [], asyncio.Timeout.reschedule

    def reschedule(limit, when):
        granted.append(when - asyncio.get_running_loop().time())
        real(limit, when)

    monkeypatch.setattr(asyncio.Timeout, "reschedule", reschedule)
    assert await pair.near.ask("rows", None, 1000.0, upto=10 * frames.ROWS_TOGETHER) == list(range(10 * frames.ROWS_TOGETHER))
    assert sum(seconds == pytest.approx(1000.0, abs=60.0) for seconds in granted) == 11  # for the first, and after each


async def test_pieces_arrive_in_order_and_wait_until_they_are_wanted(pair):
    async with aclosing(pair.near.stream("count", upto=50, size=1 << 16)) as pieces:
        first = await anext(pieces)
        for _ in range(200):
            await asyncio.sleep(0)
        assert first == bytes(1 << 16)
        assert pair.made <= control.WINDOW + 2  # those on their way, and the one that is held
        assert await pair.near.ask("echo", value="meanwhile") == "meanwhile"
        rest = [piece[:1] async for piece in pieces]
    assert rest == [bytes([number]) for number in range(1, 50)]
    assert pair.ended == 1


async def test_an_answer_that_is_not_read_to_its_end_ends(pair):
    async with aclosing(pair.near.stream("count", upto=1000)) as pieces:
        await anext(pieces)
    assert await pair.near.ask("echo", value=1) == 1
    while not pair.ended:
        await asyncio.sleep(0)
    assert pair.made < 20 and not pair.far._pouring


async def test_pieces_end_with_an_error_or_with_the_channel(pair):
    found = []
    with pytest.raises(Refused, match="the disk is gone"):
        async for piece in pair.near.stream("half"):
            found.append(piece)
    assert found == [b"1"]
    with pytest.raises(ConnectionError, match="gone"):
        async for _ in pair.near.stream("count", upto=1000):
            pair.far.close()
    assert pair.gone == ["far", "near"]
    while not pair.ended:
        await asyncio.sleep(0)


async def test_frames_that_are_none_end_neither_the_channel_nor_another_request(pair):
    waiting = asyncio.ensure_future(pair.near.ask("never"))
    await asyncio.sleep(0)
    for garbage in (b"\0\0\0\1\xc1", struct.pack(">I", frames.LIMIT + 3) + bytes(frames.LIMIT + 3)):
        for one in (pair.near, pair.far):
            one._put(garbage, [])
    assert await pair.near.ask("echo", value=1) == 1
    assert await pair.far.ask("echo", value=1) == 1
    # An answer of another version of us that is too large for this one.
    pair.far._put(struct.pack(">I", frames.LIMIT + 8) + pack(Frame(1, ok=1))[4:12] + bytes(frames.LIMIT), [])
    with pytest.raises(Refused, match="too many"):
        await waiting
    assert pair.gone == []


# A connection of the command line


async def served(tmp_path, answer, failed=lambda op, error: None):
    path = tmp_path / "socket"
    server = await asyncio.start_unix_server(lambda reader, writer: converse(reader, writer, answer, failed), path)
    return path, server


async def test_the_daemons_end_answers_with_values_pieces_and_who_is_missing(tmp_path):
    bugs = []

    async def pieces():
        for _ in range(40):
            yield bytes(1 << 18)

    async def answer(op, args, by):
        if op == "wrong":
            raise KeyError("x")
        return Answer({"raw": pieces(), "rows": list(range(5000))}.get(op, op), [3, 1])

    path, server = await served(tmp_path, answer, lambda op, error: bugs.append((op, type(error))))

    def ask():
        asked = control.begin(path, "status")
        assert (asked(), asked.missing) == ("status", [1, 3])
        assert control.ask(path, "rows") == list(range(5000))
        raw = control.begin(path, "raw")
        assert sum(len(piece) for piece in raw.pieces()) == 10 << 20
        assert raw.missing == [1, 3]
        with pytest.raises(Refused, match="internal error: KeyError"):
            control.ask(path, "wrong")
        with pytest.raises(RelayError, match="cannot be sent"):
            control.begin(path, "status", reason="\ud800")

    await asyncio.to_thread(ask)
    assert bugs == [("wrong", KeyError)]
    server.close()


async def test_garbage_on_the_control_socket_is_answered_with_a_sentence(tmp_path):
    async def answer(op, args, by):
        return Answer(op, [])

    path, server = await served(tmp_path, answer)

    def talk():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(path))
            sock.sendall(b"\0\0\0\1\xc1" + pack(Frame(4, "next")) + pack(Frame(9)))
            reader, found = Frames(), []
            while len(found) < 3:
                found += reader.feed(sock.recv(4096))
            assert "not a frame" in found[0].error and (found[1].id, found[1].ok) == (4, "next")
            assert found[2].id == 9 and "not a request" in found[2].error
            sock.sendall(
                struct.pack(">I", frames.LIMIT + 1) + b"\x83\xa2id\x05\xa2op" + bytes(frames.LIMIT - 7) + pack(Frame(6, "x"))
            )
            found.clear()
            while len(found) < 2:
                found += reader.feed(sock.recv(4096))
            assert found[0].id == 5 and "too many" in found[0].error and found[1].ok == "x"

    await asyncio.to_thread(talk)
    server.close()


def test_an_answer_that_nobody_waits_for_any_more_is_no_error(tmp_path):
    """On uvloop, whose transports raise RuntimeError when something is written after the end."""

    async def run():
        wrong, began, go_on = [], asyncio.Event(), asyncio.Event()
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context))

        async def answer(op, args, by):
            began.set()
            await go_on.wait()
            return Answer("x" * 500_000, [])

        path, server = await served(tmp_path, answer, lambda op, error: wrong.append(error))
        for _ in range(5):
            began.clear()
            go_on.clear()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.sendall(pack(Frame(1, "status")))
                await began.wait()
            await asyncio.sleep(0.05)
            go_on.set()
            await asyncio.sleep(0.05)
        server.close()
        assert wrong == []

    uvloop.run(run())


def test_a_program_that_only_answers():
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    thread = threading.Thread(target=control.serve, args=(theirs, lambda op, args: args["x"]))
    thread.start()
    with ours:
        ours.sendall(b"\0\0\0\1\xc1" + pack(Frame(1, "a", {"x": 7})) + pack(Frame(2, "a", {})))
        reader, found = Frames(), []
        while len(found) < 3:
            found += reader.feed(ours.recv(4096))
    thread.join()
    assert "not a frame" in found[0].error and found[1].ok == 7 and "KeyError" in found[2].error
