"""Hooks in Python: functions of the operator's own that are asked at each stage of a dialogue, and told afterwards what becomes
of messages. docs/hooks.md.

They run in processes of their own (hookpool.py), or, with `isolation = "loop"`, on the event loop of the worker. What they say is
untrusted either way: verdicts, reasons and replies are checked here, changes where all filters' are.
"""

import asyncio
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from relaymta.filter.hookfile import BrokenFile, HookFile, declared
from relaymta.filter.hookframes import AFTERWARDS, CLIENT, ENVELOPE, HOOKS, MESSAGE, VERBS, Reply
from relaymta.filter.hookpool import WAIT, Failed, Pool
from relaymta.filter.judgement import Answer, FilterFailure, Mail, NewEnvelope
from relaymta.hooks import Body
from relaymta.proto import reply
from relaymta.proto.hook import Said, wanted
from relaymta.proto.printable import printable

if TYPE_CHECKING:
    from relaymta.filter.hookpool import Version
    from relaymta.filter.means import HookMeans

__all__ = ["Hooks", "lent"]

REASON_MOST: Final = 200  # characters
REPLY_MOST: Final = 450  # octets of a reply
PLACES_MOST: Final = 100  # places of exceptions of which it is remembered when they were logged
TRACEBACK_EVERY: Final = 60.0  # seconds
WHOLE: Final = 1 << 20  # octets of a body that are copied into memory on the event loop; of others a file is lent
EVENTS_MOST: Final = 1000  # that wait to be told; more are dropped
EVENTS_AT_ONCE: Final = 8

_CONTINUE: Final = Answer("continue")
_ACCEPT: Final = Answer("accept")
_STRICTNESS: Final = ("accept", "tag", "discard", "hold", "tempfail", "raised", "reject")
_REPLY: Final = re.compile(r"([45])\d\d (\1\.\d{1,3}\.\d{1,3}) (\S.*)\Z", re.ASCII)
_REFUSALS: Final = {"tempfail": "4", "reject": "5"}
_OF_CLIENT: Final = frozenset({"accept", "tempfail", "reject", "raised"})  # all that can be done before there is a message
# Which words of a reply make sense.
_MAY_SAY: Final = (
    dict.fromkeys((*CLIENT, *ENVELOPE, "on_message"), frozenset({"none", *_STRICTNESS}))
    | dict.fromkeys(AFTERWARDS, frozenset({"none", "raised"}))
    | {"choose_route": frozenset({"none", "route", "raised"})}
)
_RAISED: Final = reply.format_reply(451, "4.3.0", "Internal error; try again later")


class InLoop:
    """The hooks of a file in this process, with the face of a pool and its one version."""

    def __init__(self, path: str, seconds: float, listener: Any, name: str) -> None:
        self.path = path
        self.seconds = seconds
        self.listener = listener
        self._name = name
        self.version: Any = None
        self._looking: asyncio.Future[Any] | None = None
        self._files: object = None
        self.held: Callable[[str], None] = lambda place: None
        self.open = 0

    def begin(self) -> None:
        """Import the file, unless that is done."""
        if self.version is None:
            self._import()

    def _import(self) -> None:
        try:
            self.version = _Here(HookFile(self.path, self._name))
        except BrokenFile as error:
            there = self.version is not None
            self.listener.warn(f"{error}" + ("; what was read before stays in use" if there else ""))
            if not there:
                self.version = _Here(None, str(error))
            return
        self.listener.changed(frozenset(self.version.hooks))

    async def call(self, version: Any, hook: str, arguments: list[Any], descriptor: int = -1) -> Reply:
        """As of Pool."""
        if version.file is None:
            raise Failed("connect", "unavailable", version.problem, False)
        body = None
        if descriptor >= 0:
            *arguments, part = arguments
            body = Body(descriptor, *part)
        if asyncio.current_task() is None:  # as of Guard
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(self.seconds):
                found: Reply = await version.file.call(1, hook, arguments, body)
                return found
        except TimeoutError:
            raise Failed("timeout", "timeout", f"{hook}: no answer in {self.seconds:g} s") from None

    def look(self) -> None:
        """As of Pool; the import blocks."""
        if self._looking is None and self.version is not None:
            paths = [path for path, *_ in self.version.files] or [self.path]
            self._looking = asyncio.get_running_loop().run_in_executor(None, _stamps, paths)
            self._looking.add_done_callback(self._looked)

    def _looked(self, future: "asyncio.Future[Any]") -> None:
        self._looking = None
        if future.cancelled() or future.exception() is not None:
            return
        found, before = future.result(), self._files or self.version.files
        if found != before:
            self._files = found
            self._import()

    def close(self) -> None:
        """As of Pool."""

    stop = close


