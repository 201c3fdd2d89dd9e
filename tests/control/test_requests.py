"""The table of requests: each has its handlers, its arguments are checked, and answers name the workers that are missing."""

import asyncio
import dataclasses
import math
import time
from types import SimpleNamespace

import pytest

from relaymta.control import Late, Refused
from relaymta.control.requests import REQUESTS, Change, Chosen, Where
from relaymta.errors import RelayError
from relaymta.ident import format_id
from relaymta.node import BOUNCE, HOLD, SiteState, SiteStates, Store, check_storable
from relaymta.proto.envelope import QueueName
from relaymta.queue import Filter, inspect, offline
from relaymta.send.policies import FIELDS, Policies, filter_of
from relaymta.shm import Shared
from relaymta.supervisor.answers import Answers, usage
from relaymta.supervisor.machine import Machine
from relaymta.worker.answers import Answers as WorkerAnswers
from relaymta.worker.answers import answer


def handlers(place: type) -> set[str]:
    return {name for name in vars(place) if not name.startswith("_") and asyncio.iscoroutinefunction(getattr(place, name))}


def test_each_request_has_its_handlers_and_there_are_no_others():
    by = {where: {row.name for row in REQUESTS.values() if row.where is where} for where in Where}
    assert handlers(Answers) - {"by_all", "by_any", "by_each", "by_live"} == by[Where.SUPERVISOR]
    assert handlers(WorkerAnswers) == set(REQUESTS) - by[Where.SUPERVISOR] | {"status"}
    offline_ones = {row.name for row in REQUESTS.values() if row.offline}
    assert {name for name in vars(offline.Spool) if not name.startswith("_")} == offline_ones
    assert all((row.merge is not None) == (row.where is Where.ALL) and row.seconds > 0 for row in REQUESTS.values())


def test_the_filter_of_a_request_is_the_queues():
    fields = {field.name: field.default for field in dataclasses.fields(Filter)}
    assert {name: getattr(Chosen(), name) for name in Chosen.__struct_fields__} == fields
    assert set(FIELDS) < set(fields)
    assert set(inspect.VERBS) == set(Change.__annotations__["verb"].__args__)


WRONG = [
    ("page", {"shard": "0", "after": 0, "chosen": {}}, "page: Expected `int`, got `str` - at `$.shard`"),
    ("page", {"shard": 0, "after": 0}, "page: Object missing required field `chosen`"),
    ("page", {"shard": 0, "after": 0, "chosen": {"flags": 1}}, "page: Object contains unknown field `flags` - at `$.chosen`"),
    ("page", {"shard": 0, "after": 0, "chosen": {"held": "no"}}, "page: Expected `bool`, got `str` - at `$.chosen.held`"),
    ("page", {"shard": -1, "after": 0, "chosen": {}}, "page: Expected `int` >= 0 - at `$.shard`"),
    ("change", {"shard": 0, "verb": "eat", "idents": []}, "change: Invalid enum value 'eat' - at `$.verb`"),
    ("change", {"shard": 0, "verb": "hold", "idents": ["1"]}, "change: Expected `int`, got `str` - at `$.idents[0]`"),
    ("clear", {"kind": "token", "site": "", "about": "", "resume": False}, "clear: Invalid enum value 'token' - at `$.kind`"),
    ("clear", {"kind": "hold", "site": "x", "about": "", "resume": True}, "clear: either a kind, or resume"),
    (
        "suspend",
        {"site": "x", "about": "", "seconds": math.nan, "reason": ""},
        "suspend: Expected `float` > 0.0 - at `$.seconds`",
    ),
    ("suspend", {"site": "x", "about": "", "seconds": 1e12, "reason": ""}, "suspend: Expected `float` <= 3153600000.0"),
    ("suspend", {"site": "x\0", "about": "", "seconds": 1, "reason": ""}, "suspend: Expected `str` matching regex"),
    ("suspend", {"site": "", "about": "", "seconds": 1, "reason": ""}, "suspend: which site"),
    ("policy", {"kind": "hold", "about": "helo=boss", "seconds": 1, "reason": ""}, "a policy cannot be about 'helo'"),
    ("message", {"ident": "zz"}, "not a message id: 'zz'"),
    ("message", {"ident": 5}, "message: Expected `str`, got `int` - at `$.ident`"),
    ("raw", {"ident": "zz"}, "not a message id"),
    ("summary", {"x": 1}, "summary: Object contains unknown field `x`"),
    ("eat", {}, "no such request: eat"),
    ("__init__", {}, "no such request"),
    ("by_all", {}, "no such request"),
]


