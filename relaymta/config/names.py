"""The names by which we introduce ourselves (greeting, EHLO, Received:), and names of our own for things."""

import ipaddress
import re
import socket
from typing import Annotated

from pydantic import AfterValidator

from relaymta.proto.address import DomainError, literal_address, normalize_domain

__all__ = ["Hostname", "HostnameIfAny", "Name", "has_one_label", "helo_name", "own_name"]

NAME_MOST = 253  # octets of a name that the DNS can hold (RFC 1035 2.3.4); RFC 5321 4.5.3.1.2 allows 255
LABEL_MOST = 63


def helo_name(name: str) -> str:
    """A host name as in EHLO: a domain (RFC 5321 4.1.2, RFC 1123 2.1), in A-labels and without a dot at its end, or an address
    literal. ValueError says what is wrong with it."""
    if not name or not name.isprintable() or " " in name:
        raise ValueError(f"{name!r} has white space or control characters in it" if name else "it is empty")
    if name.startswith("["):
        if literal_address(name) is None:
            raise ValueError(f'{name!r}: an address literal is written "[192.0.2.1]" or "[IPv6:2001:db8::1]"')
        return name
    literal = _as_literal(name)
    if literal:
        raise ValueError(f'{name!r} is an IP address: give the name of this host, or "{literal}"')
    if not name.isascii():
        try:
            name = normalize_domain(name)
        except DomainError:
            raise ValueError(f"{name!r} is not a valid internationalized domain name (RFC 5890)") from None
    given, name = name, name.removesuffix(".")
    if len(name) > NAME_MOST:
        raise ValueError(f"it is {len(name)} characters long; a domain name has {NAME_MOST} at most")
    labels = name.split(".")
    for label in labels:
        _check_label(given, label)
    if labels[-1].isdigit():
        raise ValueError(f"{name!r} is neither a host name, since it ends with a number, nor an IP address")
    return name


def _as_literal(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    return f"[{address}]" if address.version == 4 else f"[IPv6:{address}]"


def _check_label(name: str, label: str) -> None:
    if not label:
        raise ValueError(f"{name!r} has an empty label in it: two dots in a row, or one at the beginning")
    if len(label) > LABEL_MOST:
        raise ValueError(f"{label!r} is {len(label)} characters long; a label has {LABEL_MOST} at most")
    wrong = re.search(r"[^A-Za-z0-9-]", label)
    if wrong is not None:
        allowed = "letters, digits and hyphens are (RFC 5321 4.1.2)"
        raise ValueError(f"{name!r}: {wrong[0]!r} is not allowed in a host name: {allowed}")
    if label[0] == "-" or label[-1] == "-":
        raise ValueError(f"{name!r}: {label!r} begins or ends with a hyphen, which no label may (RFC 1123 2.1)")


def has_one_label(name: str) -> bool:
    """Whether a valid name has no dot: no other host can look it up, and many servers reject it in EHLO."""
    return "." not in name and not name.startswith("[")


def own_name() -> str:
    """This host's name, for EHLO; what is not allowed in a host name is left out or replaced by a hyphen."""
    found = socket.getfqdn()
    try:
        return helo_name(found)
    except ValueError:
        labels = [re.sub(r"[^A-Za-z0-9-]", "-", label)[:LABEL_MOST].strip("-") for label in found.split(".")]
    try:
        return helo_name(".".join(label for label in labels if label))
    except ValueError:
        return "localhost"


def _name(name: str) -> str:
    if not name:
        raise ValueError("it is empty")
    if not name.isprintable() or any(char.isspace() for char in name):
        raise ValueError(f"{name!r} has white space or control characters in it")
    return name


def _helo_name_if_any(name: str) -> str:
    return helo_name(name) if name else name


Hostname = Annotated[str, AfterValidator(helo_name)]
HostnameIfAny = Annotated[str, AfterValidator(_helo_name_if_any)]  # or ""
Name = Annotated[str, AfterValidator(_name)]
