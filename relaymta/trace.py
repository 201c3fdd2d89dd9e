"""Live traces of SMTP dialogues in one worker: who watches, which connections each sees, and the lines that are ready for it.

A `Watch` is one trace. A `Tap` is on a connection while a watch may be about it, and turns what the protocol layers parse and
write into lines without secrets (proto/trace.py). A connection of which nobody may want to know has no tap.

    watching    lines are kept in its buffer until they are taken: WAITING at most, of PENDING_OCTETS octets; others are dropped,
                and their number is told in their place
    asleep      nothing was taken for ASLEEP seconds: its taps are off. The next `take` wakes it
    closed      by `close`; its taps are off

What is known of a connection only later (the application after AUTH, sender and recipient) leaves it undecided until then: its
last lines are kept, UNDECIDED at most. Once it matches, all of it is shown, to its end.
"""

import asyncio
import ipaddress
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, NamedTuple

from relaymta.control.filters import Filter
from relaymta.control.requests import Trace
from relaymta.errors import RelayError, redacted, without
from relaymta.proto.address import mail_argument, rcpt_argument, same_host
from relaymta.proto.trace import Ear, commands, replies, reply_lines, shown

__all__ = ["Facts", "Incoming", "Line", "Outgoing", "Tap", "Tracer", "Watch"]

WATCHES = 8  # at the same time
WAITING = 20_000  # lines that wait to be taken,
WAITING_OCTETS = 4 << 20  # and their octets
TOGETHER = 500  # lines that are taken at once
UNDECIDED = 100  # lines of a connection that are kept while it is undecided,
UNDECIDED_OCTETS = 4 << 20  # and octets of all of them
LINE_OCTETS = 200  # that a line takes beside its text
CLIENTS = 10_000  # of which is known whether they are meant
ASLEEP = 30.0  # seconds
LATEST = 0.05  # seconds for which lines are collected

Line = tuple[float, str, str, str]  # time (UTC), connection, kind, text

_MAIL, _RCPT = (int.from_bytes(verb, "big") for verb in (b"MAIL", b"RCPT"))


class Facts(NamedTuple):
    """What is known of a connection. In: `client`, `listener`. Out: `names` of the site, `hosts` (name and address). Of the
    transaction: `sender` (None: there is none), `recipients`."""

    client: str = ""
    listener: str = ""
    names: frozenset[str] = frozenset()
    hosts: tuple[str, ...] = ()
    application: str = ""
    sender: str | None = None
    recipients: tuple[str, ...] = ()


class Watch:
    """One trace. `take` is for its reader, the rest for the tracer and the taps."""

    def __init__(self, tracer: "Tracer", wanted: Trace) -> None:
        """RelayError: a network is none."""
        self.wanted = wanted
        try:
            self._networks = [ipaddress.ip_network(network, strict=False) for network in wanted.clients]
        except ValueError as error:
            raise RelayError(f"trace: {error}") from None
        self._clients: dict[str, bool] = {}  # whether each is of these networks
        self._filter = Filter(sender=wanted.sender, recipient=wanted.recipient)
        self._tracer = tracer
        self._lines: deque[Line] = deque()
        self._octets = 0
        self._dropped = 0
        self._ready = asyncio.Event()
        self.asleep = False
        self.taken_at = time.monotonic()
        self.only: Tap | None = None  # the one connection that is followed

    # Which connections

    def may_concern(self, facts: Facts, changes: bool = False) -> bool:
        """Whether it may be about a connection; `changes`: its client may still be another one (XCLIENT)."""
        wanted = self.wanted
        if wanted.listener and wanted.listener not in (facts.listener, facts.listener.rpartition(":")[2]):
            return False
        if wanted.site and wanted.site not in facts.names and not any(same_host(wanted.site, name) for name in facts.names):
            return False
        if wanted.host and not any(same_host(wanted.host, host) for host in facts.hosts):
            return False
        return changes or self._is_of(facts.client)

    def _is_of(self, client: str) -> bool:
        if not self._networks:
            return True
        known = self._clients.get(client)
        if known is None:
            if len(self._clients) >= CLIENTS:
                self._clients.clear()
            known = self._clients[client] = self._in_networks(client)
        return known

    def _in_networks(self, client: str) -> bool:
        try:
            address = ipaddress.ip_address(client)
        except ValueError:
            return False
        return any(address in network for network in self._networks)

    def concerns(self, facts: Facts) -> bool:
        """Whether it is about a connection of which `may_concern` was true, by what is known now."""
        wanted = self.wanted
        if not self._is_of(facts.client) or wanted.application not in ("", facts.application):
            return False
        if not (wanted.sender or wanted.recipient):
            return True
        sender = facts.sender
        return sender is not None and self._filter.is_from(sender) and (self._filter.is_to(list(facts.recipients)))

    # Lines

    @property
    def full(self) -> bool:
        """Whether no further line is kept."""
        return len(self._lines) >= WAITING or self._octets >= WAITING_OCTETS

    def put(self, tap: "Tap", line: Line) -> None:
        """A line of a connection that it is about."""
        if self.only is not tap and self.wanted.only_one:
            if self.only is not None:
                return
            self.only = tap
            self._tracer.follow_only(self, tap)
        self.keep(line)

    def keep(self, line: Line) -> None:
        """Keep a line until it is taken, where there is room."""
        if self.full:
            self._dropped += 1
            return
        if self._dropped:
            self._tell_dropped(line[0])
        self._lines.append(line)
        self._octets += len(line[3])
        self._ready.set()

    def drop(self, lines: int) -> None:
        """So many lines were not kept."""
        self._dropped += lines

    def _tell_dropped(self, now: float) -> None:
        dropped, self._dropped = self._dropped, 0
        self._lines.append((now, "", "dropped", f"{dropped} lines were dropped here: they came faster than they were read"))

    def note(self, text: str) -> None:
        """A line about the trace itself."""
        if self._dropped:
            self._tell_dropped(time.time())
        self._lines.append((time.time(), "", "note", text))
        self._ready.set()

    async def take(self, seconds: float) -> list[Line]:
        """The next lines, TOGETHER at most; none where there are none within so many seconds."""
        self.taken_at = time.monotonic()
        if self.asleep:
            self._tracer.wake(self)
        if not self._lines:
            try:
                async with asyncio.timeout(seconds):
                    await self._ready.wait()
            except TimeoutError:
                if self._dropped:
                    self._tell_dropped(time.time())
        if 0 < len(self._lines) < TOGETHER:
            await asyncio.sleep(LATEST)
        self._ready.clear()
        found = [self._lines.popleft() for _ in range(min(TOGETHER, len(self._lines)))]
        self._octets -= sum(len(line[3]) for line in found if line[2] not in ("dropped", "note"))
        if self._lines:
            self._ready.set()
        elif self._dropped:
            self._tell_dropped(time.time())
            self._ready.set()
        return found


