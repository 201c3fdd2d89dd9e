"""Traces of messages, their ids, and what collectors answer."""

import json
from datetime import UTC, datetime

import pytest

from relaymta.ident import format_id
from relaymta.proto import otlp
from relaymta.proto.otlp import Answered, Context, Span, Traces, body_of, encoded, read_answer, read_header, retry_after
from tests.support.collectors import shown_in

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{PARENT}-{flags}" for flags in ("01", "00"))
JSON = "application/json"
NO_OTLP = "it answered 200 with what is not OTLP in JSON"


def test_a_message_with_a_traceparent_is_in_its_trace_if_that_is_recorded():
    some, all_of_them = Traces(b"secret", 0, False), Traces(b"secret", 0, True)
    found = some.of("1M8KWQ60M0000", SAMPLED)
    assert found is not None and (found.trace, found.parent, found.flags) == (TRACE, PARENT, 1)
    assert len(found.accepted) == 16 and found.accepted not in (PARENT, "0" * 16)
    assert some.of("1M8KWQ60M0000", UNSAMPLED) is None and some.of("1M8KWQ60M0000", "") is None
    assert all_of_them.of("1M8KWQ60M0000", UNSAMPLED) == found
    assert some.of("1M8KWQ60M0001", SAMPLED).accepted != found.accepted, "of a batch, each message has a span"
    random = some.of("1M8KWQ60M0000", SAMPLED[:-2] + "03")
    assert random is not None and random.flags == 3, "the flag that the trace id is random goes on"


@pytest.mark.parametrize(
    "text", ["x", "01" + SAMPLED[2:], SAMPLED + "\n", SAMPLED[:-1], SAMPLED.upper(), f"00-{'0' * 32}-{PARENT}-01"]
)
def test_a_traceparent_that_is_none(text):
    """As a file may have it from which a message is imported."""
    assert Traces(b"secret", 0, True).of("1M8KWQ60M0000", text) is None
    found = Traces(b"secret", 1, False).of("1M8KWQ60M0000", text)
    assert found is not None and found.parent == "" and found == Traces(b"secret", 1, False).of("1M8KWQ60M0000", "")


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_so_many_messages_without_a_traceparent_have_a_trace_of_their_own(ratio):
    traces = Traces(b"secret", ratio, False)
    found = [traces.of(format_id(ident << 20), "") for ident in range(20_000)]
    some = [one for one in found if one is not None]
    assert abs(len(some) - ratio * 20_000) <= 5 * (20_000 * ratio * (1 - ratio)) ** 0.5
    assert len({one.trace for one in some}) == len({one.accepted for one in some}) == len(some)
    assert all(len(one.trace) == 32 and len(one.accepted) == 16 and one.parent == "" and one.flags == 1 for one in some)
    assert found == [Traces(b"secret", ratio, True).of(format_id(ident << 20), "") for ident in range(20_000)], "in each process"
    others = [Traces(b"another", ratio, False).of(format_id(ident << 20), "") for ident in range(20_000)]
    assert not {one.trace for one in others if one is not None} & {one.trace for one in some}, "another relay has other ids"


def test_a_span_is_as_opentelemetry_has_it():
    of = Context(TRACE, "a" * 16, PARENT, 1)
    about = {"text": "ä\x00\u2028", "none": None, "empty": "", "number": 1 << 62, "yes": True, "list": ["a", "b"]}
    accepted = Span(of, "", "accept", otlp.SERVER, 1796002652.369577, 1796002653.5, about)
    attempt = Span(of, "b" * 16, "deliver", otlp.CLIENT, 1796002653.5, 1796002653.25, {}, "deferred: 451")
    first, second = shown_in(body_of([encoded(accepted), encoded(attempt)], {"service.name": "relaymta"}))
    assert (first.trace, first.ident, first.parent, first.kind, first.flags) == (TRACE, "a" * 16, PARENT, "SERVER", 0x301)
    assert first.attributes == {"text": "ä\x00\u2028", "number": 1 << 62, "yes": True, "list": ["a", "b"]}
    assert first.attributes["yes"] is True and first.resource == {"service.name": "relaymta"}
    assert (first.began, first.ended, first.failed) == (pytest.approx(1796002652.369577, abs=1e-6), 1796002653.5, "")
    assert (second.ident, second.parent, second.kind, second.flags) == ("b" * 16, "a" * 16, "CLIENT", 0x101)
    assert second.began == second.ended == 1796002653.5, "a clock that was set makes none that ends before it begins"
    assert second.failed == "deferred: 451"
    [own] = shown_in(body_of([encoded(accepted._replace(of=of._replace(parent="")))], {}))
    assert (own.parent, own.flags) == ("", 0x101)


