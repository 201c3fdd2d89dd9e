"""The answers to the requests of the command line, which come over the control socket: by the supervisor itself, or by workers.

No worker can delay an answer beyond its row's seconds, or make it fail: one that is starting, has died, is stopped or late is
named in the answer as missing.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relaymta import __version__
from relaymta.control import Answer, Late, converse, sentence
from relaymta.control.requests import (
    REQUESTS,
    Clearing,
    HistoryPiece,
    Known,
    Learned,
    MailboxAddress,
    MailboxAlias,
    MailboxChange,
    MailboxCreate,
    MailboxDelete,
    MailboxImport,
    MailboxMove,
    MailboxRename,
    MailboxRestore,
    MailboxRestored,
    Nothing,
    OfAccount,
    OfMessage,
    OfWebhook,
    Policy,
    Replaying,
    Request,
    SieveChange,
    Suppression,
    SuppressionOf,
    SuppressionPage,
    SuppressionPut,
    SuppressionRemove,
    Suspension,
    Upgrading,
    Where,
)
from relaymta.errors import RelayError
from relaymta.filter.lessons import KEY
from relaymta.history import history_files, history_piece
from relaymta.ident import format_id, parse_id, shard_of
from relaymta.log import find_history
from relaymta.metrics import RESULTS, activity, readings
from relaymta.node import DEAD, HOLD, SUSPENDED, TOKEN, SiteState, site_state_row
from relaymta.privileges import peer_of
from relaymta.route.sites import counted_as
from relaymta.send.policies import filter_of
from relaymta.store.directory import User
from relaymta.store.directory import row_of as row_of_user
from relaymta.supervisor.readiness import reasons
from relaymta.supervisor.slots import Slot
from relaymta.supervisor.tracing import live
from relaymta.suppression import address_of, counted, done, entries_of, row_of, rows_of

if TYPE_CHECKING:
    from relaymta.supervisor import Supervisor
    from relaymta.supervisor.mailboxes import MachineMailboxes

__all__ = ["Answers", "serve_cli", "usage"]

_STARTED = time.monotonic()  # the process is as old as its modules
METRICS_SECONDS = 1.5  # a scrape waits for a worker's rows
COMPLAINED_SECONDS = 10.0  # for a worker to note complaints


async def serve_cli(supervisor: "Supervisor", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection of the CLI: answer its requests in order."""

    def failed(op: str, error: Exception) -> None:
        supervisor.log.event("warning", text=f"request {op!r} of the command line: {sentence(error)}")

    uid = peer_of(writer.get_extra_info("socket")).uid
    answers = Answers(supervisor, uid)

    async def permitted(op: str, args: dict[str, Any]) -> Answer:
        changes = op in REQUESTS and REQUESTS[op].changes and op not in ("upgrade", "reload")
        if changes and supervisor.upgrade.settling:
            raise RelayError("an upgrade is being completed: try again in a moment")
        return await answers(op, args)

    async def answer(op: str, args: dict[str, Any], by: list[str]) -> Answer:
        return await supervisor.audit(permitted, uid, op, args, by)

    await converse(reader, writer, answer, failed)


async def usage(supervisor: "Supervisor") -> list[dict[str, Any]]:
    """For /metrics: the use of accounts' quotas."""
    answer = await Answers(supervisor).by_any(REQUESTS["usage"], Nothing(), METRICS_SECONDS)
    return answer.value  # type: ignore[no-any-return]


