"""Text as people see it: encoded words, charsets, transfer encodings, and what SEARCH finds in it."""

import base64
import codecs
import contextlib
import unicodedata
from email.header import Header

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta._speedups.mime import scan
from relaymta.proto import mime_text
from relaymta.proto.mime_text import (
    MARKS_MOST,
    comparable,
    contains,
    decoded,
    header_text,
    in_header,
    in_text,
    is_text,
    part_text,
    text_parts,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"(=?ISO-8859-1?Q?a?=)", "(a)"),
        (b"(=?ISO-8859-1?Q?a?= b)", "(a b)"),
        (b"(=?ISO-8859-1?Q?a?= =?ISO-8859-1?Q?b?=)", "(ab)"),
        (b"(=?ISO-8859-1?Q?a?=  =?ISO-8859-1?Q?b?=)", "(ab)"),
        (b"(=?ISO-8859-1?Q?a?=\r\n    =?ISO-8859-1?Q?b?=)", "(ab)"),
        (b"(=?ISO-8859-1?Q?a_b?=)", "(a b)"),
        (b"(=?ISO-8859-1?Q?a?= =?ISO-8859-2?Q?_b?=)", "(a b)"),
        (b"=?US-ASCII?Q?Keith_Moore?= <moore@cs.utk.edu>", "Keith Moore <moore@cs.utk.edu>"),
        (b"=?ISO-8859-1?B?SWYgeW91IGNhbiByZWFkIHRoaXMgeW8=?=\r\n =?ISO-8859-2?B?dSB1bmRlcnN0YW5kIHRoZSBleGFtcGxlLg==?=",
         "If you can read this you understand the example."),
        (b"=?iso-8859-8?b?7eXs+SDv4SDp7Oj08A==?=", "םולש ן\u05d1 ילטפנ"),
    ],
)  # fmt: skip
def test_the_examples_of_rfc_2047(value, expected):
    """Section 8."""
    assert header_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"=?utf-8?q?Gr=C3=BC=C3?= =?UTF-8?Q?=9Fe?=", "Grüße"),  # a character divided among two words
        (b"=?utf-8?b?R3LDvMOf?= =?utf-8?b?ZQ?=", "Grüße"),  # without padding
        (b"=?iso-8859-1?q?=B1?= =?iso-8859-2?q?=B1?=", "\u00b1\u0105"),
        (b"=?utf-8?q?=41_?=b", "A b"),
        (b"=?utf-8*de?q?a?=", "a"),  # RFC 2231 5
        (b'"=?utf-8?q?a?=" x=?utf-8?q?b?=y', '"a" xby'),
        (b"=?utf-8?x?a?= =?utf-8?q?a", "=?utf-8?x?a?= =?utf-8?q?a"),
        (b"=?no-such-charset?q?a=E4?=", "aä"),
        (b"=?utf-8?q?=FF?=", "\ufffd"),
        (b"=?utf-8?q??=x", "x"),
        (b"=??q?a?=", "a"),
        (b"Gr\xc3\xbc\xc3\x9fe", "Grüße"),
        (b"Gr\xfc\xdfe", "Grüße"),
        (b"", ""),
        (b" a\r\n b ", "a b"),
        (b"=?utf-8?q?a_=?= b", "a  b"),
    ],
)
def test_encoded_words(value, expected):
    assert header_text(value) == expected


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=100), charset=st.sampled_from(["utf-8", "utf-16"]))
def test_encoded_words_of_python_are_decoded(text, charset):
    text = " ".join(text.split())
    encoded = Header(text, "utf-8").encode(linesep="\r\n").encode()
    assert header_text(encoded).split() == text.split()


@pytest.mark.parametrize(
    ("charset", "octets", "expected"),
    [
        ("utf-8", "ä".encode(), "ä"), ("UTF8", "ä".encode(), "ä"), ("iso-8859-1", b"\xe4\x80", "ä€"), ("ISO_8859-15", b"\xa4",
        "€"),
        ("windows-1252", b"\x80", "€"), ("koi8-u", b"\xa4", "є"), ("gb2312", "龙".encode("gb18030"), "龙"), ("IBM850", b"\x84",
        "ä"),
        ("shift_jis", "表".encode("cp932"), "表"), ("iso-2022-jp", "表".encode("iso2022_jp"), "表"), ("utf-7", b"+AOQ-", "ä"),
        ("ks_c_5601-1987", "가".encode("euc_kr"), "가"), ("windows-874", b"\xa1", "ก"), ("x-unknown", b"\xe4", "ä"),
        ("", b"\xe4", "ä"), ("us-ascii", "ä".encode(), "ä"), ("utf-16", "ä".encode("utf-16"), "ä"), ("utf-16le", b"\xe4",
        "\ufffd"),
        # not charsets: what takes the square of the time, or makes much of little
        ("idna", b"\xe4", "ä"), ("punycode", b"\xe4", "ä"), ("zlib", b"\xe4", "ä"), ("rot13", b"a", "a"), ("hex", b"61", "61"),
        ("unicode_escape", b"\\x61", "\\x61"), ("undefined", b"a", "a"), ("mbcs", b"a", "a"), ("../x", b"a", "a"), ("\0",
        b"a", "a"),
        ("x" * 1000, b"a", "a"),
    ],
)  # fmt: skip
def test_charsets(charset, octets, expected):
    assert decoded(octets, charset) == expected
    assert decoded(octets, charset.encode()) == expected


