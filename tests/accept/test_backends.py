"""Accounts that others keep: a real Dovecot, a program asked by HTTP, tokens by JWKS and by introspection."""

import base64
import http.server
import json
import os
import signal
import smtplib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from relaymta.accept.identity import Unavailable
from relaymta.accept.web import KEYS_AGAIN, KEYS_KEPT, Bearer
from relaymta.config import TokensTable
from tests.accept.test_front_door import SECRET, Door
from tests.support.daemon import wait_for
from tests.support.programs import need


class Web:
    """An HTTP server that answers as `answer(path, body)` says: status and object; it remembers what it was asked."""

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
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def plain(door: Door, user: str, password: str) -> int:
    with door.client() as client:
        return client.docmd("AUTH", "PLAIN " + base64.b64encode(f"\0{user}\0{password}".encode()).decode())[0]


def bearer(door: Door, mechanism: str, user: str, token: str) -> int:
    text = f"user={user}\1auth=Bearer {token}\1\1" if mechanism == "XOAUTH2" else f"n,a={user},\1auth=Bearer {token}\1\1"
    with door.client() as client:
        assert mechanism in client.esmtp_features["auth"].split()
        code, said = client.docmd("AUTH", f"{mechanism} {base64.b64encode(text.encode()).decode()}")
        if code == 334:
            assert json.loads(base64.b64decode(said))["status"] == "invalid_token"
            code, _ = client.docmd("AQ==")
        return code


