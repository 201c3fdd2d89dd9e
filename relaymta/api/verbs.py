"""The verbs: what the command line does for each, with arguments and answers that are models (models.py)."""

import base64
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from relaymta.api import models as m
from relaymta.api.asking import Peer, away, not_there
from relaymta.cli.finding import Finder, Search, moment
from relaymta.cli.options import missing
from relaymta.cli.peer import asked, read_pieces
from relaymta.cli.policy import POLICIES, about_mail, enact, shown_policy
from relaymta.cli.quarantine import header_of
from relaymta.cli.queue import KINDS, change, is_named, names_of_sites, pages
from relaymta.cli.site import counted_name, end_suspension, note_suspensions
from relaymta.cli.suppression import entries, put
from relaymta.control.requests import AGES
from relaymta.ident import format_id, parse_id
from relaymta.problems import Problem
from relaymta.proto.address import plain

__all__ = [
    "abuse",
    "abuse_clear",
    "abuse_why",
    "ages",
    "clear",
    "count",
    "decisions",
    "explain",
    "filters",
    "find",
    "header",
    "history",
    "lines",
    "message",
    "messages",
    "policies",
    "policy_end",
    "policy_set",
    "quarantine",
    "quarantine_verb",
    "queues",
    "raw",
    "readiness",
    "readings",
    "reload",
    "reroute",
    "resume",
    "rules",
    "site",
    "sites",
    "status",
    "suppression_add",
    "suppression_counts",
    "suppression_lines",
    "suppression_remove",
    "suppressions",
    "suppressions_of",
    "suspend",
    "verb",
]  # fmt: skip

Answer = dict[str, Any]


# Which messages


def _number(ident: str) -> int:
    try:
        return parse_id(ident)
    except ValueError as error:
        raise Problem(400, str(error), argument="id") from None


def _sender(text: str, name: str = "from") -> str:
    if text == "<>":
        return text
    address = plain(text[1:-1] if text.startswith("<") and text.endswith(">") else text)
    if address is None:
        raise Problem(400, f"{text!r}: neither an address nor <> (the null sender)", argument=name)
    return address


def _recipient(text: str) -> str:
    found = plain(text.removeprefix("<").removesuffix(">"))
    if not found:
        raise Problem(400, f"{text!r} is not an address", argument="to")
    return found


def _domain(text: str) -> str:
    if "@" in text:
        raise Problem(400, f"{text!r}: a domain has no @ in it", argument="domain")
    return text


# An argument -> the field of control.filters.Filter, and what checks it.
_FIELDS: dict[str, tuple[str, Callable[[str], str]]] = {
    "queue": ("queue", str), "route": ("route", str), "site": ("site", str), "app": ("application", str), "user": ("user", str),
    "from_": ("sender", _sender), "to": ("recipient", _recipient), "domain": ("recipient_domain", _domain),
    "filter": ("held_by", str),
}  # fmt: skip


def _chosen(args: Any) -> Answer:
    """The filter that arguments mean."""
    found: Answer = {}
    for name, (field, checked) in _FIELDS.items():
        if (value := getattr(args, name, None)) is not None:
            found[field] = checked(value)
    for name in ("held", "unseen"):
        if getattr(args, name, False):
            found[name] = True
    for name in ("older", "newer"):
        if at := getattr(args, name, 0):
            found[name] = max(1, int(at * 1000))
    return found


# The queue


def queues(peer: Peer, args: m.Nothing) -> Answer:
    """As `queue summary`."""
    return {"queues": asked(peer, "summary")}


def ages(peer: Peer, args: m.Nothing) -> Answer:
    """As `queue shape`."""
    return {"minutes": AGES, "queues": asked(peer, "shape")}


def messages(peer: Peer, args: m.List) -> Answer:
    """A page of `queue list`."""
    return _page(peer, _chosen(args), args.limit, args.cursor)


def quarantine(peer: Peer, args: m.Quarantine) -> Answer:
    """A page of `quarantine list`."""
    return _page(peer, _chosen(args) | {"quarantined": True}, args.limit, args.cursor)


def lines(peer: Peer, args: m.List) -> Iterator[bytes]:
    """All messages that match, as lines of JSON, many at a time."""
    more = {"quarantined": True} if isinstance(args, m.Quarantine) else {}
    for _, _, found in pages(peer, _chosen(args) | more):
        if found:
            yield b"\n".join([*found, b""])


