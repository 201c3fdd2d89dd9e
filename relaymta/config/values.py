"""The types of values (durations, sizes, addresses ...), the base of all tables, and the marks for what a reload applies."""

import difflib  # noqa: F401 # for `near`: whoever drops root has imported it before
import ipaddress
import re
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from typing import Annotated, Any, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from relaymta.duration import SECONDS, parse_duration, parse_size, seconds_of
from relaymta.errors import ConfigError, near
from relaymta.proto.address import DomainError, normalize_domain, plain

__all__ = [
    "Address", "Domain", "Duration", "Host", "Mailbox", "Name", "Nameserver", "Network", "Place", "Problem", "Problems", "Quota",
    "Rate", "Reload", "Restart", "Size", "SocketAddress", "Table", "When", "check_each", "dotted", "hook_url", "in_clear",
    "in_dns", "is_http", "is_list", "is_loopback", "model_of", "near", "parse_duration", "parse_hostport", "parse_quota",
    "place_of", "repeated", "socket_address", "when",
]  # fmt: skip

_QUOTA = re.compile(r"(\d{1,15})\s*/\s*(s|m|h|d)\Z")
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h|d)\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ANY_HOST = re.compile(r"(?:\*:|:)?(\d+)\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,31}\Z")
SOCKET_PATH = 107  # octets (unix(7))
_PORT = re.compile(r"[0-9]{1,9}\Z")
_BARE_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?(/[!-~]*)?\Z")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"


# What a reload does with a key


class When(Enum):
    """When a changed value takes effect."""

    RELOAD = "reload"
    RESTART = "restart"


T = TypeVar("T")
Reload = Annotated[T, When.RELOAD]  # a key whose new value a reload applies
Restart = Annotated[T, When.RESTART]  # a key whose new value takes effect at the next start only


# Places and problems

Place = tuple[str | int, ...]


def dotted(place: Place) -> str:
    """A place as `listener.0.address`."""
    return ".".join(map(str, place))


def place_of(key: str) -> Place:
    """The place that `dotted` writes so."""
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


class Problem(NamedTuple):
    """What is wrong with the key at a place; `other`: the key that it does not go with, if it is one."""

    place: Place
    what: str
    other: Place = ()


class Problems(ValueError):
    """Problems with several keys."""

    def __init__(self, found: list[Problem]) -> None:
        super().__init__("; ".join(f"{dotted(place)}: {what}" for place, what, _ in found))
        self.found = found


class Table(BaseModel):
    """The base of all tables."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, relative to this table and dotted; what is wrong) of each problem that the types do not express."""
        return ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [Problem(place_of(key), what) for key, what in self.problems()]
        if found:
            raise Problems(found)
        return self


def when(field: FieldInfo) -> When | None:
    """What a reload does with a key; None for one that is a table, whose keys say it."""
    return next((mark for mark in field.metadata if isinstance(mark, When)), None)


