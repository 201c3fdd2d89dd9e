"""A nameserver on loopback with zone data as the test suite of RFC 7208 writes it: names, and a list of records for each."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

__all__ = ["Silence", "Zone", "nameserver"]

TTL = 300


class Silence(Exception):
    """The zone does not answer this query."""


class Zone:
    """`data`: `{name: [{type: value} or "TIMEOUT"]}`. A record of type SPF is one of TXT, too, where there is none.
    TIMEOUT: what comes behind it is not answered. `asked`: the queries so far."""

    def __init__(self, data: dict[str, list[Any]]) -> None:
        self.data = {str(name).lower(): rows for name, rows in data.items()}
        self.asked: list[tuple[str, str]] = []

    def records(self, name: str, kind: str) -> list[tuple[str, str, Any]] | None:
        """The answer: (owner, type, value) of each record, CNAMEs first; None: the name does not exist. Raises Silence."""
        self.asked.append((name, kind))
        found: list[tuple[str, str, Any]] = []
        for _ in range(12):  # aliases
            rows = self.data.get(name.lower())
            if rows is None:
                if name.lower().startswith("error."):
                    raise Silence
                return found or None
            own = [(name, kind, value) for value in self._of_kind(rows, kind)]
            alias = next((row["CNAME"] for row in rows if isinstance(row, dict) and "CNAME" in row), None)
            if own or alias is None or kind == "CNAME":
                return found + own
            found.append((name, "CNAME", alias))
            name = alias.rstrip(".")
        return found

    @staticmethod
    def _of_kind(rows: list[Any], kind: str) -> list[Any]:
        found: list[Any] = []
        texts = any(isinstance(row, dict) and "TXT" in row for row in rows)
        for row in rows:
            if row == "TIMEOUT":
                if not found:
                    raise Silence
                break
            ((of, value),) = row.items()
            if of == kind and value == "TIMEOUT":
                raise Silence
            if (of == kind or (of == "SPF" and kind == "TXT" and not texts)) and value != "NONE":
                found.append(value)
        return found


class _Protocol(asyncio.DatagramProtocol):
    def __init__(self, zone: Zone, servfail: bool, seconds: float) -> None:
        self._zone, self._servfail, self._seconds = zone, servfail, seconds

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = ".".join(label.decode("latin-1") for label in question.name.labels[:-1])
        response = dns.message.make_response(query, recursion_available=True)
        try:
            found = self._zone.records(name, dns.rdatatype.to_text(question.rdtype))
        except Silence:
            if not self._servfail:
                return
            found = []
            response.set_rcode(dns.rcode.SERVFAIL)
        if found is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        for owner, kind, value in found or ():
            end = question.name if owner == name else dns.name.Name([*(one.encode("latin-1") for one in owner.split(".")), b""])
            response.answer.append(dns.rrset.from_text(end, TTL, "IN", kind, _text(kind, value)))
        wire = response.to_wire(max_size=65535)
        if self._seconds:
            asyncio.get_running_loop().call_later(self._seconds, self._transport.sendto, wire, address)
        else:
            self._transport.sendto(wire, address)


def _text(kind: str, value: Any) -> str:
    """A record as a zone file has it."""
    if kind == "MX":
        return f"{value[0]} {_absolute(value[1])}"
    if kind == "TXT":
        strings = [value] if isinstance(value, str) else value or [""]
        parts = [text[at : at + 255] for text in strings for at in range(0, max(len(text), 1), 255)]
        return " ".join('"' + "".join(map(_octets, part.encode())) + '"' for part in parts)
    return _absolute(value) if kind in ("CNAME", "PTR") else str(value)


def _absolute(name: str) -> str:
    return str(name).rstrip(".") + "."


def _octets(octet: int) -> str:
    return chr(octet) if 32 <= octet < 127 and octet not in b'"\\' else f"\\{octet:03}"


@asynccontextmanager
async def nameserver(zone: Zone, servfail: bool = False, seconds: float = 0.0) -> AsyncIterator[str]:
    """A nameserver with a zone; its `host:port`. `servfail`: what the zone does not answer gets SERVFAIL instead of silence.
    `seconds`: until it answers."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: _Protocol(zone, servfail, seconds), ("127.0.0.1", 0))
    try:
        yield f"127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    finally:
        transport.close()
