"""The HTTP interface for operators: the API and the page. (/metrics: machine.py.)"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from relaymta.config.names import Hostname
from relaymta.config.values import Address, Duration, Restart, Table, is_loopback, parse_hostport

__all__ = ["Admin"]


class Admin(Table):
    """The HTTP API and the page for operators. `[admin]`"""

    socket: Restart[str] = Field(
        "", description='path of the unix socket of the API, "off" for none; default: admin.sock beside the control socket. '
        "Whoever may open it may do everything, as with the control socket; docs/admin.md",
    )  # fmt: skip
    listen: Restart[Address | Literal["off"]] = Field(
        "off", description='host:port of the API and the page, or "off"; whoever connects needs a token (`relaymta token create`)'
    )
    tls: Restart[bool] = Field(
        False, description="speak HTTPS there, with [[certificate]]; needed where `listen` is not a loopback address"
    )
    names: Restart[list[Hostname]] = Field(
        [], description="names by which browsers and clients call `listen`, beside localhost, `hostname` and IP addresses, such "
        "as that of a reverse proxy; a request for another name is refused",
    )  # fmt: skip
    tokens: Restart[str] = Field("", description="file of the hashes of tokens; default: admin-tokens.json in the spool")
    session: Restart[Duration] = Field(12 * 3600.0, gt=0, description="after this time a login on the page ends")

    def problems(self) -> Iterator[tuple[str, str]]:
        """As of all tables."""
        if self.listen == "off":
            if self.tls:
                yield "tls", "has no effect without admin.listen"
            return
        host, _ = parse_hostport(self.listen)
        if not self.tls and host != "localhost" and not is_loopback(host):
            yield (
                "listen",
                (
                    f"{self.listen} is not a loopback address: tokens and mail would be sent in the clear. Set admin.tls = true "
                    "(with a [[certificate]]), or listen on 127.0.0.1"
                ),
            )
