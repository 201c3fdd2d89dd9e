"""Rows of messages as the store packs them (msgpack; store/rows.py has their fields), of which a search needs a few numbers and
offsets. A MessageRow begins [object, date, saved, size, prefix], an ObjectRow [references, [segment, generation, offset, length],
description or nil], a description [version, envelope, structure, header_end, parts]; what is behind that is passed over.

Nothing is believed of a row: what has another form is none of these, and offsets are within it.
"""

NIL, BIN8, BIN32, UINT8, UINT64, INT8, INT64 = 192, 196, 198, 204, 207, 208, 211
ARRAY, ARRAY_END, POSITIVE_END, NEGATIVE = 144, 160, 128, 224


class Row:
    """A row that is read: p[pos:end] is what is left of it. `bad`: it has another form. `number`, or p[start:stop], is what was
    read last."""

    def __init__(self):  # type: ignore[no-untyped-def]
        self.row = self.p = b""
        self.pos = self.end = self.start = self.stop = 0
        self.number = self.object = self.segment = self.generation = self.offset = self.length = 0
        self.bad = self.several = False  # several: there are items behind those that are always there
        self.version = -1  # there is no description
        self.envelope = self.envelope_end = self.parts = self.parts_end = 0

    def open(self, row):  # type: ignore[no-untyped-def]
        """Begin with a row."""
        self.row = row
        self.p = row
        self.pos = 0
        self.end = len(row)
        self.bad = False

    def big(self, octets):  # type: ignore[no-untyped-def]
        """Read so many octets as a big-endian number."""
        self.number = 0
        if self.pos + octets > self.end:
            self.bad = True
            return 0
        for i in range(self.pos, self.pos + octets):
            self.number = self.number << 8 | self.p[i]
        self.pos += octets
        return 0

    def integer(self):  # type: ignore[no-untyped-def]
        """Read an integer: `number`, or 0 where it is negative."""
        self.number = 0
        if self.pos >= self.end:
            self.bad = True
            return 0
        c = self.p[self.pos]
        self.pos += 1
        if c < POSITIVE_END:
            self.number = c
        elif UINT8 <= c <= UINT64:
            self.big(1 << (c - UINT8))
        elif INT8 <= c <= INT64:
            self.big(1 << (c - INT8))
            self.number = 0
        elif c < NEGATIVE:
            self.bad = True
        return 0

    def octets(self):  # type: ignore[no-untyped-def]
        """Read octets: p[start:stop]."""
        self.start = self.stop = self.pos
        if self.pos >= self.end:
            self.bad = True
            return 0
        c = self.p[self.pos]
        self.pos += 1
        if c < BIN8 or c > BIN32:
            self.bad = True
            return 0
        self.big(1 << (c - BIN8))
        size = self.number
        if self.bad or size > self.end - self.pos:
            self.bad = True
            return 0
        self.start = self.pos
        self.pos += size
        self.stop = self.pos
        return 0

    def array(self, least):  # type: ignore[no-untyped-def]
        """Read the beginning of an array, which has to have so many items; fewer than 16 in all."""
        c = self.p[self.pos] if self.pos < self.end else 0
        self.pos += 1
        if c < ARRAY + least or c >= ARRAY_END:
            self.bad = True

    def message(self, row):  # type: ignore[no-untyped-def]
        """Read a MessageRow: `object`; p[start:stop] is the prefix."""
        self.open(row)
        self.array(4)
        self.several = not self.bad and self.p[0] > ARRAY + 4
        self.integer()
        self.object = self.number
        for _ in range(3):
            self.integer()
        self.start = self.stop = 0
        if self.several:
            self.octets()

    def body(self, row):  # type: ignore[no-untyped-def]
        """Read an ObjectRow up to its body: `segment` and what follows."""
        self.open(row)
        self.array(2)
        self.several = not self.bad and self.p[0] > ARRAY + 2
        self.integer()
        self.array(4)
        self.integer()
        self.segment = self.number
        self.integer()
        self.generation = self.number
        self.integer()
        self.offset = self.number
        self.integer()
        self.length = self.number

    def data(self, row):  # type: ignore[no-untyped-def]
        """Read an ObjectRow: `version`, and where its envelope and the places of its parts are."""
        self.body(row)
        self.version = -1
        if self.bad or not self.several or (self.pos < self.end and self.p[self.pos] == NIL):
            return 0
        self.array(5)
        self.integer()
        version = self.number
        self.octets()
        self.envelope = self.start
        self.envelope_end = self.stop
        self.octets()
        self.integer()
        self.octets()
        self.parts = self.start
        self.parts_end = self.stop
        if not self.bad and version < NIL:
            self.version = version
        return 0


def objects(rows):  # type: ignore[no-untyped-def]
    """The keys of the objects that MessageRows name; of None, a key that no object has. ValueError."""
    row = Row()
    key = bytearray(8)
    w = key
    found = []
    for one in rows:
        n = 0
        if one is not None:
            row.message(one)
            if row.bad:
                raise ValueError("a row of a message is broken")
            n = row.object
        for i in range(8):
            w[7 - i] = n & 255
            n >>= 8
        found.append(bytes(key))
    return found


def bodies(rows):  # type: ignore[no-untyped-def]
    """(segment, generation, offset, length) of the body of each ObjectRow. ValueError."""
    row = Row()
    found = []
    for one in rows:
        row.body(one)
        if row.bad:
            raise ValueError("a row of an object is broken")
        found.append((row.segment, row.generation, row.offset, row.length))
    return found


def undescribed(rows, version):  # type: ignore[no-untyped-def]
    """The indices of those ObjectRows that have no description of this version."""
    row = Row()
    found = []
    for at, one in enumerate(rows):
        row.data(one)
        if row.version != version:
            found.append(at)
    return found
