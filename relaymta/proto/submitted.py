"""The header of submitted mail (RFC 6409 8): fields that are removed from it, and addresses that are completed. The header of
mail that is relayed is never changed."""

import re

from relaymta.proto.header import header_end
from relaymta.proto.mailbox import completed

__all__ = ["submitted"]

# Bcc: names recipients whom the others must not see (RFC 5322 3.6.3), Return-Path: is for the last hop to write (RFC 5321 4.4).
# Addresses are completed in the others. What needs no change has none of the first, and in the others nothing but full addresses.
# Around a name may be what other parsers ignore there (as in `proto.dkim.name_of`).
_AROUND = rb"[\0-\x08\x0b\x0c\x0e-\x1f]*+"
_NAME = re.compile(
    rb"^" + _AROUND + rb"(?:(bcc|resent-bcc|return-path)|from|to|cc|reply-to|sender|resent-(?:from|to|cc|reply-to|sender))"
    rb"(?>(?:[\0-\x09\x0b\x0c\x0e-\x20]|\r\n(?=[ \t]))*):",
    re.I | re.M,
)
GROWTH_MOST = 2048  # octets that are added: the queue has room for so many beside its own fields
COMPLETED_MOST = 16384  # octets of the fields in which addresses are completed: parsing one costs as much as copying a thousand,
EACH = 256  # and that of any field as much as so many octets
_END = re.compile(rb"\r\n(?![ \t])")


def submitted(data: bytes, domain: str) -> bytes:
    """Message data that begins with a whole header, with that header as this relay sends it: without Bcc, Resent-Bcc and
    Return-Path, and with addresses without a domain (`From: root`) completed by `domain` ("": they are left as they are). A field
    that is no list of addresses is left as it is. The same object if nothing is changed. Linear in the length of the header."""
    end = header_end(data)
    kept: list[bytes] = []
    room, growth = COMPLETED_MOST, GROWTH_MOST
    at = 0  # up to which the header is in `kept`
    for match in _NAME.finditer(data, 0, end):
        start, value = match.span()
        if start < at:  # within the field before: it is one of bare line ends
            continue
        last = _END.search(data, value, end)
        behind = last.start() if last is not None else end
        if match[1] is not None:
            kept.append(data[at:start])
            at = min(behind + 2, end)
        elif domain and (room := room - EACH - (behind - value)) >= 0:
            before = data[value:behind]
            after = completed(before, domain, growth)
            if after != before:
                growth -= len(after) - len(before)
                kept += [data[at:value], after]
                at = behind
    return b"".join([*kept, data[at:]]) if at else data
