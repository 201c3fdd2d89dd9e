"""What a worker and a process of hooks say to each other: a length of four octets (big-endian), then an array in msgpack.

The process runs code of the operator's own: what comes from it is untrusted. A frame of it has ANSWER_MOST octets at most, and
its types are checked; all else is taken for a process that has gone mad, and ends it.
"""

import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from relaymta.proto.hook import AnyChange, clean

__all__ = [
    "AFTERWARDS", "ANSWER_MOST", "CLIENT", "ENVELOPE", "HOOKS", "MESSAGE", "VERBS", "Call", "Frames", "Garbage", "Reply", "pack",
    "pack_call", "unpack_call", "unpack_reply",
]  # fmt: skip

CLIENT: Final = ("on_connect", "on_helo", "on_auth")
ENVELOPE: Final = ("on_mail", "on_rcpt", "on_data")
MESSAGE: Final = ("on_message", "choose_route")
AFTERWARDS: Final = ("on_attempt", "on_deferred", "on_bounced", "on_delivered")
HOOKS: Final = (*CLIENT, *ENVELOPE, *MESSAGE, *AFTERWARDS)
# What a session is asked about (FilterSession, Question) -> the hook.
VERBS: Final = {
    "CONNECT": "on_connect", "HELO": "on_helo", "AUTH": "on_auth", "MAIL": "on_mail", "RCPT": "on_rcpt", "DATA": "on_data",
}  # fmt: skip

ANSWER_MOST: Final = 1 << 20  # octets
_LENGTH = struct.Struct(">I")


class Garbage(Exception):
    """What has come is no frame; str(): why."""


class Call(msgspec.Struct, array_like=True):
    """A hook is to be called; or, with number 0, `hook` is "cancel", and `arguments` has the number of a call. `descriptors`: how
    many come with it; `arguments`: of each record its fields, in their order."""

    number: int
    hook: str
    descriptors: int
    arguments: Any


class Reply(msgspec.Struct, array_like=True):
    """What has come of a call. `word`: a verdict; or "none" (it has no opinion), "route" (`reason` is its name), "raised"
    (`reason` is the traceback, `place` where), "invalid" (what it returns is nothing that it may, and why), "cancelled", "held"
    (it keeps the event loop waiting, at `place`: its answer may still come). With number 0: "ready", with the names of its
    `hooks`, of those that want `bodies`, and the `files` that were imported, each with its watch.stamp; or "broken", and why."""

    number: int
    word: str
    reason: str = ""
    reply: str = ""
    score: float | None = None
    changes: list[AnyChange] = []
    place: str = ""
    hooks: list[str] = []
    bodies: list[str] = []
    files: list[tuple[str, int, int, int]] = []


_encode = msgspec.msgpack.Encoder().encode
_call = msgspec.msgpack.Decoder(Call).decode
_reply = msgspec.msgpack.Decoder(Reply).decode


def pack(frame: "Call | Reply") -> bytes:
    """A frame as octets. What msgspec raises where a value cannot be sent."""
    body = _encode(frame)
    return _LENGTH.pack(len(body)) + body


def pack_call(call: Call) -> bytes:
    """A call as octets. Clients write octets that are no text: they are U+FFFD."""
    try:
        return pack(call)
    except UnicodeEncodeError:
        return pack(msgspec.structs.replace(call, arguments=clean(call.arguments)))


def unpack_call(body: bytes) -> Call:
    """A call, in the process of hooks."""
    return _call(body)


def unpack_reply(body: bytes) -> Reply:
    """A reply. Garbage: it is none."""
    try:
        return _reply(body)
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise Garbage(str(error)) from None


class Frames:
    """The bodies of frames in octets that arrive in any portions."""

    __slots__ = ("_buffer", "_most")

    def __init__(self, most: int) -> None:
        """`most`: octets of one."""
        self._buffer = bytearray()
        self._most = most

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Those that `data` completes. Garbage: one is too long."""
        if not self._buffer and len(data) >= 4:  # as nearly always: there is one frame, and all of it
            (length,) = _LENGTH.unpack_from(data)
            if len(data) == 4 + length:
                yield data[4:]
                return
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 4:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > self._most:
                raise Garbage(f"a frame of {length} octets")
            if len(buffer) < 4 + length:
                return
            body = bytes(buffer[4 : 4 + length])
            del buffer[: 4 + length]
            yield body
