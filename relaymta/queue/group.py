"""A group commit's operations, as the loop gives them to the writer and gets them back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue.entry import Move, Outcome, Put

if TYPE_CHECKING:
    from relaymta.queue.change import Change

__all__ = ["Assign", "Committed", "Operation", "Task"]

Assign = Callable[[Envelope, int], list[tuple[QueueName, list[int] | None]]]


class Task:
    """A change by an operator or the queue itself: `run(change)` on the writer thread, all of it or nothing, then `done(task)` on
    the loop. `error`: why it was undone; `mistake`: file and line where `run` raised it ("": the commit failed)."""

    __slots__ = ("done", "error", "mistake", "result", "run")

    def __init__(self, run: "Callable[[Change], Any]", done: "Callable[[Task], None] | None" = None) -> None:
        self.run = run
        self.done = done
        self.result: Any = None
        self.error: Exception | None = None
        self.mistake = ""


class Committed:
    """The operations of one group, with their results; passed to `on_commit`."""

    __slots__ = ("moves", "outcomes", "puts", "syncs", "tasks")

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.puts: list[Put] = []
        self.outcomes = outcomes
        self.tasks: list[Task] = []
        self.moves: list[Move] = []
        self.syncs = 0


Operation = Put | Outcome | Task | Move
