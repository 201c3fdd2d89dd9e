"""The UIDs of a mailbox, packed: 4 octets each, little-endian, in ascending order.

Ranges of them take 8 octets (first, last); they are in ascending order and disjoint. Time is linear in what goes in at most;
where one of two is much shorter, it is about its length.
"""

from relaymta._speedups._mem import copy
from relaymta._speedups._words import get32, put32, seek


def lower(uids, uid):  # type: ignore[no-untyped-def]
    """How many of the UIDs are below `uid`."""
    return seek(uids, 0, len(uids) // 4, uid)


def cut(uids, ranges):  # type: ignore[no-untyped-def]
    """The UIDs that are in ranges."""
    u = uids
    r = ranges
    total = len(uids) // 4
    out = bytearray()
    at = 0
    for i in range(len(ranges) // 8):
        at = seek(u, at, total, get32(r, i * 8))
        end = at
        if get32(r, i * 8 + 4) == 0xFFFFFFFF:
            end = total
        else:
            end = seek(u, at, total, get32(r, i * 8 + 4) + 1)
        out += u[at * 4 : end * 4]
        at = end
    return bytes(out)


def minus(uids, gone):  # type: ignore[no-untyped-def]
    """The UIDs without those in `gone`."""
    u = uids
    g = gone
    total = len(uids) // 4
    out = bytearray(total * 4)
    w = out
    k = 0
    start = 0
    for i in range(len(gone) // 4):
        at = seek(u, start, total, get32(g, i * 4))
        k = copy(w, k, u, start * 4, at * 4)
        start = at + 1 if at < total and get32(u, at * 4) == get32(g, i * 4) else at
    k = copy(w, k, u, start * 4, total * 4)
    del out[k:]
    return bytes(out)


def numbers(uids, wanted):  # type: ignore[no-untyped-def]
    """Where UIDs of `wanted` are in `uids`, counted from 1, packed in 4 octets each; those that are not there are left out."""
    u = uids
    g = wanted
    total = len(uids) // 4
    out = bytearray(len(wanted))
    w = out
    k = 0
    at = 0
    for i in range(len(wanted) // 4):
        at = seek(u, at, total, get32(g, i * 4))
        if at == total:
            break
        if get32(u, at * 4) == get32(g, i * 4):
            put32(w, k, at + 1)
            k += 4
    del out[k:]
    return bytes(out)


def runs(uids):  # type: ignore[no-untyped-def]
    """Packed UIDs or numbers as ranges without gaps."""
    u = uids
    n = len(uids) // 4
    out = bytearray(n * 8)
    w = out
    k = 0
    for i in range(n):
        uid = get32(u, i * 4)
        if i and get32(u, i * 4 - 4) + 1 == uid:
            put32(w, k - 4, uid)
        else:
            put32(w, k, uid)
            put32(w, k + 4, uid)
            k += 8
    del out[k:]
    return bytes(out)
