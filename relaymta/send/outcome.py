"""Outcomes: the replies of a transaction as Attempts, after the rules about replies are applied."""

from collections.abc import Callable
from dataclasses import dataclass, field

from relaymta.config import Rule
from relaymta.proto.envelope import PERMANENT, TRANSIENT, Attempt
from relaymta.proto.smtp_client import Mail, Said, classify
from relaymta.queue import wall_ms

__all__ = ["Judged", "judge"]


@dataclass(slots=True)
class Judged:
    """`results`: an Attempt for each recipient, by index. `retry_after_ms`: the delay that rules set, 0 for that of the schedule.
    `rules`: those with the action `suspend` or `slow`, each with the reply that it matched."""

    results: dict[int, Attempt] = field(default_factory=dict)
    retry_after_ms: int = 0
    rules: list[tuple[Rule, str]] = field(default_factory=list)


def judge(mail: Mail, peer: str, default: Callable[[int], Said | Attempt], rule_of: Callable[[str, str], Rule | None]) -> Judged:
    """The outcome of a transaction with `peer`. `default(index)`: the reply or Attempt of a recipient without a reply of its own;
    `rule_of(host, reply)`: the rule that matches a reply, or None."""
    judged = Judged()
    now = wall_ms()
    for recipient, _ in mail.recipients:
        found = mail.said.get(recipient) or default(recipient)
        if isinstance(found, Attempt):
            judged.results[recipient] = found
            continue
        kind = classify(found)
        if kind != "success":
            kind = _by_rule(judged, kind, rule_of(peer, found.whole), found)
        judged.results[recipient] = Attempt(now, kind, found.phase, peer, found.code, found.enhanced, found.text)
    return judged


def _by_rule(judged: Judged, kind: str, rule: Rule | None, said: Said) -> str:
    """The kind of result that a rule makes of a reply; the rule's other effects are added to `judged`."""
    if rule is None:
        return kind
    if rule.action == "bounce":
        return PERMANENT
    if rule.action in ("retry", "suspend"):
        judged.retry_after_ms = max(judged.retry_after_ms, int(rule.duration * 1000))
    if rule.action in ("suspend", "slow"):
        judged.rules.append((rule, said.whole))
    return TRANSIENT if rule.action in ("defer", "retry", "suspend") else kind
