"""IMAP commands about messages of the mailbox that is selected (RFC 3501 and 9051 6.4; RFC 3516, 4315, 6851, 7162)."""

from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import chain

from relaymta.errors import RelayError
from relaymta.metrics import index
from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Command, Copy, Expunge, Fetch, Search, Sort, Store, Thread
from relaymta.proto.imap_found import Found
from relaymta.proto.imap_program import Program
from relaymta.proto.imap_records import RECORD, chosen, load, packed, runs, values
from relaymta.proto.imap_resync import vanished_earlier
from relaymta.proto.mime import UnknownEncoding
from relaymta.store.asked import Copied, Partial
from relaymta.store.change import MISSING, Refusal
from relaymta.store.rows import SEEN
from relaymta.view import reading, search
from relaymta.view.access import RECORDS_ON_LOOP
from relaymta.view.connection import READ, READ_OCTETS
from relaymta.view.fetch import (
    Level,
    Plan,
    Sections,
    Text,
    described_now,
    plan_of,
    text_now,
    text_of,
    with_description,
)
from relaymta.view.incoming import SYSTEM
from relaymta.view.reader import Done, Reader, try_create
from relaymta.view.reading import Message, TooMuch
from relaymta.view.selected import ALL, Selected
from relaymta.view.sort import sorted_, threaded

__all__ = ["COMMANDS", "ranges_of"]

RECORDS = 20_000  # index records of one slice of a FETCH
ROWS = 256  # messages with their rows that a thread reads together
ROWS_ON_LOOP = 64
BODIES_ON_LOOP = 8
BODIES = 32  # messages whose data a thread reads together,
OCTETS = 256 << 10  # or until it is so much
STORED_TOGETHER = 100_000  # messages of a change: the answer, 48 octets for each, may come in one frame from another process

EXPUNGED = index("relaymta_mailbox_expunged_total")
DONE, FETCHED = Done("OK", "Done"), Done("OK", "Fetched")
EXPUNGE_ISSUED = Done("OK", "Some of the messages have been expunged", response.EXPUNGEISSUED)


async def noop(reader: Reader, command: Command) -> Done:
    """NOOP, CHECK, and the end of IDLE: what is new is told behind every command."""
    return DONE


async def unselect(reader: Reader, command: Command) -> Done:
    """UNSELECT (RFC 3691)."""
    reader.selected = None
    return Done("OK", "Unselected")


async def close(reader: Reader, command: Command) -> Done:
    """CLOSE: as UNSELECT, and messages with \\Deleted go, without a word of it."""
    selected = reader.chosen()
    if not selected.view.read_only:
        try:
            await _expunge(reader, selected, ALL)
        except Refusal as refusal:
            if refusal.code != MISSING or not reader.refresh():  # it has been deleted: it is closed all the same
                raise
    reader.selected = None
    return Done("OK", "Closed")


async def expunge(reader: Reader, command: Command) -> Done:
    """EXPUNGE, UID EXPUNGE (RFC 4315 2.1)."""
    arguments, selected = command.arguments, reader.chosen()
    assert isinstance(arguments, Expunge)
    view = selected.view
    some = await _expunge(reader, selected, ALL if arguments.numbers is None else view.ranges(arguments.numbers, True))
    if not (some and view.qresync):
        return Done("OK", "Expunged")
    if reader.behind():
        await reader.sync(True)
    return Done("OK", "Expunged", response.highestmodseq(view.highest))  # RFC 7162 3.2.7


async def _expunge(reader: Reader, selected: Selected, ranges: bytes) -> bool:
    """Whether there were any."""
    uids = await selected.marked(ranges)
    if uids:
        await reader.access.change(reader.user, "expunge", selected.mailbox, uids, True)
        reader.counters.add(EXPUNGED, len(uids))
        reader.log_change("expunge", selected.name, len(uids))
    return bool(uids)


# FETCH


async def fetch(reader: Reader, command: Command) -> Done:
    """FETCH, UID FETCH."""
    asked, selected = command.arguments, reader.chosen()
    assert isinstance(asked, Fetch)
    view = selected.view
    uids = view.targets(asked.numbers, asked.uid)
    plan = plan_of(asked, view)
    if asked.changed_since is not None:
        records, expunged = await selected.since(asked.changed_since)
        if asked.vanished:
            await reader.tell(await reader.worked_out(lambda: vanished_earlier(view, asked.numbers, expunged)))
        uids = load([chosen(records, runs(uids))]) if uids else b""
    fetched = _Fetching(reader, selected, plan)
    step, at = fetched.index if plan.level == Level.INDEX else fetched.rows, 0
    while at < len(uids):
        if at:
            await reader.pause()
        at = await step(uids, at)
    if fetched.unreadable:
        return Done("NO", "Some of the messages cannot be read now", response.UNAVAILABLE)
    if fetched.undecodable is not None:
        raise fetched.undecodable
    missing = fetched.found < len(uids) // 4 and not asked.uid
    return EXPUNGE_ISSUED if missing else FETCHED