def test_each_charset_that_is_listed_is_known_to_python():
    for name in mime_text._ALL:
        assert isinstance(decoded(b"a\xff", name), str)
        codec = mime_text._codec(name)
        assert codec == "latin_1" or codec == mime_text._ALL[name], name
        b"".decode(codec)


@given(data=st.binary(max_size=60), charset=st.sampled_from(sorted(mime_text._ALL)))
def test_any_octets_are_decoded_in_any_charset(data, charset):
    assert isinstance(decoded(data, charset), str)


@given(data=st.binary(max_size=60) | st.text("=?utf8qb-= \r\n_", max_size=40).map(str.encode))
def test_any_header_is_shown(data):
    assert isinstance(header_text(data), str)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("GRÜSSE", "grüße"), ("Straße", "STRASSE"), ("ﬁn", "FIN"), ("Ａ１", "a1"), ("ΣΊΣΥΦΟΣ", "σίσυφος"), ("e\u0301", "é"),
        ("İ", "i̇"),
    ],
)  # fmt: skip
def test_text_is_compared_by_the_casefold_of_nfkc(text, needle):
    assert contains(f"x{text}y", comparable(needle))


@given(text=st.text(max_size=40))
def test_comparable_text_stays_as_it_is(text):
    once = comparable(text)
    assert contains(text, once)
    if max(text, default="") < "\u0300":
        assert once == unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def test_many_combining_characters_do_not_take_the_square_of_the_time():
    """Nor do other characters that normalization makes combining ones of."""
    marks = [
        chr(code)
        for code in (*range(0xD800), *range(0xE000, 0x110000))
        if any(unicodedata.combining(one) for one in unicodedata.normalize("NFKD", chr(code))[:1])
    ]
    assert len(marks) > 900
    assert [mark for mark in marks if not mime_text._marked().fullmatch(mark * MARKS_MOST)] == []
    assert len(comparable("\u0345\u0316" * 100_000)) >= 200_000
    assert len(comparable("\u0f73\uff9e" * 100_000)) >= 200_000


def test_combining_characters_within_the_bound_are_in_order():
    text = "a" + "\u0323\u0301" * 16 + "b"
    assert comparable(text) == unicodedata.normalize("NFKC", text)


LETTER = (
    b"""\
Subject: =?iso-8859-1?q?=DCber?= =?iso-8859-1?q?fluss?= and more
 folded
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

a word that is bro=
ken, gr=C3=
=BCn
--b
Content-Type: text/plain; charset="ISO-8859-1"

M\xf6we
--b
Content-Type: text/html
Content-Transfer-Encoding: base64

%b
--b
Content-Type: application/octet-stream

hidden
--b
Content-Type: message/rfc822

Subject: x

attached
--b--
""".replace(b"\n", b"\r\n")
    % base64.b64encode(b"<p>caf&eacute; noir</p>")
)


def found(needle: str) -> bool:
    """Whether BODY finds it, by both ways."""
    needle = comparable(needle)
    by_text = any(contains(text, needle) for text in text_parts(LETTER))
    assert by_text == any(in_text(LETTER, part, needle) for part in scan(LETTER) if is_text(LETTER, part))
    return by_text


def test_search_finds_what_people_see():
    """Case 13: Subject in RFC 2047, quoted-printable broken amid a word, base64, ISO-8859-1; an HTML entity is left alone."""
    subject = LETTER[len("Subject:") : LETTER.index(b"Content-Type")]
    assert all(in_header(subject, comparable(needle)) for needle in ("überfluss", "FLUSS AND", "more folded", ""))
    assert not any(in_header(subject, comparable(needle)) for needle in ("iso-8859", "=?", "moreover"))
    assert all(found(needle) for needle in ("broken", "GRÜN", "möwe", "noir", "caf&eacute;", "attached", "word that"))
    assert not any(found(needle) for needle in ("café", "hidden", "brok=", "subject", "nowhere"))


