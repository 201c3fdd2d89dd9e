"""DNS resolver: aiodns (c-ares) with a cache: answers for their TTL, NXDOMAIN and NODATA for a minute, failures for some seconds.
Identical queries at the same time share one.

c-ares refuses names that no host can have before it asks anybody. The DNS allows them (RFC 2181 11), and SPF macros make them
(`exists:%{l}._spf.example` of a sender with `+` or `=`): dnspython asks for those, at the same nameservers.

Three results without records are distinguished: NXDOMAIN, NODATA, and a failed query (SERVFAIL, timeout), which must never be
taken for one of the other two.
"""

import asyncio
import errno
import os
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import aiodns
import pycares

from relaymta.errors import is_scarce
from relaymta.hosts import RESOLV_CONF, Hosts, numeric, stamp
from relaymta.proto.address import in_dns

__all__ = ["DnsFailure", "NoData", "NoDescriptor", "NoSuchName", "Records", "Resolver"]

NO_DATA = 1
NO_NAME = 4
# c-ares gives no SOA with a negative answer (RFC 2308), so its TTL is not known.
NEGATIVE_SECONDS = 60.0
FAILURE_SECONDS = 5.0
LEAST_SECONDS = 1.0  # an answer with a TTL of 0 still serves simultaneous queries
MOST_SECONDS = 3600.0
KEPT = 50_000  # answers
KEPT_OCTETS = 64 << 20  # of all answers, estimated: one may have thousands of records
ALIASES = 8  # CNAMEs followed in a chain
SECONDS = 5.0  # for an answer of one nameserver, at the first try of TRIES
TRIES = 2
ODD_AT_ONCE = 50  # queries for odd names under way: each has a socket of its own
# Names that c-ares asks for; all others that the DNS may have are odd.
_USUAL = re.compile(r"[A-Za-z0-9._/*-]*+\Z")
LOOK_SECONDS = 1.0  # between two looks at resolv.conf


_E = TypeVar("_E", bound=Exception)


class DnsFailure(Exception):
    """The query failed (SERVFAIL, timeout), or its answer is unusable: a temporary failure."""


class NoDescriptor(DnsFailure):
    """The query was not sent: this machine has no descriptor left for it. It says nothing of the name, and is not cached."""


class NoSuchName(Exception):
    """The name does not exist (NXDOMAIN)."""


class NoData(Exception):
    """The name exists, without records of this type (NODATA)."""


@dataclass(frozen=True, slots=True)
class Records:
    """A cached answer: its values, or the exception to raise for it; `until`: when it expires (`now`); `aliases`: the names that
    its CNAMEs lead to, lower case."""

    values: list[Any]
    error: DnsFailure | NoSuchName | NoData | None
    until: float
    aliases: tuple[str, ...] = ()


class _Answer(NamedTuple):
    """The answer of a nameserver: its values, the names that its CNAMEs lead to (lower case), and its TTL, seconds."""

    values: list[Any]
    aliases: tuple[str, ...]
    ttl: float


class _OnLoop(aiodns.DNSResolver):
    """c-ares on the event loop instead of in its own thread, as aiodns does where threads are not available: with a thread, each
    answer must acquire the GIL (117 us of CPU a query instead of 45; delivery to 10,000 domains: 389 us a message instead of
    265). Without the thread c-ares does not monitor resolv.conf: `Resolver.refresh` does."""

    def _make_channel(self, **options: Any) -> tuple[bool, pycares.Channel]:
        weak = weakref.WeakMethod(self._sock_state_cb)

        def changed(descriptor: int, readable: bool, writable: bool) -> None:
            callback = weak()
            if callback is not None:
                callback(descriptor, readable, writable)

        return False, pycares.Channel(sock_state_cb=changed, timeout=self._timeout, **options)

    @property
    def servers(self) -> list[str]:
        """As `Resolver.nameservers`."""
        return list(self._channel.servers)

    async def ask(self, name: str, kind: str) -> _Answer:
        """Send a query. NoSuchName, NoData, DnsFailure."""
        try:
            result = await self.query_dns(name, kind)
        except aiodns.error.DNSError as failure:
            code = failure.args[0] if failure.args else 0
            if code in (NO_NAME, NO_DATA):
                raise (NoSuchName if code == NO_NAME else NoData)(name) from None
            raise DnsFailure(f"{name} {kind}: {failure.args[1] if len(failure.args) > 1 else failure}") from None
        chain = [_value("CNAME", record.data) for record in result.answer if _is_a("CNAME", record)]
        return _Answer(
            [_value(kind, record.data) for record in result.answer if _is_a(kind, record)],
            tuple(map(str.lower, chain)),
            min((record.ttl for record in result.answer), default=NEGATIVE_SECONDS),
        )

    async def ask_oddly(self, name: str, kind: str) -> _Answer:
        """Send a query for an odd name to the same nameservers. NoSuchName, NoData, DnsFailure."""
        import dns.asyncresolver  # pyspf, which makes such names, has imported most of it
        import dns.exception
        import dns.name
        import dns.nameserver
        import dns.resolver

        servers = [server.rpartition(":") for server in self.servers]
        asking = dns.asyncresolver.Resolver(configure=False)
        asking.nameservers = [dns.nameserver.Do53Nameserver(host.strip("[]"), int(port)) for host, _, port in servers]
        asking.timeout = SECONDS
        labels = [label.encode() for label in name.split(".")]
        try:
            found = await asking.resolve(
                dns.name.Name([*labels, b""]), kind, raise_on_no_answer=False, lifetime=SECONDS * TRIES, search=False
            )
        except dns.resolver.NXDOMAIN:
            raise NoSuchName(name) from None
        except dns.exception.DNSException as failure:
            raise DnsFailure(f"{name} {kind}: {type(failure).__name__}") from None
        end = found.canonical_name
        aliases = () if end == found.qname else (end.to_text(omit_final_dot=True).lower(),)
        ttl = min((each.ttl for each in found.response.answer), default=NEGATIVE_SECONDS)
        return _Answer([_odd_value(kind, record) for record in found.rrset or ()], aliases, ttl)


