"""`relaymta trace`: dialogues of a running relay, without secrets, and nothing that stays switched on."""

import contextlib
import json
import os
import signal
import smtplib
import ssl
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from relaymta import control
from tests.support.daemon import PATIENCE, Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.routed import server_context

PASSWORD, UPSTREAM = "Xq7zKw9vTj3mRb5n", "Hd8fLc2pGs6yWt4x"
CONFIG = """
[[listener]]
address = "127.0.0.1:{port}"
auth = "may"
tls = "may"
[[listener]]
address = "127.0.0.1:{lmtp}"
protocol = "lmtp"
[[certificate]]
chain = "{folder}/cert.pem"
[accounts]
file = "{folder}/accounts.toml"
answer_after = 0
[[route]]
name = "here"
protocol = "mailbox"
recipient_domain = ["local.example"]
[[route]]
name = "upstream"
recipient_domain = ["up.example"]
hosts = ["localhost:{peer}"]
tls = "verify"
username = "me"
password_env = "RELAY_PASSWORD"
[[route]]
name = "plain"
hosts = ["127.0.0.1:{plain}"]
"""


class Traced(Relay):
    """A relay with logins, LMTP, and a smart host that wants a login."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, None, workers=2)
        self.lmtp, self.peer, self.plain = (free_port() for _ in range(3))
        self.config = folder / "relay.toml"
        ports = {"port": self.port, "lmtp": self.lmtp, "peer": self.peer, "plain": self.plain}
        self.config.write_text(CONFIG.format(folder=folder, **ports))
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.authority.issue_cert("relay.example").private_key_and_cert_chain_pem.write_to_path(str(folder / "cert.pem"))
        self.environment |= {"SSL_CERT_FILE": str(folder / "ca.pem"), "RELAY_PASSWORD": UPSTREAM}
        said = self.cli("app", "create", "shop", "--config", str(self.config)).stdout
        self.key = said.partition("secret: ")[2].split()[0]
        self.secrets = [form for secret in (PASSWORD, UPSTREAM, self.key) for form in (
            secret, *(b64encode(b"x" * n + secret.encode()).decode()[4:-4] for n in (0, 1, 2)),
        )]  # fmt: skip

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    @contextlib.contextmanager
    def client(self) -> Iterator[smtplib.SMTP]:
        """A client that speaks TLS."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        with smtplib.SMTP("127.0.0.1", self.port, "client.example", PATIENCE) as client:
            client._host = "relay.example"
            client.starttls(context=context)
            client.ehlo()
            yield client

    def traces(self) -> list[int]:
        """How many traces each worker has."""
        return [row["traces"] for row in control.ask(self.spool / "control.sock", "status")["workers"] if row["ready"]]


class Following:
    """`relaymta trace`, which has begun. `until(condition)`: waits for its lines."""

    def __init__(self, relay: Relay, *words: str) -> None:
        self.relay = relay
        self.out, self.err = (relay.folder / f"trace-{free_port()}.{end}" for end in ("out", "err"))
        command = [sys.executable, "-m", "relaymta", "trace", *words, "--json", "--spool", str(relay.spool)]
        self.process = subprocess.Popen(command, stdout=self.out.open("wb"), stderr=self.err.open("wb"))
        wait_for(lambda: self.err.read_bytes().startswith(b"tracing 2 workers") or self.process.poll() is not None)

    def __enter__(self) -> "Following":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]

    def texts(self) -> list[str]:
        return [line["text"] for line in self.lines()]

    def until(self, *texts: str) -> list[str]:
        """Until there is a line that begins with each of these."""
        wait_for(lambda: all(any(line.startswith(text) for line in self.texts()) for text in texts), what=f"{texts}")
        found = self.texts()
        assert not [secret for secret in self.relay.secrets if secret in self.out.read_text()]
        return found


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with Traced(tmp_path_factory.mktemp("trace")) as made:
        yield made


def in_order(found: list[str], *wanted: str) -> bool:
    rest = iter(found)
    return all(any(line.startswith(text) for line in rest) for text in wanted)


MESSAGE = "Subject: x\r\n\r\n" + PASSWORD + "\r\n"


