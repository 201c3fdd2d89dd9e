"""What a trace shows of an SMTP dialogue: its lines, without secrets and without message data.

Nothing here looks for secrets in what was said: whatever may be one is never shown. Of a client that is

    AUTH               the name of the mechanism, where it is one, and the number of octets behind it
    a response to 334  the number of its octets; `*` is shown (it cancels)
    no command         the number of its octets: a client that sends its password unasked says no command
    too long, broken   the verb, where it is one, and what is wrong
    NOOP, RSET ...     their arguments, which mean nothing, as the number of octets

and of message data its number of octets. Of the texts of 334 replies, of either side, nothing is shown. What other replies of a
peer quote of our own credentials is `***` (`errors.without`).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from relaymta.errors import redacted, without
from relaymta.proto.sasl import MECHANISMS

__all__ = ["LINE_MOST", "Ear", "Says", "commands", "replies", "reply_lines", "shown"]

LINE_MOST = 500  # octets of a line that are shown
LINES_MOST = 100  # lines of one reply of a peer

_COMMAND, _BAD, _DATA = 0, 1, 2  # event kinds of _speedups.smtp (C integers there)
_WRONG = {1: "too long", 2: "with a bare CR or LF", 3: "with NUL", 4: "of another protocol"}
_WITH_ARGUMENT = (b"EHLO", b"HELO", b"LHLO", b"BDAT", b"VRFY", b"XCLIENT", b"XFORWARD")
_PATH = {b"MAIL": re.compile(rb"\s*FROM\s*:", re.I), b"RCPT": re.compile(rb"\s*TO\s*:", re.I)}
_ALONE = (b"DATA", b"RSET", b"NOOP", b"HELP", b"QUIT", b"STARTTLS", b"EXPN", b"TURN", b"ETRN")
_OF_OTHERS = (b"GET", b"HEAD", b"POST", b"PUT", b"CONNECT", b"OPTIONS", b"PROXY", b"PRI")
_KNOWN = {*_WITH_ARGUMENT, *_PATH, *_ALONE, b"AUTH"}
_MECHANISMS = {*(name.encode() for name in MECHANISMS), b"CRAM-MD5", b"DIGEST-MD5", b"NTLM", b"GSSAPI", b"EXTERNAL"}


class Says(Protocol):
    """What a session is asked about an event."""

    exchange: Any


def shown(octets: bytes) -> str:
    """A line as text, of which LINE_MOST octets are kept; what is not UTF-8 is escaped."""
    text = octets[:LINE_MOST].decode("utf-8", "backslashreplace")
    return text if len(octets) <= LINE_MOST else f"{text} <{len(octets) - LINE_MOST} octets more>"


def _hidden(octets: int, of: str = "") -> str:
    return f"<{octets} octets{of}>"


class Ear:
    """What a client says, from the events of the parser (_speedups/smtp.py)."""

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = 0  # octets of message data since it began

    def heard(self, session: Says, event: Any) -> str:
        """The line of an event that is about to be handled; "" for none: message data goes on."""
        kind = event[0]
        if kind == _DATA:
            self._data += len(event[1])
            return ""
        if kind == _COMMAND:
            return _response(event[2]) if session.exchange is not None else _command(event[1], event[2])
        if kind == _BAD:
            return "<a response to AUTH, " + _WRONG[event[1]] + ">" if session.exchange is not None else _bad(event[1], event[2])
        return self.rest()

    def rest(self) -> str:
        """The message data since it began, or since the last call; "" where there was none and none is expected."""
        octets, self._data = self._data, 0
        return _hidden(octets, " of message data")

    @property
    def open(self) -> bool:
        """Whether there is message data that `rest` has not told."""
        return self._data > 0


def _response(line: bytes) -> str:
    return "*" if line.strip() == b"*" else _hidden(len(line), " in response to AUTH")


def _command(verb: int, argument: bytes) -> str:
    if verb:
        return _said(verb.to_bytes(4, "big"), argument, 5 + len(argument) if argument else 4)
    word = re.split(rb"[ \t]", argument, maxsplit=1)
    return _said(word[0].upper(), word[1] if len(word) > 1 else b"", len(argument))


def _said(verb: bytes, argument: bytes, octets: int) -> str:
    """`octets`: of the line."""
    if verb == b"AUTH":
        return _auth(argument)
    if verb in _WITH_ARGUMENT or (verb in _PATH and _PATH[verb].match(argument)):
        return shown(verb + b" " + argument if argument else verb)
    if verb in _KNOWN:
        return verb.decode() + (f" {_hidden(len(argument))}" if argument else "")
    return _hidden(octets, ", no command")


def _auth(argument: bytes) -> str:
    name, *rest = argument.split(maxsplit=1)[:2] or [b""]
    if name.upper() not in _MECHANISMS:
        return f"AUTH {_hidden(len(argument))}" if argument else "AUTH"
    return f"AUTH {name.upper().decode()}" + (f" {_hidden(len(rest[0]))}" if rest else "")


def _bad(why: int, start: bytes) -> str:
    verb = re.split(rb"[ \t]", start, maxsplit=1)[0].upper()
    name = verb.decode() + " " if verb in _KNOWN or (why == 4 and verb in _OF_OTHERS) else ""
    return f"{name}<a line {_WRONG[why]}>"


def replies(out: bytes) -> Iterator[str]:
    """The lines of our replies to a client, each of which ends with CRLF."""
    for line in out.split(b"\r\n")[:-1]:
        yield _challenge(line[4:]) if line.startswith(b"334") else shown(line)


def _challenge(text: bytes) -> str:
    return f"334 {_hidden(len(text), ' of AUTH')}" if text else "334"


def commands(octets: bytes, logging_in: bool = False) -> Iterator[str]:
    """The lines of what we say to a peer, each of which ends with CRLF. `logging_in`: within AUTH, where all is secret."""
    for line in octets.split(b"\r\n")[:-1]:
        if line[:4].upper() == b"AUTH" and line[4:5] in (b"", b" "):
            yield _auth(line[5:])
        else:
            yield _response(line) if logging_in else shown(line)


def reply_lines(code: int, text: str, secrets: Iterable[str] = ()) -> Iterator[str]:
    """The lines of a peer's reply, whose text has those of its lines that follow the code, joined by LF. `secrets`: what of it
    nobody may read."""
    if code == 334:
        yield _challenge(text.encode())
        return
    if secrets:
        text = redacted(without(text, secrets))
    lines = text.split("\n")
    more = len(lines) - LINES_MOST
    lines = lines[:LINES_MOST]
    for number, line in enumerate(lines, 1):
        begin = f"{code}{'-' if number < len(lines) or more > 0 else ' '}" if code else ""
        yield begin + shown(line.encode("utf-8", "surrogateescape"))
    if more > 0:
        yield f"<{more} lines more>"
