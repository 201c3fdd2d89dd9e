"""TLS at smart hosts: each value of `tls`, and credentials only over verified TLS."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import FakeMx


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[FakeMx]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with FakeMx({}, tls=context) as made:
        yield made


def relay_to(peer: FakeMx, folder: Path, tls: str, trusted: bool, login: bool = False) -> Relay:
    account = ', username="me", password_env="RELAY_PASSWORD"' if login else ""
    route = f'route=[{{name="out", hosts=["localhost:{peer.port}"], tls="{tls}", messages_per_connection=1{account}}}]'
    made = Relay(folder, None, route, "delivery.first_retry=0.5")
    made.environment = {"RELAY_PASSWORD": "secret"}
    if trusted:
        made.environment["SSL_CERT_FILE"] = str(folder / "ca.pem")
    return made


def test_verified_tls_and_login(peer, tmp_path):
    with relay_to(peer, tmp_path, "verify", trusted=True, login=True) as relay:
        relay.send()
        wait_for(lambda: peer.messages)
        assert peer.credentials == [b"\0me\0secret"]


def test_an_unknown_certificate_gets_neither_credentials_nor_mail(peer, tmp_path):
    with relay_to(peer, tmp_path, "verify", trusted=False, login=True) as relay:
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        assert deferred["phase"] == "starttls"
        assert "certificate" in deferred["reply"]
        assert (peer.credentials, peer.messages) == ([], [])


@pytest.mark.parametrize("tls", ["may", "encrypt"])
def test_opportunistic_tls_accepts_any_certificate(peer, tmp_path, tls):
    with relay_to(peer, tmp_path, tls, trusted=False) as relay:
        relay.send()
        wait_for(lambda: peer.messages)
        assert peer.commands.count("STAR") == 1


def test_encrypt_never_sends_in_cleartext(tmp_path):
    with FakeMx({}) as plain, relay_to(plain, tmp_path, "encrypt", trusted=False) as relay:
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        assert "STARTTLS" in deferred["reply"]
        assert plain.messages == []


def test_credentials_need_verified_tls(tmp_path):
    with FakeMx({}) as plain, pytest.raises(AssertionError, match="username: needs tls"):
        relay_to(plain, tmp_path, "may", trusted=False, login=True).start()


def test_an_unreadable_password_defers_with_its_reason_and_is_read_again(peer, tmp_path):
    secret = tmp_path / "secret"
    route = f'route=[{{hosts=["localhost:{peer.port}"], tls="verify", username="me", password_file="{secret}", connections=1}}]'
    relay = Relay(tmp_path, None, route, "delivery.first_retry=0.5")
    relay.environment = {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}
    with relay:
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        assert "password_file" in deferred["reply"]
        secret.write_text("late\n")
        wait_for(lambda: peer.messages)
        assert peer.credentials == [b"\0me\0late"]


@pytest.mark.parametrize("tls", ["may", "verify"])
def test_a_tls_session_is_resumed_by_the_next_connection(peer, tmp_path, tls):
    with relay_to(peer, tmp_path, tls, trusted=True) as relay:
        for number in range(3):
            relay.send()
            wait_for(lambda number=number: len(peer.messages) > number)
        assert peer.resumed == [False, True, True]
