"""The process: its sockets, TLS, what all answers have in common, and its end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from aiohttp import web

from relaymta.accept.tls import Certificates
from relaymta.admin.tokens import Tokens
from relaymta.api.access import Access
from relaymta.api.asking import Asker
from relaymta.api.connections import LOOK_SECONDS, Connections, Door
from relaymta.api.operations import BODY_MOST, Operations, problem
from relaymta.api.page import Page
from relaymta.config import Config
from relaymta.log import Log
from relaymta.problems import Problem

__all__ = ["WORKER", "Server"]

WORKER = -2  # the number of this process in the log; -1: the supervisor
CONNECTIONS = {"unix": 64, "tcp": 128}
KEEP_SECONDS = 30.0  # between two requests of a connection
HANDSHAKE_SECONDS = 10.0
WATCH_SECONDS = 30.0  # for changed certificates
IDLE_SECONDS = 900.0  # after which a process that nobody uses ends
BACKLOG = 64

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """`sockets`: "unix" and "tcp", as far as there are such."""

    def __init__(self, config: Config, sockets: dict[str, socket.socket]) -> None:
        self._config = config
        self._sockets = sockets
        self.log = Log(config.log.file, WORKER, form=config.log.format)
        self._access = Access(config, Tokens(Path(config.tokens_path)), self._note)
        self._ask = Asker(config.control_path)
        self._page = Page(self._access, self._ask, config.admin.tls)
        self._connections: list[Connections] = []
        self._certificates = Certificates(config)
        self._used = 0.0
        self._ending = asyncio.Event()

    async def run(self, closed: asyncio.StreamReader) -> None:
        """Serve until `closed` ends, or nobody has used it for long."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self.log.reopen)
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the supervisor's: it ends us
        self._used = loop.time()
        runners, servers = [], []
        for kind, sock in self._sockets.items():
            runner = web.AppRunner(
                self._application(kind == "unix"), access_log=None, handle_signals=False, keepalive_timeout=KEEP_SECONDS,
                lingering_time=5.0, logger=_quiet(self.log), shutdown_timeout=5.0,
                auto_decompress=False,
            )  # fmt: skip
            await runner.setup()
            assert runner.server is not None
            runner.server.request_handler = _expecting(runner.server.request_handler)
            connections = Connections(runner.server, CONNECTIONS[kind])
            self._connections.append(connections)
            runners.append(runner)
            servers.append(await self._listen(kind, sock, connections))
        tasks = [loop.create_task(one) for one in (self._look(), self._watch(), self._until(closed))]
        await self._ending.wait()
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        for runner in runners:
            await runner.cleanup()
        self._page.close()
        self._ask.close()
        self.log.close()

    async def _listen(self, kind: str, sock: socket.socket, make: Connections) -> asyncio.Server:
        loop, sock = asyncio.get_running_loop(), Door(sock, CONNECTIONS[kind])
        if kind == "unix":
            return await loop.create_unix_server(make, sock=sock, backlog=BACKLOG)
        if not self._config.admin.tls:
            return await loop.create_server(make, sock=sock, backlog=BACKLOG)
        context = await asyncio.to_thread(self._context)
        return await loop.create_server(
            make, sock=sock, backlog=BACKLOG, ssl=context, ssl_handshake_timeout=HANDSHAKE_SECONDS, ssl_shutdown_timeout=5.0
        )

    # TLS

    def _context(self) -> ssl.SSLContext:
        """A context that gives each handshake the certificate of its name, as it is now."""
        self._renew()
        first = self._certificates.context
        if first is None:
            why = "; ".join(one.problem for one in self._certificates.watched)
            self.log.event("warning", text=f"admin.listen: no certificate can be used: {why}")
            self.log.close()
            raise SystemExit(78)

        def choose(connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._certificates.named(name) or first

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sni_callback = choose
        return context

    def _renew(self) -> None:
        for one in self._certificates.watched:
            before = one.value
            one.refresh()
            if one.value is not None and one.value is not before:
                one.value.context.set_alpn_protocols(["http/1.1"])

    # What all requests have in common

    def _application(self, local: bool) -> web.Application:
        """`local`: what comes by the unix socket."""

        @web.middleware
        async def every(request: web.Request, handler: Handler) -> web.StreamResponse:
            own = next((found for one in self._connections if (found := one.of.get(request.protocol))), None)
            if own is not None:
                own.begins()
            try:
                return await self._answer(request, handler, local)
            finally:
                self._used = asyncio.get_running_loop().time()
                if own is not None:
                    own.ends()

        app = web.Application(middlewares=[every], client_max_size=BODY_MOST)
        app.add_routes(Operations(self._access, self._ask, local).routes())
        app.add_routes(self._page.routes())
        return app

    async def _answer(self, request: web.Request, handler: Handler, local: bool) -> web.StreamResponse:
        try:
            if not local and not self._access.host_allowed(request):
                raise Problem(421, "this is no name of this server: admin.names")
            return await handler(request)
        except Problem as error:
            found = error
        except web.HTTPException as error:
            more = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            found = Problem(error.status, error.reason, more)
        except ConnectionError:  # the client has gone
            raise
        except Exception as error:
            self.log.event("warning", text=f"{request.method} {request.path}: internal error: {type(error).__name__}: {error}")
            found = Problem(500, "internal error; the log says more")
        shown = not request.path.startswith("/api/") and "text/html" in request.headers.get("Accept", "")
        return self._page.error(found) if shown else problem(found)

    def _note(self, who: str, where: str, action: str, result: str) -> None:
        self.log.event("audit", who=who, where=where, action=action, about="", count=0, result=result)

    # Meanwhile

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for one in self._connections:
                one.look()
            busy = any(one.open for one in self._connections) or self._access.in_use()
            if not busy and loop.time() - self._used > IDLE_SECONDS:
                self._ending.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await asyncio.to_thread(self._renew)

    async def _until(self, closed: asyncio.StreamReader) -> None:
        await closed.read()
        self._ending.set()


def _expecting(handler: Callable[..., Awaitable[web.StreamResponse]]) -> Callable[..., Awaitable[web.StreamResponse]]:
    """`handler`, for requests that expect nothing but 100-continue: aiohttp answers others with their own words, or fails."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            return problem(Problem(417, "nothing but 100-continue can be expected"))
        return await handler(request)

    return handle


class _Errors(logging.Handler):
    """aiohttp's errors, as warnings in the log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """As of Handler."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, (web.HTTPException, ConnectionError)) or type(error).__module__.startswith("aiohttp"):
            return  # a client that does not speak HTTP
        self._log.event("warning", text=f"HTTP: {record.getMessage()}" + (f": {type(error).__name__}: {error}" if error else ""))


def _quiet(log: Log) -> logging.Logger:
    found = logging.getLogger("relaymta.api")
    found.propagate = False
    found.setLevel(logging.ERROR)
    found.handlers = [_Errors(log)]
    return found


def serve(config: Config, sockets: dict[str, socket.socket]) -> None:
    """Serve until standard input ends. The first line of it has been read."""
    asyncio.run(_serve(config, sockets))


async def _serve(config: Config, sockets: dict[str, socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    closed = asyncio.StreamReader()
    await loop.connect_read_pipe(partial(asyncio.StreamReaderProtocol, closed), sys.stdin)
    with contextlib.suppress(OSError):
        os.nice(1)  # mail first
    await Server(config, sockets).run(closed)
