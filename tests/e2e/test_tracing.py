"""Spans of a real relay, at a collector."""

import json
import smtplib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multidict import CIMultiDict

from relaymta.accept.http.requests import _asked
from tests.support.collectors import Answer, Collecting, Shown, opentelemetry_collector
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.injecting import Injecting, message

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SLOW = 0.5
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{PARENT}-{flags}" for flags in ("01", "00"))


@pytest.fixture
def site() -> Iterator[FakeMx]:
    refusals = {"nobody@d.example": b"550 5.1.1 nobody here\r\n", "later@d.example": b"451 4.2.0 later@d.example: later\r\n"}
    with FakeMx({"RCPT": refusals}) as found:
        yield found


def of(collector: Collecting, ident: str, count: int) -> list[Shown]:
    """So many spans of a message, in the order of their ends."""

    def find() -> list[Shown] | None:
        found = [span for span in collector.spans if span.attributes["relaymta.message.id"] == ident]
        return found if len(found) >= count else None

    found = wait_for(find, what="spans")
    assert len(found) == count and len({span.ident for span in found}) == count, found
    return sorted(found, key=lambda span: (span.ended, span.name != "accept"))


def sent(relay: Relay, *recipients: str) -> str:
    """The id of a message that was sent by SMTP."""
    with smtplib.SMTP("127.0.0.1", relay.port) as client:
        client.ehlo()
        client.mail("a@shop.example")
        for recipient in recipients:
            client.rcpt(recipient)
        code, text = client.data(b"Subject: x\r\n\r\nx\r\n")
        assert code == 250
        return text.decode().rpartition(" ")[2]


def test_a_message_by_http_has_its_acceptance_and_its_attempt_in_the_trace_of_its_request(tmp_path, site):
    with Collecting() as collector, Injecting(
        tmp_path, f"127.0.0.1:{site.port}", f"tracing.endpoint={collector.url}", workers=2
    ) as relay:  # fmt: skip
        before = time.time()
        said = relay.post(message(to=["b@d.example", "c@d.example"]), traceparent=SAMPLED)
        ident = said.json["id"]
        accept, deliver = of(collector, ident, 2)
        after = time.time()
        assert (accept.trace, accept.parent, accept.name, accept.kind) == (TRACE, PARENT, "accept", "SERVER")
        assert (deliver.trace, deliver.parent, deliver.name, deliver.kind) == (TRACE, accept.ident, "deliver", "CLIENT")
        assert (accept.flags, deliver.flags) == (0x301, 0x101)  # sampled; the parent is elsewhere, or is ours
        assert not accept.failed and not deliver.failed
        assert (
            before - 0.01 <= accept.began < accept.ended <= deliver.ended <= after
            and accept.began <= deliver.began < deliver.ended
        )
        assert accept.attributes["relaymta.recipients"] == deliver.attributes["relaymta.recipients"] == 2
        assert deliver.attributes["relaymta.delivered"] == 2 and deliver.attributes["relaymta.attempt"] == 1
        assert deliver.attributes["relaymta.reply.code"] == 250 and deliver.attributes["server.address"]
        assert (deliver.attributes["network.peer.address"], deliver.attributes["network.peer.port"]) == ("127.0.0.1", site.port)
        assert accept.resource["service.name"] == "relaymta"
        assert accept.resource["service.instance.id"] in ("relay.example/0", "relay.example/1")
        assert "example.com" not in str(collector.spans) and "d.example" not in str(collector.spans), "no addresses"
        [event] = [one for one in relay.events("queued") if one["id"] == ident]
        assert abs(event["began"] - accept.began) < 0.001 and abs(event["ts"] - accept.ended) < 0.001
        others = relay.post(message(), traceparent=UNSAMPLED), relay.post(message())
        last = relay.post(message(), traceparent=SAMPLED).json["id"]
        of(collector, last, 2)
        assert {span.attributes["relaymta.message.id"] for span in collector.spans} == {ident, last}
        assert not any("began" in one for one in relay.events("queued") if one["id"] in {said.json["id"] for said in others})
        wait_for(lambda: relay.metric('relaymta_trace_spans_total{result="sent"}') == 4)


