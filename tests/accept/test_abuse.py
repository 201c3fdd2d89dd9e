"""Limits by client and account, PROXY and XCLIENT, recipient maps."""

import contextlib
import json
import smtplib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relaymta.auth.identity import group_of
from tests.accept.test_endpoints import SECRET, Endpoint
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.programs import need

TEXT = "Subject: x\r\n\r\nx\r\n"


@pytest.fixture(scope="module")
def peer() -> Iterator[FakeMx]:
    with FakeMx({}) as made:
        yield made


def arrived(peer: FakeMx, *to: str) -> list[bytes]:
    """The messages to just these recipients."""
    return [text for _, recipients, text in peer.messages if recipients == list(to)]


def test_an_ipv6_network_is_one_client():
    assert group_of("2001:db8::1") == group_of("2001:db8::ffff:2") != group_of("2001:db8:0:1::1")
    assert group_of("192.0.2.1") == "192.0.2.1"


@pytest.fixture(scope="module")
def rated(peer: FakeMx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay with the limits of the rates; 127.0.0.3 has higher ones, and those of the connections are for others only."""
    networks = (
        'network=[{networks=["127.0.0.3/32"],message_rate="100/s",recipient_rate="100/s",connection_rate="100/s"},'
        '{networks=["127.0.0.2/32","127.0.0.4/32"],connection_rate="100/s"}]'
    )
    settings = ("limits.message_rate=6/h", "limits.recipient_rate=8/h", "limits.connection_rate=3/h", networks)
    with Relay(tmp_path_factory.mktemp("rated"), f"127.0.0.1:{peer.port}", *settings, workers=2) as made:
        yield made


def test_rates_are_shared_by_all_workers_and_named_in_replies(rated):
    exceeded = 'relaymta_quota_exceeded_total{result="client"}'
    before = rated.metric(exceeded)
    for _ in range(6):
        rated.send_from("127.0.0.2", TEXT)  # each on its own connection, to any worker
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refused:
        rated.send_from("127.0.0.2", TEXT)
    ((code, text),) = refused.value.recipients.values()
    assert code == 452 and text.startswith(b"4.7.1 Too much from your address (limit message_rate 6/h); try again in ")
    with smtplib.SMTP("127.0.0.1", rated.port, source_address=("127.0.0.4", 0)) as client:
        found = client.sendmail("a@b.example", [f"{n}@d.example" for n in range(10)], TEXT)
        assert len(found) == 2 and all(b"limit recipient_rate 8/h" in text for _, text in found.values())
    for _ in range(10):
        rated.send_from("127.0.0.3", TEXT)
    wait_for(lambda: rated.metric(exceeded) == before + 3)


def test_the_connection_rate_is_limited(rated):
    banners = []
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", rated.port)) as sock:
            banners.append(sock.recv(200))
    assert [banner[:3] for banner in banners] == [b"220", b"220", b"220", b"421"]
    assert b"limit connection_rate 3/h" in banners[3]


def test_quotas_of_accounts_reject_or_hold(peer, tmp_path):
    with Endpoint(tmp_path, f"127.0.0.1:{peer.port}", workers=2) as endpoint:
        with (tmp_path / "accounts.toml").open("a") as file:
            for name, keys in {
                "few": 'messages = "3/d"', "wide": 'recipients = "5/d"', "large": 'octets = "20000/d"',
                "held": 'messages = "1/d"\nover = "hold"', "single": "connections = 1",
            }.items():  # fmt: skip
                secrets = next(line for line in file_lines(tmp_path) if line.startswith("secrets"))
                file.write(f'[[account]]\nname = "{name}"\n{secrets}\n{keys}\n')

        def send(name: str, *to: str, octets: int = 10) -> dict:
            with endpoint.client() as client:
                client.login(name, SECRET)
                return client.sendmail("a@b.example", list(to) or ["c@d.example"], TEXT + "x" * octets)

        endpoint.cli("reload")  # both workers have read the file when it ends
        assert [accepted(lambda: send("few")) for _ in range(4)] == [True, True, True, False]
        assert len(send("wide", *(f"{n}@d.example" for n in range(7)))) == 2
        assert accepted(lambda: send("large", octets=15_000))
        with pytest.raises(smtplib.SMTPDataError, match=r"quota of large is used up \(octets 20000/d\); try again in"):
            send("large", octets=15_000)
        send("held", "held@d.example")
        wait_for(lambda: arrived(peer, "held@d.example"))
        send("held", "held@d.example")
        wait_for(lambda: [row["held"] for row in endpoint.summary()] == [1])
        (row,) = [json.loads(line) for line in endpoint.cli("queue", "list", "--json").stdout.splitlines()]
        assert row["state"] == "held" and row["held_for"] == "quota: messages 1/d of held is used up"
        assert len(arrived(peer, "held@d.example")) == 1
        endpoint.cli("queue", "release", row["id"])
        wait_for(lambda: len(arrived(peer, "held@d.example")) == 2)
        with endpoint.client() as first:
            first.login("single", SECRET)
            with pytest.raises(smtplib.SMTPAuthenticationError, match="limit connections 1"), endpoint.client() as second:
                second.login("single", SECRET)
        wait_for(lambda: accepted(lambda: send("single")))
        rows = [json.loads(line) for line in endpoint.account("app", "usage", "--json").splitlines()]
        usage = {row["name"]: row["used"] for row in rows}
        assert usage == {"few": 3, "wide": 5, "large": usage["large"], "held": 1} and 15_000 < usage["large"] < 16_000
        assert endpoint.stop() == 0
        endpoint.start()  # quotas survive a restart
        assert not accepted(lambda: send("few"))
        assert endpoint.metric('relaymta_quota_used_ratio{account="few",what="messages"}') > 0.99


def file_lines(folder: Path) -> list[str]:
    return (folder / "accounts.toml").read_text().splitlines()


def accepted(send) -> bool:
    try:
        return send() == {}
    except (smtplib.SMTPRecipientsRefused, smtplib.SMTPAuthenticationError):
        return False


@pytest.fixture(scope="module")
def strict(peer: FakeMx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that accepts mail from 198.51.100.0/24, and from others that for the recipients of its domains."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "recipients").write_text('# ours\n"Ann"@ours.example.\n@all.example\nann@xn--bcher-kva.example\n')
    settings = (
        'relay.networks=["198.51.100.0/24"]', 'relay.domains=["ours.example","all.example","bücher.example"]',
        f"relay.recipients={folder}/recipients", "intake.tarpit=0.3",
        'network=[{networks=["127.0.0.5/32"],xclient=true}]',
    )  # fmt: skip
    with Relay(folder, f"127.0.0.1:{peer.port}", *settings) as made:
        yield made


def test_mail_for_unknown_recipients_of_relay_domains_is_rejected(strict):
    known = strict.folder / "recipients"
    assert not [event for event in strict.events("warning") if "backscatter" in event["text"]]
    with smtplib.SMTP("127.0.0.1", strict.port) as client:
        client.ehlo("client.example")
        client.mail("x@y.example")
        asked = ["ANN@ours.example", "bob@ours.example", "any@all.example", "x@elsewhere.example", "postmaster"]
        assert [client.rcpt(to)[0] for to in asked] == [250, 550, 250, 550, 550]
        same = ['"ann"@ours.example', "ann@ours.example.", '"any one"@all.example']
        assert [client.rcpt(to)[0] for to in same] == [250] * 3
        rejected = wait_for(lambda: [event for event in strict.events("rejected") if event["recipients"] == ["bob@ours.example"]])
        assert rejected[0]["helo"] == "client.example"
        assert strict.metric('relaymta_rejections_total{phase="rcpt",reply="5xx"}') >= 3
        client.rset()
        client.command_encoding = "utf-8"
        client.docmd("MAIL", "FROM:<x@y.example> SMTPUTF8")
        asked = ["Ann@BÜCHER.example", "ann@xn--bcher-kva.example", "bob@bücher.example"]
        assert [client.docmd("RCPT", f"TO:<{to}>")[0] for to in asked] == [250, 250, 550]
    known.write_text("bob@ours.example\n")

    def takes(to: str) -> bool:
        with smtplib.SMTP("127.0.0.1", strict.port) as client:
            client.ehlo()
            client.mail("x@y.example")
            return client.rcpt(to)[0] == 250

    wait_for(lambda: takes("bob@ours.example") and not takes("ann@ours.example"))
    known.write_text("bob\n")
    wait_for(lambda: any("recipients:1: 'bob' is neither" in event["text"] for event in strict.events("warning")))
    assert takes("bob@ours.example")


def test_a_client_with_many_errors_is_tarpitted(strict):
    with smtplib.SMTP("127.0.0.1", strict.port) as client:
        began = time.monotonic()
        for _ in range(3):
            assert client.docmd("WRONG")[0] == 500
        quick = time.monotonic() - began
        client.sock.sendall(b"WRONG\r\nWRONG\r\nNOOP\r\n")
        assert [client.getreply()[0] for _ in range(3)] == [500, 500, 250]
        assert time.monotonic() - began > quick + 0.25
        assert client.noop()[0] == 250


class Behind(Relay):
    """A relay whose listeners are behind a load balancer at 127.0.0.1."""

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        listener = f'listener=[{{address="127.0.0.1:{self.port}", proxy=["127.0.0.1/32"]}}]'
        return [*found[:at], "--set", listener, *found[at + 2 :]]


@pytest.fixture(scope="module")
def behind(peer: FakeMx, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    networks = 'relay.networks=["198.51.100.7/32","127.0.0.6/32"]'
    with Behind(tmp_path_factory.mktemp("behind"), f"127.0.0.1:{peer.port}", networks) as made:
        yield made


def test_behind_a_load_balancer_the_client_is_that_of_the_proxy_header(behind):
    def rcpt(header: bytes, source: str = "127.0.0.1") -> bytes:
        with socket.create_connection(("127.0.0.1", behind.port), source_address=(source, 0)) as sock:
            sock.settimeout(10)
            with contextlib.suppress(ConnectionError):  # the relay may have closed already
                for octet in header[:5]:
                    sock.sendall(bytes([octet]))
                sock.sendall(header[5:])
            said = b""
            for command in (b"EHLO me\r\n", b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"QUIT\r\n"):
                try:
                    piece = sock.recv(1000)
                except ConnectionResetError:
                    piece = b""
                if not piece:
                    return said
                said = piece
                sock.sendall(command)
            return said

    before = behind.metric('relaymta_connections_total{result="refused"}')
    assert rcpt(b"PROXY TCP4 198.51.100.7 192.0.2.1 4000 25\r\n").startswith(b"250")
    assert rcpt(b"PROXY TCP4 198.51.100.8 192.0.2.1 4000 25\r\n").startswith(b"550")
    second = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes([198, 51, 100, 7, 192, 0, 2, 1, 0, 1, 0, 25])
    assert rcpt(second).startswith(b"250")
    assert rcpt(b"EHLO me\r\n") == b""
    assert rcpt(b"PROXY TCP4 198.51.100.7 192.0.2.1 4000 25\r\n", "127.0.0.2") == b""  # not in listener.proxy
    assert behind.metric('relaymta_connections_total{result="refused"}') == before + 2


@pytest.mark.parametrize("header", ["send-proxy", "send-proxy-v2"])
def test_behind_haproxy(peer, behind, tmp_path, header):
    program, port, to = need("haproxy"), free_port(), f"{header}@d.example"
    (tmp_path / "haproxy.cfg").write_text(
        f"defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n"
        f"listen smtp\n bind 127.0.0.1:{port}\n server relay 127.0.0.1:{behind.port} {header}\n"
    )
    balancer = subprocess.Popen([program, "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _listens(port))
        for source, expected in (("127.0.0.6", 250), ("127.0.0.7", 550)):
            with smtplib.SMTP("127.0.0.1", port, source_address=(source, 0)) as client:
                client.ehlo()
                client.mail("a@b.example")
                assert client.rcpt(to)[0] == expected
        with smtplib.SMTP("127.0.0.1", port, source_address=("127.0.0.6", 0)) as client:
            client.sendmail("a@b.example", [to], TEXT)
        (text,) = wait_for(lambda: arrived(peer, to))
        assert b"([127.0.0.6])" in text
        (event,) = wait_for(lambda: [event for event in behind.events("queued") if event["recipients"] == [to]])
        assert event["client"] == "127.0.0.6"
    finally:
        balancer.terminate()
        balancer.wait()


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_xclient_is_for_listed_peers_only(peer, strict):
    with smtplib.SMTP("127.0.0.1", strict.port, source_address=("127.0.0.5", 0)) as client:
        client.ehlo()
        assert client.esmtp_features["xclient"].split()[:2] == ["NAME", "ADDR"]
        client.mail("a@b.example")
        assert client.rcpt("xclient@d.example")[0] == 550
        assert client.docmd("XCLIENT", "ADDR=198.51.100.9")[0] == 503  # within a transaction
        client.rset()
        assert client.docmd("XCLIENT", "ADDR=nonsense")[0] == 501
        assert client.docmd("XCLIENT", "ADDR=198.51.100.9 HELO=mail+2Eexample NAME=[UNAVAILABLE]")[0] == 220
        client.ehlo()
        client.sendmail("a@b.example", ["xclient@d.example"], TEXT)
    (text,) = wait_for(lambda: arrived(peer, "xclient@d.example"))
    assert b"([198.51.100.9])" in text
    with smtplib.SMTP("127.0.0.1", strict.port) as client:
        client.ehlo()
        assert "xclient" not in client.esmtp_features
        assert client.docmd("XCLIENT", "ADDR=198.51.100.9")[0] == 500
        client.mail("a@b.example")
        assert client.rcpt("xclient@d.example")[0] == 550
