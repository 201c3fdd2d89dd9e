"""Answers to the questions of `relaymta init`: which are possible, in which form they are kept, and what is usual. A check takes
an answer and those before it; ValueError for one that is not possible."""

import ipaddress
import os
import pwd
import socket
from dataclasses import dataclass, field
from typing import Any

from relaymta.cli.options import absolute, home

__all__ = [
    "MISSING", "USER", "Answers", "address", "ca_file", "domain", "give_ports", "hostname", "listen", "login", "network",
    "password", "selector", "smart_host", "tls", "user", "usual_domain", "usual_hostname", "usual_listen", "usual_sender",
    "usual_spool", "usual_user",
]  # fmt: skip

SUBMISSION, SMTP = 587, 25  # the port of a smart host that is given without one: with a login (RFC 6409), and without
USER = "relaymta"  # whom the relay runs as, where there is such a user
SPOOL = "/var/lib/relaymta"
MISSING = "\0"  # what is usual where nothing is


@dataclass
class Answers:
    """All answers. `smarthosts`: host:port each, none: mail goes to the MX of each domain; `username`: "" without a login;
    `password`: "" where it is in `password_file` already; `domain`: as it was written; `user`: "" for the one who starts the
    relay; `to`: "" for no test message; `sender`: its envelope sender."""

    smarthosts: list[str] = field(default_factory=list)
    tls: str = "verify"
    ca_file: str = ""
    username: str = ""
    password: str = ""
    password_file: str = ""
    domain: str = ""
    hostname: str = ""
    networks: list[str] = field(default_factory=list)
    listen: list[str] = field(default_factory=list)
    user: str = ""
    spool: str = ""
    selector: str = ""
    dkim: bool = True
    to: str = ""
    sender: str = ""

    @property
    def host(self) -> str:
        """The first smart host's name, without the port."""
        return _hostport(self.smarthosts[0])[0]


# What is possible


def _hostport(text: str, port: int = SMTP) -> tuple[str, int]:
    from relaymta.config import parse_hostport

    return parse_hostport(text, port)


