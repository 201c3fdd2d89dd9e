"""Smart hosts: balance and health, authentication and tokens, LMTP, BDAT, source addresses, rewriting, staging."""

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import scramp
import trustme

from relaymta.config import Config
from relaymta.log import Log
from relaymta.proto.envelope import QueueName
from relaymta.route.lookup import Answer
from relaymta.route.mx import NoRoute
from relaymta.route.sites import Sites
from relaymta.route.table import RouteTable
from relaymta.send.opener import Sources
from tests.support.daemon import Relay, free_port, wait_for
from tests.support.fake_mx import FakeMx
from tests.support.token_server import TokenServer

MESSAGE = "Subject: x\r\n\r\n.dot\r\n"


def test_balanced_hosts_share_the_load_by_weight(tmp_path):
    with FakeMx({}) as one, FakeMx({}) as two:
        hosts = f'hosts=["127.0.0.1:{one.port}","127.0.0.1:{two.port}"]'
        route = f'route=[{{name="two",{hosts},mode="balance",weights=[3,1],messages_per_connection=1}}]'
        with Relay(tmp_path, None, route) as relay:
            for _ in range(80):
                relay.send()
            wait_for(lambda: len(one.messages) + len(two.messages) == 80)
        assert len(one.messages) > len(two.messages) > 3


def test_a_smart_host_that_was_down_is_used_again_without_a_deferred_message(tmp_path):
    port = free_port()
    with FakeMx({}) as backup:
        route = f'route=[{{name="two",hosts=["127.0.0.1:{port}","127.0.0.1:{backup.port}"],messages_per_connection=1}}]'
        with Relay(tmp_path, None, route) as relay:
            relay.send()
            wait_for(lambda: len(backup.messages) == 1)
            wait_for(lambda: any("is down" in event["text"] for event in relay.events("warning")))

            def shown() -> bool:  # a site is forgotten a second after its last connection has ended
                relay.send()
                rows = relay.sites()
                return any(f"127.0.0.1:{port}" in host for row in rows for host in row["hosts down"])

            wait_for(shown)
            with FakeMx({}, port) as first:
                wait_for(lambda: any("can be reached again" in event["text"] for event in relay.events("warning")), 20)
                relay.send()
                wait_for(lambda: first.messages)
            assert relay.events("deferred") == []


def test_bdat_to_a_peer_that_offers_chunking(tmp_path):
    rules = {"EHLO": b"250-fake\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 8BITMIME\r\n"}
    with FakeMx(rules) as peer, Relay(tmp_path, f"127.0.0.1:{peer.port}") as relay:
        for _ in range(5):
            relay.send(MESSAGE)
        wait_for(lambda: len(peer.messages) == 5)
        assert peer.commands.count("BDAT") == 5 and "DATA" not in peer.commands
        assert all(data.endswith(b"\r\n\r\n.dot\r\n") for _, _, data in peer.messages)


def test_lmtp_over_a_unix_socket_with_a_reply_for_each_recipient(tmp_path):
    path = tmp_path / "lmtp"
    rules = {"DOT": [b"250 2.1.5 one\r\n", b"550 5.2.2 two is full\r\n", b"450 4.2.1 three is busy\r\n"]}
    with FakeMx(rules, path=str(path), lmtp=True) as peer:
        route = f'route=[{{name="boxes",hosts=["unix:{path}"],protocol="lmtp"}}]'
        with Relay(tmp_path, None, route, "delivery.first_retry=0.5") as relay:
            relay.send(MESSAGE, "", "one@d", "two@d", "three@d")
            wait_for(lambda: len(relay.events("delivered")) == 2)
            wait_for(lambda: [event["recipient"] for event in relay.events("bounced")] == ["two@d"])
            wait_for(lambda: [event["recipient"] for event in relay.events("deferred")] == ["three@d"])
            assert [to for _, to, _ in peer.messages] == [["one@d", "two@d", "three@d"], ["three@d"]]
            assert peer.commands[0] == "LHLO" and "EHLO" not in peer.commands


def test_the_sender_is_rewritten_for_a_route_but_not_the_null_sender(tmp_path):
    with FakeMx({}) as peer:
        route = f'route=[{{name="out",hosts=["127.0.0.1:{peer.port}"],rewrite_sender="@bounce.example"}}]'
        with Relay(tmp_path, None, route) as relay:
            relay.send(MESSAGE, "joe@corp.example")
            relay.send(MESSAGE, "")
            wait_for(lambda: len(peer.messages) == 2)
            assert sorted(sender for sender, _, _ in peer.messages) == ["", "joe@bounce.example"]


