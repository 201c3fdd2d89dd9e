"""SPF, DKIM, ARC and DMARC for mail of unauthenticated clients. One Authentication-Results field (RFC 8601) has the results."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from relaymta.config import Verify
from relaymta.dns import Resolver
from relaymta.filter import dmarc, spf
from relaymta.filter.dmarc import Dmarc
from relaymta.filter.signatures import Keys, Verified, arc, claims, keys_of, verify
from relaymta.filter.spf import Spf
from relaymta.proto import reply
from relaymta.proto.address import DomainError, domain_of, in_a_labels, normalize_domain
from relaymta.proto.authres import field, mailbox, result, value
from relaymta.proto.dkim import BodyHashes
from relaymta.proto.header import header_end, too_long

__all__ = ["Look", "Verdict", "Verifier"]

# A domain whose servers are silent must not hide what the others say: each kind of query has a time of its own.
SECONDS = 30.0  # for all DNS queries about one message: the policy of DMARC has what is left of it
FIRST_SECONDS = 20.0  # for SPF (RFC 7208 4.6.4: 20 at least) and, side by side with it, for the keys of signatures
AT_ONCE = 65536  # octets that are hashed on the event loop, and
AT_ONCE_STEPS = 10_000  # steps of verification done there (Claims.effort); more would block it

# Of a message whose authors cannot be determined.
UNREADABLE = Dmarc("permerror", "reject", "")
# Of a message that was not verified.
UNKNOWN = Dmarc("", "none", "")


class Look:
    """A message to verify. `header`: its header, `end` octets; `claims`: of the header; `body` is fed the data behind it."""

    def __init__(self, header: bytes) -> None:
        self.header, self.end = header, len(header)
        self.claims = claims(header)
        self.body = BodyHashes(self.claims.forms())


class Verdict(NamedTuple):
    """`field`: Authentication-Results, CRLF included, or empty; `dmarc`: its result; `enforced`: its policy is applied;
    `malformed`: the authors cannot be determined; `authorless`: it is refused because there is none; `sender`: the
    envelope's; `spf`: the result; `signed`: the domain and the result of each signature."""

    field: bytes
    dmarc: Dmarc
    enforced: bool
    malformed: bool = False
    authorless: bool = False
    sender: str = ""
    spf: str = ""
    signed: Sequence[tuple[str, str]] = ()

    @property
    def genuine(self) -> bool:
        """Whether SPF, or a signature of the sender's domain or of one above that, say that the sender is not forged."""
        return (bool(self.sender) and self.spf == "pass") or _has_signed(self.sender, self.signed)

    @property
    def refusal(self) -> bytes | None:
        """The reply that refuses the message, or rejects it temporarily while the DNS does not answer; None: accept it."""
        if self.authorless:
            return reply.NO_AUTHOR
        if not self.enforced or self.dmarc.policy == "none":
            return None
        if self.malformed:
            return reply.BAD_AUTHOR
        if self.dmarc.result == "temperror":
            return reply.DNS_SILENT
        return reply.DMARC_REJECT if self.dmarc.policy == "reject" else None

    @property
    def held(self) -> str:
        """Why the message is held until an operator releases it, by DMARC; "": it is not."""
        wanted = self.enforced and self.dmarc.policy == "quarantine"
        return f"it fails, and {self.dmarc.domain} asks for quarantine" if wanted else ""