def is_list(annotation: Any) -> bool:
    """Whether a key's value is a list."""
    return getattr(annotation, "__origin__", None) is list


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a key that is a table, or a list of tables; None for other keys."""
    inner = getattr(annotation, "__args__", (annotation,))[0]
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def check_each(table: str, rows: Iterable[T], check: Callable[[T], object]) -> None:
    """Check each row of a repeated table. ConfigError with all problems; `table.key: ...` becomes `table.0.key: ...`."""
    problems: list[str] = []
    for number, row in enumerate(rows):
        try:
            check(row)
        except ConfigError as error:
            problems += [re.sub(rf"^{table}\.", f"{table}.{number}.", problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def repeated(names: list[str]) -> list[tuple[int, str]]:
    """(position, name) of each name that an earlier one is equal to."""
    first: dict[str, int] = {}
    return [(number, name) for number, name in enumerate(names) if first.setdefault(name, number) != number]


# Sizes, rates


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _rate(value: object) -> object:
    if isinstance(value, str):
        match = _RATE.match(value.strip())
        if match is None:
            raise ValueError('a rate such as "20/s", "500/m", "10000/h"')
        return float(match[1]) / SECONDS[match[2]]
    return value


@cache
def parse_quota(text: str) -> tuple[int, float]:
    """(count, seconds) of a quota `COUNT/UNIT`. ValueError for anything else."""
    match = _QUOTA.match(text.strip())
    if match is None or not int(match[1]):
        raise ValueError(f'{text!r} is not a quota such as "60/m" or "10000/d"')
    return int(match[1]), float(SECONDS[match[2]])


def _quota(value: object) -> object:
    if isinstance(value, str) and value:
        parse_quota(value)
    return value


# Hosts, networks, names


def parse_hostport(text: str, default_port: int | None = None) -> tuple[str, int]:
    """(host, port) of `host:port`, `[v6]:port`, or `host` with a default port. ValueError for anything else."""
    scheme = _SCHEME.match(text)
    if scheme is not None:
        rest = text.removeprefix(scheme[0]).rstrip("/")
        raise ValueError(f"{text!r}: write host:port without {scheme[0]}" + (f' (did you mean "{rest}"?)' if rest else ""))
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not colon:
        host, port = text, ""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets")
    if any(char.isspace() for char in host):
        raise ValueError(f"{text!r}: it has white space in it")
    if not port and default_port is not None and host and not text.endswith(":"):
        return host, default_port
    if not host or not _PORT.match(port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: expected host:port")
    return host, int(port)


def _check_hostport(text: str, default_port: int | None = None) -> None:
    """ValueError for what `parse_hostport` refuses, and for a host that is neither an IP address nor a name in the DNS."""
    _, colon, port = text.rpartition(":")
    if colon and _PORT.match(port) and not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: expected host:port with a port from 1 to 65535")
    host, _ = parse_hostport(text, default_port)
    try:
        ipaddress.ip_address(host)
        return
    except ValueError:
        pass
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        raise ValueError(f"{text!r}: {host!r} is not an IP address")
    try:
        in_dns(host)
    except ValueError:
        raise ValueError(f"{text!r}: {host!r} is neither a host name nor an IP address") from None


def _address(value: object) -> object:
    if isinstance(value, str):
        any_host = _ANY_HOST.match(value)
        if any_host is not None:
            port = any_host[1]
            raise ValueError(f'{value!r}: expected host:port; all addresses are "0.0.0.0:{port}" (IPv4) and "[::]:{port}" (IPv6)')
        _check_hostport(value)
    return value


def _host(value: object) -> object:
    if isinstance(value, str) and not value.startswith("unix:/"):
        _check_hostport(value, 25)
    return value


def socket_address(value: object) -> object:
    """What is of type SocketAddress. ValueError for another text."""
    if not isinstance(value, str):
        return value
    if value.startswith("/"):
        raise ValueError(f'{value!r}: a socket is written "unix:{value}"')
    path = value.removeprefix("unix:")
    if path is value:
        return _address(value)
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError(f'{value!r}: the whole path of a socket is needed, such as "unix:/run/clamav/clamd.ctl"')
    if not path.isprintable():
        raise ValueError(f"{value!r}: the path of a socket has no control characters in it")
    if len(path.encode()) > SOCKET_PATH:
        raise ValueError(f"{value!r}: the path of a socket has {SOCKET_PATH} octets at most")
    return value


def _nameserver(text: str) -> str:
    bare = text if text.count(":") < 2 or text.startswith("[") else f"[{text}]"
    host, _ = parse_hostport(bare, 53)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{text!r}: a name server is given by its IP address") from None
    return text


def _network_meant(text: str) -> str:
    """` (did you mean "..."?)` for a network whose host bits are set."""
    try:
        return f' (did you mean "{ipaddress.ip_network(text, strict=False)}"?)'
    except ValueError:
        return ""


def _network(value: object) -> object:
    if isinstance(value, str):
        try:
            network = ipaddress.ip_network(value)
        except ValueError as error:
            raise ValueError(f"{error}{_network_meant(value)}") from None
        if isinstance(network, ipaddress.IPv6Network):
            if network.network_address.scope_id is not None:
                raise ValueError("a network without a scope: the scope of a client's address is ignored")
            mapped = network.network_address.ipv4_mapped
            if mapped is not None and network.prefixlen >= 96:  # an IPv4 client (RFC 4291 2.5.5.2)
                return str(ipaddress.ip_network((mapped, network.prefixlen - 96)))
        return str(network)
    return value


def in_dns(name: str) -> str:
    """A domain name in A-labels and lower case, safe to insert into header fields. ValueError when it is not one."""
    try:
        found = normalize_domain(name)
    except DomainError:
        found = ""
    if not re.fullmatch(rf"{_LABEL}(?:\.{_LABEL})*", found):
        raise ValueError(f"{name!r} is not a valid domain name")
    return found


def _name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(f"{name!r}: letters, digits, spaces, '.', '-' and '_', 32 at most")
    return name


def _domain(name: str) -> str:
    return in_dns(name) if name else ""


def _mailbox(text: str) -> str:
    found = plain(text) if text else ""
    if found is None:
        raise ValueError(f"{text!r} is not an address")
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_http(url: str) -> bool:
    """Whether this is an http:// or https:// URL."""
    return re.match(r"https?://[^/]", url) is not None


def hook_url(text: str) -> str:
    """The URL of an HTTP endpoint: http or https, a host, no user, no fragment. ValueError for another text."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(f"{text!r} is no URL") from None
    if parts.scheme not in ("http", "https") or not host:
        meant = text if _BARE_HOST.match(text) else "127.0.0.1:8080/hook"
        raise ValueError(f'{text!r} is no URL: write it as "http://{meant}"')
    if not text.isprintable() or not text.isascii() or " " in text or "\\" in text:
        raise ValueError(f"{text!r}: write what is no letter, digit or mark of a URL as %XX, and the host in A-labels")
    if "@" in parts.netloc:
        raise ValueError("a URL without user and password: secret_file shows the hook who asks")  # it is not repeated
    if parts.fragment or text.endswith("#"):
        raise ValueError(f"{text!r}: what is behind # is not sent")
    _check_hostport(f"[{host}]" if ":" in host else host, port if port is not None else 80)
    if port == 0:
        raise ValueError(f"{text!r}: a port from 1 to 65535")
    return text


def in_clear(url: str) -> bool:
    """Whether a URL means plain http to another host: request and response could be read and changed on the path."""
    try:
        parts = urlsplit(url)
    except ValueError:  # not a URL
        return True
    return parts.scheme == "http" and parts.hostname != "localhost" and not is_loopback(parts.hostname or "")


Duration = Annotated[float, BeforeValidator(seconds_of), Field(ge=0)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0)]
Quota = Annotated[str, BeforeValidator(_quota)]
Address = Annotated[str, BeforeValidator(_address)]
SocketAddress = Annotated[str, BeforeValidator(socket_address)]  # host:port or unix:/PATH
Host = Annotated[str, BeforeValidator(_host)]
Nameserver = Annotated[str, AfterValidator(_nameserver)]
Network = Annotated[str, BeforeValidator(_network)]
Name = Annotated[str, AfterValidator(_name)]  # of a rule or a check, as it stands in the log and on the command line
Domain = Annotated[str, AfterValidator(_domain)]  # in A-labels, or ""
Mailbox = Annotated[str, AfterValidator(_mailbox)]  # an address in its one form, or ""
