"""A Debian of its own for tests: made by debootstrap, started by systemd-nspawn, with systemd as its first process and a network
of its own, in which there is loopback only."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
PATIENCE = 120.0
_libc = ctypes.CDLL(None, use_errno=True)


def debootstrap(folder: Path, *packages: str) -> None:
    """Install Debian's base and `packages` into a folder, from the mirror that this machine uses."""
    mirror, suite = _mirror()
    included = [f"--include={','.join(packages)}"] if packages else []
    command = ["debootstrap", "--variant=minbase", *included, suite, str(folder), mirror]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def _mirror() -> tuple[str, str]:
    """The first address in apt's lists, and the suite."""
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "".join(path.read_text() for path in lists if path.exists())
    found = re.search(r"^(?:URIs:|deb (?:\[.*?\] )?)\s*(\S+://\S+)", text, re.M)
    assert found is not None, "apt has no mirror"
    return found[1], suite


class Machine:
    """A running machine with a root directory. What is done in it is done by its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.leader = 0
        self._nspawn: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Machine":
        self._nspawn = subprocess.Popen(
            ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=read-only", "--boot",
             "-D", str(self.root)],
            stdin=subprocess.DEVNULL, stdout=(self.root.parent / "console").open("ab"), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._await_start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)  # and so each process in it
        assert self._nspawn is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._nspawn.wait(10)
        self._nspawn.kill()
        self._nspawn.wait()

    def _await_start(self) -> None:
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._nspawn.poll() is None:
            if found := children.read_text().split():
                self.leader = int(found[0])
                if self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"):
                    return
            time.sleep(0.1)
        raise AssertionError((self.root.parent / "console").read_text(errors="replace")[-3000:])

    def run(
        self, *command: str, check: bool = True, given: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine."""
        clean = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
            "HOME": "/root",
        }
        done = subprocess.run(
            ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", *command],
            capture_output=True, text=True, input=given, timeout=PATIENCE, env=clean | (env or {}),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}{self.journal()}"
        return done

    def journal(self, unit: str = "relaymta.service", lines: int = 40) -> str:
        """The last lines that a unit has logged."""
        return self.run("journalctl", "--no-pager", "-q", "-o", "cat", "-n", str(lines), "-u", unit, check=False).stdout

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Sockets that this thread makes within are in the machine's network."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(f"/proc/{self.leader}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(own)
            os.close(there)

    def path(self, inside: str) -> Path:
        """Where a file of the machine is."""
        return self.root / inside.lstrip("/")


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