@pytest.mark.parametrize("status, kind, body, expected", [
    (200, JSON, b"{}", Answered(False, 0, "")),
    (200, "application/json; charset=utf-8", b'{"partialSuccess":{}}', Answered(False, 0, "")),
    (202, "", b"", Answered(False, 0, "")),
    (200, JSON, b'{"partialSuccess":{"rejectedSpans":"3","errorMessage":"x"}}', Answered(False, 3, "it took only a part: x")),
    (200, JSON, b'{"partialSuccess":{"rejectedSpans":3}}', Answered(False, 3, "it took only a part: ")),
    (200, JSON, b'{"partialSuccess":{"rejectedSpans":99}}', Answered(False, 5, "it took only a part: ")),
    (200, JSON, b'{"partialSuccess":{"errorMessage":"a warning"}}', Answered(False, 0, "")),
    (200, JSON, b'{"more":1}', Answered(False, 0, "")),
    (200, "text/html", b"<html>", Answered(False, 5, f"{NO_OTLP} (text/html)")),
    (200, "", b"ok", Answered(False, 5, f"{NO_OTLP} (no Content-Type)")),
    (200, JSON, b"{", Answered(False, 5, f"{NO_OTLP} (application/json)")),
    (200, JSON, b'{"partialSuccess":{"rejectedSpans":"x"}}', Answered(False, 5, f"{NO_OTLP} (application/json)")),
    (429, "", b"", Answered(True, 0, "it answered 429")), (503, JSON, b"{}", Answered(True, 0, "it answered 503")),
    (502, "", b"", Answered(True, 0, "it answered 502")), (504, "", b"", Answered(True, 0, "it answered 504")),
    (400, JSON, b"{}", Answered(False, 5, "it answered 400")), (301, "", b"", Answered(False, 5, "it answered 301")),
    (401, "", b"", Answered(False, 5, "it answered 401")), (500, "", b"", Answered(False, 5, "it answered 500")),
])  # fmt: skip
def test_answers(status, kind, body, expected):
    assert read_answer(status, kind, body, 5) == expected


@pytest.mark.parametrize("text, expected", [
    ("", None), ("0", 0.0), ("120", 120.0), (" 7 ", 7.0), ("-1", None), ("soon", None), ("1.5", None), ("²", None),
    ("9" * 400, 999999999.0), ("Thu, 01 Jan 2026 00:01:00 GMT", 60.0), ("Wed, 31 Dec 2025 23:59:00 GMT", 0.0),
    ("Thu, 01 Jan 99999 00:00:00 GMT", None), ("Thu, 01 Jan 2026 00:01:00", None),
])  # fmt: skip
def test_retry_after(text, expected):
    assert retry_after(text, datetime(2026, 1, 1, tzinfo=UTC).timestamp()) == expected


def test_header_fields():
    assert read_header("Authorization: Bearer a b") == ("Authorization", "Bearer a b")
    assert read_header("X-Scope-OrgID:relay") == ("X-Scope-OrgID", "relay")
    for wrong in (
        "Authorization",
        "A b: c",
        ": c",
        "A:",
        "A: b\r\nC: d",
        "A: b\n",
        "Ä: b",
        "A: ä",
        "Content-Length: 3",
        "host: x",
    ):
        with pytest.raises(ValueError) as error:
            read_header(wrong)
        assert "Bearer" not in str(error.value)


def test_what_is_sent_is_json_without_what_says_nothing():
    found = json.loads(encoded(Span(Context(TRACE, "a" * 16, "", 1), "", "accept", otlp.INTERNAL, 1.0, 2.0, {})))
    assert found == {
        "traceId": TRACE, "spanId": "a" * 16, "name": "accept", "kind": 1, "flags": 0x101, "startTimeUnixNano": "1000000000",
        "endTimeUnixNano": "2000000000", "attributes": [],
    }  # fmt: skip