class _View:
    """What one watch sees of one connection."""

    __slots__ = ("kept", "lost", "matched", "octets", "watch")

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.matched = False
        self.kept: deque[Line] = deque()  # while it has not matched
        self.octets = 0
        self.lost = 0


class Tap:
    """On one connection. What holds it has an attribute `tap`, which is None without one."""

    __slots__ = ("_holders", "_views", "ident", "tracer")

    def __init__(self, tracer: "Tracer", views: list[_View]) -> None:
        self.tracer = tracer
        self.ident = tracer.next_ident()
        self._views = views
        self._holders: list[Any] = []

    def hold(self, *holders: Any) -> None:
        """Let these, too, tell it what they say and hear."""
        for holder in holders:
            holder.tap = self
            self._holders.append(holder)

    def facts(self) -> Facts:
        """What is known now."""
        raise NotImplementedError

    def decide(self) -> None:
        """What is known has changed."""
        facts: Facts | None = None
        for view in self._views:
            if not view.matched:
                facts = facts or self.facts()
                if view.watch.concerns(facts):
                    self._match(view)

    def _match(self, view: _View) -> None:
        view.matched = True
        kept, lost, view.kept, view.lost = view.kept, view.lost, deque(), 0
        self.tracer.undecided -= view.octets
        view.octets = 0
        if lost:
            text = f"{lost} lines before these were not kept"
            view.watch.put(self, (kept[0][0] if kept else time.time(), self.ident, "event", text))
        for line in kept:
            view.watch.put(self, line)

    def drops(self, lines: int = 1) -> bool:
        """Whether all who watch would drop a line: then so many are counted, and it need not be made."""
        if not all(view.matched and view.watch.full for view in self._views):
            return False
        for view in self._views:
            view.watch.drop(lines)
        return True

    def line(self, kind: str, text: str) -> None:
        """A line: `heard` from the other end, `said` by us, `event` or `closed`."""
        line = time.time(), self.ident, kind, text
        for view in list(self._views):
            if view.matched:
                view.watch.put(self, line)
                continue
            view.kept.append(line)
            view.octets += LINE_OCTETS + len(text)
            self.tracer.undecided += LINE_OCTETS + len(text)
            while view.kept and (len(view.kept) > UNDECIDED or self.tracer.undecided > UNDECIDED_OCTETS):
                octets = LINE_OCTETS + len(view.kept.popleft()[3])
                view.octets -= octets
                self.tracer.undecided -= octets
                view.lost += 1

    def event(self, text: str) -> None:
        """Something has happened on the connection."""
        self.line("event", shown(text.encode("utf-8", "replace")))

    def closed(self, why: str) -> None:
        """The connection has ended; further calls do nothing."""
        if self._views:
            self.line("closed", shown(why.encode("utf-8", "replace")))
            self.forget(list(self._views))

    def forget(self, views: Iterable[_View]) -> None:
        """These watch no longer; without any, it leaves its holders."""
        for view in views:
            if view in self._views:
                self._views.remove(view)
                self.tracer.undecided -= view.octets
        if not self._views:
            self.tracer.taps.discard(self)
            for holder in self._holders:
                if holder.tap is self:
                    holder.tap = None
            self._holders.clear()

    def watched_by(self, watch: Watch) -> list[_View]:
        """What this watch sees of it."""
        return [view for view in self._views if view.watch is watch]

    def add(self, views: list[_View]) -> None:
        """These watch it from now on."""
        self._views += views
        self.decide()


