"""Smart hosts: balance and health, authentication and tokens, LMTP, BDAT, source addresses, rewriting, staging."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import pytest
import scramp

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
from tests.support.routed import Routed, server_context
from tests.support.token_server import TokenServer

MESSAGE = "Subject: x\r\n\r\n.dot\r\n"
MECHANISMS = ["cram-md5", "login", "scram-sha-256"]


def oauth(url: str, folder: str, auth: str = "auto") -> str:
    keys = f'token_url="{url}",client_id="app",refresh_token_file="{folder}/refresh",scope="smtp"'
    return f'auth="{auth}",oauth={{{keys}}}'


LOGIN = 'tls="verify",username="me"'
PASSWORD = f'{LOGIN},password_env="RELAY_PASSWORD"'
# The routes of the tests that share a relay: name, recipient domain, and keys. $NAME is a free port, or a token endpoint.
ROUTES = [
    (
        "balance", "balance.test",
        'hosts=["127.0.0.1:$balance_one","127.0.0.1:$balance_two"],mode="balance",weights=[3,1],messages_per_connection=1',
    ),
    (
        "backup", "backup.test",
        'hosts=["127.0.0.1:$backup_first","127.0.0.1:$backup_second"],messages_per_connection=1',
    ),
    ("bdat", "bdat.test", 'hosts=["127.0.0.1:$bdat"]'),
    ("boxes", "boxes.test", 'hosts=["unix:$folder/lmtp"],protocol="lmtp"'),
    ("rewrite", "rewrite.test", 'hosts=["127.0.0.1:$rewrite"],rewrite_sender="@bounce.example"'),
    ("fallback", "fallback.test", 'min_attempts=1,hosts=["127.0.0.1:$fallback"]'),
    ("direct", "fallback.test", 'hosts=["127.0.0.1:$direct"]'),
    ("asked", ".asked.test", 'lookup="http://127.0.0.1:$directory/route"'),
    ("named", "nobody.test", 'hosts=["127.0.0.1:$named"]'),
    ("bulk", "header.test", 'header=["X-Class: ^bulk$$"],hosts=["127.0.0.1:$bulk"]'),
    ("rest", "header.test", 'hosts=["127.0.0.1:$rest"]'),
    ("sources", "sources.test", 'hosts=["127.0.0.1:$sources"],sources=["a","gone"]'),
    *(
        (f"login-{name}", f"login-{name}.test", f'hosts=["localhost:$login_{number}"],{PASSWORD},auth="{name}"')
        for number, name in enumerate(MECHANISMS)
    ),
    ("not-offered", "not-offered.test", f'hosts=["localhost:$not_offered"],{PASSWORD},auth="scram-sha-256"'),
    *(
        (name, f"{name}.test", f'hosts=["localhost:${name}"],{LOGIN},{oauth(f"${name}_url", "$folder", name)}')
        for name in ("xoauth2", "oauthbearer")
    ),
    (
        "expires", "expires.test",
        f'hosts=["localhost:$expires"],{LOGIN},{oauth("$expires_url", "$folder")},messages_per_connection=1',
    ),
    ("failing", "failing.test", f'hosts=["localhost:$failing"],{LOGIN},{oauth("$failing_url", "$folder")}'),
]  # fmt: skip


@pytest.fixture(scope="module")
def endpoints() -> Iterator[dict[str, "TokenEndpoint"]]:
    """The token endpoint of each route that has one."""
    made = {name: TokenEndpoint() for name in ("xoauth2", "oauthbearer", "failing")}
    made["expires"] = TokenEndpoint(seconds=4)  # so that it is refreshed after two
    yield made
    for endpoint in made.values():
        endpoint.server.shutdown()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, endpoints: dict[str, "TokenEndpoint"]) -> Iterator[Routed]:
    """The relay with ROUTES."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "refresh").write_text("r1\n")
    urls = {f"{name}_url": endpoint.url for name, endpoint in endpoints.items()}
    table = 'source=[{name="a",address="127.0.0.5",hostname="a.example"},{name="gone",address="192.0.2.9"}]'
    made = Routed(folder, ROUTES, table, "delivery.first_retry=0.5", "delivery.idle=0.2", **urls)
    made.environment["RELAY_PASSWORD"] = "pässword"
    with made:
        yield made


def test_balanced_hosts_share_the_load_by_weight(shared):
    with FakeMx({}, shared.port_of("balance_one")) as one, FakeMx({}, shared.port_of("balance_two")) as two:
        shared.send_all(80, MESSAGE, "c@balance.test")
        wait_for(lambda: len(one.messages) + len(two.messages) == 80)
        assert len(one.messages) > len(two.messages) > 3


