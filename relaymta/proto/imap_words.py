"""The words of an IMAP command, read one after another (RFC 9051 9): atoms, strings, numbers, sequence sets, dates, flags, names.

Each method takes what it is named after and raises `Refused` when something else is there. `what`: its name in that error."""

import datetime
import re
from functools import lru_cache
from typing import Final, NoReturn

from relaymta.proto import mailbox_name
from relaymta.proto.imap_command import STAR, Numbers
from relaymta.proto.mailbox_list import canonical

__all__ = ["NUMBER_MOST", "TAG_MOST", "Refused", "Words"]

# Kinds of words, see _speedups/imap.py
WORD: Final = ord("a")
QUOTED: Final = ord('"')
LITERAL: Final = ord("{")
STREAMED: Final = ord("=")
SPACE: Final = ord(" ")
OPEN: Final = ord("(")
CLOSE: Final = ord(")")
END: Final = 0

NUMBER_MOST: Final = 0xFFFFFFFF
MODSEQ_MOST: Final = 0x7FFFFFFFFFFFFFFF  # 63 bits (RFC 7162 7)
TAG_MOST: Final = 64
SHORT: Final = 10  # digits of which a number with fewer is below NUMBER_MOST
FLAG_MOST: Final = 255
SHOWN: Final = 40  # octets of a word in an error
KNOWN: Final = 32  # octets of a keyword that is remembered: all that mean something are shorter
KNOWN_NAME: Final = 100  # octets of the name of a mailbox that is remembered

