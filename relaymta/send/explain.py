"""For `message explain` and `site list`: why a message waits and until when, and the state of one worker's sites."""

import time
from collections.abc import Iterable
from heapq import nlargest
from typing import Any

from relaymta.node import HOLD
from relaymta.proto.envelope import QueueName
from relaymta.queue import Entry, wall_ms
from relaymta.route.table import Asked
from relaymta.send.dispatch import Dispatcher
from relaymta.send.pool import Pool
from relaymta.send.session import MESSAGE_DATA

__all__ = ["explain", "goes_to", "site_rows", "throttled"]

EXACT = 1000  # positions in a ready list are exact up to this one


def site_rows(dispatcher: Dispatcher, most: int = 0) -> list[dict[str, Any]]:
    """One row for each site that a worker sends to or has mail for; the `most` busiest (0: all)."""
    now = dispatcher.loop.time()
    pools: Iterable[Pool] = dispatcher.pools.values()
    if most:
        pools = nlargest(most, pools, key=lambda pool: (len(pool.ready), len(pool.sessions)))
    return [_site_row(dispatcher, pool, now) for pool in pools]


async def explain(dispatcher: Dispatcher, ident: int) -> dict[str, Any] | None:
    """A message of a worker's shard: as `inspect.message`, with `waits`: for each of its queues the routes that were checked,
    the site, the last attempts, and what it waits for. None when this shard does not have it."""
    queue = dispatcher.queue
    assert queue is not None
    found = await queue.message(ident)
    if found is None:
        return None
    found["waits"] = []
    for name, placement in await queue.places(ident):
        indexes = range(len(found["recipients"])) if placement.indexes is None else placement.indexes
        pending = [found["recipients"][i] for i in indexes if found["recipients"][i]["state"] == "pending"]
        site = dispatcher.sites.last(name)
        found["waits"].append(
            {
                "queue": str(name),
                "recipients": [recipient["address"] for recipient in pending],
                "routes": _chosen_by(dispatcher, found, name, pending[0]["address"]) if pending else [],
                "site": site.key if site is not None else "",
                "attempts": pending[0].get("attempts", []) if pending else [],
                "wait": _waits_for(dispatcher, found, name, placement.due, queue.schedule.get(ident, placement.queue)),
            }
        )
    return found


def _site_row(dispatcher: Dispatcher, pool: Pool, now: float) -> dict[str, Any]:
    return {
        "pool": pool.key,
        "site": pool.shape.key,
        "hosts": pool.site.names,
        "source": pool.source.name if pool.source is not None else "",
        "state": "down" if pool.failures else "up",
        "reason": pool.reason,
        "until": _wall(dispatcher, pool.down_until) if pool.failures else 0,
        "waiting": len(pool.ready),
        "in flight": sum(len(session.core.under_way()) for session in pool.sessions),
        "connections": len(pool.sessions),
        "opening": pool.connecting,
        "window": round(pool.window, 1),
        "rate": pool.rate(now),
        "limits": {name: {"value": limit.value, "origin": limit.origin} for name, limit in pool.binding(now)},
        "hosts down": dispatcher.opener.down(pool.site.route),
        "sessions": [
            {
                "peer": s.peer,
                "awaits": s.core.awaiting or (MESSAGE_DATA if s.core.streaming else "nothing"),
                "messages": s.core.messages,
            }
            for s in pool.sessions
        ],
    }


def _wall(dispatcher: Dispatcher, moment: int) -> float:
    assert dispatcher.queue is not None
    return dispatcher.queue.clock.wall(moment) / 1000


def _waits_for(dispatcher: Dispatcher, row: dict[str, Any], name: QueueName, due: int, entry: Entry | None) -> dict[str, Any]:
    """Why a message in the queue `name` is not delivered, as `{"why", "until", "released by", "position", "limit"}`: what it
    waits for, until when at the latest (seconds since the epoch, 0: not known), what would release it, how many messages are
    before it (-1: not known), and which limit applies. `row`: as of `inspect.message`; `due`: by the queue's clock; `entry`: None
    when it is not in memory."""
    assert dispatcher.queue is not None
    clock = dispatcher.queue.clock.now()
    if row["state"] in ("held", "quarantined"):
        return _held(dispatcher, row, name)
    site = dispatcher.sites.last(name)
    pool = next((p for p in dispatcher.pools.values() if site is not None and p.site.key == site.key), None)
    if entry is not None and entry.in_flight:
        return _in_flight(pool, entry)
    if due > clock:
        return _answer("its schedule: the next attempt is not due", _wall(dispatcher, due), "`relaymta queue flush`")
    failures, until = dispatcher.unresolved(name)
    if until > clock:
        return _answer(
            f"the DNS: {name.domain} could not be looked up {failures} times", _wall(dispatcher, until), "a working DNS"
        )
    state = None
    if site is not None:
        state = dispatcher.decisions.states.suspension(dispatcher.shaping.shape(site).key, name.application)
    if state is not None:
        until_wall = time.time() + dispatcher.decisions.states.left(state) / 1000
        why = f"{state.site or state.about} is suspended by {state.by}: {state.reason}{_quoted(state.reply)}"
        return _answer(why, until_wall, "`relaymta site resume`")
    if pool is None:
        return _answer("its turn: it is on disk, and is read when there is room in memory", 0, "")
    if pool.down_until > clock:
        return _answer(f"the site is down: {pool.reason}", _wall(dispatcher, pool.down_until), "`relaymta queue flush`")
    return _in_line(dispatcher, pool, entry)


