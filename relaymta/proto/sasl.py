"""The server side of SASL in SMTP (RFC 4422, 4954), without I/O: each mechanism is a generator that yields challenges, is sent
the client's responses, and returns a claim, which the caller verifies.

PLAIN (RFC 4616), LOGIN (draft-murchison-sasl-login), SCRAM-SHA-256 (RFC 5802, 7677), OAUTHBEARER (RFC 7628), XOAUTH2 (Google).
"""

import secrets
from collections.abc import Callable, Generator
from typing import NamedTuple

__all__ = ["MECHANISMS", "Claim", "Exchange", "Keys", "Malformed", "Password", "Proof", "Token", "begin"]


class Keys(NamedTuple):
    """What is stored of a password for SCRAM-SHA-256 (RFC 5802 3). `others`: (StoredKey, ServerKey) of the account's other
    passwords, with the same salt and iterations: the server sends the salt before it can determine which one the client has."""

    salt: bytes
    stored_key: bytes
    server_key: bytes
    iterations: int
    others: tuple[tuple[bytes, bytes], ...] = ()


class Password(NamedTuple):
    """The user name and password that the client sent."""

    user: str
    password: str

    def __repr__(self) -> str:  # a traceback, or a log, may show it
        return f"Password(user={self.user!r}, password=***)"


class Token(NamedTuple):
    """A bearer token; `user`: "" where the client names none."""

    user: str
    token: str

    def __repr__(self) -> str:
        return f"Token(user={self.user!r}, token=***)"


class Proof(NamedTuple):
    """The end of a SCRAM exchange. `good`: the client has proved that it has the password; `final`: the server-final-message,
    which confirms this to the client: sent in a 334 (RFC 4954 4), only after the caller has accepted the login."""

    user: str
    good: bool
    final: bytes = b""


Claim = Password | Token | Proof
Exchange = Generator[bytes, bytes, Claim]


class Malformed(Exception):
    """A response that is invalid in its mechanism; str() is the reason."""


def begin(mechanism: str, keys: Callable[[str], Keys]) -> tuple[Exchange, bytes | None]:
    """Start an exchange: (exchange, the challenge to send if there is no initial response, None for an empty one).
    `keys(user)`: for SCRAM; for an unknown user, keys that no password matches. KeyError: an unknown mechanism."""
    exchange = MECHANISMS[mechanism](keys)
    first = next(exchange)
    return exchange, first or None


def _text(octets: bytes, nul: bool = False) -> str:
    """A response, decoded; `nul`: NULs are allowed. Raises Malformed."""
    try:
        found = octets.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("not UTF-8") from None
    if "\0" in found and not nul:
        raise Malformed("NUL in a response")
    return found


def _plain(keys: Callable[[str], Keys]) -> Exchange:
    parts = _text((yield b""), nul=True).split("\0")
    if len(parts) != 3 or not parts[1] or not parts[2]:
        raise Malformed("expected authorization identity, user and password")
    if parts[0] not in ("", parts[1]):
        raise Malformed("the authorization identity differs from the user")
    return Password(parts[1], parts[2])


def _login(keys: Callable[[str], Keys]) -> Exchange:
    user = _text((yield b"Username:"))
    password = _text((yield b"Password:"))
    if not user or not password:
        raise Malformed("expected user and password")
    return Password(user, password)


def _scram(keys: Callable[[str], Keys]) -> Exchange:
    import scramp  # where it is needed: a worker without accounts starts without it

    mechanism, nonce = scramp.ScramMechanism("SCRAM-SHA-256"), secrets.token_hex(16)
    known: list[tuple[str, Keys]] = []

    def first_keys(name: str) -> tuple[bytes, bytes, bytes, int]:
        known.append((name, found := keys(name)))
        return found[:4]

    servers = [mechanism.make_server(first_keys, s_nonce=nonce)]
    try:
        first, header = _without_authzid(_text((yield b"")))
        servers[0].set_client_first(first)
        (user, found), server_first = known[0], servers[0].get_server_first()
        for stored, server in found.others:  # the server-first-message is the same for each
            keys_of_it = (found.salt, stored, server, found.iterations)
            servers.append(mechanism.make_server(lambda name, keys_of_it=keys_of_it: keys_of_it, s_nonce=nonce))
            servers[-1].set_client_first(first)
            servers[-1].get_server_first()
        for one in servers if header is not None else ():
            one.gs2_header = header  # which the client's final message repeats (RFC 5802 6)
        response = _text((yield server_first.encode()))
    except scramp.ScramException as error:
        raise Malformed(str(error)) from None
    for one in servers:
        try:
            one.set_client_final(response)
        except scramp.ScramException:
            continue
        return Proof(user, True, one.get_server_final().encode())
    return Proof(user, False)


class _Header(NamedTuple):
    """The gs2-header of a client that names an authorization identity, which scramp does not take."""

    text: str

    def make_cbind_input(self, binding: object) -> bytes:
        """What the channel binding of the client's final message must be."""
        return self.text.encode()


def _without_authzid(first: str) -> tuple[str, _Header | None]:
    """A client-first-message without the authorization identity, which must be the user (mutt sends it); and the header that has
    it."""
    flag, _, rest = first.partition(",")
    authzid, _, bare = rest.partition(",")
    if not authzid or flag not in ("n", "y"):
        return first, None
    if not authzid.startswith("a=") or not bare.startswith(f"n={authzid[2:]},"):
        raise Malformed("the authorization identity differs from the user")
    return f"{flag},,{bare}", _Header(f"{flag},{authzid},")


def _oauthbearer(keys: Callable[[str], Keys]) -> Exchange:
    """RFC 7628 3.1: `n,a=USER,^Ahost=...^Aauth=Bearer TOKEN^A^A`."""
    header, _, rest = _text((yield b"")).partition("\1")
    flag, _, authzid = header.partition(",")
    if flag not in ("n", "y") or not authzid.endswith(",") or (authzid != "," and not authzid.startswith("a=")):
        raise Malformed("expected a GS2 header")
    user = authzid[2:-1].replace("=2C", ",").replace("=3D", "=")
    return Token(user, _bearer(rest))


def _xoauth2(keys: Callable[[str], Keys]) -> Exchange:
    """`user=USER^Aauth=Bearer TOKEN^A^A`."""
    head, _, rest = _text((yield b"")).partition("\1")
    if not head.startswith("user="):
        raise Malformed("expected user=")
    return Token(head[5:], _bearer(rest))


def _bearer(text: str) -> str:
    fields = dict(part.partition("=")[::2] for part in text.split("\1"))
    scheme, _, token = fields.get("auth", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip() or not text.endswith("\1\1"):
        raise Malformed("expected auth=Bearer and a token")
    return token.strip()


MECHANISMS: dict[str, Callable[[Callable[[str], Keys]], Exchange]] = {
    "PLAIN": _plain,
    "LOGIN": _login,
    "SCRAM-SHA-256": _scram,
    "OAUTHBEARER": _oauthbearer,
    "XOAUTH2": _xoauth2,
}
