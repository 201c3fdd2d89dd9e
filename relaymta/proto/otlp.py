"""Traces as OpenTelemetry has them: which messages have one, its spans, and the requests that carry them to a collector (OTLP
1.x, in JSON by HTTP). The ids of a trace come by `traceparent` (W3C Trace Context level 2, version 00).

Every process derives the same ids of a message from its id, so nothing about them is stored: the span of its acceptance is the
parent of those of its attempts, also of one that another worker makes after a restart, days later.
"""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from relaymta import __version__

__all__ = [
    "CLIENT", "INTERNAL", "SERVER", "Answered", "Context", "Span", "Traces", "body_of", "encoded", "read_answer",
    "read_header", "retry_after",
]  # fmt: skip

INTERNAL, SERVER, CLIENT = 1, 2, 3  # kinds of a span
ERROR = 2  # the code of a status
REMOTE, LOCAL = 0x300, 0x100  # where the parent of a span is, in its flags: elsewhere, or in this program
SAMPLED = 1
RETRYABLE = frozenset((429, 502, 503, 504))  # OTLP/HTTP: the same request may be sent again later
_SCALE = 1 << 56
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})\Z")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)\Z")
_OURS = {"content-type", "content-length", "content-encoding", "host", "connection", "transfer-encoding"}

_json = msgspec.json.Encoder().encode


class Context(NamedTuple):
    """The trace of a message: its id, the span of the message's acceptance, and the parent of that ("": it has none), in
    hexadecimal digits. `flags`: of the trace."""

    trace: str
    accepted: str
    parent: str
    flags: int


class Traces:
    """Which messages have a trace. `secret`: the spool's; `ratio`: of messages without a traceparent, so many (0.01: one in a
    hundred); `everything`: those whose traceparent says that its caller does not record it have one, too."""

    def __init__(self, secret: bytes, ratio: float, everything: bool) -> None:
        self._key = blake2b(secret, digest_size=32, person=b"relaymta-traces").digest()
        self._below = int(ratio * _SCALE)
        self._everything = everything

    def of(self, ident: str, traceparent: str) -> Context | None:
        """The trace of a message; None: it has none. `ident`: its id; `traceparent`: of version 00; other texts count as none."""
        given = _TRACEPARENT.match(traceparent) if traceparent else None
        if given is not None:
            trace, parent, digits = given.groups()
            flags = int(digits, 16)
            if not flags & SAMPLED and not self._everything:
                return None
            span = blake2b(f"{trace}{ident}".encode(), digest_size=8, key=self._key).hexdigest()
            return Context(trace, span, parent, flags | SAMPLED)
        if not self._below:
            return None
        found = blake2b(ident.encode(), digest_size=31, key=self._key).digest()
        if int.from_bytes(found[:7]) >= self._below:
            return None
        return Context(found[7:23].hex(), found[23:].hex(), "", SAMPLED)


class Span(NamedTuple):
    """`began`, `ended`: seconds since 1970, UTC. `of`: the trace of its message; `ident`: its own id, "": it is that of the
    acceptance. `failed`: why, "": it has not. `events`: (name, when, attributes)."""

    of: Context
    ident: str
    name: str
    kind: int
    began: float
    ended: float
    attributes: dict[str, Any]
    failed: str = ""
    events: Sequence[tuple[str, float, dict[str, Any]]] = ()


def encoded(span: Span) -> bytes:
    """A span in JSON, as it is in a request."""
    of = span.of
    parent = of.accepted if span.ident else of.parent
    began = int(span.began * 1e6) * 1000
    found: dict[str, Any] = {
        "traceId": of.trace, "spanId": span.ident or of.accepted, "name": span.name, "kind": span.kind,
        "flags": of.flags | (LOCAL if span.ident or not parent else REMOTE),
        "startTimeUnixNano": str(began), "endTimeUnixNano": str(max(began, int(span.ended * 1e6) * 1000)),
        "attributes": attributes(span.attributes),
    }  # fmt: skip
    if parent:
        found["parentSpanId"] = parent
    if span.events:
        found["events"] = [
            {"name": name, "timeUnixNano": str(int(at * 1e6) * 1000), "attributes": attributes(about)}
            for name, at, about in span.events
        ]
    if span.failed:
        found["status"] = {"code": ERROR, "message": span.failed}
    return _json(found)


def attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Attributes, without those that say nothing ("" and None)."""
    return [{"key": key, "value": _value(value)} for key, value in values.items() if value is not None and value != ""]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(one) for one in value]}}
    return {"stringValue": value}


def body_of(spans: list[bytes], resource: dict[str, Any]) -> bytes:
    """The body of a request (ExportTraceServiceRequest). `resource`: attributes of whose spans they are."""
    head = _json({"attributes": attributes(resource)})
    scope = _json({"name": "relaymta", "version": __version__})
    return b'{"resourceSpans":[{"resource":%b,"scopeSpans":[{"scope":%b,"spans":[%b]}]}]}' % (head, scope, b",".join(spans))


class Answered(NamedTuple):
    """What a collector has said to a request. `again`: it may be sent again later; `refused`: spans that it does not take;
    `why`: one line, "": it has taken all."""

    again: bool
    refused: int
    why: str


class _Partial(msgspec.Struct, rename="camel"):
    rejected_spans: int | str = 0
    error_message: str = ""


class _Answer(msgspec.Struct, rename="camel"):
    partial_success: _Partial | None = None


def read_answer(status: int, media_type: str, body: bytes, count: int) -> Answered:
    """The answer to a request with `count` spans. `media_type`: its Content-Type, with or without parameters."""
    if status in RETRYABLE:
        return Answered(True, 0, f"it answered {status}")
    if not 200 <= status < 300:
        return Answered(False, count, f"it answered {status}")
    if not body.strip():
        return Answered(False, 0, "")
    kind = media_type.partition(";")[0].strip().lower()
    try:
        if kind != "application/json":
            raise ValueError
        partial = msgspec.json.decode(body, type=_Answer).partial_success or _Partial()
        refused = int(partial.rejected_spans)
    except ValueError:  # msgspec's errors are
        return Answered(False, count, f"it answered {status} with what is not OTLP in JSON ({kind[:60] or 'no Content-Type'})")
    if refused > 0:
        return Answered(False, min(refused, count), f"it took only a part: {partial.error_message[:200]}")
    return Answered(False, 0, "")


def read_header(text: str) -> tuple[str, str]:
    """The name and the value of a header field that requests may have (RFC 9110 5.5). ValueError, which does not repeat it."""
    match = _FIELD.match(text)
    if match is None:
        raise ValueError("no header field: write Name: value, in ASCII")
    if match[1].lower() in _OURS:
        raise ValueError(f"{match[1]}: requests have their own")
    return match[1], match[2]


def retry_after(text: str, now: float) -> float | None:
    """For how long a server wants to be left alone, seconds, by its Retry-After (RFC 9110 10.2.3); None: it does not say. `now`:
    seconds since 1970."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    from email.utils import parsedate_to_datetime  # seldom

    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - now) if moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None
