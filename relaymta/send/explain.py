"""For `message explain` and `site list`: why a message waits and until when, and the state of one worker's sites. Everything is
read from `View`s and `SiteView`s of the dispatcher."""

import asyncio
import shlex
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from relaymta.ident import format_id
from relaymta.proto.address import compared
from relaymta.proto.envelope import BY_POLICY, QueueName
from relaymta.queue import wall_ms
from relaymta.route.table import Asked
from relaymta.send.cures import cure, cure_here
from relaymta.send.dispatch import Dispatcher
from relaymta.send.session import MESSAGE_DATA
from relaymta.send.view import SiteView, View

__all__ = ["explain", "goes_to", "site_rows", "throttled"]

TOGETHER = 100  # queues


async def site_rows(dispatcher: Dispatcher) -> list[dict[str, Any]]:
    """One row for each site that a worker sends to or has mail for, also where all of it is deferred or held. `waiting`: messages
    that were not tried, in memory or, while a site is down, suspended or busy, on disk. (After a restart
    the site of deferred mail is known when its domain has been looked up.)"""
    queue = dispatcher.queue
    assert queue is not None
    rows = {pool.key: _site_row(dispatcher.seen(pool)) for pool in dispatcher.pools.values()}
    known = Counter[str]()  # messages in memory, of each site
    for pool in dispatcher.pools.values():
        known[pool.site.key] += rows[pool.key]["waiting"] + rows[pool.key]["in flight"]
    of_site: dict[str, dict[str, Any]] = {}
    untried = Counter[str]()
    names = {str(name): name for name in await queue.names()}
    for number, found in enumerate(await queue.summary()):
        if not number % TOGETHER:
            await asyncio.sleep(0)  # mail is delivered meanwhile
        name = names.get(found["queue"])
        site = dispatcher.sites.last(name) if name is not None else None
        if site is not None and site.key not in of_site:
            shown = _site_row(dispatcher.seen(dispatcher.connections.shown(site)))
            of_site[site.key] = rows.setdefault(shown["pool"], shown)
        if site is not None:
            of_site[site.key]["deferred"] += found["deferred"]
            untried[site.key] += found["messages"] - found["deferred"] - found["held"]
    for key, row in of_site.items():  # what waits on disk: the site is down or suspended, or has more than memory is to hold
        row["waiting"] += max(0, untried[key] - known[key])
    return list(rows.values())


async def explain(dispatcher: Dispatcher, ident: int, filters: Callable[[list[str]], str] = ", ".join) -> dict[str, Any] | None:
    """A message of a worker's shard: as `inspect.message`, with `waits`: for each of its queues the routes that were checked,
    the site, the last attempts, and what it waits for. `filters(names)`: what these do, which have not looked at it. None when
    this shard does not have it."""
    queue = dispatcher.queue
    assert queue is not None
    found = await queue.message(ident)
    if found is None:
        return None
    found["waits"] = []
    everyone = [recipient["address"] for recipient in found["recipients"]]
    for name, placement in await queue.places(ident):
        indexes = range(len(found["recipients"])) if placement.indexes is None else placement.indexes
        pending = [found["recipients"][i] for i in indexes if found["recipients"][i]["state"] == "pending"]
        entry = queue.entries.get(ident, placement.queue)
        view = dispatcher.view(name, entry, found["sender"], everyone, found["user"])
        due = queue.clock.wall(placement.due) / 1000 if placement.due > queue.clock.now() else 0.0
        attempts = pending[0].get("attempts", []) if pending else []
        held = found["state"] in ("held", "quarantined")
        in_flight = entry is not None and not entry.waiting
        if found["state"] == "unseen":
            wait = _answer(filters(found["unseen"]), 0, "")
        else:
            wait = _held(view, found["state"], found["held_for"]) if held else _waits_for(view, name, due, in_flight)
        found["waits"].append(
            {
                "queue": str(name),
                "recipients": [recipient["address"] for recipient in pending],
                "routes": _chosen_by(view, found, pending[0]["address"]) if pending else [],
                "site": view.site.key if view.site is not None else "",
                "attempts": attempts,
                "wait": _with_cure(wait, view, name, attempts, ident),
            }
        )
    return found


