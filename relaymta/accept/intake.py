"""Rules for clients, and the only way for a message into the queue: `prepend` adds the fields, `admit` submits it."""

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from relaymta.accept.endpoint import Endpoint
from relaymta.accept.identity import Identity, group_of
from relaymta.accept.quota import Quotas
from relaymta.config import Config, PeerNetwork
from relaymta.errors import StoreError, StoreFull
from relaymta.log import Log
from relaymta.metrics import Counters, index
from relaymta.proto import reply
from relaymta.proto.address import domain_of
from relaymta.proto.envelope import EIGHT_BIT, HELD, SMTPUTF8, Body, Envelope
from relaymta.proto.header import HEADER_SEEN, count_received, field_names, header_end, received_field, rfc5322_date, too_long
from relaymta.proto.mailbox import Malformed, authors
from relaymta.proto.smtp_server import Limits, ServerSession, Transaction
from relaymta.queue import Queue, format_id, wall_ms
from relaymta.route.staging import Redirection
from relaymta.route.table import RouteTable

__all__ = ["Client", "Intake"]

CONNECTIONS_REFUSED = index("relaymta_connections_total", "refused")
RECEIVED = index("relaymta_messages_received_total")
OCTETS = index("relaymta_received_octets_total")
RECIPIENTS = index("relaymta_recipients_received_total")
REFUSED_CONTENT = index("relaymta_messages_refused_total", "content")
REFUSED_STORE = index("relaymta_messages_refused_total", "store")
REFUSED_FILTER = index("relaymta_messages_refused_total", "filter")
REFUSED_FULL = index("relaymta_messages_refused_total", "full")
RECIPIENTS_REFUSED = index("relaymta_recipients_refused_total")

DMARC = {word: index("relaymta_dmarc_total", word) for word in ("pass", "none", "fail", "permerror", "temperror")}

# A local part that a later host could take for a source route: a%b, a!b, "a@b".
_ROUTED = re.compile("[%!@]")
_NO_OVERRIDES = PeerNetwork(networks=[])
UNKNOWN = "0.0.0.0"  # the address of a client whose own is unknown
T = TypeVar("T")
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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


