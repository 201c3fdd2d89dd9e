"""A connection of which filters are asked about MAIL and RCPT: nothing goes on before they have answered, and whatever happens
meanwhile leaves nothing, neither of the client nor of the question."""

import asyncio
import gc
import socket
import struct
from collections.abc import Iterator
from random import Random

import pytest

from relaymta.accept.client import KEPT
from relaymta.accept.connection import Connection
from relaymta.accept.line import OUTPUT_SECONDS
from relaymta.accept.rights import Rights
from relaymta.auth.identity import Identity
from relaymta.metrics import index
from relaymta.proto import reply
from relaymta.proto.session import STORING
from tests.accept.test_connection import CLIENT, EHLO, LOGIN, machine, say
from tests.accept.test_transactions import connected, idle
from tests.support.asking import Filters, asking
from tests.support.connection import Machine, Transport

MAIL, RCPT = b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<x@d.example>\r\n"
CHUNK = b"BDAT 4 LAST\r\nhi\r\n"
REFUSED, CLOSING = b"554 5.7.1 Refused by a filter\r\n", b"421 4.7.0 A filter wants no more of this\r\n"
LMTP = {
    "listener": [{"address": "127.0.0.1:24", "protocol": "lmtp"}],
    "route": [{"name": "here", "protocol": "mailbox", "recipient_domain": ["d.example"]}],
    "relay": {"networks": ["127.0.0.0/8"]},
}


@pytest.fixture
def of() -> Machine:
    return machine()


@pytest.fixture
def filters(of: Machine) -> Iterator[Filters]:
    with asking(of) as found:
        yield found


def run(of: Machine, steps: int = 50) -> None:
    """So many turns of the loop; a question that waits would keep it busy for ever."""
    for _ in range(steps):
        of.steps.step()


def of_client(made: Connection) -> Transport:
    assert isinstance(made.transport, Transport)
    return made.transport


def codes(said: bytes) -> list[int]:
    return [int(line[:3]) for line in said.split(b"\r\n") if line[3:4] == b" "]


def begun(of: Machine, wire: bytes, verb: str = "MAIL", filters: Filters | None = None) -> Connection:
    """A client that has said EHLO and then this, at once, and about whose command, with this verb, filters are asked."""
    made = connected(of)
    made.data_received(EHLO + wire)
    run(of)
    found = filters or of.filters  # type: ignore[attr-defined]
    while found.asked[-1].verb != verb:
        found.say()
        run(of)
    return made


# Answers


def test_replies_in_front_of_a_question_are_sent_at_once_and_its_own_when_it_is_answered(of, filters):
    made = begun(of, b"NOOP\r\n" + MAIL + RCPT + b"NOOP\r\n")
    transport = of_client(made)
    assert codes(transport.said) == [220, 250, 250] and not transport.paused
    filters.say()
    run(of)
    assert codes(transport.said) == [220, 250, 250, 250] and filters.asked[-1].address == "x@d.example"
    filters.say(REFUSED)
    idle(made)
    assert codes(transport.said)[4:] == [554, 250] and not made.waits and made.asking is None