class _Fetching:
    """One FETCH. `found`: messages that were there; `unreadable`: some could not be read; `undecodable`: why sections of some
    could not be made."""

    def __init__(self, reader: Reader, selected: Selected, plan: Plan) -> None:
        self._reader, self._selected, self._plan = reader, selected, plan
        self.found = 0
        self.unreadable = False
        self.undecodable: UnknownEncoding | None = None

    async def index(self, uids: bytes, at: int) -> int:
        """Tell what index records say of messages, by their packed UIDs from an offset on; the offset of those that are left."""
        reader, selected, plan = self._reader, self._selected, self._plan
        part = uids[at : at + RECORDS * 4]
        read = partial(reading.records_now, selected.shard, selected.mailbox, runs(part))
        few = len(part) <= RECORDS_ON_LOOP * 4
        records, reader.looked = await (reader.access.read_little(read) if few else reader.access.read(read))
        self.found += len(records) // RECORD.size
        await reader.tell(selected.view.lines(records, plan.tells_flags, plan.tells_modseq))
        if plan.tells_flags and (plan.tells_modseq or not selected.view.condstore):
            selected.view.told(records)
        return at + len(part)

    async def rows(self, uids: bytes, at: int) -> int:
        """As `index`, of what needs more than that."""
        plan, reader = self._plan, self._reader
        most = BODIES if plan.level == Level.DATA else ROWS
        part = uids[at : at + most * 4]
        now = None
        if len(uids) - at <= (BODIES_ON_LOOP if plan.level == Level.DATA else ROWS_ON_LOOP) * 4:
            read = partial(_read_now, self._selected, runs(part), plan)
            now, reader.looked = await reader.access.read_little(read)
        found = now if now is not None else await self._read(partial(_read, self._selected, runs(part), plan))
        for why in found.unreadable:
            self.unreadable = True
            reader.warn(why)
        self.undecodable = found.undecodable or self.undecodable
        self.found += found.count
        if plan.level == Level.DATA:
            await self._tell_data(found)
        else:
            told = [plan.response(self._selected.view, message, None, False) for message, _ in found.messages]
            await reader.tell(chain.from_iterable(told))
        return at + (len(part) if not found.last else (values(part).index(found.last) + 1) * 4)

    async def _read(self, read: "partial[_Found]") -> "_Found":
        """Messages by `_read`: the first one by itself, where it takes long."""
        access = self._reader.access
        try:
            return await access.read(read)
        except TooMuch:
            return await access.work(self._reader.user, partial(read, heavy=True))

    async def _tell_data(self, found: "_Found") -> None:
        """Tell of messages with their sections."""
        reader, view = self._reader, self._selected.view
        seen = await self._see([message for message, _ in found.messages]) if self._plan.sees else {}
        for number, (message, sections) in enumerate(found.messages):
            if number:
                await reader.pause()
            after = seen.get(message.uid)
            if after is not None:
                message = message._replace(flags=after[0], modseq=after[1])
            await reader.tell(self._plan.response(view, message, sections, after is not None))
        reader.counters.add(READ, len(found.messages))
        reader.counters.add(READ_OCTETS, sum([message.row.size for message, _ in found.messages]))

    async def _see(self, messages: list[Message]) -> dict[int, tuple[int, int]]:
        """Set \\Seen; (flags, MODSEQ) by UID of those that have got it."""
        unseen = [message.uid for message in messages if not message.flags & SEEN]
        if not unseen:
            return {}
        reader, selected = self._reader, self._selected
        try:
            stored = await reader.access.change(reader.user, "store_flags", selected.mailbox, unseen, "+", SEEN, [], None)
        except (RelayError, ConnectionError) as error:  # the client gets its messages all the same
            reader.warn(f"\\Seen could not be set: {error}")
            return {}
        await reader.tell([selected.view.learn(stored.keywords)])
        selected.view.changed_here(stored.before, stored.after)
        selected.view.told(stored.after)
        return {uid: (flags, modseq) for uid, _, flags, modseq in RECORD.iter_unpack(stored.after)}


