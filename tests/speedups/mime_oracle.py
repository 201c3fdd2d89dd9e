"""Message data taken apart in a slow and obvious way, by recursion over its lines: the scanner has to agree with it."""

import re
from typing import NamedTuple

NAMES = (
    "date", "subject", "from", "sender", "reply-to", "to", "cc", "bcc", "in-reply-to", "message-id", "content-id",
    "content-description", "content-disposition", "content-language", "content-location", "content-md5",
    "content-transfer-encoding", "content-type",
)  # fmt: skip
LEAF, MULTIPART, MESSAGE, OPAQUE = range(4)
DEPTH_MOST = 100

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:")
_TOKEN = re.compile(rb'[^\x00-\x20(;/=",\x7f]*')
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*(?:\\\Z)?)', re.S)
_UNQUOTED = re.compile(rb"[^\x00-\x20;]*")
_PLAIN = (b"", b"7bit", b"8bit", b"binary")


class Node(NamedTuple):
    """A part, with those attributes of the scanner's that are compared."""

    depth: int
    kind: int
    header: int
    body: int
    end: int
    lines: int
    encoding: int
    boundary: bytes | None
    type: bytes | None
    fields: list[tuple[str, bytes]]


def skip(text: bytes) -> bytes:
    """Text without white space and comments in front."""
    while text[:1] and text[:1] in b" \t\r\n(":
        depth = 0
        while text:
            depth += {b"(": 1, b")": -1}.get(text[:1], 0)
            text = text[2:] if text[:1] == b"\\" else text[1:]
            if depth == 0:
                break
    return text


def token(text: bytes) -> tuple[bytes, bytes]:
    """The token that a text begins with, and what is behind it."""
    text = skip(text)
    found = _TOKEN.match(text)[0]
    return found, text[len(found) :]


def parameters(text: bytes) -> list[tuple[bytes, bytes]]:
    """Names and values as they are written."""
    found: list[tuple[bytes, bytes]] = []
    while len(found) < 100:
        _, semicolon, text = skip(text).partition(b";")
        if not semicolon:
            break
        name, text = token(text)
        text = skip(text)
        if not name or text[:1] != b"=":
            continue
        text = skip(text[1:])
        match = _QUOTED.match(text)
        if match is not None:
            text = text[match.end() + 1 :]
        else:
            match = _UNQUOTED.match(text)
            text = text[match.end() :]
        found.append((name, match[match.lastindex or 0]))
    return found


def content_type(text: bytes) -> tuple[int, bytes | None, bytes | None]:
    """Kind, boundary and type/subtype of a part with this Content-Type."""
    kind, text = token(text)
    text = skip(text)
    subtype, rest = token(text[1:])
    if not kind or text[:1] != b"/" or not subtype:
        return LEAF, None, None
    shown = kind + b"/" + subtype
    if kind.lower() == b"multipart":
        values = [value for name, value in parameters(rest) if name.lower() == b"boundary"]
        boundary = re.sub(rb"[\\\r\n]", b"", values[0]).rstrip(b" \t") if values else b""
        return MULTIPART, boundary or None, shown
    return (MESSAGE if shown.lower() in (b"message/rfc822", b"message/global") else LEAF), None, shown


