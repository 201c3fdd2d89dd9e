"""What of a message is changed before it is stored, whose addresses are completed, and who gets mail for postmaster."""

import base64
from random import Random
from typing import Any

import pytest

from relaymta.accept.connection import Connection
from relaymta.accept.origin import Origin
from relaymta.auth.identity import Identity
from relaymta.config import Config, Listener
from relaymta.proto.envelope import UTF8_HEADER, Envelope
from relaymta.queue import Filter
from relaymta.route.staging import Redirection
from relaymta.route.table import RouteTable
from tests.accept.test_transactions import idle
from tests.support.connection import BIG, Machine, Transport

EHLO = b"EHLO client.example\r\n"
LOGIN = b"AUTH PLAIN " + base64.b64encode(b"\0ann\0secret") + b"\r\n"
NETWORKS = {"domains": ["d.example"], "networks": ["127.0.0.0/8"]}
OUTSIDE = {"domains": ["d.example"], "networks": []}


class Client:
    """A client of one relay. `relays`: its network may; `logged_in`; `submission`: the listener is for that."""

    def __init__(self, relays: bool = False, logged_in: bool = False, submission: bool = False, **settings: Any) -> None:
        relay = (NETWORKS if relays else OUTSIDE) | settings.pop("relay", {})
        signs = settings.pop("signs", False)
        self.machine = Machine(Random(1), signs=signs, hostname="mail.ours.example", relay=relay, **settings)
        self.machine.logs_in = Identity("ann", senders=settings.get("senders", ()))
        self.made = Connection(self.machine, Listener(address="127.0.0.1:25", submission=submission))
        self.made.enter(self.machine.intake.client("127.0.0.1"))
        self.made.connection_made(Transport(self.machine.steps, self.made))  # type: ignore[arg-type]
        self.say(EHLO)
        if logged_in:
            assert self.say(LOGIN)[-1].startswith("235")

    def say(self, data: bytes, step: int = 0) -> list[str]:
        """Send data (in pieces of `step`), and return the last line of each reply."""
        transport = self.made.transport
        assert isinstance(transport, Transport)
        before = len(transport.said)
        for start in range(0, len(data), step or len(data)):
            self.made.data_received(data[start : start + (step or len(data))])
            idle(self.made)
        return [line for line in transport.said[before:].decode().split("\r\n") if line[3:4] == " "]

    def send(self, message: bytes, way: str = "DATA", step: int = 0, envelope: bytes = b"") -> bytes:
        """Send a message; the one that is stored, without the fields that are added."""
        envelope = envelope or b"MAIL FROM:<a@ours.example>\r\nRCPT TO:<b@d.example>\r\n"
        if way == "DATA":
            self.say(envelope + b"DATA\r\n")
            replies = self.say(message + (b"" if message.endswith(b"\r\n") or not message else b"\r\n") + b".\r\n", step)
        else:
            replies = self.say(envelope + b"BDAT %d LAST\r\n" % len(message) + message, step)
        assert replies[-1].startswith("250"), replies
        stored = self.machine.stored[-1][1]
        signature, _, rest = stored.partition(b"\r\n") if stored.startswith(b"X-Signed") else (b"", b"", stored)
        fields, date, rest = rest.partition(b"+0000\r\n")
        assert fields.startswith(b"Received: ") and date
        if signature:
            # What is signed is what is stored; an empty line in front of a message without a header belongs to our fields.
            assert int(signature[len(b"X-Signed: ") :]) in (len(rest), len(rest) - 2), "what is signed is what is stored"
        return rest


HEADER = b"From: root\r\nBcc: x@y.example,\r\n z@y.example\r\nTo: bob, c@d.example\r\nbcc :\r\nReturn-Path: <q@y.example>\r\n"
CHANGED = b"From: root@ours.example\r\nTo: bob@ours.example, c@d.example\r\n"
WITHOUT_BCC = b"From: root\r\nTo: bob, c@d.example\r\n"
BODIES = {"small": b"\r\nBcc: body\r\n", "large": b"\r\n" + b"Bcc: body\r\n" * (BIG // 4)}


@pytest.mark.parametrize("way", ["DATA", "BDAT"])
@pytest.mark.parametrize("size", BODIES)
@pytest.mark.parametrize("step", [0, 100, 997])
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ({"relays": True}, HEADER),
        ({}, HEADER),
        ({"relays": True, "submission": True}, CHANGED),
        ({"relays": True, "logged_in": True}, CHANGED),
        ({"logged_in": True}, WITHOUT_BCC),
        ({"submission": True}, WITHOUT_BCC),
        ({"logged_in": True, "intake": {"complete_domain": "ours.example"}}, CHANGED),
    ],
    ids=repr,
)
def test_only_the_header_of_submitted_mail_is_changed(way, size, step, signs, client, expected):
    header = b"Date: x\r\nMessage-ID: <x@y>\r\n"
    found = Client(**client, signs=signs).send(header + HEADER + BODIES[size], way, step)
    assert found == header + expected + BODIES[size]


