"""A peer that answers each command of each phase with each class of reply, in each arrangement of hosts, over real sockets. What
comes of it is the table "What comes of a reply" in docs/delivery.md, which is read here."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relaymta.config import Config
from relaymta.log import Log
from relaymta.metrics import Counters
from relaymta.node import SiteStates
from relaymta.proto.envelope import SUCCESS, Body, Envelope, QueueName
from relaymta.queue import Entry
from relaymta.queue.lifecycle import WAITING
from relaymta.route.mx import Hosts
from relaymta.route.sites import Site
from relaymta.route.table import RouteTable
from relaymta.send import trust
from relaymta.send.dispatch import Dispatcher
from relaymta.send.oauth import Tokens
from relaymta.shm import Shared
from tests.send.test_dispatch import FakeQueue
from tests.support.daemon import free_port

DOCS = Path(__file__).parents[2] / "docs" / "delivery.md"
LINES = {
    "another 2xx": b"251 2.0.0 fine\r\n",
    "3xx": b"399 more\r\n",
    "4xx": b"450 4.2.0 not now\r\n",
    "421": b"421 4.3.2 bye\r\n",
    "5xx": b"550 5.1.1 no\r\n",
    "552": b"552 no more\r\n",
    "502": b"502 5.5.1 not implemented\r\n",
    "no reply": b"hello?\r\n",
    "close": b"",
    "silence": b"",
}
GOOD = {
    "banner": b"220 peer\r\n", "MAIL": b"250 2.1.0 ok\r\n", "RCPT": b"250 2.1.5 ok\r\n", "DATA": b"354 go\r\n",
    "dot": b"250 2.0.0 taken\r\n", "BDAT": b"250 2.0.0 taken\r\n", "RSET": b"250 2.0.0 ok\r\n", "QUIT": b"221 2.0.0 bye\r\n",
    "STARTTLS": b"220 2.0.0 go\r\n", "AUTH": b"235 2.7.0 welcome\r\n", "HELO": b"250 peer\r\n",
}  # fmt: skip
# What the words of the table mean: (of one host, of several): the result, and which hosts have the message.
MEANING = {
    "sent": [("success", [0]), ("success", [0])],
    "next host": [("transient", []), ("success", [1])],
    "bounced": [("permanent", []), ("permanent", [])],
    "in doubt": [("in doubt", []), ("in doubt", [])],
}


def table() -> Iterator[tuple[str, str, str]]:
    """(phase, class of reply, what comes of it) of the documented table."""
    text = DOCS.read_text().partition("## What comes of a reply")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = next(row for row in rows if row[0] == "phase")
    for row in rows[rows.index(head) + 2 :]:
        if len(row) != len(head):
            break
        for name, cell in zip(head[1:], row[1:], strict=True):
            yield row[0], name, cell


CELLS = list(table())


class Peer:
    """A host. `script[phase]`: its reply to the first command of that phase, by class; or (bytes) its reply to each; or a list of
    its replies. It takes messages with a recipient that it has answered by 2xx. `knows_bdat`: it implements BDAT."""

    def __init__(
        self, offers: bytes, script: dict[str, Any], context: ssl.SSLContext | None = None, lmtp: bool = False,
        knows_bdat: bool = True,
    ) -> None:  # fmt: skip
        self.offers = offers
        self.script = script
        self.knows_bdat = knows_bdat
        self.connections = self.open = self.most_open = 0
        self.asked: list[str] = []  # addresses of RCPT
        self.context = context
        self.lmtp = lmtp
        self.taken = 0
        self.commands: list[str] = []
        self.silent = asyncio.Event()  # set when it has answered with silence
        self.over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await self._talk(reader, writer)
        except (OSError, EOFError, ssl.SSLError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, phase: str, good: bytes = b"") -> bytes:
        """Reply to a command; ConnectionError where the connection ends. Returns the reply."""
        self.commands.append(phase)
        said, name = self.script.get(phase, b""), ""
        if isinstance(said, list):
            said = said.pop(0) if said else b""
        elif isinstance(said, str):
            name, said = said, LINES[said]
            del self.script[phase]
        line = said if said or name else good or GOOD[phase]
        writer.write(line)
        if name == "silence":
            self.silent.set()
            await self.over.wait()
        if name in ("close", "silence") or line.startswith(b"421") or phase == "QUIT":
            raise ConnectionError
        return line

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recipients, mail = 0, False
        secure = writer.get_extra_info("sslcontext") is not None
        await self._answer(writer, "banner")
        while line := await reader.readline():
            verb = (line.split() or [b""])[0].decode("latin-1").upper()
            if verb in ("EHLO", "LHLO"):
                offers = self.offers + (b"" if self.context is None else b"AUTH PLAIN\r\n" if secure else b"STARTTLS\r\n")
                lines = offers.splitlines()
                text = b"".join(b"250-" + one + b"\r\n" for one in lines[:-1]) + b"250 " + lines[-1] + b"\r\n"
                await self._answer(writer, verb, text)
            elif verb == "BDAT" and self.knows_bdat:
                await reader.readexactly(int(line.split()[1]))
                said = await self._answer(writer, "BDAT") if recipients else b"503 5.5.1 no\r\n"
                self.taken += said.startswith(b"2") and recipients > 0
            elif verb in GOOD:
                said = await self._answer(writer, verb, b"" if verb != "DATA" or recipients else b"503 5.5.1 no recipients\r\n")
                if verb == "MAIL":
                    mail, recipients = said.startswith(b"2"), 0
                elif verb == "RCPT":
                    self.asked.append(line.partition(b"<")[2].partition(b">")[0].decode())
                    recipients += mail and said.startswith(b"2")
                elif verb == "STARTTLS" and said.startswith(b"220"):
                    await writer.start_tls(self.context)  # type: ignore[arg-type]
                    secure = True
                elif verb == "DATA" and said.startswith(b"354"):
                    await reader.readuntil(b"\r\n.\r\n")
                    said = await self._answer(writer, "dot")
                    self.taken += said.startswith(b"2") and recipients > 0
                    for _ in range(1, recipients if self.lmtp else 0):
                        await self._answer(writer, "dot")
            else:
                writer.write(b"500 5.5.2 what?\r\n")


# Phases of a transaction as the session names them.
AWAITED = {"MAIL": "mail", "RCPT": "rcpt", "DATA": "data", "dot": "final", "BDAT": "final", "RSET": "rset"}
OFFERS = b"peer\r\nPIPELINING\r\n8BITMIME\r\n"


@contextlib.asynccontextmanager
async def hosted(
    folder: Path, arrangement: str, peers: list[Peer], protocol: str = "smtp", **keys: Any
) -> AsyncIterator[tuple[Dispatcher, Site]]:
    """Peers that listen, and a dispatcher with the site that they are in this arrangement."""
    port = free_port()  # not one that the system gives: it may be in use at the next address
    servers = [await asyncio.start_server(peer.serve, f"127.0.0.{number}", port) for number, peer in enumerate(peers, 1)]
    smart = arrangement.endswith(("host", "smart hosts"))
    route = {"name": "r", "protocol": protocol, **keys}
    if smart:
        route["hosts"] = [f"127.0.0.{number}:{port}" for number in range(1, len(peers) + 1)]
    config = Config.model_validate({
        "listener": [{"address": "127.0.0.1:1"}], "route": [route], "delivery": {"port": port},
    })  # fmt: skip
    addresses = {"mx1.test": ["127.0.0.1"], "mx2.test": ["127.0.0.2"]}
    pairs = ((10, "mx1.test"), (20, "mx2.test"))
    if arrangement == "two addresses":
        addresses, pairs = {"mx.test": ["127.0.0.1", "127.0.0.2"]}, ((10, "mx.test"),)  # type: ignore[assignment]

    async def resolve(host: str, families: str) -> list[str]:
        return addresses[host]

    shared, log = Shared.create(), Log(str(folder / "log"), 0)

    async def numeric(host: str, families: str) -> list[str]:
        return [host]

    resolver = SimpleNamespace(now=lambda: 0.0, addresses=resolve, host=numeric, aliases=lambda host: set())
    dispatcher = Dispatcher(
        config, RouteTable(config), shared.limits(0, 1), shared.rates(1), shared.in_flight(0), Counters(shared.counters(0)),
        log, resolver, {}, SiteStates(), lambda state, key: None, Tokens(None),  # type: ignore[arg-type]
    )  # fmt: skip
    dispatcher.queue = FakeQueue()  # type: ignore[assignment]
    site = Site("r", config.route[0], None if smart else Hosts(pairs, 0.0))
    dispatcher.sites.known = lambda name: site  # type: ignore[method-assign, assignment]
    try:
        yield dispatcher, site
    finally:
        for peer in peers:
            peer.over.set()
        await dispatcher.drain(0, 0)
        for server in servers:
            server.close()
        log.close()
        for descriptor in (shared.descriptor, log._descriptor):
            os.close(descriptor)


def message(number: int = 1, *recipients: str) -> Entry:
    names = list(recipients) or ["c@d.test"]
    data = [b"Subject: x\r\n\r\nx\r\n"]
    envelope = Envelope(sender="a@b.test", recipients=names, size=len(data[0]), flags=0, arrived=0, deadline=0)
    envelope.body = Body(1, 1, 1, 1)
    made = Entry(number, envelope, QueueName("r", "d.test"), 1, 0, 0, None, True, data)
    made.state = WAITING
    return made


async def outcome(dispatcher: Dispatcher, entry: Entry, silent: str = "") -> dict[int, str]:
    """The outcome of an entry's attempt: for each recipient "success", "transient", "permanent" or "in doubt". `silent`: when a
    session awaits the reply to this, the watchdog finds that its time is over."""
    queue: Any = dispatcher.queue
    dispatcher.offer(entry)
    async with asyncio.timeout(60):
        while not queue.finished:
            await asyncio.sleep(0.001)
            if silent and silent in [session.core.awaiting for session, _ in dispatcher.sessions]:
                silent = ""
                dispatcher.connections.tick(dispatcher.loop.time() + 1e6, queue.clock.now())
    ((_, results, _),) = queue.finished
    if results is None:
        return dict.fromkeys((i for i, _ in entry.recipients), SUCCESS)
    return {i: "in doubt" if "in doubt" in a.text else a.kind for i, a in results.items()}


ARRANGEMENTS = ["one host", "two smart hosts", "two MX", "two addresses"]


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("phase", list(dict.fromkeys(phase for phase, _, _ in CELLS)))
async def test_what_comes_of_each_reply(tmp_path, monkeypatch, contexts, phase, arrangement, protocol):
    if phase == ("EHLO" if protocol == "lmtp" else "LHLO"):
        pytest.skip("not of this protocol")
    if protocol == "lmtp" and (arrangement not in ("one host", "two smart hosts") or phase in ("BDAT", "RSET")):
        pytest.skip("LMTP is for hosts of a route, and has no BDAT here")
    server, authority = contexts
    keys: dict[str, Any] = {"tls": "off"}
    secure = phase in ("STARTTLS, optional", "STARTTLS, required", "AUTH")
    verb = phase.partition(",")[0]
    if secure:
        keys["tls"] = {"STARTTLS, optional": "may", "STARTTLS, required": "encrypt"}.get(phase, "verify")
    if phase == "AUTH":
        if arrangement.startswith("two ") and not arrangement.endswith("smart hosts"):
            pytest.skip("credentials are for hosts of a route")
        monkeypatch.setenv("RELAY_PASSWORD", "secret")
        keys |= {"username": "me", "password_env": "RELAY_PASSWORD"}
    made = trust.Context(ssl.PROTOCOL_TLS_CLIENT)
    made.sessions = {}
    authority.configure_trust(made)
    if phase != "AUTH":
        made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    monkeypatch.setattr(trust, "context_of", lambda *args: made)
    wrong = []
    for _, name, cell in [row for row in CELLS if row[0] == phase]:
        offers = OFFERS + (b"CHUNKING\r\n" if phase in ("BDAT", "RSET") else b"")
        count = 1 if arrangement == "one host" else 2
        early = verb in ("banner", "EHLO", "LHLO", "STARTTLS", "AUTH")
        peers = [
            Peer(offers, {verb: name} if not number else {}, server if secure else None, protocol == "lmtp")
            for number in range(count)
        ]
        if name == "silence" and early:  # no watchdog, but a timer
            monkeypatch.setattr("relaymta.send.opener.GREETING", 0.5)
        async with hosted(tmp_path, arrangement, peers, protocol, **keys) as (dispatcher, _):
            found = (await outcome(dispatcher, message(), AWAITED.get(phase, "") if name == "silence" else ""))[0]
            await dispatcher.drain(0, 0)
            taken = [number for number, peer in enumerate(peers) if peer.taken]
        expected = MEANING[cell][count - 1]
        if expected[0] == "in doubt":  # it may have the message
            taken = [] if taken == [0] else taken
        if (found, taken) != expected:
            wrong.append(f"{name}: {found}, taken by {taken}; expected {expected}")
    assert not wrong, wrong


def test_the_table_is_whole():
    phases = [
        "banner",
        "EHLO",
        "LHLO",
        "STARTTLS, optional",
        "STARTTLS, required",
        "AUTH",
        "MAIL",
        "RCPT",
        "DATA",
        "dot",
        "BDAT",
        "RSET",
        "QUIT",
    ]
    assert [(phase, name) for phase, name, _ in CELLS] == [(phase, name) for phase in phases for name in LINES]
    assert {cell for _, _, cell in CELLS} == set(MEANING)
