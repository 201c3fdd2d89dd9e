"""When a reply of `vacation` may be sent, and what it says (RFC 5230 4.3-4.6, 5; RFC 3834 2)."""

import re
from collections.abc import Iterable
from typing import Final

from relaymta.proto.address import comparable
from relaymta.proto.mime_text import header_text
from relaymta.proto.sieve_address import addresses_in, without_detail
from relaymta.proto.sieve_message import Message

__all__ = ["message_ids", "own", "sender_of", "subject_of", "why_not"]

REFERENCES_MOST: Final = 20
PEOPLE_MOST: Final = 1000  # addresses of a field among which the user is looked for
SUBJECT_MOST: Final = 250  # characters
_FIELDS: Final = (b"to", b"cc", b"bcc", b"resent-to", b"resent-cc", b"resent-bcc")
_MACHINES: Final = ("mailer-daemon", "listserv", "majordomo", "owner-", "-request")  # the last two: beginning and end
_MESSAGE_ID = re.compile(rb"<[!-;=?-~]{1,250}>")
_LIST = b"list-"


def own(recipient: str, given: Iterable[str], separator: str) -> frozenset[str]:
    """All addresses that count as the user's: the recipient with +detail and without, and those given."""
    return frozenset(map(comparable, (recipient, without_detail(recipient, separator), *given)))


def why_not(message: Message, sender: str, mine: frozenset[str]) -> str:
    """Why a message gets no reply; "": it may get one. `mine`: all addresses of the user."""
    if not sender:
        return "the sender is null"
    if comparable(sender) in mine:
        return "the user is the sender"
    local = sender.rpartition("@")[0].lower()
    *names, begin, end = _MACHINES
    if local in names or local.startswith(begin) or local.endswith(end):
        return "the sender is a machine"
    said = [value.partition(b";")[0].strip().lower() for value in message.texts(b"auto-submitted")]
    if any(value != b"no" for value in said):
        return "the message was sent by a machine (Auto-Submitted)"
    if any(value.lower() in (b"bulk", b"list", b"junk") for value in message.texts(b"precedence")):
        return "the message is bulk (Precedence)"
    if any(name.startswith(_LIST) for name in message.names()):
        return "the message is from a mailing list"
    people = {
        comparable(bytes(one).decode("utf-8", "replace")) for name in _FIELDS for one in message.addresses(name)[:PEOPLE_MOST]
    }
    return "" if people & mine else "the message is not addressed to the user (To, Cc)"


def subject_of(given: bytes | None, message: Message) -> str:
    """The subject of a reply: the one that is given, or by that of the message."""
    if given is None:
        found = message.texts(b"subject")
        given = b"Auto: " + found[0] if found and found[0] else b"Automated reply"
    text = given[: 4 * SUBJECT_MOST].decode("utf-8", "replace")
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())[:SUBJECT_MOST]


def sender_of(given: bytes | None, default: str, mine: frozenset[str]) -> tuple[str, str]:
    """(display name, address) of From: the first given one that is the user's, else the default."""
    for one in addresses_in(given or b""):
        address = bytes(one).decode("utf-8", "replace")
        if comparable(address) in mine:
            return header_text(one.name).strip()[:SUBJECT_MOST], address
    return "", default


def message_ids(message: Message) -> tuple[bytes, tuple[bytes, ...]]:
    """The Message-ID of a message, and the References of a reply to it (RFC 5322 3.6.4), REFERENCES_MOST of them."""
    ident = b"".join(_MESSAGE_ID.findall(b"".join(message.raw(b"message-id")[:1])[:1000])[:1])
    if not ident:
        return b"", ()
    before = message.raw(b"references") or message.raw(b"in-reply-to")
    found = list(dict.fromkeys(_MESSAGE_ID.findall(b" ".join(before)[:65536])))
    found = [one for one in found if one != ident]
    return ident, (*found[:1], *found[1:][-(REFERENCES_MOST - 2) :], ident)
