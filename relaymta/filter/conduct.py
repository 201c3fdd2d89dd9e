"""What accounts send, as one worker sees it: counted here, judged by the supervisor (supervisor/abuse.py), which sends back the
accounts whose mail is to be held.

State, all of it changed on the loop: `_seen` by `took`, `ended` and `matched`, taken by `report`; `_held` by `changed`;
`_kept` by `held` and `changed`.
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
HELD_OCTETS = 256 << 20  # of an account, in this worker, above which its mail is refused for now
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
        self._kept: dict[str, int] = {}  # octets that are held of accounts, since that began
        self._held: dict[str, dict[str, SiteState]] = {}  # by account, and by the check that holds it
        for state in states.of(ABUSE):
            self.changed(state, state.key)

    def changed(self, state: SiteState | None, key: tuple[str, str, str]) -> None:
        """A finding was made, or (None) the one with this key has been ended."""
        _, account, check = key
        found = self._held.setdefault(account, {})
        found.pop(check, None)
        if state is not None and state.reply == "hold":
            found[check] = state
        if not found:
            del self._held[account]
            self._kept.pop(account, None)

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
            for state in [*self._held.get(account, {}).values()]:
                if self._states.left(state):
                    return state
                self.changed(None, state.key)
        return None

    def holds_much(self, user: str, application: str) -> bool:
        """Whether so much is held of an account that no more of its mail is taken: it would fill the disk."""
        if not self._held or self._holding(user, application) is None:
            return False
        return any(self._kept.get(account, 0) >= HELD_OCTETS for account in accounts(user, application))

    def held(self, state: SiteState, octets: int) -> None:
        """A message is held because of a state."""
        self._kept[state.site] = self._kept.get(state.site, 0) + octets

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
