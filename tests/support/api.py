"""A client of the HTTP API: by the unix socket, or over TCP with a token."""

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any

from tests.support.daemon import PATIENCE


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


class Api:
    """`place`: the path of the unix socket, or a port of this machine (with a `context`: over TLS)."""

    def __init__(self, place: Path | int, token: str = "", context: ssl.SSLContext | None = None) -> None:
        self._place = place
        self._context = context
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def connection(self) -> http.client.HTTPConnection:
        """A new connection."""
        if isinstance(self._place, Path):
            return _Unix(self._place)
        if self._context is not None:
            return http.client.HTTPSConnection("localhost", self._place, timeout=PATIENCE, context=self._context)
        return http.client.HTTPConnection("127.0.0.1", self._place, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer. `body`: octets, or what is sent as JSON."""
        sent = self.headers | (headers or {})
        if body is not None and not isinstance(body, bytes):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json"} | sent
        one = self.connection()
        try:
            one.request(method, path, body, sent)
            answer = one.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            one.close()

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and JSON of `GET /api/v1` + path."""
        status, _, text = self.ask("GET", "/api/v1" + path, headers=headers)
        return status, json.loads(text)

    def post(self, path: str, **arguments: Any) -> tuple[int, Any]:
        """Status and JSON of `POST /api/v1` + path, with `from_` for from."""
        status, _, text = self.ask("POST", "/api/v1" + path, {name.rstrip("_"): value for name, value in arguments.items()})
        return status, json.loads(text)
