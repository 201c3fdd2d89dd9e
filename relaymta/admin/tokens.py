"""Tokens of the HTTP API: what each may do, and the file of their hashes. A token has 256 random bits, so SHA-256 is all the hash
it needs; the file does not tell it."""

import base64
import hashlib
import hmac
import secrets
import threading
import time
from pathlib import Path
from typing import Annotated

import msgspec

from relaymta.errors import ConfigError
from relaymta.files import read_octets
from relaymta.watch import Watched

__all__ = ["SCOPES", "Token", "Tokens", "expanded", "fresh", "hashed", "read_tokens", "written"]

PREFIX = "relaymta_"  # so that programs that look for leaked secrets know it
OCTETS = 32
LONGEST = 1 << 20  # octets of the file

# What each scope allows. `read`: all that end so; `all`: everything.
SCOPES = {
    "queue:read": "queues and messages: envelope, schedule, replies, history",
    "queue:write": "flush, hold, release, delete, bounce and reroute messages",
    "message:read": "header and message data",
    "quarantine:read": "messages in the quarantine, with their Subjects",
    "quarantine:write": "release and delete them",
    "site:read": "sites, their limits, and what was decided and learned about them",
    "site:write": "suspend and resume sites, clear decisions",
    "policy:read": "hold and bounce policies",
    "policy:write": "set and remove them",
    "abuse:read": "accounts that are not as usual",
    "abuse:write": "end what was found about them",
    "suppression:read": "the suppression list: recipients to whom no mail is to be sent",
    "suppression:write": "add and remove them",
    "metrics:read": "status of the processes, readiness, rates, latencies",
    "config:write": "reload the configuration",
}

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"\A[A-Za-z0-9][A-Za-z0-9 _.@-]*\Z")]


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the file. `hash`: SHA-256 of the token, in hexadecimal; times are seconds UTC; `expires`: 0: never."""

    name: Name
    hash: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    scopes: list[str]
    created: float = 0.0
    expires: float = 0.0

    @property
    def valid(self) -> bool:
        """Whether it has not expired."""
        return not self.expires or self.expires > time.time()


class _File(msgspec.Struct):
    tokens: list[Token] = []


def expanded(words: list[str]) -> list[str]:
    """The scopes that words name: scopes, "read", "all". ValueError names the first that is none."""
    found: set[str] = set()
    for word in words:
        if word == "all":
            found.update(SCOPES)
        elif word == "read":
            found.update(scope for scope in SCOPES if scope.endswith(":read"))
        elif word in SCOPES:
            found.add(word)
        else:
            raise ValueError(f"{word!r} is no scope")
    return [scope for scope in SCOPES if scope in found]


def fresh() -> str:
    """A new token."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(OCTETS)).decode().rstrip("=")


def hashed(token: str) -> str:
    """What the file has of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_tokens(path: Path) -> list[Token]:
    """The tokens of a file; none where there is no file, or it is empty. ConfigError when it cannot be read or is no file of
    tokens."""
    try:
        text = read_octets(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    if not text.strip():
        return []
    try:
        return msgspec.json.decode(text[:LONGEST], type=_File).tokens
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: this is no file of tokens: {error}"]) from None


def written(tokens: list[Token]) -> str:
    """The text of the file."""
    return msgspec.json.format(msgspec.json.encode(_File(tokens)), indent=2).decode() + "\n"


class Tokens:
    """The tokens of a file, read again when it changes. A file that cannot be used lets nobody in: `problem` says why. May be
    used on several threads."""

    def __init__(self, path: Path) -> None:
        self._watched = Watched([str(path)], lambda: read_tokens(path))
        self._lock = threading.Lock()

    @property
    def problem(self) -> str:
        """Why the file cannot be used; "": it can."""
        return self._watched.problem

    def valid(self) -> list[Token]:
        """The tokens that may be used now. Reads a file, which blocks."""
        with self._lock:
            self._watched.refresh()
            known = [] if self._watched.problem else self._watched.value or []
        return [token for token in known if token.valid]

    def find(self, presented: str) -> Token | None:
        """The valid token that somebody presents. All are compared, each in constant time."""
        digest, found = hashed(presented), None
        for token in self.valid():
            if hmac.compare_digest(token.hash, digest):
                found = token
        return found

    def still(self, known: Token) -> bool:
        """Whether a token that was found before is still valid, and may do the same."""
        return known in self.valid()
