"""Who may log in: accounts, and how often somebody may guess.

Limits are looked at before anything is computed. A failure counts for the address (IPv6: the /64) and for the account; an
address that has not failed is heard even where its account is under attack, so that nobody can be locked out by others.
Nothing but the log tells an unknown user from a wrong password.
"""

import hashlib
import hmac
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaymta.accept.dovecot import Dovecot
from relaymta.accept.identity import Identity, Unavailable, group_of
from relaymta.accept.passwords import Busy, Checker, argon2id, matches, scram_keys
from relaymta.accept.quota import KINDS
from relaymta.config import Account, Config, load_accounts
from relaymta.errors import redacted
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.sasl import Claim, Keys, Password, Proof
from relaymta.shm import Rates
from relaymta.watch import Watched

if TYPE_CHECKING:
    from relaymta.accept.web import Bearer, Passwords

__all__ = ["Logins", "check"]

GOOD = index("relaymta_logins_total", "good")
WRONG = index("relaymta_logins_total", "wrong")
LIMITED = index("relaymta_logins_total", "limited")
UNAVAILABLE = index("relaymta_logins_total", "unavailable")

REMEMBERED = 10_000
STRANGERS = 64
AT_ONCE = 3  # passwords of one address that are computed or wait for it


def check(config: Config) -> None:
    """ConfigError with what is wrong with the file of accounts, as the user who asks can read it."""
    if config.accounts.file:
        load_accounts(Path(config.accounts.file))


class _Book(NamedTuple):
    """A file of accounts: by name; the iterations of each key of SCRAM, of which a stranger is told as often as they are; and
    whether SCRAM works for all."""

    accounts: dict[str, Account]
    iterations: list[int]
    scram: bool


def _read(path: str) -> _Book:
    accounts = {account.name: account for account in load_accounts(Path(path))} if path else {}
    kept = [scram_keys(secret.hash) for account in accounts.values() for secret in account.secrets]
    iterations = [keys.iterations for keys in kept if keys is not None]
    return _Book(accounts, iterations, bool(kept) and len(iterations) == len(kept))


