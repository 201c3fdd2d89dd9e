"""The JSON of requests by HTTP: what is read of it, and where it is wrong."""

import json
import mmap
import tracemalloc
from datetime import UTC, datetime

import msgspec
import pytest

from relaymta.accept.http import models
from relaymta.accept.http.models import Limits, Mailbox, Request, Wrong, parse

BASE = {"from": "Ann <ann@a.example>", "to": "bob@b.example", "subject": "Hello", "text": "Hi"}
FILE = {"filename": "a.pdf", "content": "YQ=="}
ENTRY = {"to": "a@b"}


def parsed(**changes):
    return parse(json.dumps(BASE | changes).encode())


def batch(*entries, **changes):
    request = {name: value for name, value in BASE.items() if name != "to"} | changes
    return parse(json.dumps(request | {"batch": list(entries)}).encode())


def test_what_is_read():
    found = parsed(cc=[{"email": "c@d", "name": " C  D "}], bcc="<e@f>", reply_to=['"x, \\"y\\"" <g@h>'], tags=["a", "b", "a"])
    assert found.author == Mailbox("ann@a.example", "Ann") and found.sender == "ann@a.example"
    assert (found.to, found.cc, found.bcc) == ((Mailbox("bob@b.example"),), (Mailbox("c@d", "C D"),), (Mailbox("e@f"),))
    assert found.reply_to == (Mailbox("g@h", 'x, "y"'),)
    assert (found.tags, found.priority, found.send_at, found.batch, found.substitutions) == (
        ("a", "b"),
        "",  # that of the account
        None,
        None,
        None,
    )
    assert parsed(send_at="2030-01-01T12:00:00+02:00").send_at == datetime(2030, 1, 1, 10, tzinfo=UTC)
    assert parsed(envelope_from="").sender == parsed(envelope_from="<>").sender == ""
    assert parsed(envelope_from="bounce@a.example").sender == "bounce@a.example"
    assert parsed(headers={"Sender": "S <s@s>", "Reply-To": ["r@r"]}).on_behalf == Mailbox("s@s", "S")
    assert parsed(substitutions={"a": [1]}).substitutions == b'{"a": [1]}'
    (one, two) = batch(ENTRY | {"substitutions": {}}, ENTRY | {"subject": "x"}).batch
    assert (one.substitutions, one.subject, two.substitutions, two.subject) == (b"{}", None, b"", "x")


ADDRESSES = [
    ("Bob <bob@b.example>", Mailbox("bob@b.example", "Bob")),
    ("bob@BÜCHER.example", Mailbox("bob@xn--bcher-kva.example")),
    ("bób@bücher.example", Mailbox("bób@bücher.example")),
    ("O'Brien (Sales): Ann <a@b>", Mailbox("a@b", "O'Brien (Sales): Ann")),
    ('"a b"@c', Mailbox('"a b"@c')),
    ("a@[192.0.2.1]", Mailbox("a@[192.0.2.1]")),
    ("=?utf-8?q?x?= <a@b>", Mailbox("a@b", "=?utf-8?q?x?=")),
]


@pytest.mark.parametrize(("text", "mailbox"), ADDRESSES)
def test_a_mailbox(text, mailbox):
    assert parsed(to=text).to == (mailbox,)


