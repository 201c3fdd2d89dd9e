"""Scripted peers and DNS: hosts that answer, refuse, are silent, slow, lie or die, as the scenario has them at each moment."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiodns

from relaymta.dns import _OnLoop
from relaymta.proto.smtp_client import ClientSession, Features, Said
from relaymta.send.connect import ConnectFailed
from tests.sim import inside
from tests.sim.stage import Process, Stage

__all__ = ["Host", "Network", "Taken"]

MODES = ("good", "good", "refuse", "silent", "421", "554", "picky", "dying", "slow", "lying", "closing")
PICKY = (
    b"450 4.2.1 busy",
    b"451 4.3.0 later",
    b"452 4.3.1 full",
    b"550 5.1.1 unknown",
    b"554 5.7.1 rejected",
    b"421 4.3.2 closing",
    b"552 no more",
)


@dataclass(eq=False)
class Taken:
    """A message that a peer has accepted for one recipient. `answered`: its 250 has reached the session that sent the message."""

    ident: str
    address: str
    host: str
    process: Process
    doubtful: bool = False  # the peer lied on this connection
    answered: bool = False


@dataclass(eq=False)
class Host:
    """One peer: its extensions, and its mode."""

    name: str
    features: Features
    mode: str = "good"
    latency: float = 0.002
    no_bdat: bool = False  # it does not implement what it offers


class _Record:
    """A DNS record as pycares has it; its class is named after its type."""

    def __init__(self, kind: str, ttl: int, **fields: Any) -> None:
        self.ttl = ttl
        self.data = type(f"{kind}RecordData", (), fields)()


class _Dns:
    """One worker's c-ares."""

    def __init__(self, network: "Network", **options: Any) -> None:
        self._network = network

    async def query_dns(self, name: str, kind: str) -> Any:
        network = self._network
        random = network.stage.random
        await asyncio.sleep(random.random() * (8.0 if network.dns_slow else 0.01))
        if name in network.failing or (network.dns_fails and random.random() < network.dns_fails):
            raise aiodns.error.DNSError(11, "simulated: SERVFAIL")
        if name.startswith("gone"):
            raise aiodns.error.DNSError(4, "NXDOMAIN")
        if kind == "MX" and name in network.exchanges:
            records = [_Record("MX", network.ttl, priority=p, exchange=host) for p, host in network.exchanges[name]]
        elif kind == "A" and name in network.addresses:
            records = [_Record("A", network.ttl, addr=network.addresses[name])]
        else:
            raise aiodns.error.DNSError(1, "NODATA")
        return SimpleNamespace(answer=records)

    ask = _OnLoop.ask

    async def close(self) -> None:
        pass


@dataclass(eq=False)
class Network:
    """All peers and the DNS. `taken(record, data)` is called for what a peer accepts."""

    stage: Stage
    taken: Callable[[Taken, bytes], None]
    refused: Callable[[int | None, str, str], None]  # id, recipient, host: its 5xx to RCPT has reached the session
    hosts: dict[str, Host] = field(default_factory=dict)  # by name
    exchanges: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    by_address: dict[str, Host] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    dns_fails: float = 0.0
    dns_slow: bool = False
    ttl: int = 5
    names: dict[int, str] = field(default_factory=dict)  # the host of each session, by the id of its core
    wires: list["Wire"] = field(default_factory=list)
    connecting: dict[str, int] = field(default_factory=dict)  # by name of process
    began: dict[tuple[str, str], float] = field(default_factory=dict)  # the last attempt of a process to connect to a host

    def add(self, host: Host) -> None:
        number = len(self.hosts) + 1
        self.hosts[host.name] = self.by_address[f"192.0.2.{number}"] = host
        self.addresses[host.name] = f"192.0.2.{number}"

    def resolver(self, **options: Any) -> _Dns:
        return _Dns(self, **options)

    def _host(self, peer: Any) -> Host:
        return self.by_address.get(peer.address) or self.hosts[peer.name]

    async def connect(self, peer: Any, via: Any, tokens: Any, make: Any, recipients: int, timed: Any) -> Any:
        """As `relaymta.send.connect.connect`."""
        process = self.stage.process
        assert process is not None
        self.connecting[process.name] = self.connecting.get(process.name, 0) + 1
        try:
            return await self._connect(process, peer, via, make, recipients)
        finally:
            self.connecting[process.name] -= 1

    async def _connect(self, process: Process, peer: Any, via: Any, make: Any, recipients: int) -> Any:
        host, random = self._host(peer), self.stage.random
        self.began[process.name, host.name] = self.stage.now
        await asyncio.sleep(random.random() * host.latency)
        mode = host.mode
        if mode == "refuse":
            raise ConnectFailed("connect", f"{peer.name}: Connection refused")
        if mode == "silent":
            await asyncio.sleep(via.connect_timeout)
            raise ConnectFailed("connect", f"{peer.name}: timed out")
        if mode in ("421", "554"):
            raise ConnectFailed("connect", "not now", said=Said(int(mode), b"not now", "connect"))
        if mode == "dying" and random.random() < 0.4:
            raise ConnectFailed("ehlo", f"{peer.name}: the connection was closed")
        wire = Wire(self, host, process, via.route.protocol == "lmtp")
        await asyncio.sleep(random.random() * host.latency)
        features = Features(host.features.pipelining, host.features.eight_bit, True, host.features.size, host.features.chunking)
        features.chunking = features.chunking and via.route.chunking
        core = ClientSession(features, recipients, False)
        self.names[id(core)] = host.name
        session = make(core, peer.name)
        session.attach(wire)
        self.wires.append(wire)
        if mode == "closing" and random.random() < 0.5:
            wire.die(False)
        return session

    async def greets(self, peer: Any, tls: str) -> bool:
        """As `relaymta.send.opener._greets`."""
        await asyncio.sleep(0.01)
        return self._host(peer).mode not in ("refuse", "silent", "421", "554")


