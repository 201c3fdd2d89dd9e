"""How much somebody may send: rates by client address, quotas by account, for all workers together.

A quota of N in a time is N at once, and then as they come back: one every N-th of that time. It begins anew when the relay does.
"""

from relaymta.accept.identity import Identity
from relaymta.config import parse_quota
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.smtp_server import Transaction
from relaymta.shm import Rates

__all__ = ["KINDS", "Quotas", "key_of"]

KINDS = ("messages", "recipients", "octets")
REJECTED = index("relaymta_quota_exceeded_total", "rejected")
HELD = index("relaymta_quota_exceeded_total", "held")
CLIENTS = index("relaymta_quota_exceeded_total", "client")


def key_of(name: str, kind: str) -> str:
    """The rate that an account's quota is kept as."""
    return f"account {name} {kind}"


class Quotas:
    """What one worker takes from them."""

    def __init__(self, rates: Rates, counters: Counters) -> None:
        self._rates = rates
        self._counters = counters

    def client(self, group: str, kind: str, quota: str) -> bytes | None:
        """Take one of a client's rate; the reply that refuses it, or None."""
        wait = self._take(f"client {group} {kind}", quota, 1)
        if not wait:
            return None
        self._counters.add(CLIENTS, 1)
        text = f"Too much from your address (limit {kind} {quota}); try again in {wait:.0f} s"
        return reply.format_reply(
            421 if kind == "connection_rate" else 452, "4.7.0" if kind == "connection_rate" else "4.7.1", text
        )

    def account(self, identity: Identity, kind: str, units: int, transaction: Transaction) -> bytes | None:
        """Take from an account's quota. The reply that refuses more, or None: it may go, or (`held`) wait to be released."""
        quota = identity.quotas.get(kind, "")
        wait = self._take(key_of(identity.name, kind), quota, units) if quota else 0.0
        if not wait:
            return None
        if identity.hold:
            if not transaction.held:
                self._counters.add(HELD, 1)
            transaction.held = True
            return None
        self._counters.add(REJECTED, 1)
        text = f"The quota of {identity.name} is used up ({kind} {quota}); try again in {wait:.0f} s"
        return reply.format_reply(452, "4.7.1", text)

    def _take(self, key: str, quota: str, units: int) -> float:
        count, seconds = parse_quota(quota)
        return self._rates.take(key, count / seconds, count, units)
