"""The Subject of a message as it is shown."""

from relaymta.proto.dkim import by_name, split_fields
from relaymta.proto.mime_text import header_text
from relaymta.proto.printable import printable

__all__ = ["subject"]

READ = 4000  # octets of a field


def subject(header: bytes, most: int) -> str:
    """The first Subject: of a header, decoded (RFC 2047), in one line of at most `most` characters, with what is not printable
    escaped; "" where there is none."""
    fields = by_name(split_fields(header)).get(b"subject", [])
    value = fields[0].partition(b":")[2] if fields else b""
    return printable(header_text(value[:READ]).strip()[:most])[:most]
