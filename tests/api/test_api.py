"""The HTTP API without a relay: who may do what, what is refused and how, and its description."""

import asyncio
import json
import re
import time
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate

from relaymta.admin.tokens import SCOPES, Token, Tokens, expanded, fresh, hashed, read_tokens, written
from relaymta.api import connections
from relaymta.api.openapi import description
from relaymta.api.routes import PREFIX, ROUTES
from relaymta.config import Config
from relaymta.control.requests import REQUESTS
from relaymta.errors import ConfigError
from relaymta.problems import Problem, ProblemDetails
from tests.api.serving import LISTENER, serving, spoken

BODIES = {"queue_reroute": {"route_to": "r"}, "decision_clear": {"kind": "dead", "site": "s"},
          "policy_set": {"kind": "hold"},
          "policy_end": {"kind": "hold", "about": "a"}, "abuse_clear": {"account": "a"},
          "suppression_add": {"addresses": ["a@b.example"]}, "suppression_remove": {"addresses": ["a@b.example"]}}  # fmt: skip
QUERIES = {"abuse_why": "?account=a"}


def named(scope: str) -> str:
    return scope.replace(":", " ")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def place(route) -> str:
    return (
        PREFIX
        + route.path.replace("{id}", "1ZZZZZZZZZZZZ").replace("{name}", "s").replace("{address}", "a@b.example")
        + QUERIES.get(route.name, "")
    )


async def call(client, route, token: str) -> tuple[int, dict]:
    body = {"json": BODIES.get(route.name, {})} if route.changes else {}
    async with client.request(route.method, place(route), headers=bearer(token), **body) as answer:
        return answer.status, json.loads(await answer.read()) if not route.octets or answer.status != 200 else {}


# Tokens


def test_a_file_of_tokens_has_hashes_only_and_is_read_again_when_it_changes(tmp_path):
    path, made = tmp_path / "tokens", fresh()
    tokens = Tokens(path)
    assert tokens.valid() == [] and tokens.find(made) is None
    row = Token(name="n", hash=hashed(made), scopes=["queue:read"])
    path.write_text(written([row]))
    assert made not in path.read_text() and len(made) > 45 and made != fresh()
    assert (
        tokens.find(made) == row and tokens.find(made[:-1]) is None and tokens.find("") is None and tokens.find("\udcff") is None
    )
    assert tokens.still(row)
    path.write_text(written([msgspec.structs.replace(row, scopes=["queue:read", "queue:write"])]))
    assert not tokens.still(row), "its rights have changed"
    path.write_text(written([msgspec.structs.replace(row, expires=time.time() - 1)]))
    assert tokens.find(made) is None
    for wrong in ("{", '{"tokens": [{"name": "n"}]}', "\xff\xfe"):
        path.write_text(wrong, encoding="latin-1")
        assert tokens.find(made) is None and tokens.problem
        with pytest.raises(ConfigError, match="tokens"):
            read_tokens(path)
    path.unlink()
    assert tokens.valid() == [] and tokens.problem == ""


def test_words_for_scopes():
    assert expanded(["all"]) == list(SCOPES) and expanded(["queue:write", "queue:write"]) == ["queue:write"]
    assert all(scope.endswith(":read") for scope in expanded(["read"])) and "message:read" in expanded(["read"])
    with pytest.raises(ValueError, match="queue:delete"):
        expanded(["queue:delete"])


async def test_each_operation_needs_its_scope_and_no_other(tmp_path):
    async with serving(tmp_path) as (found, client):
        only = {scope: found.token(named(scope), scope) for scope in SCOPES}
        for route in ROUTES.values():
            for scope, token in only.items():
                before = len(found.asked.asked)
                status, answer = await call(client, route, token)
                if scope == route.scope:
                    assert status == 200 and found.asked.asked[before:] == [(f"token {named(scope)}", "127.0.0.1")], (
                        route.name,
                        answer,
                    )
                else:
                    assert status == 403 and route.scope in answer["detail"], (route.name, scope)
                    assert len(found.asked.asked) == before, "nothing was asked"
        denied = [one for one in found.noted() if one["event"] == "audit"]
        assert len(denied) == len(ROUTES) * (len(SCOPES) - 1)
        assert {(one["who"], one["where"]) for one in denied} == {(f"token {named(scope)}", "127.0.0.1") for scope in SCOPES}
        assert all(one["result"].startswith("denied: ") and one["worker"] == -2 for one in denied)


