"""Opening connections: the choice of a site's host and of the source address, and the health of smart hosts."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

import xxhash

from relaymta.config import Config, Route, Source, parse_hostport
from relaymta.dns import DnsFailure, NoData, NoDescriptor, NoSuchName, Resolver
from relaymta.errors import DNS, OUT_OF_DESCRIPTORS, US
from relaymta.log import Log
from relaymta.proto.address import DomainError, normalize_domain
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.mx import NoRoute, targets
from relaymta.route.ourselves import Ourselves, is_local
from relaymta.route.sites import Site
from relaymta.send.connect import ConnectFailed, Peer, Via, connect, implicit_tls
from relaymta.send.greeting import LenientSMTP
from relaymta.send.oauth import Tokens
from relaymta.send.session import Session
from relaymta.send.timing import Stopwatch, Timed, untimed
from relaymta.send.trust import Files, Secured, unnoted
from relaymta.trace import Facts, Tracer

__all__ = ["Opener", "Sources", "hosts_of"]

PROBE_EVERY = 4.0  # seconds between two probes of a smart host that is down
PROBE_TIMEOUT = 5.0  # of the first probe; doubled for each further one, since a slow host is not down
PROBE_LONGEST = 3600.0  # then the host counts as up, and the next message tries it
GREETING = 300.0  # seconds for the greeting (RFC 5321 4.5.3.2.1) and each further reply before MAIL
SMTP_PORT = 25
RECIPIENTS = 50  # of one transaction, as Postfix: RFC 5321 4.5.3.1.8 has 100, but some services refuse messages to more than 50
NO_BDAT_SECONDS = 86_400.0  # so long a host that does not implement BDAT gets DATA
NO_BDAT_KEPT = 10_000  # hosts
PLUMBED_SECONDS = 30.0  # between two checks whether an address is configured on this machine


class Sources:
    """The configured source addresses, by name."""

    def __init__(self, config: Config, log: Log, now: Callable[[], float] = time.monotonic) -> None:
        self._sources = {source.name: source for source in config.source}
        self._log = log
        self._now = now
        self._plumbed: dict[str, tuple[bool, float]] = {}

    def choose(self, route: Route, key: str) -> Source | None:
        """The source address for mail with this key (its sender and recipient domain): always the same while it is usable. Keys
        are distributed by weight, and most keep theirs when the list changes (rendezvous hashing). None: the system's choice."""
        if not route.sources:
            return None
        usable = [self._sources[name] for name in route.sources if self.plumbed(self._sources[name])]
        if not usable:
            return self._sources[route.sources[0]]  # the attempt fails with the reason
        if len(usable) == 1:
            return usable[0]
        return max(usable, key=lambda source: _score(source, key))

    def plumbed(self, source: Source) -> bool:
        """Whether an address is configured on this machine now; a change is logged."""
        was, until = self._plumbed.get(source.name, (True, 0.0))
        if until > self._now():
            return was
        try:
            ours = is_local(source.address)
        except OSError:  # no descriptor is left to find out
            return was
        if ours != was:
            text = (
                "is usable again" if ours else "is not an address of this machine: other sources of its routes are used, if any"
            )
            self._log.event("warning", text=f"source {source.name} ({source.address}) {text}")
        self._plumbed[source.name] = (ours, self._now() + PLUMBED_SECONDS)
        return ours


def _score(source: Source, key: str) -> float:
    """Weighted rendezvous hashing: a source has the highest score for a share of keys proportional to its weight."""
    hashed: float = (xxhash.xxh3_64_intdigest(f"{source.name}\0{key}".encode()) + 1) / 2.0**64
    return float(hashed ** (1.0 / source.weight))