WRONG = [
    ({"from": None}, "from"),
    ({"from": ""}, "from"),
    ({"from": ["a@b"]}, "from"),
    ({"from": {"name": "x"}}, "from.email"),
    ({"from": {"email": "a@b", "phone": "1"}}, "from.phone"),
    ({"from": {"email": "a", "name": "x"}}, "from.email"),
    ({"from": {"email": "a@b", "name": "x\ny"}}, "from.name"),
    ({"from": "x\r\ny <a@b>"}, "from"),
    ({"from": "n" * 257 + " <a@b>"}, "from"),
    ({"from": "n" * 2000 + " <a@b>"}, "from"),
    ({"envelope_from": "Ann <a@b>"}, "envelope_from"),
    ({"to": []}, "to"),
    ({"to": "a@b, c@d"}, "to"),
    ({"to": ["a@b", "A@, b <c@d>"]}, "to[1]"),
    ({"to": ["a@b", "c"]}, "to[1]"),
    ({"to": ["a@b", {"email": "a@b\n"}]}, "to[1].email"),
    ({"to": ["a@b", 1]}, "to[1]"),
    ({"to": "a@" + "x" * 64 + ".example"}, "to"),
    ({"to": "a@b..c"}, "to"),
    ({"to": "=?utf-8?q?x?=@b"}, "to"),
    ({"to": "\u212a@b"}, "to"),
    ({"to": "a\u0085@b"}, "to"),
    ({"to": [f"a{number}@b" for number in range(1001)]}, "to"),
    ({"cc": ["a@b", "@"]}, "cc[1]"),
    ({"reply_to": {"email": "x"}}, "reply_to.email"),
    ({"subject": "a\nb"}, "subject"),
    ({"subject": "a\u2028b"}, "subject"),
    ({"subject": "a" * 2001}, "subject"),
    ({"subject": 1}, "subject"),
    ({"text": "a\0b"}, "text"),
    ({"text": None}, "text"),
    ({"html": "\0"}, "html"),
    ({"headers": {"X-A": 1}}, "headers.X-A"),
    ({"headers": {"X-A": ["a"], "X-A[0]": "b"}}, "headers.X-A[0]"),
    ({"headers": {"X-B": "", "X-A": ["", 1]}}, "headers.X-A[1]"),
    ({"headers": {"X-A": ["a", "b\rc"]}}, "headers.X-A[1]"),
    ({"headers": {"X-A": "a\tb"}}, "headers.X-A"),
    ({"headers": {"X A": ""}}, "headers.X A"),
    ({"headers": {"X:A": ""}}, "headers.X:A"),
    ({"headers": {"": ""}}, "headers."),
    ({"headers": {"X-Ä": ""}}, "headers.X-Ä"),
    ({"headers": {"X\r\nY": ""}}, "headers.X\\r\\nY"),
    ({"headers": {"X-A": ["a"] * 101}}, "headers"),
    ({"headers": {"X-A": "a" * 8001}}, "headers.X-A"),
    ({"headers": {"bCc": "a@b"}}, "headers.bCc"),
    ({"headers": {"Date": "yesterday"}}, "headers.Date"),
    ({"headers": {"Date": "Thu, 99 Jan 2026 12:00:00 +0000"}}, "headers.Date"),
    ({"headers": {"Date": "1 Jan 2026 12:00:00 +0000", "date": "1 Jan 2026 12:00:00 +0000"}}, "headers.date"),
    ({"headers": {"Date": ["1 Jan 2026 12:00:00 +0000"] * 2}}, "headers.Date"),
    ({"headers": {"Message-ID": "x"}}, "headers.Message-ID"),
    ({"headers": {"Message-ID": "<a@b> <c@d>"}}, "headers.Message-ID"),
    ({"headers": {"Sender": "x"}}, "headers.Sender"),
    ({"headers": {"Reply-To": "x"}}, "headers.Reply-To"),
    ({"headers": {"Reply-To": "a@b"}, "reply_to": "c@d"}, "headers.Reply-To"),
    ({"headers": {"List-Id": "ä <a.b>"}}, "headers.List-Id"),
    ({"headers": {"References": "<" + "a" * 1000 + "@b>"}}, "headers.References"),
    ({"attachments": [FILE, {"content": "YQ=="}]}, "attachments[1].filename"),
    ({"attachments": [FILE, FILE | {"filename": ""}]}, "attachments[1].filename"),
    ({"attachments": [FILE, FILE | {"filename": "a\nb"}]}, "attachments[1].filename"),
    ({"attachments": [FILE, FILE | {"filename": "a" * 256}]}, "attachments[1].filename"),
    ({"attachments": [FILE, {"filename": "a"}]}, "attachments[1].content"),
    ({"attachments": [FILE, FILE | {"part": "p"}]}, "attachments[1].content"),
    ({"attachments": [FILE, FILE | {"content": 1}]}, "attachments[1].content"),
    ({"attachments": [FILE, FILE | {"content": None}]}, "attachments[1].content"),
    ({"attachments": [FILE, FILE | {"content": ["YQ=="]}]}, "attachments[1].content"),
    ({"attachments": [FILE, FILE | {"disposition": "x"}]}, "attachments[1].disposition"),
    ({"attachments": [FILE, FILE | {"disposition": "attachment", "content_id": "a"}]}, "attachments[1].disposition"),
    ({"attachments": [FILE, FILE | {"content_id": "a b"}]}, "attachments[1].content_id"),
    ({"attachments": [FILE, FILE | {"content_id": ""}]}, "attachments[1].content_id"),
    ({"attachments": [FILE | {"content_id": "a"}, FILE | {"content_id": "<a>"}]}, "attachments[1].content_id"),
    ({"attachments": [FILE, FILE | {"content_type": "image"}]}, "attachments[1].content_type"),
    ({"attachments": [FILE, FILE | {"content_type": "image/png\r\nX: y"}]}, "attachments[1].content_type"),
    ({"attachments": [FILE, FILE | {"content_type": 'a/b; c="\\""'}]}, "attachments[1].content_type"),
    ({"attachments": [FILE, FILE | {"content_type": "a/b; c=d; C=e"}]}, "attachments[1].content_type"),
    ({"attachments": [FILE, FILE | {"content_type": "message/rfc822"}]}, "attachments[1].content_type"),
    ({"attachments": [FILE, FILE | {"content_type": "Multipart/mixed; boundary=x"}]}, "attachments[1].content_type"),
    ({"attachments": [FILE] * 101}, "attachments"),
    ({"send_at": "2030-01-01T12:00:00"}, "send_at"),
    ({"send_at": 5}, "send_at"),
    ({"send_at": "0001-01-01T00:00:00+14:00"}, "send_at"),
    ({"tags": ["a", "b c"]}, "tags[1]"),
    ({"tags": ["a", "ä"]}, "tags[1]"),
    ({"tags": ["a", "x" * 65]}, "tags[1]"),
    ({"tags": ["a", ""]}, "tags[1]"),
    ({"tags": ["a"] * 21}, "tags"),
    ({"priority": "high"}, "priority"),
    ({"substitutions": []}, "substitutions"),
    ({"substitutions": {"a": "x" * (1 << 20)}}, "substitutions"),
    ({"batch": [ENTRY]}, "to"),
    ({"message_id": "<a@b>"}, "message_id"),
    ({"x\ny": 1}, "x\\ny"),
]  # fmt: skip
RESERVED = [
    "From", "To", "cc", "Bcc", "SUBJECT", "MIME-Version", "Content-Type", "content-x", "Received", "Return-Path",
    "DKIM-Signature",
    "ARC-Seal", "Authentication-Results", "X-Relay-Tags", "X-Relaymta-Export", "Resent-To", "Delivered-To",
]  # fmt: skip
WRONG += [({"headers": {name: "a@b"}}, f"headers.{name}") for name in RESERVED]


