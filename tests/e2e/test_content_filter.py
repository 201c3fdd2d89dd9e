"""Content filters behind the queue: a message goes to one by SMTP, and comes back on a listener of its own."""

import contextlib
import smtplib
import socket
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path

import dkim
import pytest

from tests.support.amavis import BANNED, amavis
from tests.support.clamd import EICAR, clamd
from tests.support.daemon import PATIENCE, Relay, free_port, heard, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.milters import DkimKey

TEXT = "From: a@b.example\r\nSubject: hello\r\n\r\nhello\r\n"


class Filtering(Relay):
    """A relay with a content filter at `filter_port`, which gives mail back at `back`. `first`: further keys of the listener that
    clients use; `looping`: the route to the filter is for all mail."""

    def __init__(
        self, folder: Path, peer: FakeMx, filter_port: int, back: int, *settings: str, first: str = "", looping: bool = False
    ) -> None:
        super().__init__(folder, None, *settings)
        self.back = back
        listeners = f'{{address="127.0.0.1:{self.port}"{first}}}, {{address="127.0.0.1:{back}", filtered=true}}'
        of = "" if looping else f', listener=["127.0.0.1:{self.port}"]'
        content = f'{{name="content", hosts=["127.0.0.1:{filter_port}"], xforward=true{of}}}'
        others = "" if looping else f', {{name="out", hosts=["127.0.0.1:{peer.port}"]}}'
        self.settings = (*self.settings, f"listener=[{listeners}]", f"route=[{content}{others}]")

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], *found[at + 2 :]]

    def give_back(self, source: str, *lines: bytes) -> bytes:
        """What the listener for mail that comes back says to some lines of a client."""
        with socket.create_connection(("127.0.0.1", self.back), PATIENCE, (source, 0)) as sock:
            said = heard(sock, b"220", b"5")
            with contextlib.suppress(ConnectionError):
                for line in lines:
                    sock.sendall(line + b"\r\n")
                    said += heard(sock, b"250 ", b"5", b"354")
            return said


