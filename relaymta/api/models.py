"""The arguments and answers of the API. The description of the API (openapi.py) is made of these, and what comes in is checked by
them."""

from typing import Annotated, Any, Literal

import msgspec

from relaymta.control.requests import SUPPRESSIONS
from relaymta.queue.listing import Row

__all__ = [
    "AbuseClear",
    "Abuses",
    "Account",
    "Ages",
    "Bounce",
    "Change",
    "Changed",
    "Clear",
    "Cleared",
    "Decisions",
    "Explanation",
    "Find",
    "Found",
    "FoundMessage",
    "Header",
    "HeaderField",
    "History",
    "List",
    "Message",
    "Messages",
    "Nothing",
    "OfMessage",
    "OfSite",
    "Policies",
    "PolicyEnd",
    "PolicySet",
    "Quarantine",
    "QuarantineChange",
    "QuarantineRelease",
    "Queue",
    "QueueAges",
    "Queues",
    "Readiness",
    "Readings",
    "Reloaded",
    "Reroute",
    "Resume",
    "Rows",
    "Sites",
    "Status",
    "SuppressionAdd",
    "SuppressionAdded",
    "SuppressionCounts",
    "SuppressionRemove",
    "SuppressionRow",
    "Suppressions",
    "SuppressionsOf",
    "SuppressionsQuery",
    "Suspend",
    "Suspended",
]  # fmt: skip

Word = Annotated[
    str, msgspec.Meta(min_length=1, max_length=1000, pattern=r"\A[^\x00]*\Z")
]  # an empty one would select everything
Ident = Annotated[str, msgspec.Meta(min_length=1, max_length=20, description="the id of a message")]
Limit = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Seconds = Annotated[float, msgspec.Meta(ge=0.001, le=36500 * 86400.0)]
Time = Annotated[float, msgspec.Meta(ge=0, description="seconds since 1970 UTC")]
MOST_IDS = 1000


