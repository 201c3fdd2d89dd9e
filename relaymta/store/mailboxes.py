"""The mailboxes as one process sees them: the directory, the shards that it owns, and those of others by way of their owners.

A message is filed by one operation for each shard concerned. What is asked of another owner goes over a channel; when that owner
ends before it has answered, the caller is told so (the queue asks again, and nothing is filed twice).
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import lmdb
import msgspec

from relaymta.control import Late
from relaymta.disk.big import BigFile
from relaymta.disk.shards import MAIL
from relaymta.errors import RelayError, StoreError
from relaymta.store import scripts
from relaymta.store.asked import Answer, Copied, Message, Partial, Stored
from relaymta.store.carry import Carried, Part, convert_part
from relaymta.store.change import LIMIT, MOVING, Change, Limits, Refusal
from relaymta.store.directory import Directory, Found, Version
from relaymta.store.others import ReadOnly
from relaymta.store.reading import Readable
from relaymta.store.rows import UserRow
from relaymta.store.shard import Shard
from relaymta.store.shown import flags_from
from relaymta.store.watching import Listener, Told, Watches
from relaymta.store.writer import File, Result, Target

__all__ = ["OF_SUPERVISOR", "Copied", "Mailboxes", "Message", "Partial", "Stored"]

OWNER_SECONDS = 30.0  # for an answer of another owner
CHANGE_SECONDS = 600.0  # for one of a session, which may concern many messages
OWNERS_MOST = 5  # that are asked for one thing, each having ended before it answered
DONE_TOGETHER = 1000  # messages, and rows of what was filed of them
REPLACED_SECONDS = 10.0  # for which the successor of an owner that has ended is waited for


class Peer(Listener, Protocol):
    """The channel to another owner (control.Channel)."""

    async def ask(self, op: str, descriptors: list[int] | None = None, seconds: float | None = None, /, **args: Any) -> Any:
        """Its answer to a request."""


class Mailboxes:
    """`own`: the numbers of the shards that this process owns. `version`: as of Directory. SpoolBusy when another process owns
    one of them."""

    def __init__(
        self,
        spool: Path,
        own: list[int],
        version: Version | None = None,
    ) -> None:
        folder = spool / MAIL
        self.directory = Directory(folder / "directory", version=version)
        self.shards = {number: Shard(folder, number, partial(self._told, number)) for number in own}
        self._watches = Watches()
        self._others = ReadOnly(folder)
        self._peers: dict[int, Peer] = {}  # by the shard that each owns
        self._changed = asyncio.Event()  # set, and replaced, when there is a new one

    async def start(self) -> None:
        """Begin to commit."""
        for shard in self.shards.values():
            await shard.start()

    async def stop(self) -> None:
        """Commit what is pending and close."""
        for shard in self.shards.values():
            await shard.stop()
        self._others.close()
        self.directory.close()

    def reach(self, shards: list[int], peer: Peer) -> None:
        """The owner of these shards is at the other end of a channel."""
        for number in shards:
            self._peers[number] = peer
            if mailboxes := self._watches.mailboxes(number):
                peer.notify("mail_watch", shard=number, mailboxes=mailboxes)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def leave(self, peer: Peer) -> None:
        """The channel to another process is closed."""
        self._watches.forget(peer)
        self._peers = {number: one for number, one in self._peers.items() if one is not peer}

    def find(self, recipient: str, separator: str) -> Found | None:
        """As `Directory.find`."""
        return self.directory.find(recipient, separator)

    def readable(self, shard: int) -> Readable | None:
        """A shard, whoever owns it, as it can be read here; None when it cannot be now."""
        return self.shards.get(shard) or self._others.shard(shard)

    def reading(self, shard: int) -> Readable:
        """As `readable`. StoreError when it cannot be read now."""
        found = self.readable(shard)
        if found is None:
            raise StoreError(f"shard {shard} of the mailboxes cannot be read now")
        return found

    def used(self, shard: int, user: int) -> UserRow | None:
        """What a user has used by the last commit; None: unknown. Some microseconds, on the loop; nothing is waited for."""
        found = self.readable(shard)
        if found is None:
            return None
        try:
            with found.rows.reading(0) as txn:
                return found.rows.user(txn, user)
        except (StoreError, lmdb.Error, msgspec.MsgspecError):
            return None

    def has_script(self, shard: int, user: int) -> bool:
        """Whether a Sieve script is run for a user. A microsecond, on the loop; nothing is waited for. lmdb.Error, StoreError."""
        own = self.shards.get(shard)
        if own is not None:
            return own.has_script(user)
        rows = self.reading(shard).rows
        with rows.reading() as txn:
            return scripts.active_ident(rows, txn, user) > 0

    async def file(self, data: list[bytes] | BigFile, targets: list[tuple[int, Target]]) -> list[Result | StoreError]:
        """File a message, `data` in pieces or a large one's file, for targets (shard, target): the result for each, in their
        order; StoreError in place of those whose shard could not commit, or whose owner did not answer."""
        by_shard: dict[int, list[int]] = defaultdict(list)
        for place, (number, _) in enumerate(targets):
            by_shard[number].append(place)
        if len(by_shard) == 1:  # as for most messages: then without a task
            return list(await self._file_in(number, data, [target for _, target in targets]))
        asked = [self._file_in(number, data, [targets[place][1] for place in places]) for number, places in by_shard.items()]
        found: dict[int, Result | StoreError] = {}
        for places, results in zip(by_shard.values(), await asyncio.gather(*asked), strict=True):
            found.update(zip(places, results, strict=True))
        return [found[place] for place in range(len(targets))]

    def submit(
        self, number: int, data: list[bytes], targets: list[Target], done: Callable[[list[Result] | list[StoreError]], None]
    ) -> bool:
        """As `file`, for targets in one shard, whoever waits for it: `done(results)` is called in another turn of the loop.
        False: that is for `file`, since the shard is another process's, or the message a large one."""
        shard = self.shards.get(number)
        if shard is None or not shard.is_small(data):
            return False

        def filed(file: File) -> None:
            done(file.results if file.error is None else [file.error] * len(targets))

        try:
            shard.submit(data, targets, filed)
        except StoreError as error:
            asyncio.get_running_loop().call_soon(done, [error] * len(targets))
        return True

    async def _file_in(self, number: int, data: list[bytes] | BigFile, targets: list[Target]) -> list[Result] | list[StoreError]:
        try:
            shard = self.shards.get(number)
            if shard is not None:
                return await shard.file(data, targets)
            sent = data if isinstance(data, BigFile) else b"".join(data)
            again = all(target.once is not None for target in targets)  # else it would be filed twice: the client decides that
            answer = await self._asked(number, "mail_file", again, shard=number, data=sent, targets=targets)
            return msgspec.convert(answer, list[Result])
        except StoreError as error:
            return [error] * len(targets)
        except (ConnectionError, RelayError) as error:
            return [StoreError(str(error))] * len(targets)

    async def _asked(self, number: int, op: str, again: bool = True, seconds: float = OWNER_SECONDS, /, **args: Any) -> Any:
        """The answer of a shard's owner: to what may be asked twice (`again`), of its successor, where it ends first.
        ConnectionError, Refused."""
        for _ in range(OWNERS_MOST):
            peer, changed = self._peers.get(number), self._changed
            try:
                if peer is None:
                    raise ConnectionError(f"nobody owns shard {number} of the mailboxes now")
                return await peer.ask(op, None, seconds, **args)
            except Late:
                raise
            except ConnectionError as error:
                if peer is not None and not again:
                    raise
                try:
                    await self._replaced(number, peer, changed)
                except TimeoutError:
                    raise error from None
        raise ConnectionError(f"the owners of shard {number} of the mailboxes end one after another")

    async def _replaced(self, number: int, peer: Peer | None, changed: asyncio.Event) -> None:
        """Wait for another owner of a shard than this one. TimeoutError: there is none."""
        async with asyncio.timeout(REPLACED_SECONDS):
            while self._peers.get(number) is peer:
                await changed.wait()
                changed = self._changed

    async def filed_for_peer(self, shard: int, data: Any, targets: list[Any]) -> list[Result]:
        """What another process has asked for by `mail_file`. StoreError."""
        what = [data] if isinstance(data, bytes) else msgspec.convert(data, BigFile)
        return await self._own(shard).file(what, msgspec.convert(targets, list[Target]))

    def _own(self, number: int) -> Shard:
        if number not in self.shards:
            raise StoreError(f"shard {number} of the mailboxes is not owned here")
        return self.shards[number]

    async def change(self, number: int, what: str, *args: Any) -> Any:
        """What a session asks of a shard's owner: an operation of `CHANGES`, with the arguments and the result of the Shard's
        method. What may be done twice is asked of the owner's successor, where it ends first. Refusal; StoreError, RelayError,
        ConnectionError: it may have been done, or in part."""
        method, _, result, again = CHANGES[what]
        if number in self.shards:
            return await method(self.shards[number], *args)
        if what == "store_flags" and args[-1] is not None:
            again = False  # what it has changed itself would be said to be modified by others
        answer = await self._asked(number, "mail_change", again, CHANGE_SECONDS, shard=number, what=what, args=args)
        return msgspec.convert(answer, Answer).taken(result)

    async def change_for_peer(self, shard: int, what: str, args: list[Any]) -> Answer:
        """What another process has asked for by `mail_change`."""
        method, kinds, _, _ = CHANGES[what]
        given = [msgspec.convert(value, kind) for value, kind in zip(args, kinds, strict=False)]
        return await Answer.of(method(self._own(shard), *given))

    def watch(self, shard: int, mailbox: int, told: Told) -> Callable[[], None]:
        """Call `told(modseq)` on the loop after each commit that has changed a mailbox, or removed it, once in a turn of the
        loop, until what this returns is called. MODSEQ 0: something may have changed; that is told when another process that owns
        the shard has begun to tell, and so whenever a new one does."""
        if self._watches.add(shard, mailbox, told):
            self._tell_owner(shard, "mail_watch", mailbox)
        watching = True

        def stop() -> None:
            nonlocal watching
            if watching and self._watches.remove(shard, mailbox, told):
                self._tell_owner(shard, "mail_unwatch", mailbox)
            watching = False

        return stop

    def _tell_owner(self, shard: int, op: str, mailbox: int) -> None:
        peer = self._peers.get(shard)
        if shard not in self.shards and peer is not None:
            peer.notify(op, shard=shard, mailboxes=[mailbox])

    def _told(self, shard: int, touched: dict[int, int]) -> None:
        self._watches.changed(shard, touched)

    async def asked_by(self, peer: Peer, op: str, args: dict[str, Any]) -> Any:
        """The answer to what another process asks for, or notifies. RelayError."""
        if op == "mail_watch":
            return self._watches.listen(peer, **args)
        if op == "mail_unwatch":
            return self._watches.ignore(peer, **args)
        if op == "mail_told":
            return self._told(args["shard"], dict(args["touched"]))
        if op not in OF_PEERS:
            raise RelayError(f"no such request of a peer: {op}")
        return await OF_PEERS[op](self, **args)

    def forget(self, queue_id: int, recipients: list[int], shards: list[int]) -> None:
        """The queue has ended these recipients of a message, which were filed in these shards."""
        for number in shards:
            if number in self.shards:
                self.shards[number].forget(queue_id, recipients)
            elif number in self._peers:
                self._peers[number].notify("mail_forget", shard=number, queue_id=queue_id, recipients=recipients)

    async def forget_for_peer(self, shard: int, queue_id: int, recipients: list[int]) -> None:
        """What another process has notified by `mail_forget`."""
        self._own(shard).forget(queue_id, recipients)

    async def add_user(self, shard: int, user: int, mailboxes: list[Any], uidvalidity: int) -> None:
        """Add a user to a shard of this process, with these mailboxes (name and special use). Refusal, StoreError."""

        def add(change: Change) -> None:
            change.add_user(user, mailboxes, uidvalidity)

        await self._own(shard).task(add)

    async def freeze_user(self, shard: int, user: int, frozen: bool = True) -> None:
        """Change nothing of a user in a shard of this process from now on; or again. Refusal, StoreError."""
        await self._own(shard).freeze(user, frozen)

    async def purge_user(self, shard: int, user: int) -> int:
        """Remove a user, if there, from a shard of this process; as `Shard.purge`. StoreError."""
        return await self._own(shard).purge(user)

    async def change_script(self, shard: int, user: int, what: str, args: list[Any]) -> None:
        """A change of a user's Sieve scripts (`CHANGES`) in a shard of this process. Refusal, StoreError."""
        await CHANGES[what][0](self._own(shard), user, *args)

    async def users_of(self, shard: int, after: int, most: int) -> list[int]:
        """A page of the ids above `after` of the users that a shard of this process has, in their order."""
        own = self._own(shard)

        def read() -> list[int]:
            with own.rows.reading() as txn:
                return list(islice(own.rows.user_idents(txn, after), most))

        return await own.readers.run(read)

    async def done_by_queue(self, shard: int, after: int) -> list[int]:
        """As `MailShard.done_by_queue`, of a shard of this process, DONE_TOGETHER at most."""
        own = self._own(shard)

        def read() -> list[int]:
            with own.rows.reading() as txn:
                return own.rows.done_by_queue(txn, after, DONE_TOGETHER)

        return await own.readers.run(read)

    async def forget_ended(self, shard: int, queue_ids: list[int]) -> None:
        """The queue has ended these messages: that they were filed in a shard of this process is forgotten. StoreError."""
        own = self._own(shard)
        while await own.task(lambda change: change.forget_ended(queue_ids, DONE_TOGETHER)) == DONE_TOGETHER:
            pass

    async def carry_user(self, shard: int, user: int, target: int) -> None:
        """Put all of a user, who is frozen, into another shard, which does not have the user. When it fails, a part may be there.
        Refusal, StoreError, ConnectionError, Refused."""
        own = self._own(shard)
        carried = Carried(own, user, large=lambda file: file)
        parts = carried.parts()
        while (part := await own.readers.run(next, parts, None)) is not None:
            carried.put(part, await self._take(target, user, part))

    async def _take(self, number: int, user: int, part: Part) -> list[int]:
        shard = self.shards.get(number)
        if shard is not None:
            return await shard.take(user, part)
        if number not in self._peers:  # it is being replaced
            with contextlib.suppress(TimeoutError):
                await self._replaced(number, None, self._changed)
        peer = self._peers.get(number)
        if peer is None:
            raise ConnectionError(f"nobody owns shard {number} of the mailboxes now")
        return list(await peer.ask("mail_take", None, CHANGE_SECONDS, shard=number, user=user, part=part))

    async def take_part(self, shard: int, user: int, part: Any) -> list[int]:
        """As `Shard.take`, in a shard of this process. Refusal, StoreError."""
        return await self._own(shard).take(user, convert_part(part))

    async def import_messages(self, shard: int, user: int, name: str, messages: list[Any]) -> list[str]:
        """Add messages to a mailbox of a user in a shard of this process, which is created if missing; quotas do not count. Why
        each is refused, "" for those that are there; what has too many keywords is there without any. Refusal, StoreError: not
        all are there."""
        own = self._own(shard)
        filing = []
        for flags, keywords, date, data in messages:
            target = Target(user, name, flags=flags_from(flags), keywords=keywords, date=date or 1, create=True)
            filing.append(self._imported(own, target, data))
        return list(await asyncio.gather(*filing))

    async def _imported(self, own: Shard, target: Target, data: bytes) -> str:
        (result,) = await own.file([data], [target])
        if result.code == LIMIT and target.keywords:
            (result,) = await own.file([data], [msgspec.structs.replace(target, keywords=[])])
        if result.code == MOVING:
            raise Refusal(result.code, result.text)
        return result.text if result.code else ""


