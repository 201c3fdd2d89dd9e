"""A session that stands still while others are asked about a command, against one that decides the same by itself at once."""

import base64
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relaymta.proto import reply
from relaymta.proto.session import ASKED, CLAIMED, COMMANDS, COMPLETE, DATA, STORING, TLS, Question, Session
from relaymta.proto.smtp_server import Host, Limits, Offers, ServerSession
from relaymta.proto.transaction import Transaction
from tests.conftest import PROVE
from tests.proto.test_smtp_server import EHLO, codes

REFUSED, LATER = b"554 5.7.1 Refused by a filter\r\n", b"451 4.7.1 A filter does not answer\r\n"
CLOSING = b"421 4.7.0 A filter wants no more of this\r\n"
ANSWERS = {"spam": REFUSED, "later": LATER}
MAIL, RCPT, LHLO = b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"LHLO client.example\r\n"
ALL, ENVELOPE = frozenset({"MAIL", "RCPT", "DATA"}), frozenset({"MAIL", "RCPT"})
LOGIN = b"AUTH PLAIN " + base64.b64encode(b"\0ann\0secret") + b"\r\n"


def filters(address: str) -> bytes | None:
    """What filters say to an address."""
    return ANSWERS.get(address.partition("@")[0])


class Mail(Transaction):
    """A transaction that refuses recipients at no.example. `asks`: filters are asked; else it knows what they would say.
    `ends`: what each was at its end, but for those whose sender was refused; `refusals`: of its own."""

    def __init__(self, sender: str, smtputf8: bool, limits: Limits, host: "Filtered") -> None:
        super().__init__(sender, smtputf8, limits)
        self.asks, self.host = host.verbs if host.asks else frozenset(), host

    def accept(self, address: str) -> bytes | None:
        if address.endswith("@no.example"):
            return reply.RELAY_DENIED
        return None if self.asks else filters(address)

    def rejects(self, address: str, answer: bytes) -> None:
        if address.endswith("@no.example"):
            self.host.refusals.append((address, answer))

    def end(self) -> None:
        if filters(self.sender) is None:
            self.host.ends.append((self.sender, tuple(self.recipients), min(self.size, self.limits.message_size + 1)))


