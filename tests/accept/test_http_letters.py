"""The messages of a request: what a large body costs before it is refused, and what is done on the event loop."""

import asyncio
import hashlib
import json
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from yarl import URL

from relaymta.accept.http import fields, models, receiving
from relaymta.accept.http.compose import Composer
from relaymta.accept.http.letters import JSON_MOST, ON_LOOP, Letters, Order, _parsed
from relaymta.accept.http.models import Limits, Wrong
from relaymta.accept.http.places import Places
from relaymta.accept.http.receiving import Received
from relaymta.problems import Problem
from relaymta.proto.transaction import Limits as SessionLimits
from tests.support.http_messages import read as read_message

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


@pytest.mark.parametrize("more, field", [
    (b'"reply_to":[' + b'"a@b.example",' * 100_000 + b'""]', "reply_to"),
    (b'"cc":[' + b'"a@b.example",' * 100_000 + b'""]', "cc"),
    (b'"headers":{' + b"".join(b'"k%d":"",' % n for n in range(50_000)) + b'"z":1}', "headers"),
    (b'"tags":[' + b'"a",' * 100_000 + b'""]', "tags"), (b'"priority":"' + b"a" * 1_000_000 + b'"', "priority"),
], ids=["reply_to", "cc", "headers", "tags", "priority"])  # fmt: skip
def test_what_one_step_would_make_many_of_is_refused_before(monkeypatch, more, field):
    monkeypatch.setattr(models, "parse", None)
    with pytest.raises(Wrong) as wrong:
        _parsed(BEGIN + b'"a@b.example",' + more + b"}", Limits())
    assert wrong.value.field == field


def test_quotes_in_many_names_are_no_strings_that_count():
    to = [{"email": "a@b.example", "name": "\\" * (number % 3) + '"' * 120} for number in range(1000)]
    assert len(_parsed(json.dumps(BASE | {"to": to}).encode(), Limits()).to) == 1000


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


