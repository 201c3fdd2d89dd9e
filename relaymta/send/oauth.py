"""OAuth 2.0 access tokens for smart hosts (RFC 6749 4.4 and 6): fetched when first needed, cached until shortly before they
expire, and refreshed by one request for all connections that wait for one.

One process of the machine exchanges tokens (`Exchanges`, in the supervisor): an endpoint that rotates refresh tokens takes each
only once, and revokes the whole family when one is used again (RFC 9700 4.14.2). Each worker has `Tokens`, which asks it.
"""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

from relaymta.config import OAuth
from relaymta.errors import Failure
from relaymta.files import read_secret
from relaymta.web import WebError, object_in, request

__all__ = ["Exchanges", "TokenError", "Tokens"]

EARLY_SECONDS = 60.0  # a token that expires sooner is not used
LONGEST_SECONDS = 3600.0
DEFAULT_SECONDS = 300.0  # without expires_in, which RFC 6749 5.1 only recommends
RETRY_SECONDS = 10.0  # after a failed request
TIMEOUT = 20.0
LARGEST = 65_536  # octets of a response


class TokenError(Failure):
    """No access token is available now. str() is the reason, for the log and operators only."""

    def __init__(self, reason: str) -> None:
        super().__init__("no access token for the next host is available now", reason, category="password")


@dataclass(slots=True)
class _Token:
    text: str
    until: float


