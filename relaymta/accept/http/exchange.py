"""What a worker and its process that renders templates say to each other: frames, a length of four octets (big-endian) and
msgpack.

A worker sends one Job and then each One of it, and gets a Rendered for each, in order. A `wrong` one is the last. Beside that,
on the process's own socket (packets), it says RENDER with the number of a request and its end of that request's socket, or KILL,
and is told ENDED.
"""

import struct

import msgspec

__all__ = ["ENDED", "KILL", "LENGTH", "RENDER", "REQUEST", "Job", "One", "Rendered", "framed"]

LENGTH = struct.Struct(">I")
REQUEST = struct.Struct(">BQ")  # RENDER or KILL, and the number of the request
ENDED = struct.Struct(">Qii")  # its number; the signal that has ended it, 0: none; the template that was being rendered, or -1
RENDER, KILL = 1, 2


class Job(msgspec.Struct, array_like=True, frozen=True):
    """Templates (field of the request, source). `substitutions`: JSON of an object, or b"", as in One; `seconds`: CPU time for
    all of it; `most`: octets of what is rendered for one message; `text`: characters of `text` and of `html`, `value`: of each
    other one."""

    templates: list[tuple[str, str]]
    substitutions: bytes
    seconds: float
    most: int
    text: int = 4 << 20
    value: int = 8000


class One(msgspec.Struct, array_like=True, frozen=True):
    """A message to be rendered. `substitutions`: go before those of the job; `subject`: the template in place of the job's, "":
    there is no template for it."""

    substitutions: bytes
    subject: str | None


class Rendered(msgspec.Struct, array_like=True, frozen=True):
    """Texts by the fields of their templates; or what is `wrong`: the field and the detail. `own`: of this message, not of
    all."""

    texts: dict[str, str]
    wrong: tuple[str, str] | None = None
    own: bool = False


_encode = msgspec.msgpack.Encoder().encode


def framed(value: Job | One | Rendered) -> bytes:
    """A frame."""
    body = _encode(value)
    return LENGTH.pack(len(body)) + body