class _Here:
    """A version in this process. `file`: None: it cannot be imported, for this `problem`."""

    known = True

    def __init__(self, file: HookFile | None, problem: str = "") -> None:
        self.file = file
        self.problem = problem
        self.hooks = frozenset[str]() if file is None else frozenset(file.hooks)
        self.bodies = frozenset[str]() if file is None else frozenset(file.bodies)
        self.files = () if file is None else tuple(file.files)

    def keep(self) -> None:
        """As of Version."""

    leave = keep


def _stamps(paths: Sequence[str]) -> tuple[Any, ...]:
    from relaymta.watch import stamp

    return tuple((path, *(stamp(path) or ())) for path in paths)


class Hooks:
    """A judgement.Follower. Its words: verdicts, and "raised". `changed()`: called when `asks`, `begins` or `looks` are others;
    `longest`: seconds that an answer may take, all in all; `told_at`: when (loop time) it was logged last, of what is not
    logged again for a while."""

    alone = True

    def __init__(
        self, path: str, seconds: float, memory: int, in_loop: bool, means: "HookMeans", name: str,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """`path`: of the file; `seconds`: that a call may take; `memory`: octets of a process, 0: any number; `in_loop`: there is
        none; `name`: of the filter; `warn(text)`: something is wrong."""
        self.path = path
        self.name = name
        self.longest = WAIT + 2 * seconds
        self.changed_shape: Callable[[], None] = lambda: None
        self._seconds = seconds
        self._memory = memory
        self._in_loop = in_loop
        self._means = means
        self.warn = warn
        self._pool: Any = None
        self._closed = False
        self.told_at: dict[str, float] = {}
        self._events: deque[tuple[str, dict[str, Any]]] = deque()
        self._telling: set[asyncio.Task[None]] = set()
        self._shape(declared(path))

    def _shape(self, hooks: Collection[str]) -> None:
        self.hooks = frozenset(hooks)
        self.asks = frozenset(verb for verb, hook in VERBS.items() if hook in self.hooks)
        self.looks = any(hook in self.hooks for hook in (*ENVELOPE, *MESSAGE))
        self.begins = self.looks or bool(self.asks)
        self.tells = frozenset(self.hooks & set(AFTERWARDS))

    def changed(self, hooks: frozenset[str]) -> None:
        """As of hookpool.Listener."""
        if hooks != self.hooks:
            self._shape(hooks)
            self.changed_shape()

    def begin(self) -> None:
        """The configuration that has it is in use: start its process."""
        self.pool.begin()

    @property
    def pool(self) -> Any:
        """Its processes. Used on the loop."""
        if self._pool is None:
            if self._in_loop:
                self._pool = InLoop(self.path, self._seconds, self, f"relaymta_hooks_{self.name}")
                self._pool.begin()
            else:
                self._pool = Pool(self.path, self._seconds, self._memory, self)
            self._pool.held = self._held
        return self._pool

    def refresh(self) -> None:
        """See whether the files have changed."""
        if self._pool is not None:
            self._pool.look()

    @property
    def open(self) -> int:
        """Descriptors that its processes have here."""
        return 0 if self._pool is None else int(self._pool.open)

    def session(self, client: str) -> "_Session":
        """As in judgement.Follower."""
        return _Session(self)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter: a message of a client that is not followed."""
        session = self.session(mail.client)
        try:
            return await session.judge(mail)
        finally:
            session.close()

    async def probe(self) -> None:
        """As in judgement.Filter: whether the file can be imported."""
        pool = self.pool
        pool.begin()
        loop = asyncio.get_running_loop()
        until = loop.time() + WAIT
        while not (pool.version.known and pool.version.hooks is not None) or pool.version.problem:
            if pool.version.problem or loop.time() > until:
                raise FilterFailure("connect", pool.version.problem or "no process of hooks is ready")
            await asyncio.sleep(0.02)

    async def prove(self) -> str:
        """As in judgement.Filter: which hooks there are."""
        await self.probe()
        return f"{', '.join(hook for hook in HOOKS if hook in self.pool.version.hooks) or 'no hooks'} ({self.path})"

    def close(self) -> None:
        """As in judgement.Filter: its processes end with the last session."""
        self._closed = True
        if self._pool is not None:
            self._pool.close()

    def stop(self) -> None:
        """The worker ends: its processes end now."""
        self._closed = True
        for task in self._telling:
            task.cancel()
        if self._pool is not None:
            self._pool.stop()

    # Calls

    async def call(self, version: "Version", hook: str, arguments: list[Any], descriptor: int = -1) -> Reply:
        """Call a hook. FilterFailure: there is no answer. Cancelled: it is stopped."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            found: Reply = await self.pool.call(version, hook, arguments, descriptor)
        except Failed as failure:
            self._means.failed(hook, failure.kind)
            raise
        finally:
            self._means.took(hook, clock() - began)
        if found.word == "raised":
            self._raised(hook, found)
        elif found.word not in _MAY_SAY[hook]:
            self._means.failed(hook, "answer")
            why = printable(found.reason)[:REASON_MOST] if found.word == "invalid" else f"{hook} says {found.word[:32]!r}"
            raise FilterFailure("protocol", why, True)
        return found

    def _raised(self, hook: str, found: Reply) -> None:
        """Count an exception, and log it, of each place once a minute."""
        self._means.failed(hook, "raised")
        place = printable(found.place)[:REASON_MOST]
        self._means.raised(place or hook)
        if self._is_news(f"raised {place or hook}"):
            self._means.log(f"filter {self.name}: {hook} has raised an exception at {place}: {printable(found.reason)}")

    def _held(self, place: str) -> None:
        """A hook has kept its event loop waiting."""
        place = printable(place)[:REASON_MOST]
        if self._is_news(f"held {place}"):
            self._means.log(f"filter {self.name}: a hook has held its process for more than 50 ms at {place}")

    def _is_news(self, what: str) -> bool:
        now = asyncio.get_running_loop().time()
        if now - self.told_at.get(what, -TRACEBACK_EVERY) < TRACEBACK_EVERY:
            return False
        if len(self.told_at) >= PLACES_MOST:
            if now - min(self.told_at.values()) < TRACEBACK_EVERY:
                return False
            self.told_at.clear()
        self.told_at[what] = now
        return True

    def answer(self, hook: str, found: Reply, header: bytes = b"") -> Answer:
        """What a reply means. FilterFailure: it means nothing."""
        word = found.word
        if word == "none":
            return _ACCEPT
        if word == "raised":
            return Answer("raised", f"{hook} has failed", reply=_RAISED)
        if hook in CLIENT and word not in _OF_CLIENT:
            self._means.failed(hook, "answer")
            raise FilterFailure("protocol", f"{hook} says {word[:32]!r}: there is no message yet", True)
        reason, note = printable(found.reason.strip())[:REASON_MOST], ""
        answer = Answer(word, reason, found.score)
        if found.reply:
            said = _reply(word, found.reply)
            note = "" if said else f"{hook} gives a reply that is none: {printable(found.reply)[:64]!r}"
            answer = answer._replace(reply=said, note=note)
        if not found.changes:
            return answer
        changes = wanted(Said(word, reason, found.score, found.changes), header)  # type: ignore[arg-type]
        envelope = None
        if changes.added or changes.removed or changes.sender is not None:
            envelope = NewEnvelope(changes.added, changes.removed, changes.sender)
        return answer._replace(edits=changes.edits, envelope=envelope, dropped=changes.dropped)

    def route(self, found: Reply) -> str:
        """The name of a route, as `choose_route` says. FilterFailure: there is none."""
        name = found.reason
        if name not in self._means.routes():
            self._means.failed("choose_route", "answer")
            raise FilterFailure("protocol", f"choose_route: there is no route {printable(name)[:64]!r}", True)
        return name

    # Afterwards

    def tell(self, result: str, attempt: dict[str, Any]) -> None:
        """What has come of an attempt to deliver; what does not fit into the queue is dropped and counted."""
        for hook in ("on_attempt", f"on_{result}"):
            if hook not in self.tells:
                continue
            if len(self._events) >= EVENTS_MOST or self._closed:
                self._means.dropped(hook)
                continue
            self._events.append((hook, attempt))
        if self._events and len(self._telling) < EVENTS_AT_ONCE:
            task = asyncio.get_running_loop().create_task(self._tell())
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self) -> None:
        while self._events:
            hook, attempt = self._events.popleft()
            version = self.pool.version
            try:
                await self.call(version, hook, [attempt])
            except FilterFailure as failure:
                if self._is_news(f"told {hook}"):
                    self.warn(str(failure))