def test_the_dialogue_with_a_client_and_with_a_smart_host_without_secrets(relay):
    def challenge(line: bytes) -> bytes:
        if line.startswith(b"AUTH"):
            return b"334 " + b64encode(b"Username: (" + UPSTREAM.encode() + b")") + b"\r\n"
        return b"334 UGFzc3dvcmQ6\r\n" if line == b"bWU=\r\n" else b"235 welcome, " + UPSTREAM.encode() + b" and " + line

    rules = {"DOT": b"250 2.0.0 I still know " + UPSTREAM.encode() + b" \x1b[2J\r\n"}
    with (
        FakeMx(rules, relay.peer, tls=server_context(relay.authority), auth=(b"LOGIN", challenge)) as peer,
        Following(relay, "in") as clients, Following(relay, "out", "--site", "upstream") as hosts,
        Following(relay, "out", "--host", "192.0.2.1") as none,
    ):  # fmt: skip
        assert relay.traces() == [3, 3]
        with relay.client() as client:
            client.docmd("AUTH PLAIN", b64encode(b"\0ann\0wrong " + PASSWORD.encode()).decode())
            client.login("shop", relay.key)
            client.docmd(PASSWORD)
            client.sendmail("a@b.example", ["c@up.example"], MESSAGE)
        wait_for(lambda: peer.messages)
        queued = wait_for(lambda: relay.events("queued"))[-1]["id"]
        said = clients.until("closed after QUIT")
        assert in_order(
            said, "connected: 127.0.0.1 to 127.0.0.1:", "220 ", "EHLO client.example", "STARTTLS", "220 ", "TLS using TLSv1",
            "EHLO", "AUTH PLAIN <", "535 ", "AUTH PLAIN", "logged in as shop", "235 ", "<16 octets, no command>", "500 ",
            "MAIL FROM:<a@b.example>", "250 ", "RCPT TO:<c@up.example>", "250 ", "DATA", "354",
            f"<{len(MESSAGE)} octets of message data>", f"250 2.0.0 Ok: queued as {queued}", "QUIT", "221", "closed after QUIT",
        ), said  # fmt: skip
        assert {line["kind"] for line in clients.lines()} == {"event", "heard", "said", "closed"}
        assert len({line["connection"] for line in clients.lines()}) == 1
        said = hosts.until("250 2.0.0 I still know ***")
        assert in_order(
            said, "connecting to localhost:", "connected from 127.0.0.1", "220 fake", "EHLO relay.example", "STARTTLS",
            "220", "TLS TLSv1.3 with cipher", "EHLO", "logging in as me", "AUTH LOGIN", "334 <", "<4 octets in response to AUTH>",
            "334 <", "<24 octets in response to AUTH>", "235 welcome, *** and ***", f"message {queued} of application shop",
            "MAIL FROM:<a@b.example>", "RCPT TO:<c@up.example>", "DATA", "250", "250", "354", "<", "250 2.0.0 I still know ***",
        ), said  # fmt: skip
        assert any("certificate verified" in line for line in said) and b"\x1b" not in hosts.out.read_bytes()
        assert none.lines() == []
        # One that begins now sees the connection that is open, and what the host quotes there.
        with Following(relay, "out", "--to", "d@up.example", "--count", "5") as later:
            with relay.client() as client:
                client.login("shop", relay.key)
                client.sendmail("a@b.example", ["e@up.example"], MESSAGE)
                client.sendmail("a@b.example", ["d@up.example"], MESSAGE)
            assert later.process.wait(PATIENCE) == 0
            assert any("already connected: localhost" in line for line in later.texts()) or len(peer.messages) > 1
    wait_for(lambda: relay.traces() == [0, 0], what="the traces to end")


def test_filters_and_what_ends_a_trace(relay):
    with (
        FakeMx({}, relay.plain),
        Following(relay, "in", "--app", "shop", "--only-one") as shop,
        Following(relay, "in", "--client", "192.0.2.0/24", "--client", "localhost", "--from", "ann@b.example") as sender,
        Following(relay, "in", "--client", "192.0.2.0/24", "--for", "5s") as elsewhere,
        Following(relay, "in", "--listener", str(relay.lmtp)) as lmtp,
        Following(relay, "out", "--from", "ann@b.example", "--terse") as out,
    ):  # fmt: skip
        relay.send("Subject: x\r\n\r\nx\r\n", "bob@b.example", "c@d.example")
        with relay.client() as client:
            client.login("shop", relay.key)
            client.sendmail("ann@b.example", ["c@d.example"], MESSAGE)
            with relay.client() as other:
                other.login("shop", relay.key)
                other.sendmail("bob@b.example", ["c@d.example"], MESSAGE)
        assert shop.process.wait(PATIENCE) == 0
        assert in_order(shop.until("closed"), "connected: ", "EHLO", "STARTTLS", "TLS", "AUTH PLAIN", "logged in as shop", "QUIT")
        assert len({line["connection"] for line in shop.lines()}) == 1
        said = sender.until("QUIT")
        assert in_order(said, "connected: ", "AUTH PLAIN", "MAIL FROM:<ann@b.example>", "QUIT")
        assert "MAIL FROM:<bob@b.example>" not in " ".join(said)
        with smtplib.LMTP("127.0.0.1", relay.lmtp, "mta.example", timeout=PATIENCE) as client:
            client.ehlo()
        assert in_order(lmtp.until("QUIT"), f"connected: 127.0.0.1 to 127.0.0.1:{relay.lmtp}", "LHLO mta.example", "QUIT")
        said = out.until("MAIL FROM:<ann@b.example>")
        assert "250-fake" not in said and "250 SIZE 0" in said
        assert elsewhere.process.wait(PATIENCE) == 0 and elsewhere.lines() == []
    assert relay.cli("trace", "in", "--client", "", check=False).returncode == 64
    assert "neither a network" in relay.cli("trace", "in", "--client", "no.such.host.invalid", check=False).stderr


def test_a_worker_that_is_replaced_is_traced_again_and_nothing_stays_on_after_kill_9(relay):
    with Following(relay, "in", "--client", "127.0.0.9") as killed, Following(relay, "in") as going:
        os.kill(relay.worker_pids()[0], signal.SIGKILL)
        going.until("worker 0 is not traced: ", "worker 0 is traced again")
        relay.cli("reload", "--config", str(relay.config))
        before = len(going.lines())
        for _ in range(20):  # some come to the new worker
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE):
                pass
        wait_for(lambda: {line["worker"] for line in going.lines()[before:]} == {0, 1}, what="both workers")
        killed.process.kill()
        wait_for(lambda: relay.traces() == [1, 1], what="the end of its trace")
        going.process.send_signal(signal.SIGINT)
        assert going.process.wait(PATIENCE) == 0 and going.err.read_text().count("\n") == 1
    wait_for(lambda: relay.traces() == [0, 0], what="the end of the traces")
