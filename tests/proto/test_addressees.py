"""Whom a header names: the reader of sendmail -t, beside the standard library's."""

from email.utils import getaddresses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.addressees import addresses, fields, header_octets, recipients


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"ann@a.example", [b"ann@a.example"]),
        (b"ann@a.example, bob@b.example;carl", [b"ann@a.example", b"bob@b.example", b"carl"]),
        (b'"Doe, Ann" <ann@a.example>, Bob (the, other) <bob@b.example>', [b"ann@a.example", b"bob@b.example"]),
        (b"root (Cron Daemon)", [b"root"]),
        (b"(a (nested, \\) ) one) ann@a.example", [b"ann@a.example"]),
        (
            b"friends: ann@a.example, Bob <bob@b.example>;, carl@c.example",
            [b"ann@a.example", b"bob@b.example", b"carl@c.example"],
        ),
        (b"undisclosed-recipients:;", []),
        (b"<@a.example,@b.example:ann@c.example>", [b"ann@c.example"]),
        (b'"a, b"@a.example', [b'"a, b"@a.example']),
        (b'"a \\" <x@y>, b"@a.example', [b'"a \\" <x@y>, b"@a.example']),
        (b"ann@[IPv6:2001:db8::1], bob@[192.0.2.1]", [b"ann@[IPv6:2001:db8::1]", b"bob@[192.0.2.1]"]),
        (b"Ann\r\n <ann@a.example>,\r\n\tbob@b.example", [b"ann@a.example", b"bob@b.example"]),
        (b"<ann@a.example, bob@b.example", [b"ann@a.example", b"bob@b.example"]),
        (b",,; ,", []),
        (b"<>", []),
        (b"ann@a.example (not closed, bob@b.example", [b"ann@a.example"]),
    ],
)
def test_addresses_of_a_list(value, found):
    assert addresses(value) == found


_WORD = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
_ADDRESS = st.builds("{}@{}.example".format, _WORD, _WORD)
_MAILBOX = st.one_of(
    _ADDRESS,
    st.builds('"{}, {}" <{}>'.format, _WORD, _WORD, _ADDRESS),
    st.builds("{} {} <{}>".format, _WORD, _WORD, _ADDRESS),
    st.builds("{} ({} {})".format, _ADDRESS, _WORD, _WORD),
    st.builds("{}: {}, <{}>;".format, _WORD, _ADDRESS, _ADDRESS),
)


@given(st.lists(_MAILBOX, max_size=6).map(", ".join))
def test_well_formed_lists_are_read_as_by_the_standard_library(value):
    assert addresses(value.encode()) == [found.encode() for _, found in getaddresses([value]) if found]


@given(st.text('ab@<>,;:()"\\[] \t', max_size=40))
def test_no_list_is_too_malformed(value):
    for found in addresses(value.encode()):
        assert found


@pytest.mark.parametrize(
    ("data", "header"),
    [
        (b"To: a\r\nCc: b\r\n c\r\n\r\nBcc: d\r\n", b"To: a\r\nCc: b\r\n c\r\n"),
        (b"hello\r\nTo: a\r\n", b""),
        (b"\r\nTo: a\r\n", b""),
        (b" To: a\r\n", b""),
        (b"To: a\r\nno field\r\nCc: b\r\n", b"To: a\r\n"),
        (b"To: a", b"To: a"),
        (b"To : a\r\n\r\n", b"To : a\r\n"),
        (b"a b: c\r\n\r\n", b""),
        (b"", b""),
    ],
)
def test_where_a_header_ends(data, header):
    assert data[: header_octets(data)] == header


def test_fields_are_unfolded():
    header = b"To: a,\r\n b\r\nSUBJECT: x\r\nCc: c\r\n d\r\nto : e\r\n"
    assert fields(header, (b"to", b"subject")) == [(b"to", b" a, b"), (b"subject", b" x"), (b"to", b" e")]


def test_recipients_of_a_header():
    header = b"To: a@x.example\r\nFrom: f@x.example\r\nbcc: b@x.example\r\nCC: c@x.example, a@x.example\r\n"
    assert recipients(header) == [b"a@x.example", b"b@x.example", b"c@x.example"]


def test_a_message_that_is_sent_on_goes_to_those_alone_whom_its_resent_fields_name():
    header = b"Resent-Bcc: r@x.example\r\nTo: a@x.example\r\nBcc: b@x.example\r\nResent-To: s@x.example\r\n"
    assert recipients(header) == [b"r@x.example", b"s@x.example"]