def test_staging_redirects_all_other_recipients(tmp_path):
    with FakeMx({}) as peer:
        settings = ('staging.redirect="qa@test.example"', 'staging.allow=["@ours.example"]')
        with Relay(tmp_path, f"127.0.0.1:{peer.port}", *settings) as relay:
            relay.send(
                "X-Staging: off\r\nSubject: x\r\n\r\nx\r\n", "a@b", "ceo@real.example", "cto@real.example", "me@ours.example"
            )
            wait_for(lambda: peer.messages)
            ((_, reached, data),) = peer.messages
            assert reached == ["qa@test.example", "me@ours.example"]
            assert b"X-Staging-Recipients: <ceo@real.example>,\r\n\t<cto@real.example>\r\n" in data


def test_mail_queued_before_staging_is_not_delivered(tmp_path):
    """Mail to real recipients that is queued when staging is switched on stays in the queue."""
    port = free_port()
    relay = Relay(tmp_path, f"127.0.0.1:{port}", "delivery.first_retry=0.3")
    with relay:
        relay.send(MESSAGE, "a@b", "ceo@real.example")
        wait_for(lambda: relay.events("deferred"))
        relay.stop()
        relay.settings += ('staging.redirect="qa@test.example"',)
        with FakeMx({}, port) as peer:
            relay.start()
            relay.send(MESSAGE, "a@b", "cto@real.example")
            wait_for(lambda: peer.messages)
            wait_for(lambda: any("staging" in event["reply"] for event in relay.events("deferred")))
            assert [to for _, to, _ in peer.messages] == [["qa@test.example"]]


def test_an_attempt_based_fallback_takes_over(tmp_path):
    with FakeMx({"RCPT": {"c@d.example": b"450 4.7.1 not from you\r\n"}}) as direct, FakeMx({}) as fallback:
        routes = (
            f'route=[{{name="fallback",min_attempts=1,hosts=["127.0.0.1:{fallback.port}"]}},'
            f'{{name="direct",hosts=["127.0.0.1:{direct.port}"]}}]'
        )
        with Relay(tmp_path, None, routes, "delivery.first_retry=0.3") as relay:
            relay.send(MESSAGE)
            wait_for(lambda: fallback.messages and relay.events("delivered"))
            assert [event["route"] for event in relay.events("deferred") + relay.events("delivered")] == ["direct", "fallback"]


def test_a_route_map_takes_precedence_and_its_errors_have_line_numbers(tmp_path):
    table = tmp_path / "map"
    with FakeMx({}) as one, FakeMx({}) as two:
        routes = f'route=[{{name="one",hosts=["127.0.0.1:{one.port}"]}},{{name="two",hosts=["127.0.0.1:{two.port}"]}}]'
        table.write_text("# routes\nvip@d.example two\n.sub.example two\n/^sales-/ two\n")
        with Relay(tmp_path, None, routes, f"route_map={table}") as relay:
            for to in ("vip@d.example", "x@a.sub.example", "sales-1@e.example", "x@d.example"):
                relay.send(MESSAGE, "a@b", to)
            wait_for(lambda: len(two.messages) == 3 and len(one.messages) == 1)
            assert one.messages[0][1] == ["x@d.example"]
        table.write_text("x@y three\nlonely\n/(/ one\n")
        with pytest.raises(AssertionError, match=r"map:1: there is no route 'three'(.|\n)*map:2: expected(.|\n)*map:3: /\(/"):
            Relay(tmp_path, None, routes, f"route_map={table}").start()


# Source addresses


class Quiet(Log):
    def __init__(self) -> None:
        pass

    def event(self, name: str, **fields: object) -> None:
        pass


