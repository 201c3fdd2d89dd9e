"""What a filter is shown of a message, and what it says about it. One module a type of filter (clamd.py …) implements `Filter`;
chain.py asks them, and alone decides what their words mean."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol

from relaymta.proto.edits import Edit

__all__ = ["PIECE", "Answer", "FailureReason", "Filter", "FilterFailure", "Learner", "Mail", "Text", "Verdict", "gtube"]

PIECE = 65536  # octets of message data that a filter gets at once

_GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-", b"STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"  # in two: this file is no spam

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
    no sense), refused (an answer that says that it cannot look), oversize (more than it takes)."""

    def __init__(self, reason: FailureReason, text: str) -> None:
        Exception.__init__(self, text)
        self.reason: FailureReason = reason


class Text:
    """Message data as filters see it: our Authentication-Results, then the message as it came, without our Received. `head`: the
    header, with the empty line behind it if there is one; `size`: octets, all in all."""

    __slots__ = ("_body", "_read", "head", "size")

    def __init__(
        self, head: bytes, body: bytes = b"", octets: int = 0, read: Callable[[int, int], Awaitable[bytes]] | None = None
    ) -> None:
        """`body`: what is behind the head, in memory; or `read(at, most)` gives it, `octets` in all, from a file."""
        self.head = head
        self._body = body
        self._read = read
        self.size = len(head) + (octets if read is not None else len(body))

    async def pieces(self, most: int | None = None) -> AsyncIterator[bytes]:
        """The first `most` octets (None: all of them) in order, in pieces of at most PIECE octets, none of them empty. OSError: a
        file cannot be read."""
        left = self.size if most is None else min(most, self.size)
        for part in (self.head, self._body):
            for at in range(0, min(len(part), left), PIECE):
                yield part[at : min(at + PIECE, left)] if at or len(part) > min(PIECE, left) else part
            left -= min(len(part), left)
        at = 0
        while self._read is not None and left > 0:
            piece = await self._read(at, min(PIECE, left))
            if not piece:
                raise OSError("the file of the message is shorter than it was")
            yield piece
            at += len(piece)
            left -= len(piece)


@dataclass(slots=True)
class Mail:
    """A message that is judged. `client`: the client's address; `user`: who logged in, or ""; `tls`: version and cipher, or "";
    `most`: octets of the text that this filter gets (its max_size where `oversize` is "head"), None for all."""

    ident: str
    sender: str
    recipients: Sequence[str]
    client: str
    helo: str
    user: str
    tls: str
    text: Text
    most: int | None = None

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


class Answer(NamedTuple):
    """What a filter says, in its own words. `word` is looked up in the filter's table of verdicts; `reason`: a virus's name, a
    rule, a sentence: printable, SHOWN characters at most; `edits`: changes to the header that it wants."""

    word: str
    reason: str = ""
    score: float | None = None
    edits: Sequence[Edit] = ()


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
