"""What can go wrong, by who has to act on it: the operator (ConfigError), the disk (StoreError), another process."""

import errno
import os
import re
from collections.abc import Callable, Iterable

__all__ = [
    "ConfigError", "Failure", "RelayError", "SpoolBusy", "StoreError", "StoreFull", "check_all", "redacted", "store_error", "told"
]  # fmt: skip

_FULL = (errno.ENOSPC, errno.EDQUOT)
LONGEST = 1000  # characters of a cause that are kept

# What is hidden of a cause: userinfo and query of a URL, tokens, and values whose names say that they are secret.
_SECRETS = (
    (re.compile(r"""://[^\s?#"'<>]*@"""), "://***@"),
    (re.compile(r"""(://[^\s?#"'<>]*)[?#](?:[^\s"'<>]*([:,;.)])(?=\s|\Z)|[^\s"'<>]*)"""), r"\1?***\2"),
    (re.compile(r"""\b(bearer|authorization:\s*\w+)\s+[^\s"',;]{6,}""", re.I), r"\1 ***"),
    (re.compile(r"\beyJ[\w-]{6,}\.[\w.-]+"), "***"),
    (
        re.compile(
            r"""\b(pass(?:word|wd|phrase)?|pwd|(?:client_?)?secret|(?:access_|refresh_|id_)?token|api_?key|assertion)"""
            r"""(\s*=\s*|["']\s*[:=]\s*)(["']?)[^\s"'&,;]+""", re.I,
        ),
        r"\1\2\3***",
    ),
)  # fmt: skip


class RelayError(Exception):
    """Every error of our own; str() is a sentence for a person."""


class Failure(RelayError):
    """Why something did not work, in two texts. `public`: what a peer or a sender may read, in a reply or in a DSN: no path, URL,
    or error of the inside. str(): the cause, for the log, `explain` and whoever runs the relay, without secrets; `inside` is
    that where it says more than `public`, "" otherwise."""

    def __init__(self, public: str, inside: str = "") -> None:
        self.public = public
        self.inside = redacted(inside)
        super().__init__(self.inside or self.public)


def redacted(text: str) -> str:
    """A text without what it would be wrong to show even to operators: passwords, tokens, userinfo and query of URLs."""
    text = text[:LONGEST]
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return text


def told(why: str | Exception) -> tuple[str, str]:
    """(What a peer or sender may read, what operators may read beyond that, "" for nothing) of a text of ours, which is public,
    or of an error, which is not unless it is a Failure."""
    if isinstance(why, str):
        return why, ""
    if isinstance(why, Failure):
        return why.public, why.inside
    return "internal error", redacted(f"{type(why).__name__}: {why}")


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
