"""What a trace shows: dialogues without secrets and message data, however the octets arrive."""

import random
from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import reply
from relaymta.proto.sasl import Keys
from relaymta.proto.session import CLAIMED, COMPLETE, Host, Limits, Offers
from relaymta.proto.smtp_server import ServerSession
from relaymta.proto.trace import LINE_MOST, Ear, commands, replies, reply_lines

SECRET = b"Xq7zKw9vTj3mRb5nHd8fLc2pGs6y"  # no piece of it occurs otherwise, raw or in base64
PIECE = 5  # characters of it that would show that it is there
FORMS = [SECRET, b64encode(SECRET), b64encode(b"\0ann\0" + SECRET), b64encode(b"x" + SECRET), b64encode(b"xx" + SECRET)]
PIECES = {form[at : at + PIECE] for form in FORMS for at in range(len(form) - PIECE + 1)}
B64 = b64encode(SECRET)
PLAIN = b64encode(b"\0ann\0" + SECRET)
BEARER = b64encode(b"user=ann\1auth=Bearer " + SECRET + b"\1\1")


class Recorder:
    """The lines of a dialogue."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ear = Ear()

    def heard(self, session, event):
        self.lines.append(self.ear.heard(session, event))

    def asks(self, again):
        raise AssertionError("nothing is asked here")


class Server(Host):
    def keys(self, user: str) -> Keys:
        return Keys(b"salt", b"k" * 32, b"k" * 32, 4096)


def talk(pieces: list[bytes], answer: bytes = reply.WRONG_CREDENTIALS) -> list[str]:
    """The lines of a dialogue in which these octets arrive. Each login is answered so."""
    mechanisms = ("PLAIN", "LOGIN", "SCRAM-SHA-256", "XOAUTH2", "OAUTHBEARER")
    session = ServerSession("mx.example", Server(Limits(errors=1000), Offers(mechanisms=mechanisms, clear=True, xclient=True)))
    session.tap = found = Recorder()
    said = session.greet()
    for piece in pieces:
        said += session.receive(piece)
        while session.behind or session.state in (COMPLETE, CLAIMED):
            if session.state == CLAIMED:
                said += session.checked(answer)
                session.wrong_logins = 0
            elif session.state == COMPLETE:
                session.store()
                said += session.finish(b"250 2.0.0 Ok\r\n")
            else:
                said += session.receive(b"")
    return [line for line in [*found.lines, *replies(said), found.ear.rest()] if line]


def leaked(lines: list[str]) -> set[bytes]:
    text = "\n".join(lines).encode()
    return {piece for piece in PIECES if piece in text}


EHLO = [b"EHLO client.example"]
MAIL = [b"MAIL FROM:<a@b.example>", b"RCPT TO:<c@d.example>"]
WAYS = {
    "PLAIN with an initial response": [b"AUTH PLAIN " + PLAIN],
    "PLAIN without one": [b"AUTH PLAIN", PLAIN],
    "in lower case, with a tab": [b"auth plain " + PLAIN, b"aUtH\tPLAIN " + PLAIN, b"AUTH  PLAIN   " + PLAIN],
    "LOGIN": [b"AUTH LOGIN", b64encode(b"ann"), B64],
    "LOGIN with an initial response": [b"AUTH LOGIN " + b64encode(b"ann"), B64],
    "LOGIN, the password in place of the user": [b"AUTH LOGIN", B64, B64],
    "XOAUTH2": [b"AUTH XOAUTH2 " + BEARER, b""],
    "OAUTHBEARER": [b"AUTH OAUTHBEARER", b64encode(b"n,a=ann,\1auth=Bearer " + SECRET + b"\1\1"), b"AQ=="],
    "SCRAM": [b"AUTH SCRAM-SHA-256", b64encode(b"n,,n=ann,r=" + SECRET), b64encode(b"c=biws,r=x,p=" + SECRET), b"*"],
    "cancelled": [b"AUTH LOGIN", B64, b"*", B64],
    "not in base64": [b"AUTH PLAIN " + SECRET, b"AUTH PLAIN", SECRET],
    "an unknown mechanism": [b"AUTH " + B64, b"AUTH NONE " + B64, b"AUTH PLAIN " + B64 + b" " + B64],
    "unasked": [B64, SECRET, b"ABCD " + B64, b"ABCD\t" + B64, b"x " + SECRET],
    "as an argument that means nothing": [b"NOOP " + SECRET, b"RSET " + SECRET, b"DATA " + SECRET, b"STARTTLS " + SECRET],
    "as a path": [b"MAIL " + SECRET, b"RCPT " + SECRET, b"MAIL\t" + SECRET, b"RCPT FROM:" + SECRET],
    "too long": [b"AUTH PLAIN " + PLAIN * 400, PLAIN * 400, b"AUTH PLAIN", PLAIN * 400],
    "with bare line ends and NUL": [
        b"AUTH PLAIN a\n" + PLAIN,
        b"AUTH\n" + PLAIN,
        PLAIN + b"\r" + PLAIN,
        b"AUTH PLAIN \0" + SECRET,
    ],
    "in AUTH with bare line ends": [b"AUTH LOGIN", B64 + b"\n" + B64, b"AUTH LOGIN", B64 + b"\0"],
    "message data": [*MAIL, b"DATA", b"Subject: " + SECRET, b"", b".." + SECRET, b"."],
    "chunks": [*MAIL, b"BDAT %d" % (len(SECRET) + 2), SECRET, b"BDAT %d LAST" % (len(SECRET) + 2), SECRET],
    "a chunk of no transaction": [b"BDAT %d" % (len(SECRET) + 2), SECRET],
}
LAST = {
    "another protocol": [b"GET /?password=" + SECRET + b" HTTP/1.1"],
    "its header": [b"Authorization: Basic " + B64],
    "a proxy": [b"PROXY " + SECRET],
    "no word": [b"\x16" + SECRET],
    "QUIT": [b"QUIT " + SECRET],
    "unfinished message data": [*MAIL, b"DATA", SECRET],
    "a bad chunk": [b"BDAT x", SECRET],
}


def octets(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\r\n" for line in lines)


@pytest.mark.parametrize("answer", [reply.WRONG_CREDENTIALS, reply.LOGIN_UNAVAILABLE, reply.LOGGED_IN], ids=["535", "454", "235"])
@pytest.mark.parametrize("way", WAYS | LAST)
def test_no_part_of_a_secret_is_shown_whether_lines_come_one_by_one_or_at_once(way, answer):
    lines = EHLO + (WAYS | LAST)[way]
    for pieces in ([octets([line]) for line in lines], [octets(lines)], [bytes([octet]) for octet in octets(lines)]):
        shown = talk(pieces, answer)
        assert "EHLO client.example" in shown and not leaked(shown), shown


@given(
    st.lists(st.sampled_from(sorted(WAYS)), max_size=4),
    st.sampled_from(["", *sorted(LAST)]),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_no_part_of_a_secret_is_shown_however_the_octets_arrive(ways, last, seed, good):
    chosen = random.Random(seed)
    lines = EHLO + [line for way in ways for line in WAYS[way]] + (LAST[last] if last else [])
    data = octets(lines)[: None if chosen.random() < 0.7 else -chosen.randrange(1, 40)]
    cuts = sorted(chosen.randrange(len(data) + 1) for _ in range(chosen.randrange(8)))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    shown = talk(pieces, reply.LOGGED_IN if good else reply.WRONG_CREDENTIALS)
    assert not leaked(shown), shown


def test_the_lines():
    shown = talk([line + b"\r\n" for line in (
        b"ehlo client.example", b"auth plain " + PLAIN, b"AUTH LOGIN", b64encode(b"ann"), b"*", b"AUTH NTLM", B64, b"NOOP x",
        b"mail from:<a@b.example> size=5", b"RCPT TO:<c@d.example>", b"RCPT x", b"DATA", b"abc", b"..", b".", b"EHLO \x1b[2J\xff",
        b"XCLIENT ADDR=192.0.2.1", b"EHLO " + b"x" * 600, b"QUIT",
    )])  # fmt: skip
    heard = shown[: shown.index("QUIT") + 1]
    assert heard == [
        "EHLO client.example", "AUTH PLAIN <44 octets>", "AUTH LOGIN", "<4 octets in response to AUTH>", "*", "AUTH NTLM",
        "<40 octets, no command>", "NOOP <1 octets>", "MAIL from:<a@b.example> size=5", "RCPT TO:<c@d.example>",
        "RCPT <1 octets>", "DATA", "<8 octets of message data>", "EHLO \x1b[2J\\xff", "XCLIENT ADDR=192.0.2.1",
        "EHLO " + "x" * (LINE_MOST - 5) + " <105 octets more>", "QUIT",
    ]  # fmt: skip
    assert [line for line in shown if line.startswith("334")] == ["334 <12 octets of AUTH>"] * 2


def test_what_we_say_to_a_peer_is_without_secrets():
    said = b"AUTH PLAIN " + PLAIN + b"\r\nauth login\r\nAUTH SCRAM-SHA-256 " + B64 + b"\r\nAUTH " + B64 + b"\r\n"
    assert list(commands(said)) == ["AUTH PLAIN <44 octets>", "AUTH LOGIN", "AUTH SCRAM-SHA-256 <40 octets>", "AUTH <40 octets>"]
    assert list(commands(B64 + b"\r\n*\r\n\r\n", True)) == [
        "<40 octets in response to AUTH>", "*", "<0 octets in response to AUTH>",
    ]  # fmt: skip
    assert list(commands(b"MAIL FROM:<a@b.example>\r\nDATA\r\n")) == ["MAIL FROM:<a@b.example>", "DATA"]


def test_the_replies_of_a_peer_are_without_what_they_quote_of_our_secrets():
    secret, coded = SECRET.decode(), B64.decode()
    assert list(reply_lines(334, coded)) == ["334 <40 octets of AUTH>"]
    assert list(reply_lines(250, "mx.example\nSIZE 5\nPIPELINING")) == ["250-mx.example", "250-SIZE 5", "250 PIPELINING"]
    quoted = list(reply_lines(535, f"5.7.8 {secret} is wrong\nso is {coded} and {coded[4:20]}", (secret, coded)))
    assert quoted == ["535-5.7.8 *** is wrong", "535 so is *** and ***"]
    assert list(reply_lines(0, "not a reply")) == ["not a reply"]
    many = list(reply_lines(250, "\n".join("x" * 150)))
    assert (len(many), many[-2:]) == (101, ["250-x", "<50 lines more>"])
