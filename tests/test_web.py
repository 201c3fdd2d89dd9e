"""What an HTTP endpoint answers: bounded, and one exception for all that is unusable."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from relaymta.config import OAuth
from relaymta.route.lookup import DEFAULT_SECONDS as DEFAULT
from relaymta.route.lookup import Answer, LookupFailed, ask
from relaymta.send.oauth import DEFAULT_SECONDS, EARLY_SECONDS, LARGEST, LONGEST_SECONDS, Exchanges, TokenError
from relaymta.web import WebError, object_in, request

DEEP = b"[" * 50_000


class Endpoint(HTTPServer):
    """Answers each request with `status` and `body`."""

    status, body = 200, b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Endpoint)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


async def keep(name: str, token: str) -> None:
    pass


HALF = DEFAULT_SECONDS - EARLY_SECONDS
TOKENS = [  # (status, body, seconds of use or the reason)
    (200, b'{"access_token": "t", "expires_in": 600}', 540),
    (200, b'{"access_token": "t", "expires_in": "600"}', 540),
    (200, b'{"access_token": "t", "expires_in": 10}', 5),
    (200, b'{"access_token": "t", "expires_in": 1e300}', LONGEST_SECONDS - EARLY_SECONDS),
    (200, b'{"access_token": "t"}', HALF),
    (200, b'{"access_token": "t", "expires_in": null}', HALF),
    (200, b'{"access_token": "t", "expires_in": 0}', HALF),
    (200, b'{"access_token": "t", "expires_in": -5}', HALF),
    (200, b'{"access_token": "t", "expires_in": "nan"}', HALF),
    (200, b'{"access_token": "t", "expires_in": "inf"}', HALF),
    (200, b'{"access_token": "t", "expires_in": 1e999}', HALF),
    (200, b'{"access_token": "t", "expires_in": [1]}', HALF),
    (200, b'{"access_token": "t", "expires_in": NaN}', "the response is no JSON object"),
    (200, b'{"access_token": "t", "x": "' + b"x" * LARGEST + b'"}', "the response is longer than"),
    (200, b"{}", "no 'access_token'"),
    (200, b'{"access_token": ""}', "access_token is not a string"),
    (200, b'{"access_token": ["t"]}', "access_token is not a string"),
    (200, b"[]", "the response is no JSON object"),
    (200, b"", "the response is no JSON object"),
    (200, b'{"access_token": ' + DEEP, "the response is no JSON object"),
    (200, b"\xff\xfe", "the response is no JSON object"),
    (302, b"", "302 Found"),
    (400, b'{"error": "invalid_grant"}', "400 invalid_grant"),
    (400, DEEP, "400 Bad Request"),
    (503, b"<html>", "503 Service Unavailable"),
    (503, b"x" * 2 * LARGEST, "503 Service Unavailable"),
]


@pytest.mark.parametrize("number", range(len(TOKENS)))
async def test_what_a_token_endpoint_answers(endpoint, number):
    endpoint.status, endpoint.body, expected = TOKENS[number]
    exchanges = Exchanges(lambda name: "", keep, lambda: 1000.0)
    settings = OAuth(token_url=endpoint.url, client_id="me")
    if isinstance(expected, str):
        with pytest.raises(TokenError) as failed:
            await exchanges.get(settings)
        assert f"token endpoint {endpoint.url}: {expected}" in str(failed.value)
    else:
        assert await exchanges.get(settings) == ("t", expected)


@pytest.mark.parametrize("body", [DEEP, b'{"hosts": NaN}', b"x" * 100_000, b"[1]", b'{"hosts": []}', b"\xff"])
async def test_a_look_up_that_answers_nonsense_fails(endpoint, body):
    endpoint.body = body
    with pytest.raises(LookupFailed):
        await ask(endpoint.url, "d.example", "")


@pytest.mark.parametrize("body", [b"x" * 100_000, b"", DEEP])
async def test_a_look_up_without_an_answer_for_the_domain(endpoint, body):
    """404: as if there were no look-up, whatever a framework writes into the page."""
    endpoint.status, endpoint.body = 404, body
    assert await ask(endpoint.url, "d.example", "") == Answer((), "", DEFAULT)


async def test_a_response_is_bounded_and_redirects_are_not_followed(endpoint):
    endpoint.body = b"x" * 1000
    assert (await request("GET", endpoint.url, seconds=5, largest=1000)).body == endpoint.body
    with pytest.raises(WebError, match="longer than 999 octets"):
        await request("GET", endpoint.url, seconds=5, largest=999)
    endpoint.status = 302
    assert (await request("GET", endpoint.url, seconds=5, largest=1000)).status == 302
    for url in ("http://127.0.0.1:1/", "http://", "http://[::1", "nothing"):
        with pytest.raises(WebError, match=r"."):
            await request("GET", url, seconds=5, largest=10)


def test_numbers_that_are_not_json_are_refused():
    for text in (b'{"x": NaN}', b'{"x": -Infinity}', b'{"x": Infinity}'):
        with pytest.raises(WebError):
            object_in(text)
