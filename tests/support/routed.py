"""A relay that several tests use one after the other, each with routes, peers and domains of its own."""

import ssl
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import trustme

from tests.support.daemon import Relay, free_port


class _Values(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        self[name] = free_port()
        return self[name]


class Routed(Relay):
    """`routes`: (name, recipient domain, keys) of each, the keys as in `[[route]]`. In these and in `settings`, $folder is the
    relay's folder, $NAME what `values` has by this name, else a free port. The relay trusts the certificates of `authority`."""

    def __init__(
        self, folder: Path, routes: Iterable[tuple[str, str, str]], *settings: str, workers: int = 1, **values: Any
    ) -> None:
        self.values = _Values(values, folder=folder)
        texts = [
            f'{{name="{name}",recipient_domain=["{domain}"],{Template(keys).substitute(self.values)}}}'
            for name, domain, keys in routes
        ]
        given = [Template(setting).substitute(self.values) for setting in settings]
        super().__init__(folder, None, f"route=[{','.join(texts)}]", *given, workers=workers)
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.environment["SSL_CERT_FILE"] = str(folder / "ca.pem")

    def port_of(self, name: str) -> int:
        """The port that $NAME is."""
        found: int = self.values[name]
        return found

    def of(self, event: str, *routes: str) -> list[dict[str, Any]]:
        """The events of this name that are of one of these routes."""
        return [row for row in self.events(event) if row["route"].partition("/")[0] in routes]


def server_context(authority: trustme.CA) -> ssl.SSLContext:
    """The TLS context of a server with a certificate of `authority` for localhost."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(made)
    return made
