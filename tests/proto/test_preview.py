"""PREVIEW (RFC 8970 3)."""

import base64
from email.message import EmailMessage

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.mime import describe
from relaymta.proto.preview import CHARACTERS, preview


def shown(data: bytes) -> str:
    return preview(describe(data).parts, lambda start, end: data[start:end])


def text(body: str, kind: str = "text/plain; charset=utf-8") -> bytes:
    return f"Content-Type: {kind}\r\n\r\n".encode() + body.encode()


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"Subject: x\r\n\r\n  one \r\n\t two\r\n", "one two"),
        (b"Subject: x\r\n\r\n", ""),
        (b"", ""),
        (text("a\r\n-- \r\nsignature"), "a"),
        (text("On Monday B wrote:\r\n> old\r\n> older\r\nnew"), "new"),
        (text("> all\r\n> is quoted"), "> all > is quoted"),
        (
            text("<style>p {}</style><p>Br&auml;tl &amp;<br>more<!-- no --></p><script>x", "text/html; charset=utf-8"),
            "Brätl & more",
        ),
        (text("a\u200b\u0000b\u202ec"), "a b c"),
        (text("%PDF", "application/pdf"), ""),
        (text("BEGIN:VCALENDAR", "text/calendar"), ""),
        (b"Content-Type: text/plain; charset=iso-8859-1\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=E4b=\r\nc", "äbc"),
        (b"Content-Type: text/plain\r\nContent-Transfer-Encoding: base64\r\n\r\n" + base64.b64encode(b"hello"), "hello"),
    ],
)
def test_preview(data, expected):
    assert shown(data) == expected


def test_plain_text_is_preferred_and_what_is_attached_is_not_shown():
    message = EmailMessage()
    message.set_content("<p>html</p>", subtype="html")
    assert shown(message.as_bytes()) == "html"
    message = EmailMessage()
    message.set_content("plain")
    message.add_alternative("<p>html</p>", subtype="html")
    assert shown(message.as_bytes()) == "plain"
    message = EmailMessage()
    message.make_mixed()
    message.add_attachment("attached", filename="a.txt")
    assert shown(message.as_bytes()) == ""


def test_its_length():
    assert shown(text("ä" * 10_000)) == "ä" * CHARACTERS and shown(text("<" * 1_000_000, "text/html")) == "<" * CHARACTERS


@given(st.binary(max_size=400), st.sampled_from(["plain", "html"]))
def test_preview_of_anything(body, kind):
    found = shown(f"Content-Type: text/{kind}\r\n\r\n".encode() + body)
    assert len(found) <= CHARACTERS and "\n" not in found and found.encode() is not None