@pytest.mark.parametrize("client", [{}, {"relays": True}, {"logged_in": True}, {"submission": True}], ids=repr)
@pytest.mark.parametrize("size", [10, 3 * BIG])
@pytest.mark.parametrize("signs", [False, True])
def test_what_is_in_front_of_a_message_is_separated(client, size, signs):
    """As Postfix 3.7: see tests/proto/test_submitted.py."""
    body = b"x\r\n" * (size // 3)
    made = Client(**client, signs=signs)
    for start, expected in (
        (b"hello\r\nBcc: x\r\n\r\n", b"\r\nhello\r\nBcc: x\r\n\r\n"),
        (b" From: x\r\nBcc: x\r\n\r\n", b"\r\n From: x\r\nBcc: x\r\n\r\n"),
        (b"From a@b Mon\r\nTo: x@y\r\n\r\n", b"X-Mailbox-Line: From a@b Mon\r\nTo: x@y\r\n\r\n"),
        (b"\r\nBcc: x\r\n", b"\r\nBcc: x\r\n"),
    ):
        found = made.send(start + body)
        # What is added on a listener for submission belongs to our fields.
        added = found[: found.index(expected)]
        assert found == added + expected + body
        assert all(line.startswith((b"Message-ID: ", b"Date: ")) for line in added.splitlines())


def test_a_bcc_alone_and_an_empty_message():
    made = Client(relays=True, logged_in=True)
    assert made.send(b"Bcc: x\r\n\r\nb\r\n") == b"\r\nb\r\n"
    assert made.send(b"Bcc: x\r\n b\r\nbody\r\n") == b"\r\nbody\r\n"
    assert made.send(b"") == b"\r\n"
    assert Client().send(b"") == b"\r\n"


def test_the_author_that_is_checked_is_the_one_that_is_sent():
    made = Client(relays=True)
    made.machine.logs_in = Identity("ann", senders=("ann@ours.example", "root@ours.example"))
    made.say(LOGIN)
    envelope = b"MAIL FROM:<root>\r\nRCPT TO:<b@d.example>\r\n"
    assert made.send(b"From: Root <root>\r\n\r\nx\r\n", envelope=envelope) == b"From: Root <root@ours.example>\r\n\r\nx\r\n"
    assert made.machine.stored[-1][0].sender == "root@ours.example"
    assert [line[:3] for line in made.say(b"MAIL FROM:<bob>\r\nMAIL FROM:<root>\r\nRCPT TO:<b@d.example>\r\nDATA\r\n")] == [
        "550", "250", "250", "354",
    ]  # fmt: skip
    assert made.say(b"From: bob\r\n\r\nx\r\n.\r\n")[0].startswith("550 5.7.1")


# Who: the client, and what completes its addresses
WHO = [
    ({}, ""),
    ({"intake": {"complete_domain": "set.example"}}, ""),
    ({"relays": True}, "ours.example"),
    ({"relays": True, "intake": {"complete_domain": "set.example"}}, "set.example"),
    ({"logged_in": True}, ""),
    ({"logged_in": True, "intake": {"complete_domain": "set.example"}}, "set.example"),
    ({"relays": True, "logged_in": True}, "ours.example"),
]


@pytest.mark.parametrize(("client", "domain"), WHO, ids=repr)
def test_whose_addresses_are_completed(client, domain):
    made = Client(**client)
    replies = made.say(b"MAIL FROM:<root>\r\nRSET\r\nMAIL FROM:<x@y.example>\r\nRCPT TO:<root>\r\nRCPT TO:<a@d.example>\r\n")
    expected = ["250", "250", "250", "250", "250"] if domain else ["501", "250", "250", "501", "250"]
    assert [line[:3] for line in replies] == expected
    if domain:
        made.say(b"RSET\r\n")
        made.send(b"A: b\r\n\r\n", envelope=b"MAIL FROM:root\r\nRCPT TO:<bob>\r\nRCPT TO: ann\r\n")
        envelope = made.machine.stored[-1][0]
        assert (envelope.sender, envelope.recipients) == (f"root@{domain}", [f"bob@{domain}", f"ann@{domain}"])


@pytest.mark.parametrize(
    ("hostname", "domain"), [("mail.ours.example", "ours.example"), ("relay.example", "relay.example"), ("host", "host")]
)
def test_the_domain_of_the_hostname(hostname, domain):
    machine = Machine(Random(1), hostname=hostname, relay=NETWORKS)
    origin = Origin.of(machine.intake.client("127.0.0.1"), None, Listener(address="127.0.0.1:25"))
    assert (origin.domain, origin.postmaster) == (domain, f"postmaster@{domain}")


@pytest.mark.parametrize(
    "word", ["<postmaster>", "<Postmaster>", "<POSTMASTER>", "postmaster", '<"postmaster">', "< postmaster >"]
)
@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ({}, None),
        ({"logged_in": True}, None),
        ({"relays": True}, "ostmaster@ours.example"),
        ({"relay": {"postmaster": "ops@far.example"}}, "ops@far.example"),
        ({"relay": {"postmaster": '"ops"@far.example.'}}, "ops@far.example"),
        ({"relay": {"postmaster": "ops@far.example"}, "logged_in": True}, "ops@far.example"),
        ({"relay": {"postmaster": "ops@far.example"}, "relays": True}, "ops@far.example"),
    ],
    ids=repr,
)
def test_who_gets_mail_for_postmaster(word, client, expected):
    """RFC 5321 4.5.1. Without a mailbox it is refused: it would bounce to a forged sender."""
    made = Client(**client)
    replies = made.say(b"MAIL FROM:<x@y.example>\r\nRCPT TO:" + word.encode() + b"\r\nRSET\r\n")
    assert replies[1].startswith("250 2.1.5" if expected else "550 5.1.1")
    if expected:
        made.send(b"A: b\r\n\r\n", envelope=b"MAIL FROM:<>\r\nRCPT TO:" + word.encode() + b"\r\nRCPT TO:<postmaster>\r\n")
        (recipient,) = made.machine.stored[-1][0].recipients
        assert recipient.lower().endswith(expected)


