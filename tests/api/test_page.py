"""The page without a relay and a browser: logins, rights, forms of other sites, and hostile mail in every part of it."""

import json
import re
import time
from urllib.parse import urlencode

import pytest

from relaymta.admin.tokens import SCOPES
from relaymta.api import routes
from relaymta.api.page import ACTIONS
from relaymta.api.rates import bars, chart, quantile
from tests.api.serving import serving

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&{{7*7}}\u202e\x1b[2J"
IDENT = "1ZZZZZZZZZZZZ"
RECIPIENT = {"address": EVIL, "state": "pending", "last": EVIL, "reply": EVIL}
ATTEMPT = {"time": 1.0, "result": "transient", "phase": EVIL, "peer": EVIL, "reply": EVIL}
WAIT = {"why": EVIL, "until": 0, "position": -1, "cure": EVIL, "command": EVIL, "released by": EVIL}
ROW = {"id": IDENT, "state": "held", "sender": EVIL, "recipients": [RECIPIENT], "size": 1, "arrived": 1.0, "client": EVIL,
       "helo": EVIL,
       "user": EVIL, "application": EVIL, "queues": [EVIL], "attempts": 1, "next": 0, "expires": 0, "held_for": EVIL,
       "unseen": [],
       "quarantine": {"subject": EVIL}, "subject": EVIL, "why": EVIL, "missing": [1]}  # fmt: skip
SITE = {"pool": EVIL, "site": EVIL, "hosts": [EVIL], "source": "", "state": "down", "reason": EVIL, "until": 1.0, "waiting": 1,
       "deferred": 1,
        "in flight": 0, "connections": 0, "rate": 0.0, "limits": {"connections": {"value": 5, "origin": EVIL}},
        "hosts down": {EVIL: EVIL}}  # fmt: skip
DECISION = {"site": EVIL, "about": EVIL, "kind": "slow", "until": 1.0, "reason": EVIL, "reply": EVIL + "!", "by": EVIL}
EVENT = {"event": EVIL, "ts": 1.0, "recipient": EVIL, "route": EVIL, "peer": EVIL, "reply": EVIL}
READINGS = {"time": 1.0, "totals": dict.fromkeys(("accepted", "delivered", "deferred", "bounced"), 1),
            "gauges": dict.fromkeys(("messages", "octets", "deferred", "held", "quarantined", "oldest", "connections",
            "sessions"), 1),
            "histograms": {name: {"bounds": [0.1, 1], "counts": [1, 2, 3]} for name in ("accept", "delivery")}}  # fmt: skip
ANSWERS = {
    "queues": {"queues": [{"queue": EVIL, "messages": 5, "bytes": 1, "deferred": 1, "held": 1, "unseen": 0, "next": 1.0,
    "parked": True}]},
    "sites": {"sites": [SITE], "decisions": [DECISION]}, "site": {"sites": [SITE], "decisions": [DECISION]},
    "policies": {"policies": [{"kind": "hold", "about": EVIL, "until": 1.0, "reason": EVIL}]},
    "messages": {"messages": [json.dumps(ROW).encode()], "next": EVIL}, "quarantine": {"messages": [json.dumps(ROW).encode()],
    "next": ""},
    "find": {"messages": [ROW], "notes": [EVIL]}, "history": {"events": [EVENT]},
    "explain": ROW | {"waits": [{"queue": EVIL, "recipients": [EVIL], "site": EVIL, "attempts": [ATTEMPT], "wait": WAIT}]},
    "header": {"header": [{"name": EVIL, "value": EVIL}]}, "readings": READINGS, "site_suspend": {"site": EVIL, "known": True},
    "site_resume": {"changed": 1},
}  # fmt: skip
CHANGED = {"matched": 3, "changed": 3, "in_flight": 1}


def answer(verb):
    """What a relay would say, all of whose texts are hostile. Operations are known by their functions, the rest by its shape."""
    cells = [cell.cell_contents for cell in verb.__closure__ or ()]
    route = next((cell for cell in cells if isinstance(cell, routes.Route)), None)
    if route is not None:
        return dict(ANSWERS.get(route.name, CHANGED))
    return READINGS if not cells else 7 if any(isinstance(cell, str) for cell in cells) else {EVIL: EVIL}


class User:
    """Somebody at the page."""

    def __init__(self, client) -> None:
        self.client = client
        self.cookie = ""

    async def get(self, path: str, **headers: str):
        async with self.client.get(path, headers={"Cookie": self.cookie, **headers}, allow_redirects=False) as got:
            return got.status, got.headers, await got.text()

    async def post(self, path: str, headers: dict[str, str] | None = None, **fields: str):
        sent = {"Cookie": self.cookie, "Content-Type": "application/x-www-form-urlencoded", **(headers or {})}
        async with self.client.post(path, headers=sent, data=urlencode(fields, doseq=True), allow_redirects=False) as got:
            return got.status, got.headers, await got.text()

    async def login(self, token: str):
        status, headers, _ = await self.post("/login", token=token)
        assert (status, headers["Location"]) == (303, "/")
        self.cookie = headers["Set-Cookie"].partition(";")[0]
        return headers["Set-Cookie"]

    async def csrf(self) -> str:
        _, _, text = await self.get("/")
        return re.search(r'name="csrf" value="([^"]+)"', text)[1]  # type: ignore[index]


async def test_a_login_is_by_token_and_ends_by_logout_time_or_when_the_token_is_revoked(tmp_path):
    async with serving(tmp_path) as (found, client):
        found.asked.answer = answer
        token, user = found.token("ann", "all"), User(client)
        assert (await user.get("/"))[0::2] == (303, "") and (await user.get("/now", **{"HX-Request": "true"}))[0] == 401
        status, _, text = await user.post("/login", token="wrong")
        assert status == 401 and "no valid token" in text and "wrong" not in text.replace("wrong tokens", "")
        cookie = await user.login(token)
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie and "Secure" not in cookie
        assert (await user.get("/"))[0] == 200
        async with client.get("/api/v1/queues", headers={"Cookie": user.cookie}) as got:
            assert got.status == 401, "the cookie is none of the API"
        csrf = await user.csrf()
        assert (await user.post("/logout", csrf=csrf))[0] == 303 and (await user.get("/"))[0] == 303
        await user.login(token)
        found.revoke("ann")
        assert (await user.get("/"))[0] == 303, "the token was revoked"
        second = found.token("bob", "all")
        await user.login(second)
        session = next(iter(found.server._access._sessions.values()))
        session.until = time.time() - 1
        assert (await user.get("/"))[0] == 303, "its time is over"
        status, headers, _ = await user.post("/login", {"X-Forwarded-Proto": "https"}, token=second)
        assert "Secure" in headers["Set-Cookie"]
        assert "page login" in {one["action"] for one in found.noted()}


async def test_no_form_of_another_site_changes_anything(tmp_path):
    async with serving(tmp_path) as (found, client):
        found.asked.answer = answer
        token, user = found.token("ann", "all"), User(client)
        await user.login(token)
        csrf, given = await user.csrf(), {"action": "delete", "ids": IDENT, "expect": "3"}
        before = len(found.asked.asked)
        for path in ("/confirm", "/do", "/logout"):
            for headers, fields in (
                ({}, {}), ({}, {"csrf": "x"}), ({}, {"csrf": csrf[:-1]}), ({"Origin": "http://evil.example"}, {"csrf": csrf}),
                ({"Origin": "null"}, {"csrf": csrf}), ({"Sec-Fetch-Site": "cross-site"}, {"csrf": csrf}),
                ({"Sec-Fetch-Site": "same-site"}, {"csrf": csrf}),
            ):  # fmt: skip
                status, _, text = await user.post(path, headers, **given, **fields)
                assert status == 403 and "form" in text, (path, headers)
        assert (await user.post("/do", {"Content-Type": "text/plain"}, csrf=csrf, **given))[0] == 415
        assert (await user.get(f"/do?csrf={csrf}&action=delete&ids={IDENT}"))[0] == 405
        assert (await user.post("/login", {"Origin": "http://evil.example"}, token=token))[0] == 403
        assert len(found.asked.asked) == before
        status, _, _ = await user.post("/do", {"Origin": found.tcp, "Sec-Fetch-Site": "same-origin"}, csrf=csrf, **given)
        assert status == 200 and found.asked.asked[before:] == [("token ann", "127.0.0.1 (page)")]


@pytest.mark.parametrize("scope", SCOPES)
async def test_a_token_may_do_on_the_page_what_it_may_do_by_the_api(tmp_path, scope):
    async with serving(tmp_path) as (found, client):
        found.asked.answer = answer
        user = User(client)
        await user.login(found.token("few", scope))
        status, _, text = await user.get("/")
        assert status == 200
        csrf = await user.csrf()
        assert ("Queues" in text, "<h2 id=\"sites-title\">" in text, "Accepted" in text) == (
            scope == "queue:read", scope == "site:read", scope == "metrics:read"
        )  # fmt: skip
        for name, action in ACTIONS.items():
            allowed = action.route.scope == scope
            given = {"site": "s"} if action.operation.startswith("site_") else {"ids": IDENT}
            for path in ("/confirm", "/do"):
                before = len(found.asked.asked)
                status, _, _ = await user.post(path, csrf=csrf, action=name, expect="3", **given)
                assert (status == 200) == allowed and (len(found.asked.asked) > before) == allowed, (name, path, status)
        for path, needed in (("/messages?to=a@b.example", "queue:read"), ("/messages?queue=q", "queue:read"),
            (f"/messages/{IDENT}", "queue:read"),
                             ("/quarantine", "quarantine:read"), ("/sites/s", "site:read")):  # fmt: skip
            status, _, text = await user.get(path)
            assert (status == 200) == (needed == scope), path


async def test_hostile_mail_is_text_in_every_part_and_nothing_may_run(tmp_path):
    async with serving(tmp_path) as (found, client):
        found.asked.answer = answer
        user = User(client)
        await user.login(found.token("ann", "all"))
        csrf = await user.csrf()
        pages = [await user.get(path) for path in (
            "/", "/now", "/messages", "/messages?to=a@b.example", "/messages?queue=q", f"/messages/{IDENT}", "/quarantine",
            "/sites/s",
            "/messages?" + urlencode({"from": EVIL}), "/messages?" + urlencode({"queue": EVIL}), "/nothing", "/login",
        )]  # fmt: skip
        for name in ("delete", "quarantine release", "suspend", "resume"):
            for path in ("/confirm", "/do"):
                pages.append(await user.post(path, csrf=csrf, action=name, ids=EVIL, site=EVIL) if name in ("suspend", "resume")
                             else await user.post(path, csrf=csrf, action=name, ids=EVIL, expect="3"))  # fmt: skip
        pages.append(await user.post("/confirm", csrf=csrf, action=EVIL))
        for status, headers, text in pages:
            assert (
                status < 500
                and "<script>alert" not in text
                and "<img" not in text
                and "49" not in re.findall(r"&amp;(\d+)", text)
            )
            assert "\u202e" not in text and "\x1b" not in text
            if not headers["Content-Type"].startswith("text/html"):
                continue
            policy = headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy and "frame-ancestors 'none'" in policy
            assert (
                "unsafe" not in policy and headers["X-Frame-Options"] == "DENY" and headers["X-Content-Type-Options"] == "nosniff"
            )
            assert headers["Cache-Control"] == "no-store" and headers["Referrer-Policy"] == "same-origin"
            assert not re.search(
                r"\sstyle=|\son\w+=[\"']|<style|javascript:|hx-on|hx-vals=.js", re.sub(r"value=\"[^\"]*\"", "", text)
            )
            assert re.findall(r"<script[^>]*>", text) in ([], ['<script src="/static/htmx.min.js" defer>'])
        assert sum("&lt;script&gt;" in text for _, _, text in pages) >= 10
        assert [one for one in found.noted() if one["event"] == "warning"] == []


async def test_files_of_the_page_are_those_and_no_others(tmp_path):
    async with serving(tmp_path) as (_, client):
        user = User(client)
        kinds = {"htmx.min.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
        for name, kind in kinds.items():
            status, headers, _ = await user.get(f"/static/{name}")
            assert status == 200 and headers["Content-Type"].startswith(kind)
        for path in ("/static/NOTICE", "/static/..%2fpage.py", "/static/%2e%2e/page.py", "/static/", "/templates/base.html"):
            assert (await user.get(path))[0] == 404, path
        async with client.get("/", headers={"Host": "evil.example", "Accept": "text/html"}) as got:
            assert got.status == 421


def test_pictures():
    one = chart([0.0, 1.0, 2.0])
    assert (one.now, one.most) == (2.0, 2.0) and one.line.count(",") == 3 and one.line.endswith("240.0,3.0")
    assert chart([]).line == "" and chart([0.0]).most == 0.0
    assert [round(high) for *_, high in bars([1, 2, 0])] == [23, 46, 0] and bars([]) == []
    assert (
        quantile([1, 2], [5, 4, 1], 0.5) == 1 and quantile([1, 2], [5, 4, 1], 0.95) is None and quantile([1], [0, 0], 0.5) is None
    )


async def test_a_form_with_fields_of_another_meaning_is_no_defect(tmp_path):
    async with serving(tmp_path) as (found, client):
        user = User(client)
        await user.login(found.token("all", "all"))
        found.asked.answer = answer
        csrf = re.search(r'name="csrf" value="([^"]+)"', (await user.get("/"))[2])[1]
        for field in ("request", "session", "operation", "dry_run"):
            for path in ("/confirm", "/do"):
                status, _, _ = await user.post(path, csrf=csrf, action="hold", ids=IDENT, **{field: "1"})
                assert status in (200, 400), (field, path)
        assert [one for one in found.noted() if one["event"] == "warning"] == []