def _site_row(site: SiteView) -> dict[str, Any]:
    return {
        "pool": site.pool,
        "site": site.site,
        "hosts": site.hosts,
        "source": site.source,
        "state": "down" if site.down else "up",
        "reason": site.reason,
        "cause": site.cause,
        "until": site.until,
        "waiting": site.waiting,
        "deferred": 0,
        "in flight": site.in_flight,
        "connections": len(site.sessions),
        "opening": site.opening,
        "window": round(site.window, 1),
        "rate": site.rate,
        "limits": {name: {"value": limit.value, "origin": limit.origin} for name, limit in site.limits.items()},
        "hosts down": site.hosts_down,
        "sessions": [{"peer": s.peer, "awaits": s.awaits, "messages": s.messages} for s in site.sessions],
    }


def _with_cure(wait: dict[str, Any], view: View, name: QueueName, attempts: list[dict[str, Any]], ident: int) -> dict[str, Any]:
    """The answer `wait` (of `_waits_for`) with `cure`: what to do about the failure of the site, else about the message's last
    one; and the id in its `command`."""
    down = next((site.cause for site in view.pools if site.down), "")
    category = down or (attempts[-1]["cause"] if attempts else "")
    if wait["command"] in ("", "queue flush ID"):
        hosts = view.site.names if view.site is not None else []
        route = view.site.route if view.site is not None else view.routes.route_of(name)
        here = route.is_local and bool(attempts)
        wait["cure"] = cure_here(attempts[-1]["reply"]) if here else cure(category, route, hosts)
    if wait["command"].endswith(" ID"):
        wait["command"] = wait["command"].removesuffix("ID") + format_id(ident)
    if wait["command"] and not wait["released by"]:
        wait["released by"] = f"`relaymta {wait['command']}`"
    return wait


def _waits_for(view: View, name: QueueName, due: float, in_flight: bool) -> dict[str, Any]:
    """Why a message in the queue `name` is not delivered, as `{"why", "until", "released by", "command", "cure", "position",
    "limit"}`: what it waits for, until when at the latest (seconds since the epoch, 0: not known), what would release it ("":
    the command), the words of the command line for that ("": none; `_with_cure`), how many messages are before it (-1: not
    known), and which limit applies. `due`: seconds since the epoch, 0: now; `in_flight`: it is, or its outcome is being
    written."""
    now = time.time()
    if in_flight:
        return _in_flight(view)
    if due:
        return _answer("its schedule: the next attempt is not due", due, "", "queue flush ID")
    if view.lookup_at > now:
        why = f"the DNS: {name.domain} could not be looked up {view.lookups_failed} times"
        return _answer(why, view.lookup_at, "a working DNS", "queue flush ID")
    if view.suspended is not None:
        by = view.suspended
        why = f"{by.site or by.about} is suspended by {by.by}: {by.reason}{_quoted(by.reply)}"
        words = ["site", "resume", *([by.site] if by.site else []), *(["--app", by.about] if by.about else [])]
        return _answer(why, view.suspended_until, "", shlex.join(words))
    if view.probed_later:
        return _answer("its turn to be probed: it was in flight when a worker died", 0, "")
    if view.asks and view.position < 0:
        return _answer(f"the DNS: {name.domain} is being looked up", 0, "")
    if not view.pools:
        return _answer("its turn: it is on disk, and is read when there is room in memory", 0, "")
    site = view.pools[0]
    if site.until > now:
        return _answer(f"the site is down: {site.reason}", site.until, "", "queue flush ID")
    return _in_line(site, view.position)


