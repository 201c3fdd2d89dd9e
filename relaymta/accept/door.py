"""What a client finds at the door: TLS and AUTH, as the listener says and the files of certificates and accounts are now."""

from concurrent.futures import Executor
from functools import partial
from typing import Any

from relaymta.accept import logins, tls
from relaymta.accept.logins import Logins
from relaymta.accept.tls import Certificates
from relaymta.config import Config, Listener
from relaymta.errors import ConfigError
from relaymta.log import Log
from relaymta.metrics import Counters
from relaymta.proto.smtp_server import Offers
from relaymta.shm import Rates

__all__ = ["Door", "check"]


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the files that are read here, as the user who asks can read them."""
    problems: list[str] = []
    for one in (tls.check, logins.check):
        try:
            one(config)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


class Door:
    """The certificates and accounts of one worker. A file that breaks changes nothing: what was read before stays in use."""

    def __init__(self, config: Config, rates: Rates, counters: Counters, log: Log) -> None:
        self._rates, self._counters, self._log = rates, counters, log
        self._refreshing = False
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a configuration (blocks while its files are read)."""
        self.certificates = Certificates(config)
        self.logins = Logins(config, self._rates, self._counters, self._log)
        self._told: set[str] = set()
        self._refresh()
        self._tell()

    def offers(self, listener: Listener) -> Offers:
        """What a session on a listener begins with."""
        return Offers(
            starttls=listener.tls in ("may", "require") and self.certificates.context is not None,
            tls_needed=listener.tls == "require",
            mechanisms=self.logins.mechanisms if listener.auth != "off" else (),
            clear=listener.auth_in_clear,
            login_needed=listener.auth == "require",
            keys=self.logins.keys,
        )

    def refresh(self, loop: Any, threads: Executor) -> None:
        """Look, on a thread, whether files have changed."""
        if not self._refreshing and (self.certificates or self.logins.watched):
            self._refreshing = True
            future = loop.run_in_executor(threads, self._refresh)
            future.add_done_callback(partial(self._refreshed))

    def _refresh(self) -> None:
        self.certificates.refresh()
        self.logins.watched.refresh()

    def _refreshed(self, future: Any) -> None:
        self._refreshing = False
        future.result()
        self._tell()

    def _tell(self) -> None:
        """Say once what is wrong, and count it."""
        problems = set(filter(None, [*self.certificates.problems, self.logins.watched.problem]))
        for problem in problems - self._told:
            self._log.event("warning", text=f"{problem}; what was read before stays in use")
        for problem in self._told - problems:
            self._log.event("warning", text=f"mended: {problem}")
        self._told = problems
        self._counters.gauge("relaymta_tls_certificate_errors", len(self.certificates.problems))
        self._counters.gauge("relaymta_accounts_file_errors", bool(self.logins.watched.problem))
