"""Whether the configuration that `relaymta init` has made works: the smart hosts are connected to, and a test message is sent."""

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from relaymta import control
from relaymta.cli.message import waiting
from relaymta.config import Config, Route, parse_hostport
from relaymta.control import program
from relaymta.dns import Resolver
from relaymta.errors import RelayError
from relaymta.proto.envelope import Envelope
from relaymta.proto.smtp_client import ClientSession
from relaymta.route.mx import NoRoute
from relaymta.route.ourselves import Ourselves
from relaymta.route.sites import Site, Sites
from relaymta.route.table import RouteTable
from relaymta.send.connect import ConnectFailed
from relaymta.send.cures import cure
from relaymta.send.oauth import TokenError, Tokens
from relaymta.send.opener import Opener
from relaymta.send.session import Session

if TYPE_CHECKING:
    from relaymta.config import OAuth

__all__ = ["Running", "reach", "send", "started", "text_of"]

STEP_SECONDS = 30.0  # for the connection, and for each reply to it
GOODBYE_SECONDS = 2.0  # for the end of a connection
START_SECONDS = 60.0  # until a relay that is started accepts mail
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.1  # between two looks at what has come of the test message
_QUEUED = re.compile(r"queued as (\w{13})")

# What to do about a smart host that cannot be used, in the words of the options; others as of `message explain`.
_CURES = {
    "refused": "nothing listens there: correct the host or the port",
    "dns": "correct the name of the host",
    "tls": "as the reason says: another port (587, 465), the name that the certificate has, or --ca-file for an internal CA; "
    "for a host that wants no login also --tls may",
    "password": "correct the user name and the password; where a provider wants a password for applications, use that",
}
# What to do where the test message was refused.
_CURES_OF_MAIL = {
    ("bounced", "policy"): "see the reply; many smart hosts accept only senders that belong to the login: give one with --from",
    ("deferred", "policy"): "see the reply; after greylisting it is accepted in some minutes: send it again (--force)",
}
_BLOCKED = "; many networks block port 25: smart hosts take mail on 587 (or 465), too"
_BLOCKED_MX = "; many networks block port 25: ask your provider to open it, or use a smart host (--smarthost)"


# Smart hosts


class _Trying(Session):
    """A session that carries no message. `over`: its connection has ended."""

    def __init__(self, core: ClientSession, peer: str) -> None:
        super().__init__(core, peer, asyncio.get_running_loop().time, lambda one: False, _nothing, _nothing)
        self.over = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.over.set()


def _nothing(*args: object) -> None:
    pass


class _Silent:
    """A log that nobody reads."""

    def event(self, name: str, **fields: object) -> None:
        """Nothing."""


async def _no_token(settings: "OAuth", refused: str) -> tuple[str, float]:
    raise TokenError("no token is fetched here")


def reach(config: Config, to: str) -> list[dict[str, Any]]:
    """What comes of a connection to each smart host, with TLS and the login; without one, to an MX host of the recipient `to`.
    One row each: `host`, `address`, `port`, `tls` (version, "": none), `login` (the user name), `failure` ("": none), `cure`."""
    return asyncio.run(_reach(config, to))


async def _reach(config: Config, to: str) -> list[dict[str, Any]]:
    resolver, silent = Resolver(config.delivery.nameservers), _Silent()
    opener = Opener(config, resolver, silent, Tokens(_no_token), _Trying)  # type: ignore[arg-type]
    try:
        if config.route:
            route = config.route[0]
            sites = [Site(route.label, route.model_copy(update={"hosts": [host]}), None) for host in route.hosts]
            return [await _tried(opener, site, site.route.hosts[0]) for site in sites]
        return [await _by_mx(config, resolver, opener, to)]
    finally:
        opener.close()
        await resolver.close()


