"""A relay that takes mail by HTTP, and clients of it."""

import base64
import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import trustme

from relaymta.auth.passwords import scram
from tests.support.daemon import PATIENCE, Relay, free_port

__all__ = ["ACCOUNTS", "Injecting", "Said", "basic", "message"]

CLEAR = 'protocol = "http"\ntls = "off"\nauth = "may"\nauth_in_clear = true\n'
SECURE = 'protocol = "http"\ntls = "implicit"\nauth = "require"\n'
ACCOUNTS = {
    "shop": "",
    "bank": "",
    "ann": 'senders = ["ann@corp.example"]\nrecipients = "20/h"\n',
    "held": 'messages = "1/d"\nover = "hold"\n',
}


class Said(NamedTuple):
    """An answer. `json`: its body, None: it is none."""

    status: int
    headers: dict[str, str]
    json: Any

    @property
    def detail(self) -> str:
        """Of a problem."""
        return str(self.json["detail"])


def basic(user: str, password: str = "secret") -> dict[str, str]:
    """The header of HTTP with the credentials of a user."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def message(**more: Any) -> dict[str, Any]:
    """The JSON of a message."""
    return {"from": "Shop <shop@example.com>", "to": "c@d.example", "subject": "hello", "text": "hello\n"} | more


class Injecting(Relay):
    """`http`: the port in the clear, where the machine itself may send without a login; `https`: that with TLS, where everybody
    has to log in. Its accounts are ACCOUNTS, whose passwords are "secret"."""

    def __init__(self, folder: Path, smarthost: str | None, *settings: str, workers: int = 1) -> None:
        super().__init__(folder, smarthost, *settings, workers=workers)
        authority = trustme.CA()
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "cert.pem")
        self.http, self.https = free_port(), free_port()
        kept = scram("secret")
        rows = (f'[[account]]\nname = "{name}"\nsecrets = [{{hash = "{kept}"}}]\n{more}' for name, more in ACCOUNTS.items())
        (folder / "accounts.toml").write_text("".join(rows))
        (folder / "accounts.toml").chmod(0o600)
        self.config = folder / "relay.toml"
        self.config.write_text(
            f'[[listener]]\naddress = "127.0.0.1:{self.port}"\n'
            f'[[listener]]\naddress = "127.0.0.1:{self.http}"\n{CLEAR}[[listener]]\naddress = "127.0.0.1:{self.https}"\n{SECURE}'
            f'[[certificate]]\nchain = "{folder}/cert.pem"\n[accounts]\nfile = "{folder}/accounts.toml"\nanswer_after = 0\n'
        )

    def command(self) -> list[str]:
        found = super().command()
        at = found.index("--listen")
        return [*found[:at], "--config", str(self.config), *found[at + 2 :]]

    def connection(self, secure: bool = False) -> http.client.HTTPConnection:
        """A connection, to be closed by the caller."""
        if secure:
            return http.client.HTTPSConnection("localhost", self.https, timeout=PATIENCE, context=self.context)
        return http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, secure: bool = False
    ) -> Said:
        """The answer to one request. `body`: octets, or what is sent as JSON."""
        connection = self.connection(secure)
        try:
            sent = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                sent.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            data = answer.read()
            return Said(answer.status, dict(answer.getheaders()), json.loads(data) if data else None)
        finally:
            connection.close()

    def post(self, body: Any, key: str = "", path: str = "/v1/messages", secure: bool = False, **headers: str) -> Said:
        """The answer to a message. `headers`: as they are named, with `_` for `-`."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, body, sent | ({"Idempotency-Key": key} if key else {}), secure)

    def states(self, ident: str, **headers: str) -> dict[str, str]:
        """What has become of a message, by recipient."""
        said = self.ask(
            "GET", f"/v1/messages/{ident}", headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        assert said.status == 200, said
        return {row["address"]: row["state"] for row in said.json["recipients"]}
