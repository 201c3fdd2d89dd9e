"""Filters: what judges mail on its way in."""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from relaymta.config.values import (
    Address,
    Duration,
    Network,
    Reload,
    Size,
    SocketAddress,
    Table,
    hook_url,
    in_dns,
    near,
    socket_address,
)
from relaymta.proto.dnsbl import Codes

__all__ = [
    "BUILT_IN",
    "LONGEST_REPLY",
    "SCORED",
    "WITHOUT_TEXT",
    "DnsList",
    "Filter",
    "FiltersTable",
    "Score",
    "Words",
    "is_line",
    "listed",
]

VERDICTS = ("accept", "tag", "hold", "discard", "tempfail", "reject")
# The words of each type, and what they mean unless a table says otherwise.
DEFAULTS: dict[str, dict[str, str]] = {
    "clamd": {"OK": "accept", "FOUND": "reject"},
    "rspamd": {
        "no action": "accept", "greylist": "accept", "add header": "tag", "rewrite subject": "tag", "soft reject": "tempfail",
        "reject": "reject", "quarantine": "hold", "discard": "discard",
    },
    "spamd": {"False": "accept", "True": "tag"},
    "milter": {
        "accept": "accept", "discard": "discard", "quarantine": "hold", "tempfail": "tempfail", "reject": "reject",
    },
    "policy": {"DUNNO": "accept", "DEFER": "tempfail", "REJECT": "reject", "HOLD": "hold", "DISCARD": "discard"},
    "http": {word: word for word in VERDICTS},
    "dnsbl": {"clean": "accept", "listed": "reject"},
    "greylist": {"known": "accept", "new": "tempfail", "early": "tempfail"},
    "python": {word: word for word in VERDICTS} | {"raised": "tempfail"},
}  # fmt: skip
SCORED = ("rspamd", "spamd", "http", "dnsbl")  # types that say how likely it is
BUILT_IN = ("dnsbl", "greylist")  # types that are no programs: they have no address, and look at unauthenticated clients alone
WITHOUT_TEXT = (*BUILT_IN, "policy")  # types that are shown no text, whatever its size
ELSEWHERE = (*BUILT_IN, "python")  # types that have no address
OF_MESSAGES = ("message", "queued")  # stages; the first is the default
STAGES = {
    "milter": ("mail", *OF_MESSAGES),
    "policy": ("rcpt", "data", *OF_MESSAGES),
    "python": ("mail", "queued"),
}  # of the others OF_MESSAGES
CHANGING = ("milter", "policy", "http", "python")  # types that may change more than the header
NOT_YET = ("smtp",)
OF_TYPE = dict.fromkeys(("delay", "retry_window", "known_for", "known_after"), "greylist") | {"lists": "dnsbl"}
OF_TYPE |= dict.fromkeys(("body", "secret_file"), "http") | dict.fromkeys(("file", "isolation", "memory"), "python")
MEMORY_LEAST = 128 << 20  # octets of address space
HOOK_SECONDS = 1.0  # of type python, where `timeout` is not given

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}\Z")
_FIELD = re.compile(r"([!-9;-~]+): ?(.*)\Z")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}|[{}]")
_REPLY = re.compile(r"5\d\d 5\.\d{1,3}\.\d{1,3} \S")
# Characters as configured. With what is put into it, at most once each (a name, a reason of 200 octets, a score), a field stays
# below 998 octets (RFC 5322 2.1.1), and a reply within 512 (RFC 5321 4.5.3.1.5).
LONGEST, LONGEST_REPLY = 400, 270

Words = Literal["accept", "tag", "hold", "discard", "tempfail", "reject"]
OnFailure = Literal["accept", "tempfail", "later", "hold", "disconnect"]


class Score(Table):
    """A verdict from a score on, such as rspamd's; of several tables that of the highest score that is reached. Where there is
    one, it decides in place of the filter's word, but for one that means tempfail. `[[filter.score]]`"""

    at: Reload[float] = Field(allow_inf_nan=False, description="the score")
    verdict: Reload[Words] = Field(description="accept, tag, hold, discard, tempfail or reject")


