"""Dot-stuffing (RFC 5321 4.5.2): message data in, stuffed message data out, in pieces.

A dot is doubled at the beginning of the message data and behind every octet that a receiver may take for the end of a line, LF or
CR. So <CRLF>.<CRLF> occurs nowhere in the output, nor any variant with a bare CR or LF (SMTP smuggling), for any input.
"""

from relaymta._speedups._mem import copy, dot

CR = 13
LF = 10


class Stuffer:
    """Dot-stuffing of one message. `feed()` its data in pieces, then write `end()`."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self.last = LF  # the octet before the next piece, and the one before that: message data begins as behind a CRLF
        self.before = CR

    def feed(self, data):  # type: ignore[no-untyped-def]
        """The next piece, stuffed; the same object if no dot had to be doubled."""
        p = data
        n = len(data)
        if n == 0:
            return data
        first = p[0] == ord(".") and (self.last == LF or self.last == CR)
        self.before = p[n - 2] if n > 1 else self.last
        self.last = p[n - 1]
        i = dot(p, 1, n)
        if i < 0:
            return b"." + data if first else data
        out = bytearray(n + n // 2 + 2)  # an octet other than a dot precedes each dot that is doubled
        w = out
        k = 0
        run = 0
        if first:
            w[0] = ord(".")
            k = 1
        while i >= 0:
            k = copy(w, k, p, run, i)
            w[k] = ord(".")
            k += 1
            run = i
            i = dot(p, i + 1, n)
        k = copy(w, k, p, run, n)
        del out[k:]
        return bytes(out)

    def end(self):  # type: ignore[no-untyped-def]
        """The end of the message data: a line with a dot, and a CRLF before it if the data did not end in one."""
        return b".\r\n" if self.last == LF and self.before == CR else b"\r\n.\r\n"


def stuff(data):  # type: ignore[no-untyped-def]
    """Message data in pieces, stuffed, with its end. Everything that is written after DATA comes from here, or in pieces from a
    Stuffer: no message data can end itself early."""
    stuffer = Stuffer()
    out = [stuffer.feed(piece) for piece in data]
    out.append(stuffer.end())
    return out
