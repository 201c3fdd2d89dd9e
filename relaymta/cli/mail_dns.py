"""The DNS records by which mail programs find the listeners of this relay (RFC 6186, 8314, 5804), and the file of autoconfig
(Thunderbird's ISPDB format, version 1.1; also K-9, Evolution, KMail)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from relaymta.config.values import is_loopback, parse_hostport

if TYPE_CHECKING:
    from relaymta.config import Config, Listener

__all__ = ["Record", "autoconfig_of", "records"]

# Service names by protocol: with TLS from the first octet, and with STARTTLS.
_SERVICES = {
    "imap": ("_imaps", "_imap"), "pop3": ("_pop3s", "_pop3"), "smtp": ("_submissions", "_submission"),
    "managesieve": ("", "_sieve"),
}  # fmt: skip

# (service, element, type, socketType) in the order of preference.
_AUTOCONFIG = (
    ("_imaps", "incomingServer", "imap", "SSL"), ("_imap", "incomingServer", "imap", "STARTTLS"),
    ("_pop3s", "incomingServer", "pop3", "SSL"), ("_pop3", "incomingServer", "pop3", "STARTTLS"),
    ("_submissions", "outgoingServer", "smtp", "SSL"), ("_submission", "outgoingServer", "smtp", "STARTTLS"),
)  # fmt: skip


class Record(NamedTuple):
    """A record in a zone file: "local.example." "MX" "10 mx.local.example."."""

    name: str
    kind: str
    value: str


def records(config: "Config", domain: str) -> Iterator[Record]:
    """The records of a domain whose mail is kept here. A service that nobody offers has the target "." (RFC 6186 3.4)."""
    host = f"{config.hostname}."
    yield Record(f"{domain}.", "MX", f"10 {host}")
    offered = _services(config)
    for name in (name for names in _SERVICES.values() for name in names if name):
        value = f"0 1 {offered[name]} {host}" if name in offered else "0 0 0 ."
        yield Record(f"{name}._tcp.{domain}.", "SRV", value)


def autoconfig_of(config: "Config", domains: list[str]) -> Iterator[str]:
    """The lines of config-v1.1.xml for some domains, in which the first server of a kind is what a program tries first."""
    offered = _services(config)
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    yield '<clientConfig version="1.1">'
    yield f'  <emailProvider id="{escape(config.hostname)}">'
    yield from (f"    <domain>{escape(domain)}</domain>" for domain in domains)
    for name, tag, kind, socket in _AUTOCONFIG:
        if name in offered:
            yield f'    <{tag} type="{kind}">'
            yield f"      <hostname>{escape(config.hostname)}</hostname>"
            yield f"      <port>{offered[name]}</port>"
            yield f"      <socketType>{socket}</socketType>"
            yield "      <username>%EMAILADDRESS%</username>"
            yield "      <authentication>password-cleartext</authentication>"  # within TLS
            yield f"    </{tag}>"
    yield "  </emailProvider>"
    yield "</clientConfig>"


def _services(config: "Config") -> dict[str, int]:
    """Ports by service; the first listener of each."""
    return dict(reversed([(name, port) for one in config.listener for name, port in _offered(one)]))


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
