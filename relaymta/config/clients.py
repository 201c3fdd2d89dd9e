"""Where mail comes from: listeners, certificates, networks of clients, who may relay."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from relaymta.config.networks import everywhere, widest
from relaymta.config.values import (
    Address,
    Domain,
    Duration,
    Mailbox,
    Network,
    Quota,
    Reload,
    Restart,
    Size,
    Table,
    is_loopback,
    parse_hostport,
)

__all__ = ["Application", "Certificate", "Intake", "Listener", "PeerNetwork", "Relay"]

LOOPBACK = ["127.0.0.0/8", "::1/128"]


class Listener(Table):
    """An address to accept mail on. `[[listener]]`, repeatable."""

    address: Restart[Address] = Field(description="host:port to listen on")
    protocol: Restart[Literal["smtp", "http", "lmtp", "pop3", "imap", "managesieve"]] = Field(
        "smtp", description="http: applications hand in mail by HTTP (docs/injection.md); lmtp (RFC 2033): clients that may "
        "relay deliver into mailboxes, past the queue; the reply for each recipient follows when the mailbox has the message; "
        "pop3 (RFC 1939), imap (RFC 9051, 3501): users read their mail; managesieve (RFC 5804, port 4190): they edit their Sieve "
        "scripts",
    )  # fmt: skip
    application: Restart[str] = Field(
        "", description="application of mail accepted here, as routes, limits and log records name it"
    )
    priority: Restart[Literal["express", "normal", "bulk"]] = Field("normal", description="class of mail accepted here")
    submission: Restart[bool] = Field(
        False, description="add Date: and Message-ID: where they are missing; remove Bcc: and Return-Path:, complete addresses, "
        "as in mail of users who log in (RFC 6409 8); http: always",
    )  # fmt: skip
    tls: Restart[Literal["off", "may", "require", "implicit"]] = Field(
        "may", description="may: STARTTLS if there is a certificate; require: no mail before STARTTLS; implicit: TLS from the "
        "first octet (port 465). http: implicit (https), or off on a loopback address",
    )  # fmt: skip
    auth: Restart[Literal["off", "may", "require"]] = Field(
        "off",
        description="AUTH, offered over TLS; may: clients that log in may relay; require: no mail before AUTH. http: Basic, or "
        "Bearer with an OAuth token; without a login only clients that may relay",
    )
    proxy: Restart[list[Network]] = Field(
        [],
        description="load balancers that send a PROXY header (version 1 or 2); if given, no other client may connect",
    )
    auth_in_clear: Restart[bool] = Field(
        False, description="offer AUTH (http: take credentials) without TLS; only on a loopback address"
    )
    filtered: Restart[bool] = Field(
        False,
        description="a content filter gives mail back here by SMTP: no filter looks at it again, it is neither verified nor "
        "signed; clients in `networks` may relay, and no other client may connect",
    )
    networks: Restart[list[Network]] = Field(LOOPBACK, description="the content filter's hosts, with filtered = true")

    def problems(self) -> Iterator[tuple[str, str]]:
        host = parse_hostport(self.address)[0]
        if self.auth_in_clear and not (host == "localhost" or is_loopback(host)):
            yield "auth_in_clear", f"{self.address} is not a loopback address: passwords would be sent in clear"
        if self.auth != "off" and self.tls == "off" and not self.auth_in_clear:
            yield "auth", "needs tls, or auth_in_clear on a loopback address: no client could log in"
        if self.protocol == "lmtp":
            yield from self._not_for_lmtp()
        if self.protocol == "http":
            yield from self._not_for_http(host)
        if self.filtered:
            yield from self._not_for_filtered()
        elif self.networks != LOOPBACK:
            yield "networks", "needs filtered = true: other clients are told apart by relay.networks and [[network]]"
        if self.reads_mail:
            yield from self._not_for_readers()

    @property
    def is_local(self) -> bool:
        """Whether it is the socket of sendmail(1), where the kernel says who the client is."""
        return self.address.startswith("unix:")

    @property
    def reads_mail(self) -> bool:
        """Whether users log in here to read their mail, or to edit their scripts."""
        return self.protocol in ("pop3", "imap", "managesieve")

    def _not_for_http(self, host: str) -> Iterator[tuple[str, str]]:
        if self.tls not in ("off", "implicit"):
            yield "tls", 'is to be given with protocol = "http": "implicit" (https), or "off" on a loopback address'
        elif self.tls == "off" and not (host == "localhost" or is_loopback(host)):
            yield "tls", f'"off" on {self.address}: mail and passwords would be sent in clear; "implicit", or a loopback address'

    def _not_for_readers(self) -> Iterator[tuple[str, str]]:
        for key in ("submission", "application", "priority", "auth"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield key, f'it has no meaning with protocol = "{self.protocol}": users log in there to read mail'
        if self.tls == "off" and not self.auth_in_clear:
            yield "tls", '"off" needs auth_in_clear, on a loopback address: no user could log in'

    def _not_for_filtered(self) -> Iterator[tuple[str, str]]:
        if self.protocol != "smtp":
            yield "filtered", f'it has no meaning with protocol = "{self.protocol}": content filters give mail back by SMTP'
        for key in ("submission", "auth", "proxy"):
            if getattr(self, key) != type(self).model_fields[key].default:
                yield key, "it has no meaning with filtered = true: that was done where the mail came in first"
        if not self.networks:
            yield "networks", "nobody could give mail back: name the content filter's hosts"
        elif everywhere(self.networks):
            yield "networks", f"{widest(self.networks)} may relay past all filters here: name the content filter's hosts only"

    def _not_for_lmtp(self) -> Iterator[tuple[str, str]]:
        if parse_hostport(self.address)[1] == 25:
            yield "address", f"{self.address}: LMTP must not be spoken on port 25, which is that of SMTP (RFC 2033 1)"
        for key, given in (("submission", self.submission), ("proxy", self.proxy)):
            if given:
                yield key, 'it has no meaning with protocol = "lmtp": a mail server delivers there'
        if self.auth == "may":
            yield "auth", '"may" has no meaning with protocol = "lmtp": "require" a login, or name the clients in relay.networks'


class Certificate(Table):
    """A certificate for TLS with clients. `[[certificate]]`, repeatable; the one for the server name that a client asks for (SNI)
    is used, else the first. Files are read again when they change."""

    chain: Reload[str] = Field(description="PEM file: the certificate, then its intermediate certificates")
    key: Reload[str] = Field("", description="PEM file of the private key; empty: it is in the same file")


class PeerNetwork(Table):
    """Settings for clients in some networks; they override the tables below. `[[network]]`, repeatable; the first match holds."""

    networks: Reload[list[Network]] = Field(description="the clients' networks")
    application: Reload[str] = Field("", description="application of their mail; overrides the listener's")
    priority: Reload[Literal["express", "normal", "bulk"] | None] = Field(None, description="class of their mail")
    relay: Reload[bool | None] = Field(None, description="whether they may relay")
    normalize: Reload[bool | None] = Field(
        None, description="whether bare LF is replaced by CRLF, and bare CR and NUL by a space"
    )
    long_lines: Reload[bool | None] = Field(None, description="whether lines may be longer than 998 octets")
    message_size: Reload[Size | None] = Field(None, gt=0, description="maximum size of a message (octets)")
    recipients: Reload[int | None] = Field(None, ge=1, le=65535, description="maximum recipients of a message")
    connections: Reload[int | None] = Field(None, ge=1, description="maximum concurrent connections from one address")
    connection_rate: Reload[Quota | None] = Field(None, description='rate of new connections from one address, such as "60/m"')
    message_rate: Reload[Quota | None] = Field(None, description="rate of messages from one address")
    recipient_rate: Reload[Quota | None] = Field(None, description="rate of recipients from one address")
    xclient: Reload[bool] = Field(False, description="whether they may send XCLIENT to set the client's name and address")
    xforward: Reload[bool] = Field(
        False, description="whether they may send XFORWARD to name the client of a message, for the log: content filters"
    )


class Application(Table):
    """Settings for the mail of one application. `[[application]]`, repeatable."""

    name: Reload[str] = Field(description="name, as in listeners, networks and accounts")
    weight: Reload[int] = Field(
        1, ge=1, le=100, description="messages in a turn where several applications wait for the same site"
    )


class Relay(Table):
    """Who may relay, and for which domains. `[relay]`"""

    networks: Reload[list[Network]] = Field(LOOPBACK, description="clients that may relay")
    domains: Reload[list[str]] = Field([], description="recipient domains that mail is accepted for from any client")
    recipients: Reload[str] = Field(
        "",
        description='file of valid recipients in these domains, one "a@example.com" or "@example.com" a line; others are '
        "rejected; empty: all are valid",
    )
    postmaster: Reload[Mailbox] = Field(
        "",
        description="address that mail for `postmaster` without a domain is sent to (RFC 5321 4.5.1); empty: rejected, or from "
        "clients whose addresses are completed, postmaster of that domain",
    )
    local_users: Reload[list[str]] = Field(
        [], description='users of this machine who may send by sendmail(1) as anybody, beside root and the relay\'s user; "*": '
        "all. Others send as themselves; docs/sendmail.md",
    )  # fmt: skip
    open_relay: Reload[bool] = Field(
        False, description="start even if much of the Internet may relay, or set client addresses by PROXY or XCLIENT"
    )


class Intake(Table):
    """How mail is accepted. `[intake]`"""

    normalize_networks: Reload[list[Network]] = Field(
        [], description="clients whose bare LF is replaced by CRLF, and bare CR and NUL by a space; rejected from others"
    )
    long_line_networks: Reload[list[Network]] = Field(LOOPBACK, description="clients whose lines may be longer than 998 octets")
    complete_domain: Reload[Domain] = Field(
        "",
        description="domain added to addresses without one (`root`), in the envelope and in the header of submitted mail, for "
        "clients that may relay; empty: the domain of `hostname`, for networks that may relay only",
    )
    idempotency_keep: Reload[Duration] = Field(
        86_400, gt=0, description="how long an idempotency key (Idempotency-Key of HTTP, X-Relay-Idempotency of SMTP) is "
        "remembered: what is handed in again under it is not sent again",
    )  # fmt: skip
    receipts_keep: Reload[Duration] = Field(
        7 * 86_400, gt=0, description="how long after its end an application can ask what has become of a message that it has "
        "handed in by HTTP, or with an idempotency key",
    )  # fmt: skip
    hops: Reload[int] = Field(50, ge=1, description="maximum number of Received: fields; a message with more is in a loop")
    errors: Reload[int] = Field(20, ge=1, description="errors after which a connection is closed")
    shed_lag: Reload[Duration] = Field(
        0.1,
        description="load shedding: new clients get 421 when the event loop is later than this three times in 5 s; 0: off",
    )
    tarpit: Reload[Duration] = Field(1, description="delay before each reply to a client that has made more than three errors")
    recipients: Reload[int] = Field(1000, ge=100, le=65535, description="maximum recipients of a message (RFC 5321 4.5.3.1.8)")
    command_timeout: Reload[Duration] = Field(300, gt=0, description="time to wait for a command")
    data_timeout: Reload[Duration] = Field(180, gt=0, description="time to wait for the next block of message data")
    flow_delay: Reload[Duration] = Field(
        0.02, description="flow control: delay of each 250 while message data arrives faster than it leaves; 0: off"
    )
    data_rate: Reload[int] = Field(500, ge=0, description="minimum rate of message data (octets a second)")
