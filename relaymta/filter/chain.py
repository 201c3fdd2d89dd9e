"""The chain: all filters that look at a message, and what is done with it because of what they say.

A filter gives a verdict and changes; the chain alone decides, at its end and all at once. Order: verification (SPF, DKIM, DMARC),
the chain, our signatures, the commit. They are asked in the order of the file: neighbours that can do no more than add fields
side by side, one that may change anything alone, and it sees what those before it have changed. The strictest verdict counts, and
of equals that of the filter that comes first in the file. A sure refusal ends the others' work; whatever one filter does, or does
not, costs another nothing.
"""

import asyncio
import ipaddress
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from relaymta.config import Config, FiltersTable, Listener, MailRule
from relaymta.config import Filter as Settings
from relaymta.config.filters import BUILT_IN
from relaymta.filter.dialogue import Dialogue
from relaymta.filter.guard import Finding, Guard
from relaymta.filter.judgement import Filter, Mail, Verdict
from relaymta.filter.means import Means
from relaymta.filter.revision import Revision
from relaymta.log import Log
from relaymta.metrics import FilterCounters, FilterTotals, ListCounters, RuleCounters, RuleTotals, index, list_name, rule_name
from relaymta.proto import reply
from relaymta.proto.address import domain_matches, domain_of
from relaymta.proto.dnsbl import Codes
from relaymta.proto.edits import Edit, Insert, spaced, subject_edits
from relaymta.proto.printable import printable
from relaymta.shm import Limits, Named

if TYPE_CHECKING:
    from relaymta.filter.hooks import Hooks
    from relaymta.filter.rules import Match, Rules, RuleSet

__all__ = ["Chain", "Chains", "Outcome", "Sender", "made", "reason_held"]

TAGS_MOST = 16384  # octets by which tags let a header grow
REASON_SHOWN = 200  # characters of a filter's reason in a reply, a field, or the reason of a held message
DNSBL_SECONDS = 5.0  # for answers of lists, where `timeout` is not given
CHAINS_KEPT = 1000  # by what decides which filters apply


class Outcome(NamedTuple):
    """What is done with a message. `reply`: where it is refused, for good or for now; `closes`: the client is disconnected then;
    `held`: why it is held, or ""; `left`: the filters that look at it later, before it is delivered; `by`: the finding that
    counts, None: there is none; `route`: the name of that which it takes, "": as routes say."""

    verdict: Verdict
    reply: bytes = b""
    closes: bool = False
    held: str = ""
    left: tuple[str, ...] = ()
    by: Finding | None = None
    route: str = ""


class Sender(NamedTuple):
    """What decides which filters look at a client's mail. `trusted`: it may relay; `queues`: its mail goes into the queue, where
    filters can look at it later."""

    listener: str
    address: str
    application: str
    trusted: bool
    queues: bool

    def is_meant_by(self, settings: "Settings | MailRule") -> bool:
        """Whether a filter, or a rule about mail, is for such a client: by `clients`, `application` and `networks`."""
        if settings.clients != "all" and self.trusted != (settings.clients == "trusted"):
            return False
        if settings.application and self.application not in settings.application:
            return False
        if not settings.networks:
            return True
        address = ipaddress.ip_address(self.address)
        return any(address in ipaddress.ip_network(network) for network in settings.networks)


