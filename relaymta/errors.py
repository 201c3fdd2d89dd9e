"""The exceptions, by what has to be corrected: the configuration (ConfigError), the disk (StoreError), another process
(SpoolBusy)."""

import errno
import os
import re
from collections.abc import Callable, Iterable

__all__ = [
    "DNS", "NETWORK", "OUT_OF_DESCRIPTORS", "PEER", "SCARCE", "US", "ConfigError", "Exists", "Failure", "NoSuch", "RelayError",
    "SpoolBusy", "StoreError", "StoreFull", "check_all", "is_scarce", "near", "redacted", "store_error", "told", "without",
]  # fmt: skip

_FULL = (errno.ENOSPC, errno.EDQUOT)
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # errors that end when descriptors or memory are free again
LONGEST = 1000  # characters of a cause that are kept
US, PEER, NETWORK, DNS = "us", "peer", "network", "dns"  # whose fault it is; `us`: this machine or its configuration

_ENCODED = re.compile(r"[A-Za-z0-9+/]{8,}")  # octets in base64: six, which are much of a password

# What is removed from a cause: userinfo and query of a URL, tokens, and values whose names mean that they are secret.
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
    """Base of our errors; str() is a message for operators. `absent`: it says that what it is about does not exist, or does
    so already where it was to be made."""

    absent = False


class NoSuch(RelayError):
    """What was asked about does not exist. str(): `no such KIND: NAME`, with the name among `known` that is like it."""

    absent = True

    def __init__(self, kind: str, name: str, known: Iterable[str] = ()) -> None:
        super().__init__(f"no such {kind}: {name}{near(name, known)}")


class Exists(RelayError):
    """What was to be made is there already."""

    absent = True


def near(word: str, known: Iterable[str]) -> str:
    """` (did you mean "..."?)`, or nothing."""
    from difflib import get_close_matches  # imported when something is wrong

    found = get_close_matches(word, list(known), 1, 0.6)
    return f' (did you mean "{found[0]}"?)' if found else ""


class Failure(RelayError):
    """A failure on a message's way, from connecting to the DSN. `public`: the sentence for outsiders (peers and senders), in
    replies and DSNs; it has no path, URL or internal error. `cause`: what operators read, in the log and `explain`, without
    secrets; "" where it is the same. str(): the cause, else the sentence. `fault`: whose it is (US, PEER, NETWORK or DNS).
    `category`: the cause for programs, one of `proto.envelope.CATEGORIES`; "" where it follows from the reply and its phase."""

    def __init__(self, public: str, cause: str = "", fault: str = US, category: str = "") -> None:
        self.public = public
        self.cause = redacted(cause)
        self.fault = fault
        self.category = category
        super().__init__(self.cause or self.public)


OUT_OF_DESCRIPTORS = "this host has no file descriptor left"


def is_scarce(error: BaseException | None) -> bool:
    """Whether an exception, or what has caused it, is that this machine has no descriptor or no memory left: it says nothing of
    the file, host or peer that was to be opened."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in SCARCE:
            return True
        error = error.__cause__ or error.__context__
    return False


def redacted(text: str) -> str:
    """A text, LONGEST characters at most, without passwords, tokens, and userinfo and query of URLs."""
    text = text[:LONGEST]
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return text


def without(text: str, secrets: Iterable[str]) -> str:
    """A text in which these secrets, which somebody else may have quoted, are `***`, and so are parts of them that could be
    decoded."""
    longest_first = sorted(filter(None, secrets), key=len, reverse=True)
    for secret in longest_first:
        text = text.replace(secret, "***")
    folded = [secret.lower() for secret in longest_first]
    return _ENCODED.sub(lambda run: "***" if any(run[0].lower() in secret for secret in folded) else run[0], text)


def told(why: str | Exception) -> tuple[str, str]:
    """(public text, cause for operators where it differs, else "") of a text of ours, which is public, or of an exception, which
    is "internal error" to the public unless it is a Failure."""
    if isinstance(why, str):
        return why, ""
    if isinstance(why, Failure):
        return why.public, why.cause
    return "internal error", redacted(f"{type(why).__name__}: {why}")


class ConfigError(RelayError):
    """An invalid configuration. `problems`: one `file:line: key: what` each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks; ConfigError with all their problems."""
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
    """The spool could not make a group of changes durable. None of its messages is acknowledged; their clients get 451 4.3.0."""


class StoreFull(StoreError):
    """The disk or the LMDB map is full: clients get 452 4.3.1."""


def store_error(failure: BaseException) -> StoreError:
    """The error for a failed write, sync or commit: StoreFull when the disk is full, else StoreError.

    An error of LMDB has the errno as `code`, or only its text.
    """
    number = getattr(failure, "errno", None) or getattr(failure, "code", None)
    full = isinstance(failure, StoreFull) or number in _FULL or os.strerror(errno.ENOSPC) in str(failure)
    return StoreFull(str(failure)) if full else StoreError(str(failure))
