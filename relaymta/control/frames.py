"""Frames of the control protocol: a length of four octets (big-endian), then a map in msgpack. A map is one of

{"id", "op", "args"}     a request; without an id a notification, which gets no answer. "descriptors": how many come with it;
                         "by": on whose behalf it is made: who, and from where
{"id", "ok", "missing"}  its answer; `missing`: the workers whose part of it is not there (left out when there are none)
{"id", "error"}          or the sentence that says why there is none; "absent": what it is about does not exist
{"id", "piece"}          a part of an answer that is sent in pieces, ahead of its "ok" or "error"
{"id", "more"}           from the asker: 1: a further piece may be sent; 0: none is wanted any more
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from relaymta.errors import RelayError
from relaymta.proto.printable import encodable

__all__ = [
    "LIMIT", "OCTETS_TOGETHER", "ROWS_TOGETHER", "UNSET", "Broken", "Frame", "Frames", "Late", "Refused", "in_pieces", "pack",
    "refusal", "sentence",
]  # fmt: skip

LIMIT = 64 << 20  # octets of a frame
OCTETS_TOGETHER = 256 << 10  # of message data in a piece
ROWS_TOGETHER = 500  # of a list in a piece

LONGEST = 10_000  # characters of a sentence

UNSET = msgspec.UNSET
_LENGTH = struct.Struct(">I")
_HEAD = 16  # octets that hold the id in front, and the key after it


class Frame(msgspec.Struct, omit_defaults=True):
    """One frame. `id`: the asker's number of the request."""

    id: int | None = None
    op: str | None = None
    args: dict[str, Any] = {}
    ok: Any = UNSET
    error: str | None = None
    absent: bool = False
    missing: list[int] = []
    piece: Any = UNSET
    more: int | None = None
    descriptors: int = 0
    by: list[str] = []


class Broken(NamedTuple):
    """A frame that is too large or none. `why`: a sentence. `ident`: its id, where that can be read. `asks`: it is a request."""

    why: str
    ident: int | None
    asks: bool


class Refused(RelayError):
    """The other end answered with an error; str() is its sentence. `absent`: what it is about does not exist."""

    def __init__(self, text: str, absent: bool = False) -> None:
        super().__init__(text)
        self.absent = absent


class Late(ConnectionError):
    """The other end has not answered in time. What it was asked for may still be done."""


def sentence(error: Exception) -> str:
    """What the asker is answered when its request has failed. Errors that are not ours are bugs, and named as such."""
    ours = isinstance(error, (RelayError, ConnectionError))
    text = (str(error) or type(error).__name__) if ours else f"internal error: {type(error).__name__}: {error}"
    return encodable(text[:LONGEST])


def refusal(ident: int | None, error: Exception) -> Frame:
    """The answer to a request that has failed."""
    return Frame(ident, error=sentence(error), absent=isinstance(error, RelayError) and error.absent)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Frame).decode


def pack(frame: Frame) -> bytes:
    """A frame as octets. RelayError when it exceeds LIMIT or has a value that cannot be sent."""
    try:
        body = _encode(frame)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # such as half of a surrogate pair
        raise RelayError(f"this cannot be sent: {error}") from None
    if len(body) > LIMIT:
        raise RelayError(_too_large(len(body)))
    return _LENGTH.pack(len(body)) + body


def _too_large(octets: int) -> str:
    return f"{octets} octets are too many for one request or answer (at most {LIMIT})"


def in_pieces(rows: list[Any]) -> Iterator[list[Any]]:
    """A long list in parts that fit into frames."""
    return (rows[start : start + ROWS_TOGETHER] for start in range(0, len(rows), ROWS_TOGETHER))


class Frames:
    """Reads frames from octets that arrive in any portions. The octets of a frame above LIMIT are skipped, not collected."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0  # octets of a frame that is too large, still to come
        self._reported = True  # that frame

    def feed(self, data: bytes) -> Iterator[Frame | Broken]:
        """The frames that `data` completes. Iterate to the end before the next call."""
        self._buffer += data
        while True:
            if self._skip:
                if not self._reported:
                    if len(self._buffer) < _HEAD:
                        return
                    self._reported = True
                    yield _broken(_too_large(self._skip), bytes(self._buffer[:_HEAD]))
                skipped = min(self._skip, len(self._buffer))
                del self._buffer[:skipped]
                self._skip -= skipped
                if self._skip:
                    return
            if len(self._buffer) < _LENGTH.size:
                return
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LIMIT:
                del self._buffer[: _LENGTH.size]
                self._skip, self._reported = length, False
                continue
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _read(body)


def _read(body: bytes) -> Frame | Broken:
    try:
        return _decode(body)
    except (ValueError, RecursionError) as error:
        return _broken(f"this is not a frame of the control protocol: {error}", body[:_HEAD])


def _broken(why: str, head: bytes) -> Broken:
    """`head`: the first octets of the map, whose first key is "id" and whose second may be "op"."""
    if head[1:4] == b"\xa2id":
        for end in (5, 6, 7, 9, 13):  # integers of 0, 1, 2, 4 and 8 octets after their type
            try:
                ident = msgspec.msgpack.decode(head[4:end], type=int)
            except ValueError:
                continue
            return Broken(why, ident, head[end : end + 3] == b"\xa2op")
    return Broken(why, None, False)
