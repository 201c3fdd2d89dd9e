"""Rules for clients, and the only way for a message into the queue: `prepend` adds the fields, `admit` submits it."""

import contextlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from relaymta.accept.aliases import MOST, UNKNOWN_ALIAS
from relaymta.accept.endpoint import Endpoint
from relaymta.accept.local import LocalRecipients
from relaymta.accept.once import FIELD, Once, Wanted, key_of
from relaymta.accept.origin import Client, Origin, Taken, protocol_of, spoken
from relaymta.accept.quota import Quotas
from relaymta.auth.identity import Identity, group_of, plain_address
from relaymta.config import Config, PeerNetwork
from relaymta.errors import StoreError, StoreFull, redacted
from relaymta.log import Log
from relaymta.metrics import COUNTERS, Counters, index
from relaymta.proto import reply
from relaymta.proto.address import compared, domain_matches, domain_of, domain_of_host, in_u_labels
from relaymta.proto.envelope import EIGHT_BIT, HELD, SMTPUTF8, UNSEEN, UTF8_HEADER, Body, Envelope, QueueName, held_because
from relaymta.proto.header import (
    HEADER_SEEN,
    begins_well,
    begun,
    count_received,
    field_names,
    header_end,
    message_id,
    received_field,
    rfc5322_date,
    too_long,
)  # fmt: skip
from relaymta.proto.session import Session
from relaymta.proto.transaction import NO_NAMES, Limits, Transaction
from relaymta.queue import Queue, format_id, wall_ms
from relaymta.route.staging import Redirection
from relaymta.route.table import RouteTable

if TYPE_CHECKING:
    from relaymta.accept.suppressed import Suppressed
    from relaymta.filter.conduct import Conduct
    from relaymta.proto.otlp import Traces

__all__ = ["Intake"]

CONNECTIONS_REFUSED = index("relaymta_connections_total", "refused")
RECEIVED = index("relaymta_messages_received_total")
OCTETS = index("relaymta_received_octets_total")
RECIPIENTS = index("relaymta_recipients_received_total")
REFUSED_CONTENT = index("relaymta_messages_refused_total", "content")
REFUSED_STORE = index("relaymta_messages_refused_total", "store")
REFUSED_FILTER = index("relaymta_messages_refused_total", "filter")
REFUSED_FULL = index("relaymta_messages_refused_total", "full")
RECIPIENTS_REFUSED = index("relaymta_recipients_refused_total")
_REJECTIONS = "relaymta_rejections_total"
REJECTIONS = {value: index(_REJECTIONS, value) for value in COUNTERS[_REJECTIONS][2]}
DELIVERED = index("relaymta_recipients_total", "delivered")
DELIVERED_OCTETS = index("relaymta_delivered_octets_total")

DMARC = {word: index("relaymta_dmarc_total", word) for word in ("pass", "none", "fail", "permerror", "temperror")}

