"""DNS by aiodns (c-ares). Answers are kept by c-ares for their TTL; failures are told apart: no such name, no data, and
"could not be asked", which must never be taken for one of the others."""

import asyncio
from typing import Any

import aiodns

__all__ = ["DnsFailure", "NoData", "NoSuchName", "Resolver"]

NO_DATA = 1
NO_NAME = 4


class DnsFailure(Exception):
    """The DNS could not be asked, or gave no usable answer (SERVFAIL, timeout): try again later."""


class NoSuchName(Exception):
    """The name does not exist (NXDOMAIN)."""


class NoData(Exception):
    """The name exists, without records of this type."""


class Resolver:
    """One worker's resolver. `nameservers`: `host[:port]` each, empty for the system's. Make it inside the loop."""

    def __init__(self, nameservers: list[str] | None = None) -> None:
        self._resolver = aiodns.DNSResolver(nameservers=nameservers or None, timeout=5.0, tries=2)

    async def mx(self, domain: str) -> list[tuple[int, str]]:
        """(preference, exchange) of a domain's MX records, as they came; "" is the null MX (RFC 7505)."""
        answer = await self._ask(domain, "MX")
        return [(r.data.priority, _text(r.data.exchange)) for r in answer]

    async def addresses(self, host: str) -> list[str]:
        """A host's addresses, IPv6 first. NoSuchName and NoData when both types say so."""
        v6: list[Any] | BaseException
        v4: list[Any] | BaseException
        v6, v4 = await asyncio.gather(self._ask(host, "AAAA"), self._ask(host, "A"), return_exceptions=True)
        found: list[str] = []
        for answer in (v6, v4):
            if isinstance(answer, list):
                found += [_text(record.data.addr) for record in answer]
        if found:
            return found
        for answer in (v4, v6):
            if isinstance(answer, DnsFailure):
                raise answer
        raise v4 if isinstance(v4, NoSuchName) else NoData(host)

    async def _ask(self, name: str, kind: str) -> list[Any]:
        try:
            result = await self._resolver.query_dns(name, kind)
        except aiodns.error.DNSError as error:
            code = error.args[0] if error.args else 0
            if code == NO_NAME:
                raise NoSuchName(name) from None
            if code == NO_DATA:
                raise NoData(name) from None
            raise DnsFailure(f"{name} {kind}: {error.args[1] if len(error.args) > 1 else error}") from None
        wanted = [r for r in result.answer if type(r.data).__name__.upper().startswith(kind + "RECORD")]
        if not wanted:
            raise NoData(name)
        return wanted

    async def close(self) -> None:
        """End c-ares' thread."""
        await self._resolver.close()


def _text(value: str | bytes) -> str:
    return (value.decode() if isinstance(value, bytes) else value).rstrip(".")
