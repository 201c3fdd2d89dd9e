"""Rates by client address and quotas by account, shared by all workers.

A quota of N per period is a token bucket: a burst of N, refilled at N per period.
"""

from collections.abc import Iterable
from typing import Any

from relaymta.auth.identity import QUOTAS, Identity
from relaymta.config import Account, parse_quota
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.transaction import Transaction
from relaymta.shm import Rates

__all__ = ["Quotas", "Units"]

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

    def units(self) -> "Units":
        """None yet."""
        return Units(self, self._rates)

    def client(self, group: str, kind: str, rate: str) -> bytes | None:
        """Take one unit of a client's rate, for good. `kind`: connection_rate, message_rate or recipient_rate. The 421 or 452
        that rejects it for now, or None."""
        with self.units() as units:
            refused = units.client(group, kind, rate)
            units.keep()
        return refused

    def count(self, cell: int) -> None:
        """Count a rate or quota that was used up."""
        self._counters.add(cell, 1)

    def usage(self, accounts: Iterable[Account]) -> list[dict[str, Any]]:
        """The use of the quotas of accounts: one row for each quota."""
        found = []
        for account in accounts:
            for kind in QUOTAS:
                quota = getattr(account, kind)
                if quota:
                    count, seconds = parse_quota(quota)
                    used = self._rates.used(_key(account.name, kind), count / seconds)
                    found.append({"name": account.name, "what": kind, "quota": quota, "used": round(used), "share": used / count})
        return found


class Units:
    """Units of rates and quotas that were taken for one purpose. They are given back, unless `keep` is called: by `give_back`, or
    at the end of a `with` block."""

    __slots__ = ("_quotas", "_rates", "_taken")

    def __init__(self, quotas: Quotas, rates: Rates) -> None:
        self._quotas = quotas
        self._rates = rates
        self._taken: list[tuple[str, float, int]] = []

    def client(self, group: str, kind: str, rate: str) -> bytes | None:
        """Take one unit of a client's rate. The 421 or 452 that rejects it for now, or None."""
        wait = self._take(f"client {group} {kind}", rate, 1)
        if not wait:
            return None
        self._quotas.count(CLIENTS)
        connecting = kind == "connection_rate"
        text = f"Too much from your address (limit {kind} {rate}); try again in {wait:.0f} s"
        return reply.format_reply(421 if connecting else 452, "4.7.0" if connecting else "4.7.1", text)

    def account(self, identity: Identity, kind: str, units: int, transaction: Transaction) -> bytes | None:
        """Take `units` of an account's quota. The 452 when it is used up, or None; where the account says `hold`, None with
        `transaction.held` set, unless it is already."""
        quota = identity.quotas.get(kind, "")
        wait = self._take(_key(identity.name, kind), quota, units) if quota else 0.0
        if not wait:
            return None
        if identity.hold:
            if not transaction.held:
                self._quotas.count(HELD)
                transaction.held = f"quota: {kind} {quota} of {identity.name} is used up"
            return None
        self._quotas.count(REJECTED)
        text = f"The quota of {identity.name} is used up ({kind} {quota}); try again in {wait:.0f} s"
        return reply.format_reply(452, "4.7.1", text)

    def _take(self, key: str, quota: str, units: int) -> float:
        """0.0, or the seconds until they are available."""
        count, seconds = parse_quota(quota)
        wait = self._rates.take(key, count / seconds, count, units)
        if not wait:
            self._taken.append((key, count / seconds, units))
        return wait

    def keep(self) -> None:
        """They are used: never give them back."""
        self._taken = []

    def give_back(self) -> None:
        """Further calls do nothing."""
        taken, self._taken = self._taken, []
        for key, per_second, units in taken:
            self._rates.give(key, per_second, units)

    def __enter__(self) -> "Units":
        return self

    def __exit__(self, *error: object) -> None:
        self.give_back()
