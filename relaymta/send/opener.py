"""Opening connections: the choice of a site's host and of the source address, and the health of smart hosts."""

import asyncio
import random
import time
from collections.abc import Callable

import xxhash

from relaymta.config import Config, Route, Source, parse_hostport
from relaymta.dns import Resolver
from relaymta.log import Log
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.mx import NoRoute, targets
from relaymta.route.ourselves import Ourselves, is_local
from relaymta.route.sites import Site
from relaymta.send.connect import ConnectFailed, Peer, Via, connect, implicit_tls
from relaymta.send.oauth import Tokens
from relaymta.send.session import Session

__all__ = ["Opener", "Sources"]

PROBE_EVERY = 4.0  # seconds between two probes of a smart host that is down
PROBE_TIMEOUT = 5.0  # of the first probe; doubled for each further one, since a slow host is not down
PROBE_LONGEST = 3600.0  # then the host counts as up, and the next message tries it
GREETING = 300.0  # seconds for the greeting (RFC 5321 4.5.3.2.1) and each further reply before MAIL
RECIPIENTS = 100  # of one transaction (RFC 5321 4.5.3.1.8: every host must accept that many)
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
        ours = is_local(source.address)
        if ours != was:
            text = "is usable again" if ours else "is not an address of this machine: the route's other sources are used"
            self._log.event("warning", text=f"source {source.name} ({source.address}) {text}")
        self._plumbed[source.name] = (ours, self._now() + PLUMBED_SECONDS)
        return ours


def _score(source: Source, key: str) -> float:
    """Weighted rendezvous hashing: a source has the highest score for a share of keys proportional to its weight."""
    hashed: float = (xxhash.xxh3_64_intdigest(f"{source.name}\0{key}".encode()) + 1) / 2.0**64
    return float(hashed ** (1.0 / source.weight))


