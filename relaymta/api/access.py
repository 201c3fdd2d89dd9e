"""Who asks, and what they may do: whoever can open the unix socket may do everything; over TCP a token, or a login with one on
the page, says it. Browsers are not trusted: neither a page that makes one send requests here, nor a name that suddenly means
this host."""

import asyncio
import hashlib
import hmac
import pwd
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import web

from relaymta.admin.tokens import SCOPES, Token, Tokens
from relaymta.config import Config, parse_hostport
from relaymta.privileges import peer_of
from relaymta.problems import Problem
from relaymta.proto.host import hostname_of, is_address

__all__ = ["Access", "Caller", "Session"]

COOKIE = "relaymta-session"
SESSIONS = 1000
FAILURES = 10  # denied requests of one address in FAILURE_SECONDS: wrong tokens and the like; further ones are not logged
FAILURE_SECONDS = 60.0
ADDRESSES = 10_000  # whose wrong tokens are counted
# What a request has that comes through a proxy, or from a browser: on the unix socket it is nobody's own.
FOREIGN = (
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Real-IP",
    "Via",
    "Origin",
    "Referer",
    "Cookie",
    "Sec-Fetch-Site",
)


class Caller(NamedTuple):
    """`who`: for the log; `where`: from where; `scopes`: what they may do."""

    who: str
    where: str
    scopes: frozenset[str]


class Session:
    """A login on the page. `csrf`: what every form of it has; `until`: seconds UTC."""

    def __init__(self, token: Token, until: float) -> None:
        self.token = token
        self.until = until
        self.csrf = secrets.token_urlsafe(32)