def test_a_smart_host_that_was_down_is_used_again_without_a_deferred_message(shared):
    port = shared.port_of("backup_first")

    def warned(text: str) -> bool:
        return any(f"smart host 127.0.0.1:{port} {text}" in event["text"] for event in shared.events("warning"))

    with FakeMx({}, shared.port_of("backup_second")) as backup:
        shared.send(MESSAGE, "a@b.example", "c@backup.test")
        wait_for(lambda: len(backup.messages) == 1)
        wait_for(lambda: warned("is down"))

        def shown() -> bool:  # a site is forgotten a second after its last connection has ended
            shared.send(MESSAGE, "a@b.example", "c@backup.test")
            return any(f"127.0.0.1:{port}" in host for row in shared.sites() for host in row["hosts down"])

        wait_for(shown)
        with FakeMx({}, port) as first:
            wait_for(lambda: warned("can be reached again"), 20)
            shared.send(MESSAGE, "a@b.example", "c@backup.test")
            wait_for(lambda: first.messages)
        assert shared.of("deferred", "backup") == []


def test_bdat_to_a_peer_that_offers_chunking(shared):
    rules = {"EHLO": b"250-fake\r\n250-PIPELINING\r\n250-CHUNKING\r\n250 8BITMIME\r\n"}
    with FakeMx(rules, shared.port_of("bdat")) as peer:
        for _ in range(5):
            shared.send(MESSAGE, "a@b.example", "c@bdat.test")
        wait_for(lambda: len(peer.messages) == 5)
        assert peer.commands.count("BDAT") == 5 and "DATA" not in peer.commands
        assert all(data.endswith(b"\r\n\r\n.dot\r\n") for _, _, data in peer.messages)


def test_lmtp_over_a_unix_socket_with_a_reply_for_each_recipient(shared):
    rules = {"DOT": [b"250 2.1.5 one\r\n", b"550 5.2.2 two is full\r\n", b"450 4.2.1 three is busy\r\n"]}
    one, two, three = (f"{name}@boxes.test" for name in ("one", "two", "three"))
    with FakeMx(rules, path=str(shared.folder / "lmtp"), lmtp=True) as peer:
        shared.send(MESSAGE, "", one, two, three)
        wait_for(lambda: len(shared.of("delivered", "boxes")) == 2)
        wait_for(lambda: [event["recipient"] for event in shared.of("bounced", "boxes")] == [two])
        wait_for(lambda: [event["recipient"] for event in shared.of("deferred", "boxes")] == [three])
        assert [to for _, to, _ in peer.messages] == [[one, two, three], [three]]
        assert peer.commands[0] == "LHLO" and "EHLO" not in peer.commands


def test_the_sender_is_rewritten_for_a_route_but_not_the_null_sender(shared):
    with FakeMx({}, shared.port_of("rewrite")) as peer:
        shared.send(MESSAGE, "joe@corp.example", "c@rewrite.test")
        shared.send(MESSAGE, "", "c@rewrite.test")
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


def test_an_attempt_based_fallback_takes_over(shared):
    rules = {"RCPT": {"c@fallback.test": b"450 4.7.1 not from you\r\n"}}
    with FakeMx(rules, shared.port_of("direct")), FakeMx({}, shared.port_of("fallback")) as fallback:
        shared.send(MESSAGE, "a@b.example", "c@fallback.test")
        wait_for(lambda: fallback.messages and shared.of("delivered", "direct", "fallback"))
        ends = [event for name in ("deferred", "delivered") for event in shared.of(name, "direct", "fallback")]
        assert [event["route"] for event in ends] == ["direct", "fallback"]


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