async def _by_mx(config: Config, resolver: Resolver, opener: Opener, to: str) -> dict[str, Any]:
    routes = RouteTable(config)
    ((name, _),) = routes.assign(Envelope("", [to], 0, 0, 0, 0))
    try:
        site = await Sites(routes, resolver, Ourselves.of(config).names, resolver.now).find(name)
    except NoRoute as error:
        return _row(name.domain, failure=str(error), cure=f"correct {to}, or see the MX record of its domain")
    return await _tried(opener, site, ", ".join(site.names[:3]))


async def _tried(opener: Opener, site: Site, host: str) -> dict[str, Any]:
    try:
        session = await opener.open(site, None, STEP_SECONDS)
    except (ConnectFailed, NoRoute) as error:
        return _row(host, failure=_without(host, str(error)), cure=_cure(error.category, site, host))
    assert isinstance(session, _Trying)
    link = session.link
    found = _row(session.peer, link.address, link.port, link.tls, site.route.username if site.route.tls == "verify" else "")
    session.quit()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE_SECONDS):
            await session.over.wait()
    return found


def _without(host: str, text: str) -> str:
    """A failure without the name of the host in front, which is shown beside it."""
    return text.removeprefix(f"{parse_hostport(host, 25)[0]}: ") if ", " not in host else text


def _row(
    host: str, address: str = "", port: int = 0, tls: str = "", login: str = "", failure: str = "", cure: str = ""
) -> dict[str, Any]:
    return {"host": host, "address": address, "port": port, "tls": tls, "login": login, "failure": failure, "cure": cure}


def _cure(category: str, site: Site, host: str) -> str:
    found = _CURES.get(category) or cure(category, site.route, [host])
    if category != "timeout":
        return found
    if site.hosts is not None:
        return found + _BLOCKED_MX
    return found + (_BLOCKED if parse_hostport(host, 25)[1] == 25 else "")


# The test message


class Running(NamedTuple):
    """A relay that accepts mail at an address, and whose control socket is at a path. `ours`: it was started for the test."""

    host: str
    port: int
    control: Path
    ours: bool


