"""Durations as the configuration and the command line write them: "90s", "10m", "5d"."""

import re

__all__ = ["SECONDS", "parse_duration", "seconds_of"]

SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}  # of a unit
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\Z")
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
