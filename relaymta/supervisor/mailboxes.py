"""The mailboxes of the machine: who owns which shard, the channels between their owners, and the changes of the directory, which
only the supervisor writes."""

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from relaymta.auth.passwords import PEOPLE_ITERATIONS, scram
from relaymta.config import Config
from relaymta.control import Channel, Refused
from relaymta.disk.shards import MAIL, shard_numbers
from relaymta.errors import RelayError, near
from relaymta.proto.address import comparable, domain_matches, domain_of, plain
from relaymta.store.directory import REMOVING, Directory, User, Version
from relaymta.supervisor.slots import Slot, Slots
from relaymta.supervisor.upkeep import Upkeep

__all__ = ["MachineMailboxes"]

JOIN_SECONDS = 0.2  # between two looks at who is ready
ANSWER_SECONDS = 5.0


class MachineMailboxes:
    """Owner of the directory, and of which slot has which shards: shard K is of slot K modulo their number. StoreError when the
    directory cannot be opened."""

    def __init__(self, spool: Path, workers: int, slots: Slots, version: Version, warn: Callable[[str], None]) -> None:
        self.directory = Directory(spool / MAIL / "directory", writable=True, version=version)
        self._workers = workers
        self._slots = slots
        self.shards = max([workers, *(number + 1 for number in shard_numbers(spool / MAIL))])
        self._joined: dict[tuple[int, int], tuple[Channel, Channel]] = {}  # by the slots; changed by `_keep_joined` alone
        self._joining: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # one change of the directory at a time: each looks first
        self._placed = self.directory.count()
        self.upkeep = Upkeep(self.directory, self.owner, spool / MAIL, self.shards, warn)

    def start(self) -> None:
        """Keep the owners joined from now on. (What is to be done now and then: `upkeep.start`.)"""
        self._joining = asyncio.get_running_loop().create_task(self._keep_joined())

    def close(self) -> None:
        """End what runs in the background. The directory stays open, since a thread may be reading it: the process ends."""
        if self._joining is not None:
            self._joining.cancel()
        self.upkeep.stop()

    def of(self, slot: int) -> list[int]:
        """The shards that the worker of a slot owns."""
        return [number for number in range(self.shards) if number % self._workers == slot]

    async def _keep_joined(self) -> None:
        """Join each two workers that are ready, so that they ask each other: again when one of them is another process, or has
        not answered."""
        while True:
            for (one, first), (other, second) in itertools.combinations(self._slots.ready(), 2):
                pair = one.number, other.number
                with contextlib.suppress(OSError):  # no descriptor is left: tried again
                    if self._joined.get(pair) != (first, second) and await self._join((one, first), (other, second)):
                        self._joined[pair] = first, second
            await asyncio.sleep(JOIN_SECONDS)

    async def _join(self, one: tuple[Slot, Channel], other: tuple[Slot, Channel]) -> bool:
        """Give two workers the ends of a socket; whether both have taken theirs."""
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                for end, (_, channel), (peer, _) in zip(ends, (one, other), (other, one), strict=True):
                    await channel.ask("peer", [end.fileno()], shards=self.of(peer.number))
        except (ConnectionError, Refused, TimeoutError):
            return False
        finally:
            for end in ends:
                end.close()
        return True

    # Changes

    async def create(self, config: Config, address: str, password: str, octets: int, messages: int) -> User:
        """Add a user: first the mailboxes, then the directory's row, so that there is never a user without INBOX. RelayError."""
        address = self._address(config, address)
        secret = await asyncio.to_thread(_secret, password) if password else ""
        async with self._changing:
            return await self._create(config, address, secret, octets, messages)

    async def _create(self, config: Config, address: str, secret: str, octets: int, messages: int) -> User:
        self.directory.check_free(address)
        ident = await asyncio.to_thread(self.directory.next_ident)
        user = User(ident, address, self._next_shard(), octets, messages, secret)
        special = [list(pair) for pair in config.mailboxes.special.items()]
        uidvalidity = await asyncio.to_thread(self.directory.raise_uidvalidity, int(time.time()))
        await self.owner("mail_user", shard=user.shard, user=ident, mailboxes=special, uidvalidity=uidvalidity)
        await asyncio.to_thread(self.directory.add, user)
        return user

    def _address(self, config: Config, text: str) -> str:
        """An address whose mail is kept here, as the directory has it. RelayError for any other."""
        if plain(text) is None or "@" not in text:
            raise RelayError(f"{text!r} is not an address")
        address = comparable(text)
        self._check_domain(config, domain_of(address))
        return address

    def _check_domain(self, config: Config, domain: str) -> None:
        if not kept_here(config, domain):
            raise RelayError(f"no route keeps mail for {domain}{near(domain, config.local_domains)}")

    def _next_shard(self) -> int:
        """Users are placed in turn."""
        self._placed += 1
        return self._placed % self.shards

    async def owner(self, op: str, seconds: float = 30.0, *, shard: int, **args: Any) -> Any:
        """The answer of the worker that has a shard. RelayError when there is none."""
        slot = next((slot for slot in self._slots if slot.number == shard % self._workers), None)
        if slot is None or not slot.ready or slot.channel is None:
            raise RelayError(f"the worker that has shard {shard} of the mailboxes is not ready; try again")
        try:
            return await slot.channel.ask(op, None, seconds, shard=shard, **args)
        except ConnectionError as error:
            raise RelayError(f"the worker that has shard {shard} of the mailboxes has not answered: {error}") from None

    async def alias(self, config: Config, address: str, targets: list[str]) -> None:
        """As `Directory.set_alias`."""
        if address.startswith("@"):
            self._check_domain(config, domain_of(comparable(address)))
        else:
            address = self._address(config, address)
        wrong = next((target for target in targets if plain(target) is None or "@" not in target), None)
        if wrong is not None:
            raise RelayError(f"{wrong!r} is not an address")
        async with self._changing:
            here = partial(kept_here, config)
            await asyncio.to_thread(self.directory.set_alias, address, targets, here, config.mailboxes.subaddress)

    async def change(self, address: str, changes: dict[str, Any]) -> User:
        """Change a user's row. NoSuch."""
        if "secret" in changes:
            changes = changes | {"secret": await asyncio.to_thread(_secret, changes["secret"])}
        if changes.get("disabled") is False:
            changes = changes | {"deleted": 0}

        def change(user: User) -> User:
            if user.deleted == REMOVING:
                raise RelayError(f"{user.address} is being removed")
            return msgspec.structs.replace(user, **changes)

        return await asyncio.to_thread(self.directory.replace, address, change)

    async def rename(self, config: Config, address: str, new: str) -> User:
        """As `Directory.rename`."""
        new = self._address(config, new)
        async with self._changing:
            return await asyncio.to_thread(self.directory.rename, address, new)

    # Users from elsewhere

    async def begin_restore(self, config: Config, address: str) -> tuple[int, int, int]:
        """(id, shard, least UIDVALIDITY) for a user who is to be restored, part by part, before `end_restore`. RelayError: the
        address is taken."""
        self.directory.check_free(self._address(config, address))
        uidvalidity = await asyncio.to_thread(self.directory.raise_uidvalidity, int(time.time()))
        return await asyncio.to_thread(self.directory.next_ident), self._next_shard(), uidvalidity

    async def owner_of(self, address: str, op: str, **args: Any) -> Any:
        """The answer of the worker that has a user. NoSuch, RelayError."""
        user = await asyncio.to_thread(self.directory.known, address)
        return await self.owner(op, 120.0, shard=user.shard, user=user.ident, **args)

    async def end_restore(self, config: Config, user: User, addresses: list[str]) -> list[str]:
        """Add a restored user to the directory; the addresses that could not be given. RelayError."""
        address = self._address(config, user.address)
        async with self._changing:
            await asyncio.to_thread(self.directory.add, msgspec.structs.replace(user, address=address))
            return await asyncio.to_thread(self._given, config, user, addresses)

    def _given(self, config: Config, user: User, addresses: list[str]) -> list[str]:
        """Give a user the addresses that nobody has; the others."""
        refused = []
        for address in addresses:
            try:
                if address != user.address:
                    self._check_domain(config, domain_of(comparable(address)))
                    self.directory.give(user.ident, address)
            except RelayError:
                refused.append(address)
        return refused


def kept_here(config: Config, domain: str) -> bool:
    """Whether a route keeps mail for a domain."""
    return domain_matches(domain, config.local_domains)


def _secret(password: str) -> str:
    """What is stored of a password. RelayError when it cannot be one."""
    try:
        return scram(password, PEOPLE_ITERATIONS)
    except ValueError as error:
        raise RelayError(f"this cannot be a password: {error}") from None
