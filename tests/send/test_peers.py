"""Delivery to peers that misbehave: the running relay, a scripted MX, and the outcomes."""

import smtplib
import socket
import threading

import pytest

from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import CLOSE, RESET, SILENT, FakeMx

GOOD = b"250 2.0.0 taken\r\n"


def relay_to(peer: FakeMx, folder, *settings: str) -> Relay:
    return Relay(folder, f"127.0.0.1:{peer.port}", "delivery.first_retry=0.3", *settings)


@pytest.mark.parametrize(
    ("rules", "events"),
    [
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
    ],
    ids=repr,
)
def test_each_reply_has_its_outcome(tmp_path, rules, events):
    with FakeMx(rules) as peer, relay_to(peer, tmp_path) as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "")
        wait_for(lambda: relay.summary() == [] and all(relay.events(name) for name in events), 15, str(events))
        for name in ("deferred", "delivered", "bounced"):
            assert len(relay.events(name)) == events.get(name, 0), (name, relay.events(name))
        assert len(peer.messages) == events.get("delivered", 0)


def test_replies_split_at_every_octet(tmp_path):
    with FakeMx({}, drip=True) as peer, relay_to(peer, tmp_path) as relay:
        for number in range(3):
            relay.send(f"Subject: {number}\r\n\r\nx\r\n")
        wait_for(lambda: len(peer.messages) == 3)


def test_a_peer_without_pipelining_or_esmtp(tmp_path):
    rules = {"EHLO": b"502 5.5.1 what?\r\n", "HELO": b"250 old\r\n"}
    with FakeMx(rules) as peer, relay_to(peer, tmp_path) as relay:
        relay.send("Subject: x\r\n\r\n.x\r\n", "a@b", "c@d", "e@f")
        wait_for(lambda: peer.messages)
        assert peer.messages[0][1] == ["c@d", "e@f"]
        assert peer.messages[0][2].endswith(b"\r\n\r\n.x\r\n")


def test_eight_bit_mail_for_a_seven_bit_peer_bounces(tmp_path):
    with FakeMx({"EHLO": b"250-old\r\n250 PIPELINING\r\n"}) as peer, relay_to(peer, tmp_path) as relay:
        relay.send("Subject: x\r\n\r\nplain\r\n")
        wait_for(lambda: len(peer.messages) == 1)
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.sendmail("a@b", ["c@d"], b"Subject: x\r\n\r\n\xc3\xbc\r\n")
        (bounce,) = wait_for(lambda: relay.events("bounced"))
        assert bounce["reply"].startswith("5.6.3")
        wait_for(lambda: any(sender == "" for sender, _, _ in peer.messages))
        assert not any(b"\xc3" in data for _, _, data in peer.messages)


def test_eight_bit_mail_is_deferred_when_ehlo_is_temporarily_rejected(tmp_path):
    """After HELO there would be no 8BITMIME, and the mail would bounce."""
    with FakeMx({"EHLO": [b"451 4.3.0 later\r\n"], "HELO": b"250 old\r\n"}) as peer, relay_to(peer, tmp_path) as relay:
        with smtplib.SMTP("127.0.0.1", relay.port) as client:
            client.sendmail("a@b", ["c@d"], b"Subject: x\r\n\r\n\xc3\xbc\r\n")
        wait_for(lambda: relay.events("delivered"))
        assert len(relay.events("deferred")) == 1 and not relay.events("bounced")
        assert "HELO" not in peer.commands


def test_an_accepted_bdat_counts_when_the_connection_ends_behind_it(tmp_path):
    rules = {"EHLO": b"250-fake\r\n250-PIPELINING\r\n250 CHUNKING\r\n", "RSET": [b"421 4.3.2 enough\r\n"]}
    with FakeMx(rules) as peer, relay_to(peer, tmp_path) as relay:
        relay.send()
        wait_for(lambda: relay.events("delivered") and relay.summary() == [])
        assert len(peer.messages) == 1 and not relay.events("deferred")