class DnsList(Table):
    """A list of addresses, or of domains, in the DNS (RFC 5782), that type "dnsbl" asks. `[[filter.lists]]`"""

    zone: Reload[str] = Field(description='the name under which it answers, such as "zen.spamhaus.org"')
    codes: Reload[list[str]] = Field(
        description='the answers that count: "127.0.0.2", "127.0.0.2-11" or "127.0.0.0/24"; others do not'
    )
    score: Reload[float] = Field(
        1.0, allow_inf_nan=False, description="what it adds where it lists; below 0: it is a list of good ones"
    )
    domain: Reload[bool] = Field(
        False, description="it lists domains: it is asked about those of HELO, of the sender, and of authors (From:)"
    )

    @field_validator("zone")
    @classmethod
    def _is_zone(cls, name: str) -> str:
        return in_dns(name.removesuffix("."))

    @field_validator("codes")
    @classmethod
    def _are_codes(cls, texts: list[str]) -> list[str]:
        if not texts:
            raise ValueError('is empty: give the answers that count, such as "127.0.0.2-11"')
        Codes(texts)
        return texts


def _place(value: object, info: ValidationInfo) -> object:
    """Where a filter is: a URL, or an address."""
    if isinstance(value, str) and info.data.get("type") == "http":
        return hook_url(value)
    return socket_address(value)