class Resolver:
    """One worker's resolver. `nameservers`: `host[:port]` each, empty for the system's. Construct it in a running event loop.

    `count(what)` is called for each "query" that is sent and each "hit" of the cache; `took(result, seconds)` when the answer
    to one has come: "found", "none" (no such name, or no such record) or "failed". `now()`: monotonic seconds.

    All queries raise NoSuchName, NoData or DnsFailure when there is no record.
    """

    def __init__(
        self,
        nameservers: list[str] | None = None,
        count: Callable[[str], None] = lambda what: None,
        now: Callable[[], float] = time.monotonic,
        took: Callable[[str, float], None] = lambda result, seconds: None,
    ) -> None:
        self._took = took
        self._nameservers = list(nameservers or [])
        self._resolver = _on_loop(self._nameservers)
        self._retiring: set[asyncio.Task[None]] = set()
        self._count = count
        self.now = now
        self._known: dict[tuple[str, str], Records] = {}
        self._octets = 0  # estimated size of the cached answers
        self._asking: dict[tuple[str, str], asyncio.Task[Records]] = {}
        self._odd = asyncio.Semaphore(ODD_AT_ONCE)
        self._hosts = Hosts()
        self._stamp = stamp(RESOLV_CONF)
        self._look_at = now() + LOOK_SECONDS
        self._reread = False  # resolv.conf was read again, and `refresh` has not said so

    @property
    def asking(self) -> int:
        """How many queries are under way: also those whose callers wait no longer."""
        return len(self._asking)

    @property
    def nameservers(self) -> list[str]:
        """The nameservers that are asked, `host:port` each."""
        return [str(server) for server in self._resolver.servers]

    async def mx(self, domain: str) -> tuple[list[tuple[int, str]], float]:
        """([(preference, exchange)] of a domain's MX records, unsorted; exchange "" is the null MX (RFC 7505), when they
        expire)."""
        found = await self._ask(domain, "MX")
        return found.values, found.until

    async def txt(self, name: str) -> list[str]:
        """A name's TXT records, the strings of each joined; octets that are not UTF-8 are replaced."""
        return (await self._ask(name, "TXT")).values

    async def values(self, name: str, kind: str) -> list[Any]:
        """A name's records of one type (A, AAAA, MX, PTR, TXT): MX as of `mx`, all others as strings."""
        return (await self._ask(name, kind)).values

    async def addresses(self, host: str, families: str = "64") -> list[str]:
        """A host's addresses, in the order of `families` ("64": IPv6 first; "4": IPv4 only). NoSuchName and NoData only when no
        query of the families failed."""
        answers = await asyncio.gather(*(self._lookup(host, "AAAA" if f == "6" else "A") for f in families))
        found = [address for answer in answers for address in answer.values]
        if found:
            return found
        errors = [answer.error for answer in answers]
        for error in errors:
            if isinstance(error, DnsFailure):
                raise _again(error)
        raise NoSuchName(host) if any(isinstance(error, NoSuchName) for error in errors) else NoData(host)

    async def host(self, host: str, families: str = "64") -> list[str]:
        """The addresses of a host that an operator has named, as of `addresses`: like getaddrinfo(3) numbers, /etc/hosts and
        localhost come before the DNS, and the search list of resolv.conf applies."""
        number = numeric(host)
        if number is not None:
            return [number]
        try:
            known, names = self._hosts.addresses(host, families), self._hosts.candidates(host)
        except OSError as failure:
            raise NoDescriptor(f"{host}: {failure}") from None
        if known:
            return known
        error: NoSuchName | NoData | None = None
        for name in names:
            try:
                return await self.addresses(name, families)
            except (NoSuchName, NoData) as failure:
                error = failure if error is None or isinstance(failure, NoData) else error
        raise error or NoSuchName(host)

    def aliases(self, host: str) -> set[str]:
        """The names that a host's CNAMEs lead to, lower case, as far as its addresses were looked up and are cached."""
        found = [self._known.get((host, kind)) for kind in ("A", "AAAA")]
        return {name for records in found if records is not None for name in records.aliases}

    async def _ask(self, name: str, kind: str) -> Records:
        found = await self._lookup(name, kind)
        if found.error is not None:
            raise _again(found.error)
        return found

    async def _lookup(self, name: str, kind: str) -> Records:
        """The answer from the cache, from an identical query under way, or from a new query."""
        key = (name, kind)
        known = self._known.get(key)
        if known is not None and known.until > self.now():
            self._count("hit")
            return known
        self._look()
        asked = self._asking.get(key)
        self._count("query" if asked is None else "hit")
        if asked is None:
            # A task of its own, shielded: a caller that is cancelled or times out must not end the query of the other callers
            # that wait for it.
            asked = self._asking[key] = asyncio.get_running_loop().create_task(self._question(name, kind))
            asked.add_done_callback(partial(self._answered, key))
        return await asyncio.shield(asked)

    def _answered(self, key: tuple[str, str], asked: asyncio.Task[Records]) -> None:
        if self._asking.get(key) is asked:  # not one that `reconfigure` has replaced
            del self._asking[key]

    async def _question(self, name: str, kind: str) -> Records:
        """Send a query. Its callers get an answer even where the task is cancelled."""
        began = self.now()
        try:
            found = await self._query(name, kind, ALIASES)
            result = "found" if found.error is None else "failed" if isinstance(found.error, DnsFailure) else "none"
            self._took(result, self.now() - began)
            return found
        except asyncio.CancelledError:  # only by `close`
            return Records([], DnsFailure(f"{name} {kind}: the resolver is closed"), 0.0)

    async def _query(self, name: str, kind: str, aliases: int) -> Records:
        """Send a query, and cache the answer. `aliases`: the number of CNAMEs that are followed at most."""
        resolver = self._resolver
        error: DnsFailure | NoSuchName | NoData | None = None
        values: list[Any] = []
        names: tuple[str, ...] = ()
        try:
            found = await self._answer(resolver, name, kind)
            values, names, ttl = found
            # For an alias the answer is a chain of CNAMEs, followed by the records of the canonical name; where the server does
            # not have these, the resolver must query for them (RFC 1034 3.6.2).
            if not values and names and aliases:
                # Not a shared query: in a loop of aliases it would wait for itself.
                end = await self._query(names[-1], kind, aliases - 1)
                until = min(end.until, self.now() + ttl)
                return self._kept(resolver, name, kind, Records(end.values, end.error, until, names + end.aliases))
            if not values:
                error, ttl = NoData(name), NEGATIVE_SECONDS
        except (NoSuchName, NoData) as negative:
            error, ttl = _again(negative), NEGATIVE_SECONDS
        except DnsFailure as failure:
            if not _descriptors_left():  # c-ares says that it cannot reach the nameservers
                return Records([], NoDescriptor(f"{name} {kind}: {os.strerror(errno.EMFILE)}"), 0.0)
            error, ttl = _again(failure), FAILURE_SECONDS
        except Exception as failure:
            if is_scarce(failure):
                return Records([], NoDescriptor(f"{name} {kind}: {failure}"), 0.0)
            # An invalid name, or an answer that cannot be decoded: both come from outside.
            error = DnsFailure(f"{name!r} {kind}: the answer cannot be read ({type(failure).__name__})")
            values, ttl = [], FAILURE_SECONDS
        until = self.now() + max(LEAST_SECONDS, min(ttl, MOST_SECONDS))
        return self._kept(resolver, name, kind, Records(values, error, until, names))

    async def _answer(self, resolver: _OnLoop, name: str, kind: str) -> _Answer:
        if _USUAL.match(name) or not in_dns(name):  # c-ares converts U-labels, and refuses what remains
            return await resolver.ask(name, kind)
        async with self._odd:
            return await resolver.ask_oddly(name, kind)

    def _kept(self, resolver: _OnLoop, name: str, kind: str, records: Records) -> Records:
        """Cache an answer, unless the nameservers that gave it were replaced meanwhile."""
        return self._keep(name, kind, records) if resolver is self._resolver else records

    def _keep(self, name: str, kind: str, records: Records) -> Records:
        was = self._known.pop((name, kind), None)
        self._octets += _octets(records) - (_octets(was) if was is not None else 0)
        self._known[name, kind] = records
        if len(self._known) >= KEPT or self._octets > KEPT_OCTETS:
            self._forget_some()
        return records

    def _forget_some(self) -> None:
        """Evict expired answers, then the oldest, until a tenth of the cache is free."""
        now, octets = self.now(), 0
        kept: list[tuple[tuple[str, str], Records]] = []
        for key, records in reversed(self._known.items()):
            if records.until > now:
                octets += _octets(records)
                if len(kept) >= KEPT * 9 // 10 or octets > KEPT_OCTETS * 9 // 10:
                    break
                kept.append((key, records))
        self._known = dict(reversed(kept))
        self._octets = sum(map(_octets, self._known.values()))

    def reconfigure(self, nameservers: list[str]) -> bool:
        """Use these nameservers (as for `Resolver`) for all queries from now on; whether that changed anything (`refresh`)."""
        if nameservers == self._nameservers:
            self._look_at = 0.0
            return self.refresh()
        self._nameservers = list(nameservers)
        self._stamp = stamp(RESOLV_CONF)
        self._replace()
        return True

    def refresh(self) -> bool:
        """Whether other nameservers are in use than at the last call, since resolv.conf has changed. Called now and then; it is
        looked at again before a query, too."""
        self._look()
        changed, self._reread = self._reread, False
        return changed

    def _look(self) -> None:
        """Read resolv.conf again if it has changed; it is looked at once in LOOK_SECONDS. One that is missing for a moment (it is
        being replaced) changes nothing."""
        if self._nameservers or self.now() < self._look_at:
            return
        self._look_at = self.now() + LOOK_SECONDS
        found = stamp(RESOLV_CONF)
        if (
            found is not None and found != self._stamp and _descriptors_left()
        ):  # c-ares would take one that it cannot read for empty
            self._stamp = found
            self._reread = True
            self._replace()

    def _replace(self) -> None:
        """Query with a new channel: cached answers are forgotten, and queries under way end at the old nameservers."""
        replaced, self._resolver = self._resolver, _on_loop(self._nameservers)
        task = asyncio.get_running_loop().create_task(_retire(replaced, list(self._asking.values())))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        self._asking.clear()
        self._known.clear()
        self._octets = 0

    async def close(self) -> None:
        """Cancel queries under way (their callers get DnsFailure), and close c-ares."""
        asked = [*self._asking.values(), *self._retiring]
        for question in asked:
            question.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await self._resolver.close()


