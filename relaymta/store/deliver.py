"""A message for its recipients' mailboxes, of the queue or of an LMTP client: one reply for each recipient (RFC 2033 4.2)."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from relaymta.config import Mailboxes as Settings
from relaymta.disk.big import BigFile
from relaymta.errors import RelayError, StoreError, StoreFull
from relaymta.proto.envelope import Onward
from relaymta.proto.said import Reply
from relaymta.store.change import LIMIT, OVERQUOTA, Limits
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.sieving import Mail, Sieved, Sieving
from relaymta.store.warning import WARNED_AT, Warnings
from relaymta.store.writer import Result, Target, prefix_of

__all__ = ["FULL", "REFUSED", "UNKNOWN", "Delivery", "Landed", "limits_of", "status_of"]

T = TypeVar("T")

UNKNOWN = Reply(550, "5.1.1", "no such user here")
_DISABLED = Reply(550, "5.2.1", "the mailbox is disabled")
FULL, REFUSED = Reply(452, "4.2.2", "the mailbox is full"), Reply(552, "5.2.2", "the mailbox is full")
_FILED = Reply(250, "2.1.5", "filed")
_NOT_NOW = Reply(451, "4.3.0", "the mailbox cannot be used now")


def limits_of(user: User, settings: Settings) -> Limits:
    """A user's quota: the user's own, else that of the configuration."""
    octets, messages = user.octets or settings.quota, user.messages or settings.messages
    return Limits(octets if octets > 0 else 0, messages if messages > 0 else 0)


class Outbox(Protocol):
    """What makes the messages that scripts send ready for the queue (send.onward.Outbox)."""

    async def make(self, messages: Sequence[Onward]) -> list[Any]:
        """What comes into the queue with the outcome. RelayError: not now."""

    def drop(self, made: Sequence[Any]) -> None:
        """That does not come into the queue."""


class Landed(NamedTuple):
    """What has become of a message for one recipient. `users`: in whose mailboxes it is; `rest`: addresses that get it by way of
    the queue, before `reply` holds: those elsewhere that an alias leads to, and users of an alias who cannot have it now while
    others have it."""

    reply: Reply
    users: list[str]
    rest: list[str]


def status_of(user: User) -> Reply | None:
    """Why a user gets no mail at all; None: mail is filed."""
    if user.deleted:
        return UNKNOWN
    return _DISABLED if user.disabled else None


class Delivery:
    """Files messages. `settings()`: the configuration in use; `count(result)`: called for each mailbox that a message is for."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        settings: Callable[[], Settings],
        count: Callable[[str], None] = lambda _: None,
        sieving: Sieving | None = None,
        warnings: Warnings | None = None,
    ) -> None:
        self._mailboxes = mailboxes
        self._settings = settings
        self._count = count
        self._sieving = sieving
        self._warnings = warnings
        self._warned: set[int] = set()  # users for whom it is being considered
        self._tasks: set[asyncio.Task[Any]] = set()  # what is done beside: for LMTP clients, and warnings
        self._submitted = 0  # messages of LMTP clients that are being filed without a task

    async def deliver(
        self,
        queue_id: int,
        attempt: int,
        sender: str,
        recipients: Iterable[tuple[int, str]],
        data: list[bytes] | BigFile,
        outbox: Outbox,
    ) -> tuple[dict[int, Reply], list[int], list[Any]]:
        """File a message for its recipients (index, address). The reply to each, the shards that were asked, and what `outbox`
        has made of the messages that are to come into the queue with the outcome. A recipient that was filed before, by an
        attempt whose outcome was lost, is not filed again. `attempt`: the number of attempts whose outcomes are recorded."""
        settings = self._settings()
        replies: dict[int, Reply] = {}
        copies: list[_Copy] = []
        ways: dict[int, _Way] = {}
        for index, address in recipients:
            way = ways[index] = self._way(address, settings)
            if not (way.users or way.others):
                replies[index] = way.reply
            for user in way.users:
                once = (queue_id, index, user.ident)
                target = Target(
                    user.ident, prefix=prefix_of(sender, address), limits=limits_of(user, settings), once=once, attempt=attempt
                )
                copies.append(_Copy(index, address, user, target))
        await self._sieve(copies, sender, data, queue_id, attempt)
        for copy in copies:
            await self._prepare(copy, sender, queue_id, outbox)
        sent: list[Any] = []
        said: dict[int, list[Reply]] = {index: [] for index in ways if index not in replies}
        for copy, reply in zip(copies, await self._filed(copies, data, settings), strict=True):
            if reply.code < 300:
                sent += copy.sent
            else:
                outbox.drop(copy.sent)
            self._note(copy, reply, queue_id)
            said[copy.index].append(reply)
        for index, some in said.items():
            if ways[index].others:
                replies[index] = await self._relayed(ways[index].landed(some), sender, outbox, sent)
            else:
                replies[index] = max(some, key=_rank)
        return replies, sorted({copy.user.shard for copy in copies}), sent

    async def _relayed(self, landed: Landed, sender: str, outbox: Outbox, sent: list[Any]) -> Reply:
        """The rest of an alias that leads elsewhere, too, gets the message by way of the queue, which `sent` is told of; the
        reply. (In accepted mail such an alias is replaced by what it leads to; not in a DSN, nor where it has changed since.)"""
        first, *others = landed.rest
        try:
            sent += await outbox.make([Onward(sender, first, b"", None, tuple(others))])
        except (RelayError, ConnectionError):
            return _NOT_NOW
        return landed.reply

    async def _prepare(self, copy: "_Copy", sender: str, queue_id: int, outbox: Outbox) -> None:
        """Make what a script sends, before the copy is filed: once that is noted, and an outcome recorded, the script is not run
        again. Behind it nothing fails but the commit of the outcome."""
        if self._sieving is None or copy.sieved is None or not copy.sieved.sends:
            return
        try:
            onward = await self._sieving.onward(copy.user, copy.sieved, sender, copy.address, queue_id, copy.index)
            copy.sent = await outbox.make(onward)
        except (RelayError, ConnectionError) as error:
            copy.sieved.cause = str(error)
            copy.reply = _NOT_NOW

    def _note(self, copy: "_Copy", reply: Reply, queue_id: int) -> None:
        """A copy has been filed, or refused for good: log what the user's script has done. One that is asked for again is noted
        then, also where that is done by way of the queue."""
        if copy.sieved is not None and self._sieving is not None and not 400 <= reply.code < 500:
            self._sieving.note(copy.user, copy.sieved, queue_id)

    def _has_script(self, copies: "list[_Copy]") -> bool:
        """Whether a script may have to be run for one of these users."""
        return self._sieving is not None and any(active is not False for active in self._sieving.active(_users_of(copies)))

    async def _sieve(
        self, copies: "list[_Copy]", sender: str, data: list[bytes] | BigFile, queue_id: int = 0, attempt: int = 0
    ) -> None:
        """Let users' scripts say what becomes of copies, where there are any."""
        sieving = self._sieving
        if sieving is None:
            return
        mail = Mail(data)
        for copy, active in zip(copies, sieving.active(_users_of(copies)), strict=True):
            if active is False:
                continue
            try:
                if active is None:
                    raise StoreError("it is not known whether there is a script")
                if queue_id and sieving.sent_before(copy.user, queue_id, copy.index, attempt):
                    continue
                copy.sieved = await sieving.run(copy.user, sender, copy.address, mail)
            except StoreError:
                copy.reply = _NOT_NOW
                continue
            copy.reply = copy.sieved.refusal
            copy.target = msgspec.structs.replace(copy.target, places=copy.sieved.places)

    async def _filed(self, copies: "list[_Copy]", data: list[bytes] | BigFile, settings: Settings) -> list[Reply]:
        """File the copies that nothing has been said of yet; the reply to each."""
        asked = [copy for copy in copies if copy.reply is None]
        results = await self._mailboxes.file(data, [(copy.user.shard, copy.target) for copy in asked])
        said = iter(self._said(asked, results, settings))
        return [copy.reply or next(said) for copy in copies]

    def _said(self, asked: "list[_Copy]", results: Sequence[Result | StoreError], settings: Settings) -> list[Reply]:
        """The replies to copies that were to be filed."""
        if self._warnings is not None:
            for copy, result in zip(asked, results, strict=True):
                if isinstance(result, Result) and result.filled >= WARNED_AT:
                    self._warn(self._warnings, copy, result.filled)
        return [self._counted(result, settings) for result in results]

    def _warn(self, warnings: Warnings, copy: "_Copy", filled: int) -> None:
        """Beside: nobody waits for that, and one for each user at a time."""
        user = copy.user
        if user.ident not in self._warned:
            self._warned.add(user.ident)
            task = self._begin(warnings.consider(user, copy.target.limits, filled))
            task.add_done_callback(lambda _: self._warned.discard(user.ident))

    def file(
        self, sender: str, recipients: list[str], data: list[bytes], done: Callable[[list[Landed] | Exception], None]
    ) -> None:
        """As `deliver_now`, whoever waits for it: `done(landed)` is called at its end, in another turn of the loop, or
        `done(error)`. Nearly all messages need no task: those for one shard of this process, and for users without a script."""
        settings = self._settings()
        ways = self._ways(sender, recipients, settings)
        copies = _every(ways)
        shards = {copy.user.shard for copy in copies}
        if len(shards) == 1 and not self._has_script(copies):

            def filed(results: list[Result] | list[StoreError]) -> None:
                self._submitted -= 1
                try:
                    landed = self._landed(recipients, ways, copies, self._said(copies, results, settings))
                except Exception as error:
                    done(error)
                else:
                    done(landed)

            if self._mailboxes.submit(shards.pop(), data, [copy.target for copy in copies], filed):
                self._submitted += 1
                return

        def ended(task: "asyncio.Task[list[Landed]]") -> None:
            error = StoreError("the relay stops") if task.cancelled() else task.exception()
            if error is None:
                done(task.result())
            else:
                done(error if isinstance(error, Exception) else StoreError(repr(error)))

        self._begin(self._deliver_now(sender, recipients, data, settings, ways)).add_done_callback(ended)

    def _begin(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Do something that `end` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def end(self, seconds: float) -> None:
        """Wait for what was begun here, `seconds` at most, and give up the rest. Nothing may be begun any more, nor be under
        way for the queue."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._submitted and loop.time() < until:
            await asyncio.sleep(0.01)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=max(until - loop.time(), 0.0))
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        if self._sieving is not None:
            self._sieving.close()

    async def deliver_now(self, sender: str, recipients: list[str], data: list[bytes]) -> list[Landed]:
        """File a message of an LMTP client; what has become of it for each recipient. An address that is there twice gets one
        copy. What was filed is not remembered: a client that has no reply and tries again is the one who decides that."""
        settings = self._settings()
        return await self._deliver_now(sender, recipients, data, settings, self._ways(sender, recipients, settings))

    async def _deliver_now(
        self, sender: str, recipients: list[str], data: list[bytes], settings: Settings, ways: "_Ways"
    ) -> list[Landed]:
        await self._sieve(_every(ways), sender, data)
        ways = {address: _sent_by_the_queue(way, copies) for address, (way, copies) in ways.items()}
        copies = _every(ways)
        return self._landed(recipients, ways, copies, await self._filed(copies, data, settings))

    def _landed(self, recipients: list[str], ways: "_Ways", copies: "list[_Copy]", said: list[Reply]) -> list[Landed]:
        """What has become of a message for each recipient, by the replies to its copies."""
        for copy, reply in zip(copies, said, strict=True):
            self._note(copy, reply, 0)
        replies = iter(said)
        landed = {address: way.landed([*islice(replies, len(way.users))]) for address, (way, _) in ways.items()}
        return [landed[address] for address in recipients]

    def _ways(self, sender: str, recipients: list[str], settings: Settings) -> "_Ways":
        ways: _Ways = {}
        for address in recipients:
            if address not in ways:
                way, prefix = self._way(address, settings), prefix_of(sender, address)
                targets = [Target(user.ident, prefix=prefix, limits=limits_of(user, settings)) for user in way.users]
                ways[address] = way, [_Copy(0, address, *both) for both in zip(way.users, targets, strict=True)]
        return ways

    def _way(self, address: str, settings: Settings) -> "_Way":
        try:
            found = self._mailboxes.find(address, settings.subaddress)
        except RelayError as error:
            return _Way(Reply(450, "4.2.4", str(error)), [], [])
        if found is None:
            return _Way(UNKNOWN, [], [])
        good = [user for user in found.users if status_of(user) is None]
        refused = _FILED if good or found.others else status_of(found.users[0])
        return _Way(refused or UNKNOWN, good, found.others)

    def _counted(self, result: Result | StoreError, settings: Settings) -> Reply:
        reply = _reply(result, settings)
        self._count("filed" if reply.code < 300 else "full" if reply.enhanced.endswith(".2.2") else "failed")
        return reply


@dataclass(slots=True)
class _Copy:
    """A message for one user, of the recipient `index`. `reply`: what is said without filing it, or None; `sieved`: what the
    user's script says, where there is one; `sent`: what is made of the messages that it sends, once the copy is filed."""

    index: int
    address: str
    user: User
    target: Target
    reply: Reply | None = None
    sieved: Sieved | None = None
    sent: Sequence[Any] = ()


def _users_of(copies: list[_Copy]) -> list[User]:
    return [copy.user for copy in copies]


def _sent_by_the_queue(way: "_Way", copies: list[_Copy]) -> "tuple[_Way, list[_Copy]]":
    """What an LMTP client has given goes by way of the queue to users whose scripts send something: that is done once, also after
    a crash. The rest of the way, and of the copies."""
    later = [copy for copy in copies if copy.sieved is not None and copy.sieved.sends]
    if not later:
        return way, copies
    alone = len(copies) == 1 and not way.others
    others = [*way.others, *(copy.address if alone else copy.user.address for copy in later)]
    rest = [copy for copy in copies if copy not in later]
    return _Way(_FILED, [copy.user for copy in rest], others), rest


class _Way(NamedTuple):
    """Where a message for an address goes: to users, and to addresses elsewhere. `reply`: what holds where it goes to neither."""

    reply: Reply
    users: list[User]
    others: list[str]

    def landed(self, replies: list[Reply]) -> Landed:
        """What has become of it, by the reply of each user's mailbox. Where all that it is for cannot have it now, the client
        tries again; where it has been filed for some, it must not: those would get it twice."""
        if len(replies) == 1 and replies[0].code < 300:  # as of nearly all
            return Landed(replies[0], [self.users[0].address], self.others)
        said = list(zip(self.users, replies, strict=True))
        filed = [user.address for user, reply in said if reply.code < 300]
        later = [user.address for user, reply in said if 400 <= reply.code < 500]
        if not said or (len(later) == len(said) and not self.others):
            return Landed(replies[0] if replies else self.reply, [], self.others)
        worst = max((reply for reply in replies if not 400 <= reply.code < 500), default=_FILED)
        return Landed(worst, filed, [*self.others, *later])


_Ways = dict[str, tuple[_Way, list[_Copy]]]  # by address


def _every(ways: _Ways) -> list[_Copy]:
    return [copy for _, copies in ways.values() for copy in copies]


def _rank(reply: Reply) -> tuple[bool, int]:
    """Which reply of several users holds for their alias: while one can have the message later it is asked for again (those who
    have it are left out then); what is refused for good is said once nobody is waited for."""
    return 400 <= reply.code < 500, reply.code


def _reply(result: Result | StoreError, settings: Settings) -> Reply:
    if isinstance(result, Result) and not result.code:
        return _FILED
    if isinstance(result, StoreFull):
        return Reply(452, "4.3.1", "there is no room for mail now")
    if isinstance(result, StoreError):
        return Reply(451, "4.3.0", "the mailbox cannot be written to now")
    if result.code == OVERQUOTA:
        return REFUSED if settings.over_quota == "refuse" else FULL
    if result.code == LIMIT:
        return Reply(452, "4.2.2", result.text)
    return Reply(450, "4.2.0", result.text)
