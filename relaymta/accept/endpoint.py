"""What a listener offers to its clients: TLS and AUTH, from its settings and the current certificates and accounts."""

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from relaymta.accept import aliases, tls
from relaymta.accept.aliases import Aliases
from relaymta.accept.included import stamps
from relaymta.accept.tls import Certificates
from relaymta.auth import logins
from relaymta.auth.identity import MailUser
from relaymta.auth.logins import Logins
from relaymta.auth.passwords import Checker
from relaymta.config import Config, Listener
from relaymta.dns import Resolver
from relaymta.errors import ConfigError, check_all
from relaymta.files import read_text
from relaymta.filter.signing import Signer, SigningKey
from relaymta.log import Log
from relaymta.metrics import Counters, certificate_name
from relaymta.proto.address import comparable, plain
from relaymta.proto.sasl import Keys
from relaymta.proto.smtp_server import Offers
from relaymta.queue import wall_ms
from relaymta.shm import Limits, Rates
from relaymta.watch import Watched

if TYPE_CHECKING:
    from relaymta.filter.chain import Chains
    from relaymta.filter.means import Means
    from relaymta.filter.verify import Verifier

__all__ = ["Endpoint", "check"]

RESTS = 50  # times the CPU time of reading aliases pass before they are read again
_PLAUSIBLE = re.compile(r"@[^\s@]+\Z")
_offers = lru_cache(64)(Offers)  # every session has one, and few differ


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the files that are read here, read with the rights of the caller."""
    check_all(
        partial(one, config) for one in (tls.check, logins.check, _check_keys, _check_recipients, _check_aliases, _check_hooks)
    )


class Parts(NamedTuple):
    """What is made of a configuration's files."""

    certificates: Certificates
    keys: list[SigningKey]
    logins: Logins
    recipients: Watched[frozenset[str] | None]
    aliases: Watched[Aliases] | None
    verifier: "Verifier | None"
    chains: "Chains | None"

    def refresh(self) -> None:
        """Read the files that have changed. Blocks."""
        for one in self.watched:
            one.refresh()
        self.certificates.look()

    @property
    def watched(self) -> list[Watched[Any]]:
        """Everything that is read again when it changes."""
        aliases = [] if self.aliases is None else [self.aliases]
        return [*self.certificates.watched, *self.keys, self.logins.watched, self.recipients, *aliases]