async def test_without_a_valid_token_nothing_is_answered_over_tcp_but_the_description(tmp_path):
    async with serving(tmp_path) as (found, client):
        late, good = found.token("late", "all", expires=time.time() - 1), found.token("good", "all")
        for route in ROUTES.values():
            for headers in (
                {},
                bearer("wrong"),
                bearer(late),
                {"Authorization": f"Basic {good}"},
                {"Cookie": f"relaymta-session={good}"},
            ):
                async with client.request(route.method, place(route), headers=headers) as answer:
                    assert answer.status in (401, 429) and answer.content_type == "application/problem+json", route.name
        async with client.get(f"{PREFIX}/openapi.json") as answer:
            assert answer.status == 200
        assert found.asked.asked == []
        found.revoke("good")
        assert (await call(client, ROUTES["queues"], good))[0] in (401, 429)


async def test_many_wrong_tokens_of_an_address_are_not_looked_at_and_a_right_one_still_is(tmp_path):
    async with serving(tmp_path) as (found, client):
        good = found.token("good", "all")
        statuses = [(await call(client, ROUTES["queues"], "wrong"))[0] for _ in range(15)]
        assert statuses == [401] * 10 + [429] * 5
        async with client.get(f"{PREFIX}/queues", headers=bearer("x")) as answer:
            assert answer.status == 429 and 0 < int(answer.headers["Retry-After"]) <= 60
        assert (await call(client, ROUTES["queues"], good))[0] == 200
        assert len([one for one in found.noted() if one["result"] == "denied: wrong token"]) == 10


async def test_the_unix_socket_needs_no_token_but_for_what_a_proxy_or_browser_sends(tmp_path):
    async with serving(tmp_path) as (found, _):
        weak = found.token("weak", "queue:read")
        async with aiohttp.ClientSession("http://x", connector=aiohttp.UnixConnector(str(found.path))) as client:
            async with client.get(f"{PREFIX}/queues") as answer:
                assert answer.status == 200
            assert found.asked.asked[0][0].endswith("(uid 0)") and found.asked.asked[0][1] == "admin socket"
            for headers in (
                {"X-Forwarded-For": "192.0.2.1"}, {"Origin": "http://evil.example"}, {"Cookie": "a=b"},
                {"User-Agent": "Mozilla/5.0"},
                {"Sec-Fetch-Site": "none"}, {"Via": "1.1 x"}, bearer("wrong"),
            ):  # fmt: skip
                async with client.get(f"{PREFIX}/queues", headers=headers) as answer:
                    assert answer.status == 401, headers
            assert len(found.asked.asked) == 1
            async with client.post(f"{PREFIX}/queue/hold", json={"all": True}, headers=bearer(weak)) as answer:
                assert answer.status == 403, "who gives a token has its rights"
            async with client.get(f"{PREFIX}/queues", headers=bearer(weak) | {"X-Forwarded-For": "192.0.2.1"}) as answer:
                assert answer.status == 200


# What is refused, and how


