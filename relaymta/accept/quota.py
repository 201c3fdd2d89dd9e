"""Rates by client address and quotas by account, shared by all workers.

A quota of N per period is a token bucket: a burst of N, refilled at N per period.
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
    """The name of an account's quota in the shared rates."""
    return f"account {name} {kind}"


class Quotas:
    """One worker's access to the shared rates."""

    def __init__(self, rates: Rates, counters: Counters) -> None:
        self._rates = rates
        self._counters = counters

    def client(self, group: str, kind: str, quota: str, taking: bool = True) -> bytes | None:
        """Take one unit of a client's rate (with `taking` false: only check). `kind`: connection_rate, message_rate or
        recipient_rate. The 421 or 452 that rejects it for now, or None."""
        wait = self._take(f"client {group} {kind}", quota, 1, taking)
        if not wait:
            return None
        self._counters.add(CLIENTS, 1)
        text = f"Too much from your address (limit {kind} {quota}); try again in {wait:.0f} s"
        return reply.format_reply(
            421 if kind == "connection_rate" else 452, "4.7.0" if kind == "connection_rate" else "4.7.1", text
        )

    def account(self, identity: Identity, kind: str, units: int, transaction: Transaction, taking: bool = True) -> bytes | None:
        """Take `units` of an account's quota (with `taking` false: check for one unit). The 452 when it is used up, or None;
        where the account says `hold`, None with `transaction.held` set."""
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
        """The use of the quotas of accounts: one row for each quota."""
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