def _page(peer: Peer, chosen: Answer, limit: int, cursor: str) -> Answer:
    first, after, until = _cursor(cursor)
    found: list[bytes] = []
    for shard in asked(peer, "shards"):
        if shard < first:
            continue
        at = after if shard == first else 0
        while True:
            part = asked(peer, "page", shard=shard, after=at, chosen=chosen | ({"until": until} if until else {}))
            if part is None:
                break
            until = until or part["until"]
            rows, idents = part["lines"].splitlines(), part["ids"]
            room = limit - len(found)
            found += rows[:room]
            if len(rows) > room or (len(found) == limit and part["after"]):
                last = idents[room - 1] if room else at
                return {"messages": found, "next": f"{shard}.{last}.{until}"}
            at = part["after"]
            if not at:
                break
    return {"messages": found, "next": ""}


def _cursor(text: str) -> tuple[int, int, int]:
    if not text:
        return 0, 0, 0
    parts = text.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) <= 19 for part in parts):
        raise Problem(400, f"{text!r} is no cursor of an earlier answer", argument="cursor")
    shard, after, until = map(int, parts)
    return shard, after, until


def _filters(args: m.Change, more: Answer | None = None) -> list[Answer]:
    chosen = _chosen(args)
    if not (args.ids or args.all or chosen):
        raise Problem(400, "which messages? Give ids, a filter, or all", argument="ids")
    chosen |= more or {}
    return [chosen | {"ident": _number(ident)} for ident in dict.fromkeys(args.ids)] or [chosen]


def _changed(peer: Peer, verb: str, filters: list[Answer], args: m.Change, word: str = "", **how: Any) -> Answer:
    """Change what matches, after it was counted, where a number is expected."""
    if args.expect is not None and not args.dry_run:
        matched = change(peer, verb, filters, True, word)["matched"]
        if missing():
            raise away()
        if matched != args.expect:
            what = f"{matched} messages match now, {args.expect} were expected; nothing was changed"
            raise Problem(409, what, argument="expect", matched=matched)
    found = change(peer, verb, filters, args.dry_run, word, **how)
    if missing() and not args.dry_run:
        raise away(matched=found["matched"], changed=found["changed"])
    return found


OUTSIDE = {"outside": True}  # the filter's field, for those who may not change what is in the quarantine


def verb(name: str, outside: bool = False) -> Callable[[Peer, m.Change], Answer]:
    """A verb of `relaymta queue` that changes messages; `outside`: those in the quarantine are left out."""

    def run(peer: Peer, args: m.Change) -> Answer:
        return _changed(peer, name, _filters(args, OUTSIDE if outside else None), args, getattr(args, "reason", ""))

    run.__doc__ = f"As `queue {name}`."
    return run


def reroute(peer: Peer, args: m.Reroute, outside: bool = False) -> Answer:
    """As `queue reroute`; `outside`: as of `verb`."""
    if args.route_to not in (known := asked(peer, "routes")):
        raise Problem(400, f"no such route: {args.route_to} (there are {', '.join(known)})", argument="route_to")
    return _changed(peer, "reroute", _filters(args, OUTSIDE if outside else None), args, args.route_to)


def quarantine_verb(name: str) -> Callable[[Peer, m.QuarantineChange], Answer]:
    """A verb of `relaymta quarantine` that changes messages."""

    def run(peer: Peer, args: m.QuarantineChange) -> Answer:
        how: Answer = {}
        if isinstance(args, m.QuarantineRelease):
            how = {"recipients": [_recipient(one) for one in args.recipients], "unscanned": args.unscanned}
        return _changed(peer, f"{name} quarantined", _filters(args, {"quarantined": True}), args, **how)

    run.__doc__ = f"As `quarantine {name}`."
    return run


def count(peer: Peer, args: m.Change, in_quarantine: bool = False) -> int:
    """How many messages match."""
    filters = _filters(args, {"quarantined": True} if in_quarantine else {})
    return sum(len(idents) for chosen in filters for _, idents, _ in pages(peer, chosen))


# Messages


def message(peer: Peer, args: m.OfMessage) -> Answer:
    """As `message show`."""
    ident = format_id(_number(args.id))
    found = asked(peer, "message", ident=ident)
    if found is None:
        raise not_there(f"no such message in the queue: {ident}")
    return dict(found)


def explain(peer: Peer, args: m.OfMessage) -> Answer:
    """As `message explain`."""
    ident = format_id(_number(args.id))
    found = asked(peer, "explain", ident=ident)
    if found is not None:
        return dict(found)
    events = [] if missing() else asked(peer, "history", ident=ident)
    if not events:
        raise not_there(f"no such message in the queue or in the history: {ident}")
    return {"id": ident, "state": "gone", "history": events}


def history(peer: Peer, args: m.OfMessage) -> Answer:
    """As `message history`."""
    ident = format_id(_number(args.id))
    events = asked(peer, "history", ident=ident)
    if not events:
        raise not_there(f"no such message in the history: {ident}")
    return {"events": events}


