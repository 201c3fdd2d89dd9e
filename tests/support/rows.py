"""Many hosts behind one relay: each row of a table has a route of its own, by its recipients' domain, and sees its own mail."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relaymta import control
from tests.support.daemon import Relay


class Row:
    """The route `name` of a shared relay, for recipients in `name`.test. `keys`: further keys of the route, in TOML."""

    relay: Relay

    def __init__(self, name: str, *hosts: str, keys: str = "") -> None:
        self.name = name
        self.domain = f"{name}.test"
        listed = ",".join(f'"{host}"' for host in hosts)
        self.route = f'{{name="{name}",recipient_domain=["{self.domain}"],hosts=[{listed}]{keys and ","}{keys}}}'

    def at(self, *names: str) -> list[str]:
        """The addresses of these names in this row's domain."""
        return [f"{name}@{self.domain}" for name in names]

    def send(self, text: str = "Subject: x\r\n\r\nx\r\n", *to: str, sender: str = "") -> None:
        """Send one message to these names in this row's domain. A bounce is sent to the same host: to another name there."""
        self.relay.send(text, sender and f"{sender}@{self.domain}", *self.at(*(to or ("c",))))

    def _is_ours(self, event: dict[str, Any]) -> bool:
        addresses = event.get("recipients", [event.get("recipient", "")])
        return event.get("route") == self.name or any(address.endswith(f"@{self.domain}") for address in addresses)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name: those of this row's route and mail."""
        return [event for event in self.relay.events(name) if self._is_ours(event)]

    def ids(self) -> list[str]:
        """The ids of its messages."""
        return [event["id"] for event in self.events("queued")]

    def warnings(self, *places: str) -> list[str]:
        """The texts of the warnings with the id of one of its messages, or with one of `places`, in them."""
        ours = (*self.ids(), *places)
        texts = [event["text"] for event in self.relay.events("warning")]
        return [text for text in texts if any(part in text for part in ours)]

    def is_done(self) -> bool:
        """Whether it has sent mail, and none of it is in the queue."""
        return bool(self.ids()) and not any(self.name in row["queue"].split("/") for row in self.relay.summary())

    def explained(self) -> dict[str, Any]:
        """What the relay says of why its first message is in the queue."""
        return control.ask(self.relay.spool / "control.sock", "explain", ident=self.ids()[0])  # type: ignore[no-any-return]

    def wait(self) -> dict[str, Any]:
        """What its first message waits for, in the one queue that it is in."""
        (place,) = self.explained()["waits"]
        return place["wait"]  # type: ignore[no-any-return]


def relay_for(folder: Path, rows: Iterable[Row], *settings: str) -> Relay:
    """A relay with the routes of these rows, which then send by it."""
    rows = list(rows)
    relay = Relay(folder, None, f"route=[{','.join(row.route for row in rows)}]", *settings)
    for row in rows:
        row.relay = relay
    return relay
