"""A peer's reply to a command of ours, and its class (RFC 5321 4.2, 3463)."""

import re
from typing import NamedTuple

from relaymta.proto.envelope import reply_text

__all__ = ["LONGEST", "Reply", "Said", "classify", "wants_tls"]

LONGEST = 4096  # characters of a reply's text that are kept

_ENHANCED = re.compile(rb"([245]\.\d{1,3}\.\d{1,3})(?:\s+|\Z)")
_TLS = re.compile(r"\b(?:STARTTLS|TLS|SSL|encrypt(?:ed|ion)?)\b", re.I)
# Codes that say it: RFC 3207 4 (530), RFC 5248 2.4 (523 5.7.10, 538 5.7.11).
_TLS_CODES = (523, 530, 538)
_TLS_ENHANCED = ("5.7.10", "5.7.11")


class Reply(NamedTuple):
    """A reply of ours to one recipient."""

    code: int
    enhanced: str
    text: str


class Said:
    """A reply as it applies to a recipient: code, enhanced code ("" when there is none), text, phase."""

    __slots__ = ("code", "enhanced", "phase", "text")

    def __init__(self, code: int, text: bytes, phase: str) -> None:
        match = _ENHANCED.match(text)
        self.code = code
        self.enhanced = match[1].decode() if match is not None else ""
        rest = text[match.end() :] if match is not None else text
        if match is not None and b"\n" in rest:
            rest = b" ".join(re.sub(_ENHANCED, b"", line, count=1) for line in rest.split(b"\n"))
        self.text = rest.replace(b"\n", b" ").decode("utf-8", "replace").strip()[:LONGEST]
        self.phase = phase

    @property
    def whole(self) -> str:
        """The reply as one line: code, enhanced code, text."""
        return reply_text(self.code, self.enhanced, self.text)


def classify(said: Said) -> str:
    """The class of a reply for its recipient: "success", "transient" or "permanent". A 552 to RCPT that says no more counts as
    452: too many recipients (RFC 5321 4.5.3.1.10). With an enhanced code of its own, 5.2.2 say, it is permanent."""
    if 200 <= said.code < 300:
        return "success"
    if said.code == 552 and said.phase == "rcpt" and (not said.enhanced or said.enhanced.endswith(".5.3")):
        return "transient"
    return "permanent" if 500 <= said.code < 600 else "transient"


def wants_tls(said: Said) -> bool:
    """Whether a peer refuses a command because the connection is not encrypted (RFC 3207 4)."""
    if not 500 <= said.code < 600:
        return False
    return said.code in _TLS_CODES or said.enhanced in _TLS_ENHANCED or _TLS.search(said.text) is not None
