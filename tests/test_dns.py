"""The resolver and its cache, with a real unbound as nameserver and a simulated clock."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relaymta.dns import DnsFailure, NoData, NoSuchName, Records, Resolver, _octets
from tests.support.resolver import nameserver_with
from tests.support.zone import Zone, nameserver

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
    """A resolver, its counts of queries and hits, and its clock."""

    def __init__(self, nameserver: str) -> None:
        self.time = 1000.0
        self.counts: Counter[str] = Counter()
        self.zone: Zone | None = None
        self.resolver = Resolver([nameserver], lambda what: self.counts.update([what]), lambda: self.time)


@pytest.fixture
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    with nameserver_with(tmp_path, ZONE) as nameserver:
        made = Asked(nameserver)
        yield made
        await made.resolver.close()


async def test_identical_queries_at_the_same_time_share_one(asked):
    answers = await asyncio.gather(*(asked.resolver.mx("mail.test") for _ in range(50)))
    assert all(sorted(values) == [(5, "other.test"), (10, "mx.test")] for values, _ in answers)
    assert asked.counts == {"query": 1, "hit": 49}


async def test_an_answer_is_cached_for_its_ttl(asked):
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
async def test_negative_answers_are_cached_and_failures_for_some_seconds(asked, name, error, kept):
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


async def test_the_cache_is_bounded_in_octets_too(asked, monkeypatch):
    """Ten records are about 1,000 octets. The newest answers are kept, and a repeated answer counts once."""
    monkeypatch.setattr("relaymta.dns.KEPT_OCTETS", 12_000)
    for number in range(50):
        asked.resolver._keep(f"n{number}.test", "A", Records(["192.0.2.1"] * 10, None, asked.time + 300))
        asked.resolver._keep("often.test", "A", Records(["192.0.2.1"] * 10, None, asked.time + 300))
    known = asked.resolver._known
    assert 8 <= len(known) <= 12
    assert ("often.test", "A") in known and ("n49.test", "A") in known
    assert asked.resolver._octets == sum(map(_octets, known.values()))


# Shared queries


class SlowNameserver(asyncio.DatagramProtocol):
    """Answers one query when `answer` is called: one MX, mx.test."""

    def __init__(self) -> None:
        self.queries: list[tuple[bytes, tuple[str, int]]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.queries.append((data, address))

    def answer(self) -> None:
        data, address = self.queries[0]
        end = data.index(b"\0", 12) + 5
        record = b"\xc0\x0c\0\x0f\0\x01\0\0\x01\x2c\0\x0b\0\x0a\x02mx\x04test\0"
        self.transport.sendto(data[:2] + b"\x81\x80\0\x01\0\x01\0\0\0\0" + data[12:end] + record, address)


async def test_a_caller_that_times_out_does_not_end_the_query_of_others():
    server = SlowNameserver()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, ("127.0.0.1", 0))
    resolver = Resolver([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"])
    first = asyncio.ensure_future(asyncio.wait_for(resolver.values("slow.test", "MX"), 0.2))
    others = [asyncio.ensure_future(resolver.mx("slow.test")) for _ in range(3)]
    with pytest.raises(TimeoutError):
        await first
    others[0].cancel()
    await asyncio.sleep(0)
    server.answer()
    found = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert [values for values, _ in found[1:]] == [[(10, "mx.test")]] * 2
    assert resolver._asking == {}
    await resolver.close()
    transport.close()


async def test_closing_the_resolver_ends_queries_under_way_with_a_failure():
    server = SlowNameserver()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, ("127.0.0.1", 0))
    resolver = Resolver([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"])
    asked = [asyncio.ensure_future(resolver.mx("slow.test")) for _ in range(3)]
    await asyncio.sleep(0.1)
    await resolver.close()
    assert [type(error) for error in await asyncio.gather(*asked, return_exceptions=True)] == [DnsFailure] * 3
    transport.close()


@pytest.mark.parametrize("name", ["\udcff.test", "a..b", "x" * 70 + ".test", "a\nb.test"])
async def test_an_invalid_name_is_a_failure_for_all_callers(asked, name):
    found = await asyncio.gather(*(asked.resolver.mx(name) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in found] == [DnsFailure] * 3
    assert asked.resolver._asking == {}


async def test_other_nameservers_answer_from_now_on_and_the_old_ones_finish(asked, monkeypatch):
    """A query under way is answered, but not from the cache afterwards; the old channel is closed after it."""
    old = asked.resolver._resolver
    assert not asked.resolver.reconfigure(asked.resolver._nameservers) and asked.resolver._resolver is old
    under_way = asyncio.create_task(asked.resolver.values("mx.test", "A"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asked.resolver.reconfigure(["192.0.2.53"]) and asked.resolver._resolver is not old
    closed = asyncio.Event()

    async def close() -> None:
        closed.set()

    monkeypatch.setattr(old, "close", close)
    assert await under_way == ["127.0.0.1"]
    await asyncio.wait_for(closed.wait(), 60)
    assert ("mx.test", "A") not in asked.resolver._known and not asked.resolver._asking


# Names that c-ares refuses


@pytest.fixture
async def odd() -> AsyncIterator[Asked]:
    zone = Zone(
        {
            "a+b.test": [
                {"A": "192.0.2.1"},
                {"A": "192.0.2.2"},
                {"AAAA": "2001:db8::1"},
                {"MX": [5, "mx.test"]},
                {"TXT": ["one ", "two"]},
            ],
            "p+b.test": [{"PTR": "host.test"}, {"MX": [0, ""]}],
            "alias+b.test": [{"CNAME": "a+b.test"}],
            "usual+b.test": [{"CNAME": "usual.test"}],
            "usual.test": [{"A": "192.0.2.3"}],
            "odd.test": [{"CNAME": "a+b.test"}],
        }
    )
    async with nameserver(zone, servfail=True) as address:
        made = Asked(address)
        made.zone = zone
        yield made
        await made.resolver.close()


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("a+b.test", "A", ["192.0.2.1", "192.0.2.2"]), ("a+b.test", "AAAA", ["2001:db8::1"]), ("a+b.test", "MX", [(5, "mx.test")]),
     ("a+b.test", "TXT", ["one two"]), ("p+b.test", "PTR", ["host.test"]), ("p+b.test", "MX", [(0, "")]),
     ("alias+b.test", "A", ["192.0.2.1", "192.0.2.2"]), ("usual+b.test", "A", ["192.0.2.3"]),
     ("odd.test", "A", ["192.0.2.1", "192.0.2.2"]),
     ("A+B.TEST", "A", ["192.0.2.1", "192.0.2.2"]), ("a+b.test", "PTR", NoData), ("alias+b.test", "PTR", NoData),
     ("c+d.test", "A", NoSuchName),
     ("error.c+d.test", "A", DnsFailure),
     *((f"c{octet}b.test", "A", NoSuchName) for octet in "!\"#$%&'()*+,/:;<=>?@[\\]^`{|}~ ")],
)  # fmt: skip
async def test_odd_names_are_asked_for_and_cached_like_others(odd, name, kind, expected):
    for _ in range(2):
        if isinstance(expected, list):
            assert sorted(await odd.resolver.values(name, kind)) == expected
        else:
            with pytest.raises(expected):
                await odd.resolver.values(name, kind)
    assert odd.counts == {"query": 1, "hit": 1} and set(odd.zone.asked) >= {(name, kind)}
    if expected is DnsFailure:
        odd.time += 6
        with pytest.raises(DnsFailure):
            await odd.resolver.values(name, kind)
        assert odd.counts["query"] == 2


async def test_odd_names_share_queries_and_few_are_under_way_at_once(monkeypatch):
    monkeypatch.setattr("relaymta.dns.ODD_AT_ONCE", 3)
    monkeypatch.setattr("relaymta.dns.SECONDS", 60.0)  # no second try
    server = SlowNameserver()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, ("127.0.0.1", 0))
    resolver = Resolver([f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"])
    asked = [asyncio.ensure_future(resolver.mx(f"a+{number // 2}.test")) for number in range(20)]
    while len(server.queries) < 3:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert len(server.queries) == 3
    asked[0].cancel()  # asked[1] waits for the same answer
    await asyncio.sleep(0)
    server.answer()
    assert (await asked[1])[0] == [(10, "mx.test")]
    while len(server.queries) < 4:
        await asyncio.sleep(0.01)
    await resolver.close()
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [asyncio.CancelledError, tuple] + [DnsFailure] * 18
    transport.close()


async def test_odd_names_are_asked_for_at_the_nameservers_of_a_reload(odd):
    async with nameserver(Zone({"a+b.test": [{"A": "192.0.2.9"}]})) as other:
        assert await odd.resolver.values("a+b.test", "MX") == [(5, "mx.test")]
        assert odd.resolver.reconfigure([other])
        assert await odd.resolver.values("a+b.test", "A") == ["192.0.2.9"]
        with pytest.raises(NoData):
            await odd.resolver.values("a+b.test", "MX")
        # A nameserver that is down is passed over.
        assert odd.resolver.reconfigure(["127.0.0.1:1", other])
        assert await odd.resolver.values("a+b.test", "A") == ["192.0.2.9"]
