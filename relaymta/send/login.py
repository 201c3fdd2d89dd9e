"""AUTH at smart hosts: PLAIN, LOGIN, CRAM-MD5 (aiosmtplib), SCRAM-SHA-256 (scramp), XOAUTH2 and OAUTHBEARER.

Called only over verified TLS: connect.py ensures it, and the configuration requires it.
"""

import base64
import os
from collections.abc import Awaitable, Callable

import aiosmtplib
import scramp

from relaymta.config import Route
from relaymta.errors import Failure
from relaymta.files import read_secret
from relaymta.send.oauth import Tokens

__all__ = ["LoginFailed", "log_in"]

# The order of preference of `auth = "auto"`.
_STRONGEST = ("SCRAM-SHA-256", "PLAIN", "LOGIN", "CRAM-MD5")


class LoginFailed(Failure):
    """Authentication is not possible: no readable password, no common mechanism, no proof by the server. str() is the reason, for
    the log and operators only."""

    def __init__(self, reason: str) -> None:
        super().__init__("logging in to the next host failed", reason)


async def log_in(client: aiosmtplib.SMTP, route: Route, tokens: Tokens) -> None:
    """Authenticate with the route's credentials. Raises LoginFailed, TokenError, or aiosmtplib's exceptions with the reply."""
    offered = client.esmtp_extensions.get("auth", "").upper().replace("=", " ").split()
    wanted = route.auth.upper() if route.auth != "auto" else "XOAUTH2" if route.oauth else ""
    mechanism = wanted or next((name for name in _STRONGEST if name in offered), "")
    if mechanism not in offered:
        raise LoginFailed(f"the host offers AUTH {' '.join(offered) or 'not at all'}, not {mechanism or ', '.join(_STRONGEST)}")
    if route.oauth is None:
        await _MECHANISMS[mechanism](client, route.username, _password(route))
        return
    try:
        await _bearer(client, mechanism, route.username, token := await tokens.get(route.oauth))
    except aiosmtplib.SMTPAuthenticationError:
        tokens.refused(route.oauth, token)  # revoked before it expired: retry once with a new one
        await _bearer(client, mechanism, route.username, await tokens.get(route.oauth))


def _password(route: Route) -> str:
    if not route.password_file:
        return os.environ.get(route.password_env, "")
    try:
        return read_secret(route.password_file)
    except OSError as error:
        raise LoginFailed(f"password_file {route.password_file}: {error.strerror}") from None


async def _plain(client: aiosmtplib.SMTP, username: str, password: str) -> None:
    await client.auth_plain(username, password)


async def _login(client: aiosmtplib.SMTP, username: str, password: str) -> None:
    await client.auth_login(username, password)


async def _cram_md5(client: aiosmtplib.SMTP, username: str, password: str) -> None:
    await client.auth_crammd5(username, password)


async def _scram(client: aiosmtplib.SMTP, username: str, password: str) -> None:
    """RFC 5802, 7677; without channel binding."""
    scram = scramp.ScramClient(["SCRAM-SHA-256"], username, password)
    first = await _command(client, b"AUTH", b"SCRAM-SHA-256", base64.b64encode(scram.get_client_first().encode()))
    try:
        scram.set_server_first(base64.b64decode(first.message).decode())
        final = await _command(client, base64.b64encode(scram.get_client_final().encode()))
        # RFC 4954 4: the server's proof comes with 334 and is answered by an empty line, or is part of the 235 reply.
        scram.set_server_final(base64.b64decode(final.message.split(" ")[-1]).decode())
    except (scramp.ScramException, ValueError) as error:
        raise LoginFailed(f"SCRAM-SHA-256: the host did not prove that it has the password: {error}") from None
    if final.code == 334:
        await _command(client, b"", last=True)


async def _command(client: aiosmtplib.SMTP, *words: bytes, last: bool = False) -> aiosmtplib.SMTPResponse:
    response = await client.execute_command(*words)
    if response.code not in ((235,) if last else (334, 235)):
        raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)
    return response


async def _bearer(client: aiosmtplib.SMTP, mechanism: str, username: str, token: str) -> None:
    """XOAUTH2 (Google, Microsoft) or OAUTHBEARER (RFC 7628). A failure is a 334 with the reason, then, after an empty
    response (a dummy one for OAUTHBEARER), the final reply."""
    initial = f"user={username}\1auth=Bearer {token}\1\1"
    if mechanism == "OAUTHBEARER":
        initial = f"n,a={username},\1auth=Bearer {token}\1\1"
    response = await client.execute_command(b"AUTH", mechanism.encode(), base64.b64encode(initial.encode()))
    if response.code == 334:
        response = await client.execute_command(b"AQ==" if mechanism == "OAUTHBEARER" else b"")
    if response.code != 235:
        raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)


_MECHANISMS: dict[str, Callable[[aiosmtplib.SMTP, str, str], Awaitable[None]]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "CRAM-MD5": _cram_md5,
    "SCRAM-SHA-256": _scram,
}