def two_hosts(folder, *ports: int) -> Relay:
    hosts = ",".join(f'"127.0.0.{number}:{port}"' for number, port in enumerate(ports, 1))
    return Relay(folder, None, f'route=[{{name="two",hosts=[{hosts}]}}]', "delivery.first_retry=0.3", "delivery.idle=1")


def send_utf8(relay: Relay) -> None:
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.sendmail("jürgen@b.example", ["c@d.example"], b"Subject: x\r\n\r\n\xc3\xbc\r\n", ["SMTPUTF8"])


PLAIN = {"EHLO": b"250-old\r\n250 PIPELINING\r\n"}
UTF8 = {"EHLO": b"250-new\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SMTPUTF8\r\n"}


def test_a_message_that_one_host_cannot_accept_is_sent_to_another(tmp_path):
    with FakeMx(PLAIN) as old, FakeMx(UTF8, host="127.0.0.2") as new, two_hosts(tmp_path, old.port, new.port) as relay:
        send_utf8(relay)
        wait_for(lambda: new.messages)
        relay.send()
        wait_for(lambda: len(old.messages) + len(new.messages) == 2)
        assert not relay.events("bounced") and not relay.events("deferred")
        assert new.messages[0][0] == "jürgen@b.example"


def test_a_message_that_no_host_can_accept_bounces(tmp_path):
    with FakeMx(PLAIN) as old, FakeMx(PLAIN, host="127.0.0.2") as other, two_hosts(tmp_path, old.port, other.port) as relay:
        send_utf8(relay)
        assert wait_for(lambda: relay.events("bounced"))[0]["reply"].startswith("5.6.7")
        assert old.connections and other.connections
        assert not relay.events("deferred")


def test_a_message_is_deferred_when_a_host_that_may_accept_it_is_down(tmp_path):
    with FakeMx(PLAIN) as old, two_hosts(tmp_path, old.port, free_port()) as relay:
        send_utf8(relay)
        assert wait_for(lambda: relay.events("deferred"))[0]["phase"] == "connect"
        assert not relay.events("bounced")


def both(folder, first: FakeMx, second: FakeMx, *settings: str) -> Relay:
    hosts = f'hosts=["127.0.0.1:{first.port}","127.0.0.2:{second.port}"]'
    return Relay(folder, None, f'route=[{{name="two",{hosts}}}]', "delivery.first_retry=600", *settings)


@pytest.mark.parametrize(
    "rules",
    [
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
    ],
    ids=repr,
)
def test_what_one_host_refuses_for_now_the_next_one_gets_in_the_same_attempt(tmp_path, rules):
    """RFC 5321 5.1; Postfix 3.7 smtp(8) does the same for two hosts."""
    with FakeMx(dict(rules)) as first, FakeMx({}, host="127.0.0.2") as second, both(tmp_path, first, second) as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "c@d.example")
        (delivered,) = wait_for(lambda: relay.events("delivered"))
        assert (len(first.messages), len(second.messages)) == (0, 1)
        assert (delivered["attempt"], delivered["peer"]) == (1, "127.0.0.2")
        assert [event["peer"] for event in relay.events("next_host")] == ["127.0.0.1"]
        assert not relay.events("deferred")


def test_what_two_hosts_refuse_is_deferred_once_and_the_reply_of_each_is_told(tmp_path):
    with (
        FakeMx({"RCPT": b"450 4.2.1 first\r\n"}) as first,
        FakeMx({"MAIL": b"451 4.3.0 second\r\n"}, host="127.0.0.2") as second,
        both(tmp_path, first, second) as relay,
    ):
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "c@d.example")
        (deferred,) = wait_for(lambda: relay.events("deferred"))
        assert (deferred["attempt"], deferred["peer"]) == (1, "127.0.0.2")
        assert deferred["reply"] == "451 4.3.0 second; before that 450 4.2.1 first (rcpt, 127.0.0.1)"
        (queued,) = relay.events("queued")
        explained = relay.cli("message", "explain", queued["id"]).stdout
        assert "second" in explained and "first" in explained


