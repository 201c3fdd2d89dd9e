"""What XFORWARD says of a message in the queue."""

import pytest

from relaymta.config import Route
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue import Entry, format_id
from relaymta.send.mails import mail_of

IDENT = 1 << 40


def said(xforward: bool = True, **of: object) -> dict[str, str]:
    envelope = Envelope("a@b", ["c@d"], 1, 0, 0, 0, **of)  # type: ignore[arg-type]
    entry = Entry(IDENT, envelope, QueueName("content", ""), 1, 0, 0, None, True, [b"x"])
    return mail_of(entry, Route.model_validate({"hosts": ["h"], "xforward": xforward})).forward


@pytest.mark.parametrize(
    ("of", "address", "source"),
    [
        ({"client": "192.0.2.1", "helo": "me"}, "192.0.2.1", "REMOTE"),
        ({"client": "2001:db8::1", "helo": "me"}, "IPV6:2001:db8::1", "REMOTE"),
        ({"client": "192.0.2.1", "helo": "me", "user": "ann"}, "192.0.2.1", "LOCAL"),
        ({"client": "127.0.0.9", "helo": "me"}, "127.0.0.9", "LOCAL"),
        ({"client": "::1", "helo": "me"}, "IPV6:::1", "LOCAL"),
        ({"client": "0.0.0.0", "helo": "me"}, "", "REMOTE"),  # behind a load balancer that did not name it
        ({}, "", "LOCAL"),  # a DSN
    ],
)
def test_the_client_that_the_message_came_from(of, address, source):
    found = said(**of)
    assert (found["ADDR"], found["SOURCE"], found["HELO"]) == (address, source, of.get("helo", ""))
    assert found["IDENT"] == format_id(IDENT) and not found["NAME"]


def test_what_was_said_before_is_passed_on():
    found = said(
        client="127.0.0.1", helo="filter", forwarded={"ADDR": "2001:db8::1", "HELO": "me", "IDENT": "X", "SOURCE": "REMOTE"}
    )
    assert found == {
        "NAME": "", "ADDR": "IPV6:2001:db8::1", "PORT": "", "PROTO": "", "HELO": "me", "IDENT": "X", "SOURCE": "REMOTE",
    }  # fmt: skip
    assert said(client="127.0.0.1", forwarded={"HELO": "me"})["IDENT"] == format_id(IDENT)


def test_a_route_that_does_not_want_it_says_nothing():
    assert said(False, client="192.0.2.1") == {}