def _typed(kind: Any, text: str) -> Any:
    """A value of a type of the configuration."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def smart_host(text: str, found: Answers) -> str:
    from relaymta.config.values import Host

    if text.startswith("unix:"):
        raise ValueError(f"{text!r}: a smart host speaks SMTP; a socket for LMTP is a [[route]] of its own (docs/delivery.md)")
    return str(_typed(Host, text))


def give_ports(found: Answers) -> None:
    """Give smart hosts without a port the one that is usual."""
    port = SUBMISSION if found.username else SMTP
    pairs = [_hostport(text, port) for text in found.smarthosts]
    found.smarthosts = [f"[{host}]:{at}" if ":" in host else f"{host}:{at}" for host, at in pairs]


def tls(text: str, found: Answers) -> str:
    if text not in ("verify", "encrypt", "may", "off"):
        raise ValueError(f"{text!r}: expected verify, encrypt, may or off")
    if text != "verify" and found.username:
        raise ValueError(f"{text!r}: credentials are sent over verified TLS only")
    return text


def ca_file(text: str, found: Answers) -> str:
    if found.tls != "verify":
        raise ValueError(f"no certificate is checked with --tls {found.tls}")
    return _file(text)


def _file(text: str) -> str:
    path = absolute(text)
    try:
        open(path, "rb").close()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return path


def login(text: str, found: Answers) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{text!r}: printable characters, with no white space around them")
    return text


def domain(text: str, found: Answers) -> str:
    from relaymta.config.values import in_dns
    from relaymta.proto.address import is_host

    if "@" in text:
        raise ValueError(f"{text!r}: a domain has no @ in it")
    if not is_host(in_dns(text)):
        raise ValueError(f"{text!r} is not a domain of mail, such as example.org")
    return text.rstrip(".")


def hostname(text: str, found: Answers) -> str:
    from relaymta.config.names import Hostname

    return str(_typed(Hostname, text))


def network(text: str, found: Answers) -> str:
    from relaymta.config import everywhere
    from relaymta.config.values import Network

    meant = str(_typed(Network, text))
    if everywhere([*found.networks, meant]):
        raise ValueError(f"{text!r}: that is much of the Internet, and anybody could relay")
    return meant


def listen(text: str, found: Answers) -> str:
    from relaymta.config.values import Address
    from relaymta.supervisor.checks import why_not_here

    meant = str(_typed(Address, text))
    if why := why_not_here(meant):
        raise ValueError(why)
    return meant


def user(text: str, found: Answers) -> str:
    from relaymta.errors import ConfigError
    from relaymta.privileges import account

    try:
        return account(text).pw_name
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("user: ")) from None


def selector(text: str, found: Answers) -> str:
    from relaymta.config.values import in_dns

    return in_dns(text)


def address(text: str, found: Answers) -> str:
    """An address, its domain in A-labels: every host takes these."""
    from relaymta.proto.address import DomainError, literal_address, normalize_domain, plain

    whole = plain(text)
    if whole is None or "@" not in whole:
        raise ValueError(f"{text!r} is not an address, such as ann@example.org")
    local, _, behind = whole.rpartition("@")
    try:
        return f"{local}@{behind if literal_address(behind) else normalize_domain(behind)}"
    except DomainError:
        raise ValueError(f"{text!r}: {behind!r} is not a domain") from None


def password(text: str) -> str:
    """ValueError for a password that its file could not hold (relaymta/files.py)."""
    if not text:
        raise ValueError("the password is empty")
    if text != text.strip() or set(text) & set("\r\n\0") or text.startswith("\ufeff"):
        raise ValueError("the password has white space around it, or more than one line: a file cannot hold it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the password is not UTF-8") from None
    return text


# Defaults


def usual_domain(found: Answers) -> str:
    """The domain of this host."""
    from relaymta.config.names import own_name
    from relaymta.proto.address import is_host

    name = own_name()
    its = name.partition(".")[2] if name.count(".") > 1 else name
    return its if is_host(its) and not f".{name}".endswith((".localhost", ".localdomain")) else MISSING


def usual_hostname(found: Answers) -> str:
    """The full name of this host; where it has none, its short name in the domain."""
    from relaymta.config.names import helo_name, own_name

    name = own_name()
    if "." in name and not f".{name}".endswith((".localhost", ".localdomain")):
        return name
    label = socket.gethostname().partition(".")[0]
    try:
        return helo_name(f"{'relay' if label in ('', 'localhost') else label}.{found.domain}")
    except ValueError:
        return helo_name(f"relay.{found.domain}")


def usual_listen(found: Answers) -> str:
    """Where clients can connect: the loopback address, or all where other hosts are to send mail."""
    port = 25 if os.geteuid() == 0 else 2525
    families = {":" in text for text in found.networks if not ipaddress.ip_network(text).is_loopback}
    hosts = [host for host, six in (("0.0.0.0", False), ("[::]", True)) if six in families] or ["127.0.0.1"]
    return " ".join(f"{host}:{port}" for host in hosts)


def usual_user(found: Answers) -> str:
    try:
        return pwd.getpwnam(USER).pw_name if os.geteuid() == 0 else ""
    except KeyError:
        return ""


def usual_spool() -> str:
    return SPOOL if os.geteuid() == 0 else str(home("XDG_STATE_HOME", ".local/state") / "relaymta")


def usual_sender(found: Answers) -> str:
    """The login where it is an address of the domain, since many smart hosts accept no other sender."""
    from relaymta.proto.address import in_a_labels, plain

    own = plain(found.username) if "@" in found.username else None
    ours = in_a_labels(found.domain)
    return own if own is not None and in_a_labels(own.rpartition("@")[2]) == ours else f"postmaster@{ours}"
