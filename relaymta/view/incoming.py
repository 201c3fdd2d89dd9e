"""The messages of an APPEND while they come: small ones in memory, large ones in files (disk/big.py), until they are filed.

Each file holds a place among the descriptors while it is written, and is gone with `discard`, which is called at every end:
filed, refused, or the client gone. Files are written on threads, one write at a time.
"""

from collections.abc import Callable

from relaymta.disk.big import BigBody, BigFile
from relaymta.errors import store_error
from relaymta.proto.imap_command import Append
from relaymta.proto.imap_view import SYSTEM_FLAGS
from relaymta.reservation import Reservation
from relaymta.store.asked import Message

__all__ = ["SYSTEM", "Incoming"]

SYSTEM = {name.decode(): 1 << bit for bit, name in enumerate(SYSTEM_FLAGS)}  # bits of system flags
IN_MEMORY = 256 << 10  # octets of a message that is kept in memory,
ALL_IN_MEMORY = 1 << 20  # and of all messages of one APPEND


class Incoming:
    """The messages of one APPEND. `make()`: a new file for one, with the place of its descriptor; None: none is left."""

    __slots__ = ("_announced", "_file", "_files", "_kept", "_make", "_pieces", "messages", "octets")

    def __init__(self, make: Callable[[], tuple[BigBody, Reservation] | None]) -> None:
        self._make = make
        self._announced: Append | None = None
        self._file: BigBody | None = None  # of the message that comes
        self._files: list[tuple[BigBody, Reservation]] = []
        self._pieces: list[bytes] = []  # of it, not written yet
        self._kept = 0  # octets in memory of those that have come
        self.messages: list[Message] = []
        self.octets = 0  # announced in all

    def begin(self, announced: Append) -> bool:
        """A message is announced; whether there is room for it. Blocks where it gets a file. OSError."""
        self._announced = announced
        self.octets += announced.octets
        if announced.octets <= IN_MEMORY and self._kept + announced.octets <= ALL_IN_MEMORY:
            self._kept += announced.octets
            return True
        made = self._make()
        if made is None:
            return False
        self._files.append(made)
        self._file = made[0]
        return True

    def take(self, pieces: list[bytes]) -> bool:
        """Octets of it have come. Whether `write` is to be called."""
        self._pieces += pieces
        return self._file is not None and bool(pieces)

    def write(self) -> None:
        """Thread: write to the file what has come. StoreError."""
        pieces, self._pieces = self._pieces, []
        assert self._file is not None
        try:
            self._file.write(pieces)
        except OSError as error:
            raise store_error(error) from None

    def end(self) -> None:
        """Thread where there is a file: all of the message has come. StoreError."""
        announced, self._announced = self._announced, None
        assert announced is not None
        data: bytes | BigFile
        if self._file is None:
            data = b"".join(self._pieces)
        else:
            file, self._file = self._file, None
            try:
                file.write(self._pieces)
                data = BigFile(str(file.path), file.ident, file.finish([]))
            except OSError as error:
                raise store_error(error) from None
        self._pieces = []
        flags = sum(SYSTEM.get(flag, 0) for flag in announced.flags)
        keywords = [flag for flag in announced.flags if flag not in SYSTEM]
        date = 0 if announced.date is None else announced.date * 1000 or 1
        self.messages.append(Message(data, flags, keywords, date))

    def written(self) -> None:
        """On the loop, behind `write` and `end`: a file that is complete needs no descriptor any more."""
        if self._file is None and self._files:
            self._files[-1][1].give_back()

    @property
    def in_file(self) -> bool:
        """Whether the message that comes is written to a file."""
        return self._file is not None

    def discard(self) -> None:
        """Remove the files. Nothing is called after it, and no thread writes."""
        files, self._files = self._files, []
        for file, place in files:
            file.discard()
            place.give_back()
        self.messages, self._pieces, self._file = [], [], None
