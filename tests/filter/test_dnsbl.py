"""Lists in the DNS: asked in the background, weighed at RCPT, and nothing is left of a session that ends."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from relaymta.dns import Resolver
from relaymta.filter import dnsbl
from relaymta.filter.dnsbl import Dnsbl, DnsList
from relaymta.filter.judgement import FilterFailure, Mail, Text
from relaymta.proto.dnsbl import Codes
from tests.support.zone import Zone, nameserver

LISTED, OTHER = "203.0.113.9", "203.0.113.10"
CODES = Codes(["127.0.0.2-11"])
DATA: dict[str, list[Any]] = {
    "9.113.0.203.one.test": [{"A": "127.0.0.2"}], "9.113.0.203.two.test": [{"A": "127.0.0.3"}, {"A": "127.0.0.4"}],
    "9.113.0.203.good.test": [{"A": "127.0.0.5"}], "10.113.0.203.one.test": [{"A": "127.0.0.99"}],
    "9.113.0.203.silent.test": ["TIMEOUT"], "10.113.0.203.silent.test": ["TIMEOUT"],
    "9.113.0.203.refusing.test": [{"A": "127.255.255.254"}], "10.113.0.203.refusing.test": [{"A": "127.0.0.2"}],
    "spam.example.domains.test": [{"A": "127.0.0.2"}], "helo.example.domains.test": [{"A": "127.0.0.2"}],
    "xn--bcher-kva.example.domains.test": [{"A": "127.0.0.2"}], "author.example.domains.test": [{"A": "127.0.0.2"}],
    "2.0.0.127.one.test": [{"A": "127.0.0.2"}], "2.0.0.127.refusing.test": [{"A": "127.255.255.254"}],
    "2.0.0.127.all.test": [{"A": "127.0.0.2"}], "1.0.0.127.all.test": [{"A": "127.0.0.2"}],
    "test.domains.test": [{"A": "127.0.0.2"}],
}  # fmt: skip


class Desk:
    """Lists, and what was counted and warned of."""

    def __init__(self, zones: tuple[str, ...], timeout: float = 5.0, **scores: float) -> None:
        self.zone = Zone(DATA)
        self.lists = [DnsList(f"{name}.test", CODES, scores.get(name, 1.0), name == "domains") for name in zones]
        self.timeout = timeout
        self.counted: list[tuple[str, str]] = []
        self.warned: list[str] = []

    async def __aenter__(self) -> Dnsbl:
        self.serving = nameserver(self.zone)
        self.resolver = Resolver([await self.serving.__aenter__()])
        count = lambda zone, result: self.counted.append((zone, result))  # noqa: E731
        self.made = Dnsbl(self.lists, self.timeout, self.resolver, count, self.warned.append)
        return self.made

    async def __aexit__(self, *what: Any) -> None:
        await self.resolver.close()
        await self.serving.__aexit__(*what)


def mail(
    client: str = LISTED, sender: str = "a@b.example", helo: str = "h.example", user: str = "", text: bytes = b"\r\n",
    to: tuple[str, ...] = ("c@d.example",),
) -> Mail:  # fmt: skip
    return Mail("ID", sender, to, client, helo, user, "", Text(text))


async def said(one: Dnsbl, about: Mail, to: str = "c@d.example") -> Any:
    session = one.session(about.client)
    try:
        return await session.rcpt(about, to)
    finally:
        session.close()


async def test_the_sum_of_scores_decides():
    async with Desk(("one", "two", "none")) as lists:
        found = await said(lists, mail())
        assert (found.word, found.score) == ("listed", 2.0)
        assert (
            found.reason == f"{LISTED} is listed by one.test (127.0.0.2), {LISTED} is listed by two.test (127.0.0.3, 127.0.0.4)"
        )
        found = await said(lists, mail(OTHER))
        assert (found.word, found.score, found.reason) == ("clean", 0, "")
    for score, word in ((-1.0, "listed"), (-2.0, "clean"), (-3.0, "clean")):
        async with Desk(("one", "two", "good"), good=score) as lists:
            found = await said(lists, mail())
            assert (found.word, found.score) == (word, 2.0 + score)
            assert ("good.test" in found.reason) == (word == "clean")


async def test_only_a_few_lists_are_named():
    desk = Desk(("one", "two", "good"))
    desk.lists += [DnsList(f"x{n}.test", CODES) for n in range(3)]
    desk.zone.data |= {f"9.113.0.203.x{n}.test": [{"A": "127.0.0.2"}] for n in range(3)}
    async with desk as lists:
        assert (await said(lists, mail())).reason.endswith("(127.0.0.5), and 3 more")


@pytest.mark.parametrize("about, to", [
    (mail(), "postmaster@d.example"), (mail(), "Postmaster"), (mail(user="ann"), "c@d.example"),
], ids=["postmaster", "bare", "logged in"])  # fmt: skip
async def test_who_is_not_judged(about, to):
    async with Desk(("one",)) as lists:
        assert (await said(lists, about, to)).word == "continue"


@pytest.mark.parametrize("client", ["", "unknown", "x.example"])
async def test_a_client_whose_address_is_unknown_is_in_no_list(client):
    desk = Desk(("one",))
    async with desk as lists:
        assert (await said(lists, mail(client))).word == "clean"
    assert not desk.zone.asked


async def test_a_list_that_refuses_us_is_paused_and_counts_nothing(monkeypatch):
    desk = Desk(("refusing",))
    monkeypatch.setattr(dnsbl, "PAUSE", 0.2)
    async with desk as lists:
        assert (await said(lists, mail())).word == "clean"
        assert (await said(lists, mail(OTHER))).word == "clean" and len(desk.zone.asked) == 1
        await asyncio.sleep(0.21)
        assert (await said(lists, mail(OTHER))).word == "listed"
    assert [result for _, result in desk.counted] == ["refused", "paused", "listed"]
    (text,) = desk.warned
    assert text.startswith("refusing.test answers 127.255.255.254 for 9.113.0.203.refusing.test: it refuses us")


async def test_many_clients_at_once_warn_of_it_once():
    desk = Desk(("refusing",))
    async with desk as lists:
        assert {one.word for one in await asyncio.gather(*(said(lists, mail()) for _ in range(50)))} == {"clean"}
    assert len(desk.warned) == 1 and len(desk.zone.asked) == 1


async def test_a_silent_list_costs_its_time_and_no_more():
    desk = Desk(("one", "silent"), timeout=0.1)
    async with desk as lists:
        began = asyncio.get_running_loop().time()
        found = await said(lists, mail())
        assert (found.word, found.score) == ("listed", 1.0) and asyncio.get_running_loop().time() - began < 2
        assert (await said(lists, mail(OTHER))).word == "clean"
    assert Counter(desk.counted)["silent.test", "failed"] == 2


async def test_it_is_asked_before_anybody_waits_for_it():
    desk = Desk(("one",))
    async with desk as lists:
        session = lists.session(LISTED)
        while not desk.zone.asked:
            await asyncio.sleep(0.001)
        assert (await session.rcpt(mail(), "c@d.example")).word == "listed" and len(desk.zone.asked) == 1
        session.close()


async def test_a_thousand_sessions_of_a_hundred_clients_ask_a_hundred_times():
    desk = Desk(("one", "two"))
    async with desk as lists:
        found = await asyncio.gather(*(said(lists, mail(f"203.0.113.{n % 100}")) for n in range(1000)))
    assert sum(one.word == "listed" for one in found) == 10
    assert len(desk.zone.asked) == len(set(desk.zone.asked)) == 200


@pytest.mark.parametrize("about, listed", [
    (mail(sender="x@spam.example"), "spam.example"), (mail(sender="x@SPAM.example"), "spam.example"),
    (mail(helo="HELO.example"), "helo.example"), (mail(sender="x@bücher.example"), "xn--bcher-kva.example"),
    (mail(sender="", helo="[192.0.2.1]"), ""), (mail(sender="x@[192.0.2.1]"), ""),
    (mail(sender="x@" + "a." * 120 + "example"), ""),
], ids=lambda value: value.sender + value.helo if isinstance(value, Mail) else "")  # fmt: skip
async def test_domains_of_sender_and_helo(about, listed):
    async with Desk(("domains",)) as lists:
        found = await said(lists, about)
        assert found.word == ("listed" if listed else "clean")
        assert found.reason == (f"{listed} is listed by domains.test (127.0.0.2)" if listed else "")


async def test_domains_of_authors_count_with_all_else_and_the_same_one_once():
    desk = Desk(("domains", "one"))
    async with desk as lists:
        assert lists.looks
        session = lists.session(LISTED)
        assert (await session.rcpt(mail(sender="x@spam.example"), "c@d.example")).score == 2
        many = b"From: a@author.example, b@AUTHOR.example, c@spam.example\r\n\r\n"
        assert (await session.judge(mail(sender="x@spam.example", text=many))).score == 3
        assert (await session.judge(mail(text=many, to=("postmaster@d.example",)))).word == "clean"
        most = b"From: " + b", ".join(b"a@x%d.example" % n for n in range(3000)) + b"\r\n\r\n"
        asked = len(desk.zone.asked)
        await session.judge(mail(text=most))
        assert len(desk.zone.asked) <= asked + dnsbl.AUTHORS + 2
        session.reset()
        session.close()


async def test_a_session_that_ends_leaves_nothing(recwarn):
    loop, told = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda loop, context: told.append(context))
    async with Desk(("one", "silent", "domains")) as lists:
        before = asyncio.all_tasks()
        lists.session(LISTED).close()
        session = lists.session(LISTED)
        asking = asyncio.create_task(session.rcpt(mail(sender="x@spam.example"), "c@d.example"))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        session.close()
        session.close()
        session = lists.session(LISTED)
        asking = asyncio.create_task(session.rcpt(mail(), "c@d.example"))
        await asyncio.sleep(0)
        session.close()
        assert (await asking).word in ("clean", "listed")
        await asyncio.sleep(0.01)
        assert {task for task in asyncio.all_tasks() - before if "_question" not in repr(task)} == set()
    assert not told


async def test_what_a_session_keeps_is_bounded():
    async with Desk(("domains",)) as lists:
        session: Any = lists.session(LISTED)
        for n in range(50):
            await session.rcpt(mail(sender=f"x@d{n}.example"), "c@d.example")
            session.reset()
        assert not session._asked


@pytest.mark.parametrize("zones, found", [
    (("one",), "1 lists that answer"), (("domains",), "1 lists that answer"),
    (("one", "gone"), "gone.test does not list 2.0.0.127, which each list does: is it one?"),
    (("refusing",), "refusing.test answers 127.255.255.254: it refuses us"),
    (("all",), "all.test lists 1.0.0.127, and so everything"),
])  # fmt: skip
async def test_what_proves_that_lists_work(zones, found):
    async with Desk(zones) as lists:
        if "lists that" in found:
            assert await lists.prove() == found
        else:
            with pytest.raises(FilterFailure) as failure:
                await lists.prove()
            assert str(failure.value) == found
        await lists.probe()


async def test_a_survey_pauses_nothing_and_shows_all():
    desk = Desk(("one", "refusing", "silent", "domains"), timeout=0.1)
    async with desk as lists:
        for _ in range(2):
            rows = await lists.survey(LISTED, "helo.example", "x@spam.example")
            assert [(row.zone, row.result) for row in rows] == [
                ("one.test", "listed"), ("refusing.test", "refused"), ("silent.test", "failed"), ("domains.test", "listed"),
                ("domains.test", "listed"),
            ]  # fmt: skip
    assert not desk.warned and not desk.counted
