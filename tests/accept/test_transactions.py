"""What is stored is what was sent in that transaction, however its octets are split, and whatever comes before and after it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from relaymta.accept.connection import Connection
from tests.conftest import PROVE
from tests.support.connection import BIG, COMMIT_FAILS, DISK_FAILS, REFUSED, Machine, Transport

SIZES = (40, BIG, 3 * BIG)
HUGE = 20 * BIG
EHLO = b"EHLO client.example\r\n"
# What makes message data unacceptable, and what does so only where it is verified.
SPOILED = {
    "": b"", "bare LF": b"x\ny", "bare CR": b"x\ry", "NUL": b"\0", "long line": b"x" * 1100, "loop": b"Received: x\r\n" * 60,
    "disk": DISK_FAILS, "commit": COMMIT_FAILS, "refused": REFUSED + b": x", "huge": b"",
}  # fmt: skip
ENDS = ("", "RSET", "EHLO", "HELO", "STARTTLS", "XCLIENT", "MAIL")


@dataclass
class Mail:
    """A transaction. `how`: DATA (-1), or BDAT in so many chunks (0: only an envelope); `end`: the command that aborts it ("": it
    is completed)."""

    how: int = -1
    size: int = 40
    spoiled: str = ""
    end: str = ""
    number: int = 0
    protocol: bytes = b"ESMTP"

    def data(self) -> bytes:
        line = b"line of mail %d\r\n" % self.number
        spoil = SPOILED[self.spoiled]
        header = b"Subject: %d\r\n" % self.number + (spoil + b"\r\n" if spoil.startswith((b"X-", b"Received")) else b"")
        body = line * ((HUGE if self.spoiled == "huge" else self.size) // len(line) + 1)
        return header + b"\r\n" + body + (spoil if not spoil.startswith((b"X-", b"Received")) else b"") + b"..\r\n.x\r\n"

    def taken(self, looks: bool) -> bool:
        """Whether it is to be stored."""
        harmless = self.spoiled in ("", "disk", *(() if looks else ("refused",)))
        return harmless and self.how != 0 and not (self.end and self.how > 0)


@dataclass
class Script:
    """What the client sends: flights, each sent after the replies to those before."""

    mails: list[Mail] = field(default_factory=list)

    def flights(self) -> Iterator[bytes]:
        octets, protocol = EHLO, b"ESMTP"
        for number, mail in enumerate(self.mails, 1):
            mail.number, mail.protocol = number, protocol
            octets += b"MAIL FROM:<%d@s.example>\r\nRCPT TO:<%d@d.example>\r\n" % (number, number)
            data = mail.data()
            if mail.how < 0:
                yield octets + b"DATA\r\n"
                octets = re.sub(rb"(?m)^\.", b"..", data) + b".\r\n"
            elif mail.how > 0:
                step = len(data) // mail.how + 1
                pieces = [data[at : at + step] for at in range(0, len(data), step)]
                last = len(pieces) - 1
                for at, piece in enumerate(pieces):
                    octets += b"BDAT %d%s\r\n" % (len(piece), b" LAST" if at == last and not mail.end else b"") + piece
            octets += {"": b"", "MAIL": b"MAIL FROM:<late@s.example>\r\nRSET\r\n", "RSET": b"RSET\r\n"}.get(mail.end, b"")
            if mail.end == "STARTTLS" and not protocol.endswith(b"S"):
                yield octets + b"STARTTLS\r\n"
                octets, protocol = EHLO, b"ESMTPS"
            elif mail.end == "XCLIENT":
                yield octets + b"RSET\r\nXCLIENT ADDR=192.0.2.%d\r\n" % number
                octets = EHLO
            elif mail.end in ("EHLO", "HELO", "STARTTLS"):
                octets += (b"HELO" if mail.end == "HELO" else b"EHLO") + EHLO[4:]
            elif mail.how == 0 and not mail.end:
                octets += b"RSET\r\n"
        yield octets + b"QUIT\r\n"


MAILS = st.builds(
    Mail,
    how=st.sampled_from((-1, -1, 0, 1, 1, 2, 5)),
    size=st.sampled_from(SIZES),
    spoiled=st.sampled_from(("", "", "", *SPOILED)),
    end=st.sampled_from(("", "", "", *ENDS)),
)
LARGE_THEN_SMALL = [Mail(size=3 * BIG, spoiled="long line"), Mail()]


def connected(machine: Machine, listener: int = 0) -> Connection:
    made = Connection(machine, machine.config.listener[listener])
    made.enter(machine.intake.client("127.0.0.1"))
    made.connection_made(Transport(machine.steps, made))  # type: ignore[arg-type]
    return made


def play(machine: Machine, flights: Iterator[bytes], random: Random, stop_at: int = -1, cuts: int = 4) -> Connection:
    """Send the flights in pieces, with turns of the loop between them. `stop_at`: the flight within which the client
    disconnects."""
    made = connected(machine)
    loop = machine.steps
    for number, flight in enumerate(flights):
        if number == stop_at:
            flight = flight[: random.randrange(len(flight))]
        edges = sorted({0, len(flight), *(random.randrange(len(flight) + 1) for _ in range(random.randrange(cuts)))})
        for start, end in pairwise(edges):
            transport = made.transport
            if transport is None:
                break
            assert isinstance(transport, Transport)
            transport.reads = random.random() < 0.7  # otherwise it reads a little later
            # After reading is paused, a piece may still arrive that TLS has decrypted already.
            late = random.random() < 0.3
            while transport.paused and not late and made.transport is transport:
                assert loop.step() or transport.owed, "reading is paused and nothing is left to wait for"
                if not loop.turns and not loop.threads and not loop.timers:
                    transport.read()
            if made.transport is transport and not transport.closing:
                made.data_received(flight[start:end])
            for _ in range(random.randrange(6)):
                loop.step()
        if number == stop_at and made.transport is not None:
            made.connection_lost(None) if random.random() < 0.5 else made.transport.close()
            break
        idle(made)
    idle(made)
    return made


def idle(made: Connection) -> None:
    """Run the loop until nothing is left to do and the client has read all replies."""
    while True:
        if made.admission.loop.step():  # type: ignore[attr-defined]
            continue
        transport = made.transport
        if not isinstance(transport, Transport) or not transport.owed:
            return
        transport.reads = True
        transport.read()


def checked(machine: Machine, made: Connection, script: Script, whole: bool, looks: bool) -> None:
    """Nothing but what was sent is stored, and no state is left."""
    taken = {mail.number: mail for mail in script.mails if mail.taken(looks)}
    found = [int(envelope.sender.partition("@")[0]) for envelope, _ in machine.stored]
    assert len(set(found)) == len(found) and set(found) <= set(taken)
    if whole:  # message data received at once needs no file, whatever its length: then a failing disk does not matter
        assert [number for number in found if taken[number].spoiled != "disk"] == [
            number for number, mail in taken.items() if mail.spoiled != "disk"
        ]
    for number, (envelope, data) in zip(found, machine.stored, strict=True):
        assert envelope.recipients == [f"{number}@d.example"] and envelope.size == len(data)
        mail = taken[number]
        assert data.endswith(mail.data())
        front = data[: -len(mail.data())]
        assert b"line of mail" not in front and b"Subject" not in front and front.count(b"Received: from") == 1
        signed = re.search(rb"X-Signed: (\d+)", front)
        assert signed is None or int(signed[1]) == len(mail.data())
        assert b" with %s id" % mail.protocol in front or b" with SMTP id" in front
    assert all(file.kept != file.discarded for file in machine.written)
    assert made.transport is None and not machine.held()


SETTINGS = {
    "limits": {"message_size": HUGE - 100},
    "network": [{"networks": ["127.0.0.1/32"], "xclient": True, "long_lines": False}],
    "intake": {"errors": 1000, "long_line_networks": []},
}


@settings(max_examples=3000 if PROVE else 100, deadline=None)
@given(mails=st.lists(MAILS, min_size=1, max_size=6), seed=st.integers(0, 1 << 32), way=st.sampled_from(("", "signs", "looks")))
@example(mails=LARGE_THEN_SMALL, seed=0, way="")
@example(mails=LARGE_THEN_SMALL, seed=0, way="looks")
@example(mails=[Mail(size=3 * BIG, spoiled="refused"), Mail(how=1, size=3 * BIG)], seed=0, way="looks")
@example(mails=[Mail(how=2, size=3 * BIG, end="STARTTLS"), Mail(how=1)], seed=0, way="signs")
@example(mails=[Mail(how=2, size=3 * BIG, end="RSET"), Mail(how=1)], seed=1, way="")
@example(mails=[Mail(how=2, size=3 * BIG, end="EHLO"), Mail(how=1)], seed=1, way="")
@example(mails=[Mail(size=3 * BIG, spoiled="disk"), Mail(size=3 * BIG)], seed=1, way="signs")
@example(mails=[Mail(size=3 * BIG, spoiled="commit"), Mail(how=2, size=3 * BIG)], seed=1, way="signs")
def test_a_transaction_holds_what_was_sent_in_it_and_leaves_nothing(mails, seed, way):
    random = Random(seed)
    relay = {"domains": ["d.example"], "networks": ["127.0.0.0/8"] if way == "signs" else []}
    machine = Machine(random, way == "signs", way == "looks", relay=relay, **SETTINGS)
    script = Script(mails)
    stop = random.randrange(4 * len(mails)) if random.random() < 0.3 else -1
    made = play(machine, script.flights(), random, stop)
    checked(machine, made, script, stop < 0 or stop >= len(list(script.flights())), way == "looks")


@settings(max_examples=5000 if PROVE else 200, deadline=None)
@given(
    mail=st.builds(
        Mail, how=st.sampled_from((-1, 1, 3)), size=st.just(3 * BIG), spoiled=st.sampled_from(tuple(SPOILED)), end=st.just("")
    ),
    cut=st.floats(0.5, 1),
    turns=st.integers(0, 12),
    seed=st.integers(0, 1 << 32),
    way=st.sampled_from(("", "signs", "looks")),
    closes=st.booleans(),
)
def test_a_client_that_disconnects_at_any_time_leaves_nothing(mail, cut, turns, seed, way, closes):
    random = Random(seed)
    relay = {"domains": ["d.example"], "networks": ["127.0.0.0/8"] if way == "signs" else []}
    machine = Machine(random, way == "signs", way == "looks", relay=relay, **SETTINGS)
    script = Script([mail])
    made = connected(machine)
    *before, last = script.flights()
    for flight in before:
        made.data_received(flight)
        idle(made)
    for piece in (last[: int(len(last) * cut) // 2], last[int(len(last) * cut) // 2 : int(len(last) * cut)]):
        made.data_received(piece)
        for _ in range(turns):
            machine.steps.step()
    if made.transport is not None:
        made.transport.close() if closes else made.connection_lost(None)
    idle(made)
    checked(machine, made, script, False, way == "looks")
