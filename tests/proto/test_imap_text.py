"""What SEARCH looks into: ENVELOPE, header, text of a message."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto import imap_text, mime_text
from relaymta.proto.imap_text import FIELDS, EnvelopeText, FileText, HeaderText, MessageText
from relaymta.proto.mime import describe
from relaymta.proto.mime_text import comparable


def envelope(*lines: bytes) -> EnvelopeText:
    return EnvelopeText(describe(b"\r\n".join([*lines, b"", b""])).envelope, lambda: "E1")


@pytest.mark.parametrize(
    ("field", "name", "found", "others"),
    [
        (b"Subject: Plain (text) \"quoted\" \\ here", "subject", ["plain (TEXT)", '"quoted" \\ h', "text", ""], ["subject", "z"]),
        (b"Subject: =?utf-8?q?=C3=9Cber?= =?utf-8?q?fluss?=", "subject", ["überfluss", "ÜBER"], ["utf-8", "=?"]),
        (b"Subject: M\xf6we \xdf", "subject", ["möwe", "MÖWE SS"], ["mowe"]),
        (b"Subject:", "subject", [""], ["a"]),
        (b"Subject: " + b"x" * 2000 + b" end", "subject", ["x end"], ["end x"]),  # a literal
        (b"From: Bob Miller <bob@far.example>", "from", ["bob miller <bob@far.example>", "BOB@FAR", "r <b", ""], ["mille@"]),
        (b'From: "Miller, Bob" <bob@far.example>, x@y.test', "from", ["miller, bob", "far.example>, x@y"], ["y.test <"]),
        (b"From: =?utf-8?q?J=C3=BCrgen?= <j@x.test>", "from", ["jürgen <j@x.test>"], ["j@x.test >"]),
        (b"To: a group: a@b.test, c@d.test; , e@f.test", "to", ["a group", "a@b.test", "e@f.test"], ["nil"]),
        (b"Cc: undisclosed-recipients:;", "cc", ["UNDISCLOSED", ""], ["@"]),
        (b"Bcc: \"a\\\"b\" <\"x y\"@z.test>", "bcc", ['a"b <x y@z.test>'], ["\\"]),
        (b"Message-ID: <1@x.test>", "message-id", ["<1@X", ""], ["2"]),
        (b"In-Reply-To: <2@x.test>", "in-reply-to", ["<2@x.test>"], ["1"]),
    ],
)  # fmt: skip
def test_fields_of_an_envelope(field, name, found, others):
    one = envelope(b"Date: x", field)
    assert [text for text in found if not one.has(name, comparable(text))] == []
    assert [text for text in others if one.has(name, comparable(text))] == []
    assert not envelope(b"X: y").has(name, "") and not envelope(b"X: y").has(name, "x")


FIELD_LINES = st.lists(
    st.tuples(
        st.sampled_from(["Subject", "From", "To", "Cc", "Message-ID"]), st.text('ab "\\(),;:<>@=?qs\u00df\u00a0', max_size=12)
    ),
    max_size=5,
).map(lambda fields: "".join(f"{name}: {text}\r\n" for name, text in fields).encode() + b"\r\n")


@given(FIELD_LINES, st.text('ab "(<>@,s', min_size=1, max_size=4))
def test_nothing_is_missed_by_a_look_at_the_octets(data, needle):
    octets, sought = describe(data).envelope, comparable(needle)
    quick = [EnvelopeText(octets, str).has(name, sought) for name in FIELDS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imap_text, "_may_have", lambda octets, needle: True)
        assert quick == [EnvelopeText(octets, str).has(name, sought) for name in FIELDS]


def test_an_envelope_that_is_none():
    for octets in (b"", b"(", b"NIL", b'("a', b"(NIL (", b"({9}\r\nab"):
        found = EnvelopeText(octets, str)
        assert found.sent() is None and not any(found.has(name, "\xe4") for name in FIELDS)


@pytest.mark.parametrize(
    ("date", "day"),
    [
        (b"Fri, 27 Nov 2026 23:59:59 -0800", (2026, 11, 27)),
        (b"1 Jan 1970 00:00:00 +1400", (1970, 1, 1)),
        (b"Fri,  2 feb 26 10:00 GMT", (2026, 2, 2)),
        (b"2 Feb 94 10:00:00", (1994, 2, 2)),
        (b"2 Feb 126 10:00:00", (2026, 2, 2)),
        (b"Fri, 27-Nov-2026 10:14:07", (2026, 11, 27)),
        (b"27 November 2026", (2026, 11, 27)),
        (b"Fri Nov 27 10:14:07 2026", (2026, 11, 27)),
        (b"Fri Nov 27 10:14:07 CET 2026", (2026, 11, 27)),
        (b"31 Feb 2026", None),
        (b"27 Foo 2026", None),
        (b"2026-11-27T10:14:07Z", None),
        (b"", None),
    ],
)
def test_the_day_of_a_date(date, day):
    """RFC 9051 6.4.4: without time and time zone."""
    assert envelope(b"Date: " + date).sent() == (datetime.date(*day) if day else None)
    assert envelope(b"Subject: " + date).sent() is None


HEADER = (
    b"Received: one\r\nX-A: =?utf-8?q?=C3=84pfel?=\r\nx-a : two\r\n folded\r\nno field\r\nX-Ab: three\r\nX-Empty:\r\n\r\n"
    b"X-Body: none\r\n"
)


@pytest.mark.parametrize(
    ("name", "needle", "found"),
    [
        (b"x-a", "\xe4pfel", True), (b"x-a", "two folded", True), (b"x-a", "", True), (b"x-a", "three", False),
        (b"x-ab", "three", True), (b"x-empty", "", True), (b"x-empty", "a", False), (b"x-body", "", False),
        (b"x-", "", False), (b"no field", "", False),
        (b"received", "one", True), (b"", "", False), ("\xe4".encode(), "", False),
    ],
)  # fmt: skip
def test_fields_of_a_header(name, needle, found):
    assert HeaderText(HEADER).has(name, needle) == found


def test_a_header_of_many_fields():
    header = b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(2500))
    assert HeaderText(header).has(b"x-2499", "2499") and not HeaderText(header).has(b"x-2499", "x")


LETTER = (
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\npreamble\r\n--b\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\nContent-Description: first\r\n"
    b'\r\nStra=C3=9F=\r\nen\r\n--b\r\nContent-Type: application/pdf; name="figures.pdf"\r\n\r\nhidden\r\n--b\r\n'
    b"Content-Type: message/rfc822\r\n\r\nSubject: within\r\nContent-Transfer-Encoding: base64\r\n\r\nYXR0YWNoZWQ=\r\n--b--\r\n"
)
PREFIX = b"Delivered-To: me@local.example\r\n"


def texts(data: bytes, prefix: bytes = b"") -> tuple[MessageText, FileText]:
    return MessageText(prefix, data), FileText(prefix, describe(data).parts, lambda start, end: data[start:end])


@pytest.mark.parametrize(
    ("needle", "in_text", "in_body"),
    [
        ("STRASSEN", True, True), ("attached", True, True), ("gr\xfcsse", True, False), ("subject: gr\xfc", True, False),
        ("figures.pdf", True, False), ("first", True, False), ("subject: within", True, False), ("me@local", True, False),
        ("hidden", False, False), ("preamble", False, False), ("=c3", False, False), ("utf-8?q", False, False),
        ("ywr0", False, False),
    ],
)  # fmt: skip
def test_text_and_body(needle, in_text, in_body):
    for one in texts(LETTER, PREFIX):
        assert (one.in_text(comparable(needle)), one.in_body(comparable(needle))) == (in_text, in_body)


PARTS = st.lists(
    st.sampled_from(
        [b"--b\r\n", b"--c\r\n", b"--b--\r\n", b"Content-Type: multipart/mixed; boundary=b\r\n", b"\r\n", b"a word\r\n", b"x",
         b"Content-Type: multipart/digest; boundary=c\r\n", b"Content-Type: message/rfc822\r\n", b"Subject: word\r\n",
         b"Content-Type: text/html; charset=utf-8\r\n", b"Content-Type: image/png\r\n", b"\xc3\x84=\r\n", b"YSB3b3Jk\r\n",
         b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n", b"=20a=20\r\n"]
    ),
    max_size=14,
).map(b"".join)  # fmt: skip


@given(PARTS, st.sampled_from(["word", "a word", "\xe4", "ysb3", " a", "x", "subject: w", "png"]))
def test_a_message_in_a_file_is_searched_as_one_in_memory(data, needle):
    one, other = texts(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mime_text, "WHOLE", 0)
        patch.setattr(mime_text, "PIECE", 16)
        patch.setattr(imap_text, "PIECE", 16)
        found = other.in_text(needle), other.in_body(needle)
    assert found == (one.in_text(needle), one.in_body(needle))


@pytest.mark.parametrize("value", ["plain", "Grüße", "=?utf-8?q?Gr=C3=BC=C3=9Fe?="])
def test_a_long_header_is_searched_in_pieces(monkeypatch, value):
    """Of whole fields; amid one it is divided only where that is longer than FIELD_MOST."""
    fields = "".join(f"X-{number}: {value} of\r\n {number * 7:03}\r\n" for number in range(40))
    data = f"{fields}X-Long: {f'{value} and{chr(10)} ' * 20}end\r\n\r\nbody".encode()
    shown = "plain" if value == "plain" else "Grüße"
    for most in (16, 100, 300, 3000):
        monkeypatch.setattr(imap_text, "PIECE", most)
        monkeypatch.setattr(imap_text, "FIELD_MOST", max(most, 100))
        for one in texts(data, PREFIX):
            each = [f"{shown} of {number * 7:03}" for number in range(40)]
            for needle in (*each, f"X-39: {shown} of", f"{shown} and", "end", "me@local.example"):
                assert one.in_headers(comparable(needle)), (most, needle)
            if value == "plain" or most > 1000:
                assert one.in_headers(comparable(f"{shown} and " * 19 + "end"))
            for needle in ("body", f"{shown} of 8x", "missing"):
                assert not one.in_headers(comparable(needle)), (most, needle)


def test_a_header_within_a_digest_is_no_text():
    data = b"Content-Type: multipart/digest; boundary=b\r\n\r\n--b\r\n\r\nSubject: inner\r\n\r\ntext\r\n--b--\r\n"
    for one in texts(data):
        assert one.in_text("inner") and one.in_body("text") and not one.in_body("inner")


def test_a_file_that_is_gone_has_nothing():
    parts = describe(LETTER).parts
    assert not FileText(b"", parts, lambda start, end: b"").in_text("attached")
    assert FileText(PREFIX, parts, lambda start, end: b"").in_text("delivered-to: me@")
