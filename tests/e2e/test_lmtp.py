"""Mail by LMTP into mailboxes: one reply for each recipient, after which the message is there, whatever is killed."""

import contextlib
import smtplib
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from relaymta.store.deliver import FULL
from tests.conftest import PROVE
from tests.support.daemon import PATIENCE, Relay, free_port, heard, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.mailboxes import LOCAL, Load, create, kill_under_load, shown, verified
from tests.support.prove import in_prove

SMALL = "Subject: {}\r\n\r\nx\r\n"


class Kept(Relay):
    """A relay that keeps the mail of local.example, with an SMTP listener and one of LMTP (with these `options`)."""

    def __init__(self, folder: Path, *settings: str, workers: int = 1, options: str = "", tables: str = "") -> None:
        super().__init__(folder, None, *settings, workers=workers)
        self.lmtp = free_port()
        self.config = folder / "relay.toml"
        self.config.write_text(
            f'[[listener]]\naddress = "127.0.0.1:{self.port}"\n'
            f'[[listener]]\naddress = "127.0.0.1:{self.lmtp}"\nprotocol = "lmtp"\n{options}\n{tables}\n'
        )

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        routes = [] if "[[route]]" in self.config.read_text() else ["--set", f"route=[{LOCAL}]"]
        return [*found[:at], "--config", str(self.config), *found[at + 2 :], *routes]

    @contextlib.contextmanager
    def client(self, source: str = "127.0.0.1") -> Iterator["Client"]:
        with Client("127.0.0.1", self.lmtp, source_address=(source, 0), timeout=PATIENCE) as client:
            client.lhlo_or_raise()
            yield client


class Client(smtplib.LMTP):
    """Reads all replies, as `smtplib.LMTP.sendmail` does not."""

    def lhlo_or_raise(self) -> None:
        code, text = self.ehlo()
        if code != 250:
            raise smtplib.SMTPHeloError(code, text)

    def deliver(self, text: str, *recipients: str, options: tuple[str, ...] = ()) -> list[str]:
        """The reply for each recipient, at RCPT or at the end of the message data."""
        code, said = self.mail("s@x.example", options)
        if code != 250:
            return [f"{code} {said.decode()}"] * len(recipients)
        replies = [self.rcpt(f"{name}@local.example" if "@" not in name else name) for name in recipients]
        if any(code == 250 for code, _ in replies):
            first = self.data(text)
            taken = iter([first, *(self.getreply() for _ in range(sum(code == 250 for code, _ in replies) - 1))])
            replies = [next(taken) if code == 250 else (code, said) for code, said in replies]
        else:
            self.rset()
        return [f"{code} {said.decode()}" for code, said in replies]


def codes(replies: list[str]) -> list[str]:
    return [" ".join(text.split()[:2]) for text in replies]


def test_each_recipient_has_a_reply_of_its_own(tmp_path):
    with Kept(tmp_path, "limits.message_size=3M") as relay:
        create(relay, "alice", "bob")
        create(relay, "carol", octets=1024)
        large = "Subject: large\r\n\r\n" + "x" * 70 + "\r\n" * 1200
        with relay.client() as client:
            assert codes(client.deliver(SMALL.format("one"), "alice", "nobody", "bob+x")) == [
                "250 2.1.5",
                "550 5.1.1",
                "250 2.1.5",
            ]
            found = client.deliver(large, "alice", "carol", "alise", "bob")  # without SIZE it is known at the end
            assert codes(found) == ["250 2.1.5", "452 4.2.2", "550 5.1.1", "250 2.1.5"]
            found = client.deliver(large, "alice", "carol", "bob", options=("SIZE=2470",))
            assert codes(found) == ["250 2.1.5", "452 4.2.2", "250 2.1.5"] and FULL.text in found[1] and "carol" not in found[1]
            assert codes(client.deliver(SMALL.format("two"), "carol", "carol", "x@far.example")) == ["250 2.1.5"] * 2 + [
                "550 5.7.1"
            ]
            assert codes(client.deliver(("x" * 70 + "\r\n") * 50_000, "alice", "bob")) == ["552 5.3.4"] * 2
            assert client.noop()[0] == 250
        assert [shown(relay, name)["INBOX"] for name in ("alice", "bob", "carol")] == [["one", "large", "large"]] * 2 + [["two"]]
        assert relay.summary() == [] and relay.events("queued") == []
        wait_for(lambda: len(relay.events("delivered")) == 4, what="the log")
        received, delivered = relay.events("received"), relay.events("delivered")
        assert [one["recipients"] for one in received][:2] == [
            ["alice@local.example", "bob+x@local.example"],
            ["alice@local.example", "bob@local.example"],
        ]
        assert delivered[0]["id"] == received[0]["id"] and delivered[0]["users"] == ["alice@local.example", "bob@local.example"]
        assert delivered[0]["peer"] == "mailbox"
        assert [one["reply"][:9] for one in relay.events("rejected")].count("452 4.2.2") == 2
        wait_for(lambda: relay.metric('relaymta_mailbox_deliveries_total{result="filed"}') == 7, what="the count")
        assert relay.metric('relaymta_mailbox_deliveries_total{result="full"}') == 1
        text = relay.cli("message", "history", received[0]["id"]).stdout
        assert "received" in text and "delivered" in text
        wait_for(lambda: not list((relay.spool / "shard-0/bodies/big").iterdir()), what="the file to go")
        assert relay.stop() == 0
    verified(relay)


