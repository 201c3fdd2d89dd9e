"""What the filters of a configuration say about a message, as a client would send it: `relaymta filter test`."""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from relaymta.cli.console import say, table
from relaymta.cli.options import fail
from relaymta.cli.peer import no_such
from relaymta.dns import Resolver
from relaymta.filter.chain import Chain, Chains, Outcome
from relaymta.filter.guard import Finding
from relaymta.filter.judgement import Mail, NewBody, Text, Verdict
from relaymta.filter.means import HookMeans, Means
from relaymta.filter.revision import Revision
from relaymta.filter.rewritten import Rewritten
from relaymta.proto.edits import without
from relaymta.proto.header import header_end
from relaymta.reservation import Reservation
from relaymta.route.table import RouteTable
from relaymta.shm import Shared

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.config import Filter as Settings

__all__ = ["Judged", "Sending", "may_relay", "means", "of_envelope"]

MOST = 64 << 20  # octets of a message to test
# Exit statuses.
DONE, MARKED, REFUSED, FAILED = 0, 1, 2, 75
_STATUS = {"accept": DONE, "tag": MARKED, "hold": MARKED, "discard": REFUSED, "tempfail": REFUSED, "reject": REFUSED}
_WORDS = {"accept": "accepted", "tag": "accepted, and tagged", "discard": "discarded"}
_SAMPLE = b"Subject: a sample\r\n\r\n"


class Sending(NamedTuple):
    """How a message is sent. `data`: the message, None: only its envelope is of interest; `application`: that which has logged
    in, or ""; `listener`: its address, "": the first."""

    data: bytes | None
    sender: str
    recipients: tuple[str, ...]
    client: str
    helo: str
    application: str
    listener: str


def may_relay(config: "Config", client: str) -> bool:
    """Whether a client may relay by its address: its [[network]] says so, or, where that says nothing, relay.networks."""
    address = ipaddress.ip_address(client)

    def within(networks: list[str]) -> bool:
        return any(address in ipaddress.ip_network(text) for text in networks)

    own = next((row.relay for row in config.network if within(row.networks)), None)
    return within(config.relay.networks) if own is None else own


def of_envelope(settings: "Settings") -> bool:
    """Whether a filter judges before there is message data."""
    return settings.type == "dnsbl" or (settings.type == "policy" and settings.stage != "message")


@asynccontextmanager
async def means(config: "Config") -> AsyncIterator[Means]:
    """What filters may use here."""
    resolver = Resolver(config.delivery.nameservers)
    shared = Shared.create()
    try:
        hooks = HookMeans(lambda: RouteTable(config).labels)
        yield Means(config.hostname, resolver, triplets=lambda stale: shared.triplets(b"", stale), hooks=hooks)
    finally:
        await resolver.close()


