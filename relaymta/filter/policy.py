"""Policy services: what speaks Postfix's policy protocol (proto/policy.py), over connections that are kept for the next question.

A connection has one question at a time, and is used again only after a whole reply. Nothing in a reply says to which question it
is: what says more than it was asked, or was not waited for, is closed. A connection that was kept and turns out to be closed
before there is any octet of a reply, is replaced by a new one, once: services end those that are idle.
"""

import asyncio
import contextlib
import select
from collections.abc import Callable, Sequence
from typing import Final, cast

from relaymta.config import parse_hostport
from relaymta.filter.judgement import Answer, Condition, FilterFailure, Mail, NewEnvelope, Text
from relaymta.filter.reach import Unreached, check_address, reach
from relaymta.proto import policy
from relaymta.proto.policy import Action

__all__ = ["IDLE", "IDLE_MOST", "Policy"]

IDLE: Final = 10.0  # seconds that a connection is kept for the next question
IDLE_MOST: Final = 16  # connections that are kept
SKIPPED: Final = 5.0  # seconds for which an address that failed is asked only if the others fail, too
REASON_MOST: Final = 200

_STATES: Final = {"rcpt": "RCPT", "data": "DATA", "message": "END-OF-MESSAGE"}
_MEANING: Final = {
    "REJECT": "REJECT", "5xx": "REJECT", "DEFER": "DEFER", "DEFER_IF_PERMIT": "DEFER", "4xx": "DEFER", "HOLD": "HOLD",
    "DISCARD": "DISCARD",
}  # fmt: skip
_CONDITIONS: Final[dict[str, Condition]] = {"DEFER_IF_PERMIT": "if permitted", "DEFER_IF_REJECT": "if rejected"}
_STRICTNESS: Final = ("DUNNO", "DISCARD", "HOLD", "DEFER", "REJECT")


class _Lost(FilterFailure):
    """A connection was closed before there was any octet of a reply to what was asked."""


class _Connection(asyncio.Protocol):
    """`ended`: it cannot be used any more."""

    def __init__(self, place: "_Place") -> None:
        self.place = place
        self.ended = False
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._replies = policy.Replies()
        self._failure: FilterFailure | None = None
        self._action: asyncio.Future[Action] | None = None  # to what was asked last

    async def ask(self, request: bytes) -> Action:
        """Ask, and wait for the reply. FilterFailure. To be dropped after that, or when it is cancelled."""
        if self.ended or self._transport is None:
            raise self._failure or self._lost()
        action: asyncio.Future[Action] = asyncio.get_running_loop().create_future()
        self._action = action
        self._transport.write(request)
        return await action

    def is_quiet(self) -> bool:
        """Whether there is nothing to be read, and it is open: what has come since it was used, and was not read yet, would be
        taken for the next answer."""
        if self.ended or self._transport is None:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def drop(self) -> None:
        """Close it now, whatever is under way."""
        self.ended = True
        if self._action is not None and not self._action.cancel() and not self._action.cancelled():
            self._action.exception()  # nobody else will ask for it
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self.ended:
            self._transport.abort()
            return
        self.place.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        asked = self._action if self._action is not None and not self._action.done() else None
        actions = self._replies.feed(data)
        if asked is not None and actions:
            asked.set_result(actions.pop(0))
            asked = None
        if self._replies.error is not None:
            name, error = self.place.name, self._replies.error
            self._fail(FilterFailure("protocol", f"{name}: answers, but not as a policy service: {error}"))
        elif asked is None and (actions or self._replies.begun):
            self._fail(FilterFailure("protocol", f"{self.place.name}: says more than it was asked"))

    def eof_received(self) -> None:
        self._fail(self._lost())

    def connection_lost(self, exc: Exception | None) -> None:
        self.place.connections.discard(self)
        self._fail(self._lost())

    def _lost(self) -> FilterFailure:
        if begun := self._replies.begun:
            return FilterFailure("protocol", f"{self.place.name}: closes the connection within a reply: {policy.shown(begun)}")
        return _Lost("connect", f"{self.place.name}: closes the connection without a reply")

    def _fail(self, failure: FilterFailure) -> None:
        if self in self.place.idle:
            self.place.idle.remove(self)
        if self.ended:
            return
        self.ended = True
        self._failure = failure
        if self._action is not None and not self._action.done():
            self._action.set_exception(failure)
        if self._transport is not None:
            self._transport.abort()


