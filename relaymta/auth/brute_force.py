"""Limits on failed login attempts by address and account, shared by all workers.

An attempt holds one unit of its address's failure budget (IPv6: of the /64's, and of the /48's, which is larger; where the
address is unknown, of that of all such clients of one proxy) and one of its account's while it is checked; only when it fails
they are used up. So no more attempts are under way at once than may fail, and what a worker held that was killed is free again.
An attempt that finds no unit while others are under way waits for them, since they may succeed. An address without failures is
not limited by its account's budget: an attack on an account cannot lock its owner out.
"""

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import Iterable

from relaymta.auth.identity import folded, group_of, wider_group_of
from relaymta.auth.passwords import Busy
from relaymta.config import AccountsTable
from relaymta.shm import Limits, Rates

__all__ = ["LoginAttempt", "LoginLimits"]

WIDER = 8  # a /48, and the unknown clients of a proxy, may have this many times the failures of one address (IPv6: /64)
_Groups = list[tuple[str, int]]  # the groups that an address is limited by, and how many times the limit of one address each has
ANY = 1 << 30  # limit of a counter that only counts
POLL_FIRST, POLL_LONGEST = 0.1, 2.0  # seconds between polls, doubled each time: other workers do not signal the end of an attempt
WAIT_SECONDS = 30.0  # seconds that an attempt waits to begin
MOST_WAITING = 200  # attempts of one address, in this worker


class LoginAttempt:
    """A login attempt under way, and the units it holds. `failed`: its address has failed before. `end()` must be called once its
    result is known; further calls do nothing."""

    __slots__ = ("_login_limits", "_taken", "account", "failed", "groups")

    def __init__(self, limits: "LoginLimits", groups: _Groups, account: str, taken: list[str], failed: bool) -> None:
        self._login_limits = limits
        self._taken: list[str] | None = taken
        self.groups = groups
        self.account = account
        self.failed = failed

    def end(self, wrong: bool, user: str = "") -> None:
        """The attempt has ended. `wrong`: the credentials were wrong, so its units are used up; otherwise they are free again.
        `user`: the account's name, if the back end has another for it than the client."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._login_limits.ended(self, taken, wrong, user)


class LoginLimits:
    """One worker's access to the limits. `secret`: keys the hash of account names, so that no client can choose a name that
    shares another's limit."""

    def __init__(self, settings: AccountsTable, secret: bytes, rates: Rates, limits: Limits) -> None:
        self._most, self._rate = settings.failures, 1 / max(0.001, settings.failures_forgotten)
        self._secret = secret
        self._rates, self._limits = rates, limits
        self._under_way: Counter[str] = Counter()  # attempts in this worker, by address group
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # attempts that wait to begin, by address group

    async def begin(self, user: str, address: str, at_once: int, behind: str = "") -> LoginAttempt | None:
        """Begin an attempt as `user` ("": no name is given yet) from `address`, or an unknown one `behind` a proxy. It waits
        while `at_once` attempts of the address are under way in this worker. None: too many failures. Busy: too many wait, or it
        waited WAIT_SECONDS."""
        groups = _groups(address, behind)
        found = self._reserve(user, groups, at_once)
        if found is True:
            found = await self._wait(user, groups, at_once)
        return found if isinstance(found, LoginAttempt) else None

    async def _wait(self, user: str, groups: _Groups, at_once: int) -> LoginAttempt | bool:
        loop, where = asyncio.get_running_loop(), groups[0][0]
        until, again = loop.time() + WAIT_SECONDS, POLL_FIRST
        while (found := self._reserve(user, groups, at_once)) is True:
            if len(self._waiting.get(where, ())) >= MOST_WAITING or loop.time() > until:
                raise Busy(f"too many login attempts of {where} are waiting")
            queue, waiter = self._waiting.setdefault(where, deque()), loop.create_future()
            queue.append(waiter)
            try:
                await asyncio.wait([waiter], timeout=again)
            finally:
                if waiter in queue:
                    queue.remove(waiter)
                if not queue and self._waiting.get(where) is queue:
                    del self._waiting[where]
            again = min(2 * again, POLL_LONGEST)  # thousands may wait at once
        return found

    def _reserve(self, user: str, groups: _Groups, at_once: int) -> LoginAttempt | bool:
        """Take an attempt's units. True: attempts under way hold what is left, and may give it back; False: too many
        failures."""
        if any(self._under_way[group] >= at_once * times for group, times in groups):
            return True
        where = f"login from {groups[0][0]}"
        failed = self._rates.wait(where, self._rate) > 0
        account = self._key(user) if user else ""
        taken: list[str] = []
        for group, times in groups:
            key = f"login from {group}"
            if not self._took(key, self._most * times):
                self._give(taken)
                return self._left(key, self._most * times) >= 1
            taken.append(key)
        if account and self._took(account, self._most):
            taken.append(account)
        elif account and failed:
            self._give(taken)
            return self._left(account, self._most) >= 1
        self._under_way.update(group for group, _ in groups)
        return LoginAttempt(self, groups, account, taken, failed)

    def _took(self, key: str, most: int) -> bool:
        # Of two workers that take the last unit at the same time none gets it, since each has counted itself before it looks.
        self._limits.take(key, ANY)
        left = self._left(key, most)
        if self._limits.apart(key):  # what the others hold is not seen: this worker has its share of what is left
            left = min(left, max(1, left // self._limits.workers))
        if self._limits.taken(key) <= left:
            return True
        self._limits.give(key)
        return False

    def _left(self, key: str, most: int) -> float:
        """The units of a budget that failures have not used up."""
        return most - self._rates.used(key, self._rate)

    def _give(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._limits.give(key)

    def ended(self, attempt: LoginAttempt, taken: list[str], wrong: bool, user: str) -> None:
        """Called by LoginAttempt.end, once."""
        self._under_way.subtract(group for group, _ in attempt.groups)
        for group, _ in attempt.groups:
            if not self._under_way[group]:
                del self._under_way[group]
        if wrong:
            for key in taken:  # first, so that what fails is not free in between
                self._rates.take(key, self._rate, ANY)
            if user and (account := self._key(user)) != attempt.account:
                self._rates.take(account, self._rate, self._most)
        self._give(taken)
        queue = self._waiting.get(attempt.groups[0][0])
        if queue:
            queue.popleft().set_result(None)

    def under_way(self, attempt: LoginAttempt) -> int:
        """The attempts under way in this worker from this one's address, or an eighth of those from its /48, if that is more."""
        return max(self._under_way[group] // times for group, times in attempt.groups)

    def _key(self, user: str) -> str:
        """The name of an account's limit: a keyed hash, so it cannot be chosen by a client. Unknown users have one, too."""
        return f"login as {hashlib.blake2b(folded(user).encode(), key=self._secret[:64], digest_size=16).hexdigest()}"


def _groups(address: str, behind: str) -> _Groups:
    """The narrowest first."""
    if behind:
        return [(f"unknown behind {group_of(behind)}", WIDER)]
    wider = wider_group_of(address)
    return [(group_of(address), 1), *([(wider, WIDER)] if wider else [])]
