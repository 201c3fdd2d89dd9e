"""A message that filters look at, step by step: what becomes of it whatever they say and whenever its client goes."""

from random import Random
from typing import Any

import pytest

from relaymta.accept.connection import Connection
from relaymta.accept.large import Large
from relaymta.filter.chain import Outcome
from relaymta.filter.judgement import FilterFailure, NewEnvelope, Verdict
from relaymta.filter.revision import Revision
from relaymta.proto.edits import Append, Insert, without
from relaymta.proto.header import header_end
from tests.accept.test_asking import LMTP
from tests.accept.test_transactions import connected, idle
from tests.support.connection import BIG, Machine, Transport

SIZES = pytest.mark.parametrize("size", [10, 3 * BIG], ids=["small", "large"])
ENVELOPE = b"EHLO client.example\r\nMAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\n"


def machine(**settings: Any) -> Machine:
    return Machine(Random(1), filters=True, **settings)


def bdat(message: bytes) -> tuple[bytes, bytes]:
    """All but the last octets, with the envelope; and these."""
    return ENVELOPE + b"BDAT %d\r\n" % (len(message) - 2) + message[:-2], b"BDAT 2 LAST\r\n" + message[-2:]


def complete(of: Machine, size: int) -> Connection:
    """A client whose message of so many octets is complete, and nothing is done about it yet."""
    made = connected(of)
    before, last = bdat(b"Subject: x\r\n\r\n" + b"line\r\n" * (size // 6))
    made.data_received(before)
    idle(made)
    made.data_received(last)
    return made


@SIZES
@pytest.mark.parametrize("lost", [False, True], ids=["it sends no more", "its connection is lost"])
def test_a_client_that_hangs_up_before_filters_are_asked_will_send_again_and_nothing_is_taken(size, lost):
    """While the rest of a large message is written, too."""
    of = machine()
    made = complete(of, size)
    transport = made.transport
    if lost:
        made.connection_lost(None)
    else:
        made.eof_received()
    idle(made)
    assert not of.stored and all(file.discarded for file in of.written)
    assert isinstance(transport, Transport) and (b"\r\n451 4.3.0 " in transport.said) == (not lost)
    assert made.transport is None and not of.held()


@SIZES
def test_what_filters_add_stays_where_a_removed_field_was_all_that_made_a_header(monkeypatch, size):
    """A client that is to be tagged must not be able to prevent that."""
    of = machine()
    of.forged = frozenset({b"x-spam"})

    async def judge(revision: Revision, dialogue: object) -> Outcome:
        revision.edit([Append(b"X-Spam", b" Yes"), Insert(0, b"X-First", b" 1")])
        return Outcome(Verdict.TAG)

    monkeypatch.setattr(of, "judge", judge)
    made = connected(of)
    rest = b"no field\r\nSubject: x\r\n\r\n" + b"line\r\n" * (size // 6)
    before, last = bdat(b"X-Spam: No\r\n" + rest)
    made.data_received(before)
    idle(made)
    made.data_received(last)
    idle(made)
    ((_, stored),) = of.stored
    assert stored.endswith(rest) and b"X-Spam: No" not in stored
    front = stored.removesuffix(rest)
    assert front.startswith(b"X-First: 1\r\nX-Spam: Yes\r\n") and front.count(b"\r\nReceived: from") == 1, front
    assert b"\r\n\r\n" not in front and header_end(stored) == stored.index(b"Subject: x\r\n\r\n") + 14
    assert without(stored, {b"x-spam"}) != stored


@SIZES
@pytest.mark.parametrize("behind", [b"QUIT\r\n", b"NOOP\r\n" * 600, b"NOOP\r\n" * 60_000], ids=["a word", "some", "much"])
def test_a_client_that_says_something_and_goes_is_noticed(size, behind):
    """Unless it says so much that nothing more is read of it: then it is as if it waited."""
    of = machine()
    made = complete(of, size)
    transport = made.transport
    assert isinstance(transport, Transport)
    for at in range(0, len(behind), 1000):
        if not transport.paused:
            made.data_received(behind[at : at + 1000])
    assert transport.paused == (len(behind) > 4096)
    if not transport.paused:
        made.connection_lost(None)
    idle(made)
    assert len(of.stored) == (len(behind) > 4096)
    if made.transport is not None:
        made.connection_lost(None)
    assert not of.held() and all(file.kept != file.discarded for file in of.written)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_new_body_and_the_header_are_no_more_than_a_message_may_be(monkeypatch, beyond):
    header, most = b"Subject: x\r\n" * 100 + b"\r\n", 65536
    of = machine(limits={"message_size": most})
    said: list[str] = []

    async def judge(revision: Revision, dialogue: object) -> Outcome:
        assert revision.mail.rewritten is not None
        new = revision.mail.rewritten()
        try:
            await new.write(b"x\r\n" * ((most - len(header)) // 3 + beyond))
            await new.end()
            said.append("taken")
        except FilterFailure as failure:
            said.append(failure.reason)
        new.discard()
        return Outcome(Verdict.ACCEPT)

    monkeypatch.setattr(of, "judge", judge)
    made = connected(of)
    made.data_received(ENVELOPE + b"BDAT %d LAST\r\n" % len(header) + header)
    idle(made)
    assert said == ["protocol" if beyond else "taken"]


def test_by_lmtp_each_recipient_that_was_accepted_has_the_message_whomever_filters_remove(monkeypatch):
    of = machine(**LMTP)

    async def judge(revision: Revision, dialogue: object) -> Outcome:
        dropped = revision.readdress(NewEnvelope(["y@d.example"], ["x@d.example"], "b@b.example"))
        assert revision.mail.recipients and revision.mail.sender == "a@b"
        return Outcome(Verdict.ACCEPT if dropped == 3 else Verdict.DISCARD)

    monkeypatch.setattr(of, "judge", judge)
    made = connected(of)
    made.data_received(ENVELOPE.replace(b"EHLO", b"LHLO").replace(b"<a@d", b"<x@d") + b"BDAT 14 LAST\r\nSubject: x\r\n\r\n")
    idle(made)
    assert [(sender, user) for sender, user, _ in of.mailboxes] == [("a@b", "x")]


def test_a_small_message_of_which_filters_make_a_large_one_waits_for_its_turn(monkeypatch):
    """Of LMTP: such are read into memory one after the other."""
    of = machine(**LMTP)
    monkeypatch.setattr(of, "become", lambda file, ident: None, raising=False)
    turns: list[int] = []
    take = of.filing.take
    monkeypatch.setattr(of.filing, "take", lambda octets, begin: (turns.append(octets), take(octets, begin)))
    new = b"x\r\n" * BIG

    async def judge(revision: Revision, dialogue: object) -> Outcome:
        assert revision.mail.rewritten is not None
        body: Any = revision.mail.rewritten()
        body.large = Large(lambda room: of.big_body(99, room), [], changes=True)
        body.large.write([new])
        revision.rewrite(body)
        return Outcome(Verdict.ACCEPT)

    monkeypatch.setattr(of, "judge", judge)
    made = connected(of)
    made.data_received(ENVELOPE.replace(b"EHLO", b"LHLO").replace(b"<a@d", b"<x@d") + b"BDAT 14 LAST\r\nSubject: x\r\n\r\n")
    idle(made)
    ((_, _, filed),) = of.mailboxes
    assert filed.endswith(b"Subject: x\r\n\r\n" + new) and turns == [len(new)]
    made.connection_lost(None)
    idle(made)
    assert not of.held() and all(file.discarded for file in of.written)