@pytest.mark.parametrize("arrives", ["at once", "octet by octet", "meanwhile"])
@pytest.mark.parametrize("end", ["DATA", "BDAT", "BDAT, QUIT", "QUIT", "RSET", "EHLO", "STARTTLS", "AUTH"])
def test_what_is_pipelined_behind_questions_is_done_in_its_turn(of, filters, end, arrives):
    wire = MAIL + RCPT + b"RCPT TO:<y@d.example>\r\n" + {
        "DATA": b"DATA\r\n", "BDAT": CHUNK + MAIL, "BDAT, QUIT": CHUNK + b"QUIT\r\n", "QUIT": b"QUIT\r\n", "RSET": b"RSET\r\n",
        "EHLO": EHLO, "STARTTLS": b"STARTTLS\r\n", "AUTH": LOGIN,
    }[end]  # fmt: skip
    made = connected(of)
    transport = of_client(made)
    made.data_received(EHLO)
    if arrives == "at once":
        made.data_received(wire)
    elif arrives == "meanwhile":
        made.data_received(MAIL)
        run(of)
        made.data_received(wire[len(MAIL) :])
    else:
        for at in range(len(wire)):
            made.data_received(wire[at : at + 1])
            run(of, 2)
    for answer in (None, None, REFUSED):
        run(of)
        filters.say(answer)
    run(of)
    if end == "BDAT":
        filters.say()
    idle(made)
    rest = {
        "DATA": [354], "BDAT": [250, 250], "BDAT, QUIT": [250, 221], "QUIT": [221], "RSET": [250], "EHLO": [250],
        "STARTTLS": [220], "AUTH": [503],
    }[end]  # fmt: skip
    assert codes(transport.said) == [220, 250, 250, 250, 554, *rest]
    if end == "DATA":
        assert codes(b"\r\n".join(line.encode() for line in say(made, b"hi\r\n.\r\n"))) == [250]
    if end in ("DATA", "BDAT", "BDAT, QUIT"):
        assert [(envelope.sender, envelope.recipients) for envelope, _ in of.stored] == [("a@b.example", ["x@d.example"])]
        assert of.stored[0][1].endswith(b"\r\nhi\r\n")
    assert len(of.stored) == (end in ("DATA", "BDAT", "BDAT, QUIT")) and transport.closed == ("QUIT" in end)
    if made.transport is not None:
        made.connection_lost(None)
    idle(made)
    assert not of.held() and not filters.waiting


def test_an_lmtp_client_waits_likewise():
    of = machine(**LMTP)
    with asking(of) as filters:
        made = connected(of)
        made.data_received(
            b"LHLO c.example\r\n" + MAIL + RCPT + b"RCPT TO:<y@d.example>\r\nRCPT TO:<z@d.example>\r\n" + CHUNK + b"QUIT\r\n"
        )
        transport = of_client(made)
        for answer in (None, None, None, REFUSED):
            run(of)
            filters.say(answer)
        idle(made)
        assert codes(transport.said) == [220, 250, 250, 250, 250, 554, 250, 452, 221]
        assert [question.address for question in filters.asked] == ["", "x@d.example", "y@d.example", "z@d.example"]
        assert [user for _, user, _ in of.mailboxes] == ["x"] and transport.closed and not of.held()


def test_a_refused_sender_begins_no_transaction_and_the_next_one_is_asked_about(of, filters):
    made = begun(of, MAIL + RCPT + CHUNK + MAIL + RCPT + CHUNK)
    filters.say(REFUSED)
    run(of)
    assert codes(of_client(made).said) == [220, 250, 554, 503, 503] and len(filters.asked) == 2
    filters.say()
    run(of)
    filters.say()
    idle(made)
    assert codes(of_client(made).said)[5:] == [250, 250, 250] and len(of.stored) == 1


def test_a_recipient_that_is_refused_here_is_told_and_not_asked_about(of, filters):
    made = begun(of, MAIL + b"RCPT TO:<x@far.example>\r\n")
    filters.say()
    idle(made)
    assert len(filters.asked) == 1 and [address for address, _ in filters.refusals] == ["x@far.example"]


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
def test_a_421_closes_the_connection(of, filters, verb):
    made = begun(of, MAIL + RCPT + CHUNK, verb)
    transport = of_client(made)
    filters.say(CLOSING)
    idle(made)
    assert transport.said.endswith(CLOSING) and transport.closed and not of.held() and not of.stored


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(5, "x"), TimeoutError(), asyncio.CancelledError()], ids=repr)
def test_a_question_that_fails_has_a_reply_and_a_warning_and_the_session_goes_on(of, filters, verb, error):
    """A cancellation, too, which is not that of the client: a filter may have waited for something of another one's."""
    made = begun(of, MAIL + RCPT + b"NOOP\r\n", verb)
    filters.say(error)
    run(of)
    said = of_client(made).said
    assert said.count(reply.NOT_ASKED) == 1 and said.endswith(reply.NOOP) and not made.waits and made.asking is None
    (warning,) = [event["text"] for event in of.events if "text" in event]
    assert warning.startswith("filters could not be asked about a command: ") and type(error).__name__ in warning
    assert made.session is not None and (made.session.transaction is None) == (verb == "MAIL")
    assert made.session.errors == (verb == "MAIL")  # that of RCPT without a sender
    made.data_received(b"RSET\r\n" + MAIL)
    run(of)
    filters.say()
    run(of)
    assert of_client(made).said.endswith(reply.SENDER_OK)


