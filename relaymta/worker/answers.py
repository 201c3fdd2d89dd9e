"""A worker's answers to the requests of the command line, which the supervisor passes on."""

import os
import resource
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from relaymta.control import sentence
from relaymta.control.filters import Filter
from relaymta.control.requests import (
    REQUESTS,
    Change,
    Exported,
    ImportData,
    ImportMessage,
    Messages,
    Move,
    Nothing,
    OfMessage,
    OfUser,
    Page,
    Queues,
    Trace,
)
from relaymta.disk.writer import GroupWriter
from relaymta.errors import NoSuch, RelayError
from relaymta.proto.address import plain
from relaymta.proto.printable import printable
from relaymta.queue import parse_id
from relaymta.queue.changes import BY, OPERATOR
from relaymta.queue.exported import read
from relaymta.queue.quarantine import Release
from relaymta.send.explain import explain, goes_to, site_rows, throttled
from relaymta.trace import Line
from relaymta.worker.tracing import lines

if TYPE_CHECKING:
    from relaymta.filter.chain import Chains
    from relaymta.worker import Shard, Worker
    from relaymta.worker.mail import Mail

__all__ = ["Answers", "answer"]


async def answer(worker: "Worker", op: str, args: dict[str, Any]) -> Any:
    """The answer to a request of the table. RelayError when there is no such request, an argument is wrong, or it is refused; a
    bug is logged."""
    row, handler = REQUESTS.get(op), getattr(Answers, op, None)
    if row is None or handler is None:
        raise RelayError(f"no such request: {op}")
    arguments = row.read(args)
    try:
        return await handler(Answers(worker), arguments)
    except (RelayError, ConnectionError):
        raise
    except Exception as error:
        worker.log.event("warning", text=f"request {op!r} of the command line: {sentence(error)}")
        raise


def operator(args: Change | Move | Exported) -> str:
    """Who asks for a change, for the log."""
    return (
        BY.get(args.verb, "")
        if isinstance(args, Change) and args.verb in BY
        else f"operator (uid {args.uid})"
        if args.uid >= 0
        else OPERATOR
    )


