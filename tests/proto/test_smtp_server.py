"""The server session in dialogues: commands and replies, in one piece and octet by octet."""

import re
import time

import pytest

from relaymta.proto import reply
from relaymta.proto.session import DATA, STORING, TLS, Session
from relaymta.proto.smtp_server import ENOUGH, Host, Limits, Offers, ServerSession
from relaymta.proto.transaction import PIECES, Transaction

EHLO = b"EHLO client.example\r\n"
ENVELOPE = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"


class Mail(Transaction):
    """A transaction that rejects recipients which contain `rejected`, and reports its end to `ends`."""

    def __init__(self, sender: str, smtputf8: bool, limits: Limits, rejected: str, ends: list[str]) -> None:
        super().__init__(sender, smtputf8, limits)
        self.rejected, self.ends = rejected, ends

    def accept(self, address: str) -> bytes | None:
        return reply.RELAY_DENIED if self.rejected and self.rejected in address else None

    def end(self) -> None:
        self.ends.append("ended")


class Choosy(Host):
    """Makes such transactions. `calls`: their senders and ends, in order."""

    def __init__(self, limits: Limits, rejected: str = "", **offers: bool) -> None:
        super().__init__(limits, Offers(**offers))  # type: ignore[arg-type]
        self.rejected = rejected
        self.calls: list[str] = []

    def begin(self, session: Session, sender: str, size: int, smtputf8: bool) -> Transaction | bytes:
        self.calls.append(sender)
        return Mail(sender, smtputf8, self.limits, self.rejected, self.calls)


def session(limits: Limits | None = None, refuse: str = "") -> ServerSession:
    made = ServerSession("mx.example", Choosy(limits or Limits(), refuse))
    assert made.greet() == b"220 mx.example ESMTP relaymta\r\n"
    return made


def talk(data: bytes, limits: Limits | None = None, refuse: str = "", step: int = 0, answer: bytes = b"250 2.0.0 queued\r\n"):
    """(replies, message data, session) of a dialogue; every complete message is accepted at once."""
    made = session(limits, refuse)
    out, messages = b"", []
    for start in range(0, len(data), step or len(data)):
        out += made.receive(data[start : start + (step or len(data))])
        while made.complete is not None or made.behind:
            if made.complete is not None:
                messages.append(b"".join(made.complete.take()))
                out += made.finish(answer)
            else:
                out += made.receive(b"")
    return out, messages, made


def codes(out: bytes) -> list[int]:
    return [int(line[:3]) for line in out.split(b"\r\n") if line[3:4] == b" "]


CASES = [
    ("mail", EHLO + ENVELOPE + b"RSET\r\nQUIT\r\n", [250, 250, 250, 250, 221]),
    ("helo", b"HELO x\r\nMAIL FROM:<>\r\nQUIT\r\n", [250, 250, 221]),
    ("no hello", b"MAIL FROM:<a@b>\r\n", [503]),
    ("no mail", EHLO + b"RCPT TO:<a@b>\r\n", [250, 503]),
    ("nested", EHLO + b"MAIL FROM:<a@b>\r\nMAIL FROM:<a@b>\r\n", [250, 250, 503]),
    ("no rcpt", EHLO + b"MAIL FROM:<a@b>\r\nDATA\r\n", [250, 250, 554]),
    ("bad paths", EHLO + b"MAIL FROM:a b\r\nMAIL FROM:<a@b\r\nMAIL FROM:<@@>\r\nMAIL\r\n", [250, 501, 501, 501, 501]),
    ("size over", EHLO + b"MAIL FROM:<a@b> SIZE=99999999999\r\n", [250, 552]),
    ("size bad", EHLO + b"MAIL FROM:<a@b> SIZE=x\r\nMAIL FROM:<a@b> SIZE=-1\r\n", [250, 501, 501]),
    ("parameters twice", EHLO + b"MAIL FROM:<a@b> SIZE=1 SIZE=2 BODY=7BIT BODY=8BITMIME AUTH=<>\r\n", [250, 250]),  # as Postfix
    ("size twice", EHLO + b"MAIL FROM:<a@b> SIZE=1 SIZE=99999999999\r\n", [250, 552]),
    ("parameter", EHLO + b"MAIL FROM:<a@b> WHAT=1\r\n", [250, 555]),
    ("body", EHLO + b"MAIL FROM:<a@b> BODY=8BITMIME SIZE=10\r\n", [250, 250]),
    ("utf8", EHLO + "MAIL FROM:<ü@b>\r\nMAIL FROM:<ü@b> SMTPUTF8\r\n".encode(), [250, 553, 250]),
    ("source route", EHLO + b"MAIL FROM:<@x,@y:a@b>\r\nRCPT TO:<@z:c@d>\r\n", [250, 250, 250]),
    ("quoted", EHLO + b'MAIL FROM:<"a b>"@c>\r\n', [250, 250]),
    ("literal", EHLO + b"MAIL FROM:<a@[192.0.2.1]>\r\nRCPT TO:<b@[IPv6:::1]>\r\nRCPT TO:<b@[x]>\r\n", [250, 250, 250, 501]),
    ("postmaster", EHLO + b"MAIL FROM:<>\r\nRCPT TO:<Postmaster>\r\n", [250, 250, 250]),
    ("unknown", b"WHAT\r\nHELLOWORLD\r\n", [500, 500]),
    ("starttls", b"STARTTLS\r\nAUTH PLAIN x\r\n", [502, 502]),
    ("bare lf", b"NOOP\nNOOP\r\n", [500]),
    ("others", b"NOOP\r\nVRFY x\r\nHELP\r\nnoop foo\r\n", [250, 252, 214, 250]),
    ("data", EHLO + ENVELOPE + b"DATA\r\n", [250, 250, 250, 354]),
    ("bad hello", b"EHLO\r\nEHLO a b\r\n", [501, 501]),
    ("bdat", EHLO + ENVELOPE + b"BDAT 4\r\na\r\nbBDAT 2 LAST\r\n\r\nNOOP\r\n", [250, 250, 250, 250, 250, 250]),
    ("bdat zero", EHLO + ENVELOPE + b"BDAT 3\r\na\r\nBDAT 0 LAST\r\nNOOP\r\n", [250, 250, 250, 250, 250, 250]),
    ("bdat early", EHLO + b"BDAT 4 LAST\r\nNOOPNOOP\r\n", [250, 503, 250]),
    ("bdat bad", EHLO + ENVELOPE + b"BDAT x\r\n", [250, 250, 250, 501]),
    ("data in bdat", EHLO + ENVELOPE + b"BDAT 1\r\naDATA\r\n", [250, 250, 250, 250, 503]),
]


