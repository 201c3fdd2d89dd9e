"""Octets that are written one behind the other, and strings as IMAP sends them (RFC 9051 4.3, 9)."""

from relaymta._speedups._mem import copy, cut, find, high
from relaymta._speedups._words import digits

TAB, LF, CR, SP = 9, 10, 13, 32
QUOTED_MOST = 1000  # octets of a quoted string; what is longer is a literal (RFC 2683 3.2.1.5)
FIRST_ROOM = 2048  # octets


class Octets:
    """What is written: w[:k]. What was unfolded last: line[start:end]."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self.octets = bytearray(FIRST_ROOM)
        self.w = self.octets
        self.size = FIRST_ROOM
        self.k = 0
        self.unfolded = bytearray()
        self.line = self.w
        self.start = self.end = 0

    def need(self, more):  # type: ignore[no-untyped-def]
        """Have room for so many octets."""
        if self.k + more > self.size:
            self.size += self.size + more
            self.octets += bytearray(self.size - len(self.octets))
            self.w = self.octets

    def put(self, text):  # type: ignore[no-untyped-def]
        """Write octets as they are."""
        self.need(len(text))
        self.k = copy(self.w, self.k, text, 0, len(text))

    def number(self, n):  # type: ignore[no-untyped-def]
        """Write a number, with a space in front."""
        self.need(24)
        self.w[self.k] = SP
        self.k = digits(self.w, self.k + 1, n)

    def taken(self, start, end):  # type: ignore[no-untyped-def]
        """What is written between two places."""
        return cut(self.w, start, end)

    def string(self, p, start, end):  # type: ignore[no-untyped-def]
        """Write p[start:end] as a string: quoted where the grammar allows it (7-bit), else a literal, which is never empty. A CR,
        LF or NUL is a space."""
        size = end - start
        self.need(2 * size + 24)
        w = self.w
        k = self.k
        if size <= QUOTED_MOST and _plain(p, start, end):
            w[k] = ord('"')
            k = copy(w, k + 1, p, start, end)
            w[k] = ord('"')
            self.k = k + 1
            return 0
        quoted = size <= QUOTED_MOST and not high(p, start, end)
        if quoted:
            w[k] = ord('"')
            k += 1
        else:
            w[k] = ord("{")
            k = copy(w, digits(w, k + 1, size), b"}\r\n", 0, 3)
        for i in range(start, end):
            c = p[i]
            if quoted and (c == ord('"') or c == ord("\\")):
                w[k] = ord("\\")
                k += 1
            w[k] = SP if c == 0 or c == CR or c == LF else c
            k += 1
        if quoted:
            w[k] = ord('"')
            k += 1
        self.k = k
        return 0

    def unfold(self, p, start, end):  # type: ignore[no-untyped-def]
        """Make p[start:end] the value at hand, on one line (RFC 5322 2.2.3), without white space around it; a CR, LF or NUL that
        is left is a space."""
        if find(p, LF, start, end) >= 0 or find(p, CR, start, end) >= 0 or find(p, 0, start, end) >= 0:
            if len(self.unfolded) < end - start:
                self.unfolded = bytearray(end - start)
            w = self.unfolded
            end = _unfolded(w, p, start, end)
            start = 0
            self.line = w
            p = w
        else:
            self.line = p
        while start < end and (p[start] == SP or p[start] == TAB):
            start += 1
        while end > start and (p[end - 1] == SP or p[end - 1] == TAB):
            end -= 1
        self.start = start
        self.end = end


def _plain(p, start, end):  # type: ignore[no-untyped-def]
    """Whether p[start:end] can be between quotes as it is."""
    bad = 0
    quote = ord('"')
    backslash = ord("\\")
    cr = 13
    lf = 10
    limit = 128
    for i in range(start, end):
        c = p[i]
        bad |= (c == quote) | (c == backslash) | (c == cr) | (c == lf) | (c == 0) | (c >= limit)
    return not bad


def _unfolded(w, p, start, end):  # type: ignore[no-untyped-def]
    """Write p[start:end] to w on one line: how many octets."""
    k = 0
    i = start
    while i < end:
        c = p[i]
        if c == CR and i + 2 < end and p[i + 1] == LF and (p[i + 2] == SP or p[i + 2] == TAB):
            i += 2
        elif c == LF and i + 1 < end and (p[i + 1] == SP or p[i + 1] == TAB):
            i += 1
        else:
            w[k] = SP if c == CR or c == LF or c == 0 else c
            k += 1
            i += 1
    return k