def test_thousands_of_questions_in_one_segment_do_not_recurse(of):
    class Ready(Filters):
        async def ask(self, question):
            self.asked.append(question)
            return REFUSED if question.verb == "MAIL" else None

    with asking(of, Ready()) as filters:
        made = connected(of)
        transport = of_client(made)
        made.data_received(EHLO)
        made.data_received(MAIL * 5_000 + b"QUIT\r\n")
        idle(made)
    assert len(filters.asked) == 5_000 and codes(transport.said) == [220, 250] + [554] * 5_000 + [221]
    assert transport.closed and not of.held()


# Whatever happens meanwhile


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
@pytest.mark.parametrize("behind", [b"", b"NOOP\r\n", RCPT + b"DATA\r\n", RCPT + CHUNK, b"QUIT\r\n"], ids=repr)
@pytest.mark.parametrize("how", ["hangs up", "is reset", "is reset in the same turn", "hangs up in the same turn"])
def test_the_question_of_a_client_that_goes_is_given_up(of, filters, verb, behind, how):
    of.logs_in = Identity("ann", connections=1)
    made = connected(of)
    transport = of_client(made)
    made.data_received(EHLO + LOGIN)
    run(of)
    made.data_received(MAIL + behind if verb == "MAIL" else MAIL)
    if verb == "RCPT":
        run(of)
        filters.say()
        run(of)
        made.data_received(RCPT + behind)
    if "same turn" not in how:
        run(of)
    session, said, asked = made.session, transport.said, len(filters.asked)
    assert session is not None
    transaction = session.transaction
    assert transaction is not None and of.held()["logged in as ann"] == 1
    if "hangs up" in how:
        assert not made.eof_received() and session.closing
        transport.close()
    else:
        made.connection_lost(None)
        transport.closed = True
    run(of)
    assert transport.closed and transport.said == said and not filters.waiting and made.asking is None and not made.waits
    assert filters.cancelled == 1 and len(filters.asked) == asked
    assert session.transaction is None and session.question is None and session.closing and not of.held() and not of.stored
    assert not [event for event in of.events if "text" in event]
    idle(made)


def test_a_client_that_says_quit_and_goes_is_noticed(of, filters):
    made = begun(of, MAIL)
    made.data_received(b"QUIT\r\n")
    run(of)
    assert not of_client(made).paused  # else its end would not be seen
    assert not made.eof_received()
    run(of)
    assert filters.cancelled == 1


def test_what_arrives_while_filters_are_asked_is_bounded_and_read_on_afterwards(of, filters):
    made = begun(of, MAIL)
    transport, count = of_client(made), 0
    while not transport.paused:
        made.data_received(b"NOOP\r\n" * 50)
        count += 50
    assert KEPT < count * 6 <= KEPT + 300 and codes(transport.said) == [220, 250]
    filters.say()
    idle(made)
    assert codes(transport.said) == [220, 250, 250] + [250] * count and not transport.paused


def test_a_client_that_sends_a_lot_ahead_is_not_read_from_one_question_to_the_next(of, filters):
    made = begun(of, MAIL)
    transport = of_client(made)
    made.data_received(RCPT * 300)
    assert transport.paused
    for _ in range(20):
        filters.say()
        run(of)
        assert filters.waiting and transport.paused
    made.connection_lost(None)
    run(of)
    assert filters.cancelled == 1 and len(filters.asked) == 21 and not of.held()


def test_an_answer_to_a_client_whose_connection_is_being_closed_is_not_sent(of, filters):
    made = begun(of, MAIL + RCPT)
    transport = of_client(made)
    said = transport.said
    filters.say()
    transport.abort()  # of which the connection is told later
    run(of)
    assert transport.closed and transport.said == said and len(filters.asked) == 1 and not of.held()


def test_a_client_is_noticed_whose_command_was_asked_about_after_a_lot_of_others(of, filters):
    made = connected(of)
    made.data_received(EHLO + b"NOOP\r\n" * 500 + MAIL)
    assert of_client(made).paused
    run(of)
    assert filters.waiting and not of_client(made).paused
    made.connection_lost(None)
    run(of)
    assert filters.cancelled == 1 and not of.held()