class Directory(BaseHTTPRequestHandler):
    """An HTTP endpoint for route lookups: `answers` by domain, each (status, object, Cache-Control)."""

    def do_GET(self) -> None:
        query = parse_qs(self.path.partition("?")[2])
        self.server.asked.append((query["domain"][0], query.get("application", [""])[0]))  # type: ignore[attr-defined]
        status, found, control = self.server.answers.get(query["domain"][0], (404, {}, ""))  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Cache-Control", control)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def test_a_route_is_looked_up_by_http(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Directory)
    server.asked, server.answers = [], {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/route"
    with FakeMx({}) as one, FakeMx({}) as two:
        server.answers = {  # type: ignore[attr-defined]
            "one.example": (200, {"hosts": [f"127.0.0.1:{one.port}"]}, "max-age=300"),
            "two.example": (200, {"route": "two"}, "max-age=300"),
            "wrong.example": (200, {"hosts": []}, ""),
            "down.example": (503, {}, ""),
        }
        routes = f'route=[{{name="asked",lookup="{url}"}},{{name="two",hosts=["127.0.0.1:{two.port}"]}}]'
        with Relay(tmp_path, None, routes, "delivery.first_retry=1") as relay:
            for domain in ("one", "two", "one", "two"):
                relay.send(MESSAGE, "a@b.example", f"x@{domain}.example")
                wait_for(lambda: one.messages or two.messages)
            wait_for(lambda: (len(one.messages), len(two.messages)) == (2, 2))
            assert sorted(server.asked) == [("one.example", ""), ("two.example", "")], "asked once, then cached"  # type: ignore[attr-defined]
            relay.send(MESSAGE, "a@b.example", "x@wrong.example", "y@down.example")
            wait_for(lambda: len(relay.events("deferred")) >= 2)
            replies = " ".join(event["reply"] for event in relay.events("deferred"))
            assert f"4.4.3 look-up of wrong.example at {url}: from 1 to 20 hosts" in replies and "503" in replies
            server.answers["down.example"] = server.answers["one.example"]  # type: ignore[attr-defined]
            wait_for(lambda: len(one.messages) == 3)
    server.shutdown()


def test_a_header_field_chooses_the_route(tmp_path):
    with FakeMx({}) as bulk, FakeMx({}) as rest:
        routes = (
            f'route=[{{name="bulk",header=["X-Class: ^bulk$"],hosts=["127.0.0.1:{bulk.port}"]}},'
            f'{{name="rest",hosts=["127.0.0.1:{rest.port}"]}}]'
        )
        with Relay(tmp_path, None, routes) as relay:
            relay.send("Subject: x\r\nX-Class: bulk\r\n\r\nX-Class: bulk\r\n")
            relay.send("Subject: x\r\n\r\nX-Class: bulk\r\n")
            large = "Subject: x\r\nX-Class: bulk\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000
            relay.send(large)
            wait_for(lambda: (len(bulk.messages), len(rest.messages)) == (2, 1))
            tried = ("route", "test", "--to", "c@d", "--set", routes, "--header", "X-Class: bulk")
            assert "route bulk             yes" in relay.cli(*tried).stdout


def with_sources(*routes: list[str]) -> Config:
    table = [{"name": name, "address": "127.0.0.1", "weight": 2 if name == "c" else 1} for name in "abcd"]
    named = [{"name": str(number), "sources": names} for number, names in enumerate(routes)]
    return Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "source": table, "route": named})


def test_sources_share_by_weight_and_keep_their_mail_when_the_pool_changes():
    config = with_sources(list("abc"), list("abcd"))
    sources = Sources(config, Quiet())
    small, large = config.route
    keys = [f"s{n}@b\0d{n}.example" for n in range(4000)]
    before = [sources.choose(small, key).name for key in keys]
    assert before == [sources.choose(small, key).name for key in keys], "the same source at each attempt"
    assert 0.45 < Counter(before)["c"] / 4000 < 0.55
    after = [sources.choose(large, key).name for key in keys]
    moved = {now for was, now in zip(before, after, strict=True) if was != now}
    assert moved == {"d"}, "only keys of the new source move"
    assert 0.15 < Counter(after)["d"] / 4000 < 0.25


def test_mail_is_sent_from_its_source_with_its_name_and_a_missing_address_is_skipped(tmp_path):
    with FakeMx({}) as peer:
        table = 'source=[{name="a",address="127.0.0.5",hostname="a.example"},{name="gone",address="192.0.2.9"}]'
        route = f'route=[{{name="out",hosts=["127.0.0.1:{peer.port}"],sources=["a","gone"]}}]'
        with Relay(tmp_path, None, table, route) as relay:
            for number in range(10):
                relay.send(MESSAGE, f"s{number}@b")
            wait_for(lambda: len(peer.messages) == 10)
            assert set(peer.clients) == {"127.0.0.5"}
            assert set(peer.greetings) == {"a.example"}
            wait_for(lambda: any("gone (192.0.2.9)" in event["text"] for event in relay.events("warning")))


# Authentication


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path / "ca.pem")
    return made


