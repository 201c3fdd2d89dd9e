"""Authentication back ends over HTTP: passwords, and bearer tokens (JWT verified by a JWKS, RFC 7519 and 7517; or introspection,
RFC 7662)."""

import asyncio
import contextlib
import time
from typing import Any

import aiohttp
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, InvalidKeyTypeError
from joserfc.jwk import JWKRegistry, Key, KeySet

from relaymta.auth.identity import Identity, Unavailable, possible
from relaymta.config import TokensTable
from relaymta.files import read_secret
from relaymta.proto.address import comparable
from relaymta.web import WebError, object_in, request

__all__ = ["Bearer", "Passwords"]

TIMEOUT = 10.0
LARGEST = 1 << 20  # octets of a response body
NAMES_KEPT = 10_000
KEYS_MOST = 100  # keys of an issuer: each takes 0.1 ms to import
KEYS_KEPT = 3600.0  # seconds until the issuer's keys are fetched again
KEYS_AGAIN = 30.0  # ... when a token names an unknown key
KEYS_RETRY = 5.0  # ... when fetching them failed
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA", "Ed25519"]  # never "none", never a shared key


async def _request(method: str, url: str, **options: Any) -> tuple[int, bytes]:
    """The status and the whole body of a response. Unavailable when there is none."""
    try:
        response = await request(method, url, seconds=TIMEOUT, largest=LARGEST, **options)
    except WebError as error:
        raise Unavailable(f"{url}: {error}") from None
    return response.status, response.body


def _object(url: str, body: bytes) -> dict[str, Any]:
    """The JSON object in a response body. Unavailable when it is none."""
    try:
        return object_in(body)
    except WebError as error:
        raise Unavailable(f"{url}: {error}") from None


class Passwords:
    """Password verification by an HTTP endpoint: `POST url` with {"user", "password", "client"}. The response is 200 with
    {"user", "application", "priority", "senders"}, each optional; or 401 or 403 for wrong credentials."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.names: dict[str, str] = {}  # login name -> the back end's user name, where they differ

    async def password(self, user: str, password: str, address: str) -> Identity | None:
        """The identity of `user`; None for a wrong password. `address`: the client's. Unavailable: no response, or no valid
        one."""
        status, body = await _request("POST", self._url, json={"user": user, "password": password, "client": address})
        if status in (401, 403):
            return None
        if status != 200:
            raise Unavailable(f"{self._url}: status {status}")
        found = _object(self._url, body or b"{}")
        name, application, priority = found.get("user", user), found.get("application", ""), found.get("priority", "")
        senders = found.get("senders", [])
        if not isinstance(name, str) or not name:
            raise Unavailable(f"{self._url}: user must be a non-empty string")
        if not isinstance(senders, list) or not all(isinstance(sender, str) and "@" in sender for sender in senders):
            raise Unavailable(f"{self._url}: senders must be addresses or @domain")
        if not isinstance(application, str) or priority not in ("", "express", "normal", "bulk"):
            raise Unavailable(f"{self._url}: application must be a string, priority one of express, normal, bulk")
        if name != user:
            if len(self.names) >= NAMES_KEPT:
                self.names.clear()
            self.names[user] = name
        return Identity(name, application, priority, tuple(map(comparable, senders)))


class Bearer:
    """Verifies the bearer tokens of one issuer."""

    def __init__(self, settings: TokensTable) -> None:
        self._settings = settings
        self._keys: KeySet | None = None
        self._fetched_at = 0.0
        self._failed_at = -KEYS_RETRY
        self._problem = ""
        self._fetching = asyncio.Lock()

    async def user(self, token: str) -> str:
        """The user that a token is for; "" for a token that is invalid, expired or not active. Unavailable: the issuer gives no
        usable answer."""
        settings = self._settings
        claims = await (self._introspected(token) if settings.introspection else self._verified(token)) or {}
        user = claims.get(settings.user_claim, "")
        if settings.user_claim == "email" and claims.get("email_verified", True) not in (True, "true"):
            return ""  # an unverified address may be another's (OpenID Connect Core 5.7)
        return user if isinstance(user, str) and possible(user) else ""

    async def _verified(self, token: str) -> dict[str, Any] | None:
        for max_age in (KEYS_KEPT, KEYS_AGAIN):
            keys = await self._key_set(max_age)
            try:
                return self._claims(token, keys)
            except InvalidKeyIdError:  # the issuer may have a new key
                continue
            except Exception:  # any error that a client's token causes in the library is a failed login
                return None
        return None

    def _claims(self, token: str, keys: KeySet) -> dict[str, Any]:
        found = jwt.decode(token, keys, algorithms=ALGORITHMS)
        wanted: dict[str, Any] = {"exp": {"essential": True}, "iss": {"essential": True, "value": self._settings.issuer}}
        if self._settings.audience:
            wanted["aud"] = {"essential": True, "value": self._settings.audience}
        jwt.JWTClaimsRegistry(leeway=30, **wanted).validate(found.claims)
        return found.claims

    async def _key_set(self, max_age: float) -> KeySet:
        """The issuer's keys, fetched at most `max_age` seconds ago, or the last known ones while it does not answer. After a
        failure it is not asked again for KEYS_RETRY seconds, so that logins do not wait for it. Unavailable: no keys were fetched
        yet."""
        if self._keys is not None and time.monotonic() - self._fetched_at <= max_age:
            return self._keys
        async with self._fetching:
            now = time.monotonic()
            if self._keys is None or now - self._fetched_at > max_age:
                if now - self._failed_at > KEYS_RETRY:
                    await self._fetch_keys()
                if self._keys is None:
                    raise Unavailable(self._problem)
            return self._keys

    async def _fetch_keys(self) -> None:
        try:
            status, body = await _request("GET", self._settings.jwks)
            if status != 200:
                raise Unavailable(f"{self._settings.jwks}: status {status}")
            self._keys, self._fetched_at = _key_set(self._settings.jwks, body), time.monotonic()
        except Unavailable as error:
            self._problem = str(error)
        else:
            return
        self._failed_at = time.monotonic()

    async def _introspected(self, token: str) -> dict[str, Any] | None:
        settings = self._settings
        secret = await asyncio.to_thread(_secret, settings.client_secret_file) if settings.client_secret_file else ""
        auth = aiohttp.BasicAuth(settings.client_id, secret) if settings.client_id else None
        status, body = await _request("POST", settings.introspection, data={"token": token}, auth=auth)
        if status != 200:
            raise Unavailable(f"{settings.introspection}: status {status}")
        found = _object(settings.introspection, body)
        if found.get("active") is not True:
            return None
        audience = found.get("aud")
        if settings.audience and settings.audience not in (audience if isinstance(audience, list) else [audience]):
            return None
        return found if not settings.issuer or found.get("iss", settings.issuer) == settings.issuer else None


def _key_set(url: str, body: bytes) -> KeySet:
    """The usable keys of a JWKS; others are ignored (RFC 7517 5). Unavailable when there are none."""
    found, listed = [], _object(url, body).get("keys")
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
    _ = key.public_key  # raises when its numbers are no valid key
    key.ensure_kid()
    return key


def _secret(path: str) -> str:
    try:
        return read_secret(path)
    except OSError as error:
        raise Unavailable(f"client_secret_file: {path}: {error.strerror}") from None
