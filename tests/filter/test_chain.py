"""The chain: what is done with a message because of what filters say, or fail to say."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.config.filters import LONGEST, LONGEST_REPLY
from relaymta.filter import chain as chains_module
from relaymta.filter import guard as guard_module
from relaymta.filter import places as places_module
from relaymta.filter.chain import Chains
from relaymta.filter.judgement import Answer, FilterFailure, Mail, Text, Verdict
from relaymta.filter.revision import Revision
from relaymta.metrics import FilterTotals
from relaymta.proto.edits import Append
from relaymta.shm import Shared

PATIENCE = 60
TRUSTED, STRANGER = "127.0.0.1", "192.0.2.1"


class Told:
    """A filter that says what it is told: an Answer, a FilterFailure or another exception; None: nothing, ever."""

    def __init__(self) -> None:
        self.says: Any = Answer("OK")
        self.shown: list[tuple[str, bytes]] = []
        self.cancelled = self.probed = self.closed = 0
        self.most = self.under_way = 0

    async def judge(self, mail: Mail) -> Answer:
        self.shown.append((mail.ident, b"".join([piece async for piece in mail.text.pieces(mail.most)])))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self._said()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1

    async def _said(self) -> Answer:
        await asyncio.sleep(0)
        said = self.says
        if isinstance(said, asyncio.Event):
            await said.wait()
            return Answer("OK")
        if said is None:
            await asyncio.Event().wait()
        if isinstance(said, BaseException):
            raise said
        assert isinstance(said, Answer)
        return said

    async def probe(self) -> None:
        self.probed += 1
        if not isinstance(self.says, Answer):
            raise FilterFailure("connect", "nobody is there")

    async def prove(self) -> str:
        return "it"

    def close(self) -> None:
        self.closed += 1


class Bench:
    """The filters of one worker. `told`: what speaks to each, by its name; `events`: what was logged."""

    def __init__(self, shared: Shared, slot: int = 0, workers: int = 1) -> None:
        self.events: list[dict[str, Any]] = []
        self.told: dict[str, Told] = {}
        self.named = shared.named(slot)
        self.limits = shared.limits(slot, workers)
        self.chains: Chains | None = None

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name} | fields)

    def of(self, name: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["event"] == name]

    def configure(self, *filters: dict[str, Any], **table: Any) -> Chains:
        every = [{"name": f"f{n}", "type": "clamd", "address": ["unix:/x"]} | one for n, one in enumerate(filters)]
        config = Config.model_validate({
            "hostname": "relay.example", "listener": [{"address": "127.0.0.1:25"}, {"address": "127.0.0.1:587"}],
            "filter": every, "filters": table,
        })  # fmt: skip
        self.config = config
        before, self.chains = (
            self.chains,
            Chains(
                config,
                self.limits,
                self.named,
                self,
                asyncio.get_running_loop(),
                self.chains,  # type: ignore[arg-type]
            ),
        )
        self.chains.begin(before)
        return self.chains

    async def judge(self, client: str = STRANGER, text: bytes = b"Subject: x\r\n\r\nx\r\n", **more: Any) -> Any:
        """What is done with a message; what it is then is in `revision`."""
        chain = self.chain(client)
        self.revision = Revision(mail(text, client=client, **more))
        return None if chain is None else await chain.judge(self.revision)

    def chain(self, client: str = STRANGER, listener: int = 0, application: str = "") -> Any:
        assert self.chains is not None
        return self.chains.chain_for(self.config.listener[listener], client, application, client == TRUSTED)

    def totals(self, name: str) -> FilterTotals:
        return FilterTotals(self.named.of(name))


def mail(text: bytes = b"Subject: x\r\n\r\nx\r\n", recipients: tuple[str, ...] = ("c@d.example",), **more: Any) -> Mail:
    head, _, body = text.partition(b"\r\n\r\n")
    given = {"ident": "ID", "sender": "a@b.example", "client": STRANGER, "helo": "h", "user": "", "tls": ""} | more
    return Mail(recipients=recipients, text=Text(head + b"\r\n\r\n", body), **given)


@asynccontextmanager
async def bench_of(shared: Shared, slot: int = 0, workers: int = 1) -> AsyncIterator[Bench]:
    made = Bench(shared, slot, workers)
    yield made
    if made.chains is not None:
        made.chains.close()
    await asyncio.sleep(0)


@pytest.fixture
async def bench(monkeypatch):
    async with bench_of(Shared.create()) as made:
        told = made.told
        monkeypatch.setattr(chains_module, "_TYPES", {"clamd": lambda settings, _: told.setdefault(settings.name, Told())})
        monkeypatch.setattr(guard_module, "PROBE_EVERY", 0.01)
        monkeypatch.setattr(places_module, "LOOK_EVERY", 0.001)
        yield made


def says(verdict: str) -> dict[str, Any]:
    """A filter whose OK means a verdict."""
    return {"verdicts": {"OK": verdict}}


ORDER = ["accept", "tag", "discard", "hold", "tempfail", "reject"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stricter", range(1, 6))
async def test_the_strictest_verdict_counts_in_whatever_order(bench, stricter, turned):
    words = ORDER[: stricter + 1]
    bench.configure(*(says(word) for word in (reversed(words) if turned else words)))
    outcome = await bench.judge()
    assert outcome.verdict.word == words[-1]
    assert [one["verdict"] for one in bench.of("filtered")] == (words if not turned else list(reversed(words)))


async def test_of_equals_the_first_in_the_file_names_itself(bench):
    bench.configure(says("reject"), says("reject"))
    bench.told["f0"].says = Answer("OK", "one")
    bench.told["f1"].says = Answer("OK", "other")
    assert (await bench.judge()).reply == b"554 5.7.1 Refused by f0: one\r\n"


async def test_a_sure_refusal_beats_failures_and_ends_the_others_work(bench):
    bench.configure({}, says("reject"), {})
    bench.told["f0"].says = FilterFailure("connect", "nobody is there")
    bench.told["f2"].says = None
    async with asyncio.timeout(PATIENCE):
        outcome = await bench.judge()
    assert outcome.verdict is Verdict.REJECT and bench.told["f2"].cancelled == 1
    assert [one["filter"] for one in bench.of("filtered")] == ["f0", "f1"]


@pytest.mark.parametrize("reason", ["", ":", " : "])
@pytest.mark.parametrize("code", ["550 5.7.1", "554 5.7.0"])
async def test_a_refusal_without_a_reason_is_a_reply(bench, code, reason):
    bench.configure({"verdicts": {"OK": "reject"}}, reply=f"{code} {{reason}}")
    bench.told["f0"].says = Answer("OK", reason)
    assert (await bench.judge()).reply == f"{code} Refused by f0\r\n".encode()


async def test_replies_and_tags_as_long_as_can_be(bench):
    """RFC 5321 4.5.3.1.5, RFC 5322 2.1.1."""
    name = "n" * 32
    bench.configure(
        {"name": name, "verdicts": {"OK": "tag"}}, reply=f"554 5.7.1 {{filter}}{{reason}}{'x' * (LONGEST_REPLY - 26)}",
        tag=[f"{'X' * (LONGEST - 25)}: {{filter}}{{reason}}{{score}}"],
    )  # fmt: skip
    bench.told[name].says = Answer("OK", "r" * 300, -1.23456e-200)
    await bench.judge()
    assert (bench.revision.above, bench.revision.header.count(b"\r\n")) == (b"", 3)
    bench.told[name].says = Answer("FOUND", "r" * 300)
    reply = (await bench.judge()).reply
    assert reply.endswith(b"x\r\n") and len(reply) <= 512


@pytest.mark.parametrize("on_failure, verdict, reply, closes", [
    ("accept", "accept", b"", False), ("tempfail", "tempfail", b"451 4.7.1 f0 does not answer now; try again later\r\n", False),
    ("hold", "hold", b"", False), ("disconnect", "tempfail", b"421 4.7.1 f0 does not answer now; closing\r\n", True),
])  # fmt: skip
async def test_what_follows_from_a_failure(bench, on_failure, verdict, reply, closes):
    bench.configure({"on_failure": on_failure})
    bench.told["f0"].says = FilterFailure("refused", "unix:/x: answers Heuristics ERROR")
    outcome = await bench.judge()
    assert (outcome.verdict.word, outcome.reply, outcome.closes) == (verdict, reply, closes)
    assert outcome.held == ("filter f0: unix:/x: answers Heuristics ERROR" if verdict == "hold" else "")
    (event,) = bench.of("filtered")
    assert (event["verdict"], event["action"]) == ("failed", verdict)
    assert event["reason"] == "refused: unix:/x: answers Heuristics ERROR"
    assert bench.totals("f0").failures == {"connect": 0, "timeout": 0, "protocol": 0, "refused": 1, "oversize": 0}


async def test_mail_of_clients_that_may_relay_has_an_answer_of_its_own(bench):
    bench.configure({"on_failure": "tempfail", "on_failure_trusted": "accept"})
    bench.told["f0"].says = FilterFailure("connect", "nobody")
    assert (await bench.judge(STRANGER)).verdict is Verdict.TEMPFAIL
    assert (await bench.judge(TRUSTED)).verdict is Verdict.ACCEPT


async def test_what_is_not_enforced_is_counted_and_logged_and_nothing_follows(bench):
    bench.configure(
        {"enforce": False} | says("reject"), {"enforce": False, "on_failure": "tempfail"}, {"enforce": False} | says("tag")
    )
    bench.told["f0"].says = Answer("OK", "it", edits=[Append(b"X-A", b" b")])
    bench.told["f1"].says = FilterFailure("connect", "nobody")
    outcome = await bench.judge()
    assert (outcome.verdict, bench.revision.header, outcome.reply) == (Verdict.ACCEPT, b"Subject: x\r\n\r\n", b"")
    assert [(one["verdict"], one["action"]) for one in bench.of("filtered")] == [
        ("reject", "accept"), ("failed", "accept"), ("tag", "accept"),
    ]  # fmt: skip
    assert bench.totals("f0").verdicts["reject"] == 1 and bench.totals("f1").failures["connect"] == 1


@pytest.mark.parametrize("oversize, verdict, reply", [
    ("skip", "accept", b""), ("hold", "hold", b""), ("reject", "reject", b"552 5.3.4 The message is too large for f0\r\n"),
])  # fmt: skip
@pytest.mark.parametrize("by", ["max_size", "its own word"])
async def test_a_message_that_is_too_large(bench, oversize, verdict, reply, by):
    text = b"Subject: x\r\n\r\n" + 100 * b"x"
    size = len(text)
    bench.configure({"oversize": oversize, "max_size": size - (by == "max_size"), "on_failure": "tempfail"})
    bench.told["f0"].says = FilterFailure("oversize", "unix:/x: answers INSTREAM size limit exceeded")
    outcome = await bench.judge(text=text)
    assert (outcome.verdict.word, outcome.reply) == (verdict, reply)
    assert len(bench.told["f0"].shown) == (by != "max_size") and bench.totals("f0").failures["oversize"] == 1
    assert bench.of("filtered")[0]["verdict"] == "skipped"


async def test_a_large_message_is_shown_up_to_its_limit(bench):
    text = b"Subject: x\r\n\r\n" + 100 * b"x"
    bench.configure({"oversize": "head", "max_size": 20, "on_failure": "hold"})
    assert (await bench.judge(text=text)).verdict is Verdict.ACCEPT
    assert bench.told["f0"].shown == [("ID", text[:20])]
    bench.told["f0"].says = FilterFailure("oversize", "its limit is lower still")
    assert (await bench.judge(text=text)).verdict is Verdict.HOLD  # it has seen nothing


async def test_what_it_never_says_is_a_failure_with_a_warning(bench):
    bench.configure({})
    bench.told["f0"].says = Answer("FND" * 100)
    assert (await bench.judge()).verdict is Verdict.TEMPFAIL
    assert bench.totals("f0").failures["protocol"] == 1
    (warning,) = bench.of("warning")
    assert "filter f0" in warning["text"] and len(warning["text"]) < 200
    bench.told["f0"].says = ZeroDivisionError("a defect")
    assert (await bench.judge()).verdict is Verdict.TEMPFAIL
    assert bench.totals("f0").failures["protocol"] == 2


# Time


async def test_time_is_bounded_by_the_filter_and_by_the_budget_of_all(bench):
    bench.configure({"timeout": 0.02, "on_failure": "accept"}, {"timeout": 300, "on_failure": "hold"}, budget=0.05)
    for told in bench.told.values():
        told.says = None
    async with asyncio.timeout(PATIENCE):
        outcome = await bench.judge()
    assert outcome.verdict is Verdict.HOLD and bench.totals("f1").failures["timeout"] == 1
    assert [told.cancelled for told in bench.told.values()] == [1, 1]


async def test_three_failures_in_a_row_and_it_is_not_asked_until_it_answers(bench):
    bench.configure({"on_failure": "accept"})
    told = bench.told["f0"]
    told.says = FilterFailure("connect", "nobody is there")
    for _ in range(2):
        await bench.judge()
    told.says = Answer("OK")
    await bench.judge()  # not in a row
    told.says = FilterFailure("connect", "nobody is there")
    for _ in range(3):
        assert (await bench.judge()).verdict is Verdict.ACCEPT
    assert len(told.shown) == 6 and not bench.totals("f0").up
    assert [(one["state"], one["reason"]) for one in bench.of("filter")] == [("down", "connect: nobody is there")]
    assert (await bench.judge()).verdict is Verdict.ACCEPT and len(told.shown) == 6  # at once
    assert bench.chains.rows()[0]["why"] == "connect: nobody is there"
    async with asyncio.timeout(PATIENCE):
        while not told.probed:
            await asyncio.sleep(0.001)
        told.says = Answer("FOUND", "it")
        while not bench.totals("f0").up:
            await asyncio.sleep(0.001)
    assert [one["state"] for one in bench.of("filter")] == ["down", "up"]
    assert (await bench.judge()).verdict is Verdict.REJECT
    probed = told.probed
    await asyncio.sleep(0.05)
    assert told.probed == probed  # no more than it takes


async def test_a_filter_that_is_silent_goes_down_whatever_its_time_limit_is(bench, monkeypatch):
    """Case 3: a listener that accepts and never speaks fails three times by its time-out, also one after the other."""
    monkeypatch.setattr(guard_module, "WITHIN", 0.02)
    bench.configure({"on_failure": "accept", "timeout": 0.03})
    bench.told["f0"].says = None
    for _ in range(3):
        assert (await bench.judge()).verdict is Verdict.ACCEPT
    assert [one["state"] for one in bench.of("filter")] == ["down"]


async def test_one_that_comes_back_and_fails_at_each_message_is_probed_ever_more_seldom(bench):
    bench.configure({"on_failure": "accept"})
    told, guard = bench.told["f0"], bench.chains.guards[0]

    async def falls() -> None:
        told.says = FilterFailure("protocol", "nonsense")
        for _ in range(3):
            await bench.judge()
        assert guard.state()["up"] is False
        told.says = Answer("OK")
        async with asyncio.timeout(PATIENCE):
            while not guard.state()["up"]:
                await asyncio.sleep(0.001)

    for relapses in (1, 2, 3):
        await falls()
        assert guard._relapses == relapses
    await bench.judge()
    assert guard._relapses == 0


async def test_answers_at_rcpt_do_not_hide_that_it_fails_at_each_message(bench):
    bench.configure({"on_failure": "accept"})
    told, guard = bench.told["f0"], bench.chains.guards[0]
    told.says = FilterFailure("protocol", "nonsense")
    session, until = SimpleNamespace(), asyncio.get_running_loop().time() + 5

    async def goes_on() -> Answer:
        return Answer("continue")

    for _ in range(3):
        assert await guard.put(goes_on, False, until, session) is None
        await bench.judge()
    assert guard.state()["up"] is False


async def test_its_own_limit_of_size_is_an_answer_and_does_not_make_it_down(bench):
    """Else three large messages would keep it from looking at those of others."""
    bench.configure({"oversize": "head", "max_size": 20, "on_failure": "accept"})
    told = bench.told["f0"]
    told.says = FilterFailure("oversize", "unix:/x: answers INSTREAM size limit exceeded")
    for _ in range(4):
        assert (await bench.judge(text=b"Subject: x\r\n\r\n" + 100 * b"x")).verdict is Verdict.ACCEPT
    assert len(told.shown) == 4 and bench.totals("f0").up and bench.of("filter") == []
    assert bench.totals("f0").failures["oversize"] == 4


async def test_a_session_from_before_a_reload_asks_its_filter_again_though_that_was_down(bench):
    """Nothing probes it any more, and the session may last for days."""
    bench.configure({"on_failure": "accept"})
    old = bench.chain()
    told = bench.told.pop("f0")
    told.says = FilterFailure("connect", "nobody is there")
    for _ in range(3):
        assert (await old.judge(Revision(mail()))).verdict is Verdict.ACCEPT
    assert not bench.totals("f0").up
    bench.configure({"on_failure": "accept", "timeout": 3})
    assert bench.totals("f0").up
    told.says = Answer("FOUND", "it")
    assert (await old.judge(Revision(mail()))).verdict is Verdict.REJECT
    told.says = FilterFailure("connect", "nobody is there")
    for _ in range(4):
        assert (await old.judge(Revision(mail()))).verdict is Verdict.ACCEPT
    assert bench.totals("f0").up and len(told.shown) == 8


async def test_a_filter_that_is_down_does_not_keep_another_ones_mail(bench):
    bench.configure({"recipient_domain": ["slow.example"]}, {"recipient_domain": ["d.example", ".sub.example"]})
    bench.told["f0"].says = None
    async with asyncio.timeout(PATIENCE):
        assert (await bench.judge()).verdict is Verdict.ACCEPT
        assert (await bench.judge(recipients=("x@a.sub.example",))).verdict is Verdict.ACCEPT
        assert (await bench.judge(recipients=("x@else.example",))).verdict is Verdict.ACCEPT
    assert len(bench.told["f0"].shown) == 0 and len(bench.told["f1"].shown) == 2


# Places


async def test_no_more_are_asked_about_at_once_than_there_are_places_in_all_workers(monkeypatch):
    shared, told = Shared.create(), Told()
    monkeypatch.setattr(chains_module, "_TYPES", {"clamd": lambda *_: told})
    monkeypatch.setattr(places_module, "LOOK_EVERY", 0.001)
    told.says = asyncio.Event()
    async with bench_of(shared, 0, 2) as one, bench_of(shared, 1, 2) as other, asyncio.timeout(PATIENCE):
        one.configure({"concurrency": 3})
        other.configure({"concurrency": 3})
        tasks = [asyncio.create_task(bench.judge(ident=f"{n}")) for n in range(6) for bench in (one, other)]
        while told.under_way < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert told.under_way == 3 and one.totals("f0").waiting == 9
        told.says.set()
        await asyncio.gather(*tasks)
        assert told.most == 3 and one.totals("f0").waiting == 0
        assert one.limits.take("filter f0", 1)  # nobody holds one
        order = [int(ident) for ident, _ in told.shown]
        assert sorted(order) == sorted([*range(6), *range(6)])


async def test_who_waits_for_a_place_and_goes_leaves_it_to_the_next(bench):
    bench.configure({"concurrency": 1})
    told = bench.told["f0"]
    told.says = go_on = asyncio.Event()
    first, second, third = (asyncio.create_task(bench.judge(ident=f"{n}")) for n in range(3))
    async with asyncio.timeout(PATIENCE):
        while bench.totals("f0").waiting < 2:
            await asyncio.sleep(0.001)
        second.cancel()
        await asyncio.wait([second])
        assert bench.totals("f0").waiting == 1
        go_on.set()
        await asyncio.gather(first, third)
        first, second = (asyncio.create_task(bench.judge()) for _ in range(2))
        told.says = go_on = asyncio.Event()
        while bench.totals("f0").waiting < 1:
            await asyncio.sleep(0.001)
        go_on.set()
        second.cancel()  # perhaps in the turn in which it gets the place
        await asyncio.wait([first, second])
    assert [ident for ident, _ in told.shown][:2] == ["0", "2"]
    assert bench.limits.take("filter f0", 1) and not bench.limits.take("filter f0", 1)


async def test_who_waits_too_long_for_a_place_has_failed_but_the_filter_is_not_down(bench):
    bench.configure({"concurrency": 1, "timeout": 0.02, "on_failure": "accept"})
    assert bench.limits.take("filter f0", 1)
    for _ in range(4):
        assert (await bench.judge()).verdict is Verdict.ACCEPT
    assert not bench.told["f0"].shown and bench.totals("f0").up and bench.totals("f0").failures["timeout"] == 4


# Who is asked, changes, reloads


async def test_whose_mail_it_looks_at(bench):
    bench.configure(
        {"clients": "unauthenticated"}, {"clients": "trusted"}, {"listener": ["127.0.0.1:587"]}, {"application": ["shop"]},
        {"networks": ["192.0.2.0/24"]},
    )  # fmt: skip

    def asked(*given: Any) -> list[str]:
        chain = bench.chain(*given)
        return [] if chain is None else [guard.name for guard in chain.guards]

    assert asked(STRANGER) == ["f0", "f4"] and asked(TRUSTED) == ["f1"]
    assert asked("198.51.100.1", 1, "shop") == ["f0", "f2", "f3"]
    bench.configure({"clients": "trusted"})
    assert bench.chain(STRANGER) is None and bench.chain(TRUSTED) is bench.chain(TRUSTED)


async def test_tags_are_those_of_the_first_filter_that_says_so(bench):
    table = {"tag": ["X-Spam: Yes", "X-Spam-Info: {filter} {score} {reason}"], "subject": "[SPAM] {subject}"}
    bench.configure({}, says("tag"), says("tag"), **table)
    bench.told["f1"].says = Answer("OK", "näh\r\nX-Evil: 1", 6.25)
    outcome = await bench.judge(text=b"Subject: hello\r\n\r\nx")
    assert outcome.verdict is Verdict.TAG
    header = bench.revision.header
    assert header == b"X-Spam: Yes\r\nX-Spam-Info: f1 6.25 n?h\\r\\nX-Evil: 1\r\nSubject: [SPAM] hello\r\n\r\n"
    assert bench.chain(STRANGER).forged == {b"x-spam", b"x-spam-info"} and bench.chain(TRUSTED) is not None
    assert bench.chain(TRUSTED).forged == frozenset()


@pytest.mark.parametrize("tag", ["X-{filter}: Yes", "X-{reason}: Yes"])
async def test_the_name_of_a_tag_is_the_same_for_all_mail(bench, tag):
    """Else copies of it from outside would stay, and one with what is no name in it would not be added."""
    with pytest.raises(ValueError, match="nothing is filled in"):
        bench.configure({}, tag=[tag])


async def test_a_refusal_has_a_text_where_there_is_no_reason_to_tell(bench):
    bench.configure(says("reject"), reply="550 5.7.1 {reason}")
    assert (await bench.judge()).reply == b"550 5.7.1 Refused by f0\r\n"
    bench.told["f0"].says = Answer("OK", "it")
    assert (await bench.judge()).reply == b"550 5.7.1 it\r\n"


async def test_what_filters_change_is_gathered_in_the_order_of_the_file(bench):
    bench.configure({}, {})
    bench.told["f0"].says = Answer("OK", edits=[Append(b"X-A", b" 1")])
    bench.told["f1"].says = Answer("OK", edits=[Append(b"X-B", b" 2")])
    await bench.judge()
    assert bench.revision.header == b"Subject: x\r\nX-A: 1\r\nX-B: 2\r\n\r\n"


async def test_a_reload_leaves_what_is_configured_as_before_and_closes_the_others(bench):
    bench.configure({"name": "kept"}, {"name": "changed"}, {"name": "gone"})
    before = dict(bench.told)
    bench.told.pop("changed")
    bench.configure({"name": "kept"}, {"name": "changed", "timeout": 3})
    assert bench.told["kept"] is before["kept"] and bench.told["changed"] is not before["changed"]
    assert [before[name].closed for name in ("kept", "changed", "gone")] == [0, 1, 1]


async def test_a_guard_that_was_replaced_shows_its_state_no_more(bench):
    """The new one of that name does."""
    bench.configure({"concurrency": 1})
    told = bench.told.pop("f0")
    told.says = asyncio.Event()
    tasks = [asyncio.create_task(bench.judge()) for _ in range(3)]
    async with asyncio.timeout(PATIENCE):
        while bench.totals("f0").waiting < 2:
            await asyncio.sleep(0.001)
        bench.configure({"concurrency": 2})
        assert bench.totals("f0").waiting == 0
        told.says.set()
        assert [one.verdict for one in await asyncio.gather(*tasks)] == [Verdict.ACCEPT] * 3
    assert bench.totals("f0").waiting == 0 and bench.limits.take("filter f0", 1)


async def test_cancelled_nothing_is_logged_and_no_place_is_held(bench):
    bench.configure({}, {})
    for told in bench.told.values():
        told.says = None
    task = asyncio.create_task(bench.judge())
    while not all(told.under_way for told in bench.told.values()):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [told.cancelled for told in bench.told.values()] == [1, 1] and bench.of("filtered") == []
    assert bench.limits.take("filter f0", 1) and bench.limits.take("filter f1", 1)


async def test_a_message_that_cannot_be_read_is_no_failure_of_the_filter(bench):
    bench.configure({}, {})
    bench.told["f0"].says = OSError("the disk")
    bench.told["f1"].says = None
    with pytest.raises(OSError, match="the disk"):
        await bench.judge()
    assert bench.told["f1"].cancelled == 1 and bench.totals("f0").failures["connect"] == 0


async def test_a_message_that_several_filters_cannot_read_is_told_of_once(bench):
    bench.configure({}, {}, {})
    for told in bench.told.values():
        told.says = OSError("the disk")
    untold: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: untold.append(context))
    with pytest.raises(OSError, match="the disk"):
        await bench.judge()
    for told in bench.told.values():
        told.says = None  # the errors hold the tasks
    gc.collect()
    assert not untold


async def test_lists_in_the_dns_look_at_a_message_of_any_size(bench, monkeypatch):
    one = Told()
    monkeypatch.setattr(chains_module, "_TYPES", {"dnsbl": lambda settings, means: one})
    bench.configure({"type": "dnsbl", "address": [], "lists": [{"zone": "l.example", "codes": ["127.0.0.2"]}]})
    large = mail()
    large.text.size = 1 << 40
    one.says = Answer("listed", "it")
    outcome = await bench.chain().judge(Revision(large))
    assert outcome.reply == b"554 5.7.1 Refused by f0: it\r\n"


@pytest.mark.parametrize("code, closes", [(421, True), (521, True), (450, False), (554, False)])
async def test_a_reply_of_a_filter_that_ends_the_session(bench, code, closes):
    """RFC 7504 3: as at MAIL, RCPT and DATA."""
    bench.configure(says("tempfail" if code < 500 else "reject"))
    bench.told["f0"].says = Answer("OK", reply=b"%d 5.3.2 its own\r\n" % code)
    outcome = await bench.judge()
    assert (outcome.reply[:3], outcome.closes) == (b"%d" % code, closes)