def _held(dispatcher: Dispatcher, row: dict[str, Any], name: QueueName) -> dict[str, Any]:
    policy = None
    if row["state"] == "held":
        policy = dispatcher.policies.find(name, row["sender"], [recipient["address"] for recipient in row["recipients"]])
    if policy is None or policy.kind != HOLD:
        return _answer(f"it is {row['state']}", 0, "`relaymta queue release`")
    until = time.time() + dispatcher.decisions.states.left(policy) / 1000
    return _answer(f"hold policy {policy.site}: {policy.reason}", until, "`relaymta policy remove`")


def throttled(dispatcher: Dispatcher, names: dict[QueueName, int]) -> tuple[int, float]:
    """(How many of the messages in these queues, all due, must wait because their site is suspended or has a rate; until when the
    last of them waits, seconds since the epoch). `names`: the number of messages by queue."""
    count, last, now = 0, 0.0, time.time()
    behind: dict[str, tuple[Pool, int]] = {}  # by pool with a rate: messages
    for name, messages in names.items():
        site = dispatcher.sites.last(name)
        if site is None:
            continue
        state = dispatcher.decisions.states.suspension(dispatcher.shaping.shape(site).key, name.application)
        if state is not None:
            count += messages
            last = max(last, now + dispatcher.decisions.states.left(state) / 1000)
            continue
        for pool in dispatcher.pools.values():
            if pool.site.key == site.key:
                behind[pool.key] = (pool, behind.get(pool.key, (pool, 0))[1] + messages)
    for pool, messages in behind.values():
        rate = dict(pool.binding(dispatcher.loop.time()))["rate"].value
        if rate and messages > rate:
            count += messages - int(rate)
            last = max(last, now + messages / rate)
    return count, last


def goes_to(dispatcher: Dispatcher, name: QueueName, site: str) -> bool:
    """Whether a queue's mail is delivered to a site, given by its name, by the name under which its limits are counted, or by a
    host's name."""
    last = dispatcher.sites.last(name)
    return last is not None and site in (last.key, dispatcher.shaping.shape(last).key, *last.names)


def _in_flight(pool: Pool | None, entry: Entry) -> dict[str, Any]:
    for session in pool.sessions if pool is not None else ():
        if any(mail.cargo is entry for mail in session.core.under_way()):
            awaits = f"the reply to {session.core.awaiting}" if session.core.awaiting else "the peer to accept its message data"
            return _answer(f"it is being delivered to {session.peer}, waiting for {awaits}", 0, "")
    return _answer("it is being delivered, or its outcome is being written", 0, "")


def _in_line(dispatcher: Dispatcher, pool: Pool, entry: Entry | None) -> dict[str, Any]:
    """The answer for a message that only the site's limits, and messages before it, delay."""
    now = dispatcher.loop.time()
    position = pool.ready.position(entry, EXACT) if entry is not None else -1
    limits = dict(pool.binding(now))
    name = "rate" if limits["rate"].value and (pool.idle or pool.pumping_at > now) else "connections"
    limit = limits[name]
    rate = limits["rate"].value or pool.rate(now)
    until = wall_ms() / 1000 + position / rate if position >= 0 and rate else 0
    elsewhere = " (other workers have them)" if name == "connections" and not pool.sessions else ""
    found = _answer(
        f"its turn at the site{elsewhere}", until, f"a higher limit: {name} is {limit.value:g}, set by {limit.origin}"
    )
    return found | {"position": position, "limit": {"name": name, "value": limit.value, "origin": limit.origin}}


def _quoted(reply: str) -> str:
    return f" (after {reply!r})" if reply else ""


def _answer(why: str, until: float, released_by: str) -> dict[str, Any]:
    return {"why": why, "until": until, "released by": released_by, "position": -1, "limit": None}


def _chosen_by(dispatcher: Dispatcher, row: dict[str, Any], name: QueueName, recipient: str) -> list[dict[str, Any]]:
    """The routes that were checked for a recipient, and the condition that decided on each."""
    site = dispatcher.sites.last(name)
    mx = site.names if site is not None and site.hosts is not None else None
    asked = Asked(
        row["application"], row["sender"].lower(), recipient.lower(), row["size"], row["attempts"], tuple(row["headers"])
    )
    return [
        {"route": verdict.route.label, "matches": verdict.matches, "by": verdict.reason}
        for verdict in dispatcher.routes.trace(asked, mx)
    ]