class Incoming(Tap):
    """On the connection of a client."""

    __slots__ = ("_again", "_ear", "_facts", "_user", "who")

    def __init__(self, tracer: "Tracer", views: list[_View], facts: Facts) -> None:
        super().__init__(tracer, views)
        self._facts = facts
        self._ear = Ear()
        self._again: Any = None  # a command that will be taken once more
        self._user = ""
        # The client's address, application and user now; None: it was not admitted.
        self.who: Callable[[], tuple[str, str, str] | None] = lambda: None

    def facts(self) -> Facts:
        return self._facts

    def heard(self, session: Any, event: Any) -> None:
        """An event of the parser, which the session is about to handle."""
        again, self._again = self._again, None
        if event is again:
            return
        if event[0] == 0 and event[1] in (_MAIL, _RCPT):
            self._envelope(session, event[1], event[2])
        if event[0] != 2 and self.drops():
            self._ear.rest()
            return
        line = self._ear.heard(session, event)
        if line:
            self.line("heard", line)

    def _envelope(self, session: Any, verb: int, argument: bytes) -> None:
        if verb == _MAIL:
            found = mail_argument(argument, session.host.domain)
            self._facts = self._facts._replace(sender=found[0] if found is not None else None, recipients=())
        elif (recipient := rcpt_argument(argument, session.host.domain)) is not None:
            self._facts = self._facts._replace(recipients=(recipient[0],))
        self.decide()

    def asks(self, again: Any) -> None:
        """The session has put off a command: the event that it will be taken from once more."""
        self._again = again

    def _ask_who(self) -> None:
        """The client may be another one, or have logged in, since something was last said to it."""
        facts, found = self._facts, self.who()
        if found is None:
            return
        client, application, user = found
        if client != facts.client:
            self.event(f"the client is {client}")
        if user != self._user:
            self.event(f"logged in as {user}" if user else "logged out")
            self._user = user
        if client != facts.client or application != facts.application:
            self._facts = facts._replace(client=client, application=application)
            self.decide()

    def said(self, out: bytes) -> None:
        """What is written to the client: whole replies."""
        self._ask_who()
        if not self.drops(out.count(b"\n")):
            for line in replies(out):
                self.line("said", line)

    def closed(self, why: str) -> None:
        if self._ear.open:
            self.line("heard", self._ear.rest()[:-1] + ", unfinished>")
        super().closed(why)


class Outgoing(Tap):
    """On a connection to a host that mail is sent to."""

    __slots__ = ("_facts", "_logging_in", "_secrets")

    def __init__(self, tracer: "Tracer", views: list[_View], facts: Facts) -> None:
        super().__init__(tracer, views)
        self._facts = facts
        self._logging_in = False
        self._secrets: tuple[str, ...] = ()

    def facts(self) -> Facts:
        return self._facts

    def logging_in(self, now: bool, secrets: tuple[str, ...] = ()) -> None:
        """AUTH begins, or has ended. `secrets`: what replies may quote from now on."""
        self._logging_in = now
        self._secrets = secrets or self._secrets

    def hide(self, secrets: tuple[str, ...]) -> None:
        """What replies may quote, and nobody may read."""
        self._secrets = secrets

    def begin(self, ident: str, application: str, sender: str, recipients: list[str]) -> None:
        """A message follows."""
        self._facts = self._facts._replace(application=application, sender=sender, recipients=tuple(recipients))
        self.decide()
        self.event(f"message {ident}" + (f" of application {application}" if application else ""))

    def said(self, octets: bytes) -> None:
        """Commands that are written."""
        if not self.drops(octets.count(b"\n")):
            for line in commands(octets, self._logging_in):
                self.line("said", line)

    def data(self, octets: int) -> None:
        """Message data that is written, and its final dot."""
        if not self.drops():
            self.line("said", f"<{octets} octets of message data>")

    def closed(self, why: str) -> None:
        super().closed(redacted(without(why, self._secrets)))  # it may have what the host has said

    def heard(self, found: Iterable[tuple[int, bytes]]) -> None:
        """Replies."""
        for code, text in found:
            if not self.drops(1 + text.count(b"\n")):
                for line in reply_lines(code, text.decode("utf-8", "replace"), self._secrets):
                    self.line("heard", line)


