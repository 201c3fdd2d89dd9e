"""Verification of DKIM signatures (RFC 6376 6) by dkimpy, with our canonicalizer and OpenSSL in place of its own, and stricter:
no rsa-sha1 (RFC 8301), keys only as their records allow (h=, k=, s=), no l= that leaves octets unsigned."""

import asyncio
import base64
import binascii
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import dkim
import dkim.canonicalization
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.proto.address import DomainError, normalize_domain
from relaymta.proto.dkim import canonical_field, name_of, split_fields
from relaymta.proto.mailbox import Malformed, authors, domains

__all__ = ["Claims", "Keys", "Verified", "arc", "claims", "keys_of", "verify"]

MOST = 5  # signatures that are verified; further ones are ignored
SETS = 10  # of an ARC chain; RFC 8617 4.2.1 allows 50, real mail has less than a tenth of them
BITS_LEAST, BITS_MOST = 1024, 4096  # RFC 8301 3.2
EXPONENT_MOST = 1 << 32  # it is 65537 in practice; a long one takes as long as signing
KEYS_KEPT = 1000  # parsed ones

# Limits for what costs their product: dkimpy searches all fields for each name in h=.
FIELDS = 500  # of a header; real mail has less than half as many
NAMES = 200  # in h=
OCTETS = 4096  # of a signature's field, or of a key's record
# A run of white space in one of these: several of dkimpy's expressions are quadratic in it.
_GAP = re.compile(rb"\s{80}")

_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9_]*")

Tags = dict[str, str]
Keys = dict[str, str | DnsFailure]  # by name; "" for none
Bodies = dict[bool, tuple[str, int]]  # for a relaxed body or not: its hash, and how many octets it covers


class Claims(NamedTuple):
    """The signatures and authors that a message's header claims. `signatures`: the tags of each, the first MOST; `chain`: those
    of its ARC sets; {} for a malformed one. `authors`: the domains in From:, none where that is `malformed`."""

    fields: list[tuple[bytes, bytes]]  # name and value, as received
    signatures: list[Tags]
    chain: list[Tags]
    authors: list[str]
    malformed: bool

    def forms(self) -> set[bool]:
        """The canonical forms of the body that the signatures cover (True: relaxed)."""
        found = {_relaxed(tags, "simple/simple") for tags in self.signatures}
        return found | {_relaxed(tags, "relaxed/relaxed") for tags in self.chain if "bh" in tags}

    def effort(self) -> int:
        """The cost of verifying all of them, in steps of some tenths of a microsecond: each name in h= is searched in all
        fields."""
        signed = [*self.signatures, *self.chain]
        return 500 * len(signed) + len(self.fields) * sum(map(_names, signed))


class Verified(NamedTuple):
    """The result of one signature: pass, fail, neutral, policy, permerror or temperror (RFC 8601 2.7.1)."""

    result: str
    domain: str
    selector: str
    algorithm: str
    reason: str


class _Relaxed:
    """Replaces dkimpy's own form: linear on hostile input."""

    name = b"our relaxed"

    @staticmethod
    def canonicalize_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        found = []
        for name, value in headers:
            own, _, rest = canonical_field(name + b":" + value.removesuffix(b"\r\n")).partition(b":")
            found.append((own, rest + b"\r\n"))
        return found


class _Simple:
    name = b"our simple"

    @staticmethod
    def canonicalize_headers(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        return headers


@lru_cache(KEYS_KEPT)
def _public(exponent: int, modulus: int) -> rsa.RSAPublicKey:
    return rsa.RSAPublicNumbers(exponent, modulus).public_key()


def _verify_rsa(hashed: Any, signature: bytes, public_key: dict[str, int]) -> bool:
    """Replaces dkimpy's own arithmetic."""
    try:
        _public(public_key["publicExponent"], public_key["modulus"]).verify(
            signature, hashed.digest(), padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())
        )
    except InvalidSignature:
        return False
    return True


# Under names of our own: other users of dkimpy in this process keep its canonicalizer.
_FORMS = {b"relaxed": b"our relaxed", b"simple": b"our simple"}
dkim.canonicalization.ALGORITHMS.update({b"our relaxed": _Relaxed, b"our simple": _Simple})
dkim.RSASSA_PKCS1_v1_5_verify = _verify_rsa
# Finds b=; dkimpy's own expression is cubic in the length of the folds.
dkim.RE_BTAG = re.compile(rb"([;\s]b\s*+=)(?:\s*+[a-zA-Z0-9+/=])*+(?:\r?\n\Z)?")
dkim.evaluate_pk = lru_cache(KEYS_KEPT)(dkim.evaluate_pk)  # the same few records recur


