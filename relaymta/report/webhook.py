"""A webhook: POST of JSON, signed (proto/webhook.py), to one URL.

What may be connected to is decided for each address, when a socket is made for it: whatever a name means by then.
"""

import asyncio
import errno
import hashlib
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec

from relaymta import __version__
from relaymta.config import Webhook as Settings
from relaymta.files import read_secret
from relaymta.proto.printable import printable
from relaymta.proto.webhook import key_of, signed
from relaymta.report.streams import Consumer, NotTaken
from relaymta.watch import Watched

__all__ = ["Answer", "Webhook"]

ANSWER_MOST: Final = 4096  # octets of a response that are read
SHOWN: Final = 200  # characters of it
IDLE_SECONDS: Final = 15.0  # that a connection is kept
SECRET_SECONDS: Final = 10.0  # after which the file of a secret is looked at again
AFTER_MOST: Final = 3600.0  # seconds of a Retry-After
GONE: Final = 410


class Answer(NamedTuple):
    """A response: its status, the beginning of its body in one line, what it says of when to ask again (0: nothing), and how many
    seconds it took."""

    status: int
    text: str
    after: float
    seconds: float

    @property
    def taken(self) -> bool:
        """Whether it says that events were taken."""
        return 200 <= self.status < 300

    @property
    def line(self) -> str:
        """The response in one line."""
        return f"HTTP {self.status}" + (f": {self.text}" if self.text else "")


class _Closed(OSError):
    """An address that must not be connected to."""


class Webhook(Consumer):
    """`settings`: its table. `answer`: the last one, None: there was none; `asked`: when it was asked last, seconds UTC."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        self.batch = settings.batch
        self.retry_ms = int(settings.retry * 1000)
        self.answer: Answer | None = None
        self.asked = 0.0
        self._events, self._applications = frozenset(settings.events), frozenset(settings.applications)
        files = [path for path in (settings.secret_file, settings.other_secret_file) if path]
        self._keys = Watched(files, lambda: _keys(files))
        self._look_at = 0.0
        self._looking = asyncio.Lock()  # the streams of all shards ask at once
        self._client: aiohttp.ClientSession | None = None

    def wants(self, event: dict[str, Any]) -> bool:
        """As of Consumer."""
        return (not self._events or event["event"] in self._events) and (
            not self._applications or event["application"] in self._applications
        )

    async def take(self, events: list[dict[str, Any]]) -> None:
        """As of Consumer. The same events have the same id each time that they are sent."""
        digest = hashlib.sha256(f"{self.name} {events[0]['id']} {events[-1]['id']} {len(events)}".encode()).hexdigest()
        answer = await self.send(f"msg_{digest[:32]}", "events", events)
        if not answer.taken:
            raise NotTaken(answer.line, answer.after, answer.status == GONE)

    async def send(self, ident: str, kind: str, events: list[dict[str, Any]]) -> Answer:
        """Send one request; the response, whatever it says. NotTaken: there is none."""
        body = msgspec.json.encode({"type": kind, "events": events})
        headers = signed(ident, int(time.time()), body, await self._current_keys())
        self.asked, began = time.time(), time.monotonic()
        try:
            async with self._session().post(self.settings.url, data=body, headers=headers, allow_redirects=False) as response:
                self.answer = await _read(response, began)
                return self.answer
        except TimeoutError:
            why = f"no response within {self.settings.timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: malformed HTTP
            why = printable(str(error) or type(error).__name__)[:SHOWN]
        self.answer = None
        raise NotTaken(why)

    async def _current_keys(self) -> list[bytes]:
        async with self._looking:
            if time.monotonic() >= self._look_at:
                await asyncio.to_thread(self._keys.refresh)
                self._look_at = time.monotonic() + SECRET_SECONDS
        if self._keys.value is None:
            self._look_at = 0.0
            raise NotTaken(f"it cannot be signed: {self._keys.problem}")
        return self._keys.value

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            connector = aiohttp.TCPConnector(
                limit=0, ssl=ssl.create_default_context(cafile=self.settings.ca_file or None), keepalive_timeout=IDLE_SECONDS,
                resolver=aiohttp.ThreadedResolver(), socket_factory=self._socket,
            )  # fmt: skip
            headers = {
                "Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": f"relaymta/{__version__}",
            }  # fmt: skip
            timeout = aiohttp.ClientTimeout(total=self.settings.timeout)
            self._client = aiohttp.ClientSession(
                connector=connector, headers=headers, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                trust_env=False,
            )  # fmt: skip
        return self._client

    def _socket(self, info: Any) -> socket.socket:
        """A socket for an address that a name means now."""
        family, kind, protocol, _, address = info
        if not self.settings.allows(address[0]):
            raise _Closed(errno.EACCES, f"{address[0]} is not an address in the Internet (private, networks)")
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """As of Consumer."""
        if self._client is not None:
            await self._client.close()
            self._client = None


async def _read(response: aiohttp.ClientResponse, began: float) -> Answer:
    """The response, of which so much is read that its connection can be used again, if that is not much."""
    body = bytearray()
    try:
        while len(body) <= ANSWER_MOST and (piece := await response.content.read(ANSWER_MOST)):
            body += piece
    except (aiohttp.ClientError, TimeoutError, OSError):
        response.close()  # its status is known
    if not response.content.at_eof():
        response.close()
    text = printable(bytes(body[:SHOWN]).decode("utf-8", "replace").strip())[:SHOWN] if response.status >= 300 else ""
    return Answer(response.status, text, _after(response.headers.get("Retry-After", "")), time.monotonic() - began)


def _after(text: str) -> float:
    """The seconds of a Retry-After (RFC 9110 10.2.3), 0 where it says none."""
    try:
        seconds = float(text) if text.isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), AFTER_MOST)


def _keys(files: list[str]) -> list[bytes]:
    """The keys in files. ValueError says in which something is wrong."""
    found = []
    for path in files:
        try:
            found.append(key_of(read_secret(path)))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return found
