"""Milters: filters that speak the milter protocol of Sendmail and Postfix (proto/milter.py), over one connection for each client.

A filter is told what the client says as late as possible, and all at once: CONNECT, HELO and MAIL at MAIL, then each RCPT, and
the rest, from DATA on, behind the final dot. It is not waited for in between. What it has to know is known here, so that another
connection can be told: where one is lost before the last answer, the message is shown once more, on a new one.

State of a session, all of it changed on the loop, by the one question that is under way, or by `reset` and `close`: `_link`, the
connection; `_over`, what the filter has said of this client, whatever it sends; `_refused`, recipients of the message that the
relay has refused, of which it may want to be told. What a connection has been told of is in `_Link`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple, TypeVar, cast

from relaymta import __version__
from relaymta.config import parse_hostport
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewBody, NewEnvelope
from relaymta.filter.reach import Unreached, check_address, reach
from relaymta.proto import milter, reply
from relaymta.proto.address import domain_of
from relaymta.proto.milter import Piece, Progress, Said

__all__ = ["Milter"]

SKIPPED = 5.0  # seconds for which an address that failed is asked only if the others fail, too
TOGETHER = 65536  # octets in one write
WAITING = 4  # pieces of a new body that wait to be written, until no more are read
KEPT = 1000  # recipients that were refused, of which it is told, or known that it was told
REASON_MOST = 200

_REFUSED_RECIPIENTS: Final = 0x800  # a step (SMFIP_RCPT_REJ): it wants to be told of them
_ACTIONS = (
    (0x1 | 0x10, "header"), (0x2, "body"), (0x4 | 0x8 | 0x80, "recipients"), (0x40, "sender"), (0x20, "quarantine"),
)  # fmt: skip

T = TypeVar("T")


class _Lost(FilterFailure):
    """The connection ends, where another one might do."""


class _Client(NamedTuple):
    """What a filter is told of a client before the first message."""

    address: str
    helo: str
    tls: str
    listener: str

    @classmethod
    def of(cls, mail: Mail) -> "_Client":
        """The sender of a message."""
        return cls(mail.client, mail.helo, mail.tls, mail.listener)


class _Link(asyncio.Protocol):
    """A connection, and what the filter has been told over it: `client`, None: nothing; whether there is a message under way, and
    of this the recipients `told`, which the first `seen` of the message are; `asked`: those whose answer is due; `refused`: what
    it has said of some that another connection had let pass; `rejects`: of so many it was told that the relay refused them.
    `aborts`: it still has to be told that a message is over."""

    def __init__(self, name: str, links: "set[_Link]") -> None:
        """`links`: those that are open, this one among them then."""
        self.name = name
        self._links = links
        self.talk = milter.Conversation()
        self.ended = False
        self.client: _Client | None = None
        self.in_message = self.aborts = False
        self.told: set[str] = set()
        self.seen = 0
        self.asked: deque[str] = deque()
        self.refused: list[tuple[str, Said]] = []
        self.rejects = 0
        self.progress: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._events: list[Said | Piece | Progress] = []
        self._failure: FilterFailure | None = None
        self._heard: asyncio.Future[None] | None = None  # what waits for an answer, or to write
        self._full = self._paused = False

    def send(self, frames: Sequence[bytes]) -> None:
        """Write them. FilterFailure: it cannot be used any more."""
        self._check()
        assert self._transport is not None
        self._transport.writelines(frames)

    async def agreed(self) -> None:
        """Wait until the terms are agreed upon. FilterFailure."""
        while self.talk.terms is None:
            await self._wait()

    async def room(self) -> None:
        """Wait until more can be written, or nothing has to be. FilterFailure."""
        while self._full and self.talk.last is None:
            await self._wait()

    async def events(self) -> list[Said | Piece | Progress]:
        """What it has answered, after waiting for more if that is nothing yet: it may still be nothing. FilterFailure."""
        if not self._events:
            await self._wait()
        events, self._events = self._events, []
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return events

    @property
    def waits(self) -> bool:
        """Whether there are answers that nobody has got, or some are due."""
        return bool(self._events) or (bool(self.talk.due) and self.talk.last is None)

    def in_step(self) -> None:
        """FilterFailure: behind its answers it has said what nobody has asked for."""
        if self.talk.error is not None:
            self._check()

    def close(self) -> None:
        """It is not used any more; the filter is told so if it is not in the middle of anything."""
        if self._transport is None or self.ended or self.talk.due or self._transport.get_write_buffer_size():
            self.drop()
            return
        self._transport.write(self.talk.quit())
        self._transport.close()
        self._fail(_Lost("connect", f"{self.name}: closed"))

    def drop(self) -> None:
        """Close it now, whatever is under way."""
        self._fail(_Lost("connect", f"{self.name}: closed"))
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        self._check()
        heard = self._heard = asyncio.get_running_loop().create_future()
        await heard
        if not self._events:
            self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        if self._heard is not None and not self._heard.done():
            self._heard.set_result(None)

    def _fail(self, failure: FilterFailure) -> None:
        if not self.ended:
            self.ended = True
            self._links.discard(self)
            self._failure = failure
            self._wake()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.ended:
            self._transport.abort()
        else:
            self._links.add(self)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        for event in self.talk.feed(data):
            if isinstance(event, Progress):
                if self.progress is not None:
                    self.progress()
            else:
                self._events.append(event)
        # Only of pieces there may be any number. What else there is to read may be its last word.
        is_much = len(self._events) > WAITING and isinstance(self._events[-1], Piece)
        if is_much and self._transport is not None and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        if self.talk.error is not None:
            self._fail(FilterFailure("protocol", f"{self.name}: answers, but not as a milter: {self.talk.error}"))
            self.drop()
        self._wake()

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(_Lost("connect", f"{self.name}: closes the connection{self._where()}"))
        if self._transport is not None:
            self._transport.abort()

    def _where(self) -> str:
        if self.talk.terms is None:
            offered = f"version {milter.VERSION}, actions {milter.ACTIONS:#x}, steps {milter.STEPS:#x}"
            return f" when it is offered {offered}"
        return f" before it answers {self.talk.due[0]}" if self.talk.due else ""

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()


class Milter:
    """A judgement.Follower. Its words: accept, reject, tempfail, discard, quarantine."""

    alone, begins, looks = True, False, True

    def __init__(self, addresses: Sequence[str], timeout: float, hostname: str, stage: str = "mail") -> None:
        """`addresses`: "unix:/path", "host:port" or "[::1]:port"; the first that is up is asked. `timeout`: seconds for a
        connection; how long all else may take is its caller's to say. `hostname`: ours; `stage`: as configured. ValueError: an
        address is none."""
        self.asks = frozenset({"MAIL", "RCPT"}) if stage != "message" else frozenset[str]()
        for address in addresses:
            check_address(address)
        self._skipped_until = dict.fromkeys(addresses, 0.0)  # loop time, by address
        self._timeout = timeout
        self._links: set[_Link] = set()  # that are open
        self.hostname = hostname

    @property
    def open(self) -> int:
        """Connections that there are."""
        return len(self._links)

    def session(self, client: str = "") -> "_Session":
        """As in judgement.Follower."""
        return _Session(self)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: a message of a client that is not followed."""
        session = self.session()
        try:
            return await session.judge(mail)
        finally:
            session.close()

    async def probe(self) -> None:
        """As in judgement.Filter: what it wants is agreed upon."""
        (await self.connect()).close()

    async def prove(self) -> str:
        """As in judgement.Filter: whether it is a milter; there is no message that each of them finds."""
        link = await self.connect()
        terms = link.talk.terms
        link.close()
        assert terms is not None
        changes = ", ".join(self._changes(terms.actions)) or "nothing"
        return f"a milter of version {terms.version}, which may want to change: {changes}"

    async def wants(self) -> list[str]:
        """What it says that it may want to change, of what filter.may names. FilterFailure."""
        link = await self.connect()
        link.close()
        return [word for word in self._changes(link.talk.terms.actions if link.talk.terms else 0) if word != "quarantine"]

    def _changes(self, actions: int) -> list[str]:
        return [word for bits, word in _ACTIONS if actions & bits]

    def close(self) -> None:
        """As in judgement.Filter: what is open is that of sessions."""

    async def connect(self) -> _Link:
        """A new connection, to the first address that is up, over which all is agreed upon. FilterFailure."""
        now = asyncio.get_running_loop().time
        began, failures = now(), []
        for address in sorted(self._skipped_until, key=lambda one: self._skipped_until[one] > began):
            link = _Link(address, self._links)
            try:
                await reach(address, lambda made=link: made, self._timeout)  # type: ignore[misc]
                link.send([link.talk.negotiate()])
                await link.agreed()
            except (Unreached, _Lost) as failure:
                link.drop()
                self._skipped_until[address] = now() + SKIPPED
                failures.append(failure)
            except BaseException as error:
                link.drop()
                if isinstance(error, FilterFailure) or now() - began > self._timeout / 2:
                    self._skipped_until[address] = now() + SKIPPED
                raise
            else:
                self._skipped_until[address] = 0.0
                return link
        raise FilterFailure(failures[0].reason, "; ".join(map(str, failures)))


