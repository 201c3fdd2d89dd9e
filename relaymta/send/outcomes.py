"""Outcomes: the replies of a transaction, a lost connection, or a site without a usable host, as one Attempt for each recipient,
after the rules about replies are applied."""

from collections.abc import Callable
from dataclasses import dataclass, field

from relaymta.config import Rule
from relaymta.errors import Failure, told
from relaymta.metrics import Counters, index
from relaymta.proto.envelope import IN_DOUBT as DOUBT
from relaymta.proto.envelope import PERMANENT, SUCCESS, TRANSIENT, Attempt
from relaymta.proto.said import Said, classify, wants_tls
from relaymta.proto.smtp_client import Mail
from relaymta.queue import Entry, Queue, wall_ms
from relaymta.send.decisions import Decisions
from relaymta.send.parking import Parking
from relaymta.send.pool import Pool
from relaymta.send.session import Session
from relaymta.send.tally import Tally
from relaymta.send.timing import Stages
from relaymta.send.trail import Trail

__all__ = ["Judged", "Outcomes", "judge"]

TRANSACTIONS = index("relaymta_transactions_total")
IN_DOUBT = index("relaymta_in_doubt_total")

FREE_RETRIES = 3  # times a message may lose a reused connection before it costs an attempt
AT_ONCE_MS = 1  # retry delay of a message that is due at once; only its sleeping queue holds it back

RuleOf = Callable[[str, str], Rule | None]


@dataclass(slots=True)
class Judged:
    """`results`: an Attempt for each recipient, by index. `retry_after_ms`: the delay that rules set, 0 for that of the schedule.
    `rules`: those with the action `suspend` or `slow`, each with the reply that it matched."""

    results: dict[int, Attempt] = field(default_factory=dict)
    retry_after_ms: int = 0
    rules: list[tuple[Rule, str]] = field(default_factory=list)


def judge(mail: Mail, peer: str, default: Callable[[int], Said | Attempt], rule_of: RuleOf, fell_back: bool = False) -> Judged:
    """The outcome of a transaction with `peer`. `default(index)`: the reply or Attempt of a recipient without a reply of its own;
    `rule_of(host, reply)`: the rule that matches a reply, or None. `fell_back`: the connection is not encrypted since starting
    TLS failed: that the peer wants TLS is no reason to give up."""
    judged = Judged()
    now = wall_ms()
    for recipient, _ in mail.recipients:
        found = mail.said.get(recipient) or default(recipient)
        if isinstance(found, Attempt):
            judged.results[recipient] = found
            continue
        kind = TRANSIENT if fell_back and wants_tls(found) else classify(found)
        if kind != SUCCESS:
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


