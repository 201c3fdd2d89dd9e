"""IMAP commands about mailboxes (RFC 3501 and 9051 6.3; RFC 5258, 5819, 6154, 8474, 9208)."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from relaymta.errors import RelayError
from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Command, Create, List, Mailbox, Rename, Select, SetQuota, Status
from relaymta.proto.imap_list import Name, listed
from relaymta.proto.imap_records import LAST_UID, RECORD_SIZE, changed, ranges_of, untold
from relaymta.proto.imap_resync import resync
from relaymta.store.change import CANNOT, Refusal
from relaymta.store.rows import MailboxRow, MailboxState
from relaymta.view import reading
from relaymta.view.reader import Done, Reader
from relaymta.view.selected import Selected, mailbox_id

__all__ = ["COMMANDS"]

VIRTUAL = ("\\All", "\\Flagged", "\\Important")  # special uses of mailboxes that show messages of others: none is kept so


async def select(reader: Reader, command: Command) -> Done:
    """SELECT, EXAMINE."""
    arguments, session = command.arguments, reader.session
    assert isinstance(arguments, Select)
    if reader.selected is not None:
        reader.unselect()  # also when this one fails (RFC 9051 6.3.2)
        if session.rev2 or session.qresync:
            await reader.tell([response.untagged("OK", "The mailbox that was selected is closed", response.CLOSED)])
    read_only = command.name == "EXAMINE"
    selected, opened = await Selected.open(
        reader.access, reader.user, arguments.name, read_only=read_only, rev2=session.rev2, condstore=session.condstore,
        qresync=session.qresync,
    )  # fmt: skip
    await reader.tell([opened])
    if session.rev2:
        await reader.tell([response.list_((), arguments.name, session.utf8, arguments.given)])
    known = arguments.qresync
    if known is not None and known.uidvalidity == selected.view.uidvalidity:
        records, expunged = await selected.since(known.modseq)
        records = untold(records, changed([records], selected.view.modseq))  # what is newer is told with all that came before it
        await reader.tell(await reader.worked_out(lambda: resync(selected.view, known, records, expunged), selected))
    reader.selected = selected
    return Done("OK", "Selected", response.READ_ONLY if read_only else response.READ_WRITE, fresh=True)


async def create(reader: Reader, command: Command) -> Done:
    """CREATE."""
    arguments = command.arguments
    assert isinstance(arguments, Create)
    if len(arguments.use) > 1 or set(arguments.use) & set(VIRTUAL):
        return Done("NO", "No mailbox is kept for that use", response.USEATTR)
    try:
        await reader.access.change(reader.user, "create", arguments.name, "".join(arguments.use))
    except Refusal as refusal:
        if refusal.code == CANNOT and arguments.use:
            return Done("NO", str(refusal), response.USEATTR)
        raise
    reader.log_change("create", arguments.name)
    if arguments.given and reader.session.rev2:
        await reader.tell([response.list_((), arguments.name, reader.session.utf8, arguments.given)])
    _, state = reading.named(reader.shard, reader.user.ident, arguments.name)
    return Done("OK", "Created", response.mailboxid(mailbox_id(reader.user, state)))


async def delete(reader: Reader, command: Command) -> Done:
    """DELETE."""
    name = _name(command)
    await reader.access.change(reader.user, "delete", name)
    reader.log_change("delete", name)
    return Done("OK", "Deleted")


async def rename(reader: Reader, command: Command) -> Done:
    """RENAME."""
    arguments = command.arguments
    assert isinstance(arguments, Rename)
    await reader.access.change(reader.user, "rename", arguments.old, arguments.new)
    reader.log_change("rename", arguments.old, into=arguments.new)
    if reader.session.rev2:
        await reader.tell([response.list_((), arguments.new, reader.session.utf8, arguments.old)])
    return Done("OK", "Renamed")


async def subscribe(reader: Reader, command: Command) -> Done:
    """SUBSCRIBE, UNSUBSCRIBE."""
    await reader.access.change(reader.user, "subscribe", _name(command), command.name == "SUBSCRIBE")
    return Done("OK", "Subscribed" if command.name == "SUBSCRIBE" else "Unsubscribed")


def _name(command: Command) -> str:
    assert isinstance(command.arguments, Mailbox)
    return command.arguments.name


# LIST and STATUS


async def list_(reader: Reader, command: Command) -> Done:
    """LIST, LSUB."""
    arguments, session = command.arguments, reader.session
    assert isinstance(arguments, List)
    found = {row.name: (row, state) for row, state in reading.names(reader.shard, reader.user.ident)}
    rows = [Name(row.name, state is not None, row.special, row.subscribed) for row, state in found.values()]
    for answer, name in listed(rows, arguments, lsub=command.name == "LSUB", rev2=session.rev2, utf8=session.utf8):
        await reader.tell([answer])
        if name is not None and arguments.status:
            row, state = found[name]
            if state is not None:
                with suppress(RelayError, ConnectionError):  # without it, then (RFC 5819 2): it has just been deleted, for one
                    await reader.tell([await _status(reader, row, state, arguments.status)])
        await reader.pause()
    return Done("OK", "Listed")


async def status(reader: Reader, command: Command) -> Done:
    """STATUS."""
    arguments = command.arguments
    assert isinstance(arguments, Status)
    row, state = reading.named(reader.shard, reader.user.ident, arguments.name)
    await reader.tell([await _status(reader, row, state, arguments.items)])
    return Done("OK", "That is its status")


async def _status(reader: Reader, row: MailboxRow, state: MailboxState, items: tuple[str, ...]) -> bytes:
    found = {item: await _STATUS[item](reader, row, state) for item in items}
    return response.status(row.name, found, reader.session.utf8)


async def _recent(reader: Reader, row: MailboxRow, state: MailboxState) -> int:
    if state.recent >= state.uidnext:
        return 0
    first = await reader.access.claim_recent(reader.user, row.mailbox, 0, state.uidnext, keep=True)
    if first >= state.uidnext:
        return 0
    ranges = ranges_of([(first, LAST_UID)])
    return len(await reader.access.read(partial(reading.records, reader.shard, row.mailbox, ranges))) // RECORD_SIZE


async def _deleted_storage(reader: Reader, row: MailboxRow, state: MailboxState) -> int:
    if not state.deleted:
        return 0
    return await reader.access.read(partial(reading.deleted_octets, reader.shard, row.mailbox))


def _of(value: Callable[[Reader, MailboxState], int | str]) -> Callable[[Reader, MailboxRow, MailboxState], Awaitable[int | str]]:
    async def found(reader: Reader, row: MailboxRow, state: MailboxState) -> int | str:
        return value(reader, state)

    return found


_STATUS: dict[str, Callable[[Reader, MailboxRow, MailboxState], Awaitable[int | str]]] = {
    "MESSAGES": _of(lambda reader, state: state.messages),
    "RECENT": _recent,
    "UIDNEXT": _of(lambda reader, state: state.uidnext),
    "UIDVALIDITY": _of(lambda reader, state: state.uidvalidity),
    "UNSEEN": _of(lambda reader, state: state.unseen),
    "DELETED": _of(lambda reader, state: state.deleted),
    "DELETED-STORAGE": _deleted_storage,
    "SIZE": _of(lambda reader, state: state.octets),
    "HIGHESTMODSEQ": _of(lambda reader, state: state.modseq),
    "MAILBOXID": _of(lambda reader, state: mailbox_id(reader.user, state)),
    "APPENDLIMIT": _of(lambda reader, state: reader.session.append_limit),
}


async def namespace(reader: Reader, command: Command) -> Done:
    """NAMESPACE."""
    await reader.tell([response.namespace()])
    return Done("OK", "That is all")


# Quota: one root for all mailboxes of a user, named by the user's address


async def quota(reader: Reader, command: Command) -> Done:
    """GETQUOTA."""
    found = _quota(reader) if _name(command).lower() == reader.user.address else b""
    if not found:
        return Done("NO", "There is no such quota root", response.NONEXISTENT)
    await reader.tell([found])
    return Done("OK", "That is the quota")


async def quotaroot(reader: Reader, command: Command) -> Done:
    """GETQUOTAROOT; also of a mailbox that is not there (yet): RFC 9208 4.1.2."""
    name = _name(command)
    found = _quota(reader)
    await reader.tell([response.quotaroot(name, [reader.user.address] if found else [], reader.session.utf8), found])
    return Done("OK", "That is the quota")


def _quota(reader: Reader) -> bytes:
    """b"": the user has no quota, so there is no quota root either."""
    used, limits = reader.access.used(reader.user), reader.limits
    resources = {}
    if limits.octets:
        resources["STORAGE"] = -(-used.octets // 1024), limits.octets // 1024
    if limits.messages:
        resources["MESSAGE"] = used.messages, limits.messages
    return response.quota(reader.user.address, resources) if resources else b""


async def set_quota(reader: Reader, command: Command) -> Done:
    """SETQUOTA: the administrator does that."""
    assert isinstance(command.arguments, SetQuota)
    return Done("NO", "Quotas are set by the administrator", response.NOPERM)


COMMANDS: dict[str, Callable[[Reader, Command], Awaitable[Done]]] = {
    "SELECT": select,
    "EXAMINE": select,
    "CREATE": create,
    "DELETE": delete,
    "RENAME": rename,
    "SUBSCRIBE": subscribe,
    "UNSUBSCRIBE": subscribe,
    "LIST": list_,
    "LSUB": list_,
    "STATUS": status,
    "NAMESPACE": namespace,
    "GETQUOTA": quota,
    "GETQUOTAROOT": quotaroot,
    "SETQUOTA": set_quota,
}
