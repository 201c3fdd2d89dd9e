"""The protocol of spamd (SpamAssassin's spamd/PROTOCOL, version 1.5): what is asked, and what an answer means. No I/O.

A connection is for one request. The client ends its side behind the message, and spamd answers up to the end of the connection.
"""

import re
from typing import NamedTuple

from relaymta.proto.printable import printable

__all__ = ["LARGEST", "PING", "Judged", "SpamdError", "has_learned", "is_pong", "judged", "request", "teaching"]

LARGEST = 65536  # octets of an answer: names of rules
SHOWN = 64  # octets of what makes no sense

PING = b"PING SPAMC/1.5\r\n\r\n"
_STATUS = re.compile(rb"SPAMD/[0-9.]{1,8} ([0-9]{1,3}) ([^\r\n]*)\r?\n")
_LEARNED = re.compile(rb"^DidSet:[ \t]*local", re.I | re.M)
_SPAM = re.compile(
    rb"^Spam:[ \t]*(True|Yes|False|No)[ \t]*;[ \t]*(-?[0-9.]{1,12})[ \t]*/[ \t]*(-?[0-9.]{1,12})[ \t]*\r?$", re.I | re.M
)


class SpamdError(Exception):
    """An answer without a verdict. `refused`: spamd says that it cannot look; else the answer makes no sense."""

    def __init__(self, text: str, refused: bool = False) -> None:
        Exception.__init__(self, text)
        self.refused = refused


class Judged(NamedTuple):
    """Whether it is spam, by the score and the threshold of spamd; and the rules that match."""

    spam: bool
    score: float
    threshold: float
    rules: list[str]


def request(octets: int, user: str = "") -> bytes:
    """What stands in front of a message of so many octets that is to be judged."""
    lines = ["SYMBOLS SPAMC/1.5", f"Content-length: {octets}", *([f"User: {printable(user)}"] if user else []), "", ""]
    return "\r\n".join(lines).encode()


def teaching(octets: int, spam: bool) -> bytes:
    """What stands in front of a message from which is to be learned."""
    return (
        f"TELL SPAMC/1.5\r\nContent-length: {octets}\r\nMessage-class: {'spam' if spam else 'ham'}\r\nSet: local\r\n\r\n".encode()
    )


def has_learned(answer: bytes) -> bool:
    """Whether something was learned; False: it was known already. SpamdError: it does not learn."""
    header = answer.replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    _check(header + b"\n" if header else b"")
    return _LEARNED.search(header) is not None


def judged(answer: bytes) -> Judged:
    """A whole answer. SpamdError."""
    header, _, body = answer.replace(b"\r\n", b"\n").partition(b"\n\n")
    _check(header + b"\n" if header else b"")
    found = _SPAM.search(header)
    if found is None:
        raise SpamdError(f"answers without a score: {_shown(answer)}")
    try:
        score, threshold = float(found[2]), float(found[3])
    except ValueError:
        raise SpamdError(f"answers without a score: {_shown(answer)}") from None
    rules = [name for name in printable(body.decode("utf-8", "replace").strip()).split(",") if name]
    return Judged(found[1].lower() in (b"true", b"yes"), score, threshold, rules)


def is_pong(answer: bytes) -> bool:
    """Whether this answers PING. SpamdError: another program's answer."""
    return _check(answer.replace(b"\r\n", b"\n")) == "PONG"


def _check(header: bytes) -> str:
    """The text behind the status, which is 0."""
    status = _STATUS.match(header)
    if status is None:
        raise SpamdError(f"answers, but not as spamd: {_shown(header)}")
    text = printable(status[2].decode("utf-8", "replace"))[:SHOWN]
    if int(status[1]):
        raise SpamdError(f"answers {int(status[1])} {text}", refused=True)
    return text


def _shown(octets: bytes) -> str:
    return f"begins with '{printable(octets[:SHOWN].decode('utf-8', 'replace'))}'" if octets else "it closes the connection"
