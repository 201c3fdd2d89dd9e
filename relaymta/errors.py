"""What can go wrong, by who has to act on it: the operator (ConfigError), the disk (StoreError), another process."""

import errno
import os
from collections.abc import Callable, Iterable

__all__ = ["ConfigError", "RelayError", "SpoolBusy", "StoreError", "StoreFull", "check_all", "store_error"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class RelayError(Exception):
    """Every error of our own; str() is a sentence for a person."""


class ConfigError(RelayError):
    """A wrong configuration. `problems`: one `file:line: key: what` each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Make all these checks; ConfigError with everything that they find."""
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


class SpoolBusy(RelayError):
    """Another process owns the shard."""


class StoreError(RelayError):
    """The spool could not make something durable: 451 4.3.0 to the client, nothing of the group is acknowledged."""


class StoreFull(StoreError):
    """No room: 452 4.3.1 to the client."""


def store_error(failure: BaseException) -> StoreError:
    """What a failed write or sync means to the client: StoreFull where there is no room, else StoreError.

    LMDB's errors carry the system's number as `code`, or only its sentence.
    """
    number = getattr(failure, "errno", None) or getattr(failure, "code", None)
    full = isinstance(failure, StoreFull) or number in _FULL or os.strerror(errno.ENOSPC) in str(failure)
    return StoreFull(str(failure)) if full else StoreError(str(failure))
