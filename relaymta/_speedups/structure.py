"""What FETCH tells of a message, written in one pass over its parts: ENVELOPE, BODYSTRUCTURE (RFC 9051 7.5.2, RFC 3501 7.4.2),
and where its parts are.

Names of types, encodings and parameters are in lower case, values are as they are in the message, on one line (RFC 2047 and RFC
2231 are not decoded). What has no valid Content-Type is text/plain in US-ASCII (RFC 2045 5.2); a part that is not looked into
(mime.py) is application/octet-stream.

Linear in the length of the header fields, however parts are nested. Bounds: no fields are shown of parts behind FIELDS_MOST
octets of fields, no addresses behind ADDRESSES_MOST octets of fields with addresses, of the message itself and of all those in
it; VALUE_MOST octets of a field are read.
"""

from relaymta._speedups._mem import copy, cut, find, same
from relaymta._speedups._turns import give_way
from relaymta._speedups._words import get32, put32
from relaymta._speedups.addresses import Addresses
from relaymta._speedups.mime import scan, value
from relaymta._speedups.octets import Octets

FIELDS_MOST = 1048576
ADDRESSES_MOST = 131072
VALUE_MOST = 65536
TURN = 256  # parts after which other threads may run: a tenth of a millisecond
TAGS_MOST = 1000  # octets of Content-Language
PLACE = 14  # octets
LEAF, MULTIPART, MESSAGE, OPAQUE = 0, 1, 2, 3  # kinds of parts, as in mime.py

# Numbers of fields, as in mime.py.
DATE, SUBJECT, FROM, SENDER, REPLY_TO, TO, CC, BCC, IN_REPLY_TO, MESSAGE_ID = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9
ID, DESCRIPTION, DISPOSITION, LANGUAGE, LOCATION, MD5, ENCODING = 10, 11, 12, 13, 14, 15, 16
FIELDS = 18