class _Place:
    """An address, and the connections to it: all of them, and those that are idle, the one used last at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped_until = 0.0  # loop time
        self.connections: set[_Connection] = set()
        self.idle: list[_Connection] = []
        check_address(name)

    def kept(self) -> _Connection | None:
        """A connection that can be used again."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_quiet():
                return connection
            connection.drop()
        return None

    async def connect(self, timeout: float) -> _Connection:
        """A new connection, within `timeout` seconds. Unreached."""
        made = _Connection(self)
        try:
            return await reach(self.name, lambda: made, timeout)
        except BaseException:
            made.drop()
            self.connections.discard(made)  # uvloop does not tell of the end of one that is given up as it is connected
            raise


class Policy:
    """A judgement.Follower. Its words: DUNNO (whatever it says that is neither of the others), REJECT, DEFER, HOLD, DISCARD."""

    alone, begins = False, False

    def __init__(self, addresses: Sequence[str], timeout: float, hostname: str, stage: str) -> None:
        """`addresses`: "unix:/path", "host:port" or "[::1]:port"; the first that is up is asked. `timeout`: seconds for a
        connection, and for all of probe() and prove(); how long all else may take is its caller's to say. `hostname`: ours.
        `stage`: "rcpt", "data" or "message": when it is asked. ValueError: an address is none."""
        self.stage = stage
        self.asks = frozenset({stage.upper()}) if stage != "message" else frozenset[str]()
        self.looks = stage == "message"
        self._state = _STATES[stage]
        self._places = [_Place(address) for address in addresses]
        self._timeout = timeout
        self._hostname = hostname
        self._closed = False
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Connections that there are, idle or not."""
        return sum(len(place.connections) for place in self._places)

    def session(self, client: str) -> "_Session":
        """As in judgement.Follower."""
        return _Session(self)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: a message of a client that is not followed. What is asked about recipients is asked about each
        of them, and the strictest answer is that of the message."""
        return await self.session(mail.client).judge(mail)

    async def question(self, mail: Mail, instance: str, address: str | None = None) -> Answer:
        """Ask about a message or one of its recipients. FilterFailure; cancelled: the connection is closed."""
        return _answer_of(await self._ask(policy.request(_attributes(mail, self._state, instance, address))), address)

    async def probe(self) -> None:
        """As in judgement.Filter: whether it can be connected to. Services count what they are asked."""
        try:
            async with asyncio.timeout(self._timeout):
                (await self._connect())[0].drop()
        except TimeoutError:
            raise self._late() from None

    async def prove(self) -> str:
        """As in judgement.Filter: whether what it answers to a question about nobody's mail makes sense."""
        mail = Mail("prove", "", (), "192.0.2.1", self._hostname, "", "", Text(b""))
        about = policy.request(_attributes(mail, "RCPT", "prove", f"postmaster@{self._hostname}"))
        try:
            async with asyncio.timeout(self._timeout):
                action = await self._ask(about)
        except TimeoutError:
            raise self._late() from None
        if action.word not in policy.WORDS:
            raise FilterFailure("protocol", f"{self._names()}: answers '{action.word}', which is no action")
        return f"a policy service that answers {action.code or action.word}"

    def close(self) -> None:
        """As in judgement.Filter."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for place in self._places:
            for connection in place.idle:
                connection.drop()
            place.idle.clear()

    def _late(self) -> FilterFailure:
        return FilterFailure("timeout", f"{self._names()}: no answer within {self._timeout:g} s")

    def _names(self) -> str:
        return ", ".join(place.name for place in self._places)

    async def _ask(self, request: bytes) -> Action:
        """What is answered at the first address that can be connected to. FilterFailure."""
        connection, is_kept = await self._connect(kept=True)
        if is_kept:
            with contextlib.suppress(_Lost):
                return await self._ask_on(connection, request, is_kept)
            connection, _ = await self._connect()
        return await self._ask_on(connection, request)

    async def _connect(self, kept: bool = False) -> tuple[_Connection, bool]:
        """A connection to the first address that is up, and whether it is a kept one: `kept`: it may be. FilterFailure. An
        address that fails, or is so slow that the caller's time is up, is the last to be tried for SKIPPED seconds. Then one
        question finds out whether it is up again: others do not wait for that."""
        now = asyncio.get_running_loop().time
        began, failures = now(), []
        for place in self._places if len(self._places) == 1 else sorted(self._places, key=lambda one: one.skipped_until > began):
            if kept and (connection := place.kept()) is not None:
                return connection, True
            began = now()
            if place.skipped_until:
                place.skipped_until = began + max(SKIPPED, self._timeout)
            try:
                connection = await place.connect(self._timeout)
            except Unreached as failure:
                place.skipped_until = now() + SKIPPED
                failures.append(failure)
            except asyncio.CancelledError:
                if now() - began > self._timeout / 2:
                    place.skipped_until = now() + SKIPPED
                raise
            else:
                return connection, False
        raise FilterFailure(failures[0].reason, "; ".join(map(str, failures)))

    async def _ask_on(self, connection: _Connection, request: bytes, is_kept: bool = False) -> Action:
        """Ask; whatever else than a reply becomes of it, the connection is closed."""
        place, now = connection.place, asyncio.get_running_loop().time
        began = now()
        try:
            action = await connection.ask(request)
        except BaseException as error:
            connection.drop()
            late = isinstance(error, asyncio.CancelledError) and now() - began > self._timeout / 2
            if late or (isinstance(error, FilterFailure) and not (is_kept and isinstance(error, _Lost))):
                place.skipped_until = now() + SKIPPED
            raise
        place.skipped_until = 0.0
        if self._closed:
            connection.drop()
        elif not connection.ended:
            self._keep(connection)
        return action

    def _keep(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        if sum(len(place.idle) for place in self._places) >= IDLE_MOST:
            connection.drop()
            return
        connection.idle_since = loop.time()
        connection.place.idle.append(connection)
        if self._sweeping is None:
            self._sweeping = loop.call_later(IDLE, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle for IDLE, and come back for the next."""
        self._sweeping = None
        loop = asyncio.get_running_loop()
        for place in self._places:
            while place.idle and place.idle[0].idle_since + IDLE <= loop.time():
                place.idle.pop(0).drop()
        waiting = [place.idle[0].idle_since for place in self._places if place.idle]
        if waiting:
            self._sweeping = loop.call_at(min(waiting) + IDLE, self._sweep)


