"""A maildrop as one POP3 session sees it, and a message on its way to the client (RFC 1939 5, 7), without I/O."""

import re
from collections.abc import Callable, Iterator, Sequence

from relaymta._speedups.dots import Stuffer

__all__ = ["Maildrop", "Wanted"]

_EMPTY_LINE = re.compile(rb"\n\r?\n")
SLICE = 1000  # messages in one piece of a listing


class Maildrop:
    """The messages that a mailbox had at login, numbered from 1, and what the session has done with them. A deletion is only a
    mark here. `count`, `octets`: of the messages that are not marked; `retrieved`: the UIDs that RETR has sent."""

    __slots__ = ("_deleted", "_sizes", "_uids", "count", "octets", "retrieved", "uidvalidity")

    def __init__(self, uidvalidity: int, uids: Sequence[int], sizes: Sequence[int]) -> None:
        """`uids`: in ascending order; `sizes`: of these messages, in octets before dot-stuffing. Both are kept, not copied, and
        must not change. ValueError: there are not as many of one as of the other."""
        if len(uids) != len(sizes):
            raise ValueError("each message has a UID and a size")
        self.uidvalidity = uidvalidity
        self._uids, self._sizes = uids, sizes
        self._deleted: set[int] = set()
        self.count, self.octets = len(uids), sum(sizes)
        self.retrieved: set[int] = set()

    def __len__(self) -> int:
        """The number of messages, deleted ones included: the highest message number."""
        return len(self._uids)

    @property
    def deleted(self) -> tuple[int, ...]:
        """The UIDs of the messages that are marked as deleted, in ascending order."""
        return tuple(self._uids[number - 1] for number in sorted(self._deleted))

    def marked(self, number: int) -> bool:
        """Whether a message is marked as deleted."""
        return number in self._deleted

    def uid(self, number: int) -> int:
        """The UID of a message."""
        return self._uids[number - 1]

    def size(self, number: int) -> int:
        """The size of a message in octets, before dot-stuffing."""
        return self._sizes[number - 1]

    def unique_id(self, number: int) -> str:
        """What UIDL says of a message (RFC 1939 7): a mailbox that is made anew has another UIDVALIDITY, and a UID is never used
        again under one, so no other message will ever have it."""
        return f"{self.uidvalidity}.{self._uids[number - 1]}"

    def delete(self, number: int) -> None:
        """Mark a message that is not marked yet."""
        self._deleted.add(number)
        self.count -= 1
        self.octets -= self._sizes[number - 1]

    def reset(self) -> None:
        """Remove all marks."""
        self.count += len(self._deleted)
        self.octets += sum(self._sizes[number - 1] for number in self._deleted)
        self._deleted.clear()

    def scan_listings(self) -> Iterator[bytes]:
        """The lines of LIST, in pieces, with the end of the multi-line reply."""
        return self._listed(lambda number: str(self._sizes[number - 1]))

    def unique_id_listings(self) -> Iterator[bytes]:
        """The lines of UIDL, in pieces, with the end of the multi-line reply."""
        return self._listed(self.unique_id)

    def _listed(self, shown: Callable[[int], str]) -> Iterator[bytes]:
        for start in range(1, len(self) + 1, SLICE):
            numbers = range(start, min(start + SLICE, len(self) + 1))
            yield "".join(f"{number} {shown(number)}\r\n" for number in numbers if number not in self._deleted).encode()
        yield b".\r\n"


class Wanted:
    """The message that RETR or TOP asks for. Its data goes through in pieces, and is dot-stuffed (RFC 1939 3): of any size, in
    memory that does not depend on it. `lines`: of the body, for TOP; None for RETR."""

    __slots__ = ("_before", "_in_header", "_left", "_stuffer", "begun", "lines", "number", "uid")

    def __init__(self, number: int, uid: int, lines: int | None) -> None:
        self.number, self.uid, self.lines = number, uid, lines
        self.begun = False
        self._stuffer = Stuffer()
        self._in_header = True  # TOP is before the empty line
        self._before = b"\n"  # the last octets of the header so far, with which an empty line may begin
        self._left = lines or 0  # lines of the body that TOP still has to send

    @property
    def enough(self) -> bool:
        """TOP has sent all that it is to send: the rest of the message need not be read."""
        return self.lines is not None and not self._in_header and self._left == 0

    def feed(self, data: bytes) -> bytes:
        """The octets to write for the next piece of the message data."""
        if self.lines is not None:
            data = data[: self._end_of_top(data)]
        return self._stuffer.feed(data)

    def end(self) -> bytes:
        """The end of the multi-line reply, with a CRLF before it if the data did not end in one."""
        return self._stuffer.end()

    def _end_of_top(self, data: bytes) -> int:
        """How many octets of the next piece TOP sends. A line ends at LF here, as most clients read it."""
        at = self._end_of_header(data) if self._in_header else 0
        if self._in_header:
            return len(data)
        lines = data.count(b"\n", at)
        if lines < self._left:
            self._left -= lines
            return len(data)
        for _ in range(self._left):
            at = data.index(b"\n", at) + 1
        self._left = 0
        return at

    def _end_of_header(self, data: bytes) -> int:
        """The position behind the empty line; the end of the piece while there was none."""
        joined = self._before + data
        empty = _EMPTY_LINE.search(joined)
        if empty is None:
            self._before = joined[-2:]
            return len(data)
        self._in_header = False
        return empty.end() - len(self._before)
