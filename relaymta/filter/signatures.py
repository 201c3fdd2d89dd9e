"""Verification of DKIM signatures (RFC 6376 6), stricter than that: no rsa-sha1 (RFC 8301), no l= that leaves octets unsigned, no
From: that is not signed. And of ARC chains (RFC 8617 5.2), whose signatures are of the same kind."""

import asyncio
import base64
import hashlib
import re
from functools import cached_property
from typing import NamedTuple

from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
from relaymta.filter.published import Tags, candidates, listed, refusal, tag_list, verifies
from relaymta.proto.address import in_a_labels
from relaymta.proto.authres import behind_comments
from relaymta.proto.dkim import by_name, canonical_field, signed_octets, split_fields, unquoted, without_signature, without_space
from relaymta.proto.mailbox import Mailbox, Malformed, authors, domains

__all__ = ["Claim", "Claims", "Keys", "Verified", "arc", "claims", "keys_of", "verify"]

MOST = 5  # signatures that are verified; further ones are ignored
SETS = 10  # of an ARC chain; RFC 8617 4.2.1 allows 50, real mail has less than a tenth of them
FIELDS = 500  # of a header; real mail has less than half as many
NAMES = 200  # in h=
LONGEST = 12  # digits of a time (RFC 6376 3.5)
NEVER = 10**LONGEST

_KEY_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(?>(?:\.[A-Za-z0-9_-]{1,63})*)\Z")
IDENTITY = 1000  # characters of i= that are read
ADDRESS_SEEN = 8192  # octets of From: fields that are no address list, in which an address is looked for
_ENCODED_WORD = re.compile(rb"=\?[^?\s]*+\?[bqBQ]\?[^?\s]*+\?=")
_QUOTED_OR_OPEN = re.compile(rb'"(?>(?:[^"\\]++|\\.)*)"|\\.|\(', re.S)
_IN_COMMENT = re.compile(rb"\\.|[()]", re.S)
_DOMAIN_LABEL = rb"[A-Za-z0-9_\x80-\xff][A-Za-z0-9_\x80-\xff-]*+"
# White space around the @ (RFC 5322 4.4) only where a domain follows, so that `Sales @ Acme` is no address.
_ADDRESS = re.compile(rb"[^\s<>@,;:()](?:@(?:%b|\[)|\s*+@\s*+(?:%b\.%b|\[))" % (_DOMAIN_LABEL, _DOMAIN_LABEL, _DOMAIN_LABEL))
_DIGITS = re.compile(r"[0-9]+\Z")
_INSTANCE = re.compile(rb"([0-9]{1,2})(?![0-9])")

_FORMS = {"simple", "relaxed", *(f"{head}/{body}" for head in ("simple", "relaxed") for body in ("simple", "relaxed"))}  # of c=

Texts = tuple[str, ...] | str | DnsFailure  # all texts at a name, or the only one; "" for none
Keys = dict[str, Texts]  # by name
Bodies = dict[bool, tuple[str, int]]  # for a relaxed body or not: its hash, and how many octets it covers
Result = tuple[str, str]  # the result of a signature, and the reason


class Claim:
    """A signature that a header claims. `field`: as it is in the header; `tags`: its tags, {} where they are malformed."""

    def __init__(self, field: bytes) -> None:
        self.field = field
        self.tags = tag_list(field.partition(b":")[2])

    @cached_property
    def domain(self) -> str:
        """The signing domain, d=, in A-labels and lower case: it may be written in U-labels (RFC 8616 5)."""
        return in_a_labels(self.tags.get("d", ""))

    @cached_property
    def selector(self) -> str:
        """The selector, s=, in A-labels (RFC 8616 5); one of ASCII as it is written."""
        text = self.tags.get("s", "")
        return text if text.isascii() else in_a_labels(text)

    @cached_property
    def name(self) -> str:
        """The name of its key's record; one that the DNS cannot have where the tags are invalid."""
        return f"{self.selector.lower()}._domainkey.{self.domain}"

    @cached_property
    def names(self) -> list[str]:
        """The names in h=, in lower case."""
        return listed(self.tags.get("h", "").lower())

    @cached_property
    def signature(self) -> bytes | None:
        """The signature itself; None where b= is not in base64."""
        try:
            return base64.b64decode(without_space(self.tags["b"].encode()), validate=True)
        except (KeyError, ValueError):
            return None

    def relaxed_body(self, default: str) -> bool:
        """Whether it covers the relaxed form of the body (RFC 6376 3.5, c=)."""
        return self.tags.get("c", default).partition("/")[2] == "relaxed"

    def covers(self, body: tuple[str, int]) -> bool:
        """Whether bh= is the hash of this body."""
        return without_space(self.tags["bh"].encode()).decode() == body[0]

    def digest(self, fields: dict[bytes, list[bytes]], default: str) -> bytes:
        """The SHA-256 of the fields that it covers."""
        relaxed = self.tags.get("c", default).partition("/")[0] == "relaxed"
        names = [name.encode() for name in self.names]
        return hashlib.sha256(signed_octets(fields, self.field, names, relaxed)).digest()


