"""Message data taken apart in one pass (RFC 5322 2.2, RFC 2045 5, RFC 2046 5): headers, the fields that IMAP shows, the tree of
MIME parts. Octets in, offsets out; nothing is decoded, and nothing is an error.

A line ends at LF, with or without CR. A header ends behind its first empty line, at a delimiter of an enclosing multipart, or at
the end of the data; it is empty where its first line is no field. A delimiter is a line of "--", the boundary, perhaps "--", and
white space alone: a boundary that another begins with is none of it. Of two with the same boundary the inner counts. A multipart
that lacks a boundary or has no part in it is text (RFC 2045 5.2: its Content-Type is not valid). An encoded message is opaque.

Linear in the length of the data, whatever it is. Bounds: HEADER_MOST octets of a header are searched for fields; FIELDS_MOST of
them, PARAMETERS_MOST of a field and KEPT_MOST of both in the whole message are kept. What is deeper than DEPTH_MOST, or behind
PARTS_MOST parts, is one opaque part.
"""

from relaymta._speedups._mem import find, same
from relaymta._speedups._turns import give_way

TAB, LF, CR, SP, DASH = 9, 10, 13, 32, 45

HEADER_MOST = 1048576  # octets
TURN = 65536  # octets after which other threads may run: a quarter of a millisecond, where lines are short
PARTS_TURN = 256  # and parts
FIELDS_MOST, PARAMETERS_MOST, KEPT_MOST = 1000, 100, 100000
DEPTH_MOST, PARTS_MOST = 100, 10000
LEAF, MULTIPART, MESSAGE, OPAQUE = 0, 1, 2, 3  # kinds of parts
IDENTITY, QUOTED_PRINTABLE, BASE64, OTHER = 0, 1, 2, 3  # encodings; the first: 7bit, 8bit, binary
CONTENT_ENCODING, CONTENT_TYPE = 16, 17  # numbers of fields: proto/mime_envelope.py has the names of all


class Part:
    """A part. `header`, `body`, `end`: offsets of its header, its body, and behind that (without the line end that belongs to the
    delimiter); `lines`: line ends in the body. `depth`: how many parts it is nested in. `type`, `type_end`, `subtype`,
    `subtype_end`: where the names in its Content-Type are, -1 without a valid one. `parameters`: of Content-Type, as of `value`.
    `fields`: (number, start, end) of the values of those fields that have a number, in order."""

    def __init__(self, depth, header):  # type: ignore[no-untyped-def]
        self.depth = depth
        self.kind = LEAF
        self.header = self.body = self.end = header
        self.lines = 0
        self.type = self.type_end = self.subtype = self.subtype_end = -1
        self.encoding = IDENTITY
        self.parameters = self.boundary = None
        self.fields = []
        self.digest = self.filled = False  # multipart/digest; a part in it has begun
        self.typed = self.encoded = False  # a Content-Type, a Content-Transfer-Encoding was seen, valid or not
        self.outer = None  # the enclosing part with the same boundary


