"""What is known of mail from strangers: SPF, DKIM and DMARC, told in one Authentication-Results field (RFC 8601), in the place of
any that claims to be ours."""

import asyncio
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from relaymta.config import Verify
from relaymta.dns import Resolver
from relaymta.filter import dmarc, spf
from relaymta.filter.dmarc import Dmarc
from relaymta.filter.signatures import ARC_FIELDS, Verified, arc, keys_of, signatures_of, verify
from relaymta.filter.spf import Spf
from relaymta.proto.dkim import author_domain, split_fields
from relaymta.proto.header import header_end

__all__ = ["Verdict", "Verifier"]

SECONDS = 20.0  # for all questions to the DNS about one message

_UNSAFE = re.compile(r"[^\w.@+-]")


class Verdict(NamedTuple):
    """`field`: Authentication-Results, CRLF included; `dmarc`: what DMARC says."""

    field: bytes
    dmarc: Dmarc


class Verifier:
    """One worker's. `run(job, done)`: `done(job())` with `job` on a thread; `now()`: the wall clock, seconds."""

    def __init__(
        self,
        settings: Verify,
        hostname: str,
        resolver: Resolver,
        run: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        now: Callable[[], int],
    ) -> None:
        self.settings = settings
        self._hostname = hostname
        self._resolver = resolver
        self._run = run
        self._now = now

    async def check(self, address: str, helo: str, sender: str, message: bytes) -> Verdict:
        """All about a message of a client at `address`."""
        try:
            async with asyncio.timeout(SECONDS):
                return await self._check(address, helo, sender, message)
        except TimeoutError:
            nothing, unknown = Dmarc("temperror", "none", ""), Spf("temperror", sender.rpartition("@")[2] or helo, "")
            return Verdict(_field(self._hostname, unknown, sender, [], "temperror", nothing), nothing)

    async def _check(self, address: str, helo: str, sender: str, message: bytes) -> Verdict:
        signatures, chain = signatures_of(message), signatures_of(message, ARC_FIELDS)
        author = author_domain(split_fields(message[: header_end(message)]))
        sent, keys = await asyncio.gather(
            spf.check(self._resolver, address, sender, helo), keys_of(self._resolver, [*signatures, *chain])
        )  # fmt: skip
        found: list[Verified] = []
        sealed = "none"
        if signatures or chain:
            future: asyncio.Future[tuple[list[Verified], str]] = asyncio.get_running_loop().create_future()
            job = lambda: (verify(message, signatures, keys, self._now()), arc(message, chain, keys))  # noqa: E731
            self._run(job, lambda result: _settle(future, result))
            found, sealed = await future
        policy = Dmarc("none", "none", "")
        if author:
            signed = [(one.domain, one.result) for one in found]
            policy = await dmarc.check(self._resolver, author, (sent.domain, sent.result), signed)
        return Verdict(_field(self._hostname, sent, sender, found, sealed, policy), policy)


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _field(hostname: str, sent: Spf, sender: str, found: list[Verified], sealed: str, policy: Dmarc) -> bytes:
    """RFC 8601 2.2, each result on a line of its own."""
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
    wanted = f" policy.dmarc={policy.policy}" if policy.result == "fail" else ""
    lines.append(f"dmarc={policy.result} header.from={_safe(policy.domain)}{wanted}")
    return f"Authentication-Results: {hostname};\r\n\t".encode() + ";\r\n\t".join(lines).encode() + b"\r\n"


def _safe(text: str) -> str:
    """A value as a token: what a stranger said breaks out of nothing."""
    return _UNSAFE.sub("?", text) or "none"