@pytest.mark.parametrize(("op", "args", "sentence"), WRONG)
async def test_wrong_arguments_are_named(op, args, sentence):
    with pytest.raises(RelayError) as error:
        await Answers(SimpleNamespace(slots=[]))(op, args)
    assert str(error.value).startswith(sentence)


# Who is missing


class FakeChannel:
    """A worker that answers as told: a value, an exception, or (None) never."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    async def ask(self, op, descriptors, seconds, /, **args):
        self.asked.append(op)
        found = self.answers.get(op)
        if op not in self.answers:
            raise Late(f"no answer to {op} within {seconds:g} s")
        if isinstance(found, Exception):
            raise found
        return found

    async def stream(self, op, seconds, /, **args):
        for piece in self.answers.get(op, []):
            yield piece


class FakeSlot:
    def __init__(self, number, answers, ready=True, state="ready"):
        self.number, self.shards, self.ready, self.state = number, [number], ready, state
        self.lives = 1
        self.channel = FakeChannel(answers) if answers is not None else None


def of(*slots):
    config = SimpleNamespace(listener=[], spool="/", metrics=SimpleNamespace(listen="off"))
    shared = SimpleNamespace(counters=lambda slot: SimpleNamespace(get=lambda cell: slot))
    return Answers(SimpleNamespace(slots=list(slots), config=config, shared=shared, stopping=asyncio.Event()))


ROW = {"queue": "q", "messages": 1, "bytes": 5, "deferred": 0, "held": 0, "unseen": 0, "next": 0, "parked": False}


async def test_an_answer_of_all_names_those_that_are_dead_starting_or_late():
    answers = of(
        FakeSlot(0, {"summary": [dict(ROW)]}), FakeSlot(1, {}), FakeSlot(2, None),
        FakeSlot(3, {"summary": []}, False, "starting"), FakeSlot(4, {"summary": [dict(ROW)]}),
    )  # fmt: skip
    found = await answers("summary", {})
    assert (found.value, found.missing) == ([dict(ROW, messages=2, bytes=10)], [1, 2, 3])
    found = await answers("status", {})
    assert found.missing == [0, 1, 2, 3, 4] and set(found.value["totals"].values()) == {10}, "also of those that are late"
    assert [row["state"] for row in found.value["workers"]] == ["late", "late", "late", "starting", "late"]
    assert (await answers("shards", {})).missing == [3]
    for state in ("dead", "late"):  # a stopped worker that is replaced, or not yet, does not start
        assert (await of(FakeSlot(0, {}, False, state))("status", {})).value["workers"][0]["state"] == state


async def test_one_that_refuses_is_heard():
    answers = of(FakeSlot(0, {"move": [1, 0]}), FakeSlot(1, {"move": Refused("there is no route 'x'")}))
    with pytest.raises(Refused, match="no route"):
        await answers("move", {"chosen": {}, "word": "x", "dry_run": False})


async def test_an_owner_that_does_not_answer_is_missing_and_no_other_is_asked():
    slots = FakeSlot(0, {"page": "a page"}), FakeSlot(1, {})
    assert await of(*slots)("page", {"shard": 0, "after": 0, "chosen": {}}) == ("a page", [])
    assert await of(*slots)("page", {"shard": 1, "after": 0, "chosen": {}}) == (None, [1])
    with pytest.raises(RelayError, match="there is no shard 2"):
        await of(*slots)("page", {"shard": 2, "after": 0, "chosen": {}})
    assert slots[0].channel.asked == ["page"]


async def test_a_message_is_sought_where_it_was_accepted_and_then_everywhere():
    ident = format_id(1 << 12 | 1 << 30)  # of shard 1
    home, other = FakeSlot(1, {"message": "here"}), FakeSlot(0, {"message": None})
    assert await of(other, home)("message", {"ident": ident}) == ("here", [])
    assert other.channel.asked == []
    assert await of(FakeSlot(0, {"message": "there"}), FakeSlot(1, {}))("message", {"ident": ident}) == ("there", [])
    assert await of(FakeSlot(0, {"message": None}), FakeSlot(1, {}))("message", {"ident": ident}) == (None, [1])
    found = await of(other, FakeSlot(1, {"message": "here", "raw": [b"a", b"b"]}))("raw", {"ident": ident})
    assert ([piece async for piece in found.value], found.missing) == ([b"a", b"b"], [])
    assert await of(other, FakeSlot(1, {}))("raw", {"ident": ident}) == (None, [1])


async def test_metrics_get_the_usage_of_the_first_that_answers():
    supervisor = SimpleNamespace(slots=[FakeSlot(0, {}), FakeSlot(1, {"usage": [7]})])
    assert await usage(supervisor) == [7]
    with pytest.raises(RelayError, match="no worker answers"):
        await usage(SimpleNamespace(slots=[FakeSlot(0, {})]))


async def test_a_bug_in_a_workers_handler_is_a_warning_and_an_answer():
    warnings = []
    worker = SimpleNamespace(shards={}, log=SimpleNamespace(event=lambda name, text: warnings.append((name, text))))
    with pytest.raises(AttributeError):
        await answer(worker, "usage", {})
    assert warnings[0][0] == "warning" and "'usage'" in warnings[0][1] and "AttributeError" in warnings[0][1]
    with pytest.raises(RelayError, match="shard 3 is not open"):
        await answer(worker, "page", {"shard": 3, "after": 0, "chosen": {}})
    for op in ("suspend", "__init__", "nothing"):
        with pytest.raises(RelayError, match="no such request"):
            await answer(worker, op, {})
    assert len(warnings) == 1


# Policies and states


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        ("held=1", "cannot be about 'held'"), ("site=x", "cannot be about 'site'"), ("ident=5", "cannot be about 'ident'"),
        ("held=1", "cannot be about 'held'"), ("until=5", "cannot be about 'until'"), ("flags=5", "cannot be about 'flags'"),
        ("", "cannot be about ''"), ("sender", "needs a value"), ("sender=", "needs a value"),
        ("sender=a b", "cannot be about 'b'"), ("sender=a sender=b", "one sender only"),
        ("sender=a  route=b", "cannot be about ''"),
    ],
)  # fmt: skip
def test_what_a_policy_cannot_be_about_is_refused(about, sentence):
    with pytest.raises(ValueError, match=sentence):
        filter_of(about)


def test_a_stored_policy_that_cannot_be_matched_is_about_no_mail():
    now = time.time_ns() // 1_000_000
    states = SiteStates([SiteState(kind, "helo=boss", "", now, now + 100_000, "operator", "") for kind in (HOLD, BOUNCE)])
    nothing = [lambda: None, *[lambda *ignored: None] * 4]
    policies = Policies(states, *nothing)
    assert policies.find(QueueName("mx", "d.example", "", "normal"), "a@b", ["c@d.example"]) is None
    states.learn(SiteState(HOLD, "sender=a@b route=mx", "", now, now + 100_000, "operator", ""))
    policies.refresh()
    assert policies.find(QueueName("mx", "d.example", "", "normal"), "A@b", ["c@d.example"]) is not None
    assert policies.find(QueueName("other", "d.example", "", "normal"), "a@b", ["c@d.example"]) is None


@pytest.mark.parametrize("wrong", [{"site": "\ud800"}, {"reason": "\udcff"}, {"until": 1 << 70}, {"value": object()}])
async def test_a_state_that_cannot_be_stored_is_not_kept(tmp_path, wrong):
    class Slots(list):
        def notify(self, op, **args):
            self.append(op)

    warnings = []
    log = SimpleNamespace(event=lambda name, text: warnings.append(text))
    machine, now = Machine(tmp_path, Shared.create(), 1, log, Slots(), b"secret"), time.time_ns() // 1_000_000
    good = {"kind": "suspended", "site": "x", "about": "", "since": now, "until": now + 60_000, "by": "operator", "reason": ""}
    check_storable(SiteState(**good))
    with pytest.raises(RelayError, match="cannot be stored"):
        machine.set_site_state(SiteState(**good | wrong), ("suspended", "x", ""))
    assert list(machine.states) == [] and machine._slots == []
    machine.set_site_state(SiteState(**good), ("suspended", "x", ""))
    await machine.site_state(good | wrong, ["suspended", "x", ""])
    await machine.site_state({"kind": 5}, ["suspended", "x", ""])
    assert len(warnings) == 2
    await machine.stop()
    assert [state.site for state in Store(tmp_path).load()] == ["x"]