class Filter(Table):
    """What judges mail: a program, lists in the DNS, greylisting. `[[filter]]`, repeatable; those that apply to a client are
    asked side by side, but a milter alone, and in this order; the strictest verdict counts: reject, tempfail, hold, discard, tag,
    accept. docs/filters.md."""

    name: Reload[str] = Field(description="its name in log, metrics, replies and on the command line")
    type: Reload[str] = Field(
        description='what it speaks: "clamd" (ClamAV), "rspamd" (its normal worker), "spamd", "milter", "policy" (as of '
        'Postfix), "http" (a hook of your own); or what the relay itself does: "dnsbl" (lists in the DNS), "greylist", "python" '
        "(hooks: functions of your own, docs/hooks.md)",
    )  # fmt: skip
    address: Reload[list[Annotated[str, BeforeValidator(_place)]]] = Field(
        [], description='"unix:/run/clamav/clamd.ctl" or "127.0.0.1:3310", of http "http://127.0.0.1:8080/hook" or an https:// '
        "URL; of several the first that answers",
    )  # fmt: skip
    stage: Reload[Literal["", "mail", "rcpt", "data", "message", "queued"]] = Field(
        "", description='when it is asked. milter: "mail" (at MAIL, at each RCPT, and about the message: the default) or '
        '"message"; policy: "rcpt" (the default), "data" or "message"; python: "mail" (at each stage that has a function: the '
        'default); programs that look at messages: "message" (the default), or "queued": after 250, and before it is delivered',
    )  # fmt: skip
    may: Reload[list[Literal["header", "body", "recipients", "sender"]]] = Field(
        ["header", "body"], description="milter, policy, http, python: what it may change; other changes are left out"
    )
    clients: Reload[Literal["all", "unauthenticated", "trusted"]] = Field(
        "all", description="whose mail; trusted: of clients that may relay, since they have logged in or by their network"
    )
    listener: Reload[list[Address]] = Field([], description="only mail accepted on these listeners; empty: on all")
    application: Reload[list[str]] = Field([], description="only mail of these applications; empty: of all")
    networks: Reload[list[Network]] = Field([], description="only mail of clients in these networks; empty: of all")
    recipient_domain: Reload[list[str]] = Field(
        [], description='only messages with a recipient in these domains (".example": below it); empty: all'
    )
    timeout: Reload[Duration] = Field(
        10, gt=0, le=300, description="for its answer: waiting for a place, connecting and talking, all in all; of dnsbl: for "
        "its lists, from the connection on (default 5 s); of python: for one call (default 1 s)",
    )  # fmt: skip
    concurrency: Reload[int] = Field(16, ge=1, le=1000, description="messages that it is asked about at once, by all workers")
    max_size: Reload[Size] = Field(50_000_000, gt=0, description="octets of a message above which `oversize` is done")
    oversize: Reload[Literal["skip", "head", "hold", "reject"]] = Field(
        "skip", description="with larger messages. skip: it is not asked; head: it is shown the first max_size octets"
    )
    on_failure: Reload[OnFailure | Literal[""]] = Field(
        "", description="when it does not answer, or with nonsense. accept: the message passes unseen; tempfail: 451; later: "
        '250, and not delivered before the filter has looked; disconnect: 421. Empty: "tempfail", at stage "queued" "later"',
    )  # fmt: skip
    on_failure_trusted: Reload[OnFailure | Literal[""]] = Field(
        "", description='the same for mail of clients that may relay; empty: as on_failure, and where that is empty, too, '
        '"later" (of a policy service at RCPT or DATA: "tempfail")',
    )  # fmt: skip
    refused: Reload[Literal["hold", "discard", "bounce"]] = Field(
        "hold", description="what is done with what it refuses after 250 (stage queued, on_failure later). bounce: only where "
        "the sender is not forged: of clients that may relay, or where SPF or DKIM pass; else hold",
    )  # fmt: skip
    enforce: Reload[bool] = Field(True, description="false: it is asked, logged and counted, and nothing follows from it")
    verdicts: Reload[dict[str, Words]] = Field(
        {}, description='what its words mean, such as { FOUND = "hold" }: accept, tag, hold, discard, tempfail or reject'
    )

    must_work: Reload[list[str]] = Field(
        [], description="rspamd: symbols by which a part of it says that it did not work, such as CLAM_VIRUS_FAIL; a message "
        "with one has not been judged (on_failure)",
    )  # fmt: skip
    controller: Reload[SocketAddress | Literal[""]] = Field(
        "", description="rspamd: address of its controller, for `relaymta filter learn`"
    )
    body: Reload[bool] = Field(False, description="http: it is shown the message data, and not the header alone")
    secret_file: Reload[str] = Field(
        "", description="http: file with the secret by which requests are signed; empty: they are not"
    )
    file: Reload[str] = Field("", description='python: the file of the functions, such as "/etc/relaymta/policy.py"')
    isolation: Reload[Literal["process", "loop"]] = Field(
        "process", description='python: where they run. process: in one beside each worker; loop: on the event loop of the '
        "worker, which a function that blocks stops",
    )  # fmt: skip
    memory: Reload[Size] = Field(
        512 << 20, ge=0, description="python: octets of address space of a process (RLIMIT_AS); 0: any number"
    )
    score: Reload[list[Score]] = Field([], description="verdicts by score")
    lists: Reload[list[DnsList]] = Field([], description="dnsbl: what is asked")
    delay: Reload[Duration] = Field(300, ge=1, le=86400, description="greylist: how long a sender that is new has to wait")
    retry_window: Reload[Duration] = Field(86400, ge=60, description="greylist: within what time it has to try again")
    known_for: Reload[Duration] = Field(36 * 86400, ge=3600, description="greylist: how long who has come through is known")
    known_after: Reload[int] = Field(
        5, ge=0, description="greylist: after how many senders that came through their network or domain is known; 0: never"
    )

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not _NAME.match(name):
            raise ValueError(f"{name!r}: letters, digits, '.', '-' and '_', 32 at most")
        return name

    @field_validator("type")
    @classmethod
    def _is_type(cls, word: str) -> str:
        if word in NOT_YET:
            raise ValueError(f'"{word}" is not there yet: there are {listed(DEFAULTS)}')
        if word not in DEFAULTS:
            raise ValueError(f"there is no type {word!r}{near(word, [*DEFAULTS, *NOT_YET])}; there are {listed(DEFAULTS)}")
        return word

    @field_validator("recipient_domain")
    @classmethod
    def _are_domains(cls, names: list[str]) -> list[str]:
        return ["." * name.startswith(".") + in_dns(name.removeprefix(".")) for name in names]

    @field_validator("stage", mode="before")
    @classmethod
    def _is_stage(cls, word: object) -> object:
        if word == "connect":
            raise ValueError(f'"{word}" is not there yet: there are "mail", "rcpt", "data", "message" and "queued"')
        return word

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.type in BUILT_IN:
            yield from self._not_of_ours()
        elif self.type == "python":
            yield from self._not_of_hooks()
        elif not self.address:
            where = '"http://HOST:PORT/PATH" or "https://HOST/PATH"' if self.type == "http" else '"unix:/PATH" or "HOST:PORT"'
            yield "address", f"is empty: give {where}"
        known = DEFAULTS.get(self.type, {})
        for word in self.verdicts.keys() - known.keys():
            meant = near(word, known) or near(word.upper(), known)
            yield f"verdicts.{word}", f"{self.type} does not say {word!r}{meant}; it says {listed(known)}"

        if self.score and self.type not in (*SCORED, "python"):
            yield "score", f"{self.type} has no score"
        if self.must_work and self.type != "rspamd":
            yield "must_work", f"{self.type} has no symbols"
        if self.controller and self.type != "rspamd":
            yield "controller", f"{self.type} has none"

        if self.type == "dnsbl" and not self.lists:
            yield "lists", 'is empty: give { zone = "zen.spamhaus.org", codes = ["127.0.0.2-11"] }'
        if self.retry_window <= self.delay:
            key = "retry_window" if "retry_window" in self.model_fields_set else "delay"
            yield key, "who waits for `delay` comes too late, if `retry_window` is not longer: nobody would get through"
        for key in ("max_size", "oversize") if self.type in WITHOUT_TEXT else ():
            if self._is_given(key):
                yield key, f"has no meaning for {self.type}, which is not shown the text: leave it out"
        for key in ("max_size", "oversize") if self.type == "http" and not self.body else ():
            if self._is_given(key):
                yield key, "has no meaning without body = true: the hook is shown the header alone"
        for key, belongs in OF_TYPE.items():
            if self._is_given(key) and self.type != belongs:
                yield key, f"is for {belongs}, not for {self.type}"

        stages = () if self.type in BUILT_IN else STAGES.get(self.type, OF_MESSAGES)
        if self.stage and self.stage not in stages:
            there = f"is asked at stage {listed(stages)}" if stages else "has no choice of that: leave it out"
            yield "stage", f"{self.type} {there}"
        if self.type not in CHANGING and self.may != ["header", "body"]:
            yield "may", f"{self.type} changes nothing but the header: it is for a milter, a policy service or hooks"
        yield from self._failing_wrongly()
        if self.type == "milter" and self.stage in ("", "mail") and self.recipient_domain:
            yield "recipient_domain", 'at MAIL no recipient is known: give stage = "message", too'

    def _failing_wrongly(self) -> Iterator[tuple[str, str]]:
        """`on_failure` where it cannot be done."""
        for key in ("on_failure", "on_failure_trusted"):
            word = getattr(self, key)
            if self.is_queued and word in ("tempfail", "disconnect"):
                yield key, f'"{word}": the client has its 250 by then: "later" (the default), "accept" or "hold"'
            elif word == "later" and not self.sees_messages:
                yield (
                    key,
                    f'"later": {self.type} at stage "{self.stage or "rcpt"}" does not look at messages: "tempfail" or "accept"',
                )

    def _not_of_ours(self) -> Iterator[tuple[str, str]]:
        """What has no meaning where there is no program."""
        if self.address:
            yield "address", f"{self.type} has none: it is no program"
        if self.clients == "trusted":
            yield "clients", f"{self.type} looks at unauthenticated clients alone"
        for key in ("application", "concurrency", "on_failure", "on_failure_trusted", "refused"):
            if self._is_given(key):
                yield key, f"has no meaning for {self.type}: leave it out"

    def _not_of_hooks(self) -> Iterator[tuple[str, str]]:
        """What has no meaning for functions."""
        if not self.file:
            yield "file", 'is empty: give that of the functions, such as "/etc/relaymta/policy.py"'
        elif not self.file.startswith("/"):
            yield "file", f"{self.file}: give the whole path, which begins with /"
        if self.address:
            yield "address", "python has none: give `file`"
        if self._is_given("concurrency"):
            yield "concurrency", "has no meaning for python: leave it out"
        if self.isolation == "loop" and self._is_given("memory"):
            yield "memory", 'has no meaning with isolation = "loop": it is the worker\'s'
        if 0 < self.memory < MEMORY_LEAST:
            yield "memory", f"{self.memory}: no process can begin with less than {MEMORY_LEAST >> 20} MB"

    def _is_given(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].get_default())

    @property
    def seconds(self) -> float:
        """How long it may take: `timeout`, or what that is for its type."""
        return HOOK_SECONDS if self.type == "python" and "timeout" not in self.model_fields_set else self.timeout

    @property
    def is_queued(self) -> bool:
        """Whether it looks at messages that are in the queue."""
        return self.stage == "queued"

    @property
    def sees_messages(self) -> bool:
        """Whether it can look at a message after it was accepted."""
        return self.type not in BUILT_IN and (self.type != "policy" or self.stage in ("message", "queued"))

    @property
    def sees_text(self) -> bool:
        """Whether it is shown more of a message than its header."""
        return self.type not in WITHOUT_TEXT and (self.type != "http" or self.body)

    def failing(self, trusted: bool) -> str:
        """What is done when it fails over a message of a client that may relay (`trusted`), or may not: one of OnFailure."""
        given = (trusted and self.on_failure_trusted) or self.on_failure
        return given or ("later" if self.is_queued or (trusted and self.sees_messages) else "tempfail")

    @property
    def meaning(self) -> dict[str, str]:
        """The verdict for each of its words."""
        return DEFAULTS[self.type] | self.verdicts