class _Arguments(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class Nothing(_Arguments):
    """No arguments."""


class _Which(_Arguments, rename={"from_": "from"}):
    """Which messages; all that is given must match. `from`: the sender, `<>`: the null sender; `to`: a recipient; `domain`: of a
    recipient; `app`: the application; `user`: the login; `older`, `newer`: accepted before, or at and after, this time."""

    queue: Word | None = None
    route: Word | None = None
    site: Word | None = None
    app: Word | None = None
    from_: Word | None = None
    user: Word | None = None
    to: Word | None = None
    domain: Word | None = None
    held: bool = False
    unseen: bool = False
    older: Time = 0
    newer: Time = 0


class List(_Which, rename={"from_": "from"}):
    """A page of messages. `cursor`: `next` of the page before; messages that have come since the first page are not shown."""

    limit: Limit = 100
    cursor: Annotated[str, msgspec.Meta(max_length=100)] = ""


class Quarantine(List, rename={"from_": "from"}):
    """As of List; `filter`: held by this filter or rule, or by "DMARC"."""

    filter: Word | None = None


class Change(_Which, rename={"from_": "from"}):
    """Which messages to change: `ids`, or a filter, or `all`; with both, those that have one of the ids and match. `dry_run`:
    only count them. `expect`: change nothing (409) unless that many match now."""

    ids: Annotated[list[Ident], msgspec.Meta(max_length=MOST_IDS)] = []
    all: bool = False
    dry_run: bool = False
    expect: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Bounce(Change, rename={"from_": "from"}):
    """As of Change; `reason`: in the DSN."""

    reason: Word = "returned by the operator"


class Reroute(Change, kw_only=True, rename={"from_": "from"}):
    """As of Change; `route_to`: the name of the route."""

    route_to: Word


class QuarantineChange(Change, rename={"from_": "from"}):
    """As of Change; `filter`: held by this filter or rule, or by "DMARC"."""

    filter: Word | None = None


class QuarantineRelease(QuarantineChange, rename={"from_": "from"}):
    """As of QuarantineChange; `recipients`: in place of their own; `unscanned`: also without the filters that have not looked at
    it yet."""

    recipients: Annotated[list[Word], msgspec.Meta(max_length=100)] = []
    unscanned: bool = False


class OfMessage(_Arguments):
    """A message."""

    id: Ident


class Find(_Arguments, rename={"from_": "from"}):
    """As of `relaymta message find`. `since`, `until`: as there, such as `2h`, or seconds since 1970 behind `@`; `id`: ours, or a
    Message-ID."""

    from_: Word | None = None
    to: Word | None = None
    domain: Word | None = None
    app: Word | None = None
    since: Word | None = None
    until: Word | None = None
    id: Word | None = None
    subject: Word | None = None
    status: list[Literal["queued", "deferred", "held", "delivered", "bounced", "gone"]] = []
    limit: Limit = 100


class OfSite(_Arguments):
    """A site, by its name, the name that its limits are counted by, or one of its hosts."""

    name: Word


class Suspend(_Arguments):
    """Send nothing to a site, or nothing of an application, for `seconds`. One of `site` and `app` at least."""

    site: Word | None = None
    app: Word | None = None
    seconds: Seconds = 3600.0
    reason: Word = "suspended by the operator"


class Resume(_Arguments):
    """End what keeps mail from a site, or an application's mail."""

    site: Word | None = None
    app: Word | None = None


class Clear(_Arguments):
    """Remove one decision about a site, by its `kind`, `site` and `about`."""

    kind: Literal["suspended", "dead", "slow", "learned"]
    site: Annotated[str, msgspec.Meta(max_length=1000)]
    about: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class PolicySet(_Arguments, rename={"from_": "from"}):
    """Hold or bounce mail that matches, queued and future, for `seconds`. One condition at least."""

    kind: Literal["hold", "bounce"]
    app: Word | None = None
    user: Word | None = None
    route: Word | None = None
    queue: Word | None = None
    from_: Word | None = None
    domain: Word | None = None
    seconds: Seconds = 3600.0
    reason: Word = "held by the operator"


class PolicyEnd(_Arguments):
    """A policy, by its kind and the mail that it is about, as they are listed."""

    kind: Literal["hold", "bounce"]
    about: Word


class Account(_Arguments):
    """An account, with its kind or without (`user=ann`, `ann`)."""

    account: Word


class AbuseClear(Account):
    """As of Account; `check`: only what this check has found."""

    check: Annotated[str, msgspec.Meta(max_length=1000)] = ""


# Answers. `missing`: the numbers of the workers that do not answer, whose part is not there.


class _Parts(msgspec.Struct, kw_only=True):
    missing: list[int] = []


class Queue(msgspec.Struct):
    """One queue. `next`: its next attempt; `parked`: its site is down or suspended."""

    queue: str
    messages: int
    bytes: int
    deferred: int
    held: int
    unseen: int
    next: float
    parked: bool = False


class Queues(_Parts):
    """All queues that have messages, the largest first."""

    queues: list[Queue]


class QueueAges(msgspec.Struct):
    """The messages of a queue by their age: as many as `minutes` has, and those that are older."""

    queue: str
    messages: int
    ages: list[int]


class Ages(_Parts):
    """Of all queues."""

    minutes: list[int]
    queues: list[QueueAges]


class Messages(_Parts):
    """A page of messages, in the order of their ids within each shard. `next`: the cursor of the next page; "": this is the
    last."""

    messages: list[Row]
    next: str = ""


class Message(_Parts):
    """A message in the queue, as `relaymta message show --json` has it, which has more than is named here. Each of `recipients`
    has its `address`, `state` and `attempts`."""

    id: str
    state: str
    sender: str
    size: int
    arrived: float
    next: float
    expires: float
    attempts: int
    queues: list[str]
    recipients: list[dict[str, Any]]


class Changed(_Parts):
    """How many messages `matched`, were `changed`, or were not since they are `in_flight`. Of flush: how many the limits of sites
    delay (`throttled`), and until when. `unknown`: ids that nothing matched."""

    matched: int
    changed: int
    in_flight: int = 0
    dry_run: bool = False
    throttled: int = 0
    until: float = 0
    unknown: list[str] = []


class History(_Parts):
    """What happened to a message: events of the log."""

    events: list[dict[str, Any]]


class Explanation(_Parts):
    """Why a message is in the queue, as `relaymta message explain --json` has it; or that it has left (`state` is "gone"), with
    its history."""

    id: str
    state: str
    waits: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []


class HeaderField(msgspec.Struct):
    """One field of a header, decoded."""

    name: str
    value: str


class Header(_Parts):
    """The header of a message, as far as its first 128 kB have it."""

    header: list[HeaderField]


class FoundRecipient(msgspec.Struct):
    """One recipient of a message that was found. `state`: pending, delivered, failed."""

    address: str
    state: str
    reply: str


class FoundMessage(msgspec.Struct):
    """As of `relaymta message find --json`."""

    id: str
    state: str
    arrived: float
    sender: str
    recipients: list[FoundRecipient]
    size: int
    client: str
    application: str
    message_id: str
    subject: str | None
    why: str


class Found(_Parts):
    """Messages in the queue and those that have left it, the newest first. `notes`: what the answer does not have."""

    messages: list[FoundMessage]
    notes: list[str] = []


class Rows(_Parts):
    """Rows, as the command line's `--json` has them."""

    rows: list[dict[str, Any]]


class Sites(_Parts):
    """Sites, as `relaymta site list --json` has them, and the decisions about them."""

    sites: list[dict[str, Any]]
    decisions: list[dict[str, Any]] = []


class Decisions(_Parts):
    """Decisions about sites: by operators, by rules about replies, and learned."""

    decisions: list[dict[str, Any]]


class Suspended(_Parts):
    """`site`: the name that it is counted by; `known`: it has mail or connections now, or is configured."""

    site: str
    known: bool


class Cleared(_Parts):
    """How many states, policies or findings were removed."""

    changed: int


class Policies(_Parts):
    """Hold and bounce policies in effect."""

    policies: list[dict[str, Any]]


class Abuses(_Parts):
    """What was found about accounts."""

    findings: list[dict[str, Any]]


Why = Literal["hard-bounce", "complaint", "unsubscribe", "manual"]
Addresses = Annotated[list[Word], msgspec.Meta(min_length=1, max_length=SUPPRESSIONS)]


class SuppressionsQuery(_Arguments):
    """A page of the suppression list. `app`: entries of this application; `all_mail`: those about all mail; `prefix`: of
    addresses that begin so; `cursor`: `next` of the page before. A page may be empty and not the last."""

    app: Word | None = None
    all_mail: bool = False
    reason: Why | None = None
    prefix: Word | None = None
    limit: Limit = 100
    cursor: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class SuppressionsOf(_Arguments):
    """A recipient."""

    address: Word


class SuppressionAdd(_Arguments):
    """Recipients to add, or whose entries to replace: for mail of this application (without `app`: for all mail), for so many
    `seconds` (without: as is configured for the reason, else for ever). `note`: in the reply to RCPT."""

    addresses: Addresses
    app: Word | None = None
    reason: Why = "manual"
    seconds: Annotated[float, msgspec.Meta(ge=1, le=36500 * 86400.0)] | None = None
    note: Annotated[str, msgspec.Meta(max_length=1000, pattern=r"\A[^\x00]*\Z")] = ""


class SuppressionRemove(_Arguments):
    """Recipients to remove: all of their entries, those of an application, or those about all mail."""

    addresses: Addresses
    app: Word | None = None
    all_mail: bool = False


class SuppressionAdded(_Parts):
    """How many entries were added, and how many replaced."""

    added: int
    replaced: int


class SuppressionRow(msgspec.Struct):
    """An entry. `application`: "": about all mail; `text`: the reply, or a note; `until`: 0: for ever."""

    application: str
    address: str
    reason: str
    text: str
    since: float
    until: float
    by: str


class Suppressions(_Parts):
    """Entries of the suppression list, expired ones until they are swept, too; `next`: the cursor of the next page, "": this
    is the last."""

    suppressions: list[SuppressionRow]
    next: str = ""


class SuppressionCounts(_Parts):
    """How many entries there are, and may be; of each application ("": about all mail) and reason; octets of the file."""

    entries: int
    most: int
    octets: int
    each: list[dict[str, Any]]


class Status(_Parts):
    """The daemon and its workers, as `relaymta status --json` has them."""

    version: str
    pid: int
    stopping: bool
    uptime: float
    totals: dict[str, int]
    listeners: list[str]
    workers: list[dict[str, Any]]


class Reason(msgspec.Struct):
    """Why no mail should be sent here now, `what` for programs."""

    what: str
    text: str


class Readiness(_Parts):
    """Whether the relay takes mail."""

    ready: bool
    reasons: list[Reason]


class Distribution(msgspec.Struct):
    """`bounds`: seconds; `counts`: up to each bound, and above the last, since the start."""

    bounds: list[float]
    counts: list[int]


class Readings(_Parts):
    """Counters since the start, gauges, and latencies, at `time`. A rate is the difference of two answers by their times."""

    time: float
    totals: dict[str, int]
    gauges: dict[str, int]
    histograms: dict[str, Distribution]


class Reloaded(_Parts):
    """What the reload has applied, as `relaymta reload` prints it."""

    text: str