class Dovecot:
    """A real one that does nothing but authenticate, as the user who runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "users").write_text("bob:{PLAIN}builder::::::\n")
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
userdb {{
  driver = static
  args = uid=0 gid=0 home=/tmp
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
        os.killpg(self.process.pid, signal.SIGKILL)  # its auth process would go on as long as somebody is connected
        self.process.wait()


@pytest.fixture
def dovecot(tmp_path: Path) -> Iterator[Dovecot]:
    need("dovecot")
    if os.geteuid():
        pytest.skip("this Dovecot's configuration is root's")
    made = Dovecot(tmp_path / "dovecot")
    yield made
    made.stop()


def test_dovecot_knows_the_passwords_of_others(dovecot, tmp_path):
    with Door(tmp_path, "127.0.0.1:1", f"accounts.dovecot={dovecot.socket}", "accounts.remember=0") as door:
        assert [plain(door, "bob", "builder"), plain(door, "bob", "wrong"), plain(door, "nobody", "x")] == [235, 535, 535]
        assert plain(door, "ann", SECRET) == 235  # ours
        dovecot.stop()
        assert plain(door, "bob", "builder") == 454
        assert door.metric('relaymta_logins_total{result="unavailable"}') >= 1
        wait_for(lambda: any("logins are put off (454)" in event["text"] for event in door.events("warning")))
        assert plain(door, "ann", SECRET) == 235
        dovecot.start()
        wait_for(lambda: plain(door, "bob", "builder") == 235)


def test_a_program_is_asked_by_http_and_says_who_may_send_what(tmp_path):
    def answer(path: str, body: bytes) -> tuple[int, object]:
        asked = json.loads(body)
        assert set(asked) == {"user", "password", "client"} and asked["client"] == "127.0.0.1"
        if asked["user"] == "ill":
            return 500, {}
        return (200, {"application": "crm", "senders": ["@Crm.example"]}) if asked["password"] == "good" else (403, {})

    web = Web(answer)
    with Door(tmp_path, "127.0.0.1:1", f"accounts.url={web.url}") as door:
        assert [plain(door, "crm", "bad"), plain(door, "ill", "good"), plain(door, "ann", SECRET)] == [535, 454, 235]
        for _ in range(2):
            with door.client() as client:
                client.login("crm", "good")
                assert client.mail("x@elsewhere.example")[0] == 550
                client.sendmail("x@crm.example", ["c@d.example"], "Subject: x\r\n\r\nx\r\n")
        (event, _) = wait_for(lambda: len(found := door.events("queued")) == 2 and found)
        assert event["application"] == "crm"
        assert len(web.asked) == 3  # the second time it was remembered
        web.close()
        assert plain(door, "crm", "bad") == 454


class Issuer:
    """Signs tokens, and serves its keys."""

    def __init__(self) -> None:
        self.keys = [RSAKey.generate_key(2048, {"kid": "one"})]
        self.web = Web(lambda path, body: (200, {"keys": [key.as_dict(private=False) for key in self.keys]}))

    def token(self, key: int = -1, **claims: object) -> str:
        known = {"iss": "https://issuer.example", "aud": "relay", "email": "cat@shop.example", "exp": int(time.time()) + 600}
        one = self.keys[key]
        return jwt.encode({"alg": "RS256", "kid": one.kid}, known | claims, one)


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
def test_a_token_is_a_login_when_its_issuer_signed_it(tmp_path, mechanism):
    issuer = Issuer()
    tokens = f'accounts.tokens={{issuer="https://issuer.example", audience="relay", jwks="{issuer.web.url}"}}'
    with Door(tmp_path, "127.0.0.1:1", tokens, "accounts.failures=100") as door:
        cat = "cat@shop.example"
        assert bearer(door, mechanism, cat, issuer.token()) == 235
        wrong = [
            issuer.token(exp=int(time.time()) - 600), issuer.token(aud="another"), issuer.token(iss="https://evil.example"),
            issuer.token(email=""), issuer.token()[:-6] + "AAAAAA", "nonsense", _unsigned(issuer.token()),
        ]  # fmt: skip
        assert [bearer(door, mechanism, cat, token) for token in wrong] == [535] * len(wrong)
        assert bearer(door, mechanism, "dog@shop.example", issuer.token()) == 535  # another's
        assert len(issuer.web.asked) == 1
        assert bearer(door, mechanism, cat, issuer.token()) == 235


def _unsigned(token: str) -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    return f"{head}.{token.split('.')[1]}."


async def test_a_new_key_of_the_issuer_is_found_and_known_ones_outlive_it():
    issuer = Issuer()
    bearer = Bearer(TokensTable(issuer="https://issuer.example", jwks=issuer.web.url))
    assert await bearer.user(issuer.token()) == "cat@shop.example"
    issuer.keys.append(RSAKey.generate_key(2048, {"kid": "two"}))
    assert await bearer.user(issuer.token()) == ""  # asked for just now: strangers cannot make us ask again and again
    bearer._asked_at -= KEYS_AGAIN + 1
    assert await bearer.user(issuer.token()) == "cat@shop.example"
    assert len(issuer.web.asked) == 2
    issuer.web.close()
    bearer._asked_at -= KEYS_KEPT + 1
    assert await bearer.user(issuer.token()) == "cat@shop.example"


def test_a_dead_issuer_puts_logins_off(tmp_path):
    issuer = Issuer()
    issuer.web.close()
    tokens = f'accounts.tokens={{issuer="https://issuer.example", jwks="{issuer.web.url}"}}'
    with Door(tmp_path, "127.0.0.1:1", tokens) as door:
        assert bearer(door, "XOAUTH2", "cat@shop.example", issuer.token()) == 454
        assert plain(door, "ann", SECRET) == 235


async def test_a_broken_issuer_is_not_asked_again_and_again():
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
    bearer._asked_at -= KEYS_KEPT + 1
    assert [await bearer.user(issuer.token()) for _ in range(3)] == ["cat@shop.example"] * 3
    assert len(broken.asked) == 2


def test_a_token_is_a_login_when_the_issuer_says_that_it_is_active(tmp_path):
    def answer(path: str, body: bytes) -> tuple[int, object]:
        return 200, {"active": body == b"token=good", "email": "cat@shop.example", "aud": ["relay"]}

    web = Web(answer)
    (tmp_path / "secret").write_text("s3cret\n")
    tokens = (
        f'accounts.tokens={{introspection="{web.url}", audience="relay", client_id="relay", '
        f'client_secret_file="{tmp_path}/secret"}}'
    )
    with Door(tmp_path, "127.0.0.1:1", tokens) as door:
        assert bearer(door, "OAUTHBEARER", "cat@shop.example", "good") == 235
        assert bearer(door, "XOAUTH2", "cat@shop.example", "bad") == 535
        assert base64.b64decode(web.asked[0][2].split()[1]) == b"relay:s3cret"
        with pytest.raises(smtplib.SMTPAuthenticationError):
            with door.client() as client:
                client.login("cat@shop.example", "good")  # a token is no password