class Tokens:
    """The access tokens that a worker uses. `exchange(settings, refused)` gets one and the seconds for which it may be used, from
    the one who exchanges; `refused`: one that a host has rejected, "" otherwise. It raises TokenError. `now()`: monotonic
    seconds."""

    def __init__(
        self, exchange: Callable[[OAuth, str], Awaitable[tuple[str, float]]], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._exchange = exchange
        self._now = now
        self._tokens: dict[OAuth, _Token] = {}
        self._refused: dict[OAuth, str] = {}

    async def get(self, settings: OAuth) -> str:
        """An access token. TokenError when none is available."""
        token = self._tokens.get(settings)
        if token is None or token.until <= self._now():
            text, seconds = await self._exchange(settings, self._refused.get(settings, ""))
            token = self._tokens[settings] = _Token(text, self._now() + seconds)
        return token.text

    def refused(self, settings: OAuth, text: str) -> None:
        """A host rejected this access token: the next `get` asks for another."""
        self._refused[settings] = text
        token = self._tokens.get(settings)
        if token is not None and token.text == text:
            del self._tokens[settings]


class Exchanges:
    """The one who exchanges tokens. `kept(name)`: the refresh token that replaced the configured one, "" when none did;
    `keep(name, token)` stores one, durably. `now()`: monotonic seconds. At most one exchange at a time uses a refresh token."""

    def __init__(
        self,
        kept: Callable[[str], str],
        keep: Callable[[str, str], Awaitable[None]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kept = kept
        self._keep = keep
        self._now = now
        self._tokens: dict[OAuth, _Token] = {}
        self._failed: dict[OAuth, tuple[float, str]] = {}
        self._asking: dict[OAuth, asyncio.Task[_Token]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by the name of a refresh token

    async def get(self, settings: OAuth, refused: str = "") -> tuple[str, float]:
        """An access token other than `refused`, and the seconds for which it may be used. TokenError when none is available. The
        exchange goes on when the caller is cancelled, since others may wait for it, and a rotated token must not be lost."""
        token = self._tokens.get(settings)
        if token is None or token.until <= self._now() or token.text == refused:
            again, reason = self._failed.get(settings, (0.0, ""))
            if again > self._now():
                raise TokenError(reason)
            task = self._asking.get(settings)
            if task is None:
                task = self._asking[settings] = asyncio.get_running_loop().create_task(self._fetch(settings))
                task.add_done_callback(lambda done: self._over(settings, done))
            token = await asyncio.shield(task)
        return token.text, token.until - self._now()

    def _over(self, settings: OAuth, done: "asyncio.Task[_Token]") -> None:
        del self._asking[settings]
        if not done.cancelled():
            done.exception()  # those who waited may be gone

    async def over(self, seconds: float) -> None:
        """Wait for the exchanges under way, for so long at most."""
        if self._asking:
            await asyncio.wait(self._asking.values(), timeout=seconds)

    async def close(self) -> None:
        """Wait for the exchanges under way: a refresh token that was rotated is stored."""
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _fetch(self, settings: OAuth) -> _Token:
        try:
            text, seconds = _token_in(await self._ask(settings))
        except (WebError, OSError, TokenError) as error:  # OSError: the replacement of a refresh token could not be stored
            reason = f"token endpoint {settings.token_url}: {error}"
            self._failed[settings] = (self._now() + RETRY_SECONDS, reason)
            raise TokenError(reason) from None
        self._failed.pop(settings, None)
        kept = min(seconds, LONGEST_SECONDS)
        token = self._tokens[settings] = _Token(text, self._now() + max(kept - EARLY_SECONDS, kept / 2))
        return token

    async def _ask(self, settings: OAuth) -> dict[str, object]:
        form = {"client_id": settings.client_id, "grant_type": "client_credentials"}
        if settings.client_secret_file:
            form["client_secret"] = await asyncio.to_thread(_secret, settings.client_secret_file)
        if settings.scope:
            form["scope"] = settings.scope
        if not settings.refresh_token_file:
            return await _post(settings.token_url, form)
        given = await asyncio.to_thread(_secret, settings.refresh_token_file)
        name = _name(settings, given)
        turn = self._turns.get(name)
        if turn is None:
            turn = self._turns[name] = asyncio.Lock()
        async with turn:  # other settings (another scope) may use the same refresh token
            used = self._kept(name) or given
            answer = await _post(settings.token_url, form | {"grant_type": "refresh_token", "refresh_token": used})
            rotated = answer.get("refresh_token")
            if isinstance(rotated, str) and rotated not in ("", used):
                await self._keep(name, rotated)
        return answer


async def _post(url: str, form: dict[str, str]) -> dict[str, object]:
    """An endpoint's successful response. WebError or TokenError with what it says otherwise."""
    response = await request("POST", url, seconds=TIMEOUT, largest=LARGEST, errors=True, data=form)
    if response.status == 200:
        return object_in(response.body)
    try:
        answer = object_in(response.body)
    except WebError:
        answer = {}
    said = answer.get("error_description") or answer.get("error") or response.reason
    raise TokenError(_without(form, f"{response.status} {said}"))


def _token_in(answer: dict[str, object]) -> tuple[str, float]:
    """The access token of a response, and the seconds for which it is valid. TokenError when there is none."""
    text, seconds = answer.get("access_token"), answer.get("expires_in", DEFAULT_SECONDS)
    if not isinstance(text, str) or not text:
        raise TokenError("access_token is not a string" if "access_token" in answer else "no 'access_token'")
    try:
        valid = float(str(seconds))  # some send a string
    except ValueError:
        valid = 0.0
    return text, valid if 0 < valid < math.inf else DEFAULT_SECONDS


def _name(settings: OAuth, given: str) -> str:
    """The name under which the replacement of a refresh token is stored; a new token in the file has a new name, and is used."""
    return hashlib.sha256("\0".join((settings.token_url, settings.client_id, given)).encode()).hexdigest()[:32]


def _without(form: dict[str, str], text: str) -> str:
    """An endpoint's response without the secrets that it may quote."""
    for name in ("client_secret", "refresh_token"):
        if form.get(name):
            text = text.replace(form[name], "***")
    return text


def _secret(path: str) -> str:
    try:
        return read_secret(path)
    except OSError as error:
        raise TokenError(f"{path}: {error.strerror}") from None