class Verifier:
    """The verification of one worker. `now()`: the wall clock, seconds. `took(seconds)` is called with what the signatures and
    ARC chain of a message took, once their keys were there."""

    def __init__(
        self, settings: Verify, hostname: str, resolver: Resolver, now: Callable[[], int], took: Callable[[float], None]
    ) -> None:
        self._settings = settings
        self._hostname = hostname
        self._resolver = resolver
        self._thread = ThreadPoolExecutor(1, "verifier")
        self._now = now
        self._took = took

    def look(self, start: bytes) -> Look | None:
        """Begin to verify a message whose data begins with `start`, which has to contain its header. None when that is too
        long: the caller refuses the message."""
        header = start[: header_end(start)]
        return None if too_long(header) else Look(header)

    async def check(self, address: str, helo: str, sender: str, look: Look, rest: bytes = b"") -> Verdict:
        """Verify a message of a client at `address`. `rest`: the part of its body that `look.body` was not fed yet."""
        authorless = self._settings.no_author == "reject" and look.claims.authorless
        if authorless or not self._settings.results:
            return Verdict(b"", UNKNOWN, False, authorless=authorless)
        loop = asyncio.get_running_loop()
        claimed, until = look.claims, loop.time() + SECONDS
        sent, keys = await asyncio.gather(self._spf(address, sender, helo), keys_of(self._resolver, claimed, FIRST_SECONDS))
        found: list[Verified] = []
        sealed = "none"
        if claimed.signatures or claimed.chain:
            began = time.monotonic()
            if claimed.effort() <= AT_ONCE_STEPS and len(rest) <= AT_ONCE:
                found, sealed = _verified(look, rest, keys, self._now())
            else:
                found, sealed = await loop.run_in_executor(self._thread, _verified, look, rest, keys, self._now())
            self._took(time.monotonic() - began)
        signed = [(one.domain, one.result) for one in found]
        if claimed.malformed:
            policy = UNREADABLE
        else:
            # Where From: names no domain, or there is none, the next host may write the envelope's sender there, as Postfix does.
            authors = claimed.authors or _host_of(sender)
            policy = await dmarc.check(self._resolver, authors, (sent.domain, sent.result), signed, until - loop.time())
        field = _field(self._hostname, sent, sender, found, sealed, policy)
        enforced = self._settings.dmarc == "enforce"
        return Verdict(field, policy, enforced, policy is UNREADABLE, False, sender, sent.result, signed)

    async def _spf(self, address: str, sender: str, helo: str) -> Spf:
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                return await spf.check(self._resolver, address, sender, helo)
        except TimeoutError:
            return Spf("temperror", in_a_labels(sender.rpartition("@")[2] or helo), "")  # RFC 7208 4.6.4


def _host_of(sender: str) -> list[str]:
    """The domain of an envelope sender, if it is valid in the DNS."""
    domain = domain_of(sender)
    try:
        return [normalize_domain(domain)] if domain and not domain.startswith("[") else []
    except DomainError:
        return []


def _has_signed(sender: str, signed: Sequence[tuple[str, str]]) -> bool:
    """Whether a signature that is good is one of an envelope sender's domain, or of one above it."""
    hosts = ["." + host for host in _host_of(sender)]
    return any(host.endswith("." + domain) for domain, result in signed if result == "pass" and domain for host in hosts)


def _verified(look: Look, rest: bytes, keys: Keys, now: int) -> tuple[list[Verified], str]:
    """The results of signatures and ARC chain: a quarter of a millisecond for most mail, three times that on a thread."""
    look.body.feed(rest)
    bodies = look.body.finish()
    return verify(look.claims, bodies, keys, now), arc(look.claims, bodies, keys, now)


def _field(hostname: str, sent: Spf, sender: str, found: list[Verified], sealed: str, policy: Dmarc) -> bytes:
    """The Authentication-Results field (RFC 8601 2.2)."""
    who = {"smtp.mailfrom": mailbox(sender)} if sender else {"smtp.helo": value(sent.domain)}
    results = [result("spf", sent.result, who)]
    for one in found:
        key = {"header.d": value(one.domain), "header.s": value(one.selector), "header.a": value(one.algorithm)}
        results.append(result("dkim", one.result, key, one.reason))
    if not found:
        results.append(result("dkim", "none", {}))
    if sealed != "none":
        results.append(result("arc", sealed, {}))
    wanted = policy.policy if policy.result in ("fail", "permerror") else ""
    results.append(result("dmarc", policy.result, {"header.from": value(policy.domain), "policy.dmarc": wanted}))
    return field(hostname, results)
