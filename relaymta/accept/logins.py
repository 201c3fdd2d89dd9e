"""Who may log in: accounts, and how often somebody may guess.

Limits (guesses.py) are looked at before anything is computed or asked. Who has secrets in the file of accounts is known by those
and by nobody else; of all others a back end is asked, and they are who it says they are. Nothing but the log tells an unknown
user from a wrong password.
"""

import hashlib
import hmac
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaymta.accept.dovecot import Dovecot
from relaymta.accept.guesses import Guess, Guesses
from relaymta.accept.identity import Identity, Unavailable, folded, possible
from relaymta.accept.passwords import Busy, Checker, argon2id, matches, scram_keys
from relaymta.accept.quota import KINDS
from relaymta.config import Account, Config, Secret, load_accounts
from relaymta.errors import redacted
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.sasl import Claim, Keys, Password, Proof
from relaymta.shm import Limits, Rates
from relaymta.watch import Watched

if TYPE_CHECKING:
    from relaymta.accept.web import Bearer, Passwords

__all__ = ["Logins", "check"]

GOOD = index("relaymta_logins_total", "good")
WRONG = index("relaymta_logins_total", "wrong")
LIMITED = index("relaymta_logins_total", "limited")
UNAVAILABLE = index("relaymta_logins_total", "unavailable")

REMEMBERED = 10_000
AT_ONCE = 3  # passwords of one address that are computed or wait for it
ASKED_AT_ONCE = 100  # ... that a back end is asked about


def check(config: Config) -> None:
    """ConfigError with what is wrong with the file of accounts, as the user who asks can read it."""
    if config.accounts.file:
        load_accounts(Path(config.accounts.file))


class _Book(NamedTuple):
    """A file of accounts: by name, and by folded name where that is only one's; the iterations of each key of SCRAM, of which a
    stranger is told as often as they are; and from when on (seconds since 1970) SCRAM works for all."""

    accounts: dict[str, Account]
    alike: dict[str, Account | None]
    iterations: list[int]
    scram_from: float


def _read(path: str) -> _Book:
    accounts = {account.name: account for account in load_accounts(Path(path))} if path else {}
    alike: dict[str, Account | None] = {}
    for account in accounts.values():
        name = folded(account.name)
        alike[name] = None if name in alike else account
    kept = [scram_keys(secret.hash) for account in accounts.values() for secret in account.secrets]
    iterations = [keys.iterations for keys in kept if keys is not None]
    scram_from = max(map(_scram_from, accounts.values()), default=math.inf) if iterations else math.inf
    return _Book(accounts, alike, iterations, scram_from)


def _scram_from(account: Account) -> float:
    """When SCRAM works with whatever opens an account then. Its server names one salt, before the client has proved anything: so
    no other secret may be valid but those that have the same one (`relaymta app rotate` keeps it)."""
    until: dict[tuple[bytes, int] | None, float] = {}
    for secret in account.secrets:
        keys = scram_keys(secret.hash)
        salt = (keys.salt, keys.iterations) if keys is not None else None
        until[salt] = max(until.get(salt, 0.0), secret.expires.timestamp() if secret.expires is not None else math.inf)
    without = until.pop(None, 0.0)
    return max([without, *sorted(until.values())[:-1]])


