"""Transactions that ask about commands: what the filters of a Machine say to that is the test's to decide."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from relaymta.accept.lmtp import FiledTransaction
from relaymta.accept.transaction import IncomingTransaction
from relaymta.proto.session import Question
from tests.support.connection import Machine, Promise

VERBS = frozenset({"MAIL", "RCPT"})


class Filters:
    """Those of one machine. Each question waits for `say`. `asked`: all questions; `cancelled`: how many of them were;
    `refusals`: those of the relay itself, of which they were told."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.waiting: list[Promise] = []
        self.cancelled = 0
        self.refusals: list[tuple[str, bytes]] = []

    async def ask(self, question: Question) -> bytes | None:
        promise = Promise()
        self.asked.append(question)
        self.waiting.append(promise)
        try:
            found: bytes | None = await promise
        except BaseException:
            self.cancelled += not promise.done()
            raise
        finally:
            self.waiting.remove(promise)
        return found

    def say(self, answer: bytes | BaseException | None = None) -> None:
        """Answer the question under way."""
        (promise,) = self.waiting
        if isinstance(answer, BaseException):
            promise.set_exception(answer)
        else:
            promise.set_result(answer)


class _Asking(IncomingTransaction):
    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        IncomingTransaction.__init__(self, *arguments)
        self.asks = VERBS if getattr(self._admission, "filters", None) is not None else frozenset()

    async def asked(self, question: Question) -> bytes | None:
        found: bytes | None = await self._admission.filters.ask(question)  # type: ignore[attr-defined]
        return found

    def rejects(self, address: str, answer: bytes) -> None:
        if self.asks:
            self._admission.filters.refusals.append((address, answer))  # type: ignore[attr-defined]


class _Filed(FiledTransaction):
    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        FiledTransaction.__init__(self, *arguments)
        self.asks = VERBS if getattr(self._admission, "filters", None) is not None else frozenset()

    asked, rejects = _Asking.asked, _Asking.rejects


@contextmanager
def asking(of: Machine, filters: Filters | None = None) -> Iterator[Filters]:
    """From now on transactions of this machine ask these filters."""
    found = filters or Filters()
    of.filters = found  # type: ignore[attr-defined]
    with (
        patch("relaymta.accept.rights.IncomingTransaction", _Asking),
        patch("relaymta.accept.rights.FiledTransaction", _Filed),
    ):
        yield found
