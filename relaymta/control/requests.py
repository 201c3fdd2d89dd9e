"""The requests of the command line, one row each: what it is called, its arguments, who answers it, how the answers of several
workers become one, and how long it may take. The command line, the supervisor, the workers and the offline reader go by this
table. A new request is a row here and a method of its name where it is answered: `Answers` of the supervisor or of the worker,
and `Spool` in queue/offline.py where it can be answered from the files.

What a handler gets are its row's arguments, checked: no other names, and each of its type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec

from relaymta.control.filters import Chosen, Number, Text
from relaymta.errors import RelayError

__all__ = ["AGES", "REQUESTS", "SUPPRESSIONS", "Request", "Where"]

HOURS = 24 * 3600.0  # seconds for what copies mail
SUPPRESSIONS = 1000  # entries of the suppression list in a request or an answer: one transaction
LAST = 20  # messages that a rule has matched, of all workers
AGES = (5, 10, 20, 40, 80, 160, 320, 640, 1280)  # minutes: the columns of `shape`; one more column for what is older


class Where(Enum):
    """Who answers a request."""

    SUPERVISOR = "the supervisor"
    OWNER = "the worker that has the shard `shard`"
    FIRST = "the first worker that has the message `ident`"
    ANY = "a worker: they share what it is about"
    ALL = "all workers; their answers are merged"
    EACH = "all workers; the pieces of their answers follow each other"
    LIVE = "all workers; what each says is passed on at once, for as long as somebody reads it"


# Arguments

Seconds = Annotated[float, msgspec.Meta(gt=0, le=36500 * 86400.0)]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Nothing(_Arguments, frozen=True):
    """No arguments."""


class Page(_Arguments, frozen=True):
    """The messages of a shard behind the id `after`."""

    shard: Number
    after: Number
    chosen: Chosen  # type: ignore[valid-type]


class Change(_Arguments, frozen=True):
    """`word`: the reason (bounce), the route (reroute) or the name of the hold policy (policy; "": not known). Of messages that
    are released from the quarantine: `recipients`, in place of their own, and whether also those are that other filters have not
    looked at (`unscanned`). `uid`: who asks, as the kernel says (-1: not known); the supervisor sets it."""

    shard: Number
    verb: Literal[
        "flush", "hold", "release", "delete", "bounce", "reroute", "policy", "release quarantined", "delete quarantined"
    ]
    idents: list[Number]
    word: Text = ""
    recipients: list[Text] = []
    unscanned: bool = False
    uid: int = -1


class Move(_Arguments, frozen=True):
    """To the route `word`; `uid`: as of Change."""

    chosen: Chosen  # type: ignore[valid-type]
    word: Text
    dry_run: bool
    uid: int = -1


class Queues(_Arguments, frozen=True):
    """Number of messages by queue."""

    queues: dict[str, Number]


class OfMessage(_Arguments, frozen=True):
    """A message's id as it is printed."""

    ident: str


class HistoryPiece(_Arguments, frozen=True):
    """The lines of the file `name` that end at the octet `end`."""

    name: Text
    end: Number


class Messages(_Arguments, frozen=True):
    """Messages of a shard."""

    shard: Number
    idents: list[Number]


class Exported(_Arguments, frozen=True):
    """Messages of a shard that were exported, each with its `exported.print_of`; `uid`: as of Change."""

    shard: Number
    messages: list[tuple[Number, Text]]
    uid: int = -1


class ImportData(_Arguments, frozen=True):
    """A piece of a large message that is imported, behind `at` octets."""

    shard: Number
    ident: Number
    at: Number
    data: bytes


class ImportMessage(_Arguments, frozen=True):
    """The content of its ID.json, and its data (None: that came before, by ImportData). `again`: also if it was
    imported before."""

    shard: Number
    record: bytes
    data: bytes | None
    again: bool = False


class Known(_Arguments, frozen=True):
    """Texts (filter/lessons.py), and whether they are spam."""

    keys: list[bytes]
    spam: bool


class OfAccount(_Arguments, frozen=True):
    """An account, with its kind or without ("user=ann", "ann"), and, to end a finding, the check ("": all)."""

    account: Text
    check: Text = ""


class Learned(_Arguments, frozen=True):
    """A text that a filter has learned, as spam or as none."""

    key: bytes
    spam: bool


class Suspension(_Arguments, frozen=True):
    """Of a site ("": all), or of an application's mail (`about`; "": all mail) to it."""

    site: Text
    about: Text
    seconds: Seconds
    reason: Text


