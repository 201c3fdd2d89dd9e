"""Submission as clients see it: TLS, certificates, AUTH, and who may send as whom."""

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

import pytest
import scramp
import trustme

from relaymta.accept.tickets import OCTETS, share
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx

SECRET = "correct horse"


class Door(Relay):
    """A relay with a submission port (STARTTLS and AUTH demanded), one with TLS from the start, and a certificate for both."""

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
        self.account("user", "add", "ann", "--password", SECRET, "--scram")

    def add_user(self, typed: str) -> int:
        """`relaymta user add bob` with this as its input: the exit status."""
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
        """`relaymta user|app ...`: what it says."""
        found = self.cli(*words, "--config", str(self.config), check=check)
        return found.stdout + found.stderr

    def context(self) -> ssl.SSLContext:
        """A client's, which knows our authority."""
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def client(self, port: int = 0, tls: bool = True) -> smtplib.SMTP:
        """Connected to the submission port, past STARTTLS."""
        made = smtplib.SMTP("127.0.0.1", port or self.submission)
        made._host = "relay.example"  # type: ignore[attr-defined]
        if tls:
            made.starttls(context=self.context())
        made.ehlo()
        return made


@pytest.fixture
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


@pytest.fixture
def door(peer: FakeMx, tmp_path: Path) -> Iterator[Door]:
    with Door(tmp_path, f"127.0.0.1:{peer.port}") as made:
        yield made


def scram(client: smtplib.SMTP, user: str, password: str) -> int:
    """AUTH SCRAM-SHA-256 by scramp's client: the last reply's code."""
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
def test_who_logs_in_over_tls_sends_anywhere(door, peer, mechanism):
    with door.client() as client:
        assert client.esmtp_features["auth"].split() == ["SCRAM-SHA-256", "PLAIN", "LOGIN"]
        assert "starttls" not in client.esmtp_features
        if mechanism == "SCRAM-SHA-256":
            assert scram(client, "ann", SECRET) == 235
        else:
            client.user, client.password = "ann", SECRET
            assert client.auth(mechanism, getattr(client, f"auth_{mechanism.lower()}"))[0] == 235
        client.sendmail("ann@a.example", ["x@far.example"], "Subject: hi\r\n\r\nhi\r\n")
    ((sender, to, text),) = wait_for(lambda: peer.messages)
    assert (sender, to) == ("ann@a.example", ["x@far.example"])
    assert b"with ESMTPSA id" in text and b"Message-ID: <" in text
    (event,) = wait_for(lambda: door.events("queued"))
    assert event["application"] == "people"
    assert [event["good"] for event in door.events("login")] == [True]


def test_tls_from_the_first_octet(door, peer):
    with smtplib.SMTP_SSL("127.0.0.1", door.implicit, context=_unnamed(door)) as client:
        assert client.sock.version() == "TLSv1.3"
        client.login("ann", SECRET)
        client.sendmail("ann@a.example", ["x@far.example"], "Subject: hi\r\n\r\nhi\r\n")
    wait_for(lambda: peer.messages)


def _unnamed(door: Door) -> ssl.SSLContext:
    context = door.context()
    context.check_hostname = False  # smtplib asks for the address's name there
    return context


def test_nothing_is_told_or_taken_before_tls(door):
    with door.client(tls=False) as client:
        assert "auth" not in client.esmtp_features and "starttls" in client.esmtp_features
        assert client.docmd("AUTH", "PLAIN AGFubgBjb3JyZWN0IGhvcnNl")[0] == 538
        assert client.mail("ann@a.example")[0] == 530
        client.starttls(context=door.context())
        client.ehlo()
        assert client.mail("ann@a.example") == (530, b"5.7.0 Authentication required")
    with door.client(door.port) as client:  # the port for mail has TLS, and no AUTH
        assert "auth" not in client.esmtp_features
        assert client.docmd("AUTH", "PLAIN AGFubgBjb3JyZWN0IGhvcnNl")[0] == 502


def test_what_is_pipelined_behind_starttls_is_never_executed(door):
    for command in (b"RSET\r\n", b"MAIL FROM:<a@b>\r\n", b"EHLO evil\r\n", b"AUTH LOGIN\r\n", b"QUIT\r\n"):
        for pause in (0.0, 0.05):
            # Either it came at once and is refused, or it came where a handshake was expected; TLS's alert is no reply.
            assert replies_behind_starttls(door, command, pause) in ([b"554"], [b"220"])
    with door.client() as client:  # and others go on
        client.login("ann", SECRET)