def context(authority: trustme.CA) -> ssl.SSLContext:
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(found)
    return found


def logged_in(folder: Path, port: int, keys: str, *settings: str) -> Relay:
    route = f'route=[{{name="out",hosts=["localhost:{port}"],tls="verify",username="me",{keys}}}]'
    made = Relay(folder, None, route, "delivery.first_retry=0.5", *settings)
    made.environment = {"RELAY_PASSWORD": "pässword", "SSL_CERT_FILE": str(folder / "ca.pem")}
    return made


def challenge_response(mechanism: str):
    """The server side of a mechanism: `answer(line) -> reply` up to 235, and a dict: `right`, whether the login was correct."""
    found: dict[str, object] = {}
    factory = scramp.ScramMechanism("SCRAM-SHA-256")
    info = factory.make_auth_info("pässword", iteration_count=4096)
    server = factory.make_server(lambda user: info)
    steps = iter(range(9))

    def answer(line: bytes) -> bytes:
        step = next(steps)
        words = line.split()
        if mechanism == "CRAM-MD5":
            if step == 0:
                return b"334 " + base64.b64encode(b"<1@fake>") + b"\r\n"
            expected = hmac.new("pässword".encode(), b"<1@fake>", hashlib.md5).hexdigest()
            found["right"] = base64.b64decode(line) == b"me " + expected.encode()
        elif mechanism == "LOGIN":
            if step < 2 and len(words) < 3 and step == 0:
                return b"334 VXNlcm5hbWU6\r\n"
            found.setdefault("said", []).append(base64.b64decode(words[-1]))  # type: ignore[attr-defined]
            if len(found["said"]) < 2:  # type: ignore[arg-type]
                return b"334 UGFzc3dvcmQ6\r\n"
            found["right"] = found["said"] == [b"me", "pässword".encode()]
        else:
            if step == 0:
                server.set_client_first(base64.b64decode(words[2]).decode())
                return b"334 " + base64.b64encode(server.get_server_first().encode()) + b"\r\n"
            if step == 1:
                server.set_client_final(base64.b64decode(line).decode())
                return b"334 " + base64.b64encode(server.get_server_final().encode()) + b"\r\n"
            found["right"] = line == b"\r\n"
        return b"235 2.7.0 welcome\r\n"

    return answer, found


@pytest.mark.parametrize("mechanism", ["CRAM-MD5", "LOGIN", "SCRAM-SHA-256"])
def test_each_mechanism_logs_in(tmp_path, authority, mechanism):
    answer, found = challenge_response(mechanism)
    with FakeMx({}, tls=context(authority), auth=(mechanism.encode(), answer)) as peer:
        with logged_in(tmp_path, peer.port, f'password_env="RELAY_PASSWORD",auth="{mechanism.lower()}"') as relay:
            relay.send()
            wait_for(lambda: peer.messages)
    assert found["right"]


def test_a_mechanism_that_is_not_offered_defers_and_the_reply_lists_those_that_are(tmp_path, authority):
    with (
        FakeMx({}, tls=context(authority)) as peer,
        logged_in(tmp_path, peer.port, 'password_env="RELAY_PASSWORD",auth="scram-sha-256"') as relay,
    ):
        relay.send()
        (deferred, *_) = wait_for(lambda: relay.events("deferred"))
        assert deferred["phase"] == "auth" and "offers AUTH PLAIN LOGIN" in deferred["reply"]


class TokenEndpoint(TokenServer):
    """An OAuth 2.0 token endpoint: tokens t1, t2, ... that are valid for `seconds`."""

    def __init__(self, seconds: int = 3600, rotates: bool = False) -> None:
        self.asked: list[dict[str, list[str]]] = []
        self.status = 200
        self._seconds, self._rotates = seconds, rotates
        super().__init__()

    def answer(self, form: dict[str, list[str]]) -> tuple[int, dict[str, object]]:
        self.asked.append(form)
        time.sleep(0.2)
        answer = {"access_token": f"t{len(self.asked)}", "token_type": "Bearer", "expires_in": self._seconds}
        if self._rotates:
            answer["refresh_token"] = f"r{len(self.asked) + 1}"
        return self.status, answer if self.status == 200 else {"error": "invalid_grant"}


@pytest.fixture
def endpoint() -> Iterator[TokenEndpoint]:
    made = TokenEndpoint()
    yield made
    made.server.shutdown()


