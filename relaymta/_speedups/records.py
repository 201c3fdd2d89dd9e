"""The index of a mailbox: records and UIDs, packed.

A record is 24 octets, little-endian: UID (4), unused (4), flags (8), MODSEQ (8). A block is a run of records; they are in the
order of their UIDs, within a block and from one to the next. Packed UIDs and ranges: uids.py. A bitmap has a bit for each record,
the lowest of an octet first.

Time is linear in what goes in. Records are trusted; what is behind the last whole one is ignored.
"""

from relaymta._speedups._mem import copy
from relaymta._speedups._words import digits, get32, get64, lowest, put32, put64, seek

SIZE = 24
FLAGS = 8  # where they are in a record
MODSEQ = 16
LINE = 96  # octets of a FETCH line without its flags, at most


def load(blocks):  # type: ignore[no-untyped-def]
    """The UIDs of the records of blocks, packed."""
    total = 0
    for block in blocks:
        total += len(block)
    out = bytearray(total // SIZE * 4)
    w = out
    k = 0
    for block in blocks:
        p = block
        for i in range(len(block) // SIZE):
            put32(w, k, get32(p, i * SIZE))
            k += 4
    return bytes(out)


def count(blocks, every, none):  # type: ignore[no-untyped-def]
    """How many records have all flags of `every` and none of `none`."""
    found = 0
    for block in blocks:
        p = block
        for i in range(len(block) // SIZE):
            flags = get64(p, i * SIZE + FLAGS)
            found += (flags & every) == every and (flags & none) == 0
    return found


def first(blocks, every, none):  # type: ignore[no-untyped-def]
    """The UID of the first record that has all flags of `every` and none of `none`; 0: there is no such record."""
    for block in blocks:
        p = block
        for i in range(len(block) // SIZE):
            flags = get64(p, i * SIZE + FLAGS)
            if (flags & every) == every and (flags & none) == 0:
                return get32(p, i * SIZE)
    return 0


def highest(records):  # type: ignore[no-untyped-def]
    """The highest MODSEQ of records; 0 without any."""
    p = records
    found = 0
    for i in range(len(records) // SIZE):
        found = max(found, get64(p, i * SIZE + MODSEQ))
    return found


def changed(blocks, modseq):  # type: ignore[no-untyped-def]
    """The records with a MODSEQ above `modseq`."""
    out = bytearray()
    for block in blocks:
        p = block
        start = -1  # of the run of such records that has begun
        n = len(block) // SIZE
        for i in range(n):
            if get64(p, i * SIZE + MODSEQ) > modseq:
                if start < 0:
                    start = i
            elif start >= 0:
                out += p[start * SIZE : i * SIZE]
                start = -1
        if start >= 0:
            out += p[start * SIZE : n * SIZE]
    return bytes(out)


def select(records, every, some, none, modseq):  # type: ignore[no-untyped-def]
    """A bitmap of the records with all flags of `every`, one of `some` (or that is 0), none of `none`, and at least `modseq`."""
    p = records
    n = len(records) // SIZE
    out = bytearray((n + 7) // 8)
    w = out
    for i in range(n):
        flags = get64(p, i * SIZE + FLAGS)
        if (
            (flags & every) == every
            and (flags & none) == 0
            and (some == 0 or (flags & some) != 0)
            and get64(p, i * SIZE + MODSEQ) >= modseq
        ):
            w[i >> 3] |= 1 << (i & 7)
    return bytes(out)


def within(records, ranges):  # type: ignore[no-untyped-def]
    """A bitmap of the records with UIDs in ranges."""
    p = records
    r = ranges
    n = len(records) // SIZE
    end = len(ranges) // 8
    out = bytearray((n + 7) // 8)
    w = out
    k = 0
    for i in range(n):
        uid = get32(p, i * SIZE)
        while k < end and get32(r, k * 8 + 4) < uid:
            k += 1
        if k == end:
            break
        if uid >= get32(r, k * 8):
            w[i >> 3] |= 1 << (i & 7)
    return bytes(out)


def pick(records, bits):  # type: ignore[no-untyped-def]
    """The records whose bits are set in a bitmap that is as long."""
    p = records
    b = bits
    out = bytearray(len(records))
    w = out
    k = 0
    for i in range(len(records) // SIZE):
        if b[i >> 3] >> (i & 7) & 1:
            k = copy(w, k, p, i * SIZE, i * SIZE + SIZE)
    del out[k:]
    return bytes(out)


def chosen(records, ranges):  # type: ignore[no-untyped-def]
    """The records with UIDs in ranges: `records` itself where all are."""
    p = records
    r = ranges
    n = len(records) // SIZE
    end = len(ranges) // 8
    out = bytearray()
    k = 0
    start = -1  # of the run of such records that has begun
    i = 0
    while i < n:
        uid = get32(p, i * SIZE)
        while k < end and get32(r, k * 8 + 4) < uid:
            k += 1
        if k == end:
            break
        if uid >= get32(r, k * 8):
            if start < 0:
                start = i
        elif start >= 0:
            out += p[start * SIZE : i * SIZE]
            start = -1
        i += 1
    if start == 0 and i * SIZE == len(records):
        return records
    if start >= 0:
        out += p[start * SIZE : i * SIZE]
    return bytes(out)


def apply(records, keep, add, modseq):  # type: ignore[no-untyped-def]
    """The records with the flags that they have of `keep`, and those of `add`; where others than before, with this MODSEQ."""
    p = records
    out = bytearray(p[: len(records) // SIZE * SIZE])
    w = out
    for i in range(len(records) // SIZE):
        old = get64(p, i * SIZE + FLAGS)
        flags = (old & keep) | add
        if flags != old:
            put64(w, i * SIZE + FLAGS, flags)
            put64(w, i * SIZE + MODSEQ, modseq)
    return bytes(out)


def merged(records, changes):  # type: ignore[no-untyped-def]
    """The records of both; of two with the same UID, that of `changes`."""
    p = records
    q = changes
    n = len(records) // SIZE
    end = len(changes) // SIZE
    out = bytearray((n + end) * SIZE)
    w = out
    k = 0
    j = 0
    for i in range(n):
        uid = get32(p, i * SIZE)
        while j < end and get32(q, j * SIZE) < uid:
            k = copy(w, k, q, j * SIZE, j * SIZE + SIZE)
            j += 1
        if j == end or get32(q, j * SIZE) != uid:
            k = copy(w, k, p, i * SIZE, i * SIZE + SIZE)
    k = copy(w, k, q, j * SIZE, end * SIZE)
    del out[k:]
    return bytes(out)


def untold(records, told):  # type: ignore[no-untyped-def]
    """The records but those that `told` has with the same UID and MODSEQ."""
    p = records
    q = told
    end = len(told) // SIZE
    out = bytearray(len(records))
    w = out
    k = 0
    j = 0
    for i in range(len(records) // SIZE):
        uid = get32(p, i * SIZE)
        while j < end and get32(q, j * SIZE) < uid:
            j += 1
        if j == end or get32(q, j * SIZE) != uid or get64(q, j * SIZE + MODSEQ) != get64(p, i * SIZE + MODSEQ):
            k = copy(w, k, p, i * SIZE, i * SIZE + SIZE)
    del out[k:]
    return bytes(out)


def lines(records, uids, names, recent, until, items):  # type: ignore[no-untyped-def]
    """FETCH responses for those records whose UIDs are in `uids`, which are the messages by their numbers. `names`: of the flags,
    by their bits (those of other bits are left out); messages from the UID `recent` to before `until` are \\Recent. `items`: 1
    with FLAGS, 2 with MODSEQ; UID is always there."""
    p = records
    u = uids
    total = len(uids) // 4
    out = bytearray(_room(records, names))
    w = out
    k = 0
    at = 0
    old = 0
    fresh = False
    start = -1  # of the last list of flags, in `out`
    stop = 0
    for i in range(len(records) // SIZE):
        uid = get32(p, i * SIZE)
        at = seek(u, at, total, uid)
        if at == total:
            break
        if get32(u, at * 4) != uid:
            continue
        k = copy(w, k, b"* ", 0, 2)
        k = digits(w, k, at + 1)
        k = copy(w, k, b" FETCH (UID ", 0, 12)
        k = digits(w, k, uid)
        if items & 1:
            flags = get64(p, i * SIZE + FLAGS)
            new = recent <= uid < until
            if start >= 0 and flags == old and fresh == new:
                k = copy(w, k, w, start, stop)
                start = k - stop + start
            else:
                old = flags
                fresh = new
                start = k
                k = _flags(w, k, flags, names, fresh)
            stop = k
        if items & 2:
            k = copy(w, k, b" MODSEQ (", 0, 9)
            k = digits(w, k, get64(p, i * SIZE + MODSEQ))
            k = copy(w, k, b")", 0, 1)
        k = copy(w, k, b")\r\n", 0, 3)
    del out[k:]
    return bytes(out)


def _room(records, names):  # type: ignore[no-untyped-def]
    """The octets that the lines of these records take at most."""
    p = records
    n = len(records) // SIZE
    size = n * LINE
    old = 0
    length = 0
    for i in range(n):
        flags = get64(p, i * SIZE + FLAGS)
        if flags != old:
            old = flags
            length = 0
            while flags:
                bit = lowest(flags)
                flags &= flags - 1
                if bit < len(names):
                    length += len(names[bit]) + 1
        size += length
    return size


def _flags(w, k, flags, names, fresh):  # type: ignore[no-untyped-def]
    """Write a list of flags to w[k:]; the new k."""
    k = copy(w, k, b" FLAGS (", 0, 8)
    begin = k
    if fresh:
        k = copy(w, k, b"\\Recent", 0, 7)
    while flags:
        bit = lowest(flags)
        flags &= flags - 1
        if bit < len(names):
            name = names[bit]
            if k > begin:
                k = copy(w, k, b" ", 0, 1)
            k = copy(w, k, name, 0, len(name))
    return copy(w, k, b")", 0, 1)