class Opener:
    """Connects to the hosts of sites. `make(core, peer)` makes the session; `tokens`: for hosts that require OAuth 2.0."""

    def __init__(
        self,
        config: Config,
        resolver: Resolver,
        log: Log,
        tokens: Tokens,
        make: Callable[[ClientSession, str], Session],
    ) -> None:
        self._config = config
        self._resolver = resolver
        self._log = log
        self._make = make
        self._tokens = tokens
        self._ourselves = _ourselves(config)
        self._down: dict[str, str] = {}  # label of a smart host that is down: why
        self._probing: set[asyncio.Task[None]] = set()
        self._no_bdat: dict[str, float] = {}  # place: until when BDAT is not used there

    def reconfigure(self, config: Config) -> None:
        """Apply a new configuration; the health of smart hosts is determined anew."""
        self._config = config
        self._ourselves = _ourselves(config)
        self._down.clear()
        self.close()

    async def open(self, site: Site, source: Source | None, timeout: float = 0.0) -> Session:
        """A session with the first host of a site that can be reached. Raises ConnectFailed or NoRoute when there is none.
        `timeout`: seconds for each step (0: as configured)."""
        failure: ConnectFailed | None = None
        loop: NoRoute | None = None
        for peer in await self.peers(site):
            try:
                return await self.to(site, peer, source, timeout)
            except ConnectFailed as error:
                failure = error
            except NoRoute as error:  # this host itself: others of the list may take the mail
                loop = error
        raise failure or loop or ConnectFailed("connect", "no host to connect to")

    async def peers(self, site: Site) -> list[Peer]:
        """The hosts to try, in order. NoRoute when the site's hosts have no address."""
        route = site.route
        if site.hosts is None:
            return [_smart_host(text) for text in self._order(route)]
        port = self._config.delivery.port
        found = await targets(
            self._resolver, site.hosts, route.ip.replace(" ", ""), lambda address: self._ourselves.at(address, port)
        )  # fmt: skip
        return [Peer(target.host, target.address, port) for target in found]

    def _order(self, route: Route) -> list[str]:
        """A route's smart hosts: those that are up first, as listed or shuffled by weight."""
        hosts = list(route.hosts)
        if route.mode == "balance":
            weights = dict(zip(hosts, route.weights or [1] * len(hosts), strict=True))
            hosts = [host for host in hosts if weights[host]]
            hosts.sort(key=lambda host: random.random() ** (1.0 / weights[host]), reverse=True)
        down = self.down(route)
        return sorted(hosts, key=lambda host: host in down)

    async def to(self, site: Site, peer: Peer, source: Source | None, timeout: float = 0.0) -> Session:
        """A session with one host. ConnectFailed when it fails; NoRoute when it is this host. `timeout`: as for `open`."""
        tls = site.route.tls
        name = peer.label
        try:
            session = await self._once(site, peer, tls, source, timeout)
        except ConnectFailed as error:
            if tls == "may" and error.phase == "starttls":  # a failed handshake, where TLS is optional
                session = await self._once(site, peer, "off", source, timeout)
                session.fell_back = True
                return session
            # The timeout of a probe (`timeout`) is short: its failure does not mean that the host is down.
            if site.hosts is None and error.phase == "connect" and error.said is None and not timeout:
                self._failed(site, peer, name, error)
            raise
        if self._down and self._down.pop(name, None) is not None:
            self._log.event("warning", text=f"smart host {name} can be reached again")
        return session

    async def _once(self, site: Site, peer: Peer, tls: str, source: Source | None, timeout: float) -> Session:
        delivery = self._config.delivery
        longest, greeting = delivery.connect_timeout, GREETING * delivery.patience
        times = (min(timeout, longest), min(timeout, greeting)) if timeout else (longest, greeting)
        via = Via(site.route, self._config.hostname, *times, tls, self._ourselves, source)
        session = await connect(peer, via, self._tokens, self._make, RECIPIENTS)
        session.place = peer.place
        if session.core.features.chunking and self._no_bdat.get(peer.place, 0.0) > time.monotonic():
            session.core.features.chunking = False
        return session

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
            task = asyncio.get_running_loop().create_task(self._probe(peer, name, site.route.tls))
            self._probing.add(task)
            task.add_done_callback(self._probing.discard)

    async def _probe(self, peer: Peer, name: str, tls: str) -> None:
        patience, began = PROBE_TIMEOUT, time.monotonic()
        while name in self._down:
            await asyncio.sleep(PROBE_EVERY)
            try:
                async with asyncio.timeout(patience):
                    greets = await _greets(peer, tls)
            except Exception:  # any failure: it did not greet
                greets = False
            if greets and self._down.pop(name, None) is not None:
                self._log.event("warning", text=f"smart host {name} can be reached again")
            elif time.monotonic() - began > PROBE_LONGEST:
                self._down.pop(name, None)
            patience = min(2 * patience, GREETING * self._config.delivery.patience)

    def down(self, route: Route) -> dict[str, str]:
        """The smart hosts of a route that are down, and why."""
        if not self._down:
            return {}
        found = {host: self._down.get(_smart_host(host).label) for host in route.hosts}
        return {host: reason for host, reason in found.items() if reason is not None}

    def close(self) -> None:
        """Cancel the probes."""
        for task in self._probing:
            task.cancel()


def _ourselves(config: Config) -> Ourselves:
    return Ourselves({config.hostname.lower()}, [listener.address for listener in config.listener])


def _smart_host(text: str) -> Peer:
    if text.startswith("unix:"):
        return Peer(text, "", 0, text.removeprefix("unix:"))
    host, port = parse_hostport(text, 25)
    return Peer(host, host, port)


async def _greets(peer: Peer, tls: str) -> bool:
    """Whether a host greets with 220 (RFC 5321 3.1)."""
    if peer.path:
        reader, writer = await asyncio.open_unix_connection(peer.path)
    else:
        reader, writer = await asyncio.open_connection(peer.address, peer.port, ssl=implicit_tls(peer, tls))
    try:
        line = await reader.readline()
        good = line.startswith(b"220") and line.endswith(b"\n")
        writer.write(b"QUIT\r\n")
        return good
    finally:
        writer.close()
