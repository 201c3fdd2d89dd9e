"""SMTP server input (RFC 5321 2.3.8, 4.1.1, 4.5.2; RFC 3030): bytes in, events out.

Events are tuples. In command mode `(COMMAND, verb, argument)`: verb is a four-letter word as an upper-cased big-endian
integer (0 for any other word, then argument is the whole line), `(BAD, reason, its first octets)` for a line that is no
command, `(BAD, FOREIGN, ...)` for one of another protocol: it begins with an octet that begins no word (reported as soon as
that octet is there), or ends as a request of HTTP.
In data mode `(DATA, data)`, without dot-stuffing, and `(END,)` at <CRLF>.<CRLF>; in chunk mode `(DATA, data)` as sent, and
`(END,)` after the announced number of octets.

Only <CRLF> ends a line. A bare CR or LF never ends anything: it is noted in `flags`; with `normalize` a bare LF is passed on as
<CRLF>, and a bare CR as a space: programs write it within a line, where a line end would make a header field of what follows. The
parser *holds* (parses nothing, keeps what arrives) after a verb behind which the next bytes may not be
commands (DATA, BDAT, AUTH, STARTTLS and every unknown word), after `(END,)` and FOREIGN, and at first; the
session then calls `commands()`, `line()`, `data()` or `chunk(n)` and feeds b"" to go on. So events depend on the bytes and on
those calls, never on how the bytes were cut into segments. One call gives BATCH events at most, and feed(b"") the next ones.

Memory: at most `line_limit` octets of an unfinished command, plus what is fed or kept while it holds.
"""

from relaymta._speedups._mem import copy, find, high

# These become C integers in the compiled form and vanish from the module: proto.smtp_server keeps the public names.
COMMAND = 0
BAD = 1
DATA = 2
END = 3

FOREIGN = 4  # why a line is BAD: 1 too long, 2 a bare CR or LF, 3 NUL, 4 another protocol

BATCH = 64  # events of one call
SHOWN = 32  # octets of a BAD line that are reported

HOLDING = 0
COMMANDS = 1
MESSAGE = 2
CHUNK = 3

# Position of the next octet within a line of message data.
START = 0
DOT = 1
DOT_CR = 2
MIDDLE = 3
AFTER_CR = 4

# flags
BARE_LF = 1
BARE_CR = 2
NUL = 4
EIGHT_BIT = 8
LONG_LINE = 16

CR = 13
LF = 10
SPACE = 32

DATA_VERB = 0x44415441
BDAT_VERB = 0x42444154
AUTH_VERB = 0x41555448