def test_a_route_is_looked_up_by_http(shared):
    server = ThreadingHTTPServer(("127.0.0.1", shared.port_of("directory")), Directory)
    server.asked, server.answers = [], {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/route"
    with FakeMx({}) as one, FakeMx({}, shared.port_of("named")) as two:
        server.answers = {  # type: ignore[attr-defined]
            "one.asked.test": (200, {"hosts": [f"127.0.0.1:{one.port}"]}, "max-age=300"),
            "two.asked.test": (200, {"route": "named"}, "max-age=300"),
            "wrong.asked.test": (200, {"hosts": []}, ""),
            "down.asked.test": (503, {}, ""),
        }
        for domain in ("one", "two", "one", "two"):
            shared.send(MESSAGE, "a@b.example", f"x@{domain}.asked.test")
            wait_for(lambda: one.messages or two.messages)
        wait_for(lambda: (len(one.messages), len(two.messages)) == (2, 2))
        assert sorted(server.asked) == [("one.asked.test", ""), ("two.asked.test", "")], "asked once, then cached"  # type: ignore[attr-defined]
        shared.send(MESSAGE, "a@b.example", "x@wrong.asked.test", "y@down.asked.test")

        def deferred(recipient: str) -> list[str]:
            return [event["reply"] for event in shared.of("deferred", "asked") if event["recipient"] == recipient]

        wait_for(lambda: deferred("x@wrong.asked.test") and deferred("y@down.asked.test"))
        assert f"4.4.3 look-up of wrong.asked.test at {url}: from 1 to 20 hosts" in deferred("x@wrong.asked.test")[0]
        assert "503" in deferred("y@down.asked.test")[0]
        server.answers["down.asked.test"] = server.answers["one.asked.test"]  # type: ignore[attr-defined]
        wait_for(lambda: len(one.messages) == 3)
    server.shutdown()


def test_a_header_field_chooses_the_route(shared):
    with FakeMx({}, shared.port_of("bulk")) as bulk, FakeMx({}, shared.port_of("rest")) as rest:
        large = "Subject: x\r\nX-Class: bulk\r\n\r\n" + ("x" * 70 + "\r\n") * 30_000
        for text in ("Subject: x\r\nX-Class: bulk\r\n\r\nX-Class: bulk\r\n", "Subject: x\r\n\r\nX-Class: bulk\r\n", large):
            shared.send(text, "a@b.example", "c@header.test")
        wait_for(lambda: (len(bulk.messages), len(rest.messages)) == (2, 1))
    routes = 'route=[{name="bulk",header=["X-Class: ^bulk$"],hosts=["h"]},{name="rest",hosts=["h"]}]'
    tried = ("route", "test", "--to", "c@d", "--set", routes, "--header", "X-Class: bulk")
    assert "route bulk             yes" in shared.cli(*tried).stdout


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


def test_mail_is_sent_from_its_source_with_its_name_and_a_missing_address_is_skipped(shared):
    with FakeMx({}, shared.port_of("sources")) as peer:
        for number in range(10):
            shared.send(MESSAGE, f"s{number}@b", "c@sources.test")
        wait_for(lambda: len(peer.messages) == 10)
        assert set(peer.clients) == {"127.0.0.5"}
        assert set(peer.greetings) == {"a.example"}
        wait_for(lambda: any("gone (192.0.2.9)" in event["text"] for event in shared.events("warning")))


# Authentication


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


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_each_mechanism_logs_in(shared, mechanism):
    answer, found = challenge_response(mechanism.upper())
    port = shared.port_of(f"login_{MECHANISMS.index(mechanism)}")
    with FakeMx({}, port, tls=server_context(shared.authority), auth=(mechanism.upper().encode(), answer)) as peer:
        shared.send(MESSAGE, "a@b.example", f"c@login-{mechanism}.test")
        wait_for(lambda: peer.messages)
    assert found["right"]


def test_a_mechanism_that_is_not_offered_defers_and_the_reply_lists_those_that_are(shared):
    with FakeMx({}, shared.port_of("not_offered"), tls=server_context(shared.authority)):
        shared.send(MESSAGE, "a@b.example", "c@not-offered.test")
        (deferred, *_) = wait_for(lambda: shared.of("deferred", "not-offered"))
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


@pytest.mark.parametrize("auth", ["xoauth2", "oauthbearer"])
def test_a_token_is_fetched_once_for_all_connections_and_again_when_it_is_rejected(shared, endpoints, auth):
    seen: list[bytes] = []
    good = [b"Bearer t1"]
    endpoint = endpoints[auth]

    def answer(line: bytes) -> bytes:
        words = line.split()
        if len(words) < 3:
            return b"535 5.7.8 bad token\r\n"
        seen.append(base64.b64decode(words[2]))
        return b"235 2.7.0 welcome\r\n" if good[0] in seen[-1] else b"334 eyJzdGF0dXMiOiI0MDEifQ==\r\n"

    with FakeMx({}, shared.port_of(auth), tls=server_context(shared.authority), auth=(auth.upper().encode(), answer)) as peer:
        for _ in range(10):
            shared.send(MESSAGE, "a@b.example", f"c@{auth}.test")
        wait_for(lambda: len(peer.messages) == 10)
        assert len(endpoint.asked) == 1
        assert endpoint.asked[0]["grant_type"] == ["refresh_token"] and endpoint.asked[0]["refresh_token"] == ["r1"]
        start = b"user=me\1" if auth == "xoauth2" else b"n,a=me,\1"
        assert all(said == start + b"auth=Bearer t1\1\1" for said in seen)
        good[0] = b"Bearer t2"  # t1 is revoked before it expires
        wait_for(lambda: peer.now_open == 0, 20)  # uvloop would wait 30 s for the peer to close TLS
        shared.send(MESSAGE, "a@b.example", f"c@{auth}.test")
        wait_for(lambda: len(peer.messages) == 11)
        assert len(endpoint.asked) == 2 and shared.of("deferred", auth) == []


def test_a_rotated_refresh_token_is_kept_across_a_restart_until_the_file_has_another(tmp_path):
    endpoint = TokenEndpoint(rotates=True)
    answer = lambda line: b"235 2.7.0 welcome\r\n"  # noqa: E731
    (tmp_path / "refresh").write_text("r1\n")
    route = ("out", "d.example", f'hosts=["localhost:$out"],{LOGIN},{oauth(endpoint.url, "$folder")}')
    made = Routed(tmp_path, [route], "delivery.first_retry=0.5")
    with FakeMx({}, made.port_of("out"), tls=server_context(made.authority), auth=(b"XOAUTH2", answer)) as peer, made as relay:
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


def test_a_token_that_expires_while_mail_is_queued_is_refreshed_once(shared, endpoints):
    endpoint = endpoints["expires"]
    answer = lambda line: b"235 2.7.0 welcome\r\n"  # noqa: E731
    tls = server_context(shared.authority)
    with FakeMx({}, shared.port_of("expires"), tls=tls, auth=(b"XOAUTH2", answer), slow=0.05) as peer:
        began = time.monotonic()
        for _ in range(30):
            shared.send(MESSAGE, "a@b.example", "c@expires.test")
            time.sleep(0.1)
        wait_for(lambda: len(peer.messages) == 30)
        assert 2 <= len(endpoint.asked) <= 1 + (time.monotonic() - began) / 2
        assert shared.of("deferred", "expires") == []


def test_a_failing_token_endpoint_defers_with_its_reason(shared, endpoints):
    endpoints["failing"].status = 400
    tls = server_context(shared.authority)
    with FakeMx({}, shared.port_of("failing"), tls=tls, auth=(b"XOAUTH2", lambda line: b"235 ok\r\n")):
        shared.send(MESSAGE, "a@b.example", "c@failing.test")
        (deferred, *_) = wait_for(lambda: shared.of("deferred", "failing"))
        assert deferred["phase"] == "auth" and "token endpoint" in deferred["reply"] and "invalid_grant" in deferred["reply"]
        assert "token endpoint" in shared.cli("message", "explain", deferred["id"]).stdout


ACCOUNT = {"tls": "verify", "username": "me", "password_env": "X"}
TOKENS = {"client_id": "y"}


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        ({"hosts": ["h"], "oauth": TOKENS | {"token_url": "https://x.example/t"}}, "oauth: needs username"),
        ({"hosts": ["h"], **ACCOUNT, "oauth": TOKENS | {"token_url": "http://x.example/t"}}, "would go over plain http"),
        (
            {"hosts": ["h"], **ACCOUNT, "oauth": TOKENS | {"token_url": "http://127.0.0.1@x.example/t"}},
            "would go over plain http",
        ),
        ({"hosts": ["h"], **ACCOUNT, "oauth": TOKENS | {"token_url": "http://127.0.0.1/t"}}, ""),
        ({"hosts": ["h"], **ACCOUNT, "oauth": TOKENS | {"token_url": "http://localhost:80/t"}}, ""),
        (ACCOUNT, "username: needs hosts"),  # or the MX hosts of every domain would get them
        ({"lookup": "https://x.example/r", **ACCOUNT}, "needs an https:// or loopback URL, and lookup_hosts"),
        ({"lookup": "http://x.example/r", "lookup_hosts": [".x.example"], **ACCOUNT}, "needs an https:// or loopback URL"),
        ({"lookup": "http://localhost.x.example/r", "lookup_hosts": ["h"], **ACCOUNT}, "needs an https:// or loopback URL"),
        ({"lookup": "http://127.0.0.1.x.example/r", "lookup_hosts": ["h"], **ACCOUNT}, "needs an https:// or loopback URL"),
        ({"lookup": "http://[::1]:80/r", "lookup_hosts": [".x.example"], **ACCOUNT}, ""),
        ({"lookup": "https://x.example/r", "lookup_hosts": ["h"], **ACCOUNT}, ""),
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
    route = {"name": "r", "lookup": "https://x.example/r", "lookup_hosts": [".x.example"], **ACCOUNT}
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
