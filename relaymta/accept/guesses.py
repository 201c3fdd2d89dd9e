"""How often somebody may guess, for all workers together: failed logins, and those under way, of addresses and of accounts.

A login takes one of its address's failures (IPv6: of the /64, and of the /48, which has more) and one of its account's before it
is checked, and gives them back unless it was wrong: no more wrong ones are under way at once than may fail. Who finds none left
while others are under way waits for them: they may be right. An address that has not failed is heard even where its account is
under attack, so that nobody can be locked out by others.
"""

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Iterable

from relaymta.accept.identity import folded, group_of, wider_group_of
from relaymta.accept.passwords import Busy
from relaymta.config import AccountsTable
from relaymta.shm import Limits, Rates

__all__ = ["Guess", "Guesses"]

WIDER = 8  # what one address (IPv6: /64) may, a /48 may so many times
ANY = 1 << 30  # logins under way are counted here, not limited
LOOK_AGAIN, SELDOM = 0.1, 2.0  # seconds until who waits looks again, later and later: other workers do not say when a login ends
PATIENCE = 30.0  # seconds somebody waits for their turn
MOST_WAITING = 200  # of one address, in this worker


class Guess:
    """A login under way, and what it has taken. `failed`: its address has failed before. `end()` is called once it is known."""

    __slots__ = ("_guesses", "_taken", "account", "failed", "groups")

    def __init__(self, guesses: "Guesses", groups: list[str], account: str, taken: list[str], failed: bool) -> None:
        self._guesses = guesses
        self._taken: list[str] | None = taken
        self.groups = groups
        self.account = account
        self.failed = failed

    def end(self, wrong: bool, user: str = "") -> None:
        """It was wrong, or was not, or could not be checked; whatever comes behind the first time says nothing. `user`: whose it
        was, where that is known better now."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._guesses.ended(self, taken, wrong, user)


class Guesses:
    """What one worker knows of them. `secret`: so that nobody can choose a name that shares another's limit."""

    def __init__(self, settings: AccountsTable, secret: bytes, rates: Rates, limits: Limits) -> None:
        self._most, self._rate = settings.failures, 1 / max(0.001, settings.failures_forgotten)
        self._secret = secret
        self._rates, self._limits = rates, limits
        self._here: Counter[str] = Counter()  # under way in this worker, by group of addresses
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # who waits for a turn, by address

    async def begin(self, user: str, address: str, at_once: int) -> Guess | None:
        """A login as `user` ("": nobody is named) begins, when its turn has come: no more than `at_once` of an address are under
        way in this worker. None: too many have failed. Busy: the turn does not come."""
        found = self._reserved(user, address, at_once)
        if found is True:
            found = await self._in_turn(user, address, at_once)
        return found if isinstance(found, Guess) else None

    async def _in_turn(self, user: str, address: str, at_once: int) -> Guess | bool:
        loop, where = asyncio.get_running_loop(), group_of(address)
        until, again = loop.time() + PATIENCE, LOOK_AGAIN
        while (found := self._reserved(user, address, at_once)) is True:
            if len(self._waiting.get(where, ())) >= MOST_WAITING or loop.time() > until:
                raise Busy(f"too many logins of {where} wait for their turn")
            queue, mine = self._waiting.setdefault(where, deque()), loop.create_future()
            queue.append(mine)
            try:
                await asyncio.wait([mine], timeout=again)
            finally:
                if mine in queue:
                    queue.remove(mine)
                if not queue and self._waiting.get(where) is queue:
                    del self._waiting[where]
            again = min(2 * again, SELDOM)  # there may be thousands who look
        return found

    def _reserved(self, user: str, address: str, at_once: int) -> Guess | bool:
        """What a login takes. True: that may be there once others that are under way have ended; False: it is not there."""
        groups = [group_of(address), *filter(None, [wider_group_of(address)])]
        if any(self._here[group] >= at_once * times for group, times in zip(groups, (1, WIDER), strict=False)):
            return True
        where = f"login from {groups[0]}"
        failed = self._rates.wait(where, self._rate, 1 + self._limits.taken(where)) > 0
        account = self._key(user) if user else ""
        taken: list[str] = []
        for key, most in zip((f"login from {group}" for group in groups), (self._most, self._most * WIDER), strict=False):
            if not self._took(key, most):
                self._give(taken)
                return self._limits.taken(key) > 0
            taken.append(key)
        if account and self._took(account, self._most):
            taken.append(account)
        elif account and failed:
            self._give(taken)
            return self._limits.taken(account) > 0
        self._here.update(groups)
        return Guess(self, groups, account, taken, failed)

    def _took(self, key: str, most: int) -> bool:
        # Counted as under way before and until behind its unit: nobody takes one that is not counted for a failure.
        self._limits.take(key, ANY)
        if not self._rates.take(key, self._rate, most):
            return True
        self._limits.give(key)
        return False

    def _give(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._rates.give(key, self._rate)
            self._limits.give(key)

    def ended(self, guess: Guess, taken: list[str], wrong: bool, user: str) -> None:
        """See Guess.end."""
        self._here.subtract(guess.groups)
        for group in guess.groups:
            if not self._here[group]:
                del self._here[group]
        if wrong:
            for key in taken:
                self._limits.give(key)
            if user and (account := self._key(user)) != guess.account:
                self._rates.take(account, self._rate, self._most)
        else:
            self._give(taken)
        queue = self._waiting.get(guess.groups[0])
        if queue:
            queue.popleft().set_result(None)

    def under_way(self, guess: Guess) -> int:
        """How many logins of the address of this one are under way here, or, where that is worse, of its /48 as one address."""
        return max(self._here[group] // times for group, times in zip(guess.groups, (1, WIDER), strict=False))

    def _key(self, user: str) -> str:
        """An account's limit, by its name: nobody can say where it is kept. Names of nobody have one as others do."""
        return f"login as {hashlib.blake2b(folded(user).encode(), key=self._secret[:64], digest_size=16).hexdigest()}"