@pytest.mark.parametrize(("changes", "field"), WRONG, ids=range(len(WRONG)))
def test_the_field_that_is_wrong_is_named(changes, field):
    with pytest.raises(Wrong) as caught:
        parsed(**changes)
    assert caught.value.field == field
    assert caught.value.detail and caught.value.detail.isprintable() and len(caught.value.detail) <= 200


WRONG_BATCH = [
    ([], {}, "batch"),
    ([ENTRY] * 10_001, {}, "batch"),
    ([ENTRY, {}], {}, "batch[1].to"),
    ([ENTRY, {"to": []}], {}, "batch[1].to"),
    ([ENTRY, {"to": "x"}], {}, "batch[1].to"),
    ([ENTRY, {"to": ["a@b", "x"]}], {}, "batch[1].to[1]"),
    ([ENTRY, ENTRY | {"cc": {"email": "x"}}], {}, "batch[1].cc.email"),
    ([ENTRY, ENTRY | {"bcc": [1]}], {}, "batch[1].bcc[0]"),
    ([ENTRY, ENTRY | {"substitutions": 1}], {}, "batch[1].substitutions"),
    ([ENTRY, ENTRY | {"text": "x"}], {}, "batch[1].text"),
    ([ENTRY, {"to": [f"a{number}@b" for number in range(999)], "cc": ["a@b"] * 2}], {}, "batch[1].to"),
    ([ENTRY], {"bcc": "a@b"}, "bcc"),
    ([ENTRY, ENTRY | {"subject": "a\nb"}], {}, "batch[1].subject"),
    ([ENTRY], {"subject": "a\nb"}, "subject"),
    ([ENTRY], {"headers": {"X-A": "a\nb"}}, "headers.X-A"),
    ([ENTRY], {"headers": {"Message-ID": "<a@b>"}}, "headers.Message-ID"),
]


