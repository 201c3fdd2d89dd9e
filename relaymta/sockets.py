"""Listening sockets, bound here or passed by systemd (sd_listen_fds(3)); the control socket; sd_notify(3)."""

import contextlib
import errno
import ipaddress
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pwd import struct_passwd

from relaymta.config import Listener, parse_hostport
from relaymta.errors import ConfigError, SpoolBusy

__all__ = [
    "ENDING_SECONDS", "another", "bind", "bound", "check_free", "control_socket", "http_sockets", "in_use", "key_of", "listens",
    "local_socket", "notify", "notify_wait", "reason", "remove_socket", "watchdog_seconds",
]  # fmt: skip

FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
BACKLOG = 1024
LOCAL = "local.socket"
HTTP_BACKLOG = 128
PROBE_SECONDS = 10.0
ENDING_SECONDS = 1.0  # for a process that was killed to end
BARRIER_SECONDS = 5.0


def bound(
    listeners: list[Listener], slots: int, own: dict[tuple[str, int], list[socket.socket]] | None = None
) -> list[list[socket.socket]]:
    """For each worker slot, one socket for each listener. A socket passed by systemd with a listener's address is used by all
    slots (several with the same address, ReusePort=yes, are distributed); the others are bound with SO_REUSEPORT. `own`: those
    that an older program has passed, by address, one for each slot; those that belong to no listener are closed. ConfigError
    when an address is in use, is not local, or was passed by systemd and belongs to no listener."""
    inherited = _inherited() if own is None else own
    rows: list[list[socket.socket]] = [[] for _ in range(slots)]
    for listener in listeners:
        address = key_of(listener.address)
        passed = inherited.pop(address, [])
        if not passed:
            check_free(listener.address)
        for number, row in enumerate(rows):
            row.append(another(passed[number % len(passed)]) if passed else bind(listener.address))
        for sock in passed:
            sock.close()
    for sock in (sock for passed in inherited.values() for sock in passed if own is not None):
        sock.close()
    if inherited and own is None:
        names = ", ".join(f"{host}:{port}" for host, port in inherited)
        raise ConfigError([f"listener.address: systemd passes a socket on {names}, which no [[listener]] has as its address"])
    return rows


def another(sock: socket.socket) -> socket.socket:
    """Another descriptor of a socket. (socket.dup would also make it block, for all processes that have it.)"""
    return socket.socket(fileno=os.dup(sock.fileno()))


def _inherited() -> dict[tuple[str, int], list[socket.socket]]:
    """The listening TCP sockets that systemd passed to this process, by address. ConfigError for other descriptors."""
    found: dict[tuple[str, int], list[socket.socket]] = {}
    count, owner = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if owner != str(os.getpid()) or not count.isdigit():
        return found
    for descriptor in range(FIRST_INHERITED, FIRST_INHERITED + int(count)):
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ConfigError([f"listener.address: systemd's descriptor {descriptor} is not a listening TCP socket"])
        host, port, *_ = sock.getsockname()
        found.setdefault(normal(host, port), []).append(sock)
    return found


def normal(host: str, port: int) -> tuple[str, int]:
    """An address in the form in which two of the same are equal."""
    with contextlib.suppress(ValueError):
        host = ipaddress.ip_address(host.partition("%")[0]).compressed
    return host, port


def key_of(address: str) -> tuple[str, int]:
    """The address of a listener as a key; of a unix socket, its path."""
    return (address, 0) if address.startswith("unix:") else normal(*parse_hostport(address))