# What dkimpy raises on hostile input.
_HOSTILE = (dkim.DKIMException, binascii.Error, IndexError, KeyError, ValueError, TypeError, AttributeError)


class _Header:
    """A mix-in for dkimpy's classes: they get the header fields that we have parsed, and the hashes of the body."""

    def __init__(self, fields: list[tuple[bytes, bytes]], bodies: Bodies) -> None:
        super().__init__(minkey=BITS_LEAST)  # type: ignore[call-arg]
        self.headers, self.body = fields, b""
        self.bodies = bodies

    def verify_sig_process(self, sig: dict[bytes, bytes], *others: Any) -> Any:
        if b"bh" in sig:
            tags = {name.decode("latin-1"): value.decode("latin-1") for name, value in sig.items()}
            found, octets = self.bodies[_relaxed(tags, "simple/simple")]
            if "".join(tags["bh"].split()) != found:
                raise dkim.ValidationError("body hash mismatch")
            if "l" in tags and tags["l"].strip() != str(octets):
                raise dkim.ValidationError("l= leaves octets unsigned")
            sig = {name: value for name, value in sig.items() if name != b"bh"}
        head, _, body = sig.get(b"c", b"simple").partition(b"/")
        if head not in _FORMS or body not in (b"", *_FORMS):
            raise dkim.MessageFormatError("invalid c= value")
        sig = sig | {b"c": _FORMS[head]}
        return super().verify_sig_process(sig, *others)  # type: ignore[misc]


class _Dkim(_Header, dkim.DKIM):  # type: ignore[misc]
    pass


class _Arc(_Header, dkim.ARC):  # type: ignore[misc]
    pass


def claims(header: bytes) -> Claims:
    """The claims of a header block."""
    fields = split_fields(header)
    found: dict[bytes, list[Tags]] = {b"dkim-signature": [], b"arc-seal": [], b"arc-message-signature": []}
    for field in fields:
        rows = found.get(name_of(field))
        if rows is not None and len(rows) <= SETS:
            rows.append(_tags(field.partition(b":")[2]))
    signatures, seals, messages = found.values()
    pairs = [field.partition(b":") for field in fields]
    try:
        names, malformed = domains(authors(header, fields=fields)), False
    except Malformed:
        names, malformed = [], True
    return Claims(
        [(name, value + b"\r\n") for name, colon, value in pairs if colon],
        signatures[:MOST],
        [*seals, *messages],
        names,
        malformed,
    )


def _relaxed(tags: Tags, default: str) -> bool:
    """Whether a signature covers the relaxed form of the body (RFC 6376 3.5, c=)."""
    return tags.get("c", default).partition("/")[2].strip() == "relaxed"


def _tags(value: bytes) -> Tags:
    found = {}
    if len(value) > OCTETS or _GAP.search(value):
        return {}
    for part in value.split(b";"):
        name, equals, content = part.partition(b"=")
        name = name.strip()
        if equals and _NAME.fullmatch(name):
            found[name.decode()] = b"".join(content.split()).decode("utf-8", "replace")
        elif part.strip():
            return {}
    return found


def _names(tags: Tags) -> int:
    """The number of names in h=."""
    return tags.get("h", "").count(":") + 1


def _name(tags: Tags) -> str:
    return f"{tags.get('s', '')}._domainkey.{tags.get('d', '')}".lower()


async def keys_of(resolver: Resolver, claimed: Claims) -> Keys:
    """The key records of all signatures, from the DNS."""

    async def one(name: str) -> str | DnsFailure:
        if not _in_dns(name):
            return ""
        try:
            return (await resolver.txt(name))[0]
        except (NoData, NoSuchName, IndexError, ValueError):
            return ""
        except DnsFailure as error:
            return error

    names = {_name(tags) for tags in [*claimed.signatures, *claimed.chain] if tags.get("d") and tags.get("s")}
    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


def _in_dns(name: str) -> bool:
    """Whether a name is valid in the DNS; an invalid one has no record, and is no temporary failure."""
    try:
        return normalize_domain(name) == name and all(name.split("."))
    except DomainError:
        return False


