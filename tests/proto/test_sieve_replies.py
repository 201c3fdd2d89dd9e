"""What Sieve scripts send: replies of vacation, redirected messages, refusals; and that nobody begins a line in their header."""

import email
import email.policy
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.envelope import Onward
from relaymta.proto.sieve_outcome import Answered
from relaymta.proto.sieve_replies import answered, redirected, rejection, vacation_reply

ANSWER = Answered(
    "ann@a.example", ("", "bob@b.example"), "Auto: hi", b"away\r\n", False, 7, b"k" * 16, b"<1@a.example>",
    (b"<0@a.example>", b"<1@a.example>"), 3,
)  # fmt: skip
FIELDS = ["From", "To", "Subject", "Date", "Message-ID", "In-Reply-To", "References", "Auto-Submitted", "MIME-Version"]
TEXT = ["Content-Type", "Content-Transfer-Encoding"]


def made(answer: Answered) -> bytes:
    return vacation_reply(answer, hostname="mx.b.example", ident="abc", seconds=1_795_842_000)


def read(answer: Answered) -> EmailMessage:
    """The reply, by the standard library."""
    data = made(answer)
    assert data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r") and b"\0" not in data
    assert all(len(line) <= 998 for line in data.split(b"\r\n"))
    return email.message_from_bytes(data, policy=email.policy.default)  # type: ignore[return-value]


def test_a_reply() -> None:
    assert made(ANSWER) == (
        b"From: <bob@b.example>\r\nTo: <ann@a.example>\r\nSubject: Auto: hi\r\nDate: Sat, 28 Nov 2026 05:00:00 +0000\r\n"
        b"Message-ID: <abc@mx.b.example>\r\nIn-Reply-To: <1@a.example>\r\nReferences: <0@a.example>\r\n\t<1@a.example>\r\n"
        b"Auto-Submitted: auto-replied\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\naway\r\n"
    )


def test_a_reply_to_a_message_without_an_identifier() -> None:
    found = read(ANSWER._replace(message_id=b"", references=()))
    assert "In-Reply-To" not in found and "References" not in found


def test_text_that_is_not_ascii() -> None:
    text = "ä€😀" * 40
    answer = ANSWER._replace(subject=text, sender=("Jürgen Bäcker", "bob@b.example"), reason=f"{text}\n.\nFrom x\n= \n".encode())
    data = made(answer)
    assert data.isascii() and all(len(line) <= 76 for line in data.split(b"\r\n"))
    found = read(answer)
    assert found["Subject"] == text
    assert str(found["From"]) == "Jürgen Bäcker <bob@b.example>"
    assert found.get_content() == f"{text}\r\n.\r\nFrom x\r\n= \r\n"


@pytest.mark.parametrize("name", ["Bob", 'B. "o" \\ b', "a, b", "=?utf-8?q?x?="])
def test_display_names(name: str) -> None:
    found = read(ANSWER._replace(sender=(name, "bob@b.example")))
    assert found["From"].addresses[0].display_name == name
    assert found["From"].addresses[0].addr_spec == "bob@b.example"


def test_an_entity_is_sent_as_it_is() -> None:
    entity = b"Content-Type: multipart/alternative;\n boundary=foo\nContent-Language: en\n\n--foo\n\nplain \xc3\xa4\n--foo--\n"
    data = made(ANSWER._replace(mime=True, reason=entity))
    assert data.endswith(b"MIME-Version: 1.0\r\n" + entity.replace(b"\n", b"\r\n"))


def test_an_entity_has_no_other_fields() -> None:
    entity = b"To: eve@e.example\nContent-Type: text/html\nBcc: x@e.example\n y@e.example\nSubject: x\n\n<b>"
    found = read(ANSWER._replace(mime=True, reason=entity))
    assert found.keys() == [*FIELDS, "Content-Type"]
    assert made(ANSWER._replace(mime=True, reason=b"\nTo: x")).endswith(b"1.0\r\n\r\nTo: x")


@given(st.text(), st.text(), st.text(), st.binary(), st.booleans())
def test_nothing_begins_a_line_of_the_header(name: str, subject: str, recipient: str, reason: bytes, mime: bool) -> None:
    name, subject = f"x\r\nBcc: e@e.example\r\n{name}", f"x\nBcc: e@e.example\n\n{subject}"
    answer = ANSWER._replace(sender=(name, f"b\r\nBcc: {recipient}"), subject=subject, recipient=f"x\r\nBcc: {recipient}")
    data = made(answer._replace(reason=b"Bcc: x\r\n\rBcc: y\n\n" + reason, mime=mime))
    header = data.partition(b"\r\n\r\n")[0]
    names = [line.partition(b":")[0].decode() for line in header.split(b"\r\n") if line[:1] not in b" \t"]
    assert names == FIELDS + TEXT * (not mime)
    assert header.count(b"\n") == header.count(b"\r") == header.count(b"\r\n")


def test_messages_for_the_queue() -> None:
    assert answered(ANSWER, hostname="mx.b.example", ident="abc", seconds=1_795_842_000) == Onward(
        "", "ann@a.example", b"", made(ANSWER)
    )
    assert redirected("x@y.example", sender="ann@a.example", recipients=["bob@b.example"]) == Onward(
        "ann@a.example", "x@y.example", b"Delivered-To: bob@b.example\r\n", None
    )
    assert (
        redirected("x@y.example", sender="", recipients=["b\r\nX: y@b.example"]).front == b"Delivered-To: b  X: y@b.example\r\n"
    )


def test_refusals_are_one_line() -> None:
    assert rejection(b"no\r\n250 yes\xff\0") == "no 250 yes\N{REPLACEMENT CHARACTER}"
    assert rejection(b" \n") == "the recipient does not accept this message"
    assert len(rejection(b"x" * 5000)) == 500
