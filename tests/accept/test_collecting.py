"""Who empties the two folders, with a relay that answers as the test says."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.accept import collecting, dropped
from relaymta.accept.collecting import Collector
from relaymta.accept.user import name_of
from relaymta.config import Config

OK = b"250 2.0.0 OK"
CLOSES = b"421 4.7.0 Too many errors; closing"


class Relay:
    """What the connections say. `says`: the reply to a command; `most`: recipients of a message; `errors`: 5xx replies after
    which a connection is closed."""

    def __init__(self, most: int = 1000, errors: int = 20) -> None:
        self.most, self.errors = most, errors
        self.says: Callable[[bytes], bytes] = lambda command: OK
        self.sent: list[tuple[list[bytes], bytes]] = []
        self.connections = self.closed = 0
        self.go = asyncio.Event()  # what is for slow@x waits for it

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        rcpts: list[bytes] = []
        data, errors = b"", 0
        writer.write(b"220 x\r\n")
        while (line := (await reader.readline()).rstrip()) not in (b"", b"QUIT"):
            answer = self.says(line)
            if b"<slow@x>" in line:
                await self.go.wait()
            if line.startswith(b"BDAT"):
                data += await reader.readexactly(int(line.split()[1]))
            if line.startswith(b"MAIL"):
                rcpts, data = [], b""
            elif line.startswith(b"RCPT"):
                if len(rcpts) >= self.most:
                    answer = b"452 4.5.3 Too many recipients"
                elif answer.startswith(b"2"):
                    rcpts.append(line.partition(b"<")[2].rstrip(b">"))
            elif line.endswith(b"LAST") and answer.startswith(b"2"):
                self.sent.append((rcpts, data))
            writer.write(answer + b"\r\n")
            errors += answer.startswith(b"5")
            if errors >= self.errors:
                writer.write(CLOSES + b"\r\n")
                self.closed += 1
                break
        writer.close()

    @property
    def recipients(self) -> list[bytes]:
        return sorted(rcpt for rcpts, _ in self.sent for rcpt in rcpts)


class Emptied(Collector):
    relay: Relay
    _serving: set[asyncio.Task[None]]

    async def _connected(self, user: int, file: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(self.relay.serve(*await asyncio.open_connection(sock=theirs)))
        self._serving.add(serving)  # a task that nobody knows may be gone at any time
        return await asyncio.open_connection(sock=ours)


class Bench:
    def __init__(self, folder: Path, relay: Relay, collector: Emptied, warnings: list[str]) -> None:
        self.folder, self.relay, self.collector, self.warnings = folder, relay, collector, warnings

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def bad(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.folder / "bad").glob("*.reason")}

    async def until(self, found: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not found():
                await asyncio.sleep(0.005)

    def put(self, name: str, rcpts: list[str], data: str = "Subject: x\r\n\r\nx\r\n") -> None:
        lines = "".join(f"RCPT TO:<{rcpt}>\r\n" for rcpt in rcpts)
        (self.folder / ".new").write_text(f"MAIL FROM:<a@x>\r\n{lines}BDAT {len(data)} LAST\r\n{data}")
        (self.folder / ".new").rename(self.folder / name)


@asynccontextmanager
async def bench(folder: Path, relay: Relay, **local: Any) -> AsyncIterator[Bench]:
    config = Config.model_validate(
        {
            "hostname": "relay.example",
            "listener": [{"address": "127.0.0.1:25"}],
            "local": {"drop": str(folder), **local},
            "queue": {"max_age": "5d"},
        }
    )
    warnings: list[str] = []
    log = SimpleNamespace(event=lambda name, text: warnings.append(text))
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(4) as threads:
        admission = SimpleNamespace(
            loop=loop, config=config, threads=threads, now=loop.time, intake=SimpleNamespace(log=log, draining=False)
        )
        collector = Emptied(admission, None)  # type: ignore[arg-type]
        collector.relay, collector._serving = relay, set()
        try:
            yield Bench(folder, relay, collector, warnings)
        finally:
            await collector.end()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(collecting, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(collecting, "AGAIN_SECONDS", 0.02)


async def test_more_recipients_than_a_message_may_have_get_it_in_several(tmp_path):
    data = "Subject: x\r\n\r\n" + "x" * 70 + "\r\n"
    async with bench(tmp_path, Relay(most=10)) as one:
        one.put("1.drop", [f"{number}@x" for number in range(25)], data)
        await one.until(lambda: not one.names())
        assert one.relay.recipients == sorted(b"%d@x" % number for number in range(25))
        assert [(len(rcpts), found) for rcpts, found in one.relay.sent] == [
            (10, data.encode()),
            (10, data.encode()),
            (5, data.encode()),
        ]
        assert one.relay.connections == 1 and one.warnings == []


@pytest.mark.parametrize("errors", [1, 3, 20])
async def test_many_refused_recipients_keep_none_of_the_others_from_it(tmp_path, monkeypatch, errors):
    monkeypatch.setattr(collecting, "AGAIN_SECONDS", 600.0)  # it takes several connections, and not several attempts
    relay = Relay(errors=errors)
    relay.says = lambda command: b"550 5.1.1 Unknown" if b"<bad" in command else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", [f"{'bad' if number % 2 else 'good'}{number}@x" for number in range(60)])
        own = (await name_of(os.geteuid())).encode()
        await one.until(lambda: len(relay.sent) > 0 and not one.names() and relay.sent[-1][0] == [own])
        *sent, (_, notice) = relay.sent
        assert errors < 20 or relay.closed == 0, "each ends before"
        assert sorted(rcpt for rcpts, _ in sent for rcpt in rcpts) == sorted(b"good%d@x" % number for number in range(0, 60, 2))
        [reason] = one.bad().values()
        assert reason.startswith("it was sent, but not to these recipients:\n")
        assert reason.splitlines()[1:] == [f"<bad{number}@x> 550 5.1.1 Unknown" for number in range(1, 60, 2)]
        assert notice.count(b"550 5.1.1 Unknown") == 30


async def test_who_has_it_does_not_get_it_again_when_the_rest_waits(tmp_path):
    relay = Relay(most=2)
    now = [b"451 4.3.0 Not now"]
    relay.says = lambda command: now[0] if b"<c@x>" in command else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", ["a@x", "b@x", "c@x"])
        await one.until(lambda: relay.connections > 4)
        assert relay.sent[0][0] == [b"a@x", b"b@x"] and len(relay.sent) == 1
        now[0] = OK
        await one.until(lambda: not one.names())
        assert relay.recipients == [b"a@x", b"b@x", b"c@x"] and one.warnings == []


async def test_who_is_refused_for_now_keeps_nobody_else_from_it(tmp_path):
    relay = Relay()
    relay.says = lambda command: b"451 4.3.0 cannot be checked now" if b"<b" in command else OK
    async with bench(tmp_path, relay) as one:
        rcpts = [f"b{number}@x" for number in range(25)]
        one.put("1.drop", [*rcpts, "a@x", "c@x"])
        await one.until(lambda: len(relay.recipients) == 2)
        assert relay.recipients == [b"a@x", b"c@x"] and one.names() == ["1.drop"]
        relay.says = lambda command: OK
        await one.until(lambda: not one.names())
        assert relay.recipients == sorted([b"a@x", b"c@x", *(rcpt.encode() for rcpt in rcpts)])
    assert not one.warnings


async def test_those_behind_many_that_are_refused_for_now_have_their_turn(tmp_path):
    relay = Relay()
    relay.says = lambda command: b"451 4.3.0 later" if b"<later" in command else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", [*(f"later{number}@x" for number in range(collecting.LATER_MOST + 20)), "a@x"])
        await one.until(lambda: relay.recipients == [b"a@x"])


async def test_a_folder_that_the_configuration_does_not_have_any_more_is_left_alone(tmp_path):
    relay = Relay()
    async with bench(tmp_path, relay) as one:
        for number in range(20):
            one.put(f"{number:02}.drop", ["slow@x"])
        await one.until(lambda: relay.connections == collecting.OF_ONE)
        admission = one.collector._admission
        local = admission.config.local.model_copy(update={"drop": "off"})
        admission.config = admission.config.model_copy(update={"local": local})
        await one.until(lambda: not one.collector._folders["local.drop"][1].due)
        relay.go.set()
        await one.until(lambda: len(relay.recipients) == collecting.OF_ONE and not one.collector._folders)
        assert len(one.names()) == 20 - collecting.OF_ONE


async def test_a_connection_that_is_lost_after_some_were_refused_for_now_loses_nobody(tmp_path):
    relay = Relay()
    relay.says = lambda command: b"451 4.3.0 no" if b"<b@x>" in command else b"QUIT" if b"LAST" in command else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", ["b@x", "a@x"])
        await one.until(lambda: relay.connections > 2)
        relay.says = lambda command: OK
        await one.until(lambda: not one.names())
        assert relay.recipients == [b"a@x", b"b@x"]


@pytest.mark.skipif(os.geteuid() != 0, reason="files of other users need root")
async def test_files_of_one_user_that_take_long_keep_nobody_waiting(tmp_path):
    relay, pickup = Relay(), tmp_path / "pickup"
    pickup.mkdir()
    async with bench(tmp_path, relay, pickup=str(pickup)) as one:
        for number in range(3 * collecting.OF_ONE):
            one.put(f"{number}.drop", ["slow@x"])
        await one.until(lambda: relay.connections == collecting.OF_ONE)
        one.put("z.drop", ["ann@x"])
        os.chown(tmp_path / "z.drop", 1001, -1)
        (pickup / "1.eml").write_text("From: a@x\nTo: bob@x\n\nx\n")
        await one.until(lambda: relay.recipients == [b"ann@x", b"bob@x"])
        await one.until(lambda: len(one.names()) == 3 * collecting.OF_ONE)  # what was sent is removed a moment later
        assert relay.connections == collecting.OF_ONE + 2
        relay.go.set()
        await one.until(lambda: not one.names())
        assert relay.recipients.count(b"slow@x") == 3 * collecting.OF_ONE


async def test_what_is_refused_for_now_for_too_long_is_put_aside_and_told(tmp_path, monkeypatch):
    relay = Relay()
    relay.says = lambda command: b"452 4.3.1 Full" if b"<b@x>" in command else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", ["b@x"])
        await one.until(lambda: relay.connections > 3)
        assert one.names() == ["1.drop"] and relay.sent == []
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 6 * 86400)
        await one.until(lambda: relay.sent)
        assert "queue.max_age" in one.bad()["1.drop.reason"] and "4.3.1 Full" in one.bad()["1.drop.reason"]
        assert relay.sent[0][0] == [(await name_of(os.geteuid())).encode()] and b"4.3.1 Full" in relay.sent[0][1]
        assert one.names() == []


async def test_a_file_that_cannot_be_put_aside_ends_nothing(tmp_path, monkeypatch):
    relay = Relay()
    relay.says = lambda command: b"550 5.1.1 Unknown" if b"<bad@x>" in command else OK
    (tmp_path / "bad").write_text("in the way")
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", ["bad@x", "good@x"])
        await one.until(lambda: one.warnings)
        one.put("2.drop", ["good@x"])
        await one.until(lambda: one.names() == ["1.drop", "bad"])
        assert relay.recipients == [b"good@x"] * 2
        (tmp_path / "bad").unlink()
        await one.until(lambda: len(one.warnings) > 1)
        assert one.names() == [] and relay.recipients.count(b"good@x") == 2
        assert len(one.warnings) == 2 and "stays where it is" in one.warnings[0] and "was moved to bad/" in one.warnings[1]


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(5, "Input/output error")])
async def test_no_error_of_one_file_ends_it(tmp_path, monkeypatch, error):
    whole = dropped.Folder.open

    def fails(self, name):
        if name == "1.drop":
            raise error
        return whole(self, name)

    monkeypatch.setattr(dropped.Folder, "open", fails)
    async with bench(tmp_path, Relay()) as one:
        one.put("1.drop", ["a@x"])
        await one.until(lambda: one.warnings)
        one.put("2.drop", ["b@x"])
        await one.until(lambda: one.names() == ["1.drop"])
        monkeypatch.setattr(dropped.Folder, "open", whole)
        await one.until(lambda: not one.names())
        assert one.warnings == [f"{tmp_path}/1.drop stays where it is for now: {error.args[-1]}"]


async def test_no_error_of_a_folder_ends_it(tmp_path, monkeypatch):
    whole = dropped.Folder.names
    monkeypatch.setattr(dropped.Folder, "names", lambda *_: 1 / 0)
    async with bench(tmp_path, Relay()) as one:
        one.put("1.drop", ["a@x"])
        await one.until(lambda: one.warnings)
        await asyncio.sleep(0.05)
        assert len(one.warnings) == 1 and "local.drop" in one.warnings[0]
        monkeypatch.setattr(dropped.Folder, "names", whole)
        await one.until(lambda: not one.names())


async def test_a_file_that_takes_the_name_of_one_that_was_sent_is_sent(tmp_path, monkeypatch):
    whole, fails = dropped.Folder.remove, []

    def remove(self, name, identity):
        fails.append(name)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dropped.Folder, "remove", remove)
    async with bench(tmp_path, Relay()) as one:
        one.put("1.drop", ["a@x"])
        await one.until(lambda: len(fails) > 3)
        assert one.relay.recipients == [b"a@x"]
        one.put("1.drop", ["b@x"])
        monkeypatch.setattr(dropped.Folder, "remove", whole)
        await one.until(lambda: not one.names())
        assert one.relay.recipients == [b"a@x", b"b@x"]


async def test_a_pickup_folder_that_is_not_there_is_named_once(tmp_path):
    drop, pickup = tmp_path / "drop", tmp_path / "pickup"
    async with bench(drop, Relay(), pickup=str(pickup)) as one:
        await one.until(lambda: one.warnings)
        await asyncio.sleep(0.05)
        assert one.warnings == [f"local.pickup: {pickup}: No such file or directory"]
        pickup.mkdir()
        (pickup / "1.eml").write_text("From: a@x.example\nTo: b@x.example\n\n")
        await one.until(lambda: not any(pickup.iterdir()))
        assert one.relay.recipients == [b"b@x.example"]


async def test_what_is_known_of_files_that_are_gone_is_forgotten(tmp_path):
    relay = Relay()
    relay.says = lambda command: b"452 4.3.1 Full" if command.startswith(b"MAIL") else OK
    async with bench(tmp_path, relay) as one:
        one.put("1.drop", ["a@x"])
        await one.until(lambda: relay.connections > 2)
        [(_, state)] = one.collector._folders.values()
        assert state.later
        (tmp_path / "1.drop").unlink()
        await one.until(lambda: not state.later)
        assert (state.works, state.warned) == ({}, {})
        await one.until(lambda: (state.since, state.oldest) == ({}, None))


def gauges(one: Bench) -> dict[str, float]:
    found: dict[str, float] = {}
    one.collector.set_gauges(found.__setitem__)
    return {name.removeprefix("relaymta_"): value for name, value in found.items()}


async def test_what_waits_and_what_was_put_aside_is_counted(tmp_path):
    relay, pickup = Relay(), tmp_path / "pickup"
    pickup.mkdir()
    relay.says = lambda command: b"452 4.3.1 Full" if b"<later@x>" in command else OK
    async with bench(tmp_path, relay, pickup=str(pickup)) as one:
        one.put("1.drop", ["later@x"])
        one.put("2.drop", ["later@x"])
        (tmp_path / "3.drop").write_text("no message")
        (pickup / "4.eml").write_text("no message")
        wanted = {"drop_files": 2, "drop_bad_files": 1, "pickup_files": 0, "pickup_bad_files": 1, "pickup_oldest_seconds": 0.0}
        await one.until(lambda: gauges(one).items() >= wanted.items())
        [(_, state), _] = one.collector._folders.values()
        state.oldest -= 1000
        assert gauges(one)["drop_oldest_seconds"] >= 1000
        for bad in (tmp_path / "bad", pickup / "bad"):
            for file in bad.iterdir():
                file.unlink()
        relay.says = lambda command: OK
        await one.until(lambda: not any(gauges(one).values()))
        own = (await name_of(os.geteuid())).encode()
        assert relay.recipients == sorted([b"later@x", b"later@x", own]), "who has dropped what is no message is told"
        os.utime(tmp_path / "bad", (1, 1))  # what has not changed for a while is not looked through again
        await one.until(lambda: state.bad == 0)
        (tmp_path / "bad/5").touch()
        await one.until(lambda: state.bad == 1)
        await one.collector.end()
        assert not any(gauges(one).values())


async def test_a_folder_that_another_relay_empties_is_counted_there(tmp_path):
    relay = Relay()
    relay.says = lambda command: b"452 4.3.1 Full" if command.startswith(b"MAIL") else OK
    async with bench(tmp_path, relay) as first:
        first.put("1.drop", ["a@x"])
        await first.until(lambda: gauges(first)["drop_files"] == 1)
        async with bench(tmp_path, relay) as second:
            await asyncio.sleep(0.05)
            assert (gauges(first)["drop_files"], gauges(second)["drop_files"]) == (1, 0)
