"""Lessons: bounded, so many a second, each text once; whatever a filter does with one costs the others nothing."""

import asyncio
import random

import pytest

from relaymta.filter import lessons
from relaymta.filter.judgement import FilterFailure, Text
from relaymta.filter.lessons import KEY, Lesson, Lessons, key_of
from relaymta.supervisor import lessons as remembered

HEAD = b"From: a@b.example\r\nSubject: one\r\nMessage-ID: <1@b.example>\r\n"


class Learner:
    def __init__(self) -> None:
        self.texts: list[tuple[bytes, bool]] = []
        self.does: object = "learned"
        self.open = asyncio.Event()
        self.open.set()

    async def learn(self, text: Text, spam: bool) -> str:
        await self.open.wait()
        self.texts.append((b"".join([piece async for piece in text.pieces()]), spam))
        if isinstance(self.does, Exception):
            raise self.does
        return str(self.does)


class Memory:
    def __init__(self, octets: bytes = b"") -> None:
        self.of = remembered.Lessons(octets)

    async def known(self, keys: list[bytes], spam: bool) -> list[bool]:
        return self.of.known(keys, spam)

    async def learned(self, key: bytes, spam: bool) -> None:
        self.of.learned(key, spam)


class Bench:
    def __init__(self, monkeypatch, *names: str, seconds: float = 5.0) -> None:
        monkeypatch.setattr(lessons, "A_SECOND", 1e6)
        self.learners = {name: Learner() for name in names or ("one",)}
        self.memory = Memory()
        self.found: list[list[Lesson]] = []
        self.of = Lessons(self.learners, dict.fromkeys(self.learners, seconds), self.memory)

    async def teach(self, data: bytes, spam: bool = True) -> list[Lesson]:
        await self.of.put(data, spam, self.found.append)
        await self.of.finished()
        return self.found[-1]


async def test_a_text_is_learned_once_in_whatever_copy_and_again_where_it_is_the_other(monkeypatch):
    bench = Bench(monkeypatch)
    text = HEAD + b"\r\nbuy\r\n"
    copy = b"Received: by x\r\nX-Spam: Yes\r\nReturn-Path: <>\r\n" + text
    assert await bench.teach(text) == [Lesson("one", "learned", "")]
    assert await bench.teach(text) == await bench.teach(copy) == [Lesson("one", "known already", "")]
    assert bench.learners["one"].texts == [(text, True)]
    assert await bench.teach(copy, False) == [Lesson("one", "learned", "")]
    assert await bench.teach(text, True) == [Lesson("one", "learned", "")]
    assert await bench.teach(text + b"more\r\n") == [Lesson("one", "learned", "")]
    assert len(bench.learners["one"].texts) == 4
    bench.of.close()


async def test_what_one_filter_does_costs_the_other_nothing(monkeypatch):
    bench = Bench(monkeypatch, "one", "two", "three", "four", seconds=0.2)
    bench.learners["one"].does = FilterFailure("refused", "no")
    bench.learners["two"].open.clear()
    bench.learners["three"].does = ValueError("a defect")
    found = {one.filter: one for one in await bench.teach(HEAD + b"\r\nx")}
    assert found["one"].error == "no" and found["two"].error == "no answer in 0.2 s" and "a defect" in found["three"].error
    assert found["four"] == Lesson("four", "learned", "")
    bench.learners["one"].does = "known already"
    bench.learners["two"].open.set()
    found = {one.filter: one.done for one in await bench.teach(HEAD + b"\r\nx")}
    assert found == {"one": "known already", "two": "learned", "three": "", "four": "known already"}
    assert len(bench.learners["four"].texts) == 1, "what failed is taught again, what did not is not"
    bench.of.close()


async def test_the_queue_is_bounded_and_nothing_is_lost_in_it(monkeypatch):
    monkeypatch.setattr(lessons, "OCTETS", 1000)
    bench = Bench(monkeypatch)
    learner = bench.learners["one"]
    learner.open.clear()
    putting = asyncio.create_task(_put_all(bench, [b"Subject: %d\r\n\r\n" % n + b"x" * 300 for n in range(20)]))
    for _ in range(200):
        await asyncio.sleep(0)
    assert not putting.done() and bench.of._octets <= 1000
    learner.open.set()
    await putting
    await bench.of.finished()
    assert len(learner.texts) == 20 == len(bench.found) and bench.of._octets == 0
    await bench.of.put(b"y" * 5000, True, bench.found.append)  # larger than all the room there is, alone
    await bench.of.finished()
    assert len(learner.texts) == 21 and bench.of._octets == 0
    bench.of.close()


