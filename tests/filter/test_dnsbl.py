"""Lists in the DNS (RFC 5782): who is asked what and when, what counts, and lists that fail, refuse or lie. With a nameserver
over the wire, and a real unbound with ten lists."""

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relaymta.dns import Resolver
from relaymta.filter import dnsbl
from relaymta.filter.dnsbl import Dnsbl, DnsList
from relaymta.filter.judgement import FilterFailure, Mail, Text
from relaymta.proto.dnsbl import Codes, reversed_address
from tests.support.resolver import nameserver_with
from tests.support.zone import Silence, Zone, nameserver

CLIENT = "192.0.2.9"
AT = "9.2.0.192"  # as it is asked for
BOB = "bob@b.example"


def a_list(zone: str, score: float = 1.0, domain: bool = False, codes: Sequence[str] = ("127.0.0.2-11",)) -> DnsList:
    return DnsList(zone, Codes(codes), score, domain)


def a_mail(client: str = CLIENT, sender: str = "", helo: str = "", authors: str = "", **more: Any) -> Mail:
    head = f"From: {authors}\r\nSubject: x\r\n\r\n".encode()
    return Mail("1", sender, [BOB], client, helo, more.pop("user", ""), "", Text(head, b"x\r\n"), **more)


def answers(**names: str) -> dict[str, list[Any]]:
    """Zone data: of each name (`_` for `.`) its A records."""
    return {name.replace("_", "."): [{"A": value} for value in values.split()] for name, values in names.items()}


class Everything(Zone):
    """It answers each question with one address; `silent`: or not at all."""

    def __init__(self, address: str, silent: bool = False) -> None:
        Zone.__init__(self, {})
        self.address, self.silent = address, silent

    def records(self, name: str, kind: str) -> list[tuple[str, str, Any]] | None:
        self.asked.append((name, kind))
        if self.silent:
            raise Silence
        return [(name, kind, self.address)]


class Asked:
    """A filter, what it has counted and warned of, and its nameserver's zone."""

    def __init__(self, resolver: Resolver, lists: Sequence[DnsList], timeout: float, zone: Zone) -> None:
        self.zone = zone
        self.counts: Counter[tuple[str, str]] = Counter()
        self.warnings: list[str] = []
        self.resolver = resolver
        self.filter = Dnsbl(lists, timeout, resolver, self.count, self.warnings.append)

    def count(self, zone: str, result: str) -> None:
        self.counts[zone, result] += 1

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.zone.asked]

    async def rcpt(self, client: str = CLIENT, address: str = BOB, **more: Any) -> tuple[str, str, float | None]:
        """What it says to a RCPT of a new client."""
        session = self.filter.session(client)
        try:
            answer = await session.rcpt(a_mail(client, **more), address)
        finally:
            session.close()
        return answer.word, answer.reason, answer.score


@asynccontextmanager
async def asking(data: dict[str, list[Any]] | Zone, *lists: DnsList, timeout: float = 5.0, **more: Any) -> AsyncIterator[Asked]:
    """As of `Asked`; at the end no task of the filter's may be left, nor anything that nobody has retrieved."""
    troubles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
    before = asyncio.all_tasks()
    zone = data if isinstance(data, Zone) else Zone(data)
    async with nameserver(zone, **more) as address:
        resolver = Resolver([address])
        yield Asked(resolver, lists, timeout, zone)
        await resolver.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() <= before
        gc.collect()
        assert not troubles


@pytest.fixture(autouse=True)
def nothing_is_forgotten(recwarn: pytest.WarningsRecorder) -> Any:
    yield
    gc.collect()
    assert not [one for one in recwarn if "never awaited" in str(one.message)]


