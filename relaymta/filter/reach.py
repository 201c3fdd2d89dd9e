"""Connections to filters."""

import asyncio
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from relaymta.config import parse_hostport
from relaymta.filter.judgement import FilterFailure

__all__ = ["Unreached", "check_address", "reach"]

FULL = 0.05  # seconds until a unix socket is tried again whose queue of connections is full

P = TypeVar("P", bound=asyncio.BaseProtocol)


class Unreached(FilterFailure):
    """There is no connection."""


def check_address(address: str) -> None:
    """ValueError: it is not one of "unix:/path", "host:port" and "[::1]:port"."""
    if not address.startswith("unix:/"):
        parse_hostport(address)


async def reach(address: str, protocol: Callable[[], P], timeout: float) -> P:
    """A new connection, within `timeout` seconds. Unreached. Whatever fails, `protocol` may have been told that it is connected:
    it has to be closed then."""
    try:
        async with asyncio.timeout(timeout):
            if address.startswith("unix:/"):
                return await _by_path(address.removeprefix("unix:"), protocol)
            _, made = await asyncio.get_running_loop().create_connection(protocol, *parse_hostport(address))
            return made
    except TimeoutError:
        raise Unreached("timeout", f"{address}: does not take the connection within {timeout:g} s") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise Unreached("connect", f"{address}: {why}") from None


async def _by_path(path: str, protocol: Callable[[], P]) -> P:
    """connect(2) to a unix socket does not wait: EAGAIN means that its queue is full, and not, as for the event loop, that it
    will be connected."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                sock.connect(path)
                break
            except BlockingIOError:
                await asyncio.sleep(FULL)
        _, made = await asyncio.get_running_loop().create_unix_connection(protocol, sock=sock)
        return made
    except BaseException:
        sock.close()
        raise
