"""Relays that are started for a run, each with its own queue in a folder that is thrown away: ours, and for comparison Postfix
and Exim. An instance that the system runs is not touched.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from relaymta import __version__
from relaymta.bench.generator import Login
from relaymta.bench.load import Load
from relaymta.bench.processes import free_port, start, stop, tail_of, wait_until
from relaymta.bench.sink import certificate
from relaymta.control import program
from relaymta.errors import RelayError
from relaymta.toml import written

__all__ = ["PEERS", "POSSIBLE", "Cannot", "Exim", "Peer", "Plan", "Postfix", "Relaymta"]

START_SECONDS = 60.0
SOCKET_PATH = 100  # octets: a longer path is none of a socket (unix(7))
FAULTY_RETRY = 1  # seconds to the first retry, where the sink is faulty: by default it is minutes, and no run is that long
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Cannot(RelayError):
    """A relay that cannot be started here. `status`: that of the command."""

    def __init__(self, text: str, status: int = 69) -> None:
        super().__init__(text)
        self.status = status


class Plan(NamedTuple):
    """What a relay is started for. `sink`: the port on 127.0.0.1 that everything is routed to; `faulty`: it misbehaves, and the
    relay is to try again soon; `settings`: keys of our configuration (dotted key -> value)."""

    load: Load
    sink: int
    faulty: bool = False
    workers: int = 1
    settings: Mapping[str, Any] = {}


class Peer(Protocol):
    """A relay that runs. `durability`: what is on disk before it says 250."""

    name: str
    version: str
    durability: str
    port: int
    root: int
    login: Login | None

    def queued(self) -> set[bytes] | None:
        """The names of the messages in its queue; None: it does not answer."""

    def syncs(self) -> float | None:
        """How often it has synced to disk; None: it does not tell."""

    def close(self) -> None:
        """Stop it."""


def _found(name: str, package: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        raise Cannot(f"{name} is not installed: apt-get install {package}")
    return found


# Ours


class Relaymta:
    """The relay of this installation, with its default configuration but for addresses, the route, and what the load needs."""

    name = "relaymta"
    version = __version__
    durability = "fdatasync of the body and a synced commit before 250, one for all messages that are ready (group commit)"

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.port, self._metrics = free_port(), free_port()
        self._file = folder / "relaymta.toml"  # empty: that of this machine is not read
        self._file.touch()
        self.spool, self._log, self._said = folder / "spool", folder / "relay.log", folder / "relay.stderr"
        self.login: Login | None = None
        self._socket = self.spool / "control.sock"
        self._elsewhere = ""  # a folder for it
        if len(os.fsencode(self._socket)) > SOCKET_PATH:
            self._elsewhere = tempfile.mkdtemp(prefix="relaymta-bench-")
            self._socket = Path(self._elsewhere) / "control.sock"
        settings = self._settings(folder, plan) | dict(plan.settings)
        options = [word for key, value in settings.items() for word in ("--set", f"{key}={written(value)}")]
        command = program("relaymta.cli", "serve", "--spool", str(self.spool), "-c", str(self._file), *options)
        with self._said.open("wb") as said:
            self.process = start(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.root = self.process.pid
        if (
            not wait_until(lambda: self.process.poll() is not None or self._healthy(), START_SECONDS)
            or self.process.poll() is not None
        ):
            self.close()
            raise Cannot(f"the relay does not start: {tail_of(self._said) or tail_of(self._log) or 'no reason given'}", 70)

    def _settings(self, folder: Path, plan: Plan) -> dict[str, Any]:
        load = plan.load
        listener: dict[str, Any] = {"address": f"127.0.0.1:{self.port}"}
        found: dict[str, Any] = {
            "listener": [listener], "route": [{"name": "sink", "hosts": [f"127.0.0.1:{plan.sink}"]}], "workers": plan.workers,
            "hostname": "relay.bench.invalid", "log.file": str(self._log), "metrics.listen": f"127.0.0.1:{self._metrics}",
            "ephemeral": True, "control.socket": str(self._socket),
        }  # fmt: skip
        if load.connections > 150:  # relay networks: at least 200
            found["limits.connections_per_client"] = load.connections + 50
        if plan.faulty:
            found["delivery.first_retry"] = FAULTY_RETRY
            found["rule"] = [{"match": "(?i)gr[ae]y.?list", "action": "retry", "for": FAULTY_RETRY}]  # by default minutes, too
        if load.tls != "off":
            certificate(folder)
            found["certificate"] = [{"chain": str(folder / "sink.pem")}]
            listener["tls"] = "implicit" if load.tls == "implicit" else "may"
        if load.auth != "off":
            listener |= {"auth": "require"} | ({"auth_in_clear": True} if load.tls == "off" else {})
            found["accounts.file"] = self._account(folder)
        return found

    def _account(self, folder: Path) -> str:
        self.login = Login("bench", secrets.token_urlsafe(16))
        path = str(folder / "accounts.toml")
        command = program(
            "relaymta.cli", "user", "add", self.login.user, "-c", str(self._file), "--set", f"accounts.file={written(path)}"
        )
        done = subprocess.run(command, input=self.login.password + "\n", capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Cannot(f"no account could be made: {done.stderr.strip()}", 70)
        return path

    def _healthy(self) -> bool:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/health", timeout=5) as answer,
        ):
            return bool(answer.status == 200)
        return False

    def counter(self, name: str) -> float:
        """The sum of the samples of a metric. OSError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))

    def queued(self) -> set[bytes] | None:
        """As of Peer."""
        where = ("--spool", str(self.spool), "--set", f"control.socket={written(str(self._socket))}")
        command = program("relaymta.cli", "queue", "list", "--json", *where, "-c", str(self._file))
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError, KeyError):
            done = subprocess.run(command, capture_output=True, timeout=120, check=False)
            if done.returncode == 0:
                return {json.loads(line)["id"].encode() for line in done.stdout.splitlines()}
        return None

    def syncs(self) -> float | None:
        """As of Peer: of bodies and commits."""
        with contextlib.suppress(OSError, ValueError):
            return self.counter("relaymta_syncs_total") + self.counter("relaymta_commits_total")
        return None

    def close(self) -> None:
        """Stop it."""
        stop(self.process)
        if self._elsewhere:
            shutil.rmtree(self._elsewhere, ignore_errors=True)


