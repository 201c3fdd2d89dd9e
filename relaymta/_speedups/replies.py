"""SMTP client input (RFC 5321 4.2): bytes in, whole replies out.

A reply is `(code, text)`: text holds what follows the codes of its lines, joined by LF. A client has to decide by the code alone
(4.2.1), so whatever follows a first line with a code is part of that reply up to its last line: an empty line, a line without a
code, or one with another code. A code needs nothing behind it. `(0, line)` is a line where a reply has to begin and there is no
code, or what follows a reply that is too long; the session must not go on after it. A line ends at LF, with or without CR: this
is lenient, since a reply is never passed on as message data.

Memory: at most `line_limit` octets of each of `lines_limit` lines are kept; a reply of more than `OCTETS` octets ends there.
"""

from relaymta._speedups._mem import find

CR = 13
LF = 10
OCTETS = 65536  # of one reply; RFC 5321 4.5.3.1.5 allows 512 a line


def _is_digit(octet):  # type: ignore[no-untyped-def]
    return ord("0") <= octet <= ord("9")


class Replies:
    """One connection's replies. `line_limit`: octets of a line that are kept; `lines_limit`: lines of one reply."""

    def __init__(self, line_limit, lines_limit):  # type: ignore[no-untyped-def]
        self.line_limit = line_limit
        self.lines_limit = lines_limit
        self.rest = b""  # of an unfinished line: its beginning
        self.cut = 0  # octets of the unfinished line, where they are more than `rest`
        self.lines = []
        self.code = 0  # of the reply that has begun; 0: none has
        self.octets = 0  # of the reply that has begun, without the unfinished line
        self.broken = False

    def feed(self, data):  # type: ignore[no-untyped-def]
        """The replies that `data` completes, in order."""
        replies = []  # type: ignore[var-annotated]
        if self.broken:
            return replies
        pos = 0
        if self.cut:
            pos = self._end_of_cut(data, replies)
            if pos < 0:
                return replies
        elif self.rest:
            data = self.rest + data
            self.rest = b""
        p = data
        n = len(data)
        while pos < n:
            i = find(p, LF, pos, n)
            if i < 0:
                break
            end = i - 1 if i > pos and p[i - 1] == CR else i
            if self.octets + i - pos > OCTETS:
                self.rest = data[pos : pos + self.line_limit + 4]
                return self._too_long(replies)
            if not self._line(data, pos, end, replies):
                return self._not_a_reply(p[pos : min(end, pos + self.line_limit)], replies)
            pos = i + 1
        if n - pos > self.line_limit + 4:
            self.cut = n - pos
            self.rest = data[pos : pos + self.line_limit + 4]
            if self.octets + self.cut > OCTETS:
                return self._too_long(replies)
        elif pos < n:
            self.rest = data[pos:]
        return replies

    def _end_of_cut(self, data, replies):  # type: ignore[no-untyped-def]
        """Where the unfinished line, of which the end is not kept, ends in `data`; -1 when it does not, or no reply follows."""
        p = data
        n = len(data)
        i = find(p, LF, 0, n)
        self.cut += n if i < 0 else i
        if self.octets + self.cut > OCTETS:
            self._too_long(replies)
            return -1
        if i < 0:
            return -1
        line = self.rest
        self.rest = b""
        self.cut = 0
        if not self._line(line, 0, len(line), replies):
            self._not_a_reply(line[: self.line_limit], replies)
            return -1
        return i + 1

    def _not_a_reply(self, line, replies):  # type: ignore[no-untyped-def]
        """No reply can follow this line."""
        self.broken = True
        replies.append((0, line))
        return replies

    def begun(self):  # type: ignore[no-untyped-def]
        """Whether some of a reply has come that is not whole."""
        return not self.broken and bool(self.rest or self.code)

    def end(self):  # type: ignore[no-untyped-def]
        """The reply that had begun when the connection ended: all that has come of it, if that has a code."""
        replies = []  # type: ignore[var-annotated]
        if not self.broken and (self.rest or self.code):
            self.broken = True
            if self.rest:
                self._line(self.rest, 0, len(self.rest), replies)
            if self.code:
                replies.append((self.code, b"\n".join(self.lines)))
            self.rest = b""
        return replies

    def _too_long(self, replies):  # type: ignore[no-untyped-def]
        """End a reply that does not end: its code counts, and nothing that follows."""
        if self.rest and not self.code:
            self._line(self.rest, 0, len(self.rest), replies)
        if self.code:
            replies.append((self.code, b"\n".join(self.lines)))
        self.rest = b""
        self.lines = []
        self.code = 0
        return self._not_a_reply(b"a reply that is too long", replies)

    def _line(self, data, pos, end, replies):  # type: ignore[no-untyped-def]
        """Parse one line without its end; False when a reply has to begin with it, and it has no code."""
        p = data
        size = end - pos
        code = 0
        if size >= 3 and _is_digit(p[pos + 1]) and _is_digit(p[pos + 2]) and ord("2") <= p[pos] <= ord("5"):
            code = (p[pos] - ord("0")) * 100 + (p[pos + 1] - ord("0")) * 10 + p[pos + 2] - ord("0")
        if not code:
            if not self.code:
                return False
            more = True
            start = pos
        else:
            more = size > 3 and p[pos + 3] == ord("-")
            start = pos + 4 if more or (size > 3 and p[pos + 3] == ord(" ")) else pos + 3
        if end - start > self.line_limit:
            end = start + self.line_limit
        if not self.code and not more:
            replies.append((code, p[start:end]))
            return True
        if not self.code:
            self.code = code
        self.octets += min(size, self.line_limit + 4) + 2
        if (size or code) and len(self.lines) < self.lines_limit:
            self.lines.append(p[start:end])
        if not more:
            replies.append((self.code, b"\n".join(self.lines)))
            self.lines = []
            self.code = 0
            self.octets = 0
        return True
