"""What an application is told: of a request, and later of its messages. The models of the answers, and which status a reply of
SMTP is."""

import re
from datetime import UTC, datetime

import msgspec

from relaymta.accept.http.submitting import Answer
from relaymta.problems import Problem
from relaymta.proto.bounce_class import classify, parsed
from relaymta.queue import Kept, Known, format_id

__all__ = [
    "Accepted", "Check", "MessageResult", "MessageState", "ReceiptState", "RecipientResult", "RecipientState", "RouteOf", "again",
    "not_taken", "problem_of", "recipient", "retry_after", "shown", "state_of",
]  # fmt: skip

ACCEPTED, REFUSED, TRY_AGAIN = "accepted", "refused", "try again"
RETRY_SECONDS = 30  # where the reply does not say how many
_IN = re.compile(r"\btry again in ([0-9]{1,9}) s")
# The status of an answer, by the enhanced code of the reply (RFC 3463), or how the text of ours begins.
_LATER = {"4.7.0": 429}
_TOO_MUCH = ("4.7.1 The quota of ", "4.7.1 Too much from ", "4.7.1 Your mail is held")
_NEVER = {"5.3.4": 413, "5.7.1": 403}


class RecipientResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A recipient of a request. `status`: "accepted", "refused", or "try again" (refused for now); `reply`: why, as SMTP says
    it."""

    address: str
    status: str
    reply: str = ""


class MessageResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message of a request. `id`: where it was accepted, also if not all recipients were; `status`: as of recipients; `reply`:
    why it was not."""

    status: str
    id: str = ""
    reply: str = ""
    recipients: list[RecipientResult]


class Accepted(msgspec.Struct, kw_only=True):
    """The messages of a request, in its order, which are safe on disk where they have an id. `id`: of the first one."""

    id: str
    messages: list[MessageResult]


class RecipientState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What has become of a message for a recipient. `state`: accepted, scheduled, filtering, held, attempting, deferred, in doubt
    (it was sent, but the reply did not come), delivered, bounced or deleted. `reply`: the last one, from `peer`; `class`: of a
    bounce, by its reply; `time`: of the last attempt (RFC 3339)."""

    address: str
    state: str
    reply: str = ""
    peer: str = ""
    bounce_class: str = msgspec.field(default="", name="class")
    attempts: int = 0
    time: str = ""


class MessageState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A message. `ended`: it has left the queue; `accepted`: when (RFC 3339)."""

    id: str
    ended: bool = False
    accepted: str
    sender: str
    message_id: str = ""
    application: str = ""
    tags: list[str] = []
    recipients: list[RecipientState]


class ReceiptState(msgspec.Struct, kw_only=True):
    """What was accepted under an idempotency key. `messages`: as far as they are known still."""

    key: str
    accepted: str
    messages: list[MessageState]


class RouteOf(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A recipient of a request that was only checked. `route`: by which it would go, to `domain`."""

    address: str
    status: str
    reply: str = ""
    route: str = ""
    domain: str = ""


class Check(msgspec.Struct, kw_only=True):
    """What would happen with a message. `valid`: it would be accepted for somebody, as far as that is known without asking
    filters; `size`: octets; `size_limit`: the most that is taken; `dkim`: domains in whose name it would be signed."""

    valid: bool
    sender: str
    sender_reply: str = ""
    size: int
    size_limit: int
    dkim: list[str]
    recipients: list[RouteOf]


def recipient(address: str, answer: Answer | None) -> RecipientResult:
    """A recipient that was refused with an answer, or (None) was not."""
    if answer is None:
        return RecipientResult(address=address, status=ACCEPTED)
    return RecipientResult(address=address, status=TRY_AGAIN if answer.code < 500 else REFUSED, reply=answer.whole)


def again(kept: Kept) -> MessageResult:
    """A message that was accepted before, as it was told then."""
    rows = [recipient(address, None) for address in kept.recipients]
    rows += [recipient(address, _read(reply)) for address, reply in kept.refused]
    return MessageResult(status=ACCEPTED, id=format_id(kept.ident), recipients=rows)


def _read(reply: str) -> Answer:
    code, _, text = reply.partition(" ")
    return Answer(int(code) if code.isdigit() else 550, text)


def not_taken(results: list[MessageResult]) -> Problem:
    """What is answered where none of a request's messages was accepted: if only one is to be tried again, that is said of all."""
    one = next((one for one in results if one.status == TRY_AGAIN), results[0])
    code, _, text = one.reply.partition(" ")
    return problem_of(Answer(int(code), text), one.recipients, results if len(results) > 1 else [])


def problem_of(answer: Answer, recipients: list[RecipientResult], messages: list[MessageResult] | None = None) -> Problem:
    """What is answered where nobody gets a message, `messages`: nor any of these."""
    later = answer.code < 500
    enhanced = answer.text.partition(" ")[0]
    status = (_LATER if later else _NEVER).get(enhanced, 503 if later else 422)
    if later and answer.text.startswith(_TOO_MUCH):
        status = 429
    headers = {"Retry-After": str(retry_after(answer.text))} if later else {}
    return Problem(status, answer.whole, headers, recipients=recipients, messages=messages or [])


def retry_after(text: str, otherwise: int = RETRY_SECONDS) -> int:
    """The seconds after which a reply says to try again, `otherwise` where it does not say."""
    match = _IN.search(text)
    return otherwise if match is None else max(int(match[1]), 1)


def state_of(ident: int, known: Known) -> MessageState:
    """A message as its application sees it."""
    receipt = known.receipt
    rows = [
        RecipientState(
            address=one.address, state="scheduled" if one.state == ACCEPTED and known.scheduled else one.state, reply=one.reply,
            peer=one.peer, bounce_class=classify(*parsed(one.reply)) if one.state == "bounced" else "", attempts=one.attempts,
            time=shown(one.at) if one.at else "",
        )
        for one in receipt.recipients
    ]  # fmt: skip
    return MessageState(
        id=format_id(ident), ended=known.ended, accepted=shown(receipt.arrived), sender=receipt.sender,
        message_id=receipt.message_id, application=receipt.application, tags=receipt.tags, recipients=rows,
    )  # fmt: skip


def shown(at: int) -> str:
    """A time (ms, UTC) as RFC 3339 writes it."""
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
