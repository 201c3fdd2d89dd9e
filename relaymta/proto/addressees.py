"""Whom a header names as its recipients: what sendmail(1) -t and the pickup folder read of a message.

sendmail(1) starts for each message: so this module imports nothing, and is beside `mailbox`, which knows far more of RFC 5322.
All of it is linear in the length of what it is given, and takes lines that end with CRLF.
"""

__all__ = ["addresses", "fields", "header_octets", "recipients"]

_TO, _RESENT = (b"to", b"cc", b"bcc"), (b"resent-to", b"resent-cc", b"resent-bcc")
_BLANK = b" \t\r\n"
_PRINTABLE = bytes(range(33, 127))


def header_octets(data: bytes) -> int:
    """The octets of the header at the begin of message data, without the empty line behind it: whole fields (RFC 5322 2.2), with
    those lines that continue them. A line that is neither ends it."""
    at = 0
    while at < len(data):
        behind = data.find(b"\r\n", at) + 2
        if behind == 1:
            behind = len(data)
        line = data[at:behind]
        if line[:1] in (b" ", b"\t"):
            if at == 0 or not line.strip(_BLANK):
                return at
        elif not _name(line):
            return at
        at = behind
    return at


def _name(line: bytes) -> bytes:
    """The name of the field that a line begins, in lower case; empty where it begins none."""
    name, colon, _ = line.partition(b":")
    name = name.rstrip(b" \t")
    return name.lower() if colon and name and not name.translate(None, _PRINTABLE) else b""


def fields(header: bytes, names: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """The (name in lower case, value on one line) of each field with one of these names (lower case)."""
    found: list[tuple[bytes, list[bytes]]] = []
    wanted = False
    for line in header.split(b"\r\n"):
        if line[:1] in (b" ", b"\t"):
            if wanted:
                found[-1][1].append(line)
        elif line:
            name = _name(line)
            wanted = name in names
            if wanted:
                found.append((name, [line.partition(b":")[2]]))
    return [(name, b"".join(lines)) for name, lines in found]


def recipients(header: bytes) -> list[bytes]:
    """The addresses in To, Cc and Bcc; in a message that was sent on (one of Resent-To, Resent-Cc and Resent-Bcc is there), those
    in these alone (RFC 5322 3.6.6). Each address once, in the order of the header."""
    found = fields(header, _RESENT) or fields(header, _TO)
    return list(dict.fromkeys(address for _, value in found for address in addresses(value)))


def addresses(value: bytes) -> list[bytes]:
    """The addresses in a list of addresses (RFC 5322 3.4): with or without names and angle brackets, in groups, with comments and
    quoted strings, source routes left out (RFC 5321 4.1.2). What is malformed is read as far as it can be: who hands it on has to
    check each address."""
    found: list[bytes] = []
    bare: list[bytes] = []  # the words outside of angle brackets
    angle: list[bytes] | None = None  # those within, while they are open
    named = False  # an address in angle brackets was there
    at, end = 0, len(value)

    def close() -> None:
        nonlocal bare, angle, named
        address = b"".join(bare if angle is None else angle)
        if (address and not named) or angle:
            found.append(_without_route(address) if angle is not None else address)
        bare, angle, named = [], None, False

    while at < end:
        octet = value[at : at + 1]
        whole = _WHOLE.get(octet)
        if whole is not None:  # what has no separators in it
            behind = whole(value, at)
            if octet != b"(":
                (bare if angle is None else angle).append(value[at:behind])
            at = behind
            continue
        at += 1
        if octet == b"<" and angle is None:
            angle = []
        elif octet == b">" and angle is not None:
            if angle:
                found.append(_without_route(b"".join(angle)))
            angle, named = None, True
        elif octet in (b",", b";") and (angle is None or octet == b";" or b"@" not in angle[:1]):
            close()
        elif octet == b":" and angle is None:  # the name of a group is before it
            bare, named = [], False
        elif octet not in (b" ", b"\t", b"\r", b"\n"):
            (bare if angle is None else angle).append(octet)
        elif angle is None and bare and bare[-1] != b" ":
            bare.append(b" ")
    close()
    return [address.strip(b" ") for address in found if address.strip(b" ")]


def _without_route(address: bytes) -> bytes:
    """An address without the source route `@a,@b:` in front of it."""
    return address.partition(b":")[2] if address.startswith(b"@") else address


def _behind_comment(value: bytes, at: int) -> int:
    """Where the comment that begins at `at` has ended; one that is not closed goes to the end."""
    depth, end = 0, len(value)
    while at < end:
        octet = value[at]
        at += 1
        if octet == 0x5C:  # a backslash
            at += 1
        elif octet == 0x28:
            depth += 1
        elif octet == 0x29:
            depth -= 1
            if not depth:
                return at
    return end


def _behind_quoted(value: bytes, at: int) -> int:
    """Where the quoted string that begins at `at` has ended; one that is not closed goes to the end."""
    at, end = at + 1, len(value)
    while at < end:
        octet = value[at]
        at += 1
        if octet == 0x5C:
            at += 1
        elif octet == 0x22:
            return at
    return end


def _behind_literal(value: bytes, at: int) -> int:
    """Where the domain literal that begins at `at` has ended."""
    return value.find(b"]", at) + 1 or len(value)


_WHOLE = {b"(": _behind_comment, b'"': _behind_quoted, b"[": _behind_literal}
