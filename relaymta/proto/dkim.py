"""DKIM signatures (RFC 6376, 8463): the octets that are hashed and the fields that are written, without keys or clocks.

Header fields are octets as they are on the wire, each without its final CRLF.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from relaymta._speedups.dkim import Body, header

__all__ = [
    "OVERSIGNED", "SIGNED", "BodyHash", "BodyHashes", "Signature", "by_name", "canonical_field", "has_author", "name_of",
    "signed", "signed_octets", "split_fields", "unquoted", "without_signature", "without_space",
]  # fmt: skip

# The fields that are signed if present (RFC 6376 5.4.1, RFC 8058 4 for the list- fields) ...
SIGNED = (
    "from", "sender", "reply-to", "subject", "date", "message-id", "to", "cc", "mime-version", "content-type",
    "content-transfer-encoding", "content-description", "content-id", "resent-date", "resent-from", "resent-sender", "resent-to",
    "resent-cc", "resent-message-id", "in-reply-to", "references", "list-id", "list-help", "list-unsubscribe",
    "list-unsubscribe-post", "list-subscribe", "list-post", "list-owner", "list-archive",
)  # fmt: skip
# ... and those that h= names once more than they are present, so that none can be added (5.4, 8.15).
OVERSIGNED = (
    "from", "to", "subject", "date", "reply-to", "mime-version", "content-type", "content-transfer-encoding",
)  # fmt: skip

LISTS_KEPT = 200
_FOLDED = re.compile(rb"\r\n(?![ \t])")
_AROUND = bytes(range(33)) + b"\x7f"
_SPACE = b" \t\r\n"  # FWS (RFC 6376 2.8)
_OCTET = re.compile(rb"=([0-9A-Fa-f]{2})")


def split_fields(block: bytes) -> list[bytes]:
    """The fields of a header block, each without its final CRLF; the empty line that ends the block is not one."""
    return [field for field in _FOLDED.split(block) if field]


def name_of(field: bytes) -> bytes:
    """A field's name in lower case, without white space, folds and control characters around it, which other parsers ignore."""
    colon = field.find(b":")
    name = field[:colon].lower() if colon >= 0 else field.lower()
    first, last = name[:1], name[-1:]
    return name.strip(_AROUND) if last <= b" " or first < b" " or last == b"\x7f" or first == b"\x7f" else name


def by_name(fields: Iterable[bytes]) -> dict[bytes, list[bytes]]:
    """Fields by `name_of`, those of each name in order. What has no colon is none."""
    found: dict[bytes, list[bytes]] = {}
    for field in fields:
        if b":" in field:
            found.setdefault(name_of(field), []).append(field)
    return found


def has_author(fields: Iterable[bytes]) -> bool:
    """Whether there is a From: that is not empty. Without it a signature means nothing (RFC 6376 5.4): verifiers refuse it."""
    return any(name_of(field) == b"from" and field.partition(b":")[2].strip() for field in fields)


def canonical_field(field: bytes) -> bytes:
    """The relaxed canonical form of a field (RFC 6376 3.4.2), without CRLF."""
    return header(field)


class BodyHash:
    """SHA-256 of a body's canonical form, fed in pieces. `octets`: the length of that form so far."""

    def __init__(self, relaxed: bool) -> None:
        self._body = Body(relaxed)
        self._hash = hashlib.sha256()
        self.octets = 0

    def feed(self, data: bytes) -> None:
        """Add the next octets of the body."""
        self._add(self._body.feed(data))

    def finish(self) -> str:
        """The hash in base64, as in bh=. Called once."""
        self._add(self._body.finish())
        return base64.b64encode(self._hash.digest()).decode()

    def _add(self, canonical: bytes) -> None:
        self._hash.update(canonical)
        self.octets += len(canonical)


