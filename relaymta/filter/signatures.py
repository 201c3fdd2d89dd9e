"""DKIM signatures of others (RFC 6376 6), verified by dkimpy with our canonicalizer and OpenSSL in the place of its own, and
strict where it is not: no rsa-sha1 (RFC 8301), keys for what they say (h=, k=, s=), no l= that leaves octets unsigned."""

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import dkim
import dkim.canonicalization
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.proto.dkim import canonical_body, canonical_field, name_of, split_fields
from relaymta.proto.header import header_end

__all__ = ["Verified", "arc", "keys_of", "signatures_of", "verify"]

MOST = 5  # signatures that are looked at; more make nothing better
BITS_LEAST = 1024
ARC_FIELDS = (b"arc-seal", b"arc-message-signature")  # RFC 8617 4.1; those of the last hop stand first

_TAG = re.compile(rb"\s*([A-Za-z][A-Za-z0-9_]*)\s*=\s*(.*?)\s*\Z", re.S)


class Verified(NamedTuple):
    """What came of one signature: pass, fail, neutral, policy, permerror or temperror (RFC 8601 2.7.1)."""

    result: str
    domain: str
    selector: str
    algorithm: str
    reason: str


Tags = dict[str, str]


class _Relaxed:
    """In dkimpy's place: linear on hostile input."""

    name = b"relaxed"

    @staticmethod
    def canonicalize_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        found = []
        for name, value in headers:
            own, _, rest = canonical_field(name + b":" + value.removesuffix(b"\r\n")).partition(b":")
            found.append((own, rest + b"\r\n"))
        return found

    @staticmethod
    def canonicalize_body(body: bytes) -> bytes:
        return canonical_body(body, True)


class _Simple:
    name = b"simple"

    @staticmethod
    def canonicalize_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        return headers

    @staticmethod
    def canonicalize_body(body: bytes) -> bytes:
        return canonical_body(body, False)


