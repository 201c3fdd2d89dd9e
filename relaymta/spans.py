"""Spans of messages for an OpenTelemetry collector (`[tracing]`; docs/tracing.md): they are made of the records of the log.

    the event loop   logs, as it does without traces; where a message has one, its records say when that began
    the log's thread `Spans.take`: keeps what a span needs of a record, in a bounded buffer; what does not fit is dropped, and
                     counted
    a thread here    makes spans of that, and sends them to the collector in batches

So mail waits neither for a span nor for the collector, and a span is about what is on disk. The OpenTelemetry SDK would send the
same requests, with 12 packages and 12 MB in each worker.
"""

import gzip
import http.client
import io
import os
import random
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from relaymta import __version__
from relaymta.config import Tracing
from relaymta.errors import redacted
from relaymta.files import read_secret
from relaymta.ident import format_id
from relaymta.metrics import Counters, index
from relaymta.proto.otlp import (
    CLIENT,
    INTERNAL,
    SERVER,
    Answered,
    Context,
    Span,
    Traces,
    body_of,
    encoded,
    read_answer,
    read_header,
    retry_after,
)

__all__ = ["Collector", "Spans"]

SENT = index("relaymta_trace_spans_total", "sent")
DROPPED = index("relaymta_trace_spans_total", "dropped")
REFUSED = index("relaymta_trace_spans_total", "refused")

MOST = 8192  # records and spans that wait in a worker, 10 MB of memory
BATCH = 512  # spans in a request
EVERY_SECONDS = 1.0  # a request at most, but for more than a batch
NEXT_HOST = "next_host"
ATTEMPT_MOST = 3600.0  # seconds: an attempt that has asked further hosts, and not ended in this time, has no span
HOSTS_MOST = 20  # events of a span
SETTLED_SECONDS = 0.25  # after the last record of an attempt: no other will follow
BACKOFF_FIRST, BACKOFF_MOST = 1.0, 60.0  # while the collector does not take any
AFTER_MOST = 300.0  # of what Retry-After asks for
CLOSE_SECONDS = 1.0
LARGEST = 65_536  # octets of an answer
UNKNOWN = (401, 403)  # it does not know us: the next connection has what is in header_file then
ADDRESSES_MOST = 100  # of a span, where they are shown
_REPLY = re.compile(r"([245]\d\d)[ -](?:([245]\.\d{1,3}\.\d{1,3})\b)?")


class _Part(NamedTuple):
    """What a span needs of a record. `event`: its name; `began`: 0.0: nothing began; `addresses`: what is shown of these."""

    event: str
    of: Context
    key: tuple[str, str, int]  # id, route, attempt
    began: float
    ended: float
    recipients: int
    record: dict[str, Any]
    reply: str
    addresses: tuple[str, ...]


