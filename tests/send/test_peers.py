"""Delivery to peers that misbehave: the running relay, a scripted MX, and the outcomes."""

import copy
import smtplib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.daemon import Relay, wait_for
from tests.support.fake_mx import CLOSE, RESET, SILENT, FakeMx
from tests.support.rows import Row, relay_for
from tests.support.together import together

Rules = dict[str, Any]

ALONE, PAIRS = 20, 10  # routes with one host and with two, for tests that take one each


class Shared:
    """One relay, its routes, and their hosts: `outcomes` and `refusals` by the tables of these names, and routes of which each
    test takes one, and says by which rules its hosts reply."""

    def __init__(self, folder) -> None:
        self.outcomes = [self._route(f"outcome-{n}", copy.deepcopy(rules)) for n, (rules, _) in enumerate(OUTCOMES)]
        self.refusals = [self._route(f"refusal-{n}", rules, {}) for n, rules in enumerate(REFUSALS)]
        self.alone = [self._route(f"one-{n}", {}) for n in range(ALONE)]
        self.pairs = [self._route(f"two-{n}", {}, {}) for n in range(PAIRS)]
        self.routes = [*self.outcomes, *self.refusals, *self.alone, *self.pairs]
        self.relay = relay_for(folder, [row for _, row in self.routes], "delivery.first_retry=0.3")

    def _route(self, name: str, *rules: Rules) -> tuple[list[FakeMx], Row]:
        peers = [FakeMx(each, host=f"127.0.0.{number}") for number, each in enumerate(rules, 1)]
        return peers, Row(name, *(f"127.0.0.{number}:{peer.port}" for number, peer in enumerate(peers, 1)))

    def to(self, rules: Rules, drip: bool = False) -> tuple[FakeMx, Row]:
        """A host that nobody else sends to, and its route."""
        (peer,), row = self.alone.pop()
        peer.rules, peer.drip = rules, drip
        return peer, row

    def to_both(self, first: Rules | None, second: Rules | None) -> tuple[FakeMx, FakeMx, Row]:
        """Two hosts of one route, 127.0.0.1 and 127.0.0.2. None: it is down."""
        (one, two), row = self.pairs.pop()
        for rules, peer in ((first, one), (second, two)):
            if rules is None:
                peer.__exit__()
            else:
                peer.rules = rules
        return one, two, row


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A relay with one message under way to the hosts of each row of OUTCOMES and REFUSALS."""
    made = Shared(tmp_path_factory.mktemp("shared"))
    with made.relay:
        for _, row in made.outcomes + made.refusals:
            row.send()
        yield made
    for peers, _ in made.routes:
        for peer in peers:
            peer.__exit__()


OUTCOMES: list[tuple[Rules, dict[str, int]]] = [
    ({"DOT": [b"451 4.3.0 later\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"MAIL": [b"450 4.7.1 not yet\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"RCPT": [b"450 4.2.1 busy\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"451 4.3.0 later\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DOT": [b"554 5.7.1 spam\r\n"]}, {"bounced": 1}),
    ({"RCPT": [b"550 5.1.1 no\r\n"]}, {"bounced": 1}),
    ({"EHLO": [b"421 4.3.2 not now\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"MAIL": [b"421 4.3.2 not now\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"421 4.3.2 not now\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DOT": [CLOSE]}, {"deferred": 1, "delivered": 1}),
    ({"DOT": [RESET]}, {"deferred": 1, "delivered": 1}),
    ({"MAIL": [RESET]}, {"deferred": 1, "delivered": 1}),
    ({"EHLO": [RESET]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"nonsense\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"250 2.0.0 taken\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"399 go\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"250 2.0.0 taken\r\n354 go\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"DATA": [b"354 go\r\n250 2.0.0 taken\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"RCPT": [b"250 ok\r\n250 ok\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"EHLO": [b"451 4.3.0 later\r\n"]}, {"deferred": 1, "delivered": 1}),
    ({"RCPT": [b"250\r\n"]}, {"delivered": 1}),
    ({"MAIL": [b"250-a\r\n250-b\r\n250 c\r\n"]}, {"delivered": 1}),
]


@pytest.mark.parametrize("number", range(len(OUTCOMES)), ids=[f"{rules!r}-{events!r}" for rules, events in OUTCOMES])
def test_each_reply_has_its_outcome(shared, number):
    events = OUTCOMES[number][1]
    (peer,), row = shared.outcomes[number]
    wait_for(lambda: row.is_done() and all(row.events(name) for name in events), what=str(events))
    for name in ("deferred", "delivered", "bounced"):
        assert len(row.events(name)) == events.get(name, 0), (name, row.events(name))
    assert len(peer.messages) == events.get("delivered", 0)


def test_replies_split_at_every_octet(shared):
    peer, row = shared.to({}, drip=True)
    for number in range(3):
        row.send(f"Subject: {number}\r\n\r\nx\r\n")
    wait_for(lambda: len(peer.messages) == 3)


def test_a_peer_without_pipelining_or_esmtp(shared):
    rules = {"EHLO": b"502 5.5.1 what?\r\n", "HELO": b"250 old\r\n"}
    peer, row = shared.to(rules)
    row.send("Subject: x\r\n\r\n.x\r\n", "c", "e", sender="a")
    wait_for(lambda: peer.messages)
    assert peer.messages[0][1] == row.at("c", "e")
    assert peer.messages[0][2].endswith(b"\r\n\r\n.x\r\n")


def send_octets(row: Row, sender: str, *options: str) -> None:
    with smtplib.SMTP("127.0.0.1", row.relay.port) as client:
        client.sendmail(sender, row.at("c"), b"Subject: x\r\n\r\n\xc3\xbc\r\n", options)


def test_eight_bit_mail_for_a_seven_bit_peer_bounces(shared):
    peer, row = shared.to({"EHLO": b"250-old\r\n250 PIPELINING\r\n"})
    row.send("Subject: x\r\n\r\nplain\r\n", sender="a")
    wait_for(lambda: len(peer.messages) == 1)
    send_octets(row, *row.at("a"))
    (bounce,) = wait_for(lambda: row.events("bounced"))
    assert bounce["reply"].startswith("5.6.3")
    wait_for(lambda: any(sender == "" for sender, _, _ in peer.messages))
    assert not any(b"\xc3" in data for _, _, data in peer.messages)


def test_eight_bit_mail_is_deferred_when_ehlo_is_temporarily_rejected(shared):
    """After HELO there would be no 8BITMIME, and the mail would bounce."""
    peer, row = shared.to({"EHLO": [b"451 4.3.0 later\r\n"], "HELO": b"250 old\r\n"})
    send_octets(row, *row.at("a"))
    wait_for(lambda: row.events("delivered"))
    assert len(row.events("deferred")) == 1 and not row.events("bounced")
    assert "HELO" not in peer.commands


def test_an_accepted_bdat_counts_when_the_connection_ends_behind_it(shared):
    rules = {"EHLO": b"250-fake\r\n250-PIPELINING\r\n250 CHUNKING\r\n", "RSET": [b"421 4.3.2 enough\r\n"]}
    peer, row = shared.to(rules)
    row.send()
    wait_for(lambda: row.events("delivered") and row.is_done())
    assert len(peer.messages) == 1 and not row.events("deferred")
    assert [event["reply"] for event in row.events("delivered")] == ["250 2.0.0 taken"]


def send_utf8(row: Row) -> None:
    send_octets(row, "jürgen@b.example", "SMTPUTF8")


PLAIN = {"EHLO": b"250-old\r\n250 PIPELINING\r\n"}
UTF8 = {"EHLO": b"250-new\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"}


def test_a_message_that_one_host_cannot_accept_is_sent_to_another(shared):
    old, new, row = shared.to_both(PLAIN, UTF8)
    send_utf8(row)
    wait_for(lambda: new.messages)
    row.send(sender="a")
    wait_for(lambda: len(old.messages) + len(new.messages) == 2)
    assert not row.events("bounced") and not row.events("deferred")
    assert new.messages[0][0] == "jürgen@b.example"


def test_a_message_that_no_host_can_accept_bounces(shared):
    old, other, row = shared.to_both(PLAIN, PLAIN)
    send_utf8(row)
    assert wait_for(lambda: row.events("bounced"))[0]["reply"].startswith("5.6.7")
    assert old.connections and other.connections
    assert not row.events("deferred")


def test_a_message_is_deferred_when_a_host_that_may_accept_it_is_down(shared):
    _, _, row = shared.to_both(PLAIN, None)
    send_utf8(row)
    assert wait_for(lambda: row.events("deferred"))[0]["phase"] == "connect"
    assert not row.events("bounced")


REFUSALS: list[Rules] = [
    {"MAIL": b"450 4.7.1 not yet\r\n"},
    {"RCPT": b"451 4.7.1 greylisted\r\n"},
    {"RCPT": b"552 too many\r\n"},
    {"DATA": b"451 4.3.0 later\r\n"},
    {"DOT": b"452 4.3.1 full\r\n"},
    {"MAIL": b"421 4.3.2 bye\r\n"},
    {"DOT": b"421 4.3.2 bye\r\n"},
    {"MAIL": CLOSE},
    {"RCPT": RESET},
    {"DATA": CLOSE},
    {"DATA": b"nonsense\r\n"},
]


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=[repr(rules) for rules in REFUSALS])
def test_what_one_host_refuses_for_now_the_next_one_gets_in_the_same_attempt(shared, number):
    """RFC 5321 5.1; Postfix 3.7 smtp(8) does the same for two hosts."""
    (first, second), row = shared.refusals[number]
    (delivered,) = wait_for(lambda: row.events("delivered"))
    assert (len(first.messages), len(second.messages)) == (0, 1)
    assert (delivered["attempt"], delivered["peer"]) == (1, "127.0.0.2")
    assert [event["peer"] for event in row.events("next_host")] == ["127.0.0.1"]
    assert not row.events("deferred")


def test_what_two_hosts_refuse_is_deferred_once_and_the_reply_of_each_is_told(shared):
    _, _, row = shared.to_both({"RCPT": b"450 4.2.1 first\r\n"}, {"MAIL": b"451 4.3.0 second\r\n"})
    row.send(sender="a")
    wait_for(lambda: len(row.events("deferred")) > 1, what="the second attempt, after which no event of the first is missing")
    (deferred,) = [event for event in row.events("deferred") if event["attempt"] == 1]
    assert deferred["peer"] == "127.0.0.2"
    assert deferred["reply"] == "451 4.3.0 second; before that 450 4.2.1 first (rcpt, 127.0.0.1)"
    explained = str(row.explained())
    assert "second" in explained and "first" in explained


def test_connections_are_reused(shared):
    peer, row = shared.to({})
    for count in range(1, 11):
        row.send()
        wait_for(lambda count=count: len(row.events("delivered")) == count)
    assert peer.connections == 1
    assert peer.commands.count("RSET") == 0


def test_a_reused_connection_that_ends_before_the_reply_to_mail_costs_no_attempt(shared):
    peer, row = shared.to({"MAIL": [b"250 ok\r\n", CLOSE]})
    row.send()
    wait_for(lambda: len(peer.messages) == 1)
    row.send()
    wait_for(lambda: len(peer.messages) == 2)
    wait_for(lambda: len(row.events("delivered")) == 2)
    assert row.events("deferred") == []
    assert row.events("delivered")[1]["attempt"] == 1


@pytest.mark.parametrize("end", [CLOSE, RESET, b"421 4.3.2 one message a connection\r\n"])
def test_no_recipient_gets_a_message_twice_when_the_connection_ends_in_its_second_transaction(shared, end):
    """One recipient a transaction, one transaction a connection."""
    rules = {
        "MAIL": [b"250 ok\r\n", end, b"250 ok\r\n", end, b"250 ok\r\n"],
        "RCPT": [b"250 ok\r\n", *[b"452 4.5.3 too many recipients\r\n"] * 2, b"250 ok\r\n", b"452 4.5.3 too many recipients\r\n"],
    }
    peer, row = shared.to(rules)
    names = ("one", "two", "three")
    row.send("Subject: x\r\n\r\nx\r\n", *names, sender="a")
    wait_for(row.is_done)
    recipients = sorted(row.at(*names))
    assert sorted(address for _, to, _ in peer.messages for address in to) == recipients
    wait_for(lambda: sorted(a for event in row.events("delivered") for a in event["recipients"]) == recipients)


def test_connections_are_limited_for_the_whole_machine(tmp_path):
    """Two workers, three connections at most, while forty messages wait."""
    with FakeMx({}, slow=0.2) as peer:
        settings = ("delivery.connections=3", "delivery.idle=0.5")
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=2) as relay:
            for _ in range(40):
                relay.send()
            wait_for(lambda: len(peer.messages) == 40)
        assert 2 <= peer.most_open <= 3


def test_an_attempt_in_doubt_is_logged_and_counted(shared):
    _, row = shared.to({"DOT": [CLOSE]})
    row.send()
    (deferred,) = wait_for(lambda: row.events("deferred"))
    assert deferred["phase"] == "final"
    assert "in doubt" in deferred["reply"]


def test_the_next_smart_host_is_tried_when_one_is_down(shared):
    _, peer, row = shared.to_both(None, {})
    row.send()
    wait_for(lambda: peer.messages)
    assert row.events("deferred") == []


def test_many_recipients_are_sent_in_few_transactions(shared):
    peer, row = shared.to({})
    row.send("Subject: x\r\n\r\nx\r\n", *[f"u{n}" for n in range(250)], sender="a")
    wait_for(lambda: row.is_done() and row.events("delivered"))
    assert [len(to) for _, to, _ in peer.messages] == [50] * 5


def test_attempts_after_temporary_failures_follow_the_schedule(shared):
    """No attempt earlier than the schedule says."""
    _, row = shared.to({"RCPT": [b"450 4.2.0 a\r\n", b"450 4.2.0 b\r\n"]})
    row.send()
    wait_for(lambda: row.events("delivered"))
    (queued,), (first, second), (done,) = row.events("queued"), row.events("deferred"), row.events("delivered")
    assert first["next"] - queued["ts"] > 0.299  # milliseconds, rounded down
    assert second["ts"] >= first["next"] and second["next"] - first["next"] > 0.599
    assert done["ts"] >= second["next"]
    assert done["attempt"] == 3


VERBS = ["EHLO", "MAIL", "RCPT", "DATA", "DOT"]


def test_silence_ends_an_attempt(tmp_path):
    """RFC 5321 4.5.3.2's timeouts, a hundredth of them. (While EHLO is not answered a second connection is tried.) All hosts are
    silent at the same time, and one of them does not read the message either: the log has the stack."""
    with ExitStack() as stack:
        rows = {}
        for verb in VERBS:
            peer = stack.enter_context(FakeMx({verb: [SILENT] * (2 if verb == "EHLO" else 1)}))
            rows[verb] = Row(verb.lower(), f"127.0.0.1:{peer.port}")
        stuck = Row("stuck", f"127.0.0.1:{stack.enter_context(stops_reading())}")
        settings = ("delivery.patience=0.01", "delivery.first_retry=0.3")
        relay = stack.enter_context(relay_for(tmp_path, [*rows.values(), stuck], *settings))

        def check(verb: str) -> None:
            row = rows[verb]
            row.send()
            deferred, *_ = wait_for(lambda: row.events("deferred"))
            assert deferred["phase"] == {"DOT": "final"}.get(verb, verb.lower())
            assert ("in doubt" in deferred["reply"]) == (verb == "DOT")
            wait_for(lambda: row.events("delivered"), what="the next attempt")
            if verb != "EHLO":
                assert any("stalled waiting for the reply to" in text for text in row.warnings())

        def check_stuck() -> None:
            stuck.send("Subject: large\r\n\r\n" + ("y" * 70 + "\r\n") * 150_000)
            deferred, *_ = wait_for(lambda: stuck.events("deferred"))
            assert "in doubt" not in deferred["reply"]
            texts = stuck.warnings()
            assert any("waiting for the peer to accept its message data" in t and "_write_data" in t for t in texts), texts

        together({**{verb: lambda verb=verb: check(verb) for verb in VERBS}, "stuck": check_stuck})  # type: ignore[misc]
        stalled = [event for event in relay.events("warning") if "stalled waiting" in event["text"]]
        assert relay.metric("relaymta_watchdog_total") == len(stalled) >= 5


@contextmanager
def stops_reading() -> Iterator[int]:
    """The port of a host that accepts one connection, and reads next to nothing of the first message."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # or the kernel takes megabytes of it
    end = threading.Event()

    def stuck() -> None:
        sock, _ = server.accept()
        server.close()
        sock.sendall(b"220 stuck\r\n")
        sock.recv(100)
        sock.sendall(b"250-stuck\r\n250 PIPELINING\r\n")
        sock.recv(1000)
        sock.sendall(b"250 ok\r\n250 ok\r\n354 go\r\n")
        end.wait()
        sock.close()

    threading.Thread(target=stuck, daemon=True).start()
    yield int(server.getsockname()[1])
    end.set()


def test_each_recipient_is_delivered_by_the_host_that_took_it(shared):
    """One attempt at two hosts: the log says where each recipient's message is."""
    rules: Rules = {"RCPT": {}}
    first, second, row = shared.to_both(rules, {})
    now, later = row.at("now", "later")
    rules["RCPT"][later] = b"451 4.7.1 greylisted\r\n"
    row.send("Subject: x\r\n\r\nx\r\n", "now", "later", sender="a")
    wait_for(lambda: len(row.events("delivered")) == 2)
    found = {event["recipients"][0]: (event["address"], event["port"]) for event in row.events("delivered")}
    assert found == {now: ("127.0.0.1", first.port), later: ("127.0.0.2", second.port)}
    assert [message[1] for message in first.messages + second.messages] == [[now], [later]]
