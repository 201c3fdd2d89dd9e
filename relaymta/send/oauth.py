"""OAuth 2.0 access tokens for smart hosts (RFC 6749 4.4 and 6): fetched when first needed, cached until shortly before they
expire, and refreshed by one request for all connections that wait for one."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relaymta.config import OAuth
from relaymta.errors import Failure

__all__ = ["TokenError", "Tokens"]

EARLY_SECONDS = 60.0  # a token that expires sooner is not used
LONGEST_SECONDS = 3600.0
DEFAULT_SECONDS = 300.0  # without expires_in, which RFC 6749 5.1 only recommends
RETRY_SECONDS = 10.0  # after a failed request
TIMEOUT = 20.0


class TokenError(Failure):
    """No access token is available now. str() is the reason, for the log and operators only."""

    def __init__(self, reason: str) -> None:
        super().__init__("no access token for the next host is available now", reason)


@dataclass(slots=True)
class _Token:
    text: str
    until: float


class Tokens:
    """The tokens of one worker. `kept(name)`: the refresh token that replaced the configured one, "" when none did;
    `keep(name, token)` stores one, for all workers and across a restart. `now()`: monotonic seconds."""

    def __init__(
        self, kept: Callable[[str], str], keep: Callable[[str, str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._kept = kept
        self._keep = keep
        self._now = now
        self._tokens: dict[OAuth, _Token] = {}
        self._failed: dict[OAuth, tuple[float, str]] = {}
        self._asking: dict[OAuth, asyncio.Task[str]] = {}
        self.fetched = 0

    async def get(self, settings: OAuth) -> str:
        """An access token. TokenError when none is available."""
        token = self._tokens.get(settings)
        if token is not None and token.until > self._now():
            return token.text
        again, reason = self._failed.get(settings, (0.0, ""))
        if again > self._now():
            raise TokenError(reason)
        task = self._asking.get(settings)
        if task is None:
            task = self._asking[settings] = asyncio.get_running_loop().create_task(self._fetch(settings))
            task.add_done_callback(lambda _: self._asking.pop(settings, None))
        return await asyncio.shield(task)

    def refused(self, settings: OAuth, text: str) -> None:
        """A host rejected this access token: the next `get` fetches another."""
        token = self._tokens.get(settings)
        if token is not None and token.text == text:
            del self._tokens[settings]

    async def _fetch(self, settings: OAuth) -> str:
        import aiohttp  # imported at start where a route needs it: it takes 0.1 s

        try:
            answer = await self._ask(settings)
            text, seconds = answer["access_token"], float(str(answer.get("expires_in") or DEFAULT_SECONDS))
            if not isinstance(text, str) or not text:
                raise ValueError("access_token is not a string")
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, ValueError, TypeError, TokenError) as error:
            what = str(error) or type(error).__name__
            reason = f"token endpoint {settings.token_url}: {'no ' if isinstance(error, KeyError) else ''}{what}"
            self._failed[settings] = (self._now() + RETRY_SECONDS, reason)
            raise TokenError(reason) from None
        self.fetched += 1
        self._failed.pop(settings, None)
        kept = min(seconds, LONGEST_SECONDS)
        self._tokens[settings] = _Token(text, self._now() + max(kept - EARLY_SECONDS, kept / 2))
        return text

    async def _ask(self, settings: OAuth) -> dict[str, object]:
        import aiohttp

        name, form = "", {"client_id": settings.client_id, "grant_type": "client_credentials"}
        if settings.client_secret_file:
            form["client_secret"] = await asyncio.to_thread(_secret, settings.client_secret_file)
        if settings.refresh_token_file:
            form["grant_type"] = "refresh_token"
            given = await asyncio.to_thread(_secret, settings.refresh_token_file)
            name = _name(settings, given)
            form["refresh_token"] = self._kept(name) or given
        if settings.scope:
            form["scope"] = settings.scope
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as client,
            client.post(settings.token_url, data=form, allow_redirects=False) as response,
        ):
            answer = await response.json(content_type=None)
            if response.status != 200 or not isinstance(answer, dict):
                said = answer.get("error_description") or answer.get("error") if isinstance(answer, dict) else ""
                raise TokenError(_without(form, f"{response.status} {said or response.reason}"))
        rotated = answer.get("refresh_token")
        if name and isinstance(rotated, str) and rotated not in ("", form["refresh_token"]):
            self._keep(name, rotated)
        return answer


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
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