class Tracer:
    """All traces of one worker. `join_in(watch)`, `join_out(watch)`: put taps on the connections that are there already."""

    def __init__(self, slot: int) -> None:
        self._slot = slot
        self._numbers = count((time.monotonic_ns() // 1_000_000) & 0xFFFFFF)
        self._incoming: list[Watch] = []
        self._outgoing: list[Watch] = []
        self.watches: list[Watch] = []  # also those that are asleep
        self.taps: set[Tap] = set()
        self.undecided = 0  # octets of lines
        self.join_in: Callable[[], None] = lambda: None
        self.join_out: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None

    def next_ident(self) -> str:
        """The name of a connection: unique among those of the machine, and not used again by the worker that comes after."""
        return f"{self._slot}-{next(self._numbers):x}"

    # Watches

    def open(self, wanted: Trace) -> Watch:
        """Begin a trace. RelayError: there are too many, or a filter is wrong."""
        if len(self.watches) >= WATCHES:
            raise RelayError(f"there are {WATCHES} traces already")
        watch = Watch(self, wanted)
        self.watches.append(watch)
        self._switch_on(watch)
        if self._timer is None:
            self._tick()
        return watch

    def close(self, watch: Watch) -> None:
        """End a trace."""
        if watch in self.watches:
            self.watches.remove(watch)
            self._switch_off(watch)
        if not self.watches and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        now = time.monotonic()
        for watch in self.watches:
            if not watch.asleep and now - watch.taken_at > ASLEEP:
                watch.asleep = True
                self._switch_off(watch)
        self._timer = asyncio.get_running_loop().call_later(1.0, self._tick)

    def wake(self, watch: Watch) -> None:
        """Its reader is there again."""
        watch.asleep = False
        if watch in self.watches:
            watch.note(f"nothing was read for {ASLEEP:g} s, so nothing was traced; from here on it is again")
            self._switch_on(watch)

    def _switch_on(self, watch: Watch) -> None:
        (self._incoming if watch.wanted.side == "in" else self._outgoing).append(watch)
        (self.join_in if watch.wanted.side == "in" else self.join_out)()

    def _switch_off(self, watch: Watch) -> None:
        for watches in (self._incoming, self._outgoing):
            if watch in watches:
                watches.remove(watch)
        for tap in list(self.taps):
            tap.forget(tap.watched_by(watch))

    def follow_only(self, watch: Watch, tap: Tap) -> None:
        """It has found its only connection."""
        for other in list(self.taps):
            if other is not tap:
                other.forget(other.watched_by(watch))

    # Taps

    def incoming(self, holder: Any, facts: Facts, changes: bool = False) -> None:
        """A tap for the connection of a client, or more who watch it, where somebody may. `changes`: as of `may_concern`."""
        if self._incoming:
            self._attach(self._incoming, holder, facts, changes, Incoming)

    def outgoing(self, holder: Any, facts: Facts) -> None:
        """A tap for a connection to a host, as `incoming`."""
        if self._outgoing:
            self._attach(self._outgoing, holder, facts, False, Outgoing)

    @property
    def watches_in(self) -> bool:
        """Whether somebody watches the connections of clients."""
        return bool(self._incoming)

    @property
    def watches_out(self) -> bool:
        """Whether somebody watches connections to other hosts."""
        return bool(self._outgoing)

    def _attach(self, watches: list[Watch], holder: Any, facts: Facts, changes: bool, kind: Any) -> None:
        tap: Tap | None = holder.tap
        views = [
            _View(watch) for watch in watches
            if (tap is None or not tap.watched_by(watch)) and watch.only in (None, tap) and watch.may_concern(facts, changes)
        ]  # fmt: skip
        if not views:
            return
        if tap is not None:
            tap.add(views)
            return
        tap = kind(self, views, facts)
        self.taps.add(tap)
        tap.hold(holder)
        tap.decide()

    def looked_up(self, facts: Facts, text: str) -> None:
        """Something about a site to which there is no connection yet."""
        line = time.time(), "", "event", shown(text.encode("utf-8", "replace"))
        for watch in self._outgoing:
            wanted = watch.wanted
            if (
                watch.only is None
                and not wanted.only_one
                and watch.may_concern(facts)
                and not (wanted.application or wanted.sender or wanted.recipient)
            ):
                watch.keep(line)
