"""What an account usually does, and whether what it does now is like that. Without I/O and without a clock: `now` is in seconds
since 1970 UTC. Time that goes back a little counts as time that stands still; where it goes back by more than BACK, the clock was
wrong before, and what was done in what is the future now is forgotten.

A `Habit` is changed by `note`, `set_apart` and `pardon` alone.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from relaymta.config.abuse import Abuse
from relaymta.filter.sketch import Sketch

__all__ = ["Figures", "Finding", "Habit", "Seen", "finding"]

HOUR, MINUTE, DAY = 3600, 60, 86400
BACK = 4 * HOUR  # so much may count as one hour: less than what `factor` allows
DAYS = 7  # of which the busiest hour counts
LAST = 200  # recipients of which the share of failures counts
NETWORKS = 200  # that are known of an account; those that were not used for longest are forgotten
NETWORK_DAYS = 60  # after which one that was not used is new again
DOMAINS_MOST = 4096  # hashes in one report


class Seen(msgspec.Struct, array_like=True):
    """What a worker has seen of an account since it last said so. `account`: "user=NAME" or "application=NAME"; `domains`: those
    of recipients, hashed, 8 octets each; `failed`, `ended`: recipients that failed for good, and all that ended; `networks`:
    recipients by the client's network; `rules`: messages by the name of the rule about mail that they match."""

    account: str
    recipients: int = 0
    domains: bytes = b""
    failed: int = 0
    ended: int = 0
    networks: dict[str, int] = {}
    rules: dict[str, int] = {}


class Figures(NamedTuple):
    """Of an account, now. `recipients`: within the last hour, `busiest`: in the busiest hour of DAYS days before; `domains`: in
    this clock hour, `most_domains`: in the one of DAYS days before with most; `failed`, `ended`: of the last LAST recipients;
    `elsewhere`: recipients within the last hour from networks that are new, `new`: these networks; `rules`: messages within the
    last hour by the rule that they match."""

    recipients: int
    busiest: int
    domains: int
    most_domains: int
    failed: int
    ended: int
    elsewhere: int
    new: tuple[str, ...]
    rules: dict[str, int]


class Finding(NamedTuple):
    """What a check makes of an account. `above`: it is not as usual: `value` is above `limit`, and there is enough of it; `text`
    says so."""

    value: float
    limit: float
    text: str
    above: bool