class Logins:
    """The accounts of one worker. `checker`: computes passwords."""

    def __init__(self, config: Config, checker: Checker, rates: Rates, counters: Counters, log: Log) -> None:
        settings = self._settings = config.accounts
        path = settings.file
        self.watched = Watched([path] if path else [], lambda: _read(path))
        self._others: Dovecot | Passwords | None = Dovecot(settings.dovecot) if settings.dovecot else None
        self._bearer: Bearer | None = None
        if settings.url or settings.tokens is not None:
            from relaymta.accept import web  # and the libraries that it needs, where it is wanted

            self._others = web.Passwords(settings.url) if settings.url else self._others
            self._bearer = web.Bearer(settings.tokens) if settings.tokens is not None else None
        self._rates, self._counters, self._log = rates, counters, log
        self._checker = checker
        self._secret = (Path(config.spool) / "secret").read_bytes()
        self._nobody = argon2id(self._secret.hex())
        self._known: dict[bytes, tuple[float, str, Identity]] = {}  # digest of a right password: until when (monotonic), its hash
        self._waiting: Counter[str] = Counter()  # passwords that are computed or wait for it, by client
        self._unavailable = 0.0  # when that was told the last time (monotonic)

    def close(self) -> None:
        """Others take their place: what they have open is closed when who is being checked has an answer."""
        if isinstance(self._others, Dovecot):
            self._others.close()

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """What AUTH offers."""
        found: list[str] = []
        # Clients take the first one that they know: where it works for some only, the others could not log in.
        if self._book.scram and self._others is None:
            found.append("SCRAM-SHA-256")
        if self._settings.file or self._others is not None:
            found += ["PLAIN", "LOGIN"]
        if self._bearer is not None:
            found += ["OAUTHBEARER", "XOAUTH2"]
        return tuple(found)

    @property
    def accounts(self) -> list[Account]:
        """Those of the file."""
        return list(self._book.accounts.values())

    @property
    def _book(self) -> _Book:
        return self.watched.value or _Book({}, [], False)

    def keys(self, user: str) -> Keys:
        """For SCRAM. Of an unknown user the same each time, and as if they were somebody's."""
        for kept in self._hashes(user):
            found = scram_keys(kept)
            if found is not None:
                return found
        salt, stored, server = (hmac.digest(self._secret, f"{n} {user}".encode(), "sha256") for n in range(3))
        likely = self._book.iterations or [4096]
        return Keys(salt[:16], stored, server, likely[int.from_bytes(salt[16:20], "big") % len(likely)])

    def _hashes(self, user: str) -> list[str]:
        """What opens an account now."""
        account = self._book.accounts.get(user)
        if account is None:
            return []
        now = datetime.now(UTC)
        return [secret.hash for secret in account.secrets if secret.expires is None or secret.expires > now]

    async def check(self, claim: Claim, address: str) -> tuple[Identity | None, bytes]:
        """Who a client at `address` is, and the reply to its AUTH."""
        where = group_of(address)
        # Names that are nobody's share some rates, so that guessing them fills no table.
        who = claim.user if claim.user in self._book.accounts else f"nobody {zlib.crc32(claim.user.encode()) % STRANGERS}"
        burst, rate = self._settings.failures, 1 / max(0.001, self._settings.failures_forgotten)
        here = self._rates.wait(f"login from {where}", rate, burst)
        failed_here = self._rates.wait(f"login from {where}", rate) > 0
        many = self._waiting.get(where, 0) >= AT_ONCE
        if here or many or (failed_here and self._rates.wait(f"login as {who}", rate, burst)):
            return self._said(None, claim, address, reply.TOO_MANY_LOGINS, LIMITED)
        try:
            found = await self._identify(claim, address, int(failed_here))
        except (Busy, Unavailable) as error:
            self._tell(str(error))
            return self._said(None, claim, address, reply.LOGIN_UNAVAILABLE, UNAVAILABLE)
        if found is None:
            self._rates.take(f"login from {where}", rate, burst)
            self._rates.take(f"login as {who}", rate, burst)
            return self._said(None, claim, address, reply.WRONG_CREDENTIALS, WRONG)
        return self._said(found, claim, address, reply.LOGGED_IN, GOOD)

    async def _identify(self, claim: Claim, address: str, failures: int) -> Identity | None:
        """Who that is, None for nobody. Busy or Unavailable when it cannot be said."""
        if self.watched.value is None:
            raise Unavailable(self.watched.problem)
        if isinstance(claim, Proof):
            return self.as_kept(Identity(claim.user)) if claim.good and self._hashes(claim.user) else None
        if isinstance(claim, Password):
            return await self._by_password(claim, address, failures)
        if self._bearer is None:
            return None
        user = await self._bearer.user(claim.token)
        return self.as_kept(Identity(user)) if user and claim.user in ("", user) else None

    async def _by_password(self, claim: Password, address: str, failures: int) -> Identity | None:
        hashes = self._hashes(claim.user)
        digest = hashlib.blake2b(f"{claim.user}\0{claim.password}".encode(), key=self._secret, digest_size=32).digest()
        until, kept, found = self._known.get(digest, (0.0, "", None))
        if found is not None and until > time.monotonic() and (kept in hashes or not (kept or hashes)):
            return self.as_kept(found)
        if hashes or self._others is None:
            kept = await self._computed(hashes, claim.password, group_of(address), failures)
            found = Identity(claim.user) if kept else None
        else:
            kept = ""
            found = await self._others.password(claim.user, claim.password, address)
        if found is None:
            return None
        if self._settings.remember:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[digest] = (time.monotonic() + self._settings.remember, kept, found)
        return self.as_kept(found)

    async def _computed(self, hashes: list[str], password: str, where: str, failures: int) -> str:
        """Which of these a password matches, "" for none; of an unknown user as costly as of a known one."""
        found = ""

        def compute() -> bool:
            nonlocal found
            found = next((kept for kept in hashes or [self._nobody] if matches(kept, password)), "")
            return bool(found and hashes)

        self._waiting[where] += 1
        try:  # whoever has failed, or asks many times at once, comes behind those who have not
            return found if await self._checker.run(compute, failures + self._waiting[where] - 1) else ""
        finally:
            self._waiting[where] -= 1
            if not self._waiting[where]:
                del self._waiting[where]

    def as_kept(self, found: Identity) -> Identity:
        """With what the file of accounts says of somebody, whoever knew the password."""
        account = self._book.accounts.get(found.name)
        if account is None:
            return found
        return Identity(
            found.name,
            account.application or found.application,
            account.priority or found.priority,
            tuple(sender.lower() for sender in account.senders) or found.senders,
            {kind: quota for kind in KINDS if (quota := getattr(account, kind))},
            account.over == "hold",
            account.connections,
        )

    def _tell(self, reason: str) -> None:
        """At most once a minute: why nobody can log in."""
        now = time.monotonic()
        if now - self._unavailable > 60:
            self._unavailable = now
            self._log.event("warning", text=f"logins are put off (454): {redacted(reason)}")

    def _said(
        self, found: Identity | None, claim: Claim, address: str, answer: bytes, counter: int
    ) -> tuple[Identity | None, bytes]:
        self._counters.add(counter, 1)
        said = answer.decode().strip()
        self._log.event("login", client=address, user=claim.user, good=found is not None, reply=said)
        return found, answer
