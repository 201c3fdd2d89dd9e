"""One end of a socket between our processes, on the event loop."""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from relaymta import control
from relaymta.control.connection import READER_SECONDS
from relaymta.control.frames import ROWS_TOGETHER, UNSET, Broken, Frame, Frames, Late, Refused, in_pieces, pack, refusal

__all__ = ["Channel"]

DESCRIPTORS = 253  # SCM_MAX_FD


class _Waiting:
    """Who waits for an answer. `rows`: what has come of a list in pieces. `limit`: when the answer or its next piece is late."""

    __slots__ = ("future", "limit", "rows", "seconds")

    def __init__(self, future: "asyncio.Future[Any]", seconds: float | None) -> None:
        self.future = future
        self.seconds = seconds
        self.rows: list[Any] = []
        self.limit: asyncio.Timeout | None = None


class Channel:
    """One end of a socket between processes, on the event loop. `handle(op, args, descriptors)` answers the other end's requests;
    an asynchronous generator that it returns is the answer in pieces, a long list is sent in pieces. `closed()` is called once
    when the channel closes. A frame that is too large or broken is refused; it ends neither the channel nor another request."""

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[str, dict[str, Any], list[int]], Awaitable[Any]],
        closed: Callable[[], None],
    ) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._handle = handle
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._descriptors: list[int] = []
        self._waiting: dict[int, _Waiting] = {}
        self._streams: dict[int, asyncio.Queue[Frame]] = {}
        self._pouring: dict[
            int, tuple[asyncio.Semaphore, asyncio.Task[Any]]
        ] = {}  # pieces the other end takes; the answer's task
        self._next = 0
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._backlog = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.open = True
        self._loop.add_reader(sock.fileno(), self._readable)

    # Asking

    async def ask(self, op: str, descriptors: list[int] | None = None, seconds: float | None = None, /, **args: Any) -> Any:
        """Send a request and wait for its answer. Refused when it is an error, RelayError when it cannot be sent, ConnectionError
        when the channel closes first, Late (a ConnectionError) when neither the answer nor a further piece of it comes within
        `seconds` (None: however long)."""
        ident = self._begin(op)
        waiting = self._waiting[ident] = _Waiting(self._loop.create_future(), seconds)
        try:
            self._send(Frame(ident, op, args, descriptors=len(descriptors or [])), descriptors or [])
            async with asyncio.timeout(seconds) as waiting.limit:
                return await waiting.future
        except TimeoutError:
            raise Late(f"no answer to {op} within {seconds:g} s") from None
        finally:  # also when the caller was cancelled
            self._waiting.pop(ident, None)

    async def stream(self, op: str, seconds: float | None = None, /, **args: Any) -> AsyncGenerator[Any, None]:
        """The pieces of an answer, of which WINDOW at most wait here. Errors as of `ask`; `seconds`: for each piece. Close the
        generator (`aclosing`) where it is not read to its end."""
        ident = self._begin(op)
        queue = self._streams[ident] = asyncio.Queue()
        ended = False
        try:
            self._send(Frame(ident, op, args), [])
            while True:
                try:
                    async with asyncio.timeout(seconds):
                        frame = await queue.get()
                except TimeoutError:
                    raise Late(f"no answer to {op} within {seconds:g} s") from None
                if frame.piece is UNSET:
                    ended = True
                    if frame.error is not None:
                        raise Refused(frame.error, frame.absent)
                    if frame.ok is UNSET:
                        raise ConnectionError("the process is gone")
                    return
                yield frame.piece
                self._reply(Frame(ident, more=1))
        finally:
            self._streams.pop(ident, None)
            if not ended:
                self._reply(Frame(ident, more=0))

    def notify(self, op: str, /, **args: Any) -> None:
        """Send a notification; there is no answer. RelayError when it cannot be sent."""
        if self.open:
            self._send(Frame(op=op, args=args), [])

    def _begin(self, op: str) -> int:
        if not self.open:
            raise ConnectionError("the process is gone")
        if self._backlog > control.BACKLOG:
            raise Late(f"{op} was not asked for: the process does not take what was sent before")
        self._next += 1
        return self._next

    # Octets

    def _reply(self, frame: Frame) -> None:
        if self.open:
            self._send(frame, [])

    def _send(self, frame: Frame, descriptors: list[int]) -> None:
        self._put(pack(frame), descriptors)

    def _put(self, data: bytes, descriptors: list[int]) -> None:
        self._out.append((memoryview(data), descriptors))
        self._backlog += len(data)
        if len(self._out) == 1:
            self._writable()

    def _writable(self) -> None:
        while self._out:
            data, descriptors = self._out[0]
            try:
                done = socket.send_fds(self._socket, [data], descriptors) if descriptors else self._socket.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._socket.fileno(), self._writable)
                return
            except OSError:
                self.close()
                return
            self._backlog -= done
            if done < len(data):
                self._out[0] = (data[done:], [])
            else:
                self._out.popleft()
        self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 18, DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors += descriptors
        if not data:
            self.close()
            return
        for frame in self._frames.feed(data):
            if isinstance(frame, Broken):
                self._refuse(frame)
            elif frame.op is not None:
                self._asked(frame)
            elif frame.more is not None:
                self._wanted(frame.id or 0, frame.more)
            else:
                self._answered(frame)

    # Frames

    def _refuse(self, broken: Broken) -> None:
        if broken.asks:
            self._reply(Frame(broken.ident, error=broken.why))
        elif broken.ident is not None:
            self._answered(Frame(broken.ident, error=broken.why))

    def _asked(self, frame: Frame) -> None:
        own = frame.descriptors  # one read may bring the descriptors of a later frame, too
        descriptors, self._descriptors = self._descriptors[:own], self._descriptors[own:]
        task = self._loop.create_task(self._answer(frame, descriptors))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answered(self, frame: Frame) -> None:
        ident = frame.id or 0  # ours begin with 1
        stream, waiting = self._streams.get(ident), self._waiting.get(ident)
        if stream is not None:
            stream.put_nowait(frame)
        elif waiting is None or waiting.future.done():
            return  # nobody waits any more
        elif frame.error is not None:
            waiting.future.set_exception(Refused(frame.error, frame.absent))
        elif isinstance(frame.piece, list):
            waiting.rows.extend(frame.piece)
            if waiting.limit is not None and waiting.seconds is not None:
                waiting.limit.reschedule(self._loop.time() + waiting.seconds)
            self._reply(Frame(ident, more=1))
        elif frame.piece is UNSET:
            waiting.future.set_result(waiting.rows or (None if frame.ok is UNSET else frame.ok))

    def _wanted(self, ident: int, more: int) -> None:
        pouring = self._pouring.get(ident)
        if pouring is not None and more > 0:
            pouring[0].release()
        elif pouring is not None:
            pouring[1].cancel()

    # Answering

    async def _answer(self, frame: Frame, descriptors: list[int]) -> None:
        assert frame.op is not None
        try:
            result = await self._handle(frame.op, frame.args, descriptors)
            if isinstance(result, list) and len(result) > ROWS_TOGETHER:
                result = _rows(result)
            if isinstance(result, AsyncGenerator):
                await self._pour(frame.id, result)
                result = None
            answer = pack(Frame(frame.id, ok=result))
        except Exception as error:
            answer = pack(refusal(frame.id, error))
        if frame.id is not None and self.open:
            self._put(answer, [])

    async def _pour(self, ident: int | None, pieces: AsyncGenerator[Any, None]) -> None:
        """Send the pieces of an answer, each when the other end has taken an earlier one."""
        task = asyncio.current_task()
        assert task is not None
        wanted = asyncio.Semaphore(control.WINDOW)
        if ident is not None:
            self._pouring[ident] = wanted, task
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    await self._until_wanted(wanted)
                    if ident is None or not self.open:
                        return
                    self._send(Frame(ident, piece=piece), [])
        finally:
            self._pouring.pop(ident or 0, None)

    async def _until_wanted(self, wanted: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(READER_SECONDS):
                await wanted.acquire()
        except TimeoutError:
            raise Late("nobody takes the answer") from None

    def close(self) -> None:
        """Close the channel. Callers that wait for an answer get ConnectionError; answers in pieces end."""
        if not self.open:
            return
        self.open = False
        with contextlib.suppress(OSError, ValueError):
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._out.clear()
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(ConnectionError("the process is gone"))
        self._waiting.clear()
        for queue in self._streams.values():
            queue.put_nowait(Frame())
        for _, task in self._pouring.values():
            task.cancel()
        self._closed()


async def _rows(found: list[Any]) -> AsyncGenerator[list[Any], None]:
    for piece in in_pieces(found):
        yield piece
