"""The busiest sites, over all workers."""

from types import SimpleNamespace

from relaymta.metrics import SITE_GAUGES
from relaymta.supervisor.activity import Activity
from relaymta.supervisor.busiest import busiest
from relaymta.worker import gauges
from relaymta.worker.gauges import busy


def worker(**waiting: int):
    """A ready worker's slot and channel: so many messages wait for each site."""
    pools = {
        name: SimpleNamespace(key=name, ready=range(count), sessions=range(count // 10), window=1.26, rate=lambda now: 2.0)
        for name, count in waiting.items()
    }
    shards = [SimpleNamespace(dispatcher=SimpleNamespace(pools=pools))]

    async def ask(op, names):
        assert op == "busy"
        return busy(shards, names, 0.0)

    return None, SimpleNamespace(ask=ask)


def slots(*workers):
    return SimpleNamespace(ready=lambda: workers)


async def test_a_site_that_is_the_busiest_of_no_worker_can_be_that_of_all():
    found = await busiest(slots(worker(a=100, x=60), worker(b=100, x=70)), Activity(most=2))
    assert [(row["pool"], row["waiting"], row["connections"]) for row in found] == [("x", 130, 13), ("a", 100, 10)]
    assert found[0]["window"] == 2.6 and found[0]["rate"] == 4.0
    assert {key for _, key in SITE_GAUGES.values()} < found[0].keys()


async def test_a_worker_that_does_not_answer_takes_nothing_from_the_others():
    async def gone(op, names):
        raise ConnectionError

    found = await busiest(slots((None, SimpleNamespace(ask=gone)), worker(a=1)), Activity(most=5))
    assert [(row["pool"], row["waiting"]) for row in found] == [("a", 1)]


async def test_a_worker_with_very_many_sites_names_those_with_most_mail(monkeypatch):
    monkeypatch.setattr(gauges, "LOADS_MOST", 2)
    found = await busiest(slots(worker(a=1, b=3, c=2)), Activity(most=5))
    assert [row["pool"] for row in found] == ["b", "c"]
