"""Cases of hooks in Python, that `relaymta policy test` reads: what a hook is called with, and what it has to answer."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from relaymta.config.filters import Words
from relaymta.config.values import Table, near

__all__ = ["Case", "CasesFile"]

HOOKS = (
    "on_connect", "on_helo", "on_auth", "on_mail", "on_rcpt", "on_data", "on_message", "choose_route", "on_attempt",
    "on_deferred", "on_bounced", "on_delivered",
)  # fmt: skip
OF_MESSAGES = ("on_message", "choose_route")


class CaseClient(Table):
    """Who has connected: fields of hooks.Client."""

    address: str = Field("192.0.2.1", description="its address")
    helo: str = Field("client.example", description="what it calls itself")
    user: str = Field("", description="who has logged in")
    mechanism: str = Field("", description="how")
    application: str = Field("", description="whose mail it is")
    tls: str = Field("", description="version and cipher")
    listener: str = Field("", description="where it has connected")
    protocol: Literal["SMTP", "ESMTP", "LMTP"] = Field("ESMTP", description="what it speaks")


class CaseEnvelope(Table):
    """For whom a message is: fields of hooks.Envelope."""

    sender: str = Field("", description="its sender")
    recipients: list[str] = Field([], description="those that are accepted so far")
    parameters: list[str] = Field([], description="of MAIL")
    size: int = Field(0, ge=0, description="octets that the client has announced")


class CaseAttempt(Table):
    """What has come of an attempt to deliver: fields of hooks.Attempt."""

    id: str = Field("", description="of the message")
    sender: str = Field("", description="its sender")
    recipients: list[str] = Field([], description="those that the attempt was about")
    application: str = Field("", description="whose mail it is")
    result: Literal["delivered", "deferred", "bounced"] = Field("delivered", description="what has come of it")
    route: str = Field("", description="by which")
    peer: str = Field("", description="the host that has answered")
    reply: str = Field("", description="what it said")
    phase: str = Field("", description="of what was not delivered")
    attempt: int = Field(1, ge=1, description="its number")
    delay: float = Field(0.0, ge=0, description="seconds since the message was accepted")
    next: float = Field(0.0, ge=0, description="when it is tried again (seconds since 1970)")


class Case(Table):
    """A case. `[[case]]`"""

    name: str = Field(description="what it is about")
    event: str = Field(description="the hook that is called, such as on_rcpt")
    client: CaseClient = Field(CaseClient(), description="who has connected")
    envelope: CaseEnvelope = Field(CaseEnvelope(), description="for whom the message is")
    recipient: str = Field("", description="on_rcpt: the recipient that is asked about")
    dmarc: str = Field("", description="on_message, choose_route: what verification has found")
    message: str = Field("", description="on_message, choose_route: a file with the message, relative to that of the case")
    header: list[str] = Field([], description='on_message, choose_route: its fields, such as "Subject: hello"')
    body: str = Field("", description="on_message, choose_route: what is behind the header")
    attempt: CaseAttempt = Field(CaseAttempt(), description="on_attempt, on_deferred ...: what it is told")
    expect: Words | Literal["none", "route", "raised", "failed"] = Field(
        "none", description="the verdict; none: it has no opinion; route: it names one; raised: an exception; failed: no answer"
    )
    reason: str | None = Field(None, description="the reason that it gives")
    reply: str | None = Field(None, description="the reply that it gives")
    route: str | None = Field(None, description="the name of the route")
    changes: list[dict[str, Any]] | None = Field(None, description='what it changes: { do = "add", name = "X-A", value = "1" }')

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.event not in HOOKS:
            yield "event", f"there is no hook {self.event!r}{near(self.event, HOOKS)}; there are {', '.join(HOOKS)}"
        if self.event == "on_rcpt" and not self.recipient:
            yield "recipient", "is empty: on_rcpt is asked about one"
        if self.message and (self.header or self.body):
            yield "message", "there are header and body, too: give one of both"
        for key in ("message", "header", "body", "dmarc"):
            if getattr(self, key) and self.event not in OF_MESSAGES:
                yield key, f"{self.event} is shown no message"
        if self.route is not None and self.expect != "route":
            yield "route", 'give expect = "route", too'


class CasesFile(Table):
    """A file of cases."""

    case: list[Case] = Field([], description="cases")
