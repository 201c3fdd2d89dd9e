"""What must hold inside of a worker at any moment: counts are equal to what is there. All private names of relaymta that the
simulator looks at are in this file."""

from collections import Counter
from typing import Any

from relaymta.proto.envelope import DELIVERED, FAILED, HELD
from relaymta.proto.smtp_client import RCPT
from relaymta.queue.store import DUE, EXPIRY, HELD_KEY, WAKE, Store

__all__ = ["asked_about", "attempt", "contents", "disk", "leftovers", "memory", "overlooked", "slots"]


def contents(store: Store) -> dict[int, tuple[Any, dict[int, Any]]]:
    """All messages on a disk: id -> envelope, states of its recipients."""
    found: dict[int, tuple[Any, dict[int, Any]]] = {}
    fresh = store.fresh.live()
    with store.env.begin() as txn:
        for ident, envelope in store.idents(txn, 0, fresh):
            found[ident] = (envelope, store.recipient_states(txn, ident))
    return found


def asked_about(core: Any, address: str) -> int | None:
    """The id of the message about whose recipient the next reply to a RCPT for that address is: others may go there, too."""
    for kind, mail, index in core._expected:
        if kind is RCPT and (index, address) in mail.asked:
            ident: int = mail.cargo.ident
            return ident
    return None


def attempt(queue: Any, entry: Any) -> str:
    """Why an attempt that begins now must not; "" when it may. By what is committed."""
    store = queue.store
    with store.env.begin() as txn:
        envelope = store.envelope(txn, entry.ident)
        if envelope is None:
            return "attempted after its end"
        if envelope.flags & HELD:
            return "attempted while held"
        placement = next((p for p in envelope.placements if p.queue == entry.queue), None)
        if placement is None:
            return "attempted in a queue in which it is not"
        row = store.queue(txn, entry.queue)
        if row is None:
            return "attempted in a queue that does not exist"
        # Others of the message may have been deferred to its queue while it waited in memory, where it is due earlier than they.
        joined = placement.indexes is not None and set(placement.indexes) != {index for index, _ in entry.recipients}
        if placement.due > queue.clock.now() and not row.moved and not joined:
            return f"attempted {placement.due - queue.clock.now()} ms before its time"
        states = store.recipient_states(txn, entry.ident)
        for index, address in entry.recipients:
            if index in states and states[index].state in (DELIVERED, FAILED):
                return f"attempted for {address}, who has it or failed"
    if queue.entries.get(entry.ident, entry.queue) is not entry:
        return "attempted by an entry that is not in the window"
    return ""


def disk(queue: Any) -> str:
    """What is inconsistent among the committed rows of a shard; "" when nothing is."""
    store = queue.store
    tables = store.tables
    messages: Counter[int] = Counter()
    octets: Counter[int] = Counter()
    deferred: Counter[int] = Counter()
    held: Counter[int] = Counter()
    live: Counter[int] = Counter()
    due: dict[int, list[tuple[int, int]]] = {}
    expiry, holds = set(), set()
    with store.env.begin() as txn:
        rows = dict(store._rows(txn, 0))
        inlined = store.fresh.live()
        both = {ident for ident, _ in inlined} & set(rows)
        if both:
            return f"both inlined and not: {both}"
        for ident, envelope in rows.items():
            if not envelope.placements:
                return f"{ident:x} is in no queue"
            for place in envelope.placements:
                messages[place.queue] += 1
                octets[place.queue] += envelope.size
                deferred[place.queue] += place.attempts > 0
                if envelope.flags & HELD:
                    held[place.queue] += 1
                    holds.add((place.queue, ident))
                else:
                    due.setdefault(place.queue, []).append((place.due, ident))
            if not envelope.flags & HELD:
                expiry.add((envelope.deadline, ident))
        for _, envelope in [*rows.items(), *inlined]:
            if envelope.body is not None and envelope.body.segment:
                live[envelope.body.segment] += 1
        known = {row.number: row for row in store.queues(txn)}
        for number, row in known.items():
            counted = (messages[number], octets[number], deferred[number], held[number])
            if counted != (row.messages, row.bytes, row.deferred, row.held):
                return f"queue {row.name}: counts {(row.messages, row.bytes, row.deferred, row.held)}, holds {counted}"
        waiting = {place.queue for _, envelope in inlined for place in envelope.placements} | set(messages)
        if waiting - set(known):
            return f"mail in queues without a row: {waiting - set(known)}"
        on_disk = {DUE.unpack(key) for key, _ in txn.cursor(db=tables["due"])}
        if on_disk != {(number, when, ident) for number, pairs in due.items() for when, ident in pairs}:
            return "due rows are not those of the messages"
        if {EXPIRY.unpack(key) for key, _ in txn.cursor(db=tables["expiry"])} != expiry:
            return "expiry rows are not those of the messages"
        if {HELD_KEY.unpack(key) for key, _ in txn.cursor(db=tables["held"])} != holds:
            return "held rows are not those of the messages"
        wakes = {
            (max(0 if known[number].moved else min(pairs)[0], known[number].not_before, 1), number)
            for number, pairs in due.items()
        }
        if {WAKE.unpack(key) for key, _ in txn.cursor(db=tables["wake"])} != wakes:
            return "wake rows are not those of the queues"
    segments = {number: row.live for number, row in store.segments().items()}
    missing = [number for number in segments if number not in queue.segments._segments]
    if missing:
        return f"rows of segments that are removed: {missing}"
    for number in set(segments) | set(live):
        if segments.get(number, 0) != live[number]:
            return f"segment {number}: counts {segments.get(number)}, holds {live[number]}"
    return ""


