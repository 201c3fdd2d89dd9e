"""Authentication back ends: a real Dovecot, an HTTP endpoint, tokens verified by JWKS and by introspection."""

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import os
import re
import signal
import smtplib
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from relaymta.auth import web
from relaymta.auth.identity import Identity, Unavailable
from relaymta.auth.web import KEYS_AGAIN, KEYS_KEPT, LARGEST, Bearer, Passwords
from relaymta.config import TokensTable
from tests.accept.test_endpoints import SECRET, Endpoint
from tests.support.daemon import wait_for
from tests.support.programs import need


class Web:
    """An HTTP server that responds as `answer(path, body)` says (status and JSON object) and records its requests."""

    def __init__(self, answer: Callable[[str, bytes], tuple[int, object]]) -> None:
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append((self.path, body, self.headers.get("Authorization", "")))
                status, found = answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(found).encode())

            do_GET = do_POST

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def plain(endpoint: Endpoint, user: str, password: str) -> int:
    with endpoint.client() as client:
        return client.docmd("AUTH", "PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()).decode())[0]


def bearer(endpoint: Endpoint, mechanism: str, user: str, token: str) -> int:
    text = f"user={user}\1auth=Bearer {token}\1\1" if mechanism == "XOAUTH2" else f"n,a={user},\1auth=Bearer {token}\1\1"
    with endpoint.client() as client:
        assert mechanism in client.esmtp_features["auth"].split()
        code, said = client.docmd("AUTH", f"{mechanism} {base64.b64encode(text.encode()).decode()}")
        if code == 334:
            assert json.loads(base64.b64decode(said))["status"] == "invalid_token"
            code, _ = client.docmd("AQ==")
        return code


class Dovecot:
    """A real Dovecot that only authenticates, running as the user of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "users").write_text("bob:{PLAIN}builder::::::\n")
        (folder / "ill").write_text("#!/bin/sh\nexit 111\n")
        (folder / "ill").chmod(0o755)
        (folder / "dovecot.conf").write_text(
            f"""base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols =
ssl = no
default_internal_user = root
default_internal_group = root
default_login_user = root
passdb {{
  driver = passwd-file
  args = {folder}/users
}}
passdb {{
  driver = checkpassword
  args = {folder}/ill
  username_filter = ill
}}
userdb {{
  driver = static
  args = uid=0 gid=0 home=/tmp
}}
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service auth {{
  unix_listener auth-client {{
    mode = 0600
  }}
}}
"""
        )
        self.start()

    @property
    def socket(self) -> str:
        return f"{self.folder}/run/auth-client"

    def start(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        command = ["dovecot", "-F", "-c", str(self.folder / "dovecot.conf")]
        self.process = subprocess.Popen(command, start_new_session=True)
        wait_for(lambda: Path(self.socket).exists())

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its auth process would run on while a client is connected
        self.process.wait()


@pytest.fixture
def dovecot() -> Iterator[Dovecot]:
    """In a folder of its own, since paths of sockets are short."""
    need("dovecot")
    if os.geteuid():
        pytest.skip("this Dovecot's configuration is root's")
    with tempfile.TemporaryDirectory() as folder:
        made = Dovecot(Path(folder) / "dovecot")
        yield made
        made.stop()


def test_dovecot_verifies_users_who_are_not_in_the_accounts_file(dovecot, tmp_path):
    """A real Dovecot keeps its connection, gives canonical names, and may end and start again."""
    with Endpoint(tmp_path, "127.0.0.1:1", f"accounts.dovecot={dovecot.socket}", "accounts.remember=0") as endpoint:
        asking = threading.Thread(target=plain, args=(endpoint, "bob", "wrong"))  # Dovecot delays the refusal by seconds
        asking.start()
        with endpoint.client() as client:  # Dovecot closes the connection on a line of more than 16384 octets
            assert client.docmd("AUTH", f"LOGIN {base64.b64encode(b'u' * 8000).decode()}")[0] == 334
            assert client.docmd(base64.b64encode(b"x" * 8000).decode())[0] == 535
        assert plain(endpoint, "BOB", "builder") == 235
        asking.join()
        wait_for(lambda: any((event["user"], event["good"]) == ("bob", True) for event in endpoint.events("login")))
        assert not any("temporarily rejected" in event["text"] for event in endpoint.events("warning"))
        assert plain(endpoint, "ill", "builder") == 454  # a temporary failure of Dovecot
        found: dict[str, int] = {}
        wrong = [
            threading.Thread(target=lambda pair=pair: found.__setitem__(pair[0], plain(endpoint, *pair)))
            for pair in (("bob", "wrong"), ("nobody", "x"))
        ]
        for thread in wrong:
            thread.start()
        for thread in wrong:
            thread.join()
        assert found == {"bob": 535, "nobody": 535}
        assert plain(endpoint, "bob", "builder") == 235
        assert plain(endpoint, "ann", SECRET) == 235  # in the accounts file
        dovecot.stop()
        unavailable = endpoint.metric('relaymta_logins_total{result="unavailable"}')
        assert plain(endpoint, "bob", "builder") == 454
        wait_for(lambda: endpoint.metric('relaymta_logins_total{result="unavailable"}') > unavailable)
        wait_for(lambda: any("logins are temporarily rejected (454)" in event["text"] for event in endpoint.events("warning")))
        assert plain(endpoint, "ann", SECRET) == 235
        dovecot.start()
        wait_for(lambda: plain(endpoint, "bob", "builder") == 235)


@pytest.mark.parametrize("kind", ["dovecot", "url"])  # tokens: test_a_token_active_by_introspection_is_accepted
def test_a_back_end_needs_no_accounts_file(tmp_path, kind, request):
    if kind == "dovecot":
        setting = f"accounts.dovecot={request.getfixturevalue('dovecot').socket}"
    else:
        setting = f"accounts.url={Web(lambda path, body: (200, {})).url}"
    with Endpoint(tmp_path, "127.0.0.1:1", 'accounts.file=""', setting) as endpoint:
        assert plain(endpoint, "bob", "builder") == 235
        with endpoint.client() as client:
            assert "SCRAM-SHA-256" not in client.esmtp_features["auth"]


class Raw:
    """Sends these octets to each request, piece by piece, then closes or (`reset`) resets the connection."""

    def __init__(self, pieces: list[bytes], reset: bool = False) -> None:
        self.pieces = pieces
        self.reset = reset
        self.asked = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        with contextlib.suppress(ConnectionError):
            for piece in self.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
        if self.reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()


@contextlib.asynccontextmanager
async def raw(pieces: list[bytes], reset: bool = False) -> AsyncIterator[tuple[Raw, str]]:
    made = Raw(pieces, reset)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    try:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/login"
    finally:
        server.close()


def http_answer(body: bytes, status: str = "200 OK", kind: str = "application/json", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode() + body


BODY = b'{"application": "crm", "senders": ["@Crm.example"]}'
CRM = Identity("ann", "crm", "", ("@crm.example",))
WHOLE = http_answer(BODY)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HUGE = b'{"application": "' + b"x" * LARGEST + b'"}'
HTTP_ANSWERS = [
    ("in one piece", [WHOLE], CRM),
    ("in two", [WHOLE[:-20], WHOLE[-20:]], CRM),
    ("octet by octet", [WHOLE[n : n + 1] for n in range(len(WHOLE))], CRM),
    ("chunked", [CHUNKED, b"5\r\n" + BODY[:5] + b"\r\n", b"%x\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n", b"0\r\n\r\n"], CRM),
    ("chunked, without its end", [CHUNKED, b"%x\r\n" % len(BODY) + BODY + b"\r\n"], Unavailable),
    ("up to the end of the connection", [b"HTTP/1.1 200 OK\r\n\r\n" + BODY[:9], BODY[9:]], CRM),
    ("shorter than its length", [http_answer(BODY[:-1], length=len(BODY))], Unavailable),
    ("large, in pieces", [http_answer(BODY + b" " * 500_000)], CRM),
    ("too large", [http_answer(HUGE)], Unavailable),
    ("too large, without a length", [b"HTTP/1.1 200 OK\r\n\r\n" + HUGE], Unavailable),
    ("another type", [http_answer(BODY, kind="text/plain")], CRM),
    ("an HTML page", [http_answer(b"<html>login</html>", kind="text/html")], Unavailable),
    ("an empty body", [http_answer(b"")], Identity("ann")),
    ("another name", [http_answer(b'{"user": "ann@corp.example"}')], Identity("ann@corp.example")),
    ("an invalid name", [http_answer(b'{"user": ["ann"]}')], Unavailable),
    ("a list", [http_answer(b"[]")], Unavailable),
    ("null", [http_answer(b"null")], Unavailable),
    ("deep", [http_answer(b"[" * 100_000)], Unavailable),
    ("no UTF-8", [http_answer(b'{"application": "\xff"}')], Unavailable),
    ("invalid senders", [http_answer(b'{"senders": "a@b"}')], Unavailable),
    ("an invalid priority", [http_answer(b'{"priority": []}')], Unavailable),
    ("no", [http_answer(b"", "401 Unauthorized")], None),
    ("no, with a long body", [http_answer(b"x" * 10_000, "403 Forbidden")], None),
    ("a redirect", [b"HTTP/1.1 302 Found\r\nLocation: /login\r\nContent-Length: 0\r\n\r\n"], Unavailable),
    ("no content", [b"HTTP/1.1 204 No Content\r\n\r\n"], Unavailable),
    ("an error", [http_answer(b"{}", "500 Internal Server Error")], Unavailable),
    ("too many", [http_answer(b"{}", "429 Too Many Requests")], Unavailable),
    ("no HTTP", [b"220 mail.example ESMTP\r\n"], Unavailable),
    ("no response", [], Unavailable),
]


@pytest.mark.parametrize(("pieces", "expected"), [row[1:] for row in HTTP_ANSWERS], ids=[row[0] for row in HTTP_ANSWERS])
async def test_responses_of_an_http_back_end(pieces, expected):
    async with raw(pieces) as (server, url):
        if expected is Unavailable:
            with pytest.raises(Unavailable):
                await Passwords(url).password("ann", "pw", "192.0.2.1")
        else:
            assert await Passwords(url).password("ann", "pw", "192.0.2.1") == expected
        assert server.asked == 1  # redirects are not followed


async def test_an_http_back_end_that_resets_or_is_silent_is_unavailable(monkeypatch):
    async with raw([WHOLE[:-5]], reset=True) as (_, url):
        with pytest.raises(Unavailable):
            await Passwords(url).password("ann", "pw", "192.0.2.1")
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    async with raw([WHOLE[:-5]] + [b""] * 1000) as (_, url):
        with pytest.raises(Unavailable, match="TimeoutError"):
            await Passwords(url).password("ann", "pw", "192.0.2.1")


def test_an_http_back_end_verifies_passwords_and_sets_senders_while_the_issuer_of_tokens_is_down(tmp_path):
    def answer(path: str, body: bytes) -> tuple[int, object]:
        asked = json.loads(body)
        assert set(asked) == {"user", "password", "client"} and asked["client"] == "127.0.0.1"
        if asked["user"] == "ill":
            return 500, {}
        return (200, {"application": "crm", "senders": ["@Crm.example"]}) if asked["password"] == "good" else (403, {})

    program, issuer = Web(answer), Issuer()
    issuer.web.close()
    tokens = f'accounts.tokens={{issuer="https://issuer.example", jwks="{issuer.web.url}"}}'
    with Endpoint(tmp_path, "127.0.0.1:1", f"accounts.url={program.url}", tokens) as endpoint:
        assert bearer(endpoint, "XOAUTH2", "cat@shop.example", issuer.token()) == 454
        assert plain(endpoint, "ann", SECRET) == 235
        assert [plain(endpoint, "crm", "bad"), plain(endpoint, "ill", "good"), plain(endpoint, "ann", SECRET)] == [535, 454, 235]
        for _ in range(2):
            with endpoint.client() as client:
                client.login("crm", "good")
                assert client.mail("x@elsewhere.example")[0] == 550
                client.sendmail("x@crm.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
        (event, _) = wait_for(lambda: len(found := endpoint.events("queued")) == 2 and found)
        assert event["application"] == "crm"
        assert len(program.asked) == 3  # the second login was remembered
        program.close()
        assert plain(endpoint, "crm", "bad") == 454


@functools.cache
def _first_key() -> RSAKey:
    return RSAKey.generate_key(2048, {"kid": "one"})


class Issuer:
    """Signs tokens and serves its keys."""

    def __init__(self) -> None:
        self.keys = [_first_key()]
        self.web = Web(lambda path, body: (200, {"keys": [key.as_dict(private=False) for key in self.keys]}))

    def token(self, key: int = -1, **claims: object) -> str:
        known = {"iss": "https://issuer.example", "aud": "relay", "email": "cat@shop.example", "exp": int(time.time()) + 600}
        one = self.keys[key]
        return jwt.encode({"alg": "RS256", "kid": one.kid}, known | claims, one)


def test_a_token_signed_by_its_issuer_is_accepted(tmp_path):
    issuer = Issuer()
    tokens = f'accounts.tokens={{issuer="https://issuer.example", audience="relay", jwks="{issuer.web.url}"}}'
    with Endpoint(tmp_path, "127.0.0.1:1", tokens) as endpoint:
        cat = "cat@shop.example"
        for mechanism in ("XOAUTH2", "OAUTHBEARER"):
            assert bearer(endpoint, mechanism, cat, issuer.token()) == 235, mechanism
            wrong = [
                issuer.token(exp=int(time.time()) - 600), issuer.token(aud="another"), issuer.token(iss="https://evil.example"),
                issuer.token(email=""), issuer.token()[:-6] + "AAAAAA", "nonsense", _unsigned(issuer.token()),
            ]  # fmt: skip
            assert [bearer(endpoint, mechanism, cat, token) for token in wrong] == [535] * len(wrong), mechanism
            assert bearer(endpoint, mechanism, "dog@shop.example", issuer.token()) == 535, mechanism  # a token for another user
            assert len(issuer.web.asked) == 1, mechanism
            assert bearer(endpoint, mechanism, cat, issuer.token()) == 235, mechanism
        with pytest.raises(smtplib.SMTPAuthenticationError), endpoint.client() as client:
            client.login(cat, issuer.token())  # a token is no password


def _unsigned(token: str) -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    return f"{head}.{token.split('.')[1]}."


NOW = int(time.time())
CLAIMS = [
    ({}, "cat@shop.example"),
    ({"email_verified": True}, "cat@shop.example"),
    ({"email_verified": "true"}, "cat@shop.example"),
    ({"email_verified": False}, ""),
    ({"email_verified": "false"}, ""),
    ({"email_verified": None}, ""),
    ({"email_verified": 0}, ""),
    ({"email": "cat\r\n250 ok"}, ""),
    ({"email": ["cat@shop.example"]}, ""),
    ({"aud": ["x", "relay"]}, "cat@shop.example"),
    ({"aud": {"relay": 1}}, ""),
    ({"nbf": NOW + 1000}, ""),
    ({"exp": str(NOW + 1000)}, ""),
    ({"exp": True}, ""),
]


@pytest.mark.parametrize(("claims", "user"), CLAIMS, ids=[f"{number} {''.join(row[0])}" for number, row in enumerate(CLAIMS)])
async def test_the_user_of_a_token(claims, user):
    issuer = Issuer()
    bearer = Bearer(TokensTable(issuer="https://issuer.example", audience="relay", jwks=issuer.web.url))
    assert await bearer.user(issuer.token(**claims)) == user
    issuer.web.close()
    said = {"active": True, "email": "cat@shop.example", "aud": "relay"} | claims
    introspection = Web(lambda path, body: (200, said))
    bearer = Bearer(TokensTable(audience="relay", introspection=introspection.url))
    if not {"exp", "nbf"} & set(claims):  # with introspection the issuer checks these
        assert await bearer.user("ticket") == user
    introspection.close()


def _part(found: object) -> str:
    octets = found if isinstance(found, bytes) else json.dumps(found).encode()
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


HEADERS = [
    {"crit": 5}, {"crit": ["b64"], "b64": False}, {"crit": [["x"]]}, {"crit": None}, {"crit": {"alg": 1}},
    {"kid": 5}, {"kid": ["one"]}, {"kid": {}}, {"alg": 5}, {"alg": ["RS256"]}, {"alg": "HS256"}, {"alg": "none"},
    {"alg": "ES256"}, {"b64": 1}, {"jwk": 5}, {"x5c": 5},
    b'{"alg":"RS256","kid":"one","crit":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"alg":' + b"9" * 5000 + b"}", b'{"alg":"\xff"}',
    b"[" * 5000, b"null", b"[1]", b'"x"', b"5", b"",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: str(header)[:40])
async def test_a_malformed_token_is_rejected(header):
    issuer = Issuer()
    bearer = Bearer(TokensTable(issuer="https://issuer.example", audience="relay", jwks=issuer.web.url))
    _, claims, signature = issuer.token().split(".")
    head = _part({"alg": "RS256", "kid": "one"} | header if isinstance(header, dict) else header)
    for token in (
        f"{head}.{claims}.{signature}",
        f"{head}.{_part(b'[' * 5000)}.{signature}",
        f"{head}..",
        head,
        f"{head}.a.b.c.d",
    ):
        assert await bearer.user(token) == ""
    issuer.web.close()


UNUSABLE = [
    {"kty": "EC", "crv": "P-999", "x": "AAAA", "y": "AAAA", "kid": "q"},
    {"kty": "OKP", "crv": "Ed999", "x": "AAAA", "kid": "q"},
    {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA", "kid": "q"},  # not on the curve
    {"kty": "ML-DSA", "kid": "q"},
    {"kty": "RSA", "n": "x", "e": "AQAB"},
    {"kty": "RSA", "kid": "q"},
    {"kty": "oct", "k": "AAAA", "kid": "q"},
    {"kty": 5},
    {},
    "key",
    None,
    5,
]


@pytest.mark.parametrize("key", UNUSABLE, ids=str)
async def test_an_unusable_key_does_not_affect_the_others(key):
    issuer = Issuer()
    good = issuer.keys[0].as_dict(private=False)
    for keys in ([key, good], [good, key], [key]):
        served = Web(lambda path, body, keys=keys: (200, {"keys": keys}))
        bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=served.url))
        if good in keys:
            assert await bearer.user(issuer.token()) == "cat@shop.example"
        else:
            with pytest.raises(Unavailable, match="no JWKS"):
                await bearer.user(issuer.token())
        served.close()
    issuer.web.close()


async def test_a_cancelled_key_request_does_not_affect_other_logins():
    issuer = Issuer()
    bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=issuer.web.url))
    asking = [asyncio.create_task(bearer.user(issuer.token())) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()  # the one that fetches the keys
    assert (await asyncio.gather(*asking, return_exceptions=True))[1:] == ["cat@shop.example"] * 2
    issuer.web.close()


async def test_new_keys_are_fetched_and_known_keys_outlive_the_issuer():
    issuer = Issuer()
    bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=issuer.web.url))
    assert await bearer.user(issuer.token()) == "cat@shop.example"
    issuer.keys.append(RSAKey.generate_key(2048, {"kid": "two"}))
    assert await bearer.user(issuer.token()) == ""  # fetched just now: clients cannot cause a fetch for each token
    bearer._fetched_at -= KEYS_AGAIN + 1
    assert await bearer.user(issuer.token()) == "cat@shop.example"
    assert len(issuer.web.asked) == 2
    issuer.web.close()
    bearer._fetched_at -= KEYS_KEPT + 1
    assert await bearer.user(issuer.token()) == "cat@shop.example"


async def test_a_broken_issuer_is_not_asked_for_each_login():
    issuer = Issuer()
    broken = Web(lambda path, body: (500, {}))
    bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=broken.url))
    for _ in range(3):
        with pytest.raises(Unavailable, match="status 500"):
            await bearer.user(issuer.token())
    assert len(broken.asked) == 1
    bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=issuer.web.url))
    assert await bearer.user(issuer.token()) == "cat@shop.example"
    bearer._settings = TokensTable(issuer="https://issuer.example", jwks=broken.url)
    bearer._fetched_at -= KEYS_KEPT + 1
    assert [await bearer.user(issuer.token()) for _ in range(3)] == ["cat@shop.example"] * 3
    assert len(broken.asked) == 2


def test_a_token_active_by_introspection_is_accepted(tmp_path):
    """And tokens need no accounts file: without it nobody can log in by a password."""

    def answer(path: str, body: bytes) -> tuple[int, object]:
        return 200, {"active": body == b"token=good", "email": "cat@shop.example", "aud": ["relay"]}

    program = Web(answer)
    (tmp_path / "secret").write_text("s3cret\n")
    tokens = (
        f'accounts.tokens={{introspection="{program.url}", audience="relay", client_id="relay", '
        f'client_secret_file="{tmp_path}/secret"}}'
    )
    with Endpoint(tmp_path, "127.0.0.1:1", tokens, 'accounts.file=""') as endpoint:
        with endpoint.client() as client:
            assert set(client.esmtp_features["auth"].split()) == {"XOAUTH2", "OAUTHBEARER"}
        assert bearer(endpoint, "OAUTHBEARER", "cat@shop.example", "good") == 235
        assert bearer(endpoint, "XOAUTH2", "cat@shop.example", "bad") == 535
        assert base64.b64decode(program.asked[0][2].split()[1]) == b"relay:s3cret"
