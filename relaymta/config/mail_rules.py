"""Rules about mail: what administrators refuse, hold or tag by what a message is."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from relaymta.config.filters import LONGEST_REPLY, Words, is_line, listed
from relaymta.config.values import Name, Network, Reload, Size, Table, near

__all__ = ["KINDS", "MailRule", "attachment_pattern", "field_pattern", "names_expression", "options"]

KINDS = ("program", "archive", "document", "image")  # of attachments, by their first octets
STRUCTURES = ("excessive",)
PREFIXES = ("type", "archive", "structure")

_FIELD = re.compile(r"([!-9;-~]+):[ \t]?+(.+)\Z", re.S)
_REPLY = re.compile(r"[45]\d\d [45]\.\d{1,3}\.\d{1,3} \S")
LONGEST = 500  # characters of an expression

Secrets = Literal["private key", "cloud key", "card number"]  # proto/secrets.py
Dmarc = Literal["pass", "none", "fail", "permerror", "temperror"]


def field_pattern(text: str) -> tuple[str, str]:
    """A condition on a header field as (its name in lower case, the expression). ValueError."""
    match = _FIELD.match(text)
    if match is None:
        raise ValueError(f'{text!r} is not "Name: expression"')
    return match[1].lower(), match[2]


def attachment_pattern(text: str) -> tuple[str, str]:
    """A condition on attachments as (what it is about, pattern or word): "name", "type", "archive" or "structure". ValueError."""
    kind, colon, rest = text.partition(":")
    if not colon:
        return "name", _glob(text, text)
    known = {"type": KINDS, "structure": STRUCTURES}
    if kind not in PREFIXES:
        raise ValueError(f"{text!r}: before a colon there is {listed(PREFIXES)}{near(kind, PREFIXES)}")
    if kind in known and rest not in known[kind]:
        raise ValueError(f"{text!r}: there is {listed(known[kind])}{near(rest, known[kind])}")
    return kind, _glob(rest, text) if kind == "archive" else rest


def _glob(pattern: str, text: str) -> str:
    if not pattern.strip("*?") or pattern != pattern.strip() or not pattern.isprintable():
        raise ValueError(f'{text!r}: give a name, such as "*.exe"')
    if "/" in pattern or "\\" in pattern:
        raise ValueError(f"{text!r}: names are compared without folders")
    return pattern


class MailRule(Table):
    """A rule about mail. `[[mail_rule]]`, repeatable. All conditions that are given must hold; of a list one of its members.
    They are evaluated before filters are asked. The first rule with `enforce` that matches decides; all that match are counted.
    docs/rules.md."""

    name: Reload[Name] = Field(description="its name in log, metrics, replies and on the command line")
    attachment: Reload[list[str]] = Field(
        [], description='a part of the message has such a name ("*.exe"), is of such a kind by its first octets '
        '("type:program", archive, document, image), has a file of such a name in it ("archive:*.exe"); or '
        '"structure:excessive": there is more than can be looked at',
    )  # fmt: skip
    header: Reload[list[str]] = Field(
        [], description='a field as "Name: expression" (RE2, on the decoded value), such as "Subject: (?i)invoice"'
    )
    body: Reload[list[str]] = Field([], description="expressions (RE2) on the decoded text, of which the first 256 KB are read")
    secrets: Reload[list[Secrets]] = Field(
        [],
        description="in the decoded text, or a file that is text, is such a secret (of a cloud, or another service); "
        "docs/rules.md",
    )
    clients: Reload[Literal["all", "unauthenticated", "trusted"]] = Field(
        "all", description="whose mail; trusted: of clients that may relay"
    )
    application: Reload[list[str]] = Field([], description="only mail of these applications; empty: of all")
    networks: Reload[list[Network]] = Field([], description="only mail of clients in these networks; empty: of all")
    sender: Reload[list[str]] = Field([], description='of these senders; "" the null sender; empty: of all')
    sender_domain: Reload[list[str]] = Field([], description='of senders in these domains, ".example": below; empty: of all')
    recipient: Reload[list[str]] = Field([], description="to one of these addresses; empty: to all")
    recipient_domain: Reload[list[str]] = Field([], description='to these domains, ".example": below; empty: to all')
    recipients_min: Reload[int] = Field(0, ge=0, description="to so many recipients at least")
    min_size: Reload[Size] = Field(0, description="messages of at least this many octets")
    dmarc: Reload[list[Dmarc]] = Field([], description="with one of these results of DMARC; empty: with any")
    score_min: Reload[float | None] = Field(
        None, allow_inf_nan=False, description="with such a score of a filter at least; then it is evaluated behind the filters"
    )
    verdict: Reload[Words] = Field("reject", description="what is done: tag, hold, discard, tempfail or reject; accept: nothing")
    reply: Reload[str] = Field(
        "", description='the reply to what it refuses, such as "552 5.7.0 {match} is not taken here"; empty: names the rule'
    )
    enforce: Reload[bool] = Field(False, description="false: what it would do is counted and logged, and not done")

    @field_validator("attachment")
    @classmethod
    def _are_attachments(cls, texts: list[str]) -> list[str]:
        patterns = [attachment_pattern(text) for text in texts]
        for word in ("name", "archive"):
            _check_names([pattern for kind, pattern in patterns if kind == word])
        return texts

    @field_validator("header")
    @classmethod
    def _are_fields(cls, texts: list[str]) -> list[str]:
        for text in texts:
            _check(field_pattern(text)[1])
        return texts

    @field_validator("body")
    @classmethod
    def _are_expressions(cls, texts: list[str]) -> list[str]:
        for text in texts:
            _check(text)
        return texts

    @field_validator("reply")
    @classmethod
    def _is_reply(cls, text: str) -> str:
        if text and (not _REPLY.match(text) or text[0] != text[4] or not is_line(text) or len(text) > LONGEST_REPLY):
            raise ValueError(f'{text!r} is not a reply such as "552 5.7.0 {{match}} is not taken here"')
        for word in re.findall(r"\{([^{}]*)\}|[{}]", text):
            if word not in ("match", "rule"):
                raise ValueError(f"{text!r}: {{match}} and {{rule}} can be filled in{near(word, ('match', 'rule'))}")
        return text

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.conditions:
            yield "name", f"{self.name!r} has no condition: it would be about all mail"
        if self.reply and self.verdict not in ("reject", "tempfail"):
            yield "reply", f'has no meaning with verdict = "{self.verdict}"'
        elif self.reply:
            first = "5" if self.verdict == "reject" else "4"
            if self.reply[0] != first:
                yield "reply", f'{self.reply[:3]} is none for verdict = "{self.verdict}": that begins with {first}'

    @property
    def conditions(self) -> list[str]:
        """The keys by which it is about some mail only."""
        keys = (
            "attachment", "header", "body", "secrets", "application", "networks", "sender", "sender_domain", "recipient",
            "recipient_domain", "recipients_min", "min_size", "dmarc",
        )  # fmt: skip
        found = [key for key in keys if getattr(self, key)]
        return [*found, *["clients"] * (self.clients != "all"), *["score_min"] * (self.score_min is not None)]


def _check(expression: str) -> None:
    """ValueError: RE2 does not take an expression; where it does not."""
    if not expression:
        raise ValueError("an empty expression finds something in every text")
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters: {LONGEST} at most")
    import re2  # where there is an expression

    try:
        re2.compile(expression, options())
    except re2.error as error:
        text = error.args[0]
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        part = text.rpartition(": ")[2]
        at = expression.find(part) if part else -1
        where = f" at character {at + 1}" if at >= 0 else ""
        hint = " (RE2 has no back-references and no look-around)" if re.search(r"\\[1-9]|\(\?[=!<]", expression) else ""
        raise ValueError(f"{expression!r}: {text}{where}{hint}") from None


def names_expression(globs: Sequence[str]) -> str:
    """What finds a name that matches one of these patterns, which are some."""
    import re2

    each = [re2.escape(glob).replace("\\*", ".*").replace("\\?", ".") for glob in globs]
    return f"(?is)\\A(?:{'|'.join(each)})\\z"


def _check_names(globs: Sequence[str]) -> None:
    """ValueError: there are more names than RE2 takes."""
    if not globs:
        return
    import re2

    try:
        re2.compile(names_expression(globs), options())
    except re2.error:
        raise ValueError(f"{len(globs)} names are too many for one rule: divide them among several") from None


def options() -> Any:
    """How expressions are compiled: bounded, and silent."""
    import re2

    found = re2.Options()
    found.log_errors, found.max_mem = False, 8 << 20
    return found
