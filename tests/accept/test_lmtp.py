"""LMTP at a Connection: who may deliver, what is filed, and what happens when the client goes or the relay stops meanwhile."""

from random import Random

import pytest

from relaymta.accept.connection import Connection
from relaymta.accept.filing import Filing
from relaymta.auth.identity import Identity
from relaymta.proto.said import Reply
from relaymta.proto.smtp_server import Offers
from relaymta.reservation import Reservation
from tests.accept.test_lmtp_machine import ROUTE
from tests.accept.test_transactions import connected, idle
from tests.support.connection import BIG, DISK_FAILS, QUEUE_FAILS, Machine, Transport

BEGUN = (
    b"LHLO mta.example\r\nMAIL FROM:<1@s.example>\r\nRCPT TO:<x@d.example>\r\nRCPT TO:<y@d.example>\r\nRCPT TO:<z@d.example>\r\n"
)
HEADER = b"Subject: x\r\nAuthentication-Results: relay.example; spf=pass\r\n"
SIZES = pytest.mark.parametrize("size", [0, 3 * BIG])


def machine(networks=("127.0.0.0/8",), postmaster="", **settings):
    listener = [{"address": "127.0.0.1:24", "protocol": "lmtp"}]
    return Machine(
        Random(1), listener=listener, route=[ROUTE], relay={"networks": list(networks), "postmaster": postmaster}, **settings
    )


