"""The targets `message` and `template`: requests of the HTTP injection API, from their JSON to message data, and templates."""

import contextlib
import json
import resource
import signal
import time
from collections.abc import Iterator

from relaymta.accept.http import templating
from relaymta.accept.http.compose import compose
from relaymta.accept.http.exchange import Job, One
from relaymta.accept.http.models import Wrong, parse
from relaymta.accept.http.templating import Renderer
from tests.support.http_messages import STRINGS, Held, check, full, read

OURS = {"from", "sender", "reply-to", "to", "cc", "subject", "mime-version", "content-type", "content-transfer-encoding"}
SECONDS = 0.2  # of CPU time, for templates
MEMORY = 512 << 20  # octets of address space beside what the fuzzer has


def message(data: bytes) -> None:
    """An input: an octet of options, and JSON; or strings with 0xff between them that go into a valid request, each behind the
    number of its place."""
    options, rest = data[0], data[1:]
    if options % 2:
        _message(rest)
        return
    of = dict(STRINGS)
    names = list(STRINGS)
    for one in rest.split(b"\xff")[:4]:
        if one:
            of[names[one[0] % len(names)]] = one[1:].decode("utf-8", "replace")
    _message(json.dumps(full(of, options % 4 == 0)).encode())


def _message(octets: bytes) -> None:
    parts = {"p": Held(b"abc" * 100, 7), "": Held(b"")}
    try:
        found = parse(octets)
        if found.batch is not None:
            return
        composed = compose(found, parts)
    except Wrong as error:
        assert error.detail.isprintable() and error.field.isprintable()
        return
    whole = b"".join(composed.pieces)
    assert len(whole) == composed.size
    check(whole, composed.utf8)
    header = whole.partition(b"\r\n\r\n")[0].decode()
    names = [line.partition(":")[0].lower() for line in header.split("\r\n") if line[:1] != " "]
    assert sorted(set(names) - OURS) == sorted({one.name.lower() for one in found.headers} - OURS)
    assert all(names.count(name) <= 1 for name in OURS) and "bcc" not in names
    if not composed.utf8:
        parts_there = list(read(whole).walk())
        leaves = [part for part in parts_there if not part.is_multipart()]
        assert len(leaves) == max(1, len(found.attachments) + (found.text is not None) + (found.html is not None))


def template(data: bytes) -> None:
    """An input: an octet that says what it is a template of, the octets of substitutions, those, and the template."""
    octets, rest = data[1], data[2:]
    substitutions, source = rest[:octets], rest[octets:].decode("utf-8", "replace")
    name = ("text", "html", "subject")[data[0] % 3]
    with _bounded():
        job = Job([(name, source)], b'{"a": 1, "b": ["x", {"c": "<"}], "d": "e"}', time.process_time() + SECONDS, 10_000)
        found = Renderer(job).render(One(substitutions, source if data[0] % 2 else None))
    if found.wrong is not None:
        assert found.wrong[0] in (name, "subject", "substitutions") and found.wrong[1]
    else:
        assert sum(len(text.encode()) for text in found.texts.values()) <= 10_000


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """As the process that renders is, for a moment."""
    with open("/proc/self/statm", "rb") as file:
        space = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, templating._passed)
    resource.setrlimit(resource.RLIMIT_AS, (space + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