@pytest.mark.parametrize("given, expected", [
    ([SAMPLED], SAMPLED), ([UNSAMPLED], UNSAMPLED), (["cc" + SAMPLED[2:]], SAMPLED), (["01" + SAMPLED[2:] + "-more"], SAMPLED),
    ([SAMPLED, UNSAMPLED], ""), (["ff" + SAMPLED[2:]], ""), ([SAMPLED + "-more"], ""), (["cc" + SAMPLED[2:] + "x"], ""),
    ([SAMPLED.upper()], ""), ([SAMPLED[:-1]], ""), ([SAMPLED.replace(TRACE, "0" * 32)], ""),
    ([SAMPLED.replace(PARENT, "0" * 16)], ""),
    ([SAMPLED + "0"], ""), ([""], ""), ([f"00-{TRACE}-{PARENT}"], ""), ([SAMPLED.replace("-", "_")], ""),
])  # fmt: skip
def test_a_traceparent_is_taken_if_it_is_one(given, expected):
    """As the tests of W3C Trace Context have it (test/test.py there: version ff, more behind 00, several fields, ...)."""
    headers = CIMultiDict([("traceparent", one) for one in given])
    rights = SimpleNamespace(admitted=True, login=None, client=None, origin=None)
    asked = _asked(SimpleNamespace(began_at=1.0, rights=rights), SimpleNamespace(headers=headers))  # type: ignore[arg-type]
    assert (asked.traceparent, asked.began) == (expected, 1.0)


class Late(list[bytes]):
    """Replies of a peer, each of which comes `SLOW` seconds late."""

    def pop(self, at: Any = 0) -> bytes:
        time.sleep(SLOW)
        return super().pop(at)


def test_a_span_is_as_long_as_what_it_is_about(tmp_path):
    with FakeMx({"DOT": Late([b"250 2.0.0 taken\r\n"] * 9)}) as site, Collecting() as collector, Injecting(
        tmp_path, f"127.0.0.1:{site.port}", f"tracing.endpoint={collector.url}"
    ) as relay:  # fmt: skip
        connection = relay.connection()
        body = json.dumps(message()).encode()
        connection.putrequest("POST", "/v1/messages")
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("traceparent", SAMPLED)):
            connection.putheader(name, value)
        connection.endheaders()
        time.sleep(SLOW)
        connection.send(body)
        ident = json.loads(connection.getresponse().read())["id"]
        connection.close()
        accept, deliver = of(collector, ident, 2)
        # (What was sent at the beginning of the pause may be read a moment later.)
        assert accept.ended - accept.began >= SLOW / 2 and deliver.ended - deliver.began >= SLOW - 0.01
        assert deliver.began >= accept.began + SLOW / 2


def test_attempts_that_fail_and_one_after_a_restart_are_in_one_trace(tmp_path, site):
    with Collecting() as collector:
        settings = f"tracing.endpoint={collector.url}", "tracing.ratio=1", "tracing.addresses=true", "delivery.first_retry=1h"
        with Relay(tmp_path, f"127.0.0.1:{site.port}", *settings) as relay:
            ident = sent(relay, "b@d.example", "nobody@d.example", "later@d.example")
            accept, attempt = of(collector, ident, 2)
            assert (accept.parent, accept.kind, accept.flags) == ("", "SERVER", 0x101)
            assert (attempt.parent, attempt.trace, attempt.kind) == (accept.ident, accept.trace, "CLIENT")
            counts = {name: attempt.attributes[f"relaymta.{name}"] for name in ("delivered", "deferred", "bounced")}
            assert counts == dict.fromkeys(counts, 1) and attempt.attributes["relaymta.recipients"] == 3
            assert attempt.failed == "bounced: 550 5.1.1 reply" and attempt.attributes["error.type"] == "reply"
            assert attempt.attributes["relaymta.reply.code"] == 550 and attempt.attributes["relaymta.phase"] == "rcpt"
            assert sorted(attempt.attributes["relaymta.recipients.addresses"]) == [
                "b@d.example", "later@d.example", "nobody@d.example",
            ]  # fmt: skip
            assert accept.attributes["relaymta.sender"] == "a@shop.example"
            [dsn] = wait_for(lambda: relay.events("bounced"))
            of_dsn = wait_for(lambda: [s for s in collector.spans if s.attributes["relaymta.message.id"] == dsn["dsn"]])
            assert of_dsn[0].kind == "INTERNAL" and attempt.attributes["relaymta.dsn.id"] == dsn["dsn"]
            assert relay.stop() == 0
        site.rules["RCPT"] = {}  # they take it now
        with Relay(tmp_path, f"127.0.0.1:{site.port}", *settings[:2]) as relay:
            relay.cli("queue", "flush", ident)
            _, _, again = of(collector, ident, 3)
            assert (again.trace, again.parent, again.name) == (accept.trace, accept.ident, "deliver")
            assert again.attributes["relaymta.attempt"] == 2 and not again.failed
            assert "relaymta.recipients.addresses" not in again.attributes


