"""SMTP client input (RFC 5321 4.2): bytes in, whole replies out.

A reply is `(code, text)`: text holds the lines behind the codes, joined by LF. `(0, line)` is a line that is not a reply,
or a reply that is too long; the session must not go on after it. A line ends at LF, with or without CR: this is lenient, since
a reply is never passed on as message data.

Memory: at most `line_limit` octets of an unfinished line plus `lines_limit` lines of an unfinished reply.
"""

from relaymta._speedups._mem import find

CR = 13
LF = 10


class Replies:
    """One connection's replies. `line_limit`: octets of a line; `lines_limit`: lines of one reply."""

    def __init__(self, line_limit, lines_limit):  # type: ignore[no-untyped-def]
        self.line_limit = line_limit
        self.lines_limit = lines_limit
        self.rest = b""
        self.lines = []
        self.code = 0
        self.broken = False

    def feed(self, data):  # type: ignore[no-untyped-def]
        """The replies that `data` completes, in order."""
        replies = []  # type: ignore[var-annotated]
        if self.broken:
            return replies
        if self.rest:
            data = self.rest + data
            self.rest = b""
        p = data
        n = len(data)
        pos = 0
        while pos < n:
            i = find(p, LF, pos, n)
            if i < 0:
                break
            end = i - 1 if i > pos and p[i - 1] == CR else i
            if not self._line(data, pos, end, replies):
                self.broken = True
                replies.append((0, p[pos:end]))
                return replies
            pos = i + 1
        if n - pos > self.line_limit:
            self.broken = True
            replies.append((0, p[pos : pos + 80]))
            return replies
        if pos < n:
            self.rest = data[pos:]
        return replies

    def _line(self, data, pos, end, replies):  # type: ignore[no-untyped-def]
        """Parse one line without its end; False when it is not a reply line."""
        p = data
        size = end - pos
        if size < 3 or size > self.line_limit:
            return False
        if p[pos] < ord("2") or p[pos] > ord("5"):
            return False
        if p[pos + 1] < ord("0") or p[pos + 1] > ord("9") or p[pos + 2] < ord("0") or p[pos + 2] > ord("9"):
            return False
        if size > 3 and p[pos + 3] != ord(" ") and p[pos + 3] != ord("-"):
            return False
        code = (p[pos] - ord("0")) * 100 + (p[pos + 1] - ord("0")) * 10 + p[pos + 2] - ord("0")
        if self.lines:
            if code != self.code or len(self.lines) >= self.lines_limit:
                return False
        elif size == 3 or p[pos + 3] == ord(" "):
            replies.append((code, p[pos + 4 : end] if size > 3 else b""))
            return True
        self.code = code
        self.lines.append(p[pos + 4 : end] if size > 3 else b"")
        if size == 3 or p[pos + 3] == ord(" "):
            replies.append((code, b"\n".join(self.lines)))
            self.lines = []
        return True
