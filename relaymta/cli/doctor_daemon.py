"""What `relaymta doctor` checks of the running relay, its control socket, and who has its ports."""

import contextlib
import grp
import ipaddress
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from relaymta import __version__, privileges
from relaymta.cli.doctor_scene import Row, Scene
from relaymta.cli.peer import lasting
from relaymta.config import parse_hostport
from relaymta.disk.lock import locked_shard
from relaymta.errors import ConfigError
from relaymta.sockets import in_use

__all__ = ["control_socket", "daemon", "holder", "ports", "workers"]

LISTEN = "0A"  # the state in /proc/net/tcp (proc_net_tcp(5))
_KNOWN = {"master": "Postfix (master)", "exim4": "Exim", "sendmail-mta": "Sendmail", "smtpd": "OpenSMTPD (smtpd)"}


def daemon(scene: Scene) -> list[Row]:
    """Whether the relay runs, is of this program's version, and listens where the configuration says."""
    told = scene.told
    if told.closed:
        return [("daemon", "warning", f"{told.silence}: run as {scene.who} to check the running relay")]
    if told.silence:
        cure = "see its log, and restart it (`systemctl restart relaymta`)"
        return [("daemon", "wrong", f"a relay runs, and does not answer ({told.silence}): {cure}")]
    status = told.status
    if scene.control is None:
        return []
    if status is None:
        if scene.given and (shard := locked_shard(Path(scene.config.spool))) is not None:
            cure = "it was started with another control.socket, or is still ending: stop it, before one with this is started"
            return [("daemon", "wrong", f"{shard} is in use by a relay that does not answer at {scene.control}: {cure}")]
        start = f"`systemctl start relaymta`, or `relaymta serve{scene.options}`"
        return [("daemon", "warning", f"no relay answers at {scene.control}: start it ({start})")]
    what = f"relaymta {status['version']}, pid {status['pid']}, up {lasting(status['uptime'])}"
    if status["version"] != __version__:
        cure = "restart it (`systemctl restart relaymta`): all processes of a relay are of one version"
        return [("daemon", "wrong", f"{what}, and this program is {__version__}: {cure}")]
    if status.get("stopping"):
        return [("daemon", "warning", f"{what}: it is stopping, and takes no mail; start it again afterwards")]
    closed = [one.address for one in scene.config.listener if scene.given and one.address not in status["listeners"]]
    if closed:
        return [("daemon", "warning", f"{what}: it does not listen on {', '.join(closed)} of the configuration: restart it")]
    return [("daemon", "ok", what)]


def workers(scene: Scene) -> list[Row]:
    """Whether all workers are ready and can write, and how often they were replaced."""
    status = scene.told.status
    if status is None:
        return []
    found: list[tuple[str, str]] = []
    for row in status["workers"]:
        name = f"worker {row['worker']}"
        if row.get("full"):
            found.append(("wrong", f"{name} takes no mail, since its disk is full: make room"))
        elif row.get("stalled"):
            found.append(("wrong", f"{name} cannot write its store: see the log for the error, and the row about the disk"))
        elif not row["ready"]:
            state = "warning" if row["state"] == "starting" else "wrong"
            found.append(
                (state, f"{name} is {row['state']}: see what the log says about it, and `relaymta status{scene.options}`")
            )
        elif row.get("restarts"):
            count = f"{row['restarts']} times" if row["restarts"] > 1 else "once"
            found.append(("warning", f"{name} has died and was replaced {count} since the start: see the log for why"))
    if not found:
        return [("workers", "ok", f"all {len(status['workers'])} ready, none was replaced")]
    state = "wrong" if any(one == "wrong" for one, _ in found) else "warning"
    return [("workers", state, "; ".join(sentence for _, sentence in found))]