class Policy(_Arguments, frozen=True):
    """`about`: the mail it matches, `field=value` words."""

    kind: Literal["hold", "bounce"]
    about: Text
    seconds: Seconds
    reason: Text


class Clearing(_Arguments, frozen=True):
    """Of one state by its key; or (`resume`) of all kinds that keep mail from a site."""

    kind: Literal["", "suspended", "dead", "slow", "learned", "hold", "bounce"]
    site: Text
    about: Text
    resume: bool


class Trace(_Arguments, frozen=True):
    """Which dialogues are shown: `in`, those with clients, by `clients` (networks) and `listener` (address or port); `out`, those
    with other hosts, by `site` and `host`. `only_one`: the first connection that matches."""

    side: Literal["in", "out"]
    clients: list[Text] = []
    listener: Text = ""
    site: Text = ""
    host: Text = ""
    application: Text = ""
    sender: Text = ""
    recipient: Text = ""
    only_one: bool = False


class MailboxCreate(_Arguments, frozen=True):
    """A user. `password`: "" for one whose back end knows it; quotas as of `store.directory.User`."""

    address: Text
    password: Text
    octets: int
    messages: int


class MailboxDelete(_Arguments, frozen=True):
    """A user by address. `now`: without the days in which the user may come back."""

    address: Text
    now: bool


class MailboxRename(_Arguments, frozen=True):
    """A user by address, and the new one."""

    address: Text
    new: Text


class MailboxMove(_Arguments, frozen=True):
    """A user by address, to a shard."""

    address: Text
    shard: Number


class MailboxImport(_Arguments, frozen=True):
    """Messages for a mailbox of a user: (flags, keywords, INTERNALDATE in ms, data)."""

    address: Text
    name: Text
    messages: list[tuple[list[str], list[str], int, bytes]]


class MailboxRestore(_Arguments, frozen=True):
    """A part of a user of a backup (store/carry.py)."""

    ident: Number
    shard: Number
    part: Any


class MailboxRestored(_Arguments, frozen=True):
    """The user, all of whose parts have been put: a row of the directory (store.directory.User), and other addresses."""

    user: Any
    addresses: list[Text]


class MailboxAddress(_Arguments, frozen=True):
    """An address."""

    address: Text


class OfUser(_Arguments, frozen=True):
    """A user's id (0: all users)."""

    user: Number = 0


class MailboxAlias(_Arguments, frozen=True):
    """`targets`: none to remove the alias."""

    address: Text
    targets: list[Text]


class MailboxFields(_Arguments, frozen=True):
    """What is to change of a user; None: nothing."""

    disabled: bool | None = None
    secret: Text | None = None
    octets: int | None = None
    messages: int | None = None


class MailboxChange(_Arguments, frozen=True):
    """A user by address, and what is to change."""

    address: Text
    changes: MailboxFields


class SieveChange(_Arguments, frozen=True):
    """A change of a user's Sieve scripts (store.mailboxes.CHANGES); `text`: of the one that is put."""

    address: Text
    what: Literal["put_script", "activate_script", "remove_script"]
    name: Text
    text: bytes


class OfWebhook(_Arguments, frozen=True):
    """A webhook."""

    name: Text


class Replaying(_Arguments, frozen=True):
    """Events of a webhook that have happened since a time, before another one (ms UTC; 0: until now), of these kinds (none: of
    all that it wants)."""

    name: Text
    since: Number
    until: Number = 0
    kinds: list[Literal["accepted", "deferred", "delivered", "bounced", "held", "released", "complained"]] = []


