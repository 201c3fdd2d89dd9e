"""A message of the queue for its recipients' mailboxes: one reply for each recipient, as LMTP has (RFC 2033 4.2)."""

from collections.abc import Callable, Iterable

from relaymta.config import Mailboxes as Settings
from relaymta.disk.big import BigFile
from relaymta.errors import RelayError, StoreError, StoreFull
from relaymta.proto.said import Reply
from relaymta.store.change import LIMIT, OVERQUOTA, Limits
from relaymta.store.directory import User
from relaymta.store.mailboxes import Mailboxes
from relaymta.store.writer import Result, Target

__all__ = ["UNKNOWN", "Delivery", "limits_of", "status_of"]


UNKNOWN = Reply(550, "5.1.1", "no such user here")
_DISABLED = Reply(550, "5.2.1", "the mailbox is disabled")
_FULL, _REFUSED = Reply(452, "4.2.2", "the mailbox is full"), Reply(552, "5.2.2", "the mailbox is full")
_FILED = Reply(250, "2.1.5", "filed")


def limits_of(user: User, settings: Settings) -> Limits:
    """A user's quota: the user's own, else that of the configuration."""

    def own(value: int, general: int) -> int:
        return max(value, 0) if value else general

    return Limits(own(user.octets, settings.quota), own(user.messages, settings.messages))


def status_of(user: User) -> Reply | None:
    """Why a user gets no mail at all; None: mail is filed."""
    if user.deleted:
        return UNKNOWN
    return _DISABLED if user.disabled else None


class Delivery:
    """Files messages of the queue. `settings()`: the configuration in use."""

    def __init__(self, mailboxes: Mailboxes, settings: Callable[[], Settings]) -> None:
        self._mailboxes = mailboxes
        self._settings = settings

    async def deliver(
        self, queue_id: int, sender: str, recipients: Iterable[tuple[int, str]], data: list[bytes] | BigFile
    ) -> tuple[dict[int, Reply], list[int]]:
        """File a message for its recipients (index, address). The reply to each, and the shards that were asked. A recipient that
        was filed before, by an attempt whose outcome was lost, is not filed again."""
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
            prefix = f"Return-Path: <{sender}>\r\nDelivered-To: {address}\r\n".encode()
            for user in users:
                once = (queue_id, index, user.ident)
                targets.append((user.shard, Target(user.ident, prefix=prefix, limits=limits_of(user, settings), once=once)))
                owners.append(index)
        for index, result in zip(owners, await self._mailboxes.file(data, targets), strict=True):
            reply = _reply(result, settings)
            if index not in replies or reply.code > replies[index].code:  # filed for some: the others are tried again
                replies[index] = reply
        return replies, sorted({shard for shard, _ in targets})

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


def _reply(result: Result | StoreError, settings: Settings) -> Reply:
    if isinstance(result, StoreFull):
        return Reply(452, "4.3.1", "there is no room for mail now")
    if isinstance(result, StoreError):
        return Reply(451, "4.3.0", "the mailbox cannot be written to now")
    if result.filed is not None or not result.code:
        return _FILED
    if result.code == OVERQUOTA:
        return _REFUSED if settings.over_quota == "refuse" else _FULL
    if result.code == LIMIT:
        return Reply(452, "4.2.2", result.text)
    return Reply(450, "4.2.0", result.text)