# Postfix


class Postfix:
    """A private instance of Postfix with its defaults, which relays to the sink. Needs root."""

    name = "Postfix"
    durability = "fsync of the queue file before 250, one for each message"

    def __init__(self, folder: Path, plan: Plan, more: str = "") -> None:
        """`more`: lines of main.cf."""
        self.possible(plan.load)
        self._postfix = _found("postfix", "postfix")
        if len(os.fsencode(folder / "queue/public/postlog")) > SOCKET_PATH:
            raise Cannot(f"{folder}: this path is too long for the sockets of Postfix: give a shorter --spool-dir", 73)
        self.port = free_port()
        self.login: Login | None = None
        self.config, self._queue, self.log = folder / "etc", folder / "queue", folder / "maillog"
        self._files(folder, plan, more)
        done = subprocess.run([self._postfix, "-c", str(self.config), "start"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Cannot(f"Postfix does not start: {(done.stderr or done.stdout).strip()[-500:] or tail_of(self.log)}", 70)
        self.version = self._asked("postconf", "-dh", "mail_version").strip()
        pid = self._queue / "pid/master.pid"
        if not wait_until(pid.exists, START_SECONDS):
            raise Cannot(f"Postfix does not start: {tail_of(self.log)}", 70)
        self.root = int(pid.read_text())

    @staticmethod
    def possible(load: Load) -> None:
        """Cannot, where it cannot be started here, or not for this load."""
        _found("postfix", "postfix")
        if os.geteuid() != 0:
            raise Cannot("Postfix needs root: run this as root", 77)
        if load.auth != "off":
            raise Cannot("Postfix has no accounts of its own: no --auth with --peer postfix", 64)

    def _files(self, folder: Path, plan: Plan, more: str) -> None:
        shutil.copytree("/etc/postfix", self.config, symlinks=True)
        data = folder / "data"
        for made in (self._queue, data):
            made.mkdir()
        shutil.chown(data, "postfix")
        folder.chmod(0o755)
        lines = [
            "compatibility_level=3.6", f"queue_directory={self._queue}", f"data_directory={data}", "mynetworks=127.0.0.0/8",
            "inet_protocols=ipv4", "inet_interfaces=127.0.0.1", "myhostname=postfix.bench.invalid", "mydestination=",
            f"relayhost=[127.0.0.1]:{plan.sink}", "alias_maps=", f"maillog_file={self.log}", f"maillog_file_prefixes={folder}",
            "smtpd_peername_lookup=no", "message_size_limit=0",
        ]  # fmt: skip
        lines.append(f"smtp_tls_security_level={'may' if plan.faulty else 'none'}")
        if plan.faulty:
            lines += [f"{key}={FAULTY_RETRY}s" for key in ("minimal_backoff_time", "queue_run_delay")]
            lines.append("maximal_backoff_time=60s")
        if plan.load.tls == "off":
            lines.append("smtpd_tls_security_level=none")
        else:
            certificate(folder)
            lines += ["smtpd_tls_security_level=may", f"smtpd_tls_chain_files={folder / 'sink.pem'}"]
            lines += ["smtpd_tls_wrappermode=yes"] if plan.load.tls == "implicit" else []
        (self.config / "main.cf").write_text("\n".join(lines) + "\n" + more)
        master = self.config / "master.cf"
        master.write_text(
            "\n".join(map(self._service, master.read_text().splitlines())) + "\npostlog unix-dgram n - n - 1 postlogd\n"
        )

    def _service(self, line: str) -> str:
        """A line of master.cf: not chrooted, and on our port."""
        words = line.split()
        if line[:1] in ("", "#", " ", "\t") or len(words) < 8:
            return line
        words[4] = "n"
        if words[1] == "inet":
            if words[0] != "smtp":
                return f"#{line}"
            words[0] = str(self.port)
        return " ".join(words)

    def _asked(self, name: str, *arguments: str) -> str:
        command = (
            [_found(name, "postfix"), *arguments, "-c", str(self.config)]
            if name == "postqueue"
            else [_found(name, "postfix"), *arguments]
        )
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    def queued(self) -> set[bytes] | None:
        """As of Peer."""
        with contextlib.suppress(ValueError, KeyError, subprocess.SubprocessError):
            return {json.loads(line)["queue_id"].encode() for line in self._asked("postqueue", "-j").splitlines()}
        return None

    def delivered(self) -> float:
        """Recipients that it has delivered to."""
        return float(self.log.read_text().count("status=sent")) if self.log.exists() else 0.0

    def syncs(self) -> float | None:
        """As of Peer."""
        return None

    def close(self) -> None:
        """Stop it."""
        subprocess.run([self._postfix, "-c", str(self.config), "stop"], check=False, capture_output=True)


# Exim


EXIM = """
primary_hostname = exim.bench.invalid
spool_directory = {folder}/spool
log_file_path = {folder}/log/%slog
pid_file_path = {folder}/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
tls_advertise_hosts =
acl_smtp_rcpt = accept_all
smtp_accept_max = 0
smtp_accept_queue_per_connection = 0
smtp_accept_max_per_connection = 0
host_lookup =
rfc1413_hosts =
never_users =
begin acl
accept_all:
  accept
begin routers
sink:
  driver = manualroute
  domains = *
  route_list = * 127.0.0.1
  self = send
  transport = sink
begin transports
sink:
  driver = smtp
  port = {sink}
  hosts_try_fastopen =
begin retry
* * F,1h,{retry}
"""


class Exim:
    """A private instance of Exim 4, which relays to the sink. Needs root."""

    name = "Exim"
    durability = "fsync of the two spool files before 250, for each message"

    def __init__(self, folder: Path, plan: Plan) -> None:
        exim = self.possible(plan.load)
        self.port = free_port()
        self.login: Login | None = None
        self._command = [exim, "-C", str(folder / "exim.conf")]
        (folder / "exim.conf").write_text(
            EXIM.format(folder=folder, port=self.port, sink=plan.sink, retry="1s" if plan.faulty else "15m")
        )
        folder.chmod(0o755)
        for name in ("spool", "log"):
            (folder / name).mkdir(mode=0o750)
            with contextlib.suppress(LookupError):
                shutil.chown(folder / name, *(("Debian-exim",) * 2 if exim.endswith("exim4") else ("exim",) * 2))
        said = folder / "exim.stderr"
        again = f"-q{'1s' if plan.faulty else '1m'}"
        with said.open("wb") as file:
            self.process = start([*self._command, "-bdf", again], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self.root = self.process.pid
        if not wait_until(lambda: self.process.poll() is not None or (folder / "exim.pid").exists(), START_SECONDS) or (
            self.process.poll() is not None
        ):
            stop(self.process)
            raise Cannot(f"Exim does not start: {tail_of(said) or tail_of(folder / 'log/paniclog')}", 70)
        shown = subprocess.run([exim, "-bV"], capture_output=True, text=True, check=False).stdout
        self.version = (re.search(r"version (\S+)", shown) or ["", ""])[1]

    @staticmethod
    def possible(load: Load) -> str:
        """The path of the program. Cannot, where it cannot be started here, or not for this load."""
        exim = shutil.which("exim4", path=PATH) or _found("exim", "exim4-daemon-light")
        if os.geteuid() != 0:
            raise Cannot("Exim needs root: run this as root", 77)
        if load.auth != "off" or load.tls != "off":
            raise Cannot("Exim is compared without --tls and --auth", 64)
        return exim

    def queued(self) -> set[bytes] | None:
        """As of Peer."""
        done = subprocess.run([*self._command, "-bpi"], capture_output=True, timeout=120, check=False)
        return set(done.stdout.split()) if done.returncode == 0 else None

    def syncs(self) -> float | None:
        """As of Peer."""
        return None

    def close(self) -> None:
        """Stop it."""
        stop(self.process)


POSSIBLE: dict[str, Callable[[Load], object]] = {"postfix": Postfix.possible, "exim": Exim.possible}
PEERS: dict[str, Callable[[Path, Plan], Peer]] = {"relaymta": Relaymta, "postfix": Postfix, "exim": Exim}