class _Session:
    """A judgement.FilterSession. `_instance`: of the transaction's questions, by which a service knows that they are about one
    message; "": none was asked yet."""

    def __init__(self, filter: Policy) -> None:
        self.renew: Callable[[], None] = lambda: None
        self.decided = False
        self._filter = filter
        self._instance = ""

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession; it is not asked."""
        return Answer("continue")

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As in judgement.FilterSession. What holds a message does not say what becomes of its other recipients."""
        answer = await self._ask(mail, address)
        self.decided = answer.word == "DISCARD"
        return answer

    async def data(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession."""
        answer = await self._ask(mail)
        self.decided = True
        return answer

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter."""
        if self._filter.stage != "rcpt":
            return await self.data(mail)
        answers = [await self._ask(mail, address) for address in mail.recipients]
        self.decided = True
        return _together(answers)

    async def _ask(self, mail: Mail, address: str | None = None) -> Answer:
        self.decided = False
        self._instance = self._instance or mail.ident
        return await self._filter.question(mail, self._instance, address)

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""

    def reset(self) -> None:
        """As in judgement.FilterSession."""
        self.decided = False
        self._instance = ""

    def close(self) -> None:
        """As in judgement.FilterSession: connections are the filter's."""


def _attributes(mail: Mail, state: str, instance: str, address: str | None) -> list[tuple[str, str]]:
    """As Postfix tells them, in its order; what is not known here is "unknown" or "", as it has it. `address`: the recipient that
    is asked about, None: all of them are."""
    host, port = parse_hostport(mail.listener) if mail.listener else ("", 0)
    words = mail.tls.split()  # "using TLSv1.3 with cipher NAME (256/256 bits)"
    version, cipher, bits = (words[1], words[4], words[5].strip("(").partition("/")[0]) if len(words) >= 7 else ("", "", "")
    recipient = address if address is not None else mail.recipients[0] if len(mail.recipients) == 1 else ""
    count = len(mail.recipients) if address is None else 0
    size = mail.text.size if state == "END-OF-MESSAGE" else mail.announced
    return [
        ("request", "smtpd_access_policy"), ("protocol_state", state), ("protocol_name", mail.protocol),
        ("client_address", mail.client), ("client_name", "unknown"), ("client_port", ""), ("reverse_client_name", "unknown"),
        ("server_address", host), ("server_port", str(port or "")), ("helo_name", mail.helo), ("sender", mail.sender),
        ("recipient", recipient), ("recipient_count", str(count)), ("queue_id", mail.ident), ("instance", instance),
        ("size", str(size)), ("etrn_domain", ""), ("stress", ""), ("sasl_method", mail.mechanism), ("sasl_username", mail.user),
        ("sasl_sender", ""), ("ccert_subject", ""), ("ccert_issuer", ""), ("ccert_fingerprint", ""),
        ("ccert_pubkey_fingerprint", ""), ("encryption_protocol", version), ("encryption_cipher", cipher),
        ("encryption_keysize", bits or "0"), ("policy_context", ""),
    ]  # fmt: skip


def _answer_of(action: Action, address: str | None) -> Answer:
    """What an action means, for a recipient (None: for all of the message)."""
    word = _MEANING.get(action.word, "DUNNO")
    reason = action.text[:REASON_MOST]
    if word in ("REJECT", "DEFER") or action.word == "DEFER_IF_REJECT":
        reply, condition = policy.refusal(action, address), _CONDITIONS.get(action.word, "")
        return Answer(word, reason, reply=reply, condition=condition)
    answer = Answer(word, reason)
    shown = f"{action.word} '{action.text}'"[:REASON_MOST]
    match action.word:
        case "OK" | "DUNNO" | "HOLD" | "DISCARD":
            return answer
        case "WARN" | "INFO":
            return answer._replace(note=reason or f"says {action.word}")
        case "PREPEND":
            found = policy.field(action.text)
            return answer._replace(edits=(found,)) if found is not None else _dropped(answer, f"says {shown}, which is no field")
        case "REDIRECT" | "BCC":
            found_address = policy.recipient(action.text)
            if found_address is None:
                return _dropped(answer, f"says {shown}, which is no address")
            only = action.word == "REDIRECT"
            return answer._replace(envelope=NewEnvelope(only=found_address) if only else NewEnvelope(added=[found_address]))
        case "FILTER":
            return _dropped(answer, f"says {shown}: there is no way to name a route")
    return answer._replace(note=f"says '{action.word}', which is no action: taken for DUNNO")


def _together(answers: Sequence[Answer]) -> Answer:
    """The strictest answer, or the first of those, with the changes of all."""
    envelopes = [one.envelope for one in answers if one.envelope is not None]
    only = [one.only for one in envelopes if one.only is not None]
    added = [address for one in envelopes for address in one.added]
    return max(answers, key=lambda one: _STRICTNESS.index(one.word), default=Answer("DUNNO"))._replace(
        edits=[edit for one in answers for edit in one.edits],
        envelope=NewEnvelope(added, only=only[-1] if only else None) if envelopes else None,
        dropped=sum(one.dropped for one in answers),
        note="; ".join(dict.fromkeys(one.note for one in answers if one.note))[:REASON_MOST],
    )


def _dropped(answer: Answer, note: str) -> Answer:
    """What it wants cannot be done."""
    return answer._replace(dropped=1, note=note)
