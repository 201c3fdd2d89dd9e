"""A reload in the supervisor: all workers get a configuration or none does, whatever they answer, whenever they end or start."""

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from relaymta.cli import main, queue
from relaymta.config import Config, load, merge
from relaymta.control import Refused
from relaymta.errors import ConfigError
from relaymta.supervisor import configuration
from relaymta.supervisor.configuration import Configuration


def config(**keys: Any) -> Config:
    return load(None, {"listener": [{"address": "127.0.0.1:1"}], "hostname": "relay.example"} | keys)


OLD, NEW = config(), config(**{"queue.max_age": "1d", "workers": 3})


class Worker:
    """A channel to a worker that prepares and commits as a real one does. `answers[op]`: an exception, or a coroutine function to
    run first."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.config = ""
        self.prepared: dict[int, str] = {}
        self.notified: list[str] = []

    async def ask(self, op: str, /, number: int, config: str = "") -> None:
        answer = self.answers.get(op)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            await answer()
        if op == "prepare":
            self.prepared[number] = config
        else:
            self.config = self.prepared[number]

    def notify(self, op: str, /, **args: Any) -> None:
        self.notified.append(op)


class Machine:
    """Slots with such workers."""

    def __init__(self, *workers: Worker) -> None:
        self.slots = [SimpleNamespace(number=number, channel=worker, ready=True) for number, worker in enumerate(workers)]
        self.answer: Config | ConfigError = NEW
        self.configuration = Configuration(OLD, self.read, self)  # type: ignore[arg-type]
        for slot in self.slots:
            slot.channel.config = self.configuration.given(slot)  # type: ignore[arg-type]

    def read(self) -> Config:
        if isinstance(self.answer, ConfigError):
            raise self.answer
        return self.answer

    def __iter__(self) -> Iterator[Any]:
        return iter(self.slots)

    def ready(self) -> list[tuple[Any, Any]]:
        return [(slot, slot.channel) for slot in self.slots if slot.ready]

    @property
    def have(self) -> set[str]:
        """The configurations in use in the workers."""
        return {slot.channel.config for slot in self.slots}

    async def settle(self) -> None:
        while self.configuration._tasks:
            await asyncio.gather(*self.configuration._tasks)


MERGED = merge(OLD, NEW).config.to_json()


async def test_a_reload_says_what_was_applied_and_what_needs_a_restart():
    machine = Machine(Worker(), Worker())
    assert await machine.configuration.reload() == "reloaded; applied: queue.max_age; these need a restart: workers"
    assert machine.have == {MERGED} and machine.configuration.config.workers == 0
    assert await machine.configuration.reload() == "reloaded; these need a restart: workers"
    machine.answer = machine.configuration.config
    assert await machine.configuration.reload() == "reloaded; no key has changed; the files that it names were read again"


async def hang() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("fault", "why"),
    [(Refused("dkim.0.key: gone"), "worker 1: dkim.0.key: gone"), (hang, "worker 1 does not answer"),
     (ConnectionError("gone"), "worker 1 has ended")],
)  # fmt: skip
async def test_a_refusal_by_one_worker_leaves_all_on_the_old(monkeypatch, fault, why):
    monkeypatch.setattr(configuration, "PREPARE_SECONDS", 0.05)
    machine = Machine(Worker(), Worker(prepare=fault), Worker())
    assert await machine.configuration.reload() == f"refused, the old configuration stays:\n{why}"
    assert machine.have == {OLD.to_json()} and machine.configuration.config is OLD
    assert [slot.channel.notified for slot in machine.slots] == [["drop"]] * 3


async def test_a_file_with_mistakes_asks_no_worker():
    machine = Machine(Worker(prepare=AssertionError("asked")))
    machine.answer = ConfigError(["r.toml:1: x: no such key"])
    assert await machine.configuration.reload() == "refused, the old configuration stays:\nr.toml:1: x: no such key"


async def test_a_worker_that_does_not_confirm_is_named_and_one_that_fails_is_replaced(monkeypatch):
    monkeypatch.setattr(configuration, "COMMIT_SECONDS", 0.05)
    machine = Machine(Worker(), Worker(commit=hang), Worker(commit=Refused("a defect")), Worker(commit=ConnectionError()))
    first, *others = (await machine.configuration.reload()).split("\n")
    assert first.startswith("reloaded; applied: queue.max_age")
    assert [line.partition(": it has")[0] for line in others] == [
        "worker 1 does not answer",
        "worker 2: a defect",
        "worker 3 has ended",
    ]
    assert machine.configuration.config.to_json() == MERGED, "successors start with it"
    assert [slot.channel.notified for slot in machine.slots] == [[], [], ["stop"], []]


async def test_a_worker_that_starts_meanwhile_catches_up():
    """It was given the old configuration before the others agreed on the new one, and is ready before or after that."""
    machine = Machine(Worker(), Worker(), Worker())
    early, late = machine.slots[1], machine.slots[2]
    early.ready = late.ready = False

    async def meanwhile() -> None:
        early.ready = True
        machine.configuration.started(early)  # type: ignore[arg-type]

    machine.slots[0].channel.answers["prepare"] = meanwhile
    assert (await machine.configuration.reload()).startswith("reloaded")
    await machine.settle()
    late.ready = True
    machine.configuration.started(late)  # type: ignore[arg-type]
    await machine.settle()
    assert machine.have == {MERGED}


async def test_a_worker_that_ends_between_the_phases_has_a_whole_configuration_afterwards():
    machine = Machine(Worker(), Worker())
    dying = machine.slots[1]

    async def replaced() -> None:
        dying.channel = Worker()  # its successor begins before the commit: with the old one
        dying.channel.config = machine.configuration.given(dying)  # type: ignore[arg-type]

    dying.channel.answers["prepare"] = replaced
    assert (await machine.configuration.reload()).startswith("reloaded")
    machine.configuration.started(dying)  # type: ignore[arg-type]
    await machine.settle()
    assert machine.have == {MERGED}


async def test_a_worker_that_cannot_catch_up_is_replaced():
    machine = Machine(Worker(), Worker(prepare=Refused("no")))
    slow = machine.slots[1]
    slow.ready = False
    assert (await machine.configuration.reload()).endswith("\nworker 1 is not ready: it gets the new configuration when it is")
    slow.ready = True
    machine.configuration.started(slow)  # type: ignore[arg-type]
    await machine.settle()
    assert slow.channel.notified == ["stop"]


async def test_reloads_do_not_mix():
    """The second waits for the first."""
    pauses = iter((0.05, 0.04, 0.03, 0.02, 0.01))
    machine = Machine(Worker(prepare=lambda: asyncio.sleep(next(pauses))), Worker())
    others = [config(**{"queue.window": 100 + number}) for number in range(5)]
    answers = iter(others)
    machine.configuration._read = lambda: next(answers)
    assert all(
        answer.startswith("reloaded") for answer in await asyncio.gather(*(machine.configuration.reload() for _ in others))
    )
    assert machine.have == {others[-1].to_json()}


async def test_many_hangups_are_one_reload_and_one_more(monkeypatch):
    """The one that comes while a reload is under way may be about a file that was written after that one has read it."""
    monkeypatch.setattr(configuration, "HANGUP_SECONDS", 0)
    machine = Machine(Worker())
    read, begun = [], asyncio.Event()

    def count() -> Config:
        read.append(len(read))
        return config(**{"queue.window": 100 + len(read)})

    async def preparing() -> None:
        begun.set()
        if len(read) == 1:
            for _ in range(59):
                machine.configuration.hang_up()
                await asyncio.sleep(0)

    machine.configuration._read = count
    machine.slots[0].channel.answers["prepare"] = preparing
    machine.configuration.hang_up()
    await begun.wait()
    await machine.settle()
    assert len(read) == 2 and machine.configuration.config.queue.window == 102
    machine.configuration.hang_up()
    await machine.settle()
    assert len(read) == 3, "and later ones are answered again"


async def test_hangups_within_a_second_wait_for_its_end(monkeypatch):
    machine, slept = Machine(Worker()), []
    reload, ended = machine.configuration.reload, []

    async def counted() -> str:
        ended.append(await reload())
        return ended[-1]

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            for _ in range(59):
                machine.configuration.hang_up()

    machine.configuration.reload = counted  # type: ignore[method-assign]
    monkeypatch.setattr(configuration.asyncio, "sleep", sleep)
    machine.configuration.hang_up()
    await machine.settle()
    assert (len(ended), slept) == (2, [configuration.HANGUP_SECONDS] * 2)


@pytest.mark.parametrize("keys", [{"listener": [{"address": "127.0.0.1:1", "tls": "require"}]}])
def test_a_merge_that_is_not_valid_as_a_whole_is_refused(keys):
    running = config(**keys, certificate=[{"chain": "/x"}])
    with pytest.raises(ConfigError) as refused:
        merge(running, OLD)
    assert refused.value.problems == [
        "with the running listener.0.tls, which only a restart changes: listener.0.tls: 'require' needs a [[certificate]]"
    ]


LISTENERS = [  # (running, in the file, what is said of it)
    ([{"address": "127.0.0.1:1"}], [{"address": "127.0.0.1:1"}], []),
    (
        [{"address": "127.0.0.1:1"}],
        [{"address": "127.0.0.1:1"}, {"address": "127.0.0.1:2"}],
        ["listener 127.0.0.1:2 is not open: only a restart opens it"],
    ),
    (
        [{"address": "127.0.0.1:1"}, {"address": "127.0.0.1:2"}],
        [{"address": "127.0.0.1:2"}],
        ["listener 127.0.0.1:1 stays open: only a restart closes it"],
    ),
    (
        [{"address": "127.0.0.1:1"}],
        [{"address": "127.0.0.1:2"}],
        [
            "listener 127.0.0.1:2 is not open: only a restart opens it",
            "listener 127.0.0.1:1 stays open: only a restart closes it",
        ],
    ),
    (
        [{"address": "127.0.0.1:1"}],
        [{"address": "127.0.0.1:1", "tls": "off", "submission": True}],
        ["listener 127.0.0.1:1 is as before: only a restart changes its submission, tls"],
    ),
]


@pytest.mark.parametrize(("running", "fresh", "said"), LISTENERS)
async def test_a_listener_that_a_reload_leaves_out_is_named(tmp_path, monkeypatch, running, fresh, said):
    machine = Machine(Worker())
    machine.configuration.config, machine.answer = config(listener=running), config(listener=fresh)
    answer = await machine.configuration.reload()
    assert answer.split("\n")[1:] == said

    monkeypatch.setattr(queue, "connect", lambda read: None)
    monkeypatch.setattr(queue, "asked", lambda peer, op: answer)
    done = CliRunner().invoke(main, ["reload", "--spool", str(tmp_path)])
    assert (done.exit_code, done.stdout.splitlines()) == (int(bool(said)), answer.split("\n"))


def test_the_first_route_that_keeps_mail_needs_a_restart():
    here = {"name": "here", "protocol": "mailbox", "recipient_domain": ["local.example"]}
    other = {"name": "there", "protocol": "mailbox", "recipient_domain": ["other.example"]}
    said = ["route here: there are no mailboxes before a restart, and mail for them is deferred until then"]
    assert merge(config(), config(route=[here])).left_out == said
    assert merge(config(route=[here]), config(route=[here, other])).left_out == []


def test_a_merge_keeps_what_needs_a_restart_and_nothing_else():
    running = config(**{"log.file": "/a", "metrics.listen": "off", "limits.connections": 7, "route": [{"hosts": ["a"]}]})
    fresh = config(**{"log.history": 0, "user": "x", "limits.memory": 5, "route": [{"hosts": ["b"]}, {"name": "c"}],
                      "listener": [{"address": "127.0.0.1:2"}]})  # fmt: skip
    change = merge(running, fresh)
    assert change.applied == ["route", "limits.connections", "limits.memory"]
    assert change.restart == ["user", "listener.0.address", "metrics.listen", "log.file", "log.history"]
    merged = change.config
    assert (merged.log, merged.metrics, merged.user, merged.listener) == (running.log, running.metrics, "", running.listener)
    assert (merged.route, merged.limits) == (fresh.route, fresh.limits)
    assert "connections" not in merged.limits.model_fields_set, "a default stays a default"
