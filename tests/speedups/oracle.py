"""SMTP input, done the slow and obvious way, from the RFC alone: the kernel has to agree with it."""


def lines_of(data: bytes) -> tuple[list[bytes], bytes]:
    """Complete lines without their CRLF, and what is left."""
    *lines, rest = data.split(b"\r\n")
    return lines, rest


def commands_of(data: bytes, limit: int) -> list[bytes]:
    """The lines that a parser tells of: all complete ones, up to the first of another protocol (which ends it, and of which one
    octet may be all that has come). `limit`: octets of a line with its CRLF."""
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
    """(message text, octets behind the final dot) of what follows 354, or None while the dot has not come."""
    lines, _ = lines_of(wire)
    text = b""
    used = 0
    for line in lines:
        used += len(line) + 2
        if line == b".":
            return text, wire[used:]
        text += (line[1:] if line.startswith(b".") else line) + b"\r\n"
    return None


def bare(text: bytes) -> tuple[bool, bool]:
    """(a bare LF, a bare CR) in the text."""
    without = text.replace(b"\r\n", b"")
    return b"\n" in without, b"\r" in without


def normalize(text: bytes) -> bytes:
    """Bare CR and LF become CRLF, NUL a space."""
    out = bytearray()
    i = 0
    while i < len(text):
        if text[i : i + 2] == b"\r\n":
            out += b"\r\n"
            i += 2
        elif text[i] in b"\r\n":
            out += b"\r\n"
            i += 1
        else:
            out.append(text[i] or 32)
            i += 1
    return bytes(out)