class Loop:
    """What Letters needs of a worker. `turns`: how often it gave way."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.threads = None
        self.intake = SimpleNamespace(log=None)
        self.turns = self
        self.gave_way = 0

    async def turn(self) -> None:
        self.gave_way += 1
        await asyncio.sleep(0)


def request(kind: str, query: str = "") -> Any:
    url = URL(f"http://x/v1/messages{query}", encoded=True)
    return SimpleNamespace(headers={"Content-Type": kind}, query=url.query, rel_url=url)


def received(body: Any, parts: dict[str, bytes] | None = None) -> Received:
    found = Received(lambda octets: None)
    if parts is not None:
        for name, octets in parts.items():
            found.part(name).add(octets)
    (found.body if parts is None else found.part("message")).add(body if isinstance(body, bytes) else json.dumps(body).encode())
    return found


@pytest.fixture
async def letters():
    found = Letters(Loop())
    yield found
    found.end()


async def read(letters: Letters, body: Any, kind: str = "application/json", parts: Any = None, query: str = "") -> Order:
    whole = received(body, parts)
    return await letters.read(request(kind, query), whole, SessionLimits(message_size=50 << 20))


async def refused(letters: Letters, *arguments: Any, **named: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        await read(letters, *arguments, **named)
    return caught.value


LONG = {f"X-{number}": "ä b" * 2600 for number in range(4)}
BASE = {"from": "a@b.example", "subject": "x", "text": "hi"}


async def of(letters: Letters, order: Order) -> list[Any]:
    async with aclosing(letters.of(order, ())) as found:
        return [letter async for _, letter in found]


async def test_what_the_entries_of_a_batch_share_is_encoded_once(letters, monkeypatch):
    made: list[str] = []
    encode = fields.unstructured
    monkeypatch.setattr(fields, "unstructured", lambda name, value: made.append(name) or encode(name, value))
    batch = [{"to": f"r{number}@d.example"} for number in range(500)] + [{"to": "x@d.example", "subject": "own"}]
    order = await read(letters, BASE | {"headers": LONG, "batch": batch})
    found = await of(letters, order)
    assert len(found) == 501 and sorted(made) == ["Subject", "Subject", "Subject", *LONG]  # that of its own: in both passes
    last, first = (read_message(b"".join(found[at].pieces)) for at in (-1, 0))
    assert (first["subject"], last["subject"], last["x-3"], last["to"]) == ("x", "own", "ä b" * 2600, "x@d.example")


async def test_a_batch_gives_way_and_what_is_long_is_done_on_threads(letters, monkeypatch):
    threads: list[str] = []
    whole = Composer.compose

    def noted(self: Composer, message: Any) -> Any:
        threads.append(threading.current_thread().name)
        return whole(self, message)

    monkeypatch.setattr(Composer, "compose", noted)
    order = await read(letters, BASE | {"batch": [{"to": "a@d.example"}] * 2000})
    await of(letters, order)
    assert letters._admission.gave_way >= 2 * 2000 * 50 // ON_LOOP and {"MainThread"} == set(threads)
    threads.clear()
    names = [{"email": f"a{number}@d.example", "name": "ä" * 250} for number in range(100)]
    order = await read(letters, BASE | {"batch": [{"to": names}] * 3})
    await of(letters, order)
    assert len(threads) == 6 and all(one.startswith("letters") for one in threads)
    threads.clear()
    order = await read(letters, BASE | {"headers": LONG, "to": "a@d.example"})
    await of(letters, order)
    assert all(one.startswith("letters") for one in threads)


async def test_what_is_rendered_is_composed_on_a_thread(letters, monkeypatch):
    threads: list[str] = []
    whole = Composer.compose
    monkeypatch.setattr(
        Composer, "compose", lambda *arguments: threads.append(threading.current_thread().name) or whole(*arguments)
    )
    order = await read(letters, BASE | {"to": "a@d.example", "text": "{{ 'ab ' * 100000 }}", "substitutions": {}})
    (letter,) = await of(letters, order)
    assert letter.size > 300_000 and len(threads) == 1 and threads[0].startswith("letters")


async def test_many_addresses_are_read_on_a_thread(letters, monkeypatch):
    threads: list[str] = []
    whole = models.parse
    monkeypatch.setattr(models, "parse", lambda *arguments: threads.append(threading.current_thread().name) or whole(*arguments))
    await read(letters, BASE | {"to": ["ü@ü.example"] * 300})
    await read(letters, BASE | {"to": ["ü@ü.example"] * 3})
    await read(letters, BASE | {"to": "a@b.example", "text": "x" * 70_000})
    assert [one.startswith("letters") for one in threads] == [True, False, True]


async def test_the_threads_that_write_the_data_of_all_mail_are_not_used(letters):
    """Whatever is asked of HTTP: they would be refused here."""
    letters._admission.threads = ThreadPoolExecutor(1)
    letters._admission.threads.shutdown()
    await of(letters, await read(letters, BASE | {"headers": LONG, "to": ["ü@ü.example"] * 300}))
    raw = b"From: a@b.example\nTo: c@d.example\n\n" + b"x\n" * 100_000
    assert (await read(letters, raw, "message/rfc822")).size == len(raw) + 100_003


async def test_who_waits_for_a_thread_too_long_is_told_so(letters):
    letters._places = tuple(Places(1, 0.01) for _ in range(2))
    async with letters._places[0].place("another"):
        problem = await refused(letters, BASE | {"to": ["a@b.example"] * 300})
    assert (problem.status, problem.headers) == (503, {"Retry-After": "5"})
    assert len((await read(letters, BASE | {"to": ["a@b.example"] * 300})).message.to) == 300


async def test_a_body_that_cannot_be_mapped(letters, monkeypatch, tmp_path):
    def none(*arguments: Any, **named: Any) -> None:
        raise OSError(24, "Too many open files")

    whole = received(BASE | {"to": "a@b.example"})
    whole.spill(whole.body, str(tmp_path))
    monkeypatch.setattr(receiving.mmap, "mmap", none)
    with pytest.raises(Problem) as caught:
        await letters.read(request("application/json"), whole, SessionLimits(message_size=1 << 20))
    whole.close()
    assert caught.value.status == 503 and "Retry-After" in caught.value.headers


async def test_a_part_that_is_for_nothing(letters):
    body = BASE | {"to": "a@b.example", "attachments": [{"filename": "f", "part": "a"}]}
    problem = await refused(letters, body, "multipart/form-data", {"a": b"", "b": b""})
    assert (problem.status, problem.more) == (422, {"argument": "b"})
    order = await read(letters, body, "multipart/form-data", {"a": b"x"})
    assert len(await of(letters, order)) == 1


RAW_MESSAGE = b"From: a@b.example\r\nTo: c@d.example\r\nSubject: how X-Relay-Idempotency works\r\n\r\nx\r\n"


@pytest.mark.parametrize("query, status", [
    ("?to=%ff@b.example", 400), ("?from=a%80@b.example", 400), ("?tag=%ed%b2%80", 400), ("?%ff=1", 400),
    ("?to=%C3%BC@b.example", 0),
], ids=str)  # fmt: skip
async def test_a_query_is_utf_8(letters, query, status):
    if status:
        assert (await refused(letters, RAW_MESSAGE, "message/rfc822", query=query)).status == status
    else:
        assert (await read(letters, RAW_MESSAGE, "message/rfc822", query=query)).recipients == ("ü@b.example",)


async def test_the_field_for_smtp_is_one_by_its_name(letters):
    assert (await read(letters, RAW_MESSAGE, "message/rfc822")).recipients == ("c@d.example",)
    for field in (b"x-relay-IDEMPOTENCY: a\r\n", b"X-Relay-Idempotency : a\n"):
        problem = await refused(letters, b"To: c@d.example\r\n" + field + RAW_MESSAGE, "message/rfc822")
        assert problem.status == 422 and "X-Relay-Idempotency" in problem.detail


@pytest.mark.parametrize("end", [b"\n\n\r\r\n\r", b"", b"\0\n"], ids=repr)
async def test_the_size_of_a_message_as_it_is_is_that_which_is_sent(letters, end):
    order = await read(letters, RAW_MESSAGE.replace(b"\r\n", b"\n") + end, "message/rfc822")
    (letter,) = await of(letters, order)
    assert letter.size == len(b"".join(letter.pieces)) >= len(RAW_MESSAGE)


async def test_a_bare_cr_in_the_header_of_a_message_as_it_is_begins_no_field(letters):
    raw = b"From: a@b.example\nTo: c@d.example\nSubject: hi\rBcc: victim@d.example\n\na\rb\n"
    order = await read(letters, raw, "message/rfc822")
    (letter,) = await of(letters, order)
    assert letter.recipients == ["c@d.example"]
    assert b"".join(letter.pieces).endswith(b"Subject: hi Bcc: victim@d.example\r\n\r\na\r\nb\r\n")


def test_what_is_in_a_form_has_a_digest_of_its_own():
    forms = [{"a": b"x\0b\0y"}, {"a": b"x", "b": b"y"}, {"a": b"xb", "": b"y"}, {"ab": b"x"}, {"a": b"bx"}, {"a": b""}, {}]
    digests = [received(b"{}", one).digest for one in forms]
    assert len(set(digests)) == len(forms)
    assert received(b"{}").digest == hashlib.blake2b(b"{}", digest_size=16).digest()  # as it was before