def test_nobody_is_asked_about_a_client_that_has_hung_up_before(of, filters):
    made = begun(of, MAIL + RCPT + CHUNK + MAIL + b"NOOP\r\n", "RCPT")
    transport = of_client(made)
    filters.say()
    assert made.session is not None
    while made.session.state != STORING:
        of.steps.step()
    assert made.eof_received()  # it may wait for the reply to its message
    run(of)
    assert transport.said.endswith(b"\r\n") and b" queued as " in transport.said.rstrip().rpartition(b"\r\n")[2]
    assert transport.closed and len(of.stored) == 1 and len(filters.asked) == 2 and not of.held()


@pytest.mark.parametrize("verb", ["MAIL", "RCPT"])
@pytest.mark.parametrize("by", ["drain", "check"])
def test_a_drain_gives_the_question_up(of, filters, verb, by):
    made = begun(of, MAIL + RCPT + b"NOOP\r\n", verb)
    transport = of_client(made)
    before = transport.said
    transport.reads = False  # the filters need not wait for that, too
    of.intake.draining = True
    made.drain() if by == "drain" else made.check(of.steps.now)
    assert transport.said == before + reply.SHUTTING_DOWN and transport.closing
    run(of)
    assert filters.cancelled == 1 and transport.said == before + reply.SHUTTING_DOWN and not transport.closed
    transport.read()
    run(of)
    assert transport.closed and not of.held() and filters.cancelled == 1


def test_the_deadline_of_commands_does_not_apply_to_filters_and_counts_from_their_answer(of, filters):
    made = begun(of, MAIL)
    patience = of.config.intake.command_timeout
    of.steps.now += 10 * patience
    made.check(of.steps.now)
    assert not made.gone and filters.waiting
    filters.say()
    idle(made)
    made.check(of.steps.now + patience - 1)
    assert not made.gone and codes(of_client(made).said) == [220, 250, 250]
    made.check(of.steps.now + patience + 1)
    assert made.gone and of_client(made).said.endswith(reply.TIMEOUT)


def test_a_client_that_does_not_read_is_disconnected_also_while_it_is_asked_about(of, filters):
    made = connected(of)
    transport = of_client(made)
    idle(made)
    transport.reads = False
    made.data_received(EHLO * 100 + MAIL)
    run(of)
    while not filters.waiting:
        transport.owed = 0
        transport.blocked = False
        made.resume_writing()
        run(of)
    transport.write(b"x" * 20_000)
    assert transport.blocked and filters.waiting
    made.check(of.steps.now + OUTPUT_SECONDS + 1)
    run(of)
    assert transport.closed and filters.cancelled == 1 and not of.held()


def test_refusals_of_filters_are_held_back_by_the_tarpit_as_others_are():
    of = machine(intake={"errors": 100, "tarpit": 5})
    with asking(of) as filters:
        made = begun(of, (MAIL * 4) + b"NOOP\r\n", filters=filters)
        transport = of_client(made)
        for said in range(3):
            filters.say(REFUSED)
            run(of)
            assert codes(transport.said) == [220, 250] + [554] * (said + 1)
        filters.say(REFUSED)
        of.steps.turns.popleft()()
        assert made.waits and made.delayed == REFUSED and codes(transport.said)[2:] == [554] * 3
        idle(made)
        assert codes(transport.said)[2:] == [554] * 4 + [250] and not made.waits


def test_replies_that_the_tarpit_holds_back_come_before_the_question():
    of = machine(intake={"errors": 100, "tarpit": 5})
    with asking(of) as filters:
        made = connected(of)
        idle(made)
        made.data_received(EHLO + b"WRONG\r\n" * 5 + MAIL)
        while of.steps.turns:
            of.steps.step()
        assert not filters.asked and codes(of_client(made).said) == [220]
        run(of)
        assert filters.waiting and codes(of_client(made).said) == [220, 250] + [500] * 5
        filters.say()
        idle(made)
        assert of_client(made).said.endswith(reply.SENDER_OK)
        made.data_received(b"RSET\r\n" + b"WRONG\r\n" + MAIL)
        made.eof_received()
        run(of)
        assert len(filters.asked) == 1 and of.held() == {}  # it had gone before that


class Stubborn(Filters):
    """Answer also when they are cancelled."""

    async def ask(self, question):
        try:
            return await Filters.ask(self, question)
        except asyncio.CancelledError:
            return None