# A local part that a later host could take for a source route: a%b, a!b, "a@b".
_ROUTED = re.compile("[%!@]")
_NO_OVERRIDES = PeerNetwork(networks=[])
TRUSTED_CONNECTIONS = 200  # of one client that may relay, at least
LOCAL_ERRORS = 1_000_000  # of a user of this machine: each recipient that is refused is one
FILTER_GROWTH = 1 << 20  # octets by which content filters may let a message grow
THIS_MACHINE = "127.0.0.1"
UNKNOWN = "0.0.0.0"  # the address of a client whose own is unknown
T = TypeVar("T")
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


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
        self.local: LocalRecipients | None = None  # None: no mailboxes are kept here
        self.conduct: Conduct | None = None  # None: nobody looks for abuse
        self.traces: Traces | None = None  # None: no message has spans
        self.once: Once | None = None  # set before the first client connects
        self.suppressed: Suppressed | None = None  # None: the suppression list is not used
        self.configure(config, routes)

    def configure(self, config: Config, routes: RouteTable) -> None:
        """Replace the configuration. Sessions under way keep the rules they began with."""
        self._config = config
        self._routes = routes
        self._domains = {compared(domain.rstrip(".")) for domain in config.relay.domains}
        self._local_domains = config.local_domains
        self._is_local_domain: dict[str, bool] = {}  # by the domain of a recipient
        self._trusted = _Networks.of(config.relay.networks)
        self._normalized = _Networks.of(config.intake.normalize_networks)
        self._long_lines = _Networks.of(config.intake.long_line_networks)
        self._staging = Redirection(config.staging.redirect, config.staging.allow) if config.staging.redirect else None
        self._peers = [(_Networks.of(peer.networks), peer) for peer in config.network]
        self._largest = max([config.limits.message_size, *(peer.message_size or 0 for peer in config.network)])
        self._clients: dict[str, Client] = {}

    def client(self, address: str) -> Client:
        """The rules for a client's address, as the system or a protocol gives it. ValueError: it is none."""
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
        limits = replace(found.limits, normalize=False, long_lines=False, lenient=False)
        unknown = replace(found, address=UNKNOWN, behind=found.address, limits=limits)
        return replace(unknown, trusted=False, xclient=False, xforward=False, application="", priority="", domain="")

    def local_client(self, user: str) -> Client:
        """The rules for a user of this machine, by sendmail(1): those for the machine itself, but that each user is counted by
        itself. What programs write there has long lines, and addresses that are none: the other recipients get the message."""
        found, domain = self.client(THIS_MACHINE), self._config.intake.complete_domain or domain_of_host(self.hostname)
        limits = replace(found.limits, errors=LOCAL_ERRORS, normalize=True, long_lines=True, lenient=True)
        found = replace(found, group=f"user {user}", limits=limits, trusted=True, xclient=False, xforward=False)
        return replace(found, connection_rate="", domain=domain, connections=max(found.connections, TRUSTED_CONNECTIONS))

    def returning(self, client: Client) -> Client:
        """The rules for a client of a listener with `filtered`, which is one of its `networks`: it gives back what has been taken
        before, from whatever client, so that it may relay, was counted, and may have grown. It speaks for no other client:
        XCLIENT would let one past the filters."""
        size = self._largest + FILTER_GROWTH
        recipients = max(client.limits.recipients, self._config.intake.recipients)
        limits = replace(client.limits, message_size=size, recipients=recipients, long_lines=True, lenient=True)
        found = replace(client, limits=limits, trusted=True, connections=max(client.connections, TRUSTED_CONNECTIONS))
        # Counted by itself: other clients of the filter's host must not keep from it the places by which mail comes back.
        found = replace(found, group=f"back {client.group}", connection_rate="", message_rate="", recipient_rate="")
        return replace(found, xclient=False, xforward=client.xforward or plain_address(client.address).is_loopback)

    def _rules(self, address: str) -> Client:
        config = self._config
        parsed = plain_address(address)
        own = next((peer for networks, peer in self._peers if parsed in networks), _NO_OVERRIDES)
        trusted = _own_or_general(own.relay, parsed in self._trusted)
        most = config.limits.connections_per_client
        limits = Limits(
            message_size=_own_or_general(own.message_size, config.limits.message_size),
            recipients=_own_or_general(own.recipients, config.intake.recipients),
            errors=config.intake.errors,
            normalize=_own_or_general(own.normalize, parsed in self._normalized),
            long_lines=_own_or_general(own.long_lines, parsed in self._long_lines or trusted),
            lenient=trusted,
        )
        connections = _own_or_general(own.connections, max(most, TRUSTED_CONNECTIONS) if trusted else most)
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
            xforward=own.xforward,
            domain=(config.intake.complete_domain or domain_of_host(self.hostname)) if trusted else "",
            login_domain=config.intake.complete_domain,
            postmaster=config.relay.postmaster,
        )

    def accept_sender(self, origin: Origin, size: int) -> bytes | None:
        """The check at MAIL: the 452 when there is no room for a message of `size` octets (0: not announced), or None. What a
        content filter gives back may use the reserve: the queue is full of what waits for the filter, and could not drain."""
        if self.out_of_memory:
            self.counters.add(REFUSED_FULL, 1)
            return reply.OUT_OF_MEMORY
        if self.conduct is not None and not origin.filtered and self.conduct.holds_much(origin.user, origin.application):
            self.counters.add(REFUSED_CONTENT, 1)
            return reply.TOO_MUCH_HELD
        queue = self.queue
        full = size >= queue.reserve if origin.filtered else queue.full or size > queue.room
        if full or queue.writer.stalled:
            self.counters.add(REFUSED_FULL, 1)
            return reply.STORE_FULL
        return None

    def accept_recipient(self, origin: Origin, address: str, transaction: Transaction, session: Session) -> bytes | None:
        """The check at RCPT: relay rights, or whether a mailbox exists; then rates and quotas. The reply that rejects the
        recipient, or None."""
        if "@" not in address:  # postmaster
            refused = None if origin.postmaster else reply.NO_POSTMASTER
        elif self._endpoint.aliases is not None and (led := self._led(origin, address, transaction)):
            refused = self._alias_refusal(origin, address, transaction, led)
        elif self.local is not None and self.is_local(address):
            found = self.local.refusal(address, transaction.announced)
            refused = reply.format_reply(*found) if found is not None else None
        elif origin.lmtp:
            refused = reply.NOT_KEPT_HERE
        else:
            refused = None if origin.may_relay else self._refusal(address)
        suppressed = self.suppressed if refused is None and "@" in address else None
        if suppressed is not None and suppressed.is_about(origin, transaction.sender):
            refused = suppressed.refusal(origin.application, address, self._reached(origin, address, transaction))
        if refused is not None:
            self.counters.add(RECIPIENTS_REFUSED, 1)
            self._rejected("rcpt", origin, session, transaction.sender, [address], refused)
            return refused
        return self._spend(origin.client, origin.identity, transaction)

    def _led(self, origin: Origin, address: str, transaction: Transaction) -> int:
        """To how many addresses an address leads as an alias of this machine; 0: it is none, UNKNOWN_ALIAS: it may be one, or
        one whose addresses are not known."""
        if self._endpoint.aliases is None or origin.lmtp:
            return 0
        aliases = self._endpoint.aliases.value
        if aliases is not None:
            return aliases.leads(address, address in _names(origin, transaction))
        return UNKNOWN_ALIAS if domain_of(address) in map(str.lower, self._config.alias_domains) else 0

    def _alias_refusal(self, origin: Origin, address: str, transaction: Transaction, led: int) -> bytes | None:
        """The reply that rejects an alias, or None. `led`: as of `_led`."""
        if led == UNKNOWN_ALIAS:
            return reply.RECIPIENTS_UNKNOWN
        refused = None if origin.may_relay or self.is_local(address) else self._refusal(address)
        if refused is None and transaction.led and transaction.led + led > MOST:
            return reply.TOO_MANY_RECIPIENTS  # the client sends the message again for this one
        transaction.led += 0 if refused is not None else led
        return refused

    def _reached(self, origin: Origin, address: str, transaction: Transaction) -> list[str]:
        """To whom an alias leads; nobody: it is none."""
        found = [address]
        if self._endpoint.aliases is not None and self._endpoint.aliases.value is not None:
            found = self._endpoint.aliases.value.expanded(found, _names(origin, transaction))
        if self.local is not None:
            found = self.local.expanded(found, self.is_local)
        return [] if found == [address] else found

    def is_local(self, address: str) -> bool:
        """Whether mail for an address is kept here, in mailboxes."""
        domain = domain_of(address)
        found = self._is_local_domain.get(domain)
        if found is None:
            if len(self._is_local_domain) > 10_000:
                self._is_local_domain.clear()
            found = self._is_local_domain[domain] = domain_matches(domain, self._local_domains)
        return found

    def _refusal(self, address: str) -> bytes | None:
        """The reply that rejects a recipient of an unauthenticated client, or None."""
        domain, (local, _, written) = domain_of(address), address.rpartition("@")
        if domain not in self._domains or not in_u_labels(written) or _ROUTED.search(local):
            return reply.RELAY_DENIED
        exists = self._endpoint.recipient_exists(compared(address), domain)
        if exists is None:
            return reply.RECIPIENTS_UNKNOWN
        return None if exists else reply.NO_SUCH_RECIPIENT

    def _spend(self, client: Client, identity: Identity | None, transaction: Transaction) -> bytes | None:
        """Take the units of a recipient, and with the first one those of the message, from rates and quotas: all or, when one is
        used up, none. The reply then, or None."""
        first = not transaction.counted  # others may have refused those before
        rates = [("message_rate", client.message_rate)] if first else []
        rates.append(("recipient_rate", client.recipient_rate))
        kinds = () if identity is None else ("messages", "recipients") if first else ("recipients",)
        with self.quotas.units() as units:
            for kind, rate in rates:
                refused = units.client(client.group, kind, rate) if rate else None
                if refused is not None:
                    return refused
            for kind in kinds:
                assert identity is not None
                refused = units.account(identity, kind, 1, transaction)
                if refused is not None:
                    return refused
            units.keep()
        transaction.counted = True
        return None

    def refused(self, transaction: Transaction, origin: Origin, session: Session, answer: bytes) -> None:
        """Count and log a message that was rejected after its message data. `answer`: the reply, 4xx or 5xx."""
        if answer.startswith(b"5"):  # 4xx was counted where it arose
            self.counters.add(REFUSED_CONTENT, 1)
        self._rejected("data", origin, session, transaction.sender, transaction.recipients, answer)

    def not_wanted(self, transaction: Transaction, origin: Origin, session: Session, recipient: str, answer: bytes) -> None:
        """Count and log that a filter refuses a recipient ("": the sender, or, where there are recipients, the message)."""
        if recipient:
            self.counters.add(RECIPIENTS_REFUSED, 1)
        recipients = [recipient] if recipient else transaction.recipients
        phase = "rcpt" if recipient else "data" if recipients else "mail"
        self._rejected(phase, origin, session, transaction.sender, recipients, answer)

    def not_asked_well(self, client: Client, user: str, answer: str) -> None:
        """Log a request by HTTP that was refused as a whole."""
        self.log.event(
            "rejected", phase="http", client=client.address, helo=user, protocol="HTTP", sender="", recipients=[], reply=answer
        )  # fmt: skip

    def client_not_wanted(self, verb: str, origin: Origin, session: Session, answer: bytes) -> None:
        """Count and log that a filter refuses a client: its connection, its name or its login."""
        if verb == "CONNECT":
            self.counters.add(CONNECTIONS_REFUSED, 1)
        self._rejected("connect", origin, session, "", [], answer)

    def foreign(self, client: Client, helo: str) -> None:
        """Count and log a connection that was closed because the client uses another protocol (HTTP, TLS)."""
        self.counters.add(CONNECTIONS_REFUSED, 1)
        self._tell_rejected("connect", client, helo, "", "", [], reply.NOT_SMTP)

    def _rejected(self, phase: str, origin: Origin, session: Session, sender: str, recipients: list[str], answer: bytes) -> None:
        self._tell_rejected(phase, origin.client, session.helo, spoken(origin, session), sender, recipients, answer)

    def _tell_rejected(
        self, phase: str, client: Client, helo: str, protocol: str, sender: str, recipients: list[str], answer: bytes
    ) -> None:
        self.counters.add(REJECTIONS[f"{phase} {'5xx' if answer.startswith(b'5') else '4xx'}"], 1)
        self.log.event(
            "rejected", phase=phase, client=client.address, helo=helo, protocol=protocol, sender=sender, recipients=recipients,
            reply=answer.decode("utf-8", "replace").strip(),
        )  # fmt: skip

    def edited(self, origin: Origin, start: bytes, whole: bool) -> bytes | None:
        """Message data, or the start of a large message (`whole` is false), as it is stored behind our fields: without `From `
        lines of mailboxes and forged results, and with the header of submitted mail changed. The same object where nothing is
        changed; None: a header that would have to be changed is too long, or does not end within `start`; the message is
        rejected."""
        if not begins_well(start):
            start = begun(start)
        if not origin.trusted:
            genuine = _without_forged_results(start, self.hostname, whole)
            if genuine is None:
                return None
            start = genuine
        if not origin.submitted:
            return start
        if not whole and header_end(start) == len(start):
            return None
        from relaymta.proto.submitted import submitted  # as below, where it is needed: most workers start without it

        return submitted(start, origin.domain)

    def prepend(
        self, ident: int, transaction: Transaction, origin: Origin, session: Session, start: bytes
    ) -> list[bytes] | bytes:
        """The fields to add before a message whose message data (as `edited`) begins with `start` (HEADER_SEEN octets suffice);
        or the reply that rejects it. Sets `transaction.headers`, `message_id` and `utf8_header`."""
        end, identity = header_end(start), origin.identity
        header = start[:end]
        if identity is not None and identity.senders:
            refused = _check_authors(identity, header, len(start))
            if refused is not None:
                return refused
        if self._routes.looks_at_headers:
            from relaymta.proto.mailbox import Malformed

            try:
                transaction.headers = self._routes.headers_met(header[:HEADER_SEEN])
            except Malformed:
                return reply.BAD_AUTHOR
        if count_received(header) > self._config.intake.hops:
            return reply.TOO_MANY_HOPS
        now = wall_ms() // 1000
        name = format_id(ident)
        protocol = protocol_of(origin, session, transaction.smtputf8)
        recipients = transaction.recipients
        fields = received_field(
            hostname=self.hostname,
            helo=session.helo,
            client=origin.client.address,
            protocol=protocol,
            ident=name,
            recipient=recipients[0] if len(recipients) == 1 else "",
            seconds=now,
            tls=session.tls,
        )
        if FIELD in header.lower() and not origin.filtered:
            key = key_of(header)
            if key is None and origin.may_relay:
                return reply.BAD_KEY
            transaction.key, transaction.keyed = key or "", origin.may_relay
        transaction.message_id = message_id(header)
        transaction.utf8_header = transaction.smtputf8 and not header.isascii()
        if origin.submission:
            names = field_names(header)
            if b"message-id" not in names:
                transaction.message_id = f"<{name}@{self.hostname}>"
                fields += f"Message-ID: {transaction.message_id}\r\n".encode()
            if b"date" not in names:
                fields += f"Date: {rfc5322_date(now)}\r\n".encode()
        if self._staging is not None:
            fields = self._staging.banner(recipients) + fields
        if not end:
            fields += b"\r\n"  # there is no header: the first line of the body must not become part of our fields
        return [fields]

    def changed(self, transaction: Transaction, header: bytes) -> None:
        """Filters have changed the header of a message: what follows from it."""
        if not header.isascii():
            transaction.eight_bit, transaction.utf8_header = True, transaction.smtputf8
        transaction.headers = self._headers(header, transaction.headers)

    def admit(
        self,
        ident: int,
        transaction: Transaction,
        recipients: list[str],
        origin: Origin,
        helo: str,
        data: list[bytes] | Body,
        size: int,
        done: Callable[[StoreError | None], None],
        wanted: Wanted | None = None,
    ) -> None:
        """Submit a complete message to the queue, for these recipients. `size`: octets, our fields included; `done(None)` is
        called once it is synced, `done(error)` if it could not be stored; `wanted`: what its application wants of it."""
        if self.conduct is not None and not origin.filtered:
            self._watch(self.conduct, transaction, recipients, origin, size)
        flags = HELD if transaction.held else UNSEEN if transaction.unseen is not None else 0
        if transaction.eight_bit:
            flags |= EIGHT_BIT
        if transaction.smtputf8:
            flags |= SMTPUTF8
        if transaction.utf8_header:
            flags |= UTF8_HEADER
        names = NO_NAMES if self._endpoint.aliases is None else _names(origin, transaction)
        if len(recipients) > 1 or "@" not in recipients[0]:
            if self._endpoint.aliases is not None:
                names = _with_postmaster(names, origin, recipients)
            recipients = list(dict.fromkeys(a if "@" in a else origin.postmaster for a in recipients))
        if self.local is not None or self._staging is not None or self._endpoint.aliases is not None:
            recipients = self.expanded(recipients, names)
        queue = self.queue
        envelope = Envelope(
            sender=transaction.sender,
            recipients=recipients,
            size=size,
            flags=flags,
            arrived=wall_ms(),
            deadline=queue.deadline(),
            client=origin.client.address,
            helo=helo,
            application=origin.application,
            priority=origin.priority,
            headers=transaction.headers,
            user=origin.user,
            message_id=transaction.message_id,
            held_for=held_because(transaction.held) if transaction.held else "",
            listener=origin.listener,
            forwarded=transaction.forwarded,
            unseen=transaction.unseen,
            quarantine=transaction.quarantine,
            route=transaction.route,
        )
        request = None
        if wanted is not None:
            self._as_wanted(envelope, wanted)
            request = wanted.request
        began = 0.0
        if self.traces is not None and self.traces.of(format_id(ident), envelope.traceparent) is not None:
            began = (wanted is not None and wanted.began) or transaction.began_at
        queue.submit(ident, envelope, data, done, request, began)

    def _as_wanted(self, envelope: Envelope, wanted: Wanted) -> None:
        envelope.tags, envelope.traceparent = wanted.tags, wanted.traceparent
        envelope.priority = wanted.priority or envelope.priority
        envelope.receipt = int(self._config.intake.receipts_keep * 1000)
        later = wanted.send_at - wall_ms()
        if wanted.send_at and later > 0:
            envelope.not_before = self.queue.clock.now() + later
            envelope.deadline += later

    def _watch(self, conduct: "Conduct", transaction: Transaction, recipients: list[str], origin: Origin, size: int) -> None:
        """Count what an account sends, and hold it where that is not as usual."""
        state = conduct.took(origin.user, origin.application, origin.client.address, recipients)
        if state is not None:
            from relaymta.filter.quarantine import of_abuse

            conduct.held(state, size)
            transaction.held = transaction.held or f"{state.by}: {state.reason}"
            transaction.quarantine = transaction.quarantine or of_abuse(state, self.queue.clock.now())

    def expanded(self, recipients: list[str], names: Mapping[str, bool] = NO_NAMES) -> list[str]:
        """Those for whom a message for these is queued: aliases, and redirection while it is tried out, are followed. `names`: as
        of `Transaction.names`."""
        if self._endpoint.aliases is not None and self._endpoint.aliases.value is not None:
            recipients = self._endpoint.aliases.value.expanded(recipients, names)
        if self.local is not None:
            recipients = self.local.expanded(recipients, self.is_local)
        return recipients if self._staging is None else self._staging.recipients(recipients)

    def routed(self, recipients: list[str], origin: Origin) -> list[tuple[str, QueueName]]:
        """The queue in which a message would wait for each of these."""
        found = []
        for address in recipients:
            envelope = Envelope("", [address], 0, 0, 0, 0, application=origin.application, priority=origin.priority)
            envelope.client, envelope.user, envelope.listener = origin.client.address, origin.user, origin.listener
            found += [(address, name) for name, _ in self._routes.assign(envelope)]
        return found

    def signed_as(self, data: bytes, origin: Origin) -> list[str]:
        """The domains in whose name a message would be signed."""
        from relaymta.filter.signing import Unsignable  # as above

        signer = self._endpoint.signer
        if not signer or not origin.may_relay:
            return []
        try:
            draft = signer.draft(b"", data, origin.application, partly=True)
        except Unsignable:
            return []
        return [] if draft is None else draft.domains

    def readdressed(self, recipients: list[str]) -> list[str]:
        """As `expanded`, of recipients that filters have given a message in the queue."""
        postmaster = self._config.relay.postmaster
        return self.expanded(list(dict.fromkeys(a if "@" in a else postmaster for a in recipients)))

    @property
    def postmaster(self) -> str:
        """Who sends what an operator sends."""
        return self._config.relay.postmaster or f"postmaster@{self.hostname}"

    def rewritten(self, envelope: Envelope, header: bytes) -> None:
        """As `changed`, of a message in the queue."""
        if not header.isascii():
            envelope.flags |= EIGHT_BIT | (UTF8_HEADER if envelope.flags & SMTPUTF8 else 0)
        envelope.headers = self._headers(header, envelope.headers)

    def _headers(self, header: bytes, before: list[str]) -> list[str]:
        """The conditions of routes that a header meets that filters have changed."""
        if self._routes.looks_at_headers:
            from relaymta.proto.mailbox import Malformed

            with contextlib.suppress(Malformed):  # as it came it was not
                return self._routes.headers_met(header[:HEADER_SEEN])
        return before

    def not_signed(self, error: Exception) -> None:
        """Count and log a message that could not be signed."""
        self.counters.add(REFUSED_FILTER, 1)
        self.log.event("warning", text=f"a message could not be signed and was temporarily rejected: {error}")

    def not_stored(self, error: Exception) -> None:
        """Count and log a message that was temporarily rejected after an internal error."""
        self.counters.add(REFUSED_STORE, 1)
        reason = redacted(f"{type(error).__name__}: {error}")
        self.log.event("warning", text=f"a message could not be stored and was temporarily rejected: {reason}")

    def not_verified(self, error: BaseException) -> None:
        """Count and log a message of an unauthenticated client that could not be verified (SPF, DKIM, DMARC)."""
        self.counters.add(REFUSED_FILTER, 1)
        reason = f"{type(error).__name__}: {error}"
        self.log.event("warning", text=f"a message could not be verified and was temporarily rejected: {reason}")

    def count_dmarc(self, result: str, refusal: bytes | None) -> None:
        """Count the DMARC result of a message ("": it was not evaluated); `refusal`: the reply that rejects it, if any."""
        if result:
            self.counters.add(DMARC[result], 1)
        if refusal is not None and refusal.startswith(b"4"):
            self.counters.add(REFUSED_FILTER, 1)

    def count_filtered(self, answer: bytes) -> None:
        """Count a message that a filter has refused; 5xx is counted as content (see `refused`)."""
        if answer.startswith(b"4"):
            self.counters.add(REFUSED_FILTER, 1)

    def accepted(self, size: int, recipients: int) -> None:
        """Count a message that was acknowledged."""
        add = self.counters.add
        add(RECEIVED, 1)
        add(OCTETS, size)
        add(RECIPIENTS, recipients)

    def landed(self, ident: int, transaction: Transaction, origin: Origin, session: Session, size: int, taken: Taken) -> None:
        """Count and log a message of an LMTP client, as it is answered."""
        for address, answer in taken.refused:
            self.counters.add(RECIPIENTS_REFUSED, 1)
            self._rejected("data", origin, session, transaction.sender, [address], answer)
        if not taken.recipients:
            return
        self.accepted(size, len(taken.recipients))
        name, stays = format_id(ident), {"stays": True} if taken.queued else {}
        self.log.event(
            "received", id=name, sender=transaction.sender, recipients=taken.recipients, size=size, client=origin.client.address,
            helo=session.helo, user=origin.user, application=origin.application, message_id=transaction.message_id, **stays,
        )  # fmt: skip
        if taken.filed:
            self.counters.add(DELIVERED, len(taken.filed))
            self.counters.add(DELIVERED_OCTETS, size)
            self.log.event(
                "delivered", id=name, recipients=taken.filed, route="", peer="mailbox", address="", port=0, tls="", cipher="",
                reply="250 2.1.5 filed", delay=taken.delay, attempt=1, users=taken.users, **stays,
            )  # fmt: skip

    def failed(self, error: StoreError) -> bytes:
        """Count a message that could not be stored; the reply for it (452 or 451)."""
        if isinstance(error, StoreFull):
            self.counters.add(REFUSED_FULL, 1)
            return reply.STORE_FULL
        self.counters.add(REFUSED_STORE, 1)
        return reply.STORE_ERROR


