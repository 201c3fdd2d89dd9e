"""Who may log in: accounts, and how often somebody may guess.

Limits are looked at before anything is computed. A failure counts for the address (IPv6: the /64) and for the account; an
address that has not failed is heard even where its account is under attack, so that nobody can be locked out by others.
Nothing but the log tells an unknown user from a wrong password.
"""

import hashlib
import hmac
import ipaddress
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from relaymta.accept.passwords import Busy, Checker, argon2id, matches, scram_keys
from relaymta.config import Account, Config, load_accounts
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.sasl import Claim, Keys, Password, Proof, Token
from relaymta.shm import Rates
from relaymta.watch import Watched

__all__ = ["Identity", "Logins", "check"]

GOOD = index("relaymta_logins_total", "good")
WRONG = index("relaymta_logins_total", "wrong")
LIMITED = index("relaymta_logins_total", "limited")
UNAVAILABLE = index("relaymta_logins_total", "unavailable")

REMEMBERED = 10_000


class Identity(NamedTuple):
    """Somebody who has logged in, and what holds for their mail ("" where the listener or network decides)."""

    name: str
    application: str
    priority: str
    senders: tuple[str, ...]

    def may_send_as(self, address: str) -> bool:
        """Whether an address is one of `senders`."""
        lower = address.lower()
        domain = lower.rpartition("@")[2]
        return not self.senders or any(
            lower == own or own == "@" + domain or (own.startswith("@.") and domain.endswith(own[1:])) for own in self.senders
        )


def check(config: Config) -> None:
    """ConfigError with what is wrong with the file of accounts, as the user who asks can read it."""
    if config.accounts.file:
        load_accounts(Path(config.accounts.file))


class Logins:
    """The accounts of one worker."""

    def __init__(self, config: Config, rates: Rates, counters: Counters, log: Log) -> None:
        self._settings = config.accounts
        path = self._settings.file
        self.watched = Watched([path] if path else [], lambda: {a.name: a for a in load_accounts(Path(path))} if path else {})
        self._rates, self._counters, self._log = rates, counters, log
        self._checker = Checker()
        self._secret = os.urandom(32)  # for what must be the same each time, and unknown to everybody
        self._nobody = argon2id(self._secret.hex())
        self._known: dict[bytes, tuple[float, str]] = {}  # digest of a password that was right: until when (monotonic), its hash

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What AUTH offers."""
        if any(scram_keys(secret.hash) for account in self._accounts.values() for secret in account.secrets):
            return ("SCRAM-SHA-256", "PLAIN", "LOGIN")
        return ("PLAIN", "LOGIN")

    @property
    def _accounts(self) -> dict[str, Account]:
        return self.watched.value or {}

    def keys(self, user: str) -> Keys:
        """For SCRAM. Of an unknown user the same each time, and as if they were somebody's."""
        for kept in self._hashes(user):
            found = scram_keys(kept)
            if found is not None:
                return found
        salt, stored, server = (hmac.digest(self._secret, f"{n} {user}".encode(), "sha256") for n in range(3))
        return Keys(salt[:16], stored, server, self._iterations())

    def _iterations(self) -> int:
        """As those have who are known."""
        hashes = (secret.hash for account in self._accounts.values() for secret in account.secrets)
        return next((keys.iterations for kept in hashes if (keys := scram_keys(kept)) is not None), 4096)

    def _hashes(self, user: str) -> list[str]:
        """What opens an account now."""
        account = self._accounts.get(user)
        if account is None:
            return []
        now = datetime.now(UTC)
        return [secret.hash for secret in account.secrets if secret.expires is None or secret.expires > now]

    async def check(self, claim: Claim, address: str) -> tuple[Identity | None, bytes]:
        """Who a client at `address` is, and the reply to its AUTH."""
        where, who = _prefix(address), claim.user
        burst, rate = self._settings.failures, 1 / max(0.001, self._settings.failures_forgotten)
        here = self._rates.wait(f"login from {where}", rate, burst)
        failed_here = self._rates.wait(f"login from {where}", rate) > 0
        if here or (failed_here and self._rates.wait(f"login as {who}", rate, burst)):
            return self._said(None, claim, address, reply.TOO_MANY_LOGINS, LIMITED)
        if isinstance(claim, Token) or self.watched.value is None:
            return self._said(None, claim, address, reply.LOGIN_UNAVAILABLE, UNAVAILABLE)
        try:
            good = claim.good if isinstance(claim, Proof) else await self._right(claim, failed_here)
        except Busy:
            return self._said(None, claim, address, reply.LOGIN_UNAVAILABLE, UNAVAILABLE)
        account = self._accounts.get(who)
        if not good or account is None:
            self._rates.take(f"login from {where}", rate, burst)
            self._rates.take(f"login as {who}", rate, burst)
            return self._said(None, claim, address, reply.WRONG_CREDENTIALS, WRONG)
        found = Identity(account.name, account.application, account.priority or "", tuple(s.lower() for s in account.senders))
        return self._said(found, claim, address, reply.LOGGED_IN, GOOD)

    async def _right(self, claim: Password, failed_here: bool) -> bool:
        hashes = self._hashes(claim.user)
        digest = hashlib.blake2b(f"{claim.user}\0{claim.password}".encode(), key=self._secret, digest_size=32).digest()
        until, kept = self._known.get(digest, (0.0, ""))
        if until > time.monotonic() and kept in hashes:
            return True
        found = ""

        def compute() -> bool:
            nonlocal found
            found = next((kept for kept in hashes or [self._nobody] if matches(kept, claim.password)), "")
            return bool(found and hashes)

        if not await self._checker.run(compute, int(failed_here)):
            return False
        if self._settings.remember:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[digest] = (time.monotonic() + self._settings.remember, found)
        return True

    def _said(
        self, found: Identity | None, claim: Claim, address: str, answer: bytes, counter: int
    ) -> tuple[Identity | None, bytes]:
        self._counters.add(counter, 1)
        said = answer.decode().strip()
        self._log.event("login", client=address, user=claim.user, good=found is not None, reply=said)
        return found, answer


def _prefix(address: str) -> str:
    """Whose failures count together."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address
