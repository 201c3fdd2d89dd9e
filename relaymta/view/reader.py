"""A user's IMAP session between the protocol and the store: what its commands work with (imap_mailboxes.py, imap_messages.py,
imap_append.py), and how what goes wrong is answered.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NamedTuple

from relaymta.accept.admission import Admission
from relaymta.errors import StoreFull
from relaymta.metrics import Counters
from relaymta.proto import imap_response as response
from relaymta.proto.imap_server import ServerSession
from relaymta.proto.imap_uids import NoSuchNumber
from relaymta.proto.mime import UnknownEncoding
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, MOVING, OVERQUOTA, Limits, Refusal
from relaymta.store.deliver import limits_of
from relaymta.store.directory import User
from relaymta.store.reading import Readable
from relaymta.view import reading
from relaymta.view.access import RECORDS_ON_LOOP, Access
from relaymta.view.fetch import Making, Piece
from relaymta.view.incoming import Incoming
from relaymta.view.reading import Removed
from relaymta.view.selected import Selected

__all__ = ["MISTAKES", "TRY_CREATE", "Done", "Gone", "Reader", "answer_to", "try_create"]


class Gone(Exception):
    """The client is gone: nothing that is written reaches it."""


class Done(NamedTuple):
    """The tagged response of a command. `expunges`: EXPUNGE may be told in front of it, where its verb allows that; `fresh`: the
    mailbox has just been selected, and what has changed since is told with the next command."""

    status: str
    text: str
    code: bytes = b""
    expunges: bool = True
    fresh: bool = False


class Reader:
    """`user`: as the directory has it; `selected`: the mailbox that is selected; `tell`: writes untagged responses as fast as the
    client reads (Gone); `pause`: lets others run, when a command has taken long; `warn`: logs what could not be done;
    `log_change`: as of ReadingConnection; `incoming`: the messages of an APPEND that has come; `looked`: the row of the selected
    mailbox's state, as the command under way has read it with something else."""

    __slots__ = (
        "_admission", "_version", "access", "incoming", "log_change", "looked", "pause", "selected", "session", "tell", "user",
        "warn",
    )  # fmt: skip

    def __init__(
        self,
        access: Access,
        user: User,
        session: ServerSession,
        admission: Admission,
        tell: Callable[[Iterable[Piece | Making]], Awaitable[None]],
        pause: Callable[[], Awaitable[None]],
        warn: Callable[[str], None],
        log_change: Callable[..., None],
    ) -> None:
        self.access = access
        self.user = user
        self.session = session
        self._admission = admission
        self._version = -1  # of the directory that says so of `user`: not looked at yet
        self.tell = tell
        self.pause = pause
        self.warn = warn
        self.log_change = log_change
        self.selected: Selected | None = None
        self.incoming: Incoming | None = None
        self.looked: bytes | None = None

    def refresh(self) -> bool:
        """Look whether the user may go on here: False when the directory says disabled, deleted, or moved since the login."""
        version = self.access.version
        if version == self._version and version >= 0:
            return True
        user = self.access.stayed(self.user)
        if user is None:
            return False
        self._version, self.user = version, user
        return True

    @property
    def counters(self) -> Counters:
        """The metrics of this process."""
        return self._admission.intake.counters

    @property
    def shard(self) -> Readable:
        """The shard of the user. StoreError."""
        return self.access.shard(self.user)

    @property
    def limits(self) -> Limits:
        """The user's quota."""
        return limits_of(self.user, self._admission.config.mailboxes)

    @property
    def room(self) -> int:
        """Octets of mail for which the disk has room."""
        queue = self._admission.intake.queue
        return 0 if queue.full else queue.room

    def chosen(self) -> Selected:
        """The mailbox that is selected: the session lets no command pass that needs one where there is none."""
        assert self.selected is not None
        return self.selected

    @property
    def holds(self) -> bool:
        """Whether the client has numbers of messages that are known to be gone."""
        return self.selected is not None and self.selected.view.holds

    def unselect(self) -> None:
        """None is selected any more."""
        self.selected = None
        self.session.unselected()

    def enabled(self) -> bytes:
        """Let the mailbox that is selected speak as the client has enabled by now; what to tell of that."""
        session, selected = self.session, self.selected
        return selected.enabled(session.condstore, session.qresync, session.rev2) if selected is not None else b""

    async def worked_out(self, lines: Callable[[], Iterator[bytes]], selected: Selected | None = None) -> Iterable[bytes]:
        """Responses that take long to be worked out in a large mailbox (`selected`, or the one that is): on a reader thread."""
        chosen = selected or self.chosen()
        if len(chosen.view.uids) <= RECORDS_ON_LOOP:
            return lines()
        return await self.access.read(lambda: list(lines()))

    def behind(self, looked: bytes | None = None) -> bool:
        """Whether there may be something new to tell of the mailbox that is selected: then `sync`. `looked`: its state's row,
        where that has just been read. StoreError."""
        return self.selected is not None and not self.selected.unchanged(looked)

    async def sync(self, may_expunge: bool) -> None:
        """Tell what the mailbox that is selected has become, where the client is `behind`. Removed."""
        assert self.selected is not None
        try:
            told = await self.selected.sync(may_expunge)
        except Refusal:  # it has been deleted
            if not self.refresh():
                raise Removed from None  # with the user, who may be elsewhere
            self.unselect()
            await self.tell([response.untagged("NO", "The mailbox that was selected has been deleted", response.CLOSED)])
            return
        await self.tell(told)


# Of a COPY or APPEND into a mailbox that is missing
TRY_CREATE = "trycreate"
# Response codes (RFC 5530, RFC 9208) by the code of a Refusal
_CODES = {
    TRY_CREATE: response.TRYCREATE,
    MISSING: response.NONEXISTENT,
    EXISTS: response.ALREADYEXISTS,
    OVERQUOTA: response.OVERQUOTA,
    LIMIT: response.LIMIT,
    CANNOT: response.CANNOT,
    MOVING: response.UNAVAILABLE,
}


# What `answer_to` answers beside RelayError and ConnectionError.
MISTAKES = (NoSuchNumber, UnknownEncoding, Removed)


def answer_to(error: Exception) -> Done:
    """The response to a command that has failed, by none of our defects."""
    match error:
        case Refusal():
            return Done("NO", _sentence(str(error)), _CODES.get(error.code, b""))
        case NoSuchNumber():
            return Done("BAD", "expected message numbers of this mailbox")
        case UnknownEncoding():
            return Done("NO", _sentence(str(error)), response.UNKNOWN_CTE)
        case StoreFull():
            return Done("NO", "There is no room for mail now; try again later", response.UNAVAILABLE)
        case Removed():
            return Done("NO", "The user's mailboxes are not here any more; log in again", response.UNAVAILABLE)
    return Done("NO", "The mailbox cannot be used now; try again", response.UNAVAILABLE)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def try_create(reader: Reader, refusal: Refusal, name: str) -> Refusal:
    """The refusal of a COPY or APPEND to a mailbox: TRY_CREATE where that is missing, and not another."""
    if refusal.code != MISSING:
        return refusal
    try:
        reading.named(reader.shard, reader.user.ident, name)
    except Refusal:
        return Refusal(TRY_CREATE, "there is no such mailbox")
    return refusal
