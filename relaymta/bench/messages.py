"""What the generator sends: sizes, recipients, and messages that can be recognized and compared.

A message has a field `X-Relaymta-Bench: RUN-SERIAL` (both hexadecimal), and its body ends with the serial, so that no two are
alike. Its digest is that of the body (RFC 5322 2.1: what follows the first empty line) without dot-stuffing.
"""

import random
import re
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from xxhash import xxh3_64

from relaymta.duration import parse_size

__all__ = ["FIELD", "LARGEST", "MAILBOXES", "SMALLEST", "Messages", "Recipients", "Sizes", "digest_of_address"]

FIELD = b"X-Relaymta-Bench"
SMALLEST, LARGEST = 64, 64 << 20  # octets of a body
MAILBOXES = 1000
_LINE = 78  # octets of a line of a body, with its CRLF
_PART = re.compile(r"\s*([^:\s-]+)(?:-([^:\s-]+))?(?:\s*:\s*(\d+(?:\.\d+)?)\s*%)?\s*\Z")


class _Part(NamedTuple):
    """Sizes from `least` to `most` octets, `share` of the messages."""

    least: int
    most: int
    share: float


class Sizes:
    """The sizes of bodies, as `4k`, `1k-100k` (as many from 1k to 10k as from 10k to 100k) or `4k:80%,1M:20%`. ValueError says
    what is wrong with a text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts = [_part(part) for part in text.split(",")]
        shares = [part.share for part in self._parts]
        if len(shares) == 1 and shares[0] < 0:
            shares = [1.0]
        if min(shares) < 0:
            raise ValueError(f"{text!r}: several sizes need a share each, such as 4k:80%,1M:20%")
        if abs(sum(shares) - 1) > 0.001:
            raise ValueError(f"{text!r}: the shares are {sum(shares):.0%} together, not 100%")
        self._shares = list(accumulate(shares))

    def draw(self, chance: random.Random) -> int:
        """The size of a message, in octets."""
        part = self._parts[0]
        if len(self._parts) > 1:
            (part,) = chance.choices(self._parts, cum_weights=self._shares)
        if part.least == part.most:
            return part.least
        return min(part.most, int(part.least * (part.most / part.least) ** chance.random()))


def _part(text: str) -> _Part:
    match = _PART.match(text)
    if match is None:
        raise ValueError(f"{text!r}: a size such as 4k, a range such as 1k-100k, or several with their shares: 4k:80%,1M:20%")
    least = parse_size(match[1])
    most = parse_size(match[2]) if match[2] else least
    if not SMALLEST <= least <= most <= LARGEST:
        raise ValueError(f"{text!r}: from {SMALLEST} octets to {LARGEST >> 20}M, the smaller size first")
    return _Part(least, most, float(match[3]) / 100 if match[3] else -1.0)


class Recipients:
    """Who the messages are to: `each` recipients a message, in turn, of those given, or of MAILBOXES in each of `domains` domains
    that do not exist (RFC 6761 6.4)."""

    def __init__(self, each: int = 1, domains: int = 1, given: Iterable[str] = ()) -> None:
        self._given = [address.encode() for address in given]
        self.each = min(each, len(self._given)) if self._given else each
        self._domains = [b"d%d.bench.invalid" % number for number in range(domains)] if domains > 1 else [b"bench.invalid"]

    def of(self, serial: int) -> list[bytes]:
        """The recipients of a message. All are in the same domain, unless they were given."""
        if self._given:
            first = serial * self.each
            return [self._given[(first + number) % len(self._given)] for number in range(self.each)]
        domain, first = self._domains[serial % len(self._domains)], serial * self.each
        return [b"r%d@%s" % ((first + number) % MAILBOXES, domain) for number in range(self.each)]


def digest_of_address(address: bytes) -> int:
    """By which a recipient is known in the ledger, whatever the case of its letters."""
    return xxh3_64(address.lower()).intdigest()


class _Text:
    """The part of a body that all of a size have: as it is sent (dots stuffed), and its digest."""

    def __init__(self, text: bytes) -> None:
        self.wire = text.replace(b"\r\n.", b"\r\n..")
        self.digest = xxh3_64(text)


class Messages:
    """The messages of one run, `run` being its number. `seed`: of their sizes and texts."""

    def __init__(self, run: int, sizes: Sizes, seed: int = 1) -> None:
        self.run = run
        self._chance = random.Random(seed)
        self._sizes = sizes
        self._texts: dict[int, _Text] = {}
        letters = "abcdefghijklmnopqrstuvwxyz      "
        self._lines = ["".join(self._chance.choices(letters, k=_LINE - 2)).strip().ljust(_LINE - 3, "x") for _ in range(199)]
        self._lines[7] = "." + self._lines[7][1:]  # dots that must be stuffed (RFC 5321 4.5.2)
        self._lines[17] = "."

    def make(self, serial: int) -> tuple[bytes, bytes, bytes, int]:
        """(header with its empty line, most of the body, the end of the body with the final dot; digest) of a message."""
        size = self._sizes.draw(self._chance)
        text = self._texts.get(size)
        if text is None:
            text = self._text(size)
        end = b"%016x-%016x\r\n" % (self.run, serial)
        digest = text.digest.copy()
        digest.update(end)
        ident = b"%016x-%x" % (self.run, serial)
        header = (
            b"%s: %s\r\nFrom: Load <load@bench.invalid>\r\nTo: Sink <sink@bench.invalid>\r\nSubject: load %d\r\n"
            b"Date: Fri, 27 Nov 2026 10:14:07 +0000\r\nMessage-ID: <%s@bench.invalid>\r\nMIME-Version: 1.0\r\n"
            b"Content-Type: text/plain; charset=us-ascii\r\n\r\n" % (FIELD, ident, serial, ident)
        )
        return header, text.wire, end + b".\r\n", digest.intdigest()

    def _text(self, size: int) -> _Text:
        rest = max(0, size - 35)  # beside the last line
        repeated = ("\r\n".join(self._lines) + "\r\n").encode()
        lines = repeated * (rest // len(repeated) + 1)
        cut = lines[:rest]
        cut = cut[: cut.rfind(b"\r\n") + 2] if b"\r\n" in cut else b""
        text = cut + b"z" * max(0, rest - len(cut) - 2) + b"\r\n"
        if len(self._texts) > 2000:  # sizes are drawn from a range
            self._texts.clear()
        self._texts[size] = found = _Text(text)
        return found
