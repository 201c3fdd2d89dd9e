"""A Connection of accept/ without a socket, a disk or a clock: the test runs every step of its loop, in any order that a real
loop and its threads could have."""

import asyncio
import errno
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from random import Random
from types import SimpleNamespace
from typing import Any

from relaymta.accept.admission import Admission
from relaymta.accept.connection import Connection
from relaymta.accept.filing import Filing
from relaymta.accept.intake import Intake
from relaymta.accept.local import LocalRecipients
from relaymta.accept.quota import Quotas
from relaymta.auth.identity import Identity
from relaymta.config import Config, Listener
from relaymta.errors import StoreError
from relaymta.filter.chain import Outcome
from relaymta.filter.judgement import Verdict
from relaymta.filter.revision import Revision
from relaymta.metrics import CELLS, Counters
from relaymta.proto import reply
from relaymta.proto.edits import Insert
from relaymta.proto.envelope import Body, Envelope
from relaymta.proto.header import header_end
from relaymta.proto.said import Reply
from relaymta.proto.smtp_server import Offers
from relaymta.route.table import RouteTable
from relaymta.store.deliver import Landed

BIG = 6000  # octets of message data above which it is large, and some more: connection.py leaves room for added fields
DISK_FAILS = b"X-Disk-Fails"  # in message data: its file cannot be written
COMMIT_FAILS = b"X-Commit-Fails"
QUEUE_FAILS = b"X-Queue-Fails"  # the mailboxes have it, but the queue does not take the rest
WRONG = "wrong"  # a password
FILTERED = b"X-Refuse-Me"  # in a header: a filter refuses the message
FILTER_FAILS = b"X-Fails-Filter"
REFUSED = b"X-Refused"  # in a header: DMARC rejects the message


class Cells:
    """Counters of one process."""

    def __init__(self) -> None:
        self.cells = [0] * CELLS

    def add(self, index: int, n: int) -> int:
        self.cells[index] += n
        return self.cells[index]

    def set(self, index: int, n: int) -> int:
        self.cells[index] = n
        return n

    def get(self, index: int) -> int:
        return self.cells[index]

    def observer(self, at: int, bounds: Sequence[float]) -> Callable[[float], None]:
        return lambda value: None


