"""A group commit's operations, as the loop gives them to the writer and gets them back."""

from collections.abc import Callable
from typing import Any

from relaymta.disk.operations import Group, Move, Task
from relaymta.proto.envelope import Envelope, QueueName
from relaymta.queue.entry import Outcome, Put

__all__ = ["Assign", "Committed", "Operation"]

Assign = Callable[[Envelope, int], list[tuple[QueueName, list[int] | None]]]


class Committed(Group):
    """The operations of one group of the queue; passed to `on_commit`."""

    __slots__ = ("outcomes", "puts")

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__()
        self.puts: list[Put] = []
        self.outcomes = outcomes

    def _lists(self) -> dict[type, list[Any]]:
        return super()._lists() | {Put: self.puts, Outcome: self.outcomes}


Operation = Put | Outcome | Task | Move
