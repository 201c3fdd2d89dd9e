"""Users of this machine: who they are, and as whom they send."""

import asyncio
import pwd
import threading
from types import SimpleNamespace

import pytest

from relaymta.accept import user
from relaymta.config import Config
from relaymta.proto.reply import for_now


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(user, "_known", {})


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("ann", ["ann@x.example", "ann@mail.x.example"], ["bob@x.example", "ann@y.example"]),
        ("ann@corp.example", ["ann@corp.example"], ["ann@x.example", "ann@corp.example@x.example"]),
        ("CORP\\Ann", ["ann@x.example", "ann@mail.x.example"], ["corp@x.example", "ann@corp"]),
    ],
)
def test_as_whom_a_user_sends(name, own, others):
    config = Config(hostname="mail.x.example", listener=[{"address": "127.0.0.1:25"}])
    identity = user.identified(config, 4242, name, "x.example")
    assert identity.name == name
    assert [one for one in own + others if identity.may_send_as(one)] == own


async def test_the_system_is_asked_once_a_minute_for_a_name(monkeypatch):
    asked, now = [], [100.0]

    def look_up(uid):
        asked.append(uid)
        if uid == 2:
            raise KeyError
        return SimpleNamespace(pw_name=f"u{uid}")

    monkeypatch.setattr(pwd, "getpwuid", look_up)
    monkeypatch.setattr(user.time, "monotonic", lambda: now[0])
    assert user.known_name(1) is None
    together = await asyncio.gather(*map(user.name_of, (1, 2, 1, 2)))
    assert together == ["u1", "2", "u1", "2"] and sorted(asked) == [1, 2]
    assert [await user.name_of(1), user.known_name(1), user.known_name(2)] == ["u1", "u1", "2"] and len(asked) == 2
    now[0] += user.KEPT_SECONDS
    assert user.known_name(1) is None and await user.name_of(1) == "u1" and len(asked) == 3
    for uid in range(1100):
        await user.name_of(uid)
    assert len(user._known) <= user.KEPT_MOST and not user._asked


async def test_who_does_not_wait_for_a_name_any_more_keeps_nobody_else_from_it(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: go.wait(10) and SimpleNamespace(pw_name="ann"))
    first, second = asyncio.create_task(user.name_of(7)), asyncio.create_task(user.name_of(7))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    go.set()
    assert await second == "ann" and first.cancelled()


@pytest.mark.parametrize(("uid", "known", "unsure"), [(4242, False, True), (4242, True, False), (None, False, False)])
def test_a_user_without_a_name_is_refused_only_for_now_where_nobody_waits(uid, known, unsure, monkeypatch):
    """Of a message in the drop folder, while the directory of users does not answer."""
    monkeypatch.setattr(user.Connection, "__init__", lambda *_: None)
    monkeypatch.setattr(user.Connection, "begin_session", lambda *_: None)
    logged_in = []
    connection = user.UserConnection(None, None, uid)
    connection.admission = SimpleNamespace(config=Config(hostname="mail.x.example", listener=[{"address": "127.0.0.1:25"}]))
    connection._uid, connection._name = 4242, "ann" if known else "4242"
    connection.begin_session(SimpleNamespace(client=SimpleNamespace(domain="x.example"), log_in=logged_in.append), False)
    assert logged_in[0].unsure == unsure
    assert for_now(b"550 5.7.1 no\r\n") == b"451 4.7.1 no\r\n"


class Transport:
    """Of a client that is connected, or has gone."""

    def __init__(self) -> None:
        self.closing = self.paused = False

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def close(self) -> None:
        self.closing = True


async def test_only_so_many_wait_for_names(monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: go.wait(10) and SimpleNamespace(pw_name="ann"))
    monkeypatch.setattr(user, "WAITING_MOST", 3)
    monkeypatch.setattr(user.Connection, "connection_made", lambda *_: None)
    tasks: list[asyncio.Task] = []
    refused = SimpleNamespace(counters=SimpleNamespace(add=lambda *_: None))
    admission = SimpleNamespace(spawn=lambda work: tasks.append(asyncio.create_task(work)), intake=refused)
    transports = [Transport() for _ in range(5)]
    for transport in transports:
        user.UserConnection(admission, None, 4242).connection_made(transport)
    assert [transport.closing for transport in transports] == [False] * 3 + [True] * 2
    go.set()
    await asyncio.gather(*tasks)
    assert not user._waiting


@pytest.mark.parametrize("stays", [True, False])
async def test_a_client_is_greeted_when_its_name_is_known_and_nobody_else_waits_for_that(stays, monkeypatch):
    go, greeted = threading.Event(), []
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: go.wait(10) and SimpleNamespace(pw_name="ann"))
    monkeypatch.setattr(user.Connection, "connection_made", lambda one, line: greeted.append((one._name, line.paused)))
    tasks: list[asyncio.Task] = []
    admission = SimpleNamespace(spawn=lambda work: tasks.append(asyncio.create_task(work)))
    transport = Transport()
    connection = user.UserConnection(admission, None, 4242)
    connection.connection_made(transport)
    await asyncio.sleep(0.01)  # the loop goes on
    assert transport.paused and not greeted
    transport.closing = not stays
    go.set()
    await asyncio.gather(*tasks)
    assert (greeted, transport.paused) == (([("ann", True)], False) if stays else ([], True))
    connection = user.UserConnection(admission, None, 4242)
    connection.connection_made(Transport())
    assert greeted[-1] == ("ann", False) and len(tasks) == 1, "it is known now"