# What sessions ask of the owner of a shard: the types of the arguments (the last may be left out where it has a default) and of
# the result, and whether it may be done twice.
CHANGES: dict[str, tuple[Callable[..., Awaitable[Any]], tuple[Any, ...], Any, bool]] = {
    "store_flags": (Shard.store_flags, (int, int, list[int], str, int, list[str], int | None), Stored, True),
    "expunge": (Shard.expunge, (int, int, list[int], bool), None, True),
    "claim_recent": (Shard.claim_recent, (int, int, int, int, bool), int, True),
    "copy": (Shard.copy, (int, int, list[int], str, Limits, bool), Copied, False),
    "append": (Shard.append, (int, str, list[Message], Limits), Copied, False),
    "create": (Shard.create, (int, str, str), None, False),
    "delete": (Shard.delete, (int, str), None, False),
    "rename": (Shard.rename, (int, str, str), None, False),
    "subscribe": (Shard.subscribe, (int, str, bool), None, True),
    "put_script": (Shard.put_script, (int, str, bytes), None, True),
    "activate_script": (Shard.activate_script, (int, str), None, True),
    "remove_script": (Shard.remove_script, (int, str), None, False),
    "rename_script": (Shard.rename_script, (int, str, str), None, False),
    "remember_reply": (Shard.remember_reply, (int, bytes, int, int, bytes), bool, True),
}
# What the supervisor asks of the owner of a shard, and what other owners ask.
OF_SUPERVISOR: dict[str, Callable[..., Awaitable[Any]]] = {
    "mail_user": Mailboxes.add_user,
    "mail_freeze": Mailboxes.freeze_user,
    "mail_purge": Mailboxes.purge_user,
    "mail_carry": Mailboxes.carry_user,
    "mail_take": Mailboxes.take_part,
    "mail_import": Mailboxes.import_messages,
    "mail_users": Mailboxes.users_of,
    "mail_done": Mailboxes.done_by_queue,
    "mail_ended": Mailboxes.forget_ended,
    "mail_script": Mailboxes.change_script,
}
OF_PEERS: dict[str, Callable[..., Awaitable[Any]]] = {
    "mail_file": Mailboxes.filed_for_peer,
    "mail_forget": Mailboxes.forget_for_peer,
    "mail_change": Mailboxes.change_for_peer,
    "mail_take": Mailboxes.take_part,
}