@pytest.mark.parametrize(("method", "path", "options", "status", "argument"), [
    ("GET", "/messages?limit=0", {}, 400, "limit"), ("GET", "/messages?limit=x", {}, 400, "limit"),
    ("GET", "/messages?domain=", {}, 400, "domain"), ("GET", "/messages?nonsense=1", {}, 400, "nonsense"),
    ("GET", "/messages?from=a&from=b", {}, 400, "from"), ("GET", "/messages/find?status=lost", {}, 400, "status"),
    ("GET", "/abuse/why", {}, 400, "account"),
    ("POST", "/suppressions", {"json": {"addresses": []}}, 400, "addresses"),
    ("POST", "/queue/hold?all=true", {"json": {}}, 400, "all"),
    ("POST", "/queue/hold", {"json": {"expect": -1}}, 400, "expect"), ("POST", "/queue/hold", {"json": {"all": 1}}, 400, "all"),
    ("POST", "/queue/reroute", {"json": {"all": True}}, 400, "route_to"), ("POST", "/queue/hold", {"json": []}, 400, None),
    ("POST", "/queue/hold", {"data": b"{"}, 400, None), ("POST", "/queue/hold", {"data": b"\xff"}, 400, None),
    ("POST", "/queue/hold", {"data": b"[" * 100_000}, 400, None),
    ("POST", "/queue/hold", {"data": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, None),
    ("POST", "/queue/hold", {"data": b" " * (1 << 20) + b"{} "}, 413, None),
    ("POST", "/queue/hold", {"data": b"x", "headers": {"Content-Encoding": "gzip"}}, 415, None),
    ("GET", "/nothing", {}, 404, None), ("DELETE", "/messages", {}, 405, None), ("GET", "/queue/hold", {}, 405, None),
    ("GET", "/queues", {"headers": {"Host": "evil.example"}}, 421, None),
    ("GET", "/queues", {"headers": {"Host": "localhost:1"}}, 200, None),
    ("GET", "/queues", {"headers": {"Host": "[::1]"}}, 200, None),
    ("GET", "/queues", {"headers": {"Host": "RELAY.example."}}, 200, None),
    ("GET", "/queues", {"headers": {"Host": "proxy.example:8443"}}, 200, None),
])  # fmt: skip
async def test_what_is_refused_is_a_problem_with_its_status_and_argument(tmp_path, method, path, options, status, argument):
    async with serving(tmp_path, names=["proxy.example"]) as (found, client):
        headers = {"Content-Type": "application/json", **bearer(found.token("good", "all")), **options.pop("headers", {})}
        async with client.request(method, PREFIX + path, headers=headers, **options) as answer:
            said = await answer.read()
            assert answer.status == status, said
            if status != 200:
                details = msgspec.json.decode(said, type=ProblemDetails)
                assert answer.content_type == "application/problem+json" and details.status == status and details.detail
                assert argument is None or details.argument == argument, details
                assert found.asked.asked == []
            assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"] and answer.headers["Server"] == "relaymta"


async def test_a_problem_of_a_verb_is_the_answer_and_a_defect_is_500_without_its_text(tmp_path):
    def fail(error):
        def answer(verb):
            raise error

        return answer

    async with serving(tmp_path) as (found, client):
        token = found.token("good", "all")
        found.asked.answer = fail(Problem(503, "worker 1 does not answer", workers=[1]))
        status, said = await call(client, ROUTES["queues"], token)
        assert (status, said["workers"], said["title"]) == (503, [1], "Service Unavailable")
        found.asked.answer = fail(KeyError("secret"))
        status, said = await call(client, ROUTES["queues"], token)
        assert status == 500 and "secret" not in str(said)
        assert "KeyError: 'secret'" in found.noted()[-1]["text"]


async def test_connections_are_limited_and_one_that_says_nothing_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
    async with serving(tmp_path) as (found, client):
        token = found.token("good", "all")
        reader, writer = await asyncio.open_connection("127.0.0.1", found.number)
        writer.write(b"GET /api/v1/queues HTTP/1.1\r\nX-Slow: ")
        assert await reader.read() == b"", "the head of a request takes too long"
        writer.close()
        found.server._connections[1].most = 1
        reader, writer = await asyncio.open_connection("127.0.0.1", found.number)
        writer.write(b"GET /api/v1/queues HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n" % token.encode())
        assert b"200 OK" in await reader.readline()
        with pytest.raises(aiohttp.ClientError):
            await call(client, ROUTES["queues"], token)
        writer.close()
        found.server._connections[1].most = 100
        while found.server._connections[1].open:
            await asyncio.sleep(0.01)
        assert (await call(client, ROUTES["queues"], token))[0] == 200


async def test_what_anybody_can_have_denied_is_logged_ten_times_a_minute(tmp_path):
    async with serving(tmp_path) as (found, client):
        for _ in range(8):
            async with client.get(f"{PREFIX}/queues", headers={"Authorization": "Basic x"}) as answer:
                assert answer.status == 401
        for _ in range(8):
            async with client.post("/login", headers={"Origin": "http://evil.example"}, data={"token": "x"}) as answer:
                assert answer.status == 403
        noted = [one["result"] for one in found.noted() if one["event"] == "audit"]
        assert noted == ["denied: no bearer token"] * 8 + ["denied: a form of another site"] * 2


async def test_head_has_no_body_and_an_argument_of_the_path_is_given_once(tmp_path):
    async with serving(tmp_path) as (found, _):
        token = found.token("good", "all").encode()
        for line, status, ends in (
            (b"HEAD /api/v1/messages/A/raw", b"200", True), (b"GET /api/v1/messages/A/raw", b"200", False),
            (b"GET /api/v1/messages/A?id=B", b"400", False),
        ):  # fmt: skip
            head = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer " + token + b"\r\n\r\n"
            answer = await spoken(found.number, line + head)
            assert answer.split()[1] == status and (answer.partition(b"\r\n\r\n")[2] == b"") == ends, answer


async def test_what_is_no_http_is_no_defect(tmp_path):
    async with serving(tmp_path) as (found, _):
        for said in (b"EHLO x\r\n\r\n", b"\x16\x03\x01\x02\0", b"GET / HTTP/9\r\n\r\n",
                     b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
                     b"POST /api/v1/queue/hold HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n"):  # fmt: skip
            reader, writer = await asyncio.open_connection("127.0.0.1", found.number)
            writer.write(said)
            writer.write_eof()
            answer = await reader.read()
            assert answer == b"" or answer.split(b" ")[1] == b"400", answer
            writer.close()
        assert [one for one in found.noted() if one["event"] == "warning"] == []


# The description


def test_the_description_is_valid_and_has_every_operation_and_no_other():
    made = description()
    validate(made)
    described = {(method.upper(), path): one for path, methods in made["paths"].items() for method, one in methods.items()}
    assert set(described) == {(route.method, PREFIX + route.path) for route in ROUTES.values()}
    for route in ROUTES.values():
        one = described[route.method, PREFIX + route.path]
        assert one["x-scope"] == route.scope and one["summary"] and one["operationId"] == route.name
        fields = {field.encode_name for field in msgspec.structs.fields(route.arguments)}
        named = {parameter["name"] for parameter in one.get("parameters", [])}
        assert named == (set() if route.changes else fields), route.name
    used = set(json.dumps(made["paths"]).split('"#/components/schemas/')[1:])
    assert {text.partition('"')[0] for text in used} <= set(made["components"]["schemas"])


def test_every_request_of_the_command_line_is_in_the_api_or_left_out_on_purpose():
    """A new request is to be thought of: `status` and others are operations of their own."""
    left_out = {name for name in REQUESTS if name.startswith(("mailbox_", "sieve_"))}
    left_out |= {"history_files", "history_piece", "lessons", "learned", "sessions", "disconnect", "usage"}
    left_out |= {"webhooks", "webhook_test", "webhook_replay"}
    left_out |= {"records", "exported", "import_data", "import_message", "trace", "activity", "upgrade"}
    behind = {  # requests that an operation is made of
        "status", "readiness", "readings", "summary", "shape", "shards", "page", "change", "move", "throttled", "message",
        "raw",
        "explain", "subjects", "history", "sites", "site_states", "suspend", "policy", "clear", "routes", "filters", "rules",
        "abuse", "abuse_why", "abuse_clear", "reload", "suppression_page", "suppression_find", "suppression_counts",
        "suppression_put", "suppression_remove",
    }  # fmt: skip
    assert set(REQUESTS) == left_out | behind


def test_the_page_has_the_table_of_scopes_and_operations():
    text = (Path(__file__).parents[2] / "docs/admin.md").read_text()
    rows = re.findall(r"^\| `(\w+:\w+)` \| ([^|]*) \| (.*) \|$", text, re.M)
    assert {scope: what for scope, what, _ in rows} == SCOPES
    for scope, _, operations in rows:
        own = [f"{route.method} {route.path}" for route in ROUTES.values() if route.scope == scope]
        assert sorted(re.findall(r"`([^`]*)`", operations)) == sorted(own), scope
    statuses = {int(one) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.M) for one in row.split(", ")}
    described = {int(one) for one in description()["paths"][f"{PREFIX}/status"]["get"]["responses"]} - {200}
    assert described <= statuses
    for body in re.findall(r"--json '([^']*)'", text):
        assert json.loads(body)


