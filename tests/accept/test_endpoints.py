"""Submission as clients see it: TLS, certificates, AUTH, and allowed senders."""

import base64
import contextlib
import json
import os
import signal
import smtplib
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scramp
import trustme

from relaymta.accept.tickets import OCTETS, share
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx

SECRET = "correct horse"
_accounts: list[bytes] = []  # the accounts file as the command line wrote it for the first Endpoint


class Endpoint(Relay):
    """A relay with a submission port (STARTTLS and AUTH required), one with implicit TLS, and a certificate for both."""

    def __init__(self, folder: Path, smarthost: str, *settings: str, workers: int = 1) -> None:
        self.submission, self.implicit = free_port(), free_port()
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(folder / "ca.pem")
        self.certify(folder, "relay.example")
        super().__init__(folder, smarthost, *settings, workers=workers)
        self.config = folder / "relay.toml"
        self.config.write_text(
            f"""
hostname = "relay.example"
[[listener]]
address = "127.0.0.1:{self.port}"
[[listener]]
address = "127.0.0.1:{self.submission}"
tls = "require"
auth = "require"
submission = true
application = "people"
[[listener]]
address = "127.0.0.1:{self.implicit}"
tls = "implicit"
auth = "may"
[[certificate]]
chain = "{folder}/relay.example.pem"
[accounts]
file = "{folder}/accounts.toml"
answer_after = 0.1
failures = 1000
"""
        )
        self.write_accounts()

    def write_accounts(self) -> None:
        """Write the accounts file with ann in it, as the command line does."""
        file = self.folder / "accounts.toml"
        if _accounts:
            file.write_bytes(_accounts[0])
            file.chmod(0o600)
        else:
            self.account("user", "add", "ann", "--password", SECRET, "--scram")
            assert file.stat().st_mode & 0o777 == 0o600
            _accounts.append(file.read_bytes())

    def add_user(self, typed: str) -> int:
        """The exit status of `relaymta user add bob` with this as its input."""
        command = [self.python, "-m", "relaymta", "user", "add", "bob", "--config", str(self.config)]
        return subprocess.run(command, input=typed, text=True, capture_output=True).returncode

    def certify(self, folder: Path, *names: str) -> None:
        """Write a certificate and its key into one file."""
        found = self.authority.issue_cert(*names)
        fresh = folder / "fresh.pem"
        fresh.write_bytes(b"".join(blob.bytes() for blob in found.cert_chain_pems) + found.private_key_pem.bytes())
        fresh.replace(folder / f"{names[0]}.pem")

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def account(self, *words: str, check: bool = True) -> str:
        """The output of `relaymta user|app ...`."""
        found = self.cli(*words, "--config", str(self.config), check=check)
        return found.stdout + found.stderr

    def context(self) -> ssl.SSLContext:
        """A client's TLS context that trusts the test CA."""
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def client(self, port: int = 0, tls: bool = True) -> smtplib.SMTP:
        """A client connected to the submission port, after STARTTLS."""
        made = smtplib.SMTP("127.0.0.1", port or self.submission)
        made._host = "relay.example"  # type: ignore[attr-defined]
        if tls:
            made.starttls(context=self.context())
        made.ehlo()
        return made


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.fixture(scope="module")
def endpoint(peer: FakeMx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A relay for the tests that change none of its files but for accounts of their own. It has a second certificate."""
    folder = tmp_path_factory.mktemp("endpoint")
    made = Endpoint(folder, f"127.0.0.1:{peer.port}")
    made.certify(folder, "mail.other.example", "*.wild.example")
    with made.config.open("a") as file:
        file.write(f'[[certificate]]\nchain = "{folder}/mail.other.example.pem"\n')
    with made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Endpoint]:
    """A relay of the test's own, for tests that break or replace its files. What it accepts stays in the queue."""
    with Endpoint(tmp_path, "127.0.0.1:1") as made:
        yield made


def arrived(peer: FakeMx, *to: str) -> list[bytes]:
    """The messages to just these recipients."""
    return [text for _, recipients, text in peer.messages if recipients == list(to)]


def queued(endpoint: Endpoint, *to: str) -> list[dict[str, Any]]:
    """The log's events of the messages to just these recipients."""
    return [event for event in endpoint.events("queued") if event["recipients"] == list(to)]


def scram(client: smtplib.SMTP, user: str, password: str) -> int:
    """The code of the last reply to AUTH SCRAM-SHA-256 by scramp's client."""
    ours = scramp.ScramClient(["SCRAM-SHA-256"], user, password)
    code, text = client.docmd("AUTH", "SCRAM-SHA-256 " + base64.b64encode(ours.get_client_first().encode()).decode())
    assert code == 334
    ours.set_server_first(base64.b64decode(text).decode())
    code, text = client.docmd(base64.b64encode(ours.get_client_final().encode()).decode())
    if code == 334:
        ours.set_server_final(base64.b64decode(text).decode())
        code, text = client.docmd("")
    return code


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256"])
def test_an_authenticated_user_may_relay(endpoint, peer, mechanism):
    to, before = f"{mechanism}@far.example", len(endpoint.events("login"))
    with endpoint.client() as client:
        assert client.esmtp_features["auth"].split() == ["SCRAM-SHA-256", "PLAIN", "LOGIN"]
        assert "starttls" not in client.esmtp_features
        if mechanism == "SCRAM-SHA-256":
            assert scram(client, "ann", SECRET) == 235
        else:
            client.user, client.password = "ann", SECRET
            assert client.auth(mechanism, getattr(client, f"auth_{mechanism.lower()}"))[0] == 235
        client.sendmail("ann@a.example", [to], "Subject: hi\r\n\r\nhi\r\n")
    (text,) = wait_for(lambda: arrived(peer, to))
    assert b"with ESMTPSA id" in text and b"Message-ID: <" in text
    (event,) = wait_for(lambda: queued(endpoint, to))
    assert (event["sender"], event["application"], event["user"]) == ("ann@a.example", "people", "ann")
    assert [event["good"] for event in endpoint.events("login")[before:]] == [True]


def test_implicit_tls(endpoint, peer):
    with smtplib.SMTP_SSL("127.0.0.1", endpoint.implicit, context=_unnamed(endpoint)) as client:
        assert client.sock.version() == "TLSv1.3"
        client.login("ann", SECRET)
        client.sendmail("ann@a.example", ["implicit@far.example"], "Subject: hi\r\n\r\nhi\r\n")
    wait_for(lambda: arrived(peer, "implicit@far.example"))


@pytest.mark.parametrize("way", ["STARTTLS", "implicit", "clear"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_received_names_tls_as_the_client_sees_it(endpoint, peer, way, version):
    """RFC 8314 4.4; and the log names the Message-ID."""
    context = _unnamed(endpoint)
    context.maximum_version = version
    expected, to = [], f"{way}-{version}@received.example"
    if way == "implicit":
        client: smtplib.SMTP = smtplib.SMTP_SSL("127.0.0.1", endpoint.implicit, context=context)
    else:
        client = smtplib.SMTP("127.0.0.1", endpoint.submission if way == "STARTTLS" else endpoint.port)
    with client:
        if way == "STARTTLS":
            client.starttls(context=context)
        if way != "clear":
            client.login("ann", SECRET)
            name, _, bits = client.sock.cipher()  # type: ignore[union-attr]
            expected = [f"\t(using {client.sock.version()} with cipher {name} ({bits}/{bits} bits))"]  # type: ignore[union-attr]
        client.sendmail("ann@a.example", [to], "Subject: hi\r\nMessage-ID:\r\n <1@x>\r\nBcc: q@x\r\n\r\nhi\r\n")
    (text,) = wait_for(lambda: arrived(peer, to))
    field = text[: text.index(b"\r\n\tby relay.example")].decode()
    assert field.splitlines()[1:] == expected
    assert (b"Bcc" in text) == (way == "clear")
    assert [event["message_id"] for event in wait_for(lambda: queued(endpoint, to))] == ["<1@x>"]


def _unnamed(endpoint: Endpoint) -> ssl.SSLContext:
    context = endpoint.context()
    context.check_hostname = False  # smtplib verifies the IP address there
    return context


def test_neither_auth_nor_mail_is_accepted_before_tls(endpoint):
    with endpoint.client(tls=False) as client:
        assert "auth" not in client.esmtp_features and "starttls" in client.esmtp_features
        assert client.docmd("AUTH", "PLAIN AGFubgBjb3JyZWN0IGhvcnNl")[0] == 538
        assert client.mail("ann@a.example")[0] == 530
        client.starttls(context=endpoint.context())
        client.ehlo()
        assert client.mail("ann@a.example") == (530, b"5.7.0 Authentication required")
    with endpoint.client(endpoint.port) as client:  # the port for mail offers TLS, but no AUTH
        assert "auth" not in client.esmtp_features
        assert client.docmd("AUTH", "PLAIN AGFubgBjb3JyZWN0IGhvcnNl")[0] == 502


def test_what_is_pipelined_behind_starttls_is_never_executed(endpoint):
    for command in (b"RSET\r\n", b"MAIL FROM:<a@b>\r\n", b"EHLO evil\r\n", b"AUTH LOGIN\r\n", b"QUIT\r\n"):
        for pause in (0.0, 0.05):
            # Either it arrived with STARTTLS and is rejected, or during the handshake; a TLS alert is no reply.
            assert replies_behind_starttls(endpoint, command, pause) in ([b"554"], [b"220"])
    with endpoint.client() as client:  # other clients are not affected
        client.login("ann", SECRET)


def replies_behind_starttls(endpoint: Endpoint, command: bytes, pause: float) -> list[bytes]:
    with socket.create_connection(("127.0.0.1", endpoint.submission)) as sock:
        sock.settimeout(10)
        sock.recv(1000)
        sock.sendall(b"EHLO me\r\n")
        sock.recv(1000)
        sock.sendall(b"STARTTLS\r\n" + (command if not pause else b""))
        if pause:
            time.sleep(pause)
            sock.sendall(command)
        received = b""
        while piece := sock.recv(1000):
            received += piece
    return [line[:3] for line in received.split(b"\r\n") if line[:3].isdigit()]


def test_session_state_from_before_tls_is_discarded(endpoint):
    with endpoint.client(tls=False) as client:
        client.docmd("STARTTLS")
        client.sock = endpoint.context().wrap_socket(client.sock, server_hostname="relay.example")
        client.file = None
        assert client.mail("a@b.example") == (503, b"5.5.1 Say EHLO first")


def test_a_failed_handshake_does_not_affect_others(endpoint):
    failed = 'relaymta_tls_handshakes_total{result="failed"}'
    before = endpoint.metric(failed)
    for noise in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x05hello"):
        with socket.create_connection(("127.0.0.1", endpoint.implicit)) as sock:
            sock.sendall(noise)
    wait_for(lambda: endpoint.metric(failed) >= before + 3)
    wait_for(lambda: endpoint.metric("relaymta_connections") == 0)
    assert "Traceback" not in (endpoint.folder / "stderr").read_text()
    with endpoint.client() as client:
        client.login("ann", SECRET)


def certificate(endpoint: Endpoint, name: str = "relay.example") -> bytes:
    """The certificate that a client gets for the SNI `name`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", endpoint.implicit)) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
        assert tls.recv(100).startswith(b"220")
        return tls.getpeercert(True) or b""


def test_a_broken_file_changes_nothing_and_a_replaced_certificate_is_used(own):
    before = certificate(own)
    with own.client() as client:
        client.login("ann", SECRET)
        (own.folder / "relay.example.pem").write_text("broken")
        with (own.folder / "accounts.toml").open("a") as file:
            file.write('\n[[account]]\nname = "bob"\nsecretz = []\n')
        wait_for(lambda: own.metric("relaymta_tls_certificate_errors") == 1)
        assert certificate(own) == before
        reported = "no certificate in PEM form; what was read before stays"
        wait_for(lambda: any(reported in event["text"] for event in own.events("warning")))
        wait_for(lambda: own.metric("relaymta_accounts_file_errors") == 1)
        (text,) = wait_for(lambda: [event["text"] for event in own.events("warning") if "secretz" in event["text"]])
        assert 'accounts.toml:7: account.1.secretz: no such key (did you mean "secrets"?)' in text
        with own.client() as other:
            other.login("ann", SECRET)
        own.certify(own.folder, "relay.example")
        wait_for(lambda: certificate(own) != before)
        wait_for(lambda: own.metric("relaymta_tls_certificate_errors") == 0)
        assert client.noop()[0] == 250  # the older session continues
        client.sendmail("ann@a.example", ["x@far.example"], "Subject: hi\r\n\r\nhi\r\n")
    found = own.cli("config", "check", "--config", str(own.config), check=False)
    assert found.returncode == 78 and "secretz" in found.stderr


def test_the_certificate_is_selected_by_sni(endpoint):
    first, second = certificate(endpoint), certificate(endpoint, "mail.other.example")
    assert first != second
    assert certificate(endpoint, "any.WILD.example") == second
    assert certificate(endpoint, "unknown.example") == first


def test_a_session_is_resumed(endpoint):
    resumptions = 'relaymta_tls_handshakes_total{result="resumed"}'
    context, before = endpoint.context(), endpoint.metric(resumptions)
    session = None
    for resumed in (False, True):
        with socket.create_connection(("127.0.0.1", endpoint.implicit)) as sock:
            with context.wrap_socket(sock, server_hostname="relay.example", session=session) as tls:
                tls.recv(100)
                session = tls.session
                assert tls.session_reused is resumed
    assert endpoint.metric(resumptions) == before + 1


def test_a_session_is_resumed_by_any_worker(tmp_path):
    with Endpoint(tmp_path, "127.0.0.1:1", workers=2) as endpoint:
        context, session = endpoint.context(), None
        for number in range(12):
            with socket.create_connection(("127.0.0.1", endpoint.implicit)) as sock:
                with context.wrap_socket(sock, server_hostname="relay.example", session=session) as tls:
                    tls.recv(100)
                    assert tls.session_reused is (number > 0)
                    session = tls.session
            if number == 8:  # with another certificate and another worker, too
                endpoint.certify(tmp_path, "relay.example")
                victim = endpoint.worker_pids()[0]
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda victim=victim: len(pids := endpoint.worker_pids()) == 2 and victim not in pids)
                time.sleep(2.5)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tickets_of_other_keys_are_not_accepted(tmp_path, version):
    authority = trustme.CA()
    found = authority.issue_cert("relay.example")
    contexts = []
    for _ in range(2):
        contexts.append(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        found.configure_cert(contexts[-1])
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.maximum_version = version
    authority.configure_trust(client)

    def resumed(server: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession]:
        into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        one = server.wrap_bio(into, out, server_side=True)
        other = client.wrap_bio(out, into, server_hostname="relay.example", session=session)
        for step in (
            other.do_handshake,
            one.do_handshake,
            other.do_handshake,
            one.do_handshake,
            lambda: one.write(b"x"),
            other.read,
        ):
            with contextlib.suppress(ssl.SSLWantReadError):
                step()
        return other.session_reused, other.session

    keys = os.urandom(OCTETS)
    assert share(contexts[0], keys) and share(contexts[1], keys)
    first, session = resumed(contexts[0], None)
    assert not first and resumed(contexts[1], session)[0]
    assert share(contexts[1], os.urandom(OCTETS))
    assert not resumed(contexts[1], session)[0]


def test_scram_does_not_distinguish_unknown_users(endpoint):
    """Neither salts nor iterations reveal whether an account exists."""
    endpoint.account("app", "create", "store")

    def reported(user: str) -> tuple[str, str]:
        with endpoint.client() as client:
            first = base64.b64encode(f"n,,n={user},r=abc".encode()).decode()
            code, text = client.docmd(f"AUTH SCRAM-SHA-256 {first}")
            assert code == 334 and client.docmd("*")[0] == 501
            fields = dict(part.split("=", 1) for part in base64.b64decode(text).decode().split(","))
            return fields["s"], fields["i"]

    wait_for(lambda: reported("store")[1] == "4096")
    assert reported("ann")[1] == "65536"
    found = {user: reported(user) for user in (f"nobody{number}" for number in range(24))}
    assert {iterations for _, iterations in found.values()} == {"4096", "65536"}
    assert len({salt for salt, _ in found.values()}) == 24 and reported("nobody3") == found["nobody3"]


def test_an_added_user_is_recorded_and_scram_is_offered_while_it_works_for_all_accounts(own):
    def offered() -> bool:
        with own.client() as client:
            return "SCRAM-SHA-256" in client.esmtp_features["auth"]

    assert offered()
    assert [own.add_user("builder\n"), own.add_user("again\n"), own.add_user("")] == [0, 1, 64]  # stored as argon2id
    wait_for(lambda: not offered())
    for name, password in (("bob", "builder"), ("ann", SECRET)):
        with _logged_in(own, name, password) as client:
            client.sendmail("x@b.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
    events = wait_for(lambda: len(found := own.events("queued")) == 2 and found)
    assert [event["user"] for event in events] == ["bob", "ann"]
    assert "logged in as bob" in own.cli("message", "show", events[0]["id"]).stdout
    own.cli("queue", "hold", "--user", "bob")  # as after a stolen password
    (held,) = [json.loads(line) for line in own.cli("queue", "list", "--held", "--json").stdout.splitlines()]
    assert held["id"] == events[0]["id"]
    own.account("user", "password", "bob", "--password", "builder", "--scram")
    wait_for(offered)


def _logged_in(endpoint: Endpoint, name: str, password: str) -> smtplib.SMTP:
    client = endpoint.client()
    client.login(name, password)
    return client


def test_an_application_sends_only_as_itself(endpoint, peer):
    to = "x@shops.example"
    said = endpoint.account("app", "create", "shop", "--sender", "@shop.example", "--sender", "Boss@corp.example")
    key = said.partition("secret: ")[2].split()[0]
    assert 'shop.example. TXT "v=spf1 a:relay.example -all"' in said

    def login() -> smtplib.SMTP:
        client = endpoint.client()
        client.login("shop", key)
        return client

    wait_for(lambda: _try(login))
    with login() as client:
        code, text = client.mail("a@elsewhere.example")
        assert (code, text) == (550, b"5.7.1 shop may not send as <a@elsewhere.example> (senders of its account)")
        with pytest.raises(smtplib.SMTPDataError) as refused:
            client.sendmail("a@shop.example", [to], "From: <ceo@elsewhere.example>\r\n\r\nx\r\n")
        assert refused.value.smtp_code == 550 and b"<ceo@elsewhere.example>" in refused.value.smtp_error
        long = b"X-Long: " + (b"x" * 900 + b"\r\n ") * 150 + b"x\r\nFrom: <ceo@elsewhere.example>\r\n\r\nx\r\n"
        with pytest.raises(smtplib.SMTPDataError) as refused:  # nor after the part of a header that is checked
            client.sendmail("a@shop.example", [to], long)
        assert refused.value.smtp_code == 554
        hidden = ["a@shop.example(<ceo@elsewhere.example>", "ceo@elsewhere.example@, a@shop.example", "...@:a@shop.example;",
                  '"ceo@elsewhere.example" <a@shop.example', "=?utf-8?q?ceo=40bank.test=3E?=@shop.example", ""]  # fmt: skip
        for value in hidden:  # malformed so that others may read another author
            for name in ("From", "from ", "Sender"):
                text = f"Subject: x\r\n{name}: {value}\r\nFrom: a@shop.example\r\n\r\nx\r\n"
                with pytest.raises(smtplib.SMTPDataError) as refused:
                    client.sendmail("a@shop.example", [to], text.encode())
                assert (refused.value.smtp_code, refused.value.smtp_error[:5]) == (550, b"5.6.0"), text
        client.sendmail("a@SHOP.example", [to], "From: boss@corp.example\r\n\r\nx\r\n")
        client.sendmail("", [to], "From: a@shop.example\r\n\r\nx\r\n")
    wait_for(lambda: len(arrived(peer, to)) == 2)
    wait_for(lambda: [event["application"] for event in queued(endpoint, to)] == ["shop", "shop"])


def _try(login) -> bool:
    try:
        login().quit()
    except smtplib.SMTPAuthenticationError:
        return False
    return True


def test_keys_are_rotated_with_an_overlap_and_ended(endpoint, tmp_path):
    first = endpoint.account("app", "create", "rotated").partition("secret: ")[2].split()[0]
    second = endpoint.account("app", "rotate", "rotated", "--overlap", "1h").partition("secret: ")[2].split()[0]

    def opens(key: str) -> bool:
        with endpoint.client() as client:
            try:
                return client.login("rotated", key)[0] == 235
            except smtplib.SMTPAuthenticationError:
                return False

    wait_for(lambda: opens(second))
    assert opens(first)
    for key in (first, second):
        with endpoint.client() as client:
            assert scram(client, "rotated", key) == 235
    with endpoint.client() as client:
        assert scram(client, "rotated", "neither") == 535
    rows = [json.loads(line) for line in endpoint.account("app", "list", "--json").splitlines()]
    rotated = next(row for row in rows if row["name"] == "rotated")
    assert [bool(secret["expires"]) for secret in rotated["secrets"]] == [False, True]
    endpoint.account("app", "rotate", "rotated", "--overlap", "0s")
    wait_for(lambda: not opens(second) and not opens(first))
    endpoint.account("app", "expire", "rotated")
    assert "ann" in endpoint.account("user", "list")
    (tmp_path / "accounts.toml").write_bytes((endpoint.folder / "accounts.toml").read_bytes())
    copy = ("--set", f"accounts.file={tmp_path}/accounts.toml")
    endpoint.account("user", "remove", "ann", *copy)
    assert "ann" not in endpoint.account("user", "list", *copy)
    assert "did you mean" in endpoint.account("app", "expire", "rotatid", check=False)


def test_brute_force_is_limited_and_locks_no_owner_out(peer, tmp_path):
    with Endpoint(tmp_path, f"127.0.0.1:{peer.port}", "accounts.failures=4", "accounts.failures_forgotten=60") as endpoint:

        def attempt(user: str, password: str, source: str) -> tuple[int, bytes]:
            with smtplib.SMTP("127.0.0.1", endpoint.submission, source_address=(source, 0)) as client:
                client._host = "relay.example"
                client.starttls(context=endpoint.context())
                client.ehlo()
                code, text = client.docmd("AUTH", "PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()).decode())
                return code, text

        wrong, unknown = attempt("ann", "x", "127.0.0.2"), attempt("nobody", "x", "127.0.0.2")
        assert wrong == unknown == (535, b"5.7.8 Authentication credentials invalid")
        codes = [attempt("ann", "x", "127.0.0.2")[0] for _ in range(4)]
        assert codes == [535, 535, 454, 454]
        assert attempt("ann", SECRET, "127.0.0.2")[0] == 454  # the right password, but the limit is reached
        for number in range(3, 6):  # the account is under attack from many addresses
            attempt("ann", "x", f"127.0.0.{number}")
        assert attempt("ann", SECRET, "127.0.0.3")[0] == 454
        assert attempt("ann", SECRET, "127.0.0.9")[0] == 235  # its owner, from an address without failures
        assert endpoint.metric('relaymta_logins_total{result="limited"}') >= 4


def test_keys_and_accounts_are_checked_as_the_relays_user(tmp_path):
    if os.geteuid():
        pytest.skip("only root can change its user")
    endpoint = Endpoint(tmp_path, "127.0.0.1:1")
    (endpoint.folder / "relay.example.pem").chmod(0o600)
    endpoint.folder.chmod(0o755)
    for path in (endpoint.folder, *endpoint.folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o055)
    found = endpoint.cli("config", "check", "--config", str(endpoint.config), "--set", "user=nobody", check=False)
    assert found.returncode == 78
    assert "relay.example.pem: Permission denied" in found.stderr and "accounts.toml: Permission denied" in found.stderr