def oauth(endpoint: TokenEndpoint, folder: Path, auth: str = "auto") -> str:
    (folder / "refresh").write_text("r1\n")
    keys = f'token_url="{endpoint.url}",client_id="app",refresh_token_file="{folder}/refresh",scope="smtp"'
    return f'auth="{auth}",oauth={{{keys}}}'


@pytest.mark.parametrize("auth", ["xoauth2", "oauthbearer"])
def test_a_token_is_fetched_once_for_all_connections_and_again_when_it_is_rejected(tmp_path, authority, endpoint, auth):
    seen: list[bytes] = []
    good = [b"Bearer t1"]

    def answer(line: bytes) -> bytes:
        words = line.split()
        if len(words) < 3:
            return b"535 5.7.8 bad token\r\n"
        seen.append(base64.b64decode(words[2]))
        return b"235 2.7.0 welcome\r\n" if good[0] in seen[-1] else b"334 eyJzdGF0dXMiOiI0MDEifQ==\r\n"

    with FakeMx({}, tls=context(authority), auth=(auth.upper().encode(), answer)) as peer:
        with logged_in(tmp_path, peer.port, oauth(endpoint, tmp_path, auth), "delivery.idle=0.2") as relay:
            for _ in range(10):
                relay.send()
            wait_for(lambda: len(peer.messages) == 10)
            assert len(endpoint.asked) == 1
            assert endpoint.asked[0]["grant_type"] == ["refresh_token"] and endpoint.asked[0]["refresh_token"] == ["r1"]
            start = b"user=me\1" if auth == "xoauth2" else b"n,a=me,\1"
            assert all(said == start + b"auth=Bearer t1\1\1" for said in seen)
            good[0] = b"Bearer t2"  # t1 is revoked before it expires
            wait_for(lambda: peer.now_open == 0, 20)  # uvloop would wait 30 s for the peer to close TLS
            relay.send()
            wait_for(lambda: len(peer.messages) == 11)
            assert len(endpoint.asked) == 2 and relay.events("deferred") == []


def test_a_rotated_refresh_token_is_kept_across_a_restart_until_the_file_has_another(tmp_path, authority):
    endpoint = TokenEndpoint(rotates=True)
    answer = lambda line: b"235 2.7.0 welcome\r\n"  # noqa: E731
    with FakeMx({}, tls=context(authority), auth=(b"XOAUTH2", answer)) as peer:
        with logged_in(tmp_path, peer.port, oauth(endpoint, tmp_path)) as relay:
            relay.send()
            wait_for(lambda: len(peer.messages) == 1)
            for wanted, given in (("r2", "r1"), ("r3", "r1"), ("other", "other")):
                relay.stop()
                (tmp_path / "refresh").write_text(given)
                relay.start()
                before = len(peer.messages)
                relay.send()
                wait_for(lambda before=before: len(peer.messages) > before)
                assert endpoint.asked[-1]["refresh_token"] == [wanted]
            assert "r2" not in relay.cli("shaping", "active", "--json").stdout
    endpoint.server.shutdown()


def test_a_token_that_expires_while_mail_is_queued_is_refreshed_once(tmp_path, authority):
    endpoint = TokenEndpoint(seconds=4)  # so that it is refreshed after two
    answer = lambda line: b"235 2.7.0 welcome\r\n"  # noqa: E731
    with FakeMx({}, tls=context(authority), auth=(b"XOAUTH2", answer), slow=0.05) as peer:
        with logged_in(tmp_path, peer.port, oauth(endpoint, tmp_path) + ",messages_per_connection=1") as relay:
            began = time.monotonic()
            for _ in range(30):
                relay.send()
                time.sleep(0.1)
            wait_for(lambda: len(peer.messages) == 30)
            assert 2 <= len(endpoint.asked) <= 1 + (time.monotonic() - began) / 2
            assert relay.events("deferred") == []
    endpoint.server.shutdown()


def test_a_failing_token_endpoint_defers_with_its_reason(tmp_path, authority, endpoint):
    endpoint.status = 400
    with FakeMx({}, tls=context(authority), auth=(b"XOAUTH2", lambda line: b"235 ok\r\n")) as peer:
        with logged_in(tmp_path, peer.port, oauth(endpoint, tmp_path), "delivery.first_retry=30") as relay:
            relay.send()
            (deferred, *_) = wait_for(lambda: relay.events("deferred"))
            assert deferred["phase"] == "auth" and "token endpoint" in deferred["reply"] and "invalid_grant" in deferred["reply"]
            (ident,) = [event["id"] for event in relay.events("queued")]
            assert "token endpoint" in relay.cli("message", "explain", ident).stdout