class Claims(NamedTuple):
    """What a message's header claims. `signatures`: the first MOST. `seals`, `messages`, `results`: the three kinds of field
    of its ARC sets by instance; `chained`: these are complete sets, from 1 on. `authors`: the domains in From:, none where
    that is `malformed`; `authorless`: there is no From:, or no address in it."""

    fields: dict[bytes, list[bytes]]  # by name
    octets: int  # of the header
    signatures: list[Claim]
    seals: dict[int, Claim]
    messages: dict[int, Claim]
    results: dict[int, bytes]
    chained: bool
    authors: list[str]
    malformed: bool
    authorless: bool

    @property
    def chain(self) -> list[Claim]:
        """The signatures of the ARC sets."""
        return [*self.seals.values(), *self.messages.values()]

    @property
    def crowded(self) -> bool:
        """Whether the header has more fields than any that has to be verified."""
        return sum(map(len, self.fields.values())) > FIELDS

    def forms(self) -> set[bool]:
        """The canonical forms of the body that the signatures cover (True: relaxed)."""
        found = {one.relaxed_body("simple/simple") for one in self.signatures}
        return found | {one.relaxed_body("relaxed/relaxed") for one in self.messages.values()}

    def effort(self) -> int:
        """The cost of verifying all of them, in steps of some tenths of a microsecond: a signature may cover the whole header."""
        signed = [*self.signatures, *self.chain]
        return (500 + self.octets // 64) * len(signed) + 5 * sum(len(one.names) for one in signed)


class Verified(NamedTuple):
    """The result of one signature: pass, fail, policy, permerror or temperror (RFC 8601 2.7.1). `domain`,
    `selector`: in A-labels."""

    result: str
    domain: str
    selector: str
    algorithm: str
    reason: str


# What a header claims


def claims(header: bytes) -> Claims:
    """The claims of a header block."""
    fields = split_fields(header)
    named = by_name(fields)
    rows = [named.get(name, []) for name in (b"arc-seal", b"arc-message-signature", b"arc-authentication-results")]
    seals, messages = ({_instance_of(one): one for one in map(Claim, row[: SETS + 1])} for row in rows[:2])
    results = {_instance(field): field for field in rows[2][: SETS + 1]}
    sets = len(rows[0])
    chained = sets <= SETS and all(len(row) == sets for row in rows)
    chained = chained and set(seals) == set(messages) == set(results) == set(range(1, sets + 1))
    found: list[Mailbox] = []
    malformed, authorless = False, True
    try:
        found = authors(header, fields=fields)
        authorless = not any(one.domain for one in found)
    except Malformed:
        malformed = True
        authorless = not _names_a_domain(named.get(b"from", []))
    signatures = [Claim(field) for field in named.get(b"dkim-signature", [])[:MOST]]
    return Claims(named, len(header), signatures, seals, messages, results, chained, domains(found), malformed, authorless)


def _names_a_domain(fields: list[bytes]) -> bool:
    """Whether From: fields that are no address list have something like an address in them: not in a name in quotes or in an
    encoded word, nor in a comment. What is beyond ADDRESS_SEEN is not looked at, and taken for one."""
    left = ADDRESS_SEEN
    for field in fields:
        if left < len(field):
            return True
        left -= len(field)
        if b"@" in field and _ADDRESS.search(_without_names(_ENCODED_WORD.sub(b"x", field))):
            return True
    return False


def _without_names(field: bytes) -> bytes:
    """A field without its comments, and with `x` for each quoted string. A "(" without its ")" begins no comment."""
    parts, at = [], 0
    comments = True
    while (match := _QUOTED_OR_OPEN.search(field, at)) is not None:
        parts.append(field[at : match.start()])
        at = match.end()
        if match[0] == b"(":
            end = _behind_comment(field, at) if comments else -1
            comments = comments and end >= 0  # behind one that does not end, no other does
            at = end if end >= 0 else at
            parts.append(b" ")
        else:
            parts.append(b"x")
    return b"".join([*parts, field[at:]])


def _behind_comment(field: bytes, at: int) -> int:
    """The index behind a comment whose first octet is at `at` (RFC 5322 3.2.2: no quotes in it); -1: it does not end."""
    depth = 1
    for match in _IN_COMMENT.finditer(field, at):
        depth += (match[0] == b"(") - (match[0] == b")")
        if not depth:
            return match.end()
    return -1


def _instance_of(claim: Claim) -> int:
    """The instance of an ARC signature, i=; 0: invalid."""
    text = claim.tags.get("i", "")
    return int(text) if len(text) <= 2 and _DIGITS.match(text) else 0


def _instance(field: bytes) -> int:
    """The instance of an ARC-Authentication-Results field, `i=` in front of its results (RFC 8617 4.1.1); 0: invalid."""
    at = field.find(b":") + 1
    for word in (b"i", b"="):
        at = behind_comments(field, at)
        if field[at : at + 1] != word:
            return 0
        at += 1
    match = _INSTANCE.match(field, behind_comments(field, at))
    if match is None:
        return 0
    at = behind_comments(field, match.end())
    return int(match[1]) if field[at : at + 1] in (b";", b"") else 0


# Keys


async def keys_of(resolver: Resolver, claimed: Claims, seconds: float | None = None) -> Keys:
    """The key records of all signatures, from the DNS. What has not come after so many seconds is a failure of its own."""

    async def one(name: str) -> tuple[str, ...] | DnsFailure:
        if not _may_exist(name):
            return ()
        try:
            async with asyncio.timeout(seconds):
                return tuple(await resolver.txt(name))
        except TimeoutError:
            return DnsFailure("no answer in time")
        except (NoData, NoSuchName, ValueError):
            return ()
        except DnsFailure as error:
            return error

    signed = [*claimed.signatures, *(claimed.chain if claimed.chained else [])]
    names = {claim.name for claim in signed if claim.tags.get("d") and claim.tags.get("s")}
    return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))


