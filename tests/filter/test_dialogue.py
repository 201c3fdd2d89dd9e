"""What filters say of the envelope, of several recipients, and more than once: scripted ones."""

from typing import Any

import pytest

from relaymta.filter import chain as chains_module
from relaymta.filter.chain import Chains
from relaymta.filter.dialogue import Dialogue
from relaymta.filter.judgement import Answer, FilterSession, Mail, NewEnvelope, Verdict
from relaymta.filter.revision import Revision
from relaymta.shm import Shared
from tests.filter.test_chain import STRANGER, Bench, bench_of, mail

DUNNO, REJECT, DEFER = Answer("DUNNO"), Answer("REJECT", "no"), Answer("DEFER", "later")
A, B, C = "a@d.example", "b@d.example", "c@d.example"


class Says:
    """A filter that follows a client, and says what it is told: of the recipient that it is asked about, else of "". `heard`:
    what it was asked."""

    begins = False

    def __init__(self, stage: str) -> None:
        self.alone = stage == "mail"
        self.asks = frozenset({stage.upper()}) if stage in ("rcpt", "data") else frozenset[str]()
        self.looks = stage in ("mail", "message")
        self.says: dict[str, Answer] = {}
        self.heard: list[str] = []

    def session(self, client: str) -> "_Session":
        return _Session(self)

    def close(self) -> None:
        pass


class _Session(FilterSession):
    def __init__(self, of: Says) -> None:
        self.of, self.decided = of, False

    def _said(self, about: str, of_all: bool) -> Answer:
        self.of.heard.append(about)
        answer = self.of.says.get(about, DUNNO)
        self.decided = of_all or answer.word == "DISCARD"
        return answer

    async def mail(self, mail: Mail) -> Answer:
        return Answer("continue")

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        return self._said(address, False)

    async def data(self, mail: Mail) -> Answer:
        return self._said(" ".join(mail.recipients), True)

    async def judge(self, mail: Mail) -> Answer:
        return self._said("", True)

    def refused(self, address: str, answer: bytes) -> None:
        pass

    def reset(self) -> None:
        self.decided = False

    def close(self) -> None:
        pass


@pytest.fixture
async def bench(monkeypatch):
    async with bench_of(Shared.create()) as made:
        told: Any = made.told

        def follower(settings: Any, _: Any) -> Any:
            return told.setdefault(settings.name, Says(settings.stage or "mail"))

        monkeypatch.setattr(chains_module, "_TYPES", {"policy": follower, "milter": follower})
        yield made


def begun(bench: Bench, *filters: dict[str, Any]) -> tuple[Dialogue, list[Any]]:
    made: Chains = bench.configure(*({"type": "policy"} | one for one in filters))
    dialogue = bench.chain().dialogue(STRANGER)
    return dialogue, [guard.filter for guard in made.guards]


async def test_who_is_refused_at_data_and_adds_recipients_is_judged_anew(bench):
    dialogue, (counts, greys) = begun(bench, {"stage": "data"}, {"stage": "data"})
    counts.says[f"{A} {B}"], greys.says[A] = REJECT, DEFER
    assert await dialogue.mail(mail()) is None
    found = await dialogue.data(mail(recipients=(A,)))
    assert found is not None and found.action is Verdict.TEMPFAIL and counts.heard == [A]
    found = await dialogue.data(mail(recipients=(A, B)))
    assert found is not None and (found.guard.name, found.action) == ("f0", Verdict.REJECT)
    assert await dialogue.data(mail(recipients=(A, C))) is None
    dialogue.end()


async def test_what_was_said_before_other_recipients_were_added_does_not_count(bench):
    dialogue, (marks, greys) = begun(bench, {"stage": "data"}, {"stage": "data"})
    marks.says[A], greys.says[A] = Answer("HOLD", "look"), DEFER
    assert await dialogue.data(mail(recipients=(A,))) is not None
    assert await dialogue.data(mail(recipients=(A, B))) is None
    assert (await bench.chain().judge(Revision(mail(recipients=(A, B))), dialogue)).verdict is Verdict.ACCEPT
    dialogue.end()


async def test_what_is_said_of_a_recipient_counts_though_the_message_goes_elsewhere(bench):
    dialogue, (moves, holds) = begun(
        bench, {"type": "milter", "may": ["recipients"], "verdicts": {"accept": "accept"}},
        {"stage": "rcpt", "recipient_domain": ["d.example"]},
    )  # fmt: skip
    moves.says[""] = Answer("accept", envelope=NewEnvelope(["x@far.example"], [A]))
    holds.says[A] = Answer("HOLD", "look")
    assert await dialogue.rcpt(mail(recipients=()), A) is None
    revision = Revision(mail(recipients=(A,)))
    outcome = await bench.chain().judge(revision, dialogue)
    assert revision.recipients == ["x@far.example"] and outcome.held == "filter f1: look"
    dialogue.end()


@pytest.mark.parametrize("word", ["HOLD", "DISCARD"])
async def test_what_is_said_of_a_recipient_that_another_filter_refuses_does_not_count(bench, word):
    dialogue, (says, refuses) = begun(bench, {"stage": "rcpt"}, {"stage": "rcpt"})
    says.says[A], refuses.says[A] = Answer(word, "look"), REJECT
    assert [await dialogue.rcpt(mail(recipients=()), address) is None for address in (A, B)] == [False, True]
    assert says.heard == [A, B]
    assert (await bench.chain().judge(Revision(mail(recipients=(B,))), dialogue)).verdict is Verdict.ACCEPT
    refuses.says.clear()
    assert [await dialogue.rcpt(mail(recipients=(B,)), address) is None for address in (A, C)] == [True, True]
    outcome = await bench.chain().judge(Revision(mail(recipients=(B, A, C))), dialogue)
    assert outcome.verdict.word == word.lower() and (says.heard[-1] == C) == (word == "HOLD")
    dialogue.end()


@pytest.mark.parametrize("verdict", ["reject", "tempfail"])
async def test_a_word_about_all_of_the_message_that_refuses_a_recipient_refuses_no_other(bench, verdict):
    dialogue, (one,) = begun(bench, {"stage": "rcpt", "verdicts": {"DISCARD": verdict}})
    one.says[B] = Answer("DISCARD", "away")
    assert [await dialogue.rcpt(mail(recipients=()), address) is None for address in (A, B, C)] == [True, False, True]
    assert one.heard == [A, B, C]
    assert (await bench.chain().judge(Revision(mail(recipients=(A, C))), dialogue)).verdict is Verdict.ACCEPT
    dialogue.end()


async def test_a_message_that_is_discarded_is_asked_about_no_more(bench):
    dialogue, (one,) = begun(bench, {"stage": "rcpt"})
    one.says[A] = Answer("DISCARD", "away")
    assert [await dialogue.rcpt(mail(recipients=()), address) for address in (A, B)] == [None, None] and one.heard == [A]
    assert (await bench.chain().judge(Revision(mail(recipients=(A, B))), dialogue)).verdict is Verdict.DISCARD
    dialogue.reset()
    assert await dialogue.rcpt(mail(recipients=()), B) is None and one.heard == [A, B]
    assert (await bench.chain().judge(Revision(mail(recipients=(B,))), dialogue)).verdict is Verdict.ACCEPT
    dialogue.end()