async def test_case_10_error_codes_of_a_list_are_no_listing():
    for answer in ("127.255.255.254", "127.0.0.1", "203.0.113.9"):
        good = a_list("good.example")
        async with asking(
            Everything(answer), a_list("bl.example", codes=["127.0.0.0/8"]), a_list("dbl.example", domain=True)
        ) as it:
            assert await it.rcpt(helo="mail.a.example") == ("clean", "", 0.0)
            assert it.counts == {("bl.example", "refused"): 1, ("dbl.example", "refused"): 1}
            assert len(it.warnings) == 2
            assert f"bl.example answers {answer} for {AT}.bl.example" in it.warnings[0] and "10 minutes" in it.warnings[0]
            assert await it.rcpt("192.0.2.10", helo="other.a.example") == ("clean", "", 0.0)
            assert len(it.zone.asked) == 2 and len(it.warnings) == 2, "it is paused"
            assert it.counts["bl.example", "paused"] == it.counts["dbl.example", "paused"] == 1
    async with asking(answers(**{f"{AT}.good.example".replace(".", "_"): "127.0.0.4"}), good) as it:
        assert await it.rcpt() == ("listed", f"{CLIENT} is listed by good.example (127.0.0.4)", 1.0)
        assert it.counts == {("good.example", "listed"): 1} and not it.warnings


async def test_a_list_is_asked_again_after_its_pause(monkeypatch):
    monkeypatch.setattr(dnsbl, "PAUSE", 0.05)
    zone = Everything("127.255.255.254")
    async with asking(zone, a_list("bl.example")) as it:
        await it.rcpt("192.0.2.1")
        await it.rcpt("192.0.2.2")
        assert it.counts == {("bl.example", "refused"): 1, ("bl.example", "paused"): 1}
        zone.address = "127.0.0.2"
        await asyncio.sleep(0.06)
        assert (await it.rcpt("192.0.2.3"))[0] == "listed" and len(it.warnings) == 1
        zone.address = "127.255.255.254"
        await it.rcpt("192.0.2.4")
        assert len(it.warnings) == 2, "another pause"


async def test_nobody_waits_for_a_list_that_stays_silent(monkeypatch):
    monkeypatch.setattr(dnsbl, "SILENT_PAUSE", 0.05)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        resolver = Resolver([f"127.0.0.1:{silent.getsockname()[1]}"])
        it = Asked(resolver, (a_list("bl.example"),), 0.01, Zone({}))
        for n in range(dnsbl.SILENT + 2):
            assert await it.rcpt(f"192.0.2.{n}") == ("clean", "", 0.0)
        assert it.counts == {("bl.example", "failed"): dnsbl.SILENT, ("bl.example", "paused"): 2}
        assert it.warnings == ["bl.example has not answered 10 questions in a row; it is not asked for 0.05 seconds"]
        await asyncio.sleep(0.06)
        await it.rcpt("192.0.2.77")
        assert it.counts["bl.example", "failed"] == dnsbl.SILENT + 1
        await resolver.close()


async def test_one_warning_for_all_answers_that_were_under_way():
    async with asking(Everything("127.0.0.1"), a_list("bl.example", codes=["127.0.0.2"]), a_list("bl.example", 2.0)) as it:
        found = await asyncio.gather(*(it.rcpt(f"192.0.2.{n}") for n in range(20)))
        assert {word for word, _, _ in found} == {"clean"}
        assert len(it.warnings) == 1 and not it.counts["bl.example", "paused"]
        assert all(one.paused_until for one in it.filter.lists)


async def test_only_the_addresses_of_the_list_are_listed():
    data = {
        f"{reversed_address(address)}.bl.example": [{"A": code}]
        for address, code in (
            (CLIENT, "127.0.0.2"), ("192.0.2.10", "127.0.0.12"), ("2001:db8::25", "127.0.0.3"), ("192.0.2.12", "127.0.0.11")
        )
    }  # fmt: skip
    async with asking(data, a_list("bl.example")) as it:
        assert await it.rcpt() == ("listed", f"{CLIENT} is listed by bl.example (127.0.0.2)", 1.0)
        assert await it.rcpt("192.0.2.10") == ("clean", "", 0.0), "a code that does not count"
        assert await it.rcpt("192.0.2.11") == ("clean", "", 0.0)
        assert await it.rcpt("192.0.2.12") == ("listed", "192.0.2.12 is listed by bl.example (127.0.0.11)", 1.0)
        assert await it.rcpt("2001:db8::25") == ("listed", "2001:db8::25 is listed by bl.example (127.0.0.3)", 1.0)
        assert (await it.rcpt("2001:db8::26"))[0] == "clean"
        assert await it.rcpt(f"::ffff:{CLIENT}") == ("listed", f"::ffff:{CLIENT} is listed by bl.example (127.0.0.2)", 1.0)
        assert await it.rcpt("unknown") == ("clean", "", 0), "its proxy does not know it"
        assert await it.rcpt("0.0.0.0") == ("clean", "", 0), "which stands for one that is unknown"
        assert it.counts == {("bl.example", "listed"): 4, ("bl.example", "clean"): 3}
        assert len(it.zone.asked) == 6, "the resolver keeps answers"