class Habit(msgspec.Struct, array_like=True):
    """Of one account. `began`, `seen`: when it was first and last heard of; `minutes`: (minute, recipients) of the last hour;
    `hours`, `spread`: (clock hour, recipients; domains) of DAYS days, without the current one, less those that a later one
    exceeds; `hour`: that, with `recipients` and `sketch` (of its domains); `results`: of the last recipients, 1: failed;
    `networks`: by network when it was first and last used; `elsewhere`: (minute, recipients) of new networks; `rules`: (minute,
    messages) by rule; `unlike`: the last clock hour that is no measure (`set_apart`), `apart`: the most recipients and domains
    of such hours."""

    began: int
    seen: int
    minutes: list[tuple[int, int]] = []
    hours: list[tuple[int, int]] = []
    spread: list[tuple[int, int]] = []
    hour: int = 0
    recipients: int = 0
    sketch: bytes = b""
    results: bytes = b""
    networks: dict[str, tuple[int, int]] = {}
    elsewhere: list[tuple[int, int]] = []
    rules: dict[str, list[tuple[int, int]]] = {}
    unlike: int = 0
    apart: tuple[int, int] = (0, 0)

    def note(self, seen: Seen, now: int) -> None:
        """It has done this."""
        self._pass(now)
        now = self.seen
        _add(self.minutes, now // MINUTE, seen.recipients)
        self.recipients += seen.recipients
        if seen.domains:
            sketch = Sketch(self.sketch)
            for at in range(0, min(len(seen.domains), 8 * DOMAINS_MOST) - 7, 8):
                sketch.add(int.from_bytes(seen.domains[at : at + 8], "big"))
            self.sketch = sketch.dump()
        if seen.ended:
            failed, good = min(seen.failed, LAST), min(seen.ended - seen.failed, LAST)
            self.results = (self.results + b"\0" * good + b"\1" * failed)[-LAST:]
        new = 0
        for network, recipients in seen.networks.items():
            first, _ = self.networks.get(network, (now, 0))
            self.networks[network] = first, now
            new += recipients if self._is_new(first) and not self._is_everywhere else 0
        if len(self.networks) > NETWORKS:
            for network in sorted(self.networks, key=lambda one: self.networks[one][1])[:-NETWORKS]:
                del self.networks[network]
        _add(self.elsewhere, now // MINUTE, new)
        for rule, messages in seen.rules.items():
            _add(self.rules.setdefault(rule, []), now // MINUTE, messages)

    def figures(self, now: int) -> Figures:
        """As they are now."""
        self._pass(now)
        new = tuple(network for network, (first, _) in self.networks.items() if self._is_new(first) and not self._is_everywhere)
        rules = {name: _sum(counts) for name, counts in self.rules.items()}
        # The hour before is within the last 60 minutes in part: it is no measure for them.
        busiest = max((count for hour, count in self.hours if hour < self.hour - 1), default=0)
        return Figures(
            _sum(self.minutes), busiest, Sketch(self.sketch).count(), max((count for _, count in self.spread), default=0),
            sum(self.results), len(self.results), _sum(self.elsewhere), new, rules,
        )  # fmt: skip

    def set_apart(self, begins: bool) -> None:
        """What it does in this clock hour is not what it usually does, and networks that are new stay so: somebody else may be at
        work, whose deeds must not be taken for its own once the finding has ended. `begins`: it was as usual until now."""
        if begins:
            self.apart = 0, 0
        self.unlike = self.hour
        for network, (first, last) in self.networks.items():
            if self._is_new(first):
                self.networks[network] = self.seen, last

    def forget_results(self) -> None:
        """They have been held against it: what is held cannot give better ones."""
        self.results = b""

    def pardon(self, now: int) -> None:
        """What it does now, and has done while it was not as usual, is usual from now on."""
        found = self.figures(now)
        before = self.hour - 2
        _most(self.hours, before, max(found.recipients, self.apart[0]))
        _most(self.spread, before, max(found.domains, self.apart[1]))
        self.unlike, self.apart = 0, (0, 0)
        self.results = b""
        self.elsewhere.clear()
        self.rules.clear()
        self.networks = {network: (min(first, self.seen - DAY), last) for network, (first, last) in self.networks.items()}

    @property
    def _is_everywhere(self) -> bool:
        """Whether it is used from more networks than are remembered, as a listener for the public is: none is new then."""
        return len(self.networks) >= NETWORKS

    def _is_new(self, first: int) -> bool:
        """Whether a network that was first used then is new: not for an account that was not there before, either."""
        return first > max(self.seen - DAY, self.began + DAY)

    def _pass(self, now: int) -> None:
        """Time has passed."""
        if now < self.seen - BACK:
            self._set_back(now)
        now = self.seen = max(now, self.seen)
        hour = now // HOUR
        if hour != self.hour:
            domains = Sketch(self.sketch).count()
            if self.hour and self.hour == self.unlike:
                self.apart = max(self.apart[0], self.recipients), max(self.apart[1], domains)
            elif self.hour:
                _append(self.hours, self.hour, self.recipients)
                _append(self.spread, self.hour, domains)
            self.hour, self.recipients, self.sketch = hour, 0, b""
            for counts in (self.hours, self.spread):
                while counts and counts[0][0] < hour - DAYS * 24:
                    del counts[0]
            gone = [network for network, (_, last) in self.networks.items() if last < now - NETWORK_DAYS * DAY]
            for network in gone:
                del self.networks[network]
        oldest = now // MINUTE - 60
        for one in (self.minutes, self.elsewhere, *self.rules.values()):
            while one and one[0][0] <= oldest:
                del one[0]
        if any(not counts for counts in self.rules.values()):
            self.rules = {name: counts for name, counts in self.rules.items() if counts}

    def _set_back(self, now: int) -> None:
        """The clock was."""
        self.seen, self.began, self.hour = now, min(self.began, now), now // HOUR
        self.recipients, self.sketch = 0, b""
        self.minutes, self.elsewhere, self.rules = [], [], {}
        self.hours, self.spread = ([one for one in counts if one[0] < self.hour] for counts in (self.hours, self.spread))
        self.networks = {network: (min(first, now), min(last, now)) for network, (first, last) in self.networks.items()}


def _add(counts: list[tuple[int, int]], at: int, number: int) -> None:
    if not number:
        return
    if counts and counts[-1][0] == at:
        counts[-1] = at, counts[-1][1] + number
    else:
        counts.append((at, number))


def _append(counts: list[tuple[int, int]], at: int, number: int) -> None:
    """The count of an hour that has passed. An earlier one that is not above the last one is never the busiest any more; the last
    one is not yet a measure itself (`Habit.figures`)."""
    if not number:
        return
    if counts:
        last = counts.pop()
        while counts and counts[-1][1] <= last[1]:
            del counts[-1]
        counts.append(last)
    counts.append((at, number))


def _most(counts: list[tuple[int, int]], at: int, number: int) -> None:
    """The count of an hour, in its order; the greater one where there is one."""
    if not number:
        return
    known = dict(counts)
    known[at] = max(number, known.get(at, 0))
    counts[:] = sorted(known.items())


def _sum(counts: Iterable[tuple[int, int]]) -> int:
    return sum(number for _, number in counts)


def finding(check: Abuse, now: Figures) -> Finding:
    """What a check makes of these figures."""
    value, limit, text = _WATCHES[check.watch](check, now)
    enough = now.ended if check.watch == "failures" else value
    return Finding(value, limit, text, enough >= check.least and value > limit)


def _volume(check: Abuse, now: Figures) -> tuple[float, float, str]:
    limit = max(check.factor * now.busiest, check.least - 1)
    usual = f"its busiest hour of {DAYS} days had {now.busiest}" if now.busiest else "it has sent nothing before"
    return now.recipients, limit, f"{now.recipients} recipients within an hour; {usual}"


def _spread(check: Abuse, now: Figures) -> tuple[float, float, str]:
    limit = max(check.factor * now.most_domains, check.least - 1)
    usual = f"at most {now.most_domains} in {DAYS} days" if now.most_domains else "it has sent nothing before"
    return now.domains, limit, f"recipients in {now.domains} domains within an hour; {usual}"


def _failures(check: Abuse, now: Figures) -> tuple[float, float, str]:
    return now.failed / max(now.ended, 1), check.share, f"{now.failed} of its last {now.ended} recipients failed for good"


def _network(check: Abuse, now: Figures) -> tuple[float, float, str]:
    where = ", ".join(now.new[:3]) + (" ..." if len(now.new) > 3 else "")
    return now.elsewhere, check.least - 1, f"{now.elsewhere} recipients within an hour from {where or 'no'} new network"


def _rule(check: Abuse, now: Figures) -> tuple[float, float, str]:
    messages = now.rules.get(check.rule, 0)
    several = f"{messages} messages within an hour match" if messages != 1 else "1 message within an hour matches"
    return messages, check.least - 1, f"{several} the rule {check.rule}"


_WATCHES = {"volume": _volume, "spread": _spread, "failures": _failures, "network": _network, "rule": _rule}
