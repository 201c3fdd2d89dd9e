"""Without filters, a message takes the same way as before there were any."""

import sys
from collections import Counter
from types import FrameType

import pytest

from relaymta.accept.connection import Connection
from relaymta.ident import format_id
from tests.accept.test_connection import EHLO, machine, say
from tests.accept.test_transactions import connected, idle
from tests.support.connection import Transport

LINE = b"y" * 60 + b"\r\n"
TRUSTED = {"networks": ["127.0.0.0/8"], "domains": ["d.example"]}


def message(lines: int) -> bytes:
    data = b"Subject: x\r\n\r\n" + lines * LINE
    return b"MAIL FROM:<a@b>\r\nRCPT TO:<a@d.example>\r\nBDAT %d LAST\r\n%b" % (len(data), data)


def calls(made: Connection, data: bytes) -> Counter[str]:
    """The calls of functions of the relay that a client's octets cause, up to the replies."""
    found: Counter[str] = Counter()
    format_id.cache_clear()  # other tests have had messages with these ids

    def profile(frame: FrameType, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and "/relaymta/" in name and "/tests/" not in name:
            found[frame.f_code.co_qualname] += 1

    sys.setprofile(profile)
    try:
        said = say(made, data)
    finally:
        sys.setprofile(None)
    assert "queued as" in said[-1], said
    return found


@pytest.mark.parametrize("lines, settings, expected", [
    (1, {}, 66), (1, {"looks": True}, 72), (1, {"signs": True, "relay": TRUSTED}, 53), (322, {}, 66),
], ids=["small", "verified", "signed", "large"])  # fmt: skip
def test_a_message_that_no_filter_looks_at_takes_as_many_calls_as_before_there_were_filters(lines, settings, expected):
    """Counted in the tree before filters, less one (what observes a duration is compiled since); whoever changes the way of a
    message for another reason counts anew."""
    made = connected(machine(**settings))
    say(made, EHLO)
    calls(made, message(1))
    found = calls(made, message(lines))
    assert not [name for name in found if "ilter" in name or "udge" in name or "Chain" in name]
    assert found.total() == expected, dict(found)


@pytest.mark.parametrize("ends", ["lost", "half-closed"])
@pytest.mark.parametrize("lines", [1, 322], ids=["small", "large"])
@pytest.mark.parametrize("steps", range(12))
def test_a_client_that_hangs_up_while_filters_look_has_sent_nothing(lines, steps, ends):
    """At each step: it is stored as a whole, and was let pass before, or there is nothing of it."""
    of = machine(filters=True)
    made = connected(of)
    say(made, EHLO)
    transport = made.transport
    assert isinstance(transport, Transport)
    made.data_received(message(lines))
    for _ in range(steps):
        of.steps.step()
    transaction = made.session.transaction if made.session is not None else None
    looks = transaction is None or getattr(transaction, "_judging", None) is not None
    if ends == "lost":
        made.connection_lost(None)
    else:
        made.eof_received()
    idle(made)
    if looks and transaction is not None:
        assert not of.stored and all(file.discarded for file in of.written)
        assert ends == "lost" or b"\r\n451 4.3.0 You have hung up while filters looked" in transport.said
    if ends == "half-closed" and transport.closed is False:
        transport.abort()
        idle(made)
    assert not of.held() and all(file.kept != file.discarded for file in of.written)


def test_a_reply_that_says_so_ends_the_connection(monkeypatch):
    of = machine(filters=True)

    async def judge(revision, dialogue):
        from relaymta.filter.chain import Outcome
        from relaymta.filter.judgement import Verdict

        return Outcome(Verdict.TEMPFAIL, b"421 4.7.1 virus does not answer now; closing\r\n", True)

    monkeypatch.setattr(of, "judge", judge)
    made = connected(of)
    say(made, EHLO)
    made.data_received(message(1) + b"NOOP\r\n")
    transport = made.transport
    assert isinstance(transport, Transport)
    idle(made)
    assert transport.said.endswith(b"421 4.7.1 virus does not answer now; closing\r\n") and made.gone
    assert not of.stored and not of.held()