@contextlib.contextmanager
def started(config: Config, path: Path) -> Iterator[Running]:
    """A relay with the configuration in a file, but on a free port of the loopback address, and with a spool of its own, which is
    removed at the end. RelayError, with what it has said, when it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="relaymta-init-"))
    process, said = None, tempfile.TemporaryFile()  # noqa: SIM115 # not in the folder, where the relay's user could put a link
    try:
        if config.user and os.geteuid() == 0:
            user = pwd.getpwnam(config.user)
            os.chown(folder, user.pw_uid, user.pw_gid)
        port = _free_port()
        process = subprocess.Popen(
            _command(path, folder, port), stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        _await(process, port, said)
        yield Running("127.0.0.1", port, folder / "spool" / "control.sock", True)
    finally:
        if process is not None:
            _stop(process)
        said.close()
        shutil.rmtree(folder, ignore_errors=True)


def _command(path: Path, folder: Path, port: int) -> list[str]:
    """It must not be in the way of another relay, nor refuse the message since the machine is busy."""
    settings = (f"log.file={folder}/log", "control.socket=", "control.group=", "metrics.listen=off", "intake.shed_lag=0")
    options = ["-c", str(path), "--spool", str(folder / "spool"), "--listen", f"127.0.0.1:{port}", "--workers", "1"]
    return [*program("relaymta.cli", "serve"), *options, *(word for one in settings for word in ("--set", one))]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _await(process: "subprocess.Popen[bytes]", port: int, said: IO[bytes]) -> None:
    """Wait until the relay greets."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            if sock.recv(3) == b"220":
                return
        time.sleep(LOOK_SECONDS)
    said.seek(0)
    why = said.read().decode("utf-8", "replace").strip() or f"it does not accept mail within {START_SECONDS:.0f} s"
    raise RelayError(f"the relay does not start: {why}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def send(relay: Running, config: Config, sender: str, to: str, seconds: float) -> dict[str, Any]:
    """What becomes of a test message within so many seconds: `id`, `state` (delivered, deferred, bounced, waiting; refused: the
    relay did not take it), `peer`, `address`, `port`, `tls`, `login`, `reply` (of the peer, or why it was not delivered),
    `cure`."""
    found = {"id": "", "state": "refused", "peer": "", "address": "", "port": 0, "tls": "", "login": "", "reply": "", "cure": ""}
    try:
        reply = _hand_in(relay, config.hostname, sender, to)
        ident = _QUEUED.search(reply)
        if ident is None:
            return found | {"reply": reply}
        found["id"] = ident[1]
        event = _outcome(relay.control, ident[1], seconds)
        if event is None:
            return found | {"state": "waiting", "reply": _waits_for(relay.control, ident[1])}
    except smtplib.SMTPResponseException as error:
        text = error.smtp_error.decode("utf-8", "replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        return found | {"reply": f"{error.smtp_code} {text}"}
    except (OSError, smtplib.SMTPException, RelayError) as error:
        return found | {"reply": str(error) or type(error).__name__}
    found |= {key: event[key] for key in ("peer", "address", "port", "tls", "reply") if key in event}
    route = config.route[0] if config.route else Route()
    if event["event"] == "delivered":
        return found | {"state": "delivered", "login": route.username}
    hosts = route.hosts or [event["peer"]]
    found["cure"] = _CURES_OF_MAIL.get((event["event"], event["cause"])) or cure(event["cause"], route, hosts)
    return found | {"state": event["event"]}


def _hand_in(relay: Running, hostname: str, sender: str, to: str) -> str:
    """Send the message to the relay; the reply to its message data."""
    head = {
        "From": f"relaymta <{sender}>", "To": f"<{to}>", "Subject": f"Test message of relaymta on {hostname}",
        "Date": formatdate(localtime=True), "Message-ID": make_msgid(domain=hostname.strip("[]")),
        "Auto-Submitted": "auto-generated", "MIME-Version": "1.0", "Content-Type": "text/plain; charset=utf-8",
    }  # fmt: skip
    text = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    text += f"\r\nThis message was sent by `relaymta init` on {hostname}. The relay there can deliver mail.\r\n"
    options = () if f"{sender}{to}".isascii() else ("SMTPUTF8",)
    with smtplib.SMTP(relay.host, relay.port, local_hostname="localhost", timeout=STEP_SECONDS) as client:
        client.ehlo()
        for code, reply in (client.mail(sender, options), client.rcpt(to), client.data(text.encode())):
            if code != 250:
                raise smtplib.SMTPResponseException(code, reply)
    return reply.decode("utf-8", "replace")


def _outcome(path: Path, ident: str, seconds: float) -> dict[str, Any] | None:
    """The event that says what has become of a message; None: there was none in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        events: list[dict[str, Any]] = control.ask(path, "history", ident=ident)
        ended = [event for event in events if event["event"] in ("delivered", "deferred", "bounced")]
        if ended:
            return ended[-1]
        time.sleep(LOOK_SECONDS)
    return None


def _waits_for(path: Path, ident: str) -> str:
    found = control.ask(path, "explain", ident=ident)
    waits = [waiting(place["wait"]["why"]) for place in found["waits"]] if found else []
    return waits[0] if waits else "it has no outcome yet"


_FATES = {"refused": "not sent", "bounced": "refused for good", "deferred": "not delivered", "waiting": "not delivered yet"}


def text_of(found: dict[str, Any]) -> list[str]:
    """Lines that say where a test message went, or why it did not."""
    if found["state"] == "delivered":
        tls = f" over {found['tls']}" if found["tls"] else ", without TLS"
        login = f" as {found['login']}" if found["login"] else ""
        where = f"{found['peer']} [{found['address']}]:{found['port']}{tls}{login}"
        return [f"delivered to {where}; reply {found['reply']}"]
    by = f" by {found['peer']}" if found["peer"] and found["state"] in ("bounced", "deferred") else ""
    what = f"refused {'for good' if found['state'] == 'bounced' else 'for now'}{by}" if by else _FATES[found["state"]]
    lines = [f"{what}: {found['reply']}"]
    return [*lines, f"cure: {found['cure']}"] if found["cure"] else lines
