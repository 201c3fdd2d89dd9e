"""pytest-benchmark: kernels, one commit group, the schedule. `pytest benchmarks --benchmark-only -o addopts=`."""

import asyncio
from pathlib import Path

import pytest
import uvloop

from relaymta._speedups.replies import Replies
from relaymta._speedups.smtp import Parser
from relaymta.ident import format_id
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.proto.smtp_client import stuff
from relaymta.queue import Events, Null, Queue, QueueSettings, wall_ms

ENVELOPE = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"


@pytest.mark.parametrize("kind", ["plain", "dotted", "bdat"])
@pytest.mark.parametrize("size", [4_096, 204_800])
def test_parser(benchmark, size, kind):
    line = (b"." if kind == "dotted" else b"x") + b"y" * 76 + b"\r\n"
    data = line * (size // len(line)) + b".\r\n"
    parser = Parser(2048, 998, False)

    def message() -> None:
        parser.commands()
        parser.feed(ENVELOPE)
        if kind == "bdat":
            parser.chunk(len(data), True)
        else:
            parser.data()
        for start in range(0, len(data), 65536):
            parser.feed(data[start : start + 65536])

    benchmark(message)


def test_replies(benchmark):
    replies = Replies(4096, 100)
    benchmark(replies.feed, b"250 2.0.0 Ok: queued\r\n250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go\r\n")


def test_stuffing_200kb(benchmark):
    benchmark(stuff, [b"x" * 76 + b"\r\n"] * 2600)


def test_format_id(benchmark):
    benchmark(format_id.__wrapped__, 1 << 60)


@pytest.mark.parametrize("group", [1, 16, 64])
def test_commit_group(benchmark, tmp_path: Path, group):
    """A group of 4 kB messages accepted and ended: two commits, both synced."""
    loop = uvloop.new_event_loop()
    ended: list[object] = []

    class Delivers(Null):
        def offer(self, entry) -> None:
            queue.begin(entry)
            queue.finish(entry, None)

        def awake(self, name: QueueName) -> bool:
            return True

    class Quiet(Events):
        def ended(self, outcome) -> None:
            ended.append(outcome)

    async def open_queue() -> Queue:
        queue = Queue(tmp_path, 0, QueueSettings("bench"), lambda *_: [(QueueName("bench", ""), None)], Delivers(), Quiet())
        await queue.start()
        return queue

    queue = loop.run_until_complete(open_queue())
    data = [b"Received: x\r\n", b"y" * 4083]

    async def one_group() -> None:
        ended.clear()
        for _ in range(group):
            envelope = Envelope("a@b", ["c@d"], 4096, 0, wall_ms(), queue.deadline())
            queue.submit(queue.ident(), envelope, data, lambda error: None)
        while len(ended) < group:
            await asyncio.sleep(0)

    benchmark.pedantic(lambda: loop.run_until_complete(one_group()), rounds=50, warmup_rounds=5)
    loop.run_until_complete(queue.stop())
    loop.close()