def test_the_address_of_postmaster_is_no_open_relay():
    made = Client(relay={"postmaster": "ops@far.example"})
    made.say(b"MAIL FROM:<x@y.example>\r\n")
    assert made.say(b"RCPT TO:<ops@far.example>\r\n")[0].startswith("550 5.7.1")


@pytest.mark.parametrize("key", ["relay.postmaster", "intake.complete_domain"])
@pytest.mark.parametrize("value", ["no address or domain", "a b@c", "@", "a@b@c"])
def test_wrong_values_are_problems_of_the_configuration(key, value):
    table, name = key.split(".")
    with pytest.raises(ValueError, match=name):
        Config.model_validate({"listener": [{"address": "127.0.0.1:25"}], table: {name: value}})


@pytest.mark.parametrize("line", [b"EHLO my pc", b"HELO my pc", b"EHLO  my \t pc "])
def test_a_name_with_blanks_is_accepted_from_networks_that_may_relay(line):
    """As Postfix does: `from my?pc`."""
    made = Client(relays=True)
    assert made.say(line + b"\r\n")[-1].startswith("250")
    made.send(b"A: b\r\n\r\n")
    envelope, data = made.machine.stored[-1]
    assert envelope.helo == "my pc" and data.startswith(b"Received: from my?pc (")
    assert Client().say(line + b"\r\n")[-1].startswith("501")
    long = line[:5] + b"x" * 500
    made = Client(relays=True)
    assert made.say(line[:5] + b"x" * 2030 + b"\r\n")[-1].startswith("250")
    made.send(b"A: b\r\n\r\n")
    assert max(map(len, made.machine.stored[-1][1].split(b"\r\n"))) <= 998, "RFC 5322 2.1.1"
    assert Client(relays=True).say(long + b"\r\n")[-1].startswith("250")
    assert Client().say(long + b"\r\n")[-1].startswith("501")