LOGIN = {"tls": "verify", "username": "me", "password_env": "X"}
TOKENS = {"client_id": "y"}


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        ({"hosts": ["h"], "oauth": TOKENS | {"token_url": "https://x.example/t"}}, "oauth: needs username"),
        ({"hosts": ["h"], **LOGIN, "oauth": TOKENS | {"token_url": "http://x.example/t"}}, "would go over plain http"),
        (
            {"hosts": ["h"], **LOGIN, "oauth": TOKENS | {"token_url": "http://127.0.0.1@x.example/t"}},
            "would go over plain http",
        ),
        ({"hosts": ["h"], **LOGIN, "oauth": TOKENS | {"token_url": "http://127.0.0.1/t"}}, ""),
        ({"hosts": ["h"], **LOGIN, "oauth": TOKENS | {"token_url": "http://localhost:80/t"}}, ""),
        (LOGIN, "username: needs hosts"),  # or the MX hosts of every domain would get them
        ({"lookup": "https://x.example/r", **LOGIN}, "needs an https:// or loopback URL, and lookup_hosts"),
        ({"lookup": "http://x.example/r", "lookup_hosts": [".x.example"], **LOGIN}, "needs an https:// or loopback URL"),
        ({"lookup": "http://localhost.x.example/r", "lookup_hosts": ["h"], **LOGIN}, "needs an https:// or loopback URL"),
        ({"lookup": "http://127.0.0.1.x.example/r", "lookup_hosts": ["h"], **LOGIN}, "needs an https:// or loopback URL"),
        ({"lookup": "http://[::1]:80/r", "lookup_hosts": [".x.example"], **LOGIN}, ""),
        ({"lookup": "https://x.example/r", "lookup_hosts": ["h"], **LOGIN}, ""),
        ({"lookup": "http://x.example/r"}, ""),
    ],
)
def test_credentials_are_sent_only_protected_and_to_listed_hosts(route, problem):
    config = {"listener": [{"address": "127.0.0.1:1"}], "route": [route]}
    if problem:
        with pytest.raises(ValueError, match=problem):
            Config.model_validate(config)
    else:
        Config.model_validate(config)


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ({"hosts": ["mx.x.example:587"]}, True),
        ({"hosts": ["MX.X.example."]}, True),
        ({"hosts": ["x.example.evil.example"]}, False),
        ({"hosts": ["mx.x.example", "evil.example"]}, False),
        ({"hosts": ["127.0.0.1:25"]}, False),
        ({}, False),  # 404: not to the MX either
    ],
)
def test_a_lookup_may_not_return_a_host_that_must_not_get_credentials(answer, allowed, monkeypatch):
    asked = Answer(tuple(answer.get("hosts", ())), "", 60.0)

    async def ask(url: str, domain: str, application: str) -> Answer:
        return asked

    monkeypatch.setattr("relaymta.route.sites.ask", ask)
    route = {"name": "r", "lookup": "https://x.example/r", "lookup_hosts": [".x.example"], **LOGIN}
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "route": [route]})
    sites = Sites(RouteTable(config), None, set(), lambda: 0.0)  # type: ignore[arg-type]
    name = QueueName("r", "d.example")
    if allowed:
        assert asyncio.run(sites.find(name)).names == list(asked.hosts)
        return
    with pytest.raises(NoRoute) as failure:
        asyncio.run(sites.find(name))
    assert not failure.value.permanent and "d.example" in failure.value.public and "x.example/r" not in failure.value.public


def test_the_hosts_that_lookups_return_are_not_kept_for_ever(monkeypatch):
    async def ask(url: str, domain: str, application: str) -> Answer:
        return Answer((f"mx.{domain}",), "", 60.0)

    monkeypatch.setattr("relaymta.route.sites.ask", ask)
    monkeypatch.setattr("relaymta.route.sites.KEPT_GIVEN", 5)
    route = {"name": "r", "lookup": "https://x.example/r"}
    config = Config.model_validate({"listener": [{"address": "127.0.0.1:1"}], "route": [route]})
    sites = Sites(RouteTable(config), None, set(), lambda: 0.0)  # type: ignore[arg-type]
    for number in range(30):
        assert asyncio.run(sites.find(QueueName("r", f"d{number}.example"))).names == [f"mx.d{number}.example"]
    assert len(sites._given) <= 5