def replies_behind_starttls(door: Door, command: bytes, pause: float) -> list[bytes]:
    with socket.create_connection(("127.0.0.1", door.submission)) as sock:
        sock.settimeout(10)
        sock.recv(1000)
        sock.sendall(b"EHLO me\r\n")
        sock.recv(1000)
        sock.sendall(b"STARTTLS\r\n" + (command if not pause else b""))
        if pause:
            time.sleep(pause)
            sock.sendall(command)
        heard = b""
        while piece := sock.recv(1000):
            heard += piece
    return [line[:3] for line in heard.split(b"\r\n") if line[:3].isdigit()]


def test_what_was_said_before_tls_is_forgotten(door):
    with door.client(tls=False) as client:
        client.docmd("STARTTLS")
        client.sock = door.context().wrap_socket(client.sock, server_hostname="relay.example")
        client.file = None
        assert client.mail("a@b.example") == (503, b"5.5.1 Say EHLO first")


def test_a_failed_handshake_harms_nobody(door):
    for noise in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x05hello"):
        with socket.create_connection(("127.0.0.1", door.implicit)) as sock:
            sock.sendall(noise)
    wait_for(lambda: door.metric('relaymta_tls_handshakes_total{result="failed"}') >= 3)
    wait_for(lambda: door.metric("relaymta_connections") == 0)
    assert "Traceback" not in (door.folder / "stderr").read_text()
    with door.client() as client:
        client.login("ann", SECRET)


