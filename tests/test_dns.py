"""The cache in front of the DNS, with a real unbound behind it and a clock of our own."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from tests.support.resolver import nameserver_with

ZONE = [
    "mail.test. 300 IN MX 10 mx.test.",
    "mail.test. 300 IN MX 5 other.test.",
    "mx.test. 30 IN A 127.0.0.1",
    "mx.test. 60 IN AAAA ::1",
    "a.test. 300 IN CNAME b.test.",
    "b.test. 300 IN CNAME mail.test.",
    "loop.test. IN CNAME pool.test.",
    "pool.test. IN CNAME loop.test.",
    "null.test. IN MX 0 .",
]


class Asked:
    """A resolver, how often it asked, and its clock."""

    def __init__(self, nameserver: str) -> None:
        self.time = 1000.0
        self.counts: Counter[str] = Counter()
        self.resolver = Resolver([nameserver], lambda what: self.counts.update([what]), lambda: self.time)


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    with nameserver_with(tmp_path, ZONE) as nameserver:
        made = Asked(nameserver)
        yield made
        await made.resolver.close()


async def test_those_who_ask_the_same_at_a_time_share_one_question(asked):
    answers = await asyncio.gather(*(asked.resolver.mx("mail.test") for _ in range(50)))
    assert all(sorted(values) == [(5, "other.test"), (10, "mx.test")] for values, _ in answers)
    assert asked.counts == {"query": 1, "hit": 49}


async def test_an_answer_is_kept_for_its_ttl(asked):
    assert await asked.resolver.addresses("mx.test", "64") == ["::1", "127.0.0.1"]
    assert await asked.resolver.addresses("mx.test", "4") == ["127.0.0.1"]
    assert asked.counts["query"] == 2
    asked.time += 29
    await asked.resolver.addresses("mx.test", "4")
    assert asked.counts["query"] == 2
    asked.time += 2
    await asked.resolver.addresses("mx.test", "64")
    assert asked.counts["query"] == 3, "A has expired, AAAA has not"


@pytest.mark.parametrize(
    ("name", "error", "kept"), [("nobody.test", NoSuchName, 60), ("mx.test", NoData, 60), ("mail.elsewhere", DnsFailure, 5)]
)
async def test_that_there_is_nothing_is_kept_too_and_failures_for_a_moment(asked, name, error, kept):
    for step in (0.0, kept - 1.0):
        asked.time += step
        with pytest.raises(error):
            await asked.resolver.mx(name)
    assert asked.counts["query"] == 1
    asked.time += 2
    with pytest.raises(error):
        await asked.resolver.mx(name)
    assert asked.counts["query"] == 2


async def test_aliases_are_followed_and_a_loop_ends(asked):
    values, _ = await asked.resolver.mx("a.test")
    assert sorted(values) == [(5, "other.test"), (10, "mx.test")]
    with pytest.raises((NoData, DnsFailure)):
        await asyncio.wait_for(asked.resolver.mx("loop.test"), 10)


async def test_the_null_mx(asked):
    values, _ = await asked.resolver.mx("null.test")
    assert values == [(0, "")]


async def test_the_cache_is_bounded(asked, monkeypatch):
    monkeypatch.setattr("relaymta.dns.KEPT", 20)
    for number in range(50):
        with pytest.raises(NoSuchName):
            await asked.resolver.mx(f"n{number}.test")
    assert len(asked.resolver._known) <= 20