class Scanner:
    """One pass over message data."""

    def __init__(self, data):  # type: ignore[no-untyped-def]
        self.data = data
        self.size = len(data)
        self.parts = []
        self.stack = []  # the part at hand, in what it is nested
        self.open = {}  # boundaries whose last delimiter has not come, with their innermost parts
        self.lines = 0  # line ends so far
        self.closing = False  # the delimiter that was matched is a last one
        self.kept = 0  # fields and parameters

    def run(self):  # type: ignore[no-untyped-def]
        """All parts, each in front of those in it; the first is the message."""
        p = self.data
        n = self.size
        pos = self._begin(p, 0, False)
        due = pos + TURN
        while pos < n:
            if pos > due:
                give_way()
                due = pos + TURN
            i = -1
            if p[pos] == DASH and pos + 1 < n and p[pos + 1] == DASH and len(self.open):
                i = self._delimiter(p, pos)
            if i < 0:
                i = find(p, LF, pos, n) + 1
                if i == 0:
                    break
                self.lines += 1
            pos = i
        while len(self.stack):
            self._finish(n, self.lines)
        return self.parts

    def _begin(self, p, pos, digest):  # type: ignore[no-untyped-def]
        """Open the part whose header is at `pos`, and those that begin with its body; where the last one's body is."""
        while True:
            part = Part(len(self.stack), pos)
            self.parts.append(part)
            if len(self.parts) % PARTS_TURN == 0:
                give_way()
            self.stack.append(part)
            pos = self._header(p, part)
            part.body = pos
            part.lines = self.lines
            if digest and not part.typed:
                part.kind = MESSAGE
            if part.kind == MULTIPART and part.boundary is None:
                _as_text(part)
            encoded = part.kind == MESSAGE and (part.encoding == BASE64 or part.encoding == QUOTED_PRINTABLE)
            full = len(self.parts) >= PARTS_MOST
            if encoded or full or (part.kind != LEAF and part.depth >= DEPTH_MOST):
                part.kind = OPAQUE
            if full:
                self.open.clear()
            if part.kind == MULTIPART:
                part.outer = self.open.get(part.boundary)
                self.open[part.boundary] = part
            if part.kind != MESSAGE:
                return pos
            digest = False

    def _finish(self, end, lines):  # type: ignore[no-untyped-def]
        """End the innermost part; `lines`: line ends up to there."""
        part = self.stack.pop()
        part.end = max(end, part.body)
        part.lines = lines - part.lines if end >= part.body else 0
        if part.kind == MULTIPART:
            self._close(part)
            if not part.filled:
                _as_text(part)

    def _close(self, part):  # type: ignore[no-untyped-def]
        """Delimiters of a part are none from here on."""
        if self.open.get(part.boundary) is part:
            del self.open[part.boundary]
            if part.outer is not None:
                self.open[part.boundary] = part.outer

    def _delimiter(self, p, pos):  # type: ignore[no-untyped-def]
        """What the line at `pos` begins or ends, if it is a delimiter: where to go on; -1: it is none."""
        i = find(p, LF, pos, self.size)
        stop = self.size if i < 0 else i
        part = self._match(p, pos, stop)
        if part is None:
            return -1
        end = pos - 2 if pos > 1 and p[pos - 2] == CR else pos - 1
        while self.stack[len(self.stack) - 1] is not part:
            self._finish(end, self.lines - 1)
        if i >= 0:
            self.lines += 1
            stop += 1
        if self.closing:
            self._close(part)
            return stop
        part.filled = True
        return self._begin(p, stop, part.digest)

    def _match(self, p, pos, stop):  # type: ignore[no-untyped-def]
        """The part that the line p[pos:stop], which begins with "--", is a delimiter of, or None."""
        while stop > pos + 2 and (p[stop - 1] == CR or p[stop - 1] == SP or p[stop - 1] == TAB):
            stop -= 1
        self.closing = False
        part = self.open.get(p[pos + 2 : stop])
        if part is None and stop > pos + 4 and p[stop - 1] == DASH and p[stop - 2] == DASH:
            self.closing = True
            part = self.open.get(p[pos + 2 : stop - 2])
        return part

    def _header(self, p, part):  # type: ignore[no-untyped-def]
        """Read the header of a part: where its body begins."""
        n = self.size
        pos = part.header
        number = -1  # of the field at hand, whose value is p[start:stop]
        start = stop = 0
        due = pos + TURN
        while pos < n:
            if pos > due:
                give_way()
                due = pos + TURN
            c = p[pos]
            if c == LF or (c == CR and pos + 1 < n and p[pos + 1] == LF):
                pos += 1 if c == LF else 2
                self.lines += 1
                break
            i = find(p, LF, pos, n)
            i = n if i < 0 else i
            if c == DASH and pos + 1 < n and p[pos + 1] == DASH and len(self.open) and self._match(p, pos, i) is not None:
                break
            end = i - 1 if i > pos and p[i - 1] == CR else i
            if (c == SP or c == TAB) and pos > part.header:
                stop = end
            else:
                if number >= 0:
                    self._field(p, part, number, start, stop)
                number = -1
                colon = _colon(p, pos, end)
                if colon >= 0 and pos - part.header < HEADER_MOST:
                    number = _number(p, pos, colon)
                    start = colon + 1
                    stop = end
                elif colon < 0 and pos == part.header:
                    break
            self.lines += i < n
            pos = min(i + 1, n)
        if number >= 0:
            self._field(p, part, number, start, stop)
        return pos

    def _field(self, p, part, number, start, stop):  # type: ignore[no-untyped-def]
        """Keep a field, and read what the structure depends on."""
        stop = min(stop, start + HEADER_MOST)
        if len(part.fields) < FIELDS_MOST and self.kept < KEPT_MOST:
            self.kept += 1
            part.fields.append((number, start, stop))
        if number == CONTENT_TYPE and not part.typed:
            part.typed = True
            self._content_type(p, part, start, stop)
        elif number == CONTENT_ENCODING and not part.encoded:
            part.encoded = True
            part.encoding = _encoding(p, start, stop)

    def _content_type(self, p, part, pos, end):  # type: ignore[no-untyped-def]
        """Read a Content-Type (RFC 2045 5.1); one that is not valid changes nothing."""
        kind = _skip(p, pos, end)
        kind_end = _token(p, kind, end)
        sub = _skip(p, kind_end, end)
        if kind_end > kind and sub < end and p[sub] == ord("/"):
            sub = _skip(p, sub + 1, end)
            i = _token(p, sub, end)
            if i > sub:
                part.type, part.type_end, part.subtype, part.subtype_end = kind, kind_end, sub, i
                parameters = _parameters(p, i, end)
                if same(p, kind, kind_end, b"multipart"):
                    part.kind = MULTIPART
                    part.digest = same(p, sub, i, b"digest")
                    part.boundary = _boundary(p, parameters)
                elif same(p, kind, kind_end, b"message") and (same(p, sub, i, b"rfc822") or same(p, sub, i, b"global")):
                    part.kind = MESSAGE
                if parameters is not None and self.kept < KEPT_MOST:
                    self.kept += len(parameters)
                    part.parameters = parameters