def _descriptors_left() -> bool:
    try:
        os.close(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError:
        return False
    return True


def _on_loop(nameservers: list[str]) -> _OnLoop:
    return _OnLoop(nameservers=nameservers or None, timeout=SECONDS, tries=TRIES)


async def _retire(resolver: _OnLoop, asked: list[asyncio.Task[Records]]) -> None:
    """Close a resolver that was replaced, after its last answer; at once when cancelled."""
    try:
        if asked:
            await asyncio.wait(asked)
    finally:
        for question in asked:
            question.cancel()
        await resolver.close()


def _octets(records: Records) -> int:
    """The estimated size of an answer in memory, octets."""
    return 300 + sum(60 + len(value if isinstance(value, str) else value[1]) for value in records.values)


def _again(error: _E) -> _E:
    """A copy of a cached exception: raising the same one again and again would accumulate its tracebacks."""
    return type(error)(*error.args)


def _is_a(kind: str, record: Any) -> bool:
    return type(record.data).__name__.upper().startswith(kind + "RECORD")


def _value(kind: str, data: Any) -> Any:
    if kind == "MX":
        return data.priority, _text(data.exchange)
    if kind == "PTR":
        return _text(data.dname)
    if kind == "TXT":
        return data.data.decode("utf-8", "replace")
    return _text(data.cname if kind == "CNAME" else data.addr)


def _odd_value(kind: str, record: Any) -> Any:
    """As `_value`, of a record of dnspython."""
    if kind == "MX":
        return record.preference, record.exchange.to_text(omit_final_dot=True).removesuffix(".")
    if kind == "PTR":
        return record.target.to_text(omit_final_dot=True)
    return b"".join(record.strings).decode("utf-8", "replace") if kind == "TXT" else record.address


def _text(value: str | bytes) -> str:
    return (value.decode() if isinstance(value, bytes) else value).rstrip(".")