class Scripted(FakeMx):
    """A content filter that gives each message back before it answers, with a field of its own, and says what it was told.
    `seen`: the XFORWARD commands that it was given; `times`: how many messages."""

    def __init__(self, back: int, offers: bool = True) -> None:
        self.seen: list[str] = []
        self.back = back
        self.offers = offers
        self.times = 0
        super().__init__({})

    def _talk(self, sock: socket.socket) -> None:
        stream = sock.makefile("rb")
        sock.sendall(b"220 filter.example ESMTP\r\n")
        said, sender, recipients = b"", "", list[str]()
        while line := stream.readline():
            verb, text = line[:4].upper(), line.decode().strip()
            if verb == b"EHLO":
                extra = b"250-XFORWARD NAME ADDR PROTO HELO IDENT SOURCE\r\n" if self.offers else b""
                sock.sendall(b"250-filter.example\r\n250-PIPELINING\r\n" + extra + b"250 8BITMIME\r\n")
            elif verb == b"XFOR":
                self.seen.append(text)
                said = line
                sock.sendall(b"250 ok\r\n")
            elif verb == b"MAIL":
                sender, recipients = text.partition("<")[2].partition(">")[0], []
                sock.sendall(b"250 ok\r\n")
            elif verb == b"RCPT":
                recipients.append(text.partition("<")[2].partition(">")[0])
                sock.sendall(b"250 ok\r\n")
            elif verb == b"DATA":
                sock.sendall(b"354 go\r\n")
                data = b""
                while (line := stream.readline()) != b".\r\n":
                    data += line
                self.times += 1
                sock.sendall(self._returned(said, sender, recipients, b"X-Filtered: yes\r\n" + data))
                said = b""
            else:
                sock.sendall(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
                if verb == b"QUIT":
                    return

    def _returned(self, said: bytes, sender: str, recipients: list[str], data: bytes) -> bytes:
        with smtplib.SMTP("127.0.0.1", self.back, timeout=PATIENCE) as client:
            client.ehlo("filter.example")
            if said:
                assert client.docmd(said.decode().strip())[0] == 250
            try:
                client.sendmail(sender, recipients, data.replace(b"\r\n..", b"\r\n."))
            except smtplib.SMTPDataError as error:
                text = error.smtp_error if isinstance(error.smtp_error, bytes) else error.smtp_error.encode()
                return b"%d %b\r\n" % (error.smtp_code, text)
        return b"250 2.0.0 given back\r\n"


class Parting(FakeMx):
    """A content filter that takes two messages by BDAT, and of the second is only heard to reply to XFORWARD."""

    def _talk(self, sock: socket.socket) -> None:
        stream = sock.makefile("rb")
        sock.sendall(b"220 filter.example ESMTP\r\n")
        while line := stream.readline():
            verb, sender = line[:4].upper(), self.mails[-1] if self.mails else ""
            if verb == b"EHLO":
                sock.sendall(b"250-filter.example\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 XFORWARD ADDR\r\n")
                continue
            if verb == b"MAIL":
                self.mails.append(line.decode())
            if verb == b"BDAT":
                self.messages.append((sender, [], stream.read(int(line.split()[1]))))
                if len(self.mails) == 2:
                    stream.close()
                    return
            if len(self.mails) < 2:
                sock.sendall(b"250 ok\r\n")


def queued(relay: Relay, count: int) -> list[dict]:
    wait_for(lambda: len(relay.events("queued")) >= count, what=f"{count} messages")
    found = relay.events("queued")
    assert len(found) == count, found
    return found


def arrived(peer: FakeMx, count: int = 1) -> list[tuple[str, list[str], bytes]]:
    wait_for(lambda: len(peer.messages) >= count, what=f"{count} messages at the next host")
    assert len(peer.messages) == count
    return peer.messages


def test_mail_goes_through_the_filter_once_and_its_client_is_known_behind_it(tmp_path):
    back, key = free_port(), DkimKey(tmp_path)
    key.path.chmod(0o600)
    signing = f'dkim=[{{domain="b.example", selector="s", key="{key.path}"}}]'
    with FakeMx({}) as peer, Scripted(back) as content, Filtering(tmp_path, peer, content.port, back, signing) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port, "my+pc.example", PATIENCE, source_address=("127.0.0.9", 0)) as client:
            for number in range(3):
                client.sendmail(
                    "a@b.example", ["c@d.example", "e@d.example"], f"From: a@b.example\r\nSubject: {number}\r\n\r\n.x\r\n"
                )
        assert sorted(len(to) for _, to, _ in arrived(peer, 3)) == [2, 2, 2] and content.times == 3
        _, _, data = peer.messages[0]
        assert data.count(b"X-Filtered: yes") == 1 and data.count(b"Received:") == 2 and data.endswith(b"\r\n.x\r\n")
        assert data.count(b"DKIM-Signature:") == 1 and dkim.verify(data, dnsfunc=lambda name, timeout=5: key.record.encode())
        events = queued(relay, 6)
        first = [event for event in events if "orig_id" not in event]
        behind = {event["orig_id"]: event for event in events if "orig_id" in event}
        assert set(behind) == {event["id"] for event in first}
        for event in behind.values():
            assert (event["orig_client"], event["orig_helo"]) == ("127.0.0.9", "my+pc.example")
            assert (event["client"], event["helo"]) == ("127.0.0.1", "filter.example")
        assert all(line.startswith("XFORWARD ") and "HELO=my+2Bpc.example" in line for line in content.seen)
        (ident,) = [event["id"] for event in behind.values() if event["orig_id"] == first[0]["id"]]
        shown = relay.cli("message", "history", ident).stdout
        assert f"of 127.0.0.9 (my+pc.example), there {first[0]['id']}" in shown


def test_a_filter_that_knows_no_xforward_gets_the_mail_all_the_same(tmp_path):
    back = free_port()
    with FakeMx({}) as peer, Scripted(back, False) as content, Filtering(tmp_path, peer, content.port, back) as relay:
        relay.send()
        arrived(peer)
        assert not content.seen and not any("orig_id" in event for event in queued(relay, 2))


