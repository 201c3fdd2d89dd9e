"""Stored passwords, as argon2id hashes or SCRAM-SHA-256 keys: creating and verifying them. Verification runs on one thread beside
the loop."""

import asyncio
import base64
import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable
from functools import cache
from hmac import compare_digest
from typing import Any

import argon2

from relaymta.proto.sasl import Keys

__all__ = ["KEY_ITERATIONS", "PEOPLE_ITERATIONS", "Busy", "Checker", "argon2id", "matches", "scram", "scram_keys"]

# OWASP's least for argon2id: 19 MiB, two passes, one lane.
_ARGON2 = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
KEY_ITERATIONS = 4096  # of SCRAM for a key of an application, which brute force cannot find
# Of SCRAM for a password that people choose: the most that clients with Cyrus SASL compute (mbsync); 13 ms of CPU to verify.
PEOPLE_ITERATIONS = 65_536
NICE = 10
MOST_WAITING = 500


class Busy(Exception):
    """Too many passwords wait to be verified; str() is the reason."""


@cache
def _scram() -> Any:
    import scramp  # where it is needed: a worker without accounts starts without it

    return scramp.ScramMechanism("SCRAM-SHA-256")


def argon2id(password: str) -> str:
    """The argon2id hash to store for a person's password."""
    return _ARGON2.hash(password)


def scram(password: str, iterations: int = KEY_ITERATIONS, salt: bytes = b"") -> str:
    """The SCRAM-SHA-256 keys to store for a password. Few iterations are for generated keys only, which brute force cannot find.
    `salt`: that of another secret of the same account, since a SCRAM server announces one salt (RFC 5802 5.1). ValueError: the
    password is not allowed (RFC 4013)."""
    import scramp

    try:
        salt, stored, server, count = _scram().make_auth_info(password, iteration_count=iterations, salt=salt or os.urandom(16))
    except scramp.ScramException as error:
        raise ValueError(str(error)) from None
    return f"SCRAM-SHA-256${count}:{_b64(salt)}${_b64(stored)}:{_b64(server)}"


def _b64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


def scram_keys(kept: str) -> Keys | None:
    """The SCRAM keys of a stored secret; None when it is an argon2id hash."""
    head, _, rest = kept.partition("$")
    if head != "SCRAM-SHA-256":
        return None
    start, _, keys = rest.partition("$")
    iterations, _, salt = start.partition(":")
    stored, _, server = keys.partition(":")
    return Keys(base64.b64decode(salt), base64.b64decode(stored), base64.b64decode(server), int(iterations))


def matches(kept: str, password: str) -> bool:
    """Whether a password matches a stored secret. Called on a thread: it takes about 20 ms for argon2id, 1 ms for a SCRAM key."""
    keys = scram_keys(kept)
    import scramp

    try:
        if keys is None:
            return _ARGON2.verify(kept, password)
        found = _scram().make_auth_info(password, iteration_count=keys.iterations, salt=keys.salt)
    except (argon2.exceptions.Argon2Error, argon2.exceptions.InvalidHashError, scramp.ScramException, ValueError):
        return False
    return compare_digest(found[1], keys.stored_key)


class Checker:
    """One thread of low priority that verifies passwords, so that brute force takes no CPU from mail. Clients with fewer failed
    attempts go first."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.PriorityQueue[tuple[int, int, Callable[[], bool], asyncio.Future[bool]]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        threading.Thread(target=self._run, name="passwords", daemon=True).start()

    async def run(self, check: Callable[[], bool], failures: int) -> bool:
        """The result of `check()`, computed on the thread behind all with fewer `failures`. Busy when too many wait; half of the
        queue is reserved for those without failures."""
        if self._inbox.qsize() >= MOST_WAITING * (1 if failures else 2):
            raise Busy("too many passwords wait to be checked")
        future: asyncio.Future[bool] = self._loop.create_future()
        self._inbox.put((failures, next(self._numbers), check, future))
        return await future

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # where a filter of system calls forbids it, at the same priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            _, _, check, future = self._inbox.get()
            if future.cancelled():  # the client has disconnected
                continue
            try:
                good = check()
            except Exception:  # a check that fails is a wrong password
                good = False
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker is ending
                self._loop.call_soon_threadsafe(_resolve, future, good)


def _resolve(future: "asyncio.Future[bool]", good: bool) -> None:
    if not future.done():
        future.set_result(good)
