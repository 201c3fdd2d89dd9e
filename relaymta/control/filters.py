"""Which messages an operator means: the filter that the command line sends, and that the queue and policies go by."""

import dataclasses
from typing import Annotated, Any, Self

import msgspec

from relaymta.ident import stamp_of
from relaymta.proto.address import comparable, compared, domain_of
from relaymta.proto.envelope import HELD, UNSEEN, Envelope, QueueName

__all__ = ["Chosen", "Filter", "Number", "Text"]

Text = Annotated[str, msgspec.Meta(max_length=4000, pattern=r"\A[^\x00]*\Z")]
Number = Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass(frozen=True, slots=True)
class Filter:
    """Selects messages; all that is given must match. `queue`: as `str(QueueName)`; `site`: a name that `at_site` of a page
    accepts; `sender`: an address, or "<>" for the null sender; `recipient_domain`: without @; `until`: the highest id (0:
    any); `recipient`: an address; `older`, `newer`: it arrived before or after this (ms since 1970 UTC; 0: any); `held_by`: the
    filter or rule that has put it into the quarantine, or "DMARC"; `outside`: it is not in the quarantine."""

    ident: Number = 0
    queue: Text = ""
    route: Text = ""
    application: Text = ""
    site: Text = ""
    sender: Text = ""
    user: Text = ""
    recipient_domain: Text = ""
    held: bool = False
    unseen: bool = False
    until: Number = 0
    recipient: Text = ""
    older: Number = 0
    newer: Number = 0
    quarantined: bool = False
    held_by: Text = ""
    outside: bool = False

    @classmethod
    def of(cls, chosen: Any) -> Self:
        """The filter that a request has sent, as `Chosen`."""
        return cls(**msgspec.structs.asdict(chosen))

    @property
    def whole_queues(self) -> bool:
        """Whether it matches all mail of a queue or none, by the queue's name and site alone."""
        return not (
            self.ident or self.sender or self.user or self.recipient_domain or self.held or self.unseen or self.recipient
            or self.older or self.newer or self.quarantined or self.held_by or self.outside
        )  # fmt: skip

    @property
    def by_queue(self) -> bool:
        """Whether it depends on the queue in which a message waits (or also on that)."""
        return bool(self.queue or self.route or self.application or self.site)

    def waits_in(self, name: QueueName) -> bool:
        """Whether a queue's name matches (its site is not checked here)."""
        return self.queue in ("", str(name)) and self.route in ("", name.route) and self.application in ("", name.application)

    def matches(self, ident: int, envelope: Envelope) -> bool:
        """Whether a message matches, provided that its queue does."""
        if self.ident and ident != self.ident:
            return False
        if not self.is_from(envelope.sender):
            return False
        if self.user and envelope.user != self.user:
            return False
        if self.held and not envelope.flags & HELD:
            return False
        if self.unseen and not envelope.flags & UNSEEN:
            return False
        if (self.older and envelope.arrived >= self.older) or (self.newer and envelope.arrived < self.newer):
            return False
        if (self.quarantined or self.held_by) and not self._is_quarantined(envelope):
            return False
        if self.outside and envelope.quarantine is not None:
            return False
        return self.is_to(envelope.recipients)

    def _is_quarantined(self, envelope: Envelope) -> bool:
        why, name = envelope.quarantine, self.held_by
        if why is None or (self.until and why.since > stamp_of(self.until)):  # it was put there since the first page
            return False
        kind, _, names = why.by.partition(" ")
        return name in ("", why.by, *(names.split(", ") if kind in ("filter", "rule", "abuse") else ()))

    def is_from(self, sender: str) -> bool:
        """Whether an envelope's sender matches."""
        return not self.sender or (compared(sender) or "<>") == comparable(self.sender)

    def is_to(self, recipients: list[str]) -> bool:
        """Whether one of an envelope's recipients matches."""
        if self.recipient and comparable(self.recipient) not in map(compared, recipients):
            return False
        if not self.recipient_domain:
            return True
        wanted = compared(self.recipient_domain.rstrip("."))
        return any(domain_of(address) == wanted for address in recipients)


# The filter in a request: its fields, checked, and no others.
Chosen = msgspec.defstruct(
    "Chosen",
    [(field.name, field.type, field.default) for field in dataclasses.fields(Filter)],
    frozen=True,
    forbid_unknown_fields=True,
)
