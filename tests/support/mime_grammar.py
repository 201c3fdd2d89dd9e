"""What a server may send about a message, read strictly by the grammar of RFC 9051 9 (which is that of RFC 3501 9 here):
ENVELOPE, BODY, BODYSTRUCTURE and strings. Independent of the code that writes them; anything else is Refused."""

from typing import Any, NamedTuple

__all__ = ["Body", "Envelope", "Refused", "body", "envelope", "nstring"]

_DISCRETE = ("APPLICATION", "AUDIO", "IMAGE", "FONT", "MESSAGE", "MODEL", "VIDEO")


class Refused(ValueError):
    """Octets that the grammar does not allow."""


class Envelope(NamedTuple):
    """The ten members; addresses are None or lists of (name, route, mailbox, host)."""

    date: bytes | None
    subject: bytes | None
    sender_from: list[tuple[bytes | None, ...]] | None
    sender: list[tuple[bytes | None, ...]] | None
    reply_to: list[tuple[bytes | None, ...]] | None
    to: list[tuple[bytes | None, ...]] | None
    cc: list[tuple[bytes | None, ...]] | None
    bcc: list[tuple[bytes | None, ...]] | None
    in_reply_to: bytes | None
    message_id: bytes | None


class Body(NamedTuple):
    """A body. `type`, `subtype` in upper case; `children`: of a multipart, or the one body of a message; `lines`: None where the
    grammar has none; `extension`: None, or (md5 of a single part, disposition, language, location) as far as they are there."""

    type: str
    subtype: str
    parameters: dict[bytes, bytes] | None
    children: tuple["Body", ...] = ()
    ident: bytes | None = None
    description: bytes | None = None
    encoding: str = ""
    octets: int = 0
    lines: int | None = None
    envelope: Envelope | None = None
    extension: tuple[Any, ...] | None = None


