"""TLS with hosts of an internal CA, and with hosts that want a certificate of ours; and what is said when it fails."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from relaymta.config import Route, Source
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.ourselves import Ourselves
from relaymta.send import trust
from relaymta.send.connect import ConnectFailed, Peer, Via, connect
from relaymta.send.session import Session
from relaymta.send.trust import Files, TrustFailed, context_of
from tests.support.daemon import wait_for
from tests.support.fake_mx import FakeMx
from tests.support.rows import Row, relay_for

CA, OTHER = trustme.CA(), trustme.CA()
OURS = CA.issue_cert("relay.example")


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files."""
    folder = tmp_path_factory.mktemp("pem")
    CA.cert_pem.write_to_path(folder / "ca.pem")
    OTHER.cert_pem.write_to_path(folder / "other.pem")
    OURS.private_key_and_cert_chain_pem.write_to_path(folder / "ours.pem")
    OURS.private_key_pem.write_to_path(folder / "key.pem")
    OURS.cert_chain_pems[0].write_to_path(folder / "chain.pem")
    OTHER.issue_cert("x").private_key_pem.write_to_path(folder / "wrong-key.pem")
    (folder / "empty.pem").write_text("")
    (folder / "text.pem").write_text("nonsense\n")
    return folder


def served(*names: str, wants: bool = False, authority: trustme.CA = CA) -> ssl.SSLContext:
    """A host's context; `wants`: it wants a certificate of a client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or ("localhost",))).configure_cert(context)
    if wants:
        CA.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


GOOD = {  # the name of the host; keys of its route; its context
    "starttls": ("localhost", 'ca_file="{}/ca.pem"', {}),
    "dot": ("localhost.", 'ca_file="{}/ca.pem"', {}),
    "login": ("localhost", 'ca_file="{}/ca.pem", username="me", password_env="RELAY_PASSWORD"', {}),
    "certificate": ("localhost", 'ca_file="{}/ca.pem", client_certificate="{}/ours.pem"', {"wants": True}),
    "certificate-and-key": (
        "localhost", 'ca_file="{}/ca.pem", client_certificate="{}/chain.pem", client_key="{}/key.pem"', {"wants": True},
    ),
}  # fmt: skip
FAILURES = {  # keys of the route; the host's context; what the operator reads
    "unknown-ca": ("", {}, ["is not trusted", "the system's trust store", "set ca_file of route unknown-ca"]),
    "other-ca": (
        'ca_file="{}/other.pem"', {}, ["is not trusted", "ca_file {}/other.pem", "add that CA's certificate to {}/other.pem"],
    ),
    "other-name": (
        'ca_file="{}/ca.pem"', {"names": ("elsewhere.test",)}, ["is not for the name localhost", "hosts of route other-name"],
    ),
    "no-certificate": ('ca_file="{}/ca.pem"', {"wants": True}, ["set client_certificate of route no-certificate"]),
    "missing-file": ('ca_file="{}/none.pem"', {}, ["ca_file {}/none.pem: No such file"]),
    "empty-file": ('ca_file="{}/empty.pem"', {}, ["ca_file {}/empty.pem: is empty"]),
    "no-pem": ('ca_file="{}/text.pem"', {}, ["ca_file {}/text.pem: no certificate in PEM"]),
    "wrong-key": (
        'ca_file="{}/ca.pem", client_certificate="{}/chain.pem", client_key="{}/wrong-key.pem"', {},
        ["client_key {}/wrong-key.pem: the key is not that of the certificate"],
    ),
    "missing-certificate": ('client_certificate="{}/none.pem"', {}, ["client_certificate {}/none.pem: No such file"]),
}  # fmt: skip
CHANGED = "changed-file"


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory, pem: Path) -> Iterator[dict[str, tuple[FakeMx, Row]]]:
    """The hosts of GOOD and FAILURES, and one whose CA's file is `changed.pem`, which has another CA's certificate; the route to
    each, in one relay; and one message under way to each."""
    (pem / "changed.pem").write_bytes((pem / "other.pem").read_bytes())
    given = GOOD | {name: ("localhost", keys, how) for name, (keys, how, _) in FAILURES.items()}
    given[CHANGED] = ("localhost", 'ca_file="{}/changed.pem"', {})
    with ExitStack() as stack:
        found = {}
        for name, (host, keys, how) in given.items():
            context = served(*how.get("names", ()), wants=how.get("wants", False))  # type: ignore[attr-defined]
            peer = stack.enter_context(FakeMx({}, tls=context))
            found[name] = peer, Row(name, f"{host}:{peer.port}", keys=f'tls="verify",{keys.replace("{}", str(pem))}'.rstrip(","))
        relay = relay_for(tmp_path_factory.mktemp("relay"), [row for _, row in found.values()], "delivery.first_retry=0.5")
        relay.environment = {"SSL_CERT_FILE": "/nonexistent", "RELAY_PASSWORD": "secret"}
        stack.enter_context(relay)
        for _, row in found.values():
            row.send()
        yield found


@pytest.mark.parametrize("how", GOOD)
def test_a_host_of_an_internal_ca(sent, how):
    """Credentials are sent, too, and a certificate. A dot at the end of the name is not part of it (RFC 6066 3)."""
    peer, row = sent[how]
    wait_for(lambda: peer.messages)
    (event,) = wait_for(lambda: row.events("delivered"))
    assert (event["peer"], event["address"], event["port"]) == ("localhost", "127.0.0.1", peer.port)
    assert event["tls"] == "TLSv1.3" and event["cipher"].startswith("TLS_")
    assert peer.credentials == ([b"\0me\0secret"] if how == "login" else [])
    assert not row.events("deferred")


class Implicit(FakeMx):
    """TLS begins with the first octet."""

    def _talk(self, sock: socket.socket) -> None:
        assert self.tls is not None
        with contextlib.suppress(OSError):
            super()._talk(self.tls.wrap_socket(sock, server_side=True))


def make(core: ClientSession, peer: str) -> Session:
    def nothing(*args: Any) -> None:
        pass

    return Session(core, peer, asyncio.get_running_loop().time, nothing, nothing, nothing)


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    ("name", "wants", "good"), [("localhost", False, True), ("localhost", True, True), ("other.test", False, False)]
)
async def test_implicit_tls_verifies_the_name_by_the_internal_ca(pem, monkeypatch, protocol, name, wants, good):
    """RFC 8314 3.3, port 465. The certificate is compared with the name, not with the address that was looked up."""
    files = Files(str(pem / "ca.pem"), str(pem / "ours.pem"))
    route = Route(name="out", hosts=["h"], protocol=protocol, tls="verify")
    with Implicit({}, tls=served(wants=wants), lmtp=protocol == "lmtp") as peer:
        monkeypatch.setattr("relaymta.send.connect.IMPLICIT_TLS_PORT", peer.port)
        via = Via(route, "us.test", 30.0, 30.0, "verify", Ourselves(set()), Source(name="x", address="127.0.0.1"))
        opening = connect(Peer(name, "127.0.0.1", peer.port, files=files), via, Any, make, 100)  # type: ignore[arg-type]
        if good:
            session = await opening
            assert session.link[:2] == ("127.0.0.1", peer.port) and session.link.tls == "TLSv1.3"
            session.fail("done")
        else:
            with pytest.raises(ConnectFailed, match=r"is not for the name other\.test") as failed:
                await opening
            assert failed.value.category == "tls"


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_says_which_check_failed_by_which_store_and_what_to_do(sent, pem, how):
    peer, row = sent[how]
    deferred, *_ = wait_for(lambda: row.events("deferred"))
    for part in ["localhost", *FAILURES[how][2]]:
        assert part.replace("{}", str(pem)) in deferred["reply"], deferred["reply"]
    assert deferred["cause"] == "tls"
    site, *_ = wait_for(lambda: row.events("site"))
    assert site["cause"] == "tls"
    assert peer.messages == []


def test_a_changed_file_is_used_without_a_reload(sent, pem):
    peer, row = sent[CHANGED]
    wait_for(lambda: row.events("deferred"))
    (pem / "changed.pem").write_bytes((pem / "ca.pem").read_bytes())
    wait_for(lambda: peer.messages)


@pytest.fixture
def forgotten() -> Iterator[None]:
    trust._known.clear()
    yield
    trust._known.clear()


def test_contexts_are_kept_and_what_was_read_stays_in_use(tmp_path, pem, forgotten):
    file = tmp_path / "ca.pem"
    file.write_bytes((pem / "ca.pem").read_bytes())
    files = Files(str(file))
    first = context_of("verify", files)
    assert context_of("verify", files) is first and context_of("verify") is not first
    assert context_of("may", files) is not first, "a session that was not verified is not resumed where that is needed"
    assert first.cert_store_stats()["x509_ca"] == 1, "no other CA is trusted"
    file.write_text("broken")
    assert context_of("verify", files) is first
    file.write_bytes((pem / "other.pem").read_bytes())
    os.utime(file, (1, 1))
    assert context_of("verify", files) is not first
    with pytest.raises(TrustFailed, match="No such file"):
        context_of("verify", Files(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({}, []),
        ({"ca_file": "ca.pem"}, []),
        ({"ca_file": "ca.pem", "client_certificate": "ours.pem"}, []),
        ({"client_certificate": "chain.pem", "client_key": "key.pem"}, []),
        ({"ca_file": "none.pem"}, ["ca_file"]),
        ({"ca_file": ""}, []),
        ({"ca_file": "text.pem"}, ["ca_file"]),
        ({"client_certificate": "chain.pem"}, ["client_certificate"]),
        ({"client_certificate": "chain.pem", "client_key": "none.pem"}, ["client_key"]),
        ({"client_certificate": "chain.pem", "client_key": "wrong-key.pem"}, ["client_key"]),
        ({"client_certificate": "."}, ["client_certificate"]),
    ],
)
def test_the_configuration_check_reads_the_files(pem, keys, found):
    given = {key: str(pem / name) if name else "" for key, name in keys.items()}
    problems = list(trust.problems(Route(hosts=["h"], tls="verify", **given)))
    assert [key for key, _ in problems] == found
    assert all(str(pem) in what for _, what in problems)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"ca_file": "x", "tls": "may"}, "ca_file: needs tls"),
        ({"client_certificate": "x", "tls": "off"}, "client_certificate: needs TLS"),
        ({"client_key": "x", "tls": "verify"}, "client_key: needs client_certificate"),
    ],
)
def test_keys_that_need_others(keys, problem):
    with pytest.raises(ValueError, match=problem):
        Route(hosts=["h"], **keys)