def header(peer: Peer, args: m.OfMessage) -> Answer:
    """The header, as `quarantine show` has it."""
    ident = message(peer, args)["id"]
    return {"header": [{"name": name, "value": value} for name, value in header_of(peer, ident)]}


def raw(peer: Peer, args: m.OfMessage) -> Iterator[bytes]:
    """As `message raw`."""
    found = False
    for piece in read_pieces(peer, "raw", ident=format_id(_number(args.id))):
        found = True
        yield piece
    if not found:
        raise not_there(f"no such message in the queue: {args.id}")


def find(peer: Peer, args: m.Find) -> Answer:
    """As `message find`."""
    chosen = _chosen(args)
    for name, field in (("since", "newer"), ("until", "older")):
        if text := getattr(args, name):
            chosen[field] = max(1, int(moment(name, text) * 1000))
    by_message_id = args.id if args.id and "@" in args.id else ""
    if args.id and not by_message_id:
        chosen["ident"] = _number(args.id)
    finder = Finder(peer, Search(chosen, tuple(args.status), by_message_id, args.subject or ""))
    found = list(finder.find(args.limit))
    return {"messages": found, "notes": list(finder.notes(len(found), args.limit))}


# Sites


def sites(peer: Peer, args: m.Nothing) -> Answer:
    """As `site list`."""
    rows = asked(peer, "sites")
    states = [state for state in asked(peer, "site_states") if state["kind"] in KINDS]
    note_suspensions(rows, states)
    return {"sites": rows, "decisions": states}


def site(peer: Peer, args: m.OfSite) -> Answer:
    """As `site show`."""
    rows = [row for row in asked(peer, "sites") if is_named(row, args.name)]
    names = {args.name, *(row["pool"] for row in rows), *(row["site"] for row in rows)}
    states = [state for state in asked(peer, "site_states") if state["site"] in names]
    note_suspensions(rows, states)
    if not rows and not states:
        raise not_there(f"no such site: {args.name}")
    return {"sites": rows, "decisions": states}


def _about(args: m.Suspend | m.Resume) -> tuple[str, str]:
    if args.site is None and args.app is None:
        raise Problem(400, "which site? Give its name, or the application whose mail to all of them is meant", argument="site")
    return args.site or "", args.app or ""


def suspend(peer: Peer, args: m.Suspend) -> Answer:
    """As `site suspend`."""
    name, application = _about(args)
    rows = asked(peer, "sites") if name else []
    known = names_of_sites(peer, rows) if name else set()
    site = counted_name(rows, name)
    done = asked(peer, "suspend", site=site, about=application, seconds=args.seconds, reason=args.reason)
    return {"site": done["site"], "known": not name or done["known"] or name in known}


def resume(peer: Peer, args: m.Resume) -> Answer:
    """As `site resume`."""
    name, application = _about(args)
    rows = asked(peer, "sites") if name else []
    done, _ = end_suspension(peer, rows, name, application)
    if not done:
        raise not_there(f"nothing keeps mail from {name or 'any site'}{f' of {application}' if application else ''}")
    return {"changed": done}


def decisions(peer: Peer, args: m.Nothing) -> Answer:
    """As `shaping active`."""
    return {"decisions": [state for state in asked(peer, "site_states") if state["kind"] in KINDS]}


def clear(peer: Peer, args: m.Clear) -> Answer:
    """As `shaping clear`, of one decision."""
    done = asked(peer, "clear", kind=args.kind, site=args.site, about=args.about, resume=False)
    if not done:
        raise not_there(f"no such decision: {args.kind} {args.site}")
    return {"changed": done}


# Policies, accounts


def policies(peer: Peer, args: m.Nothing) -> Answer:
    """As `policy list`."""
    return {"policies": [shown_policy(state) for state in asked(peer, "site_states") if state["kind"] in POLICIES]}


def policy_set(peer: Peer, args: m.PolicySet, outside: bool = False) -> Answer:
    """As `policy hold|bounce`; `outside`: as of `verb`."""
    given = {field: value for field, value in _chosen(args).items() if isinstance(value, str)}
    if not given:
        raise Problem(400, "which mail? Give one condition at least", argument="app")
    about_mail(given)
    if given.get("route") and given["route"] not in asked(peer, "routes"):
        raise Problem(400, f"no such route: {given['route']}", argument="route")
    found = enact(peer, args.kind, given, args.seconds, args.reason, outside)
    if missing():
        raise away(matched=found["matched"], changed=found["changed"])
    return found