class Answers:
    """A method for each request that the table gives to workers, and `status` for the supervisor's."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._shards = worker.shards

    def _shard(self, number: int) -> "Shard":
        if number not in self._shards:
            raise RelayError(f"shard {number} is not open")
        return self._shards[number]

    async def summary(self, args: Nothing) -> list[Any]:
        """As `inspect.summary`, of all shards."""
        return [row for shard in self._shards.values() for row in await shard.queue.summary()]

    async def shape(self, args: Nothing) -> list[Any]:
        """As `inspect.shape`, of all shards."""
        return [row for shard in self._shards.values() for row in await shard.queue.shape()]

    async def page(self, args: Page) -> Any:
        """As `listing.page`."""
        one = self._shard(args.shard)
        return await one.queue.page(Filter.of(args.chosen), args.after, partial(goes_to, one.dispatcher))

    async def change(self, args: Change) -> Any:
        """Apply a verb to messages: (changed, in flight). RelayError when there is no such route."""
        one = self._shard(args.shard)
        if args.verb == "reroute" and args.word not in self._worker.routes.labels:
            raise self._no_route(args.word)
        word: str | Release = args.word
        if args.verb == "release quarantined":
            word = self._released(args)
        try:
            result = await one.queue.change_messages(args.verb, args.idents, word, operator(args))
        finally:
            if args.verb == "policy":  # some may be held even after an error
                one.dispatcher.policies.held(args.word)
        if args.verb == "flush":
            one.dispatcher.flush()
            await one.queue.wake_queues()
        return result

    def _released(self, args: Change) -> Release:
        """Who releases a message to others sends it to them, and gets its DSNs."""
        intake = self._worker.intake
        assert intake is not None
        found = [plain(one) or "" for one in args.recipients]
        if not all(found):
            raise RelayError(f"{printable(args.recipients[found.index('')])!r} is not an address")
        recipients = intake.readdressed(found) if found else []
        return Release(recipients, intake.postmaster, args.unscanned)

    async def move(self, args: Move) -> Any:
        """Move all messages of whole queues to a route: (messages matched, those in flight). None when the filter does not match
        whole queues, or the route has no hosts of its own. RelayError when there is no such route."""
        wanted, route = Filter.of(args.chosen), self._worker.routes.named(args.word)
        if route is None:
            raise self._no_route(args.word)
        if wanted.until or not (wanted.whole_queues and route.hosts):  # without hosts, the queue depends on the domain
            return None
        messages, in_flight = 0, 0
        for shard in self._shards.values():
            one, at_site = shard.dispatcher, partial(goes_to, shard.dispatcher)
            found = await shard.queue.move_queues(
                wanted, at_site, partial(self._worker.routes.by_route, route), args.dry_run, operator(args)
            )
            one.forget_parked()
            messages, in_flight = messages + found[0], in_flight + found[1]
        return messages, in_flight

    async def routes(self, args: Nothing) -> list[str]:
        """The names of all routes."""
        return self._worker.routes.labels

    def _no_route(self, word: str) -> NoSuch:
        return NoSuch("route", word, self._worker.routes.labels)

    async def throttled(self, args: Queues) -> Any:
        """Of `queues`: how many messages the limits of sites delay, and until when (seconds UTC)."""
        found = [(0, 0.0)]
        for shard in self._shards.values():
            names = {name: args.queues[str(name)] for name in await shard.queue.names() if str(name) in args.queues}
            found.append(throttled(shard.dispatcher, names))
        return max(found)

    async def message(self, args: OfMessage) -> Any:
        """As `listing.message`; None when no shard has it."""
        for shard in self._shards.values():
            found = await shard.queue.message(parse_id(args.ident))
            if found is not None:
                return found
        return None

    async def explain(self, args: OfMessage) -> Any:
        """As `send.explain.explain`; None when no shard has it."""
        for shard in self._shards.values():
            found = await explain(shard.dispatcher, parse_id(args.ident), self._waits_for)
            if found is not None:
                return found
        return None

    def _waits_for(self, names: list[str]) -> str:
        """What filters do that have not looked at a message in the queue."""
        if not names:  # none is to look at it: it is to be signed
            return "its DKIM signature"
        chains = self._chains()
        told = [f"filter {name}, which is not configured any more" for name in names] if chains is None else chains.told(names)
        return "; ".join(told)

    async def raw(self, args: OfMessage) -> AsyncGenerator[bytes, None]:
        """A message's data in pieces; none when no shard has it."""
        return self._raw(parse_id(args.ident))

    async def _raw(self, ident: int) -> AsyncGenerator[bytes, None]:
        for shard in self._shards.values():
            async with aclosing(shard.queue.raw(ident)) as pieces:
                async for piece in pieces:
                    yield piece

    async def subjects(self, args: Messages) -> list[str | None]:
        """As `raw.subjects`."""
        return await self._shard(args.shard).queue.subjects(args.idents)

    async def sites(self, args: Nothing) -> list[Any]:
        """As `send.explain.site_rows`, of all shards."""
        return [row for shard in self._shards.values() for row in await site_rows(shard.dispatcher)]

    async def records(self, args: Messages) -> list[tuple[int, str, bytes]]:
        """As `exported.records`."""
        return await self._shard(args.shard).queue.records(args.idents)

    async def exported(self, args: Exported) -> list[tuple[int, str]]:
        """As `Changes.delete_unchanged`: (id, what has become of it)."""
        found = await self._shard(args.shard).queue.delete_unchanged(dict(args.messages), operator(args))
        return list(found.items())

    async def import_data(self, args: ImportData) -> str:
        """As `Importing.data`."""
        return await self._shard(args.shard).queue.importing.data(args.ident, args.at, args.data)

    async def import_message(self, args: ImportMessage) -> str:
        """As `Importing.message`."""
        known = self._worker.routes.labels.__contains__
        return await self._shard(args.shard).queue.importing.message(read(args.record), args.data, known, args.again)

    def _mail(self) -> "Mail":
        if self._worker.mail is None:
            raise RelayError("no mailboxes are kept here")
        return self._worker.mail

    async def sessions(self, args: OfUser) -> AsyncGenerator[list[dict[str, Any]], None]:
        """As `Mail.sessions`."""
        return self._mail().sessions(args.user)

    async def disconnect(self, args: OfUser) -> int:
        """As `view.sessions.disconnect`."""
        if not args.user:
            raise RelayError("disconnect: which user?")
        return await self._mail().disconnect(args.user)

    def _chains(self) -> "Chains | None":
        """The filters and the rules about mail; None: this worker has none."""
        acceptor = self._worker.acceptor
        return acceptor.endpoint.chains if acceptor is not None else None

    async def filters(self, args: Nothing) -> list[Any]:
        """As `Chains.rows`."""
        chains = self._chains()
        return chains.rows() if chains is not None else []

    async def rules(self, args: Nothing) -> list[Any]:
        """As `Chains.ruled`."""
        chains = self._chains()
        return chains.ruled() if chains is not None else []

    async def trace(self, args: Trace) -> AsyncGenerator[list[Line], None]:
        """As `tracing.lines`."""
        return lines(self._worker.tracer, args)

    async def usage(self, args: Nothing) -> list[Any]:
        """The use of accounts' quotas, which all workers share."""
        worker = self._worker
        if worker.acceptor is None or worker.intake is None:
            return []
        return worker.intake.quotas.usage(worker.acceptor.endpoint.logins.accounts)

    async def status(self, args: Nothing) -> dict[str, Any]:
        """What this worker says of itself."""
        acceptor, shards = self._worker.acceptor, self._shards.values()
        mail = self._worker.mail.shards.values() if self._worker.mail is not None else ()
        writers: list[GroupWriter[Any, Any, Any]] = [*(shard.queue.writer for shard in shards), *(shard.writer for shard in mail)]
        return {
            "pid": os.getpid(),
            "shards": list(self._shards),
            "connections": len(acceptor.connections) if acceptor else 0,
            "cpu": round(time.process_time(), 3),
            "rss": _resident(),
            "lag": round(acceptor.lateness.worst, 4) if acceptor else 0.0,
            "messages": sum(shard.totals.messages for shard in shards if shard.totals is not None),
            "traces": len(self._worker.tracer.watches),
            "in flight": sum(shard.dispatcher.in_flight() for shard in shards),
            "full": any(shard.queue.full for shard in shards) or any(shard.disk.full for shard in mail),
            "stalled": any(writer.stalled for writer in writers),
            "last store error": next((writer.last_error for writer in writers if writer.last_error), ""),
            "sites down": {
                pool.key: pool.reason for shard in shards for pool in shard.dispatcher.pools.values() if pool.failures
            },
        }


def _resident() -> int:
    """Octets of memory that this process has; without a descriptor to look, the most that it has had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
