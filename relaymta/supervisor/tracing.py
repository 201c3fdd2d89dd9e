"""The supervisor's part of live requests (`Where.LIVE`): the pieces of all workers, and of those that replace them.

One task for each worker puts its pieces into a queue of TOGETHER at most. Whoever does not read fills it: then the tasks wait,
then the workers, which drop what does not fit. The tasks end with the generator.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

import msgspec

from relaymta.control import Refused
from relaymta.control.requests import Request
from relaymta.supervisor.slots import Slot

__all__ = ["live"]

TOGETHER = 4  # pieces of all workers
ALIVE_SECONDS = 1.0  # between two pieces, of which one without lines shows whether the reader is there
AGAIN_SECONDS = 0.2  # between two looks whether a worker is ready

Piece = list[Any] | Refused


def _note(kind: str, text: str) -> list[Any]:
    return [(time.time(), "", kind, text)]


async def live(slots: Iterable[Slot], row: Request, args: Any) -> AsyncGenerator[list[Any], None]:
    """Pieces of lines, without end; one without lines each second in which there are none. The line of the kind `begun` says that
    every worker has begun, or is noted as one that has not. Refused by the first worker that refuses."""
    asked = list(slots)
    queue: asyncio.Queue[Piece] = asyncio.Queue(TOGETHER)
    begun: set[int] = set()
    tasks = [asyncio.create_task(_follow(slot, row, msgspec.to_builtins(args), queue, begun)) for slot in asked]
    told = False
    try:
        while True:
            piece: Piece = []
            try:
                async with asyncio.timeout(ALIVE_SECONDS):
                    piece = await queue.get()
            except TimeoutError:
                pass
            if isinstance(piece, Refused):
                raise piece
            if not told and len(begun) == len(asked):
                told = True
                piece = piece + _note("begun", f"{len(asked)} workers")
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow(slot: Slot, row: Request, args: dict[str, Any], queue: "asyncio.Queue[Piece]", begun: set[int]) -> None:
    """What one worker says, and each that replaces it. `begun`: gets its number once that is known to begin, or not to."""
    gone = False
    while True:
        try:
            if not slot.ready or slot.channel is None:
                raise ConnectionError("it is not ready")
            async with aclosing(slot.channel.stream(row.name, row.seconds, **args)) as pieces:
                async for piece in pieces:
                    if gone:
                        gone = False
                        await queue.put(_note("note", f"worker {slot.number} is traced again"))
                    if slot.number not in begun:
                        begun.add(slot.number)
                        await queue.put([])
                    if piece:
                        await queue.put(piece)
        except Refused as error:
            await queue.put(error)
            return
        except ConnectionError as error:
            if not gone:
                gone = True
                begun.add(slot.number)
                await queue.put(_note("note", f"worker {slot.number} is not traced: {error}"))
        await asyncio.sleep(AGAIN_SECONDS)
