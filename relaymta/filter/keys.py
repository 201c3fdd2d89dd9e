"""DKIM keys (RFC 6376): their files, and the TXT records that publish them."""

import base64
import itertools
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from relaymta.config import Config, Dkim, check_each
from relaymta.errors import ConfigError
from relaymta.files import read_octets
from relaymta.filter.signatory import Private
from relaymta.proto.dkim import OVERSIGNED, SIGNED, Signature

__all__ = ["Key", "check", "load_key", "record", "zone_line"]

BITS_LEAST = 1024
STRING = 255  # octets of one string of a TXT record

_numbers = itertools.count()


class Key(NamedTuple):
    """A key in use, and the fields that it signs. `number`: unique among the keys that this process has read."""

    settings: Dkim
    private: Private
    signature: Signature
    number: int

    @property
    def der(self) -> bytes:
        """The private key in DER (PKCS #8), for the signing process."""
        form = serialization.PrivateFormat.PKCS8
        return self.private.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption())


def check(config: Config) -> None:
    """Read every key file, as the calling user. Raises ConfigError with all errors."""
    check_each("dkim", config.dkim, load_key)


def load_key(settings: Dkim) -> Key:
    """Read a key file. Raises ConfigError with the error."""
    try:
        private = serialization.load_pem_private_key(read_octets(settings.key), None)
    except OSError as error:
        raise ConfigError([f"dkim.key: {settings.key}: {error.strerror}"]) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError([f"dkim.key: {settings.key}: no private key in PEM form without a pass phrase"]) from None
    if not isinstance(private, Private):
        raise ConfigError([f"dkim.key: {settings.key}: neither RSA nor Ed25519"])
    if isinstance(private, rsa.RSAPrivateKey) and private.key_size < BITS_LEAST:
        raise ConfigError([f"dkim.key: {settings.key}: {private.key_size} bits are too few (RFC 8301 3.2)"])
    algorithm = "rsa-sha256" if isinstance(private, rsa.RSAPrivateKey) else "ed25519-sha256"
    head, _, body = settings.canonicalization.partition("/")
    more = tuple(name.lower() for name in settings.signed)
    over = tuple(name.lower() for name in settings.oversigned)
    signature = Signature(
        settings.domain.lower(), settings.selector.lower(), algorithm, head == "relaxed", body == "relaxed",
        (*SIGNED, *(name for name in more if name not in SIGNED)), over or OVERSIGNED, int(settings.expires),
    )  # fmt: skip
    return Key(settings, private, signature, next(_numbers))


def record(key: Key) -> str:
    """The TXT record of a key's public half (RFC 6376 3.6.1, RFC 8463 4)."""
    public = key.private.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(raw).decode()}"
    raw = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"v=DKIM1; k=rsa; p={base64.b64encode(raw).decode()}"


def zone_line(name: str, text: str) -> str:
    """A TXT record in the syntax of a zone file (RFC 1035 5.1)."""
    strings = [text[i : i + STRING] for i in range(0, len(text), STRING)]
    return f"{name}. TXT " + " ".join(f'"{part}"' for part in strings)