@pytest.mark.parametrize(
    ("value", "needle", "expected"),
    [
        (b" Plain Text", "plain text", True), (b" a\r\n b", "a b", True), (b" a\r\n b", "ä", False), (b" a\nb", "a b", False),
        (b" \xc3\x84", "ä", True), (b" \xc4", "ä", True), (b" =?utf-8?q?=C3=84?=", "ä", True),
    ],
)  # fmt: skip
def test_headers_are_searched(value, needle, expected):
    assert in_header(value, needle) == expected


def test_7_bit_charsets_are_not_taken_for_ascii():
    data = b"Content-Type: text/plain; charset=utf-7\r\n\r\n+AOQ-"
    (part,) = scan(data)
    assert in_text(data, part, "ä") and not in_text(data, part, "aoq")


def test_characters_that_stand_for_ascii_are_known():
    missing = [
        (one, character)
        for one in map(chr, (*range(128, 0xD800), *range(0xE000, 0x10000)))
        for character in comparable(one)
        if character < "\x80" and one not in mime_text._forms()[character]
    ]
    assert missing == []


TRICKY = "aesfit \n1\u00e9\u0301\u00df\u017f\ufb01\uff21\u00a0\u2026\u212a\u0130\u00aa\u2019\u4e2d\U0001d41a\U0001f600"
JOINING = "\u1112\u1161\u11ab\uac00\u09c7\u09be\u30ab\uff76\uff9e\u3099\u0345\u0323"
STATEFUL = ("utf-7", "iso-2022-jp", "hz", "gb18030", "shift_jis", "euc-kr", "utf-32", "utf-16-be", "utf-8-sig")
CHARSETS = ("utf-8", "iso-8859-1", "windows-1252", "us-ascii", "", "koi8-r", "utf-16", "unknown")


def letter(text: str, charset: str, encoding: str, width: int) -> bytes:
    try:
        octets = text.encode(charset or "utf-8", "replace")
    except LookupError:
        octets = text.encode()
    if encoding == "base64":
        encoded = base64.b64encode(octets)
        octets = b"".join(encoded[at : at + width] + b"\r\n" for at in range(0, len(encoded), width))
    elif encoding:
        octets = b"".join(b"=%02X%s" % (one, b"=\r\n" * (at % width == 0)) for at, one in enumerate(octets))
    kind = f"; charset={charset}" if charset else ""
    return f"Content-Type: text/plain{kind}\r\nContent-Transfer-Encoding: {encoding or '8bit'}\r\n\r\n".encode() + octets


LETTERS = st.builds(
    letter, st.text(TRICKY, max_size=30), st.sampled_from(CHARSETS), st.sampled_from(["", "base64", "quoted-printable"]),
    st.integers(3, 20),
)  # fmt: skip


@given(LETTERS, st.text(TRICKY, min_size=1, max_size=4), st.data())
def test_octets_are_searched_as_their_text_is(data, needle, more):
    """Also where they are not decoded."""
    (part,) = scan(data)
    text = comparable(part_text(data, part))
    start = more.draw(st.integers(0, len(text)))
    for sought in (comparable(needle), text[start : start + 3] or "x"):
        assert in_text(data, part, sought) == (sought in text), sought


@given(
    st.text(TRICKY + JOINING, max_size=80), st.sampled_from((*CHARSETS, *STATEFUL)),
    st.sampled_from(["", "base64", "quoted-printable"]), st.integers(3, 20), st.integers(0, 60), st.integers(1, 9),
    st.integers(1, 40),
)  # fmt: skip
def test_a_long_text_is_searched_in_pieces(text, charset, encoding, width, start, length, size):
    data = letter(text, charset, encoding, width)
    (part,) = scan(data)
    text = comparable(part_text(data, part))
    sought = text[start : start + length] or "x"
    for whole, piece in ((0, size), (1 << 18, size)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mime_text, "WHOLE", whole)
            patch.setattr(mime_text, "PIECE", piece)
            assert in_text(data, part, sought) == (sought in text)
            assert in_text(data, part, sought + "\u4e00") == (sought + "\u4e00" in text)


def test_a_long_line_is_not_divided_in_front_of_a_combining_character(monkeypatch):
    for text, sought in (("\U0001d41a" * 40 + "\u0301", "a" * 7 + "\u00e1"), ("\u1112\u1161\u11ab" * 40, "\ud55c" * 40)):
        data = letter(text, "utf-8", "", 20)
        (part,) = scan(data)
        for size in range(16, 80):
            monkeypatch.setattr(mime_text, "WHOLE", 0)
            monkeypatch.setattr(mime_text, "PIECE", size)
            assert in_text(data, part, sought), size


