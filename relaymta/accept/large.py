"""A large message: message data that is streamed into a file of its own."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from relaymta.filter.signing import Draft
from relaymta.proto.envelope import Body
from relaymta.queue import BigBody

if TYPE_CHECKING:
    from relaymta.filter.verify import Look

__all__ = ["Large"]

ROOM = 65536  # octets reserved before the message data for fields computed from all of it: DKIM-Signature, Authentication-Results


class Large:
    """A large message while it is received. It is to be signed (`draft`), verified (`look`), or neither. `front`: the fields that
    this relay adds. Called on threads, one at a time: `write` for all message data, then `read`, `finish` or `discard`."""

    def __init__(
        self, make: Callable[[int], BigBody], front: list[bytes], draft: Draft | None = None, look: "Look | None" = None
    ) -> None:
        """`make(room)` creates the file, with `room` octets reserved before what is written."""
        self.draft, self.look = draft, look
        self._make = make
        self._front = front
        self._file: BigBody | None = None

    def write(self, data: list[bytes]) -> None:
        """Append pieces of message data. OSError or StoreError: the file cannot be written."""
        digest = self.draft or self.look
        if self._file is None:
            self._file = self._make(ROOM if digest is not None else 0)
            if digest is None:  # no field will be added before ours
                self._file.write(self._front)
                self._front = []
        self._file.write(data)
        if digest is not None:
            for piece in data:
                digest.body.feed(piece)

    def read(self) -> list[bytes]:
        """The message so far, `front` included, in pieces. It is neither signed nor verified."""
        assert self._file is not None
        return self._file.read()

    def finish(self, fields: bytes) -> Body:
        """Write `fields` before everything else and sync the file. Where the message data lies then."""
        assert self._file is not None
        return self._file.finish([fields, *self._front])

    def discard(self) -> None:
        """The message was not accepted: remove the file."""
        if self._file is not None:
            self._file.discard()
