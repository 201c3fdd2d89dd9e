"""Addresses in the fields of a message as Sieve compares them (RFC 5228 2.7.4, RFC 5233). They are those that IMAP shows of the
message: lenient, as a mail reader is.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from relaymta.proto.address import quoted_if_needed
from relaymta.proto.mime import describe
from relaymta.proto.mime_envelope import tokens, unfolded

__all__ = ["NULL", "Address", "addresses_in", "part_of", "split", "without_detail"]

_FRONT = b"(NIL NIL NIL NIL NIL ("  # of the ENVELOPE of a message with nothing but addresses in To


class Address(NamedTuple):
    """`local`: the local part, unquoted; `domain`: b"" without one; `name`: the display name, as it is in the field."""

    local: bytes
    domain: bytes
    name: bytes = b""

    def __bytes__(self) -> bytes:
        """The address, its local part quoted only if necessary."""
        if not self.domain:
            return self.local
        local = quoted_if_needed(self.local.decode("utf-8", "surrogateescape"))
        return local.encode("utf-8", "surrogateescape") + b"@" + self.domain


NULL = Address(b"", b"")  # the null sender


def addresses_in(value: bytes) -> list[Address]:
    """The addresses in a field's value, folded or not, without the names of groups."""
    envelope = describe(b"To: %b\r\n\r\n" % unfolded(value)).envelope
    if not envelope.startswith(_FRONT):
        return []
    return [
        Address(local, domain, name or b"")
        for name, _, local, domain in _structures(envelope, len(_FRONT))
        if local is not None and domain is not None
    ]


def _structures(envelope: bytes, at: int) -> Iterator[list[bytes | None]]:
    """The structures of addresses from here on: four strings each."""
    found: list[bytes | None] = []
    for token in tokens(envelope, at):
        if not isinstance(token, str):
            found.append(token)
        elif token == ")":
            if len(found) != 4:  # the end of the list
                return
            yield found
            found = []


def split(address: str) -> Address:
    """An address of an envelope; "" is NULL."""
    local, at, domain = address.rpartition("@")
    if not at:
        local, domain = domain, ""
    if len(local) > 1 and local[0] == local[-1] == '"':
        local = re.sub(r"\\(.)", r"\1", local[1:-1])
    return Address(local.encode("utf-8", "replace"), domain.encode("utf-8", "replace"))


def part_of(address: Address, part: str, separator: bytes) -> bytes | None:
    """A part of an address: "all", "localpart", "domain", "user" or "detail"; None: it has none such. Each of NULL is b""
    (RFC 5228 5.4). `separator`: of user and detail, b"": there is no detail."""
    if part == "all" or (not address.local and not address.domain):
        return bytes(address)
    if not address.domain:
        return None
    if part == "domain":
        return address.domain
    if part == "localpart" or not separator:
        return None if part == "detail" else address.local
    user, found, detail = address.local.partition(separator)
    if part == "user":
        return user
    return detail if found else None


def without_detail(address: str, separator: str) -> str:
    """An address without its +detail, where it has one and a user in front of it."""
    local, _, domain = address.rpartition("@")
    user = local.partition(separator)[0] if separator else ""
    return f"{user}@{domain}" if user else address