def verify(claimed: Claims, bodies: Bodies, keys: Keys, now: int) -> list[Verified]:
    """The result of each signature. `keys`: from keys_of(); `now`: the wall clock, seconds."""
    found = []
    message = _Dkim(claimed.fields, bodies)
    for number, tags in enumerate(claimed.signatures):
        key = keys.get(_name(tags), "")
        outcome = _refusal(claimed, tags, bodies, key, now) or _checked(message, number, str(key))
        found.append(Verified(outcome[0], tags.get("d", "").lower(), tags.get("s", ""), tags.get("a", ""), outcome[1]))
    return found


def arc(claimed: Claims, bodies: Bodies, keys: Keys) -> str:
    """The result of the ARC chain: none, pass or fail (RFC 8617 5.2), or temperror."""
    if not claimed.chain:
        return "none"
    if len(claimed.chain) > 2 * SETS or len(claimed.fields) > FIELDS or any(map(_unlikely, claimed.chain)):
        return "fail"
    if any(isinstance(keys.get(_name(tags)), DnsFailure) for tags in claimed.chain):
        return "temperror"

    def look_up(name: bytes, timeout: int = 5) -> bytes:
        key = str(keys.get(name.decode("utf-8", "replace").rstrip(".").lower(), "")).encode()
        return key if _usable(_tags(key)) else b""

    try:
        found, _, _ = _Arc(claimed.fields, bodies).verify(dnsfunc=look_up)
    except _HOSTILE:
        return "fail"
    return {b"pass": "pass", b"none": "none"}.get(found, "fail")


def _unlikely(tags: Tags) -> bool:
    """Whether an ARC signature is one that no implementation makes."""
    return tags.get("a") != "rsa-sha256" or _names(tags) > NAMES


def _refusal(claimed: Claims, tags: Tags, bodies: Bodies, key: str | DnsFailure, now: int) -> tuple[str, str] | None:
    """(result, reason) of a signature that is not verified; None: verify it."""
    missing = [name for name in ("v", "a", "b", "bh", "d", "h", "s") if not tags.get(name)]
    if missing:
        return "permerror", f"no {missing[0]}= in the signature"
    if tags["a"] not in ("rsa-sha256", "ed25519-sha256"):
        return "policy", f"{tags['a']} is not accepted"
    covered = tags["h"].lower().split(":").count("from")
    if not covered:
        return "permerror", "From: is not signed"
    if covered < sum(name_of(name) == b"from" for name, _ in claimed.fields):
        return "policy", "a From: is not signed"  # it may have been added (RFC 6376 8.15)
    if len(claimed.fields) > FIELDS or _names(tags) > NAMES:
        return "policy", "too many fields"
    if "x" in tags and tags["x"].isascii() and tags["x"].isdigit() and int(tags["x"]) < now:
        return "fail", "the signature has expired"
    if isinstance(key, DnsFailure):
        if tags["bh"] != bodies[_relaxed(tags, "simple/simple")][0]:
            return "fail", "body hash mismatch"  # with any key
        return "temperror", "temporary failure to look up the key"
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
    if found is None and not _usable(record):
        found = "permerror", "the key is malformed, too short or too long"
    if found is None and "l" in tags and tags["l"] != str(bodies[_relaxed(tags, "simple/simple")][1]):
        found = "policy", "l= leaves octets unsigned"
    return found


def _usable(record: Tags) -> bool:
    """Whether p= is a valid key of an accepted size."""
    return "p" in record and _is_key(record.get("k", "rsa"), record["p"])


@lru_cache(KEYS_KEPT)
def _is_key(kind: str, text: str) -> bool:
    try:
        octets = base64.b64decode(text, validate=True)
        if kind == "ed25519":
            return len(octets) == 32
        key = serialization.load_der_public_key(octets)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False
    if not isinstance(key, rsa.RSAPublicKey):
        return False
    return BITS_LEAST <= key.key_size <= BITS_MOST and key.public_numbers().e < EXPONENT_MOST


def _identity(tags: Tags) -> str:
    return tags.get("i", "").rpartition("@")[2].lower() or tags["d"].lower()


def _checked(message: _Dkim, number: int, key: str) -> tuple[str, str]:
    """(result, reason) by dkimpy."""
    look_up: Callable[..., bytes] = lambda name, timeout=5: key.encode()  # noqa: E731
    try:
        if message.verify(idx=number, dnsfunc=look_up):
            return "pass", ""
    except dkim.ValidationError as error:
        return "fail", str(error).partition(":")[0]
    except dkim.KeyFormatError as error:
        return "permerror", str(error)
    except _HOSTILE as error:
        return "permerror", f"{type(error).__name__}: {error}"
    return "fail", "the signature does not verify"