class Endpoint:
    """The certificates, accounts, DKIM keys and recipient map of one worker. While a file is broken, the version read before
    stays in use. Where there is none, recipients, logins, and mail that the key would sign are temporarily rejected; without any
    certificate STARTTLS is not offered."""

    def __init__(
        self,
        config: Config,
        rates: Rates,
        limits: Limits,
        resolver: Resolver,
        counters: Counters,
        log: Log,
        tickets: bytes,
        mail_user: Callable[[str], MailUser | None] | None = None,
        means: "Means | None" = None,
    ) -> None:
        """`tickets`: TLS session ticket keys (tickets.OCTETS); `mail_user`: as of Logins; `means`: of filters, with their
        counters. Called on the loop."""
        self._means = means
        self._loop = asyncio.get_running_loop()
        self.chains: Chains | None = None  # None: there are no filters
        self._mail_user = mail_user
        self.aliases: Watched[Aliases] | None = None
        self._tickets = tickets
        self._resolver = resolver
        self._rates, self._limits, self._counters, self._log = rates, limits, counters, log
        self._refreshing = False
        self._checker = Checker()
        self.signer = Signer(counters, log, lambda: wall_ms() // 1000)
        self._use(self._read(config))

    def prepare(self, config: Config) -> Parts:
        """Read the files of a configuration, for `configure`. Blocks: called on a thread. ConfigError when one is broken."""
        parts = self._read(config)
        problems = [one.problem for one in parts.watched if one.problem]
        if problems:
            raise ConfigError(problems)
        return parts

    def configure(self, parts: Parts) -> None:
        """Replace the configuration by a prepared one."""
        replaced = self.logins
        parts.certificates.renew_tickets(self._tickets)  # they may have been renewed since
        self._use(parts)
        replaced.close()

    def _read(self, config: Config) -> Parts:
        path = config.relay.recipients
        parts = Parts(
            Certificates(config, self._tickets),
            [SigningKey(one) for one in config.dkim],
            Logins(config, self._checker, self._rates, self._limits, self._counters, self._log, self._mail_user),
            Watched([path] if path else [], lambda: _recipients(path)),
            _aliases(config, self.aliases),
            self._verifier(config) if config.verify.results or config.verify.no_author == "reject" else None,
            self._chains(config) if config.filter or config.mail_rule else None,
        )
        parts.refresh()
        return parts

    def _use(self, parts: Parts) -> None:
        self._parts = parts
        self.aliases = parts.aliases  # None: there are none; without a value they are not known (as of `recipient_exists`)
        self.certificates, self.logins, self.verifier = parts.certificates, parts.logins, parts.verifier
        self.signer.configure(parts.keys)
        before, self.chains = self.chains, parts.chains
        if self.chains is not None:
            self.chains.begin(before)
        elif before is not None:
            before.close()
        self._reported: set[str] = set()
        self._report()

    def renew_tickets(self, keys: bytes) -> None:
        """Replace the TLS session ticket keys, so that a later leak of the new ones does not decrypt recorded sessions."""
        self._tickets = keys
        self.certificates.renew_tickets(keys)

    def _verifier(self, config: Config) -> "Verifier":
        from relaymta.filter.verify import Verifier  # with its libraries, only where it is configured

        took = self._counters.histogram("relaymta_dkim_seconds", "verify")
        return Verifier(config.verify, config.hostname, self._resolver, lambda: wall_ms() // 1000, took)

    def _chains(self, config: Config) -> "Chains":
        from relaymta.filter.chain import Chains  # likewise

        assert self._means is not None and self._means.named is not None
        return Chains(config, self._limits, self._means.named, self._log, self._loop, self.chains, self._means)

    def end(self) -> None:
        """The worker ends: stop the signing process, leave the filters."""
        self.signer.end()
        if self.chains is not None:
            self.chains.stop()

    def offers(self, listener: Listener, xclient: bool, xforward: bool = False) -> Offers:
        """What a new session on a listener may use. `xclient`, `xforward`: the client may use these commands."""
        return _offers(
            starttls=listener.tls in ("may", "require") and self.certificates.context is not None,
            tls_needed=listener.tls == "require",
            mechanisms=self.logins.mechanisms if listener.auth != "off" or listener.reads_mail else (),
            clear=listener.auth_in_clear,
            login_needed=listener.auth == "require",
            xclient=xclient,
            xforward=xforward,
            lmtp=listener.protocol == "lmtp",
        )

    def keys(self, user: str) -> Keys:
        """SCRAM keys from the current accounts; sessions that began before a reload use them, too."""
        return self.logins.keys(user)

    def refresh(self, loop: Any, threads: Executor | None) -> None:
        """Read changed files, on a thread. Does nothing while that is under way."""
        if self.chains is not None:
            self.chains.refresh()
        if not self._refreshing:
            self._refreshing = True
            loop.run_in_executor(threads, self._parts.refresh).add_done_callback(self._refreshed)

    def recipient_exists(self, address: str, domain: str) -> bool | None:
        """Whether the recipient map (relay.recipients) has an address (as `compared`) of a relay domain; true without a
        map. None while it is unknown: the map was broken when this worker started, and has been since."""
        known = self._parts.recipients.value
        if known is None:
            return None if self._parts.recipients.problem else True
        return address in known or "@" + domain in known

    def _refreshed(self, future: Any) -> None:
        self._refreshing = False
        future.result()
        self._report()

    def _report(self) -> None:
        """Log each new and each resolved problem once, and update the gauges."""
        problems = {one.problem: one.trouble for one in self._parts.watched if one.problem}
        if self.aliases is not None and self.aliases.value is not None:
            problems |= {trouble: trouble for trouble in self.aliases.value.troubles}
        for problem in problems.keys() - self._reported:
            self._log.event("warning", text=problems[problem])
        for problem in self._reported - problems.keys():
            self._log.event("warning", text=f"resolved: {problem}")
        self._reported = set(problems)
        self._counters.gauge("relaymta_tls_certificate_errors", _broken(self.certificates.watched))
        self._note_ends()
        self._counters.gauge("relaymta_dkim_key_errors", _broken(self._parts.keys))
        self._counters.gauge("relaymta_accounts_file_errors", bool(self.logins.watched.problem))

    def _note_ends(self) -> None:
        """Note for /metrics when the certificates in use end."""
        if self._means is None or self._means.named is None:
            return
        for path, ends in self.certificates.ends().items():
            at = self._means.named.row(certificate_name(path))
            if at >= 0:
                self._means.named.own().set(at, ends)


def _broken(watched: Sequence[Watched[Any]]) -> int:
    """How many of them cannot be read now."""
    return sum(bool(one.problem) for one in watched)


def _check_keys(config: Config) -> None:
    if config.dkim:
        from relaymta.filter import keys

        keys.check(config)


def _check_hooks(config: Config) -> None:
    if any(one.type == "python" for one in config.filter):
        from relaymta.filter import hookcheck

        hookcheck.check(config)


def _check_recipients(config: Config) -> None:
    if config.relay.recipients:
        _recipients(config.relay.recipients)


def _check_aliases(config: Config) -> None:
    if config.local.aliases:
        aliases.read(config.local.aliases, config.alias_domains)


def _aliases(config: Config, before: Watched[Aliases] | None) -> Watched[Aliases] | None:
    """The aliases of this machine, which are read again when one of their files changes; None: there are none. `before`: those of
    the configuration before."""
    path, domains = config.local.aliases, config.alias_domains
    files = [path]

    def load() -> Aliases:
        known = made.value or (None if before is None else before.value)
        found = aliases.read(path, domains, known)
        files[:] = list(dict.fromkeys(found.files))
        return found

    made = Watched(files, load, lambda value: bool(value.troubles), stamps, RESTS)
    return made if path else None


def _recipients(path: str) -> frozenset[str] | None:
    """The addresses and "@domain"s of a recipient map, in lower case; None for no file. ConfigError names each line that is
    neither (20 at most)."""
    if not path:
        return None
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise ConfigError([f"relay.recipients: {path}: {error.strerror}"]) from None
    words = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, word) for number, word in words if word and not word.startswith("#")]
    wrong = [
        f"{path}:{number}: {word!r} is neither an address nor @domain"
        for number, word in found
        if not _PLAUSIBLE.match(word) and plain(word) is None
    ]
    if wrong:
        raise ConfigError(wrong[:20])
    return frozenset(comparable(word) for _, word in found)
