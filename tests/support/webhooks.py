"""The consumer of a webhook, as a program of somebody else: it verifies signatures by the published implementation of Standard
Webhooks, and answers as a test says."""

import base64
import json
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from standardwebhooks.webhooks import Webhook

__all__ = ["DROP", "Consumer", "Request", "consumer", "secret_file", "table"]

DROP = "drop"  # the connection, without an answer
Reply = tuple[int, dict[str, str], bytes] | str


class Request(NamedTuple):
    """`fields`: names in lower case."""

    fields: dict[str, str]
    body: bytes

    @property
    def ident(self) -> str:
        return self.fields["webhook-id"]

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.told["events"]
        return found


def secret_file(path: Path) -> str:
    """A new secret, in a file; the secret."""
    secret = "whsec_" + base64.b64encode(os.urandom(32)).decode()
    path.write_text(secret + "\n")
    path.chmod(0o600)
    return secret


def table(name: str, url: str, secret: Path, more: str = "private = true") -> str:
    """The table of a webhook, in one line."""
    return f'{{name = "{name}", url = "{url}", secret_file = "{secret}"{", " if more else ""}{more}}}'


class Consumer:
    """`reply(request)`: its answer to one whose signature is right (200 at first). `requests`: all that were answered by 2xx;
    `refused`: the others; `wrong`: those whose signature was wrong."""

    def __init__(self, secret: str) -> None:
        self.secrets = [secret]
        self.reply: Callable[[Request], Reply] = lambda request: (200, {}, b"")
        self.requests: list[Request] = []
        self.refused: list[Request] = []
        self.wrong: list[Request] = []
        self.url = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events that were taken, each once, in the order in which they came first."""
        found = {event["id"]: event for request in list(self.requests) for event in request.events}
        return list(found.values())

    def answer(self, request: Request) -> Reply:
        """Verify a request, and note it."""
        try:
            for secret in self.secrets:
                Webhook(secret).verify(request.body, request.fields)
        except Exception as error:
            self.wrong.append(request)
            return 400, {}, f"{type(error).__name__}: {error}".encode()
        found = self.reply(request)
        (self.requests if not isinstance(found, str) and 200 <= found[0] < 300 else self.refused).append(request)
        return found


def _handler(own: Consumer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found = own.answer(Request({name.lower(): value for name, value in self.headers.items()}, body))
            if isinstance(found, str):
                self.close_connection = True
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            status, fields, text = found
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(text))} | fields).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # who has asked has gone


@contextmanager
def consumer(secret: str, port: int = 0, context: ssl.SSLContext | None = None) -> Iterator[Consumer]:
    """A consumer that listens on 127.0.0.1."""
    own = Consumer(secret)
    server = _Server(("127.0.0.1", port), _handler(own))
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    own.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_address[1]}/events"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield own
    finally:
        server.shutdown()
        server.server_close()