def test_connections_are_reused(tmp_path):
    with FakeMx({}) as peer, relay_to(peer, tmp_path) as relay:
        for count in range(1, 11):
            relay.send()
            wait_for(lambda count=count: len(relay.events("delivered")) == count)
        assert peer.connections == 1
        assert peer.commands.count("RSET") == 0


def test_a_reused_connection_that_ends_before_the_reply_to_mail_costs_no_attempt(tmp_path):
    with FakeMx({"MAIL": [None, CLOSE]}) as peer:
        peer.rules["MAIL"] = [b"250 ok\r\n", CLOSE]
        with relay_to(peer, tmp_path) as relay:
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            relay.send()
            wait_for(lambda: len(peer.messages) == 2)
            wait_for(lambda: len(relay.events("delivered")) == 2)
            assert relay.events("deferred") == []
            assert relay.events("delivered")[1]["attempt"] == 1


@pytest.mark.parametrize("end", [CLOSE, RESET, b"421 4.3.2 one message a connection\r\n"])
def test_no_recipient_gets_a_message_twice_when_the_connection_ends_in_its_second_transaction(tmp_path, end):
    """One recipient a transaction, one transaction a connection."""
    rules = {
        "MAIL": [b"250 ok\r\n", end, b"250 ok\r\n", end, b"250 ok\r\n"],
        "RCPT": [b"250 ok\r\n", *[b"452 4.5.3 too many recipients\r\n"] * 2, b"250 ok\r\n", b"452 4.5.3 too many recipients\r\n"],
    }
    with FakeMx(rules) as peer, relay_to(peer, tmp_path) as relay:
        recipients = ["one@d.example", "two@d.example", "three@d.example"]
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", *recipients)
        wait_for(lambda: relay.summary() == [])
        assert sorted(address for _, to, _ in peer.messages for address in to) == sorted(recipients)
        wait_for(lambda: sorted(a for row in relay.events("delivered") for a in row["recipients"]) == sorted(recipients))


def test_connections_are_limited_for_the_whole_machine(tmp_path):
    """Two workers, three connections at most, while forty messages wait."""
    with FakeMx({}, slow=0.2) as peer:
        settings = ("delivery.connections=3", "delivery.idle=0.5")
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings, workers=2) as relay:
            for _ in range(40):
                relay.send()
            wait_for(lambda: len(peer.messages) == 40)
        assert 2 <= peer.most_open <= 3


def test_an_attempt_in_doubt_is_logged_and_counted(tmp_path):
    with FakeMx({"DOT": [CLOSE]}) as peer, relay_to(peer, tmp_path) as relay:
        relay.send()
        (deferred,) = wait_for(lambda: relay.events("deferred"))
        assert deferred["phase"] == "final"
        assert "in doubt" in deferred["reply"]


def test_the_next_smart_host_is_tried_when_one_is_down(tmp_path):
    with FakeMx({}) as peer:
        hosts = f'route=[{{name="two",hosts=["127.0.0.1:{free_port()}","127.0.0.1:{peer.port}"]}}]'
        with Relay(tmp_path, None, hosts) as relay:
            relay.send()
            wait_for(lambda: peer.messages)
            assert relay.events("deferred") == []


def test_many_recipients_are_sent_in_few_transactions(tmp_path):
    with FakeMx({}) as peer, relay_to(peer, tmp_path) as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b", *[f"u{n}@d.example" for n in range(250)])
        wait_for(lambda: relay.summary() == [] and relay.events("delivered"))
        assert [len(to) for _, to, _ in peer.messages] == [100, 100, 50]