class Collector:
    """The one who gets spans. Used by one thread."""

    def __init__(self, settings: Tracing) -> None:
        parts = urlsplit(settings.endpoint)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = parts.path + (f"?{parts.query}" if parts.query else "")
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._gzip = settings.gzip
        self._headers = {"User-Agent": f"relaymta/{__version__}", "Content-Type": "application/json"}
        self._headers |= dict(map(read_header, settings.headers))
        self._secret_file = settings.header_file
        self._secret: dict[str, str] = {}  # as it was when the connection was opened
        self._open: http.client.HTTPConnection | None = None

    def send(self, body: bytes, count: int, seconds: float) -> tuple[Answered, float | None]:
        """Send `count` spans, and wait so long at most, but for the look-up of its name; what it says, and after how many
        seconds it wants to be asked again, if it says that."""
        headers = dict(self._headers)
        if self._gzip:
            body, headers["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        end = time.monotonic() + seconds
        try:
            reused = self._open is not None
            try:
                return self._post(body, headers, count, end)
            except (http.client.RemoteDisconnected, ConnectionError):
                self.close()
                if not reused:
                    raise
                return self._post(body, headers, count, end)  # it had closed the connection meanwhile
        except Exception as error:  # whatever comes of what it says, it is asked again later
            self.close()
            return Answered(True, 0, redacted(str(error) or type(error).__name__)[:200]), None

    def _post(self, body: bytes, headers: dict[str, str], count: int, end: float) -> tuple[Answered, float | None]:
        connection = self._connection(end)
        connection.request("POST", self._path, body, headers | self._secret)
        with connection.getresponse() as response:
            said = response.read(LARGEST + 1)
            if len(said) > LARGEST or response.will_close or not response.isclosed() or response.status in UNKNOWN:
                self.close()
            kind, after = response.headers.get("Content-Type", ""), response.headers.get("Retry-After", "")
            return read_answer(response.status, kind, said, count), retry_after(after, time.time())

    def _connection(self, end: float) -> http.client.HTTPConnection:
        left = max(0.001, end - time.monotonic())
        found = self._open
        if found is None:
            self._secret = dict([read_header(read_secret(self._secret_file))]) if self._secret_file else {}
            if self._context is not None:
                found = http.client.HTTPSConnection(self._host, self._port, timeout=left, context=self._context)
            else:
                found = http.client.HTTPConnection(self._host, self._port, timeout=left)
            found.connect()
            self._open = found
        assert found.sock is not None
        found.sock.settimeout(max(0.001, end - time.monotonic()))
        found.response_class = lambda sock, **more: http.client.HTTPResponse(_Until(sock, end), **more)  # type: ignore
        return found

    def close(self) -> None:
        """Close the connection, if any. The next request opens another one."""
        if self._open is not None:
            self._open.close()
            self._open = None


class _Until:
    """A socket that is read until `end` (monotonic seconds), however slowly octets come: a socket's timeout is for each."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock = sock
        self._end = end

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of socket."""
        return io.BufferedReader(_Reader(self._sock, self._end))


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock = sock
        self._end = end
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class Spans:
    """The spans of one process. `traces`: which messages have any. `warn(text)`: logs a warning; called by the thread."""

    def __init__(
        self, settings: Tracing, collector: Collector, traces: Traces, counters: Counters, resource: dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._timeout = settings.timeout
        self._shows_addresses = settings.addresses
        self._collector = collector
        self.traces = traces
        self._add = counters.add
        self._resource = resource
        self._warn = warn
        self._parts: deque[_Part] = deque()  # the log's thread appends, ours takes from the front
        self._spans: deque[bytes] = deque()  # what is being sent is at the front
        # Attempts that further records may be about: what there is of each, and when the last of it came (monotonic).
        self._open: dict[tuple[str, str, int], tuple[list[_Part], float]] = {}
        self._lost = False  # a span could not be made, which was logged
        self._last_dropped: tuple[str, str, int] | None = None
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._until = 0.0  # when the thread gives up, once it is closing (monotonic)
        self._failures = 0  # of requests, one after the other
        self._not_before = 0.0  # the next request (monotonic)
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def has(self, entry: Any) -> bool:
        """Whether the message of an entry of the queue has spans."""
        return self.traces.of(format_id(entry.ident), entry.envelope.traceparent) is not None

    # On the log's thread

    def take(self, records: list[Any]) -> None:
        """Keep what spans need of these records. Never blocks."""
        for record in records:
            event = type(record).__name__
            if event in _READ:
                try:
                    of = self.traces.of(record.id, record.traceparent or "")
                    if of is not None:
                        self._keep(_READ[event](record, of, self._shows_addresses))
                except Exception as error:  # the log goes on
                    self._lose(error)
        if self._parts and not self._wanted.is_set():
            self._wanted.set()

    def _keep(self, part: _Part) -> None:
        if len(self._parts) + len(self._spans) < MOST:
            self._parts.append(part)
        elif part.key != self._last_dropped:  # else of the same span
            self._last_dropped = part.key
            self._add(DROPPED, 1)

    def _lose(self, error: Exception) -> None:
        """A span cannot be made."""
        self._add(DROPPED, 1)
        if not self._lost:
            self._lost = True
            self._warn(redacted(f"a span is dropped: internal error: {type(error).__name__}: {error}"))

    # On the thread here

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            while not self._closing.is_set() and (self._parts or self._open or self._spans):
                self._closing.wait(max(EVERY_SECONDS, self._not_before - time.monotonic()) if not self._more else 0)
                self._gather()
                if time.monotonic() >= self._not_before:
                    self._send_all()
            if self._closing.is_set():
                self._gather()
                self._send_all()
                return

    @property
    def _more(self) -> bool:
        """Whether there is enough for a request, and nothing to wait for."""
        return len(self._parts) + len(self._spans) >= BATCH and time.monotonic() >= self._not_before

    def _gather(self) -> None:
        """Make spans of what is there; of an attempt once all of its records are."""
        for _ in range(len(self._parts)):
            part = self._parts.popleft()
            if part.event == "queued":
                self._made(_acceptance, part)
            else:
                parts = self._open.pop(part.key, ([], 0.0))[0]
                parts.append(part)
                self._open[part.key] = parts, time.monotonic()
        settled = time.monotonic() - SETTLED_SECONDS
        for key, (parts, last) in list(self._open.items()):
            if all(part.event == NEXT_HOST for part in parts):
                if last <= settled - ATTEMPT_MOST or self._closing.is_set():
                    del self._open[key]
            elif last <= settled or self._closing.is_set():
                del self._open[key]
                self._made(_attempt, parts)

    def _made(self, make: Callable[[Any], Span], of: Any) -> None:
        try:
            self._spans.append(encoded(make(of)))
        except Exception as error:  # the other spans go on
            self._lose(error)

    def _send_all(self) -> None:
        """Send what there is, until the collector does not take any."""
        while self._spans:
            seconds = self._timeout
            if self._closing.is_set():
                seconds = min(seconds, self._until - time.monotonic())
                if seconds <= 0:
                    return
            batch = [self._spans[place] for place in range(min(BATCH, len(self._spans)))]
            answer, after = self._collector.send(body_of(batch, self._resource), len(batch), seconds)
            if answer.again:
                self._failed(answer.why, after)
                return
            for _ in batch:
                self._spans.popleft()
            self._add(SENT, len(batch) - answer.refused)
            if answer.refused:
                self._add(REFUSED, answer.refused)
            self._answered(answer.why)

    def _failed(self, why: str, after: float | None) -> None:
        self._failures += 1
        if self._failures == 1:
            self._warn(f"tracing.endpoint: {why}: up to {MOST} spans of a worker wait for it, others are dropped")
        pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self._failures - 1, 10)) * random.uniform(0.5, 1.0)
        if after is not None:
            pause = max(pause, min(after, AFTER_MOST))
        self._not_before = time.monotonic() + pause

    def _answered(self, why: str) -> None:
        """A request was answered for good; `why` it has refused spans, "": it has taken all."""
        if self._failures and not why:
            self._warn("tracing.endpoint: it takes spans again")
            self._failures = 0
        elif why:
            if not self._failures:
                self._warn(f"tracing.endpoint: {why}: spans are dropped")
            self._failures += 1

    # By whoever has made it

    def close(self) -> None:
        """Send what there is, for CLOSE_SECONDS at most; the rest is dropped. Not before the log is closed, whose thread calls
        `take`."""
        self._until = time.monotonic() + CLOSE_SECONDS
        self._closing.set()
        self._wanted.set()
        self._thread.join(CLOSE_SECONDS)
        self._add(DROPPED, len(self._parts) + len(self._open) + len(self._spans))