def test_a_filter_that_has_replied_to_xforward_and_goes_may_have_the_message(tmp_path):
    back = free_port()
    with Parting({}) as content, Filtering(tmp_path, content, content.port, back) as relay:
        relay.send()
        wait_for(lambda: relay.events("delivered"), what="the first message")
        relay.send()
        wait_for(lambda: relay.events("deferred"), what="the end of the connection")
        assert "in doubt" in relay.events("deferred")[0]["reply"] and len(content.messages) == 2
        assert relay.metric("relaymta_in_doubt_total") == 1


def test_who_may_give_mail_back_and_what_is_not_done_to_it(tmp_path):
    """Clients at 127.0.0.2 are strangers: they may neither relay nor give mail back, but for the one that does by right."""
    back = free_port()
    settings = (
        "relay.networks=[]", 'relay.domains=["d.example"]', "verify.results=true", "limits.message_rate=\"1/h\"",
        'filter=[{name="lists", type="policy", address=["127.0.0.1:1"], on_failure="tempfail"}]',
        'network=[{networks=["127.0.0.3/32"], xforward=true}]',
    )  # fmt: skip
    with FakeMx({}) as peer, Filtering(tmp_path, peer, peer.port, back, *settings) as relay:
        envelope = (b"EHLO filter.example", b"MAIL FROM:<a@b.example>", b"RCPT TO:<x@else.example>")
        for _ in range(2):  # the rates were spent where it came in
            with smtplib.SMTP("127.0.0.1", back, timeout=PATIENCE) as client:
                client.ehlo("filter.example")
                assert "xforward" in client.esmtp_features
                client.sendmail("a@b.example", ["x@else.example"], "Authentication-Results: relay.example; spf=pass\r\n\r\nx\r\n")
        for _, _, data in arrived(peer, 2):
            assert data.count(b"Authentication-Results:") == 1 and b"spf=pass" in data
        said = relay.give_back(
            "127.0.0.1", *envelope, b"XFORWARD HELO=x", b"RSET", b"XFORWARD ADDR=x", b"XFORWARD ADDR=192.0.2.1"
        )
        assert [line[:3] for line in said.split(b"\r\n") if line[3:4] == b" "] == [
            b"220", b"250", b"250", b"250", b"503", b"250", b"501", b"250",
        ]  # fmt: skip
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.ehlo("stranger.example")
            assert "xforward" not in client.esmtp_features
            assert client.mail("a@b.example")[0] == 250 and client.rcpt("x@else.example")[0] == 550
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE, source_address=("127.0.0.3", 0)) as client:
            client.ehlo("known.example")
            assert client.docmd("XFORWARD ADDR=127.0.0.1")[0] == 250
            assert client.mail("a@b.example")[0] == 250 and client.rcpt("x@else.example")[0] == 550, "it gives no right"


def test_others_cannot_give_mail_back(tmp_path):
    back = free_port()
    with FakeMx({}) as peer, Filtering(tmp_path, peer, peer.port, back) as relay:
        relay.settings = tuple(one.replace("filtered=true", 'filtered=true, networks=["127.0.0.5/32"]') for one in relay.settings)
        relay.stop()
        relay.start()
        assert relay.give_back("127.0.0.1").startswith(b"554 5.7.1 Your address may not give mail back here")
        assert relay.give_back("127.0.0.5").startswith(b"220 ")


def test_what_some_clients_may_send_comes_back_whatever_the_filters_own_limits(tmp_path):
    back = free_port()
    settings = (
        "limits.message_size=10000",
        'network=[{networks=["127.0.0.9/32"], message_size=200000}, {networks=["127.0.0.1"], message_size=5000, recipients=1}]',
    )
    with FakeMx({}) as peer, Scripted(back) as content, Filtering(tmp_path, peer, content.port, back, *settings) as relay:
        relay.send_from("127.0.0.9", TEXT + ("x" * 70 + "\r\n") * 2000, ("c@d.example", "e@d.example"))
        ((_, to, data),) = arrived(peer)
        assert len(to) == 2 and len(data) > 140_000


