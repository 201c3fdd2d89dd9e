"""APPEND (RFC 3501 and 9051 6.3.12, RFC 3502): what is known before a message comes, and filing all of them."""

from collections.abc import Awaitable, Callable

from relaymta.errors import StoreFull, store_error
from relaymta.proto import imap_response as response
from relaymta.proto.imap_command import Append, Appended, Command
from relaymta.store.change import OVERQUOTA, Refusal
from relaymta.view import reading
from relaymta.view.imap_messages import ranges_of
from relaymta.view.incoming import SYSTEM, Incoming
from relaymta.view.reader import Done, Reader, try_create

__all__ = ["COMMANDS", "refusal"]

MESSAGES_MOST = 1000  # of one APPEND


def refusal(reader: Reader, append: Append, incoming: Incoming) -> Done | None:
    """Why a message that is announced is not taken; None: it may come. Refusal, and what else `answer_to` answers."""
    try:
        reading.named(reader.shard, reader.user.ident, append.name)
    except Refusal as refused:
        raise try_create(reader, refused, append.name) from None
    if any(flag.startswith("\\") and flag not in SYSTEM for flag in append.flags):
        return Done("NO", "There is no such system flag", response.CANNOT)
    if append.number >= MESSAGES_MOST:
        return Done("NO", f"{MESSAGES_MOST} messages are the most of one APPEND", response.LIMIT)
    used, limits = reader.access.used(reader.user), reader.limits
    over = limits.octets and used.octets + incoming.octets + append.octets > limits.octets
    if over or (limits.messages and used.messages + append.number >= limits.messages):
        raise Refusal(OVERQUOTA, "the quota is used up")
    if incoming.octets + append.octets > reader.room:
        raise StoreFull("there is no room for mail")
    try:
        room = incoming.begin(append)
    except OSError as error:
        raise store_error(error) from None
    return None if room else Done("NO", "Too many large messages are coming; try again", response.UNAVAILABLE)


async def append(reader: Reader, command: Command) -> Done:
    """APPEND: all messages have come."""
    asked, incoming = command.arguments, reader.incoming
    assert isinstance(asked, Appended) and incoming is not None
    try:
        filed = await reader.access.change(reader.user, "append", asked.name, incoming.messages, reader.limits)
    except Refusal as refused:
        raise try_create(reader, refused, asked.name) from None
    finally:
        reader.incoming = None
        incoming.discard()
    reader.log_change("append", asked.name, len(filed.copies))
    return Done("OK", "Appended", response.appenduid(filed.uidvalidity, ranges_of(filed.copies)))


COMMANDS: dict[str, Callable[[Reader, Command], Awaitable[Done]]] = {"APPEND": append}