# Records as parts: by event


def _queued(record: Any, of: Context, addresses: bool) -> _Part:
    shown = (record.sender, *record.recipients[:ADDRESSES_MOST]) if addresses else ()
    about = {
        "relaymta.message.size": record.size, "relaymta.application": record.application,
        "relaymta.held": True if record.held else None, "client": record.client,
    }  # fmt: skip
    return _Part("queued", of, (record.id, "", 0), record.began or 0.0, record.ts, len(record.recipients), about, "", shown)


def _delivered(record: Any, of: Context, addresses: bool) -> _Part:
    shown = tuple(record.recipients[:ADDRESSES_MOST]) if addresses else ()
    about = {
        "server.address": record.peer, "network.peer.address": record.address, "network.peer.port": record.port or None,
        "tls.protocol.version": record.tls.removeprefix("TLSv"), "tls.cipher": record.cipher,
    }  # fmt: skip
    return _part("delivered", record, of, len(record.recipients), about, shown)


def _not_delivered(record: Any, of: Context, addresses: bool) -> _Part:
    about = {
        "server.address": record.peer, "relaymta.phase": record.phase, "error.type": record.cause,
        "relaymta.dsn.id": getattr(record, "dsn", None),
    }  # fmt: skip
    return _part(type(record).__name__, record, of, 1, about, (record.recipient,) if addresses else ())


