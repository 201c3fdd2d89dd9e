"""What one attempt has come to at the hosts of a site that it has reached so far."""

from dataclasses import dataclass, field

import msgspec

from relaymta.proto.envelope import SUCCESS, TRANSIENT, Attempt

__all__ = ["HOSTS", "Trail"]

# Hosts of a site that are asked to take a message in one attempt. Each message of a backlog asks that many, where a site
# refuses all of it for now: no more than Postfix (smtp_mx_session_limit).
HOSTS = 2


@dataclass(slots=True)
class Trail:
    """Of one attempt for one entry, as long as that is in flight; changed by whoever has it: a mail, or `Elsewhere`.

    `results`: the last result of each recipient, by index. `final`: recipients that are not asked for again in this attempt
    (answered for good, or in doubt). `tried`: the places (or names) of hosts that are not tried (again). `asked`: hosts that were
    asked to take the message. `retry_after_ms`: the longest delay that a rule has set. `links`: the connection over which each
    recipient's result came, by index."""

    results: dict[int, Attempt] = field(default_factory=dict)
    final: set[int] = field(default_factory=set)
    tried: set[str] = field(default_factory=set)
    asked: int = 0
    retry_after_ms: int = 0
    links: dict[int, tuple[str, int, str, str]] = field(default_factory=dict)

    def left(self, recipients: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """Of an entry's recipients, those that another host may be asked to take."""
        return [pair for pair in recipients if pair[0] not in self.final]

    def add(
        self, place: str, results: dict[int, Attempt], doubtful: set[int], retry_after_ms: int, link: tuple[str, int, str, str]
    ) -> None:
        """Add what a host has said over `link` (`results`); `doubtful`: recipients for which it may have the message all the
        same."""
        self.tried.add(place)
        self.asked += 1
        self.retry_after_ms = max(self.retry_after_ms, retry_after_ms)
        for index, attempt in results.items():
            before = self.results.get(index)
            if before is not None and attempt.kind != SUCCESS:
                attempt = _behind(attempt, str(before))
            self.results[index] = attempt
            self.links[index] = link
            if attempt.kind != TRANSIENT or index in doubtful:
                self.final.add(index)

    def note(self, why: str) -> None:
        """Note for operators why another host was not asked, behind the results of the recipients that are left."""
        for index, attempt in self.results.items():
            if index not in self.final:
                self.results[index] = msgspec.structs.replace(attempt, inside=f"{attempt.inside or attempt.text}; then {why}")


def _behind(attempt: Attempt, before: str) -> Attempt:
    """A result whose cause for operators tells what an earlier host has said."""
    return msgspec.structs.replace(attempt, inside=f"{attempt.inside or attempt.text}; before that {before}")