class _Found:
    """Messages that were read, with their sections (None: none are asked for). `last`: the UID of the last one, where not all
    were; `count`: how many were there; `unreadable`: why some could not be read; `undecodable`: why sections of some cannot be
    made."""

    __slots__ = ("count", "last", "messages", "undecodable", "unreadable")

    def __init__(self) -> None:
        self.messages: list[tuple[Message, Sections | None]] = []
        self.last = self.count = 0
        self.unreadable: list[str] = []
        self.undecodable: UnknownEncoding | None = None

    def add(self, plan: Plan, message: Message, text: Text | None) -> None:
        """Refusal (LIMIT)."""
        try:
            self.messages.append((message, None if text is None else plan.sections(text)))
        except UnknownEncoding as error:
            self.undecodable = error
        self.count += 1


def _read_now(selected: Selected, ranges: bytes, plan: Plan) -> tuple[_Found | None, bytes | None]:
    """As `_read`, on the loop, None where something would have to be waited for, or take long; and as of `reading.raw_state`."""
    found, octets, level = _Found(), 0, plan.level
    messages, state = reading.messages_now(selected.shard, selected.mailbox, ranges)
    for message in messages:
        octets += message.row.size
        text = None
        if level == Level.DATA:
            text = text_now(selected.shard, message) if octets <= OCTETS else None
            if text is None or not plan.is_light(text):
                return None, state
        elif level == Level.DESCRIPTION and not described_now(message):
            return None, state
        found.add(plan, message, text)
    return found, state


def _read(selected: Selected, ranges: bytes, plan: Plan, heavy: bool = False) -> _Found:
    """Messages with what a FETCH needs of them, up to one of which that takes long to be found. TooMuch: this is the first one,
    for which (`heavy`) there is another thread. Refusal (LIMIT)."""
    found, octets, last = _Found(), 0, 0
    for message in reading.messages(selected.shard, selected.mailbox, ranges):
        text = None
        if not heavy and plan.is_heavy(message):
            if not last:
                raise TooMuch
            found.last = last
            break
        last = message.uid
        try:
            if plan.level >= Level.DESCRIPTION:
                message = with_description(selected.shard, message)
            if plan.level == Level.DATA:
                text = text_of(selected.shard, message)
        except Refusal:
            continue  # it has been expunged
        except RelayError as error:
            found.unreadable.append(f"message {message.uid} of {selected.name}: {error}")
            found.count += 1
            continue
        found.add(plan, message, text)
        octets += len(text.data or b"") if text is not None else _described_octets(message)
        if octets >= OCTETS or heavy:
            found.last = message.uid
            break
    return found


def _described_octets(message: Message) -> int:
    described = message.object.described
    return 0 if described is None else len(described.envelope) + len(described.structure) + len(described.parts)


# STORE, COPY, MOVE


async def store(reader: Reader, command: Command) -> Done:
    """STORE, UID STORE."""
    asked, selected = command.arguments, reader.chosen()
    assert isinstance(asked, Store)
    view = selected.view
    uids = values(view.targets(asked.numbers, asked.uid))
    bits = sum(SYSTEM.get(flag, 0) for flag in asked.flags)
    keywords = [flag for flag in asked.flags if flag not in SYSTEM]
    if any(word.startswith("\\") for word in keywords):
        return Done("NO", "There is no such system flag", response.CANNOT)
    if not uids:
        return Done("OK", "Stored")
    count, modified = 0, list[int]()
    for start in range(0, len(uids), STORED_TOGETHER):
        part = uids[start : start + STORED_TOGETHER].tolist()
        stored = await reader.access.change(
            reader.user, "store_flags", selected.mailbox, part, asked.how, bits, keywords, asked.unchanged_since
        )
        await reader.tell([view.learn(stored.keywords)])
        await reader.tell(view.stored(stored.before, stored.after, asked.silent, asked.unchanged_since is not None))
        count += len(stored.after) // RECORD.size
        modified += stored.modified
    if modified:
        named = view.named(packed(modified), asked.uid)
        return Done("OK", "Some have changed meanwhile, and were left alone", b"MODIFIED " + named)
    missing = count < len(uids) and not asked.uid
    return EXPUNGE_ISSUED if missing else Done("OK", "Stored")