def _may_exist(name: str) -> bool:
    """Whether there may be a key at a name; one that cannot exist (RFC 6376 3.1) has no record, and is no temporary failure."""
    return len(name) <= 253 and _KEY_NAME.match(name) is not None


def _records(key: Texts | None) -> list[Tags]:
    """The records among the texts at a name."""
    if key is None or isinstance(key, DnsFailure):
        return []
    return candidates([key] if isinstance(key, str) else key)


# DKIM


def verify(claimed: Claims, bodies: Bodies, keys: Keys, now: int) -> list[Verified]:
    """The result of each signature. `keys`: from keys_of(); `now`: the wall clock, seconds."""
    found = []
    for one in claimed.signatures:
        result, reason = _refusal(claimed, one, now) or _checked(claimed, one, bodies, keys.get(one.name))
        found.append(Verified(result, one.domain, one.selector, one.tags.get("a", ""), reason))
    return found


def _refusal(claimed: Claims, claim: Claim, now: int) -> Result | None:
    """The result of a signature that no key can make valid; None: it has to be verified."""
    tags, names = claim.tags, claim.names
    missing = [name for name in ("v", "a", "b", "bh", "d", "h", "s") if not tags.get(name)]
    if missing:
        return "permerror", f"no {missing[0]}= in the signature"
    if tags["a"] not in ("rsa-sha256", "ed25519-sha256"):
        return "policy", f"{tags['a']} is not accepted"
    covered = names.count("from")
    if not covered:
        return "permerror", "From: is not signed"
    if covered < len(claimed.fields.get(b"from", ())):
        return "policy", "a From: is not signed"  # it may have been added (RFC 6376 8.15)
    if claimed.crowded or len(names) > NAMES:
        return "policy", "too many fields"
    if tags.get("c", "simple") not in _FORMS:
        return "permerror", "invalid c= value"
    domain, identity = claim.domain, _identity(claim)
    tests: list[tuple[bool, str]] = [
        (tags["v"] != "1", "v= is not 1"),
        (claim.signature is None, "b= is not base64"),
        ("q" in tags and "dns/txt" not in listed(tags["q"]), "no query method of q= is known"),
        (identity != domain and not identity.endswith("." + domain), "i= is not of the signing domain"),
        *_times(tags, now),
    ]
    return next((("fail", reason) for wrong, reason in tests if wrong), None)


def _times(tags: Tags, now: int) -> list[tuple[bool, str]]:
    """Whether t= and x= (RFC 6376 3.5) are wrong, and the reason."""
    if not all(_DIGITS.match(tags.get(name, "0")) for name in ("t", "x")):
        return [(True, "t= or x= is not a number")]
    ends = _seconds(tags["x"]) if "x" in tags else NEVER
    return [(ends < now, "the signature has expired"), (ends < _seconds(tags.get("t", "0")), "x= is before t=")]