async def _put_all(bench: Bench, texts: list[bytes]) -> None:
    for text in texts:
        await bench.of.put(text, True, bench.found.append)


@pytest.mark.parametrize("octets", [5, 1 << 30])
@pytest.mark.parametrize("steps", range(8))
async def test_whoever_is_cancelled_leaves_nothing(monkeypatch, steps, octets):
    """Wherever it is: it waits for room, or for the other texts, or is in the queue."""
    monkeypatch.setattr(lessons, "WAITING", 2)
    monkeypatch.setattr(lessons, "OCTETS", octets)
    bench = Bench(monkeypatch)
    bench.learners["one"].open.clear()
    tasks = [asyncio.create_task(bench.of.put(b"Subject: %d\r\n\r\nx" % n, True, bench.found.append)) for n in range(8)]
    for _ in range(steps):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    bench.learners["one"].open.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(one is None or isinstance(one, asyncio.CancelledError) for one in done)
    async with asyncio.timeout(20):
        await bench.of.finished()
    assert len(bench.found) == done.count(None) and bench.of._octets == 0
    await bench.teach(b"another")
    bench.of.close()


async def test_what_a_callback_raises_ends_them_and_nobody_waits_for_ever(monkeypatch):
    bench = Bench(monkeypatch)

    def broken(found: list[Lesson]) -> None:
        raise OSError("the output is gone")

    await bench.of.put(b"x", True, broken)
    with pytest.raises(OSError, match="the output is gone"):
        await bench.of.finished()
    with pytest.raises(OSError, match="the output is gone"):
        await _put_all(bench, [b"%d" % n for n in range(100)])


async def test_five_a_second_and_what_is_known_costs_no_time(monkeypatch):
    waited: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, *arguments: object) -> None:
        waited.append(seconds)
        await real(0)

    bench = Bench(monkeypatch)
    monkeypatch.setattr(lessons, "A_SECOND", 5.0)
    monkeypatch.setattr(lessons.asyncio, "sleep", sleep)
    for n in (0, 1, 1, 1, 2):
        await bench.teach(b"Subject: %d\r\n\r\nx" % n)
    waits = [seconds for seconds in waited if seconds > 0]
    assert len(waits) == 2 and all(0.1 < seconds < 0.2001 for seconds in waits)
    bench.of.close()


def test_a_key_is_of_the_filter_and_of_what_all_copies_have():
    text = HEAD + b"\r\nbody"
    assert len(key_of("a", text)) == KEY
    assert key_of("a", text) != key_of("b", text)
    assert key_of("a", text) == key_of("a", b"Delivered-To: x\r\n" + text) != key_of("a", text + b"\r\n")
    assert key_of("a", b"") == key_of("a", b"\r\n") != key_of("a", b"x")
    assert key_of("a", b"Subject: a\r\n\r\nb") != key_of("a", b"Subject: a\r\nTo: b\r\n\r\nb")


async def test_what_the_machine_remembers_survives_a_restart_and_is_bounded(monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 50)
    rng, model, memory = random.Random(1), dict[bytes, bool](), remembered.Lessons(b"")
    for _ in range(400):
        key, spam = bytes([rng.randrange(90)]) * KEY, rng.random() < 0.5
        model.pop(key, None)
        model[key] = spam
        if len(model) > 50:
            del model[next(iter(model))]
        memory.learned(key, spam)
        if rng.random() < 0.05:
            memory = remembered.Lessons(await memory.dump())
            assert not memory.changed
    keys = [bytes([n]) * KEY for n in range(90)]
    for spam in (True, False):
        assert memory.known(keys, spam) == [model.get(key) is spam for key in keys]
    assert remembered.Lessons((await memory.dump()) + b"half").known(keys, True) == memory.known(keys, True)
