"""IMAP commands taken apart in a slow and obvious way, from RFC 9051 9 alone: the kernel has to agree with it."""

import re

COMMAND, BAD, LITERAL, PIECE, END = 0, 1, 2, 3, 4
TOO_LONG, WRONG, REFUSED, ENDLESS = 1, 2, 7, 8  # WRONG: any other reason
DEPTH, DROP, SHOWN = 20, 1048576, 80

WORD = re.compile(rb'([ ()])|"((?:[^"\\\r\n\0]|\\["\\])*)"|([^\x00-\x20()"{\x7f]+)', re.S)
HEADER = re.compile(rb"(~?)\{([0-9]{1,18})(\+?)\}\Z")


def answer(kinds: bytes, values: list[bytes], fits: bool) -> str:
    """What becomes of a literal: the messages of APPEND are streamed, what does not fit, or belongs to NONE, is refused."""
    name = values[2].upper() if len(values) > 2 else b""
    if name == b"APPEND" and len(kinds) > 4:
        return "stream"
    return "collect" if fits and name != b"NONE" else "refuse"


def words(text: bytes, depth: int) -> tuple[bytes, list[bytes], int] | None:
    """(kinds, values, how many parentheses are open) of a part of a command without literals; None where there are others."""
    kinds, values, at = b"", [], 0
    while at < len(text):
        match = WORD.match(text, at)
        if match is None:
            return None
        special, quoted, word = match.groups()
        depth += (special == b"(") - (special == b")")
        if depth > DEPTH:
            return None
        kinds += special or (b"a" if word else b'"')
        values.append(word or (b"" if special else re.sub(rb"\\(.)", rb"\1", quoted)))
        at = match.end()
    return kinds, values, depth


def events(wire: bytes, limit: int) -> list[tuple]:
    """All events of what a client has sent."""
    found: list[tuple] = []
    at = 0
    while at >= 0:
        at = _command(wire, at, limit, found)
    return found


def _command(wire: bytes, at: int, limit: int, found: list[tuple]) -> int:
    """One command at `at`: where the next one is, -1 when there is none."""
    begin, used, why, dropped, depth = at, 0, 0, 0, 0
    kinds, values = b"", []
    while True:
        end = wire.find(b"\r\n", at)
        if end < 0:
            return -1
        start = wire[begin : min(begin + SHOWN, wire.find(b"\r\n", begin))]
        line = wire[at:end]
        at = end + 2
        used += len(line) + 2
        header = HEADER.search(line)
        taken = words(line[: header.start()] if header else line, depth)
        if not why and used > limit:
            why = TOO_LONG
        elif not why and taken is None:
            why = WRONG
        elif not why:
            kinds, values, depth = kinds + taken[0], values + taken[1], taken[2]
        if not header:
            found.append((BAD, why, start) if why else (COMMAND, kinds, tuple(values)))
            return at
        size, plus, binary = int(header[2]), header[3] == b"+", header[1] == b"~"
        if not why:
            found.append((LITERAL, size, plus, binary, kinds, tuple(values)))
        what = "refuse" if why else answer(kinds, values, size <= limit - used)
        if what == "refuse":
            why = why or REFUSED
            if not plus:
                found.append((BAD, why, start))
                return at
            dropped += size
            if dropped > DROP:
                found.append((BAD, ENDLESS, start))
                return -1
        octets = wire[at : at + size]
        if what == "stream" and octets:
            found.append((PIECE, octets))
        if len(octets) < size:
            return -1
        if what == "stream":
            found.append((END,))
            kinds, values = kinds + b"=", [*values, b""]
        elif what == "collect":
            used += size
            kinds, values = kinds + (b"~" if binary else b"{"), [*values, octets]
        at += size
