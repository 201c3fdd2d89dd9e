"""An entry as a Mail for a peer, and whether the peer can accept it."""

from relaymta.config import Route
from relaymta.proto.arguments import XFORWARD
from relaymta.proto.envelope import EIGHT_BIT, SMTPUTF8, UTF8_HEADER, Envelope
from relaymta.proto.smtp_client import Features, Mail
from relaymta.queue import Entry, format_id
from relaymta.send.trail import Trail

__all__ = ["is_large", "mail_of", "told_of", "unfit"]

UNKNOWN = "0.0.0.0"  # the address of a client whose own is unknown (accept/intake.py)


def told_of(mail: Mail) -> tuple[str, str]:
    """The id and the application of a message that is sent."""
    entry = mail.cargo
    return (format_id(entry.ident), entry.envelope.application) if isinstance(entry, Entry) else ("", "")


def is_large(entry: Entry) -> bool:
    """Whether the message is a large one: its message data is streamed from a file of its own."""
    body = entry.envelope.body
    return body is not None and not body.segment


def unfit(entry: Entry, features: Features) -> tuple[str, str] | None:
    """Why a peer with these features cannot accept a message, as (enhanced status code, text); None when it can."""
    envelope = entry.envelope
    if envelope.flags & SMTPUTF8 and not features.smtputf8:
        needed = (
            envelope.flags & UTF8_HEADER
            or not envelope.sender.isascii()
            or not all(address.isascii() for _, address in entry.recipients)
        )
        if needed:
            return "5.6.7", "the message needs SMTPUTF8, which the peer does not offer"
    if envelope.flags & EIGHT_BIT and not features.eight_bit:
        return "5.6.3", "the message needs 8BITMIME, which the peer does not offer"
    if features.size and envelope.size > features.size:
        return "5.3.4", f"the message has {envelope.size} octets, the peer accepts {features.size}"
    return None


def mail_of(entry: Entry, route: Route, trail: Trail | None = None) -> Mail:
    """An entry as a Mail for a host of a route. `trail`: what the attempt has come to at other hosts: the mail is for the
    recipients that are left."""
    rewrite = route.rewrite_sender
    envelope = entry.envelope
    sender = envelope.sender
    if rewrite and sender:
        sender = sender.rpartition("@")[0] + rewrite if rewrite.startswith("@") else rewrite
    flags = envelope.flags
    mail = Mail(
        entry,
        sender,
        entry.recipients if trail is None else trail.left(entry.recipients),
        entry.data,
        envelope.size,
        flags & EIGHT_BIT != 0,
        flags & SMTPUTF8 != 0,
    )
    mail.trail = trail
    if route.xforward:
        mail.forward = _forward(entry.ident, envelope)
    return mail


def _forward(ident: int, envelope: Envelope) -> dict[str, str]:
    """What XFORWARD says of a message: the client that it came from, as its own client has said by XFORWARD, if it has; else
    that client itself, and our id."""
    if envelope.forwarded:
        known = dict.fromkeys(XFORWARD, "") | envelope.forwarded
        return known | {"ADDR": _literal(known["ADDR"]), "IDENT": known["IDENT"] or format_id(ident)}
    client = envelope.client
    ours = not client or bool(envelope.user) or client.startswith("127.") or client == "::1"
    return {
        "NAME": "",
        "ADDR": _literal(client) if client != UNKNOWN else "",
        "PORT": "",
        "PROTO": "",
        "HELO": envelope.helo,
        "IDENT": format_id(ident),
        "SOURCE": "LOCAL" if ours else "REMOTE",
    }


def _literal(address: str) -> str:
    """An address as XFORWARD has it."""
    return f"IPV6:{address}" if ":" in address else address
