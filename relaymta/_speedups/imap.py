"""IMAP server input (RFC 3501 and 9051 2.2.1, 4.3, 9; RFC 7888, 3516): bytes in, one event at a time out.

A command is a line and what follows it as long as a line ends in the header of a literal. Its words are a string of kinds, one
octet each, and a list of values beside it, of the same length:

    a  a word: a run of octets other than SP ( ) { " and controls      "  a quoted string, without its quotes and backslashes
    {  a literal    ~  a literal8    =  a literal that was streamed (its value is empty)
    SP ( )  themselves (their values are empty), every single one

The words are those of the wire, no more: what they mean, and where a blank may be, is the grammar's (`proto.imap_grammar`).

Events are tuples: `(COMMAND, kinds, values)`, `(BAD, why, its first octets)` for a command that is none, once all of it has
arrived; `(LITERAL, octets, plus, binary, kinds so far, values so far)`, after which the parser *holds* until `collect()`,
`stream()` or `refuse()`; `(PIECE, octets)` and `(END,)` of a literal that is streamed; `(LINE, octets)` after `line()`.
After a BAD one that is ENDLESS nothing is parsed any more.

Only <CRLF> ends a line. Of a command that is refused, whatever the client sends of its own accord is dropped: the rest of its
lines, and literals with a plus. Events depend on the octets and on those calls alone, never on how the octets were cut.

Memory: at most `limit` octets of a command (its words are some ten times that, at worst), and what is kept while it holds.
"""

from relaymta._speedups._mem import cut, find

# These become C integers in the compiled form and vanish from the module: proto.imap_session keeps the public names.
COMMAND, BAD, LITERAL, PIECE, END, LINE = 0, 1, 2, 3, 4, 5
TOO_LONG, BARE, CONTROL, QUOTED, BRACE, NESTED, REFUSED, ENDLESS = 1, 2, 3, 4, 5, 6, 7, 8  # why a command is BAD
COMMANDS, HOLDING, COLLECTING, STREAMING, DROPPING, RAW, ENDED = 0, 1, 2, 3, 4, 5, 6  # mode

SHOWN = 80  # octets of a BAD command that are reported
DEPTH = 20  # of parentheses
DROP = 1048576  # octets of refused literals of one command
DIGITS = 18  # of the size of a literal: with more it is none
TAIL = 32  # octets at the end of a line that is too long: the longest header of a literal, and a CR

CR = 13
LF = 10
NOTHING = b""