def overlooked(queue: Any) -> set[tuple[int, int]]:
    """(id, queue) of what is due on disk, is not in the window, and could be: a scan should read it."""
    window, schedule, now = queue.entries, queue.schedule, queue.clock.now()
    if window.paused or queue.writer.stalled or window.scanned > window.half // 2:
        return set()
    found = set()
    with queue.store.env.begin() as txn:
        for key, _ in txn.cursor(db=queue.store.tables["wake"]):
            moment, number = WAKE.unpack(key)
            if moment > now:
                break
            row = queue.store.queue(txn, number)
            if number in schedule.skip or window.claimed_queue(number) or row is None:
                continue
            for due, ident in queue.store.due(txn, number):
                if (due <= now or row.moved) and not window.has(ident, number):
                    found.add((ident, number))
    return found


def memory(queue: Any) -> str:
    """What is inconsistent in the window."""
    window = queue.entries
    entries = list(window._entries.values())
    scanned = sum(entry.scanned for entry in entries)
    octets = sum(entry.octets for entry in entries)
    if (window.fresh, window.scanned) != (len(entries) - scanned, scanned):
        return f"the window counts {(window.fresh, window.scanned)}, holds {(len(entries) - scanned, scanned)}"
    if window.octets != octets:
        return f"the window counts {window.octets} octets, holds {octets}"
    return ""


def slots(workers: list[Any], limits: Any) -> str:
    """Whether the connections that are counted are those that exist."""
    total, busy = 0, False
    for worker in workers:
        if worker.up or worker.stopping:
            dispatcher = worker.dispatcher
            opened = dict(dispatcher.sessions)
            pools = {id(pool): pool for pool in [*dispatcher.pools.values(), *opened.values()]}
            total += len(opened) + sum(pool.connecting for pool in pools.values())
            busy = busy or bool(dispatcher.tasks._running)
            for pool in pools.values():
                if pool.sessions != {session for session, its in opened.items() if its is pool}:
                    return f"{pool.key} has other sessions than those that are in it"
    taken = limits.taken("out")
    if taken < total or (taken != total and not busy):
        return f"{taken} connections are counted, {total} exist"
    return ""


def leftovers(worker: Any) -> str:
    """What is left after all mail has ended."""
    found = []
    queue = worker.queue
    if len(queue.entries):
        found.append(f"{len(queue.entries)} entries in the window")
    marked = [ident for ident in worker.in_flight._cells.values() if ident]
    if marked:
        found.append(f"marked as in flight: {marked}")
    if contents(queue.store):
        found.append(f"on disk: {[f'{ident:x}' for ident in contents(queue.store)]}")
    if queue.segments.usage()[1]:
        found.append(f"{queue.segments.usage()[1]} live octets in segments")
    big = queue.segments.big_files()
    if big:
        found.append(f"files of large messages: {big}")
    if len(worker.dispatcher.sessions) or any(pool.connecting for pool in worker.dispatcher.pools.values()):
        found.append("connections")
    return ", ".join(found)