# The configuration


@pytest.mark.parametrize(("admin", "why"), [
    ({"listen": "0.0.0.0:1"}, "0.0.0.0:1 is not a loopback address: tokens and mail would be sent in the clear"),
    ({"listen": "192.0.2.1:1"}, "not a loopback address"), ({"listen": "[::]:1"}, "not a loopback address"),
    ({"listen": "0.0.0.0:1", "tls": True}, "needs a [[certificate]]"), ({"tls": True}, "no effect without admin.listen"),
    ({"listen": "127.0.0.1:2525"}, "has this port already"), ({"listen": "127.0.0.1:9125"}, "has this port already"),
    ({"names": ["a b"]}, ""), ({"session": "0s"}, ""),
])  # fmt: skip
def test_a_configuration_that_would_be_open_is_refused(admin, why):
    with pytest.raises(ValueError) as error:
        Config.model_validate(LISTENER | {"admin": admin})
    assert why in str(error.value)


# Any octets

WORDS = st.sampled_from([
    "GET", "POST", "HEAD", "OPTIONS", " ", "\r\n", "\r\n\r\n", "HTTP/1.1", "HTTP/1.0", "/api/v1/",
    *(f"/api/v1{r.path}" for r in ROUTES.values()),
    "Host: localhost\r\n", "Content-Type: application/json\r\n", "Content-Length: 2\r\n", "Transfer-Encoding: chunked\r\n",
    "{}", "0\r\n\r\n",
    "Cookie: relaymta-session=x; \xff=\r\n", "Authorization: Bearer ", "?limit=",
    "%00", "%ff", "&", "=", ":", "..", "//", "\0", "\xff",
    "Expect: 100-continue\r\n", "Connection: upgrade\r\nUpgrade: websocket\r\n", "Range: bytes=0-\r\n", "/login", "/",
])  # fmt: skip


