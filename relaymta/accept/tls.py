"""TLS for clients: certificates, selected by SNI (RFC 6066 3), and read again when their files change."""

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from relaymta.accept import tickets
from relaymta.config import Certificate, Config, check_each
from relaymta.errors import ConfigError
from relaymta.files import read_octets
from relaymta.watch import Watched

if TYPE_CHECKING:  # a worker without certificates starts without it
    from cryptography.x509 import Certificate as Leaf

__all__ = ["Certificates", "certificate_paths", "check", "names_of", "server_context"]

Choose = Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]


class _Loaded(NamedTuple):
    """A certificate in use: its context, its DNS names in lower case, wildcards ("*.example") included, and when it ends (seconds
    since 1970)."""

    context: ssl.SSLContext
    names: list[str]
    ends: int


class Certificates:
    """All certificates of a configuration. While the files of one are broken, the version read before stays in use. `keys`: the
    session ticket keys (tickets.OCTETS), b"" for OpenSSL's own."""

    def __init__(self, config: Config, keys: bytes = b"") -> None:
        self._tickets = keys
        self._theirs, ours = certificate_paths(config)
        self._ours = [(path, Watched([path], lambda path=path: ends_of(path))) for path in ours]  # type: ignore[misc]
        self.watched = [
            Watched([c.chain, c.key or c.chain], lambda c=c: self._loaded(c))  # type: ignore[misc]
            for c in config.certificate
        ]

    def _loaded(self, certificate: Certificate) -> _Loaded:
        found = _load(certificate, self._choose)
        if self._tickets:
            tickets.share(found.context, self._tickets)
        return found

    def look(self) -> None:
        """Look at the certificates with which we identify ourselves to other hosts: only at when they end. Blocks."""
        for _, one in self._ours:
            one.refresh()

    def ends(self) -> dict[str, int]:
        """When the certificates that are in use end (seconds since 1970), by their path: those for clients, and our own as a
        client of other hosts. (`certificate_paths` names them all.)"""
        found = {path: one.value.ends for path, one in zip(self._theirs, self.watched, strict=True) if one.value is not None}
        return found | {path: one.value for path, one in self._ours if one.value is not None}

    def renew_tickets(self, keys: bytes) -> None:
        """Replace the session ticket keys."""
        self._tickets = keys
        for one in self.watched:
            if one.value is not None:
                tickets.share(one.value.context, keys)

    @property
    def context(self) -> ssl.SSLContext | None:
        """The context for a new handshake; None when there is no usable certificate."""
        return next((one.value.context for one in self.watched if one.value is not None), None)

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int | None:
        """SNI callback: select the first certificate that has this name, else the first of all."""
        found = self.named(name)
        if name and found is not None:
            connection.context = found
        return None

    def named(self, name: str | None) -> ssl.SSLContext | None:
        """The context of the first certificate that has this name, else of the first of all; None: as of `context`."""
        return (self._of(name) if name else None) or self.context

    def has(self, name: str) -> bool:
        """Whether a certificate has this name."""
        return self._of(name) is not None

    def _of(self, name: str) -> ssl.SSLContext | None:
        wanted_name = name.lower().rstrip(".")
        wanted = {wanted_name, "*." + wanted_name.partition(".")[2]}
        found = (one.value for one in self.watched if one.value is not None)
        return next((one.context for one in found if not wanted.isdisjoint(one.names)), None)


def certificate_paths(config: Config) -> tuple[list[str], list[str]]:
    """The files of the certificates for clients, in their order, and of those with which we identify ourselves to other hosts."""
    ours = dict.fromkeys(route.client_certificate for route in config.route if route.client_certificate)
    return [certificate.chain for certificate in config.certificate], list(ours)


def check(config: Config) -> None:
    """ConfigError with everything that is wrong with the certificates' files, read with the rights of the caller."""
    check_each("certificate", config.certificate, server_context)


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """The context of a certificate by itself. ConfigError, as of `check`."""
    return _load(certificate, lambda *_: None).context


def _load(certificate: Certificate, choose: Choose) -> _Loaded:
    """Read a certificate and its key. ConfigError names the file and the reason."""
    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 1  # a client gets the next one when it resumes
    context.set_alpn_protocols(["smtp"])
    try:
        leaf = x509.load_pem_x509_certificate(read_octets(certificate.chain))
    except OSError as error:
        raise ConfigError([f"certificate.chain: {certificate.chain}: {error.strerror}"]) from None
    except ValueError:
        raise ConfigError([f"certificate.chain: {certificate.chain}: no certificate in PEM form"]) from None
    key = certificate.key or certificate.chain
    try:
        with _for_openssl(certificate.chain) as chain, _for_openssl(key) as private:
            context.load_cert_chain(chain, private, password=_no_password)
    except ssl.SSLError as error:
        what = "is not the certificate's" if error.reason == "KEY_VALUES_MISMATCH" else f"no usable key: {error.reason or error}"
        raise ConfigError([f"certificate.key: {key}: {what}"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"certificate.key: {key}: {getattr(error, 'strerror', None) or error}"]) from None
    context.sni_callback = choose
    return _Loaded(context, names_of(leaf), _ends(leaf))


def _ends(leaf: "Leaf") -> int:
    """When a certificate ends, seconds since 1970."""
    return int(leaf.not_valid_after_utc.timestamp())


def ends_of(path: str) -> int:
    """When the certificate in a PEM file ends, seconds since 1970. OSError, ValueError."""
    from cryptography import x509

    return _ends(x509.load_pem_x509_certificate(read_octets(path)))


@contextlib.contextmanager
def _for_openssl(path: str) -> Iterator[str]:
    """A path at which OpenSSL reads a PEM file: its own, or of a copy in memory without the byte order mark, which OpenSSL takes
    for text before the first line. OSError."""
    clean = read_octets(path)
    if os.path.getsize(path) == len(clean):
        yield path
        return
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, clean)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_password() -> str:
    raise ValueError("the key is encrypted; give it without a pass phrase, with access for its owner only")


def names_of(leaf: "Leaf") -> list[str]:
    """The DNS names of a certificate, in lower case."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    except x509.ExtensionNotFound:
        return [str(entry.value).lower() for entry in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
