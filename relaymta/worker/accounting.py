"""What a worker counts and logs of what its queue has committed."""

import time
from collections.abc import Callable
from typing import Any

from relaymta.filter.conduct import Conduct
from relaymta.ident import stamp_of
from relaymta.log import Log
from relaymta.metrics import COUNTERS, Counters, index
from relaymta.proto.envelope import SUCCESS, TRANSIENT, Attempt, Envelope, QueueName
from relaymta.proto.said import Said
from relaymta.queue import Committed, Entry, Events, Outcome, Put, format_id, wall_ms

__all__ = ["Witness", "attempt_of"]

DELIVERED = index("relaymta_recipients_total", "delivered")
DEFERRED = index("relaymta_recipients_total", "deferred")
BOUNCED = index("relaymta_recipients_total", "bounced")
EXPIRED = index("relaymta_recipients_total", "expired")
DELIVERED_OCTETS = index("relaymta_delivered_octets_total")
COMMITS = index("relaymta_commits_total")
OPERATIONS = index("relaymta_commit_operations_total")
SYNCS = index("relaymta_syncs_total")
COMMIT_ERRORS = index("relaymta_commit_errors_total")
DSNS = index("relaymta_dsns_total")
DSNS_DROPPED = index("relaymta_dsns_dropped_total")
QUARANTINE = {how: index("relaymta_quarantine_total", how) for how in COUNTERS["relaymta_quarantine_total"][2]}


Link = tuple[str, int, str, str]  # as in send/session.py: address, port, TLS version, cipher
NOWHERE: Link = ("", 0, "", "")
# The peer that has taken an entry for all of its recipients, its reply, and the connection to it.
NO_ROUTE = ("", (0, b""), NOWHERE)
_STAYS = {"stays": True}  # what an event says where the message is in the queue after it


def _shown(code: int, text: bytes) -> str:
    """A reply in one line, as `Said.whole`; of the usual one at less cost."""
    if b"\n" in text:
        return Said(code, text, "final").whole
    return f"{code} {text.decode('utf-8', 'replace')}".strip() if code else ""


def attempt_of(entry: Entry) -> Attempt:
    """The attempt by which all recipients of an entry were delivered."""
    peer, (code, text), _ = entry.route if isinstance(entry.route, tuple) else NO_ROUTE
    said = Said(code, text, "final")
    return Attempt(wall_ms(), SUCCESS, said.phase, peer, said.code, said.enhanced, said.text)


def _wall(moment: float) -> float:
    """A monotonic moment as the log has times: seconds since 1970."""
    return time.time() - (time.monotonic() - moment)


def _traced(entry: Entry) -> dict[str, Any]:
    """What the log says of the trace of an attempt's message."""
    found: dict[str, Any] = {"traceparent": entry.envelope.traceparent} if entry.envelope.traceparent else {}
    if entry.began:
        found["began"] = _wall(entry.began)
    return found


def _more(put: Put) -> dict[str, Any]:
    """What XFORWARD has said, which filters have not looked at it yet, why it is held, what its application has said of it, and
    when its acceptance began, as the log has it."""
    envelope = put.envelope
    found: dict[str, Any] = {} if envelope.unseen is None else {"unseen": envelope.unseen.filters}
    if envelope.held_for:
        found["held"] = envelope.held_for
    if envelope.tags:
        found["tags"] = envelope.tags
    if envelope.traceparent:
        found["traceparent"] = envelope.traceparent
    if put.began:
        found["began"] = _wall(put.began)
    if envelope.forwarded:
        for field, name in (("client", "ADDR"), ("helo", "HELO"), ("id", "IDENT")):
            found[f"orig_{field}"] = envelope.forwarded.get(name, "")
    return found


def _link(entry: Entry, position: int) -> Link:
    """The connection over which the result of one recipient has come."""
    found: Link = entry.route.get(position, NOWHERE) if isinstance(entry.route, dict) else NOWHERE
    return found


