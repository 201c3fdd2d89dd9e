"""Public keys as TXT records publish them (RFC 6376 3.6.1, RFC 8463 4): what a record allows, and whether a signature is its
key's. Tag lists (3.2), which signatures are as well."""

import base64
import re
from collections.abc import Iterable
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa, utils

from relaymta.proto.dkim import without_space

__all__ = ["Tags", "candidates", "listed", "refusal", "tag_list", "verifies"]

BITS_LEAST, BITS_MOST = 1024, 4096  # RFC 8301 3.2
EXPONENT_MOST = 1 << 32  # it is 65537 in practice; a long one takes as long as signing
KEPT = 1000  # records and keys that were read: the same few recur
OCTETS = 4096  # of a record
RECORDS = 10  # of a selector, which are tried; there should be one

_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9_]*\Z")
_PADDING, _HASHED = padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())

Tags = dict[str, str]
Public = rsa.RSAPublicKey | ed25519.Ed25519PublicKey


def tag_list(value: bytes) -> Tags:
    """The tags of a list by name, white space around them removed; {} when it is malformed or a tag occurs twice (3.2)."""
    found: Tags = {}
    for part in value.split(b";"):
        name, equals, content = part.partition(b"=")
        name = name.strip()
        if equals and _NAME.match(name) and name.decode() not in found:
            found[name.decode()] = content.strip().decode("utf-8", "replace")
        elif part.strip():
            return {}
    return found


def listed(value: str) -> list[str]:
    """The elements of a colon-separated list, with white space around them or not: h=, s= and t= of a key, h= and q= of a
    signature."""
    return [one.strip() for one in value.split(":")]


@lru_cache(KEPT)
def _record(text: str) -> Tags:
    return tag_list(text.encode())


def candidates(texts: Iterable[str]) -> list[Tags]:
    """The key records among the texts at a selector, in an order that does not depend on the order in which the DNS has given
    them: there should be one (3.6.2.2); of several each may be the one (6.1.2)."""
    read = (_record(text) for text in sorted(set(texts)) if len(text) <= OCTETS)
    return [one for one in read if "p" in one and one.get("v", "DKIM1") == "DKIM1"][:RECORDS]


def refusal(record: Tags, algorithm: str, below: bool) -> str:
    """Why a key may not be used for a message's signature; "": it may. `below`: the signature is for a subdomain of the key's."""
    tests: list[tuple[bool, str]] = [
        (record["p"] == "", "the key was revoked"),
        (record.get("k", "rsa") != algorithm.partition("-")[0], "the key is for another algorithm"),
        ("h" in record and "sha256" not in listed(record["h"]), "the key is for other hashes"),
        ("s" in record and not {"*", "email"} & set(listed(record["s"])), "the key is not for mail"),
        (below and "s" in listed(record.get("t", "")), "the key is not for subdomains"),
    ]
    found = next((reason for wrong, reason in tests if wrong), "")
    return found or ("" if _key_of(record) is not None else "the key is malformed, too short or too long")


def verifies(record: Tags, hashed: bytes, signature: bytes) -> bool:
    """Whether `signature` is the one of this record's key over a SHA-256 (3.3, RFC 8463 3)."""
    key = _key_of(record)
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, hashed, _PADDING, _HASHED)
        elif key is not None:
            key.verify(signature, hashed)
    except InvalidSignature:
        return False
    return key is not None


def _key_of(record: Tags) -> Public | None:
    """The key in p=; None when it is not valid, or of a size that is not accepted."""
    return _public(record.get("k", "rsa"), record["p"])


@lru_cache(KEPT)
def _public(kind: str, text: str) -> Public | None:
    try:
        octets = base64.b64decode(without_space(text.encode()), validate=True)
        if kind == "ed25519":
            return ed25519.Ed25519PublicKey.from_public_bytes(octets)
        key = serialization.load_der_public_key(octets)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, rsa.RSAPublicKey) or not BITS_LEAST <= key.key_size <= BITS_MOST:
        return None
    return key if key.public_numbers().e < EXPONENT_MOST else None