def scan(data):  # type: ignore[no-untyped-def]
    """The parts of message data: each in front of those in it; the first is the message itself."""
    return Scanner(data).run()


def fields(data, start, end):  # type: ignore[no-untyped-def]
    """The fields of the header at data[start:end], FIELDS_MOST at most: (start, end of the name, start of the value, end), the
    end behind the last line. Lines that belong to no field are left out."""
    p = data
    found = []  # type: ignore[var-annotated]
    name = -1  # start of the field at hand
    colon = 0
    pos = start
    while pos < end and len(found) < FIELDS_MOST:
        c = p[pos]
        if c == LF or (c == CR and pos + 1 < end and p[pos + 1] == LF):
            break
        i = find(p, LF, pos, end)
        i = end - 1 if i < 0 else i
        if c != SP and c != TAB:
            if name >= 0:
                found.append((name, _name_end(p, name, colon), colon + 1, pos))
                name = -1
                continue
            colon = _colon(p, pos, i + 1)
            name = pos if colon >= 0 else -1
        pos = i + 1
    if name >= 0:
        found.append((name, _name_end(p, name, colon), colon + 1, pos))
    return found


def value(data, start, end):  # type: ignore[no-untyped-def]
    """A token with parameters, as in Content-Disposition (RFC 2183 2): (start of the token, its end, parameters). A parameter is
    (start of its name, its end, start of its value, its end); a value that is quoted has a quote in front of its start."""
    p = data
    pos = _skip(p, start, end)
    i = _token(p, pos, end)
    return pos, i, _parameters(p, i, end)


def _as_text(part):  # type: ignore[no-untyped-def]
    """What was a multipart is text of the default type."""
    part.kind = LEAF
    part.type = -1
    part.parameters = None


def _colon(p, pos, end):  # type: ignore[no-untyped-def]
    """The index of the colon behind the field name at `pos`; -1: that is no field (RFC 5322 2.2, 4.5)."""
    i = pos
    while i < end and p[i] > SP and p[i] < 127 and p[i] != ord(":"):
        i += 1
    if i == pos:
        return -1
    while i < end and (p[i] == SP or p[i] == TAB):
        i += 1
    return i if i < end and p[i] == ord(":") else -1


def _name_end(p, pos, colon):  # type: ignore[no-untyped-def]
    """The index behind the field name at `pos`."""
    while colon > pos and (p[colon - 1] == SP or p[colon - 1] == TAB):
        colon -= 1
    return colon