def _next_host(record: Any, of: Context, addresses: bool) -> _Part:
    about = {"server.address": record.peer, "relaymta.recipients": len(record.recipients), "relaymta.phase": record.phase}
    key = record.id, record.route, record.attempt
    return _Part(NEXT_HOST, of, key, 0.0, record.ts, 0, about, record.reply, ())


def _part(event: str, record: Any, of: Context, count: int, about: dict[str, Any], shown: tuple[str, ...]) -> _Part:
    key = record.id, record.route, record.attempt
    return _Part(event, of, key, record.began or 0.0, record.ts, count, about, record.reply, shown)


_READ: dict[str, Callable[[Any, Context, bool], _Part]] = {
    "queued": _queued, "delivered": _delivered, "deferred": _not_delivered, "bounced": _not_delivered, NEXT_HOST: _next_host,
}  # fmt: skip
_WITHOUT = {"bounced": "bounce", "deferred": "defer", "delivered": "deliver"}  # names of what nothing was attempted for
_ORDER = ("bounced", "deferred", "delivered")  # of several results the one that an attempt is shown with


def _acceptance(part: _Part) -> Span:
    about = dict(part.record)
    own = not about.pop("client")  # a DSN, or what a user's Sieve script sends: nobody has asked for it
    about = {"relaymta.message.id": part.key[0], "relaymta.recipients": part.recipients, **about}
    if part.addresses:
        about |= {"relaymta.sender": part.addresses[0], "relaymta.recipients.addresses": list(part.addresses[1:])}
    return Span(part.of, "", "accept", INTERNAL if own else SERVER, part.began or part.ended, part.ended, about)


def _attempt(parts: list[_Part]) -> Span:
    """The span of an attempt, of the records of its recipients, and those of hosts that were asked before."""
    before, parts = [part for part in parts if part.event == NEXT_HOST], [part for part in parts if part.event != NEXT_HOST]
    counts = dict.fromkeys(_ORDER, 0)
    for part in parts:
        counts[part.event] += part.recipients
    shown = min(parts, key=lambda part: _ORDER.index(part.event))
    ident, route, attempt = shown.key
    began, ended = min(part.began for part in parts), max(part.ended for part in parts)
    code, enhanced = _codes(shown.reply)
    about: dict[str, Any] = {
        "relaymta.message.id": ident, "relaymta.site": route, "relaymta.attempt": attempt,
        "relaymta.recipients": sum(counts.values()), **{f"relaymta.{event}": count for event, count in counts.items() if count},
        **shown.record, "relaymta.reply.code": code, "relaymta.reply.enhanced_code": enhanced,
    }  # fmt: skip
    addresses = [one for part in parts for one in part.addresses][:ADDRESSES_MOST]
    if addresses:
        about |= {"relaymta.recipients.addresses": addresses, "relaymta.reply.text": shown.reply}
    why = [f"{shown.event}:", str(code or ""), enhanced, shown.record.get("error.type", "")]
    failed = "" if shown.event == "delivered" else " ".join(filter(None, why))
    name, kind = ("deliver", CLIENT) if began else (_WITHOUT[shown.event], INTERNAL)
    hosts = [_event(part) for part in before[:HOSTS_MOST]]
    return Span(shown.of, os.urandom(8).hex(), name, kind, began or ended, ended, about, failed, hosts)


def _codes(reply: str) -> tuple[int | None, str]:
    match = _REPLY.match(reply)
    return (int(match[1]), match[2] or "") if match is not None else (None, "")


def _event(part: _Part) -> tuple[str, float, dict[str, Any]]:
    return part.event, part.ended, {**part.record, "relaymta.reply.code": _codes(part.reply)[0]}
