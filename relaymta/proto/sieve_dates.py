"""Parts of a date and time (RFC 5260 4.2), and dates in fields."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, timezone
from email.utils import parsedate_tz
from typing import Final

__all__ = ["date_in", "date_part", "now", "shifted"]

DATE_MOST = 200  # octets of a field in which a date is looked for: the last ones
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MJD = datetime(1858, 11, 17).toordinal()


def date_in(value: bytes) -> datetime | None:
    """The date that a field is, or that is behind its last semicolon (RFC 5322 3.3, 4.3), in its own time zone; None: there is
    none, or the calendar does not have it."""
    text = value.rpartition(b";")[2][-DATE_MOST:].decode("ascii", "replace")
    try:
        found = parsedate_tz(text)
        if found is None:
            return None
        year, month, day, hour, minute, second = found[:6]
        zone = timezone(timedelta(seconds=found[9] or 0))
        return datetime(year, month, day, hour, minute, min(second, 59) if second == 60 else second, tzinfo=zone)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def shifted(moment: datetime, minutes: int) -> datetime:
    """The same moment in the time zone with this offset. OverflowError: it is beyond the years that there are."""
    return moment.astimezone(timezone(timedelta(minutes=minutes)))


def _zone(moment: datetime) -> str:
    minutes = round((moment.utcoffset() or timedelta()).total_seconds()) // 60
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02}{abs(minutes) % 60:02}"


def _iso8601(moment: datetime) -> str:
    zone = _zone(moment)
    shown = "Z" if zone == "+0000" else f"{zone[:3]}:{zone[3:]}"
    return f"{_date(moment)}T{_time(moment)}{shown}"


def _std11(moment: datetime) -> str:
    day, month = _DAYS[moment.weekday()], _MONTHS[moment.month - 1]
    return f"{day}, {moment.day:02} {month} {moment.year:04} {_time(moment)} {_zone(moment)}"


def _date(moment: datetime) -> str:
    return f"{moment.year:04}-{moment.month:02}-{moment.day:02}"


def _time(moment: datetime) -> str:
    return f"{moment.hour:02}:{moment.minute:02}:{moment.second:02}"


_PARTS: Final[Mapping[str, Callable[[datetime], str]]] = {
    "year": lambda moment: f"{moment.year:04}",
    "month": lambda moment: f"{moment.month:02}",
    "day": lambda moment: f"{moment.day:02}",
    "date": _date,
    "julian": lambda moment: str(moment.toordinal() - _MJD),
    "hour": lambda moment: f"{moment.hour:02}",
    "minute": lambda moment: f"{moment.minute:02}",
    "second": lambda moment: f"{moment.second:02}",
    "time": _time,
    "iso8601": _iso8601,
    "std11": _std11,
    "zone": _zone,
    "weekday": lambda moment: str(moment.isoweekday() % 7),
}


def date_part(moment: datetime, part: bytes) -> bytes | None:
    """A part of a date in its time zone; None: there is no part of this name."""
    made = _PARTS.get(part.decode("ascii", "replace").lower())
    return None if made is None else made(moment).encode()


def now(seconds: int) -> datetime:
    """The moment so many seconds after 1970, in UTC."""
    return datetime.fromtimestamp(seconds, UTC)
