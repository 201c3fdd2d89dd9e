"""Users of this machine: who they are, and as whom they send."""

import pwd
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
def test_as_whom_a_user_sends(name, own, others, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name=name))
    config = Config(hostname="mail.x.example", listener=[{"address": "127.0.0.1:25"}])
    identity = user.identified(config, 4242, "x.example")
    assert identity.name == name
    assert [one for one in own + others if identity.may_send_as(one)] == own


def test_the_system_is_asked_once_a_minute_for_a_name(monkeypatch):
    asked, now = [], [100.0]

    def look_up(uid):
        asked.append(uid)
        if uid == 2:
            raise KeyError
        return SimpleNamespace(pw_name=f"u{uid}")

    monkeypatch.setattr(pwd, "getpwuid", look_up)
    monkeypatch.setattr(user.time, "monotonic", lambda: now[0])
    assert [user.name_of(uid) for uid in (1, 2, 1, 2)] == ["u1", "2", "u1", "2"]
    assert asked == [1, 2]
    now[0] += user.KEPT_SECONDS
    assert user.name_of(1) == "u1" and asked == [1, 2, 1]
    for uid in range(5000):
        user.name_of(uid)
    assert len(user._known) <= user.KEPT_MOST


@pytest.mark.parametrize(("uid", "known", "unsure"), [(4242, False, True), (4242, True, False), (None, False, False)])
def test_a_user_without_a_name_is_refused_only_for_now_where_nobody_waits(uid, known, unsure, monkeypatch):
    """Of a message in the drop folder, while the directory of users does not answer."""

    def look_up(number):
        if known:
            return SimpleNamespace(pw_name="ann")
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", look_up)
    monkeypatch.setattr(user.Connection, "__init__", lambda *_: None)
    monkeypatch.setattr(user.Connection, "begin_session", lambda *_: None)
    logged_in = []
    connection = user.UserConnection(None, None, uid)
    connection.admission = SimpleNamespace(config=Config(hostname="mail.x.example", listener=[{"address": "127.0.0.1:25"}]))
    connection._uid = 4242
    connection.begin_session(SimpleNamespace(client=SimpleNamespace(domain="x.example"), log_in=logged_in.append), False)
    assert logged_in[0].unsure == unsure
    assert for_now(b"550 5.7.1 no\r\n") == b"451 4.7.1 no\r\n"