# Whether an octet belongs to a tag of a language.
TAG = bytes(octet in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789*-" for octet in range(256))


class Writer:
    """Writes replies about the message in `data`."""

    def __init__(self, data, parts):  # type: ignore[no-untyped-def]
        self.data = data
        self.parts = parts
        self.out = Octets()
        self.addresses = Addresses(self.out)
        self.places = bytearray(8 * FIELDS)  # start and end of the first value of each field at hand; 0: there is none
        self.first = self.places
        self.repeated = 0  # bits: fields that come more than once
        self.fields_left = FIELDS_MOST
        self.addresses_left = ADDRESSES_MOST  # of the messages in the message

    def index(self, fields):  # type: ignore[no-untyped-def]
        """Have fields (number, start, end) at hand: octets of all of them."""
        first = self.first
        for number in range(FIELDS):
            put32(first, 8 * number, 0)
            put32(first, 8 * number + 4, 0)
        self.repeated = 0
        octets = 0
        for number, start, end in fields:
            octets += end - start
            if get32(first, 8 * number):
                self.repeated |= 1 << number
            else:
                put32(first, 8 * number, start)
                put32(first, 8 * number + 4, end)
        return octets

    def text(self, number):  # type: ignore[no-untyped-def]
        """Write the first field with a number, or NIL."""
        out = self.out
        start = get32(self.first, 8 * number)
        if start == 0:
            out.put(b"NIL")
        else:
            out.unfold(self.data, start, min(get32(self.first, 8 * number + 4), start + VALUE_MOST))
            out.string(out.line, out.start, out.end)

    def envelope(self, fields, room):  # type: ignore[no-untyped-def]
        """Write ENVELOPE of the message with these fields. Of a field that is repeated the first counts; of addresses, all.
        `room`: octets of fields of addresses that are read."""
        out = self.out
        self.index(fields)
        out.put(b"(")
        self.text(DATE)
        out.put(b" ")
        self.text(SUBJECT)
        out.put(b" ")
        start = out.k
        room = self.people(fields, FROM, room)
        end = out.k
        for number in range(SENDER, BCC + 1):
            out.put(b" ")
            room = self.people(fields, number, room)
            if number <= REPLY_TO and not self.addresses.count:
                out.need(end - start)
                out.k = copy(out.w, out.k - 3, out.w, start, end)
        out.put(b" ")
        self.text(IN_REPLY_TO)
        out.put(b" ")
        self.text(MESSAGE_ID)
        out.put(b")")

    def people(self, fields, number, room):  # type: ignore[no-untyped-def]
        """Write the addresses of all fields with a number, or NIL: what is left of `room`."""
        out = self.out
        begin = out.k
        self.addresses.count = 0
        out.put(b"(")
        if self.repeated >> number & 1:
            for one, start, end in fields:
                if one == number:
                    room = self.read(start, end, room)
        elif get32(self.first, 8 * number):
            room = self.read(get32(self.first, 8 * number), get32(self.first, 8 * number + 4), room)
        if self.addresses.count:
            out.put(b")")
        else:
            out.k = begin
            out.put(b"NIL")
        return room

    def read(self, start, end, room):  # type: ignore[no-untyped-def]
        """Write the addresses of the field whose value is data[start:end]: what is left of `room`."""
        end = min(end, start + room)
        self.out.unfold(self.data, start, end)
        self.addresses.write(self.out.line, self.out.start, self.out.end)
        return room - (end - start)

    def part(self, number):  # type: ignore[no-untyped-def]
        """Write BODYSTRUCTURE of a part and all that is in it: the number of the next one."""
        out = self.out
        part = self.parts[number]
        self.fields_left -= self.index(part.fields)
        shown = self.fields_left >= 0
        number += 1
        if number % TURN == 0:
            give_way()
        out.put(b"(")
        if part.kind == MULTIPART:
            while number < len(self.parts) and self.depth(number) > part.depth:
                number = self.part(number)
            out.put(b" ")
            self.lowered(part.subtype, part.subtype_end)
            out.put(b" ")
            self.index(part.fields if shown else [])
            self.parameters(part.parameters if shown else None)
        else:
            if not shown:
                self.index([])
            self.body(part, shown)
            if part.kind == MESSAGE:
                number = self.message(number)
            if part.kind != OPAQUE and (part.kind == MESSAGE or self.textual(part)):
                out.number(part.lines)
            out.put(b" ")
            if part.kind == MESSAGE:
                self.index(part.fields if shown else [])
            self.text(MD5)
        self.extension()
        out.put(b")")
        return number

    def depth(self, number):  # type: ignore[no-untyped-def]
        """How deep a part is nested."""
        part = self.parts[number]
        return part.depth

    def textual(self, part):  # type: ignore[no-untyped-def]
        """Whether a part is text."""
        return part.type < 0 or same(self.data, part.type, part.type_end, b"text")

    def message(self, number):  # type: ignore[no-untyped-def]
        """Write the envelope and the structure of an attached message: the number of the part behind it."""
        part = self.parts[number]
        self.out.put(b" ")
        self.envelope(part.fields, self.addresses_left)
        for one, start, end in part.fields:
            if FROM <= one <= BCC:
                self.addresses_left -= end - start
        self.addresses_left = max(0, self.addresses_left)
        self.out.put(b" ")
        return self.part(number)

    def body(self, part, shown):  # type: ignore[no-untyped-def]
        """Write type, subtype and body-fields; `shown`: with parameters."""
        out = self.out
        if part.kind != OPAQUE and part.type < 0:
            out.put(b'"message" "rfc822" NIL' if part.kind == MESSAGE else b'"text" "plain" ("charset" "us-ascii")')
        else:
            if part.kind == OPAQUE:
                out.put(b'"application" "octet-stream"')
            else:
                self.lowered(part.type, part.type_end)
                out.put(b" ")
                self.lowered(part.subtype, part.subtype_end)
            out.put(b" ")
            self.parameters(part.parameters if shown else None)
        out.put(b" ")
        self.text(ID)
        out.put(b" ")
        self.text(DESCRIPTION)
        out.put(b" ")
        self.encoding()
        out.number(part.end - part.body)

    def encoding(self):  # type: ignore[no-untyped-def]
        """Write body-fld-enc."""
        start = get32(self.first, 8 * ENCODING)
        end = get32(self.first, 8 * ENCODING + 4)
        if start:
            start, end, _ = value(self.data, start, min(end, start + VALUE_MOST))
        if end > start:
            self.lowered(start, end)
        else:
            self.out.put(b'"7bit"')

    def extension(self):  # type: ignore[no-untyped-def]
        """Write disposition, language and location, each with a space in front."""
        out = self.out
        start = get32(self.first, 8 * DISPOSITION)
        end = get32(self.first, 8 * DISPOSITION + 4)
        parameters = None
        if start:
            start, end, parameters = value(self.data, start, min(end, start + VALUE_MOST))
        if end > start:
            out.put(b" (")
            self.lowered(start, end)
            out.put(b" ")
            self.parameters(parameters)
            out.put(b") ")
        else:
            out.put(b" NIL ")
        self.language()
        out.put(b" ")
        self.text(LOCATION)

    def language(self):  # type: ignore[no-untyped-def]
        """Write body-fld-lang: the tags in Content-Language as a list, or NIL."""
        out = self.out
        start = get32(self.first, 8 * LANGUAGE)
        begin = out.k
        if start:
            out.unfold(self.data, start, min(get32(self.first, 8 * LANGUAGE + 4), start + VALUE_MOST))
            p = out.line
            tags = TAG
            end = min(out.end, out.start + TAGS_MOST)
            tag = -1
            for i in range(out.start, end + 1):
                if i < end and tags[p[i]]:
                    tag = i if tag < 0 else tag
                elif tag >= 0:
                    out.put(b"(" if out.k == begin else b" ")
                    out.string(p, tag, i)
                    tag = -1
        out.put(b"NIL" if out.k == begin else b")")

    def parameters(self, parameters):  # type: ignore[no-untyped-def]
        """Write body-fld-param."""
        out = self.out
        if not parameters:
            out.put(b"NIL")
            return 0
        p = self.data
        front = b"("
        for name, name_end, start, end in parameters:
            out.put(front)
            front = b" "
            self.lowered(name, name_end)
            out.put(b" ")
            if p[start - 1] == ord('"') and find(p, ord("\\"), start, end) >= 0:
                text = _unquoted(p, start, end)
                out.unfold(text, 0, len(text))
            else:
                out.unfold(p, start, end)
            out.string(out.line, out.start, out.end)
        out.put(b")")
        return 0

    def lowered(self, start, end):  # type: ignore[no-untyped-def]
        """Write data[start:end] as a string in lower case."""
        out = self.out
        k = out.k
        out.string(self.data, start, end)
        w = out.w
        for i in range(k, out.k):
            if 65 <= w[i] <= 90:
                w[i] += 32

    def all(self):  # type: ignore[no-untyped-def]
        """ENVELOPE, BODYSTRUCTURE, and where the parts are."""
        out = self.out
        part = self.parts[0]
        self.envelope(part.fields, ADDRESSES_MOST)
        structure = out.k
        self.part(0)
        places = out.k
        out.need(PLACE * len(self.parts))
        k = places
        for part in self.parts:
            out.w[k] = part.kind | part.encoding << 4
            out.w[k + 1] = part.depth
            put32(out.w, k + 2, part.header)
            put32(out.w, k + 6, part.body - part.header)
            put32(out.w, k + 10, part.end - part.body)
            k += PLACE
        return out.taken(0, structure), out.taken(structure, places), out.taken(places, k)


def describe(data):  # type: ignore[no-untyped-def]
    """Of message data: ENVELOPE, BODYSTRUCTURE, the offset of the body, and the places of the parts, in records of PLACE octets
    (as of proto/mime.py)."""
    parts = scan(data)
    part = parts[0]
    envelope, structure, places = Writer(data, parts).all()
    return envelope, structure, part.body, places


def _unquoted(p, start, end):  # type: ignore[no-untyped-def]
    """p[start:end] with its quoted pairs undone (RFC 5322 3.2.1)."""
    out = bytearray(end - start)
    w = out
    k = 0
    i = start
    while i < end:
        if p[i] == ord("\\") and i + 1 < end:
            i += 1
        w[k] = p[i]
        k += 1
        i += 1
    return cut(w, 0, k)
