"""BODY[...] and BINARY[...]: which octets of a message a section is (RFC 9051 6.4.5.1, RFC 3516)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.mime import Section, UnknownEncoding, binary, cut, describe, literal, section
from tests.proto.test_mime import part
from tests.speedups.test_mime import DATA
from tests.support.messages import ATTACHED, NASTY, crlf

NUMBERED = {
    "1": "one", "2": "dHdv", "3.1": "three.one", "3.2": "three.two", "4.1": "four.one", "4.2.1": "four.two.one",
    "4.2.2.1": "four.two.two.one", "4.2.2.2": "four.two.two.two",
    "3.HEADER": "Subject: three\nContent-Type: multipart/mixed; boundary=i\n\n",
    "4.2.HEADER": "Subject: four.two\nContent-Type: multipart/mixed; boundary=m\n\n", "1.MIME": "\n",
    "4.1.MIME": "Content-Type: image/gif\nContent-ID: <four.one>\n\n", "4.2.MIME": "Content-Type: message/rfc822\n\n",
    "4.2.2.2.MIME": "Content-Type: text/richtext\n\n", "HEADER": "From: a@b.test\nContent-Type: multipart/mixed; boundary=o\n\n",
    "3.HEADER.FIELDS (subject X)": "Subject: three\n\n",
    "3.HEADER.FIELDS.NOT (SUBJECT)": "Content-Type: multipart/mixed; boundary=i\n\n",
    "4.2.HEADER.FIELDS (X)": "\n",
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERED)
def test_parts_have_the_numbers_of_rfc_9051(text):
    """6.4.5.1, its example."""
    assert part(ATTACHED, text) == crlf(NUMBERED[text])


def test_whole_and_text():
    header = part(ATTACHED, "HEADER")
    assert header is not None
    assert part(ATTACHED, "") == ATTACHED and part(ATTACHED, "TEXT") == ATTACHED[len(header) :]
    three = part(ATTACHED, "3")
    assert three == (part(ATTACHED, "3.HEADER") or b"") + (part(ATTACHED, "3.TEXT") or b"")
    assert three is not None and three.endswith(b"--i--") and (part(ATTACHED, "4.2.2") or b"").startswith(b"--n\r\n")


@pytest.mark.parametrize(
    "text", ["5", "1.1", "1.HEADER", "2.TEXT", "4.HEADER", "3.3", "3.1.1", "4.2.2.3", "4.2.2.HEADER", "9.9.MIME", "3.1.2"]
)
def test_parts_that_are_not_there(text):
    assert part(ATTACHED, text) is None


LETTER = crlf(
    "Content-Type: multipart/mixed; boundary=b\n\n"
    "--b\n\nx\n--b\nContent-Type: message/rfc822\nContent-ID: <2>\n\nSubject: y\n\nz\n--b--\n"
)


def test_sections_of_an_attached_message_that_is_no_multipart():
    """Case 12."""
    assert part(LETTER, "2.MIME") == b"Content-Type: message/rfc822\r\nContent-ID: <2>\r\n\r\n"
    assert part(LETTER, "2.HEADER") == b"Subject: y\r\n\r\n"
    assert part(LETTER, "2.1") == part(LETTER, "2.TEXT") == b"z"
    assert part(LETTER, "2.1.MIME") == b"Subject: y\r\n\r\n"
    assert part(LETTER, "2.2") is None and part(LETTER, "2.1.1") is None


def test_part_1_of_a_message_that_is_no_multipart():
    """Case 12."""
    data = b"Subject: x\r\n\r\nbody\r\n"
    assert part(data, "1") == part(data, "TEXT") == b"body\r\n"
    assert part(data, "1.MIME") == part(data, "HEADER") == b"Subject: x\r\n\r\n"
    assert part(data, "2") is None and part(data, "1.1") is None and part(data, "1.HEADER") is None


def test_a_message_that_is_an_attached_message():
    data = b"Content-Type: message/rfc822\r\n\r\nSubject: x\r\n\r\nbody"
    assert part(data, "1") == part(data, "TEXT") == b"Subject: x\r\n\r\nbody"
    assert part(data, "1.HEADER") == b"Subject: x\r\n\r\n" and part(data, "1.1") == part(data, "1.TEXT") == b"body"


def test_parts_of_a_multipart_are_not_those_of_the_next():
    inner = "--b\nContent-Type: multipart/mixed; boundary=c\n\n--c\n\n{}\n--c--\n"
    data = crlf("Content-Type: multipart/mixed; boundary=b\n\n" + inner.format("x") + inner.format("y") + "--b--\n")
    assert (part(data, "1.1"), part(data, "2.1"), part(data, "1.2")) == (b"x", b"y", None)


FIELDS = b"To: a\r\nX: 1\r\n 2\r\nto : b\r\ngarbage\r\nX-Y: z\r\n\r\nbody"


@pytest.mark.parametrize(
    ("text", "expected", "echo"),
    [
        ('HEADER.FIELDS ("X")', b"X: 1\r\n 2\r\n\r\n", "HEADER.FIELDS (X)"),
        ("header.fields (TO x)", b"To: a\r\nX: 1\r\n 2\r\nto : b\r\n\r\n", "HEADER.FIELDS (TO x)"),
        ("HEADER.FIELDS (Cc)", b"\r\n", "HEADER.FIELDS (Cc)"),
        ("HEADER.FIELDS.NOT (To)", b"X: 1\r\n 2\r\nX-Y: z\r\n\r\n", "HEADER.FIELDS.NOT (To)"),
        ('HEADER.FIELDS.NOT ("a b" To)', b"X: 1\r\n 2\r\nX-Y: z\r\n\r\n", 'HEADER.FIELDS.NOT ("a b" To)'),
    ],
)
def test_fields_of_a_header(text, expected, echo):
    """Case 12: names are echoed without quotes, and there is an empty line even when none matches."""
    assert part(FIELDS, text) == expected
    assert Section.parse(text.encode()).shown() == echo.encode()


def test_a_header_without_an_end_has_one_in_its_fields():
    assert part(b"A: b\r\nC: d", "HEADER.FIELDS (c)") == b"C: d\r\n\r\n"
    assert part(b"A: b\r\nC: d", "HEADER") == b"A: b\r\nC: d"
    assert part(b"no header", "HEADER.FIELDS (c)") == b"\r\n" and part(b"no header", "TEXT") == b"no header"


def test_a_prefix_is_in_front_of_the_message():
    prefix = b"Return-Path: <a@b.test>\r\n"
    assert part(FIELDS, "", prefix) == prefix + FIELDS
    assert part(FIELDS, "HEADER", prefix) == prefix + FIELDS[:-4]
    assert part(FIELDS, "HEADER.FIELDS (return-path x-y)", prefix) == prefix + b"X-Y: z\r\n\r\n"
    assert part(FIELDS, "TEXT", prefix) == part(FIELDS, "1", prefix) == b"body"


@pytest.mark.parametrize(
    "text",
    ["0", "1.", ".1", "01", "1..2", "MIME", "HEADER.FIELDS", "HEADER.FIELDS ()", "TEXT (a)", "X", "1.X", "1HEADER",
    "HEADER.FIELDS (a b",
     "HEADER.FIELDS (a\0)", 'HEADER.FIELDS ("a)', "1.2.HEADER.FIELDS.NOT", " ", "1 ", ".".join(["1"] * 101), "1234567890"],
)  # fmt: skip
def test_sections_that_are_not_valid(text):
    with pytest.raises(ValueError):
        Section.parse(text.encode())


@given(
    data=DATA, path=st.lists(st.integers(1, 3), max_size=4), what=st.sampled_from(["", "HEADER", "TEXT", "MIME", "HEADER.FIELDS"])
)
def test_any_section_of_any_message(data, path, what):
    names = (b"Subject",) if what == "HEADER.FIELDS" else ()
    wanted = Section(tuple(path), what, names)
    slices = section(data, describe(data).parts, wanted)
    if slices is not None and what != "HEADER.FIELDS":
        assert b"".join(slices) in data
    again = Section.parse(wanted.shown()) if path or what != "MIME" else wanted
    assert again == wanted


@given(pieces=st.lists(st.binary(min_size=1, max_size=5), max_size=4), first=st.integers(0, 20), octets=st.integers(1, 20))
def test_a_part_of_slices(pieces, first, octets):
    assert b"".join(cut(pieces, first, octets)) == b"".join(pieces)[first : first + octets]


def test_nothing_is_an_empty_string():
    """Case 1: never {0}."""
    assert literal([]) == literal([b""]) == [b'""']
    assert b"".join(literal(cut([b"abc"], 393216, 10))) == b'""'
    assert b"".join(literal([b"ab", b"c"])) == b"{3}\r\nabc" and literal(None) == [b"NIL"]
    assert b"".join(literal([b"a\0"], eight=True)) == b"~{2}\r\na\0" and b"".join(literal([b"a"], eight=True)) == b"{1}\r\na"


# BINARY


def test_binary():
    found = describe(ATTACHED)
    assert b"".join(binary(ATTACHED, found.parts, (2,)) or ()) == b"two"
    assert b"".join(binary(ATTACHED, found.parts, (1,)) or ()) == b"one"
    assert b"".join(binary(ATTACHED, found.parts, ()) or ()) == ATTACHED
    assert b"".join(binary(ATTACHED, found.parts, (3,)) or ()) == part(ATTACHED, "3")
    assert binary(ATTACHED, found.parts, (9,)) is None
    data = b"Content-Transfer-Encoding: Quoted-Printable\r\n\r\na=00=\r\nb=E4 \r\n"
    assert binary(data, describe(data).parts, (1,)) == [b"a\0b\xe4\r\n"]


def test_binary_of_a_message_is_the_message():
    data = b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: x\r\n\r\nSubject: y\r\n\r\nz"
    assert b"".join(binary(data, describe(data).parts, (1,)) or ()) == b"Subject: y\r\n\r\nz"


def test_binary_of_an_unknown_encoding():
    data = NASTY["an unknown encoding"]
    with pytest.raises(UnknownEncoding):
        binary(data, describe(data).parts, (1,))
