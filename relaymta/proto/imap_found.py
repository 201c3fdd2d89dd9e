"""What SEARCH has found, and how it is told (RFC 9051 6.4.4, 7.3.4; RFC 3501 7.2.5; RFC 4731 3.2; RFC 7162 3.1.5, 3.1.6)."""

from collections.abc import Iterator, Set

from relaymta.proto.imap_records import RECORD_SIZE, formatted, highest, joined, load, numbers, runs, values
from relaymta.proto.imap_view import View

__all__ = ["Found"]

PIECE = 4096  # numbers, or ranges, of a piece of a reply


class Found:
    """The result of a search. `returns`: what RETURN names of MIN, MAX, COUNT, ALL and SAVE, in upper case; empty: ALL."""

    def __init__(self, returns: Set[str] = frozenset()) -> None:
        self._returns = returns or frozenset({"ALL"})
        self._parts: list[bytes] = []

    def add(self, records: bytes) -> None:
        """Messages match: their records, packed. Slices may come in any order."""
        if records:
            self._parts.append(records)

    @property
    def enough(self) -> bool:
        """The reply is known, though not all messages were looked at: to be asked behind each slice of the index, in their
        order."""
        return any(self._parts) and self._returns <= {"MIN", "SAVE"} and "MIN" in self._returns

    def _records(self) -> bytes:
        """All that was found, in order."""
        self._parts = [joined(self._parts)]
        return self._parts[0]

    def uids(self) -> bytes:
        """The UIDs of what is returned or saved, packed: of all, or of the first and the last one (RFC 9051 6.4.4.1)."""
        return load([self._returned()])

    def _returned(self) -> bytes:
        records = self._records()
        if self._returns & {"ALL", "COUNT"} or not self._returns & {"MIN", "MAX"}:
            return records
        first = records[:RECORD_SIZE] if "MIN" in self._returns else b""
        last = records[-RECORD_SIZE:] if "MAX" in self._returns else b""
        return first + last if first != last else first

    def _highest(self) -> int:
        """The highest MODSEQ of what is returned; 0 when nothing is."""
        return highest(self._returned())

    def save(self, view: View) -> None:
        """Do what SAVE asks for."""
        if "SAVE" in self._returns:
            view.saved = self.uids()

    def esearch(self, tag: bytes, view: View, by_uid: bool, by_modseq: bool) -> Iterator[bytes]:
        """The ESEARCH response, in pieces; none with SAVE alone. `by_modseq`: the search has a MODSEQ key."""
        if self._returns == {"SAVE"}:
            return
        all_uids = load([self._records()])
        listed = all_uids if by_uid else numbers(view.uids.data, all_uids)
        yield b'* ESEARCH (TAG "%s")%s' % (tag, b" UID" if by_uid else b"")
        if "MIN" in self._returns and listed:
            yield b" MIN %d" % values(listed[:4])[0]
        if "MAX" in self._returns and listed:
            yield b" MAX %d" % values(listed[-4:])[0]
        if "COUNT" in self._returns:
            yield b" COUNT %d" % (len(listed) // 4)
        if "ALL" in self._returns and listed:
            ranges = runs(listed)
            for at in range(0, len(ranges), 8 * PIECE):
                yield (b"," if at else b" ALL ") + formatted(ranges[at : at + 8 * PIECE])
        if by_modseq and listed:
            yield b" MODSEQ %d" % self._highest()
        yield b"\r\n"

    def search(self, view: View, by_uid: bool, by_modseq: bool) -> Iterator[bytes]:
        """The SEARCH response of IMAP4rev1, in pieces."""
        uids = load([self._records()])
        listed = values(uids if by_uid else numbers(view.uids.data, uids))
        yield b"* SEARCH"
        for at in range(0, len(listed), PIECE):
            yield b"".join([b" %d" % one for one in listed[at : at + PIECE]])
        if by_modseq and listed:
            yield b" (MODSEQ %d)" % self._highest()
        yield b"\r\n"
