"""Spans are made of records, and sent: whatever the collector does, nobody waits for it and every span is counted once."""

import ssl
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from relaymta import log, spans
from relaymta.config import Tracing
from relaymta.proto.otlp import Traces
from relaymta.spans import Collector, Spans
from tests.support.collectors import Answer, Collecting, shown_in
from tests.support.daemon import PATIENCE, free_port, wait_for

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Counted:
    def __init__(self) -> None:
        self.cells: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, cell: int, n: int) -> None:
        with self._lock:
            self.cells[cell] = self.cells.get(cell, 0) + n

    @property
    def all(self) -> tuple[int, int, int]:
        """Sent, dropped, refused."""
        sent, dropped, refused = (self.cells.get(cell, 0) for cell in (spans.SENT, spans.DROPPED, spans.REFUSED))
        return sent, dropped, refused


class Made:
    def __init__(self, url: str, **settings: Any) -> None:
        self.counted, self.warnings = Counted(), list[str]()
        of = Tracing(endpoint=url, **{"ratio": 1, **settings})
        self.spans = Spans(of, Collector(of), Traces(b"secret", of.ratio, False), self.counted, {}, self.warnings.append)  # type: ignore[arg-type]

    def take(self, *idents: str) -> None:
        self.spans.take([queued(ident) for ident in idents])


def queued(ident: str, **more: Any) -> Any:
    fields = dict.fromkeys(("client", "helo", "user", "application", "message_id"), "")
    return log._RECORDS["queued"](time.time(), 0, id=ident, sender="a@b", recipients=["c@d"], size=1, **{**fields, **more})


def delivered(ident: str, *recipients: str, **more: Any) -> Any:
    fields = {
        "route": "default",
        "peer": "mx.d",
        "address": "192.0.2.1",
        "port": 25,
        "tls": "TLSv1.3",
        "cipher": "X",
        "reply": "250 ok",
        "attempt": 1,
    }
    return log._RECORDS["delivered"](time.time(), 0, id=ident, recipients=list(recipients), delay=1.0, **{**fields, **more})


