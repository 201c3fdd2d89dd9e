"""Debian's Dovecot with a configuration of its own: LMTP, IMAP and POP3 on loopback, in the foreground, in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from benchmarks.run import PATH, cpu_seconds
from tests.support.daemon import free_port, wait_for

__all__ = ["LOCATIONS", "PASSWORD", "Dovecot", "lacking"]

PACKAGES = "dovecot-core dovecot-lmtpd dovecot-imapd dovecot-pop3d"
PROGRAMS = Path("/usr/lib/dovecot")
LOCATIONS = {"mdbox": "mdbox:~/mdbox", "Maildir": "maildir:~/Maildir"}
PASSWORD = "secret"
OWNER = 5000  # uid and gid of all mail; nobody needs to have them

CONFIGURATION = """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/dovecot.log
listen = 127.0.0.1
protocols = imap pop3 lmtp
ssl = no
disable_plaintext_auth = no
mail_max_userip_connections = 10000
first_valid_uid = {owner}
mail_location = {location}
mail_fsync = optimized
namespace inbox {{
  inbox = yes
}}
passdb {{
  driver = passwd-file
  args = {folder}/users
}}
userdb {{
  driver = passwd-file
  args = {folder}/users
}}
service lmtp {{
  inet_listener lmtp {{
    port = {lmtp}
  }}
}}
service imap-login {{
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service pop3-login {{
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = 0
  }}
}}
"""


def lacking() -> str:
    """Why Dovecot cannot be run here; empty when it can be."""
    if os.geteuid():
        return "Dovecot needs root"
    installed = shutil.which("dovecot", path=PATH) and all((PROGRAMS / name).exists() for name in ("lmtp", "imap", "pop3"))
    return "" if installed else f"Dovecot is missing: apt-get install --no-install-recommends {PACKAGES}"


class Dovecot:
    """One instance. `lmtp`, `imap`, `pop3`: its ports; `root`: the pid of its master process, above all others.

    `location`: of LOCATIONS; users are u0@`domain` and so on, with PASSWORD, in a file; all else is the default (mail_fsync is
    "optimized", no cache of logins), but for the log, which is a file."""

    def __init__(self, folder: Path, location: str, users: int, domain: str = "local.example") -> None:
        """Start it, and wait for its greeting. `folder` exists; mail lies in it, too."""
        self.name = f"Dovecot {location}"
        self.lmtp, self.imap, self.pop3 = free_port(), free_port(), free_port()
        self.log = folder / "dovecot.log"
        self._open_to_others(folder)
        (folder / "mail").mkdir()
        os.chown(folder / "mail", OWNER, OWNER)
        (folder / "users").write_text(
            "".join(
                f"u{number}@{domain}:{{PLAIN}}{PASSWORD}:{OWNER}:{OWNER}::{folder}/mail/u{number}::\n" for number in range(users)
            )
        )
        configuration = folder / "dovecot.conf"
        configuration.write_text(
            CONFIGURATION.format(
                folder=folder, owner=OWNER, location=LOCATIONS[location], lmtp=self.lmtp, imap=self.imap, pop3=self.pop3
            )
        )
        program = shutil.which("dovecot", path=PATH) or sys.exit(lacking())
        self.process = subprocess.Popen([program, "-F", "-c", str(configuration)])
        self.root = self.process.pid
        try:
            wait_for(self._ready, 30, self.name)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _open_to_others(folder: Path) -> None:
        """Dovecot's users have to reach what is theirs in a folder that was made for root alone."""
        for path in (folder, *folder.parents[:-2]):
            if not path.stat().st_mode & 0o001:
                path.chmod(path.stat().st_mode | 0o055)

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            sys.exit(f"Dovecot has ended: {self.log.read_text() if self.log.exists() else 'see above'}")
        try:
            with socket.create_connection(("127.0.0.1", self.lmtp), 5) as sock:
                return sock.recv(100).startswith(b"220")
        except OSError:
            return False

    def cpu(self) -> float:
        """CPU seconds of all its processes, those that have ended included."""
        return cpu_seconds(self.root)

    def close(self) -> None:
        """End it: its master process ends the others."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
