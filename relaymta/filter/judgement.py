"""What a filter is shown of a message, and what it says about it. One module a type of filter (clamd.py …) implements `Filter`;
chain.py asks them, and alone decides what their words mean."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

from relaymta.proto.edits import Edit

__all__ = [
    "PIECE", "Answer", "Condition", "FailureReason", "Filter", "FilterFailure", "FilterSession", "Follower", "Greeter", "Learner",
    "Mail",     "NewBody", "NewEnvelope", "Text", "Verdict", "gtube",
]  # fmt: skip

PIECE = 65536  # octets of message data that a filter gets at once

_GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-", b"STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"  # in two: this file is no spam

Condition = Literal["", "if permitted", "if rejected"]
FailureReason = Literal["connect", "timeout", "protocol", "refused", "oversize"]


class Verdict(IntEnum):
    """What is done with a message; of several filters' the greatest is."""

    ACCEPT = 0
    TAG = 1
    DISCARD = 2
    HOLD = 3
    TEMPFAIL = 4
    REJECT = 5

    @property
    def word(self) -> str:
        """As it is configured, logged and counted."""
        return self.name.lower()


class FilterFailure(Exception):
    """A filter said nothing that is a verdict. `reason`: connect (nobody answers there), timeout, protocol (an answer that makes
    no sense), refused (an answer that says that it cannot look), oversize (more than it takes). `own`: it is about this message
    alone: the filter is well, and others are asked."""

    def __init__(self, reason: FailureReason, text: str, own: bool = False) -> None:
        Exception.__init__(self, text)
        self.reason: FailureReason = reason
        self.own = own or reason in ("oversize", "refused")


