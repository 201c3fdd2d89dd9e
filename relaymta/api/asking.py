"""How this process asks the relay: over the control socket, as the command line does, on threads. So each verb of the command
line that is made of several requests is the same here."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import click

from relaymta import control
from relaymta.cli.options import missing, note_missing
from relaymta.cli.peer import Daemon
from relaymta.control.requests import REQUESTS
from relaymta.errors import RelayError
from relaymta.problems import Problem

__all__ = ["Asker", "Peer", "not_there"]

THREADS = 16
T = TypeVar("T")


class Peer(Daemon):
    """The daemon. Every error is a Problem. `by`: on whose behalf it is asked."""

    def __init__(self, path: Path, by: tuple[str, str]) -> None:
        super().__init__(path)
        self._by = by

    @property
    def who(self) -> str:
        """On whose behalf it is asked."""
        return self._by[0]

    def begin(self, op: str, **args: Any) -> Callable[[], Any]:
        """As of `Daemon`."""
        asked = self._asked(op, args)

        def result() -> Any:
            try:
                found = asked()
            except (RelayError, OSError) as error:
                raise _refused(error) from None
            note_missing(asked.missing, REQUESTS[op].changes)
            return found

        return result

    def pieces(self, op: str, **args: Any) -> Iterator[bytes]:
        """As of `Daemon`."""
        asked = self._asked(op, args)
        try:
            yield from asked.pieces()
        except (RelayError, OSError) as error:
            raise _refused(error) from None
        note_missing(asked.missing)

    def _asked(self, op: str, args: dict[str, Any]) -> control.Asked:
        try:
            REQUESTS[op].read(args)
            return control.begin(self._path, op, self._by, **args)
        except RelayError as error:
            raise Problem(400, str(error)) from None
        except OSError as error:
            raise _refused(error) from None


def _refused(error: RelayError | OSError) -> Problem:
    if isinstance(error, OSError):
        return Problem(503, f"the relay does not answer: {error}")
    text = str(error)
    return Problem(404 if error.absent else 500 if text.startswith("internal error") else 409, text)


def not_there(what: str) -> Problem:
    """Why something was not found: it does not exist (404), or a worker that may have it does not answer (503)."""
    return away() if missing() else Problem(404, what)


def away(**more: Any) -> Problem:
    """503, with the workers that do not answer."""
    numbers = sorted(missing())
    who = f"worker {numbers[0]} does" if len(numbers) == 1 else f"workers {', '.join(map(str, numbers))} do"
    return Problem(503, f"{who} not answer", workers=numbers, **more)


class Asker:
    """Asks on threads. A change that has begun goes on when the client has gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(THREADS, "asking")

    async def __call__(self, by: tuple[str, str], verb: Callable[[Peer], T]) -> tuple[T, list[int]]:
        """(The result of `verb` on a thread, the workers whose part of it is missing). Problem."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._pool, lambda: self._within(_context(), by, verb)))

    async def stream(self, by: tuple[str, str], verb: Callable[[Peer], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What `verb` yields, each made on a thread when it is wanted. Problem."""
        loop, context = asyncio.get_running_loop(), _context()
        found = verb(Peer(self._path, by))

        def step() -> T | None:
            return self._within(context, by, lambda peer: next(found, None))[0]

        try:
            while (piece := await loop.run_in_executor(self._pool, step)) is not None:
                yield piece
        finally:
            close = getattr(found, "close", None)
            if close is not None:
                await loop.run_in_executor(self._pool, close)

    def _within(self, context: click.Context, by: tuple[str, str], verb: Callable[[Peer], T]) -> tuple[T, list[int]]:
        with context.scope(cleanup=False):
            try:
                return verb(Peer(self._path, by)), sorted(missing())
            except click.UsageError as error:
                raise Problem(400, error.message) from None
            except SystemExit:  # a worker is missing, where the command line gives up
                raise away() from None

    def close(self) -> None:
        """Take no more; what is under way goes on."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _context() -> click.Context:
    """What notes the missing workers of one request. The command line's `fail` raises UsageError within it."""
    return click.Context(click.Command("api"), resilient_parsing=True)
