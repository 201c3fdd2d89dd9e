"""Names of mailboxes as LIST sees them: INBOX in any case (RFC 9051 5.1), and patterns (6.3.9)."""

import re
import unicodedata

from relaymta.proto.mailbox_name import NAME_MOST

__all__ = ["INBOX", "Pattern", "canonical"]

INBOX = "INBOX"
DELIMITER = "/"

_WILDCARDS = re.compile(r"[*%]{2,}")
_IN_ANY_CASE = re.compile(r"inbox(?:/|\Z)", re.I | re.A)  # of ASCII: to str.upper a dotless i is an I, too


def canonical(name: str) -> str:
    """The name as it is stored: in NFC, and INBOX in upper case, also where other mailboxes lie below it. Linear time."""
    if not name.isascii() and len(name) <= NAME_MOST:  # longer ones cannot be, and normalization is not linear
        name = unicodedata.normalize("NFC", name)
    return INBOX + name[len(INBOX) :] if _IN_ANY_CASE.match(name) else name


def _below_inbox(name: str) -> bool:
    """Whether this is INBOX, or below it."""
    return name.startswith(INBOX) and name[len(INBOX) : len(INBOX) + 1] in ("", DELIMITER)


class Pattern:
    """Patterns of LIST, of which one has to match: `*` is any octets, `%` any within one level. A name is matched in time
    proportional to its length, times that of the patterns divided by 64, whatever they are: all places in the patterns that may
    be reached are bits of one number. Memory: the number of different characters, times that length."""

    __slots__ = ("_any", "_at", "_begin", "_end", "_every", "_exact", "_level")

    def __init__(self, *patterns: str) -> None:
        self._exact: set[str] = set()  # those without wildcards
        self._every = False
        self._at: dict[str, int] = {}  # where in the patterns a character is
        self._any = self._level = 0  # where they have a `*`, and either of the two
        self._begin = self._end = 0
        place = 0
        for given in patterns:
            pattern = _WILDCARDS.sub(lambda run: "*" if "*" in run[0] else "%", canonical(given))
            if "*" not in pattern and "%" not in pattern:
                self._exact.add(pattern)
            elif pattern == "*":
                self._every = True
            elif len(pattern) <= 2 * NAME_MOST + 1:  # else there is no such name
                self._begin |= 1 << place
                for character in pattern:
                    self._place(character, 1 << place)
                    place += 1
                self._end |= 1 << place
                place += 1

    def _place(self, character: str, bit: int) -> None:
        if character == "*":
            self._any |= bit
        if character in "*%":
            self._level |= bit
        else:
            self._at[character] = self._at.get(character, 0) | bit

    def matches(self, name: str) -> bool:
        """Whether one of the patterns matches the name, which is canonical. The INBOX in it is matched in any case."""
        if self._every or name in self._exact:
            return True
        anycase = len(INBOX) if _below_inbox(name) else 0
        places = self._behind_wildcards(self._begin)
        for number, character in enumerate(name):
            if not places:
                return False
            at = self._at.get(character, 0)
            if number < anycase:
                at |= self._at.get(character.lower(), 0)
            stays = self._any if character == DELIMITER else self._level
            places = self._behind_wildcards((places & at) << 1 | (places & stays))
        return bool(places & self._end)

    def _behind_wildcards(self, places: int) -> int:
        """These places, and those behind a wildcard that stands for nothing: two are never side by side."""
        return places | (places & self._level) << 1
