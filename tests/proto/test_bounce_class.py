"""The class of a bounce, by its reply codes."""

import pytest

from relaymta.proto.bounce_class import HARD, Reply, classify, parsed


@pytest.mark.parametrize(("reply", "name", "hard"), [
    ("550 5.1.1 User unknown", "bad-mailbox", True), ("550-5.1.1 The email account", "bad-mailbox", True),
    ("553 5.1.3 Bad syntax", "bad-mailbox", True), ("551 5.1.6 moved", "moved", True), ("556 5.1.10 Null MX", "null-mx", True),
    ("550 5.2.1 disabled", "disabled", True), ("5.1.10 x.example accepts no mail", "null-mx", True),
    ("550 5.1.2 no such domain", "bad-domain", False), ("550 5.1.8 bad sender", "sender", False),
    ("550 5.1.0 x", "address", False),
    ("552 5.2.2 full", "full", False), ("552 5.2.3 long", "size", False), ("552 5.3.4 big", "size", False),
    ("550 5.2.0 x", "mailbox", False), ("554 5.3.2 x", "system", False), ("554 5.4.4 x", "network", False),
    ("554 5.4.7 x", "expired", False), ("554 5.5.2 x", "protocol", False), ("554 5.6.1 x", "content", False),
    ("550 5.7.1 spam", "policy", False), ("554 5.7.509 DMARC", "policy", False), ("554 5.9.9 x", "other", False),
    ("550 No such user", "other", False), ("550 5.1.11 x", "address", False), ("550 5.11.1 x", "other", False),
    ("450 4.1.1 later", "transient", False), ("550 4.2.2 x", "transient", False), ("450 5.1.1 x", "transient", False),
    ("421 busy", "transient", False), ("250 2.1.5 ok", "other", False), ("250 5.1.1 ok", "other", False), ("", "other", False),
    ("550 5.1.1.2 x", "other", False), ("550 5.1.1234 x", "other", False), ("550 5.1.\u0661 x", "other", False),
])  # fmt: skip
def test_a_reply_has_the_class_of_its_codes(reply, name, hard):
    assert classify(*parsed(reply)) == name
    assert (name in HARD) is hard


def test_replies_are_taken_apart():
    assert parsed("550 5.1.1 <a@b>: User unknown") == Reply(550, "5.1.1", "<a@b>: User unknown")
    assert parsed("550-5.1.1 text") == Reply(550, "5.1.1", "text") and parsed("550 text") == Reply(550, "", "text")
    assert parsed("connection refused") == Reply(0, "", "connection refused") and parsed("5.1.10 x") == Reply(0, "5.1.10", "x")
    assert parsed("550") == Reply(550, "", "")