class Chain:
    """The filters for the mail of one client, in the order of the file. `follows`: one of them follows the client, and needs a
    `Dialogue`, which `begins` with the connection, or with the first MAIL; `asks`: about which commands; `looks`: one of them is
    shown messages, or may tag them; else there is nothing to do but what they have said of the envelope; `forged`: names of
    fields that are removed from mail of clients that may not relay, since they are those of our tags; `queues`: as of Sender."""

    def __init__(
        self, guards: list[Guard], table: FiltersTable, trusted: bool, log: Log, loop: asyncio.AbstractEventLoop,
        queues: bool = True, behind: bool = False, named: bool = False, rules: "RuleSet | None" = None,
    ) -> None:  # fmt: skip
        """`behind`: they look at a message that is in the queue, or, as on the command line, at once; `named`: it waits for them,
        and all of them are asked: its recipients were what they look at, before aliases were followed; `rules`: those about mail
        of this client."""
        self.queues = queues
        self._rules = rules
        self._named = named
        self._later = [guard for guard in guards if guard.is_queued and queues and not behind]
        self.guards = [guard for guard in guards if guard not in self._later]
        self.follows = any(guard.follows for guard in self.guards)
        self.asks = frozenset[str]().union(*(guard.asks for guard in self.guards))
        self.begins = any(guard.begins for guard in self.guards)
        self.looks = bool(self._later) or rules is not None or any(guard.looks or guard.tags for guard in self.guards)
        self._all = guards
        self.forged = frozenset() if trusted else table.tag_names
        self._table = table
        self.trusted = trusted
        self._log = log
        self._loop = loop

    async def judge(self, revision: Revision, dialogue: Dialogue | None = None) -> Outcome:
        """Ask all filters that apply, and say what is done; what they change, `revision` has then. `dialogue`: that with the
        client, where there is one. OSError or StoreError: the message cannot be read or written. Cancelled: they are left alone,
        and nothing is logged."""
        findings = await self.ask(revision, dialogue)
        for one in findings:
            if isinstance(one.guard, Guard):  # what rules say was told
                self.told(revision.mail, one)
        return self.outcome(findings, revision)

    async def ask(self, revision: Revision, dialogue: Dialogue | None = None) -> list[Finding]:
        """Ask all filters that apply: what they say, in the order of the file, or up to a refusal that nothing can change."""
        if dialogue is None and self.follows:
            dialogue = self.dialogue(revision.mail.client)
            try:
                return await self.ask(revision, dialogue)
            finally:
                dialogue.end()
        findings = await self._ruled(revision, None, False)
        if any(one.is_sure for one in findings):
            return findings
        until = self.deadline()
        for group in self._groups():
            mail = revision.mail
            asked = [one for one in group if self._counts(one, mail, dialogue)]
            if len(asked) != 1:
                found = await self._side_by_side(asked, mail, dialogue, until)
            else:
                found = [await self._one(asked[0], mail, dialogue, until)]
            findings += found
            if any(one.is_sure for one in found):
                break
            for one in found:
                self._apply(one, revision)
        else:
            scores = [one.score for one in findings if one.score is not None]
            findings += await self._ruled(revision, max(scores, default=None), True)
        return findings

    async def _ruled(self, revision: Revision, score: float | None, late: bool) -> list[Finding]:
        """What rules about mail say."""
        match = await self._rules.judge(revision.mail, score, late) if self._rules is not None else None
        if match is None:
            return []
        refusal = match.reply if match.verdict >= Verdict.TEMPFAIL else b""
        return [Finding(match.rule, match.verdict.word, match.verdict, match.what, reply=refusal)]

    def _counts(self, one: Guard, mail: Mail, dialogue: Dialogue | None) -> bool:
        """Whether a filter has a word about a message, or has had it before another one has changed the recipients."""
        looks = one.looks and (self._named or one.looks_at(mail.recipients))
        return looks or (dialogue is not None and dialogue.knows(one))

    def at_once(self) -> "Chain":
        """The same filters and rules, of which none waits until the message is in the queue."""
        return Chain(self._all, self._table, self.trusted, self._log, self._loop, behind=True, rules=self._rules)

    def dialogue(self, client: str) -> Dialogue:
        """For a new client, whose address it is, where one of them follows it."""
        return Dialogue(self, client)

    def deadline(self) -> float:
        """Until when (loop time) all filters together may take for what they are asked now."""
        return self._loop.time() + self._table.budget

    def _groups(self) -> Iterator[list[Guard]]:
        """Filters that are asked at the same time."""
        for alone, guards in groupby(self.guards, key=lambda guard: guard.alone):
            if alone:
                yield from ([guard] for guard in guards)
            else:
                yield list(guards)

    def _apply(self, one: Finding, revision: Revision) -> None:
        """Make the changes that a filter wants."""
        dropped = one.dropped + revision.edit(one.edits)
        if one.body is not None:
            revision.rewrite(one.body)
        if one.envelope is not None:
            dropped += revision.readdress(one.envelope)
        if dropped:
            one.guard.warn(f"{dropped} of its changes to {revision.mail.ident} were not made")

    def _one(self, guard: Guard, mail: Mail, dialogue: Dialogue | None, until: float) -> Coroutine[object, object, Finding]:
        if dialogue is None:
            return guard.ask(mail, self.trusted, until)
        return dialogue.judge(guard, mail, self.trusted, until)

    async def _side_by_side(self, asked: list[Guard], mail: Mail, dialogue: Dialogue | None, until: float) -> list[Finding]:
        """The findings, in the order of the file: of all, or up to a refusal that nothing can change."""
        tasks = [self._loop.create_task(self._one(guard, mail, dialogue, until)) for guard in asked]
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if any(task.result().is_sure for task in done):
                    break
        finally:
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.exception()  # one is told of, and asyncio would log the others
        return [task.result() for task in tasks if not task.cancelled() and task.exception() is None]

    def told(self, mail: Mail, one: Finding, recipients: Sequence[str] | None = None) -> None:
        """Log what a filter has said; of these `recipients`, None: of all there are."""
        changes = len(one.edits) + (one.body is not None)
        if one.envelope is not None:
            envelope = one.envelope
            changes += len(envelope.added) + len(envelope.removed)
            changes += (envelope.sender is not None) + (envelope.only is not None)
        self._log.event(
            "filtered", id=mail.ident, client=mail.client, sender=mail.sender,
            recipients=mail.recipients if recipients is None else recipients, filter=one.guard.name,
            verdict=one.word, action=one.follows, score=one.score, seconds=round(one.seconds, 4), changes=changes,
            reason=f"{one.failure}: {one.reason}" if one.failure else one.reason,
        )  # fmt: skip

    def outcome(self, findings: list[Finding], revision: Revision) -> Outcome:
        """What is done because of what they say, where their changes are made already; a tag is added here."""
        found, left = self._outcome(findings, revision), {one.guard.name for one in findings if one.later}
        left |= {guard.name for guard in self._later if guard.looks_at(revision.mail.recipients)}
        if not left or found.verdict >= Verdict.TEMPFAIL or found.verdict is Verdict.DISCARD:
            return found
        if not self.queues:
            late = next(one for one in findings if one.later)
            answer = self.reply(late._replace(action=Verdict.TEMPFAIL, later=False))
            return Outcome(Verdict.TEMPFAIL, answer, by=late)
        return found._replace(left=tuple(guard.name for guard in self._all if guard.name in left))

    def _outcome(self, findings: list[Finding], revision: Revision) -> Outcome:
        first = max(findings, key=lambda one: one.action, default=None)  # of equals, `max` finds the first
        if first is None:
            return Outcome(Verdict.ACCEPT)
        if first.is_sure:
            instead = next((one for one in findings if one.condition == "if rejected"), None)
            first = first if instead is None else instead._replace(action=Verdict.TEMPFAIL)
        if first.action >= Verdict.TEMPFAIL:
            answer = self.reply(first)
            return Outcome(first.action, answer, answer.startswith((b"421", b"521")), by=first)
        if first.action is Verdict.DISCARD or not revision.mail.recipients:
            return Outcome(Verdict.DISCARD, by=first)
        tag = next((one for one in findings if one.action is Verdict.TAG), None)
        if tag is not None:
            revision.edit(self._tags(tag, revision.mail), TAGS_MOST)
        route = next((one.route for one in findings if one.route), "")
        return Outcome(first.action, held=reason_held(first) if first.action is Verdict.HOLD else "", by=first, route=route)

    def reply(self, one: Finding) -> bytes:
        """The refusal that follows: the filter's own, where it gives one; else it names the filter, and never an address or a
        version."""
        name = one.guard.name
        if one.reply and one.reply.startswith(b"4" if one.action is Verdict.TEMPFAIL else b"5"):
            return one.reply
        if one.closes:
            return reply.format_reply(421, "4.7.1", f"{name} does not answer now; closing")
        if one.word == "failed":
            return reply.format_reply(451, "4.7.1", f"{name} does not answer now; try again later")
        if one.word == "skipped":
            return reply.format_reply(552, "5.3.4", f"The message is too large for {name}")
        if one.action is Verdict.TEMPFAIL:
            return reply.format_reply(451, "4.7.1", f"Not taken now by {name}: {_ascii(one.reason)}".rstrip(": "))
        code, enhanced, text = self._table.reply.split(" ", 2)
        return reply.format_reply(int(code), enhanced, _filled(text, one).strip(": ") or f"Refused by {name}")

    def _tags(self, one: Finding, mail: Mail) -> list[Edit]:
        """They stand first in the header: what is behind a line that is no field some readers do not see."""
        edits: list[Edit] = []
        for text in reversed(self._table.tag):
            name, _, value = _filled(text, one).partition(":")
            edits.append(Insert(1, name.encode(), spaced(value.strip().encode())))
        if self._table.subject:
            edits += subject_edits(mail.text.head, self._table.subject)
        return edits


