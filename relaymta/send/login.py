"""AUTH at smart hosts: PLAIN, LOGIN, CRAM-MD5 (by aiosmtplib), SCRAM-SHA-256 (scramp), XOAUTH2 and OAUTHBEARER.

Called only over verified TLS: connect.py ensures it, and the configuration requires it.
"""

import base64
import contextlib
import os
from collections.abc import Awaitable, Callable

import aiosmtplib

from relaymta.config import Route
from relaymta.errors import Failure
from relaymta.files import read_secret
from relaymta.send.greeting import LenientSMTP
from relaymta.send.oauth import Tokens

__all__ = ["LoginFailed", "log_in"]

LOGIN_PROMPTS = 2
_PROMPTS = {"pass": "password", "user": "user", "login": "user", "mail": "user"}  # words of prompts, lower case

# The order of preference of `auth = "auto"`.
_STRONGEST = ("SCRAM-SHA-256", "PLAIN", "LOGIN", "CRAM-MD5")


class LoginFailed(Failure):
    """Authentication is not possible: no readable password, no common mechanism, no proof by the server. str() is the reason, for
    the log and operators only."""

    def __init__(self, reason: str) -> None:
        super().__init__("logging in to the next host failed", reason, category="password")


async def log_in(client: LenientSMTP, route: Route, tokens: Tokens) -> None:
    """Authenticate with the route's credentials. Raises LoginFailed, TokenError, or aiosmtplib's exceptions with the reply."""
    offered = client.esmtp_extensions.get("auth", "").upper().replace("=", " ").split()
    wanted = route.auth.upper() if route.auth != "auto" else "XOAUTH2" if route.oauth else ""
    mechanism = wanted or next((name for name in _STRONGEST if name in offered), "")
    if mechanism not in offered:
        raise LoginFailed(f"the host offers AUTH {' '.join(offered) or 'not at all'}, not {mechanism or ', '.join(_STRONGEST)}")
    if route.oauth is None:
        password = _password(route)
        client.hide(password, _initial(route.username, password))
        await _MECHANISMS[mechanism](client, route.username, password)
        return
    try:
        await _bearer(client, mechanism, route.username, token := await tokens.get(route.oauth))
    except aiosmtplib.SMTPAuthenticationError as error:
        if not 500 <= error.code < 600:  # for now (RFC 4954 6), or the host closes: it is not the token
            raise
        tokens.refused(route.oauth, token)  # revoked before it expired: retry once with a new one
        if not client.is_connected:
            raise
        await _bearer(client, mechanism, route.username, await tokens.get(route.oauth))


def _password(route: Route) -> str:
    """The route's password. LoginFailed, which names the file or variable, where there is none: an empty one is never tried."""
    what = f"password_file {route.password_file}" if route.password_file else f"password_env {route.password_env}"
    try:
        if route.password_file:
            return read_secret(route.password_file)
    except OSError as error:
        raise LoginFailed(f"{what}: {error.strerror or error}") from None
    given = os.environb.get(os.fsencode(route.password_env))
    if given is None:
        raise LoginFailed(f"{what}: the variable is not set in the environment of the relay")
    try:
        password = given.decode("utf-8")
    except UnicodeDecodeError:
        raise LoginFailed(f"{what}: not UTF-8") from None
    if not password.strip():
        raise LoginFailed(f"{what}: it is empty")
    return password


def _initial(username: str, password: str) -> str:
    """The message of PLAIN (RFC 4616 2)."""
    return f"\0{username}\0{password}"


async def _plain(client: LenientSMTP, username: str, password: str) -> None:
    """RFC 4616. A host that has ignored the initial response asks for it by 334 (RFC 4954 4)."""
    response = base64.b64encode(_initial(username, password).encode())
    if (await _command(client, b"AUTH", b"PLAIN", response)).code == 334:
        await _command(client, response, last=True)


async def _login(client: LenientSMTP, username: str, password: str) -> None:
    """LOGIN has no standard (draft-murchison-sasl-login): hosts ask for the user, then for the password. No initial response is
    sent, since some hosts ignore it and ask for the user all the same. Each prompt is answered by what it asks for, or, where it
    says neither, in this order; the password is sent once, and never before the user."""
    answers = {"user": username, "password": password}
    response = await _command(client, b"AUTH", b"LOGIN")
    for _ in range(LOGIN_PROMPTS):
        if response.code == 235:
            return
        asked = _asked(response.message) or next(iter(answers), "")
        if asked not in answers or (asked == "password" and "user" in answers):
            break
        response = await _command(client, base64.b64encode(answers.pop(asked).encode()))
    if response.code == 235:
        return
    await client.execute_command(b"*")  # RFC 4954 4: it is cancelled
    # Without the text of the prompt, which may echo the password.
    raise LoginFailed(f"AUTH LOGIN: the host asks for {_asked(response.message) or 'more'} out of turn")


def _asked(prompt: str) -> str:
    """What a prompt of LOGIN asks for: "user", "password", or "" where it does not say. Most are in base64."""
    text = prompt
    with contextlib.suppress(ValueError):  # without padding, or not in UTF-8, from some
        octets = base64.b64decode(prompt.strip() + "=" * (-len(prompt.strip()) % 4), validate=True)
        decoded = octets.decode("utf-8", "replace")
        text = f"{prompt} {decoded}" if "\ufffd" in decoded else decoded
    found = {what for word, what in _PROMPTS.items() if word in text.lower()}
    return found.pop() if len(found) == 1 else ""


async def _cram_md5(client: LenientSMTP, username: str, password: str) -> None:
    await client.auth_crammd5(username, password)


async def _scram(client: LenientSMTP, username: str, password: str) -> None:
    """RFC 5802, 7677; without channel binding."""
    import scramp

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


async def _command(client: LenientSMTP, *words: bytes, last: bool = False) -> aiosmtplib.SMTPResponse:
    response = await client.execute_command(*words)
    if response.code not in ((235,) if last else (334, 235)):
        raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)
    return response


async def _bearer(client: LenientSMTP, mechanism: str, username: str, token: str) -> None:
    """XOAUTH2 (Google, Microsoft) or OAUTHBEARER (RFC 7628). A failure is a 334 with the reason, then, after an empty
    response (a dummy one for OAUTHBEARER), the final reply."""
    initial = f"user={username}\1auth=Bearer {token}\1\1"
    if mechanism == "OAUTHBEARER":
        initial = f"n,a={username},\1auth=Bearer {token}\1\1"
    client.hide(token, initial)
    response = await client.execute_command(b"AUTH", mechanism.encode(), base64.b64encode(initial.encode()))
    if response.code == 334:
        response = await client.execute_command(b"AQ==" if mechanism == "OAUTHBEARER" else b"")
    if response.code != 235:
        raise aiosmtplib.SMTPAuthenticationError(response.code, response.message)


_MECHANISMS: dict[str, Callable[[LenientSMTP, str, str], Awaitable[None]]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "CRAM-MD5": _cram_md5,
    "SCRAM-SHA-256": _scram,
}
