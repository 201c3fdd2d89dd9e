"""What accounts send, as one worker sees it: counted here, judged by the supervisor (supervisor/abuse.py), which sends back the
accounts whose mail is to be held.

State, all of it changed on the loop: `_seen` by `took`, `ended` and `matched`, taken by `report`; `_held` by `refresh`.
"""

from collections.abc import Sequence

import msgspec
import xxhash

from relaymta.filter.habits import DOMAINS_MOST, Seen
from relaymta.filter.judgement import Mail
from relaymta.filter.networks import network_of
from relaymta.node import ABUSE, SiteState, SiteStates
from relaymta.proto.address import domain_of
from relaymta.proto.envelope import DSN, Envelope

__all__ = ["Conduct", "accounts"]

ACCOUNTS_MOST = 20_000  # of which something is reported together
MESSAGES_MOST = 1000  # rules that are counted of an account


def accounts(user: str, application: str) -> Sequence[str]:
    """The accounts that a message counts for: of its user and of its application, which is none of its own where it has the
    user's name."""
    found = (f"user={user}",) if user else ()
    return (*found, f"application={application}") if application and application != user else found


class _Counts:
    """Of one account, since the last report."""

    __slots__ = ("domains", "ended", "failed", "networks", "recipients", "rules")

    def __init__(self) -> None:
        self.recipients = self.failed = self.ended = 0
        self.domains: set[str] = set()
        self.networks: dict[str, int] = {}
        self.rules: dict[str, int] = {}


class Conduct:
    """`states`: those of this worker."""

    def __init__(self, states: SiteStates) -> None:
        self._states = states
        self._seen: dict[str, _Counts] = {}
        self._held: dict[str, SiteState] = {}
        self.refresh()

    def refresh(self) -> None:
        """States have changed."""
        self._held = {state.site: state for state in self._states.of(ABUSE) if state.reply == "hold"}

    def _of(self, user: str, application: str) -> list[_Counts]:
        found = []
        for account in accounts(user, application):
            counts = self._seen.get(account)
            if counts is None:
                if len(self._seen) >= ACCOUNTS_MOST:
                    continue
                counts = self._seen[account] = _Counts()
            found.append(counts)
        return found

    def took(self, user: str, application: str, client: str, recipients: Sequence[str]) -> SiteState | None:
        """A message is taken; the state because of which it is held, None: it is not."""
        if not user and not application:
            return None
        network = network_of(client)
        for counts in self._of(user, application):
            counts.recipients += len(recipients)
            counts.networks[network] = counts.networks.get(network, 0) + len(recipients)
            if len(counts.domains) < DOMAINS_MOST:
                counts.domains.update(map(domain_of, recipients))
        return self._holding(user, application) if self._held else None

    def _holding(self, user: str, application: str) -> SiteState | None:
        for account in accounts(user, application):
            state = self._held.get(account)
            if state is not None and self._states.left(state):
                return state
        return None

    def ended(self, envelope: Envelope, good: int, failed: int) -> None:
        """Recipients of a message have ended: so many delivered, so many failed for good. A DSN of ours is no mail of theirs."""
        if envelope.flags & DSN:
            return
        for counts in self._of(envelope.user, envelope.application):
            counts.ended += good + failed
            counts.failed += failed

    def matched(self, mail: Mail, rule: str) -> None:
        """A rule about mail matches a message."""
        for counts in self._of(mail.user, mail.application):
            if rule in counts.rules or len(counts.rules) < MESSAGES_MOST:
                counts.rules[rule] = counts.rules.get(rule, 0) + 1

    def report(self) -> list[object]:
        """What was seen since the last report, as Seen."""
        seen, self._seen = self._seen, {}
        return [
            msgspec.to_builtins(
                Seen(
                    account, one.recipients, b"".join(_hash(domain) for domain in [*one.domains][:DOMAINS_MOST]), one.failed,
                    one.ended, one.networks, one.rules,
                ),
                builtin_types=(bytes,),
            )
            for account, one in seen.items()
        ]  # fmt: skip


def _hash(domain: str) -> bytes:
    """The same in all workers, and after a restart."""
    return xxhash.xxh3_64_digest(domain.encode())