class Filtered(Host):
    def __init__(self, asks: bool, lmtp: bool = False, limits: Limits | None = None) -> None:
        super().__init__(limits or Limits(), Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"), clear=True, lmtp=lmtp))
        self.asks = asks
        self.verbs = ENVELOPE
        self.ends: list[tuple[str, tuple[str, ...], int]] = []
        self.refusals: list[tuple[str, bytes]] = []

    def begin(self, session: Session, sender: str, size: int, smtputf8: bool) -> Transaction | bytes:
        answer = None if self.asks else filters(sender)
        return Mail(sender, smtputf8, self.limits, self) if answer is None else answer


class Talk:
    """A dialogue. `late`: whether what the session waits for is left for later, until more has arrived."""

    def __init__(self, host: Filtered, late: Callable[[], bool] = lambda: False) -> None:
        self.host, self.late = host, late
        self.made = ServerSession("mx.example", host)
        self.made.greet()
        self.out = b""
        self.questions: list[tuple[Question, str]] = []
        self.messages: list[tuple[str, tuple[str, ...], bytes]] = []

    @property
    def waits(self) -> bool:
        return self.made.state in (ASKED, CLAIMED, COMPLETE, STORING)

    def say(self, data: bytes) -> None:
        """Send octets; they are kept while something is waited for, one way or the other."""
        made = self.made
        if made.closing:
            return
        if self.waits and self.late():
            made.keep(data)
        else:
            self.out += made.receive(data)
        while self.waits or made.behind:
            if self.waits and self.late():
                return
            self.step()

    def step(self) -> None:
        made = self.made
        if made.state == ASKED:
            question, transaction = made.question, made.transaction
            assert question is not None and transaction is not None and made.complete is None and not made.behind
            assert made.receive(b"") == b"" and made.state == ASKED
            self.questions.append((question, transaction.sender))
            self.out += made.answered(self.answer(question, transaction.sender))
            assert made.question is None
        elif made.state == CLAIMED:
            self.out += made.checked(reply.WRONG_CREDENTIALS)
        elif made.state == COMPLETE:
            mail = made.transaction
            assert mail is not None
            self.messages.append((mail.sender, tuple(mail.recipients), b"".join(mail.take())))
            made.store()
        elif made.state == STORING:
            count = len(self.messages[-1][1])
            lmtp = self.host.offers.lmtp
            self.out += made.finish([b"250 2.1.5 filed\r\n"] * count if lmtp else b"250 2.0.0 queued\r\n")
        else:
            self.out += made.receive(b"")

    @staticmethod
    def answer(question: Question, sender: str) -> bytes | None:
        """To DATA a sender whose name begins with a `d` is refused."""
        if question.verb == "DATA":
            return filters(sender[1:]) if sender.startswith("d") else None
        return filters(question.address if question.verb == "RCPT" else sender)

    def settle(self) -> None:
        """All that has come is answered; a TLS handshake is done."""
        while self.waits or self.made.behind:
            self.step()
        if self.made.state == TLS:
            self.made.tls_started()


def play(wire: bytes, asks: bool, step: int = 0, lmtp: bool = False) -> Talk:
    """A dialogue, cut where the wire has a `|`, at which the client waits for all replies, and at each `step`th octet."""
    talk = Talk(Filtered(asks, lmtp))
    talk.host.verbs = ALL
    for flight in wire.split(b"|"):
        for at in range(0, len(flight), step or len(flight) or 1):
            talk.say(flight[at : at + (step or len(flight))])
        talk.settle()
    return talk


# Behind a question

BEHIND = {
    "EHLO": EHLO, "HELO": b"HELO x\r\n", "LHLO": LHLO, "MAIL": MAIL, "RCPT": RCPT, "RCPT twice": RCPT * 2, "DATA": b"DATA\r\n",
    "DATA x": b"DATA x\r\n", "data": b"DATA\r\n|Subject: x\r\n\r\n..x\r\n.\r\n", "BDAT 0": b"BDAT 0 LAST\r\n",
    "BDAT": b"BDAT 6\r\nMAIL\r\nBDAT 8 LAST\r\nRSET\r\n\r\n", "BDAT x": b"BDAT x\r\n" + MAIL, "RSET": b"RSET\r\n",
    "NOOP": b"NOOP\r\n", "VRFY": b"VRFY x\r\n", "HELP": b"HELP\r\n", "QUIT": b"QUIT\r\n" + MAIL, "AUTH": LOGIN,
    "AUTH, asked for": b"AUTH LOGIN\r\nRSET\r\nRSET\r\n", "RSET, AUTH": b"RSET\r\n" + LOGIN,
    "RSET, AUTH, asked for": b"RSET\r\nAUTH LOGIN\r\nRSET\r\nQUIT\r\n", "AUTH by tab": b"AUTH\tLOGIN\r\n",
    "STARTTLS": b"STARTTLS\r\n|" + EHLO, "STARTTLS x": b"STARTTLS x\r\n", "XCLIENT": b"XCLIENT ADDR=192.0.2.1\r\n",
    "WHAT": b"WHAT\r\n", "HELLOWORLD": b"HELLOWORLD x\r\n", "tab": b"NOOP\tx\r\n", "empty": b"\r\n", "NUL": b"NOOP \0\r\n",
    "bare LF": b"NOOP\nNOOP\r\n", "too long": b"NOOP " + b"x" * 13_000 + b"\r\n", "HTTP": b"GET / HTTP/1.1\r\n" + MAIL,
    "TLS": b"\x16\x03\x01" + MAIL,
}  # fmt: skip
BEFORE = {
    "MAIL": EHLO + MAIL, "MAIL refused": EHLO + b"MAIL FROM:<spam@b>\r\n", "MAIL later": EHLO + b"MAIL FROM:<later@b>\r\n",
    "RCPT": EHLO + MAIL + RCPT, "RCPT refused": EHLO + MAIL + b"RCPT TO:<spam@d>\r\n",
    "RCPT later": EHLO + MAIL + b"RCPT TO:<later@d>\r\n", "RCPT of two": EHLO + MAIL + RCPT + b"RCPT TO:<spam@d>\r\n",
    "RCPT refused here": EHLO + MAIL + b"RCPT TO:<c@no.example>\r\n",
}  # fmt: skip


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("step", [0, 1])
def test_every_command_waits_for_the_question_in_front_of_it(before, behind, step):
    wire = BEFORE[before] + BEHIND[behind] + b"NOOP\r\n" * (behind not in ("DATA", "STARTTLS", "data"))
    if len(wire) > 10_000 and step:
        step = 997
    found, expected = play(wire, True, step), play(wire, False, step)
    assert found.out == expected.out and found.messages == expected.messages and found.host.ends == expected.host.ends
    assert (
        found.host.refusals[: len(expected.host.refusals)] == expected.host.refusals or "later" in before or "refused" in before
    )
    assert (found.made.closing, found.made.foreign, found.made.errors) == (
        expected.made.closing, expected.made.foreign, expected.made.errors
    )  # fmt: skip
    assert (found.made.state, found.made.helo, found.made.secure) == (
        expected.made.state,
        expected.made.helo,
        expected.made.secure,
    )


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("answer", [None, REFUSED, LATER])
def test_nothing_behind_a_question_has_any_effect_before_it_is_answered(behind, answer):
    talk = Talk(Filtered(True))
    made, (wire, *rest) = talk.made, BEHIND[behind].split(b"|")
    out = made.receive(b"NOOP\r\n" + EHLO + MAIL + wire)
    assert codes(out) == [250, 250] and made.question == Question("MAIL") and not made.behind
    before = made.transaction
    assert before is not None and before.sender == "a@b.example" and not before.recipients and not before.chunked
    assert made.receive(b"".join(rest)) == b"" and made.transaction is before and made.state == ASKED and not made.errors
    out = made.answered(answer)
    assert out == (answer or reply.SENDER_OK) and made.state == COMMANDS and made.question is None
    assert made.transaction is (before if answer is None else None) and made.errors == (answer is REFUSED) and made.behind


def test_what_is_asked():
    talk = Talk(Filtered(True))
    made = talk.made
    assert codes(made.receive(EHLO + b"MAIL FROM:<a@b.example> SIZE=100  BODY=8BITMIME\tauth=<>\r\n")) == [250]
    assert made.question == Question("MAIL", "", ("SIZE=100", "BODY=8BITMIME", "auth=<>"))
    assert made.transaction is not None and made.transaction.announced == 100
    assert made.answered(None) == reply.SENDER_OK and not made.behind
    assert made.receive(b"RCPT TO:<C@D.example>\r\n") == b"" and made.question == Question("RCPT", "C@D.example", ())
    assert made.transaction.recipients == []
    assert made.answered(None) == reply.RECIPIENT_OK and made.transaction.recipients == ["C@D.example"]
    assert made.receive(b"RCPT TO:<e@d.example>\r\n") == b"" and made.answered(REFUSED) == REFUSED
    assert made.transaction.recipients == ["C@D.example"] and made.errors == 1 and made.host.refusals == []


@pytest.mark.parametrize("wire", [
    b"MAIL FROM:a b\r\n", b"MAIL FROM:<a@b> WHAT=1\r\n", b"MAIL FROM:<a@b> SIZE=999999999\r\n", RCPT,
    "MAIL FROM:<ü@b>\r\n".encode(),
], ids=lambda wire: repr(wire[:30]))  # fmt: skip
def test_nobody_is_asked_about_what_the_relay_itself_refuses(wire):
    talk = play(EHLO + wire + MAIL, True)
    assert [question.verb for question, _ in talk.questions] == ["MAIL"] and codes(talk.out)[1] >= 500


def test_a_recipient_that_the_relay_itself_refuses_is_told_and_nothing_is_waited_for():
    limits = Limits(recipients=1)
    made = Talk(Filtered(True, limits=limits)).made
    made.receive(EHLO + MAIL)
    made.answered(None)
    assert made.receive(b"RCPT TO:<x@no.example>\r\n") == reply.RELAY_DENIED and made.state == COMMANDS
    assert made.host.refusals == [("x@no.example", reply.RELAY_DENIED)]
    made.receive(b"RCPT TO:<spam@d.example>\r\n")
    made.answered(REFUSED)
    made.receive(RCPT)
    made.answered(None)
    assert made.receive(RCPT) == reply.TOO_MANY_RECIPIENTS and made.state == COMMANDS  # the refused ones do not count
    assert len(made.host.refusals) == 1


def test_a_hundred_recipients_in_one_segment_are_asked_about_one_by_one():
    rcpts = [b"RCPT TO:<%s%d@d.example>\r\n" % (b"spam" if i % 7 == 3 else b"u", i) for i in range(150)]
    talk = Talk(Filtered(True, limits=Limits(errors=1000)))
    made, asked = talk.made, []
    out = made.receive(EHLO + MAIL + b"".join(rcpts) + b"DATA\r\n")
    while made.state == ASKED or made.behind:
        if made.state == ASKED:
            assert made.question is not None
            asked.append(made.question.address)
            out += made.answered(REFUSED if asked[-1].startswith("spam") else None)
        else:
            out += made.receive(b"")
    assert asked[1:] == [f"{'spam' if i % 7 == 3 else 'u'}{i}@d.example" for i in range(150)]
    assert codes(out) == [250, 250, *(554 if i % 7 == 3 else 250 for i in range(150)), 354]
    assert made.transaction is not None and made.transaction.recipients == [one for one in asked[1:] if one[0] == "u"]


# Message data


@pytest.mark.parametrize("arrives", ["at once", "while it is asked", "in octets"])
@pytest.mark.parametrize("early", [b"", b"S", b"Subject: x\r\n"])
def test_data_behind_questions_is_early_only_where_it_is(arrives, early):
    talk = Talk(Filtered(True))
    made, behind = talk.made, RCPT * 2 + b"DATA\r\n" + early
    if arrives == "at once":
        made.receive(EHLO + MAIL + behind)
    elif arrives == "in octets":
        made.receive(EHLO + MAIL)
        for at in range(len(behind)):
            assert made.receive(behind[at : at + 1]) == b""
    else:
        made.receive(EHLO + MAIL + RCPT)
        made.keep(RCPT + b"DATA\r\n")
        made.keep(early)
    talk.settle()
    assert len(talk.questions) == 3 and made.closing == bool(early)
    assert talk.out.endswith(reply.TALKING_EARLY if early else reply.GO_AHEAD)
    if not early:
        talk.say(b"MAIL FROM:<x@y>\r\n..\r\n.\r\nNOOP\r\n")
        assert talk.messages == [("a@b.example", ("c@d.example",) * 2, b"MAIL FROM:<x@y>\r\n.\r\n")]
        assert talk.out.endswith(b"250 2.0.0 queued\r\n" + reply.NOOP)


@pytest.mark.parametrize("early", [b"", b"N", EHLO])
def test_starttls_behind_questions_is_early_only_where_it_is(early):
    """Else what was sent in the clear would be taken for what came by TLS."""
    talk = Talk(Filtered(True))
    talk.say(EHLO + MAIL + RCPT + b"STARTTLS\r\n" + early)
    assert len(talk.questions) == 2 and talk.made.closing == bool(early)
    assert talk.out.endswith(reply.TALKING_EARLY if early else reply.START_TLS) and (talk.made.state == TLS) != bool(early)
    assert talk.host.ends == [("a@b.example", ("c@d.example",), 0)]


@pytest.mark.parametrize("sender, code", [(b"a", 250), (b"spam", 503)])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_the_octets_of_a_chunk_behind_questions_stay_with_it(sender, code, step):
    chunk = MAIL + b"RSET\r\n.\r\nDATA\r\n"
    wire = (
        EHLO + b"MAIL FROM:<" + sender + b"@b>\r\n" + RCPT + b"BDAT %d\r\n" % len(chunk) + chunk + b"BDAT 4 LAST\r\nQUITNOOP\r\n"
    )
    talk = play(wire, True, step)
    accepted = code == 250
    assert codes(talk.out) == [250, 250 if accepted else 554, code, code, code, 250]
    assert talk.messages == ([(f"{sender.decode()}@b", ("c@d.example",), chunk + b"QUIT")] if accepted else [])


def asked_about_data(wire: bytes, lmtp: bool = False, errors: int = 20) -> ServerSession:
    """A session that asks about DATA alone, and has taken this."""
    host = Filtered(True, lmtp, Limits(errors=errors))
    host.verbs = frozenset({"DATA"})
    made = Talk(host).made
    made.receive((LHLO if lmtp else EHLO) + MAIL + RCPT * 2 + wire)
    return made


def test_data_waits_for_its_question():
    made = asked_about_data(b"DATA\r\n")
    assert made.question is not None and made.question[:3] == ("DATA", "", ()) and made.state == ASKED
    assert made.answered(None) == b"" and made.behind and made.receive(b"") == reply.GO_AHEAD and made.state == DATA
    made.receive(b"x: y\r\n\r\n.\r\n")
    assert made.complete is not None and made.complete.data == [b"x: y\r\n\r\n"]


def test_octets_behind_data_that_is_asked_about_are_early():
    made = asked_about_data(b"DATA\r\n")
    assert made.receive(b"Subject: x\r\n") == b""
    assert made.answered(None) == b"" and made.receive(b"") == reply.TALKING_EARLY and made.closing


@pytest.mark.parametrize("answer, errors", [(REFUSED, 1), (LATER, 0)])
def test_data_that_is_refused_leaves_the_transaction_and_is_asked_about_anew(answer, errors):
    made = asked_about_data(b"DATA\r\n")
    made.keep(b"NOOP\r\nDATA\r\n")
    assert made.answered(answer) == answer and made.behind and made.errors == errors
    assert made.receive(b"") == reply.NOOP and made.state == ASKED
    assert made.answered(None) == b"" and made.receive(b"") == reply.GO_AHEAD
    assert made.transaction is not None and len(made.transaction.recipients) == 2


@pytest.mark.parametrize("lmtp", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("answer, errors", [(REFUSED, 1), (LATER, 0)])
def test_a_chunk_that_is_refused_is_read_and_its_transaction_is_over(answer, errors, last, lmtp):
    made = asked_about_data(b"BDAT 6%b\r\nRSET" % (b" LAST" if last else b""), lmtp)
    assert made.question is not None and made.question.parameters == (("6", "LAST") if last else ("6",))
    before = made.transaction
    assert made.answered(answer) == b"" and made.behind and made.transaction is None and before is not None
    assert (
        made.receive(b"") == b""
        and made.receive(b"\r\nBDAT 2 LAST\r\nhi") == answer * (2 if lmtp and last else 1) + reply.NEED_SENDER
    )
    assert made.errors == errors + 1 and made.state == COMMANDS and made.receive(b"NOOP\r\n") == reply.NOOP
    assert len(made.host.ends) == 1


def test_only_the_first_chunk_is_asked_about():
    made = asked_about_data(b"BDAT 2\r\nhi")
    assert made.answered(None) == b"" and made.receive(b"") == reply.RESET
    assert made.receive(b"BDAT 4 LAST\r\n\r\n\r\n") == b"" and made.complete is not None
    assert b"".join(made.complete.take()) == b"hi\r\n\r\n"


@pytest.mark.parametrize("answer", [CLOSING, b"521 5.3.2 No mail here\r\n"])
@pytest.mark.parametrize("wire", [b"DATA\r\n", b"BDAT 6 LAST\r\nRSET\r\n", b"BDAT 0 LAST\r\n"])
def test_a_reply_to_data_that_ends_the_session(wire, answer):
    made = asked_about_data(wire)
    assert made.answered(answer) == answer and made.closing and not made.behind and made.transaction is None
    assert made.receive(b"") == b""


def test_too_many_refusals_of_data_end_the_session():
    made = asked_about_data(b"DATA\r\n", errors=2)
    made.answered(REFUSED)
    made.receive(b"DATA\r\n")
    assert made.answered(REFUSED) == REFUSED + reply.TOO_MANY_ERRORS and made.closing and not made.behind
    made = asked_about_data(b"BDAT 2\r\nhi", errors=1)
    assert made.answered(REFUSED) == b"" and made.receive(b"") == REFUSED + reply.TOO_MANY_ERRORS and made.closing


# Ends


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
@pytest.mark.parametrize("answer", [CLOSING, b"421-4.7.0 More\r\n421 4.7.0 than one line\r\n"])
@pytest.mark.parametrize("behind", [b"BDAT 2 LAST\r\nhi" + MAIL, b"NOOP\r\n" * 100], ids=["BDAT", "NOOP"])
def test_a_421_ends_the_session_and_nothing_behind_it_is_parsed(verb, answer, behind):
    made = Talk(Filtered(True)).made
    made.receive(EHLO + MAIL + RCPT + behind)
    if verb == "RCPT":
        assert made.answered(None) == reply.SENDER_OK and made.receive(b"") == b""
    assert made.question is not None and made.question.verb == verb
    assert made.answered(answer) == answer and made.closing and not made.behind and made.state == COMMANDS
    assert made.receive(b"NOOP\r\n") == b"" and made.transaction is None
    assert made.host.ends == [("a@b.example", (), 0)]


@pytest.mark.parametrize("answer, count", [(REFUSED, 3), (LATER, 0)])
@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
def test_a_refusal_for_good_counts_as_an_error(answer, count, verb):
    made = Talk(Filtered(True, limits=Limits(errors=3))).made
    made.receive(EHLO + (MAIL * 5 if verb == "MAIL" else MAIL + RCPT * 5) + b"NOOP\r\n")
    out = b""
    while made.state == ASKED or made.behind:
        if made.state == ASKED:
            assert made.question is not None
            out += made.answered(answer if made.question.verb == verb else None)
        else:
            out += made.receive(b"")
    assert made.errors == count and made.closing == bool(count)
    assert (made.transaction is None) == (verb == "MAIL" or made.closing)
    assert codes(out)[verb == "RCPT" :] == ([554, 554, 554, 421] if count else [451] * 5 + [250])


@pytest.mark.parametrize("wire", [MAIL, MAIL + RCPT, MAIL + RCPT + b"DATA\r\n"], ids=["MAIL", "pipelined", "DATA"])
def test_a_session_that_is_closed_while_it_asks_has_no_question_and_no_transaction(wire):
    made = Talk(Filtered(True)).made
    made.receive(EHLO + wire)
    assert made.state == ASKED
    made.close()
    assert made.question is None and made.transaction is None and not made.pending and not made.behind
    assert made.state == COMMANDS and made.host.ends == [("a@b.example", (), 0)]
    assert made.receive(RCPT) == b""
    made.close()
    assert len(made.host.ends) == 1


def test_where_nothing_asks_there_is_no_question():
    made = Talk(Filtered(False)).made
    assert codes(made.receive(EHLO + MAIL + RCPT + b"DATA\r\n")) == [250, 250, 250, 354] and made.state == DATA
    assert made.question is None


def test_the_mechanism_is_that_of_the_user():
    class Proxied(Filtered):
        def assume(self, attributes: dict[str, str]) -> bytes | None:
            if "LOGIN" in attributes:
                self.user = attributes["LOGIN"]
            return None

    host = Proxied(True)
    host.offers = Offers(starttls=True, mechanisms=("PLAIN", "LOGIN"), clear=True, xclient=True)

    def log_in(answer: bytes, line: bytes = LOGIN) -> str:
        made.receive(line)
        host.user = "ann" if answer.startswith(b"2") else ""
        made.checked(answer)
        return made.mechanism

    made = ServerSession("mx.example", host)
    made.greet()
    made.receive(EHLO)
    assert made.mechanism == "" and log_in(reply.WRONG_CREDENTIALS) == "" and log_in(reply.LOGGED_IN) == "PLAIN"
    made.receive(b"XCLIENT ADDR=192.0.2.1\r\n" + EHLO)
    assert made.mechanism == "PLAIN"  # that is still ann
    made.receive(b"XCLIENT LOGIN=bob\r\n" + EHLO)
    assert (host.user, made.mechanism) == ("bob", "")
    host.user = ""
    words = [base64.b64encode(word) + b"\r\n" for word in (b"ann", b"secret")]
    assert log_in(reply.LOGGED_IN, b"AUTH LOGIN\r\n" + b"".join(words)) == "LOGIN"
    made.receive(b"STARTTLS\r\n")
    assert made.state == TLS and made.mechanism == "LOGIN"
    made.tls_started()
    assert (host.user, made.mechanism) == ("", "")


# Any split, any timing

DATA_OF = b"Subject: x\r\n\r\n..dot\r\n.\r\n"
WORDS = st.sampled_from([
    EHLO, LHLO, MAIL, MAIL + RCPT, MAIL + RCPT + b"BDAT 2 LAST\r\nhi", b"MAIL FROM:<spam@b>\r\n", b"MAIL FROM:<later@b>\r\n",
    b"MAIL FROM:<d@e> SIZE=3 BODY=8BITMIME\r\n", RCPT, RCPT, b"RCPT TO:<spam@d>\r\n", b"RCPT TO:<later@d>\r\n", RCPT * 70,
    b"RCPT TO:<e@no.example>\r\n", b"RSET\r\n", b"NOOP\r\n", b"NOOP\r\n" * 70, b"WHAT\r\n", b"HELLOWORLD\r\n",
    b"BDAT 6\r\nRSET\r\n", b"BDAT 6 LAST\r\nMAIL\r\n", b"BDAT 0 LAST\r\n", b"BDAT 3 LAST\r\nx\ny",
    b"BDAT 200 LAST\r\n" + b"x" * 200, b"DATA\r\n|" + DATA_OF, b"DATA\r\n|" + DATA_OF + MAIL, b"DATA\r\n|", LOGIN,
    b"AUTH LOGIN\r\n*\r\n", b"STARTTLS\r\n|", b"QUIT\r\n", b"GET / HTTP/1.1\r\n", b"NOOP\nx\r\n", b"BDAT x\r\n",
])  # fmt: skip


def dice(random: Random) -> Callable[[], bool]:
    return lambda: random.random() < 0.6


@given(
    words=st.lists(WORDS, max_size=14), cuts=st.lists(st.integers(0, 700), max_size=12), seed=st.integers(0, 1 << 32),
    lmtp=st.booleans(),
)  # fmt: skip
@settings(max_examples=5000 if PROVE else 300, deadline=None)
def test_neither_cuts_nor_the_timing_of_answers_change_anything(words, cuts, seed, lmtp):
    """The replies, their order, the transactions and their ends are those of a session that knows the answers itself; whether it
    is asked octet by octet, or answered at once or late."""
    wire, limits = (LHLO if lmtp else EHLO) + b"".join(words), Limits(message_size=100, errors=12)
    talks = [Talk(Filtered(False, lmtp, limits)), Talk(Filtered(True, lmtp, limits))]
    talks.append(Talk(Filtered(True, lmtp, limits), dice(Random(seed))))
    for talk in talks:
        talk.host.verbs = ALL
    for number, talk in enumerate(talks):
        for flight in wire.split(b"|"):
            for piece in pieces(flight, cuts if number == 2 else []):
                talk.say(piece)
            talk.settle()
        talk.made.close()
    known, at_once, late = talks
    for talk in (at_once, late):
        assert talk.out == known.out and talk.messages == known.messages and talk.host.ends == known.host.ends
        made = talk.made
        assert (made.errors, made.foreign, made.parting, made.secure) == (
            known.made.errors, known.made.foreign, known.made.parting, known.made.secure
        )  # fmt: skip
    assert late.questions == at_once.questions and late.host.refusals == at_once.host.refusals == known.host.refusals


REFUSED_LATER = st.sampled_from([
    b"MAIL FROM:<dspam@b>\r\n" + RCPT, b"MAIL FROM:<dlater@b>\r\n" + RCPT * 2, b"MAIL FROM:<a@b>\r\n" + RCPT,
    b"DATA\r\n|" + DATA_OF, b"DATA\r\n|", b"DATA\r\nearly\r\n", b"BDAT 6\r\nRSET\r\n", b"BDAT 6 LAST\r\nMAIL\r\n",
    b"BDAT 0 LAST\r\n", b"RSET\r\n", b"NOOP\r\n",
])  # fmt: skip


@given(words=st.lists(REFUSED_LATER, max_size=14), seed=st.integers(0, 1 << 32), lmtp=st.booleans())
@settings(max_examples=5000 if PROVE else 300, deadline=None)
def test_neither_does_the_timing_of_refusals_of_data(words, seed, lmtp):
    """Octets that come while it is asked are, behind DATA, as early as those of the same segment; behind BDAT they are its."""
    wire, limits = (LHLO if lmtp else EHLO) + b"".join(words), Limits(errors=12)
    talks = [Talk(Filtered(True, lmtp, limits)), Talk(Filtered(True, lmtp, limits), dice(Random(seed)))]
    for talk in talks:
        talk.host.verbs = ALL
        for flight in wire.split(b"|"):
            talk.say(flight)
            talk.settle()
        talk.made.close()
    at_once, late = talks
    assert late.out == at_once.out and late.messages == at_once.messages and late.host.ends == at_once.host.ends
    assert late.questions == at_once.questions and late.made.errors == at_once.made.errors
    assert not any(sender.startswith("d") for sender, _, _ in late.messages)


def pieces(flight: bytes, cuts: list[int]) -> Iterator[bytes]:
    return (flight[a:b] for a, b in pairwise(sorted({0, len(flight), *(at for at in cuts if at < len(flight))})))
