"""The DNS records by which mail programs find the listeners of this relay (RFC 6186, 8314, 5804)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from relaymta.config.values import is_loopback, parse_hostport

if TYPE_CHECKING:
    from relaymta.config import Config, Listener

__all__ = ["Record", "records"]

# Service names by protocol: with TLS from the first octet, and with STARTTLS.
_SERVICES = {
    "imap": ("_imaps", "_imap"), "pop3": ("_pop3s", "_pop3"), "smtp": ("_submissions", "_submission"),
    "managesieve": ("", "_sieve"),
}  # fmt: skip


class Record(NamedTuple):
    """A record in a zone file: "local.example." "MX" "10 mx.local.example."."""

    name: str
    kind: str
    value: str


def records(config: "Config", domain: str) -> Iterator[Record]:
    """The records of a domain whose mail is kept here. A service that nobody offers has the target "." (RFC 6186 3.4)."""
    host = f"{config.hostname}."
    yield Record(f"{domain}.", "MX", f"10 {host}")
    offered = dict(reversed([(name, port) for one in config.listener for name, port in _offered(one)]))
    for name in (name for names in _SERVICES.values() for name in names if name):
        value = f"0 1 {offered[name]} {host}" if name in offered else "0 0 0 ."
        yield Record(f"{name}._tcp.{domain}.", "SRV", value)


def _offered(listener: "Listener") -> Iterator[tuple[str, int]]:
    """The service that a listener is; none for SMTP without logins, on loopback addresses, or without TLS."""
    host, port = parse_hostport(listener.address)
    loopback = host == "localhost" or is_loopback(host)
    if loopback or listener.protocol not in _SERVICES or (listener.protocol == "smtp" and listener.auth == "off"):
        return
    secure, starttls = _SERVICES[listener.protocol]
    name = secure if listener.tls == "implicit" else starttls if listener.tls != "off" else ""
    if name:
        yield name, port