def test_a_late_answer_to_a_client_that_has_gone_changes_nothing(of):
    with asking(of, Stubborn()) as filters:
        made = begun(of, MAIL)
        transport = of_client(made)
        said = transport.said
        made.connection_lost(None)
        run(of)
        assert filters.cancelled == 1 and transport.said == said and not of.held() and not made.waits


def test_a_client_that_does_not_read_and_half_closes_gets_what_is_written_and_no_more(of):
    with asking(of, Stubborn()) as filters:
        made = begun(of, MAIL + RCPT)
        transport = of_client(made)
        transport.reads = False
        transport.write(b"x" * 20_000)
        said = transport.said
        assert transport.blocked and made.eof_received()  # it may read that still
        run(of)
        assert filters.cancelled == 1 and not transport.closing and made.asking is None
        transport.reads = True
        transport.read()
        run(of)
        assert transport.closed and transport.said == said and len(filters.asked) == 1 and not of.held()


# The real thing


class Real(Machine):
    """A machine on the loop of the test."""

    def __init__(self) -> None:
        super().__init__(Random(1), intake={"errors": 100_000, "tarpit": 0})
        self.loop = asyncio.get_running_loop()
        self.turns._loop, self.now = self.loop, self.loop.time

    def spawn(self, coroutine):
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Slow(Filters):
    """Answers when `answers` is set, never before."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.begun = asyncio.Event(), asyncio.Event()

    async def ask(self, question):
        self.asked.append(question)
        self.begun.set()
        await asyncio.sleep(0)  # what has a time-out has to be a task
        try:
            async with asyncio.timeout(30):
                await self.answers.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@pytest.mark.parametrize("ends", ["FIN", "RST", "stays"])
@pytest.mark.parametrize("behind", [b"", b"NOOP\r\n"], ids=repr)
async def test_a_client_with_a_socket(ends, behind):
    of = Real()
    with asking(of, Slow()) as filters:
        server = await of.loop.create_server(lambda: Connection(of, of.config.listener[0]), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await reader.readline()
        writer.write(EHLO + MAIL)
        await filters.begun.wait()
        if behind:
            writer.write(behind)
            await asyncio.sleep(0.01)
        if ends == "stays":
            assert of.cells.get(index("relaymta_connections_total", "accepted")) == 1 and of.held()[CLIENT] == 1
            filters.answers.set()
            writer.write(b"QUIT\r\n")
            said = await reader.read()
            assert codes(said) == [250, 250, *([250] if behind else []), 221]
        elif ends == "RST":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()
        async with asyncio.timeout(5):
            while of.held() or of._tasks:
                await asyncio.sleep(0.001)
        assert filters.cancelled == (ends != "stays")
        server.close()
    gc.collect()
    gc.disable()
    try:
        assert not [one for one in gc.get_objects() if isinstance(one, Connection) and one.admission is of]
    finally:
        gc.enable()


def test_a_message_counts_once_however_many_of_its_recipients_are_refused():
    of = machine(limits={"message_rate": "3/h"})
    with asking(of) as filters:
        made = begun(of, MAIL + b"".join(b"RCPT TO:<%d@d.example>\r\n" % n for n in range(5)) + CHUNK, filters=filters)
        for answer in (None, *[REFUSED] * 4, None):
            filters.say(answer)
            run(of)
        idle(made)
        assert codes(of_client(made).said) == [220, 250, 250, 554, 554, 554, 554, 250, 250]
        assert of.used["client 127.0.0.1 message_rate"] == 1, of.used


# The dialogue that begins with the connection


@pytest.mark.parametrize("reads_mail", [False, True])
def test_who_comes_to_read_mail_is_not_looked_up(reads_mail):
    class Follows(Machine):
        begins, begun, ended, asks = True, 0, 0, frozenset[str]()

        def dialogue(self, client: str) -> "Follows":
            self.begun += 1
            return self

        def end(self) -> None:
            self.ended += 1

    of = Follows(Random(1), filters=True)
    made = connected(of)
    assert (of.begun, of.ended) == (1, 0)
    rights = Rights.admit(of, of.config.listener[0], None if reads_mail else made, of.intake.client("192.0.2.1"))
    assert isinstance(rights, Rights)
    rights.log_in(Identity("ann"))
    rights.end()
    made.connection_lost(None)
    assert of.begun == of.ended == (1 if reads_mail else 3)
