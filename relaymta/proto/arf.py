"""Reports of complaints (ARF, RFC 5965): what one says, and about which message.

Pure, in one pass over the first OCTETS_MOST octets: the rest of what is reported does not matter. A report is written by a
stranger: nothing in it is an error but that it is none.
"""

from typing import Final, NamedTuple

from relaymta._speedups.mime import scan
from relaymta.proto.address import plain
from relaymta.proto.header import HEADER_SEEN, LINES_SEEN, fields
from relaymta.proto.mailbox import Malformed, authors

__all__ = ["NOT_SPAM", "NotAReport", "Report", "parse"]

OCTETS_MOST: Final = 1 << 20
RECIPIENTS_MOST: Final = 100
VALUE_MOST: Final = 1000  # characters of a field that is shown
NOT_SPAM: Final = "not-spam"  # RFC 6430: the opposite of a complaint


class NotAReport(ValueError):
    """A sentence: why this is no report."""


class Report(NamedTuple):
    """`kind`: the Feedback-Type in lower case, such as "abuse"; `recipients`: the addresses that have complained, none where the
    report hides them; `message_id`, `author`: of the message that is reported; `agent`: who has written the report. What is not
    there is ""."""

    kind: str
    recipients: list[str]
    sender: str
    source: str
    agent: str
    message_id: str
    author: str


def parse(data: bytes) -> Report:
    """The report in a message, with any line ends. The recipients are those of Original-Rcpt-To, else the one in To: of the
    message that is reported, where there is one alone. NotAReport."""
    data = data[:OCTETS_MOST]
    said: list[tuple[bytes, str]] | None = None
    reported, within = b"", False
    for part in scan(data):
        kind = data[part.type : part.type_end].lower() + b"/" + data[part.subtype : part.subtype_end].lower()
        if part.depth > 1:
            if within and not reported:
                reported = data[part.header : part.body]
            continue
        within = kind == b"message/rfc822"
        if kind == b"message/feedback-report" and said is None:
            said = _fields(data[part.body : part.end])
        elif kind == b"text/rfc822-headers" and not reported:
            reported = data[part.body : part.end]
    if said is None:
        raise NotAReport("there is no part of the type message/feedback-report in it")
    first: dict[bytes, str] = {}
    for name, value in said:
        first.setdefault(name, value[:VALUE_MOST])
    if not first.get(b"feedback-type"):
        raise NotAReport("it has no Feedback-Type")
    about = dict(reversed(_fields(reported)))
    recipients = _addresses([value for name, value in said if name == b"original-rcpt-to"]) or _addressee(about.get(b"to", ""))
    return Report(
        first[b"feedback-type"].lower(), recipients, _bare(first.get(b"original-mail-from", "")), first.get(b"source-ip", ""),
        first.get(b"user-agent", ""), about.get(b"message-id", "")[:VALUE_MOST], about.get(b"from", "")[:VALUE_MOST],
    )  # fmt: skip


def _fields(block: bytes) -> list[tuple[bytes, str]]:
    """The fields of the first lines, whose ends may be LF alone."""
    lines = block[:HEADER_SEEN].replace(b"\r\n", b"\n").split(b"\n", LINES_SEEN)[:LINES_SEEN]
    return fields(b"\r\n".join(lines))


def _bare(path: str) -> str:
    """An address without the angle brackets, and without the `rfc822;` that some write in front of it."""
    kind, semicolon, rest = path.partition(";")
    path = rest if semicolon and kind.strip().lower() in ("rfc822", "utf-8") else path
    return path.strip().removeprefix("<").removesuffix(">")


def _addresses(paths: list[str]) -> list[str]:
    found = (plain(_bare(path)) for path in paths[:RECIPIENTS_MOST])
    return list(dict.fromkeys(address for address in found if address))


def _addressee(to: str) -> list[str]:
    """The address in To:, where there is only one."""
    try:
        found = [str(mailbox) for mailbox in authors(f"To: {to[:VALUE_MOST]}\r\n".encode("utf-8", "replace"), (b"to",))]
    except Malformed:
        return []
    return _addresses(found) if len(found) == 1 else []