class Answers:
    """Answers requests. A method for each that the table gives to the supervisor; the others are passed on to workers."""

    def __init__(self, supervisor: "Supervisor", uid: int = -1) -> None:
        """`uid`: who asks (-1: not known)."""
        self._supervisor = supervisor
        self._uid = uid
        self._slots = supervisor.slots

    async def __call__(self, op: str, args: dict[str, Any]) -> Answer:
        """The answer to a request. RelayError when there is no such request, an argument is wrong, or it was refused."""
        row = REQUESTS.get(op)
        if row is None:
            raise RelayError(f"no such request: {op}")
        arguments = row.read(args)
        if hasattr(arguments, "uid"):
            arguments = msgspec.structs.replace(arguments, uid=self._uid)
        return await _BY[row.where](self, row, arguments)

    # By workers

    async def _ask(self, slot: Slot, row: Request, args: Any, seconds: float) -> Any:
        if not slot.ready or slot.channel is None:
            raise ConnectionError(f"worker {slot.number} is not ready")
        return await slot.channel.ask(row.name, None, seconds or row.seconds, **msgspec.to_builtins(args))

    async def _each(
        self, slots: Iterable[Slot], row: Request, args: Any, seconds: float = 0
    ) -> tuple[list[tuple[Slot, Any]], list[int]]:
        """The workers' answers, asked side by side, and the numbers of those without one. RelayError when one refuses."""
        asked = list(slots)
        answers = await asyncio.gather(*(self._ask(slot, row, args, seconds) for slot in asked), return_exceptions=True)
        found, missing = [], []
        for slot, answer in zip(asked, answers, strict=True):
            if isinstance(answer, ConnectionError):
                missing.append(slot.number)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found.append((slot, answer))
        return found, missing

    async def by_all(self, row: Request, args: Any, seconds: float = 0) -> Answer:
        """All workers' answers, merged. `seconds`: for each of them, instead of the row's."""
        assert row.merge is not None
        found, missing = await self._each(self._slots, row, args, seconds)
        return Answer(row.merge([answer for _, answer in found], args), missing)

    async def by_any(self, row: Request, args: Any, seconds: float = 0) -> Answer:
        """The answer of the first worker that gives one. RelayError when none does."""
        for slot in self._slots:
            with contextlib.suppress(ConnectionError):
                return Answer(await self._ask(slot, row, args, seconds), [])
        raise RelayError("no worker answers")

    async def _by_owner(self, row: Request, args: Any) -> Answer:
        owner = next((slot for slot in self._slots if args.shard in slot.shards), None)
        if owner is None:
            raise RelayError(f"there is no shard {args.shard}")
        found, missing = await self._each([owner], row, args)
        return Answer(found[0][1] if found else None, missing)

    async def _by_first(self, row: Request, args: OfMessage) -> Answer:
        """The answer of the worker that has a message; None when none has it."""
        asked = REQUESTS["message"] if row.pieces else row
        home = shard_of(_number(args.ident))
        missing: list[int] = []
        for here in (True, False):
            found, away = await self._each((slot for slot in self._slots if (home in slot.shards) == here), asked, args)
            for slot, answer in found:
                if answer is not None:
                    return Answer(self._pieces(slot, row, args) if row.pieces else answer, [])
            missing += away
        return Answer(None, missing)

    async def _pieces(self, slot: Slot, row: Request, args: Any) -> AsyncGenerator[Any, None]:
        if not slot.ready or slot.channel is None:
            raise Late(f"worker {slot.number} is not ready")
        async with aclosing(slot.channel.stream(row.name, row.seconds, **msgspec.to_builtins(args))) as pieces:
            async for piece in pieces:
                yield piece

    async def by_each(self, row: Request, args: Any) -> Answer:
        """The pieces of all workers' answers: those of one worker behind those of another."""
        missing: list[int] = []
        return Answer(self._pieces_of_each(row, args, missing), missing)

    async def _pieces_of_each(self, row: Request, args: Any, missing: list[int]) -> AsyncGenerator[Any, None]:
        """All are asked at once, so that several who are late delay the answer no more than one. `missing`: gets the numbers of
        those whose part is not there, or not all of it."""
        loop = asyncio.get_running_loop()
        streams = [(slot, self._pieces(slot, row, args)) for slot in self._slots]
        firsts = [loop.create_task(_next(pieces)) for _, pieces in streams]
        try:
            for (slot, pieces), first in zip(streams, firsts, strict=True):
                try:
                    piece = await first
                    while piece is not None:
                        yield piece
                        piece = await _next(pieces)
                except ConnectionError:
                    missing.append(slot.number)
        finally:
            for first in firsts:
                first.cancel()
            await asyncio.gather(*firsts, return_exceptions=True)
            for _, pieces in streams:
                await pieces.aclose()

    async def by_live(self, row: Request, args: Any) -> Answer:
        """What all workers say, as it comes, without end."""
        return Answer(live(self._slots, row, args), [])

    # By the supervisor

    async def _by_supervisor(self, row: Request, args: Any) -> Answer:
        found = await getattr(self, row.name)(args)
        return found if isinstance(found, Answer) else Answer(found, [])

    async def status(self, args: Nothing) -> Answer:
        """The processes. A worker's row has what the worker says of itself, where it answers; `totals` are of all workers."""
        supervisor = self._supervisor
        found, missing = await self._each(self._slots, REQUESTS["status"], args)
        answers = {slot.number: answer for slot, answer in found}
        rows = []
        for slot in self._slots:
            ready = slot.number in answers
            state = "ready" if ready else "late" if slot.ready else str(slot.state)
            own = {"worker": slot.number, "ready": ready, "state": state, "restarts": max(0, slot.lives - 1)}
            rows.append(own | answers.get(slot.number, {}))
        counted = [supervisor.shared.counters(slot.number) for slot in self._slots]
        value = {
            "version": __version__,
            "pid": os.getpid(),
            "stopping": supervisor.stopping.is_set(),
            "uptime": round(time.monotonic() - _STARTED, 1),
            "totals": {name: sum(one.get(cell) for one in counted) for name, cell in RESULTS.items()},
            "listeners": [listener.address for listener in supervisor.config.listener],
            "spool": _absolute(supervisor.config.spool),
            "durability": "250 only after fdatasync of the message data and a synced LMDB commit",
            "metrics": supervisor.config.metrics.listen,
            "workers": rows,
        }
        return Answer(value, missing)

    async def activity(self, args: Nothing) -> dict[str, Any]:
        """As `metrics.activity`, of all workers; they are not asked."""
        return activity([self._supervisor.shared.counters(slot.number) for slot in self._slots])

    async def readiness(self, args: Nothing) -> list[dict[str, str]]:
        """As `readiness.reasons`."""
        return reasons(self._slots, self._supervisor.shared, self._supervisor.stopping)

    async def readings(self, args: Nothing) -> dict[str, Any]:
        """As `metrics.readings`, and the time (seconds UTC)."""
        blocks = [self._supervisor.shared.counters(slot.number) for slot in self._slots]
        return {"time": time.time(), **readings(blocks)}

    async def shards(self, args: Nothing) -> Answer:
        """The numbers of the shards whose workers are ready."""
        ready = [slot for slot in self._slots if slot.ready]
        away = [slot.number for slot in self._slots if not slot.ready]
        return Answer(sorted(shard for slot in ready for shard in slot.shards), away)

    async def history(self, args: OfMessage) -> list[dict[str, Any]]:
        """As `log.find_history`."""
        folder = Path(self._supervisor.config.spool) / "history"
        return await asyncio.to_thread(find_history, folder, format_id(_number(args.ident)))

    async def history_files(self, args: Nothing) -> list[tuple[str, int]]:
        """As `history.history_files`."""
        return await asyncio.to_thread(history_files, Path(self._supervisor.config.spool) / "history")

    async def history_piece(self, args: HistoryPiece) -> bytes:
        """As `history.history_piece`."""
        folder = Path(self._supervisor.config.spool) / "history"
        return await asyncio.to_thread(history_piece, folder, args.name, args.end)

    async def abuse(self, args: Nothing) -> list[dict[str, Any]]:
        """As `Accounts.rows`."""
        return self._supervisor.abuse.rows()

    async def abuse_why(self, args: OfAccount) -> dict[str, Any]:
        """As `Accounts.why`."""
        return self._supervisor.abuse.why(args.account)

    async def abuse_clear(self, args: OfAccount) -> list[dict[str, Any]]:
        """As `Accounts.clear`."""
        return self._supervisor.abuse.clear(args.account, args.check)

    async def webhooks(self, args: Nothing) -> list[dict[str, Any]]:
        """As `report.serving.Reporter.rows`; nothing where there are none."""
        supervisor = self._supervisor
        if not supervisor.config.webhook:
            return []
        found: list[dict[str, Any]] = await supervisor.reports.ask("rows", 5)
        return found

    async def webhook_test(self, args: OfWebhook) -> dict[str, Any]:
        """As `Reporter.test`."""
        found: dict[str, Any] = await self._supervisor.reports.ask("test", 305, name=args.name)
        return found

    async def webhook_replay(self, args: Replaying) -> dict[str, Any]:
        """As `Reporter.replay`."""
        found: dict[str, Any] = await self._supervisor.reports.ask("replay", 55, **msgspec.to_builtins(args))
        return found

    async def lessons(self, args: Known) -> list[bool]:
        """Of each text, whether it was last learned as this."""
        return self._supervisor.machine.lessons.known(args.keys, args.spam)

    async def learned(self, args: Learned) -> None:
        """A filter has learned a text."""
        if len(args.key) != KEY:
            raise RelayError(f"learned: a key has {KEY} octets")
        self._supervisor.machine.lessons.learned(args.key, args.spam)

    # The suppression list

    async def suppression_counts(self, args: Nothing) -> dict[str, Any]:
        """How many entries there are."""
        return counted(await self._supervisor.suppressing.count())

    async def suppression_find(self, args: SuppressionOf) -> list[dict[str, Any]]:
        """The entries of an address."""
        return [row_of(entry) for entry in await self._supervisor.suppressing.find(address_of(args.address))]

    async def suppression_page(self, args: SuppressionPage) -> dict[str, Any]:
        """A page of entries."""
        suppressing = self._supervisor.suppressing
        return rows_of(await suppressing.page(args.after, args.most, args.application, args.prefix, args.reason))

    async def suppression_put(self, args: SuppressionPut) -> dict[str, int]:
        """Add entries."""
        by = f"operator (uid {args.uid})" if args.uid >= 0 else "operator"
        suppressing = self._supervisor.suppressing
        found = done(await suppressing.put(entries_of(args.rows, by, suppressing.lasting)))
        await self._complained([row for row in args.rows if row.reason == "complaint" and not row.since])  # now
        return found

    async def _complained(self, rows: list[Suppression]) -> None:
        """Have it noted in a journal of events that these recipients have complained: webhooks are told."""
        if not rows or not self._supervisor.config.webhook:
            return
        told = [(row.address, row.application, row.text) for row in rows]
        for slot in self._slots:
            if slot.ready and slot.channel is not None:
                with contextlib.suppress(ConnectionError):
                    await slot.channel.ask("complained", None, COMPLAINED_SECONDS, rows=told)
                    return
        raise RelayError("the entries were added, but no worker could note for webhooks that they have complained")

    async def suppression_remove(self, args: SuppressionRemove) -> int:
        """Remove entries; how many."""
        return await self._supervisor.suppressing.remove(list(map(address_of, args.addresses)), args.application)

    async def site_states(self, args: Nothing) -> list[dict[str, Any]]:
        """All site states but secrets, as `node.site_state_row` shows them."""
        states = self._supervisor.machine.states
        shown = sorted((state for state in states if state.kind != TOKEN), key=lambda state: state.key)
        return [site_state_row(state, states) for state in shown]

    async def suspend(self, args: Suspension) -> dict[str, Any]:
        """Suspend a site, or an application's mail. `site`: the name by which it is counted; `known`: it is configured."""
        if not args.site and not args.about:
            raise RelayError("suspend: which site, or which application's mail?")
        found = counted_as(self._supervisor.config, args.site)
        if len(found) > 1 and args.site not in found:
            raise RelayError(f"{args.site} belongs to several sites: {', '.join(sorted(found))}: name one of them")
        if not found and any(route.label == args.site and not route.hosts for route in self._supervisor.config.route):
            raise RelayError(f"{args.site} is a route without hosts of its own: name one of its sites (`relaymta site list`)")
        site = args.site if args.site in found or not found else found.pop()
        self._decided(SiteState(SUSPENDED, site, args.about, *_lasting(args.seconds), "operator", args.reason))
        return {"site": site, "known": site != args.site or bool(found)}

    async def policy(self, args: Policy) -> None:
        """Set a hold or bounce policy."""
        try:
            filter_of(args.about)
        except ValueError as error:
            raise RelayError(str(error)) from None
        if args.kind == HOLD:
            self._not_ours(args.about)
        self._decided(SiteState(args.kind, args.about, "", *_lasting(args.seconds), "operator", args.reason))

    def _not_ours(self, about: str) -> None:
        """RelayError where a hold policy belongs to a finding about an account."""
        why = self._supervisor.abuse.suspended_by_us(about)
        if why:
            raise RelayError(f"{why}: `relaymta abuse clear {about}` ends that")

    def _decided(self, state: SiteState) -> None:
        """Set and log a state that an operator has decided."""
        self._supervisor.machine.set_site_state(state, state.key)
        self._supervisor.log.event(
            "shaping", site=state.site, tenant=state.about, action=state.kind, by=state.by, reply=state.reason, until=state.until,
            ends=state.until / 1000,
        )  # fmt: skip

    async def clear(self, args: Clearing) -> int:
        """Remove states; how many."""
        if bool(args.kind) == args.resume:
            raise RelayError("clear: either a kind, or resume")
        if args.kind == HOLD:
            self._not_ours(args.site)
        kinds = [SUSPENDED, DEAD] if args.resume else [args.kind]
        names = {args.site}
        if args.resume and len(found := counted_as(self._supervisor.config, args.site)) == 1:
            names |= found
        keys = [(kind, site, args.about) for kind in kinds for site in names]
        return sum(self._supervisor.machine.set_site_state(None, key) for key in keys)

    # Mailboxes

    def _mail(self) -> "MachineMailboxes":
        found = self._supervisor.mail
        if found is None:
            hint = 'no route has protocol = "mailbox"'
            raise RelayError(f"no mailboxes are kept here: {hint} (a new one needs a restart)")
        return found

    async def mailbox_create(self, args: MailboxCreate) -> dict[str, Any]:
        """As `MachineMailboxes.create`."""
        config = self._supervisor.config
        return row_of_user(await self._mail().create(config, args.address, args.password, args.octets, args.messages))

    async def mailbox_rename(self, args: MailboxRename) -> dict[str, Any]:
        """As `MachineMailboxes.rename`."""
        return row_of_user(await self._mail().rename(self._supervisor.config, args.address, args.new))

    async def mailbox_delete(self, args: MailboxDelete) -> dict[str, Any]:
        """As `Upkeep.delete`."""
        return row_of_user(await self._mail().upkeep.delete(args.address, args.now, self._supervisor.config.mailboxes.subaddress))

    async def mailbox_move(self, args: MailboxMove) -> dict[str, Any]:
        """As `Upkeep.move`. `moved`: False where the user was there already."""
        mail = self._mail()
        before = await asyncio.to_thread(mail.directory.known, args.address)
        found = await mail.upkeep.move(args.address, args.shard)
        return row_of_user(found) | {"moved": before.moving >= 0 or before.shard != found.shard}

    async def mailbox_import(self, args: MailboxImport) -> list[str]:
        """As `Mailboxes.import_messages`, for a user by address."""
        return list(await self._mail().owner_of(args.address, "mail_import", name=args.name, messages=args.messages))

    async def mailbox_owner(self, args: MailboxAddress) -> dict[str, Any]:
        """The user who has an address. NoSuch."""
        directory = self._mail().directory
        found = await asyncio.to_thread(directory.owner, args.address)
        return row_of_user(found[0] if found is not None else await asyncio.to_thread(directory.known, args.address))

    async def mailbox_begin_restore(self, args: MailboxAddress) -> tuple[int, int, int]:
        """As `MachineMailboxes.begin_restore`."""
        return await self._mail().begin_restore(self._supervisor.config, args.address)

    async def mailbox_restore(self, args: MailboxRestore) -> list[int]:
        """As `Shard.take`, in the shard that `mailbox_begin_restore` named."""
        found = await self._mail().owner("mail_take", 120.0, shard=args.shard, user=args.ident, part=args.part)
        return list(found)

    async def mailbox_end_restore(self, args: MailboxRestored) -> list[str]:
        """As `MachineMailboxes.end_restore`."""
        return await self._mail().end_restore(self._supervisor.config, msgspec.convert(args.user, User), args.addresses)

    async def mailbox_alias(self, args: MailboxAlias) -> None:
        """As `Directory.set_alias`."""
        await self._mail().alias(self._supervisor.config, args.address, args.targets)

    async def sieve_change(self, args: SieveChange) -> None:
        """A change of a user's Sieve scripts."""
        words = [args.name, args.text] if args.what == "put_script" else [args.name]
        await self._mail().owner_of(args.address, "mail_script", what=args.what, args=words)

    async def mailbox_change(self, args: MailboxChange) -> dict[str, Any]:
        """Change a user's row."""
        changes = {key: value for key, value in msgspec.to_builtins(args.changes).items() if value is not None}
        return row_of_user(await self._mail().change(args.address, changes))

    async def upgrade(self, args: Upgrading) -> dict[str, Any]:
        """As `Upgrade.run`."""
        return await self._supervisor.upgrade.run(args.program, args.seconds)

    async def reload(self, args: Nothing) -> str:
        """As `Supervisor.reload`. RelayError while the relay stops. During an upgrade it waits for that, and the program that is
        in charge then does it."""
        await self._supervisor.upgrade.over()
        if self._supervisor.upgrade.pid:
            return str(await self._supervisor.upgrade.passed_on("reload"))
        if self._supervisor.stopping.is_set():
            raise RelayError("the relay is stopping")
        return await self._supervisor.reload()


_BY: dict[Where, Callable[[Answers, Request, Any], Awaitable[Answer]]] = {
    Where.SUPERVISOR: Answers._by_supervisor,
    Where.OWNER: Answers._by_owner,
    Where.FIRST: Answers._by_first,
    Where.ANY: Answers.by_any,
    Where.ALL: Answers.by_all,
    Where.EACH: Answers.by_each,
    Where.LIVE: Answers.by_live,
}


async def _next(pieces: AsyncGenerator[Any, None]) -> Any:
    return await anext(pieces, None)


def _number(ident: str) -> int:
    try:
        return parse_id(ident)
    except ValueError as error:
        raise RelayError(str(error)) from None


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # looks at no file


def _lasting(seconds: float) -> tuple[int, int]:
    """(since, until) of a state that begins now."""
    now = time.time_ns() // 1_000_000
    return now, now + int(seconds * 1000)