class _Reader:
    def __init__(self, octets: bytes) -> None:
        self.octets = octets
        self.at = 0

    def peek(self, text: bytes) -> bool:
        return self.octets.startswith(text, self.at)

    def expect(self, text: bytes) -> None:
        if not self.peek(text):
            raise Refused(f"{text!r} expected at {self.octets[max(0, self.at - 40) : self.at + 40]!r}")
        self.at += len(text)

    def take(self, text: bytes) -> bool:
        if self.peek(text):
            self.at += len(text)
            return True
        return False

    def number(self) -> int:
        start = self.at
        while self.octets[self.at : self.at + 1].isdigit():
            self.at += 1
        digits = self.octets[start : self.at]
        if not digits or (len(digits) > 1 and digits[:1] == b"0") or int(digits) >= 1 << 32:
            raise Refused(f"no number: {digits!r}")
        return int(digits)

    def string(self) -> bytes:
        return self.quoted() if self.peek(b'"') else self.literal()

    def quoted(self) -> bytes:
        self.expect(b'"')
        out = bytearray()
        while not self.take(b'"'):
            octet = self.octets[self.at]
            self.at += 1
            if octet == 0x5C:
                octet = self.octets[self.at]
                self.at += 1
                if octet not in b'"\\':
                    raise Refused("a quoted pair of another character")
            elif not 0 < octet < 128 or octet in b"\r\n":
                raise Refused(f"octet {octet} in a quoted string")
            out.append(octet)
        return bytes(out)

    def literal(self) -> bytes:
        self.expect(b"{")
        size = self.number()
        self.expect(b"}\r\n")
        found = self.octets[self.at : self.at + size]
        if not size or len(found) != size or b"\0" in found:  # {0} is legal, and stalls clients
            raise Refused("a literal of no octets, too few, or with NUL")
        self.at += size
        return found

    def nstring(self) -> bytes | None:
        return None if self.take(b"NIL") else self.string()

    def envelope(self) -> Envelope:
        self.expect(b"(")
        members: list[Any] = []
        for number in range(10):
            if number:
                self.expect(b" ")
            members.append(self.nstring() if number in (0, 1, 8, 9) else self.addresses())
        self.expect(b")")
        return Envelope(*members)

    def addresses(self) -> list[tuple[bytes | None, ...]] | None:
        if self.take(b"NIL"):
            return None
        self.expect(b"(")
        found = [self.address()]
        while not self.take(b")"):
            found.append(self.address())
        return found

    def address(self) -> tuple[bytes | None, ...]:
        self.expect(b"(")
        members = []
        for number in range(4):
            if number:
                self.expect(b" ")
            members.append(self.nstring())
        self.expect(b")")
        name, route, mailbox, host = members
        if host is None and not name is route is None:
            raise Refused("a group with a name or a route")
        if host is not None and mailbox is None:
            raise Refused("a host without a mailbox")
        return name, route, mailbox, host

    def parameters(self) -> dict[bytes, bytes] | None:
        if self.take(b"NIL"):
            return None
        self.expect(b"(")
        found = {}
        while True:
            name = self.string()
            self.expect(b" ")
            found[name] = self.string()
            if self.take(b")"):
                return found
            self.expect(b" ")

    def body(self, extended: bool) -> Body:
        self.expect(b"(")
        found = self.multipart(extended) if self.peek(b"(") else self.single(extended)
        self.expect(b")")
        return found

    def multipart(self, extended: bool) -> Body:
        children = [self.body(extended)]
        while self.peek(b"("):
            children.append(self.body(extended))
        self.expect(b" ")
        subtype = self.string().decode("latin-1").upper()
        parameters = None
        extension = None
        if extended:
            self.expect(b" ")
            parameters = self.parameters()
            extension = self.extension()
        return Body("MULTIPART", subtype, parameters, tuple(children), extension=extension)

    def single(self, extended: bool) -> Body:
        quoted = self.peek(b'"')
        kind = self.string().decode("latin-1").upper()
        self.expect(b" ")
        subtype = self.string().decode("latin-1").upper()
        if kind == "MULTIPART" or (kind in (*_DISCRETE, "TEXT") and not quoted):
            raise Refused(kind)
        self.expect(b" ")
        parameters = self.parameters()
        texts = []
        for _ in range(2):
            self.expect(b" ")
            texts.append(self.nstring())
        self.expect(b" ")
        encoding = self.string().decode("latin-1").upper()
        self.expect(b" ")
        octets = self.number()
        children: tuple[Body, ...] = ()
        shown = lines = None
        if kind == "MESSAGE" and subtype in ("RFC822", "GLOBAL"):
            self.expect(b" ")
            shown = self.envelope()
            self.expect(b" ")
            children = (self.body(extended),)
        if kind == "TEXT" or children:
            self.expect(b" ")
            lines = self.number()
        extension = None
        if extended:
            self.expect(b" ")
            extension = (self.nstring(), *self.extension())
        return Body(kind, subtype, parameters, children, texts[0], texts[1], encoding, octets, lines, shown, extension)

    def extension(self) -> tuple[Any, ...]:
        self.expect(b" ")
        disposition: tuple[bytes, dict[bytes, bytes] | None] | None = None
        if not self.take(b"NIL"):
            self.expect(b"(")
            word = self.string()
            self.expect(b" ")
            disposition = (word, self.parameters())
            self.expect(b")")
        self.expect(b" ")
        language: list[bytes] | bytes | None
        if self.take(b"("):
            language = [self.string()]
            while not self.take(b")"):
                self.expect(b" ")
                language.append(self.string())
        else:
            language = self.nstring()
        self.expect(b" ")
        return disposition, language, self.nstring()

    def ended(self) -> None:
        if self.at != len(self.octets):
            raise Refused(f"more: {self.octets[self.at : self.at + 40]!r}")


def envelope(octets: bytes) -> Envelope:
    """An ENVELOPE, and nothing behind it."""
    reader = _Reader(octets)
    found = reader.envelope()
    reader.ended()
    return found


def body(octets: bytes, extended: bool = True) -> Body:
    """A BODYSTRUCTURE with all extension data that RFC 9051 names, or a BODY (`extended` is false), and nothing behind it."""
    reader = _Reader(octets)
    found = reader.body(extended)
    reader.ended()
    return found


def nstring(octets: bytes) -> bytes | None:
    """An nstring, and nothing behind it."""
    reader = _Reader(octets)
    found = reader.nstring()
    reader.ended()
    return found