class Suppression(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the suppression list (suppression.Entry). `since`: 0: now; `until`: None: as is configured for the reason, 0:
    for ever; `by`: "": who asks."""

    address: Text
    application: Text = ""
    reason: Literal["hard-bounce", "complaint", "unsubscribe", "manual"] = "manual"
    text: Text = ""
    since: Number = 0
    until: Number | None = 0
    by: Text = ""


class SuppressionPut(_Arguments, frozen=True):
    """Entries to add, or to replace; `uid`: as of Change."""

    rows: Annotated[list[Suppression], msgspec.Meta(max_length=SUPPRESSIONS)]
    uid: int = -1


class SuppressionRemove(_Arguments, frozen=True):
    """Addresses to remove: of an application ("": from the list about all mail), or (None) everywhere."""

    addresses: Annotated[list[Text], msgspec.Meta(max_length=SUPPRESSIONS)]
    application: Text | None = None


class SuppressionPage(_Arguments, frozen=True):
    """A page of entries, as of suppression.Suppressions.page."""

    after: bytes
    application: Text | None = None
    prefix: Text = ""
    reason: Literal["", "hard-bounce", "complaint", "unsubscribe", "manual"] = ""
    most: Annotated[int, msgspec.Meta(ge=1, le=SUPPRESSIONS)] = SUPPRESSIONS


class SuppressionOf(_Arguments, frozen=True):
    """An address."""

    address: Text


class Upgrading(_Arguments, frozen=True):
    """To the program at a path ("": the one that the relay was started with), each of whose steps may take so many seconds."""

    program: Text
    seconds: Seconds


# How answers are merged: the workers' answers and the request's arguments -> one answer

Rows = list[dict[str, Any]]


def _by(name: str, counts: tuple[str, ...], join: Callable[[dict[str, Any], dict[str, Any]], None], parts: list[Rows]) -> Rows:
    """The rows merged by the value of the column `name`: the columns `counts` are added up, `join(known, row)` merges others."""
    merged: dict[str, dict[str, Any]] = {}
    for row in (row for rows in parts for row in rows):
        known = merged.setdefault(row[name], row)
        if known is not row:
            for key in counts:
                known[key] += row[key]
            join(known, row)
    return list(merged.values())


def _summaries(parts: list[Rows], args: Any) -> Rows:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        known["next"] = min(filter(None, (known["next"], row["next"])), default=0)

    return sorted(
        _by("queue", ("messages", "bytes", "deferred", "held", "unseen"), join, parts), key=lambda row: -row["messages"]
    )


def _shapes(parts: list[Rows], args: Any) -> Rows:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        known["ages"] = [sum(pair) for pair in zip(known["ages"], row["ages"], strict=True)]

    return sorted(_by("queue", ("messages",), join, parts), key=lambda row: -row["messages"])


def _sites(parts: list[Rows], args: Any) -> Rows:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        if row["state"] == "down":
            known |= {key: row[key] for key in ("state", "reason", "until")}

    counts = ("waiting", "deferred", "in flight", "connections", "opening", "window", "rate", "sessions")
    rows = _by("pool", counts, join, parts)
    return sorted(rows, key=lambda row: (-row["waiting"], -row["connections"], -row["deferred"], row["pool"]))


def _filters(parts: list[Rows], args: Any) -> Rows:
    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        if not row["up"] and (known["up"] or row["down for"] > known["down for"]):
            known |= {key: row[key] for key in ("up", "down for", "why")}

    return _by("name", ("waiting",), join, parts)


def _rules(parts: list[Rows], args: Any) -> Rows:
    """What was counted is counted by all workers together; what each has matched last, by itself."""

    def join(known: dict[str, Any], row: dict[str, Any]) -> None:
        known["last"] = sorted({*known["last"], *row["last"]})[-LAST:]

    return _by("rule", (), join, parts)


def _moved(parts: list[list[int] | None], args: Any) -> list[int] | None:
    found = [part for part in parts if part is not None]
    return None if len(found) < len(parts) else [sum(column) for column in zip(*found, strict=True)] or [0, 0]


def _sum(parts: list[int], args: Any) -> int:
    return sum(parts)


def _latest(parts: list[list[float]], args: Any) -> list[float]:
    return max(parts, default=[0, 0.0])


@dataclass(frozen=True)
class Request:
    """One row. `seconds`: for one worker's answer, or the next piece of it. `changes`: it changes something, so an answer without
    a worker's part is a failure. `offline`: the spool's files answer it, too. `pieces`: its answer comes in pieces."""

    name: str
    arguments: type[_Arguments]
    where: Where
    seconds: float = 10.0
    merge: Callable[[list[Any], Any], Any] | None = None
    changes: bool = False
    offline: bool = False
    pieces: bool = False

    @property
    def patience(self) -> float:
        """The seconds after which the supervisor itself is late: it asks workers side by side, or one and then the others."""
        return 2 * self.seconds + 5

    def read(self, args: object) -> Any:
        """The arguments of a request as the row's type. RelayError names the first that is wrong."""
        try:
            return msgspec.convert(args, self.arguments)
        except (msgspec.ValidationError, ValueError) as error:
            raise RelayError(f"{self.name}: {error}") from None


REQUESTS: dict[str, Request] = {
    row.name: row
    for row in (
        Request("status", Nothing, Where.SUPERVISOR, 5),
        Request("readiness", Nothing, Where.SUPERVISOR, 5),
        Request("readings", Nothing, Where.SUPERVISOR, 5),
        Request("summary", Nothing, Where.ALL, 15, _summaries, offline=True),
        Request("shape", Nothing, Where.ALL, 15, _shapes, offline=True),
        Request("shards", Nothing, Where.SUPERVISOR, offline=True),
        Request("page", Page, Where.OWNER, 15, offline=True),
        Request("change", Change, Where.OWNER, 60, changes=True),
        Request("move", Move, Where.ALL, 60, _moved, changes=True),
        Request("throttled", Queues, Where.ALL, 10, _latest),
        Request("message", OfMessage, Where.FIRST, offline=True),
        Request("raw", OfMessage, Where.FIRST, 30, offline=True, pieces=True),
        Request("explain", OfMessage, Where.FIRST),
        Request("subjects", Messages, Where.OWNER, 15, offline=True),
        Request("records", Messages, Where.OWNER, 30),
        Request("exported", Exported, Where.OWNER, 60, changes=True),
        Request("import_data", ImportData, Where.OWNER, 60, changes=True),
        Request("import_message", ImportMessage, Where.OWNER, 60, changes=True),
        Request("history", OfMessage, Where.SUPERVISOR, 60, offline=True),
        Request("history_files", Nothing, Where.SUPERVISOR, offline=True),
        Request("history_piece", HistoryPiece, Where.SUPERVISOR, offline=True),
        Request("sites", Nothing, Where.ALL, 15, _sites),
        Request("site_states", Nothing, Where.SUPERVISOR),
        Request("suspend", Suspension, Where.SUPERVISOR, changes=True),
        Request("policy", Policy, Where.SUPERVISOR, changes=True),
        Request("clear", Clearing, Where.SUPERVISOR, changes=True),
        Request("routes", Nothing, Where.ANY),
        Request("mailbox_create", MailboxCreate, Where.SUPERVISOR, 40, changes=True),
        Request("mailbox_alias", MailboxAlias, Where.SUPERVISOR, 30, changes=True),
        Request("mailbox_change", MailboxChange, Where.SUPERVISOR, 30, changes=True),
        Request("mailbox_rename", MailboxRename, Where.SUPERVISOR, 30, changes=True),
        Request("mailbox_delete", MailboxDelete, Where.SUPERVISOR, HOURS, changes=True),
        Request("mailbox_move", MailboxMove, Where.SUPERVISOR, HOURS, changes=True),
        Request("mailbox_import", MailboxImport, Where.SUPERVISOR, 120, changes=True),
        Request("mailbox_begin_restore", MailboxAddress, Where.SUPERVISOR, 30, changes=True),
        Request("mailbox_restore", MailboxRestore, Where.SUPERVISOR, 120, changes=True),
        Request("mailbox_end_restore", MailboxRestored, Where.SUPERVISOR, 30, changes=True),
        Request("sieve_change", SieveChange, Where.SUPERVISOR, 40, changes=True),
        Request("mailbox_owner", MailboxAddress, Where.SUPERVISOR),
        Request("sessions", OfUser, Where.EACH, pieces=True),
        Request("disconnect", OfUser, Where.ALL, 30, _sum, changes=True),
        Request("filters", Nothing, Where.ALL, 10, _filters),
        Request("rules", Nothing, Where.ALL, 10, _rules),
        Request("abuse", Nothing, Where.SUPERVISOR),
        Request("abuse_why", OfAccount, Where.SUPERVISOR),
        Request("abuse_clear", OfAccount, Where.SUPERVISOR, changes=True),
        Request("webhooks", Nothing, Where.SUPERVISOR, 10),
        Request("webhook_test", OfWebhook, Where.SUPERVISOR, 310, changes=True),
        Request("webhook_replay", Replaying, Where.SUPERVISOR, 60, changes=True),
        Request("suppression_counts", Nothing, Where.SUPERVISOR, offline=True),
        Request("suppression_find", SuppressionOf, Where.SUPERVISOR, offline=True),
        Request("suppression_page", SuppressionPage, Where.SUPERVISOR, 30, offline=True),
        Request("suppression_put", SuppressionPut, Where.SUPERVISOR, 60, changes=True, offline=True),
        Request("suppression_remove", SuppressionRemove, Where.SUPERVISOR, 60, changes=True, offline=True),
        Request("lessons", Known, Where.SUPERVISOR),
        Request("learned", Learned, Where.SUPERVISOR, changes=True),
        Request("trace", Trace, Where.LIVE, pieces=True),
        Request("activity", Nothing, Where.SUPERVISOR),
        Request("usage", Nothing, Where.ANY, 5),
        Request("upgrade", Upgrading, Where.SUPERVISOR, HOURS, changes=True),
        Request("reload", Nothing, Where.SUPERVISOR, 60, changes=True),
    )
}