class Parser:
    """One connection's input side. `line_limit`: octets of a command line with its CRLF; `data_line_limit`: octets of
    a line of message data without CRLF beyond which LONG_LINE is noted; `normalize`: bare LF becomes CRLF, bare CR and NUL a
    space."""

    def __init__(self, line_limit, data_line_limit, normalize):  # type: ignore[no-untyped-def]
        self.line_limit = line_limit
        self.data_line_limit = data_line_limit
        self.normalize = normalize
        self.rest = b""
        self.at = 0
        self.start = b""
        self.mode = HOLDING
        self.raw = False
        self.skipping = False
        self.place = START
        self.column = 0
        self.left = 0
        self.size = 0
        self.flags = 0

    def commands(self):  # type: ignore[no-untyped-def]
        """Go on with commands."""
        self.mode = COMMANDS
        self.raw = False

    def line(self):  # type: ignore[no-untyped-def]
        """The next line is no command (a response in AUTH, RFC 4954): passed as `(COMMAND, 0, line)`, then the parser holds."""
        self.mode = COMMANDS
        self.raw = True

    def data(self):  # type: ignore[no-untyped-def]
        """A new message's data follows (after 354). Zeroes size and flags."""
        self.mode = MESSAGE
        self.place = START
        self.column = 0
        self.size = 0
        self.flags = 0

    def chunk(self, octets, first):  # type: ignore[no-untyped-def]
        """`octets` of a BDAT chunk follow; `first`: of a new message, which zeroes size and flags."""
        self.mode = CHUNK
        self.left = octets
        if first:
            self.place = START
            self.column = 0
            self.size = 0
            self.flags = 0

    def waiting(self):  # type: ignore[no-untyped-def]
        """The number of octets that have arrived and are not parsed yet."""
        return len(self.rest) - self.at

    def runnable(self):  # type: ignore[no-untyped-def]
        """Whether feed(b"") could give events."""
        return self.mode != HOLDING and (len(self.rest) > self.at or (self.mode == CHUNK and self.left == 0))

    def keep(self, data):  # type: ignore[no-untyped-def]
        """Keep `data` for a later feed()."""
        self.rest = self.rest[self.at :] + data
        self.at = 0

    def feed(self, data):  # type: ignore[no-untyped-def]
        """Parse what is kept and `data`; the list of events."""
        events = []  # type: ignore[var-annotated]
        pos = 0
        if self.rest:
            if data:
                data = self.rest[self.at :] + data
            else:
                data = self.rest
                pos = self.at
            self.rest = b""
            self.at = 0
        n = len(data)
        while self.mode != HOLDING and len(events) < BATCH:
            if self.mode == COMMANDS:
                before = pos
                pos = self._command(data, pos, n, events)
                if pos == before:
                    break
            elif self.mode == MESSAGE:
                if pos >= n:
                    break
                pos = self._data(data, pos, n, events)
            else:
                if pos >= n and self.left > 0:
                    break
                pos = self._chunk(data, pos, n, events)
        if pos < n:
            # The parsed part is cut off once it is the larger one: in many small steps each octet is copied once or twice.
            if pos >= n - pos:
                self.rest = data[pos:]
            else:
                self.rest = data
                self.at = pos
        return events

    def _command(self, data, pos, n, events):  # type: ignore[no-untyped-def]
        """Parse one command line at `pos`; the position behind it, or `pos` when it is unfinished."""
        p = data
        i = pos
        if not self.raw and not self.skipping and pos < n:
            letter = p[pos] | 0x20
            if (letter < 97 or letter > 122) and p[pos] != CR and p[pos] != LF:
                self.mode = HOLDING
                events.append((BAD, FOREIGN, b""))
                return pos + 1
        while True:
            i = find(p, LF, i, n)
            if i < 0:
                return self._unfinished(data, pos, n)
            if i > pos and p[i - 1] == CR:
                break
            i += 1
        end = i - 1
        if self.raw:
            self.mode = HOLDING
        if self.skipping or i + 1 - pos > self.line_limit:
            events.append((BAD, 1, self.start if self.skipping else p[pos : min(end, pos + SHOWN)]))
            self.skipping = False
            return i + 1
        if find(p, LF, pos, end) >= 0 or find(p, CR, pos, end) >= 0:
            events.append((BAD, 2, p[pos : min(end, pos + SHOWN)]))
            return i + 1
        if find(p, 0, pos, end) >= 0:
            events.append((BAD, 3, p[pos : min(end, pos + SHOWN)]))
            return i + 1
        if self.raw:
            events.append((COMMAND, 0, p[pos:end]))
            return i + 1
        if end - pos > 9 and p[end - 2] == ord(".") and p[end - 4] == ord("/") and p[end - 9 : end - 3] == b" HTTP/":
            self.mode = HOLDING
            events.append((BAD, FOREIGN, p[pos : min(end, pos + SHOWN)]))
            return i + 1
        if end - pos >= 4 and (end - pos == 4 or p[pos + 4] == ord(" ")):
            verb = ((p[pos] & 0xDF) << 24) | ((p[pos + 1] & 0xDF) << 16) | ((p[pos + 2] & 0xDF) << 8) | (p[pos + 3] & 0xDF)
            if verb == DATA_VERB or verb == BDAT_VERB or verb == AUTH_VERB:
                self.mode = HOLDING
            events.append((COMMAND, verb, p[pos + 5 : end] if end - pos > 4 else b""))
        else:
            self.mode = HOLDING
            events.append((COMMAND, 0, p[pos:end]))
        return i + 1

    def _unfinished(self, data, pos, n):  # type: ignore[no-untyped-def]
        """No CRLF in data[pos:]: wait for it at `pos`, or skip what is over the limit (all but a last CR)."""
        p = data
        if not self.skipping and n - pos <= self.line_limit:
            return pos
        if not self.skipping:
            self.skipping = True
            self.start = p[pos : min(n, pos + SHOWN)]
        return n - 1 if n > pos and p[n - 1] == CR else n

    def _data(self, data, pos, n, events):  # type: ignore[no-untyped-def]
        """Parse message data from `pos` up to the end of the data or the final dot; the position behind it."""
        p = data
        first = pos  # where the region inspected for NUL and 8-bit starts
        run = pos  # start of the octets that pass unchanged and are not copied yet
        k = 0
        out = None
        tail = -1  # where the message data ends, once the final dot is seen
        lf = -1  # the next LF, or n; searched once, however many bare CRs there are in front of it
        while pos < n:
            place = self.place
            if place == MIDDLE:
                if lf < pos:
                    i = find(p, LF, pos, n)
                    lf = n if i < 0 else i
                stop = lf
                self.column += stop - pos
                # A CR is valid only right before that LF.
                c = find(p, CR, pos, stop)
                if c >= 0 and self.normalize and (c + 1 < stop or stop == n):
                    # A bare CR, or one that is held back: the next octet says what it is.
                    if out is None:
                        out = bytearray(2 * (n - run) + 4)
                        w = out
                    k = copy(w, k, p, run, c)
                    run = c + 1
                    if c + 1 < stop:
                        self.flags |= BARE_CR
                        w[k] = SPACE
                        k += 1
                    else:
                        self.place = AFTER_CR
                    self.column -= stop - (c + 1)
                    pos = c + 1
                    continue
                if c >= 0 and c + 1 < stop:
                    self.column -= stop - (c + 1)
                    pos = c + 1
                    self.place = AFTER_CR
                    continue
                if c >= 0:
                    # The last octet before the LF (or before the end of the data) is a CR.
                    pos = stop
                    self.place = AFTER_CR
                    continue
                if stop == n:
                    pos = n
                    break
                i = stop
                # A bare LF.
                self.flags |= BARE_LF
                if self.normalize:
                    if out is None:
                        out = bytearray(2 * (n - run) + 4)
                        w = out
                    k = copy(w, k, p, run, i)
                    w[k] = CR
                    k += 1
                    run = i
                    self._line(0)
                pos = i + 1
            elif place == AFTER_CR:
                if self.normalize and run == pos:  # it is held back
                    if out is None:
                        out = bytearray(2 * (n - run) + 4)
                        w = out
                    w[k] = CR if p[pos] == LF else SPACE
                    k += 1
                if p[pos] == LF:
                    pos += 1
                    self._line(1)
                    self.place = START
                else:
                    self.flags |= BARE_CR
                    self.place = MIDDLE
            elif place == START:
                if p[pos] == ord("."):
                    if pos + 2 < n and p[pos + 1] == CR and p[pos + 2] == LF:
                        tail = pos
                        pos += 3
                        break
                    # Held back until the next octet says whether it was stuffed or final.
                    if run < pos:
                        if out is None:
                            out = bytearray(2 * (n - run) + 4)
                            w = out
                        k = copy(w, k, p, run, pos)
                    pos += 1
                    run = pos
                    self.place = DOT
                else:
                    self.place = MIDDLE
            elif place == DOT:
                if p[pos] == CR:
                    # Held back too: "." CR LF ends the message data.
                    pos += 1
                    run = pos
                    self.place = DOT_CR
                else:
                    self.place = MIDDLE
            else:  # DOT_CR
                if p[pos] == LF:
                    tail = pos
                    run = pos
                    pos += 1
                    break
                # The CR was held back: it is message data after all.
                self.column += 1
                self.place = AFTER_CR
                if self.normalize:
                    continue
                if out is None:
                    out = bytearray(2 * (n - run) + 4)
                    w = out
                w[k] = CR
                k += 1
        self._flush(data, first, run, pos if tail < 0 else tail, out, k, events)
        if tail >= 0:
            self.mode = HOLDING
            events.append((END,))
        return pos

    def _line(self, ending):  # type: ignore[no-untyped-def]
        """A line ended; `ending` octets of its end are in `column`."""
        if self.column - ending > self.data_line_limit:
            self.flags |= LONG_LINE
        self.column = 0
        return 0

    def _flush(self, data, first, run, pos, out, k, events):  # type: ignore[no-untyped-def]
        """Emit out[:k] + data[run:pos] as one DATA event, after noting what data[first:pos] holds."""
        p = data
        if self.column - 1 > self.data_line_limit:
            self.flags |= LONG_LINE
        if high(p, first, pos):
            self.flags |= EIGHT_BIT
        nul = find(p, 0, first, pos) >= 0
        if nul:
            self.flags |= NUL
        if out is None:
            if run >= pos:
                return 0
            body = data if run == 0 and pos == len(data) else p[run:pos]
        else:
            w = out
            k = copy(w, k, p, run, pos)
            if k == 0:
                return 0
            body = bytes(out[:k])
        if nul and self.normalize:
            body = body.replace(b"\0", b" ")
        self.size += len(body)
        events.append((DATA, body))
        return 0

    def _chunk(self, data, pos, n, events):  # type: ignore[no-untyped-def]
        """Pass `left` octets on as they are, noting bare CR and LF; the position behind them."""
        p = data
        end = n if n - pos < self.left else pos + self.left
        self.left -= end - pos
        i = pos
        lf = -1  # as in _data
        while i < end:
            if self.place == AFTER_CR:
                if p[i] == LF:
                    i += 1
                    self._line(1)
                else:
                    self.flags |= BARE_CR
                self.place = MIDDLE
                continue
            if lf < i:
                j = find(p, LF, i, end)
                lf = end if j < 0 else j
            stop = lf
            c = find(p, CR, i, stop)
            if c >= 0:
                self.column += c + 1 - i
                i = c + 1
                self.place = AFTER_CR
                continue
            self.column += stop - i
            if stop < end:
                self.flags |= BARE_LF
                self.column += 1
            i = stop if stop == end else stop + 1
        self._flush(data, pos, pos, end, None, 0, events)
        if self.left == 0:
            self.mode = HOLDING
            events.append((END,))
        return end