def test_users_of_two_workers_and_an_alias_of_both(tmp_path):
    with Kept(tmp_path, workers=2) as relay:
        create(relay, "alice", "bob", "carol", "dave")
        create(relay, "eve", "fay", octets=1024)
        relay.cli("mailbox", "alias", "team@local.example", "alice@local.example", "bob@local.example", "alice@local.example")
        relay.cli("mailbox", "alias", "poor@local.example", "eve@local.example", "fay@local.example")
        for number in range(6):  # connections are spread over both workers
            with relay.client() as client:
                assert codes(client.deliver(SMALL.format(number), "alice", "bob", "carol", "dave")) == ["250 2.1.5"] * 4
                assert codes(client.deliver(SMALL.format("team"), "team")) == ["250 2.1.5"]
                found = client.deliver(SMALL.format("x"), "eve", "fay", "poor", options=("SIZE=2000",))
                assert codes(found) == ["452 4.2.2"] * 3  # whichever shard has them
        for name in ("alice", "bob"):
            assert Counter(shown(relay, name)["INBOX"]) == Counter([*map(str, range(6)), *["team"] * 6])
        big = "Subject: big\r\n\r\n" + ("y" * 70 + "\r\n") * 70_000
        with relay.client() as client:
            assert codes(client.deliver(big, "alice", "bob", "alice")) == ["250 2.1.5"] * 3
        assert [shown(relay, name)["INBOX"].count("big") for name in ("alice", "bob")] == [1, 1]
        for number in range(2):
            wait_for(lambda: not list((relay.spool / f"shard-{number}/bodies/big").iterdir()), what="the files to go")  # noqa: B023
        assert relay.stop() == 0
    verified(relay)


