"""The client of HTTP injection by itself: what it tries again, and what it sends then; beside a server that follows a script."""

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relaymta import client
from relaymta.client import Attachment, Client, Problem, Unreachable

ACCEPTED = {"id": "1M8MZK99Q0000", "messages": [{"status": "accepted", "id": "1M8MZK99Q0000", "recipients": []}], "newer": 1}
MAIL: client.Mail = {"from_": "a@b.example", "to": "c@d.example", "text": "hello"}
Step = tuple[int, dict[str, str], Any]
HANG_UP: Step = (0, {}, None)


class Scripted:
    """A server whose answers are `steps`, one a request; the last is repeated."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) < int(self.headers["Content-Length"]):  # the client has given up
                    self.close_connection = True
                    return
                outer.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                status, headers, answer = outer.steps.pop(0) if len(outer.steps) > 1 else outer.steps[0]
                self.close_connection = not status
                if not status:
                    return
                self.send_response(status)
                text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                for name, value in ({"Content-Length": str(len(text))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["Scripted"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """The pauses that were made; none takes any time."""
    found: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        found.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(client.time, "sleep", sleep)
    monkeypatch.setattr(client.time, "monotonic", lambda: now[0])
    return found


def problem(status: int, **headers: str) -> Step:
    return status, headers, {"title": "x", "status": status, "detail": "why"}


def test_it_imports_only_the_standard_library_and_little_of_that():
    code = "import sys; import relaymta.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True)
    found = set(done.stdout.split()) - set(bare.stdout.split())
    assert {one for one in found if one.startswith("relaymta")} == {"relaymta", "relaymta.client"}
    assert not found & {"asyncio", "aiohttp", "msgspec", "pydantic", "dataclasses", "inspect", "mimetypes", "logging"}
    tops = {one.partition(".")[0] for one in found} - {"relaymta"}
    assert tops <= set(sys.stdlib_module_names), tops - set(sys.stdlib_module_names)


def test_what_is_tried_again_has_the_same_key_and_the_pauses_are_those_that_the_relay_names(slept):
    steps = problem(429, **{"Retry-After": "7"}), problem(409, **{"Retry-After": "1"}), problem(503), HANG_UP, (202, {}, ACCEPTED)
    with Scripted(*steps).running() as server, Client(server.url, "u", "p") as relay:
        sent = relay.send(**MAIL)
        again = relay.send(**MAIL)
    keys = [headers["idempotency-key"] for _, headers, _ in server.asked]
    assert len(keys) == 6 and set(keys[:5]) == {sent.key} and keys[5] == again.key != sent.key
    assert {body for _, _, body in server.asked} == {b'{"from": "a@b.example", "to": "c@d.example", "text": "hello"}'}
    assert slept[:2] == [7.0, 1.0] and all(0 < one <= client.LONGEST_PAUSE for one in slept[2:])
    assert sent.id == ACCEPTED["id"] and not sent.replayed and sent.complete


def test_it_does_not_wait_beyond_its_patience(slept):
    with Scripted(problem(503, **{"Retry-After": "3600"})).running() as server, Client(server.url) as relay:
        with pytest.raises(Problem) as found:
            relay.send(**MAIL)
        assert found.value.status == 503 and found.value.retry_after == 3600 and len(found.value.key) == 32
        assert not slept and len(server.asked) == 1
    with Scripted(problem(503)).running() as server, Client(server.url, patience=20) as relay:
        with pytest.raises(Problem):
            relay.send(**MAIL)
        assert 1 < len(server.asked) < 30 and sum(slept) < 20


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 415, 422, 500])
def test_other_problems_are_not_tried_again(slept, status):
    rows = [{"address": "c@d.example", "status": "refused", "reply": "550 5.1.1 no"}]
    step = status, {}, {"title": "x", "status": status, "detail": "why", "argument": "to", "recipients": rows}
    with Scripted(step).running() as server, Client(server.url) as relay:
        with pytest.raises(Problem, match=f"{status}: why") as found:
            relay.send(**MAIL)
    assert len(server.asked) == 1 and not slept
    assert (found.value.argument, found.value.recipients[0].reply) == ("to", "550 5.1.1 no")


@pytest.mark.parametrize("text", [
    b"", b"<html>", b"[]", b'{"status": 200}', b"\xff",
    b'{"status": 404, "title": "Not Found", "recipients": [[1]], "messages": 5}',
])  # fmt: skip
def test_what_has_answered_instead_of_the_relay_is_a_problem_too(slept, text):
    with Scripted((404, {}, text)).running() as server, Client(server.url) as relay:
        with pytest.raises(Problem) as found:
            relay.send(**MAIL)
    assert found.value.status == 404 and found.value.document["title"] == "Not Found"


@pytest.mark.parametrize(
    "text", [b"<html>", b"[]", b"{}", b"1", b'{"id":"1","messages":[5]}', b'{"id":"1","messages":[{}]}', b"["]
)
def test_an_answer_that_is_not_the_relays_is_not_taken_for_an_accepted_message(slept, text):
    with Scripted((202, {}, text), (202, {}, ACCEPTED)).running() as server, Client(server.url) as relay:
        with pytest.raises(Unreachable, match="is that the relay") as found:
            relay.send(key="mine", **MAIL)
        assert found.value.key == "mine" and not slept
        assert relay.send(key=found.value.key, **MAIL).id == ACCEPTED["id"]
    with Scripted((200, {}, text)).running() as server, Client(server.url) as relay, pytest.raises(Unreachable):
        relay.check(**MAIL)


def test_an_answer_that_is_cut_off_is_asked_for_again_with_the_same_key(slept):
    cut = 202, {"Content-Length": "1000", "Connection": "close"}, ACCEPTED
    with Scripted(cut, (202, {}, ACCEPTED)).running() as server, Client(server.url) as relay:
        sent = relay.send(**MAIL)
    assert sent.id == ACCEPTED["id"] and [headers["idempotency-key"] for _, headers, _ in server.asked] == [sent.key] * 2
    with Scripted(cut).running() as server, Client(server.url, patience=5) as relay:
        with pytest.raises(Unreachable, match="IncompleteRead") as found:
            relay.send(key="mine", **MAIL)
    assert found.value.key == "mine" and 1 < len(server.asked) < 30


def test_there_is_a_pause_though_the_relay_names_none(slept):
    with Scripted(problem(503, **{"Retry-After": "0"})).running() as server, Client(server.url, patience=20) as relay:
        with pytest.raises(Problem):
            relay.send(**MAIL)
    assert len(slept) == len(server.asked) - 1 < 30 and all(one > 0 for one in slept) and sum(slept) > 5


def test_a_batch_of_which_nobody_gets_anything_says_so_of_each(slept):
    rows = [{"status": "refused", "recipients": []}, {"status": "try again", "reply": "452 4.7.1 x", "recipients": []}]
    step = 503, {"Retry-After": "99"}, {"status": 503, "detail": "why", "messages": rows}
    with Scripted(step).running() as server, Client(server.url) as relay:
        with pytest.raises(Problem) as found:
            relay.send(**MAIL)
    assert [one.status for one in found.value.messages] == ["refused", "try again"] and found.value.retry_after == 99


def test_where_nobody_listens_it_is_unreachable(slept):
    with Scripted((202, {}, ACCEPTED)).running() as server:
        pass
    with pytest.raises(Unreachable, match="ConnectionRefusedError") as found, Client(server.url, patience=3) as relay:
        relay.send(key="mine", **MAIL)
    assert found.value.key == "mine" and slept


def test_a_connection_that_was_closed_meanwhile_is_replaced_at_once(slept):
    steps = (202, {}, ACCEPTED), HANG_UP, (202, {}, ACCEPTED)
    with Scripted(*steps).running() as server, Client(server.url) as relay:
        relay.send(**MAIL)
        relay.send(**MAIL)
    assert len(server.asked) == 3 and not slept


def test_files_are_read_in_pieces_while_they_are_sent(tmp_path, slept, monkeypatch):
    file = tmp_path / "a file.pdf"
    file.write_bytes(b"%PDF" + bytes(3 * client.BLOCK))
    held: list[int] = []
    made = client._Body._pieces

    def pieces(self, sizes):
        for piece in made(self, sizes):
            held.append(len(piece))
            yield piece

    monkeypatch.setattr(client._Body, "_pieces", pieces)
    with Scripted((202, {}, ACCEPTED)).running() as server, Client(server.url) as relay:
        relay.send(**MAIL, attachments=[file, Attachment(b"\0\r\n--", "b.bin", content_id="b")])
        relay.send_raw(file, sender="", to=["x@d.example", "y@d.example"], tags=["t"], key="k")
    assert max(held) <= client.BLOCK
    _, headers, body = server.asked[0]
    boundary = headers["content-type"].partition("boundary=")[2].encode()
    assert len(body) == int(headers["content-length"])
    assert body.split(b"--" + boundary)[2].partition(b"\r\n\r\n")[2] == file.read_bytes() + b"\r\n"
    files = json.loads(body.split(b"--" + boundary)[1].partition(b"\r\n\r\n")[2])["attachments"]
    assert files == [
        {"filename": "a file.pdf", "content_type": "application/pdf", "part": "file0"},
        {"filename": "b.bin", "content_type": "application/octet-stream", "part": "file1", "content_id": "b"},
    ]
    path, headers, body = server.asked[1]
    assert path == "/v1/messages?tag=t&to=x%40d.example&to=y%40d.example&from="
    assert headers["content-type"] == "message/rfc822" and body == file.read_bytes() and headers["idempotency-key"] == "k"


def test_a_file_that_is_not_there_or_becomes_shorter_is_an_error_of_its_own(tmp_path, slept, monkeypatch):
    file = tmp_path / "a"
    with Scripted((202, {}, ACCEPTED)).running() as server, Client(server.url) as relay:
        with pytest.raises(OSError, match="No such file") as found:
            relay.send(**MAIL, attachments=[file])
        assert not isinstance(found.value, ConnectionError) and found.value.filename in (file, str(file))
        file.write_bytes(bytes(1000))
        monkeypatch.setattr(client, "BLOCK", 100)
        made = client._read

        def cut(path, size):
            for piece in made(path, size):
                file.write_bytes(b"")
                yield piece

        monkeypatch.setattr(client, "_read", cut)
        with pytest.raises(OSError, match="shorter"):
            relay.send(**MAIL, attachments=[file])
        assert not server.asked and not slept
        relay.send(**MAIL)


def test_an_answer_before_the_end_of_the_body_is_the_answer(slept, tmp_path):
    """Also where the rest of the body is read by nobody, and the connection is reset. (Over TLS OpenSSL may not read on.)"""
    file = tmp_path / "large"
    with file.open("wb") as writing:
        writing.truncate(64 << 20)

    def serve(listening: socket.socket) -> None:
        found, _ = listening.accept()
        with found:
            found.recv(100)
            found.sendall(b'HTTP/1.1 413 X\r\nContent-Length: 31\r\n\r\n{"status":413,"detail":"large"}')

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        with Client(f"http://127.0.0.1:{listening.getsockname()[1]}", patience=0) as relay:
            with pytest.raises(Problem, match="413: large"):
                relay.send(**MAIL, attachments=[file])
        thread.join()


def test_secrets_go_in_clear_to_this_machine_only():
    wrong = "http://relay.example", "http://10.0.0.1:8080", "http://127.evil.example", "ftp://relay.example", "relay.example"
    for url in (*wrong, "https://u:p@relay.example"):
        with pytest.raises(ValueError, match=r"clear|URL"):
            Client(url, "u", "p")
    for url in ("http://localhost:1", "http://127.0.0.1:1/api", "http://[::1]:1", "https://relay.example"):
        Client(url, "u", "p").close()
    Client("http://relay.example", "u", "p", in_clear=True).close()


def test_its_answers_have_the_fields_of_the_api():
    document = json.loads((Path(__file__).parents[1] / "docs/injection-openapi.json").read_text(encoding="utf-8"))
    schemas = document["components"]["schemas"]
    for name, kind in (
        ("RecipientResult", client.RecipientResult), ("MessageResult", client.MessageResult), ("Check", client.Check),
        ("RouteOf", client.RouteOf), ("MessageState", client.MessageState), ("ReceiptState", client.Receipt),
        ("RecipientState", client.RecipientState),
    ):  # fmt: skip
        assert {{"bounce_class": "class"}.get(one, one) for one in kind._fields} == set(schemas[name]["properties"]), name
    named = {one.rstrip("_") for one in client.Mail.__annotations__}
    assert named == set(schemas["Request"]["properties"])
    assert set(client.BatchEntry.__annotations__) == set(schemas["BatchEntry"]["properties"])