@pytest.mark.parametrize(
    ("head", "octets"),
    [
        (b"Content-Transfer-Encoding: base64", b"YWI=YWI=YQ==YWJjZGVm=YWI=YQYQ==YWJjYWJj" * 3),  # padding anywhere
        (b"Content-Transfer-Encoding: quoted-printable", b"a  \t =20= \r\nb =  \r\n=3D=3=41 \r c \r\n" * 4),
        (b"Content-Type: text/plain; charset=utf-8", "\u09c7\u09be\u1112\u1161\u11ab\uff76\uff9e".encode() * 6),
        (b"Content-Type: text/plain; charset=utf-8", b"ab\xc3"),
        (b"Content-Type: text/plain; charset=utf-16", "some words".encode("utf-16-le")),
        (b"Content-Type: text/plain; charset=utf-7", b"+" + b"AOQ" * 40),
        (b"Content-Type: text/plain; charset=utf-16", "some words".encode("utf-16")),
        (b"Content-Type: text/plain; charset=utf-32", b"\0\0\xfe\xff" + "some words".encode("utf-32-be")),
        (b"Content-Type: text/plain; charset=iso-2022-jp", "\u65e5\u672c words \u8a9e".encode("iso2022_jp") * 3),
        (b"Content-Type: text/plain; charset=iso-2022-jp", b"a\x1b$bcdefghijklm\x1bopqrst\x1b" * 3 + b"uvwxyz\x1b$$0123456789"),
    ],
)  # fmt: skip
def test_the_seams_of_pieces_are_not_seen(monkeypatch, head, octets):
    monkeypatch.setattr(mime_text, "WHOLE", 0)
    data = head + b"\r\n\r\n" + octets
    (part,) = scan(data)
    text = comparable(part_text(data, part))
    for size in range(1, 40):
        monkeypatch.setattr(mime_text, "PIECE", size)
        assert in_text(data, part, text) and not in_text(data, part, text + "x"), size


def test_escape_sequences_without_end_are_not_waited_for():
    data = b"Content-Type: text/plain; charset=iso-2022-jp\r\n\r\n" + b"\x1b$bcdefghij" * 100_000 + b"\x1b(B here"
    (part,) = scan(data)
    assert in_text(data, part, "here") and not in_text(data, part, "there")


@pytest.mark.parametrize("charset", ["utf-16", "utf-32"])
def test_a_mark_of_order_behind_a_piece_of_nothing(charset):
    text = base64.b64encode("\ufeffM\xf6we".encode(f"{charset}-be"))
    head = f"Content-Type: text/plain; charset={charset}\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    data = head.encode() + b"\r\n" * mime_text.PIECE + text
    (part,) = scan(data)
    assert in_text(data, part, "m\xf6we")


def test_each_charset_can_be_decoded_in_pieces():
    for name in {*mime_text._ALL.values()} - mime_text._NO_TEXT:
        with contextlib.suppress(UnicodeError):  # UTF-16 without a mark of its order: it is read as ISO-8859-1
            assert isinstance(codecs.getincrementaldecoder(name)("replace").decode(b"abc"), str)


def test_a_piece_that_is_not_utf_8_is_iso_8859_1(monkeypatch):
    monkeypatch.setattr(mime_text, "WHOLE", 0)
    monkeypatch.setattr(mime_text, "PIECE", 16)
    data = b"Content-Type: text/plain\r\n\r\n" + "f\u00fcr\n".encode() * 20 + b"M\xf6we\n" * 20
    (part,) = scan(data)
    assert in_text(data, part, "f\u00fcr\nf\u00fcr") and in_text(data, part, "m\u00f6we\nm\u00f6we")


def test_a_text_that_two_pieces_share(monkeypatch):
    monkeypatch.setattr(mime_text, "WHOLE", 0)
    monkeypatch.setattr(mime_text, "PIECE", 16)
    data = b"\r\n" + b"".join(b"line %d\r\n" % number for number in range(20))
    (part,) = scan(data)
    text = part_text(data, part)
    missing = [
        text[at : at + size] for at in range(len(text)) for size in range(1, 24) if not in_text(data, part, text[at : at + size])
    ]
    assert missing == []


def test_a_letter_and_a_combining_character_are_another_letter():
    data = "Content-Type: text/plain; charset=utf-8\r\n\r\ncafe\u0301".encode()
    (part,) = scan(data)
    assert in_text(data, part, "caf") and in_text(data, part, "caf\u00e9") and not in_text(data, part, "cafe")
