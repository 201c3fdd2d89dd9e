"""What a worker shows of its state every second: gauges, and what follows from memory and disk."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable, Iterable
from heapq import nlargest
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaymta import memory
from relaymta.hosts import RESOLV_CONF
from relaymta.metrics import Counters, index
from relaymta.queue import Totals

if TYPE_CHECKING:
    from relaymta.worker import Shard, Worker
    from relaymta.worker.mail import Mail

__all__ = ["QUARANTINE", "Gauges", "busy", "watch_collector"]

QUARANTINE = "relaymta_quarantine_octets"
LOG_DROPPED = index("relaymta_log_dropped_total")
JOURNAL_DROPPED = index("relaymta_journal_dropped_total")

_TOTALS: list[tuple[str, Callable[[Totals], float], Callable[[Iterable[float]], float]]] = [
    ("relaymta_queue_messages", attrgetter("messages"), sum),
    ("relaymta_queue_octets", attrgetter("octets"), sum),
    ("relaymta_queue_deferred", attrgetter("deferred"), sum),
    ("relaymta_queue_held", attrgetter("held"), sum),
    ("relaymta_oldest_overdue_seconds", attrgetter("overdue"), max),
    ("relaymta_oldest_message_seconds", attrgetter("oldest"), max),
    ("relaymta_unseen", attrgetter("unseen"), sum),
    ("relaymta_unseen_oldest_seconds", attrgetter("oldest_unseen"), max),
    ("relaymta_oldest_held_seconds", attrgetter("oldest_held"), max),
    ("relaymta_segment_octets", attrgetter("segment_octets"), sum),
    ("relaymta_segment_live_octets", attrgetter("segment_live"), sum),
]

TALLY_EVERY = 5  # seconds between two reports of attempts by site
COUNT_SECONDS = 60.0  # after so long another count is started, even if the last one has not ended
COUNT_SHARE = 50  # counting takes at most 1/50 of the time
LOADS_MOST = 1000  # sites of one worker that are compared with those of others
_STORE_REASONS = {"slow": "free space is near its floor", "full": "free space is below its floor"}


def busy(shards: "Iterable[Shard]", names: list[str] | None, now: float) -> list[Any]:
    """The load of sites for /metrics. Without `names`: of the LOADS_MOST with most mail, as (name, messages waiting,
    connections). With names: the rows of these, for `metrics.SITE_GAUGES`."""
    pools = [pool for shard in shards for pool in shard.dispatcher.pools.values()]
    if names is None:
        loads = ((len(pool.ready), len(pool.sessions), pool.key) for pool in pools)
        return [(key, waiting, connections) for waiting, connections, key in nlargest(LOADS_MOST, loads)]
    wanted = set(names)
    return [
        {
            "pool": pool.key, "waiting": len(pool.ready), "connections": len(pool.sessions), "window": round(pool.window, 1),
            "rate": pool.rate(now),
        }
        for pool in pools
        if pool.key in wanted
    ]  # fmt: skip


def watch_collector(counters: Counters) -> None:
    """Observe how long Python's garbage collections stop this process from now on."""
    observe, began = counters.histogram("relaymta_gc_pause_seconds"), 0.0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        now = time.perf_counter()
        if phase == "start":
            began = now
        else:
            observe(now - began)

    gc.callbacks.append(note)