@dataclass(slots=True)
class _Networks:
    """A set of networks."""

    networks: list[_Network] = field(default_factory=list)

    @classmethod
    def of(cls, texts: list[str]) -> "_Networks":
        return cls([ipaddress.ip_network(text) for text in texts])

    def __contains__(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return any(address in network for network in self.networks)


class Intake:
    """The rules and counters that the connections of a worker share."""

    def __init__(
        self, config: Config, routes: RouteTable, queue: Queue, endpoint: Endpoint, quotas: Quotas, counters: Counters, log: Log
    ) -> None:
        self._endpoint = endpoint
        self.quotas = quotas
        self.hostname = config.hostname
        self.queue = queue
        self.counters = counters
        self.accept_seconds = counters.histogram("relaymta_accept_seconds")
        self.log = log
        self.draining = False
        self.out_of_memory = False
        self.configure(config, routes)

    def configure(self, config: Config, routes: RouteTable) -> None:
        """Replace the configuration. Sessions under way keep the rules they began with."""
        self._config = config
        self._routes = routes
        self._domains = {domain.lower().rstrip(".") for domain in config.relay.domains}
        self._trusted = _Networks.of(config.relay.networks)
        self._normalized = _Networks.of(config.intake.normalize_networks)
        self._long_lines = _Networks.of(config.intake.long_line_networks)
        self._staging = Redirection(config.staging.redirect, config.staging.allow) if config.staging.redirect else None
        self._peers = [(_Networks.of(peer.networks), peer) for peer in config.network]
        self._clients: dict[str, Client] = {}

    def client(self, address: str) -> Client:
        """The rules for a client's address."""
        known = self._clients.get(address)
        if known is None:
            if len(self._clients) > 10_000:
                self._clients.clear()
            known = self._clients[address] = self._rules(address)
        return known

    def unknown_client(self, peer: str) -> Client:
        """The rules for a client whose address is unknown, behind the proxy `peer`: it is counted as the proxy, but has neither
        its rights nor its address, which SPF would evaluate."""
        found = self.client(peer)
        limits = replace(found.limits, normalize=False, long_lines=False)
        return replace(found, address=UNKNOWN, trusted=False, xclient=False, application="", priority="", limits=limits)

    def _rules(self, address: str) -> Client:
        config = self._config
        parsed = ipaddress.ip_address(address)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        own = next((peer for networks, peer in self._peers if parsed in networks), _NO_OVERRIDES)
        trusted = _own_or_general(own.relay, parsed in self._trusted)
        most = config.limits.connections_per_client
        limits = Limits(
            message_size=_own_or_general(own.message_size, config.limits.message_size),
            recipients=_own_or_general(own.recipients, config.intake.recipients),
            errors=config.intake.errors,
            normalize=_own_or_general(own.normalize, parsed in self._normalized),
            long_lines=_own_or_general(own.long_lines, parsed in self._long_lines or trusted),
        )
        connections = _own_or_general(own.connections, max(most, 200) if trusted else most)
        general = config.limits
        return Client(
            str(parsed),
            group_of(str(parsed)),
            trusted,
            connections,
            own.application,
            own.priority or "",
            limits,
            own.xclient,
            _own_or_general(own.connection_rate, general.connection_rate),
            _own_or_general(own.message_rate, general.message_rate),
            _own_or_general(own.recipient_rate, general.recipient_rate),
        )

    def accept_sender(self, sender: str, size: int) -> bytes | None:
        """The check at MAIL: the 452 when there is no room for a message of `size` octets (0: not announced), or None."""
        if self.out_of_memory:
            self.counters.add(REFUSED_FULL, 1)
            return reply.OUT_OF_MEMORY
        if self.queue.full or self.queue.writer.stalled or size > self.queue.room:
            self.counters.add(REFUSED_FULL, 1)
            return reply.STORE_FULL
        return None

    def sender_check(self, identity: Identity) -> Callable[[str, int], bytes | None]:
        """The check at MAIL for an authenticated user: the reply (550) when their account may not send as this sender, else
        `accept_sender`."""
        if not identity.senders:
            return self.accept_sender

        def check(sender: str, size: int) -> bytes | None:
            if sender and not identity.may_send_as(sender):
                return reply.format_reply(550, "5.7.1", f"{identity.name} may not send as <{sender}> (senders of its account)")
            return self.accept_sender(sender, size)

        return check

    def recipient_check(self, client: Client, identity: Identity | None) -> Callable[[str, Transaction], bytes | None]:
        """The check at RCPT for a client or an authenticated user: relay rights, then rates and quotas."""
        limited = bool(client.message_rate or client.recipient_rate or (identity is not None and identity.quotas))
        free = client.trusted or identity is not None
        if free and not limited:
            return _accept_any

        def check(address: str, transaction: Transaction) -> bytes | None:
            refused = None if free else self._refusal(address)
            if refused is not None:
                self.counters.add(RECIPIENTS_REFUSED, 1)
                self._rejected(client, "", transaction.sender, [address], refused)
            elif limited:
                refused = self._spend(client, identity, transaction)
            return refused

        return check

    def _refusal(self, address: str) -> bytes | None:
        """The reply that rejects a recipient of an unauthenticated client, or None. Postmaster is accepted (RFC 5321 4.5.1)."""
        domain = domain_of(address)
        if address.lower() == "postmaster":
            return None
        if domain not in self._domains or _ROUTED.search(address.rpartition("@")[0]):
            return reply.RELAY_DENIED
        return None if self._endpoint.recipient_exists(address.lower(), domain) else reply.NO_SUCH_RECIPIENT

    def _spend(self, client: Client, identity: Identity | None, transaction: Transaction) -> bytes | None:
        """Take the units of a recipient, and with the first one those of the message, from rates and quotas. The reply when one
        is used up, or None."""
        first = not transaction.recipients
        rates = [("recipient_rate", client.recipient_rate)] if client.recipient_rate else []
        if first and client.message_rate:
            rates.insert(0, ("message_rate", client.message_rate))
        kinds = () if identity is None else ("messages", "recipients") if first else ("recipients",)
        for taking in (False, True):  # all units or none: a rejected recipient takes nothing
            for kind, quota in rates:
                refused = self.quotas.client(client.group, kind, quota, taking)
                if refused is not None:
                    return refused
            for kind in kinds:
                assert identity is not None
                refused = self.quotas.account(identity, kind, 1, transaction, taking)
                if refused is not None:
                    return refused
        return None

    def refused(self, transaction: Transaction, client: Client, helo: str, answer: bytes) -> None:
        """Count and log a message that was rejected after its message data. `answer`: the reply, 4xx or 5xx."""
        if answer.startswith(b"5"):  # 4xx was counted where it arose
            self.counters.add(REFUSED_CONTENT, 1)
        self._rejected(client, helo, transaction.sender, transaction.recipients, answer)

    def foreign(self, client: Client, helo: str) -> None:
        """Count and log a connection that was closed because the client uses another protocol (HTTP, TLS)."""
        self.counters.add(CONNECTIONS_REFUSED, 1)
        self._rejected(client, helo, "", [], reply.NOT_SMTP)

    def _rejected(self, client: Client, helo: str, sender: str, recipients: list[str], answer: bytes) -> None:
        answered = answer.decode("utf-8", "replace").strip()
        self.log.event("rejected", client=client.address, helo=helo, sender=sender, recipients=recipients, reply=answered)

    def prepend(self, ident: int, transaction: Transaction, client: Client, session: ServerSession,
                start: bytes, submission: bool, identity: Identity | None) -> list[bytes] | bytes:  # fmt: skip
        """The fields to add before a message whose message data begins with `start` (HEADER_SEEN octets suffice); or the reply
        that rejects it. Sets `transaction.headers`."""
        header = start[: header_end(start)]
        if identity is not None and identity.senders:
            refused = _check_authors(identity, header, len(start))
            if refused is not None:
                return refused
        if self._routes.looks_at_headers:
            try:
                transaction.headers = self._routes.headers_met(header[:HEADER_SEEN])
            except Malformed:
                return reply.BAD_AUTHOR
        if count_received(header) > self._config.intake.hops:
            return reply.TOO_MANY_HOPS
        now = wall_ms() // 1000
        name = format_id(ident)
        protocol = "SMTP" if not session.extended else "UTF8SMTP" if transaction.smtputf8 else "ESMTP"
        if session.extended:  # RFC 3848, 6531 4.3
            protocol += ("S" if session.secure else "") + ("A" if session.user else "")
        recipients = transaction.recipients
        fields = received_field(
            hostname=self.hostname,
            helo=session.helo,
            client=client.address,
            protocol=protocol,
            ident=name,
            recipient=recipients[0] if len(recipients) == 1 else "",
            seconds=now,
        )
        if submission:
            names = field_names(header)
            if b"message-id" not in names:
                fields += f"Message-ID: <{name}@{self.hostname}>\r\n".encode()
            if b"date" not in names:
                fields += f"Date: {rfc5322_date(now)}\r\n".encode()
        if self._staging is not None:
            fields = self._staging.banner(recipients) + fields
        if not header or (header[:2] != b"\r\n" and b":" not in header.partition(b"\r\n")[0]):
            fields += b"\r\n"  # there is no header: the first line of the body must not become part of our fields
        return [fields]

    def admit(
        self,
        ident: int,
        transaction: Transaction,
        data: list[bytes] | Body,
        size: int,
        client: Client,
        helo: str,
        user: str,
        application: str,
        priority: str,
        done: Callable[[StoreError | None], None],
    ) -> None:
        """Submit a complete message to the queue. `size`: octets, our fields included; `user`: the authenticated user or "";
        `done(None)` is called once it is synced, `done(error)` if it could not be stored."""
        flags = HELD if transaction.held else 0
        if transaction.eight_bit:
            flags |= EIGHT_BIT
        if transaction.smtputf8:
            flags |= SMTPUTF8
        recipients = transaction.recipients
        if len(recipients) > 1 or "@" not in recipients[0]:
            recipients = list(dict.fromkeys(a if "@" in a else f"{a}@{self.hostname}" for a in recipients))
        if self._staging is not None:
            recipients = self._staging.recipients(recipients)
        queue = self.queue
        envelope = Envelope(
            sender=transaction.sender,
            recipients=recipients,
            size=size,
            flags=flags,
            arrived=wall_ms(),
            deadline=queue.deadline(),
            client=client.address,
            helo=helo,
            application=application,
            priority=priority,
            headers=transaction.headers,
            user=user,
        )
        queue.submit(ident, envelope, data, done)

    def not_signed(self, error: Exception) -> None:
        """Count and log a message that could not be signed."""
        self.counters.add(REFUSED_FILTER, 1)
        self.log.event("warning", text=f"a message could not be signed and was temporarily rejected: {error}")

    def not_verified(self, error: Exception) -> None:
        """Count and log a message of an unauthenticated client that could not be verified (SPF, DKIM, DMARC)."""
        self.counters.add(REFUSED_FILTER, 1)
        reason = f"{type(error).__name__}: {error}"
        self.log.event("warning", text=f"a message could not be verified and was temporarily rejected: {reason}")

    def count_dmarc(self, result: str, refusal: bytes | None) -> None:
        """Count the DMARC result of a message; `refusal`: the reply that rejects it, if any."""
        self.counters.add(DMARC[result], 1)
        if refusal is not None and refusal.startswith(b"4"):
            self.counters.add(REFUSED_FILTER, 1)

    def accepted(self, size: int, recipients: int) -> None:
        """Count a message that was acknowledged."""
        add = self.counters.add
        add(RECEIVED, 1)
        add(OCTETS, size)
        add(RECIPIENTS, recipients)

    def failed(self, error: StoreError) -> bytes:
        """Count a message that could not be stored; the reply for it (452 or 451)."""
        if isinstance(error, StoreFull):
            self.counters.add(REFUSED_FULL, 1)
            return reply.STORE_FULL
        self.counters.add(REFUSED_STORE, 1)
        return reply.STORE_ERROR


def _check_authors(identity: Identity, header: bytes, seen: int) -> bytes | None:
    """The reply that rejects a header with an author (From, Sender) that the account may not use, or with one that cannot be
    checked: only `seen` octets of the message data are known. None: all authors are allowed."""
    if too_long(header) or len(header) == seen >= HEADER_SEEN:  # fields after the known part may name other authors
        return reply.HEADER_TOO_LONG
    try:
        found = [str(mailbox) for mailbox in authors(header, (b"from", b"sender"))]
    except Malformed:
        return reply.BAD_AUTHOR
    foreign = next((author for author in found if not identity.may_send_as(author)), None)
    if foreign is None:
        return None
    return reply.format_reply(550, "5.7.1", f"{identity.name} may not write as <{foreign[:320]}> (senders of its account)")


def _accept_any(address: str, transaction: Transaction) -> bytes | None:
    return None


def _own_or_general(own: T | None, general: T) -> T:
    """A network's own value, or the general one where it has none."""
    return general if own is None else own
