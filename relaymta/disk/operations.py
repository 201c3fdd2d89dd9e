"""The operations that every store's writer takes; those of its own are beside them."""

from collections.abc import Callable, Iterable
from typing import Any

from relaymta.errors import StoreError
from relaymta.proto.envelope import Body

__all__ = ["Group", "Move", "Task", "refuse"]


class Task:
    """A change of any kind: `run(change)` on the writer thread, in the store's transaction, all of it or nothing, then
    `done(task)` on the loop. `error`: why it was undone; `mistake`: file and line where `run` raised it ("": the commit
    failed)."""

    __slots__ = ("done", "error", "mistake", "result", "run")

    def __init__(self, run: Callable[[Any], Any], done: "Callable[[Task], None] | None" = None) -> None:
        self.run = run
        self.done = done
        self.result: Any = None
        self.error: Exception | None = None
        self.mistake = ""


class Move:
    """A body to copy from `was` to a cold segment; `data`: its verified octets. `body`: where it lies once that is committed,
    None when nothing points at it any more or it moved first; `places`: what the store says then of who has it in memory (the
    queue: numbers of the queues in which its message waits). `done(move)` is called on the loop; `last`: of its slice."""

    __slots__ = ("body", "data", "done", "error", "ident", "last", "places", "was")

    def __init__(self, ident: int, was: Body, data: bytes, done: Callable[["Move"], None]) -> None:
        self.ident = ident
        self.was = was
        self.data = data
        self.done = done
        self.body: Body | None = None
        self.places: list[int] = []
        self.error: StoreError | None = None
        self.last = False


class Group:
    """The operations of one group, with their results; `syncs`: how many syncs its bodies took; `seconds`: how long it took."""

    __slots__ = ("moves", "seconds", "syncs", "tasks")

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.moves: list[Move] = []
        self.syncs = 0
        self.seconds = 0.0

    def add(self, batch: Iterable[Any]) -> None:
        """Sort operations into their lists."""
        lists = self._lists()
        for operation in batch:
            lists[type(operation)].append(operation)

    def _lists(self) -> dict[type, list[Any]]:
        """The list for each type of operation."""
        return {Task: self.tasks, Move: self.moves}


def refuse(operations: Iterable[Any], error: StoreError | None) -> None:
    """Tell operations that they were not committed."""
    for operation in operations:
        operation.error = error
