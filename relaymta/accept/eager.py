"""Coroutines that are run at once up to where they first wait: a command that waits for nothing needs no task."""

import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

__all__ = ["begin"]


def begin(coroutine: Coroutine[Any, Any, None], spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:
    """Run a coroutine; what comes behind its first wait is given to `spawn`, which makes a task of it. Up to there no task is
    current: `asyncio.timeout` cannot be used before that."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return
    spawn(_rest(coroutine, waits_for))


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """The rest of a coroutine, which waits for this: a task sees what it would have seen of the whole."""
    while True:
        go_on: Callable[[], Any]
        try:
            go_on = partial(coroutine.send, (yield waits_for))
        except BaseException as error:  # a cancellation too is the coroutine's to answer
            go_on = partial(coroutine.throw, error)
        try:
            waits_for = go_on()
        except StopIteration:
            return