def _held(view: View, state: str, held_for: str) -> dict[str, Any]:
    """As `_waits_for`, of a message that is held or quarantined."""
    by_policy = state == "held" and (held_for.startswith(BY_POLICY) or not held_for)
    if view.policy is None or not by_policy:
        return _answer(f"it is {state}{held_for and ': '}{held_for}", 0, "", "queue release ID")
    why, remove = f"hold policy {view.policy.site}: {view.policy.reason}", ["policy", "remove", "hold", view.policy.site]
    return _answer(why, view.policy_until, "", shlex.join(remove))


def throttled(dispatcher: Dispatcher, names: dict[QueueName, int]) -> tuple[int, float]:
    """(How many of the messages in these queues, all due, must wait because their site is suspended or has a rate; until when the
    last of them waits, seconds since the epoch). `names`: the number of messages by queue."""
    count, last, now = 0, 0.0, time.time()
    behind: dict[str, tuple[SiteView, int]] = {}  # by pool: messages
    for name, messages in names.items():
        view = dispatcher.view(name)
        if view.suspended is not None:
            count += messages
            last = max(last, view.suspended_until)
            continue
        for site in view.pools:
            behind[site.pool] = (site, behind.get(site.pool, (site, 0))[1] + messages)
    for site, messages in behind.values():
        rate = site.limits["rate"].value
        if rate and messages > rate:
            count += messages - int(rate)
            last = max(last, now + messages / rate)
    return count, last


def goes_to(dispatcher: Dispatcher, name: QueueName, site: str) -> bool:
    """Whether a queue's mail is delivered to a site, given by its name, by the name under which its limits are counted, or by a
    host's name. Also called on reader threads."""
    return site in dispatcher.names_of_site(name)


def _in_flight(view: View) -> dict[str, Any]:
    session = view.delivering
    if session is None:
        return _answer("it is being delivered, or its outcome is being written", 0, "")
    awaits = "the peer to accept its message data" if session.awaits == MESSAGE_DATA else f"the reply to {session.awaits}"
    return _answer(f"it is being delivered to {session.peer}, waiting for {awaits}", 0, "")


def _in_line(site: SiteView, position: int) -> dict[str, Any]:
    """The answer for a message that only the site's limits, and messages before it, delay."""
    if site.opening and not site.sessions:
        return _answer("a connection to its site, which is being opened", 0, "") | {"position": position}
    name = "rate" if site.limits["rate"].value and site.paced else "connections"
    limit = site.limits[name]
    rate = site.limits["rate"].value or site.rate
    until = wall_ms() / 1000 + position / rate if position >= 0 and rate else 0
    elsewhere = " (other workers have them)" if name == "connections" and not site.sessions else ""
    found = _answer(
        f"its turn at the site{elsewhere}", until, f"a higher limit: {name} is {limit.value:g}, set by {limit.origin}"
    )
    return found | {"position": position, "limit": {"name": name, "value": limit.value, "origin": limit.origin}}


def _quoted(reply: str) -> str:
    return f" (after {reply!r})" if reply else ""


def _answer(why: str, until: float, released_by: str, command: str = "") -> dict[str, Any]:
    found = {"why": why, "until": until, "released by": released_by, "command": command, "cure": ""}
    return found | {"position": -1, "limit": None}


def _chosen_by(view: View, row: dict[str, Any], recipient: str) -> list[dict[str, Any]]:
    """The routes that were checked for a recipient, and the condition that decided on each."""
    mx = view.site.names if view.site is not None and view.site.hosts is not None else None
    asked = Asked(
        row["application"],
        compared(row["sender"]),
        compared(recipient),
        row["size"],
        row["attempts"],
        tuple(row["headers"]),
        row["listener"],
    )
    return [
        {"route": verdict.route.label, "matches": verdict.matches, "by": verdict.reason}
        for verdict in view.routes.trace(asked, mx)
    ]
