"""Where a message comes from: the client, and what its address, its login and the listener make of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from relaymta.auth.identity import Identity
from relaymta.config import Listener
from relaymta.proto.session import Session
from relaymta.proto.transaction import Limits

if TYPE_CHECKING:
    from relaymta.filter.chain import Chain

__all__ = ["Client", "Origin", "Taken", "protocol_of", "spoken"]

_NOBODY = Identity("")


@dataclass(frozen=True, slots=True)
class Client:
    """A client, and what the rules for its address allow."""

    address: str
    group: str  # by which its connections and rates are counted
    trusted: bool
    connections: int
    application: str
    priority: str  # "" where the listener decides
    limits: Limits
    xclient: bool
    connection_rate: str
    message_rate: str
    recipient_rate: str
    behind: str = ""  # the address of the proxy whose client this is, where its own is unknown
    domain: str = ""  # completes its addresses without one, "": nothing does; and
    login_domain: str = ""  # those of a user who is logged in
    postmaster: str = ""  # relay.postmaster
    xforward: bool = False


class Origin(NamedTuple):
    """Where a message comes from, and what follows for it. `identity`: the authenticated user, and `user` its name, "": nobody;
    `may_relay`: the client is authenticated or in a network that may relay; `free`: its recipients need no check, but for those
    whose mail is kept here and aliases; `submission`: Date and Message-ID are added; `submitted`: its header may be changed
    (submitted.py); `domain`: completes addresses without one, "": they are refused; `postmaster`: the address that this means
    without a domain, "": it is rejected; `trusted`: Authentication-Results in our name are kept, since the client is of our own
    network and has not logged in, such as a filter that hands back what we have verified (RFC 8601 5); `lmtp`: it goes into
    mailboxes, past the queue; `listener`: its address; `chain`: the filters that look at it, None: none does; `filtered`: a
    content filter gives it back; `http`: it comes by HTTP."""

    client: Client
    identity: Identity | None
    user: str
    application: str
    priority: str
    submission: bool
    may_relay: bool
    free: bool
    submitted: bool
    domain: str
    postmaster: str
    trusted: bool
    lmtp: bool
    listener: str
    chain: "Chain | None" = None
    filtered: bool = False
    http: bool = False

    @classmethod
    def of(cls, client: Client, identity: Identity | None, listener: Listener) -> "Origin":
        """Of a client of a listener."""
        user = identity if identity is not None else _NOBODY
        may_relay = identity is not None or client.trusted
        lmtp, http = listener.protocol == "lmtp", listener.protocol == "http"
        domain = client.domain or (client.login_domain if identity is not None else "")
        return cls(
            client,
            identity,
            user.name,
            user.application or client.application or listener.application,
            user.priority or client.priority or listener.priority,
            listener.submission or http,
            may_relay,
            may_relay and not (client.message_rate or client.recipient_rate or user.quotas),
            listener.submission or http or (identity is not None and not lmtp),
            domain,
            client.postmaster or (f"postmaster@{domain}" if domain else ""),
            identity is None and may_relay,
            lmtp,
            listener.address,
            filtered=listener.filtered,
            http=http,
        )


class Taken(NamedTuple):
    """What an LMTP client is told of a message: `recipients` whose mail is taken, of these the `filed` ones, in the mailboxes of
    `users`; `refused`: the others, each with the reply. `delay`: seconds since the end of its message data; `queued`: it is in
    the queue, too."""

    recipients: list[str]
    filed: list[str]
    users: list[str]
    refused: list[tuple[str, bytes]]
    delay: float
    queued: bool


def spoken(origin: Origin, session: Session) -> str:
    """The protocol of a session: SMTP, ESMTP, LMTP or HTTP."""
    if origin.http:
        return "HTTP"
    return "LMTP" if origin.lmtp else "ESMTP" if session.extended else "SMTP"


def protocol_of(origin: Origin, session: Session, smtputf8: bool) -> str:
    """The protocol as Received: names it (RFC 3848, 6531 4.3)."""
    if origin.http:
        return "HTTP"
    if not session.extended and not origin.lmtp:
        return "SMTP"
    name = ("UTF8" if smtputf8 else "" if origin.lmtp else "E") + ("LMTP" if origin.lmtp else "SMTP")
    return name + ("S" if session.secure else "") + ("A" if origin.identity is not None else "")
