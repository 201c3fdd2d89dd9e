"""Message ids: 64 bits, ordered by time, with the shard's number, never used again; printed as 13 Crockford base32 digits."""

from functools import lru_cache

__all__ = ["SEQUENCE_BITS", "SHARD_BITS", "format_id", "parse_id", "shard_of", "stamp_of"]

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_VALUES = {digit: value for value, digit in enumerate(_DIGITS)} | {"I": 1, "L": 1, "O": 0}
_PAIRS = [a + b for a in _DIGITS for b in _DIGITS]

SHARD_BITS = 8
SEQUENCE_BITS = 12


@lru_cache(16384)
def format_id(ident: int) -> str:
    """An id as it is printed."""
    return (
        _DIGITS[ident >> 60]
        + _PAIRS[(ident >> 50) & 1023]
        + _PAIRS[(ident >> 40) & 1023]
        + _PAIRS[(ident >> 30) & 1023]
        + _PAIRS[(ident >> 20) & 1023]
        + _PAIRS[(ident >> 10) & 1023]
        + _PAIRS[ident & 1023]
    )


def parse_id(text: str) -> int:
    """The id that `text` prints (any case; I, L and O are read as 1, 1 and 0). ValueError when it is none."""
    ident = 0
    if len(text) != 13:
        raise ValueError(f"not a message id: {text!r} (13 characters, such as {format_id(1 << 60)})")
    for digit in text.upper():
        if digit not in _VALUES:
            raise ValueError(f"not a message id: {text!r} ({digit!r} is no Crockford base32 digit)")
        ident = ident << 5 | _VALUES[digit]
    if ident >> 64:
        raise ValueError(f"not a message id: {text!r} (too large)")
    return ident


def shard_of(ident: int) -> int:
    """The shard in which a message was accepted."""
    return ident >> SEQUENCE_BITS & ((1 << SHARD_BITS) - 1)


def stamp_of(ident: int) -> int:
    """The time at which an id was made: ms of the clock of its shard."""
    return ident >> SEQUENCE_BITS + SHARD_BITS
