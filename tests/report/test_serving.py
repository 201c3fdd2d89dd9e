"""The streams of a spool: shards that workers have made, and consumers that are no webhooks."""

import asyncio
import os
import time

from relaymta.config import Config
from relaymta.report import serving, streams
from relaymta.report.serving import Reporter
from tests.queue.test_journal import Noted
from tests.queue.test_queue import until
from tests.report.test_streams import Taker
from tests.support.webhooks import consumer, secret_file


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


def hooked(folder, url: str, **more) -> Config:
    row = {"name": "shop", "url": url, "secret_file": str(folder / "secret"), "private": True, **more}
    return Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], "spool": str(folder), "webhook": [row]})


async def test_what_was_counted_of_a_webhook_stays_when_a_reload_changes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    with consumer(secret_file(tmp_path / "secret")) as shop:
        async with Noted(tmp_path) as bench:
            await bench.store("a@d.example", "b@d.example")
        reporter = Reporter(tmp_path, Log())
        try:
            await reporter.configure(hooked(tmp_path, shop.url), ("shop",))
            await until(lambda: reporter.rows()[0]["delivered"] == 2)
            await reporter.replay("shop", 0, 0, [])
            await until(lambda: reporter.rows()[0]["replayed"] == 2)
            await reporter.configure(hooked(tmp_path, shop.url, batch=7))
            (row,) = reporter.rows()
            assert (row["delivered"], row["replayed"]) == (2, 2)
        finally:
            await reporter.close()


async def test_what_a_replay_drops_is_shown_as_dropped_and_counts_from_when_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(streams, "FIRST", 0.01)
    began = time.time_ns
    with consumer(secret_file(tmp_path / "secret")) as shop:
        async with Noted(tmp_path) as bench:
            await bench.store("a@d.example", "b@d.example")
        reporter = Reporter(tmp_path, Log())
        await reporter.configure(hooked(tmp_path, shop.url, retry="1h"), ("shop",))
        await until(lambda: reporter.rows()[0]["delivered"] == 2)
        shop.reply = lambda request: (500, {}, b"")
        await reporter.replay("shop", 0, 0, [])
        await until(lambda: len(shop.refused) > 1)
        await reporter.close()
        reporter = Reporter(tmp_path, log := Log())
        try:
            await reporter.configure(hooked(tmp_path, shop.url, retry="1h"))
            await until(lambda: len(shop.refused) > 3)
            assert reporter.rows()[0]["dropped"] == 0
            monkeypatch.setattr(time, "time_ns", lambda: began() + 3_600_000_000_000)
            await until(lambda: reporter.rows()[0]["dropped"] == 2)
            assert any("2 events of shard 0 were not taken for too long" in text for text in log.texts)
        finally:
            await reporter.close()
