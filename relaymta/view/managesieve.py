"""The connection of a ManageSieve client: what it does beside what all do (accept/client.py).

Scripts are read here, and changed by the owner of the user's shard.
"""

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

from relaymta.accept.admission import Admission
from relaymta.accept.client import ClientConnection
from relaymta.accept.line import COMMITTING
from relaymta.accept.rights import Rights
from relaymta.config import Listener
from relaymta.errors import RelayError
from relaymta.proto import managesieve_reply as reply
from relaymta.proto.managesieve_server import ASKED, CLAIMED, TLS, Asked, Listed, ServerSession
from relaymta.store import scripts
from relaymta.store.change import CANNOT, EXISTS, LIMIT, MISSING, OVERQUOTA, Refusal
from relaymta.store.directory import User
from relaymta.view.access import Access
from relaymta.view.connection import ReadingConnection

__all__ = ["ManageSieveConnection"]

T = TypeVar("T")

IDLE_SECONDS = 1800.0  # RFC 5804 1.2: at least 30 minutes
# Response codes (RFC 5804 1.3).
CODES = {
    MISSING: reply.NONEXISTENT, EXISTS: reply.ALREADYEXISTS, LIMIT: reply.MAXSCRIPTS, OVERQUOTA: reply.MAXSIZE,
    CANNOT: b"", scripts.INVALID: b"",
}  # fmt: skip


class ManageSieveConnection(ReadingConnection[ServerSession]):
    """`_told`: the client has the capabilities of this connection as it is now."""

    protocol = "managesieve"
    silence = IDLE_SECONDS
    too_late = reply.IDLE_TOO_LONG
    shutting_down = reply.SHUTTING_DOWN
    dismissed = reply.DISMISSED

    __slots__ = ("_commands", "_told")

    def __init__(self, access: Access, admission: Admission, listener: Listener) -> None:
        super().__init__(access, admission, listener)
        self._commands = 0
        self._told = False

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        endpoint = self.admission.endpoint
        self._greeted_at = self.admission.now()
        self._told = secure
        return ServerSession(self.admission.intake.hostname, endpoint.offers(self.listener, False), endpoint.keys, secure)

    def refusal(self, answer: bytes) -> bytes:
        """A refusal of SMTP as BYE."""
        text = answer.decode("utf-8", "replace").strip().partition(" ")[2].partition(" ")[2]
        return reply.bye(text, reply.TRYLATER if answer.startswith(b"4") else b"")

    def secured(self, described: str) -> None:
        super().secured(described)
        if not self._told and self.session is not None:
            self._told = True
            self.write(self.session.greet())

    def admit_login(self) -> bytes | None:
        assert self.session is not None
        user = self.seated()
        if isinstance(user, bytes):
            return user
        self.session.name_owner(user.address)
        return None

    def logged_in(self, session: ServerSession) -> bool:
        return bool(session.owner)

    def doing(self) -> dict[str, Any]:
        return {"commands": self._commands}

    def allowed(self) -> bool:
        """A user who has been moved may go on: the next command goes to the other shard."""
        return self._current() is not None

    def _current(self) -> User | None:
        assert self._user is not None
        user = self._access.user(self._user.address)
        return user if user is not None and user.ident == self._user.ident else None

    # Commands

    def _begin(self, session: ServerSession) -> None:
        self.waits |= COMMITTING
        self.pause()
        self.admission.spawn(self._run(session))

    async def _run(self, session: ServerSession) -> None:
        out, asked = b"", session.asked
        try:
            if asked is not None:
                out = await self._answer(session, asked)
        except Exception as error:  # a defect: this command fails, the session and the others go on
            self.mistaken(error)
            out = session.refused("The server has failed; try again later", reply.TRYLATER)
        finally:
            self._commands += 1
            self.waits &= ~COMMITTING
            self.active_at = self.admission.now()
            if self.gone:
                self.leave()
        if not self.gone:
            self.done(session, out)

    async def _answer(self, session: ServerSession, asked: Asked) -> bytes:
        """Do what is asked; what to write."""
        user = self._current()
        if user is None:  # disabled, deleted
            session.close()
            return reply.DISMISSED
        try:
            return session.done(await DOINGS[asked.what](self._access, user, asked))
        except Refusal as refusal:
            code = CODES.get(refusal.code, reply.TRYLATER)
            if asked.what == "remove" and refusal.code == CANNOT:
                code = reply.ACTIVE
            return session.refused(str(refusal), code)
        except (RelayError, ConnectionError) as error:
            self.warn(f"{asked.what}: {error or type(error).__name__}")
            return session.refused("The scripts are temporarily not available; try again later", reply.TRYLATER)

    # The end

    def connection_lost(self, exc: Exception | None) -> None:
        session = self.session
        super().connection_lost(exc)
        if session is not None and self._user is not None and session.owner:
            self.log_session(commands=self._commands)
            session.owner = ""  # this may be called again
        if not self.waits & COMMITTING:  # else the command that is under way ends with it
            self.leave()

    steps: ClassVar[dict[int, Callable[[Any, Any], None]]] = {
        TLS: ClientConnection.start_tls,
        CLAIMED: ClientConnection.log_in,
        ASKED: lambda self, session: self._begin(session),
    }


# What is asked, one function each. RelayError, ConnectionError.


async def _list(access: Access, user: User, asked: Asked) -> list[Listed]:
    return [Listed(one.name, one.active) for one in await _scripts(access, user)]


async def _scripts(access: Access, user: User) -> list[scripts.Script]:
    shard = access.shard(user)

    def read() -> list[scripts.Script]:
        with shard.rows.reading() as txn:
            return scripts.scripts(shard.rows, txn, user.ident)

    return await _read(access, user, read)


async def _get(access: Access, user: User, asked: Asked) -> bytes | None:
    shard = access.shard(user)

    def read() -> bytes | None:
        with shard.rows.reading() as txn:
            return scripts.text(shard.rows, txn, user.ident, asked.name)

    return await _read(access, user, read)


async def _read(access: Access, user: User, read: Callable[[], T]) -> T:
    found = await access.read(read)
    access.check_stayed(user)
    return found


async def _put(access: Access, user: User, asked: Asked) -> None:
    await access.change(user, "put_script", asked.name, asked.text)


async def _check(access: Access, user: User, asked: Asked) -> None:
    await access.work(user, lambda: scripts.check(asked.text))


async def _activate(access: Access, user: User, asked: Asked) -> None:
    await access.change(user, "activate_script", asked.name)


async def _remove(access: Access, user: User, asked: Asked) -> None:
    await access.change(user, "remove_script", asked.name)


async def _rename(access: Access, user: User, asked: Asked) -> None:
    await access.change(user, "rename_script", asked.name, asked.new)


async def _room(access: Access, user: User, asked: Asked) -> None:
    """Whether a script of that name and size could be kept (RFC 5804 2.5)."""
    problem = scripts.name_problem(asked.name)
    if problem is not None:
        raise Refusal(CANNOT, problem)
    scripts.check_size(asked.size)
    found = await _scripts(access, user)
    if len(found) >= scripts.SCRIPTS_MOST and asked.name not in {one.name for one in found}:
        raise Refusal(LIMIT, f"{scripts.SCRIPTS_MOST} scripts are the most that a user may have")


DOINGS: dict[str, Callable[[Access, User, Asked], Awaitable[Any]]] = {
    "list": _list,
    "get": _get,
    "put": _put,
    "check": _check,
    "activate": _activate,
    "remove": _remove,
    "rename": _rename,
    "room": _room,
}