class Access:
    """`note(who, where, action, result)` logs a request that was denied, or a login."""

    def __init__(self, config: Config, tokens: Tokens, note: Callable[[str, str, str, str], None]) -> None:
        self._config = config
        self._tokens = tokens
        self._note = note
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        listens = config.admin.listen
        own = {parse_hostport(listens)[0]} if listens != "off" else set()
        self._names = {"localhost", config.hostname.lower(), *(name.lower().rstrip(".") for name in config.admin.names), *own}

    # Where from

    def host_allowed(self, request: web.Request) -> bool:
        """Whether a request is for one of our names. (DNS rebinding: a page of another name whose address has become ours.)"""
        if len(request.headers.getall("Host", [])) > 1:
            return False
        name = hostname_of(request.headers.get("Host", ""))
        return name in self._names or is_address(name)

    # API

    async def caller(self, request: web.Request, local: bool) -> Caller:
        """Who makes a request of the API. `local`: it came by the unix socket. Problem (401, 429)."""
        where = "admin socket" if local else request.remote or "unknown"
        kind, _, presented = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and presented.strip():
            token = await self.token(request, presented.strip(), where)
            return Caller(f"token {token.name}", where, frozenset(token.scopes))
        if local and not _foreign(request):
            return Caller(await _user(request), where, frozenset(SCOPES))
        if kind and self._failed(where)[0] < FAILURES:
            self._note("unknown", where, f"{request.method} {request.path}", "denied: no bearer token")
        what = "a request that a proxy or browser has sent needs a token here, too" if local else "a token is needed"
        raise Problem(401, f"{what}: `Authorization: Bearer ...` (`relaymta token create`)", _CHALLENGE)

    async def token(self, request: web.Request, presented: str, where: str) -> Token:
        """The token that was presented. Problem (401; 429 after many that were wrong, which are not logged)."""
        found = await asyncio.to_thread(self._tokens.find, presented)
        if found is not None:
            return found
        count, since = self._failed(where)
        if count >= FAILURES:
            wait = str(max(1, int(since + FAILURE_SECONDS - time.monotonic())))
            raise Problem(429, "too many wrong tokens from this address", {"Retry-After": wait})
        problem = self._tokens.problem  # for the log alone: it names a path
        self._note(
            "unknown", where, f"{request.method} {request.path}", "denied: wrong token" + (f" ({problem})" if problem else "")
        )
        raise Problem(401, "no valid token", _CHALLENGE)

    def _failed(self, where: str) -> tuple[int, float]:
        """Count what an address was denied: how many times before, in the minute since when. FAILURES are logged."""
        count, since = self._failures.pop(where, (0, 0.0))
        now = time.monotonic()
        if now - since > FAILURE_SECONDS:
            count, since = 0, now
        self._failures[where] = count + 1, since
        if len(self._failures) > ADDRESSES:
            self._failures.popitem(last=False)
        return count, since

    def require(self, request: web.Request, caller: Caller, scope: str) -> None:
        """Problem (403) unless the caller has a scope."""
        if scope not in caller.scopes:
            self._note(caller.who, caller.where, f"{request.method} {request.path}", f"denied: it needs the scope {scope}")
            more = {"WWW-Authenticate": f'Bearer realm="relaymta", error="insufficient_scope", scope="{scope}"'}
            raise Problem(403, f"this needs the scope {scope}", more)

    # Page

    def login(self, token: Token, where: str) -> str:
        """Begin a session; the value of its cookie."""
        value = secrets.token_urlsafe(32)
        until = time.time() + self._config.admin.session
        self._sessions[_digest(value)] = Session(token, min(until, token.expires) if token.expires else until)
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)
        self._note(f"token {token.name}", where, "page login", "done")
        return value

    async def session(self, request: web.Request) -> Session | None:
        """The session of a request; None: there is none, it has ended, or its token is not valid any more."""
        key = _digest(request.cookies.get(COOKIE, ""))
        found = self._sessions.get(key)
        if found is None:
            return None
        if found.until < time.time() or not await asyncio.to_thread(self._tokens.still, found.token):
            self._sessions.pop(key, None)
            return None
        return found

    def logout(self, request: web.Request) -> None:
        """End the session of a request."""
        self._sessions.pop(_digest(request.cookies.get(COOKIE, "")), None)

    def in_use(self) -> bool:
        """Whether there is a session."""
        now = time.time()
        for key in [key for key, one in self._sessions.items() if one.until < now]:
            del self._sessions[key]
        return bool(self._sessions)

    def of_session(self, request: web.Request, session: Session) -> Caller:
        """Who makes a request of the page."""
        return Caller(f"token {session.token.name}", f"{request.remote or 'unknown'} (page)", frozenset(session.token.scopes))

    def check_origin(self, request: web.Request) -> None:
        """Problem (403) unless a form is from here, where the browser says where it is from."""
        origin = request.headers.get("Origin")
        here = origin is None or origin.partition("://")[2] == request.headers.get("Host", "")
        if not here or request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            where = request.remote or "unknown"
            if self._failed(where)[0] < FAILURES:
                self._note("unknown", where, f"{request.method} {request.path}", "denied: a form of another site")
            raise Problem(403, "this form was sent by another site")

    def check_form(self, request: web.Request, session: Session, given: Any) -> None:
        """Problem (403) unless a form is from here (`check_origin`), and has the secret of the session."""
        self.check_origin(request)
        if not (isinstance(given, str) and hmac.compare_digest(given.encode("utf-8", "replace"), session.csrf.encode())):
            caller = self.of_session(request, session)
            self._note(
                caller.who, caller.where, f"{request.method} {request.path}", "denied: a form without the secret of its login"
            )
            raise Problem(403, "this form is of an earlier login: load the page again")


_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="relaymta"'}


def _digest(value: str) -> str:
    """What a session is known by: the cookie itself is nowhere."""
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()


def _foreign(request: web.Request) -> bool:
    return any(name in request.headers for name in FOREIGN) or request.headers.get("User-Agent", "").startswith("Mozilla/")


async def _user(request: web.Request) -> str:
    """The name of the user at the other end of the unix socket."""
    transport = request.transport
    if transport is None:
        raise Problem(400, "the client has gone")
    uid = peer_of(transport.get_extra_info("socket")).uid
    try:
        name = (await asyncio.to_thread(pwd.getpwuid, uid)).pw_name
    except KeyError:
        return f"uid {uid}"
    return f"{name} (uid {uid})"
