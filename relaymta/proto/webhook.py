"""What webhooks tell, and their signatures, as of Standard Webhooks 1.0.0: HMAC-SHA256 over id, time and body."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

__all__ = ["EVENTS", "key_of", "signed"]

EVENTS = ("accepted", "deferred", "delivered", "bounced", "held", "released", "complained")
PREFIX = "whsec_"
LEAST, MOST = 24, 64  # octets of a key


def key_of(secret: str) -> bytes:
    """The key of a secret as it is written: "whsec_" (which may be left out) and base64. ValueError says what is wrong; it does
    not repeat the secret."""
    text = secret.removeprefix(PREFIX).rstrip("=")
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise ValueError(f'it is not "{PREFIX}" and base64') from None
    if not LEAST <= len(key) <= MOST:
        raise ValueError(f"it has {len(key)} octets, where {LEAST} to {MOST} are needed")
    return key


def signed(ident: str, seconds: int, body: bytes, keys: Sequence[bytes]) -> dict[str, str]:
    """The headers of a request with this id and body, sent at a time (seconds since 1970), signed with each of the keys."""
    content = f"{ident}.{seconds}.".encode() + body
    marks = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
    return {
        "webhook-id": ident,
        "webhook-timestamp": str(seconds),
        "webhook-signature": " ".join(f"v1,{mark}" for mark in marks),
    }
