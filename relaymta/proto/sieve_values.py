"""Strings of a Sieve script that name something: addresses, mailboxes, flags, time zones. They are checked when a script is
compiled, and again when it runs where variables are in them. ValueError says what is wrong."""

import re
from typing import Final

from relaymta.proto import mailbox_name
from relaymta.proto.address import plain
from relaymta.proto.mailbox import Mailbox, Malformed, addresses
from relaymta.proto.mailbox_list import canonical

__all__ = ["ADDRESS_FIELDS", "DATE_PARTS", "FLAGS_MOST", "flag_names", "mailbox_named", "outbound", "senders", "zone_minutes"]

# Fields that are lists of addresses: the `address` test knows no others (RFC 5228 5.1).
ADDRESS_FIELDS: Final = frozenset((
    b"from", b"to", b"cc", b"bcc", b"sender", b"reply-to", b"resent-from", b"resent-to", b"resent-cc", b"resent-bcc",
    b"resent-sender", b"resent-reply-to", b"return-path", b"delivered-to", b"x-original-to", b"envelope-to", b"errors-to",
    b"mail-reply-to", b"mail-followup-to", b"disposition-notification-to", b"return-receipt-to", b"apparently-to",
))  # fmt: skip
DATE_PARTS: Final = frozenset((
    b"year", b"month", b"day", b"date", b"julian", b"hour", b"minute", b"second", b"time", b"iso8601", b"std11", b"zone",
    b"weekday",
))  # fmt: skip
FLAGS_MOST: Final = 64  # of one message; further ones are ignored
_FLAG_OCTETS = 100
_SYSTEM: Final = {flag.lower(): flag for flag in ("\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft")}
_KEYWORD = re.compile(r'[^\x00-\x20\x7f-\U0010ffff(){%*"\\\]]+\Z')
_ZONE = re.compile(rb"([+-])([0-9]{2})([0-5][0-9])\Z")


def outbound(value: bytes) -> str:
    """The address in a string that is one, alone or with a name (RFC 5228 2.4.2.3)."""
    try:
        found = addresses(value)
    except Malformed as error:
        raise ValueError(f"not an address: {error}") from None
    if len(found) != 1 or value.rstrip().endswith(b";"):
        raise ValueError("not one address")
    return _plain(found[0])


def _plain(one: Mailbox) -> str:
    address = plain(str(one)) if one.domain else None
    if address is None:
        raise ValueError("not an address with a domain")
    return address


def senders(value: bytes) -> list[str]:
    """The addresses in a mailbox-list (RFC 5322 3.4)."""
    try:
        return [_plain(one) for one in addresses(value)]
    except Malformed as error:
        raise ValueError(f"not a list of addresses: {error}") from None


def mailbox_named(value: bytes) -> str:
    """The mailbox of this name, which is in UTF-8."""
    try:
        name = canonical(value.decode())
    except UnicodeDecodeError:
        raise ValueError("not the name of a mailbox: the name is not UTF-8") from None
    why = mailbox_name.problem(name)
    if why is not None:
        raise ValueError(f"not the name of a mailbox: {why}")
    return name


def flag_names(values: list[bytes]) -> tuple[str, ...]:
    """The flags that strings name (RFC 5232 2), each once, in order; what is none that IMAP lets a client set is ignored."""
    found: dict[str, str] = {}
    for value in values:
        for word in value.split(b" "):
            flag = word.decode("utf-8", "replace") if 0 < len(word) <= _FLAG_OCTETS else ""
            known = _SYSTEM.get(flag.lower()) or (flag if _KEYWORD.match(flag) else "")
            if known and len(found) < FLAGS_MOST:
                found.setdefault(known.lower(), known)
    return tuple(found.values())


def zone_minutes(value: bytes) -> int:
    """The offset from UTC in minutes that a time zone (`+0100`) has."""
    match = _ZONE.match(value)
    if match is None or int(match[2]) > 23:
        raise ValueError('not a time zone such as "+0100"')
    minutes = int(match[2]) * 60 + int(match[3])
    return -minutes if match[1] == b"-" else minutes