def policy_end(peer: Peer, args: m.PolicyEnd) -> Answer:
    """As `policy remove`."""
    done = asked(peer, "clear", kind=args.kind, site=args.about, about="", resume=False)
    if not done:
        raise not_there(f"no such policy: {args.kind} {args.about}")
    return {"changed": done}


def abuse(peer: Peer, args: m.Nothing) -> Answer:
    """As `abuse list`."""
    return {"findings": asked(peer, "abuse")}


def abuse_why(peer: Peer, args: m.Account) -> Answer:
    """As `abuse why`."""
    return {"rows": [asked(peer, "abuse_why", account=args.account)]}


def abuse_clear(peer: Peer, args: m.AbuseClear) -> Answer:
    """As `abuse clear`."""
    return {"changed": len(asked(peer, "abuse_clear", account=args.account, check=args.check))}


# The suppression list


def suppressions(peer: Peer, args: m.SuppressionsQuery) -> Answer:
    """A page of `suppression list`."""
    try:
        after = base64.urlsafe_b64decode(args.cursor)
    except ValueError:
        raise Problem(400, f"{args.cursor!r} is no cursor of an earlier answer", argument="cursor") from None
    found = asked(peer, "suppression_page", after=after, most=args.limit, **_suppressed(args))
    return {"suppressions": found["rows"], "next": base64.urlsafe_b64encode(found["after"]).decode()}


def suppression_lines(peer: Peer, args: m.SuppressionsQuery) -> Iterator[bytes]:
    """All entries that match, as lines of JSON, many at a time."""
    chosen = _suppressed(args)
    for rows in entries(peer, chosen["application"], chosen["reason"], chosen["prefix"]):
        yield b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def _suppressed(args: m.SuppressionsQuery) -> Answer:
    return {"application": _whose(args), "reason": args.reason or "", "prefix": (args.prefix or "").lower()}


def _whose(args: m.SuppressionsQuery | m.SuppressionRemove) -> str | None:
    if args.app is not None and args.all_mail:
        raise Problem(400, "app and all_mail do not go together", argument="all_mail")
    return "" if args.all_mail else args.app


def suppressions_of(peer: Peer, args: m.SuppressionsOf) -> Answer:
    """As `suppression show`."""
    rows = asked(peer, "suppression_find", address=_listed(args.address))
    if not rows:
        raise not_there(f"no such address in the suppression list: {args.address}")
    return {"suppressions": rows}


def _listed(text: str, argument: str = "address") -> str:
    found = plain(text)
    if not found:
        raise Problem(400, f"{text!r} is not an address", argument=argument)
    return found


def suppression_counts(peer: Peer, args: m.Nothing) -> Answer:
    """As `suppression stats`."""
    return dict(asked(peer, "suppression_counts"))


def suppression_add(peer: Peer, args: m.SuppressionAdd) -> Answer:
    """As `suppression add`."""
    until = int(time.time() + args.seconds) if args.seconds else None
    common = {"application": args.app or "", "reason": args.reason, "text": args.note, "until": until, "by": peer.who}
    done = put(peer, [{"address": _listed(one, "addresses"), **common} for one in args.addresses])
    if done["left_out"]:
        raise Problem(409, "the suppression list is full (suppression.entries)", left_out=done["left_out"])
    return {"added": done["added"], "replaced": done["replaced"]}


def suppression_remove(peer: Peer, args: m.SuppressionRemove) -> Answer:
    """As `suppression remove`."""
    addresses = [_listed(one, "addresses") for one in args.addresses]
    done = asked(peer, "suppression_remove", addresses=addresses, application=_whose(args))
    if not done:
        raise not_there("none of these addresses is in the suppression list")
    return {"changed": done}


# The relay


def status(peer: Peer, args: m.Nothing) -> Answer:
    """As `status`."""
    return dict(asked(peer, "status"))


def readiness(peer: Peer, args: m.Nothing) -> Answer:
    """As /readyz."""
    found = asked(peer, "readiness")
    return {"ready": not found, "reasons": found}


def readings(peer: Peer, args: m.Nothing) -> Answer:
    """Counters, gauges, latencies."""
    return dict(asked(peer, "readings"))


def filters(peer: Peer, args: m.Nothing) -> Answer:
    """As `filter list`."""
    return {"rows": asked(peer, "filters")}


def rules(peer: Peer, args: m.Nothing) -> Answer:
    """As `rule list`."""
    return {"rows": asked(peer, "rules")}


def reload(peer: Peer, args: m.Nothing) -> Answer:
    """As `reload`."""
    text = asked(peer, "reload")
    if not text.startswith("reloaded"):
        raise Problem(409, text)
    return {"text": text}