class Opener:
    """Connects to the hosts of sites. `make(core, peer)` makes the session; `tokens`: for hosts that require OAuth 2.0; `timed`:
    what the phases of that take; `secured`: told what has come of TLS."""

    def __init__(
        self,
        config: Config,
        resolver: Resolver,
        log: Log,
        tokens: Tokens,
        make: Callable[[ClientSession, str], Session],
        timed: Timed = untimed,
        secured: Secured = unnoted,
    ) -> None:
        self._timed = timed
        self._secured = secured
        self._config = config
        self._resolver = resolver
        self._log = log
        self._make = make
        self._tokens = tokens
        self._ourselves = Ourselves.of(config)
        self._down: dict[str, str] = {}  # label of a smart host that is down: why
        self._probing: set[asyncio.Task[None]] = set()
        self._no_bdat: dict[str, float] = {}  # place: until when BDAT is not used there
        self.tracer: Tracer | None = None
        self.names: Callable[[Site, Source | None], frozenset[str]] = lambda site, source: frozenset((site.key,))

    def reconfigure(self, config: Config) -> None:
        """Apply a new configuration; the health of smart hosts is determined anew."""
        self._config = config
        self._ourselves = Ourselves.of(config)
        self._down.clear()
        self.close()

    async def open(self, site: Site, source: Source | None, timeout: float = 0.0) -> Session:
        """A session with the first host of a site that can be reached. Raises ConnectFailed or NoRoute when there is none.
        `timeout`: seconds for each step (0: as configured)."""
        try:
            return await self._open(site, source, timeout)
        except NoRoute as error:
            self._told(site, f"no host: {error}")
            raise

    async def _open(self, site: Site, source: Source | None, timeout: float) -> Session:
        failure: ConnectFailed | None = None
        loop: NoRoute | None = None
        reached: set[str] = set()  # smart hosts of which an address could be connected to
        async for peer in self._each(site):
            try:
                return await self.to(site, peer, source, timeout, peer.last and peer.host not in reached)
            except ConnectFailed as error:
                if error.scarce:  # no host can be connected to
                    raise
                failure = error
                if error.phase != "connect" or error.said is not None:
                    reached.add(peer.host)
            except NoRoute as error:  # this host itself
                loop = error
                if site.hosts is not None:  # so those that follow are not preferred to it (RFC 5321 5.1)
                    break
        raise failure or loop or ConnectFailed("connect", "no host to connect to")

    async def peers(self, site: Site) -> list[Peer]:
        """The hosts to try, in order. NoRoute when the site's hosts have no address."""
        return [peer async for peer in self._each(site)]

    async def _each(self, site: Site) -> AsyncIterator[Peer]:
        """As `peers`; a smart host's name is looked up when those before it could not be used."""
        route, ours = site.route, self._ourselves
        families = route.ip.replace(" ", "")
        if site.hosts is None:
            for text in self._order(route):
                for peer in await self._smart_host(text, families, Files.of(route)):
                    yield peer
            return
        port = self._config.delivery.port
        with Stopwatch(self._timed).phase("dns"):
            try:
                found = await targets(
                    self._resolver, site.hosts, families, lambda address: ours.is_exchange(address, port),
                    lambda host: not ours.names.isdisjoint(self._resolver.aliases(host)),
                )  # fmt: skip
            except OSError as error:  # whether an address is ours is not known
                raise NoRoute(False, "4.3.0", OUT_OF_DESCRIPTORS, str(error), US, scarce=True) from None
        if self.tracer is not None:
            order = ", ".join(f"{target.host} [{target.address}]" for target in found)
            self._told(site, f"MX hosts in this order: {order}", tuple(target.host for target in found))
        for target in found:
            yield Peer(target.host, target.address, port, files=Files.of(route))

    async def _smart_host(self, text: str, families: str, files: Files) -> list[Peer]:
        """A smart host as a Peer for each of its addresses. When it has none, one with the reason (this is temporary: an operator
        has named it); with the system's name servers, one with the name as its address, for what else getaddrinfo(3) can ask."""
        name, port, path = _parsed(text)
        if path:
            return [Peer(text, "", 0, path, text, files)]
        try:
            with Stopwatch(self._timed).phase("dns"):
                found = await self._resolver.host(name, families)
        except NoDescriptor as error:
            raise NoRoute(False, "4.3.0", OUT_OF_DESCRIPTORS, str(error), US, scarce=True) from None
        except (DnsFailure, NoData, NoSuchName) as error:
            what = {NoSuchName: "it does not exist", NoData: f"it has no address of IPv{' or IPv'.join(families)}"}
            why = what.get(type(error)) or str(error)
            cause = f"{name}: its name could not be looked up: {why}; {self._asked()}"
            failure = ConnectFailed("connect", f"{name}: its name could not be looked up", cause, fault=DNS, category="dns")
            address = "" if self._config.delivery.nameservers else name
            return [Peer(_tls_name(name), address, port, host=text, files=files, failure=failure)]
        host = _tls_name(name)
        return [Peer(host, address, port, "", text, files, number == len(found)) for number, address in enumerate(found, 1)]

    def _asked(self) -> str:
        """Who is asked for names of smart hosts, for people."""
        given = self._config.delivery.nameservers
        return "asked: /etc/hosts, then " + (f"delivery.nameservers {', '.join(given)}" if given else "the system's name servers")

    def _order(self, route: Route) -> list[str]:
        """A route's smart hosts: those that are up first, as listed or shuffled by weight."""
        hosts = list(route.hosts)
        if route.mode == "balance":
            weights = dict(zip(hosts, route.weights or [1] * len(hosts), strict=True))
            hosts = [host for host in hosts if weights[host]]
            hosts.sort(key=lambda host: random.random() ** (1.0 / weights[host]), reverse=True)
        down = self.down(route)
        return sorted(hosts, key=lambda host: host in down)

    async def to(self, site: Site, peer: Peer, source: Source | None, timeout: float = 0.0, marks: bool = False) -> Session:
        """A session with one host. ConnectFailed when it fails; NoRoute when it is this host. `timeout`: as for `open`.
        `marks`: a smart host that cannot be connected to is down (its other addresses have failed before)."""
        tls = site.route.tls
        name = peer.label
        try:
            session = await self._once(site, peer, tls, source, timeout)
        except ConnectFailed as error:
            if tls == "may" and error.phase == "starttls" and not error.scarce:  # a failed handshake, where TLS is optional
                session = await self._once(site, peer, "off", source, timeout)
                session.fell_back = True
                return session
            # The timeout of a probe (`timeout`) is short: its failure does not mean that the host is down.
            theirs = error.phase == "connect" and error.said is None and not error.scarce
            if site.hosts is None and marks and theirs and not timeout:
                self._failed(site, peer, name, error)
            raise
        if self._down and self._down.pop(name, None) is not None:
            self._log.event("warning", text=f"smart host {name} can be reached again")
        return session

    async def _once(self, site: Site, peer: Peer, tls: str, source: Source | None, timeout: float) -> Session:
        if peer.failure is not None and not peer.address:
            self._told(site, str(peer.failure), hosts_of(peer.name, peer.place))
            raise peer.failure
        delivery = self._config.delivery
        longest, greeting = delivery.connect_timeout, GREETING * delivery.patience
        times = (min(timeout, longest), min(timeout, greeting)) if timeout else (longest, greeting)
        by_name = site.hosts is not None or peer.port == SMTP_PORT  # on other ports of this machine a content filter may be
        trace = None
        if self.tracer is not None and self.tracer.watches_out:
            trace = partial(self._trace, self.tracer, site, peer, source)
        via = Via(site.route, self._config.hostname, *times, tls, self._ourselves, source, by_name, trace)
        try:
            session = await connect(peer, via, self._tokens, self._make, RECIPIENTS, self._timed)
        except ConnectFailed as error:
            if error.in_tls and not peer.path:
                self._secured(site.route.tls, "failed")
            if peer.failure is not None and error.category == "dns":
                raise peer.failure from None  # says more
            raise
        if not peer.path:
            by = "verified" if tls == "verify" else "encrypted"
            self._secured(site.route.tls, by if session.link.tls else "clear")
        session.place = peer.place
        if trace is None and self.tracer is not None:  # somebody watches since it was begun
            session.trace(self.tracer, self.names(site, source), hosts_of(peer.name, peer.place))
        if session.core.features.chunking and self._no_bdat.get(peer.place, 0.0) > time.monotonic():
            session.core.features.chunking = False
        return session

    def _trace(self, tracer: Tracer, site: Site, peer: Peer, source: Source | None, client: LenientSMTP) -> None:
        """Let those know of a connection who watch it."""
        tracer.outgoing(client, Facts(names=self.names(site, source), hosts=hosts_of(peer.name, peer.place)))
        if client.tap is not None:
            whose = f"site {site.key}" + (f", source {source.name}" if source is not None else "")
            client.tap.event(f"connecting to {peer.label} [{peer.place}] ({whose})")

    def _told(self, site: Site, text: str, hosts: tuple[str, ...] = ()) -> None:
        """Let those know who watch a site, of what comes before a connection."""
        if self.tracer is not None and self.tracer.watches_out:
            self.tracer.looked_up(Facts(names=self.names(site, None), hosts=hosts), f"{site.key}: {text}")

    def without_bdat(self, place: str) -> None:
        """Remember that a host offers CHUNKING, and does not implement BDAT: DATA is used."""
        if self._no_bdat.get(place, 0.0) <= time.monotonic():
            self._log.event("warning", text=f"{place} offers CHUNKING and does not implement BDAT: DATA is used")
            if len(self._no_bdat) >= NO_BDAT_KEPT:
                self._no_bdat.clear()
        self._no_bdat[place] = time.monotonic() + NO_BDAT_SECONDS

    # The health of smart hosts

    def _failed(self, site: Site, peer: Peer, name: str, error: ConnectFailed) -> None:
        """Mark a smart host as down: others are preferred until a background probe finds it up, so that no message is delayed by
        trying it. Further failures change only the reason."""
        known = name in self._down
        self._down[name] = str(error)
        if not known and len(site.route.hosts) > 1:
            self._log.event("warning", text=f"smart host {name} is down, others of route {site.route.label} are used: {error}")
            families = site.route.ip.replace(" ", "")
            task = asyncio.get_running_loop().create_task(self._probe(peer, name, site.route.tls, families))
            self._probing.add(task)
            task.add_done_callback(self._probing.discard)

    async def _probe(self, peer: Peer, name: str, tls: str, families: str = "64") -> None:
        patience, began = PROBE_TIMEOUT, time.monotonic()
        while name in self._down:
            await asyncio.sleep(PROBE_EVERY)
            try:
                async with asyncio.timeout(patience):
                    peers = await self._smart_host(peer.host, families, peer.files) if peer.host else [peer]
                    greets = await self._any_greets(peers, tls)
            except Exception:  # any failure: it did not greet
                greets = False
            if greets and self._down.pop(name, None) is not None:
                self._log.event("warning", text=f"smart host {name} can be reached again")
            elif time.monotonic() - began > PROBE_LONGEST:
                self._down.pop(name, None)
            patience = min(2 * patience, GREETING * self._config.delivery.patience)

    async def _any_greets(self, peers: list[Peer], tls: str) -> bool:
        found = await asyncio.gather(*(_greets(peer, tls) for peer in peers if peer.address or peer.path), return_exceptions=True)
        return True in found

    def down(self, route: Route) -> dict[str, str]:
        """The smart hosts of a route that are down, and why."""
        if not self._down:
            return {}
        found = {host: self._down.get(_label(host)) for host in route.hosts}
        return {host: reason for host, reason in found.items() if reason is not None}

    def close(self) -> None:
        """Cancel the probes."""
        for task in self._probing:
            task.cancel()