def test_addresses_elsewhere_get_it_by_way_of_the_queue(tmp_path):
    with FakeMx({}) as peer:
        routes = (
            '[[route]]\nname = "here"\nprotocol = "mailbox"\nrecipient_domain = ["local.example"]\n'
            f'[[route]]\nname = "out"\nhosts = ["127.0.0.1:{peer.port}"]\ntls = "off"\n'
        )
        with Kept(tmp_path, tables=routes) as relay:
            create(relay, "alice", "bob")
            create(relay, "carol", messages=1)
            relay.cli("mailbox", "alias", "both@local.example", "alice@local.example", "ann@far.example")
            relay.cli("mailbox", "alias", "away@local.example", "ann@far.example", "ben@far.example")
            relay.cli("mailbox", "alias", "some@local.example", "bob@local.example", "carol@local.example")
            with relay.client() as client:
                assert codes(client.deliver(SMALL.format("x"), "both", "away", "bob")) == ["250 2.1.5", "250 2.0.0", "250 2.1.5"]
                assert codes(client.deliver("Subject: big\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000, "both")) == ["250 2.1.5"]
                assert codes(client.deliver(SMALL.format("1"), "some")) == ["250 2.1.5"]
                # Carol has no room any more: bob has it now, and carol's copy waits in the queue.
                assert codes(client.deliver(SMALL.format("2"), "some")) == ["250 2.1.5"]
            wait_for(lambda: len(peer.messages) == 2, what="delivery")
            assert sorted(recipients for _, recipients, _ in peer.messages) == [
                ["ann@far.example"],
                ["ann@far.example", "ben@far.example"],
            ]
            assert shown(relay, "alice")["INBOX"] == ["x", "big"] and shown(relay, "bob")["INBOX"] == ["x", "1", "2"]
            assert shown(relay, "carol")["INBOX"] == ["1", "Your mailbox is 100 % full"]
            wait_for(lambda: relay.events("deferred"), what="the deferral")
            assert relay.events("deferred")[0]["recipient"] == "carol@local.example"
            assert [event.get("stays") for event in relay.events("received")] == [True, True, None, True], "for those elsewhere"
            wait_for(lambda: not list((relay.spool / "shard-0/bodies/big").iterdir()), what="the file to go")


def test_only_clients_that_may_relay_deliver(tmp_path):
    with Kept(tmp_path, 'relay.networks=["127.0.0.1/32"]') as relay:
        create(relay, "alice")
        with socket.create_connection(("127.0.0.1", relay.lmtp), PATIENCE, ("127.0.0.2", 0)) as sock:
            assert heard(sock, b"220").startswith(b"554 5.7.1") and sock.recv(1) == b""
        wait_for(lambda: relay.metric("relaymta_connections") == 0, what="the end of the connection")
        with relay.client() as client:
            assert codes(client.deliver(SMALL.format("x"), "alice")) == ["250 2.1.5"]
            assert client.docmd("EHLO x")[0] == client.docmd("HELO x")[0] == 500
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            assert client.docmd("LHLO x")[0] == 500


def test_starttls_a_login_and_chunks(tmp_path):
    authority = trustme.CA()
    authority.issue_cert("relay.example").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    tables = f'[[certificate]]\nchain = "{tmp_path}/cert.pem"\n[accounts]\nfile = "{tmp_path}/accounts.toml"\n'
    relay = Kept(tmp_path, 'relay.networks=["127.0.0.9/32"]', options='auth = "require"\ntls = "require"', tables=tables)
    relay.cli("user", "add", "mta", "--password", "secret of the mta", "--config", str(relay.config))
    with relay:
        create(relay, "alice", "bob")
        with Client("127.0.0.1", relay.lmtp, timeout=PATIENCE, local_hostname="mta.example") as client:
            client.lhlo_or_raise()
            assert client.docmd("MAIL FROM:<>")[0] == 530
            context = ssl.create_default_context()
            authority.configure_trust(context)
            client._host = "relay.example"
            client.starttls(context=context)
            client.lhlo_or_raise()
            assert "auth" in client.esmtp_features and client.docmd("MAIL FROM:<>")[0] == 530
            client.login("mta", "secret of the mta")
            assert codes(client.deliver(SMALL.format("x"), "alice")) == ["250 2.1.5"]
            envelope = b"MAIL FROM:<s\xc3\xbc@x.example> SMTPUTF8\r\n" + b"RCPT TO:<bob@local.example>\r\n" * 2
            client.send(envelope + b"BDAT 12\r\nSubject: y\r\nBDAT 0 LAST\r\nNOOP\r\n")
            assert [client.getreply()[0] for _ in range(7)] == [250] * 7  # two of them for BDAT LAST
        row, found = wait_for(lambda: relay.events("received")[1:] and relay.events("received"), what="the log")
        assert row["user"] == "mta" and row["helo"] == "mta.example"
        assert found["sender"] == "s\u00fc@x.example" and found["recipients"] == ["bob@local.example"] * 2
        assert shown(relay, "bob")["INBOX"] == ["y"]
        assert relay.stop() == 0
    whole = b"".join(path.read_bytes() for path in (relay.spool / "mail/shard-0/bodies").rglob("*") if path.is_file())
    assert b"with LMTPSA id" in whole and b"with UTF8LMTPSA id" in whole


class Deliveries(Load):
    """LMTP clients that deliver messages, and note which recipients had a 250."""

    def client(self):
        return self.relay.client()

    def deliver(self, client, to, text):
        said = client.deliver(text, *to)
        return [name for name, one in zip(to, said, strict=True) if one[0] == "2"]


@pytest.mark.parametrize("what", ["group", *in_prove("workers")])
def test_what_was_acknowledged_is_there_when_processes_are_killed(tmp_path, what):
    users = [f"u{number}" for number in range(8)]
    relay = Kept(tmp_path, workers=2)
    relay.start()
    create(relay, *users)
    load = Deliveries(relay, users, 4)
    kill_under_load(relay, load, what, 30 if PROVE else 2)
    try:
        wait_for(lambda: len(relay.worker_pids()) == 2, what="both workers")
        found = Counter((name, subject) for name in users for subject in shown(relay, name)["INBOX"])
        assert [pair for pair in load.acknowledged if not found[pair]] == []
        twice = [pair for pair, count in found.items() if count > 1]
        assert len(twice) <= 12 * 3  # one that was under way may be asked for again: LMTP cannot tell
        assert len(load.acknowledged) > 20 and relay.summary() == []
        assert relay.stop() == 0
    finally:
        if relay.process is not None and relay.process.poll() is None:
            relay.kill()
    verified(relay)
