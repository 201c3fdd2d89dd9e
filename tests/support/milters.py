"""Milters: one that does what messages say (acting_milter.py), and the real ones, without the Internet."""

import base64
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.daemon import wait_for
from tests.support.programs import PACKAGES, need

__all__ = [
    "Acting", "DkimKey", "Program", "acting", "clamav_milter", "dkimpy_milter", "opendkim", "opendmarc",
    "pyspf_milter", "spamass_milter",
]  # fmt: skip

PACKAGES |= {
    "clamav-milter": "clamav-milter", "spamass-milter": "spamass-milter", "opendmarc": "opendmarc",
    "pyspf-milter": "pyspf-milter", "dkimpy-milter": "dkimpy-milter",
}  # fmt: skip
PYTHON = "/usr/bin/python3"  # Debian's: pymilter is there


class Program:
    """A filter with a unix socket. `address`: as it is configured."""

    def __init__(self, folder: Path, command: list[str | Path], path: Path) -> None:
        self.folder, self.path = folder, path
        self.address = f"unix:{path}"
        self._command = command
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it can be connected to."""
        self.path.unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        process = self.process
        wait_for(lambda: process.poll() is not None or self._is_there(), what=str(self._command[0]))
        assert process.poll() is None, (self.folder / "log").read_text()

    def _is_there(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return not sock.connect_ex(str(self.path))

    def send(self, number: signal.Signals) -> None:
        """A signal. SIGKILL: it is gone afterwards; SIGSTOP: all of its threads stand still."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()
        elif number == signal.SIGSTOP:
            tasks = Path(f"/proc/{self.process.pid}/task")
            wait_for(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()), what="the signal")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="milter"))  # short: the path of a socket has at most 107 octets
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _running(program: Program) -> Iterator[Program]:
    try:
        program.start()
        yield program
    finally:
        program.stop()


class Acting(Program):
    """acting_milter.py."""

    def told(self) -> list[list[Any]]:
        """What it was told: [connection, letter, ..., macros] each."""
        events = self.folder / "events"
        lines = events.read_text().splitlines(keepends=True) if events.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be written just now

    def letters(self) -> str:
        return "".join(event[1] for event in self.told())


@contextlib.contextmanager
def acting() -> Iterator[Acting]:
    """A running one."""
    if subprocess.run([PYTHON, "-c", "import Milter"], capture_output=True).returncode:
        need("pymilter (apt-get install python3-milter)")
    with _folder() as folder:
        path = folder / "socket"
        script = Path(__file__).with_name("acting_milter.py")
        made = Acting(folder, [PYTHON, script, f"unix:{path}", folder / "events"], path)
        with _running(made):
            yield made