class _Message:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offsets = [0, *(match.end() for match in re.finditer(rb"\n", data))]
        if self.offsets[-1] != len(data):
            self.offsets.append(len(data))
        self.at = 0
        self.found: list[Node | None] = []

    def line(self) -> bytes:
        return self.data[self.offsets[self.at] : self.offsets[self.at + 1]]

    def ended(self) -> bool:
        return self.at + 1 >= len(self.offsets)

    def delimiter(self, boundaries: list[bytes]) -> tuple[int, bool] | None:
        """Which of the boundaries the line at hand is a delimiter of, the innermost first, and whether it is the last one."""
        line = self.line()
        if not line.startswith(b"--"):
            return None
        text = line[2:].rstrip(b" \t\r\n")
        for last in (False, True):
            for number in reversed(range(len(boundaries))):
                if text == boundaries[number] + b"--" * last:
                    return number, last
        return None

    def header(self, boundaries: list[bytes]) -> list[tuple[str, bytes]]:
        """Read a header: its fields."""
        start = self.at
        fields: list[list[bytes]] = []
        while not self.ended() and self.delimiter(boundaries) is None:
            line = self.line()
            if line in (b"\n", b"\r\n"):
                self.at += 1
                break
            match = _FIELD.match(line)
            if line[:1] in (b" ", b"\t") and self.at > start:
                if fields and fields[-1]:
                    fields[-1].append(line)
            elif match is not None:
                fields.append([match[1], line[match.end() :]])
            elif self.at == start:
                break
            else:
                fields.append([])
            self.at += 1
        named = [
            (name.decode("latin-1").lower(), re.sub(rb"\r?\n?\Z", b"", b"".join(value))) for name, *value in filter(None, fields)
        ]
        return [one for one in named if one[0] in NAMES]

    def part(self, depth: int, boundaries: list[bytes], digest: bool) -> None:
        """Read a part up to a delimiter of what it is in."""
        number = len(self.found)
        self.found.append(None)
        header = self.offsets[self.at] if self.offsets else 0
        fields = self.header(boundaries)
        body = self.offsets[min(self.at, len(self.offsets) - 1)]
        values = dict(reversed(fields))
        word, _ = token(values.get("content-transfer-encoding", b""))
        encoding = {b"quoted-printable": 1, b"base64": 2}.get(word.lower(), 0 if word.lower() in _PLAIN else 3)
        kind, boundary, shown = LEAF, None, None
        if "content-type" in values:
            kind, boundary, shown = content_type(values["content-type"])
        elif digest:
            kind = MESSAGE
        if kind == MULTIPART and not boundary:
            kind, shown = LEAF, None
        if (kind == MESSAGE and encoding in (1, 2)) or (kind != LEAF and depth >= DEPTH_MOST):
            kind = OPAQUE
        if kind == MULTIPART:
            assert boundary is not None and shown is not None
            if not self.multipart(depth, boundaries, boundary, shown.lower() == b"multipart/digest"):
                kind, shown = LEAF, None
        elif kind == MESSAGE:
            self.part(depth + 1, boundaries, False)
        else:
            self.text(boundaries)
        end = self.offsets[min(self.at, len(self.offsets) - 1)]
        if not self.ended() and end > body:
            end -= 2 if self.data[end - 2 : end] == b"\r\n" else 1
        lines = self.data.count(b"\n", body, end)
        self.found[number] = Node(depth, kind, header, body, end, lines, encoding, boundary, shown, fields)

    def multipart(self, depth: int, boundaries: list[bytes], boundary: bytes, digest: bool) -> bool:
        """Read the body of a multipart; whether there was a part in it."""
        inner = [*boundaries, boundary]
        some = False
        while not self.ended():
            hit = self.delimiter(inner)
            if hit is None:
                self.at += 1
            elif hit[0] != len(boundaries):
                break
            else:
                self.at += 1
                if hit[1]:
                    self.text(boundaries)
                    break
                some = True
                self.part(depth + 1, inner, digest)
        return some

    def text(self, boundaries: list[bytes]) -> None:
        while not self.ended() and self.delimiter(boundaries) is None:
            self.at += 1


def parts(data: bytes) -> list[Node]:
    """All parts of message data, each in front of those in it."""
    message = _Message(data)
    message.part(0, [], False)
    assert None not in message.found
    return message.found  # type: ignore[return-value]


def base64(data: bytes) -> bytes:
    """Bits of the characters that count; padding ends a run, whose incomplete octet is lost."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    out = bytearray()
    bits = ""
    for octet in [*data, ord("=")]:
        if octet in alphabet:
            bits += f"{alphabet.index(octet):06b}"
        elif octet == ord("="):
            out += bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) // 8 * 8, 8))
            bits = ""
    return bytes(out)


def quoted_printable(data: bytes) -> bytes:
    """Line by line, RFC 2045 6.7."""
    out = b""
    for line in re.findall(rb"[^\n]*\n|[^\n]+\Z", data):
        text = re.sub(rb"\r?\n\Z|\r\Z", b"", line) if line.endswith(b"\n") else line
        end = line[len(text) :]
        text = text.rstrip(b" \t")
        if text.endswith(b"="):
            text, end = text[:-1], b""
        out += re.sub(rb"=([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), text) + end
    return out


def folded(data: bytes, unfold: bool) -> bytes:
    return re.sub(rb"\r?\n(?=[ \t])", b"", data).lower() if unfold else data.lower()
