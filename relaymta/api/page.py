"""The page for operators: rendered here, for any browser, with or without scripts. It does what the API does, by the same verbs,
for who has logged in with a token.

Whatever is shown came from outside: templates escape it, and unprintable characters are shown as on the terminal.
"""

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

import jinja2
import msgspec
from aiohttp import web
from markupsafe import Markup

from relaymta import __version__
from relaymta.api import models as m
from relaymta.api import verbs as v
from relaymta.api.access import COOKIE, Access, Session
from relaymta.api.asking import Asker, Peer
from relaymta.api.operations import SECURE, read_body
from relaymta.api.rates import HEIGHT, WIDTH, Rates, bars, chart, lately, per_second, quantile
from relaymta.api.routes import ROUTES, Route
from relaymta.cli.message import RESULTS, waiting, what_happened
from relaymta.cli.peer import asked, due, lasting, size, until, when
from relaymta.problems import Problem, of_arguments
from relaymta.proto.printable import printable

__all__ = ["ACTIONS", "Page"]

HERE = Path(__file__).parent
STATIC = {"htmx.min.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
FIELDS_MOST = 1100  # of a form: the ids of a page of messages among them
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = SECURE | {
    "Content-Security-Policy": POLICY, "X-Frame-Options": "DENY", "Content-Type": "text/html; charset=utf-8",
    "Referrer-Policy": "same-origin",  # with no-referrer browsers say of our own forms that they are from "null"
}  # fmt: skip
RECENT = 100  # messages of a list
LOOKED_INTO = 10  # queues

Handler = Callable[[web.Request, Session], Awaitable[web.Response]]


class Action(NamedTuple):
    """A change that the page offers. `operation`: that of the API; `label`: of the button; `sentence`: what it means, in the
    confirmation."""

    operation: str
    label: str
    sentence: str

    @property
    def route(self) -> Route:
        """The operation's row."""
        return ROUTES[self.operation]


ACTIONS = {
    "flush": Action("queue_flush", "Try now", "They are tried now, as far as the limits of their sites allow."),
    "hold": Action("queue_hold", "Hold", "They are not tried, and do not expire, until they are released."),
    "release": Action("queue_release", "Release", "Those that are held are due now, and their maximum age begins again."),
    "bounce": Action("queue_bounce", "Bounce", "They are given up, and each sender gets a DSN."),
    "delete": Action("queue_delete", "Delete", "They are removed for good. No DSN is sent."),
    "quarantine release": Action("quarantine_release", "Release", "They are sent to their recipients as they are."),
    "quarantine delete": Action("quarantine_delete", "Delete", "They are removed for good. No DSN is sent."),
    "suspend": Action("site_suspend", "Suspend", "Nothing is sent there for an hour. Mail for it waits."),
    "resume": Action("site_resume", "Resume", "Mail is sent there again, now."),
}
OF_QUEUE = ("flush", "hold", "release", "bounce", "delete")
OF_QUARANTINE = ("quarantine release", "quarantine delete")
OF_SITES = ("suspend", "resume")


def _shown(value: Any) -> Any:
    """What an expression of a template writes."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters |= {"when": when, "due": due, "size": size, "lasting": lasting, "until": until, "waiting": waiting}
    found.filters |= {"happened": what_happened, "utc": _utc, "seconds": _seconds, "begun": _begun, "urlquote": _quoted}
    found.globals |= {"version": __version__, "actions": ACTIONS, "width": WIDTH, "height": HEIGHT, "results": RESULTS}
    return found


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _quoted(text: str) -> str:
    return quote(text, safe="")


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if seconds else "-"


def _seconds(value: float | None) -> str:
    """A bound of a latency."""
    if value is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if value >= length:
            return f"{value / length:g} {unit}"
    return f"{value * 1000:g} ms"


class Page:
    """`secure`: this process speaks TLS itself."""

    def __init__(self, access: Access, ask: Asker, secure: bool) -> None:
        self._access = access
        self._ask = ask
        self._secure = secure
        self._templates = _templates()
        self._rates = Rates(self._readings)
        self._static = {name: (HERE / "static" / name).read_bytes() for name in STATIC}

    def routes(self) -> list[web.RouteDef]:
        """What aiohttp's router takes."""
        reading = {
            "/": self._overview, "/now": self._now, "/messages": self._messages, "/messages/{id}": self._message,
            "/quarantine": self._quarantine, "/sites/{name}": self._site,
        }  # fmt: skip
        changing = {"/confirm": self._confirm, "/do": self._do, "/logout": self._logout}
        found = [web.get(path, self._for_users(handler)) for path, handler in reading.items()]
        found += [web.post(path, self._for_users(handler)) for path, handler in changing.items()]
        found += [web.get("/login", self._shown(self._login_form)), web.post("/login", self._shown(self._login))]
        return [*found, web.get("/static/{name}", self._file)]

    def close(self) -> None:
        """End what it does in the background."""
        self._rates.close()

    # What all pages have in common

    def _for_users(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def logged_in(request: web.Request) -> web.Response:
            session = await self._access.session(request)
            if session is not None:
                return await handler(request, session)
            if "HX-Request" in request.headers:
                return web.Response(status=401, headers=HEADERS | {"HX-Redirect": "/login"})
            return _go("/login")

        return self._shown(logged_in)

    def _shown(
        self, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def shown(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except Problem as error:
                session = await self._access.session(request)
                return self._render("error.html", session, error.status, error=error)

        return shown

    def _render(self, template: str, session: Session | None, status: int = 200, **values: Any) -> web.Response:
        scopes = session.token.scopes if session is not None else []
        common = {"session": session, "scopes": scopes, "now": time.time(), "may": lambda *names: self._may(scopes, names)}
        text = self._templates.get_template(template).render(common | values)
        return web.Response(text=text, status=status, headers=HEADERS)

    def _may(self, scopes: list[str], names: tuple[str, ...]) -> list[str]:
        """The actions among `names` that these scopes allow."""
        return [name for name in names if ACTIONS[name].route.scope in scopes]

    async def _run(self, request: web.Request, session: Session, operation: str, /, **given: Any) -> Any:
        """The answer of an operation, for who has logged in. Problem, also where they may not."""
        route = ROUTES[operation]
        caller = self._access.of_session(request, session)
        self._access.require(request, caller, route.scope)
        try:
            arguments: Any = msgspec.convert(given, route.arguments, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise of_arguments(error) from None
        value, missing = await self._ask((caller.who, caller.where), lambda peer: route.within(caller.scopes)(peer, arguments))
        return value | {"missing": missing}

    async def _if_allowed(self, request: web.Request, session: Session, operation: str, **given: Any) -> Any:
        """As `_run`; None where it is not allowed."""
        return await self._run(request, session, operation, **given) if ROUTES[operation].scope in session.token.scopes else None

    async def _readings(self) -> dict[str, Any]:
        found, _ = await self._ask(("page", "page"), lambda peer: v.readings(peer, m.Nothing()))
        return found

    # Login

    async def _login_form(self, request: web.Request) -> web.Response:
        return self._render("login.html", None, why="")

    async def _login(self, request: web.Request) -> web.Response:
        form = await _form(request)
        self._access.check_origin(request)
        where = request.remote or "unknown"
        try:
            token = await self._access.token(request, str(form.get("token", "")).strip(), where)
        except Problem as error:
            return self._render("login.html", None, error.status, why=error.detail)
        answer = _go("/")
        secure = self._secure or request.headers.get("X-Forwarded-Proto", "") == "https"
        answer.set_cookie(COOKIE, self._access.login(token, where), httponly=True, samesite="Strict", secure=secure, path="/")
        return answer

    async def _logout(self, request: web.Request, session: Session) -> web.Response:
        self._access.check_form(request, session, (await _form(request)).get("csrf"))
        self._access.logout(request)
        answer = _go("/login")
        answer.del_cookie(COOKIE, path="/")
        return answer

    # Reading

    async def _overview(self, request: web.Request, session: Session) -> web.Response:
        queues = await self._if_allowed(request, session, "queues")
        sites = await self._if_allowed(request, session, "sites")
        reasons: dict[str, str] = {}
        if queues is not None:
            caller, rows = self._access.of_session(request, session), (sites or {}).get("sites", [])
            reasons, _ = await self._ask((caller.who, caller.where), lambda peer: _reasons(peer, queues["queues"], rows))
        return self._render(
            "overview.html", session, queues=queues, sites=sites, reasons=reasons, **await self._figures(session),
            policies=await self._if_allowed(request, session, "policies"),
        )  # fmt: skip

    async def _now(self, request: web.Request, session: Session) -> web.Response:
        return self._render("now.html", session, **await self._figures(session))

    async def _figures(self, session: Session) -> dict[str, Any]:
        """What now.html needs."""
        if "metrics:read" not in session.token.scopes:
            return {"figures": None}
        samples = await self._rates.look()
        shown = {name: chart(per_second(samples, name)) for name in ("accepted", "delivered", "deferred", "bounced")}
        latencies = {}
        for name in ("accept", "delivery"):
            bounds, counts, recent = lately(samples, name)
            points = [quantile(bounds, counts, part) for part in (0.5, 0.95)]
            latencies[name] = {"bars": bars(counts), "bounds": bounds, "recent": recent, "points": points, "some": any(counts)}
        return {
            "figures": {"charts": shown, "latencies": latencies, "gauges": samples[-1]["gauges"], "time": samples[-1]["time"]}
        }

    async def _messages(self, request: web.Request, session: Session) -> web.Response:
        query = {name: text.strip() for name, text in request.query.items() if text.strip()}
        given = {name: query[name] for name in ("from", "to", "domain", "id", "subject", "status", "since") if name in query}
        place = {name: query[name] for name in ("queue", "site", "route", "app", "held", "cursor") if name in query}
        both = {name: text for name, text in given.items() if name in ("from", "to", "domain")}
        why = ""
        found: dict[str, Any] | None = None
        try:
            if place:
                found = await self._run(request, session, "messages", **both, **place, limit=RECENT)
                found = {"messages": [_listed(msgspec.json.decode(line)) for line in found["messages"]], **_rest(found)}
            elif given:
                more = {"status": [given.pop("status")]} if "status" in given else {}
                found = await self._run(request, session, "find", **given, **more, limit=RECENT)
        except Problem as error:
            if error.status != 400:
                raise
            why = error.detail
        following = found.get("next", "") if found is not None else ""
        more_at = urlencode(both | place | {"cursor": following}) if following else ""
        return self._render(
            "messages.html", session, 400 if why else 200, asked=query, found=found, place=place, why=why, more_at=more_at,
            verbs=OF_QUEUE, quarantine=False,
        )  # fmt: skip

    async def _quarantine(self, request: web.Request, session: Session) -> web.Response:
        cursor = request.query.get("cursor", "")
        found = await self._run(request, session, "quarantine", cursor=cursor, limit=RECENT)
        rows = {"messages": [_listed(msgspec.json.decode(line)) for line in found["messages"]], **_rest(found)}
        more_at = urlencode({"cursor": found["next"]}) if found["next"] else ""
        return self._render(
            "messages.html",
            session,
            asked={},
            found=rows,
            place={},
            why="",
            more_at=more_at,
            verbs=OF_QUARANTINE,
            quarantine=True,
        )

    async def _message(self, request: web.Request, session: Session) -> web.Response:
        ident = request.match_info["id"]
        found = await self._run(request, session, "explain", id=ident)
        events = found.get("history") or []
        if found["state"] != "gone":
            try:
                events = (await self._run(request, session, "history", id=ident))["events"]
            except Problem:
                events = []  # the history does not reach back so far
        header = await self._if_allowed(request, session, "header", id=ident) if found["state"] != "gone" else None
        for field in header["header"] if header is not None else ():
            field["value"] = " ".join(field["value"].split())
        verbs = OF_QUARANTINE if found.get("quarantine") else OF_QUEUE
        return self._render("message.html", session, one=found, events=events, header=header, verbs=verbs)

    async def _site(self, request: web.Request, session: Session) -> web.Response:
        name = request.match_info["name"]
        return self._render("site.html", session, name=name, found=await self._run(request, session, "site", name=name))

    # Changing

    async def _confirm(self, request: web.Request, session: Session) -> web.Response:
        """What would be changed, and how many; the button that does it."""
        form = await _form(request)
        self._access.check_form(request, session, form.get("csrf"))
        action, given = _asked(form)
        count = await self._count(request, session, action, given)
        return self._render("confirm.html", session, action=action, name=_name(form), given=given, count=count, changed=None)

    async def _count(self, request: web.Request, session: Session, action: Action, given: dict[str, Any]) -> int:
        if action.operation.startswith("site_"):
            caller = self._access.of_session(request, session)
            self._access.require(request, caller, action.route.scope)
            site = str(given.get("site", ""))
            return (await self._ask((caller.who, caller.where), lambda peer: _waiting_there(peer, site)))[0]
        found = await self._run(request, session, action.operation, **given | {"dry_run": True})
        return int(found["matched"])

    async def _do(self, request: web.Request, session: Session) -> web.Response:
        form = await _form(request)
        self._access.check_form(request, session, form.get("csrf"))
        action, given = _asked(form)
        expect = form.get("expect", "")
        more = {} if action.operation.startswith("site_") else {"expect": expect}
        try:
            found = await self._run(request, session, action.operation, **given, **more)
        except Problem as error:
            if error.status != 409 or "matched" not in error.more:
                raise
            return self._render(
                "confirm.html", session, 409, action=action, name=_name(form), given=given, count=error.more["matched"],
                changed=expect,
            )  # fmt: skip
        return self._render("done.html", session, action=action, given=given, found=found)

    def error(self, error: Problem) -> web.Response:
        """An error that nobody has handled."""
        return self._render("error.html", None, error.status, error=error)

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in STATIC:
            raise web.HTTPNotFound
        headers = SECURE | {"Content-Type": f"{STATIC[name]}; charset=utf-8", "Cache-Control": "private, max-age=3600"}
        return web.Response(body=self._static[name], headers=headers)


def _go(where: str) -> web.Response:
    return web.Response(status=303, headers=HEADERS | {"Location": where})


async def _form(request: web.Request) -> dict[str, Any]:
    """The fields of a form; `ids` is a list."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise Problem(415, "a form is expected (application/x-www-form-urlencoded)")
    text = (await read_body(request)).decode("utf-8", "replace")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=FIELDS_MOST)
    except ValueError:
        raise Problem(413, f"the form has more than {FIELDS_MOST} fields") from None
    found: dict[str, Any] = dict(pairs)
    if ids := [value for name, value in pairs if name == "ids"]:
        found["ids"] = ids
    return found


def _name(form: dict[str, Any]) -> str:
    """The action that a form names."""
    name = str(form.get("action", ""))
    if name not in ACTIONS:
        raise Problem(400, f"{name!r}: there is no such action", argument="action")
    return name


def _asked(form: dict[str, Any]) -> tuple[Action, dict[str, Any]]:
    """The action, and the arguments of its operation that say what it is about."""
    given = {name: value for name, value in form.items() if name not in ("csrf", "action", "expect") and value}
    return ACTIONS[_name(form)], given


def _waiting_there(peer: Peer, site: str) -> int:
    """How many messages are for a site."""
    rows = v.site(peer, m.OfSite(name=site))["sites"] if site else []
    return sum(row["waiting"] + row["deferred"] + row["in flight"] for row in rows)


def _rest(found: dict[str, Any]) -> dict[str, Any]:
    return {"notes": [], "next": found["next"], "missing": found["missing"]}


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    """A message of a list as `find` has it."""
    recipients = [{"address": one["address"], "state": one["state"], "reply": one["last"]} for one in row["recipients"]]
    held = row["quarantine"]
    return row | {"recipients": recipients, "why": row["held_for"], "subject": held["subject"] if held else None}


def _reasons(peer: Peer, queues: list[dict[str, Any]], sites: list[dict[str, Any]]) -> dict[str, str]:
    """Why mail of queues waits, by their names: what their site says, else the last reply about their oldest message (of
    LOOKED_INTO queues)."""
    found = {}
    for row in queues:
        name = row["queue"]
        for site in sites:
            if site["reason"] and (site["pool"] == name or name.startswith(f"{site['pool']}/")):
                found[name] = str(site["reason"])
    unclear = [row["queue"] for row in queues if row["deferred"] and row["queue"] not in found][:LOOKED_INTO]
    for name in unclear:
        for shard in asked(peer, "shards"):
            page = asked(peer, "page", shard=shard, after=0, chosen={"queue": name})
            lines = page["lines"].splitlines()[:1] if page else []
            replies = [one["last"] for line in lines for one in msgspec.json.decode(line)["recipients"] if one["last"]]
            if replies:
                found[name] = replies[0]
                break
    return found