class Parser:
    """One connection's input side. `limit`: octets of a command with its literals, but not those that are streamed; `line_limit`:
    octets of a line after `line()`, with its CRLF."""

    def __init__(self, limit, line_limit):  # type: ignore[no-untyped-def]
        self.limit = limit
        self.line_limit = line_limit
        self.held = bytearray()
        self.scanned = 0  # octets of `held` in which there is no end of a line
        self.mode = COMMANDS
        self.kinds = bytearray()
        self.values = []
        self.depth = 0
        self.used = 0  # octets of the command under way, before `held`
        self.start = b""
        self.why = 0  # the command under way is BAD
        self.size = 0  # of the literal whose header was last; -1: it had none
        self.plus = False
        self.binary = False
        self.left = 0  # of the literal under way
        self.dropped = 0
        self.ends = False

    def keep(self, data):  # type: ignore[no-untyped-def]
        """Octets from the client, for the next events."""
        self.held += data

    def waiting(self):  # type: ignore[no-untyped-def]
        """The number of octets that have arrived and are in no event yet."""
        return len(self.held)

    def fits(self):  # type: ignore[no-untyped-def]
        """Whether the literal that was announced is within the limit of its command."""
        return self.size <= self.limit - self.used

    def line(self):  # type: ignore[no-untyped-def]
        """The next line is no command (a response in AUTHENTICATE): a LINE, or BAD."""
        self.mode = RAW

    def collect(self):  # type: ignore[no-untyped-def]
        """The literal that was announced becomes a word of its command."""
        self.left = self.size
        self.mode = COLLECTING

    def stream(self):  # type: ignore[no-untyped-def]
        """The literal that was announced is passed on in pieces, and its end."""
        self.left = self.size
        self.mode = STREAMING
        self.kinds.append(ord("="))
        self.values.append(NOTHING)

    def refuse(self):  # type: ignore[no-untyped-def]
        """The command under way is refused, its literal not read, or not further. It ends as BAD."""
        self.why = REFUSED
        if self.mode == HOLDING:
            self._drop(self.size, self.plus)
        else:
            self._drop(self.left, True)

    def event(self):  # type: ignore[no-untyped-def]
        """The next event; None: it needs more octets, or an answer."""
        while True:
            if self.mode == COMMANDS:
                found = self._line()
                if found is not None or self.mode == COMMANDS:
                    return found
            elif self.mode == COLLECTING:
                if len(self.held) < self.left:
                    return None
                self._collected()
            elif self.mode == STREAMING:
                return self._piece()
            elif self.mode == DROPPING:
                found = self._dropping()
                if found is not None or self.mode == DROPPING:
                    return found
            elif self.mode == RAW:
                return self._raw()
            elif self.mode == ENDED:
                self.held.clear()
                return None
            else:
                return None

    def _end_of_line(self):  # type: ignore[no-untyped-def]
        """Where the CRLF is that ends the line in `held`, or -1."""
        p = self.held
        n = len(self.held)
        i = self.scanned
        while True:
            i = find(p, LF, i, n)
            if i < 0:
                self.scanned = n
                return -1
            if i > 0 and p[i - 1] == CR:
                return i - 1
            i += 1

    def _line(self):  # type: ignore[no-untyped-def]
        """A line of a command, if it is whole: the event that it gives, or None."""
        end = self._end_of_line()
        if end < 0:
            self._too_long(self.used + len(self.held) > self.limit)
            return None
        p = self.held
        if self.used == 0 and self.why == 0:
            self.start = cut(p, 0, min(end, SHOWN))
        stop = self._header(end)
        if self.why == 0:
            self.why = TOO_LONG if self.used + end + 2 > self.limit else self._words(stop)
        self.used += end + 2
        del self.held[: end + 2]
        self.scanned = 0
        if self.size < 0:
            return self._whole()
        if self.why:
            self._drop(self.size, self.plus)
            return None
        self.mode = HOLDING
        return (LITERAL, self.size, self.plus, self.binary, bytes(self.kinds), self.values)

    def _too_long(self, beyond):  # type: ignore[no-untyped-def]
        """Of a line that has no end yet, and is `beyond` the limit or of a BAD command, nothing is kept but what its end
        needs."""
        if not beyond and self.why == 0:
            return 0
        n = len(self.held)
        if self.why == 0:
            if self.used == 0:
                p = self.held
                self.start = cut(p, 0, min(n, SHOWN))
            self.why = TOO_LONG
        if n > 2 * TAIL:
            del self.held[: n - TAIL]
            self.scanned = TAIL
        return 0

    def _header(self, end):  # type: ignore[no-untyped-def]
        """Find the header of a literal at the end of a line, which ends at `end`: where it begins. `size`: -1, there is none."""
        p = self.held
        self.size = -1
        i = end - 1
        if i < 2 or p[i] != ord("}"):
            return end
        i -= 1
        plus = p[i] == ord("+")
        if plus:
            i -= 1
        last = i
        size = 0
        scale = 1
        while i >= 0 and last - i < DIGITS and ord("0") <= p[i] <= ord("9"):
            size += (p[i] - ord("0")) * scale
            scale *= 10
            i -= 1
        if i < 0 or p[i] != ord("{") or i == last:
            return end
        self.size = size
        self.plus = plus
        self.binary = i > 0 and p[i - 1] == ord("~")
        return i - 1 if self.binary else i

    def _words(self, end):  # type: ignore[no-untyped-def]
        """Take held[:end] apart into words; why that is impossible, or 0."""
        p = self.held
        values = self.values
        out = bytearray(end)
        w = out
        i = 0
        k = 0
        while i < end:
            c = p[i]
            if c == ord(" ") or c == ord("(") or c == ord(")"):
                self.depth += (c == ord("(")) - (c == ord(")"))
                if self.depth > DEPTH:
                    return NESTED
                values.append(NOTHING)
                i += 1
            elif c == ord('"'):
                i = self._quoted(i + 1, end)
                if i < 0:
                    return -i
            else:
                c = ord("a")
                j = i
                while j < end and p[j] > ord(" ") and p[j] != ord("(") and p[j] != ord(")") and p[j] != ord('"'):
                    if p[j] == ord("{"):
                        return BRACE
                    if p[j] == 127:
                        return CONTROL
                    j += 1
                if j == i:
                    return BARE if p[i] == CR or p[i] == LF else CONTROL
                values.append(cut(p, i, j))
                i = j
            w[k] = c
            k += 1
        del out[k:]
        self.kinds += out
        return 0

    def _quoted(self, start, end):  # type: ignore[no-untyped-def]
        """Take the quoted string at `start` of `held`: the position behind it, or why there is none, negative."""
        p = self.held
        i = start
        escaped = False
        while i < end and p[i] != ord('"'):
            if p[i] == CR or p[i] == LF:
                return -BARE
            if p[i] == 0:
                return -CONTROL
            if p[i] == ord("\\"):
                i += 1
                escaped = True
                if i >= end or (p[i] != ord('"') and p[i] != ord("\\")):
                    return -QUOTED
            i += 1
        if i >= end:
            return -QUOTED
        value = cut(p, start, i)
        if escaped:  # each pair begins at the first backslash that is in no other
            value = b"\\".join([part.replace(b'\\"', b'"') for part in value.split(b"\\\\")])
        self.values.append(value)
        return i + 1

    def _collected(self):  # type: ignore[no-untyped-def]
        """All of a literal is there."""
        p = self.held
        self.values.append(cut(p, 0, self.left))
        self.kinds.append(ord("~") if self.binary else ord("{"))
        del self.held[: self.left]
        self.used += self.left
        self.left = 0
        self.mode = COMMANDS
        return 0

    def _piece(self):  # type: ignore[no-untyped-def]
        """What has arrived of a literal that is streamed, or its end."""
        n = len(self.held)
        if self.left == 0:
            self.mode = COMMANDS
            return (END,)
        if n == 0:
            return None
        if n > self.left:
            n = self.left
        p = self.held
        piece = cut(p, 0, n)
        del self.held[:n]
        self.left -= n
        return (PIECE, piece)

    def _drop(self, octets, coming):  # type: ignore[no-untyped-def]
        """Drop a literal of a BAD command. `coming`: the client sends it, whatever we say; else its command ends here."""
        self.kinds.clear()
        self.values = []
        self.ends = not coming
        self.left = octets if coming else 0
        self.dropped += self.left
        self.mode = DROPPING
        return 0

    def _dropping(self):  # type: ignore[no-untyped-def]
        """Drop what has arrived of a literal: the event that ends its command, or None."""
        if self.dropped > DROP:
            self.mode = ENDED
            return (BAD, ENDLESS, self.start)
        n = len(self.held)
        if n > self.left:
            n = self.left
        del self.held[:n]
        self.left -= n
        if self.left:
            return None
        self.mode = COMMANDS
        return self._whole() if self.ends else None

    def _whole(self):  # type: ignore[no-untyped-def]
        """A command has ended: its event."""
        if self.why:
            event = (BAD, self.why, self.start)
        else:
            event = (COMMAND, bytes(self.kinds), self.values)
        self.kinds.clear()
        self.values = []
        self.depth = 0
        self.used = 0
        self.dropped = 0
        self.why = 0
        return event

    def _raw(self):  # type: ignore[no-untyped-def]
        """A line that is no command, if it is whole."""
        end = self._end_of_line()
        if end < 0:
            self._too_long(len(self.held) > self.line_limit)
            return None
        p = self.held
        if self.why == 0 and end + 2 > self.line_limit:
            self.why = TOO_LONG
        elif self.why == 0 and (find(p, CR, 0, end) >= 0 or find(p, LF, 0, end) >= 0):
            self.why = BARE
        event = (BAD, self.why, NOTHING) if self.why else (LINE, cut(p, 0, end))
        del self.held[: end + 2]
        self.scanned = 0
        self.used = 0
        self.why = 0
        self.mode = COMMANDS
        return event
