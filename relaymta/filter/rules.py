"""Rules about mail (`[[mail_rule]]`): what a message is, against what an administrator does not want.

All rules that apply to a client are evaluated, each is counted, and the first one with `enforce` that matches decides. Without
`enforce` it is only said what it would do. They are evaluated before filters are asked (those with `score_min` behind them), on
the text as it came, on the event loop where it is short, else on a thread.

What is expensive is done once for a message, when the first rule asks for it: its parts, decoded fields, decoded text.
Expressions run in RE2, in time that is linear in the text, whatever they are.

State: `Rule.last`, the messages that it matched last, by whoever evaluates; the counters in shared memory.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from relaymta.config import MailRule
from relaymta.config.mail_rules import attachment_pattern, field_pattern, names_expression, options
from relaymta.errors import redacted
from relaymta.filter.judgement import Mail, Text, Verdict
from relaymta.metrics import RuleCounters
from relaymta.proto import reply
from relaymta.proto.address import comparable, compared, domain_matches, domain_of
from relaymta.proto.attachments import Parts, parts
from relaymta.proto.dkim import by_name, split_fields
from relaymta.proto.mime_text import header_text
from relaymta.proto.printable import printable

if TYPE_CHECKING:
    from relaymta.filter.chain import Sender

__all__ = ["SHOWN", "Match", "RuleSet", "Rules"]

SHOWN = 80  # characters of what matches, in replies and the log
REPLY_MOST = 512  # octets of a reply (RFC 5321 4.5.3.1.5)
LAST = 20  # messages that are remembered of each rule
AT_ONCE = 12288  # octets of a text that is looked at on the event loop: the worst ones take 35 ms
PROGRAM_MOST = 200  # instructions of an expression that is evaluated there: RE2 may take 15 ns for each and each octet
MOST = 64 << 20  # octets of a text that are looked at
WARN_EVERY = 10.0  # seconds between two warnings about what is wrong here
BODY = 262144  # characters of decoded text
FILE = 65536  # octets of a file that is no text by its type


class Match(NamedTuple):
    """A rule that matches. `what`: the first thing in the message by which it does, or ""."""

    rule: "Rule"
    what: str

    @property
    def verdict(self) -> Verdict:
        return Verdict[self.rule.settings.verdict.upper()]

    @property
    def reply(self) -> bytes:
        """The reply that refuses the message: one line of REPLY_MOST octets at most, with some text in it."""
        settings = self.rule.settings
        text = (
            settings.reply
            or ("554 5.7.1" if settings.verdict == "reject" else "451 4.7.1") + " Refused by the rule {rule}: {match}"
        )
        code, enhanced, words = text.split(" ", 2)
        what = self.what.encode("ascii", "replace").decode()
        words = (
            words.replace("{rule}", settings.name).replace("{match}", what).strip(": ") or f"Refused by the rule {settings.name}"
        )
        return reply.format_reply(int(code), enhanced, words[: REPLY_MOST - len(f"{code} {enhanced} \r\n")])


class Message:
    """A message as rules see it: what it takes to say that is found out once."""

    def __init__(self, mail: Mail, body: bytes, score: float | None) -> None:
        """`body`: of what rules look at, b"" where none looks; `score`: the highest that a filter has given; None: none has."""
        self.mail = mail
        self.score = score
        self._header = mail.text.head  # as it came, with the empty line
        self._body = body
        self._decoded: dict[str, list[str]] = {}

    @cached_property
    def parts(self) -> Parts:
        return parts(self._header, self._body)

    @cached_property
    def text(self) -> str:
        """The first BODY characters of the decoded text of all parts."""
        return "\n".join(self.parts.texts(BODY))

    @cached_property
    def files(self) -> str:
        """The beginnings of parts that are no text, but have text in them, as files of keys have: BODY characters together."""
        found, left = list[str](), BODY
        for part in self.parts.parts:
            first = part.first
            charset = "utf-16" if first.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1"
            is_text = charset == "utf-16" or first.startswith(b"#!") or not (part.kinds or b"\0" in first)
            if not part.is_text and left > 0 and is_text:
                octets = part.beginning(min(FILE, left))
                found.append(octets.decode(charset, "replace"))
                left -= len(octets)
        return "\n".join(found)

    def field(self, name: str) -> list[str]:
        """The decoded values of all fields of a name, which is in lower case."""
        found = self._decoded.get(name)
        if found is None:
            found = self._decoded[name] = [header_text(value) for value in self._fields.get(name.encode(), ())]
        return found

    @cached_property
    def _fields(self) -> dict[bytes, list[bytes]]:
        fields = by_name(split_fields(self._header))
        return {name: [one.partition(b":")[2].replace(b"\r\n", b"").strip() for one in found] for name, found in fields.items()}


# Whether a condition holds: what in the message makes it hold ("": nothing that can be shown); None: it does not.
Condition = Callable[[Message], str | None]


class Rule:
    """A rule that is configured. `name`, `title`, `enforce`, `refused`, `warn`: as of Guard, in whose place it stands where it
    decides; `last`: ids of the messages that it matched last; `needs_body`, `late`: its conditions are about the body, or about
    scores of filters; `heavy`: a text may take long."""

    refused = "hold"

    def __init__(self, settings: MailRule, counters: RuleCounters, last: deque[str]) -> None:
        self.settings = settings
        self.name = settings.name
        self.title = f"rule {settings.name}"
        self.enforce = settings.enforce
        self.counters = counters
        self.last = last
        self.late = settings.score_min is not None
        self.needs_body = bool(settings.attachment or settings.body or settings.secrets)
        expressions = [*settings.body, *(field_pattern(text)[1] for text in settings.header)]
        self.heavy = any(_compiled(one).programsize > PROGRAM_MOST for one in expressions)
        self._conditions = _conditions(settings)

    def warn(self, text: str) -> None:
        """As of Guard: it changes nothing that could be dropped."""

    def match(self, message: Message) -> Match | None:
        """Whether it matches; None: it does not. Counted."""
        began = time.perf_counter_ns()
        shown = ""
        matches = True
        for condition in self._conditions:
            what = condition(message)
            if what is None:
                matches = False
                break
            shown = shown or what
        self.counters.looked(matches, self.enforce, (time.perf_counter_ns() - began) // 1000)
        if not matches:
            return None
        self.last.append(message.mail.ident)
        return Match(self, printable(shown[:SHOWN])[:SHOWN])


def _conditions(settings: MailRule) -> list[Condition]:
    """The conditions of a rule, the cheapest first."""
    found: list[Condition] = []

    def add(given: object, holds: Callable[[Message], bool]) -> None:
        if given:
            found.append(lambda message: "" if holds(message) else None)

    senders, recipients = {comparable(one) for one in settings.sender}, {comparable(one) for one in settings.recipient}
    add(settings.recipients_min, lambda message: len(message.mail.recipients) >= settings.recipients_min)
    add(settings.min_size, lambda message: message.mail.text.size >= settings.min_size)
    add(settings.dmarc, lambda message: message.mail.dmarc in settings.dmarc)
    lowest = settings.score_min
    add(lowest is not None, lambda message: message.score is not None and lowest is not None and message.score >= lowest)
    add(senders, lambda message: compared(message.mail.sender) in senders)
    add(settings.sender_domain, lambda message: domain_matches(domain_of(message.mail.sender), settings.sender_domain))
    add(recipients, lambda message: any(compared(one) in recipients for one in message.mail.recipients))
    domains = settings.recipient_domain
    add(domains, lambda message: any(domain_matches(domain_of(one), domains) for one in message.mail.recipients))
    if settings.header:
        found.append(_header([field_pattern(text) for text in settings.header]))
    if settings.attachment:
        found.append(_attachment([attachment_pattern(text) for text in settings.attachment]))
    if settings.body:
        found.append(_body(settings.body))
    if settings.secrets:
        found.append(_secrets(settings.secrets))
    return found


def _header(patterns: Sequence[tuple[str, str]]) -> Condition:
    wanted = [(name, _compiled(expression)) for name, expression in patterns]

    def holds(message: Message) -> str | None:
        for name, expression in wanted:
            for value in message.field(name):
                if (found := _found(expression, value)) is not None:
                    return str(found.group() or value)
        return None

    return holds


def _body(expressions: Sequence[str]) -> Condition:
    wanted = [_compiled(expression) for expression in expressions]

    def holds(message: Message) -> str | None:
        for expression in wanted:
            if (found := _found(expression, message.text)) is not None:
                return str(found.group())
        return None

    return holds


def _secrets(kinds: Sequence[str]) -> Condition:
    from relaymta.proto.secrets import secrets  # as RE2

    def holds(message: Message) -> str | None:
        for text in (message.text, message.files):
            for one in secrets(text, kinds):
                return one.what
        return None

    return holds


def _attachment(patterns: Sequence[tuple[str, str]]) -> Condition:
    names, archived = (_globs([glob for kind, glob in patterns if kind == word]) for word in ("name", "archive"))
    kinds = {word for kind, word in patterns if kind == "type"}
    excessive = ("structure", "excessive") in patterns

    def holds(message: Message) -> str | None:
        found = message.parts
        if excessive and (found.excessive or any(part.unlisted for part in found.parts)):
            return "excessive structure"
        for part in found.parts:
            if kinds and not kinds.isdisjoint(part.kinds):
                return next(iter(part.names), "") or next(one for one in part.kinds if one in kinds)
            for expression, several in ((names, part.names), (archived, part.archived)):
                for name in several if expression is not None else ():
                    if _found(expression, name) is not None:
                        return str(name)
        return None

    return holds


def _globs(globs: Sequence[str]) -> Any:
    """An expression that finds what matches one of these; None where there are none."""
    return _compiled(names_expression(globs)) if globs else None


def _found(expression: Any, text: str) -> Any:
    """What an expression finds. Some charsets, such as UTF-7, give lone surrogates, which RE2 does not take: they are U+FFFD."""
    try:
        return expression.search(text)
    except UnicodeEncodeError:
        return expression.search(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def _compiled(expression: str) -> Any:
    import re2  # a worker without such rules starts without it

    return re2.compile(expression, options())


class RuleSet:
    """The rules about mail of one client. `large`: a place for each message that is in memory as a whole meanwhile."""

    def __init__(
        self, rules: Sequence[Rule], told: Callable[[Mail, Match], None], warn: Callable[[str], None], large: asyncio.Semaphore
    ) -> None:
        self._large = large
        self._rules = {late: [rule for rule in rules if rule.late == late] for late in (False, True)}
        self._told = told
        self._warn = warn

    async def judge(self, mail: Mail, score: float | None, late: bool) -> Match | None:
        """Evaluate those that are due, before filters are asked or behind them (`late`); tell of all that match. The first one
        that is enforced, and does something; None: none is. OSError: the text cannot be read."""
        rules = self._rules[late]
        if not rules:
            return None
        text, body = mail.text, any(rule.needs_body for rule in rules)
        octets = text.size if body else len(text.head) if any(rule.settings.header for rule in rules) else 0
        if octets <= AT_ONCE and not any(rule.heavy for rule in rules):
            message = Message(mail, await _body_of(text) if body else b"", score)
            found, wrong = _evaluate(rules, message)
        else:
            found, wrong = await self._on_thread(rules, mail, score, body)
        if wrong:
            self._warn(wrong)
        for match in found:
            self._told(mail, match)
        return next((match for match in found if match.rule.enforce and match.verdict is not Verdict.ACCEPT), None)

    async def _on_thread(self, rules: Sequence[Rule], mail: Mail, score: float | None, body: bool) -> tuple[list[Match], str]:
        """One after the other. Cancelled, the thread goes on, and has its place until it is done."""
        await self._large.acquire()
        try:
            message = Message(mail, await _body_of(mail.text) if body else b"", score)
            evaluating = asyncio.get_running_loop().run_in_executor(None, _evaluate, rules, message)
        except BaseException:
            self._large.release()
            raise
        evaluating.add_done_callback(lambda _: self._large.release())
        return await asyncio.shield(evaluating)


def _evaluate(rules: Sequence[Rule], message: Message) -> tuple[list[Match], str]:
    """On any thread: those that match, and what was wrong."""
    found, wrong = list[Match](), ""
    for rule in rules:
        try:
            match = rule.match(message)
        except Exception as error:  # a defect costs no more than what the rule would have done
            wrong = wrong or redacted(f"rule {rule.name}: {type(error).__name__}: {error}")
            continue
        if match is not None:
            found.append(match)
    return found, wrong


async def _body_of(text: Text) -> bytes:
    """What is behind the header, MOST octets of it."""
    return b"".join([piece async for piece in text.pieces(len(text.head) + MOST, body_only=True)])


class Rules:
    """All rules that are configured, as one worker has them."""

    def __init__(
        self, settings: Sequence[MailRule], counters: Callable[[str], RuleCounters], before: "Rules | None",
        told: Callable[[Mail, Match], None], warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`counters(name)`: of a rule; `before`: those in use now: what a rule has matched last stays with its name; `told(mail,
        match)`: a rule has matched."""
        known = {} if before is None else {rule.name: rule.last for rule in before.rules}
        self.rules: list[Rule] = [Rule(one, counters(one.name), known.get(one.name, deque(maxlen=LAST))) for one in settings]
        self._told = told
        self._warn_now = warn
        self._large = asyncio.Semaphore(1)
        self._warn_after = 0.0

    def _warn(self, text: str) -> None:
        """Unless that was done a moment ago."""
        now = asyncio.get_running_loop().time()
        if now >= self._warn_after:
            self._warn_after = now + WARN_EVERY
            self._warn_now(text)

    def of(self, sender: "Sender") -> RuleSet | None:
        """Those about mail of a client; None: there are none."""
        rules = [rule for rule in self.rules if sender.is_meant_by(rule.settings)]
        return RuleSet(rules, self._told, self._warn, self._large) if rules else None