_ATOM = re.compile(rb"[!#$&'+,\-./0-9:;<=>?@A-Z\[^_`a-z|}~]+")
_ASTRING = re.compile(rb"[!#$&'+,\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+")
_TAG = re.compile(rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]{1,%d}" % TAG_MOST)
_PATTERN = re.compile(rb"[!#$%&'*+,\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+")
_NUMBERS = re.compile(
    rb"(?:[1-9][0-9]{0,9}|\*)(?>(?::(?:[1-9][0-9]{0,9}|\*))?)(?>(?:,(?:[1-9][0-9]{0,9}|\*)(?>(?::(?:[1-9][0-9]{0,9}|\*))?))*)"
)
_DATE = re.compile(rb"([0-9]{1,2})-([A-Za-z]{3})-([0-9]{4})")
_TIME = re.compile(rb"([ 0-9][0-9])-([A-Za-z]{3})-([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) ([+-])([0-9]{2})([0-9]{2})")
_MONTHS = {name: number for number, name in enumerate(b"jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_SYSTEM_FLAGS = {name.lower(): name for name in ("\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft")}
_EPOCH = datetime.datetime(1970, 1, 1)


class Refused(Exception):
    """A command is refused: `status` BAD or NO, `code` (a response code without brackets, b"" for none), `text`."""

    def __init__(self, text: str, status: str = "BAD", code: bytes = b"") -> None:
        super().__init__(text)
        self.text = text
        self.status = status
        self.code = code


class Words:
    """A command, read from its first word. `utf8`: names of mailboxes are UTF-8, else modified UTF-7; `accept`: UTF8=ACCEPT is
    enabled; `qresync`: QRESYNC is."""

    __slots__ = ("accept", "at", "count", "kinds", "qresync", "utf8", "values")

    def __init__(
        self, kinds: bytes, values: list[bytes], utf8: bool = False, accept: bool = False, qresync: bool = False
    ) -> None:
        self.kinds = kinds + b"\0"
        self.values = values
        self.at = 0
        self.utf8 = utf8
        self.accept = accept
        self.qresync = qresync
        self.count = 0  # of search keys

    def expected(self, what: str) -> NoReturn:
        """There is something else than `what`."""
        raise Refused(f"expected {what} {self._place()}")

    def _place(self) -> str:
        kind = self.kinds[self.at]
        if kind == END:
            return "at the end"
        if kind in b" ()":
            return f'at "{chr(kind)}"'
        if kind == STREAMED:
            return "at the message"
        text = self.values[self.at][:SHOWN].decode("ascii", "backslashreplace")
        return f'at "{"".join(one if one.isprintable() else "?" for one in text)}"'

    def reject(self, text: str) -> NoReturn:
        """The word before is wrong: `text` says why."""
        self.at -= 1
        raise Refused(f"{text} {self._place()}")

    # What is between words

    def take(self, kind: int) -> bool:
        """Take a word of this kind, if one is there."""
        if self.kinds[self.at] != kind:
            return False
        self.at += 1
        return True

    def space(self) -> None:
        """A blank."""
        if self.kinds[self.at] != SPACE:
            self.expected("a space")
        self.at += 1

    def open(self) -> None:
        """An opening parenthesis."""
        if not self.take(OPEN):
            self.expected('"("')

    def close(self) -> None:
        """A closing parenthesis."""
        if not self.take(CLOSE):
            self.expected('")"')

    def end(self) -> None:
        """The end of the command."""
        if self.kinds[self.at] != END:
            self.expected("the end of the command")

    def more(self) -> bool:
        """Take the blank before another element of a list in parentheses, or the parenthesis that ends it."""
        if self.take(CLOSE):
            return False
        self.space()
        return True

    # Words

    def _match(self, form: re.Pattern[bytes], what: str) -> bytes:
        value = self.values[self.at] if self.kinds[self.at] == WORD else b""
        if not form.fullmatch(value):
            self.expected(what)
        self.at += 1
        return value

    def atom(self, what: str) -> str:
        """An atom."""
        return self._match(_ATOM, what).decode()

    def keyword(self, what: str) -> str:
        """An atom, in upper case."""
        if self.kinds[self.at] != WORD or len(self.values[self.at]) > KNOWN:
            return self._match(_ATOM, what).decode().upper()
        found = _keyword(self.values[self.at])
        if not found:
            self.expected(what)
        self.at += 1
        return found

    def tag(self) -> str:
        """The tag of a command: of printable ASCII, without "+" (RFC 9051 9)."""
        if self.kinds[0] == WORD and not self.at and _TAG.fullmatch(self.values[0]):
            self.at = 1
            return self.values[0].decode()
        value = self._match(_ASTRING, "a tag")
        if b"+" in value:
            self.reject('expected a tag without "+"')
        if len(value) > TAG_MOST:
            self.reject(f"expected a tag of at most {TAG_MOST} octets")
        return value.decode()

    def string(self, what: str) -> bytes:
        """A quoted string or a literal."""
        if self.kinds[self.at] not in (QUOTED, LITERAL):
            self.expected(what)
        self.at += 1
        value = self.values[self.at - 1]
        if b"\0" in value:
            raise Refused(f"NUL in {what}")
        return value

    def astring(self, what: str) -> bytes:
        """An atom or a string."""
        return self._match(_ASTRING, what) if self.kinds[self.at] == WORD else self.string(what)

    def nstring(self, what: str) -> bytes | None:
        """A string, or NIL."""
        if self.kinds[self.at] == WORD and self.values[self.at].upper() == b"NIL":
            self.at += 1
            return None
        return self.string(what)

    def text(self, what: str) -> str:
        """An atom or a string, in UTF-8."""
        return self.decoded(self.astring(what), what)

    def decoded(self, value: bytes, what: str) -> str:
        """The value, which is UTF-8."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{what} is not UTF-8") from None

    # Numbers

    def number(self, what: str, most: int = NUMBER_MOST, least: int = 0) -> int:
        """A number up to `most`."""
        value = self.values[self.at] if self.kinds[self.at] == WORD else b""
        if not value.isdigit() or len(value) > 20 or not least <= int(value) <= most:
            self.expected(what)
        self.at += 1
        return int(value)

    def modseq(self) -> int:
        """A mod-sequence, or 0 (RFC 7162 7)."""
        return self.number("a mod-sequence", MODSEQ_MOST)

    def numbers(self, saved: bool = True) -> Numbers:
        """A sequence set; `saved`: or `$`. Time as of a sort of the ranges."""
        value = self.values[self.at] if self.kinds[self.at] == WORD else b""
        if value == b"$" and saved:
            self.at += 1
            return Numbers((), saved=True)
        if len(value) < SHORT and value.isdigit() and value[:1] != b"0":  # most are one number
            self.at += 1
            number = int(value)
            return Numbers(((number, number),))
        if not _NUMBERS.fullmatch(value):
            self.expected("a sequence set")
        self.at += 1
        found = _numbers(value)
        if found is None:
            self.reject(f"expected numbers up to {NUMBER_MOST}")
        return found

    def uids(self) -> Numbers:
        """A set of UIDs without `*` and `$` (known-uids of RFC 7162 7)."""
        if self.kinds[self.at] == WORD and b"*" in self.values[self.at]:
            self.expected('a set of numbers without "*"')
        return self.numbers(saved=False)

    # Dates

    def date(self) -> datetime.date:
        """A date, quoted or not."""
        value = self.values[self.at] if self.kinds[self.at] in (WORD, QUOTED) else b""
        match = _DATE.fullmatch(value)
        if match is None:
            self.expected("a date (1-Feb-1994)")
        self.at += 1
        try:
            return datetime.date(int(match[3]), _MONTHS.get(match[2].lower(), 0), int(match[1]))
        except ValueError:
            self.reject("expected a date that exists")

    def date_time(self) -> int:
        """A date and time with a zone, quoted, in seconds since 1970."""
        match = _TIME.fullmatch(self.values[self.at]) if self.kinds[self.at] == QUOTED else None
        if match is None:
            self.expected('a date and time ("01-Feb-1994 21:52:25 -0800")')
        self.at += 1
        day, month, year, hour, minute, second, sign, hours, minutes = match.groups()
        try:  # a leap second is the second before it
            local = datetime.datetime(
                int(year), _MONTHS.get(month.lower(), 0), int(day), int(hour), int(minute), min(int(second), 59)
            )
        except ValueError:
            self.reject("expected a date and time that exist")
        offset = 3600 * int(hours) + 60 * int(minutes)
        if int(minutes) > 59 or int(second) > 60:
            self.reject("expected a date and time that exist")
        past = local - _EPOCH
        return past.days * 86400 + past.seconds - (-offset if sign == b"-" else offset)

    # Flags and names

    def flag(self) -> str:
        """A flag or keyword, but not \\Recent, which no client can change (RFC 3501 9)."""
        value = self.values[self.at] if self.kinds[self.at] == WORD else b""
        if not _ATOM.fullmatch(value.removeprefix(b"\\")) or value.lower() == b"\\recent":
            self.expected("a flag")
        if len(value) > FLAG_MOST:
            raise Refused(f"a flag has more than {FLAG_MOST} octets", "NO", b"LIMIT")
        self.at += 1
        name = value.decode()
        return _SYSTEM_FLAGS.get(name.lower(), name)

    def flags(self) -> tuple[str, ...]:
        """Flags in parentheses, each once."""
        self.open()
        if self.take(CLOSE):
            return ()
        found = {self.flag(): None}
        while self.more():
            found[self.flag()] = None
        return tuple(found)

    def mailbox(self) -> str:
        """The name of a mailbox. Refused with NO where it is malformed in the encoding of the session."""
        return canonical(self.named())

    def named(self) -> str:
        """The name of a mailbox as the client wrote it, decoded."""
        return self._name(self.astring("the name of a mailbox"))

    def pattern(self) -> str:
        """A pattern of LIST, decoded; as it is where that is not possible: it matches no name then."""
        what = "a pattern"
        value = self._match(_PATTERN, what) if self.kinds[self.at] == WORD else self.string(what)
        try:
            return self._name(value)
        except Refused:
            return value.decode("latin-1")

    def _name(self, value: bytes) -> str:
        try:
            return (_known_name if len(value) <= KNOWN_NAME else _decoded_name)(value, self.utf8)
        except ValueError:
            how = "UTF-8" if self.utf8 else "modified UTF-7 (RFC 3501 5.1.3)"
            raise Refused(f"the name is not {how}", "NO", b"CANNOT") from None


def _decoded_name(value: bytes, utf8: bool) -> str:
    """The name of a mailbox. ValueError."""
    return value.decode("utf-8") if utf8 else mailbox_name.decode(value.decode("ascii"))


_known_name = lru_cache(512)(_decoded_name)


@lru_cache(512)
def _keyword(value: bytes) -> str:
    """A word in upper case; "" where it is no atom."""
    return value.decode().upper() if _ATOM.fullmatch(value) else ""


def _numbers(value: bytes) -> Numbers | None:
    """A sequence set, in order; None: a number in it is too large."""
    ranges: list[tuple[int, int]] = []
    stars: list[int] = []
    for part in value.split(b","):
        low, _, high = part.partition(b":")
        if b"*" in part:
            number = high if low == b"*" else low
            stars.append(STAR if number in (b"", b"*") else int(number))
            continue
        one, other = int(low), int(high or low)
        ranges.append((one, other) if one <= other else (other, one))
    if max((*stars, *(high for _, high in ranges))) > NUMBER_MOST:
        return None
    return Numbers(_merged(ranges), min(stars, default=None))


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    if len(ranges) < 2:
        return tuple(ranges)
    ranges.sort()
    found = [ranges[0]]
    for low, high in ranges:
        first, last = found[-1]
        if low <= last + 1:
            found[-1] = (first, max(last, high))
        else:
            found.append((low, high))
    return tuple(found)