class Text:
    """Message data as filters see it: our Authentication-Results, then the message as it came, without our Received. `head`: the
    header, with the empty line behind it if there is one; `size`: octets, all in all."""

    __slots__ = ("_body", "_octets", "_read", "head", "open", "size")

    def __init__(
        self, head: bytes, body: bytes = b"", octets: int = 0, read: Callable[[int, int], Awaitable[bytes]] | None = None,
        open: Callable[[], tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """`body`: what is behind the head, in memory; or `read(at, most)` gives it, `octets` in all, from a file, and `open()`,
        on a thread, a further descriptor of that, to read from only, and where in it the body begins."""
        self.head = head
        self.open = open
        self._body = body
        self._read = read
        self._octets = octets if read is not None else len(body)
        self.size = len(head) + self._octets

    def below(self, head: bytes) -> "Text":
        """The same body below another header."""
        return Text(head, self._body, self._octets, self._read, self.open)

    async def pieces(self, most: int | None = None, body_only: bool = False) -> AsyncIterator[bytes]:
        """The first `most` octets (None: all of them) in order, in pieces of at most PIECE octets, none of them empty; or, of
        these, those behind the header, in pieces of at most 65,535. OSError: a file cannot be read."""
        left, each = self.size if most is None else min(most, self.size), PIECE - body_only
        if body_only:
            left = max(left - len(self.head), 0)
        for part in (self._body,) if body_only else (self.head, self._body):
            for at in range(0, min(len(part), left), each):
                yield part[at : min(at + each, left)] if at or len(part) > min(each, left) else part
            left -= min(len(part), left)
        at = 0
        while self._read is not None and left > 0:
            piece = await self._read(at, min(each, left))
            if not piece:
                raise OSError("the file of the message is shorter than it was")
            yield piece
            at += len(piece)
            left -= len(piece)


class NewBody(Protocol):
    """What takes the body that a filter writes in place of a message's; see filter/rewritten.py."""

    octets: int  # so far
    eight_bit: bool  # they are not all ASCII

    async def write(self, piece: bytes) -> None:
        """More of it. OSError or StoreError: it cannot be written; FilterFailure: it is too large."""

    async def end(self) -> None:
        """That was all. As `write`."""

    def discard(self) -> None:
        """It is not used. Whatever is under way."""

    def text(self, head: bytes) -> Text:
        """The message with this body."""


@dataclass(slots=True)
class Mail:
    """A message that is judged. `client`: the client's address; `user`: who logged in, or "", and `mechanism`: how; `tls`:
    version and cipher, or ""; `listener`: its address; `parameters`: of MAIL, and `announced`: its SIZE, octets, 0: none;
    `protocol`: SMTP, ESMTP or LMTP; `dmarc`: the result, "": none; `application`: whose it is, or ""; `rewritten`: makes what
    takes a new body, None: there can be none; `most`: octets of the text that it gets (max_size where `oversize` is "head"),
    None: all."""

    ident: str
    sender: str
    recipients: Sequence[str]
    client: str
    helo: str
    user: str
    tls: str
    text: Text
    most: int | None = None
    mechanism: str = ""
    listener: str = ""
    parameters: tuple[str, ...] = ()
    announced: int = 0
    protocol: str = "ESMTP"
    dmarc: str = ""
    application: str = ""
    rewritten: Callable[[], NewBody] | None = None

    @property
    def octets(self) -> int:
        """How many octets of the text it gets."""
        return self.text.size if self.most is None else min(self.most, self.text.size)

    def head(self, octets: int) -> "Mail":
        """The same message, of which only so many octets are shown."""
        return replace(self, most=octets)


def gtube() -> Mail:
    """The message that every spam filter has to find, from a client elsewhere."""
    proof = Text(b"From: a@example.org\r\nSubject: GTUBE\r\n\r\n", b"".join(_GTUBE) + b"\r\n")
    return Mail("prove", "a@example.org", ["b@example.org"], "192.0.2.1", "localhost", "", "", proof)


class NewEnvelope(NamedTuple):
    """Changes to an envelope: one recipient that replaces all there are by then (None: they stay), recipients that are added and
    removed, in this order, and another sender (None: as it was)."""

    added: Sequence[str] = ()
    removed: Sequence[str] = ()
    sender: str | None = None
    only: str | None = None

    def joined(self, later: "NewEnvelope") -> "NewEnvelope":
        """With what the same filter wants later."""
        sender = self.sender if later.sender is None else later.sender
        only = self.only if later.only is None else later.only
        return NewEnvelope([*self.added, *later.added], [*self.removed, *later.removed], sender, only)


class Answer(NamedTuple):
    """What a filter says, in its own words. `word` is looked up in the filter's table of verdicts; `reason`: a virus's name, a
    rule, a sentence: printable, SHOWN characters at most. Changes that it wants: `edits` of the header, `body`, `envelope`;
    `dropped`: how many of its changes were none that can be made. `reply`: the SMTP reply that it wants a refusal to have, b"":
    none. `condition`: "if permitted": a refusal that holds only where no other filter refuses; "if rejected": no refusal, but
    `reply` (4xx) is said in place of another filter's 5xx. `note`: what it wants to have logged, "": nothing. `route`: the name
    of that which it wants the message to take, "": none."""

    word: str
    reason: str = ""
    score: float | None = None
    edits: Sequence[Edit] = ()
    body: NewBody | None = None
    envelope: NewEnvelope | None = None
    dropped: int = 0
    reply: bytes = b""
    condition: Condition = ""
    note: str = ""
    route: str = ""


class Learner(Protocol):
    """A filter that learns from messages that people have judged."""

    async def learn(self, text: Text, spam: bool) -> str:
        """Show it spam, or what is none: "learned" or "known already". FilterFailure: it does not learn; OSError: the text cannot
        be read."""


class Filter(Protocol):
    """A filter, as one worker uses it."""

    async def judge(self, mail: Mail) -> Answer:
        """Ask it. FilterFailure when there is no verdict. Cancelled (time is up, the client is gone): no connection that has half
        of a dialogue is used again."""

    async def probe(self) -> None:
        """Whether it answers: a question that costs it nothing. FilterFailure when it does not."""

    async def prove(self) -> str:
        """Show it what it must find (EICAR, GTUBE), and say what it found. FilterFailure when it does not find it."""

    def close(self) -> None:
        """Close what is open and idle. What is under way ends by itself, and closes its connection then."""


class FilterSession(Protocol):
    """A filter that follows the dialogue with one client. One question at a time; an Answer whose word is "continue" is none yet.
    Of each: FilterFailure; cancelled: as of `Filter.judge`. It is asked what `Follower.asks` names."""

    renew: Callable[[], None]  # called when it says that it is still at work
    decided: bool  # what it has said last is about all of the message: it is asked no more in this transaction

    async def mail(self, mail: Mail) -> Answer:
        """MAIL: a transaction begins. Any other word is about all of the message."""

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """RCPT. "reject" and "tempfail" are about this recipient, any other word about all of the message."""

    async def data(self, mail: Mail) -> Answer:
        """DATA, or the first BDAT: the envelope is complete. Any word is about all of the message."""

    def refused(self, address: str, answer: bytes) -> None:
        """A recipient was refused by the relay itself, with this reply."""

    async def judge(self, mail: Mail) -> Answer:
        """As of Filter. It may not have been told of the envelope before."""

    def reset(self) -> None:
        """The transaction is over."""

    def close(self) -> None:
        """The client has gone, or is another one. What is under way is cancelled, or ends by itself."""


class Greeter(FilterSession, Protocol):
    """A filter that is asked about clients, too, before they send anything."""

    async def client(self, verb: str, mail: Mail) -> Answer:
        """A client has connected ("CONNECT"), said its name ("HELO"), or logged in ("AUTH"); `mail` has no more than that.
        "reject" and "tempfail" refuse it; no other word than these and "continue"."""


class Follower(Filter, Protocol):
    """A filter that can follow a client."""

    alone: bool  # it may change what others look at: nobody is asked beside it
    asks: frozenset[
        str
    ]  # of "MAIL", "RCPT" and "DATA", of a Greeter "CONNECT", "HELO" and "AUTH", too: when its sessions are asked
    begins: bool  # its sessions begin with the connection, not with the first MAIL
    looks: bool  # they are asked about the message, too

    def session(self, client: str) -> FilterSession:
        """For a new client, of which the address is known."""