@pytest.mark.parametrize(("entries", "changes", "field"), WRONG_BATCH, ids=range(len(WRONG_BATCH)))
def test_the_entry_of_a_batch_that_is_wrong_is_named(entries, changes, field):
    with pytest.raises(Wrong) as caught:
        batch(*entries, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "octets",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"from": "\xff"}', b'{"from": "\\ud800"}',
        b'{"attachments": [{"content": ' + b"[" * 100_000,
        b'{"substitutions": ' + b'{"a":' * 100_000, b'{"from": 1e999}', b'{"headers": {"X-A": 1}, "text": }', b"{} {}",
    ],
)  # fmt: skip
def test_what_is_no_request(octets):
    with pytest.raises(Wrong):
        parse(octets)


def test_the_recipients_of_a_batch_are_counted_together():
    request = {"from": "a@b", "text": "x", "batch": [{"to": ["a@b", "c@d"], "cc": "e@f"}, {"to": "g@h", "bcc": "i@j"}]}
    assert len(parse(json.dumps(request).encode(), Limits(together=5)).batch) == 2
    with pytest.raises(Wrong, match="batch: it has more than 4 recipients"):
        parse(json.dumps(request).encode(), Limits(together=4))


def test_limits_can_be_others():
    with pytest.raises(Wrong, match="more than 1 recipients"):
        parse(json.dumps(BASE | {"cc": "c@d"}).encode(), Limits(recipients=1))


@pytest.mark.parametrize("name, most, request_", [
    ("reply_to", 100, {"reply_to": ["ü@ü.example"] * 101}), ("to", 1000, {"to": ["ü@ü.example"] * 1001}),
    ("to", 1000, {"cc": ["ü@ü.example"] * 600, "bcc": ["ü@ü.example"] * 600}),
    ("headers", 100, {"headers": {"X-A": ["x"] * 101}}),
    ("batch", 100_000, {"to": [], "batch": [{"to": ["ü@ü.example"] * 1000}] * 101}),
], ids=str)  # fmt: skip
def test_what_is_too_much_is_counted_before_it_is_read(monkeypatch, name, most, request_):
    """As reading takes up to 50 us a mailbox."""
    read = []
    monkeypatch.setattr(models, "plain", lambda text: read.append(text) or "a@b")
    with pytest.raises(Wrong) as wrong:
        parsed(**request_)
    assert wrong.value.field == name and str(most) in wrong.value.detail
    assert read == ["ann@a.example"] or read == []


def test_a_hundred_reply_tos():
    assert len(parsed(reply_to=["a@b"] * 100).reply_to) == 100


LONG = "ä - at `$.x " * 100_000


