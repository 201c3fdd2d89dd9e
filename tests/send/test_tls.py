"""TLS at smart hosts: each value of `tls`, and credentials only over verified TLS."""

from collections.abc import Iterator

import pytest
import trustme

from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.routed import Routed, server_context

LOGIN = 'username="me",password_env="RELAY_PASSWORD"'
ROUTES = [
    ("login", "login.test", f'hosts=["localhost:$login"],tls="verify",{LOGIN}'),
    ("unknown", "unknown.test", f'hosts=["localhost:$unknown"],tls="verify",{LOGIN}'),
    ("may", "may.test", 'hosts=["localhost:$may"],tls="may"'),
    ("encrypt", "encrypt.test", 'hosts=["localhost:$encrypt"],tls="encrypt"'),
    ("plain", "plain.test", 'hosts=["localhost:$plain"],tls="encrypt"'),
    (
        "unreadable", "unreadable.test",
        'hosts=["localhost:$unreadable"],tls="verify",username="me",password_file="$folder/secret",connections=1',
    ),
    ("resumed-may", "resumed-may.test", 'hosts=["localhost:$resumed_may"],tls="may",messages_per_connection=1'),
    ("resumed-verify", "resumed-verify.test", 'hosts=["localhost:$resumed_verify"],tls="verify",messages_per_connection=1'),
]  # fmt: skip


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    made = Routed(tmp_path_factory.mktemp("relay"), ROUTES, "delivery.first_retry=0.5")
    made.environment["RELAY_PASSWORD"] = "secret"
    with made:
        yield made


def send(relay: Relay, route: str) -> None:
    relay.send("Subject: hello\r\n\r\nhello\r\n", "a@b.example", f"c@{route}.test")


def test_verified_tls_and_login(relay):
    with FakeMx({}, relay.port_of("login"), tls=server_context(relay.authority)) as peer:
        send(relay, "login")
        wait_for(lambda: peer.messages)
        assert peer.credentials == [b"\0me\0secret"]


def test_an_unknown_certificate_gets_neither_credentials_nor_mail(relay):
    with FakeMx({}, relay.port_of("unknown"), tls=server_context(trustme.CA())) as peer:
        send(relay, "unknown")
        (deferred, *_) = wait_for(lambda: relay.of("deferred", "unknown"))
        assert deferred["phase"] == "starttls"
        assert "certificate" in deferred["reply"]
        assert (peer.credentials, peer.messages) == ([], [])


@pytest.mark.parametrize("tls", ["may", "encrypt"])
def test_opportunistic_tls_accepts_any_certificate(relay, tls):
    with FakeMx({}, relay.port_of(tls), tls=server_context(trustme.CA())) as peer:
        send(relay, tls)
        wait_for(lambda: peer.messages)
        assert peer.commands.count("STAR") == 1
    assert relay.metric(f'relaymta_tls_sessions_total{{policy="{tls}",result="encrypted"}}') >= 1


def test_encrypt_never_sends_in_cleartext(relay):
    with FakeMx({}, relay.port_of("plain")) as plain:
        send(relay, "plain")
        (deferred, *_) = wait_for(lambda: relay.of("deferred", "plain"))
        assert "STARTTLS" in deferred["reply"]
        assert plain.messages == []


def test_credentials_need_verified_tls(tmp_path):
    route = f'route=[{{name="out",hosts=["localhost:25"],tls="may",{LOGIN}}}]'
    with pytest.raises(AssertionError, match="username: needs tls"):
        Relay(tmp_path, None, route).start()


def test_an_unreadable_password_defers_with_its_reason_and_is_read_again(relay):
    with FakeMx({}, relay.port_of("unreadable"), tls=server_context(relay.authority)) as peer:
        send(relay, "unreadable")
        (deferred, *_) = wait_for(lambda: relay.of("deferred", "unreadable"))
        assert "password_file" in deferred["reply"]
        (relay.folder / "secret").write_text("late\n")
        wait_for(lambda: peer.messages)
        assert peer.credentials == [b"\0me\0late"]


@pytest.mark.parametrize("tls", ["may", "verify"])
def test_a_tls_session_is_resumed_by_the_next_connection(relay, tls):
    with FakeMx({}, relay.port_of(f"resumed_{tls}"), tls=server_context(relay.authority)) as peer:
        for number in range(3):
            send(relay, f"resumed-{tls}")
            wait_for(lambda number=number: len(peer.messages) > number)
        assert peer.resumed == [False, True, True]
