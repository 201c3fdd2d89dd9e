"""Idempotency keys: what is handed in twice under one key is taken once, whichever worker gets it.

A key is the business of one request at a time on the whole machine: its unit of the shared limits is held from the look at what
was accepted under it before, in all shards, until what is accepted now is committed. A worker that dies has committed its message
or has not; its unit is released by the supervisor.
"""

import asyncio
import re
from concurrent.futures import Executor
from hashlib import blake2b
from typing import NamedTuple

from relaymta.accept.origin import Origin
from relaymta.errors import StoreError
from relaymta.proto.header import fields
from relaymta.queue import Kept, Request, Shards, digest_of
from relaymta.shm import Limits

__all__ = ["CONTENT", "FIELD", "Busy", "Once", "Turn", "Wanted", "content_of", "key_of", "owner_of", "without_boundaries"]

FIELD = b"x-relay-idempotency"
LOOK_SECONDS, LOOK_MOST = 0.01, 0.2  # between two looks whether the one before is done
CONTENT = 16  # octets of a digest
_KEY = re.compile(r"[!-~]{1,255}\Z")
LINES_MOST = 20_000  # lines of a body, of delimiters and headers of parts, in which boundaries are looked for
_TYPE = re.compile(
    rb"^content-type[ \t]*:\s*(?:(multipart/)|(message/(?:rfc822|global)\b))?[^\r\n]*(?:\r\n[ \t][^\r\n]*)*", re.I | re.M
)
_BOUNDARY = re.compile(rb"""\bboundary[ \t]*=[ \t]*(?:"([^"\r\n]{1,200})"|([^\s;"]{1,200}))""", re.I)


class Busy(Exception):
    """Another request with the key is under way."""


class Wanted(NamedTuple):
    """What an application wants of a message beside its envelope. `priority`: "" for that of its origin; `send_at`: when it is
    tried first (ms, UTC), 0: at once; `request`: what it belongs to, None: it has no idempotency key; `began`: when its
    request began to come (loop time), 0.0: not by HTTP."""

    tags: list[str]
    traceparent: str
    priority: str
    send_at: int
    request: Request | None
    began: float = 0.0


def owner_of(origin: Origin) -> str:
    """Whose the keys are that clients of this origin use: those of a user, whatever its application and listener; or, of nobody
    who has logged in, of an address and application."""
    return origin.user or f"\0{origin.application}\0{origin.client.address}"


def key_of(header: bytes) -> str | None:
    """The idempotency key of a header that may have one (FIELD is in it); "" without one. None: it is not well-formed, or there
    are several."""
    found = [value for name, value in fields(header) if name == FIELD]
    if not found:
        return ""
    return found[0] if len(found) == 1 and _KEY.match(found[0]) else None


def content_of(sender: str, header: bytes) -> "blake2b":
    """What tells a message with an idempotency key from another one: its sender and its subject; its body, or the size of that,
    is to be added. Not what programs make anew each time, such as Date, Message-ID and boundaries."""
    subject = next((value for name, value in fields(header) if name == b"subject"), "")
    return blake2b(f"{sender}\0{subject}\0".encode(), digest_size=CONTENT)


def without_boundaries(header: bytes, body: bytes) -> bytes:
    """A body in which the boundaries that Content-Type names, in its header or in that of a part, are numbers, where they delimit
    parts and where they are named. Behind LINES_MOST lines that may be either, all is as it is."""
    known: dict[bytes, int] = {}
    in_header = _renamed(header, known)[1]
    if not known and not in_header:
        return body
    text, found = b"\r\n" + body, list[bytes]()
    at = done = lines = 0
    while lines < LINES_MOST:
        if in_header:  # `at`: at the line end before it
            end = _next(text, b"\r\n\r\n", at)
            renamed, in_header = _renamed(text[at:end], known)
            found += text[done:at], renamed
            lines += renamed.count(b"\n")
            done, at = end, end + 2 if in_header else end
            continue
        at = text.find(b"\r\n--", at)
        if at < 0:
            break
        end = _next(text, b"\r\n", at + 2)
        name = text[at + 4 : end].rstrip(b" \t")
        closing = name not in known and name.endswith(b"--")
        number = known.get(name[:-2] if closing else name)
        if number is not None:
            found += text[done : at + 4], b"\0%d" % number, b"--" if closing else b""
            done, in_header = end, not closing
        lines, at = lines + 1, end
    return b"".join([*found, text[done:]])


def _next(text: bytes, what: bytes, at: int) -> int:
    """Where it is found from here on, or the end."""
    found = text.find(what, at)
    return len(text) if found < 0 else found


def _renamed(header: bytes, known: dict[bytes, int]) -> tuple[bytes, bool]:
    """A header in which the boundary that it names is its number in `known`, to which it is added; and whether the header of a
    message follows."""
    field = _TYPE.search(header)
    if field is None:
        return header, False
    match = _BOUNDARY.search(header, field.start(), field.end()) if field[1] else None
    if match is None:
        return header, bool(field[2])
    number = known.setdefault(match[1] or match[2], len(known))
    return b"%b\0%d%b" % (header[: match.start()], number, header[match.end() :]), False


class Turn:
    """The turn of one request: nobody else has its key until `end`. `kept`: what was accepted under it before, by part."""

    def __init__(self, limits: Limits, name: str, digest: bytes, kept: dict[int, Kept]) -> None:
        self._limits = limits
        self._name = name
        self._ended = False
        self.digest = digest
        self.kept = kept

    def end(self) -> None:
        """Further calls do nothing."""
        if not self._ended:
            self._ended = True
            self._limits.give(self._name)


class Once:
    """One worker's access to the keys of the machine."""

    def __init__(self, shards: Shards, limits: Limits, threads: Executor | None) -> None:
        self._shards = shards
        self._limits = limits
        self._threads = threads

    async def begin(self, owner: str, key: str, seconds: float) -> Turn:
        """The turn of a request with this key of `owner` (`owner_of`), once others with the same key are done. Busy: they are not
        within `seconds`; StoreError: it cannot be told what was accepted before."""
        digest = digest_of(owner, key)
        name = f"request {digest.hex()}"
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + seconds, LOOK_SECONDS
        while not self._limits.take(name, 1):
            if loop.time() >= until:
                raise Busy("a request with the same idempotency key is under way")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LOOK_MOST)
        try:
            if self._limits.apart(name):
                raise StoreError("too much is under way to tell whether this is a request with the same key as another one")
            kept = await loop.run_in_executor(self._threads, self._shards.kept, digest)
        except BaseException:
            self._limits.give(name)
            raise
        return Turn(self._limits, name, digest, kept)

    async def kept(self, owner: str, key: str) -> dict[int, Kept]:
        """What was accepted under a key, by part. StoreError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._shards.kept, digest_of(owner, key))
