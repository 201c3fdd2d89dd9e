"""Canonical forms for DKIM (RFC 6376 3.4): octets in, octets to be hashed out, independent of how the input is split.

Linear in the length of any input: runs of lines that are canonical already are found whole and copied; only other
lines are processed octet by octet. A bare CR or LF ends no line. Empty lines are counted, not kept.
"""

from relaymta._speedups._mem import clean, copy, find

CR = 13
LF = 10
SP = 32
TAB = 9


class Body:
    """A body's canonical form, `relaxed` (RFC 6376 3.4.4) or simple (3.4.3)."""

    def __init__(self, relaxed):  # type: ignore[no-untyped-def]
        self.relaxed = relaxed
        self.blanks = 0  # CRLFs that are written once other octets follow
        self.wsp = False
        self.cr = False
        self.middle = False  # within a line that is processed octet by octet
        self.some = False  # anything was written

    def feed(self, data):  # type: ignore[no-untyped-def]
        """The next part of the canonical form, after `data`; empty while it is undetermined."""
        p = data
        n = len(data)
        out = bytearray(n + 4)
        w = out
        k = 0
        front = -1  # CRLFs in front of everything this call writes; -1: nothing was written yet
        pos = 0
        run = -1  # p[run:stop] is canonical already
        stop = 0
        while pos < n:
            if not self.middle:
                blanks = 0
                while pos + 1 < n and p[pos] == CR and p[pos + 1] == LF:
                    pos += 2
                    blanks += 1
                self.blanks += blanks
                if pos >= n:
                    break
                i = find(p, LF, pos, n)
                if i > pos and p[i - 1] == CR and (not self.relaxed or clean(p, pos, i - 1)):
                    if run < 0:
                        if front < 0:
                            front = self.blanks
                        else:
                            k = self._lines(out, k)
                        run = pos
                    stop = i - 1
                    self.blanks = 1
                    pos = i + 1
                    continue
                if run >= 0:
                    k = copy(w, k, p, run, stop)
                    run = -1
                self.middle = True
            while pos < n:
                c = p[pos]
                if self.cr and c == LF:
                    pos += 1
                    self.cr = False
                    self.wsp = False
                    self.middle = False
                    self.blanks += 1
                    break
                if not self.cr and c == CR:
                    self.cr = True
                    pos += 1
                    continue
                if not self.cr and self.relaxed and (c == SP or c == TAB):
                    self.wsp = True
                    pos += 1
                    continue
                if front < 0:
                    front = self.blanks
                    self.blanks = 0
                elif self.blanks:
                    k = self._lines(out, k)
                if self.wsp:
                    w[k] = SP
                    k += 1
                    self.wsp = False
                if self.cr:  # a bare one; the octet behind it is processed again
                    w[k] = CR
                    k += 1
                    self.cr = False
                else:
                    w[k] = c
                    k += 1
                    pos += 1
        if run >= 0:
            k = copy(w, k, p, run, stop)
        if front < 0:
            return b""
        self.some = True
        del out[k:]
        return b"\r\n" * front + out if front else bytes(out)

    def _lines(self, out, k):  # type: ignore[no-untyped-def]
        """Write the pending CRLFs; the new k."""
        w = out
        while self.blanks:
            w[k] = CR
            w[k + 1] = LF
            k += 2
            self.blanks -= 1
        return k

    def finish(self):  # type: ignore[no-untyped-def]
        """The rest of the canonical form; called once, at the end of the body."""
        if self.cr:
            self.cr = False
            rest = (b"\r\n" * self.blanks) + (b" " if self.wsp else b"") + b"\r\r\n"
            self.blanks = 0
            return rest
        return b"\r\n" if self.some or not self.relaxed else b""


def header(field):  # type: ignore[no-untyped-def]
    """A header field (without the CRLF of its end) in relaxed form (3.4.2), without CRLF."""
    p = field
    n = len(field)
    colon = find(p, ord(":"), 0, n)
    if colon < 0:
        colon = n
    out = bytearray(n + 1)
    w = out
    k = 0
    i = 0
    while i < colon:
        c = p[i]
        if c >= ord("A") and c <= ord("Z"):
            c = c + 32
        w[k] = c
        k += 1
        i += 1
    while k > 0 and (w[k - 1] == SP or w[k - 1] == TAB):
        k -= 1
    if colon < n:
        w[k] = ord(":")
        k += 1
    start = k
    wsp = False
    i = colon + 1
    while i < n:
        c = p[i]
        if c == SP or c == TAB:
            wsp = True
        elif c == CR and i + 1 < n and p[i + 1] == LF:
            i += 1
        else:
            if wsp and k > start:
                w[k] = SP
                k += 1
            wsp = False
            w[k] = c
            k += 1
        i += 1
    del out[k:]
    return bytes(out)
