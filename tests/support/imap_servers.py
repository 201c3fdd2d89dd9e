"""IMAP servers that client programs are tried on: our daemon, and Debian's Dovecot, on which the tests themselves are tried."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import trustme

from tests.support.daemon import PATIENCE, free_port, wait_for
from tests.support.mailboxes import Readable, verified
from tests.support.programs import need

__all__ = ["SERVERS", "Account", "ImapServer", "someone", "started"]

PASSWORD = "geheim"


class Account(NamedTuple):
    """A user of a server, and how a client gets there. `security`: "clear", "starttls" or "implicit"; `ca`: a file with the
    certificate's issuer."""

    user: str
    password: str
    ports: dict[str, int]  # "imap", "imaps"
    ca: str
    security: str = "clear"

    @property
    def host(self) -> str:
        return "localhost"

    @property
    def port(self) -> int:
        return self.ports["imaps" if self.security == "implicit" else "imap"]


class ImapServer(Protocol):
    """A running server. `utf8`: it offers UTF8=ACCEPT (RFC 6855)."""

    utf8: bool

    def account(self, name: str) -> Account:
        """A new user with an empty INBOX."""


class _Ours:
    utf8 = True

    def __init__(self, relay: Readable) -> None:
        self._relay = relay

    def account(self, name: str) -> Account:
        self._relay.user(name, PASSWORD)
        return Account(f"{name}@local.example", PASSWORD, self._relay.ports, self._relay.ca)


@contextlib.contextmanager
def _ours(folder: Path) -> Iterator[ImapServer]:
    relay = Readable(folder, workers=2, protocols=("imap",))
    with relay:
        yield _Ours(relay)
        verified(relay)


class _Dovecot:
    utf8 = False

    def __init__(self, ports: dict[str, int], ca: str) -> None:
        self._ports, self._ca = ports, ca

    def account(self, name: str) -> Account:
        return Account(f"{name}@local.example", PASSWORD, self._ports, self._ca)


_DOVECOT = """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap
ssl = yes
ssl_cert = <{folder}/cert.pem
ssl_key = <{folder}/cert.pem
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_failure_delay = 0
mail_uid = {user}
mail_gid = {group}
first_valid_uid = 1
first_valid_gid = 1
mail_home = {folder}/home/%u
mail_location = mdbox:~/mail
mail_max_userip_connections = 100
{internal}
namespace {{
  inbox = yes
  separator = /
}}
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
}}
service imap-login {{
  {chroot}
  inet_listener imap {{
    address = 127.0.0.1
    port = {imap}
  }}
  inet_listener imaps {{
    address = 127.0.0.1
    port = {imaps}
    ssl = yes
  }}
}}
service anvil {{
  {chroot}
}}
"""


def someone() -> pwd.struct_passwd:
    """Whom Dovecot's programs run as, which refuse to touch mail as root."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


@contextlib.contextmanager
def _dovecot(folder: Path) -> Iterator[ImapServer]:
    program = need("dovecot")
    authority = trustme.CA()
    ca = folder / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    place = Path(tempfile.mkdtemp(prefix="dovecot-"))  # paths of its sockets have to be short, and open to its users
    try:
        authority.issue_cert("localhost", "127.0.0.1", common_name="localhost").private_key_and_cert_chain_pem.write_to_path(
            place / "cert.pem"
        )
        ports = {"imap": free_port(), "imaps": free_port()}
        _configure_dovecot(place, ports)
        process = subprocess.Popen([program, "-F", "-c", str(place / "conf")])
        try:
            wait_for(lambda: _answers(ports["imap"]), what="Dovecot")
            yield _Dovecot(ports, str(ca))
        finally:
            process.terminate()
            process.wait(PATIENCE)
    finally:
        shutil.rmtree(place)


def _configure_dovecot(place: Path, ports: dict[str, int]) -> None:
    user = someone()
    for name in ("run", "state", "home"):
        (place / name).mkdir()
    place.chmod(0o755)
    root = os.getuid() == 0
    if root:
        os.chown(place / "home", user.pw_uid, user.pw_gid)
    internal = "" if root else f"default_internal_user = {user.pw_name}\ndefault_login_user = {user.pw_name}"
    (place / "conf").write_text(
        _DOVECOT.format(
            folder=place, user=user.pw_uid, group=user.pw_gid, password=PASSWORD, internal=internal,
            chroot="" if root else "chroot =", **ports,
        )
    )  # fmt: skip


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        return sock.recv(4096).startswith(b"* OK [CAPABILITY")
    return False


_STARTED = {"relaymta": _ours, "dovecot": _dovecot}
SERVERS = os.environ.get("RELAYMTA_IMAP_SERVERS", "relaymta").split()  # names of those that are tried


def started(name: str, folder: Path) -> contextlib.AbstractContextManager[ImapServer]:
    """The server of this name, from here to the end of the context; what it keeps is consistent then."""
    return _STARTED[name](folder)
