"""TLS towards clients: certificates, chosen by the name a client asks for (SNI), read again when their files change."""

import ssl
from collections.abc import Callable
from typing import NamedTuple

from cryptography import x509
from cryptography.x509.oid import NameOID

from relaymta.accept import tickets
from relaymta.config import Certificate, Config
from relaymta.errors import ConfigError
from relaymta.watch import Watched

__all__ = ["Certificates", "check"]

Choose = Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]


class _Loaded(NamedTuple):
    """A certificate in use: its context, and the names it is for, "*.example" among them (lower case)."""

    context: ssl.SSLContext
    names: list[str]


class Certificates:
    """All certificates of a configuration, each of which stays in use until its files are whole again when they break. `keys`:
    of the tickets that clients resume their sessions by, b"" for the library's own."""

    def __init__(self, config: Config, keys: bytes = b"") -> None:
        self._tickets = keys
        self._watched = [
            Watched([c.chain, c.key or c.chain], lambda c=c: self._loaded(c))  # type: ignore[misc]
            for c in config.certificate
        ]

    def _loaded(self, certificate: Certificate) -> _Loaded:
        found = _load(certificate, self._choose)
        if self._tickets:
            tickets.share(found.context, self._tickets)
        return found

    def renew_tickets(self, keys: bytes) -> None:
        """Other keys, from now on."""
        self._tickets = keys
        for one in self._watched:
            if one.value is not None:
                tickets.share(one.value.context, keys)

    @property
    def context(self) -> ssl.SSLContext | None:
        """For a new handshake; None when there is no usable certificate."""
        return next((one.value.context for one in self._watched if one.value is not None), None)

    @property
    def problems(self) -> list[str]:
        """Of the files that cannot be used as they are now."""
        return [one.problem for one in self._watched if one.problem]

    def refresh(self) -> None:
        """Thread: read what has changed."""
        for one in self._watched:
            one.refresh()

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        """The first certificate that is for this name, else the first of all."""
        if name:
            asked = name.lower().rstrip(".")
            wanted = {asked, "*." + asked.partition(".")[2]}
            for one in self._watched:
                if one.value is not None and not wanted.isdisjoint(one.value.names):
                    connection.context = one.value.context
                    break
        return None


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the certificates' files, as the user who asks can read them."""
    found = Certificates(config)
    found.refresh()
    if found.problems:
        raise ConfigError(found.problems)


def _load(certificate: Certificate, choose: Choose) -> _Loaded:
    """Read a certificate and its key. ConfigError says which file is wrong, and how."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 1  # a client resumes with it, and gets the next one then
    context.set_alpn_protocols(["smtp"])
    try:
        with open(certificate.chain, "rb") as file:
            leaf = x509.load_pem_x509_certificate(file.read())
    except OSError as error:
        raise ConfigError([f"certificate.chain: {certificate.chain}: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"certificate.chain: {certificate.chain}: no certificate in PEM form"]) from None
    key = certificate.key or certificate.chain
    try:
        context.load_cert_chain(certificate.chain, key, password=_no_password)
    except ssl.SSLError as error:
        what = "is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else f"no usable key: {error.reason or error}"
        raise ConfigError([f"certificate.key: {key}: {what}"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"certificate.key: {key}: {getattr(error, 'strerror', None) or error}"]) from None
    context.sni_callback = choose
    return _Loaded(context, _names(leaf))


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a pass phrase, readable by nobody else")


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    except x509.ExtensionNotFound:
        return [str(entry.value).lower() for entry in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