class BodyHashes:
    """The hashes of one body in each of `forms` (True: relaxed, False: simple), fed in pieces."""

    def __init__(self, forms: Iterable[bool]) -> None:
        self._hashes = {relaxed: BodyHash(relaxed) for relaxed in forms}
        self._skip = 0

    def skip(self, octets: int) -> None:
        """Ignore the next `octets` octets: they are the header."""
        self._skip += octets

    def feed(self, data: bytes) -> None:
        """Add the next octets of the message data."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        for one in self._hashes.values():
            one.feed(data)

    def finish(self) -> dict[bool, tuple[str, int]]:
        """For each form the hash in base64, as in bh=, and the octets it covers. Called once."""
        return {relaxed: (one.finish(), one.octets) for relaxed, one in self._hashes.items()}


class Signature:
    """The DKIM-Signature fields of one key, but for hashes and times. `algorithm`: rsa-sha256 or ed25519-sha256; `signed`,
    `oversigned`: names in lower case; `expires`: seconds from t= to x=, 0 for no x=."""

    def __init__(
        self,
        domain: str,
        selector: str,
        algorithm: str,
        relaxed_header: bool = True,
        relaxed_body: bool = True,
        signed: Sequence[str] = SIGNED,
        oversigned: Sequence[str] = OVERSIGNED,
        expires: int = 0,
    ) -> None:
        self.relaxed_header = relaxed_header
        self.relaxed_body = relaxed_body
        self._oversigned = tuple(dict.fromkeys(name.encode() for name in oversigned))
        # What h= names, is signed: also a field that is only oversigned. From: always is (5.4).
        self._signed = frozenset((b"from", *(name.encode() for name in signed), *self._oversigned))
        self._expires = expires
        form = f"{'relaxed' if relaxed_header else 'simple'}/{'relaxed' if relaxed_body else 'simple'}"
        self._start = f"DKIM-Signature: v=1; a={algorithm}; c={form}; d={domain};\r\n\ts={selector}; t="
        self._lists: dict[tuple[bytes, ...], str] = {}  # h= by the field names of a message: most have the same

    def unsigned(self, fields: list[bytes], body_hash: str, seconds: int) -> tuple[bytes, bytes]:
        """(DKIM-Signature with an empty b=, without CRLF; octets to sign) of a message's `fields` at a wall-clock second."""
        chosen: list[bytes] = []
        names: list[bytes] = []
        wanted = self._signed
        for field in reversed(fields):  # 5.4.2: of several of a name the last one first
            name = name_of(field)
            if name in wanted and b":" in field:
                chosen.append(field)
                names.append(name)
        end = f" x={seconds + self._expires};" if self._expires else ""
        own = f"{self._start}{seconds};{end}\r\n\th={self._names(tuple(names))};\r\n\tbh={body_hash};\r\n\tb=".encode()
        chosen.append(own)
        return own, b"\r\n".join(map(header, chosen) if self.relaxed_header else chosen)

    def _names(self, names: tuple[bytes, ...]) -> str:
        found = self._lists.get(names)
        if found is None:
            if len(self._lists) >= LISTS_KEPT:
                self._lists.clear()
            found = self._lists[names] = _folded([name.decode("latin-1") for name in (*names, *self._oversigned)])
        return found


def without_space(value: bytes) -> bytes:
    """A tag's value without white space, where that means nothing: base64, lists, dkim-quoted-printable."""
    return value.translate(None, _SPACE)


def unquoted(value: bytes) -> bytes:
    """What dkim-quoted-printable (RFC 6376 2.11) stands for. An = that begins no octet is kept, as many write it."""
    return _OCTET.sub(lambda match: bytes((int(match[1], 16),)), without_space(value))


def without_signature(field: bytes) -> bytes:
    """A field with an empty b= tag, as it is signed (3.7): white space around the value goes, too. Only the tag of that name is
    meant: `b=` may also be within z= or another value."""
    start = field.find(b":") + 1
    while start < len(field):
        end = field.find(b";", start)
        end = len(field) if end < 0 else end
        equals = field.find(b"=", start, end)
        if equals >= 0 and field[start:equals].strip(_SPACE) == b"b":
            return field[: equals + 1] + field[end:]
        start = end + 1
    return field


def signed_octets(fields: Mapping[bytes, Sequence[bytes]], own: bytes, names: Iterable[bytes], relaxed: bool) -> bytes:
    """What a verifier hashes (3.7, 5.4.2): of the fields with these `names` (lower case) the last one first, each once; then the
    signature `own`, which is never one of those. `fields`: of `by_name`."""
    left: dict[bytes, list[bytes]] = {}
    chosen: list[bytes] = []
    for name in names:
        if name not in left:
            left[name] = [field for field in fields.get(name, ()) if field is not own]
        if left[name]:
            chosen.append(left[name].pop())
    chosen.append(without_signature(own))
    return b"\r\n".join(map(header, chosen) if relaxed else chosen)


def signed(own: bytes, signature: bytes) -> bytes:
    """The field `own`, which ends with an empty b=, with its signature in base64; CRLF included."""
    encoded = base64.b64encode(signature)
    return own + b"\r\n\t ".join(encoded[i : i + 72] for i in range(0, len(encoded), 72)) + b"\r\n"


def _folded(names: list[str]) -> str:
    lines, line = [], ""
    for name in names:
        if len(line) + len(name) > 70:
            lines.append(line)
            line = ""
        line += name + ":"
    return "\r\n\t ".join([*lines, line]).rstrip(":")
