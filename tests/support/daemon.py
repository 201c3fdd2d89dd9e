"""Real relays for tests: started as a user starts them (commands.py), killed as a power cut kills them."""

import contextlib
import http.client
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

from relaymta import control
from relaymta.log import record_of
from tests.support import commands

# Below the ports that the system gives to outgoing connections; each of several test processes has a range of its own.
_first = 10_000 + 3_500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 6)
_ports = itertools.cycle(random.sample(range(_first, _first + 3_500), 3_500))


def free_port() -> int:
    """A TCP port that is not in use right now."""
    for port in _ports:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


PATIENCE = 90.0  # seconds: what takes one on a quiet machine may take long on a busy one


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "it") -> Any:
    """Poll until the condition holds; its value. It waits for the longer of `seconds` and PATIENCE: how long it takes is not
    what is tested."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > max(seconds, PATIENCE):
            raise AssertionError(f"waited {waited:.0f} s for {what}")
        time.sleep(min(0.1, max(0.01, waited / 10)))  # a look costs CPU, here and in the relay: seldom, where it takes long


def check_records(text: bytes) -> None:
    """Each record of a log is as the schema says, and has no field that it does not name. What is no JSON, or cut off, is passed
    over."""
    for line in text.splitlines():
        if line.startswith(b'{"event":') and line.endswith(b"}"):
            record = record_of(line)
            known = {"event", *type(record).__struct_fields__}
            assert json.loads(line).keys() <= known, line


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
        self.process: subprocess.Popen[bytes] | commands.Started | None = None
        self.environment: dict[str, str] = {}
        self.python = sys.executable

    def command(self) -> list[str]:
        """The command line."""
        found = [*self.wrap, self.python, "-m", "relaymta", "serve", "--ephemeral", "--listen", f"127.0.0.1:{self.port}"]
        if self.smarthost is not None:
            found += ["--smarthost", self.smarthost]
        found += ["--spool", str(self.spool), "--workers", str(self.workers)]
        # A machine that is busy with other tests must not cause load shedding, where that is not tested.
        for setting in (
            f"log.file={self.log}", "hostname=relay.example", f"metrics.listen=127.0.0.1:{self.metrics_port}", "intake.shed_lag=0"
        ):  # fmt: skip
            found += ["--set", setting]
        for setting in self.settings:
            found += ["--set", setting]
        return found

    def start(self) -> "Relay":
        """Start and wait for the banner."""
        before = self.events("started")
        command, environment = self.command(), os.environ | self.environment
        with (self.folder / "stderr").open("ab") as stderr:
            if commands.forkable(command, environment):
                process: subprocess.Popen[bytes] | commands.Started = commands.start(command, environment, stderr)
            else:
                process = subprocess.Popen(command, start_new_session=True, env=environment, stderr=stderr)
        self.process = process
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
        return self.process.wait(PATIENCE)

    def __enter__(self) -> "Relay":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        if exc[0] is None and self.log.exists():
            check_records(self.log.read_bytes())

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `relaymta ARGUMENTS --spool ...`."""
        anywhere = ["--set", "ephemeral=true"] if {"config", "check"} <= set(arguments) else []  # tests may run in a container
        done = commands.run([*arguments, "--spool", str(self.spool), *anywhere], PATIENCE)
        if check:
            done.check_returncode()
        return done

    def summary(self) -> list[dict[str, Any]]:
        """The output of `queue summary --json`."""
        return self._asked("summary", "queue", "summary")  # type: ignore[no-any-return]

    def sites(self) -> list[dict[str, Any]]:
        """The output of `site list --json`."""
        return self._asked("sites", "site", "list")  # type: ignore[no-any-return]

    def _asked(self, op: str, *verb: str) -> Any:
        """The daemon's answer by its socket, which saves half a second of CPU; the command line's without a daemon."""
        end = time.monotonic() + PATIENCE
        try:
            while True:
                asked = control.begin(self.spool / "control.sock", op)
                answer = asked()
                if op == "status" or not asked.missing:  # the part of a worker that is late looks like an empty queue
                    return answer
                assert time.monotonic() < end, f"workers {asked.missing} do not answer"
        except (FileNotFoundError, ConnectionRefusedError):
            lines = self.cli(*verb, "--json").stdout.splitlines()
            return [json.loads(line) for line in lines] if verb != ("status",) else json.loads(lines[0])

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's events of this name."""
        if not self.log.exists():
            return []
        begin = b'{"event":"%s",' % name.encode()  # only these are parsed: a log has thousands of lines, and is read often
        lines = (line for line in self.log.read_bytes().splitlines() if line.startswith(begin) and line.endswith(b"}"))
        return [json.loads(line.decode("utf-8", "replace")) for line in lines if line.count(b"{") == 1]

    def metric(self, sample: str) -> float:
        """The value of one sample of /metrics, such as `name{label="x"}`."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10).read().decode()
        return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.rpartition(" ")[0] == sample)

    def monitored(self, path: str) -> tuple[int, str]:
        """Status and text of the answer to GET /path at the address of /metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def unready(self) -> list[str]:
        """What keeps it from being ready, as /readyz says; nothing: it is ready."""
        status, text = self.monitored("/readyz")
        found = json.loads(text)
        assert (status, found["ready"]) == ((503, False) if found["reasons"] else (200, True))
        assert all(reason["text"] for reason in found["reasons"])
        return [reason["what"] for reason in found["reasons"]]

    def worker_pids(self) -> list[int]:
        """The workers' process ids."""
        found = self._asked("status", "status")
        return [row["pid"] for row in found["workers"] if row["ready"]]

    def send(self, text: str = "Subject: hello\r\n\r\nhello\r\n", sender: str = "a@b.example", *to: str) -> None:
        """Send one message by smtplib."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            client.sendmail(sender, list(to) or ["c@d.example"], text)

    def send_all(self, count: int, text: str = "Subject: hello\r\n\r\nhello\r\n", to: str = "c@d.example") -> None:
        """Send so many messages, one after the other on one connection."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE) as client:
            for _ in range(count):
                client.sendmail("a@b.example", [to], text)

    def send_from(
        self, address: str, text: str = "Subject: hello\r\n\r\nhello\r\n", to: tuple[str, ...] = ("c@d.example",)
    ) -> None:
        """Send one message from another address of this machine."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=PATIENCE, source_address=(address, 0)) as client:
            client.sendmail("a@b.example", list(to), text)


def heard(sock: socket.socket, *ends: bytes) -> bytes:
    """The octets received until a line begins with one of `ends`, or the peer closes."""
    said = b""
    while not any(line.startswith(ends) for line in said.split(b"\r\n")[:-1]):
        piece = sock.recv(65536)
        if not piece:
            break
        said += piece
    return said


def dialog(port: int, *parts: bytes, pause: float = 0.05) -> bytes:
    """Send parts, after DATA once it was answered, otherwise with pauses between; returns all replies until the server closed
    or sent no more."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.settimeout(30)
        said += sock.recv(4096)
        for part in parts:
            sock.sendall(part)
            if part.endswith(b"DATA\r\n"):
                said += heard(sock, b"354", b"503", b"554 5.5.1", b"421")
            else:
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