class _Session:
    """A judgement.FilterSession."""

    def __init__(self, filter: Milter) -> None:
        self.renew: Callable[[], None] = lambda: None
        self.decided = False
        self._filter = filter
        self._link: _Link | None = None
        self._over: tuple[_Client, Answer] | None = None
        self._refused: list[tuple[str, bytes]] = []
        self._closed = self._busy = False

    # What is asked

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession."""
        return await self._twice(mail, lambda: self._tell(mail, None))

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As in judgement.FilterSession."""
        return await self._twice(mail, lambda: self._tell(mail, address))

    async def data(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession: it is told of DATA with the message."""
        return _CONTINUE

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter."""
        return await self._twice(mail, lambda: self._judge(mail))

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""
        terms = self._link.talk.terms if self._link is not None else None
        if (terms is None or terms.steps & _REFUSED_RECIPIENTS) and len(self._refused) < KEPT:
            self._refused.append((address, answer))

    def reset(self) -> None:
        """As in judgement.FilterSession."""
        self.decided = False
        self._refused.clear()
        link = self._link
        if link is not None and link.in_message:
            link.in_message, link.aborts = False, True

    def close(self) -> None:
        """As in judgement.FilterSession."""
        self._closed = True
        link = self._link
        if link is not None and not self._busy:
            self._link = None
            link.close()

    # How

    async def _twice(self, mail: Mail, step: Callable[[], Awaitable[Answer]]) -> Answer:
        """Take a step; once more, on a new connection, where one is lost."""
        self.decided = False
        if self._over is not None and self._over[0] == _Client.of(mail):
            self.decided = True
            return self._over[1]
        try:
            return await self._safely(step)
        except _Lost:
            if self._closed:
                raise
        return await self._safely(step)

    async def _safely(self, step: Callable[[], Awaitable[Answer]]) -> Answer:
        """A connection over which a step was not taken to its end is not used again."""
        self._busy = True
        try:
            return await step()
        except BaseException:
            link, self._link = self._link, None
            if link is not None:
                link.drop()
            raise
        finally:
            self._busy = False
            if self._closed:
                self.close()

    async def _caught_up(self, mail: Mail) -> tuple[_Link, list[bytes]]:
        """A connection, and the frames by which the filter learns what it does not know yet of what is before DATA."""
        client, link = _Client.of(mail), self._link
        if link is not None and (link.ended or link.client != client):
            self._link = None
            link.close()
            link = None
        if link is None:
            link = self._link = await self._filter.connect()
        link.progress = self.renew
        talk, frames = link.talk, list[bytes]()
        if link.client is None:
            link.client = client
            told = _connect_macros(mail, self._filter.hostname)
            frames = [talk.connect(f"[{mail.client}]", mail.client, 0, told), talk.helo(mail.helo, _helo_macros(mail))]
        if link.aborts:
            link.aborts = False
            frames.append(talk.abort())
        if not link.in_message:
            link.in_message, link.seen, link.rejects = True, 0, 0
            link.told.clear()
            link.asked.clear()
            link.refused.clear()
            frames.append(talk.mail(mail.sender, mail.parameters, _mail_macros(mail)))
        frames += [self._recipient(link, one, one) for one in mail.recipients[link.seen :] if one not in link.told]
        link.seen = len(mail.recipients)
        if talk.terms is not None and talk.terms.steps & _REFUSED_RECIPIENTS:
            frames += [self._recipient(link, "", address, answer) for address, answer in self._refused[link.rejects :]]
            link.rejects = len(self._refused)
        return link, frames

    def _recipient(self, link: _Link, about: str, address: str, refused: bytes = b"") -> bytes:
        """RCPT of an address, whose answer is about a recipient, or "" for nobody: it was refused with that reply."""
        due = len(link.talk.due)
        frame = link.talk.rcpt(address, (), _refused_macros(refused) if refused else _rcpt_macros(address))
        if len(link.talk.due) > due:
            link.asked.append(about)
        if about:
            link.told.add(about)
        return frame

    async def _tell(self, mail: Mail, address: str | None) -> Answer:
        """MAIL, or RCPT of an address."""
        link, frames = await self._caught_up(mail)
        if address is not None:
            if len(link.told) > len(mail.recipients) + KEPT:  # those that it has refused may be without number
                link.told.intersection_update(mail.recipients)
            frames.append(self._recipient(link, address, address))
        link.send(frames)
        refused = await self._heard(link, None)
        link.refused += [one for one in refused if one[0] != address]
        if link.talk.last is not None:
            return self._final(link, link.talk.last)
        if address is None:
            return _CONTINUE
        mine = [said for one, said in refused if one == address]
        return _answer_of(mine[-1]) if mine else _CONTINUE

    async def _judge(self, mail: Mail) -> Answer:
        if self._link is not None:
            self._link.seen = 0  # other filters may have changed the recipients
        link, frames = await self._caught_up(mail)
        talk, told = link.talk, {"i": mail.ident}
        body = _Taken(mail.rewritten)
        try:
            frames += [talk.data(told), *talk.header(mail.text.head, told)]
            await self._show(link, frames, mail)
            refused = link.refused + await self._heard(link, body)
            last = talk.last
            if last is None:
                raise FilterFailure("protocol", f"{link.name}: says nothing of the message")
            answer = self._final(link, last)
            if answer.word in ("accept", "quarantine"):
                if refused:
                    answer = _refusal_of(refused)
                else:
                    return answer._replace(body=await body.ended(talk.changes.replaced))
            body.discard()
            return answer
        except BaseException:
            body.discard()
            raise

    async def _show(self, link: _Link, frames: list[bytes], mail: Mail) -> None:
        """Send frames, the body and the end of the message: until it has said its last word."""
        talk, octets = link.talk, sum(map(len, frames))
        async with aclosing(mail.text.pieces(mail.most, True)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                body = talk.body(piece)
                if not body:
                    break
                frames += body
                octets += len(piece)
                if octets >= TOGETHER:
                    link.send(frames)
                    frames, octets = [], 0
                    await link.room()
        if talk.last is not None:  # nothing more is due: nobody waits for what it would say to the end
            return
        frames.append(talk.end({"i": mail.ident}))
        link.send(frames)

    async def _heard(self, link: _Link, body: "_Taken | None") -> list[tuple[str, Said]]:
        """Wait for all answers that are due: which recipients are refused, and how."""
        refused = []
        while link.waits:
            for event in await link.events():
                if isinstance(event, Piece):
                    if body is not None:
                        await body.write(event.octets)
                elif isinstance(event, Said) and event.event == "R":
                    address = link.asked.popleft()
                    if address and event.word in ("reject", "tempfail"):
                        refused.append((address, event))
        link.in_step()
        return refused

    def _final(self, link: _Link, last: Said) -> Answer:
        """What its last word means."""
        talk, self.decided = link.talk, True
        if last.event == "E":
            link.in_message = False
            return _answer_of(last, talk.changes)
        answer = _answer_of(last)
        if last.event in ("C", "H") and link.client is not None:
            self._over = link.client, answer
        if talk.spent or last.event in ("C", "H"):
            self._link = None
            link.close()
        else:
            link.in_message, link.aborts = False, True
        return answer


class _Taken:
    """A new body, from its first piece on."""

    def __init__(self, make: Callable[[], NewBody] | None) -> None:
        self._make = make
        self._body: NewBody | None = None

    async def write(self, piece: bytes) -> None:
        if self._body is None and self._make is not None:
            self._body = self._make()
        if self._body is not None:
            await self._body.write(piece)

    async def ended(self, replaced: bool) -> NewBody | None:
        """All of it, None: there is none. `replaced`: there is one, though it may be empty."""
        if self._body is None and replaced and self._make is not None:
            self._body = self._make()
        if self._body is not None:
            await self._body.end()
        return self._body

    def discard(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.discard()


_CONTINUE: Final = Answer("continue")
_WORDS = {"continue": "accept", "shutdown": "tempfail", "conn_fail": "tempfail"}


def _answer_of(said: Said, changes: "milter.Changes | None" = None) -> Answer:
    """A last word, or one about a recipient."""
    word = _WORDS.get(said.word, said.word)
    reason = " ".join(said.reply.decode().split("\r\n")).strip()[:REASON_MOST]
    if changes is None or word != "accept":
        return Answer(word, reason, reply=said.reply)
    if changes.quarantine is not None:
        word, reason = "quarantine", changes.quarantine
    envelope = None
    if changes.added or changes.removed or changes.sender is not None:
        sender = changes.sender[0] if changes.sender is not None else None
        envelope = NewEnvelope([address for address, _ in changes.added], changes.removed, sender)
    return Answer(word, reason, None, changes.edits, None, envelope, changes.dropped)


def _refusal_of(refused: list[tuple[str, Said]]) -> Answer:
    """Of a message of which recipients are refused whose RCPT was answered before: the first one is named."""
    address, said = next((one for one in refused if one[1].word == "reject"), refused[0])
    first = said.reply.decode().split("\r\n")[0]
    if first:
        code, (enhanced, text) = first[:3], first[4:].split(" ", 1)
    else:
        code, enhanced, text = ("550", "5.7.1", "refused") if said.word == "reject" else ("451", "4.7.1", "not taken now")
    line = f"<{address}>: {text}".encode("ascii", "replace").decode()
    return Answer(said.word, f"{code} {enhanced} {line}"[:REASON_MOST], reply=reply.format_reply(int(code), enhanced, line[:450]))


# Macros, by the names of Sendmail (https://www.postfix.org/MILTER_README.html#macros)


def _connect_macros(mail: Mail, hostname: str) -> dict[str, str]:
    host, port = parse_hostport(mail.listener) if mail.listener else ("", 0)
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime())
    found = {"j": hostname, "_": f"[{mail.client}]", "v": f"relaymta {__version__}", "b": date, "{daemon_name}": mail.listener}
    if port:
        found |= {"{daemon_addr}": host, "{daemon_port}": str(port), "{if_addr}": host}
    return found | {"{client_addr}": mail.client}


def _helo_macros(mail: Mail) -> dict[str, str]:
    words = mail.tls.split()  # "using TLSv1.3 with cipher NAME (256/256 bits)"
    if len(words) < 7:
        return {}
    bits = words[5].strip("(").partition("/")[0]
    return {"{tls_version}": words[1], "{cipher}": words[4], "{cipher_bits}": bits}


def _mail_macros(mail: Mail) -> dict[str, str]:
    found = {"i": mail.ident, "{mail_addr}": mail.sender, "{mail_host}": domain_of(mail.sender), "{mail_mailer}": "smtp"}
    if mail.user:
        found |= {"{auth_type}": mail.mechanism or "PLAIN", "{auth_authen}": mail.user}
    return found


def _refused_macros(answer: bytes) -> dict[str, str]:
    """Of a recipient that was refused: as Sendmail has it, the reply in place of the address."""
    code, *more = answer.decode().strip().split(" ", 2)
    return {"{rcpt_mailer}": "error", "{rcpt_host}": more[0] if more else code, "{rcpt_addr}": more[-1] if more else ""}


def _rcpt_macros(address: str) -> dict[str, str]:
    return {"{rcpt_addr}": address, "{rcpt_host}": domain_of(address), "{rcpt_mailer}": "smtp"}