def deferred(ident: str, recipient: str, reply: str, **more: Any) -> Any:
    fields = {"route": "default", "peer": "mx.d", "phase": "rcpt", "cause": "reply", "next": 0.0, "delay": 1.0, "attempt": 1}
    return log._RECORDS["deferred"](time.time(), 0, id=ident, recipient=recipient, reply=reply, **{**fields, **more})


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(spans, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(spans, "SETTLED_SECONDS", 0.05)


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_sent(compressed, tmp_path):
    (tmp_path / "secret").write_text("Authorization: Bearer t0ken\n")
    with Collecting() as collector:
        made = Made(
            collector.url + "?a=b", gzip=compressed, headers=["X-Scope-OrgID: relay"], header_file=str(tmp_path / "secret")
        )
        made.take("1M8KWQ60M0000")
        wait_for(lambda: made.counted.all == (1, 0, 0))
        [request] = collector.requests
        assert request.path == "/v1/traces?a=b" and request.headers["content-type"] == "application/json"
        assert request.headers["x-scope-orgid"] == "relay" and request.headers["authorization"] == "Bearer t0ken"
        assert (request.headers.get("content-encoding") == "gzip") == compressed == (request.body[:2] == b"\x1f\x8b")
        made.take("1M8KWQ60M0001", "1M8KWQ60M0002")
        wait_for(lambda: made.counted.all == (3, 0, 0))
        assert collector.connections == 1 and len({span.trace for span in collector.spans}) == 3
        made.spans.close()
        assert made.counted.all == (3, 0, 0) and not made.warnings


def test_the_records_of_an_attempt_are_one_span_however_they_come(monkeypatch):
    monkeypatch.setattr(spans, "SETTLED_SECONDS", PATIENCE)
    with Collecting() as collector:
        made = Made(collector.url)
        began = time.time() - 3
        records = [
            delivered("A", "x@d", "y@d", began=began), deferred("A", "z@d", "451 4.2.0 z@d: later", began=began),
            deferred("A", "u@d", "450 4.2.1 other", began=began),
            delivered("A", "w@e", route="other", began=began), delivered("A", "x@d", attempt=2, began=began),
        ]  # fmt: skip
        for record in records:
            made.spans.take([record])
            wait_for(lambda: not made.spans._parts)
        made.spans.close()
        assert made.counted.all == (3, 0, 0)
        found = {(span.attributes["relaymta.site"], span.attributes["relaymta.attempt"]): span for span in collector.spans}
        assert len(found) == 3 == len({span.ident for span in collector.spans}) and len({s.parent for s in collector.spans}) == 1
        first = found["default", 1]
        assert first.attributes["relaymta.recipients"] == 4 and first.attributes["relaymta.delivered"] == 2
        assert first.attributes["relaymta.deferred"] == 2 and "relaymta.bounced" not in first.attributes
        assert first.failed == "deferred: 451 4.2.0 reply" and first.attributes["relaymta.reply.enhanced_code"] == "4.2.0"
        assert first.began == pytest.approx(began, abs=1e-5) and first.ended == pytest.approx(records[2].ts, abs=1e-5)
        assert not found["other", 1].failed and found["other", 1].attributes["tls.protocol.version"] == "1.3"
        assert "@" not in str(collector.spans)


def test_hosts_that_were_asked_before_are_events_of_the_attempt():
    with Collecting() as collector:
        made = Made(collector.url)
        first = log._RECORDS["next_host"](
            time.time() - 9, 0, id="A", recipients=["x@d", "y@d"], route="default", phase="rcpt", peer="mx1.d", attempt=1,
            reply="451 4.3.0 x@d",
        )  # fmt: skip
        other = log._RECORDS["next_host"](
            time.time(), 0, id="B", recipients=["x@d"], route="default", phase="connect", peer="mx1.d", reply="", attempt=1
        )
        made.spans.take([first, other])
        made.take("C")
        wait_for(lambda: made.counted.all[0] == 1)
        time.sleep(2 * spans.SETTLED_SECONDS)
        assert made.counted.all == (1, 0, 0), "the attempt goes on"
        made.spans.take([delivered("A", "x@d", "y@d", began=time.time() - 10)])
        wait_for(lambda: made.counted.all[0] == 2)
        [span] = [one for one in collector.spans if one.name == "deliver"]
        about = {"server.address": "mx1.d", "relaymta.recipients": 2, "relaymta.phase": "rcpt", "relaymta.reply.code": 451}
        assert span.events == [("next_host", pytest.approx(first.ts, abs=1e-5), about)] and not span.failed
        assert span.attributes["relaymta.recipients"] == 2 and span.began < first.ts < span.ended
        made.spans.close()
        assert made.counted.all == (2, 0, 0)


def test_what_was_not_attempted_is_a_span_without_a_duration():
    with Collecting() as collector:
        made = Made(collector.url)
        made.spans.take([deferred("A", "z@d", "the domain has no address", phase="route", peer="", cause="dns")])
        wait_for(lambda: collector.spans)
        [span] = collector.spans
        assert (span.name, span.kind, span.failed) == ("defer", "INTERNAL", "deferred: dns") and span.began == span.ended
        assert "server.address" not in span.attributes and "relaymta.reply.code" not in span.attributes
        made.spans.close()


@pytest.mark.parametrize("answer", [
    Answer(429), Answer(502), Answer(503), Answer(504), Answer(503, headers=(("Retry-After", "0"),)), Answer(hangs=PATIENCE),
    Answer(hangs=PATIENCE, drips=True), Answer(200, b" " * 70_000, closes=True), Answer(hangs=0.01),
], ids=["429", "502", "503", "504", "now", "hangs", "drips", "long", "closes"])  # fmt: skip
def test_spans_wait_for_a_collector_that_does_not_take_them_now(answer):
    with Collecting(answer, answer) as collector:
        made = Made(collector.url, timeout=0.2)
        made.take("A", "B")
        wait_for(lambda: made.counted.all[0] == 2)
        made.take("C")
        wait_for(lambda: made.counted.all == (3, 0, 0))
        if answer.status != 200:
            assert {span.attributes["relaymta.message.id"] for span in collector.requests[-1].spans} == {"C"}
            assert [{span.ident for span in one.spans} for one in collector.requests[1:3]] == [
                {span.ident for span in collector.requests[0].spans}
            ] * 2  # again the same
            if not answer.hangs or answer.hangs > 1:
                assert len(made.warnings) == 2 and "wait for it" in made.warnings[0] and "again" in made.warnings[1]
        made.spans.close()


def test_a_collector_is_left_alone_for_as_long_as_it_says():
    with Collecting(Answer(503, headers=(("Retry-After", "1"),))) as collector:
        made = Made(collector.url)
        made.take("A")
        wait_for(lambda: made.counted.all == (1, 0, 0))
        first, second = collector.requests
        assert second.at - first.at >= 0.9
        made.spans.close()


@pytest.mark.parametrize("answer, refused", [
    (Answer(400), 2), (Answer(401), 2), (Answer(404), 2), (Answer(413), 2), (Answer(302, headers=(("Location", "/"),)), 2),
    (Answer(200, b"<html>", "text/html"), 2), (Answer(200, b"{}", "application/x-protobuf"), 2),
    (Answer(200, b'{"partialSuccess":{"rejectedSpans":"1","errorMessage":"full"}}'), 1),
], ids=["400", "401", "404", "413", "302", "html", "protobuf", "partial"])  # fmt: skip
def test_what_a_collector_refuses_is_not_sent_again(answer, refused):
    with Collecting(answer, answer) as collector:
        made = Made(collector.url)
        made.take("A", "B")
        wait_for(lambda: made.counted.all == (2 - refused, 0, refused))
        made.take("C", "D")
        wait_for(lambda: made.counted.all == (4 - 2 * refused, 0, 2 * refused))
        made.take("E")
        wait_for(lambda: made.counted.all == (5 - 2 * refused, 0, 2 * refused))
        assert [len(one.spans) for one in collector.requests] == [2, 2, 1]
        assert len(made.warnings) == 2 and made.warnings[0].endswith("spans are dropped") and "again" in made.warnings[1]
        made.spans.close()


def test_a_secret_that_was_replaced_is_used_once_the_old_one_is_refused(tmp_path):
    file = tmp_path / "secret"
    file.write_text("Authorization: Bearer old")
    file.chmod(0o600)
    with Collecting(Answer(401)) as collector:
        made = Made(collector.url, header_file=str(file))
        made.take("A")
        wait_for(lambda: made.counted.all == (0, 0, 1))
        file.write_text("Authorization: Bearer new")
        made.take("B")
        wait_for(lambda: made.counted.all == (1, 0, 1))
        assert [one.headers["authorization"] for one in collector.requests] == ["Bearer old", "Bearer new"]
        made.spans.close()


def test_a_connection_that_was_closed_meanwhile_is_opened_again():
    with Collecting(Answer(closes=True), Answer(closes=True)) as collector:
        made = Made(collector.url)
        for number in range(1, 4):
            made.take(str(number))
            wait_for(lambda number=number: made.counted.all == (number, 0, 0))
        assert len(collector.requests) == collector.connections == 3 and not made.warnings
        made.spans.close()


def test_memory_is_bounded_and_what_has_no_room_is_counted(monkeypatch):
    monkeypatch.setattr(spans, "MOST", 100)
    with Collecting(Answer(hangs=PATIENCE)) as collector:
        made = Made(collector.url, timeout=60)
        made.take("first")
        wait_for(lambda: collector.requests)
        for number in range(150):
            made.take(f"A{number}")
        made.spans.take([deferred("B", f"{number}@d", "451 later") for number in range(50)])  # one span
        assert made.counted.all == (0, 52, 0)
        began = time.monotonic()
        made.spans.close()
        assert time.monotonic() - began < 30  # not the 60 s that the request may take
        assert made.counted.all == (0, 152, 0)


def test_many_spans_go_in_several_requests():
    with Collecting() as collector:
        made = Made(collector.url)
        made.take(*(f"A{number}" for number in range(2 * spans.BATCH + 3)))
        wait_for(lambda: made.counted.all == (2 * spans.BATCH + 3, 0, 0))
        assert len({span.ident for span in collector.spans}) == 2 * spans.BATCH + 3
        assert max(len(one.spans) for one in collector.requests) == spans.BATCH
        made.spans.close()


def test_at_the_end_what_is_there_is_sent(monkeypatch):
    monkeypatch.setattr(spans, "EVERY_SECONDS", PATIENCE)
    monkeypatch.setattr(spans, "SETTLED_SECONDS", PATIENCE)
    with Collecting() as collector:
        made = Made(collector.url)
        made.take("A")
        made.spans.take([delivered("A", "x@d")])
        made.spans.close()
        assert made.counted.all == (2, 0, 0) and len(collector.spans) == 2


def test_a_record_of_which_no_span_can_be_made_harms_no_other(monkeypatch):
    with Collecting() as collector:
        made = Made(collector.url)
        broken = deferred("A", "z@d", "451 later")
        broken.reply = None
        made.spans.take([broken, queued("B")])
        made.spans.take([queued("C"), queued("\ud800")])
        wait_for(lambda: made.counted.all == (2, 2, 0))
        assert {span.attributes["relaymta.message.id"] for span in collector.spans} == {"B", "C"}
        assert len(made.warnings) == 1 and "internal error" in made.warnings[0]
        made.spans.close()
        assert made.counted.all == (2, 2, 0)


def test_nobody_is_there(tmp_path):
    made = Made(f"http://127.0.0.1:{free_port()}/v1/traces")
    made.take("A")
    wait_for(lambda: made.warnings)
    made.spans.close()
    assert made.counted.all == (0, 1, 0) and "Connection refused" in made.warnings[0]
    made = Made("http://127.0.0.1:1/v1/traces", header_file=str(tmp_path / "none"))
    made.take("A")
    wait_for(lambda: made.warnings)
    assert "No such file" in made.warnings[0]
    made.spans.close()


def test_by_tls_with_a_certificate_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with Collecting() as collector:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        assert isinstance(collector.server, ThreadingHTTPServer)
        collector.server.socket = context.wrap_socket(collector.server.socket, server_side=True)
        url = collector.url.replace("http:", "https:")
        stranger = Made(url)
        stranger.take("A")
        wait_for(lambda: stranger.warnings)
        assert "certificate verify failed" in stranger.warnings[0]
        stranger.spans.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        made = Made(url)
        made.take("B")
        wait_for(lambda: made.counted.all == (1, 0, 0))
        made.spans.close()
        assert [span.attributes["relaymta.message.id"] for span in collector.spans] == ["B"]


def test_records_without_spans_cost_no_memory():
    made = Made("http://127.0.0.1:1/v1/traces", ratio=0)
    made.take("A")
    made.spans.take([log._RECORDS["warning"](0.0, 0, text="x"), queued("B", traceparent=TRACEPARENT[:-1] + "0")])
    assert not made.spans._parts
    made.spans.close()
    assert made.counted.all == (0, 0, 0)


def test_the_decoder_is_strict():
    with pytest.raises(Exception, match="no field named"):
        shown_in(b'{"resourceSpans":[{"scopeSpan":[]}]}')