class Logins:
    """The accounts of one worker. `checker`: computes passwords."""

    def __init__(self, config: Config, checker: Checker, rates: Rates, limits: Limits, counters: Counters, log: Log) -> None:
        settings = self._settings = config.accounts
        path = settings.file
        self.watched = Watched([path] if path else [], lambda: _read(path))
        self._others: Dovecot | Passwords | None = Dovecot(settings.dovecot) if settings.dovecot else None
        self._bearer: Bearer | None = None
        if settings.url or settings.tokens is not None:
            from relaymta.accept import web  # and the libraries that it needs, where it is wanted

            self._others = web.Passwords(settings.url) if settings.url else self._others
            self._bearer = web.Bearer(settings.tokens) if settings.tokens is not None else None
        self._counters, self._log = counters, log
        self._checker = checker
        self._secret = (Path(config.spool) / "secret").read_bytes()
        self._guesses = Guesses(settings, self._secret, rates, limits)
        self._nobody = argon2id(self._secret.hex())
        self._known: dict[bytes, tuple[float, str, Identity]] = {}  # digest of a right password: until when (monotonic), its hash
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
        if self._book.scram_from <= time.time() and self._others is None:
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
        return self.watched.value or _Book({}, {}, [], math.inf)

    def keys(self, user: str) -> Keys:
        """For SCRAM. Of an unknown user the same each time, and as if they were somebody's."""
        found = [keys for keys in map(scram_keys, self._hashes(user)) if keys is not None]
        if found:
            first = found[0]
            alike = (one for one in found[1:] if (one.salt, one.iterations) == (first.salt, first.iterations))
            return first._replace(others=tuple((one.stored_key, one.server_key) for one in alike))
        salt, stored, server = (hmac.digest(self._secret, f"{n} {user}".encode(), "sha256") for n in range(3))
        likely = self._book.iterations or [4096]
        return Keys(salt[:16], stored, server, likely[int.from_bytes(salt[16:20], "big") % len(likely)])

    def _hashes(self, user: str) -> list[str]:
        """What opens an account now."""
        account = self._book.accounts.get(user)
        return [secret.hash for secret in account.secrets if not _expired(secret)] if account is not None else []

    async def check(self, claim: Claim, address: str) -> tuple[Identity | None, bytes]:
        """Who a client at `address` is, and the reply to its AUTH."""
        asked = not isinstance(claim, Password) or self._asks(claim.user)
        try:
            guess = await self._guesses.begin(self._called(claim.user), address, ASKED_AT_ONCE if asked else AT_ONCE)
            if guess is None:
                return self._said(None, claim, address, reply.TOO_MANY_LOGINS, LIMITED)
            wrong = False
            try:
                found = await self._identify(claim, address, guess)
                wrong = found is None
            finally:  # what could not be checked, or has nobody who waits for it, was no guess
                guess.end(wrong, self._called(claim.user))
        except (Busy, Unavailable) as error:
            self._tell(str(error))
            return self._said(None, claim, address, reply.LOGIN_UNAVAILABLE, UNAVAILABLE)
        if found is None:
            return self._said(None, claim, address, reply.WRONG_CREDENTIALS, WRONG)
        return self._said(found, claim, address, reply.LOGGED_IN, GOOD)

    def _asks(self, user: str) -> bool:
        """Whether a back end knows somebody's password: not of an account that has secrets in the file, expired ones too."""
        account = self._book.accounts.get(user)
        return self._others is not None and not (account is not None and account.secrets)

    def _called(self, user: str) -> str:
        """What the back end calls somebody, as far as that was heard."""
        return self._others.names.get(user, user) if self._others is not None else user

    async def _identify(self, claim: Claim, address: str, guess: Guess) -> Identity | None:
        """Who that is, None for nobody. Busy or Unavailable when it cannot be said."""
        if self.watched.value is None:
            raise Unavailable(self.watched.problem)
        if isinstance(claim, Proof):
            return self.as_kept(Identity(claim.user)) if claim.good and self._hashes(claim.user) else None
        if isinstance(claim, Password):
            return await self._by_password(claim, address, guess)
        if self._bearer is None:
            return None
        user = await self._bearer.user(claim.token)
        found = self._known_as(Identity(user)) if user and claim.user in ("", user) else None
        account = self._book.accounts.get(found.name) if found is not None else None
        if account is not None and account.secrets and all(map(_expired, account.secrets)):
            return None
        return self.as_kept(found) if found is not None else None

    async def _by_password(self, claim: Password, address: str, guess: Guess) -> Identity | None:
        asks, hashes = self._asks(claim.user), self._hashes(claim.user)
        # A back end may say no to the same password from elsewhere.
        said = f"{claim.user}\0{claim.password}\0{address if asks else ''}"
        digest = hashlib.blake2b(said.encode(), key=self._secret, digest_size=32).digest()
        until, kept, found = self._known.get(digest, (0.0, "", None))
        if found is None or until <= time.monotonic() or not (kept in hashes or (asks and not kept)):
            if asks and self._others is not None:
                kept, found = "", await self._others.password(claim.user, claim.password, address)
            else:
                kept = await self._computed(hashes, claim.password, guess)
                found = Identity(claim.user) if kept else None
            if found is not None and self._settings.remember:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[digest] = (time.monotonic() + self._settings.remember, kept, found)
        if asks and found is not None:
            found = self._known_as(found)
            account = self._book.accounts.get(found.name) if found is not None else None
            if account is not None and account.secrets:
                return None
        return self.as_kept(found) if found is not None else None

    async def _computed(self, hashes: list[str], password: str, guess: Guess) -> str:
        """Which of these a password matches, "" for none; of an unknown user as costly as of a known one."""
        found = ""

        def compute() -> bool:
            nonlocal found
            found = next((kept for kept in hashes or [self._nobody] if matches(kept, password)), "")
            return bool(found and hashes)

        # Whoever has failed, or asks many times at once, comes behind those who have not.
        behind = int(guess.failed) + max(0, self._guesses.under_way(guess) - 1)
        return found if await self._checker.run(compute, behind) else ""

    def _known_as(self, found: Identity) -> Identity | None:
        """Somebody whom a back end named, by the name of their account in the file; None where that name can be nobody's."""
        if not possible(found.name):
            return None
        if found.name in self._book.accounts:
            return found
        account = self._book.alike.get(folded(found.name))
        return found._replace(name=account.name) if account is not None else found

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
        user = found.name if found is not None else claim.user
        self._log.event("login", client=address, user=user, good=found is not None, reply=said)
        return found, answer


def _expired(secret: Secret) -> bool:
    return secret.expires is not None and secret.expires <= datetime.now(UTC)
