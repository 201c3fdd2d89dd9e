"""What `relaymta doctor` checks of certificates: those that we show to clients, and to next hops."""

import ssl
import time
from typing import TYPE_CHECKING, NamedTuple

from relaymta.cli.doctor_scene import Row, Scene, days_left
from relaymta.config import Config
from relaymta.errors import ConfigError
from relaymta.files import read_octets

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

__all__ = ["Expiry", "certificates", "client_certificates", "expiry"]

SOON = 14 * 86_400.0  # seconds before the end at which a certificate should have been renewed ...
SHARE = 3  # ... or this part of its life, of one that lives shorter
RENEW = "renew it, and look why that was not done by itself (`systemctl list-timers`, for example certbot.timer)"
# Failed checks of a certificate, by OpenSSL's code (X509_V_ERR_*).
_NO_ISSUER, _SELF_SIGNED = {2, 20, 21}, {18, 19}


class Expiry(NamedTuple):
    """`state`: ok | warning | wrong; `found`: until when it is valid."""

    state: str
    found: str


def expiry(leaf: "Certificate") -> Expiry:
    """Whether a certificate is valid now, and for long enough."""
    now = time.time()
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    left = end.timestamp() - now
    if left <= 0:
        return Expiry("wrong", f"has expired on {end:%Y-%m-%d}")
    if begin.timestamp() > now:
        return Expiry("wrong", f"is not valid before {begin:%Y-%m-%d %H:%M}Z: see whether the clock is right")
    soon = left < min(SOON, (end - begin).total_seconds() / SHARE)
    return Expiry("warning" if soon else "ok", f"is valid until {end:%Y-%m-%d} ({days_left(left)})")


def certificates(scene: Scene) -> list[Row]:
    """Each [[certificate]]: readable, with its key, in time, with its issuers; and whether one is for our name."""
    config = scene.config
    rows, names = [], set[str]()
    for number, one in enumerate(config.certificate):
        row, own = _certificate(config, number)
        names |= own
        rows.append((f"certificate {one.chain}", *row))
    if rows and all(state == "ok" for _, state, _ in rows) and not _covers(names, config.hostname):
        what, _, found = rows[0]
        cure = f"have one made for {config.hostname}, or set hostname"
        rows[0] = (what, "warning", f"{found}; none is for {config.hostname}, so clients that verify it are refused: {cure}")
    return rows


def _certificate(config: Config, number: int) -> tuple[tuple[str, str], set[str]]:
    """(State and what was found) of one certificate, and its DNS names."""
    from cryptography import x509

    from relaymta.accept import tls

    one = config.certificate[number]
    try:
        context = tls.server_context(one)
    except ConfigError as error:
        what = "; ".join(error.problems).partition(": ")[2]
        return ("wrong", f"{what}: {_cure(what, config, one.chain)}"), set()
    chain = x509.load_pem_x509_certificates(read_octets(one.chain))
    names = set(tls.names_of(chain[0]))
    state, found = expiry(chain[0])
    found = f"of {', '.join(sorted(names)[:3]) or 'no name'} {found}"
    if state != "ok":
        return (state, f"{found}: {RENEW}"), names
    late = next((each for each in chain[1:] if expiry(each).state == "wrong"), None)
    if late is not None:
        what = f"{found}, but its issuer {late.subject.rfc4514_string()} {expiry(late).found}"
        return ("wrong", f"{what}: put the issuer's new certificate behind it"), names
    why = _distrusted(context)
    return ("warning" if why else "ok", f"{found}{why}"), names


def _cure(what: str, config: Config, chain: str) -> str:
    if "is not the certificate's" in what:
        return f"set certificate.key to the key that {chain} was made with, or have a certificate made for this one"
    if "Permission denied" in what:
        return f"let {config.user or 'the user of the relay'} read it (`chgrp`, `chmod g+r`; docs/privileges.md)"
    return "correct the path, or the file (PEM: the certificate, then its issuers)"


def _covers(names: set[str], host: str) -> bool:
    host = host.lower()
    return host in names or f"*.{host.partition('.')[2]}" in names


def _distrusted(server: ssl.SSLContext) -> str:
    """Why a client of this machine that verifies certificates does not trust it: a handshake with one; "": it does."""
    client = ssl.create_default_context()
    client.check_hostname = False
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    try:
        for _ in range(4):
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        code = error.verify_code
        if code in _NO_ISSUER:
            cure = (
                "put the certificates of its issuers behind it in the file (fullchain.pem), if it is not that of an internal CA"
            )
            return f"; its issuer is not in the file, and not trusted here: clients that verify refuse it; {cure}"
        if code in _SELF_SIGNED:
            cure = "clients that verify refuse it, unless they are given its CA; have it made by a CA that they trust"
            return f"; it, or its CA, is not trusted here (self-signed): {cure}"
        return f"; it could not be verified here ({error.verify_message})"
    return ""


def client_certificates(scene: Scene) -> list[Row]:
    """The files for TLS of each route: ours, and of the CAs that it trusts."""
    from relaymta.send import trust

    rows: list[Row] = []
    for route in scene.config.route:
        files = trust.Files.of(route)
        broken = dict(trust.problems(route))
        for key, what in broken.items():
            rows.append((f"{key} of route {route.label}", "wrong", f"{what}: correct it, or let the relay's user read it"))
        for key, path in files.named:
            if not broken and key != "client_key":
                rows.append((f"{key} of route {route.label}", *_file(key, path)))
    return rows


def _file(key: str, path: str) -> tuple[str, str]:
    """(State and what was found) of a file of a route: its first certificate; of CAs the one that is valid the longest."""
    from cryptography import x509

    found = x509.load_pem_x509_certificates(read_octets(path))
    shown = max(found, key=lambda one: one.not_valid_after_utc) if key == "ca_file" else found[0]
    state, when = expiry(shown)
    cure = "put the new certificate of the CA into it" if key == "ca_file" else RENEW
    return state, f"{path} {when}" + (f": {cure}" if state != "ok" else "")