@pytest.mark.parametrize("changes, field", [
    ({LONG: 1}, "ä"), ({"attachments": [{LONG: 1}]}, "attachments[0].ä"), ({"headers": {LONG: 1}}, "headers.ä"),
    ({"headers": {LONG: "x"}}, "headers.ä"), ({"headers": {LONG: ["1"] * 90}}, "headers.ä"), ({"priority": LONG}, "priority"),
    ({"headers": {LONG: ["1"] * 1000}}, "headers.ä"), ({"envelope_from": LONG}, "envelope_from"), ({"send_at": LONG}, "send_at"),
    ({"from": {"email": LONG}}, "from.email"), ({"from": {"email": "a@b", "name": LONG}}, "from.name"), ({"from": LONG}, "from"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_an_error_does_not_grow_with_the_request(monkeypatch, changes, field):
    """Neither what is answered, nor what is looked at by a regular expression, or is copied for each value."""
    longest = 0
    printed = models.printable

    def noted(text):
        nonlocal longest
        longest = max(longest, len(text))
        return printed(text)

    monkeypatch.setattr(models, "printable", noted)
    octets = json.dumps(BASE | changes, ensure_ascii=False).encode()
    tracemalloc.start()
    try:
        with pytest.raises(Wrong) as wrong:
            parse(octets)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    found = wrong.value
    assert found.field.startswith(field) and len(found.field) <= 200 and len(found.detail) <= 200 and longest <= 200
    assert most < 10 * len(octets)


def test_headers_that_may_be_set():
    headers = {
        "Date": " Thu, 1 Jan 2026 12:00:00 +0000 ", "Message-ID": "<a.b@c>", "List-Unsubscribe": "<https://a.example/x>",
        "In-Reply-To": "<a@b>", "X-Some": ["a", "ä"], "Comments": "=?x?q?y?=",
    }  # fmt: skip
    assert [(one.name, one.value) for one in parsed(headers=headers).headers] == [
        ("Date", "Thu, 1 Jan 2026 12:00:00 +0000"), ("Message-ID", "<a.b@c>"), ("List-Unsubscribe", "<https://a.example/x>"),
        ("In-Reply-To", "<a@b>"), ("X-Some", "a"), ("X-Some", "ä"), ("Comments", "=?x?q?y?="),
    ]  # fmt: skip


def test_templates_are_checked_when_they_are_rendered():
    found = batch(
        ENTRY | {"subject": "a\n{{ b }}"}, headers={"Message-ID": "<{{ id }}@b>", "Date": "{{ date }}"}, subject="\n{# x #}"
    )
    assert found.batch[0].subject == "a\n{{ b }}" and found.headers[0].value == "<{{ id }}@b>"
    with pytest.raises(Wrong, match=r"headers.Date"):
        parsed(headers={"Date": "{{ date }}"})


def test_attachments():
    found = parsed(
        attachments=[
            FILE,
            FILE | {"content_type": 'text/calendar;charset=utf-8;  method="REQUEST x"', "disposition": "inline"},
            {"filename": "ä", "part": "p", "content_id": "<logo@a.example>"},
        ]
    ).attachments
    assert [bytes(one.content) for one in found] == [b"YQ==", b"YQ==", b""]
    assert [one.content_type for one in found] == [
        "application/octet-stream", 'text/calendar; charset=utf-8; method="REQUEST x"', "application/octet-stream"
    ]  # fmt: skip
    assert [(one.inline, one.content_id, one.part) for one in found] == [
        (False, "", None), (True, "", None), (True, "logo@a.example", "p")
    ]  # fmt: skip


def test_a_large_attachment_is_a_view_of_the_request():
    octets = json.dumps(BASE | {"attachments": [FILE | {"content": "A" * (8 << 20)}]}).encode()
    buffer = mmap.mmap(-1, len(octets))
    buffer.write(octets)
    tracemalloc.start()
    try:
        found = parse(buffer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.attachments[0].content) == 8 << 20 and peak < 1 << 16
    with pytest.raises(BufferError):
        buffer.close()
    del found
    buffer.close()


def test_the_request_can_be_described():
    """As the description of the API needs it."""
    schema = json.dumps(msgspec.json.schema(Request))
    assert '"contentEncoding": "base64"' in schema and '"envelope_from"' in schema
