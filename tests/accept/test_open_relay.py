"""Nobody who should not uses the relay: every way that was ever tried, from outside the trusted networks."""

import smtplib

import pytest

from tests.support.daemon import Relay

SETTINGS = ('relay.networks=["192.0.2.0/24"]', 'relay.domains=["ours.example"]', "intake.tarpit=0")
OURS = ["x@ours.example", "x@OURS.EXAMPLE", '"x y"@ours.example', "postmaster"]
ELSEWHERE = [
    "x@far.example", "x@FAR.example", "x@far.example.", "x@sub.ours.example", "x@ours.example.far.example", "x@notours.example",
    "x%far.example@ours.example", "x%far.example%ours.example@ours.example", "far.example!x@ours.example",
    "ours.example!far.example!x@ours.example", '"x@far.example"@ours.example', '"x%far.example"@ours.example',
    '"far.example!x"@ours.example', "@ours.example:x@far.example", "@ours.example,@far.example:x@far.example",
    "x@[198.51.100.1]", "x@[127.0.0.1]", "x@[IPv6:::1]", "x@127.0.0.1", "x@localhost", "x", "x@", "x@far.example@ours.example",
    "x@ours.example@far.example", "<x@far.example>", '""@far.example', "x@ours.example>@far.example", "postmaster@far.example",
    "x@xn--urs-tbd.example", "x@оurs.example", "x@ours。example", "x@ｏurs.example", "x@ours.example\0.far.example",
    "x@far.example (x@ours.example)", "x@far.example,x@ours.example", "x@ours.example;x@far.example",
]  # fmt: skip


@pytest.fixture(scope="module")
def relay(tmp_path_factory):
    with Relay(tmp_path_factory.mktemp("relay"), "127.0.0.1:1", *SETTINGS) as made:
        yield made


def refused(client: smtplib.SMTP, to: str) -> bool:
    client.putcmd("RCPT", f"TO:<{to}>")
    code, _ = client.getreply()
    return code >= 500


@pytest.mark.parametrize("sender", ["<>", "<a@ours.example>", "<a@far.example>", "<root@localhost>", "<a@ours.example> SMTPUTF8"])
@pytest.mark.parametrize("helo", ["EHLO ours.example", "HELO localhost", "EHLO [127.0.0.1]", "EHLO 192.0.2.1"])
def test_nothing_is_relayed_for_strangers(relay, sender, helo):
    taken = []
    for start in range(0, len(ELSEWHERE), 12):  # a session is closed after 20 mistakes
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.command_encoding = "utf-8"
            assert client.docmd(*helo.split(" ", 1))[0] == 250
            assert client.docmd("MAIL", f"FROM:{sender}")[0] == 250 or "SMTPUTF8" in sender
            taken += [to for to in ELSEWHERE[start : start + 12] if not refused(client, to)]
    assert taken == []
    with smtplib.SMTP("127.0.0.1", relay.port) as client:  # while mail for us is taken
        client.docmd(*helo.split(" ", 1))
        client.docmd("MAIL", "FROM:<a@far.example>")
        assert [client.rcpt(to)[0] for to in ("x@ours.example", "x@OURS.EXAMPLE", '"x y"@ours.example', "postmaster")] == [
            250
        ] * 4


def test_nobody_is_believed_who_they_say_they_are(relay):
    for claim in (
        "XCLIENT ADDR=192.0.2.1 LOGIN=root", "XFORWARD ADDR=192.0.2.1", "PROXY TCP4 192.0.2.1 192.0.2.1 1 25",
        "AUTH PLAIN AGEAYg==", "AUTH EXTERNAL =", "MAIL FROM:<a@b.example> AUTH=root@ours.example", "STARTTLS", "VRFY root",
        "EXPN root", "TURN", "ETRN far.example", "SEND FROM:<a@b.example>",
    ):  # fmt: skip
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.ehlo("192.0.2.1")
            client.putcmd(claim)
            if client.getreply()[0] == 421:  # it is not even heard any more
                continue
            client.docmd("MAIL", "FROM:<a@ours.example>")
            assert refused(client, "x@far.example"), claim