class Outcomes:
    """Gives the queue one outcome for each entry that was begun. Its only state is in the entries: `route` and `lost`.

    `go_on(pool, entry, trail)`: whether another host is asked to take what is left of an entry, which is its then."""

    queue: Queue
    go_on: Callable[[Pool, Entry, Trail], bool]

    def __init__(self, counters: Counters, decisions: Decisions, parking: Parking) -> None:
        self._counters = counters
        self.stages = Stages(counters)
        self.tally = Tally()
        self._decisions = decisions
        self._parking = parking
        self._rule_of: RuleOf = lambda host, reply: None

    def configure(self, rule_of: RuleOf) -> None:
        """Apply a new configuration: `rule_of(host, reply)`: the rule that matches a reply, or None."""
        self._rule_of = rule_of

    def finished(self, pool: Pool | None, session: Session, mail: Mail) -> None:
        """All replies to a message are there. `pool`: the session's, where it is still in one."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        self._counters.add(TRANSACTIONS, 1)
        self.stages.replied(mail, session.core.features.chunking and mail.data is not None)
        entry.route = (session.peer, mail.answer, session.link)
        if mail.all_sent and mail.trail is None:
            self.tally.add(pool.key if pool is not None else "", SUCCESS, len(mail.recipients))
            self.queue.finish(entry, None)
            return
        unseen = Said(*mail.answer, "final") if mail.all_sent else Said(0, b"no reply was seen", "final")
        judged = judge(mail, session.peer, lambda _: unseen, self._rule_of, session.fell_back)
        self._settle(pool, session, mail, judged, {i for i, a in judged.results.items() if not a.code})

    def _settle(self, pool: Pool | None, session: Session, mail: Mail, judged: Judged, doubtful: set[int]) -> None:
        """The attempt of an entry goes on at another host, for those of its recipients that this one has temporarily refused; or
        ends. `doubtful`: recipients for which the host may have the message."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        for attempt in judged.results.values():
            self.tally.add(pool.key if pool is not None else "", attempt.kind, 1)
        self._decisions.rules(pool, entry.name.application, judged.rules)
        trail = mail.trail if isinstance(mail.trail, Trail) else Trail()
        place = session.place or session.peer
        trail.add(place, judged.results, doubtful, judged.retry_after_ms, session.link)
        if session.core.not_sent and entry.lost < FREE_RETRIES:  # it is asked again, by DATA
            entry.lost += 1
            trail.asked -= 1
            trail.tried.discard(place)
        if pool is None or session.our_fault or not self.go_on(pool, entry, trail):
            self.end(entry, trail)

    def end(self, entry: Entry, trail: Trail) -> None:
        """An attempt ends with what it has come to at one host or several."""
        good = trail.asked == 1 and all(a.kind == SUCCESS for a in trail.results.values())
        if not good:
            entry.route = trail.links
        self.queue.finish(entry, None if good else trail.results, trail.retry_after_ms)

    def lost(self, pool: Pool, session: Session, mail: Mail, reason: str) -> bool:
        """The connection ended under a message. False when that is no attempt: the caller delivers the entry again at once."""
        entry = mail.cargo
        assert isinstance(entry, Entry)
        core = session.core
        said = core.last_said
        # A reused connection that ended before any reply to the message: no attempt is counted. (Not where an earlier transaction
        # of the same message was on it: its recipients must not get the message again.)
        # Nor where the peer did not implement BDAT: the message is sent by DATA.
        fresh = not mail.said and mail.trail is None and entry.lost < FREE_RETRIES
        free = fresh and (core.not_sent or (mail.reached == "" and core.messages))
        doubt, doubtful = "", set[int]()
        # Not in doubt: the reply was 421; or the peer had closed the connection, and the message data was written behind (BDAT).
        if mail.data_sent and said is None and not core.not_sent and not (free and session.closed_by_peer):
            self._counters.add(IN_DOUBT, 1)
            doubt = DOUBT
            doubtful = {index for index, _ in mail.asked if index not in mail.said}  # not those of further transactions
        if free:
            entry.lost += 1
            return False
        phase = core.awaiting or mail.reached or "mail"
        self.stages.lost(core.awaiting, core.waits)
        now = wall_ms()

        def unanswered(index: int) -> Said | Attempt:
            behind = doubt if index in doubtful else ""
            inside = session.cause and session.cause + behind
            return said or Attempt(now, TRANSIENT, phase, session.peer, 0, "4.4.2", reason + behind, inside)

        judged = judge(mail, session.peer, unanswered, self._rule_of, session.fell_back)
        entry.route = (session.peer, mail.answer, session.link)
        self._settle(pool, session, mail, judged, doubtful)
        return True

    def charge(
        self, entry: Entry, kind: str, phase: str, peer: str, code: int, enhanced: str, why: str | Failure, retry_after: int = 0
    ) -> None:
        """Finish an entry with an attempt that reached no transaction, for all of its recipients. `retry_after`: ms, 0: by the
        schedule."""
        if entry.waiting or entry.in_flight:
            category = why.category if isinstance(why, Failure) else ""
            attempt = Attempt(wall_ms(), kind, phase, peer, code, enhanced, *told(why), category)
            self.queue.finish(entry, dict.fromkeys((i for i, _ in entry.recipients), attempt), retry_after)

    def charge_one(
        self, entries: list[Entry], until: int, phase: str, said: Said, enhanced: str, why: Failure, began: float = 0.0
    ) -> None:
        """Where nothing can be delivered, charge one message with the attempt and put the others back. Their queues sleep, and
        nothing else delays them: the charged one is due like the others, and is offered when its queue wakes.
        `began`: when a connection was to be opened (loop time), 0.0: none was."""
        for number, entry in enumerate(entries):
            self._parking.park(entry.queue, until)
            if number == 0:
                if began:
                    self.stages.failed_since(entry, began)
                self.charge(entry, TRANSIENT, phase, "", said.code, enhanced, why, AT_ONCE_MS)
            else:
                self._parking.put_back(entry)

    def bounce(self, entry: Entry, indexes: list[int], reason: str) -> None:
        """A bounce policy: these recipients fail permanently; the others are due at once."""
        if entry.waiting:
            attempt = Attempt(wall_ms(), PERMANENT, "queue", "", 0, "5.7.1", reason)
            self.queue.finish(entry, dict.fromkeys(indexes, attempt), 1)
