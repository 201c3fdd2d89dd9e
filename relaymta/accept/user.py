"""A user of this machine, who hands mail in by sendmail(1): who that is, and the connection. Nobody logs in: the system says who
has opened the socket, and whose a file is.

What a user is called may have to be asked of a directory on the network, which may not answer for a minute: that is for threads
of its own, and a connection is greeted when it has answered.
"""

import asyncio
import contextlib
import os
import pwd
import threading
import time

from relaymta.accept.admission import Admission
from relaymta.accept.connection import Connection
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.auth.identity import Identity
from relaymta.config import Config, Listener
from relaymta.privileges import peer_of
from relaymta.proto.smtp_server import ServerSession

__all__ = ["UserConnection", "identified", "known_name", "name_of"]

EVERYBODY = "*"
KEPT_SECONDS, KEPT_MOST = 60.0, 1000
AGAIN_SECONDS = 0.05
ASKED_MOST = 16  # users about whom the system is asked at the same time
WAITING_MOST = 200  # connections for whose user's name the system is asked: sendmail(1) drops what others want to hand in
_known: dict[int, tuple[str, float]] = {}  # names of users, and until when they count (monotonic seconds)
_asked: dict[int, "asyncio.Future[str]"] = {}  # users about whom the system is asked now
_waiting: set["UserConnection"] = set()  # clients that are greeted when their name is known


def known_name(uid: int) -> str | None:
    """What a user is called, where the system has said so in the last KEPT_SECONDS."""
    known = _known.get(uid)
    return known[0] if known is not None and time.monotonic() < known[1] else None


async def name_of(uid: int) -> str:
    """The name of a user; without one the number. What the system has said counts for KEPT_SECONDS."""
    known = known_name(uid)
    if known is not None:
        return known
    while uid not in _asked and len(_asked) >= ASKED_MOST:
        await asyncio.sleep(AGAIN_SECONDS)
    asked = _asked.get(uid)
    if asked is None:
        loop = asyncio.get_running_loop()
        asked = _asked[uid] = loop.create_future()
        # Not a thread of a pool: the end of the process would wait for the directory, too.
        threading.Thread(target=_ask, args=(uid, asked, loop), name="names", daemon=True).start()
    return await asyncio.shield(asked)  # others may wait for it, too


def _ask(uid: int, asked: "asyncio.Future[str]", loop: asyncio.AbstractEventLoop) -> None:
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, OSError):  # it may be that its directory does not answer now
        name = str(uid)
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(_note, uid, asked, name)


def _note(uid: int, asked: "asyncio.Future[str]", name: str) -> None:
    _asked.pop(uid, None)
    if len(_known) >= KEPT_MOST:
        _known.clear()
    _known[uid] = name, time.monotonic() + KEPT_SECONDS
    if not asked.done():
        asked.set_result(name)


def identified(config: Config, uid: int, name: str, domain: str) -> Identity:
    """A user of this name as one who has logged in. root, the relay's own user and those in relay.local_users send as anybody,
    the others as themselves. `domain`: completes addresses without one."""
    anybody = config.relay.local_users
    if uid in (0, os.geteuid()) or name in anybody or EVERYBODY in anybody:
        return Identity(name)
    return Identity(name, senders=_addresses(name, (domain, config.hostname)), said_by="relay.local_users")


def _addresses(name: str, domains: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses of a user at these domains. A name that is an address itself (`ann@corp.example`, as SSSD has them) is the
    only one; of `CORP\\ann`, as Winbind has them, the name is `ann` (as in sendmail/message.py)."""
    local = name.rpartition("\\")[2].lower()
    return (local,) if "@" in local else tuple(dict.fromkeys(f"{local}@{one}".lower() for one in domains))


class UserConnection(Connection):
    """The connection of a user. `uid`: whose it is; None: the system says it. `file`: as of Flow."""

    __slots__ = ("_later", "_name", "_uid")

    def __init__(self, admission: Admission, listener: Listener, uid: int | None = None, file: str = "") -> None:
        super().__init__(admission, listener)
        self.file = file
        self._uid = uid
        self._name = ""
        self._later = uid is not None  # the message was left here: nobody waits for the reply who could be told

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._uid is None:
            self._uid = peer_of(transport.get_extra_info("socket")).uid
        name = known_name(self._uid)
        if name is not None:
            self._begin(transport, name)
            return
        self.transport = transport  # type: ignore[assignment]
        if len(_waiting) >= WAITING_MOST:
            self.count_refused()
            self.close()
            return
        self.pause()
        _waiting.add(self)
        self.admission.spawn(self._named(transport, self._uid))

    async def _named(self, transport: asyncio.BaseTransport, uid: int) -> None:
        try:
            name = await name_of(uid)
        finally:
            _waiting.discard(self)
        if not self.gone:
            self._begin(transport, name)
            self.resume()

    def _begin(self, transport: asyncio.BaseTransport, name: str) -> None:
        self._name = name
        super().connection_made(transport)

    def connected(self, transport: asyncio.BaseTransport) -> Client | None:
        return self.admission.intake.local_client(self._name)

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        assert self._uid is not None
        identity = identified(self.admission.config, self._uid, self._name, rights.client.domain)
        # The program knew the user's name. Where the directory of users does not, now, nothing is refused for good.
        rights.log_in(identity._replace(unsure=self._later and identity.name == str(self._uid)))
        return super().begin_session(rights, secure)
