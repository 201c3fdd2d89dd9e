"""Real relays for tests: started as a user starts them, killed as a power cut kills them."""

import contextlib
import itertools
import json
import os
import random
import signal
import smtplib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Below the ports that the system gives to outgoing connections; those who test side by side have their own.
_first = 10_000 + 10_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20_000
_ports = itertools.cycle(random.sample(range(_first, _first + 10_000), 10_000))


def free_port() -> int:
    """A TCP port nobody uses right now."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


def wait_for(condition: Callable[[], Any], seconds: float = 20.0, what: str = "it") -> Any:
    """Poll until the condition holds; its value."""
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


class Relay:
    """`relaymta serve` in a process group of its own, with its spool and log under `folder`."""

    def __init__(self, folder: Path, smarthost: str | None, *settings: str, workers: int = 1, wrap: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        self.log = folder / "relay.log"
        self.port = free_port()
        self.metrics_port = free_port()
        self.smarthost = smarthost
        self.settings = settings
        self.workers = workers
        self.wrap = wrap
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.python = sys.executable

    def command(self) -> list[str]:
        """The command line."""
        found = [*self.wrap, self.python, "-m", "relaymta", "serve", "--listen", f"127.0.0.1:{self.port}"]
        if self.smarthost is not None:
            found += ["--smarthost", self.smarthost]
        found += ["--spool", str(self.spool), "--workers", str(self.workers)]
        for setting in (f"log.file={self.log}", "hostname=relay.example", f"metrics.listen=127.0.0.1:{self.metrics_port}"):
            found += ["--set", setting]
        for setting in self.settings:
            found += ["--set", setting]
        return found

    def start(self) -> "Relay":
        """Start and wait for the banner."""
        before = self.events("started")
        process = self.process = subprocess.Popen(
            self.command(), start_new_session=True, env=os.environ | self.environment, stderr=(self.folder / "stderr").open("ab")
        )
        try:
            wait_for(lambda: len(self.events("started")) > len(before) or process.poll() is not None, 30, "the relay to start")
        except AssertionError:
            self.kill()
            raise
        assert self.process.poll() is None, (self.folder / "stderr").read_text()
        return self

    def kill(self) -> None:
        """kill -9 of the whole group."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> "Relay":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `relaymta ARGUMENTS --spool ...`."""
        return subprocess.run(
            [sys.executable, "-m", "relaymta", *arguments, "--spool", str(self.spool)],
            capture_output=True, text=True, check=check, timeout=60,
        )  # fmt: skip

    def summary(self) -> list[dict[str, Any]]:
        """`queue summary --json`."""
        return json.loads(self.cli("queue", "summary", "--json").stdout)  # type: ignore[no-any-return]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name."""
        if not self.log.exists():
            return []
        lines = self.log.read_bytes().decode("utf-8", "replace").splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}") and line.count("{") == 1]
        return [row for row in rows if row["event"] == name]

    def metric(self, sample: str) -> float:
        """The value of one sample of /metrics, such as `name{label="x"}`."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10).read().decode()
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.rpartition(" ")[0] == sample)

    def worker_pids(self) -> list[int]:
        """The workers' process ids."""
        found = json.loads(self.cli("status", "--json").stdout)
        return [row["pid"] for row in found["workers"] if row["ready"]]

    def send(self, text: str = "Subject: hello\r\n\r\nhello\r\n", sender: str = "a@b.example", *to: str) -> None:
        """One message by smtplib."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=30) as client:
            client.sendmail(sender, list(to) or ["c@d.example"], text)

    def send_from(
        self, address: str, text: str = "Subject: hello\r\n\r\nhello\r\n", to: tuple[str, ...] = ("c@d.example",)
    ) -> None:
        """One message from another address of this machine."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=30, source_address=(address, 0)) as client:
            client.sendmail("a@b.example", list(to), text)


def dialog(port: int, *parts: bytes, pause: float = 0.05) -> bytes:
    """Send parts with pauses between them; everything the server said until it closed or fell silent."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.settimeout(10)
        said += sock.recv(4096)
        for part in parts:
            sock.sendall(part)
            time.sleep(pause)
        sock.shutdown(socket.SHUT_WR)
        while True:
            try:
                piece = sock.recv(65536)
            except (TimeoutError, ConnectionResetError):
                break
            if not piece:
                break
            said += piece
    return said