class Judged:
    """What the filters of a configuration say. `findings`: of each that was asked, in their order; `refused`: recipients, with
    the replies; `outcome`: what is done, None: no filter looks at such mail; `changes`: lines; `lists`: the answers of lists in
    the DNS."""

    def __init__(self, config: "Config", sending: Sending) -> None:
        self._config = config
        self._sending = sending
        self.findings: list[Finding] = []
        self.refused: list[tuple[str, str]] = []
        self.outcome: Outcome | None = None
        self.changes: list[str] = []
        self.lists: list[dict[str, Any]] = []
        asyncio.run(self._ask())

    async def _ask(self) -> None:
        """As a relay of one worker, which logs nothing."""
        config, shared = self._config, Shared.create()
        async with means(config) as given:
            loop = asyncio.get_running_loop()
            log: Any = _Silent()
            chains = Chains(config, shared.limits(0, 1), shared.named(0), log, loop, None, given)
            try:
                chain = self._chain(chains)
                if chain is not None:
                    await self._dialogue(chain)
            finally:
                chains.stop()
                await asyncio.sleep(0)

    def _chain(self, chains: Chains) -> Chain | None:
        config, sending = self._config, self._sending
        listeners = {one.address: one for one in config.listener}
        if sending.listener and sending.listener not in listeners:
            fail(64, f"--listener: {no_such('listener', sending.listener, listeners)}")
        at = listeners[sending.listener] if sending.listener else config.listener[0]
        if at.filtered:
            return None
        trusted = bool(sending.application) or may_relay(config, sending.client)
        chain = chains.chain_for(at, sending.client, sending.application, trusted)
        return None if chain is None else chain.at_once()

    async def _dialogue(self, chain: Chain) -> None:
        """MAIL, RCPT, DATA, and the message."""
        sending = self._sending
        dialogue = chain.dialogue(sending.client)
        mail, header = self._mail(chain)
        try:
            await self._look_up(chain, mail)
            refusal = None
            for verb in ("CONNECT", "HELO", *(["AUTH"] if sending.application else [])):
                if refusal is None and verb in chain.asks:
                    refusal = await dialogue.client(verb, mail)
            refusal = refusal or await dialogue.mail(mail)
            for address in [] if refusal is not None else sending.recipients:
                found = await dialogue.rcpt(mail, address)
                if found is None:
                    mail.recipients = (*mail.recipients, address)
                else:
                    self.findings.append(found)
                    self.refused.append((address, chain.reply(found).decode().strip()))
            if refusal is None and mail.recipients:
                refusal = await dialogue.data(mail)
            elif refusal is None:
                self.outcome = Outcome(self.findings[-1].action, chain.reply(self.findings[-1]))
                return
            if refusal is not None:
                self.findings.append(refusal)
                self.outcome = Outcome(refusal.action, chain.reply(refusal))
                return
            revision = Revision(mail)
            findings = await chain.ask(revision, dialogue)
            self.findings += findings
            self.outcome = chain.outcome(findings, revision)
            self.changes = _changes(self.outcome, header, mail, revision)
        finally:
            dialogue.end()

    async def _look_up(self, chain: Chain, mail: Mail) -> None:
        for guard in chain.guards:
            survey = getattr(guard.filter, "survey", None)
            if survey is not None:
                self.lists += [row._asdict() for row in await survey(mail.client, mail.helo, mail.sender)]

    def _mail(self, chain: Chain) -> tuple[Mail, bytes]:
        """The message as filters are shown it, without what passes for our tags; and its header as it came."""
        sending, data = self._sending, self._sending.data
        data = _SAMPLE if data is None else data
        end = header_end(data)
        text = Text(without(data[:end], chain.forged) or b"\r\n", data[end:])
        listener = sending.listener or self._config.listener[0].address
        mail = Mail(
            "test", sending.sender, (), sending.client, sending.helo, sending.application, "", text, listener=listener,
            rewritten=_new_body,
        )  # fmt: skip
        return mail, data[:end]

    def status(self) -> int:
        """The exit status."""
        if self.outcome is None:
            return DONE
        decides = max(self.findings, key=lambda one: one.action, default=None)
        failed = any(one.word == "failed" and one.guard.enforce for one in self.findings)
        refused = decides is not None and decides.word != "failed" and _STATUS[self.outcome.verdict.word] == REFUSED
        return FAILED if failed and not refused else _STATUS[self.outcome.verdict.word]

    def row(self) -> dict[str, Any]:
        """All of it, for programs."""
        outcome = self.outcome
        return {
            "filters": [
                {
                    "filter": one.guard.name, "verdict": one.word, "action": one.follows, "score": one.score,
                    "reason": one.reason, "failure": one.failure, "seconds": round(one.seconds, 4),
                }
                for one in self.findings
            ],
            "lists": self.lists,
            "verdict": outcome.verdict.word if outcome is not None else "accept",
            "reply": outcome.reply.decode().strip() if outcome is not None else "",
            "refused recipients": dict(self.refused),
            "held for": outcome.held if outcome is not None else "",
            "changes": self.changes,
        }  # fmt: skip

    def show(self, known: list[str]) -> None:
        """Print all of it. `known`: the names of all filters."""
        if self.lists:
            head = ["list", "asked", "result", "answers", "score", "time"]
            table("", head, [_cells(row) for row in self.lists])
        if self.findings:
            table("", ["filter", "verdict", "done", "score", "time", "reason"], [_line(one) for one in self.findings])
        skipped = [name for name in known if name not in {one.guard.name for one in self.findings}]
        if skipped:
            why = "without a word, or not asked, since it does not look at such mail or another one has decided"
            say(f"{why}: {', '.join(skipped)}")
        if self.outcome is None:
            say("accepted: no filter looks at mail of this client")
            return
        for address, answer in self.refused if len(self._sending.recipients) > 1 else []:
            say(f"recipient <{address}> refused: {answer}")
        for line in self.changes:
            say(line)
        word = self.outcome.verdict.word
        if self.outcome.left:
            say(f"it would be taken, and delivered only when it was looked at by filter {', '.join(self.outcome.left)}")
        if word == "hold":
            say(f"held ({self.outcome.held})")
        else:
            say(_WORDS.get(word) or f"refused: {self.outcome.reply.decode().strip()}")


def _cells(row: dict[str, Any]) -> list[str]:
    answers = ", ".join(row["answers"]) or "-"
    return [row["zone"], row["asked"], row["result"], answers, f"{row['score']:g}", f"{row['seconds'] * 1000:.0f} ms"]


def _line(one: Finding) -> list[str]:
    enforced = "" if one.guard.enforce else " (enforce = false)"
    score = "-" if one.score is None else f"{one.score:g}"
    why = f"{one.failure}: {one.reason}" if one.failure else one.reason
    return [one.guard.name, one.word + enforced, one.follows, score, f"{one.seconds * 1000:.1f} ms", why or "-"]


class _Silent:
    """A log that nobody reads."""

    def event(self, name: str, **fields: object) -> None:
        """As of Log."""


def _new_body() -> NewBody:
    """It is kept in memory, whatever its size."""

    def nothing(*arguments: object) -> None:
        raise AssertionError("it is in no file")

    return Rewritten(nothing, MOST, MOST, nothing, Reservation(lambda: None))  # type: ignore[arg-type]


def _changes(outcome: Outcome, header: bytes, mail: Mail, revision: Revision) -> list[str]:
    """What would be changed in a message, as lines of a diff: those that go, then those that come; and in its envelope."""
    if outcome.verdict not in (Verdict.ACCEPT, Verdict.TAG, Verdict.HOLD):
        return []
    before, after = (text.decode("utf-8", "replace").split("\r\n") for text in (header, revision.above + revision.header))
    gone, new = Counter(before), Counter(after)
    gone, new = gone - new, new - gone
    found = [*(f"- {line}" for line in _of(gone, before)), *(f"+ {line}" for line in _of(new, after))]
    if revision.body is not None:
        found.append(f"+ another body, of {revision.body.octets} octets")
    if revision.sender is not None and revision.sender != mail.sender:
        found += [f"- sender <{mail.sender}>", f"+ sender <{revision.sender}>"]
    if revision.recipients is not None:
        found += [f"- recipient <{one}>" for one in mail.recipients if one not in revision.recipients]
        found += [f"+ recipient <{one}>" for one in revision.recipients if one not in mail.recipients]
    return found


def _of(counts: Counter[str], lines: list[str]) -> Iterator[str]:
    """So many of each of these lines, in their order."""
    for line in lines:
        if line and counts[line] > 0:
            counts[line] -= 1
            yield line