class Loop:
    """Callbacks (in order), thread jobs (in any order) and timers (once nothing else is left)."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.turns: deque[Callable[[], object]] = deque()
        self.threads: deque[Callable[[], object]] = deque()
        self.timers: deque[Callable[[], object]] = deque()

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Callable[..., object], *arguments: object) -> None:
        self.turns.append(lambda: call(*arguments))

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        self.timers.append(lambda: call(*arguments))

    def run_in_executor(self, threads: object, call: Callable[..., Any], *arguments: object) -> "Future[Any]":
        future: Future[Any] = Promise()

        def run() -> None:
            try:
                found = call(*arguments)
            except Exception as error:
                failure = error
                self.turns.append(lambda: future.set_exception(failure))
            else:
                self.turns.append(lambda: future.set_result(found))

        self.threads.append(run)
        return future

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> "Task":
        return Task(self, coroutine)

    async def start_tls(self, transport: "Transport", protocol: Connection, context: object, **patience: object) -> "Transport":
        assert transport.paused, "what arrives now belongs to the handshake"
        return Transport(self, protocol, secure=True)

    def step(self) -> bool:
        """Run one callback, thread job or timer; False when there is none."""
        self.threads.rotate(self.random.randrange(3))  # there are several threads
        ready = [queue for queue in (self.turns, self.threads) if queue]
        if not ready and not self.timers:
            return False
        (self.random.choice(ready) if ready else self.timers).popleft()()
        return True


class Promise(Future[Any]):
    """What a thread job returns, for coroutines, too."""

    def __await__(self) -> Generator[None, None, Any]:
        while not self.done():
            yield
        return self.result()


class Task:
    """A coroutine on a Loop."""

    def __init__(self, loop: Loop, coroutine: Coroutine[Any, Any, None]) -> None:
        self._loop, self._coroutine = loop, coroutine
        self._calls: list[Callable[[Any], object]] = []
        self._cancels = self._cancelled = False
        self._error: BaseException | None = None
        self.over = False
        loop.turns.append(self._run)

    def _run(self) -> None:
        try:
            cancels, self._cancels = self._cancels, False
            waited_for = self._coroutine.throw(asyncio.CancelledError()) if cancels else self._coroutine.send(None)
        except StopIteration:
            self._end()
        except asyncio.CancelledError:
            self._cancelled = True
            self._end()
        except Exception as error:
            self._error = error
            self._end()
        else:
            assert waited_for is None, "waits for something outside of this loop"
            self._loop.turns.append(self._run)

    def _end(self) -> None:
        self.over = True
        assert self._calls or self._error is None, self._error
        for call in self._calls:
            self._loop.call_soon(call, self)

    def add_done_callback(self, call: Callable[[Any], object]) -> None:
        self._calls.append(call)

    def cancel(self) -> bool:
        self._cancels = not self.over
        return self._cancels

    def cancelled(self) -> bool:
        return self._cancelled

    def exception(self) -> BaseException | None:
        return self._error


class Transport:
    """`reads`: whether the client reads its replies."""

    def __init__(self, loop: Loop, protocol: Connection, secure: bool = False) -> None:
        self.loop, self.protocol, self.secure = loop, protocol, secure
        self.said = b""
        self.owed = self.most_owed = 0
        self.reads = True
        self.paused = self.blocked = self.closing = self.closed = self.ending = False
        self.limits = (1 << 30, 1 << 30)

    def get_extra_info(self, name: str) -> object:
        return SimpleNamespace(session_reused=False) if self.secure and name == "ssl_object" else None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = (high, low)

    def set_read_buffer_limits(self, high: int) -> None:
        assert self.secure

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        self.said += data
        self.owed += len(data)
        self.most_owed = max(self.owed, self.most_owed)
        if self.owed > self.limits[0] and not self.blocked:
            self.blocked = True
            self.protocol.pause_writing()
        if self.reads:
            self.loop.call_soon(self.read)

    def read(self) -> None:
        """The client reads all of it."""
        self.owed = 0
        if self.blocked:
            self.blocked = False
            self.protocol.resume_writing()
        if self.ending and not self.protocol.eof_received():
            self.closing = True
        if self.closing:
            self._lost()

    def can_write_eof(self) -> bool:
        return not self.secure

    def write_eof(self) -> None:
        """The client closes when it has read all."""
        self.ending = True
        if not self.owed:
            self.loop.call_soon(self.read)

    def close(self) -> None:
        self.closing = True
        if not self.owed:
            self.loop.call_soon(self._lost)

    def abort(self) -> None:
        self.closing = True
        self.loop.call_soon(self._lost)

    def _lost(self) -> None:
        if not self.closed:
            self.closed = True
            self.protocol.connection_lost(None)


class Machine(Admission):
    """What the connections of one worker share. `big`: as BIG; `signs`: mail is signed; `looks`: mail of unauthenticated clients
    is verified."""

    def __init__(
        self, random: Random, signs: bool = False, looks: bool = False, big: int = BIG, filters: bool = False, **settings: Any
    ) -> None:
        steps, limits = Loop(random), Limits()
        found: dict[str, Any] = {"hostname": "relay.example", "relay": {"domains": ["d.example"], "networks": []}}
        found["listener"] = [{"address": "127.0.0.1:25"}]
        config = Config.model_validate(found | settings)
        self.stored: list[tuple[Envelope, bytes]] = []
        self.written: list[File] = []
        self.events: list[dict[str, Any]] = []
        self.tls = False
        self.logs_in: Identity | None = None
        self.signer: Any = self if signs else None
        self.verifier = self if looks else None
        self.chains: Any = self if filters else None
        self.forged: frozenset[bytes] = frozenset()
        self.mailboxes: list[tuple[str, str, bytes]] = []  # sender, user and message of what was filed
        self.certificates = SimpleNamespace(context=object())
        self.logins = SimpleNamespace(check=self.login, with_account=lambda identity: identity)
        self.cells = Cells()
        self.big_limit, self.room, self.reserve, self.full, self.last = big, 1 << 40, 1 << 40, False, 0
        self.writer = SimpleNamespace(stalled=False)
        counters, log = Counters(self.cells), SimpleNamespace(event=lambda name, **fields: self.events.append(fields))
        self.used: Counter[str] = Counter()
        self.quotas = Quotas(Rates(self.used), counters)  # type: ignore[arg-type]
        intake = Intake(config, RouteTable(config), self, self, self.quotas, counters, log)  # type: ignore[arg-type]
        super().__init__(config, intake, self, limits, None, steps)  # type: ignore[arg-type]
        self.steps, self.counts = steps, limits.counts
        if config.local_domains:
            intake.local = LocalRecipients(lambda address, size: None, lambda recipients, kept: recipients, self.file_now)
            self.filing = Filing(2 * big)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Any:
        return self.steps.spawn(coroutine)

    def held(self) -> Counter[str]:
        """All that is held of limits; empty when everything was given back."""
        return +(self.counts + Counter(files=self.files, filing=self.filing.octets, connections_in_set=len(self.connections)))

    # As the endpoint.

    aliases = None

    def offers(self, listener: Listener, xclient: bool, xforward: bool = False) -> Offers:
        lmtp = listener.protocol == "lmtp"
        return Offers(starttls=True, mechanisms=("PLAIN",), clear=True, xclient=xclient, xforward=xforward, lmtp=lmtp)

    async def login(self, claim: object, address: str, behind: str, mechanism: str = "") -> tuple[Identity | None, bytes]:
        found = self.logs_in if getattr(claim, "password", "") != WRONG else None
        return found, reply.LOGGED_IN if found is not None else reply.WRONG_CREDENTIALS

    def recipient_exists(self, address: str, domain: str) -> bool:
        return True

    # As the filters.

    def chain_for(self, *sender: object) -> "Machine":
        return self

    follows = begins = False
    looks = True
    open = 0

    async def judge(self, revision: Revision, dialogue: object) -> Outcome:
        """Reads all of it, and does what the header says. The size of what it has seen stands above all other fields."""
        mail, octets = revision.mail, 0
        async for piece in mail.text.pieces():
            octets += len(piece)
            await asyncio.sleep(0)
        assert octets == mail.text.size
        if FILTER_FAILS in mail.text.head:
            raise ValueError("a defect")
        if FILTERED in mail.text.head:
            return Outcome(Verdict.REJECT, b"554 5.7.1 Refused\r\n")
        revision.edit([Insert(1, b"X-Below", b" ours"), Insert(0, b"X-Filter", b" %d" % octets)])
        return Outcome(Verdict.ACCEPT)

    # As the signer and the verifier: the digest is the message data itself, so that it can be compared.

    def __bool__(self) -> bool:
        return True

    def sign(self, front: bytes, data: list[bytes], application: str, done: Callable[[bytes | Exception], None]) -> None:
        self.steps.call_soon(done, b"X-Signed: %d\r\n" % sum(map(len, data)))

    def draft(self, front: bytes, start: bytes, application: str) -> "Seen":
        return Seen(0)

    def finish(self, draft: "Seen", done: Callable[[bytes | Exception], None]) -> None:
        self.steps.call_soon(done, b"X-Signed: %d\r\n" % len(draft.octets))

    def look(self, data: bytes) -> "Look":
        return Look(data[: header_end(data)])

    async def check(self, address: str, helo: str, sender: str, look: "Look", body: bytes) -> SimpleNamespace:
        assert REFUSED not in look.body.octets
        octets = len(look.header) + len(look.body.octets or body)
        refusal = reply.DMARC_REJECT if REFUSED in look.header else None
        dmarc = SimpleNamespace(result="none")
        return SimpleNamespace(refusal=refusal, dmarc=dmarc, held=False, field=b"X-Signed: %d\r\n" % octets)

    # As the mailboxes: "x" has one, "y" is full, "z" is an alias of a user and an address elsewhere.

    def file_now(self, sender: str, recipients: list[str], data: list[bytes], done: Callable[[Any], None]) -> None:
        whole = b"".join(data)

        def commit() -> None:
            if COMMIT_FAILS in whole:
                done(StoreError("it cannot"))
                return
            users = {address: address[0] for address in recipients if not address.startswith("y")}
            self.mailboxes += [(sender, user, whole) for user in users.values()]
            full, filed = Reply(452, "4.2.2", "the mailbox is full"), Reply(250, "2.1.5", "filed")
            rest = {"z": ["z@far.example"]}
            done([Landed(full, [], []) if a[0] == "y" else Landed(filed, [a[0]], rest.get(a[0], [])) for a in recipients])

        self.steps.threads.append(lambda: self.steps.call_soon(commit))

    # As the queue.

    def ident(self) -> int:
        self.last += 1
        return self.last

    def delay(self, flow: float) -> float:
        return 0.0

    def deadline(self) -> int:
        return 0

    def big_body(self, ident: int, room: int = 0) -> "File":
        self.written.append(File(len(self.written)))
        return self.written[-1]

    def submit(
        self,
        ident: int,
        envelope: Envelope,
        data: list[bytes] | Body,
        done: Callable[[Any], None],
        request: Any = None,
        began: float = 0.0,
    ) -> None:
        file = None if isinstance(data, list) else self.written[data.segment]
        whole = b"".join(data) if isinstance(data, list) else self.written[data.segment].front + self.written[data.segment].data

        def commit() -> None:
            if COMMIT_FAILS in whole or (self.mailboxes and QUEUE_FAILS in whole):
                done(StoreError("it cannot"))
            else:
                self.stored.append((envelope, whole))
                if file is not None:
                    file.kept = True
                done(None)

        self.steps.threads.append(lambda: self.steps.call_soon(commit))


class Rates:
    """Rates shared by the machine, which never become free again."""

    def __init__(self, used: Counter[str]) -> None:
        self.used = used

    def take(self, key: str, per_second: float, burst: int, units: int = 1) -> float:
        if self.used[key] + units > burst:
            return 60.0
        self.used[key] += units
        return 0.0

    def give(self, key: str, per_second: float, units: int = 1) -> None:
        assert self.used[key] >= units, key
        self.used[key] -= units


class Limits:
    """Limits shared by the machine."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def take(self, key: str, most: int) -> bool:
        if self.counts[key] >= most:
            return False
        self.counts[key] += 1
        return True

    def give(self, key: str) -> None:
        assert self.counts[key] > 0, key
        self.counts[key] -= 1


