"""SMTP input parsed in a slow and obvious way, from the RFC alone: the kernel has to agree with it."""


def lines_of(data: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines without their CRLF, and what is left."""
    *lines, rest = data.split(b"\r\n")
    return lines, rest


def commands_of(data: bytes, limit: int) -> list[bytes]:
    """The lines that a parser reports: all complete ones, up to the first of another protocol (which ends it, and of which one
    octet may be all that has arrived). `limit`: octets of a line with its CRLF."""
    lines, rest = lines_of(data)
    found = []
    for line in lines:
        found.append(line)
        request = line[-9:-3] == b" HTTP/" and line[-2:-1] == b"." and len(line) > 9 and len(line) + 2 <= limit
        if _alien(line) or (request and not any(octet in line for octet in b"\r\n\0")):
            return found
    return [*found, rest] if _alien(rest) else found


def _alien(line: bytes) -> bool:
    return line[:1] not in (b"", b"\r", b"\n") and not line[:1].isalpha()


def unstuff(wire: bytes) -> tuple[bytes, bytes] | None:
    """(message data, octets behind the final dot) of what follows 354, or None while the dot has not arrived."""
    lines, _ = lines_of(wire)
    message = b""
    used = 0
    for line in lines:
        used += len(line) + 2
        if line == b".":
            return message, wire[used:]
        message += (line[1:] if line.startswith(b".") else line) + b"\r\n"
    return None


def bare(message: bytes) -> tuple[bool, bool]:
    """(a bare LF, a bare CR) in message data."""
    without = message.replace(b"\r\n", b"")
    return b"\n" in without, b"\r" in without


def normalize(message: bytes) -> bytes:
    """Bare LF becomes CRLF, bare CR and NUL a space."""
    out = bytearray()
    i = 0
    while i < len(message):
        if message[i : i + 2] == b"\r\n":
            out += b"\r\n"
            i += 2
        elif message[i] == 10:
            out += b"\r\n"
            i += 1
        elif message[i] == 13:
            out += b" "
            i += 1
        else:
            out.append(message[i] or 32)
            i += 1
    return bytes(out)
