"""A user of this machine, who hands mail in by sendmail(1): who that is, and the connection. Nobody logs in: the system says who
has opened the socket, and whose a file is.
"""

import asyncio
import os
import pwd
import time

from relaymta.accept.admission import Admission
from relaymta.accept.connection import Connection
from relaymta.accept.origin import Client
from relaymta.accept.rights import Rights
from relaymta.auth.identity import Identity
from relaymta.config import Config, Listener
from relaymta.privileges import peer_of
from relaymta.proto.smtp_server import ServerSession

__all__ = ["UserConnection", "identified", "name_of"]

EVERYBODY = "*"
KEPT_SECONDS, KEPT_MOST = 60.0, 1000
_known: dict[int, tuple[str, float]] = {}  # names of users, and until when they count (monotonic seconds)


def name_of(uid: int) -> str:
    """The name of a user; without one the number. What the system has said counts for KEPT_SECONDS."""
    known, now = _known.get(uid), time.monotonic()
    if known is not None and now < known[1]:
        return known[0]
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:  # it may be that its directory does not answer now
        name = str(uid)
    if len(_known) >= KEPT_MOST:
        _known.clear()
    _known[uid] = name, now + KEPT_SECONDS
    return name


def identified(config: Config, uid: int, domain: str) -> Identity:
    """A user as one who has logged in. root, the relay's own user and those in relay.local_users send as anybody, the others as
    themselves. `domain`: completes addresses without one."""
    name, anybody = name_of(uid), config.relay.local_users
    if uid in (0, os.geteuid()) or name in anybody or EVERYBODY in anybody:
        return Identity(name)
    return Identity(name, senders=_addresses(name, (domain, config.hostname)), said_by="relay.local_users")


def _addresses(name: str, domains: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses of a user at these domains. A name that is an address itself (`ann@corp.example`, as SSSD has them) is the
    only one; of `CORP\\ann`, as Winbind has them, the name is `ann` (as in sendmail/message.py)."""
    local = name.rpartition("\\")[2].lower()
    return (local,) if "@" in local else tuple(dict.fromkeys(f"{local}@{one}".lower() for one in domains))


class UserConnection(Connection):
    """The connection of a user. `uid`: whose it is; None: the system says it."""

    __slots__ = ("_later", "_uid")

    def __init__(self, admission: Admission, listener: Listener, uid: int | None = None) -> None:
        super().__init__(admission, listener)
        self._uid = uid
        self._later = uid is not None  # the message was left here: nobody waits for the reply who could be told

    def connected(self, transport: asyncio.BaseTransport) -> Client | None:
        if self._uid is None:
            self._uid = peer_of(transport.get_extra_info("socket")).uid
        return self.admission.intake.local_client(name_of(self._uid))

    def begin_session(self, rights: Rights, secure: bool) -> ServerSession | None:
        assert self._uid is not None
        identity = identified(self.admission.config, self._uid, rights.client.domain)
        # The program knew the user's name. Where the directory of users does not, now, nothing is refused for good.
        rights.log_in(identity._replace(unsure=self._later and identity.name == str(self._uid)))
        return super().begin_session(rights, secure)