class Seen:
    """Message data that was fed to a digest."""

    def __init__(self, skipped: int) -> None:
        self.octets, self.skipped = b"", skipped
        self.body = self

    def skip(self, octets: int) -> None:
        self.skipped = octets

    def feed(self, piece: bytes) -> None:
        skipped = min(self.skipped, len(piece))
        self.skipped -= skipped
        self.octets += piece[skipped:]


class Look:
    """The parsed message of an unauthenticated client."""

    def __init__(self, header: bytes) -> None:
        self.header, self.end = header, len(header)
        self.body = Seen(0)


class File:
    """The file of a large message."""

    def __init__(self, number: int) -> None:
        self.number, self.data, self.front = number, b"", b""
        self.discarded = self.finished = self.kept = False

    def write(self, buffers: list[bytes]) -> None:
        assert not self.discarded and not self.finished
        whole = b"".join(buffers)
        if DISK_FAILS in whole:
            raise OSError(errno.EIO, "it cannot")
        self.data += whole

    @property
    def length(self) -> int:
        return len(self.data)

    def piece(self, at: int, most: int) -> bytes:
        assert not self.discarded and not self.finished
        return self.data[at : at + most]

    def read(self, skip: int = 0) -> list[bytes]:
        assert not self.discarded and not self.finished
        return [self.data[skip:]]

    def finish(self, front: list[bytes], skip: int = 0) -> Body:
        assert not self.discarded and not self.finished
        self.finished, self.front, self.data = True, b"".join(front), self.data[skip:]
        return Body(self.number, 1, 0, len(self.front) + len(self.data))

    def discard(self) -> None:
        self.discarded = True