class _Session:
    """A judgement.FilterSession. `_asked`: recipients, and verbs, about which hooks were asked in this transaction."""

    def __init__(self, hooks: Hooks) -> None:
        self.renew: Callable[[], None] = lambda: None
        self.decided = False
        self._hooks = hooks
        self._version: Any = hooks.pool.version  # which it keeps: a new one is for new sessions
        self._version.keep()
        self._open = True
        self._asked: set[str] = set()

    async def client(self, verb: str, mail: Mail) -> Answer:
        """As in judgement.Greeter."""
        return await self._envelope(verb, mail)

    async def mail(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession."""
        self._asked.add("MAIL")
        return await self._envelope("MAIL", mail)

    async def rcpt(self, mail: Mail, address: str) -> Answer:
        """As in judgement.FilterSession."""
        self._asked.add(address)
        return await self._envelope("RCPT", mail, address)

    async def data(self, mail: Mail) -> Answer:
        """As in judgement.FilterSession."""
        self._asked.add("DATA")
        return await self._envelope("DATA", mail)

    async def _envelope(self, verb: str, mail: Mail, *more: str) -> Answer:
        hook = VERBS[verb]
        self.decided = False
        if not self._has(hook):
            return _CONTINUE
        arguments: list[Any] = [_client(mail)] if hook in CLIENT else [_client(mail), _envelope(mail), *more]
        answer = self._hooks.answer(hook, await self._hooks.call(self._version, hook, arguments))
        if answer is _ACCEPT or (answer.word == "accept" and not (answer.edits or answer.envelope or answer.dropped)):
            return _CONTINUE
        self.decided = answer.word == "discard"
        return answer

    def _has(self, hook: str) -> bool:
        version = self._version
        return hook in (version.hooks if version.known else self._hooks.hooks)

    def _wants_body(self, *hooks: str) -> bool:
        """Whether one of them does, or it is not known yet: then the process knows."""
        return not self._version.known or not self._version.bodies.isdisjoint(hooks)

    async def judge(self, mail: Mail) -> Answer:
        """As in judgement.Filter. What was not asked about the envelope before, since nobody was followed, is asked now."""
        answers = []
        for verb, address in [("MAIL", ""), *(("RCPT", one) for one in mail.recipients), ("DATA", "")]:
            if (address or verb) not in self._asked:
                answers.append(await self._envelope(verb, mail, *([address] if address else [])))
                if answers[-1].word in ("reject", "tempfail", "raised"):
                    break
        else:
            answers += await self._message(mail)
        self.decided = True
        return _together(answers)

    async def _message(self, mail: Mail) -> list[Answer]:
        """What hooks say of the message, and which route it takes, where they let it pass."""
        hooks = [hook for hook in MESSAGE if self._has(hook)]
        if not hooks:
            return []
        arguments: list[Any] = [_client(mail), _envelope(mail), [mail.ident, mail.dmarc, mail.text.head, mail.text.size]]
        descriptor, part = -1, (0, 0)
        try:
            if self._wants_body(*hooks):
                descriptor, part = await lent(mail)
            return await self._called(hooks, mail, arguments, descriptor, part)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    async def _called(
        self, hooks: list[str], mail: Mail, arguments: list[Any], descriptor: int, part: tuple[int, int]
    ) -> list[Answer]:  # fmt: skip
        found: list[Answer] = []
        for hook in hooks:
            wants = descriptor >= 0 and self._wants_body(hook)
            given = [*arguments, part] if wants else arguments
            said = await self._hooks.call(self._version, hook, given, descriptor if wants else -1)
            if said.word == "route":
                found.append(Answer("accept", route=self._hooks.route(said)))
                continue
            found.append(self._hooks.answer(hook, said, mail.text.head))
            if found[-1].word in ("reject", "tempfail", "raised", "discard"):
                break
        return found

    def refused(self, address: str, answer: bytes) -> None:
        """As in judgement.FilterSession."""

    def reset(self) -> None:
        """As in judgement.FilterSession."""
        self.decided = False
        self._asked.clear()

    def close(self) -> None:
        """As in judgement.FilterSession."""
        if self._open:
            self._open = False
            self._version.leave()


def _client(mail: Mail) -> tuple[str, ...]:
    """The fields of hooks.Client."""
    return (
        mail.client, mail.helo, mail.user, mail.mechanism, mail.application, mail.tls, mail.listener, mail.protocol
    )  # fmt: skip


def _envelope(mail: Mail) -> tuple[Any, ...]:
    """The fields of hooks.Envelope."""
    return mail.sender, mail.recipients, mail.parameters, mail.announced


async def lent(mail: Mail) -> tuple[int, tuple[int, int]]:
    """A descriptor from which the body can be read, which is the caller's to close, and which part of its file that is: where it
    begins, and octets. Of a large message the file itself, which nobody can change by that; else, or where there is none, a copy
    in memory. OSError or StoreError."""
    text = mail.text
    octets = max(mail.octets - len(text.head), 0)
    loop = asyncio.get_running_loop()
    if text.open is not None:
        opening = loop.run_in_executor(None, text.open)
        try:
            descriptor, at = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise
        return descriptor, (at, octets)
    descriptor = os.memfd_create("relaymta-body", os.MFD_CLOEXEC)
    try:
        async for piece in text.pieces(mail.most, True):
            write = partial(_write, descriptor, piece)
            if octets <= WHOLE:
                write()
            else:
                await asyncio.shield(loop.run_in_executor(None, write))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, (0, octets)


def _write(descriptor: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def _close(opening: "asyncio.Future[tuple[int, int]]") -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result()[0])


def _reply(word: str, text: str) -> bytes:
    """The reply that a hook gives, one line of ASCII. b"": it is none to what it says."""
    match = _REPLY.match(printable(text).encode("ascii", "replace").decode())
    if match is None or match[1] != _REFUSALS.get(word):
        return b""
    return reply.format_reply(int(text[:3]), match[2], match[3])[: REPLY_MOST - 2].rstrip(b"\r\n") + b"\r\n"


def _together(answers: Sequence[Answer]) -> Answer:
    """The strictest of several answers, with the changes of all, and the route."""
    said = [one for one in answers if one.word != "continue"]
    if len(said) == 1:
        return said[0]
    if not said:
        return _ACCEPT
    strictest = max(said, key=lambda one: _STRICTNESS.index(one.word))
    envelope: NewEnvelope | None = None
    for one in said:
        if one.envelope is not None:
            envelope = one.envelope if envelope is None else envelope.joined(one.envelope)
    return strictest._replace(
        edits=[edit for one in said for edit in one.edits], envelope=envelope, dropped=sum(one.dropped for one in said),
        route=next((one.route for one in said if one.route), ""), note="; ".join(filter(None, (one.note for one in said))),
    )  # fmt: skip