def hosts_of(name: str, place: str) -> tuple[str, ...]:
    """What a peer is known by: its name and its address, with the port that it is connected to."""
    address, _, port = place.rpartition(":")
    if place.startswith("unix:"):
        return (place, name)
    host = f"[{address}]" if ":" in address else address
    return (f"{host}:{port}", f"{name}:{port}")


def _parsed(text: str) -> tuple[str, int, str]:
    """(Name, port, path) of a smart host as a route names it; path: of a unix socket, else ""."""
    return ("", 0, text.removeprefix("unix:")) if text.startswith("unix:") else (*parse_hostport(text, 25), "")


def _label(text: str) -> str:
    """`Peer.label` of a smart host."""
    name, port, path = _parsed(text)
    return f"unix:{path}" if path else f"{_tls_name(name)}:{port}"


def _tls_name(name: str) -> str:
    """A host's name as TLS and the log have it: A-labels, without the dot at the end that says that it is complete."""
    try:
        return normalize_domain(name) if not name.isascii() else name.rstrip(".")
    except DomainError:
        return name.rstrip(".")


async def _greets(peer: Peer, tls: str) -> bool:
    """Whether a host greets with 220 (RFC 5321 3.1)."""
    if peer.path:
        reader, writer = await asyncio.open_unix_connection(peer.path)
    else:
        context = implicit_tls(peer, tls)
        reader, writer = await asyncio.open_connection(
            peer.address, peer.port, ssl=context, server_hostname=peer.name if context is not None else None
        )
    try:
        line = await reader.readline()
        good = line.startswith(b"220") and line.endswith(b"\n")
        writer.write(b"QUIT\r\n")
        return good
    finally:
        writer.close()
