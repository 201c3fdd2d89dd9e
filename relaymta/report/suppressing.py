"""The consumer that tells the suppression list of hard bounces and complaints: from the journal, so that none is overlooked,
whoever dies meanwhile. What comes twice changes nothing."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from relaymta.config import Config
from relaymta.errors import RelayError
from relaymta.proto.address import compared, domain_of
from relaymta.proto.envelope import reply_text
from relaymta.report.streams import Consumer, NotTaken

__all__ = ["Suppressing"]

MAILBOX = "mailbox"  # the peer of what is filed here


class Suppressing(Consumer):
    """`note(events)`: has the list take events (`Suppressor.take`), which it has when that returns."""

    name = "+suppression"  # no webhook can be called so

    def __init__(self, config: Config, note: Callable[[list[dict[str, Any]]], Awaitable[Any]]) -> None:
        self._note = note
        self.configure(config)

    def configure(self, config: Config) -> None:
        """The configuration is this one from now on."""
        self.follows = config.suppression.follows
        self._ours = frozenset(compared(domain.rstrip(".")) for domain in config.relay.domains)

    def wants(self, event: dict[str, Any]) -> bool:
        """Not of interest: what an operator or the time has decided, mail from nobody, such as DSNs, whose recipients anybody may
        have made up, and addresses of ours, that may be made tomorrow. Nor a complaint of no message: an operator has made an
        entry of it himself, with a note and an end of his own, and may have removed it since."""
        if not self.follows:
            return False
        if event["event"] == "complained":
            return bool(event["message"])
        if event["event"] != "bounced" or event["reason"] != "permanent" or event["cause"] == "operator":
            return False
        ours = compared(domain_of(event["recipient"])) in self._ours
        return bool(event["sender"]) and event["peer"] != MAILBOX and not ours

    async def take(self, events: list[dict[str, Any]]) -> None:
        """As of Consumer."""
        try:
            await self._note([_noted(event) for event in events])
        except (RelayError, ConnectionError, TimeoutError) as error:
            raise NotTaken(str(error) or type(error).__name__) from None


def _noted(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the list takes it."""
    reply = event.get("reply", {"text": event.get("text", "")})
    return {
        "event": event["event"], "application": event["application"], "recipient": event["recipient"],
        "reply": reply_text(reply.get("code", 0), reply.get("enhanced", ""), reply.get("text", "")),
        "time": round(datetime.fromisoformat(event["time"]).timestamp() * 1000), "phase": event.get("phase", ""),
        "recipients": event.get("recipients", 1),
    }  # fmt: skip
