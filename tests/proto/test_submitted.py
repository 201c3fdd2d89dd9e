"""The beginning of message data: how our fields are separated from it, what is removed from and completed in the header of
submitted mail, and what is logged of it. The rows were tried with Postfix 3.7."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relaymta.proto.header import MESSAGE_ID_SHOWN, begins_well, begun, message_id, received_field
from relaymta.proto.mailbox import addresses, completed
from relaymta.proto.submitted import submitted

# (message data, as it is put behind our fields); without the latter: unchanged
BEGINNINGS = [
    (b"Subject: x\r\n\r\nb\r\n",),
    (b"Foo : x\r\n\r\nb\r\n",),
    (b"From : x@y.example\r\n\r\nb\r\n",),  # obsolete syntax (RFC 5322 4.5); Postfix: a line of a mailbox
    (b"\r\nb\r\n",),
    (b"", b"\r\n"),
    (b"hello\r\nworld\r\n\r\nmore\r\n", b"\r\nhello\r\nworld\r\n\r\nmore\r\n"),
    (b" lead\r\nSubject: x\r\n\r\nb\r\n", b"\r\n lead\r\nSubject: x\r\n\r\nb\r\n"),
    (b"\tlead: x\r\nSubject: x\r\n\r\nb\r\n", b"\r\n\tlead: x\r\nSubject: x\r\n\r\nb\r\n"),
    (b"  \r\nSubject: x\r\n\r\nb\r\n", b"\r\n  \r\nSubject: x\r\n\r\nb\r\n"),
    (b": x\r\nSubject: y\r\n\r\nb\r\n", b"\r\n: x\r\nSubject: y\r\n\r\nb\r\n"),
    (b"foo bar: x\r\nSubject: y\r\n\r\nb\r\n", b"\r\nfoo bar: x\r\nSubject: y\r\n\r\nb\r\n"),
    ("Fü: x\r\nSubject: y\r\n\r\nb\r\n".encode(), "\r\nFü: x\r\nSubject: y\r\n\r\nb\r\n".encode()),
    (b"-----\r\nhello\r\n", b"\r\n-----\r\nhello\r\n"),
    (b"From a@b Mon\r\nSubject: x\r\n\r\nb\r\n", b"X-Mailbox-Line: From a@b Mon\r\nSubject: x\r\n\r\nb\r\n"),
    (
        b">From a@b\r\nFrom c\r\nSubject: x\r\n\r\nb\r\n",
        b"X-Mailbox-Line: >From a@b\r\nX-Mailbox-Line: From c\r\nSubject: x\r\n\r\nb\r\n",
    ),
    (b"From a@b\r\n x\r\n\r\nb\r\n", b"X-Mailbox-Line: From a@b\r\n\r\n x\r\n\r\nb\r\n"),
    (b"From a\r\n\r\nb\r\n", b"X-Mailbox-Line: From a\r\n\r\nb\r\n"),
    (b"From a\r\nhello\r\n", b"X-Mailbox-Line: From a\r\n\r\nhello\r\n"),
    (b"From a\r\n", b"X-Mailbox-Line: From a\r\n"),
    (b"From " + b"a" * 977 + b"\r\n\r\nb\r\n", b"X-Mailbox-Line: From " + b"a" * 977 + b"\r\n\r\nb\r\n"),
    (  # RFC 5322 2.1.1: a line stays shorter than 998 octets
        b"From " + b"a" * 978 + b"\r\n\r\nb\r\n",
        b"X-Mailbox-Line: From\r\n " + b"a" * 978 + b"\r\n\r\nb\r\n",
    ),
    (b"From a b" + b"c" * 975 + b"\r\n\r\n", b"X-Mailbox-Line: From a\r\n b" + b"c" * 975 + b"\r\n\r\n"),
    (b"From a" + b" " * 980 + b"\r\n\r\n", b"X-Mailbox-Line: From a\r\n\r\n"),  # 3.2.2: no line of white space
    (b"From " + b" " * 980 + b"\r\n\r\n", b"X-Mailbox-Line: From\r\n\r\n"),
    (
        b"From " + b" " * 700 + b"a" * 280 + b"\r\n\r\n",
        b"X-Mailbox-Line: From " + b" " * 494 + b"\r\n " + b" " * 206 + b"a" * 280 + b"\r\n\r\n",
    ),
    (
        b">" * 600 + b"From " + b"a" * 385 + b"\r\n\r\n",
        b"X-Mailbox-Line: " + b">" * 499 + b"\r\n " + b">" * 101 + b"From " + b"a" * 385 + b"\r\n\r\n",
    ),
    (b"From a\r\n" * 150 + b"\r\n", b"X-Mailbox-Line: From a\r\n" * 100 + b"\r\n" + b"From a\r\n" * 50 + b"\r\n"),
    ((b"From " + b"a" * 978 + b"\r\n") * 100 + b"\r\nb", (b"X-Mailbox-Line: From\r\n " + b"a" * 978 + b"\r\n") * 100 + b"\r\nb"),
    (b"From " + b"a" * 1200 + b"\r\n\r\n", b"X-Mailbox-Line: From " + b"a" * 1200 + b"\r\n\r\n"),  # it was longer before
    (b"FROM x\r\nb: c\r\n\r\nd\r\n", b"\r\nFROM x\r\nb: c\r\n\r\nd\r\n"),
    (b"from a@b\r\n cont\r\nSubject: x\r\n\r\nb\r\n", b"\r\nfrom a@b\r\n cont\r\nSubject: x\r\n\r\nb\r\n"),
]


def test_a_line_is_not_folded_within_a_character():
    for front in (499, 500):
        one, two, *_ = begun(b">" * front + b"From " + "\u00fc".encode() * 240 + b"\r\n\r\n").split(b"\r\n")
        assert one.decode().startswith("X-Mailbox-Line: >") and two.decode().startswith(" ")
    one, two, *_ = begun(b">From " + "\u00fc".encode() * 489 + b"\r\n").split(b"\r\n")
    assert one == b"X-Mailbox-Line: >From" and two.decode() == " " + "\u00fc" * 489


@pytest.mark.parametrize("row", BEGINNINGS)
def test_our_fields_never_swallow_what_is_behind_them(row):
    data, expected = row[0], row[-1]
    assert begins_well(data) == (len(row) == 1)
    found = begun(data) if not begins_well(data) else data
    assert (b"" if begins_well(found) else b"\r\n") + found == expected
    assert begun(found) is found


_LINES = st.sampled_from([b"From a\r\n", b">From \r\n", b" x\r\n", b"\r\n", b"a: b\r\n", b"x\r\n", b"From : a\r\n", b".\r"])


@given(st.lists(_LINES))
def test_message_data_is_only_added_to(pieces):
    data = b"".join(pieces)
    found = data if begins_well(data) else begun(data)
    assert begins_well(found) or found is data
    assert found.replace(b"X-Mailbox-Line: ", b"").replace(b"\r\n", b"") == data.replace(b"\r\n", b"")
    assert found.endswith(data) or data.startswith((b"From ", b">From "))


SUBMITTED = [
    (b"Bcc: x@y\r\nSubject: s\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"Subject: s\r\nBcc: x@y\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"bcc : x@y\r\nSubject: s\r\nBCC:\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"Bcc:\tx@y,\r\n z@y,\r\n\tv@y\r\nSubject: s\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"Bcc: x@y\r\n \r\n z@y\r\nSubject: s\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"Resent-Bcc: x@y\r\nResent-To: v@w\r\n\r\nb", b"Resent-To: v@w\r\n\r\nb"),
    (b"Return-Path: <a@b>\r\nSubject: s\r\n\r\nb", b"Subject: s\r\n\r\nb"),
    (b"Subject: Bcc: x@y\r\nX-Bcc: x@y\r\nBccs: x\r\n\r\nBcc: b", None),
    (b"Subject: s\r\n Bcc: x@y\r\n\r\nb", None),
    (b"\r\nBcc: x@y\r\n\r\nb", None),
    (b"Bcc: x@y\r\n\r\nb", b"\r\nb"),
    (b"Subject: s\r\nBcc: x@y\r\n", b"Subject: s\r\n"),
    (b"Subject: s\r\nBcc: x@y", b"Subject: s\r\n"),
    (b"From: root\r\nTo: ann@b, bob\r\n\r\nTo: root", b"From: root@ours.example\r\nTo: ann@b, bob@ours.example\r\n\r\nTo: root"),
    (b"FROM : root\r\n\r\n", b"FROM : root@ours.example\r\n\r\n"),
    (
        b"Cc: a\r\nReply-To: b\r\nSender: c\r\nBcc: q\r\nResent-To: d\r\nResent-From: e\r\nResent-Cc: f\r\n"
        b"Resent-Sender: g\r\n\r\n",
        b"Cc: a@ours.example\r\nReply-To: b@ours.example\r\nSender: c@ours.example\r\nResent-To: d@ours.example\r\n"
        b"Resent-From: e@ours.example\r\nResent-Cc: f@ours.example\r\nResent-Sender: g@ours.example\r\n\r\n",
    ),
    (b"Subject: root\r\nX-To: root\r\nReceived: root\r\nMessage-ID: root\r\n\r\nb", None),
]


@pytest.mark.parametrize(("data", "expected"), SUBMITTED)
def test_the_header_of_submitted_mail(data, expected):
    found = submitted(data, "ours.example")
    assert found == (data if expected is None else expected)
    assert submitted(found, "ours.example") is found, "and once is enough"


def test_without_a_domain_nothing_is_completed():
    data = b"From: root\r\nTo: ann\r\n\r\nb"
    assert submitted(data, "") is data


LISTS = [
    (" root", " root@d.example"),
    (" root ", " root@d.example "),
    (" a, b@c, d <e>, <f>", " a@d.example, b@c, d <e@d.example>, <f@d.example>"),
    (" Ann <root >", " Ann <root@d.example >"),
    (" undisclosed-recipients:;", None),
    (" g: a, b@c;, d", " g: a@d.example, b@c;, d@d.example"),
    (" ann (comment)", " ann@d.example (comment)"),
    (" (c) ann (d)", " (c) ann@d.example (d)"),
    (" ann@x.y (root)", None),
    (' "root"', ' "root"@d.example'),
    (" a.b", " a.b@d.example"),
    (" root\r\n , ann", " root@d.example\r\n , ann@d.example"),
    (" x <@y:root>", " x <@y:root@d.example>"),
    (' Bob <bob> (hi), "Q, R" <q>', ' Bob <bob@d.example> (hi), "Q, R" <q@d.example>'),
    (" root, ü <ann>", " root@d.example, ü <ann@d.example>"),
    (" ann@[192.0.2.1], bob", " ann@[192.0.2.1], bob@d.example"),
    (' "A B" <a@b.c>,\r\n J. R. <j@k>, =?utf-8?q?x?= <x@y>, z@z', None),
    # What is no list of addresses, or not said clearly, is left as it is.
    (" =?utf-8?q?x?=", None),
    (" Ann Lee", None),
    (" <>", None),
    ("", None),
    (" ann@", None),
    (" a%b", None),
    (" a!b", None),
    (" a..b", None),
    (' "Ann Lee"', None),
    (' "unterminated', None),
    (" a\r\n b", None),
]


@pytest.mark.parametrize(("value", "expected"), LISTS)
def test_addresses_in_a_header_are_completed(value, expected):
    assert completed(value.encode(), "d.example", 2048).decode() == (value if expected is None else expected)


_BITS = st.sampled_from([
    b"ann", b"@", b"b.example", b",", b" ", b"<", b">", b":", b";", b"(", b")", b'"', b".", b"\r\n ", b"\xc3\xbc", b"\\",
])  # fmt: skip


@given(st.lists(_BITS, max_size=12))
def test_completing_changes_no_address_that_is_complete(bits):
    value = b"".join(bits)
    found = completed(value, "d.example", 100_000)
    assert found.replace(b"@d.example", b"") == value.replace(b"@d.example", b"")
    try:
        before, after = addresses(value), addresses(found)
    except ValueError:
        return
    assert [one._replace(domain=one.domain or "d.example") for one in before] == after


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"A: b\r\nMessage-ID: <x@y>\r\nB: c\r\n\r\n", "<x@y>"),
        (b"Message-Id: <x@y>\r\n\r\n", "<x@y>"),
        (b"A: b\r\nmessage-id:<x@y>", "<x@y>"),
        (b"MESSAGE-ID :\r\n <x@y>\r\n\tz\r\n\r\n", "<x@y>\tz"),
        (b"A: Message-ID: <x@y>\r\n\r\n", ""),
        (b"Message-ID: \r\n\r\n", ""),
        (b"", ""),
        (b"Message-ID: <a\x1b\xff>\r\n\r\n", "<a\x1b\ufffd>"),
        (b"A: b\r\nMessage-ID: <" + b"x" * 5000 + b">\r\n\r\n", "<" + "x" * (MESSAGE_ID_SHOWN - 1)),
    ],
)
def test_the_message_id_for_the_log_is_short(header, expected):
    assert message_id(header) == expected


def test_received_names_the_tls_version_and_cipher():
    """RFC 8314 4.4; the form is that of Postfix."""
    tls = "using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384 (256/256 bits)"
    given = {"hostname": "h", "helo": "c", "client": "192.0.2.1", "protocol": "ESMTPS", "ident": "I", "recipient": ""}
    assert f"([192.0.2.1])\r\n\t({tls})\r\n\tby h ".encode() in received_field(**given, seconds=0, tls=tls)  # type: ignore[arg-type]
    assert b"([192.0.2.1])\r\n\tby h " in received_field(**given, seconds=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [b"Bcc\r\n : q@x", b"\x0bBcc: q@x", b"Bcc\x0b: q@x", b"bcc \t: q@x"])
def test_what_other_parsers_take_for_bcc_is_removed(field):
    assert submitted(b"From: a@b\r\n" + field + b"\r\nTo: c@d\r\n\r\nx", "ours.test") == b"From: a@b\r\nTo: c@d\r\n\r\nx"


def test_a_completed_header_grows_by_little():
    """The room that the queue leaves for added octets is bounded."""
    header = b"From: a\r\nTo: " + b",".join([b"a"] * 7000) + b"\r\nCc: b\r\n\r\n"
    found = submitted(header, "ours.test")
    assert found == header.replace(b"From: a", b"From: a@ours.test").replace(b"Cc: b", b"Cc: b@ours.test")
    many = b"From: a\r\nTo: " + b",".join([b"a"] * 200) + b"\r\nCc: " + b",".join([b"b"] * 200) + b"\r\n\r\n"
    assert 1900 < len(submitted(many, "ours.test")) - len(many) <= 2048