class Witness(Events):
    """Counts and logs what the queue has committed."""

    def __init__(
        self,
        counters: Counters,
        log: Log,
        landed: Callable[[Entry], None],
        refused: Callable[[Entry], None],
        next_try: Callable[[Outcome], int],
        now: Callable[[], int],
    ) -> None:
        """`landed(entry)`: called when an entry's outcome is committed; `refused(entry)`: when it could not be.
        `next_try(outcome)`: when its deferred recipients are tried again (ms of the wall clock). `now()`: the shard's clock."""
        self._landed = landed
        self._refused = refused
        self._next_try = next_try
        self._add = counters.add
        self._now = now
        self._delay = counters.histogram("relaymta_delivery_delay_seconds")
        self._commit_seconds = counters.histogram("relaymta_commit_seconds")
        self._commit_messages = counters.histogram("relaymta_messages_per_commit")
        self.conduct: Conduct | None = None  # None: nobody looks for abuse
        # Told of each result: delivered, deferred or bounced, and the fields of hooks.Attempt. None: nobody is.
        self.tell: Callable[[str, dict[str, Any]], None] | None = None
        self._log = log

    def _age(self, ident: int) -> float:
        """Seconds since a message was accepted. Its id says when, by the shard's clock, which nobody sets."""
        return max(0, self._now() - stamp_of(ident)) / 1000

    def queued(self, put: Put) -> None:
        envelope = put.envelope
        more = envelope.forwarded or envelope.unseen or envelope.held_for or envelope.tags or envelope.traceparent or put.began
        self._log.event(
            "queued", id=format_id(put.ident), sender=envelope.sender, recipients=envelope.recipients, size=envelope.size,
            client=envelope.client, helo=envelope.helo, user=envelope.user, application=envelope.application,
            message_id=envelope.message_id, **(_more(put) if more else {}),
        )  # fmt: skip

    def ended(self, outcome: Outcome) -> None:
        entry = outcome.entry
        self._landed(entry)
        envelope = entry.envelope
        if outcome.success:
            peer, answer, link = entry.route if isinstance(entry.route, tuple) else NO_ROUTE
            everyone, indexes = envelope.recipients, entry.indexes
            recipients = everyone if indexes is None else [everyone[index] for index in indexes]
            delay = self._age(entry.ident)
            self._add(DELIVERED, len(recipients))
            self._add(DELIVERED_OCTETS, envelope.size)
            self._delay(delay)
            if self.conduct is not None:
                self.conduct.ended(envelope, len(recipients), 0)
            self._log.event(
                "delivered", id=format_id(entry.ident), recipients=recipients, route=entry.name.label,
                peer=peer, address=link[0], port=link[1], tls=link[2], cipher=link[3], reply=_shown(*answer),
                delay=delay, attempt=entry.attempts + 1, **(_STAYS if outcome.stays else {}),
                **(_traced(entry) if envelope.traceparent or entry.began else {}),
            )  # fmt: skip
            if self.tell is not None:
                self._told("delivered", entry, recipients, peer, _shown(*answer), delay)
            return
        last, expired = next(reversed(outcome.results), -1), {id(attempt) for _, attempt, late in outcome.failed if late}
        for position, attempt in outcome.results.items():
            stays = outcome.stays or position != last
            self._recipient_ended(outcome, position, attempt, _STAYS if stays else {}, id(attempt) in expired)
        if outcome.dsn is not None:
            self._add(DSNS, 1)
        elif outcome.failed:
            self._add(DSNS_DROPPED, 1)

    def _recipient_ended(self, outcome: Outcome, position: int, attempt: Any, stays: dict[str, bool], expired: bool) -> None:
        entry = outcome.entry
        common = {
            "id": format_id(entry.ident), "route": entry.name.label, "peer": attempt.peer, "attempt": entry.attempts + 1,
            "reply": attempt.cause, "delay": self._age(entry.ident),
        }  # fmt: skip
        if entry.envelope.traceparent or entry.began:
            common |= _traced(entry)
        address = entry.envelope.recipients[position]
        # What an operator or a policy bounces has not failed because of who has sent it.
        if self.conduct is not None and attempt.kind != TRANSIENT and attempt.because != "operator":
            self.conduct.ended(entry.envelope, attempt.kind == SUCCESS, attempt.kind != SUCCESS)
        if attempt.kind == SUCCESS:
            self._add(DELIVERED, 1)
            place = dict(zip(("address", "port", "tls", "cipher"), _link(entry, position), strict=True))
            self._log.event("delivered", recipients=[address], **place, **common, **stays)
            told, more = "delivered", {}
        elif attempt.kind == TRANSIENT:
            self._add(DEFERRED, 1)
            again = self._next_try(outcome) / 1000
            self._log.event(
                "deferred", recipient=address, phase=attempt.phase, cause=attempt.because, next=again, **common
            )  # fmt: skip
            told, more = "deferred", {"next": again, "phase": attempt.phase}
        else:
            self._add(EXPIRED if outcome.expired else BOUNCED, 1)
            dsn = format_id(outcome.dsn.ident) if outcome.dsn is not None else ""
            self._log.event(
                "bounced", sender=entry.envelope.sender, recipient=address, phase=attempt.phase, cause=attempt.because, dsn=dsn,
                **common, **stays, **({"expired": True} if expired else {}),
            )  # fmt: skip
            told, more = "bounced", {"phase": attempt.phase}
        if self.tell is not None:
            self._told(told, entry, [address], attempt.peer, attempt.cause, self._age(entry.ident), **more)

    def _told(self, result: str, entry: Entry, recipients: list[str], peer: str, said: str, delay: float, **more: Any) -> None:
        """Tell hooks of it."""
        assert self.tell is not None
        found = {
            "id": format_id(entry.ident), "sender": entry.envelope.sender, "recipients": recipients,
            "application": entry.envelope.application, "result": result, "route": entry.name.label, "peer": peer, "reply": said,
            "attempt": entry.attempts + 1, "delay": delay,
        }  # fmt: skip
        self.tell(result, found | more)

    def left_quarantine(self, ident: int, envelope: Envelope, how: str, to: list[str]) -> None:
        why = envelope.quarantine
        assert why is not None
        self._add(QUARANTINE[how], 1)
        self._log.event(
            "quarantine", id=format_id(ident), sender=envelope.sender, recipients=envelope.recipients, result=how, by=why.by,
            reason=why.reason, **({"to": to} if to else {}),
        )  # fmt: skip

    def changed(self, how: str, ident: int, envelope: Envelope, by: str) -> None:
        about = {"id": format_id(ident), "sender": envelope.sender, "recipients": envelope.recipients, "by": by}
        if how == "held":
            self._log.event("held", **about, reason=envelope.held_for)
        elif how == "released":
            self._log.event("released", **about)
        elif how == "rerouted":
            self._log.event("rerouted", **about, route=envelope.route)
        else:
            self._log.event("deleted", **about)

    def moved(self, name: QueueName, new: QueueName, messages: int, by: str) -> None:
        self._log.event("moved", queue=str(name), route=new.route, messages=messages, by=by)

    def refused(self, entry: Entry, why: str) -> None:
        self._log.event("warning", text=f"message {format_id(entry.ident)}: an outcome was refused: {why}")
        self._refused(entry)

    def failed(self, what: str) -> None:
        self._log.event("warning", text=f"a change of the queue was undone: internal error: {what}")

    def committed(self, group: Committed) -> None:
        self._add(COMMITS, 1)
        self._add(OPERATIONS, len(group.puts) + len(group.outcomes) + len(group.tasks))
        self._add(SYNCS, group.syncs)
        self._commit_seconds(group.seconds)
        if group.puts:
            self._commit_messages(len(group.puts))
        failed = sum(put.error is not None for put in group.puts) + sum(task.error is not None for task in group.tasks)
        if failed:
            self._add(COMMIT_ERRORS, failed)