def _seconds(digits: str) -> int:
    """A time; one that is longer than allowed never comes."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= LONGEST else NEVER


def _identity(claim: Claim) -> str:
    """The domain of i= (the signing domain by default), in A-labels; "" where it has none. RFC 6376 3.5: its value is in
    dkim-quoted-printable."""
    if "i" not in claim.tags:
        return claim.domain
    if len(claim.tags["i"]) > IDENTITY:
        return ""
    _, at, domain = unquoted(claim.tags["i"].encode()).decode("utf-8", "replace").rpartition("@")
    return in_a_labels(domain) if at else ""


def _checked(claimed: Claims, claim: Claim, bodies: Bodies, key: Texts | None) -> Result:
    """The result of a signature with the keys at its selector: of several, the valid one counts, whatever their order."""
    tags, body = claim.tags, bodies[claim.relaxed_body("simple/simple")]
    if isinstance(key, DnsFailure):
        if not claim.covers(body):
            return "fail", "body hash mismatch"  # with any key
        return "temperror", "temporary failure to look up the key"
    below = _identity(claim) != claim.domain
    refused = [(refusal(record, tags["a"], below), record) for record in _records(key)]
    usable = [record for reason, record in refused if not reason]
    if not usable:
        return "permerror", refused[0][0] if refused else "no key for the signature"
    if not _number(tags.get("l", "0")):
        return "permerror", "l= is no number"
    if not _signs_all(tags, body[1]):
        return "policy", "l= leaves octets unsigned"
    if not claim.covers(body):
        return "fail", "body hash mismatch"
    hashed = claim.digest(claimed.fields, "simple/simple")
    valid = any(verifies(record, hashed, claim.signature or b"") for record in usable)
    return ("pass", "") if valid else ("fail", "the signature does not verify")


def _number(text: str) -> bool:
    """Whether a tag's value is 1*76DIGIT (RFC 6376 3.5)."""
    return len(text) <= 76 and _DIGITS.match(text) is not None


def _signs_all(tags: Tags, octets: int) -> bool:
    """Whether all octets of a body are signed."""
    return "l" not in tags or (_number(tags["l"]) and int(tags["l"]) == octets)


# ARC


def arc(claimed: Claims, bodies: Bodies, keys: Keys, now: int = 0) -> str:
    """The result of the ARC chain: none, pass or fail (RFC 8617 5.2), or temperror. `now`: the wall clock, seconds."""
    if not claimed.chain:
        return "none"
    if not claimed.chained or claimed.crowded or not _well_formed(claimed):
        return "fail"
    last = claimed.messages[len(claimed.messages)]  # the others need not be valid any more: a relay may change a message
    if last.names.count("from") < max(1, len(claimed.fields.get(b"from", ()))):
        return "fail"  # RFC 6376 5.4, 8.15: From: is signed, and each of them
    if any(isinstance(keys.get(one.name), DnsFailure) for one in [*claimed.seals.values(), last]):
        return "temperror"
    body = bodies[last.relaxed_body("relaxed/relaxed")]
    late = any(wrong for wrong, _ in _times(last.tags, now))
    if late or not last.covers(body) or not _signs_all(last.tags, body[1]):
        return "fail"
    valid = _is_by(last, last.digest(claimed.fields, "relaxed/relaxed"), keys)
    return "pass" if valid and all(_is_by(seal, _sealed(claimed, i), keys) for i, seal in claimed.seals.items()) else "fail"


def _well_formed(claimed: Claims) -> bool:
    """Whether the sets of a chain may be valid, and are as implementations make them."""
    return all(
        _has(seal, ("a", "b", "d", "s", "cv")) and "h" not in seal.tags  # RFC 8617 4.1.3
        and seal.tags["cv"] == ("none" if i == 1 else "pass")  # 5.2, 3.B
        for i, seal in claimed.seals.items()
    ) and all(
        _has(one, ("a", "b", "bh", "d", "h", "s")) and one.tags.get("c", "relaxed/relaxed") in _FORMS
        and len(one.names) <= NAMES and "arc-seal" not in one.names  # 4.1.2
        for one in claimed.messages.values()
    )  # fmt: skip


def _has(claim: Claim, names: tuple[str, ...]) -> bool:
    return all(claim.tags.get(name) for name in names) and claim.tags["a"] == "rsa-sha256" and claim.signature is not None


def _is_by(claim: Claim, hashed: bytes, keys: Keys) -> bool:
    """Whether an ARC signature is by a key at its selector."""
    usable = [record for record in _records(keys.get(claim.name)) if not refusal(record, claim.tags["a"], False)]
    return any(verifies(record, hashed, claim.signature or b"") for record in usable)


def _sealed(claimed: Claims, last: int) -> bytes:
    """The SHA-256 of what a seal covers: the fields of all sets up to its own, in their order (5.1.1), itself without b=."""
    parts: list[bytes] = []
    for i in range(1, last + 1):
        parts += (claimed.results[i], claimed.messages[i].field, claimed.seals[i].field)
    parts[-1] = without_signature(parts[-1])
    return hashlib.sha256(b"\r\n".join(map(canonical_field, parts))).digest()