def control_socket(scene: Scene) -> list[Row]:
    """Who may use the command line of the running relay."""
    path, what = scene.control, "control socket"
    if path is None or (scene.told.status is None and not scene.told.silence):
        return []
    try:
        found = path.stat()
        folder = path.parent.stat()
    except PermissionError:
        return [(what, "warning", f"{path}: run as {scene.who} to check it")]
    mode, owner = stat.S_IMODE(found.st_mode), _name_of_user(found.st_uid)
    shown = f"{path} of {owner}:{_name_of_group(found.st_gid)}, mode {mode:04o}"
    if mode & 0o007:
        cure = f"`chmod o= {path}`; for a group of operators there is control.group"
        return [(what, "wrong", f"{shown}: every user of this machine may use all verbs, also those that delete mail: {cure}")]
    if folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX:
        return [(what, "wrong", f"{shown}: every user can put another one in its place: `chmod o-w {path.parent}`")]
    user = scene.user
    if user is not None and found.st_uid not in (user.pw_uid, 0):
        return [(what, "wrong", f"{shown}, but the relay runs as {user.pw_name or user.pw_uid}: restart it")]
    if scene.given and scene.config.control.group:
        try:
            group = privileges.group(scene.config.control.group)
        except ConfigError as error:
            return [(what, "wrong", f"{error}: create it, or correct control.group")]
        if found.st_gid != group:
            return [(what, "warning", f"{shown}, and control.group is {scene.config.control.group}: restart the relay")]
    return [(what, "ok", shown)]


def _name_of_user(number: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def _name_of_group(number: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return str(number)


def ports(scene: Scene) -> list[Row]:
    """Whether another program has an address of the relay, such as a local MTA port 25; and which."""
    from relaymta.supervisor.checks import addresses

    wanted = [address for _, address in addresses(scene.config)]
    if scene.told.silence:
        return [("ports", "warning", f"the running relay did not tell its ports: run as {scene.who} to check them")]
    status = scene.told.status
    ours = {*status["listeners"], status["metrics"]} if status is not None else set()
    rows: list[Row] = []
    for address in wanted:
        if address in ours:
            continue
        who = holder(address)
        if who is None and not in_use(address):
            continue
        if who == "systemd":  # which binds the ports of relaymta.socket
            continue
        cure = "stop it for good (`systemctl disable --now UNIT`), or choose another address"
        name = who or f"another program (run as {scene.who} to see which)"
        unit = (who or "").partition(", unit ")[2]
        rows.append((f"port {address}", "wrong", f"{name} listens on it: {cure.replace('UNIT', unit or 'UNIT')}"))
    if rows:
        return rows
    return [("ports", "ok", f"{', '.join(wanted)}: " + ("ours" if status is not None else "free"))] if wanted else []


def holder(address: str) -> str | None:
    """Which program listens on an address, or on all of its port: its name, process and unit, "" where we may not see it; None:
    there is none."""
    host, port = parse_hostport(address)
    inodes = {inode for local, at, inode in _listening() if at == port and _overlap(host, local)}
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(entry.path) in wanted for entry in os.scandir(process / "fd")):
                return _named(process)
    return ""


def _listening() -> Iterator[tuple[str, int, str]]:
    """(address, port, inode) of each TCP socket that listens."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN:
                    host, _, port = words[1].partition(":")
                    yield _address(host), int(port, 16), words[9]


def _address(text: str) -> str:
    """An address in /proc/net/tcp: 32-bit words in the machine's order."""
    octets = b"".join(bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8))
    return str(ipaddress.ip_address(octets))


def _overlap(host: str, local: str) -> bool:
    """Whether listening on one address leaves no room for the other. On :: IPv4 may be served, too."""
    if local == "::" or host == local:
        return True
    try:
        wanted = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return True
    other = ipaddress.ip_address(local)
    return wanted == other or (wanted.version == other.version and (wanted.is_unspecified or other.is_unspecified))


def _named(process: Path) -> str:
    """A process: its name, number and unit."""
    name = (process / "comm").read_text().strip()
    if process.name == "1" and name == "systemd":
        return name
    group = (process / "cgroup").read_text().rpartition("/")[2].strip()
    unit = f", unit {group}" if group.endswith(".service") else ""
    return f"{_KNOWN.get(name, name)}, pid {process.name}{unit}"
