"""A message for its recipients' mailboxes, of the queue or of an LMTP client: one reply for each recipient (RFC 2033 4.2)."""

import asyncio
from collections.abc import Callable, Iterable
from typing import NamedTuple

from relaymta.config import Mailboxes as Settings
from relaymta.disk.big import BigFile
from relaymta.errors import RelayError, StoreError, StoreFull
from relaymta.proto.envelope import Onward
from relaymta.proto.said import Reply
from relaymta.store.change import LIMIT, OVERQUOTA, Limits
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.writer import Result, Target

__all__ = ["FULL", "REFUSED", "UNKNOWN", "Delivery", "Landed", "limits_of", "status_of"]

UNKNOWN = Reply(550, "5.1.1", "no such user here")
_DISABLED = Reply(550, "5.2.1", "the mailbox is disabled")
FULL, REFUSED = Reply(452, "4.2.2", "the mailbox is full"), Reply(552, "5.2.2", "the mailbox is full")
_FILED = Reply(250, "2.1.5", "filed")


def limits_of(user: User, settings: Settings) -> Limits:
    """A user's quota: the user's own, else that of the configuration."""

    def own(value: int, general: int) -> int:
        return max(value, 0) if value else general

    return Limits(own(user.octets, settings.quota), own(user.messages, settings.messages))


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
        self, mailboxes: Mailboxes, settings: Callable[[], Settings], count: Callable[[str], None] = lambda _: None
    ) -> None:
        self._mailboxes = mailboxes
        self._settings = settings
        self._count = count
        self._tasks: set[asyncio.Task[list[Landed]]] = set()

    async def deliver(
        self, queue_id: int, attempt: int, sender: str, recipients: Iterable[tuple[int, str]], data: list[bytes] | BigFile
    ) -> tuple[dict[int, Reply], list[int], list[Onward]]:
        """File a message for its recipients (index, address). The reply to each, the shards that were asked, and messages that
        are to come into the queue with the outcome. A recipient that was filed before, by an attempt whose outcome was lost, is
        not filed again. `attempt`: the number of attempts whose outcomes are recorded."""
        settings = self._settings()
        replies: dict[int, Reply] = {}
        targets: list[tuple[int, Target]] = []
        owners: list[int] = []  # the recipient of each target
        for index, address in recipients:
            try:
                users = self._users(address, settings)
            except RelayError as error:
                replies[index] = Reply(450, "4.2.4", str(error))
                continue
            if isinstance(users, Reply):
                replies[index] = users
                continue
            prefix = _prefix(sender, address)
            for user in users:
                once = (queue_id, index, user.ident)
                targets.append((user.shard, Target(user.ident, prefix=prefix, limits=limits_of(user, settings), once=once)))
                owners.append(index)
        for index, result in zip(owners, await self._mailboxes.file(data, targets), strict=True):
            reply = self._counted(result, settings)
            if index not in replies or _rank(reply) > _rank(replies[index]):
                replies[index] = reply
        return replies, sorted({shard for shard, _ in targets}), []

    def file(
        self, sender: str, recipients: list[str], data: list[bytes], done: Callable[[list[Landed] | Exception], None]
    ) -> None:
        """As `deliver_now`, whoever waits for it: `done(landed)` is called at its end, or `done(error)`."""

        def ended(task: "asyncio.Task[list[Landed]]") -> None:
            self._tasks.discard(task)
            error = StoreError("the relay stops") if task.cancelled() else task.exception()
            if error is None:
                done(task.result())
            else:
                done(error if isinstance(error, Exception) else StoreError(repr(error)))

        task = asyncio.get_running_loop().create_task(self.deliver_now(sender, recipients, data))
        self._tasks.add(task)
        task.add_done_callback(ended)

    async def end(self, seconds: float) -> None:
        """Wait for what `file` has begun, `seconds` at most, and give up the rest. Nothing may be begun any more."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def deliver_now(self, sender: str, recipients: list[str], data: list[bytes]) -> list[Landed]:
        """File a message of an LMTP client; what has become of it for each recipient. An address that is there twice gets one
        copy. What was filed is not remembered: a client that has no reply and tries again is the one who decides that."""
        settings = self._settings()
        ways = {address: self._way(address, settings) for address in recipients}
        targets: list[tuple[int, Target]] = []
        for address, way in ways.items():
            prefix = _prefix(sender, address)
            targets += [(user.shard, Target(user.ident, prefix=prefix, limits=limits_of(user, settings))) for user in way.users]
        results = iter([self._counted(result, settings) for result in await self._mailboxes.file(data, targets)])
        landed = {address: way.landed([next(results) for _ in way.users]) for address, way in ways.items()}
        return [landed[address] for address in recipients]

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

    def _users(self, address: str, settings: Settings) -> list[User] | Reply:
        """The users that an address leads to, or the reply that refuses it. RelayError: it leads to nobody now."""
        found = self._mailboxes.find(address, settings.subaddress)
        if found is None:
            return UNKNOWN
        if found.others and not found.users:  # those of mail that comes by SMTP are replaced when it is accepted
            raise RelayError(f"{address} is an alias of addresses elsewhere only")
        refused = [status for user in found.users if (status := status_of(user)) is not None]
        good = [user for user in found.users if status_of(user) is None]
        return good or refused[0]


class _Way(NamedTuple):
    """Where a message for an address goes: to users, and to addresses elsewhere. `reply`: what holds where it goes to neither."""

    reply: Reply
    users: list[User]
    others: list[str]

    def landed(self, replies: list[Reply]) -> Landed:
        """What has become of it, by the reply of each user's mailbox. Where all that it is for cannot have it now, the client
        tries again; where it has been filed for some, it must not: those would get it twice."""
        said = list(zip(self.users, replies, strict=True))
        filed = [user.address for user, reply in said if reply.code < 300]
        later = [user.address for user, reply in said if 400 <= reply.code < 500]
        if not said or (len(later) == len(said) and not self.others):
            return Landed(replies[0] if replies else self.reply, [], self.others)
        worst = max((reply for reply in replies if not 400 <= reply.code < 500), default=_FILED)
        return Landed(worst, filed, [*self.others, *later])


def _rank(reply: Reply) -> tuple[bool, int]:
    """Which reply of several users holds for their alias: while one can have the message later it is asked for again (those who
    have it are left out then); what is refused for good is said once nobody is waited for."""
    return 400 <= reply.code < 500, reply.code


def _prefix(sender: str, address: str) -> bytes:
    return f"Return-Path: <{sender}>\r\nDelivered-To: {address}\r\n".encode()


def _reply(result: Result | StoreError, settings: Settings) -> Reply:
    if isinstance(result, StoreFull):
        return Reply(452, "4.3.1", "there is no room for mail now")
    if isinstance(result, StoreError):
        return Reply(451, "4.3.0", "the mailbox cannot be written to now")
    if result.filed is not None or not result.code:
        return _FILED
    if result.code == OVERQUOTA:
        return REFUSED if settings.over_quota == "refuse" else FULL
    if result.code == LIMIT:
        return Reply(452, "4.2.2", result.text)
    return Reply(450, "4.2.0", result.text)