class DkimKey:
    """A key of b.example, selector s; `record`: in the DNS."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "key.pem"
        subprocess.run(["openssl", "genrsa", "-out", str(self.path), "2048"], check=True, capture_output=True)
        public = ["openssl", "rsa", "-in", str(self.path), "-pubout", "-outform", "DER"]
        found = subprocess.run(public, check=True, capture_output=True).stdout
        self.record = f"v=DKIM1; k=rsa; p={base64.b64encode(found).decode()}"
        self.path.chmod(0o644)


@contextlib.contextmanager
def opendkim(*settings: str) -> Iterator[tuple[Program, DkimKey]]:
    """opendkim, which signs mail of 127.0.0.1 for b.example (unless `settings` say otherwise), and verifies that of others."""
    program = need("opendkim")
    with _folder() as folder:
        key, path = DkimKey(folder), folder / "socket"
        (folder / "keys").write_text(f"s._domainkey.b.example {key.record}\n")
        (folder / "hosts").write_text("127.0.0.1\n")
        lines = [
            "Domain b.example", "Selector s", f"KeyFile {key.path}", f"Socket local:{path}", "Mode sv", "UMask 000",
            "Canonicalization simple/simple", f"TestPublicKeys {folder}/keys", f"InternalHosts {folder}/hosts",
            "RequireSafeKeys false", "UserID opendkim", "AlwaysAddARHeader yes", "AuthservID opendkim.example",
        ]  # fmt: skip
        given = {line.split()[0] for line in settings}
        (folder / "conf").write_text("\n".join([*(line for line in lines if line.split()[0] not in given), *settings, ""]))
        with _running(Program(folder, [program, "-f", "-x", folder / "conf"], path)) as made:
            yield made, key


@contextlib.contextmanager
def opendmarc() -> Iterator[Program]:
    """opendmarc, which believes opendkim.example and relay.example, and writes `history` in its folder."""
    program = need("opendmarc")
    with _folder() as folder:
        path = folder / "socket"
        lines = [
            f"Socket local:{path}", "UMask 000", "AuthservID dmarc.example", "TrustedAuthservIDs opendkim.example,relay.example",
            "DNSTimeout 1", "RequiredHeaders false", f"PidFile {folder}/pid", "IgnoreAuthenticatedClients false",
            f"HistoryFile {folder}/history", "RecordAllMessages true", "",
        ]  # fmt: skip
        (folder / "conf").write_text("\n".join(lines))
        with _running(Program(folder, [program, "-f", "-c", folder / "conf"], path)) as made:
            yield made


@contextlib.contextmanager
def clamav_milter(scanner: str) -> Iterator[Program]:
    """clamav-milter with a clamd at this address."""
    program = need("clamav-milter")
    with _folder() as folder:
        path = folder / "socket"
        lines = [
            f"MilterSocket unix:{path}", "Foreground yes", f"ClamdSocket {scanner}", "OnInfected Reject", "AddHeader Replace",
            'RejectMsg "Virus %v here"', f"TemporaryDirectory {folder}", "MilterSocketMode 666", "",
        ]  # fmt: skip
        (folder / "conf").write_text("\n".join(lines))
        with _running(Program(folder, [program, "-c", folder / "conf"], path)) as made:
            yield made


@contextlib.contextmanager
def spamass_milter(spamd: str) -> Iterator[Program]:
    """spamass-milter with a spamd at this address; it refuses from 15 on."""
    program = need("spamass-milter")
    host, port = spamd.split(":")
    with _folder() as folder:
        path = folder / "socket"
        command: list[str | Path] = [program, "-p", path, "-r", "15", "--", "-d", host, "-p", port]
        with _running(Program(folder, command, path)) as made:
            yield made


@contextlib.contextmanager
def dkimpy_milter() -> Iterator[tuple[Program, DkimKey]]:
    """dkimpy-milter, which signs mail of 127.0.0.1 for b.example."""
    program = need("dkimpy-milter")
    with _folder() as folder:
        key, path = DkimKey(folder), folder / "socket"
        key.path.chmod(0o600)
        lines = [
            f"Socket local:{path}", "Domain b.example", "Selector s", f"KeyFile {key.path}", "Mode s", "UMask 000",
            "InternalHosts 127.0.0.1", f"PidFile {folder}/pid", "Canonicalization relaxed/simple", "UserID root", "",
        ]  # fmt: skip
        (folder / "conf").write_text("\n".join(lines))
        with _running(Program(folder, [program, folder / "conf"], path)) as made:
            yield made, key


@contextlib.contextmanager
def pyspf_milter() -> Iterator[Program]:
    """pyspf-milter, which adds what it finds, and refuses nothing."""
    program = need("pyspf-milter")
    with _folder() as folder:
        path = folder / "socket"
        lines = [
            "debugLevel = 1", "TestOnly = 1", "HELO_reject = False", "Mail_From_reject = False", f"Socket = local:{path}",
            f"PidFile = {folder}/pid", "UserID = root", "InternalHosts = 192.0.2.99", "skip_addresses = 192.0.2.98/32",
            "Header_Type = AR", "Authserv_Id = spf.example", "",
        ]  # fmt: skip
        (folder / "conf").write_text("\n".join(lines))
        with _running(Program(folder, [program, folder / "conf"], path)) as made:
            yield made