def test_attempts_after_temporary_failures_follow_the_schedule(tmp_path):
    """No attempt earlier than the schedule says."""
    rules = {"RCPT": [b"450 4.2.0 a\r\n", b"450 4.2.0 b\r\n"]}
    with FakeMx(rules) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}", "delivery.first_retry=1") as relay:
        relay.send()
        wait_for(lambda: relay.events("delivered"), 20)
        (queued,), (first, second), (done,) = relay.events("queued"), relay.events("deferred"), relay.events("delivered")
        assert first["next"] - queued["ts"] > 0.999  # milliseconds, rounded down
        assert second["ts"] >= first["next"] and second["next"] - first["next"] > 1.999
        assert done["ts"] >= second["next"]
        assert done["attempt"] == 3


@pytest.mark.parametrize("verb", ["EHLO", "MAIL", "RCPT", "DATA", "DOT"])
def test_silence_ends_an_attempt(tmp_path, verb):
    """RFC 5321 4.5.3.2's timeouts, a hundredth of them. (While EHLO is not answered a second connection is tried.)"""
    with (
        FakeMx({verb: [SILENT] * (2 if verb == "EHLO" else 1)}) as peer,
        relay_to(peer, tmp_path, "delivery.patience=0.01") as relay,
    ):
        relay.send()
        (deferred,) = wait_for(lambda: relay.events("deferred"), 20)
        assert deferred["phase"] == {"DOT": "final"}.get(verb, verb.lower())
        assert ("in doubt" in deferred["reply"]) == (verb == "DOT")
        wait_for(lambda: relay.events("delivered"), what="the next attempt")
        if verb != "EHLO":
            assert relay.metric("relaymta_watchdog_total") == 1
            assert any("stalled waiting for" in event["text"] for event in relay.events("warning"))


def test_a_peer_that_stops_reading_is_disconnected_and_the_log_has_the_stack(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))
    end = threading.Event()

    def stuck() -> None:
        sock, _ = server.accept()
        sock.sendall(b"220 stuck\r\n")
        sock.recv(100)
        sock.sendall(b"250-stuck\r\n250 PIPELINING\r\n")
        sock.recv(1000)
        sock.sendall(b"250 ok\r\n250 ok\r\n354 go\r\n")
        end.wait(30)
        sock.close()

    threading.Thread(target=stuck, daemon=True).start()
    settings = ("delivery.patience=0.01", "delivery.first_retry=60")
    with server, Relay(tmp_path, f"127.0.0.1:{server.getsockname()[1]}", *settings) as relay:
        relay.send("Subject: large\r\n\r\n" + ("y" * 70 + "\r\n") * 400_000)
        (deferred,) = wait_for(lambda: relay.events("deferred"), 20)
        assert "in doubt" not in deferred["reply"]
        texts = [event["text"] for event in relay.events("warning")]
        assert any("waiting for the peer to accept its message data" in text and "_write_data" in text for text in texts), texts
    end.set()


def test_each_recipient_is_delivered_by_the_host_that_took_it(tmp_path):
    """One attempt at two hosts: the log says where each recipient's message is."""
    rules = {"RCPT": {"later@d.example": b"451 4.7.1 greylisted\r\n", "now@d.example": b"250 2.1.5 ok\r\n"}}
    with FakeMx(rules) as first, FakeMx({}, host="127.0.0.2") as second, both(tmp_path, first, second) as relay:
        relay.send("Subject: x\r\n\r\nx\r\n", "a@b.example", "now@d.example", "later@d.example")
        wait_for(lambda: len(relay.events("delivered")) == 2)
        found = {event["recipients"][0]: (event["address"], event["port"]) for event in relay.events("delivered")}
        assert found == {"now@d.example": ("127.0.0.1", first.port), "later@d.example": ("127.0.0.2", second.port)}
        assert [message[1] for message in first.messages + second.messages] == [["now@d.example"], ["later@d.example"]]