class Gauges:
    """Sets a worker's gauges, from its start on until `stop`."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._store_state = self._mail_state = "ok"
        self._log_dropped = 0
        self._journal_dropped, self._journal_fails = 0, False
        self._memory_level = 0
        self._beats = 0
        self._timer: asyncio.TimerHandle
        self._set()

    def stop(self) -> None:
        self._timer.cancel()
        self._report_sites()

    def _report_sites(self) -> None:
        """Tell the supervisor of the attempts since the last report."""
        counts = [row for shard in self._worker.shards.values() for row in shard.dispatcher.outcomes.tally.take()]
        if counts:
            self._worker.channel.notify("sites", counts=counts)

    def _set(self) -> None:
        """Set the gauges, and what follows from memory and disk; once a second, even if it fails."""
        worker = self._worker
        self._timer = worker.loop.call_later(1.0, self._set)
        now = worker.loop.time()
        if worker.resolver.refresh():
            worker.log.event("warning", text=f"{RESOLV_CONF} has changed: its name servers are used from now on")
            for shard in worker.shards.values():
                shard.dispatcher.flush()  # domains that could not be looked up,
                shard.dispatcher.look_back()  # and the queues that sleep because of that
        for shard in worker.shards.values():
            if now >= shard.count_at:
                shard.count_at = now + COUNT_SECONDS
                shard.queue.watch_totals(lambda totals, shard=shard: self._set_totals(shard, totals, now))  # type: ignore[misc]
        gauge = worker.counters.gauge
        gauge("relaymta_connections", len(worker.acceptor.connections) if worker.acceptor else 0)
        gauge("relaymta_sessions", sum(len(shard.dispatcher.sessions) for shard in worker.shards.values()))
        gauge("relaymta_window", sum(len(shard.queue.entries) for shard in worker.shards.values()))
        full = any(shard.queue.full for shard in worker.shards.values())
        slow = any(shard.queue.pressure for shard in worker.shards.values())
        stalled = any(shard.queue.writer.stalled for shard in worker.shards.values())
        gauge("relaymta_limit_overflows", worker.limits.overflows + worker.rates.overflows + worker.client_rates.overflows)
        gauge("relaymta_store_slow", slow)
        gauge("relaymta_store_full", full)
        gauge("relaymta_listeners_paused", worker.acceptor is not None and worker.acceptor.paused)
        gauge("relaymta_stressed", worker.acceptor is not None and worker.acceptor.stressed)
        gauge("relaymta_store_stalled", stalled)
        self._beats += 1
        if self._beats % TALLY_EVERY == 0:
            self._report_sites()
        worker.report_conduct()
        gauge("relaymta_quarantine_messages", sum(shard.queue.quarantine.messages for shard in worker.shards.values()))
        worker.note_quarantine()
        gauge("relaymta_quarantine_limit_octets", worker.config.quarantine.octets)
        disks = [shard.queue.disk for shard in worker.shards.values()]
        gauge("relaymta_disk_free_octets", min(disk.free for disk in disks))
        gauge("relaymta_disk_floor_octets", min(disk.floor for disk in disks))
        gauge("relaymta_lmdb_map_used_ratio", max(disk.map_used for disk in disks))
        gauge("relaymta_shedding", worker.acceptor is not None and worker.acceptor.lateness.shedding)
        with contextlib.suppress(OSError):  # no descriptor is left to look: what was seen last holds
            gauge("relaymta_rss_octets", memory.anonymous())
            self._watch_memory()
        if worker.mail is not None:
            worker.mail.set_gauges(gauge)
        if worker.collector is not None:
            worker.collector.set_gauges(gauge)
        brim = any(shard.queue.brim for shard in worker.shards.values())
        worker.log.muted = brim and worker.log.shares_disk_with(Path(worker.config.spool))
        self._count_journal()
        worker.counters.add(LOG_DROPPED, worker.log.dropped - self._log_dropped)
        self._log_dropped = worker.log.dropped
        state = "stalled" if stalled else "full" if full else "slow" if slow else "ok"
        if state != self._store_state:
            reason = next((s.queue.writer.last_error for s in worker.shards.values() if s.queue.writer.last_error), "")
            worker.log.event("store", state=state, reason="" if state == "ok" else reason or _STORE_REASONS.get(state, ""))
            self._store_state = state
        if worker.mail is not None:
            self._note_mail(worker.mail)

    def _count_journal(self) -> None:
        """Count the events that could not be written, and log that there are such, and that they are written again."""
        dropped, error = 0, ""
        for shard in self._worker.shards.values():
            journal = shard.queue.writer.journal
            if journal is not None:
                dropped += journal.files.dropped
                error = error or journal.files.error
        if dropped > self._journal_dropped:
            self._worker.counters.add(JOURNAL_DROPPED, dropped - self._journal_dropped)
            if not self._journal_fails:
                self._worker.log.event("warning", text=f"events cannot be written to the journal: {error}: webhooks lack them")
        self._journal_fails = dropped > self._journal_dropped
        self._journal_dropped = dropped

    def _note_mail(self, mail: "Mail") -> None:
        """Log that the mailboxes take no mail now, and that they do again."""
        state, reason = mail.state()
        if state != self._mail_state:
            self._worker.log.event("store", state=state, reason=reason and f"mailboxes: {reason}")
            self._mail_state = state

    def _watch_memory(self) -> None:
        """When memory is tight, keep no message data in it; when it is used up, reject new mail temporarily. OSError."""
        worker = self._worker
        used = memory.share(worker.config.limits.memory, worker.workers)
        level = 2 if used >= memory.REFUSE else 1 if used >= memory.TIGHT else 0
        worker.counters.gauge("relaymta_memory_pressure", level)
        if worker.intake is not None:
            worker.intake.out_of_memory = level == 2
        if level != self._memory_level:
            self._memory_level = level
            for shard in worker.shards.values():
                shard.queue.entries.keep_data(level == 0)
            text = ("sufficient again", "tight: message data is not kept in it", "used up: mail is temporarily rejected")[level]
            worker.log.event("warning", text=f"memory is {text} ({used:.0%} of the limit)")

    def _set_totals(self, shard: "Shard", totals: Totals, began: float) -> None:
        """Set the gauges of totals, from the last counts of this worker's shards. The longer a count takes (with very many
        queues), the later is the next one (COUNT_SECONDS, COUNT_SHARE)."""
        worker = self._worker
        shard.totals = totals
        shard.count_at = began + max(1.0, COUNT_SHARE * (worker.loop.time() - began))
        for name, of, combine in _TOTALS:
            worker.counters.gauge(name, combine(of(one.totals) for one in worker.shards.values() if one.totals is not None))
