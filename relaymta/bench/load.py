"""What load is asked for: how many messages, how fast, over which connections."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["AUTHS", "TLS", "Load"]

TLS = ("off", "starttls", "implicit")
AUTHS = ("off", "plain", "login")


@dataclass(frozen=True)
class Load:
    """One load. It ends after `messages` messages or `seconds`, whichever is first. `rate`: messages a second, whether or not
    there are replies (open loop); 0: each connection sends the next message when the one before is answered (closed loop)."""

    connections: int = 20
    messages: int = 1_000_000
    seconds: float = 30.0
    rate: float = 0.0
    ramp: float = 1.0  # seconds in which connections are opened, and the rate rises
    per_connection: int = 0  # messages on a connection; 0: any number
    pipelining: bool = True
    size: str = "4k"
    recipients: int = 1
    domains: int = 1
    tls: Literal["off", "starttls", "implicit"] = "off"
    auth: Literal["off", "plain", "login"] = "off"
    seed: int = 1

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def sentence(self) -> str:
        """In words."""
        reused = {0: "reused connections", 1: "connections, one for each message"}.get(
            self.per_connection, f"connections, {self.per_connection} messages on each"
        )
        parts = [f"{self.connections} {reused}", f"{self.size} each"]
        parts += [f"{self.rate:g} messages a second"] if self.rate else []
        parts += [f"{self.recipients} recipients a message"] if self.recipients > 1 else []
        parts += [f"{self.domains} domains"] if self.domains > 1 else []
        parts += [{"starttls": "STARTTLS", "implicit": "TLS from the first octet"}[self.tls]] if self.tls != "off" else []
        parts += [f"AUTH {self.auth.upper()}"] if self.auth != "off" else []
        parts += [] if self.pipelining else ["no pipelining"]
        return ", ".join(parts)
