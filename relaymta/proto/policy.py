"""The policy protocol of Postfix, on the MTA's side, without I/O: what a policy service is asked, and what its replies say.

A request and a reply are attributes, `name=value`, each a line of its own, behind which an empty line is the end. A reply has one
that counts, `action`, whose value is a word, in any case, and mostly a text. A connection has one request after the other, and
nothing in a reply says to which request it is. https://www.postfix.org/SMTPD_POLICY_README.html has the protocol,
https://www.postfix.org/access.5.html the actions.
"""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from relaymta.proto.address import rcpt_argument
from relaymta.proto.edits import Insert, spaced
from relaymta.proto.printable import printable
from relaymta.proto.reply import format_reply

__all__ = [
    "BEGINNING",
    "REPLY_MOST",
    "WORDS",
    "Action",
    "PolicyError",
    "Replies",
    "field",
    "recipient",
    "refusal",
    "request",
    "shown",
]

REPLY_MOST: Final = 16_384  # octets of a reply, and characters of its text
BEGINNING: Final = 64  # octets of what is no reply that are shown
WORD_MOST: Final = 64  # characters of a word that is none of WORDS
ADDRESS_MOST: Final = 1024  # octets; a path of the dialogue has no more
LINE_MOST: Final = 480  # of a reply's text; RFC 5321 4.5.3.1.5 has 512 octets for the line
RECIPIENT_MOST: Final = 200  # characters of an address in that

WORDS: Final = frozenset((
    "OK", "DUNNO", "REJECT", "DEFER", "DEFER_IF_PERMIT", "DEFER_IF_REJECT", "HOLD", "DISCARD", "PREPEND", "WARN", "INFO",
    "REDIRECT", "FILTER", "BCC", "4xx", "5xx",
))  # fmt: skip
_CLASSES: Final = {"REJECT": "5", "5xx": "5", "DEFER": "4", "DEFER_IF_PERMIT": "4", "DEFER_IF_REJECT": "4", "4xx": "4"}
_ATTRIBUTE: Final = re.compile(rb"[A-Za-z][A-Za-z0-9_.-]*+=")
_ENHANCED: Final = re.compile(r"([245])\.[0-9]{1,3}\.[0-9]{1,3}(?= |\Z)")  # RFC 3463 2
_CODE: Final = re.compile(r"[45][0-5][0-9]")  # RFC 5321 4.2
_NOT_IN_VALUES: Final = re.compile(r"[\r\n\0]")
_NOT_IN_REPLIES: Final = re.compile(r"[^ -~]")
_IN_NAMES: Final = bytes(octet for octet in range(33, 127) if octet != 0x3A)  # RFC 5322 3.6.8


class PolicyError(Exception):
    """What came is no reply of a policy service. str(): how it begins, printable."""


class Action(NamedTuple):
    """What a policy service wants to be done. `word`: one of WORDS, "4xx" and "5xx" where it gives the reply's code, or what else
    it says, printable, WORD_MOST characters at most; `code`: that code (400 to 599), or 0; `enhanced`: the status code (RFC 3463)
    with which the text of a refusal began, if its class is that of the refusal, or ""; `text`: what is behind that: one line,
    printable, REPLY_MOST characters at most."""

    word: str
    code: int = 0
    enhanced: str = ""
    text: str = ""


def request(attributes: Iterable[tuple[str, str]]) -> bytes:
    """A whole request, in UTF-8. Names are the caller's own; CR, LF, NUL and lone surrogates in a value become question marks."""
    lines = [f"{name}={_NOT_IN_VALUES.sub('?', value)}\n" for name, value in attributes]
    return ("".join(lines) + "\n").encode("utf-8", "replace")


