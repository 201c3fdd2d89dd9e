"""What accounts send, judged for the whole machine: the habits of each (filter/habits.py), from what the workers report each
second, and what follows where they are left (`[[abuse]]`).

A finding is a state of the machine (node/), as are policies: it is sent to all workers, survives a restart, and has an end. Of
verdict "hold" the workers put what comes from the account into the quarantine; of "suspend" there is a hold policy, too. One that
is not enforced is a state by which nothing is held: it is told once, and not again before its end.

Owner of the habits is `Accounts`, on the loop: `conduct` and `clear` change them.
"""

import asyncio
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
CLEARED_SECONDS = 2.0  # in which workers tell of what was done before `clear`
NETWORKS_MOST = 500_000  # of all accounts: each takes 300 octets
TABLE_MOST = 1 << 27  # octets of all habits, in front of compression to a third or less
PACKED_MOST = 60 << 20  # octets of them behind it: what node/ takes, and less
TOGETHER = 200  # accounts that are encoded at once: 2 MB at most
PIECE = 1 << 20  # octets that are decompressed at once

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[tuple[str, Habit]])
_KINDS = ("user", "application")
_SIZE = 4  # octets in front of accounts that were encoded together, which say how many they take
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
        self._networks = 0  # that are known of all accounts: counted anew by each `dump`
        self._cleared: dict[str, float] = {}  # accounts, until when (s UTC) nothing is found about them
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
            known = len(habit.networks)
            habit.note(seen, now)
            self._networks += len(habit.networks) - known
            self._judge(seen.account, habit, now)
            self.changed = True
        while len(self._habits) > MOST or (self._networks > NETWORKS_MOST and len(self._habits) > 1):
            self._networks -= len(self._habits.popitem(last=False)[1].networks)

    def _judge(self, account: str, habit: Habit, now: int) -> None:
        checks = [check for check in self._checks() if check.is_about(account)]
        if not checks:
            return
        if account in self._cleared:  # what was done before that, and a worker tells of now
            if self._now() < self._cleared[account]:
                habit.pardon(now)
                return
            del self._cleared[account]
        figures = habit.figures(now)
        for check in checks:
            found = finding(check, figures)
            known = self._states.get(ABUSE, account, check.name) if found.above else None
            if found.above and (known is None or (check.enforce and not known.reply)):
                begins = not self._is_held(account)
                if self._find(account, check, found):
                    habit.set_apart(begins)
                    if check.watch == "failures":
                        habit.forget_results()
        if self._is_held(account):
            habit.set_apart(False)

    def _is_held(self, account: str) -> bool:
        """Whether something is done about an account."""
        states = (self._states.get(ABUSE, account, check.name) for check in self._checks())
        return any(state is not None and state.reply for state in states)

    def _find(self, account: str, check: Abuse, found: Finding) -> bool:
        """Tell of a finding, and do what follows from it: whether something does."""
        now = time.time_ns() // 1_000_000
        until, by = now + int(check.lasts * 1000), f"abuse {check.name}"
        verdict = check.verdict if check.enforce else ""
        if verdict == "suspend" and (" " in account or self._has_policy(account)):  # there can be no policy of ours
            verdict = "hold"
        state = SiteState(ABUSE, account, check.name, now, until, by, found.text, verdict, float(found.value))
        try:
            self._decide(state, state.key)
            self._suspend(account)
        except RelayError as error:
            self._log.event("warning", text=f"{by}: {account}: {error}")
            return False
        key = check.name, check.enforce
        self.found[key] = self.found.get(key, 0) + 1
        self._log.event(
            "abuse", account=account, check=check.name, watch=check.watch, value=round(found.value, 3),
            limit=round(found.limit, 3), verdict=verdict or check.verdict, enforced=check.enforce, reason=found.text,
            ends=until / 1000,
        )  # fmt: skip
        return check.enforce

    def _suspend(self, account: str) -> None:
        """Have our hold policy last as long as the findings that suspend an account; end it where there is none."""
        checks = [self._states.get(ABUSE, account, check.name) for check in self._checks()]
        found = [state for state in checks if state is not None and state.reply == "suspend"]
        ours = self._states.get(HOLD, account)
        if self._has_policy(account):
            return
        if not found:
            if ours is not None:
                self._decide(None, ours.key)
            return
        last = max(found, key=self._states.left)
        left = self._states.left(last)
        if ours is None or abs(self._states.left(ours) - left) > 1000:
            now = time.time_ns() // 1_000_000
            policy = SiteState(HOLD, account, "", now, now + left, last.by, last.reason)
            self._decide(policy, policy.key)

    def suspended_by_us(self, account: str) -> str:
        """Why an operator's policy must not take the place of ours, or end it; "": there is none of ours."""
        policy = self._states.get(HOLD, account)
        return "" if policy is None or self._has_policy(account) else f"{account} is suspended by {policy.by}"

    def configured(self) -> None:
        """Checks may have changed: what one has found that is gone ends, and what is done by one that is not enforced now."""
        enforced = {check.name: check.enforce for check in self._checks()}
        for state in self._states.of(ABUSE):
            if state.about not in enforced or (state.reply and not enforced[state.about]):
                self._end(state)

    def _end(self, state: SiteState) -> None:
        """End a finding, and what follows from it."""
        self._decide(None, state.key)
        self._suspend(state.site)
        self._log.event(
            "abuse", account=state.site, check=state.about, watch="", value=state.value, limit=0.0, verdict="cleared",
            enforced=bool(state.reply), reason=state.reason, ends=time.time(),
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
            self._end(state)
        if account in self._habits:
            self._habits[account].pardon(int(self._now()))
            self._cleared[account] = self._now() + CLEARED_SECONDS
            self.changed = True
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

    async def dump(self) -> bytes:
        """All habits, to be stored, those of accounts that were heard of last first; the loop goes on meanwhile."""
        self.changed = False
        packing, found, size, packed = zlib.compressobj(1), list[bytes](), 0, 0
        names = list(reversed(self._habits))
        self._networks = sum(len(habit.networks) for habit in self._habits.values())
        try:
            for start in range(0, len(names), TOGETHER):
                there = [name for name in names[start : start + TOGETHER] if name in self._habits]
                octets = _encoder.encode([(name, self._habits[name]) for name in there])
                size += _SIZE + len(octets)
                if size > TABLE_MOST or packed > PACKED_MOST:
                    break
                found.append(await asyncio.to_thread(packing.compress, len(octets).to_bytes(_SIZE, "big") + octets))
                packed += len(found[-1])
        except BaseException:
            self.changed = True
            raise
        return b"".join([*found, packing.flush()])


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
    """What `dump` has returned, in pieces: a bomb takes no memory."""
    found, raw, size, unpacking = list[tuple[str, Habit]](), bytearray(), 0, zlib.decompressobj()
    try:
        while not unpacking.eof and size <= TABLE_MOST:
            piece = unpacking.decompress(octets, PIECE)
            octets = unpacking.unconsumed_tail
            if not piece and not octets and not unpacking.eof:
                return {}
            raw += piece
            size += len(piece)
            while len(raw) > _SIZE and len(raw) >= (end := _SIZE + int.from_bytes(raw[:_SIZE], "big")):
                found += _decoder.decode(raw[_SIZE:end])
                del raw[:end]
    except (zlib.error, msgspec.DecodeError, ValueError):
        return {}
    return dict(reversed(found[:MOST]))