@pytest.mark.parametrize(("data", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_dialogues(data, expected, step):
    out, _, _ = talk(data, step=step)
    assert codes(out) == expected


def send(message: bytes, limits: Limits | None = None, step: int = 0):
    """Replies after 354, and (message data, transaction) of each message, of one DATA."""
    made = session(limits)
    made.receive(EHLO + ENVELOPE)
    assert made.receive(b"DATA\r\n").startswith(b"354")
    out, messages = b"", []
    for start in range(0, len(message), step or len(message)):
        out += made.receive(message[start : start + (step or len(message))])
        while made.complete is not None or made.behind:
            if made.complete is not None:
                messages.append((b"".join(made.complete.take()), made.complete))
                out += made.finish(b"250 2.0.0 queued\r\n")
            else:
                out += made.receive(b"")
    return out, messages


@pytest.mark.parametrize("step", [0, 1, 5])
def test_message_data_is_unstuffed_and_the_next_command_follows(step):
    out, messages = send(b"Subject: x\r\n\r\n..dot\r\nend\r\n.\r\nNOOP\r\n", step=step)
    assert codes(out) == [250, 250]
    assert messages[0][0] == b"Subject: x\r\n\r\n.dot\r\nend\r\n"


# Published forms of SMTP smuggling, and their neighbours: none may end the message data, all are refused.
ENDINGS = [
    a + b"." + b
    for a in (b"\n", b"\r", b"\r\n", b"\r\r\n", b"\n\n", b"\r\n\x00")
    for b in (b"\n", b"\r", b"\r\n", b"\r\r\n", b"\n\r\n", b"\x00\r\n")
]


@pytest.mark.parametrize("ending", [e for e in ENDINGS if b"\r\n.\r\n" not in e], ids=repr)
@pytest.mark.parametrize("step", [0, 1])
def test_smuggling_is_refused(ending, step):
    inner = b"MAIL FROM:<evil@x>\r\nRCPT TO:<v@y>\r\nDATA\r\n"
    out, messages = send(b"a: b\r\n\r\nx" + ending + inner + b"\r\n.\r\n", step=step)
    assert len(messages) == 0
    assert codes(out) == [550]


def test_normalize_repairs_instead():
    out, messages = send(b"a: b\n\nx\n.\ny\r\n.\r\n", Limits(normalize=True))
    assert codes(out) == [250]
    assert messages[0][0] == b"a: b\r\n\r\nx\r\n.\r\ny\r\n"


@pytest.mark.parametrize(
    ("message", "limits", "code"),
    [
        (b"x" * 101 + b"\r\n.\r\n", Limits(message_size=100), 552),
        (b"x" * 999 + b"\r\n.\r\n", Limits(), 550),
        (b"x" * 999 + b"\r\n.\r\n", Limits(long_lines=True), 250),
        (b"\0\r\n.\r\n", Limits(), 550),
        (b"\0\r\n.\r\n", Limits(normalize=True), 250),
        (b".\r\n", Limits(), 250),
    ],
)
def test_limits_on_message_data(message, limits, code):
    assert codes(send(message, limits)[0]) == [code]


def test_message_data_before_354_closes_the_connection():
    out, _, made = talk(EHLO + ENVELOPE + b"DATA\r\nSubject: early\r\n")
    assert codes(out)[-1] == 554
    assert made.closing


def test_a_hundred_recipients_in_one_packet():
    rcpts = b"".join(b"RCPT TO:<u%d@d.example>\r\n" % i for i in range(100))
    out, _, _ = talk(EHLO + b"MAIL FROM:<a@b>\r\n" + rcpts + b"DATA\r\n")
    assert codes(out) == [250] * 102 + [354]


def test_too_many_recipients_and_errors():
    rcpts = b"".join(b"RCPT TO:<u%d@d.example>\r\n" % i for i in range(102))
    out, _, _ = talk(EHLO + b"MAIL FROM:<a@b>\r\n" + rcpts, Limits(recipients=100))
    assert codes(out)[-2:] == [452, 452]
    assert b"4.5.3" in out
    out, _, made = talk(b"BAD\r\n" * 30)
    assert codes(out) == [500] * 20 + [421]
    assert made.closing


def test_refused_recipients_count_and_the_rest_is_taken():
    out, _, _ = talk(EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<x@no>\r\nRCPT TO:<y@yes>\r\n", refuse="@no")
    assert codes(out) == [250, 250, 550, 250]


def test_every_reply_has_an_enhanced_code():
    for name, value in vars(reply).items():
        if isinstance(value, bytes) and name != "GO_AHEAD":
            assert re.match(rb"([245])\d\d \1\.\d{1,3}\.\d{1,3} [^\r\n]+\r\n\Z", value), name


SMTP = EHLO + ENVELOPE + b"BDAT 2 LAST\r\nhi"
FOREIGN = [
    # Cross-protocol requests: a browser's form (the "form protocol attack", 2001), fetch(), an internal service's client.
    *(word + b" / HTTP/1.1\r\nHost: mx.example:25\r\nContent-Length: 90\r\n\r\n" for word in (
        b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"PATCH", b"DELETE", b"TRACE", b"PROPFIND", b"LOCK", b"ANYTHING", b"post"
    )),
    *(word + b" / HTTP/1.0\r\n\r\n" for word in (b"EHLO", b"HELO", b"MAIL", b"NOOP", b"HELP", b"RSET", b"QUUX")),
    b"CONNECT mx.example:25 HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\r\n",  # HTTP/0.9
    b"POST / HTTP/1.1\nHost: mx.example\n\n",  # bare LF: all of it is one line, with the first of ours
    b"POST /" + b"x" * 3000 + b" HTTP/1.1\r\n",  # longer than a command may be
    b"POST /" + b"x" * 20000 + b" HTTP/1.1\r\n",
    b"POST /\0 HTTP/1.1\r\n",
    # Postfix: smtpd_forbidden_commands = CONNECT GET POST regexp:{{/^[^A-Z]/ Bogus}}
    b"Host: mx.example\r\n", b"Content-Type: text/plain\r\n", b"X-A:b\r\n", b"Subject: message data without DATA\r\n",
    b" EHLO client.example\r\n", b"{\"json\": 1}\r\n", b"<html>\r\n", b"*1\r\n$4\r\nPING\r\n", b"\xef\xbb\xbfEHLO x\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of a ClientHello, which no CRLF follows
    b"\x03\x00\x00\x13\x0e\xe0", b"SSH-2.0-OpenSSH_9.2\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 25\r\n", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11",  # from a balancer that is not configured
]  # fmt: skip


@pytest.mark.parametrize("before", [b"", EHLO, EHLO + ENVELOPE, b"WRONG\r\n"], ids=["first", "greeted", "in mail", "wrong"])
@pytest.mark.parametrize("data", FOREIGN, ids=lambda data: repr(data[:20]))
@pytest.mark.parametrize("step", [0, 1, 7])
def test_another_protocol_ends_the_session_before_anything_behind_it(before, data, step):
    out, messages, made = talk(before + data + SMTP, step=step)
    assert made.closing and made.foreign and not messages
    assert out.endswith(reply.NOT_SMTP) and out.count(b"421 ") == 1
    assert set(codes(out)[before.count(b"\r\n") :]) <= {421, 500}  # 500: an empty line in front


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\r\nNOOP\r\n", [500, 250]),
        (b"GETS\r\nPOSTED\r\nPUTT x\r\nNOOP\r\n", [500, 500, 500, 250]),
        (b"NOOP GET / HTTP/xyz\r\nNOOP GET/HTTP/1.1\r\n", [250, 250]),
        (b"EHLO http.example\r\nMAIL FROM:<get@http.example> BODY=8BITMIME\r\n", [250, 250]),
        (b"NOOP\nHost: x\r\nNOOP\r\n", [500, 250]),
        (b"x" * 3000 + b": y\r\nNOOP\r\n", [500, 250]),
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_what_only_looks_like_another_protocol_is_answered(data, expected, step):
    out, _, made = talk(data, step=step)
    assert codes(out) == expected and not made.closing


def test_an_unknown_word_in_front_hides_no_other():
    out, _, made = talk(EHLO + b"WHAT STARTTLS\r\nWHAT XCLIENT ADDR=192.0.2.1\r\nNOOP\r\n")
    assert codes(out) == [250, 500, 500, 250] and made.state != TLS


def test_work_for_one_call_is_bounded_and_what_comes_meanwhile_is_kept():
    made = session()
    wire = b"NOOP\r\n" * 10_000
    out = [made.receive(wire)]
    while made.behind:
        assert out[-1].count(b"\r\n") <= 2 * ENOUGH and len(out) < 1000
        made.keep(b"NOOP\r\n")
        out.append(made.receive(b""))
    assert b"".join(out).count(b"250 2.0.0 Ok\r\n") == 10_000 + len(out) - 1 and len(out) > 10


def _seconds(count: int) -> float:
    """Of so many empty chunks in one segment."""
    made = session()
    made.receive(EHLO + ENVELOPE)
    began = time.perf_counter()
    made.receive(b"BDAT 0\r\n" * count)
    while made.behind:
        made.receive(b"")
    assert made.parser.waiting() == 0
    return time.perf_counter() - began


def test_many_small_steps_through_one_segment_cost_no_more_each():
    few, many = (min(_seconds(count) / count for _ in range(5)) for count in (4_000, 256_000))
    assert many < 8 * few  # copied at each step: 100 times


def test_message_data_in_many_small_pieces_is_kept_as_few():
    made = session()
    made.receive(EHLO + ENVELOPE)
    for _ in range(5_000):
        made.receive(b"BDAT 1\r\nx")
    assert made.transaction is not None and len(made.transaction.data) <= PIECES
    assert b"".join(made.transaction.take()) == b"x" * 5_000


@pytest.mark.parametrize(
    "end",
    [b"RSET\r\n", EHLO, b"HELO x\r\n", b"BDAT 0 LAST\r\n", b"STARTTLS\r\n", b"QUIT\r\n", b"BDAT x\r\n", b"GET / HTTP/1.1\r\n",
     b"lost", b"WHAT\r\n" * 20],
    ids=lambda end: end[:4].decode(),
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 1])
def test_every_end_of_a_transaction_is_reached_before_what_follows_is_parsed(end, step):
    """And the caller sees each."""
    host = Choosy(Limits(message_size=5), starttls=True)
    made = ServerSession("mx.example", host)
    made.greet()
    made.receive(EHLO + b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 9\r\n" + b"x" * 9)
    assert made.state == DATA and host.calls == ["a@b"]
    wire = end + b"MAIL FROM:<e@f>\r\nRCPT TO:<c@d>\r\n"
    if end == b"lost":
        made.close()
    elif step:
        for at in range(len(end)):
            made.receive(end[at : at + 1])
    else:
        made.receive(wire if end != b"STARTTLS\r\n" else end)
    assert host.calls == ["a@b", "ended"] and made.transaction is None
    if made.closing:
        assert made.receive(wire) == b"" and not made.behind
        return
    if end == b"STARTTLS\r\n":
        made.tls_started()
        made.receive(EHLO)
    while made.behind:
        made.receive(b"")
    made.receive(wire[len(end) :] if step or end == b"STARTTLS\r\n" else b"")
    assert host.calls == ["a@b", "ended", "e@f"]


def test_a_message_that_is_being_stored_ends_with_its_reply_even_if_the_client_is_gone():
    host = Choosy(Limits())
    made = ServerSession("mx.example", host)
    made.greet()
    made.receive(EHLO + ENVELOPE + b"BDAT 2 LAST\r\nhi" + b"NOOP\r\n")
    made.store()
    assert made.state == STORING and made.complete is None
    made.close()
    assert host.calls == ["a@b.example"]
    made.finish(b"250 2.0.0 queued\r\n")
    assert host.calls == ["a@b.example", "ended"] and not made.behind and made.receive(b"") == b""
