"""Login attempts: limits, the accounts file and authentication back ends.

The limits (brute_force.py) are checked first. An account with secrets in the accounts file is verified by those alone, then a
user whose mail is kept here by the password that is stored with the mailboxes; all other users are verified by the back end,
whose user name for them is used. Whoever has verified it, the name that is found has the rules of its account and of the user
whose mail is kept here (`_granted`). Replies and their timing do not distinguish an unknown user from a wrong password; only the
log does.
"""

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaymta.auth.brute_force import LoginAttempt, LoginLimits
from relaymta.auth.dovecot import Dovecot
from relaymta.auth.identity import QUOTAS, Identity, MailUser, Unavailable, folded, possible
from relaymta.auth.passwords import PEOPLE_ITERATIONS, Busy, Checker, argon2id, matches, scram_keys
from relaymta.config import Account, Config, Secret, load_accounts
from relaymta.errors import redacted
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.address import comparable
from relaymta.proto.sasl import Claim, Keys, Password, Proof
from relaymta.shm import Limits, Rates
from relaymta.watch import Watched

if TYPE_CHECKING:
    from relaymta.auth.web import Bearer, Passwords

__all__ = ["Logins", "check"]

GOOD = index("relaymta_logins_total", "good")
WRONG = index("relaymta_logins_total", "wrong")
LIMITED = index("relaymta_logins_total", "limited")
UNAVAILABLE = index("relaymta_logins_total", "unavailable")

