"""SEARCH in ENVELOPEs, told from rows as they are stored, without an object for each string. What is not plain has to be asked:
proto/imap_text.py decides then, and where this decides, it decides the same. Linear in the length of what is searched.
"""

from relaymta._speedups._mem import copy, find, high
from relaymta._speedups.search import encoded

TAB, SP = 9, 32
NO, YES, ASK = 0, 1, 2
PLACES = 10  # fields of an ENVELOPE


def envelopes(needle, messages, care, place, version):  # type: ignore[no-untyped-def]
    """Bitmaps of messages, of those of the bitmap `care`: those with the needle in a field of their ENVELOPE (by its place in
    it), and those that have to be asked. A message: (anything, ObjectRow with a description of this version), or what has to be
    asked."""
    yes = bytearray((len(messages) + 7) // 8)
    ask = bytearray(len(yes))
    c = care
    y = yes
    a = ask
    for at, one in enumerate(messages):
        if not c[at >> 3] >> (at & 7) & 1:
            continue
        told = ASK
        if isinstance(one, tuple):
            needle.row.data(one[1])
            if needle.row.version == version:
                told = _field(needle, needle.row.p, needle.row.envelope, needle.row.envelope_end, place)
        if told == YES:
            y[at >> 3] |= 1 << (at & 7)
        elif told:
            a[at >> 3] |= 1 << (at & 7)
    return bytes(yes), bytes(ask)


def elements(envelope):  # type: ignore[no-untyped-def]
    """Where the fields of an ENVELOPE begin, in their order; where it is none, those in front of what is wrong."""
    p = envelope
    end = len(envelope)
    found = []  # type: ignore[var-annotated]
    pos = 1
    while 0 < pos < end and len(found) < PLACES:
        found.append(pos)
        pos = _next(p, pos, end)
    return found


def _field(needle, p, pos, end, place):  # type: ignore[no-untyped-def]
    """Whether a field of the ENVELOPE p[pos:end] has the needle."""
    if pos >= end or p[pos] != ord("("):
        return ASK
    pos += 1
    while place > 0:
        pos = _next(p, pos, end)
        place -= 1
        if pos == 0:
            return ASK
    stop = _item(p, pos, end)
    if stop < 0:
        return ASK
    c = p[pos]
    if c == ord("N"):
        return NO
    if high(p, pos, stop) or find(p, ord("\\"), pos, stop) >= 0 or find(p, ord("{"), pos, stop) >= 0 or encoded(p, pos, stop):
        return ASK
    if not needle.whole:
        return NO
    if c == ord('"'):
        needle.need(stop - pos)
        end = _stripped(needle.w, 0, p, pos + 1, stop - 1)
    else:
        end = _addresses(needle, p, pos, stop)
        if end < 0:
            return ASK
    return YES if needle.seek(needle.w, 0, end) >= 0 else NO


def _addresses(needle, p, pos, end):  # type: ignore[no-untyped-def]
    """Write the addresses p[pos:end] as they are searched, `name <mailbox@host>, ...`: how many octets; -1: they are none."""
    needle.need(end - pos)
    w = needle.w
    k = 0
    several = False
    pos += 1
    while pos < end and p[pos] == ord("("):
        name = pos + 1
        route = _next(p, name, end)
        mailbox = _next(p, route, end) if route else 0
        host = _next(p, mailbox, end) if mailbox else 0
        stop = _item(p, host, end) if host else -1
        if stop < 0 or stop >= end or p[stop] != ord(")") or p[name] == ord("("):
            return -1
        if p[host] != ord("N") or p[mailbox] != ord("N"):
            if several:
                k = copy(w, k, b", ", 0, 2)
            k = _address(w, k, p, name, route, mailbox, host, stop)
            several = True
        pos = stop + 1
    return k if pos + 1 == end else -1


def _item(p, pos, end):  # type: ignore[no-untyped-def]
    """The index behind the string, NIL or list at `pos`; -1: there is none."""
    depth = 0
    while pos < end:
        c = p[pos]
        if c == ord('"'):
            pos += 1
            while pos < end and p[pos] != ord('"'):
                pos += 2 if p[pos] == ord("\\") else 1
        elif c == ord("{"):
            size = 0
            pos += 1
            while pos < end and ord("0") <= p[pos] <= ord("9") and size < end:
                size = 10 * size + (p[pos] - ord("0"))
                pos += 1
            pos += 2 + size  # the last octet of it
        elif c == ord("N"):
            pos += 2
        elif c == ord("("):
            depth += 1
        elif c == ord(")"):
            depth -= 1
        elif c != SP or not depth:
            return -1
        pos += 1
        if depth <= 0:
            return pos if depth == 0 and pos <= end else -1
    return -1


def _next(p, pos, end):  # type: ignore[no-untyped-def]
    """The index of what follows the item at `pos`, behind a space; 0: there is nothing."""
    pos = _item(p, pos, end)
    return pos + 1 if 0 <= pos < end - 1 and p[pos] == SP else 0


def _stripped(w, k, p, pos, end):  # type: ignore[no-untyped-def]
    """Write p[pos:end] without white space around it to w[k:]; the new k."""
    while pos < end and (p[pos] == SP or p[pos] == TAB):
        pos += 1
    while end > pos and (p[end - 1] == SP or p[end - 1] == TAB):
        end -= 1
    return copy(w, k, p, pos, end)


def _address(w, k, p, name, route, mailbox, host, stop):  # type: ignore[no-untyped-def]
    """Write the address whose strings are there to w[k:], or (no host) the name of a group; the new k."""
    if p[host] == ord("N"):
        return _stripped(w, k, p, mailbox + 1, host - 2)
    named = p[name] == ord('"') and route - name > 3
    if named:
        k = _stripped(w, k, p, name + 1, route - 2)
        k = copy(w, k, b" <", 0, 2)
    begin = k
    if p[mailbox] == ord('"'):
        k = copy(w, k, p, mailbox + 1, host - 2)
    if stop - host > 2:
        k = copy(w, k, b"@", 0, 1)
        k = copy(w, k, p, host + 1, stop - 1)
    k = _trimmed(w, begin, k)
    return copy(w, k, b">", 0, 1) if named else k


def _trimmed(w, begin, end):  # type: ignore[no-untyped-def]
    """Take white space from both ends of w[begin:end]: the new end."""
    start = begin
    while start < end and (w[start] == SP or w[start] == TAB):
        start += 1
    while end > start and (w[end - 1] == SP or w[end - 1] == TAB):
        end -= 1
    for i in range(start, end):
        w[begin + i - start] = w[i]
    return begin + end - start
