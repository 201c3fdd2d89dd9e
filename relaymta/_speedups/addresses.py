"""Addresses in header fields (RFC 5322 3.4), written as the structures of an ENVELOPE (RFC 9051 7.5.2).

Lenient, as a mail reader has to be: what is no address list gives the addresses that can be seen in it. (proto/mailbox.py is the
strict parser, for decisions.) Linear in the length of the fields; of one field ADDRESSES_MOST are written, the first ones.
"""

from relaymta._speedups._mem import copy, find

TAB, SP = 9, 32
ADDRESSES_MOST = 10000
QUOTED_MOST = 1000  # octets of an address that is read in a simple way: none of its strings is a literal

# Classes of octets.
ATOM, DOMAIN, QUOTED, BREAK, LITERAL = 1, 2, 4, 8, 16
_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_"
CLASSES = bytes(
    ATOM * (octet in _LETTERS + b"!#$%&'*+/=?^`{|}~") + DOMAIN * (octet in _LETTERS)
    + QUOTED * (31 < octet < 127 and octet not in b'"\\') + BREAK * (octet in b' \t"(<>,;:@')
    + LITERAL * (octet not in b' \t"[]<>,;@')
    for octet in range(256)
)  # fmt: skip


class Text:
    """Octets that are gathered: w[:k]. `at`: the index of the last "@" that was a token, -1 where there is none; w[start:end] is
    what was asked for last."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self.octets = bytearray(64)
        self.w = self.octets
        self.size = 64
        self.k = 0
        self.at = -1
        self.start = self.end = 0

    def begin(self, room):  # type: ignore[no-untyped-def]
        """Empty, with room for so many octets."""
        self.k = 0
        self.at = -1
        if room > self.size:
            self.octets = bytearray(room)
            self.w = self.octets
            self.size = room

    def strip(self, start, end):  # type: ignore[no-untyped-def]
        """Ask for w[start:end] without white space around it."""
        w = self.w
        while start < end and (w[start] == SP or w[start] == TAB):
            start += 1
        while end > start and (w[end - 1] == SP or w[end - 1] == TAB):
            end -= 1
        self.start = start
        self.end = end

    def join(self, start, end):  # type: ignore[no-untyped-def]
        """Ask for the local part or the domain at w[start:end]: without white space around dots."""
        self.strip(start, end)
        w = self.w
        k = begin = start = self.start
        last = self.end
        if find(w, SP, start, last) < 0:
            return
        while start <= last:
            dot = find(w, ord("."), start, last)
            end = last if dot < 0 else dot
            self.strip(start, end)
            for i in range(self.start, self.end):
                w[k] = w[i]
                k += 1
            if dot >= 0:
                w[k] = ord(".")
                k += 1
            start = end + 1
        self.start = begin
        self.end = k


class Addresses:
    """Writes the addresses of fields."""

    def __init__(self, out):  # type: ignore[no-untyped-def]
        self.out = out
        self.count = 0  # of addresses that were written
        self.name = self.within = self.route = self.comment = None  # (most fields are read without them)
        self.words = False  # there are words outside of <>
        self.angle = False  # < came, and > did not yet
        self.angled = False  # < came,
        self.begun = False  # and something behind it,
        self.routed = False  # the first of which was "@"
        self.route_end = self.behind_route = 0

    def prepare(self):  # type: ignore[no-untyped-def]
        """Have what `element` gathers words in."""
        self.name = Text()  # the words outside of <>,
        self.within = Text()  # those in it,
        self.route = Text()  # the beginning of these, if it is a source route, without white space,
        self.comment = Text()  # and the last comment

    def write(self, p, pos, end):  # type: ignore[no-untyped-def]
        """Write the addresses of the unfolded value p[pos:end]."""
        group = False
        while pos < end and self.count < ADDRESSES_MOST:
            i = self.common(p, pos, end)
            if i < 0:
                i = self.element(p, pos, end)
                if i < end and p[i] == ord(":"):
                    self.group(group)
                else:
                    self.mailbox()
            if i == end:
                break
            if group and p[i] == ord(";"):
                self.group_end()
            group = p[i] == ord(":") or (group and p[i] == ord(","))
            pos = i + 1
        if group:
            self.group_end()

    def common(self, p, pos, end):  # type: ignore[no-untyped-def]
        """Write the address at `pos` if it has one of the common forms, where nothing has to be unquoted: the index of the "," or
        the end behind it; -1: it has none of them, nothing is written."""
        classes = CLASSES
        pos = _behind_space(p, pos, end)
        start = i = pos
        quoted = i < end and p[i] == ord('"')
        if quoted:
            start = i = i + 1
            while i < end and classes[p[i]] & QUOTED:
                i += 1
            if i == end or p[i] != ord('"'):
                return -1
        else:
            while i < end and (classes[p[i]] & ATOM or (p[i] == SP and p[i - 1] != SP)):
                i += 1
        stop = i
        while start < stop and p[start] == SP:
            start += 1
        local = start
        local_end = stop
        while stop > start and p[stop - 1] == SP:
            stop -= 1
        pos = _behind_space(p, i + 1, end) if quoted else i
        angle = pos < end and p[pos] == ord("<")
        if angle:
            pos += 1
            local = pos
            while pos < end and classes[p[pos]] & ATOM:
                pos += 1
            local_end = pos
        elif quoted or find(p, SP, start, local_end) >= 0:
            return -1
        if local == local_end or pos >= end or p[pos] != ord("@"):
            return -1
        domain = pos + 1
        i = domain
        while i < end and classes[p[i]] & DOMAIN:
            i += 1
        if i == domain or i - start > QUOTED_MOST or (angle and (i == end or p[i] != ord(">"))):
            return -1
        pos = _behind_space(p, i + angle, end)
        if pos < end and p[pos] != ord(","):
            return -1
        out = self.out
        out.need(i - start + 32)
        w = out.w
        if angle and stop > start:
            k = copy(w, copy(w, copy(w, out.k, b'("', 0, 2), p, start, stop), b'" NIL "', 0, 7)
        else:
            k = copy(w, out.k, b'(NIL NIL "', 0, 10)
        k = copy(w, copy(w, k, p, local, local_end), b'" "', 0, 3)
        out.k = copy(w, copy(w, k, p, domain, i), b'")', 0, 2)
        self.count += 1
        return pos

    def element(self, p, start, end):  # type: ignore[no-untyped-def]
        """Read what is at `start` up to a ",", ";" or ":" that ends it, or the end: the index of that."""
        if self.name is None:
            self.prepare()
        self.name.begin(end - start)
        self.comment.begin(0)
        self.words = self.angle = self.angled = False
        spaced = False  # behind white space or a comment
        i = start
        while i < end:
            c = p[i]
            if c == SP or c == TAB:
                spaced = True
                i += 1
            elif c == ord("("):
                spaced = True
                i = self.read_comment(p, i + 1, end)
            elif c == ord("<"):
                spaced = self.begun = self.routed = False
                self.angle = self.angled = True
                self.within.begin(end - start)
                self.route.begin(0)
                self.behind_route = self.route_end = 0
                i += 1
            elif c == ord(">"):
                spaced = self.angle = False
                i += 1
            elif (c == ord(",") or c == ord(";") or c == ord(":")) and (
                not self.angle or c == ord(";") or (c == ord(",") and not self.routed)
            ):
                break
            else:
                i = self.read_word(p, start, i, end, spaced)
                spaced = False
        return i

    def read_word(self, p, start, i, end, spaced):  # type: ignore[no-untyped-def]
        """Gather the word, or the special, at `i`: the index behind it. `start`: where the address begins."""
        classes = CLASSES
        into = self.within if self.angle else self.name
        w = into.w
        k = into.k
        if spaced:
            w[k] = SP
            k += 1
        begin = k
        c = p[i]
        if c == ord('"'):
            i += 1
            while i < end and p[i] != ord('"'):
                if p[i] == ord("\\"):
                    i += 1
                    if i == end:
                        break
                w[k] = p[i]
                k += 1
                i += 1
            i = min(i + 1, end)
        elif c == ord("@") or c == ord(":") or c == ord(","):
            w[k] = c
            k += 1
            i += 1
        else:
            stop = _behind_literal(p, i, end) if i > start and p[i - 1] == ord("@") else i
            k = copy(w, k, p, i, stop)
            i = stop
            while i < end and not classes[p[i]] & BREAK:
                if p[i] == ord("\\") and i + 1 < end:
                    w[k] = p[i]
                    k += 1
                    i += 1
                w[k] = p[i]
                k += 1
                i += 1
        into.k = k
        if c == ord("@"):
            into.at = begin
        if self.angle:
            self.read_route(c, begin, end - start)
        else:
            self.words = True
        return i

    def read_route(self, c, begin, room):  # type: ignore[no-untyped-def]
        """Gather what was read last in <>, if that begins with a source route. `c`: its first octet; `begin`: where it is."""
        within = self.within
        route = self.route
        if not self.begun:
            self.begun = True
            self.routed = c == ord("@")
            route.begin(room if self.routed else 0)
        if self.routed:
            if c == ord(":"):
                self.route_end = route.k
                self.behind_route = within.k
                within.at = -1
            route.k = copy(route.w, route.k, within.w, begin, within.k)

    def read_comment(self, p, i, end):  # type: ignore[no-untyped-def]
        """Read the comment whose ( is in front of `i`: the index behind it. One that does not end is all the rest."""
        comment = self.comment
        comment.begin(end - i)
        stop = _behind_comment(p, i, end)
        end = stop - 1 if p[stop - 1] == ord(")") else stop
        w = comment.w
        k = 0
        while i < end:
            if p[i] == ord("\\") and i + 1 < end:
                i += 1
            w[k] = p[i]
            k += 1
            i += 1
        comment.k = k
        return stop

    def mailbox(self):  # type: ignore[no-untyped-def]
        """Write the address that was read: (name, source route, local part, domain). What has no domain gets an empty one: NIL
        would make it a group. Nothing where there is nothing but comments."""
        if not self.words and not self.angled:
            return 0
        out = self.out
        name = self.name
        text = self.within if self.angled else name
        name.strip(0, name.k)
        if not self.angled or name.start == name.end:
            name = self.comment
            name.strip(0, name.k)
        out.put(b"(")
        if name.start < name.end:
            out.string(name.w, name.start, name.end)
        else:
            out.put(b"NIL")
        out.put(b" ")
        if self.angled and self.route_end:
            out.string(self.route.w, 0, self.route_end)
        else:
            out.put(b"NIL")
        out.put(b" ")
        at = text.at if text.at >= 0 else text.k
        text.join(self.behind_route if self.angled else 0, at)
        out.string(text.w, text.start, text.end)
        out.put(b" ")
        text.join(min(at + 1, text.k), text.k)
        out.string(text.w, text.start, text.end)
        out.put(b")")
        self.count += 1
        return 0

    def group(self, within):  # type: ignore[no-untyped-def]
        """Write the beginning of the group whose name was read; `within`: another one ends."""
        if within:
            self.group_end()
        out = self.out
        if self.count < ADDRESSES_MOST:
            self.name.strip(0, self.name.k)
            out.put(b"(NIL NIL ")
            out.string(self.name.w, self.name.start, self.name.end)
            out.put(b" NIL)")
            self.count += 1

    def group_end(self):  # type: ignore[no-untyped-def]
        """Write the end of a group."""
        if self.count < ADDRESSES_MOST:
            self.out.put(b"(NIL NIL NIL NIL)")
            self.count += 1


def _behind_space(p, i, end):  # type: ignore[no-untyped-def]
    """The index behind white space."""
    while i < end and (p[i] == SP or p[i] == TAB):
        i += 1
    return i


def _behind_literal(p, i, end):  # type: ignore[no-untyped-def]
    """The index behind the domain literal at `i`, which is `i` where there is none."""
    classes = CLASSES
    if p[i] != ord("["):
        return i
    stop = i + 1
    while stop < end and classes[p[stop]] & LITERAL:
        stop += 1
    return stop + 1 if stop < end and p[stop] == ord("]") else i


def _behind_comment(p, i, end):  # type: ignore[no-untyped-def]
    """The index behind the comment whose ( is in front of `i`; comments nest."""
    depth = 1
    while i < end:
        c = p[i]
        if c == ord("\\"):
            i += 1
        elif c == ord("("):
            depth += 1
        elif c == ord(")"):
            depth -= 1
            if not depth:
                return i + 1
        i += 1
    return end