def _verify_rsa(hashed: Any, signature: bytes, public_key: dict[str, int]) -> bool:
    """In the place of dkimpy's arithmetic."""
    key = rsa.RSAPublicNumbers(public_key["publicExponent"], public_key["modulus"]).public_key()
    try:
        key.verify(signature, hashed.digest(), padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


dkim.canonicalization.ALGORITHMS.update({b"relaxed": _Relaxed, b"simple": _Simple})
dkim.RSASSA_PKCS1_v1_5_verify = _verify_rsa


def signatures_of(message: bytes, names: tuple[bytes, ...] = (b"dkim-signature",)) -> list[Tags]:
    """The tags of a message's signatures (fields of these names), the first MOST; {} for one that has none to speak of."""
    fields = split_fields(message[: header_end(message)])
    return [_tags(field.partition(b":")[2]) for field in fields if name_of(field) in names][:MOST]


def _tags(value: bytes) -> Tags:
    found = {}
    for part in value.split(b";"):
        match = _TAG.match(part)
        if match is not None:
            found[match[1].decode()] = b"".join(match[2].split()).decode("utf-8", "replace")
        elif part.strip():
            return {}
    return found


def _name(tags: Tags) -> str:
    return f"{tags.get('s', '')}._domainkey.{tags.get('d', '')}".lower()


async def keys_of(resolver: Resolver, signatures: list[Tags]) -> dict[str, str | DnsFailure]:
    """The key records of signatures, by name; "" where there is none."""
    found: dict[str, str | DnsFailure] = {}
    for tags in signatures:
        name = _name(tags)
        if name in found or not tags.get("d") or not tags.get("s"):
            continue
        try:
            found[name] = (await resolver.txt(name))[0]
        except (NoData, NoSuchName, IndexError, ValueError):
            found[name] = ""
        except DnsFailure as error:
            found[name] = error
    return found


def verify(message: bytes, signatures: list[Tags], keys: dict[str, str | DnsFailure], now: int) -> list[Verified]:
    """Thread: what comes of each signature, with the keys that the DNS had. `now`: the wall clock, seconds."""
    found = []
    for number, tags in enumerate(signatures):
        key = keys.get(_name(tags), "")
        result, reason = _refusal(tags, key, now) or _checked(message, number, tags, str(key))
        found.append(Verified(result, tags.get("d", "").lower(), tags.get("s", ""), tags.get("a", ""), reason))
    return found


def arc(message: bytes, signatures: list[Tags], keys: dict[str, str | DnsFailure]) -> str:
    """Thread: what a chain of ARC sets comes to: none, pass or fail (RFC 8617 5.2), or temperror. `signatures`: of ARC_FIELDS."""
    if not signatures:
        return "none"
    if any(isinstance(key, DnsFailure) for key in keys.values()):
        return "temperror"
    if any(tags.get("a", "rsa-sha256") != "rsa-sha256" for tags in signatures):
        return "fail"

    def look_up(name: bytes, timeout: int = 5) -> bytes:
        return str(keys.get(name.decode("utf-8", "replace").rstrip(".").lower(), "")).encode()

    try:
        found, _, _ = dkim.arc_verify(message, dnsfunc=look_up, minkey=BITS_LEAST)
    except (dkim.DKIMException, binascii.Error, IndexError, KeyError, ValueError, TypeError, AttributeError):
        return "fail"
    return {b"pass": "pass", b"none": "none"}.get(found, "fail")


def _refusal(tags: Tags, key: str | DnsFailure, now: int) -> tuple[str, str] | None:
    """Why a signature is not looked at: (result, reason)."""
    missing = [name for name in ("v", "a", "b", "bh", "d", "h", "s") if not tags.get(name)]
    if missing:
        return "permerror", f"no {missing[0]}= in the signature"
    if tags["a"] not in ("rsa-sha256", "ed25519-sha256"):
        return "policy", f"{tags['a']} is not accepted"
    if "from" not in tags["h"].lower().split(":"):
        return "permerror", "From: is not signed"
    if "x" in tags and tags["x"].isdigit() and int(tags["x"]) < now:
        return "fail", "the signature has expired"
    if isinstance(key, DnsFailure):
        return "temperror", "the DNS does not say the key"
    record = _tags(key.encode()) if key else {}
    tests: list[tuple[bool, str]] = [
        (not record or record.get("v", "DKIM1") != "DKIM1", "no key for the signature"),
        (record.get("p") == "", "the key was revoked"),
        (record.get("k", "rsa") != tags["a"].partition("-")[0], "the key is for another algorithm"),
        ("h" in record and "sha256" not in record["h"].split(":"), "the key is for other hashes"),
        ("s" in record and not {"*", "email"} & set(record["s"].split(":")), "the key is not for mail"),
        ("s" in record.get("t", "").split(":") and _identity(tags) != tags["d"].lower(), "the key is not for subdomains"),
    ]
    found = next((("permerror", reason) for wrong, reason in tests if wrong), None)
    return found if found is not None or _usable(record) else ("permerror", "the key is malformed, or too short")


def _usable(record: Tags) -> bool:
    """Whether p= is a key that somebody could have signed with (RFC 8301 3.2: RSA of 1024 bits at least)."""
    try:
        octets = base64.b64decode(record["p"], validate=True)
        if record.get("k", "rsa") == "ed25519":
            return len(octets) == 32
        key = serialization.load_der_public_key(octets)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return isinstance(key, rsa.RSAPublicKey) and key.key_size >= BITS_LEAST


def _identity(tags: Tags) -> str:
    return tags.get("i", "").rpartition("@")[2].lower() or tags["d"].lower()


def _checked(message: bytes, number: int, tags: Tags, key: str) -> tuple[str, str]:
    """By dkimpy."""
    if "l" in tags:
        whole = canonical_body(message[header_end(message) :], tags.get("c", "").endswith("/relaxed"))
        if not tags["l"].isdigit() or int(tags["l"]) < len(whole):
            return "policy", "l= leaves octets unsigned"
    look_up: Callable[..., bytes] = lambda name, timeout=5: key.encode()  # noqa: E731
    try:
        if dkim.DKIM(message, minkey=BITS_LEAST).verify(idx=number, dnsfunc=look_up):
            return "pass", ""
    except dkim.ValidationError as error:
        return "fail", str(error).partition(":")[0]
    except dkim.KeyFormatError as error:
        return "permerror", str(error)
    except (dkim.DKIMException, binascii.Error, IndexError, KeyError, ValueError, TypeError) as error:
        return "permerror", f"{type(error).__name__}: {error}"
    return "fail", "the signature does not verify"
