"""The process of the HTTP API and the page (api/), which is not this one: what it does for one operator delays neither another
one nor a worker, and what is wrong with it ends with it.

It is started when somebody connects, and again when it has ended: until then, and in between, connections wait in the sockets,
which are open here. It ends by itself when nobody has needed it for long.
"""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from relaymta.admin.tokens import Tokens
from relaymta.config import Config, parse_hostport
from relaymta.config.values import is_loopback
from relaymta.control import program
from relaymta.errors import ConfigError
from relaymta.sockets import check_free, control_socket, reason, remove_socket

__all__ = ["HttpApi", "admin_port", "admin_socket"]

BACKLOG = 64
LOOK_SECONDS = 5.0  # whether there is a token, without which only loopback addresses are listened on
BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # seconds before a process that has failed is started again
STEADY_SECONDS = 60.0  # of a process that is no failure
END_SECONDS = 5.0  # for it to end


def admin_port(config: Config) -> socket.socket | None:
    """The bound TCP socket of the API, which does not listen yet; None: there is to be none. ConfigError."""
    address = config.admin.listen
    if address == "off":
        return None
    host, port = parse_hostport(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        check_free(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except ConfigError as error:
        sock.close()
        raise ConfigError([one.replace("listener.address", "admin.listen") for one in error.problems]) from None
    except OSError as error:
        sock.close()
        raise ConfigError([f"admin.listen: {address}: {reason(error)}"]) from None
    return sock


def admin_socket(config: Config, group: int | None) -> socket.socket | None:
    """The unix socket of the API, made by the current user; None: there is to be none. ConfigError, SpoolBusy."""
    path = config.admin_path
    return None if path is None else control_socket(path, None, group, "admin.socket")


class HttpApi:
    """`unix`, `port`: its sockets. `warn(text)` logs a warning."""

    def __init__(
        self, config: Config, unix: socket.socket | None, port: socket.socket | None, warn: Callable[[str], None]
    ) -> None:
        self._config = config
        self._unix = unix
        self._port = port
        self._open = [unix] if unix is not None else []  # those that listen
        self._watching = False
        self._warn = warn
        self._wanted = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Listen, and start the process when it is needed. Until `close`."""
        loop = asyncio.get_running_loop()
        if self._unix is not None or self._port is not None:
            self._tasks.append(loop.create_task(self._keep()))
        if self._port is not None:
            self._tasks.append(loop.create_task(self._listen(self._port)))

    async def _listen(self, port: socket.socket) -> None:
        """Listen on the TCP port; where others than this machine can connect, as soon as there is a token."""
        host, _ = parse_hostport(self._config.admin.listen)
        if host != "localhost" and not is_loopback(host):
            tokens = Tokens(Path(self._config.tokens_path))
            told = False
            while not await asyncio.to_thread(tokens.valid):
                if not told:
                    why = tokens.problem or "there is no token (`relaymta token create`)"
                    self._warn(f"admin.listen: {self._config.admin.listen} is closed: {why}")
                told = True
                await asyncio.sleep(LOOK_SECONDS)
        port.listen(BACKLOG)
        self._open.append(port)
        self._end_process()  # it has not got this socket
        if self._watching:
            self._watch()

    def _watch(self) -> None:
        """Notice connections that wait."""
        loop = asyncio.get_running_loop()
        self._watching = True
        for sock in self._open:
            loop.add_reader(sock.fileno(), self._come)

    def _come(self) -> None:
        self._leave()
        self._wanted.set()

    def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        self._watching = False
        for sock in self._open:
            loop.remove_reader(sock.fileno())

    def _end_process(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _keep(self) -> None:
        backoff = BACKOFF_FIRST
        while True:
            self._wanted.clear()
            self._watch()
            await self._wanted.wait()
            began = time.monotonic()
            status = await self._run()
            if status and time.monotonic() - began < STEADY_SECONDS:
                self._warn(f"the process of the HTTP API has ended ({status}); it is not started again for {backoff:.0f} s")
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, BACKOFF_MOST)
            else:
                backoff = BACKOFF_FIRST
                if status:
                    self._warn(f"the process of the HTTP API has ended ({status}); it is started again when it is needed")

    async def _run(self) -> int:
        """Run the process; its exit status."""
        descriptors = {"unix": self._unix, "tcp": self._port}
        passed = {kind: sock.fileno() for kind, sock in descriptors.items() if sock is not None and sock in self._open}
        try:
            process = await asyncio.create_subprocess_exec(
                *program("relaymta.api"), pass_fds=list(passed.values()), stdin=asyncio.subprocess.PIPE
            )
        except OSError as error:
            self._warn(f"the process of the HTTP API cannot be started: {error.strerror or error}")
            return 1
        self._process = process
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"config": self._config.to_json(), "sockets": passed}).encode() + b"\n")
            await process.stdin.drain()  # it ends when this end is closed
            return await process.wait()
        except ConnectionError:
            return await process.wait()
        finally:
            self._process = None

    def configured(self, config: Config) -> None:
        """A reload has replaced the configuration. What the process has of it and a reload may change are certificates."""
        changed = config.certificate != self._config.certificate
        self._config = config
        if changed:
            self._end_process()  # the next one has the new ones

    def reopen_log(self) -> None:
        """The log was rotated."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)

    async def close(self, leave: bool = False) -> None:
        """End the process and close the sockets; `leave`: another program has them."""
        process = self._process
        self._leave()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if process is not None and process.returncode is None:
            self._process = process
            self._end_process()
            try:
                async with asyncio.timeout(END_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._unix is not None and leave:
            self._unix.close()
        elif self._unix is not None:
            path = self._config.admin_path
            assert path is not None
            remove_socket(self._unix, path)
        if self._port is not None:
            self._port.close()