def bind(address: str) -> socket.socket:
    """A listening SO_REUSEPORT socket. ConfigError when the address is in use or not local."""
    host, port = parse_hostport(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError([f"listener.address: {address}: {reason(error)}"]) from None
    return sock


def http_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for an address of /metrics, one for each that its name has. OSError when it is in use."""
    found: list[socket.socket] = []
    try:
        for family, _, _, _, address in socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sock = socket.socket(family, socket.SOCK_STREAM)
            found.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            _patiently(partial(sock.bind, address))
            sock.listen(HTTP_BACKLOG)
    except BaseException:
        for sock in found:
            sock.close()
        raise
    return found


def check_free(address: str) -> None:
    """ConfigError when another program listens on an address (SO_REUSEPORT alone would share the port with it)."""
    try:
        _patiently(lambda: _try(address))
    except OSError as error:
        raise ConfigError([f"listener.address: {address}: {reason(error)}"]) from None


def in_use(address: str) -> bool:
    """Whether a program listens on an address; false where the caller has no right to try."""
    try:
        _try(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def _patiently(bind: Callable[[], None]) -> None:
    """Bind an address; where it is in use, again and again for a moment: a program that was killed has it until it has ended.
    OSError."""
    until = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            return bind()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
            time.sleep(0.005)


def _try(address: str) -> None:
    """Bind an address and close it again, without listening on it. OSError."""
    host, port = parse_hostport(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((host, port))


def control_socket(
    path: Path, user: struct_passwd | None = None, group: int | None = None, key: str = "control.socket", backlog: int = 16
) -> socket.socket:
    """The listening control socket at `path`, for its owner (`user`, if given) and group (`group`, if given) only; that of
    sendmail(1) (`key`: what has its path in the configuration), for everybody. A socket left
    over there, on which no process answers, is removed. SpoolBusy when one answers; ConfigError when something else is there."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear_way(path, key)
        before = os.umask(0o111 if key == LOCAL else 0o117)
        try:
            control.bind(str(path))
        finally:
            os.umask(before)
        _give_socket(path, user, group)
        control.listen(backlog)
    except OSError as error:
        control.close()
        raise ConfigError([f"{key}: {path}: {error.strerror or error}"]) from None
    except BaseException:
        control.close()
        raise
    return control


def local_socket(path: Path, user: struct_passwd | None = None) -> socket.socket:
    """The listening socket of sendmail(1), as `control_socket`."""
    return control_socket(path, user, None, LOCAL, BACKLOG)


def _give_socket(path: Path, user: struct_passwd | None, group: int | None) -> None:
    """Give the control socket to its owner and group. Between bind and this nobody else can connect: it does not listen yet."""
    if user is None and group is None:
        return
    own = -1 if user is None else user.pw_gid
    try:
        os.chown(path, -1 if user is None else user.pw_uid, own if group is None else group, follow_symlinks=False)
    except PermissionError:
        path.unlink()
        if group is None:
            raise
        what = "only root, or a member of the group, can give the socket to it; start as root, or add the relay's user to it"
        raise ConfigError([f"control.group: {what}"]) from None


def _clear_way(path: Path, key: str) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError([f"{key}: {path} exists and is not a socket; it was left as it is: move it, or choose another path"])
    if listens(path):
        raise SpoolBusy(f"{path}: another relaymta answers here")
    path.unlink()


def listens(path: Path) -> bool:
    """Whether a process listens at a control socket. OSError when there is none, or that cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):  # a process has it, and is slow
            pass
    return True


def remove_socket(control: socket.socket, path: Path) -> None:
    """Close and remove the control socket, if a socket is still at `path`. One that may not be removed (in a folder of root's) is
    left to the next start."""
    control.close()
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


def reason(error: OSError) -> str:
    """Why an address cannot be bound, for operators."""
    if error.errno == errno.EADDRINUSE:
        return "another program listens on this port; stop it, or choose another address"
    if error.errno == errno.EACCES:
        return "ports below 1024 need root"
    return error.strerror or str(error)


def watchdog_seconds() -> float:
    """How often systemd expects a sign of life (sd_watchdog_enabled(3)); 0: it does not."""
    period, owner = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    return int(period) / 1e6 if period.isdigit() and owner in ("", str(os.getpid())) else 0.0


def notify_wait(state: str) -> None:
    """As `notify`, and wait until systemd has seen it (sd_notify_barrier(3)): this process may end then. Blocks for
    BARRIER_SECONDS at most."""
    notify(state)
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    ours, theirs = os.pipe()
    try:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            socket.send_fds(sock, [b"BARRIER=1"], [theirs])
            os.close(theirs)
            theirs = -1
            seen = select.poll()
            seen.register(ours, 0)  # its other end is closed
            seen.poll(BARRIER_SECONDS * 1000)
    finally:
        for descriptor in (ours, theirs):
            if descriptor >= 0:
                os.close(descriptor)


def notify(state: str) -> None:
    """Send a state to systemd (sd_notify), if it has asked for it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
