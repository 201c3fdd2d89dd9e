"""SEARCH as the kernels tell it from rows and data, against what decides where they do not: what they tell is the same."""

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relaymta import _speedups as speedups
from relaymta._speedups import envelopes, packed, search
from relaymta.proto import mime_text
from relaymta.proto.envelope import Body
from relaymta.proto.imap_text import FIELDS, EnvelopeText, MessageText
from relaymta.proto.mime import VERSION, describe
from relaymta.proto.mime_text import comparable
from relaymta.store.rows import ID, MessageRow, ObjectRow
from tests.support.search_texts import search_text


def interpreted():
    """The source of the kernels, run by the interpreter: each needs those in front of it in that form."""
    names = [f"relaymta._speedups.{one}" for one in ("packed", "search", "envelopes")]
    kept = {name: sys.modules[name] for name in names}
    found = []
    try:
        for name in names:
            path = Path(speedups.__file__).parent / f"{name.rpartition('.')[2]}.py"
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, SourceFileLoader(name, str(path))))
            sys.modules[name] = module
            module.__spec__.loader.exec_module(module)
            found.append(module)
        return found
    finally:
        sys.modules.update(kept)


KERNELS = [pytest.param((packed, search, envelopes), id="compiled"), pytest.param(interpreted(), id="interpreted")]
PREFIX = b"Return-Path: <>\r\nDelivered-To: me@local.example\r\n"
NUMBERS = st.sampled_from([0, 1, 127, 128, 255, 256, 65535, 65536, (1 << 32) - 1, 1 << 32, (1 << 63) - 1]) | st.integers(
    0, 1 << 62
)
BODIES = st.builds(Body, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
pack = msgspec.msgpack.encode


def needle(kernels, sought: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mime_text, "Needle", kernels[1].Needle)
        return mime_text.needle_of(sought)


# Rows


@pytest.mark.parametrize("kernels", KERNELS)
@given(NUMBERS, st.integers(-(1 << 62), 1 << 62), NUMBERS, st.binary(max_size=300), BODIES, st.integers(0, 3))
def test_what_rows_say(kernels, ident, date, size, octets, body, version):
    rows = kernels[0]
    message = pack(MessageRow(ident, date, date, size, octets))
    assert rows.objects([message, pack([ident, date, date, size]), None]) == [ID.pack(ident), ID.pack(ident), bytes(8)]
    data = [
        pack(ObjectRow(size, body)),
        pack([size, body]),
        pack(ObjectRow(size, body, describe(octets)._replace(version=version))),
    ]
    assert rows.bodies(data) == [(body.segment, body.generation, body.offset, body.length)] * 3
    assert rows.undescribed(data, VERSION) == [0, 1] + [2] * (version != VERSION)


@pytest.mark.parametrize("kernels", KERNELS)
@given(st.binary(max_size=40), st.integers(0, 200), BODIES)
def test_broken_rows_are_told(kernels, octets, cut, body):
    """None of it is believed, and nothing is read behind a row."""
    rows = kernels[0]
    for row in (octets, pack(MessageRow(1 << 60, 1, 1, 1))[: min(cut, 12)], pack([body, 1, 1, 1])):
        try:
            assert [len(key) for key in rows.objects([row])] == [8]
        except ValueError:
            pass
    whole = pack(ObjectRow(1, body, describe(octets)))
    for row in (octets, whole[:cut]):
        try:
            assert len(rows.bodies([row])) == 1
        except ValueError:
            pass
        finder = needle(kernels, "a")
        told = (
            kernels[2].envelopes(finder, [(b"", row)], b"\1", 1, VERSION),
            finder.texts([(b"", row, octets)], b"\1", True, VERSION),
        )
        if not rows.undescribed([row], VERSION):
            assert describe(octets).envelope in row and describe(octets).parts in row
        else:
            assert told == ((b"\0", b"\1"), (b"\0", b"\1", b"\0"))


# Whole messages


def row_of(data: bytes) -> bytes:
    return pack(ObjectRow(1, Body(1, 1, 1, len(data)), describe(data)))


FIELD_LINES = st.lists(
    st.tuples(
        st.sampled_from(["Subject", "From", "To", "Cc", "Message-ID", "Date", "Sender"]),
        st.text('abA "\\(),;:<>@=?qs\u00df\u00a0\t', max_size=14)
        | st.sampled_from(
            ['Bob <b@a.s>, "a" <@x>', "g: a@b, s <q@s>;", "u:;", '" A " <a@b>', "=?utf-8?q?=41?=", "a" * 1001, "<a>"]
        ),
    ),
    max_size=6,
).map(lambda fields: "".join(f"{name}: {text}\r\n" for name, text in fields).encode() + b"\r\n")


@pytest.mark.parametrize("kernels", KERNELS)
@given(FIELD_LINES, st.text('abA "(<>@,s\u00df', min_size=1, max_size=4))
@example(b"From: " + b"a" * 1001 + b"\r\n\r\n", "a")
@example(b'From: <" a"@b>\r\n\r\n', " a")
@example(b"From: a:;, Bob <b@c>\r\n\r\n", ", b")
@example(b'From: " A" <@b>, <c@>\r\n\r\n', "a <")
def test_envelopes(kernels, data, sought):
    sought, row = comparable(sought), row_of(data)
    finder, text = needle(kernels, sought), EnvelopeText(describe(data).envelope, str)
    for name, place in FIELDS.items():
        yes, ask = kernels[2].envelopes(finder, [(b"", row), text, (b"", row)], b"\3", place, VERSION)
        assert ask[0] & 2 == 2 and not (yes[0] | ask[0]) & 4
        if not ask[0] & 1:
            assert yes == bytes([text.has(name, sought)])


@pytest.mark.parametrize(
    "octets", [b"", b"(", b"NIL", b'("a', b"(NIL (", b"({9}\r\nab", b'("a" "b', b"(NIL (NIL) ", b"({99999999999999999999}"]
)
@pytest.mark.parametrize("kernels", KERNELS)
def test_an_envelope_that_is_none(kernels, octets):
    row = pack(ObjectRow(1, Body(1, 1, 1, 1), describe(b"")._replace(envelope=octets)))
    finder, text = needle(kernels, "a"), EnvelopeText(octets, str)
    for name, place in FIELDS.items():
        yes, ask = kernels[2].envelopes(finder, [(b"", row)], b"\1", place, VERSION)
        assert ask == b"\1" or yes[0] == text.has(name, "a")


def told(kernels, data: bytes, sought: str, headers: bool, prefix: bytes = PREFIX, row: bytes | None = None) -> str:
    """What the kernel says: "yes", "no", "ask", "ask headers"."""
    one = (pack(MessageRow(1, 1, 1, 1, prefix)), row or row_of(data), data)
    yes, ask, ask_headers = needle(kernels, sought).texts([one, one], b"\2", headers, VERSION)
    return {(0, 0, 0): "no", (2, 0, 0): "yes", (0, 2, 0): "ask", (0, 0, 2): "ask headers"}[yes[0], ask[0], ask_headers[0]]


def agree(kernels, data: bytes, sought: str, prefix: bytes = PREFIX) -> None:
    sought, text = comparable(sought), MessageText(prefix, data)
    body = told(kernels, data, sought, False, prefix)
    assert body == "ask" or body == ("yes" if text.in_body(sought) else "no")
    if "\r" in sought or "\n" in sought:
        return
    whole = told(kernels, data, sought, True, prefix)
    if whole == "ask headers":
        assert text.in_headers(sought) == text.in_text(sought)
    else:
        assert whole == "ask" or whole == ("yes" if text.in_text(sought) else "no")


@pytest.mark.parametrize("kernels", KERNELS)
@given(st.randoms(use_true_random=False))
def test_texts(kernels, chance):
    """All encodings and charsets, whole and damaged."""
    data, needles = search_text(chance)
    for sought in needles:
        agree(kernels, data, sought, chance.choice([PREFIX, b"", b"X: =?utf-8?q?=41?=\r\n", b"no end"]))


PLAIN = b"Subject: the first\r\n one\r\nX-A: =b\r\nContent-Type: %b\r\nContent-Transfer-Encoding: %b\r\n\r\n%b"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    ("kind", "encoding", "text", "sought", "said"),
    [
        (b"text/plain", b"7bit", b"Some WORDS", "words", "yes"),
        (b"text/plain", b"7bit", b"Some WORDS", "wordy", "no"),
        (b"text/plain", b"7bit", b"Some WORDS", "first one", "yes in the header"),
        (b"text/plain", b"7bit", b"Some WORDS", "firstone", "no"),
        (b"text/plain", b"7bit", b"Some WORDS", "local.example", "yes in the header"),
        (b"text/plain", b"7bit", b"Some WORDS", "w\xf6rds", "no"),
        (b"application/pdf", b"7bit", b"Some WORDS", "words", "no"),
        (b"text/plain; charset=utf-8", b"quoted-printable", b"Some wo=\r\nrds =C3=A4", "words", "yes"),
        (b"text/plain;\r\n\tcharset=\"UTF-8\"", b"quoted-printable", b"Some =77ords =C3=A4", "wordy \xe4x", "no"),
        (b"text/plain; charset=utf-8", b"base64", b"U29tZSBXT1JEUw==", "words", "yes"),
        (b"text/plain; charset=utf-8", b"8bit", "Köln 😀 – “x”".encode(), "words", "no"),
        (b"text/plain; charset=utf-8", b"8bit", "Köln ﬃ".encode(), "words", "no"),
        (b"text/plain; charset=utf-8", b"8bit", "Köln ﬃ".encode(), "ffi", "ask"),
        (b"text/plain; charset=utf-8", b"8bit", "words\u0301".encode(), "words", "ask"),
        (b"text/plain; charset=utf-8", b"8bit", b"K\xf6ln", "words", "ask"),
        (b"text/plain; charset=iso-8859-1", b"8bit", b"K\xf6ln words", "words", "yes"),
        (b"text/plain; charset=iso-8859-1", b"8bit", b"K\xf6ln words", "wordy", "ask"),
        (b"text/plain; charset=iso-8859-1", b"8bit", b"\xc3\xb2", "2", "ask"),
        (b"text/plain", b"8bit", b"\xc1\xb2", "2", "ask"),
        (b"text/plain", b"8bit", b"\xe0\x80\xb2", "2", "ask"),
        (b"text/plain", b"8bit", b"\xed\xa0\xb2", "2", "ask"),
        (b"text/plain; charset=utf-7", b"7bit", b"words", "words", "ask"),
        (b"text/plain; charset=utf-8", b"quoted-printable", b"In Z=C3=BCRich.", "z\xfcrich", "yes"),
        (b"text/plain; charset=utf-8", b"8bit", "Zürcher Rhein –".encode(), "z\xfcrich", "no"),
        (b"text/plain; charset=utf-8", b"8bit", "Über".encode(), "\xfcber", "ask"),
        (b"text/plain; charset=utf-8", b"8bit", "u\u0308ber".encode(), "\xfcber", "ask"),
        (b"text/plain; charset=utf-8", b"8bit", "über".encode() + b"\xff", "\xfcber", "ask"),
        (b"text/plain", b"8bit", "über ".encode() + b"\xff", "\xfcber", "ask"),
        (b"text/plain; charset=iso-8859-1", b"8bit", "über".encode(), "\xfcber", "ask"),
        (b"text/plain; charset=utf-8", b"8bit", "привет мир".encode(), "\u043c\u0438\u0440", "yes"),
    ],
)  # fmt: skip
def test_what_is_told_without_decoding(kernels, kind, encoding, text, sought, said):
    data = PLAIN % (kind, encoding, text)
    header = said == "yes in the header"
    assert told(kernels, data, sought, False) == ("no" if header else said)
    assert told(kernels, data, sought, True) == ("yes" if header else said)
    agree(kernels, data, sought)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_header_begins_amid_a_line(kernels):
    """That of the message, where what is in front of it in this copy does not end with its line."""
    data = PLAIN % (b"text/plain", b"7bit", b"Some words")
    assert MessageText(b"X: no", data).in_headers("nosubject")
    assert told(kernels, data, "nosubject", True, b"X: no") == "ask headers"
    agree(kernels, data, "nosubject", b"X: no")


@pytest.mark.parametrize("kernels", KERNELS)
def test_parts_that_do_not_fit_the_data_are_asked(kernels):
    data = PLAIN % (b"text/plain", b"7bit", b"Some words")
    for cut in (0, 20, len(data) - 1):
        assert told(kernels, data[:cut], "words", True, row=row_of(data)) == "ask"


@pytest.mark.parametrize("kernels", KERNELS)
def test_long_needles_in_repeated_text(kernels):
    """Comparing comes to an end."""
    data = b"\r\n" + b"a" * 20000 + b"b"
    assert told(kernels, data, "a" * 5000 + "c", False) in ("no", "ask")
    assert told(kernels, data, "ab" + "a" * 5000, False) in ("no", "ask")
    agree(kernels, data, "a" * 5000 + "b")
    assert told(kernels, b"\r\n" + b"ab" * 10000, "ab" * 2000 + "ba", False) == "ask"


def test_pictures_hide_no_letter():
    """What `bare` takes them for."""
    assert not any(one.isascii() for code in range(0x1F300, 0x1FB00) for one in comparable(chr(code)))
