"""LMTP clients that do anything in any order: each recipient's reply says what has become of the message there, and every count
is that of what there is, and returns to zero."""

from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from tests.accept.test_connection_machine import ANN, Clients, Known, Mail
from tests.conftest import PROVE
from tests.support.connection import BIG, COMMIT_FAILS, QUEUE_FAILS, Machine

ROUTE = {"name": "here", "protocol": "mailbox", "recipient_domain": ["d.example"]}


class LmtpClients(Clients):
    """As clients of SMTP. The mailbox of x takes everything, that of y nothing, and z is an alias with an address elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: set[tuple[int, str]] = set()  # messages and recipients that were acknowledged
        self.lost: set[int] = set()  # messages of which a reply was lost

    @precondition(lambda self: self.of is None)
    @rule(seed=st.integers(0, 1 << 32), tarpit=st.sampled_from((0, 5)), asks=st.booleans())
    def start(self, seed: int, tarpit: int, asks: bool) -> None:  # type: ignore[override]
        configured: dict[str, Any] = {
            "listener": [{"address": "127.0.0.1:24", "protocol": "lmtp"}],
            "route": [ROUTE],
            "relay": {"networks": ["127.0.0.0/8"]},
            "network": [{"networks": ["127.0.0.1/32"], "xclient": True, "long_lines": False}],
            "intake": {"errors": 30, "tarpit": tarpit, "long_line_networks": []},
            "accounts": {"answer_after": 0},
            "limits": {"message_size": 10 * BIG},
        }
        self.random, self.relays = Random(seed), False
        self.of = Machine(self.random, **configured)
        self.of.logs_in = ANN
        if asks:
            self.ask()

    def greet(self, one: Known, verb: bytes) -> None:
        if verb == b"EHLO":
            super().greet(one, b"LHLO")
        else:
            one.wire.append((verb + b" client.example\r\n", lambda code: self.refused(code)))

    def refused(self, code: int | None) -> None:
        assert code in (500, 421, None)

    def message(self, mail: Mail, size: int, spoiled: bytes) -> bytes:
        if spoiled.startswith(b"X-Refused"):  # by DMARC, which nobody asks about mail that comes by LMTP
            spoiled = QUEUE_FAILS + b": x"
        return super().message(mail, size, spoiled)

    def ended(self, one: Known, mail: Mail, code: int | None) -> None:
        one.mail = None
        assert all(address.endswith("@d.example") for address in mail.recipients)
        assert not mail.recipients or mail.client.startswith("127.") or mail.user
        for number, address in enumerate(mail.recipients):
            found = code if number == 0 else next(one.codes, None)
            if found == 250:
                assert address != "y@d.example"
                self.taken.add((mail.number, address[0]))
            elif found is None:
                self.lost.add(mail.number)

    @invariant()
    def what_is_stored_was_sent_and_counts_are_those_of_what_there_is(self) -> None:
        if self.of is None:
            return
        texts = [event["text"] for event in self.of.events if "text" in event]
        expected = ("StoreError: it cannot", "filters could not be asked about a command: ")
        assert all(any(words in text for words in expected) for text in texts), texts  # nothing else goes wrong inside
        filed, queued = set(), set()
        for sender, user, data in self.of.mailboxes:
            number = int(sender.partition("@")[0])
            mail = self.mails[number]
            assert (number, user) not in filed and f"{user}@d.example" in mail.recipients
            filed.add((number, user))
            self.is_what_was_sent(mail, data)
            assert (number, user) in self.taken or number in self.lost or QUEUE_FAILS in data
        for envelope, data in self.of.stored:
            number = int(envelope.sender.partition("@")[0])
            assert number not in queued and envelope.recipients == ["z@far.example"] and envelope.size == len(data)
            queued.add(number)
            self.is_what_was_sent(self.mails[number], data)
        assert self.taken <= filed and {number for number, user in self.taken if user == "z"} <= queued
        alive = [one for one in self.known if one.alive]
        held = self.of.held()
        assert held["connections"] == held["connections_in_set"] == len(alive)
        assert held["logged in as ann"] == sum(one.user == "ann" for one in alive)
        assert held["files"] <= sum(one.mail is not None for one in alive) and not held["filing"]
        assert self.asking is None or not self.asking.now

    def is_what_was_sent(self, mail: Mail, data: bytes) -> None:
        sent = mail.data if mail.data.endswith(b"\r\n") else mail.data + b"\r\n"
        front = data.removesuffix(sent)
        assert front != data and front.count(b"Received: from") == 1 and b" with LMTP" in front and COMMIT_FAILS not in data


TestLmtpClients = LmtpClients.TestCase
TestLmtpClients.settings = settings(max_examples=1500 if PROVE else 60, stateful_step_count=40, deadline=None)