def certificate(door: Door, name: str = "relay.example") -> bytes:
    """What a client that asks for `name` is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", door.implicit)) as sock, context.wrap_socket(sock, server_hostname=name) as tls:
        assert tls.recv(100).startswith(b"220")
        return tls.getpeercert(True) or b""


def test_a_replaced_certificate_is_used_and_a_broken_one_is_not(door):
    before = certificate(door)
    with door.client() as client:
        client.login("ann", SECRET)
        (door.folder / "relay.example.pem").write_text("broken")
        wait_for(lambda: door.metric("relaymta_tls_certificate_errors") == 1)
        assert certificate(door) == before
        told = "no certificate in PEM form; what was read before stays"
        wait_for(lambda: any(told in event["text"] for event in door.events("warning")))
        door.certify(door.folder, "relay.example")
        wait_for(lambda: certificate(door) != before)
        wait_for(lambda: door.metric("relaymta_tls_certificate_errors") == 0)
        assert client.noop()[0] == 250  # the session from before goes on
        client.sendmail("ann@a.example", ["x@far.example"], "Subject: hi\r\n\r\nhi\r\n")


def test_the_certificate_is_the_one_for_the_name_that_is_asked_for(peer, tmp_path):
    made = Door(tmp_path, f"127.0.0.1:{peer.port}")
    made.certify(tmp_path, "mail.other.example", "*.wild.example")
    with made.config.open("a") as file:
        file.write(f'[[certificate]]\nchain = "{tmp_path}/mail.other.example.pem"\n')
    with made:
        first, second = certificate(made), certificate(made, "mail.other.example")
        assert first != second
        assert certificate(made, "any.WILD.example") == second
        assert certificate(made, "unknown.example") == first


def test_a_session_is_resumed(door):
    context = door.context()
    session = None
    for resumed in (False, True):
        with socket.create_connection(("127.0.0.1", door.implicit)) as sock:
            with context.wrap_socket(sock, server_hostname="relay.example", session=session) as tls:
                tls.recv(100)
                session = tls.session
                assert tls.session_reused is resumed
    assert door.metric('relaymta_tls_handshakes_total{result="resumed"}') == 1


def test_a_session_is_resumed_whichever_worker_it_comes_to(tmp_path):
    with Door(tmp_path, "127.0.0.1:1", workers=2) as door:
        context, session = door.context(), None
        for number in range(12):
            with socket.create_connection(("127.0.0.1", door.implicit)) as sock:
                with context.wrap_socket(sock, server_hostname="relay.example", session=session) as tls:
                    tls.recv(100)
                    assert tls.session_reused is (number > 0)
                    session = tls.session
            if number == 8:  # nor does it matter that there is another certificate, and another worker
                door.certify(tmp_path, "relay.example")
                victim = door.worker_pids()[0]
                os.kill(victim, signal.SIGKILL)
                wait_for(lambda victim=victim: len(pids := door.worker_pids()) == 2 and victim not in pids)
                time.sleep(2.5)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_other_keys_take_no_old_tickets(tmp_path, version):
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


def test_scram_is_offered_while_it_works_for_all(door):
    def offered() -> bool:
        with door.client() as client:
            return "SCRAM-SHA-256" in client.esmtp_features["auth"]

    assert offered() and door.add_user("builder\n") == 0  # kept as argon2id
    wait_for(lambda: not offered())
    door.account("user", "password", "bob", "--password", "builder", "--scram")
    wait_for(offered)


def test_what_scram_tells_of_nobody_is_told_of_somebody_too(door):
    """Neither salts nor iterations say who has an account."""
    door.account("app", "create", "shop")

    def told(user: str) -> tuple[str, str]:
        with door.client() as client:
            first = base64.b64encode(f"n,,n={user},r=abc".encode()).decode()
            code, text = client.docmd(f"AUTH SCRAM-SHA-256 {first}")
            assert code == 334 and client.docmd("*")[0] == 501
            fields = dict(part.split("=", 1) for part in base64.b64decode(text).decode().split(","))
            return fields["s"], fields["i"]

    wait_for(lambda: told("shop")[1] == "4096")
    assert told("ann")[1] == "100000"
    found = {user: told(user) for user in (f"nobody{number}" for number in range(24))}
    assert {iterations for _, iterations in found.values()} == {"4096", "100000"}
    assert len({salt for salt, _ in found.values()}) == 24 and told("nobody3") == found["nobody3"]


def test_who_sent_a_message_is_known(tmp_path):
    with Door(tmp_path, "127.0.0.1:1") as door:
        assert [door.add_user("builder\n"), door.add_user("again\n"), door.add_user("")] == [0, 1, 64]
        wait_for(lambda: _try(lambda: _logged_in(door, "bob", "builder")))
        for name, password in (("bob", "builder"), ("ann", SECRET)):
            with _logged_in(door, name, password) as client:
                client.sendmail("x@b.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
        events = wait_for(lambda: len(found := door.events("queued")) == 2 and found)
        assert [event["user"] for event in events] == ["bob", "ann"]
        assert "logged in as bob" in door.cli("message", "show", events[0]["id"]).stdout
        door.cli("queue", "hold", "--user", "bob")  # whose password was stolen
        (held,) = [json.loads(line) for line in door.cli("queue", "list", "--held", "--json").stdout.splitlines()]
        assert held["id"] == events[0]["id"]


def _logged_in(door: Door, name: str, password: str) -> smtplib.SMTP:
    client = door.client()
    client.login(name, password)
    return client


def test_an_application_sends_only_as_itself(door, peer):
    said = door.account("app", "create", "shop", "--sender", "@shop.example", "--sender", "Boss@corp.example")
    key = said.partition("secret: ")[2].split()[0]
    assert 'shop.example. TXT "v=spf1 a:relay.example -all"' in said

    def login() -> smtplib.SMTP:
        client = door.client()
        client.login("shop", key)
        return client

    wait_for(lambda: _try(login))
    with login() as client:
        code, text = client.mail("a@elsewhere.example")
        assert (code, text) == (550, b"5.7.1 shop may not send as <a@elsewhere.example> (senders of its account)")
        with pytest.raises(smtplib.SMTPDataError) as refused:
            client.sendmail("a@shop.example", ["x@far.example"], "From: <ceo@elsewhere.example>\r\n\r\nx\r\n")
        assert refused.value.smtp_code == 550 and b"<ceo@elsewhere.example>" in refused.value.smtp_error
        long = b"X-Long: " + (b"x" * 900 + b"\r\n ") * 150 + b"x\r\nFrom: <ceo@elsewhere.example>\r\n\r\nx\r\n"
        with pytest.raises(smtplib.SMTPDataError) as refused:  # nor behind more of a header than is looked at
            client.sendmail("a@shop.example", ["x@far.example"], long)
        assert refused.value.smtp_code == 554
        hidden = ["a@shop.example(<ceo@elsewhere.example>", "ceo@elsewhere.example@, a@shop.example", "...@:a@shop.example;",
                  '"ceo@elsewhere.example" <a@shop.example', "=?utf-8?q?ceo=40bank.test=3E?=@shop.example", ""]  # fmt: skip
        for value in hidden:  # from us, and not from others
            for name in ("From", "from ", "Sender"):
                text = f"Subject: x\r\n{name}: {value}\r\nFrom: a@shop.example\r\n\r\nx\r\n"
                with pytest.raises(smtplib.SMTPDataError) as refused:
                    client.sendmail("a@shop.example", ["x@far.example"], text.encode())
                assert (refused.value.smtp_code, refused.value.smtp_error[:5]) == (550, b"5.6.0"), text
        client.sendmail("a@SHOP.example", ["x@far.example"], "From: boss@corp.example\r\n\r\nx\r\n")
        client.sendmail("", ["x@far.example"], "From: a@shop.example\r\n\r\nx\r\n")
    wait_for(lambda: len(peer.messages) == 2)
    wait_for(lambda: [event["application"] for event in door.events("queued")] == ["shop", "shop"])


def _try(login) -> bool:
    try:
        login().quit()
    except smtplib.SMTPAuthenticationError:
        return False
    return True


def test_keys_are_rotated_with_an_overlap_and_ended(door):
    first = door.account("app", "create", "shop").partition("secret: ")[2].split()[0]
    second = door.account("app", "rotate", "shop", "--overlap", "1h").partition("secret: ")[2].split()[0]

    def opens(key: str) -> bool:
        with door.client() as client:
            try:
                return client.login("shop", key)[0] == 235
            except smtplib.SMTPAuthenticationError:
                return False

    wait_for(lambda: opens(second))
    assert opens(first)
    for key in (first, second):
        with door.client() as client:
            assert scram(client, "shop", key) == 235
    with door.client() as client:
        assert scram(client, "shop", "neither") == 535
    rows = json.loads(door.account("app", "list", "--json"))
    shop = next(row for row in rows if row["name"] == "shop")
    assert [bool(secret["expires"]) for secret in shop["secrets"]] == [False, True]
    door.account("app", "rotate", "shop", "--overlap", "0s")
    wait_for(lambda: not opens(second) and not opens(first))
    door.account("app", "expire", "shop")
    assert "ann" in door.account("user", "list")
    door.account("user", "remove", "ann")
    assert "ann" not in door.account("user", "list")
    assert "did you mean" in door.account("app", "expire", "shob", check=False)


def test_a_broken_file_of_accounts_changes_nothing(door):
    with (door.folder / "accounts.toml").open("a") as file:
        file.write('\n[[account]]\nname = "bob"\nsecretz = []\n')
    wait_for(lambda: door.metric("relaymta_accounts_file_errors") == 1)
    (text,) = wait_for(lambda: [event["text"] for event in door.events("warning") if "secretz" in event["text"]])
    assert 'accounts.toml:7: account.1.secretz: no such key (did you mean "secrets"?)' in text
    with door.client() as client:
        client.login("ann", SECRET)
    found = door.cli("config", "check", "--config", str(door.config), check=False)
    assert found.returncode == 78 and "secretz" in found.stderr


def test_guessing_is_limited_and_locks_nobody_out(peer, tmp_path):
    with Door(tmp_path, f"127.0.0.1:{peer.port}", "accounts.failures=4", "accounts.failures_forgotten=60") as door:

        def guess(user: str, password: str, source: str) -> tuple[int, bytes]:
            with smtplib.SMTP("127.0.0.1", door.submission, source_address=(source, 0)) as client:
                client._host = "relay.example"
                client.starttls(context=door.context())
                client.ehlo()
                code, text = client.docmd("AUTH", "PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()).decode())
                return code, text

        wrong, unknown = guess("ann", "x", "127.0.0.2"), guess("nobody", "x", "127.0.0.2")
        assert wrong == unknown == (535, b"5.7.8 Authentication credentials invalid")
        codes = [guess("ann", "x", "127.0.0.2")[0] for _ in range(4)]
        assert codes == [535, 535, 454, 454]
        assert guess("ann", SECRET, "127.0.0.2")[0] == 454  # the right one, but too late
        for number in range(3, 6):  # the account is under attack from everywhere
            guess("ann", "x", f"127.0.0.{number}")
        assert guess("ann", SECRET, "127.0.0.3")[0] == 454
        assert guess("ann", SECRET, "127.0.0.9")[0] == 235  # and its owner comes from where nobody has failed
        assert door.metric('relaymta_logins_total{result="limited"}') >= 4


def test_keys_and_accounts_are_checked_as_the_relays_user(door):
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    (door.folder / "relay.example.pem").chmod(0o600)
    door.folder.chmod(0o755)
    for path in (door.folder, *door.folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o055)
    found = door.cli("config", "check", "--config", str(door.config), "--set", "user=nobody", check=False)
    assert found.returncode == 78
    assert "relay.example.pem: Permission denied" in found.stderr and "accounts.toml: Permission denied" in found.stderr