def test_who_may_name_clients_elsewhere_does_not_let_them_past_the_filter(tmp_path):
    back = free_port()
    settings = ("relay.networks=[]", 'relay.domains=["d.example"]', 'network=[{networks=["127.0.0.1/32"], xclient=true}]')
    with FakeMx({}) as peer, Filtering(tmp_path, peer, peer.port, back, *settings) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port, timeout=PATIENCE) as client:
            client.ehlo("proxy.example")
            assert client.docmd("XCLIENT ADDR=192.0.2.7")[0] == 220
        with smtplib.SMTP("127.0.0.1", back, timeout=PATIENCE) as client:
            client.ehlo("proxy.example")
            assert "xclient" not in client.esmtp_features and "xforward" in client.esmtp_features
            assert client.docmd("XCLIENT ADDR=192.0.2.7")[0] == 500
            client.sendmail("a@b.example", ["x@else.example"], TEXT)


def test_a_route_that_sends_what_comes_back_to_the_filter_again_ends_in_a_bounce(tmp_path):
    hops, back = 5, free_port()
    with FakeMx({}) as peer, Scripted(back) as content:
        with Filtering(tmp_path, peer, content.port, back, f"intake.hops={hops}", looping=True) as relay:
            relay.send()
            wait_for(lambda: len(relay.events("bounced")) >= 2, what="the bounce, and its own end")
            first, second = relay.events("bounced")
            assert first["recipient"] == "c@d.example" and "5.4.6" in first["reply"] and first["dsn"]
            assert second["recipient"] == "a@b.example" and not second["dsn"], "the DSN went round, too, and has ended"
            assert content.times == hops + 1 + hops + 2 and not relay.summary()  # a DSN has no Received: at first
            assert relay.events("queued")[-1]["orig_client"] == ""  # our own message has no client


# amavis


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Filtering, FakeMx]]:
    back = free_port()
    with clamd() as scanner, amavis(back, scanner.path) as port, FakeMx({}) as peer:
        with Filtering(tmp_path_factory.mktemp("amavis"), peer, port, back) as relay:
            yield relay, peer


def test_amavis_lets_clean_mail_pass_once_and_refuses_or_bounces_other(running):
    relay, peer = running
    with smtplib.SMTP("127.0.0.1", relay.port, "pc.example", PATIENCE, source_address=("127.0.0.9", 0)) as client:
        client.sendmail("a@b.example", ["c@d.example"], TEXT)
    ((sender, to, data),) = arrived(peer)
    assert (sender, to) == ("a@b.example", ["c@d.example"]) and data.count(b"X-Virus-Scanned: amavis at filter.example") == 1
    first, second = queued(relay, 2)
    assert (second["orig_client"], second["orig_helo"], second["orig_id"]) == ("127.0.0.9", "pc.example", first["id"])
    assert second["client"] == "127.0.0.1" and "orig_client" not in first

    relay.send("From: a@b.example\r\nSubject: virus\r\n\r\n" + EICAR.decode() + "\r\n")
    wait_for(lambda: relay.events("bounced"), what="the bounce")
    (bounced,) = relay.events("bounced")
    assert "Eicar" in bounced["reply"] or "INFECTED" in bounced["reply"]
    _, to, data = arrived(peer, 2)[1]  # our DSN, which does not go to the filter
    assert to == ["a@b.example"] and b"X-Virus-Scanned" not in data.partition(b"\r\n\r\n")[0]

    message = EmailMessage()
    message["From"], message["Subject"] = "a@b.example", "a program"
    message.set_content("see the attachment\n")
    message.add_attachment(b"MZ" + b"\0" * 64, maintype="application", subtype="octet-stream", filename=BANNED)
    relay.send(message.as_string().replace("\n", "\r\n"))
    sender, to, data = arrived(peer, 3)[2]  # amavis's DSN, which comes back as all that it sends
    assert (sender, to) == ("", ["a@b.example"]) and BANNED.encode() in data
