"""The server session of LMTP (RFC 2033) in dialogues, in one piece and octet by octet."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto import reply
from relaymta.proto.smtp_server import Host, Limits, Offers, ServerSession
from relaymta.proto.transaction import Transaction
from tests.conftest import PROVE
from tests.proto.test_smtp_server import codes

LHLO = b"LHLO client.example\r\n"
MAIL = b"MAIL FROM:<a@b.example>\r\n"
RCPTS = b"RCPT TO:<c@d.example>\r\nRCPT TO:<no@d.example>\r\nRCPT TO:<e@d.example>\r\n"
BEGUN, SAID = LHLO + MAIL + RCPTS, [250, 250, 250, 550, 250]
EACH = {"c@d.example": b"250 2.1.5 c\r\n", "e@d.example": b"452 4.2.2 e\r\n"}


class Mail(Transaction):
    """Rejects the recipient no@d.example. `answers`: its refusals as a whole."""

    def __init__(self, sender: str, smtputf8: bool, limits: Limits, answers: list[bytes]) -> None:
        super().__init__(sender, smtputf8, limits)
        self.answers = answers

    def accept(self, address: str) -> bytes | None:
        return reply.NO_SUCH_RECIPIENT if address.startswith("no@") else None

    def refused(self, answer: bytes) -> None:
        self.answers.append(answer)


class Mailboxes(Host):
    def __init__(self, limits: Limits, lmtp: bool = True) -> None:
        super().__init__(limits, Offers(lmtp=lmtp, starttls=True))
        self.answers: list[bytes] = []

    def begin(self, session, sender, size, smtputf8):
        return Mail(sender, smtputf8, self.limits, self.answers)


def talk(pieces: list[bytes], limits: Limits | None = None, whole: bytes = b"", lmtp: bool = True):
    """(replies, messages, session, refusals) of a dialogue; a complete message has the replies EACH, or `whole`."""
    host = Mailboxes(limits or Limits(), lmtp)
    made = ServerSession("mx.example", host)
    assert made.greet() == (b"220 mx.example LMTP relaymta\r\n" if lmtp else b"220 mx.example ESMTP relaymta\r\n")
    out, messages = b"", []
    for piece in pieces:
        out += made.receive(piece)
        while made.complete is not None or made.behind:
            if made.complete is not None:
                mail = made.complete
                messages.append((mail.recipients[:], b"".join(mail.take())))
                out += made.finish(whole or [EACH[address] for address in mail.recipients])
            else:
                out += made.receive(b"")
    return out, messages, made, host.answers


DATA = b"Subject: x\r\n\r\n..dot\r\n.\r\n"
CASES = [
    ("hello", b"EHLO x\r\nHELO x\r\nLHLO x\r\nlhlo y\r\nLHLO\r\n", [500, 500, 250, 250, 501]),
    ("no hello", MAIL, [503]),
    ("data", BEGUN + b"DATA\r\n|" + DATA + b"NOOP\r\n", [*SAID, 354, 250, 452, 250]),
    ("no rcpt", LHLO + MAIL + b"DATA\r\nRCPT TO:<no@d.example>\r\nDATA\r\nNOOP\r\n", [250, 250, 503, 550, 503, 250]),
    ("no mail", LHLO + b"DATA\r\nRCPT TO:<c@d.example>\r\n", [250, 503, 503]),
    ("bdat", BEGUN + b"BDAT 4\r\na\r\nbBDAT 2 LAST\r\n\r\nNOOP\r\n", [*SAID, 250, 250, 452, 250]),
    ("bdat zero", BEGUN + b"BDAT 3\r\na\r\nBDAT 0 LAST\r\nNOOP\r\n", [*SAID, 250, 250, 452, 250]),
    ("bdat without rcpt", LHLO + MAIL + b"BDAT 4 LAST\r\nNOOPNOOP\r\n", [250, 250, 503, 250]),
    ("twice", LHLO + MAIL + b"RCPT TO:<c@d.example>\r\n" * 2 + b"BDAT 2 LAST\r\nhi", [250] * 6),
    ("two messages", BEGUN + b"BDAT 2 LAST\r\nhi" + MAIL + b"RCPT TO:<e@d.example>\r\nBDAT 2 LAST\r\nho",
     [*SAID, 250, 452, 250, 250, 452]),
    ("rset", BEGUN + b"BDAT 2\r\nhiRSET\r\nBDAT 2 LAST\r\nho", [*SAID, 250, 250, 503]),
    ("help", b"HELP\r\n", [214]),
]  # fmt: skip


def pieces_of(wire: bytes, step: int) -> list[bytes]:
    """The wire in pieces of so many octets (0: one), cut where it has a `|`: nothing may be pipelined behind DATA."""
    return [part[at : at + (step or len(part))] for part in wire.split(b"|") for at in range(0, len(part), step or len(part))]


@pytest.mark.parametrize(("wire", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_dialogues(wire, expected, step):
    out, _, _, answers = talk(pieces_of(wire, step))
    assert codes(out) == expected and not answers


def test_lhlo_is_unknown_to_smtp():
    out, _, _, _ = talk([b"LHLO x\r\nEHLO x\r\n"], lmtp=False)
    assert codes(out) == [500, 250]


def test_what_is_offered():
    out, _, _, _ = talk([LHLO])
    assert {line[4:] for line in out.split(b"\r\n")[1:-1]} == {
        b"PIPELINING", b"SIZE 52428800", b"8BITMIME", b"SMTPUTF8", b"CHUNKING", b"STARTTLS", b"ENHANCEDSTATUSCODES"
    }  # fmt: skip
    assert b"LHLO first" in talk([MAIL])[0]


@pytest.mark.parametrize(
    ("data", "limits", "code"),
    [
        (b"x" * 101 + b"\r\n.\r\n", Limits(message_size=100), 552),
        (b"x\ny\r\n.\r\n", Limits(), 550),
        (b"x" * 999 + b"\r\n.\r\n", Limits(), 550),
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_a_message_refused_as_a_whole_is_refused_for_each_recipient_and_is_one_error(data, limits, code, step):
    out, messages, made, answers = talk(pieces_of(BEGUN + b"DATA\r\n|" + data + b"NOOP\r\n", step), limits)
    assert codes(out) == [*SAID, 354, code, code, 250] and not messages
    assert made.errors == 2 and len(answers) == 1  # the other one is that of RCPT


def test_a_message_refused_by_the_caller_is_refused_for_each_recipient():
    out, messages, _, answers = talk(pieces_of(BEGUN + b"BDAT 2 LAST\r\nhiNOOP\r\n", 0), whole=reply.TOO_MANY_HOPS)
    assert codes(out) == [*SAID, 554, 554, 250] and len(messages) == 1 and answers == [reply.TOO_MANY_HOPS]
    assert talk(pieces_of(BEGUN + b"BDAT 2 LAST\r\nhi", 0))[3] == []  # replies of their own are no refusal of the message


def test_too_many_errors_close_behind_the_replies_of_all_recipients():
    wire = (MAIL + b"RCPT TO:<c@d.example>\r\n" * 2 + b"BDAT 3 LAST\r\nx\ny") * 3
    out, _, made, _ = talk([LHLO + wire], Limits(errors=2))
    assert codes(out) == [250, 250, 250, 250, 550, 550, 250, 250, 250, 550, 550, 421] and made.closing


WORDS = st.sampled_from(
    [LHLO, MAIL, b"RCPT TO:<c@d.example>\r\n", b"RCPT TO:<e@d.example>\r\n", b"RCPT TO:<no@d.example>\r\n", b"RSET\r\n",
     b"NOOP\r\n", b"EHLO x\r\n", b"BDAT 3 LAST\r\nx\r\n", b"BDAT 3 LAST\r\nx\ny", b"BDAT 200 LAST\r\n" + b"x" * 200,
     b"BDAT 2\r\nhi", b"DATA\r\n|", DATA, b"WHAT\r\n"]
)  # fmt: skip


@given(words=st.lists(WORDS, max_size=12), cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=3000 if PROVE else 200, deadline=None)
def test_replies_do_not_depend_on_the_cuts_and_each_recipient_has_one(words, cuts):
    wire, limits = BEGUN + b"".join(words), Limits(message_size=100, errors=8)
    found = talk([piece for piece in wire.split(b"|") if piece], limits)
    cut = [
        part[a:b]
        for part in wire.split(b"|")
        for a, b in pairwise(sorted({0, len(part), *(at for at in cuts if at < len(part))}))
    ]
    again = talk(cut, limits)
    assert again[:2] == found[:2] and again[3] == found[3]
    assert found[0].count(b" 2.1.5 c") == sum(recipients.count("c@d.example") for recipients, _ in found[1])
    assert found[0].count(b" 4.2.2 e") == sum(recipients.count("e@d.example") for recipients, _ in found[1])
