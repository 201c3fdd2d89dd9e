"""What DATA carries (RFC 5321 4.5.2): text in, stuffed text out, piece by piece.

A dot is doubled behind every octet that some receiver may take for the end of a line: LF, CR, and the beginning of the text. So
<CRLF>.<CRLF> stands nowhere in what is written, nor does any form of it with a bare CR or LF, whatever the text is.
"""

from relaymta._speedups._mem import copy, dot

CR = 13
LF = 10


class Stuffer:
    """One text on its way out."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self.last = LF  # the octet before the next piece, and the one before that: a text begins as behind a CRLF
        self.before = CR

    def feed(self, data):  # type: ignore[no-untyped-def]
        """A piece, stuffed; the same object where nothing had to be."""
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
        out = bytearray(n + n // 2 + 2)  # a dot needs an octet before it that is none
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
        """The line with the dot that ends the text, which ends in CRLF before it."""
        return b".\r\n" if self.last == LF and self.before == CR else b"\r\n.\r\n"


def stuff(text):  # type: ignore[no-untyped-def]
    """A text in pieces as DATA carries it, with the dot that ends it. Everything that is written behind DATA comes from here, or
    piece by piece from a Stuffer: whatever the text is, nothing in it ends it early."""
    stuffer = Stuffer()
    out = [stuffer.feed(piece) for piece in text]
    out.append(stuffer.end())
    return out
