"""How much somebody may send: rates by client address, quotas by account, for all workers together.

A quota of N in a time is N at once, and then as they come back: one every N-th of that time.
"""

from collections.abc import Iterable
from typing import Any

from relaymta.accept.identity import Identity
from relaymta.config import Account, parse_quota
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.smtp_server import Transaction
from relaymta.shm import Rates

__all__ = ["KINDS", "Quotas"]

KINDS = ("messages", "recipients", "octets")
REJECTED = index("relaymta_quota_exceeded_total", "rejected")
HELD = index("relaymta_quota_exceeded_total", "held")
CLIENTS = index("relaymta_quota_exceeded_total", "client")


def _key(name: str, kind: str) -> str:
    """The rate that an account's quota is kept as."""
    return f"account {name} {kind}"


class Quotas:
    """What one worker takes from them."""

    def __init__(self, rates: Rates, counters: Counters) -> None:
        self._rates = rates
        self._counters = counters

    def client(self, group: str, kind: str, quota: str, taking: bool = True) -> bytes | None:
        """Take one of a client's rate (or only look, unless `taking`); the reply that refuses it, or None."""
        wait = self._take(f"client {group} {kind}", quota, 1, taking)
        if not wait:
            return None
        self._counters.add(CLIENTS, 1)
        text = f"Too much from your address (limit {kind} {quota}); try again in {wait:.0f} s"
        return reply.format_reply(
            421 if kind == "connection_rate" else 452, "4.7.0" if kind == "connection_rate" else "4.7.1", text
        )

    def account(self, identity: Identity, kind: str, units: int, transaction: Transaction, taking: bool = True) -> bytes | None:
        """Take from an account's quota (or only look for one unit, unless `taking`). The reply that refuses more, or None: it may
        go, or (`held`) wait to be released."""
        quota = identity.quotas.get(kind, "")
        wait = self._take(_key(identity.name, kind), quota, units, taking) if quota else 0.0
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

    def usage(self, accounts: Iterable[Account]) -> list[dict[str, Any]]:
        """What is used of the quotas of accounts, a row for each."""
        found = []
        for account in accounts:
            for kind in KINDS:
                quota = getattr(account, kind)
                if quota:
                    count, seconds = parse_quota(quota)
                    used = self._rates.used(_key(account.name, kind), count / seconds)
                    found.append({"name": account.name, "what": kind, "quota": quota, "used": round(used), "share": used / count})
        return found

    def _take(self, key: str, quota: str, units: int, taking: bool) -> float:
        count, seconds = parse_quota(quota)
        if not taking:
            return self._rates.wait(key, count / seconds, count)
        return self._rates.take(key, count / seconds, count, units)
