"""A relay that takes mail by HTTP, and its clients."""

import base64
import contextlib
import http.client
import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.daemon import PATIENCE, Relay, free_port

__all__ = ["PASSWORD", "USER", "Answer", "Injecting"]

USER, PASSWORD = "shop", "correct horse battery staple"


class Answer(NamedTuple):
    """Of HTTP. `json`: what the body has; None: it is empty."""

    status: int
    headers: dict[str, str]
    json: Any


class Injecting(Relay):
    """A relay with a listener for SMTP, and one for HTTP on which USER logs in. `more`: lines of its configuration."""

    def __init__(self, folder: Path, smarthost: str, more: str = "", workers: int = 1) -> None:
        super().__init__(folder, smarthost, workers=workers)
        self.http = free_port()
        self.config = folder / "relaymta.toml"
        self.config.write_text(
            f"""
hostname = "relay.example"
[[listener]]
address = "127.0.0.1:{self.port}"
[[listener]]
address = "127.0.0.1:{self.http}"
protocol = "http"
tls = "off"
auth = "require"
auth_in_clear = true
[accounts]
file = "{folder}/accounts.toml"
answer_after = 0.1
{more}
"""
        )
        self.cli("user", "add", USER, "--password", PASSWORD, "--config", str(self.config))

    @property
    def url(self) -> str:
        """Where applications hand in mail."""
        return f"http://127.0.0.1:{self.http}"

    def command(self) -> list[str]:
        """As of Relay."""
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def ask(self, method: str, path: str, body: bytes | Any = None, user: str = f"{USER}:{PASSWORD}", **headers: str) -> Answer:
        """The answer to a request. `body`: octets, or what is sent as JSON; `user`: with the password, "": nobody; of the names
        of `headers`, "_" is "-"."""
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if user:
            fields.setdefault("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            fields.setdefault("Content-Type", "application/json")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)) as connection:
            connection.request(method, path, body, fields)
            answer = connection.getresponse()
            text = answer.read()
        return Answer(
            answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.loads(text) if text else None
        )
