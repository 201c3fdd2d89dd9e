"""Webhooks: who is told of what has become of mail."""

import ipaddress
from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from relaymta.config.values import Duration, Name, Network, Reload, Size, Table, hook_url, in_clear

__all__ = ["Webhook", "WebhooksTable", "is_private"]

Event = Literal["accepted", "deferred", "delivered", "bounced", "held", "released", "complained"]
# What the registry says of more than ipaddress knows, or otherwise: NAT64 (RFC 6052, 8215), 6to4, Teredo, site-local ones (RFC
# 3879: where they are still used, they are those of a private network), and addresses with an IPv4 one in them.
_EMBEDDING = [ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "2002::/16", "::/96", "::ffff:0:0:0/96")]
_NOT_PUBLIC = [
    ipaddress.ip_network(text) for text in ("64:ff9b:1::/48", "2001::/32", "100.64.0.0/10", "192.88.99.0/24", "fec0::/10")
]


def is_private(address: str) -> bool:
    """Whether an IP address is not one of a host in the Internet: private, loopback, link-local (and so that of a cloud's
    metadata), shared, reserved or multicast; also inside one that embeds it (IPv4-mapped, NAT64, 6to4)."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or _embedded(found)
        if inner is not None:
            return is_private(str(inner))
    listed = any(found.version == network.version and found in network for network in _NOT_PUBLIC)
    return listed or not found.is_global or found.is_multicast or found.is_reserved or found.is_unspecified


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    for network in _EMBEDDING:
        if address in network:
            bits = 80 if network.prefixlen == 16 else 0
            return ipaddress.IPv4Address(int(address) >> bits & 0xFFFFFFFF)
    return None


class Webhook(Table):
    """Who is told of what becomes of mail: by POST of JSON, signed as Standard Webhooks are, again until there is a 2xx.
    `[[webhook]]`, repeatable. docs/webhooks.md."""

    name: Reload[Name] = Field(description="its name in log, metrics and on the command line")
    url: Reload[Annotated[str, AfterValidator(hook_url)]] = Field(description="https:// URL that requests are sent to")
    secret_file: Reload[str] = Field(
        description='file with the secret that signs requests ("whsec_" and 24 to 64 octets in base64)'
    )
    other_secret_file: Reload[str] = Field(
        "", description="file with one that signs them, too, while whoever verifies them goes over to another"
    )
    events: Reload[list[Event]] = Field(
        [], description="which: accepted, deferred, delivered, bounced, held, released, complained; empty: all"
    )
    applications: Reload[list[str]] = Field([], description="only of mail of these applications; empty: of all mail")
    batch: Reload[int] = Field(500, ge=1, le=500, description="events in one request, at most")
    timeout: Reload[Duration] = Field(15, gt=0, le=300, description="for connecting and the response, all in all")
    retry: Reload[Duration] = Field(
        3 * 86400,
        ge=60,
        description="for how long an event is sent again, from when it happened; then it is dropped, and counted",
    )
    private: Reload[bool] = Field(
        False, description="also to private, loopback and link-local addresses, and over http:// to other hosts"
    )
    networks: Reload[list[Network]] = Field([], description="also to addresses in these networks")
    ca_file: Reload[str] = Field(
        "", description="file of the CAs that its certificate is verified by; empty: those of the system"
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        """As of all tables."""
        if not self.secret_file:
            yield "secret_file", "is empty: give the file of a secret; docs/webhooks.md says how one is made"
        host = urlsplit(self.url).hostname or ""
        if in_clear(self.url) and not self.private:
            yield "url", "addresses would go over plain http to another host: use https://, or set private = true"
        try:
            closed = not self.private and not self.allows(host)
        except ValueError:
            closed = host == "localhost" and not self.private and not self.allows("127.0.0.1") and not self.allows("::1")
        if closed:
            yield "url", f"{host} is not an address in the Internet: set private = true, or name its network (networks)"

    def allows(self, address: str) -> bool:
        """Whether requests are sent to an IP address. ValueError: it is none."""
        if self.private or not is_private(address):
            return True
        found = ipaddress.ip_address(address.partition("%")[0])
        mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
        found = mapped or found
        networks = [ipaddress.ip_network(text) for text in self.networks]
        return any(found.version == network.version and found in network for network in networks)


class WebhooksTable(Table):
    """The journal of events, from which webhooks are served. `[webhooks]`"""

    keep: Reload[Duration] = Field(3 * 86400, ge=60, description="for how long events are kept, whether they were sent or not")
    store: Reload[Size] = Field(
        1 << 30, ge=1 << 20, description="octets on the disk of the spool, all in all; the oldest events give way. Where mail "
        "needs the room, there are fewer",
    )  # fmt: skip