REMEMBERED = 10_000
AT_ONCE = 3  # login attempts of one address whose password is verified here, in one worker
ASKED_AT_ONCE = 100  # ... by a back end


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the accounts file, read with the rights of the caller."""
    if config.accounts.file:
        load_accounts(Path(config.accounts.file))


class _AccountsFile(NamedTuple):
    """The accounts file: accounts by name, and by folded name (None where several accounts share it); the iterations of all SCRAM
    keys, from which those announced for unknown users are drawn; and the time (seconds since 1970) from which on SCRAM works for
    all accounts."""

    accounts: dict[str, Account]
    by_folded: dict[str, Account | None]
    iterations: list[int]
    scram_from: float


def _read(path: str) -> _AccountsFile:
    accounts = {account.name: account for account in load_accounts(Path(path))} if path else {}
    by_folded: dict[str, Account | None] = {}
    for account in accounts.values():
        name = folded(account.name)
        by_folded[name] = None if name in by_folded else account
    kept = [scram_keys(secret.hash) for account in accounts.values() for secret in account.secrets]
    iterations = [keys.iterations for keys in kept if keys is not None]
    scram_from = max(map(_scram_from, accounts.values()), default=math.inf) if iterations else math.inf
    return _AccountsFile(accounts, by_folded, iterations, scram_from)


def _scram_from(account: Account) -> float:
    """When SCRAM will work with every secret of an account that is valid then (seconds since 1970). A SCRAM server announces one
    salt before the client has proved anything (RFC 5802 5.1), so all valid secrets must have the same one (`relaymta app rotate`
    keeps it)."""
    until: dict[tuple[bytes, int] | None, float] = {}
    for secret in account.secrets:
        keys = scram_keys(secret.hash)
        salt = (keys.salt, keys.iterations) if keys is not None else None
        until[salt] = max(until.get(salt, 0.0), secret.expires.timestamp() if secret.expires is not None else math.inf)
    without = until.pop(None, 0.0)
    return max([without, *sorted(until.values())[:-1]])


class Logins:
    """Login verification in one worker. `checker`: the thread that verifies passwords; `mail_user(name)`: a user whose mail is
    kept here, None: where no mailboxes are kept."""

    def __init__(
        self,
        config: Config,
        checker: Checker,
        rates: Rates,
        limits: Limits,
        counters: Counters,
        log: Log,
        mail_user: Callable[[str], MailUser | None] | None = None,
    ) -> None:
        settings = self._settings = config.accounts
        self._mail_user = mail_user
        path = settings.file
        self.watched = Watched([path] if path else [], lambda: _read(path))
        self._back_end: Dovecot | Passwords | None = Dovecot(settings.dovecot) if settings.dovecot else None
        self._bearer: Bearer | None = None
        if settings.url or settings.tokens is not None:
            from relaymta.auth import web  # with its libraries, only where it is configured

            self._back_end = web.Passwords(settings.url) if settings.url else self._back_end
            self._bearer = web.Bearer(settings.tokens) if settings.tokens is not None else None
        self._counters, self._log = counters, log
        self._checker = checker
        self._secret = (Path(config.spool) / "secret").read_bytes()
        self._login_limits = LoginLimits(settings, self._secret, rates, limits)
        self._dummy_hash = argon2id(self._secret.hex())
        # Digest of a verified login -> valid until (monotonic), stored hash ("": a back end's), identity.
        self._remembered: dict[bytes, tuple[float, str, Identity]] = {}
        self._warned_at = 0.0  # when the last warning was logged (monotonic)

    def close(self) -> None:
        """This configuration was replaced: close the back end's connection after its last answer."""
        if isinstance(self._back_end, Dovecot):
            self._back_end.close()

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """The SASL mechanisms that AUTH offers."""
        found: list[str] = []
        # Clients take the first mechanism that they support: SCRAM is offered only if it works for all accounts. The passwords of
        # users whose mail is kept here are stored so that it does.
        accounts = self._accounts_file
        by_scram = accounts.scram_from <= time.time() or (self._mail_user is not None and not accounts.accounts)
        if by_scram and self._back_end is None:
            found.append("SCRAM-SHA-256")
        if self._settings.file or self._back_end is not None or self._mail_user is not None:
            found += ["PLAIN", "LOGIN"]
        if self._bearer is not None:
            found += ["OAUTHBEARER", "XOAUTH2"]
        return tuple(found)

    @property
    def accounts(self) -> list[Account]:
        """The accounts of the file."""
        return list(self._accounts_file.accounts.values())

    @property
    def _accounts_file(self) -> _AccountsFile:
        return self.watched.value or _AccountsFile({}, {}, [], math.inf)

    def keys(self, user: str) -> Keys:
        """The keys for a SCRAM exchange. For an unknown user they are derived from the name, the same for all of its spellings,
        and look like those of an account."""
        found = [keys for keys in map(scram_keys, self._hashes(user)) if keys is not None]
        if found:
            first = found[0]
            same_salt = (one for one in found[1:] if (one.salt, one.iterations) == (first.salt, first.iterations))
            return first._replace(others=tuple((one.stored_key, one.server_key) for one in same_salt))
        name = self._one_spelling(user)
        salt, stored, server = (hmac.digest(self._secret, f"{n} {name}".encode(), "sha256") for n in range(3))
        likely = self._accounts_file.iterations or [PEOPLE_ITERATIONS if self._mail_user is not None else 4096]
        if self._mail_user is not None and "@" in user:
            likely = [PEOPLE_ITERATIONS]
        return Keys(salt[:16], stored, server, likely[int.from_bytes(salt[16:20], "big") % len(likely)])

    def _hashes(self, user: str) -> list[str]:
        """The stored secrets of an account that have not expired."""
        account = self._account(user)
        if account is not None and account.secrets:
            return [secret.hash for secret in account.secrets if not _expired(secret)]
        mail_user = self._kept_here(user)
        return [mail_user.secret] if mail_user is not None and mail_user.secret and mail_user.active else []

    def _kept_here(self, user: str) -> MailUser | None:
        return self._mail_user(user) if self._mail_user is not None else None

    def _account(self, user: str) -> Account | None:
        """The account in the file of this name, or of the user whose mail is kept here who is called so, in any
        spelling."""
        file = self._accounts_file
        account = file.accounts.get(user)
        mail_user = self._kept_here(user) if account is None and file.accounts else None
        if mail_user is None:
            return account
        return file.accounts.get(mail_user.name) or file.by_folded.get(folded(mail_user.name))

    def _one_spelling(self, user: str) -> str:
        """A name as the directory of the mailboxes compares it."""
        return comparable(user) if self._mail_user is not None and "@" in user else user

    async def check(self, claim: Claim, address: str, behind: str = "", mechanism: str = "") -> tuple[Identity | None, bytes]:
        """The identity of a client at `address` (an unknown one: `behind` that proxy) and the reply to its AUTH command (235,
        454 or 535); None if not authenticated. `mechanism`: of SASL, for the log; "": a command of another kind, such as USER."""
        by_back_end = not isinstance(claim, Password) or self._uses_back_end(claim.user)
        try:
            attempt = await self._login_limits.begin(
                self._canonical(claim.user), address, ASKED_AT_ONCE if by_back_end else AT_ONCE, behind
            )
            if attempt is None:
                return self._finish(None, claim, address, mechanism, reply.TOO_MANY_LOGINS, LIMITED)
            wrong = False
            try:
                found = await self._identify(claim, address, attempt)
                wrong = found is None
            finally:  # an attempt that could not be checked, or was cancelled, is no failure
                attempt.end(wrong, self._canonical(claim.user))
        except (Busy, Unavailable) as error:
            self._warn(str(error))
            return self._finish(None, claim, address, mechanism, reply.LOGIN_UNAVAILABLE, UNAVAILABLE)
        if found is None:
            return self._finish(None, claim, address, mechanism, reply.WRONG_CREDENTIALS, WRONG)
        return self._finish(found, claim, address, mechanism, reply.LOGGED_IN, GOOD)

    def _uses_back_end(self, user: str) -> bool:
        """Whether a user's password is verified by the back end: not if the account has secrets in the file, even expired ones,
        nor if it is a user whose mail is kept here and who has a password here, or may not log in."""
        if self._back_end is None:
            return False
        account = self._account(user)
        if account is not None and account.secrets:
            return False
        mail_user = self._kept_here(user)
        return mail_user is None or (mail_user.active and not mail_user.secret)

    def _canonical(self, user: str) -> str:
        """What failures are counted by: the back end's name for a user, if it has given one before, else the name itself; that of
        the user whose mail is kept here, where there is one, so that no spelling and no other address has a budget of its own."""
        name = self._back_end.names.get(user, user) if self._back_end is not None else user
        mail_user = self._kept_here(name)
        return mail_user.name if mail_user is not None else self._one_spelling(name)

    async def _identify(self, claim: Claim, address: str, attempt: LoginAttempt) -> Identity | None:
        """The identity of the client; None for wrong credentials. Busy or Unavailable when they cannot be verified."""
        if self.watched.value is None:
            raise Unavailable(self.watched.problem)
        if isinstance(claim, Proof):
            return self._granted(self._known(claim.user)) if claim.good and self._hashes(claim.user) else None
        if isinstance(claim, Password):
            return await self._by_password(claim, address, attempt)
        if self._bearer is None:
            return None
        await asyncio.sleep(0)  # what has a time-out has to be a task (accept/eager.py)
        user = await self._bearer.user(claim.token)
        found = self._mapped(Identity(user)) if user and claim.user in ("", user) else None
        account = self._account(found.name) if found is not None else None
        if account is not None and account.secrets and all(map(_expired, account.secrets)):
            return None
        return self._granted(found) if found is not None else None

    async def _by_password(self, claim: Password, address: str, attempt: LoginAttempt) -> Identity | None:
        by_back_end, hashes = self._uses_back_end(claim.user), self._hashes(claim.user)
        # A back end may refuse the same password from another address.
        login = f"{claim.user}\0{claim.password}\0{address if by_back_end else ''}"
        digest = hashlib.blake2b(login.encode(), key=self._secret, digest_size=32).digest()
        until, kept, found = self._remembered.get(digest, (0.0, "", None))
        if found is None or until <= time.monotonic() or not (kept in hashes or (by_back_end and not kept)):
            if by_back_end and self._back_end is not None:
                await asyncio.sleep(0)  # what has a time-out has to be a task (accept/eager.py)
                kept, found = "", await self._back_end.password(claim.user, claim.password, address)
            else:
                kept = await self._computed(hashes, claim.password, attempt)
                found = self._known(claim.user) if kept else None
            if found is not None and self._settings.remember:
                if len(self._remembered) >= REMEMBERED:
                    self._remembered.clear()
                self._remembered[digest] = (time.monotonic() + self._settings.remember, kept, found)
        if by_back_end and found is not None:
            found = self._mapped(found)
            if found is not None and not self._uses_back_end(found.name):  # by the name that it has given
                return None
        return self._granted(found) if found is not None else None

    async def _computed(self, hashes: list[str], password: str, attempt: LoginAttempt) -> str:
        """The stored secret that a password matches, "" for none. For an unknown user it takes as long as for a known one."""
        found = ""

        def compute() -> bool:
            nonlocal found
            found = next((kept for kept in hashes or [self._dummy_hash] if matches(kept, password)), "")
            return bool(found and hashes)

        # Clients with failures, or with many attempts at once, are served after the others.
        behind = int(attempt.failed) + max(0, self._login_limits.under_way(attempt) - 1)
        return found if await self._checker.run(compute, behind) else ""

    def _known(self, user: str) -> Identity:
        """The identity of a user whose secret is stored here: one whose mail is kept here has one name, whichever address
        was given."""
        account = self._account(user)
        if account is not None and account.secrets:
            return Identity(account.name)
        mail_user = self._kept_here(user)
        return Identity(mail_user.name if mail_user is not None else user)

    def _mapped(self, found: Identity) -> Identity | None:
        """An identity from a back end, with the name of its account in the file, if there is one; None when the name is invalid
        or ambiguous."""
        if not possible(found.name):
            return None
        if found.name in self._accounts_file.accounts:
            return found
        account = self._accounts_file.by_folded.get(folded(found.name))
        return found._replace(name=account.name) if account is not None else found

    def _granted(self, found: Identity) -> Identity | None:
        """An identity that was verified, as `with_account`; None: mail of this user is kept here, and the user may not log in."""
        mail_user = self._kept_here(found.name)
        return self.with_account(found) if mail_user is None or mail_user.active else None

    def with_account(self, found: Identity) -> Identity:
        """An identity with the settings of its account in the file, which take precedence over those from a back end. A user
        whose mail is kept here has one name, and sends as any of the user's addresses where nothing else is said."""
        account, mail_user = self._account(found.name), self._kept_here(found.name)
        if mail_user is not None:
            found = found._replace(name=mail_user.name, senders=found.senders or mail_user.senders)
        if account is None:
            return found
        return Identity(
            account.name,
            account.application or found.application,
            account.priority or found.priority,
            tuple(map(comparable, account.senders)) or found.senders,
            {kind: quota for kind in QUOTAS if (quota := getattr(account, kind))},
            account.over == "hold",
            account.connections,
        )

    def _warn(self, reason: str) -> None:
        """Log why logins fail, at most once a minute."""
        now = time.monotonic()
        if now - self._warned_at > 60:
            self._warned_at = now
            self._log.event("warning", text=f"logins are temporarily rejected (454): {redacted(reason)}")

    def _finish(
        self, found: Identity | None, claim: Claim, address: str, mechanism: str, answer: bytes, counter: int
    ) -> tuple[Identity | None, bytes]:
        self._counters.add(counter, 1)
        answered = answer.decode().strip()
        user = found.name if found is not None else claim.user
        self._log.event("login", client=address, user=user, good=found is not None, reply=answered, mechanism=mechanism)
        return found, answer


def _expired(secret: Secret) -> bool:
    return secret.expires is not None and secret.expires <= datetime.now(UTC)
