"""Exit statuses (sysexits.h), and the error that leads to one."""

__all__ = [
    "CANNOT_CREATE", "CONFIG", "DATA", "IO", "NO_INPUT", "NO_PERMISSION", "OK", "SOFTWARE", "SYSTEM", "TEMPFAIL", "UNAVAILABLE",
    "USAGE", "Stop",
]  # fmt: skip

OK = 0
USAGE = 64
DATA = 65  # the message or an address is refused
NO_INPUT = 66
UNAVAILABLE = 69
SOFTWARE = 70
SYSTEM = 71
CANNOT_CREATE = 73
IO = 74
TEMPFAIL = 75  # nothing was taken: try again later
NO_PERMISSION = 77
CONFIG = 78


class Stop(Exception):
    """The program ends with `status`; str() is the sentence for its user."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
