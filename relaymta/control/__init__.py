"""The protocol between our processes: frames (frames.py) over unix sockets, with descriptors passed along where needed
(SCM_RIGHTS). The supervisor and each worker speak it, a worker and its signing process (channel.py), and the command line
(asking.py; its requests: requests.py) with the supervisor (connection.py).

What the command line uses needs no event loop. The rest is imported when it is used: asyncio takes a third of a short command's
time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relaymta.control.asking import Asked, ask, begin
from relaymta.control.frames import LIMIT, Late, Refused, sentence
from relaymta.control.process import program

if TYPE_CHECKING:
    from relaymta.control.channel import Channel
    from relaymta.control.connection import Answer, converse, serve

__all__ = [
    "BACKLOG", "WINDOW", "Answer", "Asked", "Channel", "Late", "Refused", "ask", "begin", "converse", "program", "sentence",
    "serve",
]  # fmt: skip

WINDOW = 4  # pieces of an answer that are on their way
BACKLOG = 2 * LIMIT  # octets not yet taken by the other end above which no request is sent

_LATER = {"Channel": "channel", "Answer": "connection", "converse": "connection", "serve": "connection"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