@pytest.mark.parametrize(
    ("options", "header", "flag"),
    [
        (b" SMTPUTF8", "Subject: grün", True), (b" SMTPUTF8", "Subject: x", False), (b"", "Subject: grün", False),
        (b" SMTPUTF8", "Subject: x\r\n\r\ngrün", False),
    ],
)  # fmt: skip
def test_a_header_in_utf8_is_noted_where_the_client_has_asked_for_smtputf8(options, header, flag):
    """RFC 6531 3.2."""
    made = Client(relays=True)
    made.say(b"EHLO x\r\nMAIL FROM:<a@b>" + options + b"\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
    made.say(header.encode() + b"\r\n\r\nx\r\n.\r\n")
    envelope, _ = made.machine.stored[-1]
    assert bool(envelope.flags & UTF8_HEADER) == flag


@pytest.mark.parametrize("chunks", [b"BDAT 0 LAST\r\n", b"BDAT 0\r\nBDAT 0 LAST\r\n"])
def test_an_empty_message_stays_empty(chunks):
    """As by DATA: the empty line is the end of the header that our fields begin."""
    made = Client(relays=True)
    made.say(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d.example>\r\n" + chunks)
    _, data = made.machine.stored[-1]
    assert data.endswith(b"\r\n\r\n") and not data.endswith(b"\r\n\r\n\r\n")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b"MAIL  FROM:<a@b>\r\nRCPT  TO:<c@d.example>\r\n", ["250", "250"]),
        (b"MAIL\tFROM:<a@b>\r\nRCPT\tTO:<c@d.example>\r\nNOOP\tx\r\nRSET\t\r\n", ["250", "250", "250", "250"]),
        (b"mail from: <a@b>\r\nrcpt to: <c@d.example>\r\nDATA \r\n", ["250", "250", "354"]),
        (b"MAIL\tFROM:<a@b>\r\nRCPT\tTO:<c@d.example>\r\nDATA\t\r\n", ["250", "250", "354"]),
        (b"MAIL\tFROM:<a@b>\r\nRCPT\tTO:<c@d.example>\r\nBDAT\t2 LAST\r\nhi", ["250", "250", "250"]),
        (b"EHLO\tx\r\nVRFY\tx\r\nWHAT\tx\r\nQUIT\t\r\n", ["250", "252", "500", "221"]),
        (b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d.example>\r\nRCPT TO:<c@d.example.>\r\n", ["250", "250", "250"]),
        (b"GET\t/ HTTP/1.1\r\n", ["421"]),
        (b"HEAD\t/ x\r\n", ["421"]),
    ],
)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_blanks_where_postfix_accepts_them(lines, expected, step):
    assert [line[:3] for line in Client().say(lines, step)] == expected


@pytest.mark.parametrize(
    ("to", "code"), [('"ann"@d.example', "250"), ("ann@d.example.", "250"), ("ANN@D.Example", "250"), ("bob@d.example", "550")]
)
def test_the_recipient_map_has_one_form(to, code):
    made = Client()
    made.machine.recipient_exists = lambda address, domain: address == "ann@d.example" and domain == "d.example"  # type: ignore
    assert made.say(f"MAIL FROM:<x@y>\r\nRCPT TO:<{to}>\r\n".encode())[1][:3] == code


@pytest.mark.parametrize(
    ("client", "header", "expected"),
    [
        ({}, b"Message-ID: <x@y>\r\n", "<x@y>"),
        ({}, b"message-id:\r\n <x@y>\r\n", "<x@y>"),
        ({}, b"Subject: x\r\n", ""),
        ({"submission": True}, b"Subject: x\r\n", "<"),
        ({"submission": True}, b"Message-Id: <x@y>\r\n", "<x@y>"),
    ],
)
@pytest.mark.parametrize("size", BODIES)
def test_the_log_gets_the_message_id(client, header, expected, size):
    made = Client(**client)
    made.send(header + BODIES[size])
    envelope, data = made.machine.stored[-1]
    if expected == "<":
        assert f"\r\nMessage-ID: {envelope.message_id}\r\n".encode() in data and envelope.message_id
    else:
        assert envelope.message_id == expected


@pytest.mark.parametrize("written", ["ann@ours.example", '"Ann"@ours.example', "ANN@Ours.Example.", "ann @ ours.example"])
def test_what_is_said_about_an_address_is_about_all_of_its_spellings(written):
    """Routes, the filters of commands and policies, and staging."""
    queued = Envelope("ann@ours.example", ["ann@ours.example"], 1, 0, 0, 0)
    assert Filter(sender=written).matches(1, queued)
    listeners = [{"address": "127.0.0.1:25"}]
    for condition in ("sender", "recipient"):
        route = {"name": "one", "hosts": ["192.0.2.1"], condition: [written]}
        table = RouteTable(Config.model_validate({"listener": listeners, "route": [route]}))
        assert table.choose(queued, "ann@ours.example").label == "one"
    assert Redirection("qa@test.example", [written]).allows("ann@ours.example")
    for domain in ("ours.example", "@ours.example", "Ours.Example"):
        assert Redirection("qa@test.example", [domain]).allows("bob@ours.example")
        assert not Redirection("qa@test.example", [domain]).allows("bob@other.example")
    assert Filter(recipient_domain="Ours.example.").matches(1, queued)
