"""Logins that another program knows, by HTTP: passwords, and bearer tokens (JWT by a JWKS, RFC 7519 and 7517; or introspection,
RFC 7662)."""

import asyncio
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, InvalidKeyTypeError
from joserfc.jwk import JWKRegistry, Key, KeySet

from relaymta.accept.identity import Identity, Unavailable, possible
from relaymta.config import TokensTable

__all__ = ["Bearer", "Passwords"]

TIMEOUT = 10.0
LARGEST = 1 << 20  # octets of an answer
PLAIN = {"Accept-Encoding": "identity"}  # what we ask for is small: nothing is unpacked
NAMES_KEPT = 10_000
KEYS_MOST = 100  # of an issuer: each takes a tenth of a millisecond
KEYS_KEPT = 3600.0  # seconds until the issuer's keys are asked for again
KEYS_AGAIN = 30.0  # ... where a token has an unknown one
KEYS_RETRY = 5.0  # ... where they were not to be had
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA", "Ed25519"]  # never "none", never a shared key


async def _asked(method: str, url: str, **options: Any) -> tuple[int, bytes]:
    """Status and body of a whole answer, in however many pieces it came. Unavailable when there is none."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT), headers=PLAIN) as client,
            client.request(method, url, allow_redirects=False, **options) as response,
        ):
            found = bytearray()
            async for piece in response.content.iter_any():
                found += piece
                if len(found) > LARGEST:
                    raise Unavailable(f"{url}: the answer is longer than {LARGEST} octets")
            return response.status, bytes(found)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:  # ValueError: no HTTP, or no URL
        raise Unavailable(f"{url}: {str(error) or type(error).__name__}") from None


def _object(url: str, text: bytes) -> dict[str, Any]:
    """The JSON object of an answer. Unavailable when it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unavailable(f"{url}: the answer is no JSON object")
    return found


class Passwords:
    """`POST url` with {"user", "password", "client"} is answered by 200 and {"user", "application", "priority", "senders"}, all
    of which may be missing; or by 401 or 403."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.names: dict[str, str] = {}  # what it calls whom, where that is not what they said

    async def password(self, user: str, password: str, address: str) -> Identity | None:
        """Who that is; None for a wrong password. Unavailable when that is not to be had."""
        status, text = await _asked("POST", self._url, json={"user": user, "password": password, "client": address})
        if status in (401, 403):
            return None
        if status != 200:
            raise Unavailable(f"{self._url}: status {status}")
        found = _object(self._url, text or b"{}")
        name, application, priority = found.get("user", user), found.get("application", ""), found.get("priority", "")
        senders = found.get("senders", [])
        if not isinstance(name, str) or not name:
            raise Unavailable(f"{self._url}: user is a name")
        if not isinstance(senders, list) or not all(isinstance(sender, str) and "@" in sender for sender in senders):
            raise Unavailable(f"{self._url}: senders are addresses, or @domain")
        if not isinstance(application, str) or priority not in ("", "express", "normal", "bulk"):
            raise Unavailable(f"{self._url}: application is a string, priority one of express, normal, bulk")
        if name != user:
            if len(self.names) >= NAMES_KEPT:
                self.names.clear()
            self.names[user] = name
        return Identity(name, application, priority, tuple(sender.lower() for sender in senders))


class Bearer:
    """Tokens of one issuer."""

    def __init__(self, settings: TokensTable) -> None:
        self._settings = settings
        self._keys: KeySet | None = None
        self._asked_at = 0.0
        self._failed_at = -KEYS_RETRY
        self._problem = ""
        self._asking = asyncio.Lock()

    async def user(self, token: str) -> str:
        """Whose token it is, "" when it is nobody's (any more). Unavailable when that is not to be had."""
        settings = self._settings
        claims = await (self._introspected(token) if settings.introspection else self._verified(token)) or {}
        user = claims.get(settings.user_claim, "")
        if settings.user_claim == "email" and claims.get("email_verified", True) not in (True, "true"):
            return ""  # anybody may have said that it is theirs (OpenID Connect Core 5.7)
        return user if isinstance(user, str) and possible(user) else ""

    async def _verified(self, token: str) -> dict[str, Any] | None:
        for kept in (KEYS_KEPT, KEYS_AGAIN):
            keys = await self._key_set(kept)
            try:
                return self._claims(token, keys)
            except InvalidKeyIdError:  # there may be a new one
                continue
            except Exception:  # whatever a stranger writes into a token, and whatever the library makes of that: it is no login
                return None
        return None

    def _claims(self, token: str, keys: KeySet) -> dict[str, Any]:
        found = jwt.decode(token, keys, algorithms=ALGORITHMS)
        wanted: dict[str, Any] = {"exp": {"essential": True}, "iss": {"essential": True, "value": self._settings.issuer}}
        if self._settings.audience:
            wanted["aud"] = {"essential": True, "value": self._settings.audience}
        jwt.JWTClaimsRegistry(leeway=30, **wanted).validate(found.claims)
        return found.claims

    async def _key_set(self, kept: float) -> KeySet:
        """The issuer's keys, `kept` seconds old at most, or as they were where it does not answer. Who asks for them in vain is
        not asked again for a while: nobody else waits for that."""
        if self._keys is not None and time.monotonic() - self._asked_at <= kept:
            return self._keys
        async with self._asking:
            now = time.monotonic()
            if self._keys is None or now - self._asked_at > kept:
                if now - self._failed_at > KEYS_RETRY:
                    await self._ask_for_keys()
                if self._keys is None:
                    raise Unavailable(self._problem)
            return self._keys

    async def _ask_for_keys(self) -> None:
        try:
            status, text = await _asked("GET", self._settings.jwks)
            if status != 200:
                raise Unavailable(f"{self._settings.jwks}: status {status}")
            self._keys, self._asked_at = _key_set(self._settings.jwks, text), time.monotonic()
        except Unavailable as error:
            self._problem = str(error)
        else:
            return
        self._failed_at = time.monotonic()

    async def _introspected(self, token: str) -> dict[str, Any] | None:
        settings = self._settings
        secret = await asyncio.to_thread(_secret, settings.client_secret_file) if settings.client_secret_file else ""
        auth = aiohttp.BasicAuth(settings.client_id, secret) if settings.client_id else None
        status, text = await _asked("POST", settings.introspection, data={"token": token}, auth=auth)
        if status != 200:
            raise Unavailable(f"{settings.introspection}: status {status}")
        found = _object(settings.introspection, text)
        if found.get("active") is not True:
            return None
        audience = found.get("aud")
        if settings.audience and settings.audience not in (audience if isinstance(audience, list) else [audience]):
            return None
        return found if not settings.issuer or found.get("iss", settings.issuer) == settings.issuer else None


def _key_set(url: str, text: bytes) -> KeySet:
    """The keys of a JWKS that can be used: the others are for others (RFC 7517 5). Unavailable when there are none."""
    found, listed = [], _object(url, text).get("keys")
    for one in listed[:KEYS_MOST] if isinstance(listed, list) else ():
        with contextlib.suppress(Exception):  # an unknown curve, a missing member, no object at all
            found.append(_key(one))
    if not found:
        raise Unavailable(f"{url}: no JWKS, or none of its keys can be used")
    return KeySet(found)


def _key(one: Any) -> Key:
    if one["kty"] == "oct":
        raise InvalidKeyTypeError("a shared key")
    key = JWKRegistry.import_key(one)
    _ = key.public_key  # its numbers make a key
    key.ensure_kid()
    return key


def _secret(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"client_secret_file: {path}: {error}") from None