def _names(origin: Origin, transaction: Transaction) -> Mapping[str, bool]:
    """Recipients who are names of this machine, in mail of its users, who write `root` alone; none for other clients."""
    return transaction.names if origin.listener.startswith("unix:") else NO_NAMES


def _with_postmaster(names: Mapping[str, bool], origin: Origin, recipients: list[str]) -> Mapping[str, bool]:
    """`_names` of a message for these, of which `postmaster` is one, too, unless relay.postmaster says which address that is."""
    if origin.client.postmaster or not origin.listener.startswith("unix:") or all("@" in one for one in recipients):
        return names
    return {**names, origin.postmaster: origin.postmaster in recipients}


def _without_forged_results(start: bytes, hostname: str, whole: bool) -> bytes | None:
    """The start of message data (`whole`: all of it) without Authentication-Results in our name; None when there may be some
    behind it, or its header is too long to be parsed."""
    header = start[: header_end(start)]
    if not whole and len(header) == len(start):
        return None
    if b"authentication-results" not in header.lower():
        return start
    if too_long(header):
        return None
    from relaymta.proto.authres import without_forged

    kept = without_forged(header, hostname)
    return start if kept is header else kept + start[len(header) :]


def _check_authors(identity: Identity, header: bytes, seen: int) -> bytes | None:
    """The reply that rejects a header with an author (From, Sender) that the account may not use, or with one that cannot be
    checked: only `seen` octets of the message data are known. None: all authors are allowed."""
    if too_long(header) or len(header) == seen >= HEADER_SEEN:  # fields after the known part may name other authors
        return reply.HEADER_TOO_LONG
    from relaymta.proto.mailbox import Malformed, authors

    try:
        found = [str(mailbox) for mailbox in authors(header, (b"from", b"sender"))]
    except Malformed:
        return reply.BAD_AUTHOR
    foreign = next((author for author in found if not identity.may_send_as(author)), None)
    if foreign is None:
        return None
    denied = reply.format_reply(550, "5.7.1", f"{identity.name} may not write as <{foreign[:320]}> ({identity.said_by})")
    return reply.for_now(denied) if identity.unsure else denied


def _own_or_general(own: T | None, general: T) -> T:
    """A network's own value, or the general one where it has none."""
    return general if own is None else own
