"""The streams of a spool: shards that workers have made, and consumers that are no webhooks."""

import asyncio
import os

from relaymta.config import Config
from relaymta.report import serving
from relaymta.report.serving import Reporter
from tests.queue.test_journal import Noted
from tests.queue.test_queue import until
from tests.report.test_streams import Taker


class Log:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, name: str, text: str) -> None:
        self.texts.append(text)


async def test_another_consumer_of_the_same_events_has_its_own_place(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "spool": str(tmp_path)})

    async def told(*fresh: str) -> list[str]:
        taker = Taker()
        reporter = Reporter(tmp_path, Log(), (taker,))
        await reporter.configure(config, fresh)
        try:
            await until(lambda: taker.taken or not fresh)
            await reporter.configure(config)  # a reload leaves it alone
            await until(lambda: all(stream.behind == 0 for one in reporter._told.values() for stream in one.streams.values()))
            assert reporter.rows() == [], "it is no webhook"
        finally:
            await reporter.close()
        return [event["recipient"] for events in taker.taken for event in events]

    async with Noted(tmp_path) as bench:
        await bench.store("a@d.example", "b@d.example")
    assert await told("taker") == ["a@d.example", "b@d.example"]
    assert await told() == [], "it is where it was"
    assert (tmp_path / "report/taker/shard-0").exists()


async def test_a_shard_that_is_new_is_told_from_its_first_event_on(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "spool": str(tmp_path)})

    async def told(taker: Taker) -> list[str]:
        reporter = Reporter(tmp_path, Log(), (taker,))
        await reporter.configure(config)
        await asyncio.sleep(0.3)
        await reporter.close()
        return [event["recipient"] for events in taker.taken for event in events]

    async with Noted(tmp_path) as bench:
        await bench.store("a@d.example")
    assert await told(Taker()) == [], "what was before it is not for a new one"
    os.rename(tmp_path / "report/taker/shard-0", tmp_path / "report/taker/shard-1")  # as if shard 0 were new: more workers
    assert await told(Taker()) == ["a@d.example"]


async def test_of_two_reloads_at_once_the_last_one_counts(tmp_path):
    def config(*hooks: str) -> Config:
        rows = [{"name": hook[0], "url": f"http://127.0.0.1:9/{hook}", "secret_file": "none", "private": True} for hook in hooks]
        return Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "spool": str(tmp_path), "webhook": rows})

    async with Noted(tmp_path) as bench:
        await bench.store("a@d.example")
    reporter = Reporter(tmp_path, Log())
    try:
        await reporter.configure(config("a1", "b1"), ("a", "b"))
        await asyncio.sleep(0.2)  # streams that have something to end
        await asyncio.gather(reporter.configure(config("a2")), reporter.configure(config("a3", "c1")))
        assert [row["url"][-2:] for row in reporter.rows()] == ["a3", "c1"]
    finally:
        await reporter.close()
