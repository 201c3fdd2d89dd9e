"""SEARCH in the text of messages, told from rows and message data as they are stored, without an object for each part. What is
not plain has to be asked: proto/imap_text.py decides then, and where this decides, it decides the same.

Linear in the length of what is searched: where too much of the needle is compared in vain, it is asked for, too.
"""

from relaymta._speedups._mem import find, high, same
from relaymta._speedups._words import get32
from relaymta._speedups.packed import Row
from relaymta._speedups.text import from_base64, from_quoted, unfolded

TAB, LF, SP = 9, 10, 32
NO, YES, ASK, ASK_HEADERS = 0, 1, 2, 3  # the last: of its headers alone it is not known
NO_TEXT, UTF8, ASCII, OTHER = 0, 1, 2, 3  # parts: of no type text; in UTF-8; where octets below 128 are ASCII; in another charset
BLOCK = 128  # octets
PLACE = 14  # octets, as of structure.py
PIECE = 262144  # octets of a part, as WHOLE of proto/mime_text.py
HEADERS_MOST, PARTS_MOST, FIELD_MOST = 65536, 1000, 500  # octets, parts, and octets of a Content-Type
NONE = bytes(8192)
LOWER = bytes(range(256)).lower()


class Needle:
    """What is looked for: `octets`, in lower case, perhaps none. `whole`: they are all of it; else it has more, and is not ASCII.
    Octets that are not ASCII are UTF-8, of characters that none behind them joins but combining ones. `rare`: indices of three of
    the octets, rare ones. `kind_of(field)`: what a Content-Type makes of a part; `hidden()`: a bitmap of the characters of 16
    bits in which the octets may be found though they are not there."""

    def __init__(self, octets, whole, rare, kind_of, hidden):  # type: ignore[no-untyped-def]
        self.octets = octets
        self.whole = whole
        self.size = len(octets)
        self.eight = not octets.isascii()
        self.first, self.second, self.third = rare
        self.kind_of = kind_of
        self.hidden = hidden
        self.flags = None
        self.scratch = bytearray()
        self.w = self.scratch
        self.row = Row()
        self.own = Row()

    def need(self, size):  # type: ignore[no-untyped-def]
        """Have room for so many octets in `w`."""
        if len(self.scratch) < size:
            self.scratch = bytearray(size + size)
            self.w = self.scratch

    def seek(self, p, start, end):  # type: ignore[no-untyped-def]
        """The index of the first needle in p[start:end], in any case; -1: there is none; -2: it takes too long to tell."""
        q = self.octets
        lower = LOWER
        size = self.size
        first = self.first
        second = self.second
        third = self.third
        one = q[first] | 32
        two = q[second] | 32
        three = q[third] | 32
        end -= size - 1
        work = 16 * (end - start) + 4096
        while start < end:
            stop = min(start + BLOCK, end)
            hit = 0
            for i in range(start, stop):
                hit |= ((p[i + first] | 32) == one) & ((p[i + second] | 32) == two) & ((p[i + third] | 32) == three)
            if hit:
                for i in range(start, stop):
                    if (p[i + first] | 32) == one and (p[i + second] | 32) == two and (p[i + third] | 32) == three:
                        k = 0
                        while k < size and lower[p[i + k]] == q[k]:
                            k += 1
                        if k == size:
                            return i
                        work -= k
                if work < 0:
                    return -2
            start = stop
        return -1

    def texts(self, messages, care, headers, version):  # type: ignore[no-untyped-def]
        """Bitmaps of messages, of those of the bitmap `care`: those with the needle in the text of a part (`headers`: or in a
        header), those that have to be asked, and those that have to be asked of their headers alone. A message: (MessageRow,
        ObjectRow with a description of this version, data), or what has to be asked."""
        c = care
        size = (len(messages) + 7) // 8
        out = bytearray(3 * size)
        w = out
        for at, one in enumerate(messages):
            if not c[at >> 3] >> (at & 7) & 1:
                continue
            told = ASK
            if isinstance(one, tuple):
                self.row.data(one[1])
                if self.row.version == version:
                    told = self.message(one[0], one[2], headers)
            if told:
                w[(told - 1) * size + (at >> 3)] |= 1 << (at & 7)
        return bytes(out[:size]), bytes(out[size : 2 * size]), bytes(out[2 * size :])

    def message(self, own, data, headers):  # type: ignore[no-untyped-def]
        """Whether the message in `data`, whose row is read, has the needle."""
        p = self.row.p
        pos = self.row.parts
        end = self.row.parts_end
        if end - pos > PLACE * PARTS_MOST:
            return ASK
        octets = 0
        for at in range(pos, end, PLACE):
            if at + PLACE > end:
                return ASK
            start = get32(p, at + 2)
            body = get32(p, at + 6)
            size = get32(p, at + 10)
            if start + body + size > len(data):
                return ASK
            octets += body
        if octets > HEADERS_MOST:
            return ASK
        told = self.headers(own, data, p, pos, end) if headers else NO
        if told == YES:
            return YES
        asked = ASK_HEADERS if told else NO
        for at in range(pos, end, PLACE):
            if p[at] & 15 == 0:
                start = get32(p, at + 2)
                body = start + get32(p, at + 6)
                told = self.part(data, start, body, body + get32(p, at + 10), p[at] >> 4)
                if told == YES:
                    return YES
                if told:
                    asked = ASK
        return asked

    def headers(self, own, data, p, pos, end):  # type: ignore[no-untyped-def]
        """Whether the header of a part has the needle, or what is in front of the message in this copy of it."""
        self.own.message(own)
        if self.own.bad:
            return ASK
        start = self.own.start
        stop = self.own.stop
        told = self.header(self.own.p, start, stop)
        if stop > start and self.own.p[stop - 1] != LF:
            told = ASK
        for at in range(pos, end, PLACE):
            if told & YES:
                return YES
            start = get32(p, at + 2)
            told |= self.header(data, start, start + get32(p, at + 6))
        return YES if told & YES else told

    def header(self, p, start, end):  # type: ignore[no-untyped-def]
        """Whether the header p[start:end] has the needle."""
        if high(p, start, end) or encoded(p, start, end):
            return ASK
        if not self.whole:
            return NO
        self.need(end - start)
        at = self.seek(self.w, 0, unfolded(self.w, p, start, end))
        return YES if at >= 0 else NO if at == -1 else ASK

    def part(self, p, start, body, end, encoding):  # type: ignore[no-untyped-def]
        """Whether the part whose header and body are p[start:body] and p[body:end] has the needle in its text."""
        kind = self.kind(p, start, body)
        if kind == NO_TEXT or body == end:
            return NO
        if kind == OTHER or end - body > PIECE:
            return ASK
        if encoding == 1:
            self.need(end - body)
            return self.text(self.w, 0, from_quoted(self.w, p, body, end), kind)
        if encoding == 2:
            self.need((end - body) // 4 * 3 + 4)
            return self.text(self.w, 0, from_base64(self.w, p, body, end), kind)
        return self.text(p, body, end, kind)

    def kind(self, p, pos, end):  # type: ignore[no-untyped-def]
        """What the Content-Type in the header p[pos:end] makes of a part; where there are several, the first."""
        while pos < end:
            stop = _line_end(p, pos, end)
            if (p[pos] | 32) == ord("c") and stop - pos > 12 and same(p, pos, pos + 12, b"content-type"):
                i = pos + 12
                while i < stop and (p[i] == SP or p[i] == TAB):
                    i += 1
                if i < stop and p[i] == ord(":"):
                    while stop < end and (p[stop] == SP or p[stop] == TAB):
                        stop = _line_end(p, stop, end)
                    if stop - pos > FIELD_MOST:
                        return OTHER
                    return self.kind_of(p[pos:stop])
            pos = stop
        return UTF8

    def text(self, p, start, end, kind):  # type: ignore[no-untyped-def]
        """Whether p[start:end], in UTF-8 or where octets below 128 are ASCII, has the needle."""
        at = self.seek(p, start, end) if self.size else -1
        if at == -2:
            return ASK
        if not high(p, start, end):
            return YES if at >= 0 and self.whole else NO
        if self.eight and kind != UTF8:
            return ASK
        if at >= 0:  # its last letter and a combining character behind it may be another one
            sure = self.whole and (at + self.size == end or p[at + self.size] < 128)
            return YES if sure and (not self.eight or _bare(p, start, end, NONE)) else ASK
        if self.size == 0 or kind != UTF8:
            return ASK
        if self.flags is None:
            self.flags = self.hidden()
        return NO if _bare(p, start, end, self.flags) else ASK


def _bare(p, i, end, flags):  # type: ignore[no-untyped-def]
    """Whether p[i:end] is UTF-8 without characters of a bitmap; of those beyond 16 bits, with pictures alone."""
    while i < end:
        stop = min(i + 64, end)
        if not high(p, i, stop):
            i = stop
            continue
        while i < stop:
            c = p[i]
            if c < 128:
                i += 1
                continue
            size = 2 if 0xC2 <= c < 0xE0 else 3 if 0xE0 <= c < 0xF0 else 4
            if c < 0xC2 or c > 0xF0 or i + size > end:
                return False
            d = p[i + 1]
            e = p[i + 2] if size > 2 else 0x80
            if d & 0xC0 != 0x80 or e & 0xC0 != 0x80:
                return False
            if size == 4:  # U+1F300 to U+1FAFF
                if d != 0x9F or e < 0x8C or e > 0xAB or p[i + 3] & 0xC0 != 0x80:
                    return False
            else:
                c = (c & 0x1F) << 6 | (d & 0x3F) if size == 2 else (c & 0x0F) << 12 | (d & 0x3F) << 6 | (e & 0x3F)
                if (size == 3 and (c < 0x800 or 0xD800 <= c < 0xE000)) or flags[c >> 3] >> (c & 7) & 1:
                    return False
            i += size
    return True


def _line_end(p, pos, end):  # type: ignore[no-untyped-def]
    """The index behind the line at `pos`."""
    i = find(p, LF, pos, end)
    return end if i < 0 else i + 1


def encoded(p, pos, end):  # type: ignore[no-untyped-def]
    """Whether "=?" is in p[pos:end]."""
    while True:
        pos = find(p, ord("="), pos, end) + 1
        if pos == 0:
            return False
        if pos < end and p[pos] == ord("?"):
            return True