def test_a_further_host_is_asked_in_the_same_span(tmp_path, site):
    with FakeMx({"RCPT": {"c@d.example": b"451 4.3.0 not here, c@d.example\r\n"}}) as first, Collecting() as collector:
        relay = Injecting(tmp_path, None, f"tracing.endpoint={collector.url}")
        with relay.config.open("a") as config:
            config.write(f'[[route]]\nhosts = ["127.0.0.1:{first.port}", "127.0.0.1:{site.port}"]\n')
        with relay:
            accept, deliver = of(collector, relay.post(message(), traceparent=SAMPLED).json["id"], 2)
            [(name, at, about)] = deliver.events
            assert (name, about["relaymta.reply.code"], about["relaymta.recipients"]) == ("next_host", 451, 1)
            assert about["server.address"] == "127.0.0.1" and deliver.attributes["network.peer.port"] == site.port
            assert deliver.began <= at <= deliver.ended and not deliver.failed and deliver.parent == accept.ident
            assert "c@d" not in str(deliver)


def test_a_site_that_cannot_be_reached_is_an_attempt(tmp_path):
    with Collecting() as collector, Relay(
        tmp_path, f"127.0.0.1:{free_port()}", f"tracing.endpoint={collector.url}", "tracing.ratio=1"
    ) as relay:  # fmt: skip
        ident = sent(relay, "b@d.example")
        accept, attempt = of(collector, ident, 2)
        assert (attempt.kind, attempt.name, attempt.parent) == ("CLIENT", "deliver", accept.ident)
        assert attempt.failed == "deferred: refused" and attempt.attributes["relaymta.phase"] == "connect"
        assert accept.began <= attempt.began < attempt.ended


@pytest.mark.parametrize("answer", [Answer(hangs=120), Answer(hangs=120, drips=True), Answer(503)], ids=["hangs", "drips", "503"])
def test_mail_and_the_end_of_the_relay_do_not_wait_for_the_collector(tmp_path, site, answer):
    with Collecting(*[answer] * 20) as collector, Relay(
        tmp_path, f"127.0.0.1:{site.port}", f"tracing.endpoint={collector.url}", "tracing.ratio=1", "tracing.timeout=60"
    ) as relay:  # fmt: skip
        first = sent(relay, "b@d.example")
        wait_for(lambda: collector.requests, what="the first request")
        for _ in range(5):
            sent(relay, "b@d.example")
        wait_for(lambda: len(relay.events("delivered")) == 6)
        assert len(collector.requests) <= 2 and first
        dropped = relay.metric('relaymta_trace_spans_total{result="dropped"}')
        assert dropped == 0 and relay.metric('relaymta_trace_spans_total{result="sent"}') == 0
        assert relay.stop() == 0
        assert not [one for one in relay.events("warning") if "killed" in one["text"]]


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_the_opentelemetry_collector_takes_the_spans(tmp_path: Path, site: FakeMx) -> None:
    with opentelemetry_collector(tmp_path) as (url, spans):
        for number, compressed in enumerate(("false", "true")):
            folder = tmp_path / compressed
            folder.mkdir()
            settings = f"tracing.endpoint={url}", "tracing.ratio=1", f"tracing.gzip={compressed}"
            with Injecting(folder, f"127.0.0.1:{site.port}", *settings) as relay:
                ident = relay.post(message(), traceparent=SAMPLED).json["id"]
                sent(relay, "b@d.example", "nobody@d.example", "later@d.example")
                wait_for(lambda number=number: len(spans()) == 6 * (number + 1), what="spans")  # those of the DSN are there
                accept, deliver = [span for span in spans() if span.attributes["relaymta.message.id"] == ident]
                assert (accept.trace, accept.parent, deliver.parent) == (TRACE, PARENT, accept.ident)
                wait_for(lambda relay=relay: relay.metric('relaymta_trace_spans_total{result="sent"}') == 6)
                assert relay.metric('relaymta_trace_spans_total{result="refused"}') == 0
                assert not [one for one in relay.events("warning") if "tracing" in one["text"]]