async def test_an_address_is_asked_about_before_anybody_waits():
    async with asking(answers(), a_list("bl.example"), a_list("dbl.example", domain=True)) as it:
        session = it.filter.session(CLIENT)
        while not it.counts:
            await asyncio.sleep(0)
        assert it.names == [f"{AT}.bl.example"] and not session.decided
        assert (await session.mail(a_mail())).word == (await session.data(a_mail())).word == "continue"
        session.refused(BOB, b"550 5.1.1 no\r\n")
        session.close()


SCORES = [
    # (scores of the lists that list the client, word, score)
    ([], "clean", 0.0), ([1.0], "listed", 1.0), ([1.0, 2.5], "listed", 3.5), ([-1.0], "clean", -1.0), ([1.0, -1.0], "clean", 0.0),
    ([2.0, -1.0], "listed", 1.0), ([1.0, -2.0], "clean", -1.0), ([0.0], "clean", 0.0), ([0.1, 0.2, -0.3], "clean", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("scores", "word", "score"), SCORES)
async def test_scores_are_added(scores, word, score):
    data = {f"{AT}.l{n}.example": [{"A": "127.0.0.2"}] for n in range(len(scores))}
    async with asking(
        data, *(a_list(f"l{n}.example", each) for n, each in enumerate(scores)), a_list("other.example", 9.0)
    ) as it:
        found = await it.rcpt()
        assert (found[0], found[2]) == (word, score)
        against = [n for n, each in enumerate(scores) if each > 0 or word == "clean"]
        assert found[1] == ", ".join(f"{CLIENT} is listed by l{n}.example (127.0.0.2)" for n in against)


async def test_a_reason_is_short():
    lists = [a_list(f"l{n}.example") for n in range(9)]
    data = {f"{AT}.l{n}.example": [{"A": f"127.0.0.{code}"} for code in (9, 8, 7, 6, 5)] for n in range(9)}
    async with asking(data, *lists) as it:
        said = [f"{CLIENT} is listed by l{n}.example (127.0.0.5, 127.0.0.6, 127.0.0.7)" for n in range(3)]
        assert await it.rcpt() == ("listed", ", ".join([*said, "and 6 more"]), 9.0)


async def test_two_lists_of_one_zone_count_by_their_codes():
    lists = [a_list("bl.example", 1.0, codes=["127.0.0.2"]), a_list("bl.example", 4.0, codes=["127.0.0.3"])]
    data = {f"{reversed_address(f'192.0.2.{n}')}.bl.example": [{"A": f"127.0.0.{n}"}] for n in (2, 3)}
    data[f"{AT}.bl.example"] = [{"A": "127.0.0.2"}, {"A": "127.0.0.3"}]
    async with asking(data, *lists) as it:
        assert [(await it.rcpt(client))[2] for client in ("192.0.2.2", "192.0.2.3", CLIENT)] == [1.0, 4.0, 5.0]
        assert len(it.zone.asked) == 3


@pytest.mark.parametrize("address", ["postmaster", "POSTMASTER", "Postmaster@b.example", "postMaster@[192.0.2.1]"])
async def test_postmaster_gets_all_mail(address):
    async with asking(Everything("127.0.0.2"), a_list("bl.example"), a_list("dbl.example", domain=True)) as it:
        assert await it.rcpt(address=address, helo="a.example") == ("continue", "", None)
        only = a_mail(authors="ann@a.example")
        only.recipients = [address, address]
        assert (await it.filter.judge(only)).word == "clean"
        only.recipients = [address, BOB]
        assert (await it.filter.judge(only)).word == "listed"


async def test_who_logs_in_is_not_judged_and_their_domains_are_nobodys_to_know():
    async with asking(Everything("127.0.0.2"), a_list("dbl.example", domain=True)) as it:
        mail = {"user": "ann", "helo": "a.example", "sender": "ann@b.example", "authors": "ann@c.example"}
        assert await it.rcpt(**mail) == ("continue", "", None)
        assert (await it.filter.judge(a_mail(**mail))).word == "clean"
        assert it.names == []


@pytest.mark.parametrize("servfail", [True, False])
async def test_a_list_that_fails_counts_nothing(servfail):
    data = {f"{AT}.dead.example": ["TIMEOUT"], f"{AT}.bl.example": [{"A": "127.0.0.2"}]}
    async with asking(data, a_list("dead.example"), a_list("bl.example"), timeout=0.1, servfail=servfail) as it:
        assert await it.rcpt() == ("listed", f"{CLIENT} is listed by bl.example (127.0.0.2)", 1.0)
        assert it.counts == {("dead.example", "failed"): 1, ("bl.example", "listed"): 1} and not it.warnings


async def test_time_runs_from_the_connection_on():
    async with asking({f"{AT}.dead.example": ["TIMEOUT"]}, a_list("dead.example"), timeout=0.05) as it:
        session = it.filter.session(CLIENT)
        while not it.counts:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        asked = asyncio.create_task(session.rcpt(a_mail(), BOB))
        await asyncio.sleep(0)
        assert asked.done() and asked.result().word == "clean"
        session.close()


DOMAINS = [
    # (HELO, sender, authors, names that are asked about)
    ("mail.a.example", "ann@b.example", "ann@c.example", ["mail.a.example", "b.example", "c.example"]),
    ("a.example", "ann@A.EXAMPLE", "Ann <ann@a.Example>", ["a.example"]),
    ("a.example.", "", "", ["a.example"]),
    ("localhost", "", "ann", []),
    ("[192.0.2.9]", "ann@[192.0.2.9]", "ann@[192.0.2.9]", []),
    ("192.0.2.9", "", "", []),
    ("${domain}", "postmaster", "", []),
    ("b\u00fccher.example", "ann@B\u00dcCHER.example", "ann@xn--bcher-kva.example", ["xn--bcher-kva.example"]),
    ("", "", "ann@a.example, bob@b.example, ann@a.example", ["a.example", "b.example"]),
    ("", "", ", ".join(f"a@a{n}.example" for n in range(12)), [f"a{n}.example" for n in range(10)]),
    ("", "", "ann@a.example <", []),
    (".".join(["x" * 60] * 4), "", "", []),  # with the zone it is no name
]


@pytest.mark.parametrize(("helo", "sender", "authors", "names"), DOMAINS)
async def test_domains_are_asked_about(helo, sender, authors, names):
    async with asking(answers(), a_list("dbl.example", domain=True), a_list("bl.example")) as it:
        assert it.filter.looks
        session = it.filter.session(CLIENT)
        mail = a_mail(helo=helo, sender=sender, authors=authors)
        for _ in range(3):
            await session.rcpt(mail, BOB)
        assert set(it.names) <= {f"{name}.dbl.example" for name in names[:2]} | {f"{AT}.bl.example"}
        assert (await session.judge(mail)).word == "clean"
        assert sorted(it.names) == sorted([f"{AT}.bl.example", *(f"{name}.dbl.example" for name in names)])
        assert it.counts["dbl.example", "clean"] == len(names) or len(helo) > 240
        session.close()


async def test_a_message_is_judged_by_all_that_is_known_of_it():
    data = answers(**{f"{AT}.bl.example".replace(".", "_"): "127.0.0.2", "c_example_dbl_example": "127.0.0.3"})
    async with asking(data, a_list("bl.example", -1.0), a_list("dbl.example", 3.0, domain=True)) as it:
        session = it.filter.session(CLIENT)
        mail = a_mail(helo="a.example", sender="ann@b.example", authors="ann@c.example")
        assert (await session.rcpt(mail, BOB))[:3] == ("clean", f"{CLIENT} is listed by bl.example (127.0.0.2)", -1.0)
        assert (await session.judge(mail))[:3] == ("listed", "c.example is listed by dbl.example (127.0.0.3)", 2.0)
        assert (await session.rcpt(mail, BOB)).word == "clean", "an author is not known at RCPT"
        session.reset()
        assert (await session.judge(a_mail(authors="ann@d.example"))).word == "clean", "another message"
        session.close()


async def test_a_list_counts_once_however_many_names_it_lists():
    async with asking(Everything("127.0.0.2"), a_list("dbl.example", 2.0, domain=True)) as it:
        mail = a_mail(helo="a.example", sender="ann@b.example", authors="ann@c.example, ann@d.example")
        assert (await it.filter.judge(mail))[:3] == ("listed", "a.example is listed by dbl.example (127.0.0.2)", 2.0)


async def test_without_lists_of_domains_nobody_looks_at_messages():
    async with asking(answers(), a_list("bl.example")) as it:
        assert not it.filter.looks and not it.filter.alone and it.filter.asks == {"RCPT"}
        await it.rcpt(helo="a.example", sender="ann@b.example")
        assert it.names == [f"{AT}.bl.example"]


async def test_a_session_that_is_closed_leaves_nothing():
    before = asyncio.all_tasks()
    async with asking(Everything("", silent=True), a_list("bl.example"), a_list("dbl.example", domain=True), timeout=60.0) as it:
        for steps in range(6):  # closed before anything began, and at each step of it
            session = it.filter.session(f"192.0.2.{steps}")
            asked = asyncio.create_task(session.rcpt(a_mail(helo="a.example"), BOB)) if steps % 2 else None
            for _ in range(steps):
                await asyncio.sleep(0)
            session.close()
            session.close()
            if asked is not None:
                assert (await asyncio.wait_for(asked, 5)).word == "clean"
            assert (await session.rcpt(a_mail(helo="b.example"), BOB)).word == "clean"
        for _ in range(5):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - before
        assert len(left) == it.resolver.asking, "only the resolver's queries, which others may wait for"
        assert not [name for name in it.names if name.startswith("b.")]


async def test_a_question_that_is_cancelled_leaves_the_session_as_it_was():
    zone = Everything("127.0.0.2")
    async with asking(zone, a_list("bl.example"), a_list("dbl.example", 2.0, domain=True), seconds=0.02) as it:
        for steps in range(5):
            session = it.filter.session(f"192.0.2.{steps}")
            mail = a_mail(helo=f"a{steps}.example", authors=f"ann@b{steps}.example")
            for ask in (lambda s=session, m=mail: s.rcpt(m, BOB), lambda s=session, m=mail: s.judge(m)):
                asked = asyncio.create_task(ask())
                for _ in range(steps):
                    await asyncio.sleep(0)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
            assert (await session.rcpt(mail, BOB)).score == (await session.judge(mail)).score == 3.0
            session.close()
            judged = asyncio.create_task(it.filter.judge(mail))
            for _ in range(steps):
                await asyncio.sleep(0)
            judged.cancel()
            with pytest.raises(asyncio.CancelledError):
                await judged


async def test_the_resolver_is_closed_in_the_middle():
    async with asking(Everything("", silent=True), a_list("bl.example"), a_list("dbl.example", domain=True), timeout=60.0) as it:
        for steps in range(5):
            session = it.filter.session(f"192.0.2.{steps}")
            asked = asyncio.create_task(session.rcpt(a_mail(helo=f"a{steps}.example"), BOB))
            for _ in range(steps):
                await asyncio.sleep(0)
        await it.resolver.close()
        assert (await asked).word == "clean"


async def test_a_thousand_clients_at_once():
    lists = [a_list("bl.example"), a_list("other.example"), a_list("allow.example", -1.0)]
    clients = [f"198.51.{n >> 8}.{n & 255}" for n in range(1000)]
    bad = set(clients[::10])
    data = {f"{reversed_address(client)}.bl.example": [{"A": "127.0.0.2"}] for client in bad}
    data |= {f"{reversed_address(client)}.allow.example": [{"A": "127.0.0.2"}] for client in clients[::20]}
    async with asking(data, *lists) as it:
        sessions = {}
        for at in range(0, 1000, 20):  # no more than a socket's buffer holds
            for client in clients[at : at + 20]:
                sessions[client] = [it.filter.session(client), it.filter.session(client)]
            while it.resolver.asking or sum(it.counts.values()) < 6 * (at + 20):
                await asyncio.sleep(0)
        for client, both in sessions.items():
            for session in both:
                expected = "listed" if client in bad and client not in clients[::20] else "clean"
                assert (await session.rcpt(a_mail(client), BOB)).word == expected
                session.close()
        assert Counter(it.names) == {f"{reversed_address(client)}.{one.zone}": 1 for client in clients for one in lists}


async def test_a_dead_nameserver_does_not_get_all_questions_at_once(monkeypatch):
    monkeypatch.setattr(dnsbl, "MOST_ASKED", 10)
    zone = Everything("127.0.0.2", silent=True)
    async with asking(zone, a_list("bl.example"), timeout=0.1) as it:
        await asyncio.gather(*(it.rcpt(f"192.0.2.{n}") for n in range(50)))
        assert it.counts == {("bl.example", "failed"): 50}
        assert it.resolver.asking == len(set(it.names)) == 10


PROOFS = [
    # (data, of domains, said, or what is wrong)
    ({"2.0.0.127.bl.example": "127.0.0.2"}, False, ""),
    ({"2.0.0.127.bl.example": "127.0.0.99"}, False, ""),  # what it is listed as is not what mail is refused for
    ({}, False, "bl.example does not list 2.0.0.127"),
    ({"2.0.0.127.bl.example": "127.0.0.2", "1.0.0.127.bl.example": "127.0.0.2"}, False, "bl.example lists 1.0.0.127"),
    ({"2.0.0.127.bl.example": "127.255.255.254"}, False, "bl.example answers 127.255.255.254: it refuses us"),
    ({"2.0.0.127.bl.example": "203.0.113.9", "1.0.0.127.bl.example": "203.0.113.9"}, False, "answers 203.0.113.9: it refuses us"),
    ({"test.bl.example": "127.0.1.2"}, True, ""),
    ({"2.0.0.127.bl.example": "127.0.0.2"}, True, "bl.example does not list test"),
    ({"test.bl.example": "127.0.1.2", "invalid.bl.example": "127.0.1.2"}, True, "bl.example lists invalid"),
]


@pytest.mark.parametrize(("data", "domain", "said"), PROOFS)
async def test_a_list_has_to_know_the_test_entries(data, domain, said):
    zone = {name: [{"A": value}] for name, value in data.items()}
    zone |= {"2.0.0.127.good.example": [{"A": "127.0.0.2"}]}
    async with asking(zone, a_list("good.example"), a_list("bl.example", domain=domain)) as it:
        await it.filter.probe()
        if said:
            with pytest.raises(FilterFailure, match=said):
                await it.filter.prove()
        else:
            assert await it.filter.prove() == "2 lists that answer"
        assert not it.counts and not it.warnings
        assert not any(one.paused_until for one in it.filter.lists)
    async with asking(zone, a_list("good.example")) as it:
        assert await it.filter.prove() == "1 list that answers"


async def test_a_list_that_does_not_answer_proves_nothing():
    async with asking(Everything("", silent=True), a_list("bl.example"), timeout=0.05) as it:
        with pytest.raises(FilterFailure, match=r"bl\.example does not answer") as caught:
            await it.filter.prove()
        assert caught.value.reason == "refused"
        await it.resolver.close()


@pytest.fixture
async def ten(tmp_path):
    """unbound with ten lists: what they are is in their names."""
    records = [
        *(f"{reversed_address(address)}.{zone}. IN A {code}" for address, zone, code in (
            (CLIENT, "good.test", "127.0.0.2"), (CLIENT, "good.test", "127.0.0.4"), ("2001:db8::25", "good.test", "127.0.0.3"),
            (CLIENT, "others.test", "127.0.0.99"), ("192.0.2.50", "allow.test", "127.0.10.2"),
            ("192.0.2.50", "good.test", "127.0.0.4"),
            ("127.0.0.2", "good.test", "127.0.0.2"),
        )),
        "bad.example.names.test. IN A 127.0.1.2", "test.names.test. IN A 127.0.1.2",
    ]  # fmt: skip
    zones = {"refusing.test": "127.255.255.254", "lying.test": "203.0.113.9", "odd.test": "127.0.0.1"}
    server = "  do-not-query-localhost: no\n"
    for zone, answer in zones.items():
        server += f'  local-zone: "{zone}." redirect\n  local-data: "{zone}. IN A {answer}"\n'
    slow = Zone({f"{AT}.slow.example": [{"A": "127.0.0.5"}]})
    dead, broken = Everything("", silent=True), Everything("", silent=True)
    async with nameserver(slow, seconds=0.1) as one, nameserver(dead) as two, nameserver(broken, servfail=True) as three:
        forwards = {"slow.example.": one, "dead.example.": two, "broken.example.": three}
        with nameserver_with(tmp_path, records, server, forwards) as address:
            resolver = Resolver([address])
            codes = ["127.0.0.2-11", "127.0.1.2", "127.0.10.0/24"]
            names = ["good.test", "others.test", "refusing.test", "lying.test", "odd.test", "slow.example", "dead.example"]
            lists = [a_list(name, codes=codes) for name in [*names, "broken.example"]]
            lists += [a_list("allow.test", -5.0, codes=codes), a_list("names.test", 2.0, domain=True, codes=codes)]
            yield Asked(resolver, lists, 1.0, slow)
            await resolver.close()


async def test_ten_lists_of_a_real_nameserver(ten):
    slow = f"{CLIENT} is listed by slow.example (127.0.0.5)"
    good = f"{CLIENT} is listed by good.test (127.0.0.2, 127.0.0.4)"
    first, second, third, fourth = await asyncio.gather(
        ten.rcpt(helo="bad.example"), ten.rcpt("192.0.2.50"), ten.rcpt("2001:db8::25"), ten.rcpt("192.0.2.51", helo="a.example")
    )
    assert first == ("listed", f"{good}, {slow}, bad.example is listed by names.test (127.0.1.2)", 4.0)
    assert (second[0], second[2]) == ("clean", -4.0)
    assert third == ("listed", "2001:db8::25 is listed by good.test (127.0.0.3)", 1.0)
    assert fourth == ("clean", "", 0.0)
    warned = [warning.partition(" for ")[0] for warning in ten.warnings]
    assert sorted(warned) == [
        "lying.test answers 203.0.113.9", "odd.test answers 127.0.0.1", "refusing.test answers 127.255.255.254"
    ]  # fmt: skip
    results = {zone: {result for each, result in ten.counts if each == zone} for zone, _ in ten.counts}
    assert results == {
        "good.test": {"listed", "clean"}, "others.test": {"clean"}, "refusing.test": {"refused"}, "lying.test": {"refused"},
        "odd.test": {"refused"}, "slow.example": {"listed", "clean"}, "dead.example": {"failed"}, "broken.example": {"failed"},
        "allow.test": {"listed", "clean"}, "names.test": {"listed", "clean"},
    }  # fmt: skip
    with pytest.raises(FilterFailure) as caught:
        await ten.filter.prove()
    told = str(caught.value).split("; ")
    wrong = [
        "others.test",
        "refusing.test",
        "lying.test",
        "odd.test",
        "slow.example",
        "dead.example",
        "broken.example",
        "allow.test",
    ]
    assert [each.split()[0] for each in told] == wrong, told


async def test_a_survey_of_a_real_nameserver(ten):
    rows = await ten.filter.survey(CLIENT, "bad.example", "ann@a.example")
    results = [(row.zone, row.asked.removesuffix(f".{row.zone}"), row.result, tuple(row.answers), row.score) for row in rows]
    assert results == [
        ("good.test", AT, "listed", ("127.0.0.2", "127.0.0.4"), 1.0), ("others.test", AT, "clean", ("127.0.0.99",), 0.0),
        ("refusing.test", AT, "refused", ("127.255.255.254",), 0.0), ("lying.test", AT, "refused", ("203.0.113.9",), 0.0),
        ("odd.test", AT, "refused", ("127.0.0.1",), 0.0), ("slow.example", AT, "listed", ("127.0.0.5",), 1.0),
        ("dead.example", AT, "failed", (), 0.0), ("broken.example", AT, "failed", (), 0.0), ("allow.test", AT, "clean", (), 0.0),
        ("names.test", "bad.example", "listed", ("127.0.1.2",), 2.0), ("names.test", "a.example", "clean", (), 0.0),
    ]  # fmt: skip
    assert all(row.seconds >= 0 for row in rows)
    assert not ten.warnings and not ten.counts and not any(one.paused_until for one in ten.filter.lists)