def chunk(size=0, header=b"", body=b""):
    data = HEADER + header + b"\r\n" + body + b"line\r\n" * (size // 6)
    return b"BDAT %d LAST\r\n" % len(data) + data


def send(made: Connection, octets: bytes) -> None:
    """In pieces: what comes in one is no large message."""
    for at in range(0, len(octets), 4000):
        while made.transport.paused and made.admission.steps.step():
            pass
        made.data_received(octets[at : at + 4000])


def said(made: Connection, transport: Transport) -> list[bytes]:
    idle(made)
    return [line[:9] for line in transport.said.split(b"\r\n") if line[3:4] == b" "]


def send_until_filing(of: Machine, made: Connection, octets: bytes) -> None:
    """Run the loop until a message is given to the mailboxes, which have not answered yet."""
    began: list[tuple[object, ...]] = []
    file = of.intake.local.file
    of.intake.local = of.intake.local._replace(file=lambda *given: began.append(given) or file(*given))
    send(made, octets)
    while not began:
        assert of.steps.step()


@SIZES
def test_each_recipient_has_a_reply_and_the_rest_goes_through_the_queue(size):
    of = machine()
    made = connected(of)
    send(made, BEGUN + chunk(size) + b"NOOP\r\n")
    assert said(made, made.transport)[6:] == [b"250 2.1.5", b"452 4.2.2", b"250 2.1.5", b"250 2.0.0"]
    assert [(sender, user) for sender, user, _ in of.mailboxes] == [("1@s.example", "x"), ("1@s.example", "z")]
    assert [envelope.recipients for envelope, _ in of.stored] == [["z@far.example"]]
    assert all(b"spf=pass" in data and b" with LMTP id " in data for _, _, data in of.mailboxes)
    names = [event for event in of.events if "reply" in event or "size" in event]
    assert [event["recipients"] for event in names] == [
        ["y@d.example"], ["x@d.example", "z@d.example"], ["x@d.example", "z@d.example"]
    ]  # fmt: skip
    assert names[2]["users"] == ["x", "z"] and not of.held()["files"] and not of.held()["filing"]
    assert all(file.kept for file in of.written)


def test_the_reply_of_a_user_who_says_much_is_a_line_of_smtp():
    of = machine()
    made = connected(of)
    landed = of.intake.local.file
    answer = Reply(550, "5.7.1", "n" * 500)
    of.intake.local = of.intake.local._replace(
        file=lambda sender, names, data, done: landed(
            sender, names, data, lambda some: done([one._replace(reply=answer, rest=[]) for one in some])
        )
    )
    send(made, BEGUN + chunk())
    idle(made)
    lines = [line for line in made.transport.said.split(b"\r\n") if line.startswith(b"550 5.7.1 <")]
    assert [len(line) for line in lines] == [510] * 3 and lines[0].startswith(b"550 5.7.1 <x@d.example> nnn")


@SIZES
def test_when_the_queue_does_not_take_the_rest_only_its_recipient_is_told_to_try_again(size):
    of = machine()
    made = connected(of)
    send(made, BEGUN + chunk(size, QUEUE_FAILS + b": x\r\n"))
    assert said(made, made.transport)[6:] == [b"250 2.1.5", b"452 4.2.2", b"451 4.3.0"]
    assert not of.held()["files"] and all(file.discarded for file in of.written)


@SIZES
@pytest.mark.parametrize("how", ["abort", "lost"])
def test_a_client_that_goes_does_not_stop_its_message(size, how):
    of = machine()
    made = connected(of)
    send_until_filing(of, made, BEGUN + chunk(size))
    assert bool(of.held()["files"]) == bool(of.held()["filing"]) == bool(size)
    made.connection_lost(None) if how == "lost" else made.transport.abort()
    idle(made)
    assert [user for _, user, _ in of.mailboxes] == ["x", "z"] and len(of.stored) == 1 and not of.held()
    assert any(event.get("users") == ["x", "z"] for event in of.events)


@SIZES
def test_a_relay_that_stops_answers_what_is_under_way_and_closes(size):
    of = machine()
    made = connected(of)
    transport = made.transport
    send_until_filing(of, made, BEGUN + chunk(size))
    assert bool(of.held()["files"]) == bool(of.held()["filing"]) == bool(size)
    of.intake.draining = True
    made.drain()
    assert said(made, transport)[6:] == [b"250 2.1.5", b"452 4.2.2", b"250 2.1.5", b"421 4.3.2"] and not of.held()


@SIZES
@pytest.mark.parametrize(
    ("spoiled", "reply"),
    [
        ({"header": b"Received: x\r\n" * 60}, b"554 5.4.6"),
        ({"body": b"x\ny\r\n"}, b"550 5.5.2"),
        ({"body": b"x" * 10 * BIG + b"\r\n"}, b"552 5.3.4"),
    ],
)
def test_a_message_refused_as_a_whole_is_refused_for_each_and_filed_for_nobody(size, spoiled, reply):
    of = machine(limits={"message_size": 9 * BIG})
    made = connected(of)
    send(made, BEGUN + chunk(size, **spoiled) + b"NOOP\r\n")
    assert said(made, made.transport)[6:] == [reply] * 3 + [b"250 2.0.0"]
    assert not of.mailboxes and not of.stored and not of.held()["files"] and all(file.discarded for file in of.written)
    assert len([event for event in of.events if event.get("reply", "").startswith(reply.decode())]) == 1


def test_a_file_that_cannot_be_written_refuses_the_message():
    of = machine()
    made = connected(of)
    send(made, BEGUN + chunk(3 * BIG, DISK_FAILS + b": x\r\n"))
    assert said(made, made.transport)[6:] == [b"451 4.3.0"] * 3 and not of.mailboxes


def test_other_clients_get_no_greeting_and_are_counted():
    of = machine(["192.0.2.0/24"])
    made = connected(of)
    transport = made.transport
    made.data_received(BEGUN)
    of.offers = lambda listener, xclient, xforward: Offers(lmtp=True)
    other = connected(of)
    first = other.transport
    other.data_received(BEGUN)
    assert said(other, first) == [b"554 5.7.1"] and other.transport is None
    # One that could log in, or name another client, is told at MAIL.
    assert said(made, transport)[:2] == [b"220 relay", b"250 ENHAN"] and set(said(made, transport)[2:]) == {
        b"550 5.7.1",
        b"503 5.5.1",
    }
    secure = Connection(of, of.config.listener[0])
    secure.enter(of.intake.client("127.0.0.1"))
    transport = Transport(of.steps, secure, secure=True)
    secure.connection_made(transport)
    assert not transport.said
    secure._secured(transport)
    assert said(secure, transport) == [b"554 5.7.1"] and secure.transport is None


def test_a_user_who_logs_in_delivers_and_vouches_for_no_results():
    of = machine(["192.0.2.0/24"])
    of.logs_in = Identity("mta")
    made = connected(of)
    made.data_received(b"LHLO x\r\nAUTH PLAIN AG10YQBz\r\n")
    idle(made)
    send(made, BEGUN + chunk())
    assert said(made, made.transport)[-3:] == [b"250 2.1.5", b"452 4.2.2", b"250 2.1.5"]
    assert all(b"spf=pass" not in data and b" with LMTPA id " in data for _, _, data in of.mailboxes)
    assert not any(b"Date:" in data for _, _, data in of.mailboxes)  # it is no submission


def test_postmaster_is_who_it_means():
    of = machine()
    made = connected(of)
    made.data_received(b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<postmaster>\r\nRCPT TO:<x@elsewhere.example>\r\n")
    assert said(made, made.transport)[3:] == [b"550 5.7.1"] * 2  # postmaster@relay.example is not kept here
    of = machine(postmaster="x@d.example")
    made = connected(of)
    made.data_received(b"LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<postmaster>\r\n" + chunk())
    assert said(made, made.transport)[3:] == [b"250 2.1.5"] * 2 and of.mailboxes[0][1] == "x"


def test_large_messages_take_their_turns():
    room, begun = Filing(10), []
    for octets in (4, 4, 4, 30, 1):
        room.take(octets, begun.append)
    assert len(begun) == 2 and room.octets == 8
    begun[0].give_back()
    assert len(begun) == 3
    begun[1].give_back()
    assert len(begun) == 3  # the large one waits, and the small one behind it
    begun[2].give_back()
    assert len(begun) == 4 and room.octets == 30
    begun[3].give_back()
    assert len(begun) == 5 and isinstance(begun[4], Reservation)
    begun[4].give_back()
    assert room.octets == 0
