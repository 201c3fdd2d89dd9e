"""Modified UTF-7 against RFC 3501 and Python's own UTF-7; which names of mailboxes may exist."""

import contextlib
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.mailbox_name import decode, encode, problem

PAIRS = [
    ("~peter/mail/台北/日本語", "~peter/mail/&U,BTFw-/&ZeVnLIqe-"),  # RFC 3501 5.1.3
    ("台北日本語", "&U,BTF2XlZyyKng-"),
    ("INBOX/Sent 2024", "INBOX/Sent 2024"),
    ("AT&T", "AT&-T"),
    ("&&", "&-&-"),
    ("&é&", "&-&AOk-&-"),
    ("Entwürfe", "Entw&APw-rfe"),
    ("😀", "&2D3eAA-"),
    ("a\tb", "a&AAk-b"),
    ("", ""),
]
MALFORMED = [
    "&", "a&", "&AOk", "é", "a\tb", "&A-", "&AA-", "&AOkA-", "&AOl-",  # the last: bits that are left over are not 0
    "&AGE-", "&U,BTFw-&ZeVnLIqe-", "&ACY-", "&2D0-", "&3gDYPQ-", "&AOk=-", "&A/k-", "& -",
]  # fmt: skip

names = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("&-,/+abAÿé台😀")), max_size=60)


@pytest.mark.parametrize(("name", "text"), PAIRS)
def test_names_and_their_encodings(name, text):
    assert encode(name) == text
    assert decode(text) == decode(text, lenient=True) == name


def test_what_the_rfc_forbids_is_malformed():
    for text in MALFORMED:
        with pytest.raises(ValueError):
            decode(text)


def test_needless_shifts_are_taken_where_that_is_asked_for():
    taken = {"a&AC4-b": "a.b", "&AGE-": "a", "&U,BTFw-&ZeVnLIqe-": "台北日本語", "&AOQALg-": "ä.", "&AOl-": "é", "&ACY-": "&"}
    assert {text: decode(text, lenient=True) for text in taken} == taken
    for text in ("&", "a&", "&AOk", "é", "a\tb", "&A-", "&AA-", "&2D0-", "&AOk=-", "&A/k-", "& -", "&&-"):
        with pytest.raises(ValueError):
            decode(text, lenient=True)


def test_a_lone_surrogate_has_no_encoding():
    with pytest.raises(ValueError):
        encode("a\ud800")


@given(names)
def test_every_name_comes_back(name):
    text = encode(name)
    assert text.isascii() and text.isprintable()
    assert decode(text) == decode(text, lenient=True) == name


@given(st.text(st.characters(codec="utf-8", exclude_characters="&+,/"), max_size=60))
def test_pythons_utf_7_reads_it(name):
    assert encode(name).replace("&", "+").replace(",", "/").encode().decode("utf-7") == name


@given(st.one_of(st.text(st.sampled_from("&-,+AOkABC/= é."), max_size=30), st.text(max_size=30)))
def test_a_name_has_one_encoding(text):
    try:
        name = decode(text)
    except ValueError:
        return
    assert encode(name) == text


def test_time_is_linear():
    begun = time.process_time()
    for text in ("&" * 10**6, "&AOk-" * 200_000, "&" + "A" * 10**6, "&-" * 500_000, "é&" * 500_000, "&AAA" * 250_000):
        encode(text)
        for lenient in (False, True):
            with contextlib.suppress(ValueError):
                decode(text, lenient=lenient)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "empty"), ("/a", "empty"), ("a/", "empty"), ("a//b", "empty"), ("a*", "wildcard"), ("%", "wildcard"),
        ("a\nb", "control"), ("a\x7f", "control"), ("a\x85", "control"), ("a\u2028b", "control"), ("e\u0301", "form C"),
        ("a\udc80", "UTF-8"), ("ä" * 128, "255 octets"), ("/".join(["a" * 250] * 4), "1000 octets"),
        ("/".join("a" * 21), "20 levels"),
    ],
)  # fmt: skip
def test_names_that_may_not_exist(name, says):
    assert says in problem(name)


@pytest.mark.parametrize(
    "name", ["INBOX", "Sent/2024", "AT&T", ".", "ä" * 127, "/".join("a" * 20), "/".join(["a" * 249] * 4), "\u212b"]
)
def test_names_that_may_exist(name):
    assert problem(unicodedata.normalize("NFC", name)) is None