class Chains:
    """All configured filters of one worker. Made on any thread; used on the loop from `begin` on."""

    def __init__(
        self, config: Config, limits: Limits, named: Named, log: Log, loop: asyncio.AbstractEventLoop, before: "Chains | None",
        means: "Means | None" = None,
    ) -> None:  # fmt: skip
        """`before`: what is in use now: filters that are configured as before go on as they are."""
        means = (means or Means())._replace(hostname=config.hostname, named=named)
        self._table = config.filters
        self._means = means
        self._named = named
        self._log = log
        self._loop = loop
        self._chains: dict[Sender, Chain | None] = {}
        self._gone: list[Guard] = []

        known = {} if before is None else {guard.name: guard for guard in before.guards}
        self.guards: list[Guard] = []
        for one in config.filter:
            guard = known.get(one.name)
            if guard is None or guard.settings != one:
                counters = FilterCounters(named.own(), named.row(one.name))
                asked = made(one, means._replace(warn=partial(_warn, log, one.name)))
                guard = Guard(one, asked, limits, counters, log, loop)
            self.guards.append(guard)
        self.rules: Rules | None = self._ruled(config, before) if config.mail_rule else None

    def _ruled(self, config: Config, before: "Chains | None") -> "Rules":
        from relaymta.filter.rules import Rules  # where there are some

        own, row = self._named.own(), self._named.row
        return Rules(
            config.mail_rule, lambda name: RuleCounters(own, row(rule_name(name))), None if before is None else before.rules,
            self._matched, lambda text: self._log.event("warning", text=text),
        )  # fmt: skip

    def _matched(self, mail: Mail, match: "Match") -> None:
        rule = match.rule
        self._means.matched(mail, rule.name)
        self._log.event(
            "rule", id=mail.ident, client=mail.client, sender=mail.sender, recipients=mail.recipients, rule=rule.name,
            verdict=match.verdict.word, enforced=rule.enforce, match=match.what,
        )  # fmt: skip

    def begin(self, before: "Chains | None") -> None:
        """Use it from now on, in place of `before`."""
        kept = {id(guard) for guard in self.guards}
        gone = [] if before is None else [guard for guard in before.guards if id(guard) not in kept]
        for guard in gone:
            guard.close()
        self._gone = [guard for guard in ([] if before is None else [*before._gone, *gone]) if guard.open]
        for guard in self.guards:
            if hasattr(guard.filter, "changed_shape"):
                guard.filter.changed_shape = partial(self._reshaped, guard)
            guard.begin()

    def _reshaped(self, guard: Guard) -> None:
        """A filter is asked something else from now on, by sessions that begin now."""
        guard.shape()
        self._chains.clear()

    def refresh(self) -> None:
        """See whether files that filters have read are others now."""
        for guard in self.guards:
            refresh = getattr(guard.filter, "refresh", None)
            if refresh is not None:
                refresh()

    def tell(self, result: str, attempt: dict[str, Any]) -> None:
        """What has come of an attempt to deliver a message, for hooks that are told."""
        for guard in self.guards:
            tells = getattr(guard.filter, "tells", None)
            if tells and _is_told(guard.settings, attempt):
                cast("Hooks", guard.filter).tell(result, attempt)

    @property
    def open(self) -> int:
        """Descriptors of connections to filters, those that only sessions from before a reload still have among them."""
        return sum(guard.open for guard in self.guards) + sum(guard.open for guard in self._gone)

    def rows(self) -> list[dict[str, Any]]:
        """For operators: of each filter its state for this worker, and what all workers have counted."""
        found = []
        for guard in self.guards:
            total = FilterTotals(self._named.of(guard.name))
            half, nearly_all = total.within(0.5), total.within(0.99)
            found.append(
                guard.state()
                | {"asked": sum(total.buckets), "p50": half, "p99": nearly_all}
                | {"verdicts": total.verdicts, "failures": total.failures}
            )
        return found

    def ruled(self) -> list[dict[str, Any]]:
        """For operators: of each rule about mail what all workers have counted, and what it has matched last here."""
        found = []
        for rule in self.rules.rules if self.rules is not None else []:
            total = RuleTotals.of(self._named.of(rule_name(rule.name)))
            row = {"rule": rule.name, "verdict": rule.settings.verdict, "enforce": rule.enforce}
            found.append(row | total._asdict() | {"last": list(rule.last)})
        return found

    def told(self, names: Sequence[str]) -> list[str]:
        """For operators: what these filters do, for each that a message in the queue waits for."""
        known = {guard.name: guard for guard in self.guards}
        return [known[name].told() if name in known else f"filter {name}, which is not configured any more" for name in names]

    def close(self) -> None:
        """There are no filters any more."""
        for guard in self.guards:
            guard.close()

    def stop(self) -> None:
        """The worker ends."""
        for guard in [*self.guards, *self._gone]:
            guard.stop()

    def behind(self, names: Sequence[str], trusted: bool) -> Chain | None:
        """Of the filters of these names those that there are, for a message in the queue of a client that may relay (`trusted`),
        or may not; None: there are none any more."""
        guards = [guard for guard in self.guards if guard.name in names and guard.settings.sees_messages]
        return Chain(guards, self._table, trusted, self._log, self._loop, behind=True, named=True) if guards else None

    @property
    def scans(self) -> int:
        """How many messages in the queue they look at at once."""
        return self._table.scans

    def waited_for(self, trusted: bool) -> frozenset[str]:
        """The names of the filters that are down, where messages in the queue wait for them."""
        return frozenset(guard.name for guard in self.guards if guard.waits(trusted))

    def chain_for(self, listener: Listener, address: str, application: str, trusted: bool) -> Chain | None:
        """The filters that look at the mail of a client; None: none does."""
        sender = Sender(listener.address, address, application, trusted, listener.protocol != "lmtp")
        if sender not in self._chains:
            if len(self._chains) >= CHAINS_KEPT:
                self._chains.clear()
            guards = [guard for guard in self.guards if not guard.idle and _is_for(guard.settings, sender)]
            rules = None if self.rules is None else self.rules.of(sender)
            self._chains[sender] = (
                Chain(guards, self._table, trusted, self._log, self._loop, sender.queues, rules=rules)
                if guards or rules is not None
                else None
            )
        return self._chains[sender]


