"""The messages of a request: what a large body costs before it is refused."""

import tracemalloc

import pytest

from relaymta.accept.http.letters import JSON_MOST, _parsed
from relaymta.accept.http.models import Limits, Wrong

BEGIN = b'{"from":"a@b.example","to":'
MANY = 1_200_000


@pytest.mark.parametrize("body, detail", [
    (BEGIN + b"[" + b'"a@b.example",' * MANY + b'"c@d.example"]}', "strings"),
    (BEGIN + b'"a@b.example","batch":[' + b'{"to":"a@b.example"},' * MANY + b'{"to":"c@d.example"}]}', "strings"),
    (BEGIN + b'"a@b.example","text":"' + "ä".encode() * (JSON_MOST // 2) + b'"}', "octets of JSON"),
    (BEGIN + b'"a@b.example","text":"' + b'\\"' * (JSON_MOST // 2) + b'"}', "strings"),
    (BEGIN + b'"a@b.example","headers":{"X-A":"' + b"x" * JSON_MOST + b'"}}', "octets of JSON"),
    (BEGIN + b'"a@b.example","attachments":[{"filename":"' + b"x" * JSON_MOST + b'","content":"QUJD"}]}', "octets of JSON"),
], ids=["recipients", "batch", "text", "escapes", "headers", "filename"])  # fmt: skip
def test_what_would_take_much_memory_is_refused_before(body, detail):
    tracemalloc.start()
    try:
        with pytest.raises(Wrong) as wrong:
            _parsed(body, Limits())
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert detail in str(wrong.value) and most < 1 << 20


def test_base64_is_no_json_that_counts():
    content = b"QUJD" * (JSON_MOST // 4 + 100)
    body = BEGIN + b'"a@b.example","attachments":[{"filename":"x","content":"' + content + b'"}]}'
    tracemalloc.start()
    try:
        found = _parsed(body, Limits())
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found.attachments) == 1 and most < 1 << 20
