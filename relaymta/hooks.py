"""What hooks in Python are given and may answer: import it in the file of a `[[filter]]` of type "python".

    from relaymta.hooks import Client, Mail, Verdict, reject

    async def on_connect(client: Client) -> Verdict | None: ...

docs/hooks.md has all of them. The records are frozen, so that hooks can be tested by calling them.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, TypeVar, cast

__all__ = [
    "Add", "AddRecipient", "Attempt", "Body", "Change", "Client", "Envelope", "Header", "Mail", "Remove", "RemoveRecipient",
    "Replace", "Results", "SetSender", "Verdict", "Word", "accept", "discard", "hold", "reject", "tag", "tempfail", "wants_body",
]  # fmt: skip

Word = Literal["accept", "tag", "hold", "discard", "tempfail", "reject"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Client:
    """Who has connected. `helo`: what it calls itself, "" before it has said so; `user`: who has logged in, or "", and
    `mechanism`: how; `application`: whose mail it is, or ""; `tls`: version and cipher, or ""; `listener`: the address at which
    it has connected; `protocol`: SMTP, ESMTP or LMTP."""

    address: str = "192.0.2.1"
    helo: str = ""
    user: str = ""
    mechanism: str = ""
    application: str = ""
    tls: str = ""
    listener: str = ""
    protocol: str = "ESMTP"


@dataclass(frozen=True, slots=True)
class Envelope:
    """For whom a message is. `sender`: "" is the null sender; `recipients`: those that were accepted so far; `parameters`: of
    MAIL, as they came; `size`: octets that the client has announced, 0: none."""

    sender: str = ""
    recipients: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    size: int = 0


@dataclass(frozen=True, slots=True)
class Results:
    """What verification has found. `dmarc`: "pass", "fail", "none" ..., "": the message was not verified. The whole is in the
    header: Authentication-Results."""

    dmarc: str = ""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a message as it is shown to filters. `octets`: all of it."""

    octets: bytes = b""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(name, value) of each field, unfolded, in UTF-8 with U+FFFD for other octets; encoded words are left as they are."""
        from relaymta.proto.hook import fields  # for hooks that look at fields

        return iter(fields(self.octets)[0])

    def all(self, name: str) -> list[str]:
        """The values of all fields of a name, whatever its case."""
        wanted = name.lower()
        return [value for known, value in self if known.lower() == wanted]

    def get(self, name: str, default: str = "") -> str:
        """The value of the first field of a name."""
        return next(iter(self.all(name)), default)


class Body:
    """What is behind the header, for hooks that want it (`wants_body`). It is read from a descriptor, which is closed when the
    hook returns. `size`: octets that are shown (filter.max_size where `oversize` is "head")."""

    __slots__ = ("_at", "_descriptor", "size")

    def __init__(self, descriptor: int, at: int, size: int) -> None:
        """It lies in a file of this descriptor, from `at` on."""
        self._descriptor = descriptor
        self._at = at
        self.size = size

    def open(self) -> BinaryIO:
        """A file to read it from, which begins anew with each call."""
        return cast(BinaryIO, io.BufferedReader(_Part(self._descriptor, self._at, self.size), 65536))

    def read(self) -> bytes:
        """All of it, in memory."""
        return self.open().read()


class _Part(io.RawIOBase):
    """A part of a file, whose own position is not used: others have the same descriptor."""

    def __init__(self, descriptor: int, at: int, size: int) -> None:
        self._descriptor = descriptor
        self._begin, self._at, self._end = at, at, at + size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: self._begin, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        self._at = max(base + offset, self._begin)
        return self._at - self._begin

    def tell(self) -> int:
        return self._at - self._begin

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        found = os.pread(self._descriptor, max(min(len(view), self._end - self._at), 0), self._at)
        view[: len(found)] = found
        self._at += len(found)
        return len(found)


@dataclass(frozen=True, slots=True)
class Mail:
    """A message. `id`: as in the log; `size`: octets, header and body; `body`: None unless the hook wants it."""

    id: str = ""
    client: Client = field(default_factory=Client)
    envelope: Envelope = field(default_factory=Envelope)
    results: Results = field(default_factory=Results)
    header: Header = field(default_factory=Header)
    size: int = 0
    body: Body | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What has come of an attempt to deliver a message to some of its recipients. `result`: delivered, deferred or bounced;
    `route`: by which; `peer`: the host that has answered, or ""; `reply`: what it said, or why nobody did; `phase`: mail, rcpt,
    data, dot ..., of what was not delivered; `attempt`: the first is 1; `delay`: seconds since it was accepted; `next`: when a
    deferred one is tried again (seconds since 1970), else 0."""

    id: str = ""
    sender: str = ""
    recipients: tuple[str, ...] = ()
    application: str = ""
    result: Literal["delivered", "deferred", "bounced"] = "delivered"
    route: str = ""
    peer: str = ""
    reply: str = ""
    phase: str = ""
    attempt: int = 1
    delay: float = 0.0
    next: float = 0.0


# What a verdict about a message may change, where filter.may says so


@dataclass(frozen=True, slots=True)
class Add:
    """A new field, in front of the others; with `last` behind them."""

    name: str
    value: str
    last: bool = False


@dataclass(frozen=True, slots=True)
class Replace:
    """The value of the n-th field of a name; where there are fewer, a new field."""

    name: str
    value: str
    instance: int = 1


@dataclass(frozen=True, slots=True)
class Remove:
    """The n-th field of a name, or (None) all of them."""

    name: str
    instance: int | None = None


@dataclass(frozen=True, slots=True)
class AddRecipient:
    """A further recipient."""

    address: str


@dataclass(frozen=True, slots=True)
class RemoveRecipient:
    """One less."""

    address: str


@dataclass(frozen=True, slots=True)
class SetSender:
    """Another envelope sender; "": the null sender."""

    address: str


Change = Add | Replace | Remove | AddRecipient | RemoveRecipient | SetSender


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a hook says. `reason`: for the log, and for the reply where that is not given; `reply`: a whole reply to what is
    refused, such as "550 5.7.1 Not here", "": as `filters.reply` has it; `score`: for the log; `changes`: of the message."""

    word: Word
    reason: str = ""
    reply: str = ""
    score: float | None = None
    changes: tuple[Change, ...] = ()


def accept(*changes: Change, reason: str = "") -> Verdict:
    """It passes, with these changes. (None says the same as `accept()`.)"""
    return Verdict("accept", reason, changes=changes)


def tag(reason: str = "", *changes: Change, score: float | None = None) -> Verdict:
    """It passes with the fields of `filters.tag`."""
    return Verdict("tag", reason, score=score, changes=changes)


def hold(reason: str = "", *changes: Change) -> Verdict:
    """The client hears 250, and the message is held."""
    return Verdict("hold", reason, changes=changes)


def discard(reason: str = "") -> Verdict:
    """The client hears 250, and the message is gone."""
    return Verdict("discard", reason)


def tempfail(reason: str = "", reply: str = "") -> Verdict:
    """The client is to try again: 451, or the 4xx of `reply`."""
    return Verdict("tempfail", reason, reply)


def reject(reason: str = "", reply: str = "") -> Verdict:
    """The client is refused: as `filters.reply` has it, or with the 5xx of `reply`."""
    return Verdict("reject", reason, reply)


def wants_body(hook: F) -> F:
    """Decorates an `on_message` or `choose_route` that reads `mail.body`. Setting `hook.wants_body = True` does the same."""
    hook.wants_body = True  # type: ignore[attr-defined]
    return hook