def reason_held(one: Finding) -> str:
    """Why a message is held because of what a filter says."""
    return f"{one.guard.title}: {_short(one.reason)}"


def _warn(log: Log, name: str, text: str) -> None:
    log.event("warning", text=f"filter {name}: {text}")


def made(settings: Settings, means: Means) -> Filter:
    """What speaks to a filter of the type that is configured."""
    return _TYPES[settings.type](settings, means)


def _clamd(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.clamd import Clamd  # where it is configured

    return Clamd(settings.address, settings.timeout)


def _rspamd(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.rspamd import Rspamd

    return Rspamd(settings.address, settings.timeout, settings.must_work, settings.controller)


def _spamd(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.spamd import Spamd

    return Spamd(settings.address, settings.timeout)


def _milter(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.milter import Milter

    return Milter(settings.address, settings.timeout, means.hostname, "message" if settings.is_queued else settings.stage)


def _policy(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.policy import Policy

    stage = "message" if settings.is_queued else settings.stage or "rcpt"
    return Policy(settings.address, settings.timeout, means.hostname, stage)


def _http(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.http import Http

    return Http(
        settings.address, settings.timeout, settings.name, means.hostname, settings.stage or "message", settings.body,
        settings.secret_file, means.warn,
    )  # fmt: skip


def _dnsbl(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.dnsbl import Dnsbl, DnsList

    assert means.resolver is not None
    lists = [DnsList(one.zone, Codes(one.codes), one.score, one.domain) for one in settings.lists]
    counted: dict[str, ListCounters] = {}
    if means.named is not None:
        own, row = means.named.own(), means.named.row
        counted = {one.zone: ListCounters(own, row(list_name(one.zone))) for one in lists}

    def count(zone: str, result: str) -> None:
        if zone in counted:
            counted[zone].result(result)

    timeout = settings.timeout if "timeout" in settings.model_fields_set else DNSBL_SECONDS
    return Dnsbl(lists, timeout, means.resolver, count, means.warn)


def _greylist(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.greylist import Greylist, Times, stale

    assert means.resolver is not None and means.triplets is not None
    times = Times(int(settings.delay), int(settings.retry_window), int(settings.known_for), settings.known_after)
    counters = means.counters

    def count(word: str) -> None:
        if counters is not None:
            counters.add(index("relaymta_greylist_total", word), 1)

    table = means.triplets(lambda first, last, now: stale(times, first, last, now))
    return Greylist(times, table, means.resolver, count)


def _python(settings: Settings, means: Means) -> Filter:
    from relaymta.filter.hooks import Hooks

    return Hooks(
        settings.file, settings.seconds, settings.memory, settings.isolation == "loop", means.hooks, settings.name, means.warn
    )


_TYPES: dict[str, Callable[[Settings, Means], Filter]] = {
    "clamd": _clamd, "rspamd": _rspamd, "spamd": _spamd, "milter": _milter, "policy": _policy, "http": _http, "dnsbl": _dnsbl,
    "greylist": _greylist, "python": _python,
}  # fmt: skip


def _is_for(settings: Settings, sender: Sender) -> bool:
    """Whether a filter looks at a client's mail, whoever its recipients are."""
    if settings.type in BUILT_IN and sender.trusted:
        return False
    if settings.listener and sender.listener not in settings.listener:
        return False
    return sender.is_meant_by(settings)


def _is_told(settings: Settings, attempt: dict[str, Any]) -> bool:
    """Whether a filter is told of an attempt to deliver: by `application` and `recipient_domain`."""
    if settings.application and attempt["application"] not in settings.application:
        return False
    wanted = settings.recipient_domain
    return not wanted or any(domain_matches(domain_of(address), wanted) for address in attempt["recipients"])


def _filled(template: str, one: Finding) -> str:
    """A reply or a field, with its placeholders filled in: one line of ASCII."""
    score = "" if one.score is None else f"{one.score:g}"
    for word, value in (("{filter}", one.guard.name), ("{score}", score), ("{reason}", _ascii(one.reason))):
        template = template.replace(word, value)
    return template


def _short(reason: str) -> str:
    return printable(reason)[:REASON_SHOWN]


def _ascii(reason: str) -> str:
    return _short(reason).encode("ascii", "replace").decode()
