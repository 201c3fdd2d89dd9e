"""Collectors of spans: one that answers as a test says, whose decoder is of OpenTelemetry's own package; and the OpenTelemetry
Collector, built from the Go module proxy (`tests/support/collector`)."""

import base64
import gzip
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.daemon import free_port, wait_for
from tests.support.programs import need

__all__ = ["Answer", "Collecting", "Request", "Shown", "opentelemetry_collector", "shown_in"]

SOURCE = Path(__file__).parent / "collector"


class Shown(NamedTuple):
    """A span. Ids in hexadecimal digits; times in seconds. `resource`: attributes of whose it is."""

    trace: str
    ident: str
    parent: str
    name: str
    kind: str
    flags: int
    began: float
    ended: float
    failed: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[tuple[str, float, dict[str, Any]]]


def _in_base64(value: Any) -> Any:
    """OTLP has ids in hexadecimal digits, where the JSON of protobuf has base64."""
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(one)).decode()
            if key in ("traceId", "spanId", "parentSpanId")
            else _in_base64(one)
            for key, one in value.items()
        }
    return [_in_base64(one) for one in value] if isinstance(value, list) else value


def shown_in(text: bytes | str) -> list[Shown]:
    """The spans of a request. json_format.ParseError: it has a field that OTLP has not, or one of another type."""
    from google.protobuf import json_format
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(each) for each in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    def values(pairs: Any) -> dict[str, Any]:
        found = {pair.key: value(pair.value) for pair in pairs}
        assert len(found) == len(pairs), "keys are unique"
        return found

    request = json_format.ParseDict(_in_base64(json.loads(text)), ExportTraceServiceRequest())
    found = []
    for of in request.resource_spans:
        for scope in of.scope_spans:
            assert scope.scope.name == "relaymta" and scope.scope.version
            for span in scope.spans:
                assert len(span.trace_id) == 16 and len(span.span_id) == 8 and len(span.parent_span_id) in (0, 8)
                assert span.status.code in (Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR)
                assert bool(span.status.message) == (span.status.code == Status.STATUS_CODE_ERROR)
                found.append(Shown(
                    span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name,
                    Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"), span.flags, span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9, span.status.message, values(span.attributes), values(of.resource.attributes),
                    [(event.name, event.time_unix_nano / 1e9, values(event.attributes)) for event in span.events],
                ))  # fmt: skip
    return found


class Answer(NamedTuple):
    """`hangs`: seconds in which not all of it comes, an octet at a time (`drips`) or nothing; then the connection is closed."""

    status: int = 200
    body: bytes = b"{}"
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    hangs: float = 0.0
    drips: bool = False
    closes: bool = False


class Request(NamedTuple):
    """`at`: when it had come (monotonic)."""

    at: float
    path: str
    headers: dict[str, str]
    body: bytes
    spans: list[Shown]


class Collecting:
    """A collector that gives `answers`, one after the other, and then good ones. `requests`: those that have come; `connections`:
    how many it has accepted."""

    def __init__(self, *answers: Answer) -> None:
        collector = self
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.connections = 0
        self.ended = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                collector.connections += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                plain = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(time.monotonic(), self.path, headers, body, shown_in(plain))
                answer = collector.answers.pop(0) if collector.answers else Answer()
                collector.requests.append(request)
                if answer.hangs:
                    collector._hang(answer, self.wfile.write)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                if answer.kind:
                    self.send_header("Content-Type", answer.kind)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                self.close_connection = answer.closes  # without a word of it

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def _hang(self, answer: Answer, write: Callable[[bytes], Any]) -> None:
        end = time.monotonic() + answer.hangs
        with suppress(OSError):
            if answer.drips:
                write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while time.monotonic() < end and not self.ended.wait(0.05):
                if answer.drips:
                    write(b" ")

    @property
    def spans(self) -> list[Shown]:
        """All that have come."""
        return [span for request in list(self.requests) for span in request.spans]

    def __enter__(self) -> "Collecting":
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def opentelemetry_collector(folder: Path) -> Iterator[tuple[str, Callable[[], list[Shown]]]]:
    """The OpenTelemetry Collector: its URL, and the spans that it has. It is built once, which takes minutes."""
    program = folder / "collector"
    done = subprocess.run(
        [need("go"), "build", "-mod=readonly", "-buildvcs=false", "-o", str(program), "."],
        cwd=SOURCE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    port, out = free_port(), folder / "spans.jsonl"
    (folder / "collector.yaml").write_text(
        f'receivers: {{otlp: {{protocols: {{http: {{endpoint: "127.0.0.1:{port}"}}}}}}}}\n'
        f"exporters: {{file: {{path: {out}, flush_interval: 100ms}}}}\n"
        "service: {telemetry: {metrics: {level: none}}, pipelines: {traces: {receivers: [otlp], exporters: [file]}}}\n"
    )
    with (folder / "collector.log").open("wb") as log:
        process = subprocess.Popen([program, "--config", folder / "collector.yaml"], stdout=log, stderr=log)
    try:
        wait_for(lambda: b"Everything is ready" in (folder / "collector.log").read_bytes(), what="the collector")

        def spans() -> list[Shown]:
            lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
            return [span for line in lines if line.endswith(b"\n") for span in shown_in(line)]

        yield f"http://127.0.0.1:{port}/v1/traces", spans
    finally:
        process.kill()
        process.wait()
