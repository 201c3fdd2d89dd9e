"""SPF, DKIM, ARC and DMARC for mail of unauthenticated clients. The results are in one Authentication-Results field (RFC 8601),
which replaces any with our own authserv-id."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from relaymta.config import Verify
from relaymta.dns import Resolver
from relaymta.filter import dmarc, spf
from relaymta.filter.dmarc import Dmarc
from relaymta.filter.signatures import Keys, Verified, arc, claims, keys_of, verify
from relaymta.filter.spf import Spf
from relaymta.proto import reply
from relaymta.proto.address import DomainError, domain_of, normalize_domain
from relaymta.proto.authres import without_forged
from relaymta.proto.dkim import BodyHashes
from relaymta.proto.header import header_end, too_long

__all__ = ["Look", "Verdict", "Verifier"]

SECONDS = 20.0  # for all DNS queries about one message
AT_ONCE = 65536  # octets that are hashed on the event loop, and
AT_ONCE_STEPS = 10_000  # steps of verification done there (Claims.effort); more would block it

# Of a message whose authors cannot be determined.
UNREADABLE = Dmarc("permerror", "reject", "")

_UNSAFE = re.compile(r"[^\w.@+-]")


class Look:
    """A message to verify. `end`: where its header ends; `header`: its header without forged results;
    `claims`: of the header; `body` is fed the data behind the header."""

    def __init__(self, header: bytes, end: int) -> None:
        self.header, self.end = header, end
        self.claims = claims(header)
        self.body = BodyHashes(self.claims.forms())


class Verdict(NamedTuple):
    """`field`: Authentication-Results, CRLF included; `dmarc`: its result; `enforced`: its policy is applied; `malformed`:
    the authors cannot be determined."""

    field: bytes
    dmarc: Dmarc
    enforced: bool
    malformed: bool = False

    @property
    def refusal(self) -> bytes | None:
        """The reply that refuses the message, or rejects it temporarily while the DNS does not answer; None: accept it."""
        if not self.enforced or self.dmarc.policy == "none":
            return None
        if self.malformed:
            return reply.BAD_AUTHOR
        if self.dmarc.result == "temperror":
            return reply.DNS_SILENT
        return reply.DMARC_REJECT if self.dmarc.policy == "reject" else None

    @property
    def held(self) -> bool:
        """Whether the message is held until an operator releases it."""
        return self.enforced and self.dmarc.policy == "quarantine"


class Verifier:
    """The verification of one worker. `now()`: the wall clock, seconds."""

    def __init__(self, settings: Verify, hostname: str, resolver: Resolver, now: Callable[[], int]) -> None:
        self._settings = settings
        self._hostname = hostname
        self._resolver = resolver
        self._thread = ThreadPoolExecutor(1, "verifier")
        self._now = now

    def look(self, start: bytes) -> Look | None:
        """Begin to verify a message whose data begins with `start`, which has to contain its header. None when that is too
        long: the caller refuses the message."""
        end = header_end(start)
        header = start[:end]
        return None if too_long(header) else Look(without_forged(header, self._hostname), end)

    async def check(self, address: str, helo: str, sender: str, look: Look, rest: bytes = b"") -> Verdict:
        """Verify a message of a client at `address`. `rest`: the part of its body that `look.body` was not fed yet."""
        try:
            async with asyncio.timeout(SECONDS):
                return await self._check(address, helo, sender, look, rest)
        except TimeoutError:
            nothing, unknown = Dmarc("temperror", "reject", ""), Spf("temperror", sender.rpartition("@")[2] or helo, "")
            return self._verdict(unknown, sender, [], "temperror", UNREADABLE if look.claims.malformed else nothing)

    async def _check(self, address: str, helo: str, sender: str, look: Look, rest: bytes) -> Verdict:
        claimed = look.claims
        sent, keys = await asyncio.gather(spf.check(self._resolver, address, sender, helo), keys_of(self._resolver, claimed))
        found: list[Verified] = []
        sealed = "none"
        if claimed.signatures or claimed.chain:
            if claimed.effort() <= AT_ONCE_STEPS and len(rest) <= AT_ONCE:
                found, sealed = _verified(look, rest, keys, self._now())
            else:
                loop = asyncio.get_running_loop()
                found, sealed = await loop.run_in_executor(self._thread, _verified, look, rest, keys, self._now())
        signed = [(one.domain, one.result) for one in found]
        if claimed.malformed:
            policy = UNREADABLE
        else:
            # Where From: names no domain, or there is none, the next host may write the envelope's sender there, as Postfix does.
            authors = claimed.authors or _host_of(sender)
            policy = await dmarc.check(self._resolver, authors, (sent.domain, sent.result), signed)
        return self._verdict(sent, sender, found, sealed, policy)

    def _verdict(self, sent: Spf, sender: str, found: list[Verified], sealed: str, policy: Dmarc) -> Verdict:
        field = _field(self._hostname, sent, sender, found, sealed, policy)
        return Verdict(field, policy, self._settings.dmarc == "enforce", policy is UNREADABLE)


def _host_of(sender: str) -> list[str]:
    """The domain of an envelope sender, if it is valid in the DNS."""
    domain = domain_of(sender)
    try:
        return [normalize_domain(domain)] if domain and not domain.startswith("[") else []
    except DomainError:
        return []


def _verified(look: Look, rest: bytes, keys: Keys, now: int) -> tuple[list[Verified], str]:
    """The results of signatures and ARC chain: a quarter of a millisecond for most mail, three times that on a thread."""
    look.body.feed(rest)
    bodies = look.body.finish()
    return verify(look.claims, bodies, keys, now), arc(look.claims, bodies, keys)


def _field(hostname: str, sent: Spf, sender: str, found: list[Verified], sealed: str, policy: Dmarc) -> bytes:
    """The Authentication-Results field (RFC 8601 2.2), each result on a line of its own."""
    who = f"smtp.mailfrom={_safe(sender)}" if sender else f"smtp.helo={_safe(sent.domain)}"
    lines = [f"spf={sent.result} {who}"]
    for one in found:
        reason = f' reason="{_UNSAFE.sub(" ", one.reason)}"' if one.reason else ""
        key = f"header.d={_safe(one.domain)} header.s={_safe(one.selector)} header.a={_safe(one.algorithm)}"
        lines.append(f"dkim={one.result}{reason} {key}")
    if not found:
        lines.append("dkim=none")
    if sealed != "none":
        lines.append(f"arc={sealed}")
    wanted = f" policy.dmarc={policy.policy}" if policy.result in ("fail", "permerror") else ""
    lines.append(f"dmarc={policy.result} header.from={_safe(policy.domain)}{wanted}")
    ours = f'"{hostname}"' if hostname.startswith("[") else hostname  # an address literal is no token (RFC 2045 5.1)
    return f"Authentication-Results: {ours};\r\n\t".encode() + ";\r\n\t".join(lines).encode() + b"\r\n"


def _safe(text: str) -> str:
    """An untrusted value as a token, which cannot end its property."""
    return _UNSAFE.sub("?", text) or "none"
