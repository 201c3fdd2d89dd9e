"""TLS with next hops: the contexts, which certificates are trusted, our own certificate, and what a failure of TLS means."""

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from relaymta.config import Route
from relaymta.errors import US, Failure, is_scarce
from relaymta.metrics import COUNTERS, Counters, index
from relaymta.watch import Watched

__all__ = ["NO_FILES", "Context", "Files", "Secured", "TrustFailed", "context_of", "counts", "problems", "reason", "unnoted"]

SESSIONS_KEPT = 10_000  # hosts
CONTEXTS_KEPT = 200  # of routes with files of their own
_TOTAL = "relaymta_tls_sessions_total"
_SESSIONS = {tuple(value.split()): index(_TOTAL, value) for value in COUNTERS[_TOTAL][2]}

Secured = Callable[[str, str], None]  # (a route's `tls`, what has come of it for one connection: as the metric has them)


def counts(counters: Counters) -> Secured:
    """What counts connections by their TLS."""

    def counted(policy: str, result: str) -> None:
        counters.add(_SESSIONS[policy, result], 1)

    return counted


def unnoted(policy: str, result: str) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Files:
    """PEM files of a route: the certificates of the CAs that it trusts ("": those of the system), the certificate with which we
    identify ourselves, and its key ("": in the same file)."""

    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def of(cls, route: Route) -> "Files":
        """Those of a route."""
        if not (route.ca_file or route.client_certificate):
            return NO_FILES
        return cls(route.ca_file, route.client_certificate, route.client_key)

    @property
    def named(self) -> list[tuple[str, str]]:
        """(key of the route, path) of each file."""
        keys = ("ca_file", self.ca), ("client_certificate", self.certificate), ("client_key", self.key)
        return [(key, path) for key, path in keys if path]

    @property
    def store(self) -> str:
        """Whose certificates are trusted, for people."""
        if self.ca:
            return f"ca_file {self.ca}"
        paths = ssl.get_default_verify_paths()
        return f"the system's trust store ({', '.join(path for path in (paths.cafile, paths.capath) if path) or 'empty'})"


NO_FILES = Files()


class TrustFailed(Failure):
    """A file of a route's cannot be used: str() names its key and why."""

    def __init__(self, cause: str) -> None:
        super().__init__("TLS is not possible now", cause, US, "tls")


class Context(ssl.SSLContext):
    """A client context that resumes the last TLS session of a host, which saves most of the handshake on both sides. (uvloop does
    not: it calls `wrap_bio` without a session.) The certificate is verified in the full handshake only."""

    sessions: dict[str, ssl.SSLSession]

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        known = self.sessions.get(str(server_hostname))
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session or known)

    def remember(self, connection: ssl.SSLObject) -> None:
        """Keep a connection's session; called after its first data, since TLS 1.3 sends sessions after the handshake."""
        if connection.session is not None and connection.server_hostname:
            if len(self.sessions) >= SESSIONS_KEPT:
                self.sessions.clear()
            self.sessions[connection.server_hostname] = connection.session


_known: dict[tuple[bool, Files], Watched[Context]] = {}


def context_of(tls: str, files: Files = NO_FILES) -> Context:
    """The context for `tls` (may, encrypt, verify: only this one verifies). Files are read again when they have changed; while
    they cannot be used, what was read before is. TrustFailed when there is nothing to use."""
    verified = tls == "verify"
    watched = _known.get((verified, files))
    if watched is None:
        if len(_known) >= CONTEXTS_KEPT:
            _known.clear()
        paths = [path for _, path in files.named]
        watched = _known[verified, files] = Watched(paths, lambda: _made(verified, files))
    watched.refresh()
    if watched.value is None:
        raise TrustFailed(watched.problem) from watched.error  # which may be that no descriptor is left
    return watched.value


