"""The streams of a spool: shards that workers have made, and consumers that are no webhooks."""

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
