"""A worker's part of live traces (relaymta/trace.py): which connections it has, and the lines of each trace as they come."""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from relaymta.accept.connection import Connection
from relaymta.control.requests import Trace
from relaymta.trace import Line, Tracer

if TYPE_CHECKING:
    from relaymta.worker import Worker

__all__ = ["lines", "wire"]

ALIVE_SECONDS = 2.0  # between two pieces, of which one without lines says that the worker is there


def wire(worker: "Worker") -> Tracer:
    """The tracer of a worker, which knows its connections. Its acceptor and its dispatchers know it by `tracer`."""
    tracer = Tracer(worker.slot)

    def join_in() -> None:
        for connection in list(worker.acceptor.connections) if worker.acceptor is not None else ():
            if isinstance(connection, Connection) and connection.rights is not None:
                connection.trace(connection.rights.client, False)

    def join_out() -> None:
        for shard in worker.shards.values():
            shard.dispatcher.join_trace(tracer)

    tracer.join_in, tracer.join_out = join_in, join_out
    return tracer


async def lines(tracer: Tracer, wanted: Trace) -> AsyncGenerator[list[Line], None]:
    """The lines of a trace, in pieces; the first, without any, says that it has begun. It ends with the generator."""
    watch = tracer.open(wanted)
    try:
        yield []
        while True:
            yield await watch.take(ALIVE_SECONDS)
    finally:
        tracer.close(watch)