class Replies:
    """The replies of one connection. `error`: what came behind the last one is none; nothing behind that is read. Memory:
    REPLY_MOST octets beside what is fed."""

    __slots__ = ("_action", "_at", "_buffer", "_scanned", "error")

    def __init__(self) -> None:
        self.error: PolicyError | None = None
        self._buffer = bytearray()  # of a reply, from its first octet on
        self._at = 0  # in it: the beginning of the line that is still to come to its end
        self._scanned = 0  # in it: there is no end of a line up to here
        self._action: bytes | None = None

    @property
    def begun(self) -> bytes:
        """Of a part of a reply the first BEGINNING octets, b"": there is none."""
        return bytes(self._buffer[:BEGINNING])

    def feed(self, data: bytes) -> list[Action]:
        """The replies that `data` completes, in order. Look at `error` then."""
        actions: list[Action] = []
        if self.error is not None:
            return actions
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while (end := buffer.find(b"\n", self._scanned)) >= 0:
                if end + 1 - start > REPLY_MOST:
                    break
                line = bytes(buffer[self._at : end]).removesuffix(b"\r")
                if self._take(line, actions):
                    start = end + 1
                self._at = self._scanned = end + 1
            if (end + 1 or len(buffer)) - start > REPLY_MOST:
                raise PolicyError(f"has no end, and begins with {shown(buffer[start : start + BEGINNING])}")
        except PolicyError as error:
            self.error = error
            buffer.clear()
            return actions
        del buffer[:start]
        self._at -= start
        self._scanned = len(buffer)
        return actions

    def _take(self, line: bytes, actions: list[Action]) -> bool:
        """One line; whether it ends a reply."""
        if line:
            if _ATTRIBUTE.match(line) is None:
                raise PolicyError(f"begins with {shown(line[:BEGINNING])}")
            if self._action is None and line.startswith(b"action="):
                self._action = line.removeprefix(b"action=")
            return False
        if self._action is None:
            raise PolicyError("leaves out its action")
        actions.append(_action_of(self._action))
        self._action = None
        return True


def _action_of(value: bytes) -> Action:
    """What stands behind `action=`."""
    said, _, rest = value.decode("utf-8", "replace").replace("\t", " ").strip(" ").partition(" ")
    text = printable(rest.strip(" "))[:REPLY_MOST]
    if not said:
        return Action("DUNNO")
    word, code = said.upper() if said.isascii() else said, 0
    if said.isascii() and said.isdecimal():
        if len(said) == 3 and said[0] in "45":
            word, code = f"{said[0]}xx", int(said)
        elif not text:
            word = "OK"  # "all-numerical", as of relays that ask who has fetched mail before
    elif word == "PERMIT":
        word = "OK"
    if word not in WORDS:
        return Action("5XX" if said == "5xx" else "4XX" if said == "4xx" else printable(said)[:WORD_MOST], text=text)
    enhanced = ""
    if word in _CLASSES and (match := _ENHANCED.match(text)) is not None:
        text = text[match.end() :].lstrip(" ")
        if match[1] == _CLASSES[word]:
            enhanced = match[0]
    return Action(word, code, enhanced, text)


# What follows from an action


def refusal(action: Action, address: str | None) -> bytes:
    """The SMTP reply to a recipient (None: to all of the message) that is refused for REJECT, 5xx, DEFER..., 4xx: one line of
    ASCII of at most 512 octets, with an enhanced status code. A code that is none (RFC 5321 4.2) becomes 554 or 450."""
    kind = _CLASSES[action.word]
    code = action.code if _CODE.fullmatch(str(action.code)) else 554 if kind == "5" else 450
    text = action.text or "Access denied"
    if address is not None:
        name = address if len(address) <= RECIPIENT_MOST else f"{address[:RECIPIENT_MOST]}..."
        text = f"<{name}>: Recipient address rejected: {text}"
    return format_reply(code, action.enhanced or f"{kind}.7.1", _NOT_IN_REPLIES.sub("?", text[:LINE_MOST]).strip())


def field(text: str) -> Insert | None:
    """The field above all others that PREPEND has as its text, `name: value`. None: it is none, or has no value."""
    name, colon, value = text.partition(":")
    octets = name.rstrip(" ").encode("utf-8", "replace")
    value = value.strip(" ")
    if not colon or not value or not octets or octets.translate(None, _IN_NAMES):
        return None
    return Insert(0, octets, spaced(value.encode("utf-8", "replace")))


def recipient(text: str) -> str | None:
    """The address, with its brackets or without, that REDIRECT and BCC have as their text. None: it is none, or has a backslash,
    as what is printable instead of a control character has."""
    octets = text.strip().encode("utf-8", "replace")
    if not octets or len(octets) > ADDRESS_MOST or not octets.isascii() or b"\\" in octets:
        return None
    found = rcpt_argument(b"TO:" + (octets if octets.startswith(b"<") else b"<" + octets + b">"))
    return found[0] if found is not None and not found[1] and "@" in found[0] else None


def shown(octets: bytes | bytearray) -> str:
    """Octets as they are quoted in a sentence."""
    return f"'{printable(octets.decode('utf-8', 'replace'))}'"
