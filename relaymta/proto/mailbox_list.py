"""Names of mailboxes as LIST sees them: INBOX in any case (RFC 9051 5.1), and patterns (6.3.9)."""

import re
import unicodedata

from relaymta.proto.mailbox_name import NAME_MOST

__all__ = ["INBOX", "Pattern", "canonical"]

INBOX = "INBOX"
DELIMITER = "/"

_WILDCARDS = re.compile(r"[*%]{2,}")


def canonical(name: str) -> str:
    """The name as it is stored: in NFC, and INBOX in upper case, also where other mailboxes lie below it. Linear time."""
    if not name.isascii() and len(name) <= NAME_MOST:  # longer ones cannot be, and normalization is not linear
        name = unicodedata.normalize("NFC", name)
    return INBOX + name[len(INBOX) :] if _below_inbox(name[: len(INBOX) + 1].upper()) else name


def _below_inbox(name: str) -> bool:
    """Whether this is INBOX, or below it."""
    return name.startswith(INBOX) and name[len(INBOX) : len(INBOX) + 1] in ("", DELIMITER)


class Pattern:
    """A pattern of LIST: `*` is any octets, `%` any within one level. A name is matched in time proportional to its length, times
    that of the pattern divided by 64, whatever the two are: all places in the pattern that may be reached are bits of one
    number."""

    __slots__ = ("_any", "_at", "_empty", "_end", "_exact", "_level")

    def __init__(self, pattern: str) -> None:
        pattern = _WILDCARDS.sub(lambda run: "*" if "*" in run[0] else "%", canonical(pattern))
        self._exact = pattern if "*" not in pattern and "%" not in pattern else None
        self._empty = len(pattern) > 2 * NAME_MOST + 1  # there is no such name
        self._at: dict[str, int] = {}  # where in the pattern a character is
        self._any = self._level = 0  # where it has a `*`, and either of the two
        self._end = 1 << len(pattern)
        for place, character in enumerate("" if self._empty else pattern):
            if character == "*":
                self._any |= 1 << place
            if character in "*%":
                self._level |= 1 << place
            else:
                self._at[character] = self._at.get(character, 0) | 1 << place

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the name, which is canonical. The INBOX in it is matched in any case."""
        if self._exact is not None:
            return name == self._exact
        if self._empty:
            return False
        if self._any == 1 and self._end == 2:
            return True
        anycase = len(INBOX) if _below_inbox(name) else 0
        places = self._behind_wildcards(1)
        for number, character in enumerate(name):
            at = self._at.get(character, 0)
            if number < anycase:
                at |= self._at.get(character.lower(), 0)
            stays = self._any if character == DELIMITER else self._level
            places = self._behind_wildcards((places & at) << 1 | (places & stays))
            if not places:
                return False
        return bool(places & self._end)

    def _behind_wildcards(self, places: int) -> int:
        """These places, and those behind a wildcard that stands for nothing: two are never side by side."""
        return places | (places & self._level) << 1
