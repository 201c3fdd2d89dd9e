"""amavisd-new: a real one, which gives mail back by SMTP."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import free_port, wait_for
from tests.support.programs import need

__all__ = ["BANNED", "amavis"]

BANNED = "program.exe"  # the name of an attachment that it bounces

SETTINGS = """use strict;
$MYHOME = '{folder}/home'; $TEMPBASE = "$MYHOME/tmp"; $QUARANTINEDIR = undef;
$daemon_user = 'amavis'; $daemon_group = 'amavis'; $pid_file = "$MYHOME/pid"; $lock_file = "$MYHOME/lock";
$mydomain = 'filter.example'; $myhostname = 'filter.example';
$inet_socket_bind = '127.0.0.1'; $inet_socket_port = {port}; @inet_acl = qw(127.0.0.1);
$forward_method = 'smtp:[127.0.0.1]:{back}'; $notify_method = $forward_method;
$max_servers = 2; $enable_db = 0; $enable_zmq = 0; $do_syslog = 0; $LOGFILE = "$MYHOME/log"; $log_level = 2;
@bypass_spam_checks_maps = (1); $enable_dkim_verification = 0; $enable_dkim_signing = 0;
$X_HEADER_LINE = "amavis at $mydomain";
@av_scanners = (['ClamAV', \\&ask_daemon, ["CONTSCAN {{}}\\n", "{clamd}"], qr/\\bOK$/m, qr/\\bFOUND$/m, qr/^.*?: (.*) FOUND$/m]);
$banned_filename_re = new_RE(qr'\\.exe$'i);
$final_virus_destiny = D_REJECT; $final_banned_destiny = D_BOUNCE; $final_bad_header_destiny = D_PASS;
$virus_quarantine_to = undef; $banned_quarantine_to = undef; $virus_admin = undef;
1;
"""


@contextlib.contextmanager
def amavis(back: int, clamd: Path) -> Iterator[int]:
    """A running one, and its port. `back`: the port that mail is given back to; `clamd`: the socket of the scanner. It refuses
    viruses, and bounces BANNED attachments."""
    program = need("amavisd")
    if os.geteuid():
        pytest.skip("amavisd reads no configuration that its own user may write: only root can start it for a test")
    folder = Path(tempfile.mkdtemp(prefix="amavis"))
    folder.chmod(0o755)
    clamd.parent.chmod(0o755)  # amavis connects as its own user
    (folder / "home/tmp").mkdir(parents=True)
    for path in (folder / "home", folder / "home/tmp"):
        shutil.chown(path, "amavis", "amavis")
    port = free_port()
    (folder / "conf").write_text(SETTINGS.format(folder=folder, port=port, back=back, clamd=clamd))
    with (folder / "log").open("wb") as log:
        command = [program, "-c", str(folder / "conf"), "foreground"]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as sock:
            return sock.recv(3) == b"220"
        return False

    try:
        wait_for(lambda: process.poll() is not None or answers(), what="amavisd")
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder)