class FiltersTable(Table):
    """All filters together. `[filters]`"""

    budget: Reload[Duration] = Field(30, gt=0, le=300, description="for all filters of a message; what is late then has failed")
    scans: Reload[int] = Field(
        8, ge=1, le=1000, description="messages in the queue that filters look at at once (stage queued, on_failure later), by "
        "each worker",
    )  # fmt: skip
    tag: Reload[list[str]] = Field(
        ["X-Spam: Yes"], description="header fields that the verdict `tag` adds; {filter}, {reason} and {score} are filled in. "
        "Copies in mail of unauthenticated clients are removed where a filter looks",
    )  # fmt: skip
    subject: Reload[str] = Field("", description='the Subject: of what is tagged, such as "[SPAM] {subject}"; empty: as it was')
    reply: Reload[str] = Field(
        "554 5.7.1 Refused by {filter}: {reason}", description="the reply to what is refused; {filter} and {reason} are filled in"
    )

    @field_validator("tag")
    @classmethod
    def _are_fields(cls, fields: list[str]) -> list[str]:
        for text in fields:
            match = _FIELD.match(text)
            if match is None or not is_line(text):
                raise ValueError(f'{text!r} is not a header field such as "X-Spam: Yes"')
            if "{" in match[1] or "}" in match[1]:
                raise ValueError(f"{text!r}: nothing is filled in in the name of a field")
            if match[1].lower() in _OURS:
                raise ValueError(f"{text!r}: {match[1]}: is a field that other programs write")
            _check_placeholders(text, ("filter", "reason", "score"))
        return fields

    @field_validator("subject")
    @classmethod
    def _has_subject(cls, text: str) -> str:
        if text and (text.count("{subject}") != 1 or not is_line(text, ascii_only=False)):
            raise ValueError(f'{text!r} has to have "{{subject}}" in it once, where the words of the message go')
        if "=?" in text:
            raise ValueError(f"{text!r}: write it as it is shown: it is encoded where it has to be")
        _check_placeholders(text, ("subject",))
        return text

    @field_validator("reply")
    @classmethod
    def _is_reply(cls, text: str) -> str:
        if not _REPLY.match(text) or not is_line(text) or len(text) > LONGEST_REPLY:
            raise ValueError(f'{text!r} is not a reply such as "554 5.7.1 Refused by {{filter}}: {{reason}}"')
        _check_placeholders(text, ("filter", "reason"))
        return text

    @property
    def tag_names(self) -> frozenset[bytes]:
        """The names of the fields that the verdict `tag` adds, in lower case."""
        return frozenset(text.partition(":")[0].lower().encode() for text in self.tag)


# Fields that tags must not be: those of every message, and of its way.
_OURS = {
    "arc-authentication-results", "arc-message-signature", "arc-seal", "authentication-results", "bcc", "cc",
    "content-transfer-encoding", "content-type", "date", "dkim-signature", "from", "in-reply-to", "message-id",
    "mime-version", "received", "references", "reply-to", "return-path", "sender", "subject", "to",
}  # fmt: skip


def listed(words: Iterable[str]) -> str:
    """Words for a message, each in quotation marks."""
    return ", ".join(f'"{word}"' for word in words)


def is_line(text: str, ascii_only: bool = True) -> bool:
    return text.isprintable() and len(text) <= LONGEST and (text.isascii() or not ascii_only)


def _check_placeholders(text: str, known: tuple[str, ...]) -> None:
    for word in known:
        if text.count(f"{{{word}}}") > 1:
            raise ValueError(f"{text!r}: {{{word}}} is there twice")
    for match in _PLACEHOLDER.finditer(text):
        word = match[1]
        if word not in known:
            names = ", ".join(f"{{{one}}}" for one in known)
            raise ValueError(f"{match[0]} in {text!r}: {names} can be filled in{near(word or '', known)}")
