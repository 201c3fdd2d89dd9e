"""Messages that scripts send, as they come into the queue."""

from types import SimpleNamespace

import pytest

from relaymta.proto.envelope import EIGHT_BIT, SMTPUTF8, UTF8_HEADER, Onward
from relaymta.send.onward import Outbox

QUEUE = SimpleNamespace(
    ident=lambda: 7, sign=lambda data: b"", big_limit=1 << 20, deadline=lambda: 1, assign=lambda envelope, attempts: []
)
ENTRY = SimpleNamespace(envelope=SimpleNamespace(flags=0, application="", message_id=""))


@pytest.mark.parametrize(
    ("front", "data", "flags"),
    [
        ("Delivered-To: a@x.example\r\n", None, 0),
        ("Delivered-To: \xe4@x.example\r\n", None, EIGHT_BIT | SMTPUTF8 | UTF8_HEADER),
        ("", "From: <a@x.example>\r\n\r\nx\r\n", 0),
        ("", "From: <a@x.example>\r\n\r\n\xe4\r\n", EIGHT_BIT),
        ("", "From: <\xe4@x.example>\r\n\r\nx\r\n", EIGHT_BIT | SMTPUTF8 | UTF8_HEADER),
    ],
)
async def test_a_header_that_is_not_ascii_needs_smtputf8(front, data, flags):
    message = Onward("s@x.example", "r@y.example", front.encode(), None if data is None else data.encode())
    (put,) = await Outbox(QUEUE, ENTRY, [b"Subject: x\r\n\r\n"], lambda recipients: [*recipients, "z@y.example"]).make([message])
    assert put.envelope.flags == flags and put.envelope.recipients == ["r@y.example", "z@y.example"]