def _number(p, pos, colon):  # type: ignore[no-untyped-def]
    """The number of the field whose name is at `pos`; -1: it has none."""
    end = _name_end(p, pos, colon)
    size = end - pos
    c = p[pos] | 32
    if c == ord("c") and size > 9:
        return _content_number(p, pos, end)
    if size == 2:
        return 5 if same(p, pos, end, b"to") else 6 if same(p, pos, end, b"cc") else -1
    if size == 4:
        return 0 if same(p, pos, end, b"date") else 2 if same(p, pos, end, b"from") else -1
    if c == ord("s"):
        return 1 if same(p, pos, end, b"subject") else 3 if same(p, pos, end, b"sender") else -1
    if size == 8:
        return 4 if same(p, pos, end, b"reply-to") else -1
    if size == 3:
        return 7 if same(p, pos, end, b"bcc") else -1
    if size == 11:
        return 8 if same(p, pos, end, b"in-reply-to") else -1
    return 9 if size == 10 and same(p, pos, end, b"message-id") else -1


def _content_number(p, pos, end):  # type: ignore[no-untyped-def]
    """`_number` for a name that begins with "c"."""
    if not same(p, pos, pos + 8, b"content-"):
        return -1
    pos += 8
    size = end - pos
    if size == 4:
        return CONTENT_TYPE if same(p, pos, end, b"type") else -1
    if size == 17:
        return CONTENT_ENCODING if same(p, pos, end, b"transfer-encoding") else -1
    if size == 11:
        return 12 if same(p, pos, end, b"disposition") else 11 if same(p, pos, end, b"description") else -1
    if size == 8:
        return 13 if same(p, pos, end, b"language") else 14 if same(p, pos, end, b"location") else -1
    if size == 2:
        return 10 if same(p, pos, end, b"id") else -1
    return 15 if same(p, pos, end, b"md5") else -1


def _encoding(p, pos, end):  # type: ignore[no-untyped-def]
    """The encoding that a Content-Transfer-Encoding names (RFC 2045 6.1)."""
    pos = _skip(p, pos, end)
    end = _token(p, pos, end)
    if end == pos or same(p, pos, end, b"7bit") or same(p, pos, end, b"8bit") or same(p, pos, end, b"binary"):
        return IDENTITY
    if same(p, pos, end, b"quoted-printable"):
        return QUOTED_PRINTABLE
    return BASE64 if same(p, pos, end, b"base64") else OTHER


def _skip(p, pos, end):  # type: ignore[no-untyped-def]
    """The index behind white space and comments (RFC 5322 3.2.2), which nest; a comment that does not end is all the rest."""
    depth = 0
    while pos < end:
        c = p[pos]
        if c == ord("("):
            depth += 1
        elif depth and c == ord(")"):
            depth -= 1
        elif depth and c == ord("\\"):
            pos += 1
        elif not depth and c != SP and c != TAB and c != CR and c != LF:
            return pos
        pos += 1
    return end


def _token(p, pos, end):  # type: ignore[no-untyped-def]
    """The index behind the token at `pos` (RFC 2045 5.1)."""
    while pos < end and p[pos] > SP and p[pos] not in b'(;/=",\x7f':
        pos += 1
    return pos


def _parameters(p, pos, end):  # type: ignore[no-untyped-def]
    """The parameters from `pos` on, as of `value`; None: there are none. What is no parameter is passed over up to a ";"."""
    found = []  # type: ignore[var-annotated]
    while len(found) < PARAMETERS_MOST:
        pos = find(p, ord(";"), _skip(p, pos, end), end) + 1
        if pos == 0:
            break
        name = _skip(p, pos, end)
        name_end = _token(p, name, end)
        pos = _skip(p, name_end, end)
        if name_end == name or pos == end or p[pos] != ord("="):
            continue
        pos = _skip(p, pos + 1, end)
        start = pos
        if pos < end and p[pos] == ord('"'):
            start = pos + 1
            stop = start
            while stop < end and p[stop] != ord('"'):
                stop += 2 if p[stop] == ord("\\") else 1
            stop = min(stop, end)
            pos = min(stop + 1, end)
        else:
            while pos < end and p[pos] > SP and p[pos] != ord(";"):
                pos += 1
            stop = pos
        found.append((name, name_end, start, stop))
    return found or None


def _boundary(p, parameters):  # type: ignore[no-untyped-def]
    """The boundary among parameters, or None: there is none, or an empty one."""
    for name, name_end, start, stop in parameters or ():
        if same(p, name, name_end, b"boundary"):
            text = p[start:stop]
            return text.translate(None, b"\\\r\n").rstrip(b" \t") or None
    return None