async def copy(reader: Reader, command: Command) -> Done:
    """COPY, MOVE, and those of UIDs."""
    asked, selected = command.arguments, reader.chosen()
    assert isinstance(asked, Copy)
    uids = values(selected.view.targets(asked.numbers, asked.uid)).tolist()
    moves = command.name.endswith("MOVE")
    if not uids:
        return Done("OK", "There is nothing to copy")
    if not asked.uid and (missing := await _missing(reader, selected, uids)):
        return missing
    try:
        copied = await reader.access.change(reader.user, "copy", selected.mailbox, uids, asked.name, reader.limits, moves)
    except Partial as error:
        reader.log_change("move", selected.name, len(error.copied.copies), asked.name)
        await reader.tell([response.untagged("OK", "Moved so far", _copyuid(error.copied))])
        return Done("NO", "Not all could be moved; try again", response.UNAVAILABLE)
    except Refusal as refusal:
        raise try_create(reader, refusal, asked.name) from None
    if not copied.copies:
        return Done("OK", "The messages have been expunged")
    reader.log_change("move" if moves else "copy", selected.name, len(copied.copies), asked.name)
    if moves:
        await reader.tell([response.untagged("OK", "Moved", _copyuid(copied))])
        return Done("OK", "Done")
    return Done("OK", "Copied", _copyuid(copied))


async def _missing(reader: Reader, selected: Selected, uids: list[int]) -> Done | None:
    """The refusal of a COPY by message numbers when some of the messages are gone: all or nothing (RFC 9051 6.4.7)."""
    ranges = runs(packed(uids))
    records = await reader.access.read(partial(reading.records, selected.shard, selected.mailbox, ranges))
    if len(records) // RECORD.size == len(uids):
        return None
    return Done("NO", "Some of the messages have been expunged", response.EXPUNGEISSUED)


def _copyuid(copied: Copied) -> bytes:
    return response.copyuid(copied.uidvalidity, ranges_of(copied.sources), ranges_of(copied.copies))


def ranges_of(uids: list[int]) -> Iterator[tuple[int, int]]:
    """UIDs in order, as ranges."""
    start = last = 0
    for uid in uids:
        if uid != last + 1 and last:
            yield start, last
        if uid != last + 1 or not last:
            start = uid
        last = uid
    if last:
        yield start, last


# SEARCH

TOO_MANY_BODIES = Done("NO", f"At most {search.BODIES_MOST} keys may look into all of a message", response.LIMIT)


async def find(reader: Reader, command: Command) -> Done:
    """SEARCH, UID SEARCH."""
    asked, selected = command.arguments, reader.chosen()
    assert isinstance(asked, Search)
    view, returns = selected.view, asked.returns
    program = Program(asked.key, view, search.now_ms())
    if returns is not None and "SAVE" in returns:
        view.saved = b""  # also where the search fails (RFC 9051 6.4.4.1)
    if asked.refusal is not None:
        return Done("NO", *asked.refusal)
    if program.bodies > search.BODIES_MOST:
        return TOO_MANY_BODIES
    found = Found(returns if returns is not None else frozenset())
    after: int | None = 0
    while after is not None and not found.enough:
        matching, after = await search.slice_of(reader.access, selected, program, after)
        found.add(matching)
        if after is not None:
            await reader.pause()
    found.save(view)
    if returns is None and not reader.session.rev2:
        await reader.tell(found.search(view, asked.uid, asked.modseq))
    else:
        await reader.tell(found.esearch(command.tag.encode(), view, asked.uid, asked.modseq))
    return Done("OK", "Searched", expunges=not program.by_number)


async def arrange(reader: Reader, command: Command) -> Done:
    """SORT, THREAD, and those of UIDs (RFC 5256)."""
    asked, selected = command.arguments, reader.chosen()
    assert isinstance(asked, Sort | Thread)
    program = Program(asked.key, selected.view, search.now_ms())
    if program.bodies > search.BODIES_MOST:
        return TOO_MANY_BODIES
    async with reader.access.arranging(reader.user, len(selected.view.uids)):
        if isinstance(asked, Sort):
            told = await sorted_(reader, selected, asked, program)
        else:
            told = await threaded(reader, selected, asked, program)
    await reader.tell(told)
    return Done("OK", "Sorted" if isinstance(asked, Sort) else "Threaded", expunges=not program.by_number)


COMMANDS: dict[str, Callable[[Reader, Command], Awaitable[Done]]] = {
    "NOOP": noop,
    "CHECK": noop,
    "IDLE": noop,
    "CLOSE": close,
    "UNSELECT": unselect,
    "EXPUNGE": expunge,
    "UID EXPUNGE": expunge,
    "FETCH": fetch,
    "UID FETCH": fetch,
    "STORE": store,
    "UID STORE": store,
    "COPY": copy,
    "UID COPY": copy,
    "MOVE": copy,
    "UID MOVE": copy,
    "SEARCH": find,
    "UID SEARCH": find,
    **dict.fromkeys(("SORT", "UID SORT", "THREAD", "UID THREAD"), arrange),
}