class Wire:
    """A connection: the transport of a Session on one side, the peer on the other. What is written arrives after a while, also
    when the writing process has died meanwhile."""

    def __init__(self, network: Network, host: Host, process: Process, lmtp: bool) -> None:
        self.network, self.host, self.process = network, host, process
        self.stage = network.stage
        self.protocol: Any = None
        self.open = True  # as the session sees it
        self.alive = True  # the peer's side
        self._lost = False
        self._buffer = b""
        self._dots = False  # message data that ends with a dot is under way
        self._expects = 0  # octets of BDAT, and one
        self._sender: str | None = None
        self._recipients: list[str] = []
        self._lied = False
        self._arrives = 0.0  # nothing overtakes
        self._returns = 0.0

    # The transport

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return not self.open

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes) -> None:
        if self.open and data:
            self._arrives = max(self._arrives, self.stage.now + self._delay())
            self.stage.at(self._arrives, lambda: self._arrived(bytes(data)))

    def writelines(self, pieces: list[bytes]) -> None:
        self.write(b"".join(pieces))

    def close(self) -> None:
        if self.open:
            self.open = False
            self.stage.at(max(self._arrives, self.stage.now + self._delay()), self._eof)
            if not self.process.dead:
                self.process.loop.call_soon(self._connection_lost, None)

    abort = close

    def _delay(self) -> float:
        host = self.host
        return self.stage.random.random() * (4.0 if host.mode == "slow" else host.latency)

    def _eof(self) -> None:
        self.alive = False
        if self in self.network.wires:
            self.network.wires.remove(self)

    def _connection_lost(self, error: Exception | None) -> None:
        if not self._lost and not self.process.dead:
            self._lost = True
            self.open = False
            self.protocol.connection_lost(error)

    # The peer

    def die(self, reset: bool) -> None:
        """The peer closes (or resets) the connection."""
        if self.alive:
            self._eof()
            moment = max(self._returns, self.stage.now + self._delay())
            self.stage.at(moment, lambda: self._gone(reset))

    def _gone(self, reset: bool) -> None:
        if not self.process.dead and self.open:
            self.open = False
            self.process.loop.call_soon(self._connection_lost, ConnectionResetError("simulated") if reset else None)

    def _reply(self, text: bytes, taken: list[Taken] | None = None, refused: str = "") -> None:
        self._returns = max(self._returns, self.stage.now + self._delay())
        self.stage.at(self._returns, lambda: self._replied(text + b"\r\n", taken or [], refused))

    def _replied(self, text: bytes, taken: list[Taken], refused: str) -> None:
        if self.process.dead or not self.open:
            return
        self.process.loop.call_soon(self._received, text, taken, refused)

    def _received(self, text: bytes, taken: list[Taken], refused: str) -> None:
        if self.open and not self._lost:
            for record in taken:
                record.answered = True
            if refused and not self._lied:
                self.network.refused(inside.asked_about(self.protocol.core, refused), refused, self.host.name)
            self.protocol.data_received(text)

    def _arrived(self, data: bytes) -> None:
        if not self.alive:
            return
        mode, random = self.host.mode, self.stage.random
        self._buffer += data
        if mode == "silent":
            return
        if mode in ("dying", "refuse") and random.random() < 0.3:
            self.die(random.random() < 0.5)
            return
        while self.alive and self._one():
            pass

    def _one(self) -> bool:
        """Handle one command or the end of message data; whether there was one."""
        if self._expects or self._dots:
            return self._more_data()
        line, newline, rest = self._buffer.partition(b"\r\n")
        if not newline:
            return False
        self._buffer = rest
        verb = line[:4].upper().decode("ascii", "replace")
        answer = getattr(self, "_" + verb.lower(), None) if verb in ("MAIL", "RCPT", "DATA", "BDAT", "RSET", "QUIT") else None
        if answer is None:
            self._reply(b"500 5.5.2 what?")
        else:
            answer(line)
        return True

    def _picks(self) -> bytes | None:
        """A refusal that the peer's mode makes up."""
        host, random = self.host, self.stage.random
        if host.mode == "picky" and random.random() < 0.25:
            return random.choice(PICKY)
        return None

    def _refuse(self, text: bytes, address: str = "") -> None:
        self._reply(text, refused=address if text.startswith(b"5") and not text.startswith(b"552") else "")
        if text.startswith(b"421"):
            self.die(False)

    def _lies(self) -> bool:
        if self.host.mode == "lying" and self.stage.random.random() < 0.2:
            self._lied = True
            self._reply(
                self.stage.random.choice((b"250 2.0.0 fine", b"354 go on", b"220 hello", b"299 x", b"199 y", b"no reply at all"))
            )
            return self.stage.random.random() < 0.5
        return False

    def _mail(self, line: bytes) -> None:
        if self._lies():
            return
        text = self._picks()
        if text is not None:
            self._refuse(text)
            return
        self._sender, self._recipients = line[11:].partition(b">")[0].decode(), []
        self._reply(b"250 2.1.0 ok")

    def _rcpt(self, line: bytes) -> None:
        if self._sender is None:
            self._reply(b"503 5.5.1 MAIL first")
            return
        text, address = self._picks(), line[9:].partition(b">")[0].decode()
        if text is not None:
            self._refuse(text, address)
            return
        self._recipients.append(address)
        self._reply(b"250 2.1.5 ok")

    def _rset(self, line: bytes) -> None:
        self._sender, self._recipients = None, []
        self._reply(b"250 2.0.0 ok")

    def _quit(self, line: bytes) -> None:
        self._eof()

    def _data(self, line: bytes) -> None:
        if self._lies():
            return
        text = self._picks() if self._recipients else b"503 5.5.1 no recipients"
        if text is not None:
            self._refuse(text)
            return
        self._dots = True
        self._reply(b"354 go on")

    def _bdat(self, line: bytes) -> None:
        if self.host.no_bdat:
            self._reply(b"500 5.5.2 what?")
            return
        self._expects = int(line.split()[1]) + 1  # one more, so that 0 octets are under way, too

    def _more_data(self) -> bool:
        if self._expects:
            octets = self._expects - 1
            if len(self._buffer) < octets:
                return False
            data, self._buffer, self._expects = self._buffer[:octets], self._buffer[octets:], 0
        else:
            whole = b"\r\n" + self._buffer
            data, dot, rest = whole.partition(b"\r\n.\r\n")
            if not dot:
                return False
            data = (data + b"\r\n")[2:].replace(b"\r\n.", b"\r\n")
            data, self._buffer = data.removeprefix(b"."), rest
            self._dots = False
        self._end_of_data(data)
        return True

    def _end_of_data(self, data: bytes) -> None:
        sender, recipients = self._sender, self._recipients
        self._sender, self._recipients = None, []
        if sender is None or not recipients:
            self._reply(b"503 5.5.1 no recipients")
            return
        text = self._picks()
        if text is not None:
            self._refuse(text)
            return
        if self.host.mode == "dying" and self.stage.random.random() < 0.3:
            self.die(True)  # before it has accepted it
            return
        lies = self._lies()
        doubtful = self._lied or not self.open or self.process.dead  # nobody waits for the answer any more
        taken = [Taken("", address, self.host.name, self.process, doubtful) for address in recipients]
        for record in taken:
            self.network.taken(record, data)
        if self.host.mode in ("dying", "closing") and self.stage.random.random() < 0.3:
            self.die(True)  # after it has accepted it: in doubt
        elif not lies:
            self._reply(b"250 2.0.0 taken", taken)