@pytest.fixture(scope="module")
def loop_of_module():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def server(loop_of_module, tmp_path_factory):
    context = serving(tmp_path_factory.mktemp("any"))
    found, _ = loop_of_module.run(context.__aenter__())
    found.good = found.token("good", "all").encode()
    yield found
    loop_of_module.run(context.__aexit__(None, None, None))


@given(st.lists(WORDS | st.text(max_size=5), max_size=25).map("".join))
def test_any_octets_get_an_answer_that_is_no_500(loop_of_module, server, text):
    data = text.encode("latin-1", "replace").replace(b"Bearer ", b"Bearer " + server.good)
    answer = loop_of_module.run(spoken(server.number, data))
    assert not answer or (answer.startswith(b"HTTP/1.") and answer.split(b" ", 2)[1] != b"500"), answer


def test_no_octets_were_a_defect(server):
    """After the one before."""
    assert [one for one in server.noted() if one["event"] == "warning"] == []


async def test_who_says_no_more_still_gets_the_answer_and_who_has_gone_is_no_defect(tmp_path):
    async with serving(tmp_path) as (found, _):
        token, release = found.token("good", "all"), asyncio.Event()

        class Slow(type(found.asked)):  # type: ignore[misc]
            async def __call__(self, by, verb):
                await release.wait()
                return {}, []

        found.asked.__class__ = Slow
        head = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", found.number)
        writer.write(b"GET /api/v1/queues HTTP/1.1\r\n" + head + b"\r\n")
        writer.write_eof()
        gone, leaving = await asyncio.open_connection("127.0.0.1", found.number)
        leaving.write(
            b"POST /api/v1/queue/hold HTTP/1.1\r\n" + head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        await asyncio.sleep(0.05)
        leaving.transport.abort()
        release.set()
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK") and await gone.read() == b""
        writer.close()
        assert [one for one in found.noted() if one["event"] == "warning"] == []
