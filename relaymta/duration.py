"""Durations and sizes as the configuration and the command line write them: "90s", "10m", "5d"; "50MB", "5G"."""

import re

__all__ = ["SECONDS", "parse_duration", "parse_size", "seconds_of"]

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}  # of a unit
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\Z")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMG]?)i?[bB]?\Z")
_OCTETS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LONGEST = 36500 * 86400.0  # seconds of a duration: a time plus this can still be stored and shown


def seconds_of(value: object) -> object:
    """The seconds of a duration that is a text; any other value as it is. ValueError says what is expected."""
    if isinstance(value, str):
        match = _DURATION.match(value.strip())
        if match is None:
            raise ValueError('a duration such as "90s", "10m", "5d"')
        value = float(match[1]) * SECONDS[match[2]]
    if isinstance(value, int | float) and value > _LONGEST:
        raise ValueError('a duration of at most "36500d"')
    return value


def parse_duration(text: str) -> float:
    """Seconds of a duration such as "90s", "10m", "5d", at most a hundred years. ValueError says what is expected."""
    return float(seconds_of(text))  # type: ignore[arg-type]


def parse_size(text: str) -> int:
    """Octets of a size such as "50MB". ValueError says what is expected."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError('a size such as "50MB"')
    return int(float(match[1]) * _OCTETS[match[2]])
