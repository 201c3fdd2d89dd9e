"""What accounts send, judged for the whole machine: the habits of each (filter/habits.py), from what the workers report each
second, and what follows where they are left (`[[abuse]]`).

A finding is a state of the machine (node/), as are policies: it is sent to all workers, survives a restart, and has an end. Of
verdict "hold" the workers put what comes from the account into the quarantine; of "suspend" there is a hold policy, too. One that
is not enforced is a state by which nothing is held: it is told once, and not again before its end.

Owner of the habits is `Accounts`, on the loop: `conduct` and `clear` change them.
"""

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from relaymta.config import Abuse
from relaymta.errors import NoSuch, RelayError
from relaymta.filter.habits import Figures, Finding, Habit, Seen, finding
from relaymta.log import Log
from relaymta.node import ABUSE, HOLD, SiteState, SiteStates

__all__ = ["Accounts"]

MOST = 20_000  # accounts; those that were not heard of for longest are forgotten
NETWORKS_SHOWN = 20
TABLE_MOST = 1 << 26  # octets of all habits

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[str, Habit])
_KINDS = ("user", "application")
Key = tuple[str, str, str]


class Accounts:
    """`checks()`: what is configured; `states`, `decide(state, key)`: as of Machine; `now()`: seconds UTC."""

    def __init__(
        self, checks: Callable[[], list[Abuse]], states: SiteStates, decide: Callable[[SiteState | None, Key], bool], log: Log,
        octets: bytes = b"", now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`octets`: what `dump` has returned before; b"", or what is none: nothing is known."""
        self._checks = checks
        self._states = states
        self._decide = decide
        self._log = log
        self._now = now
        self._habits: OrderedDict[str, Habit] = OrderedDict(_loaded(octets))
        self.changed = False
        self.found: dict[tuple[str, bool], int] = {}  # findings since the start, by check, and whether it is enforced

    async def conduct(self, rows: list[Any]) -> None:
        """What a worker has seen since its last report, as Seen."""
        now = int(self._now())
        for row in rows:
            seen = msgspec.convert(row, Seen)
            habit = self._habits.get(seen.account)
            if habit is None:
                habit = self._habits[seen.account] = Habit(now, now)
            self._habits.move_to_end(seen.account)
            habit.note(seen, now)
            self._judge(seen.account, habit, now)
            self.changed = True
        while len(self._habits) > MOST:
            self._habits.popitem(last=False)

    def _judge(self, account: str, habit: Habit, now: int) -> None:
        checks = [check for check in self._checks() if check.is_about(account)]
        if not checks:
            return
        figures = habit.figures(now)
        for check in checks:
            found = finding(check, figures)
            known = self._states.get(ABUSE, account, check.name) if found.above else None
            if found.above and (known is None or (check.enforce and not known.reply)):
                self._find(account, check, found)

    def _find(self, account: str, check: Abuse, found: Finding) -> None:
        now = time.time_ns() // 1_000_000
        until, by = now + int(check.lasts * 1000), f"abuse {check.name}"
        verdict = check.verdict if check.enforce else ""
        if verdict == "suspend" and (" " in account or self._has_policy(account)):  # there can be no policy of ours
            verdict = "hold"
        state = SiteState(ABUSE, account, check.name, now, until, by, found.text, verdict, float(found.value))
        try:
            self._decide(state, state.key)
            if verdict == "suspend":
                policy = SiteState(HOLD, account, "", now, until, by, found.text)
                self._decide(policy, policy.key)
        except RelayError as error:
            self._log.event("warning", text=f"{by}: {account}: {error}")
            return
        key = check.name, check.enforce
        self.found[key] = self.found.get(key, 0) + 1
        self._log.event(
            "abuse", account=account, check=check.name, watch=check.watch, value=round(found.value, 3),
            limit=round(found.limit, 3), verdict=verdict or check.verdict, enforced=check.enforce, reason=found.text,
            ends=until / 1000,
        )  # fmt: skip

    def _has_policy(self, account: str) -> bool:
        """Whether an operator's hold policy is in the place of ours."""
        policy = self._states.get(HOLD, account)
        return policy is not None and not policy.by.startswith("abuse ")

    def counts(self) -> dict[str, tuple[int, int, int]]:
        """For /metrics: of each check that is configured the findings since the start, enforced ones and others, and those that
        have not ended."""
        now = [state.about for state in self._states.of(ABUSE)]
        return {
            check.name: (self.found.get((check.name, True), 0), self.found.get((check.name, False), 0), now.count(check.name))
            for check in self._checks()
        }

    # For operators

    def rows(self) -> list[dict[str, Any]]:
        """The findings that have not ended, the latest last."""
        return [_row(state) for state in sorted(self._states.of(ABUSE), key=lambda state: (state.since, state.key))]

    def why(self, name: str) -> dict[str, Any]:
        """What an account does, and what it usually does: figures for each check. NoSuch."""
        account = self._account(name)
        habit = self._habits.get(account)
        found: dict[str, Any] = {"account": account, "since": 0, "checks": [], "networks": []}
        if habit is not None:
            figures = habit.figures(int(self._now()))
            networks = sorted(habit.networks.items(), key=lambda one: -one[1][1])[:NETWORKS_SHOWN]
            found |= {"since": habit.began, "networks": [{"network": n, "first": a, "last": b} for n, (a, b) in networks]}
            for check in self._checks():
                if check.is_about(account):
                    found["checks"].append(_figure(check, figures))
        return found | {"findings": [row for row in self.rows() if row["account"] == account]}

    def clear(self, name: str, check: str) -> list[dict[str, Any]]:
        """End the findings about an account, of this check ("": of all), and what follows from them; what it does now is usual
        from now on. The findings. NoSuch."""
        account = self._account(name)
        states = [state for state in self._states.of(ABUSE) if state.site == account and check in ("", state.about)]
        if not states:
            others = [state.about for state in self._states.of(ABUSE) if state.site == account]
            raise NoSuch(f"finding about {account}", check or "any", others)
        for state in states:
            self._decide(None, state.key)
        suspended = any(one.site == account and one.reply == "suspend" for one in self._states.of(ABUSE))
        if not suspended and self._states.get(HOLD, account) is not None and not self._has_policy(account):
            self._decide(None, (HOLD, account, ""))
        if account in self._habits:
            self._habits[account].pardon(int(self._now()))
            self.changed = True
        for state in states:
            self._log.event(
                "abuse", account=account, check=state.about, watch="", value=state.value, limit=0.0, verdict="cleared",
                enforced=bool(state.reply), reason=state.reason, ends=time.time(),
            )  # fmt: skip
        return [_row(state) for state in states]

    def _account(self, name: str) -> str:
        """The account that an operator means: with its kind, or the only one of this name."""
        known = {*self._habits, *(state.site for state in self._states.of(ABUSE))}
        if name in known:
            return name
        found = [f"{kind}={name}" for kind in _KINDS if f"{kind}={name}" in known]
        if not found:
            raise NoSuch("account that has sent anything", name, known)
        if len(found) > 1:
            raise RelayError(f"{name} is a user and an application: name one of {', '.join(found)}")
        return found[0]

    # Across restarts

    def dump(self) -> bytes:
        """All habits, to be stored."""
        self.changed = False
        return zlib.compress(_encoder.encode(self._habits), 1)


def _figure(check: Abuse, figures: Figures) -> dict[str, Any]:
    found = finding(check, figures)
    return {
        "check": check.name, "watch": check.watch, "value": round(found.value, 3), "limit": round(found.limit, 3),
        "above": found.above, "floor": check.least, "verdict": check.verdict, "enforce": check.enforce, "text": found.text,
    }  # fmt: skip


def _row(state: SiteState) -> dict[str, Any]:
    return {
        "account": state.site, "check": state.about, "since": state.since / 1000, "until": state.until / 1000,
        "verdict": state.reply, "enforced": bool(state.reply), "value": state.value, "reason": state.reason,
    }  # fmt: skip


def _loaded(octets: bytes) -> dict[str, Habit]:
    try:
        unpacking = zlib.decompressobj()
        raw = unpacking.decompress(octets, TABLE_MOST)
        return _decoder.decode(raw) if unpacking.eof else {}
    except (zlib.error, msgspec.DecodeError, ValueError):
        return {}
