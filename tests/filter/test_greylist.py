"""Greylisting: who is new is deferred once, and nobody twice."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.dns import DnsFailure, NoSuchName
from relaymta.filter import greylist
from relaymta.filter.greylist import Greylist, Times, stale
from relaymta.filter.judgement import Mail, Text

TIMES = Times(delay=300, retry_window=86400, max_age=36 * 86400, known_after=5)
DAY = 86400


class Rows(dict[int, tuple[int, int]]):
    """Triplets of one process."""

    def key(self, *parts: str) -> int:
        return hash(parts)

    def put(self, key: int, was: tuple[int, int], now: tuple[int, int]) -> bool:
        if self.get(key) != was:
            return False
        self[key] = now
        return True

    def get(self, key: int) -> tuple[int, int]:  # type: ignore[override]
        return dict.get(self, key, (0, 0))


class Policies:
    """A resolver that knows SPF policies. `asked`: how many questions there were."""

    def __init__(self, **policies: str) -> None:
        self.policies = {name.replace("_", "."): text for name, text in policies.items()}
        self.asked = 0

    async def values(self, name: str, kind: str) -> list[Any]:
        self.asked += 1
        await asyncio.sleep(0)
        text = self.policies.get(name)
        if text == "failure":
            raise DnsFailure(name)
        if text == "silence":
            await asyncio.sleep(60)
        if text is None or kind != "TXT":
            raise NoSuchName(name)
        return [text]


class Desk:
    """Greylisting, at a time that the test says. `counted`: what it has counted."""

    def __init__(self, times: Times = TIMES, table: Any = None, **policies: str) -> None:
        self.now = 1_800_000_000
        self.rows = Rows() if table is None else table
        self.resolver = Policies(**policies)
        self.counted: list[str] = []
        self.made = Greylist(times, self.rows, self.resolver, self.counted.append, lambda: self.now)  # type: ignore[arg-type]

    async def ask(
        self, client: str = "192.0.2.1", sender: str = "a@b.example", to: tuple[str, ...] = ("c@d.example",), after: int = 0
    ) -> str:
        """Send a message so many seconds later; what is said."""
        self.now += after
        mail = Mail("ID", sender, to, client, "h.example", "", "", Text(b""))
        session = self.made.session(client)
        answer = await session.data(mail)
        assert bool(answer.reply) == (answer.word != "known")
        self.reply = answer.reply
        return answer.word


async def test_a_new_sender_waits_once_and_is_known_then():
    desk = Desk()
    assert await desk.ask() == "new" and desk.reply == b"451 4.7.1 Greylisted: try again in 300 seconds\r\n"
    assert await desk.ask(after=100) == "early" and desk.reply == b"451 4.7.1 Greylisted: try again in 200 seconds\r\n"
    assert await desk.ask(after=199) == "early" and desk.reply == b"451 4.7.1 Greylisted: try again in 1 seconds\r\n"
    assert await desk.ask(after=1) == "known"
    assert await desk.ask() == "known" and await desk.ask(after=35 * DAY) == "known" and await desk.ask(after=35 * DAY) == "known"
    assert await desk.ask(after=37 * DAY) == "new"
    assert desk.counted == ["new", "early", "early", "passed", "known", "known", "known", "new"]


async def test_who_tries_again_too_late_is_new():
    desk = Desk()
    assert [await desk.ask(after=each) for each in (0, DAY, DAY + 1, 300)] == ["new", "known", "known", "known"]
    desk = Desk()
    assert [await desk.ask(after=each) for each in (0, DAY + 1, 299, 1)] == ["new", "new", "early", "known"]


@pytest.mark.parametrize("changed", [
    {"sender": "other@b.example"}, {"to": ("e@d.example",)}, {"client": "192.0.3.1"}, {"client": "2001:db8::1"}, {"sender": ""},
], ids=repr)  # fmt: skip
async def test_each_part_of_a_triplet_counts(changed):
    desk = Desk()
    await desk.ask()
    assert await desk.ask(after=400, **changed) == "new"
    assert await desk.ask() == "known"


@pytest.mark.parametrize("one, other", [
    ({"client": "192.0.2.1"}, {"client": "192.0.2.254"}),
    ({"client": "2001:db8:1:2::1"}, {"client": "2001:db8:1:2:ffff::9"}),
    ({"client": "::ffff:192.0.2.1"}, {"client": "192.0.2.7"}),
    ({"sender": "A@B.example"}, {"sender": "a@b.EXAMPLE"}),
    ({"sender": "list-bounces-1234-c=d.example@b.example"}, {"sender": "list-bounces-99-c=d.example@b.example"}),
    ({"sender": "prvs=1234abcdef=a@b.example"}, {"sender": "prvs=9999000000=a@b.example"}),
    ({"to": ("C@D.example",)}, {"to": ("c@d.EXAMPLE",)}),
], ids=repr)  # fmt: skip
async def test_what_is_the_same_in_other_words(one, other):
    desk = Desk()
    assert await desk.ask(**one) == "new" and await desk.ask(after=300, **other) == "known"


# Case 11 of messages that never got through, or only to half of their recipients


async def test_a_pool_of_addresses_that_spf_names_is_one_client():
    desk = Desk(b_example="v=spf1 ip4:192.0.2.0/23 ip6:2001:db8::/32 -all")
    assert await desk.ask("192.0.2.1") == "new" and await desk.ask("192.0.3.1", after=100) == "early"
    assert await desk.ask("2001:db8:7::1", after=200) == "known"
    asked = desk.resolver.asked
    assert await desk.ask("2001:db8:7::2") == "known" and desk.resolver.asked == asked, "its network is known from then on"
    assert await desk.ask("192.0.4.1") == "new", "that is none of the pool"


async def test_one_known_recipient_of_three_and_all_get_it():
    desk = Desk()
    to = ("a@d.example", "b@d.example", "c@d.example")
    assert await desk.ask(to=to[1:2]) == "new" and await desk.ask(to=to[1:2], after=300) == "known"
    assert await desk.ask(to=to) == "known"
    assert await desk.ask(to=to[:1]) == "known" and await desk.ask(to=to[2:]) == "known"


async def test_recipients_that_are_tried_apart_do_not_wait_anew():
    desk = Desk()
    assert await desk.ask(to=("a@d.example", "b@d.example")) == "new"
    assert await desk.ask(to=("b@d.example",), after=300) == "known"
    assert await desk.ask(to=("a@d.example",)) == "known"


async def test_a_group_is_known_once_enough_have_come_through():
    desk = Desk(known := TIMES._replace(known_after=3))
    for n in range(3):
        assert await desk.ask(sender=f"{'abc'[n]}@b.example") == "new"
        assert await desk.ask(sender=f"{'abc'[n]}@b.example", after=300) == "known"
    assert await desk.ask(sender="new@b.example") == "known" and desk.counted[-1] == "known"
    assert await desk.ask(sender="other@b.example", client="192.0.3.1") == "new"
    desk.now += known.max_age + 1
    assert await desk.ask(sender="new2@b.example") == "new"
    assert await desk.ask(sender="new2@b.example", after=300) == "known" and await desk.ask(sender="z@b.example") == "new"


async def test_a_single_sender_that_comes_often_does_not_make_its_group_known():
    desk = Desk(TIMES._replace(known_after=2))
    await desk.ask()
    for _ in range(5):
        assert await desk.ask(after=4000) == "known"
    assert await desk.ask(sender="new@b.example") == "new"


async def test_no_group_is_known_where_that_is_so_configured():
    desk = Desk(TIMES._replace(known_after=0))
    for name in "abcdefgh":
        await desk.ask(sender=f"{name}@b.example")
        assert await desk.ask(sender=f"{name}@b.example", after=300) == "known"
    assert await desk.ask(sender="z@b.example") == "new"


@pytest.mark.parametrize("to", ["postmaster@d.example", "Abuse@d.example"])
async def test_who_has_to_be_reachable_is(to):
    assert await Desk().ask(to=(to,)) == await Desk().ask(to=(to, "postmaster@d.example")) == "known"


@pytest.mark.parametrize("to", ["postmaster@d.example", "Abuse@d.example"])
async def test_nobody_else_is_reached_through_who_has_to_be(to):
    desk = Desk()
    assert await desk.ask(to=(to, "c@d.example")) == "new"
    assert await desk.ask(to=(to, "c@d.example"), after=300) == "known"


async def test_a_dns_that_fails_or_is_silent_leaves_the_network(monkeypatch):
    monkeypatch.setattr(greylist, "SPF_SECONDS", 0.01)
    for policy in ("failure", "silence"):
        desk = Desk(b_example=policy)
        assert await desk.ask() == "new" and await desk.ask("192.0.2.9", after=300) == "known"


async def test_a_clock_that_is_set_back_makes_nobody_wait_longer_than_once():
    desk = Desk()
    await desk.ask()
    assert await desk.ask(after=-1000) == "new" and await desk.ask(after=300) == "known"
    assert await desk.ask(after=-1000) == "known"


async def test_what_another_worker_writes_meanwhile_stays():
    class Racing(Rows):
        races = True

        def put(self, key: int, was: tuple[int, int], now: tuple[int, int]) -> bool:
            if self.races:
                self[key] = (now[0] - 200, now[0] - 200)  # it was there first
            return super().put(key, was, now)

    desk = Desk(table=Racing())
    assert await desk.ask() == "new"
    desk.rows.races = False
    assert await desk.ask(after=100) == "known"


async def test_cancelled_while_the_dns_is_asked_it_has_noted_nothing():
    desk = Desk(b_example="silence")
    task = asyncio.create_task(desk.ask())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not desk.rows and not desk.counted


def test_what_says_nothing_any_more_may_be_forgotten():
    at = 1_800_000_000
    assert not stale(TIMES, at, at, at + DAY) and stale(TIMES, at, at + 9, at + DAY + 1)
    assert not stale(TIMES, 1, at, at + 36 * DAY) and stale(TIMES, 5, at, at + 36 * DAY + 1)


STEPS = st.tuples(
    st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.3.1", "2001:db8::1"]), st.sampled_from(["a@b.example", "x@b.example", ""]),
    st.lists(st.sampled_from(["c@d.example", "e@d.example", "g@h.example"]), min_size=1, max_size=3, unique=True),
    st.sampled_from([0, 1, 299, 300, 301, 5000, DAY, 20 * DAY, 36 * DAY, 37 * DAY]),
)  # fmt: skip


@given(st.lists(STEPS, max_size=25))
@settings(max_examples=200, deadline=None)
def test_against_a_plain_account(steps: list[Any]):
    """Of each network, sender and recipient: when it was first tried and has passed last; no groups."""
    tried: dict[Any, int] = {}
    passed: dict[Any, int] = {}

    def net(client: str) -> str:
        return client.rpartition(".")[0] or client

    async def play() -> None:
        desk = Desk(TIMES._replace(known_after=0))
        for client, sender, to, after in steps:
            said = await desk.ask(client, sender, tuple(to), after)
            keys = [(net(client), sender, one) for one in to]
            known = [key for key in keys if key in passed and desk.now - passed[key] <= TIMES.max_age]
            waited = [
                key for key in keys
                if key not in passed and key in tried and TIMES.delay <= desk.now - tried[key] <= TIMES.retry_window
            ]  # fmt: skip
            assert (said == "known") == bool(known or waited), (client, sender, to, after)
            for key in keys:
                if said == "known":
                    if desk.now - passed.get(key, 0) > greylist.REFRESH:
                        passed[key] = desk.now
                elif key in passed or key not in tried or desk.now - tried[key] > TIMES.retry_window:
                    passed.pop(key, None)
                    tried[key] = desk.now

    asyncio.run(play())