def problems(route: Route) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of each file of a route that cannot be used now."""
    files = Files.of(route)
    if files == NO_FILES:
        return
    for key, path in files.named:
        try:
            why = _unreadable(path)
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            yield key, f"{path}: {why}"
            return
    try:
        _made(True, files)
    except TrustFailed as error:
        key, _, what = str(error).partition(" ")
        yield key, what


def _unreadable(path: str) -> str:
    """Why a file cannot be used; "": it can. OSError: no descriptor is left, which says nothing of the file."""
    try:
        with Path(path).open("rb") as file:
            return "" if file.read(1) else "is empty"
    except OSError as error:
        if is_scarce(error):
            raise
        return error.strerror or str(error)


def _made(verified: bool, files: Files) -> Context:
    for key, path in files.named:
        why = _unreadable(path)
        if why:
            raise TrustFailed(f"{key} {path}: {why}")
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.sessions = {}
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if not files.ca:
        bundle = ssl.get_default_verify_paths().cafile
        if verified and bundle:
            _unreadable(bundle)  # without a descriptor the context would trust nobody, and not say so
        context.load_default_certs()
    elif verified:
        _load_authorities(context, files.ca)
    if files.certificate:
        _load_certificate(context, files)
    return context


def _load_authorities(context: Context, path: str) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise TrustFailed(f"ca_file {path}: no certificate in PEM format can be read from it ({_library(error)})") from None


def _load_certificate(context: Context, files: Files) -> None:
    key = "client_key" if files.key else "client_certificate"
    try:
        context.load_cert_chain(files.certificate, files.key or None, password=lambda: b"")
    except ssl.SSLError as error:
        why = _library(error)
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TrustFailed(f"{key} {files.key or files.certificate}: the key is not that of the certificate") from None
        what = "no certificate and unencrypted key" if not files.key else "no certificate, or no unencrypted key,"
        raise TrustFailed(f"client_certificate {files.certificate}: {what} in PEM format can be read ({why})") from None


def _library(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


# Failed checks of a certificate, by OpenSSL's code (X509_V_ERR_*): what is wrong.
_EXPIRED, _EARLY, _REVOKED, _NAMES = {10, 14}, {9, 13}, {23}, {62, 63, 64}
_UNTRUSTED = {2, 18, 19, 20, 21, 24, 27}


def reason(error: ssl.SSLError, name: str, files: Files, route: str) -> str:
    """Why TLS with the host `name` failed, and what to do about it; `route`: the name of its route."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _unverified(error, name, files, route)
    why = error.reason or ""
    if "CERTIFICATE_REQUIRED" in why or (why.endswith("HANDSHAKE_FAILURE") and not files.certificate):
        cure = f"if it wants a certificate of ours, set client_certificate of route {route}"
        return f"TLS failed: the host ended the handshake ({_library(error)}); {cure}"
    if files.certificate and why.endswith(("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "CERTIFICATE_EXPIRED")):
        return f"TLS failed: the host does not accept client_certificate {files.certificate} ({_library(error)})"
    if why == "WRONG_VERSION_NUMBER":
        return "TLS failed: what the host sends is not TLS; on port 465 TLS begins at once, on 25 and 587 with STARTTLS"
    return f"TLS failed ({_library(error)})"


def _unverified(error: ssl.SSLCertVerificationError, name: str, files: Files, route: str) -> str:
    code, what = getattr(error, "verify_code", 0), getattr(error, "verify_message", str(error))
    if code in _NAMES:
        return f"its certificate is not for the name {name} ({what}): write the name of its certificate in hosts of route {route}"
    if code in _EXPIRED | _EARLY | _REVOKED:
        when = "has expired" if code in _EXPIRED else "is not valid yet: compare the clocks" if code in _EARLY else "is revoked"
        return f"its certificate, or one of its issuers, {when} ({what}); trusted are those in {files.store}"
    if code in _UNTRUSTED:
        cure = (
            f"if it belongs to another CA, add that CA's certificate to {files.ca}"
            if files.ca
            else f"if it is that of an internal CA, set ca_file of route {route} to the CA's certificate (PEM)"
        )
        return f"the issuer of its certificate is not trusted ({what}) by {files.store}; {cure}"
    return f"its certificate could not be verified ({what}) by {files.store}"
