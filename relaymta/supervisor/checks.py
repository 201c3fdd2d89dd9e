"""What a start needs beside the configuration itself: files, folders, addresses. A start and a reload refuse what `check_files`
finds; `relaymta config check` reports all that is here, before a start finds it."""

import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import relaymta
from relaymta import privileges
from relaymta.config import Config, given_values, parse_hostport
from relaymta.disk.mounts import IN_LAYERS, IN_MEMORY, mount_of
from relaymta.errors import ConfigError
from relaymta.files import read_secret
from relaymta.route.ourselves import is_local
from relaymta.sockets import in_use, reason
from relaymta.toml import CONF_D

__all__ = [
    "addresses", "broken_lists", "busy_ports", "changeable_files", "check_files", "check_program", "closed_socket",
    "ephemeral_spool", "exposed_secrets", "fleeting_spool", "import_all", "made_by_root", "missing_variables", "unreadable_files",
    "unreadable_secrets", "unusable_places", "why_not_here",
]  # fmt: skip

SOCKET_PATH = 107  # octets (unix(7))


def import_all(config: Config) -> None:
    """Import what `check_files` needs, before root is dropped: the relay's user may not be able to read the interpreter."""
    names = ["difflib", "encodings.idna", "encodings.punycode"]  # for suggestions, and for host names
    if _has_files(config):
        names += ["cryptography.x509", "relaymta.accept.endpoint", "relaymta.filter.keys", "scramp"]
    if _has_hooks(config):
        names += ["relaymta.accept.endpoint", "relaymta.filter.hookcheck"]
    for name in names:
        import_module(name)


def _has_files(config: Config) -> bool:
    return bool(config.certificate or config.accounts or config.dkim or config.relay.recipients or config.local.aliases)


def _has_hooks(config: Config) -> bool:
    return any(one.type == "python" for one in config.filter)


def check_files(config: Config) -> None:
    """ConfigError when certificates, keys, accounts, recipients, hooks or the route map cannot be read or used by the current
    user, or control.group does not exist."""
    problems = []
    if config.control.group:
        try:
            privileges.group(config.control.group)
        except ConfigError as error:
            problems += error.problems
    if _has_files(config) or _has_hooks(config):
        from relaymta.accept import endpoint  # imports cryptography and argon2

        try:
            endpoint.check(config)
        except ConfigError as error:
            accounts = config.accounts.file
            problems += [f"accounts.file: {one}" if one.startswith(f"{accounts}: ") else one for one in error.problems]
    if config.route_map:
        try:
            open(config.route_map, "rb").close()
        except FileNotFoundError:
            pass  # which is found where it is read
        except OSError as error:
            problems.append(f"route_map: {config.route_map}: {error.strerror or error}")
    if problems:
        raise ConfigError(config.located(problems))


def broken_lists(config: Config) -> list[str]:
    """Warnings about files that local.aliases includes, and that cannot be used by the current user: mail for these aliases
    waits. Nothing where it is wrong itself, which `check_files` says."""
    if not config.local.aliases:
        return []
    from relaymta.accept import aliases

    try:
        return aliases.read(config.local.aliases, config.alias_domains).troubles
    except ConfigError:
        return []


def unreadable_files(config: Config) -> list[str]:
    """Warnings about files of the configuration itself that the current user cannot read: the relay does at each reload, when it
    is not root any more."""
    return [
        f"{path}: {config.user or 'the relay'} cannot read it: a reload would be refused"
        for path in (*config.files, *(path.parent / CONF_D for path in config.files[:1]))
        if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0))
    ]


def unreadable_secrets(config: Config) -> list[str]:
    """Files with passwords and tokens (keys that end in `_file`) that cannot be read now. They are read when they are needed, and
    only what needs them fails, so that a start only warns. The same holds for files of routes' TLS."""
    from relaymta.send import trust

    found = []
    for number, route in enumerate(config.route):
        found += [(f"route.{number}.{key}", why) for key, why in trust.problems(route)]
    for key, path in given_values(config):
        if key.endswith("_file") and not key.endswith(".ca_file") and path:
            try:
                read_secret(path)
            except OSError as error:
                found.append((key, f"{path}: {error.strerror or error}"))
    return _placed(config, found)


def exposed_secrets(config: Config) -> list[str]:
    """Warnings about files with passwords and keys that every user of this machine can read or change."""
    found = []
    for key, path in _secrets(config):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            does = "change" if mode & stat.S_IWOTH else "read"
            found.append(
                (key, f"{path}: every user of this machine can {does} it (mode {stat.S_IMODE(mode):04o}): chmod o= {path}")
            )
    return _placed(config, found)


def changeable_files(config: Config) -> list[str]:
    """Warnings about files of the configuration itself, and the folder with more of them, that every user of this machine can
    change: root reads them, too."""
    found = []
    for path in (*config.files, *(path.parent / CONF_D for path in config.files[:1])):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH and not stat.S_ISCHR(mode):  # /dev/stdin
            found.append(f"{path}: every user of this machine can change it (mode {stat.S_IMODE(mode):04o}): chmod o-w {path}")
    return found


_PRIVATE = {"key": "chain", "client_key": "client_certificate"}  # keys, and where they are if they have no file of their own


def _secrets(config: Config) -> Iterator[tuple[str, str]]:
    """(dotted key, path) of files with passwords, tokens, hashes of passwords and private keys."""
    values = dict(given_values(config))
    for key, path in values.items():
        table, _, name = key.rpartition(".")
        if name in _PRIVATE:
            known = key if path else f"{table}.{_PRIVATE[name]}"
            if values.get(known):
                yield known, str(values[known])
        elif path and (key == "accounts.file" or (name.endswith("_file") and name != "ca_file")):
            yield key, str(path)


def _placed(config: Config, found: list[tuple[str, str]]) -> list[str]:
    """(key, what is wrong), each with its place, in the order of the files."""
    return [config.at(key, what) for key, what in sorted(found, key=lambda pair: config.order(pair[0]))]


def check_program(config: Config) -> None:
    """ConfigError when `user` cannot execute the interpreter or read our code: workers are started by exec, as that user."""
    for what, path, rights in (
        ("execute the interpreter", sys.executable, os.X_OK),
        ("read our code", relaymta.__file__, os.R_OK),
    ):
        if path and config.user and not os.access(path, rights):
            closed = next((folder for folder in _ways(Path(path)) if folder.is_dir() and not os.access(folder, os.X_OK)), None)
            why = f": {closed} is closed to it" if closed is not None else ""
            where = "install relaymta where every user can read it, such as /opt/relaymta, or open the way to it"
            raise ConfigError([config.at("user", f"{config.user} cannot {what} {path}{why}; {where}")])


def _ways(path: Path) -> Iterator[Path]:
    """The folders that lead to a file, from / on: by its own path, then by that of what it links to, where that can be read."""
    for one in (path, Path(os.path.realpath(path))):
        yield from reversed(one.absolute().parents)


def missing_variables(config: Config) -> list[str]:
    """Passwords that are expected in environment variables and not there."""
    return [
        config.at(f"route.{number}.password_env", f"{route.password_env} is not set in this environment")
        for number, route in enumerate(config.route)
        if route.password_env and not route.password_file and not os.environ.get(route.password_env)
    ]


def absent_places(config: Config) -> list[str]:
    """Warnings about what mail is sent from or to, and is not there now: addresses of sources, and unix sockets of routes."""
    found = [
        (f"source.{number}.address", f"{source.address} is not an address of this machine: it is used once it is")
        for number, source in enumerate(config.source)
        if not is_local(source.address)
    ]
    for number, route in enumerate(config.route):
        for path in (Path(host.removeprefix("unix:")) for host in route.hosts if host.startswith("unix:")):
            try:
                path.stat()
            except OSError as error:
                found.append((f"route.{number}.hosts", f"{path}: {error.strerror or error}"))
    return _placed(config, found)


def ephemeral_spool(config: Config) -> list[str]:
    """Why the mail in the spool would not outlive this container, where it is on a file system of layers, unless `ephemeral`
    allows that: then it must not be used."""
    mount = None if config.ephemeral else mount_of(Path(config.spool))
    if mount is None or mount.kind not in IN_LAYERS:
        return []
    what = f"{config.spool} is on an overlay file system ({mount.kind}), which ends with its container, and the mail in it, too"
    return [config.at("spool", f"{what}: mount a volume there; if mail may be lost, start with --ephemeral (ephemeral = true)")]


def fleeting_spool(config: Config) -> list[str]:
    """A warning when the mail in the spool outlives the relay, but not this machine's restart, or is not the next container's."""
    mount = None if config.ephemeral else mount_of(Path(config.spool))
    if mount is None:
        return []
    if mount.kind in IN_MEMORY:
        what = f"is in memory ({mount.kind}): the mail in it is lost when this machine, or the container, restarts"
        return [config.at("spool", f"{config.spool} {what}")]
    if mount.unnamed:
        what = "is on a volume of this container or pod alone, which the next one will not have"
        return [config.at("spool", f"{config.spool} {what}: mount one that has a name, or a claim")]
    return []


def made_by_root(config: Config) -> set[str]:
    """The keys whose folder only root can change: root makes what is in it for `user`. Called as root."""
    if os.geteuid() != 0 or not config.user:
        return set()
    user = privileges.account(config.user)
    folders = {
        "spool": Path(config.spool),
        "log.file": Path(config.log.file).parent,
        "control.socket": config.control_path.parent,
    }
    if (path := config.admin_path) is not None:
        folders["admin.socket"] = path.parent
    if (path := config.local_path) is not None:
        folders["local.socket"] = path.parent
    return {key for key, folder in folders.items() if privileges.roots_alone(folder, user)}


def unusable_places(config: Config, made_by_root: set[str]) -> list[str]:
    """Folders, files and addresses that a start with this configuration would refuse, as the current user."""
    checks: list[tuple[str, Callable[[bool], str]]] = [
        ("spool", lambda by_root: _folder(Path(config.spool), by_root)),
        ("log.file", lambda by_root: _log_file(Path(config.log.file), by_root)),
        ("control.socket", lambda by_root: _socket(config.control_path, by_root or not config.control.socket)),
    ]
    if (path := config.admin_path) is not None:
        beside = not config.admin.socket and not config.control.socket
        checks.append(("admin.socket", lambda by_root: _socket(path, by_root or beside)))
    if (local := config.local_path) is not None:
        beside_control = not config.local.socket and not config.control.socket
        checks.append(("local.socket", lambda by_root: _socket(local, by_root or beside_control)))
    found = []
    for key, check in checks:
        try:
            found.append((key, check(key in made_by_root)))
        except PermissionError as error:  # a folder on the way
            found.append((key, f"{error.filename}: {error.strerror}"))
    found += [(key, why_not_here(address)) for key, address in addresses(config)]
    return [config.at(key, why) for key, why in found if why]


def _folder(path: Path, by_root: bool) -> str:
    """Why a folder cannot be used or made, "" if it can. `by_root`: root makes it and gives it away."""
    parents = path.absolute().parents
    there = next(one for one in (path, *parents) if os.path.lexists(one))
    if there.is_symlink() and not there.exists():  # to what is not mounted, for example
        return f"{there} is a link to {os.readlink(there)}, which is not there"
    existing = next(folder for folder in (*(() if by_root else (path,)), *parents) if folder.exists())
    for wrong in (path, existing):
        if wrong.exists() and not wrong.is_dir():
            return f"{wrong} is not a directory"
    if not os.access(existing, os.X_OK):
        return f"{existing}: Permission denied"
    return "" if by_root or os.access(existing, os.W_OK) else f"{existing} is not writable"


def _log_file(path: Path, by_root: bool) -> str:
    if str(path) == "-":
        return ""
    if path.is_dir():
        return f"{path} is a directory"
    if by_root:
        return _folder(path.parent, by_root)
    if path.exists():
        return "" if os.access(path, os.W_OK) else f"{path} is not writable"
    return _folder(path.parent, by_root) if path.parent.exists() else f"{path.parent}: No such file or directory"


def _socket(path: Path, folder_is_made: bool) -> str:
    if len(os.fsencode(path)) > SOCKET_PATH:
        return f"{path}: longer than {SOCKET_PATH} octets"
    if folder_is_made and not os.access(path.parent, os.X_OK):
        return ""
    if os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode):
        return f"{path} exists and is not a socket"
    if folder_is_made:
        return ""
    return _folder(path.parent, False) if path.parent.exists() else f"{path.parent}: No such file or directory"


def addresses(config: Config) -> list[tuple[str, str]]:
    """(dotted key, host:port) of all that the relay listens on."""
    found = [(f"listener.{number}.address", listener.address) for number, listener in enumerate(config.listener)]
    more = (("metrics.listen", config.metrics.listen), ("admin.listen", config.admin.listen))
    return [*found, *((key, address) for key, address in more if address != "off")]


def busy_ports(config: Config, ours: set[str]) -> list[str]:
    """Warnings about ports on which another program listens now, as far as the caller may try them. `ours`: addresses that a
    relay of this configuration has. It is no error: the other program may be stopped before the start, as when this relay
    replaces another MTA."""
    found = []
    for key, address in addresses(config):
        if address not in ours and in_use(address):
            found.append(config.at(key, f"{address}: another program listens on this port now: a start would fail"))
    return found


def closed_socket(config: Config) -> list[str]:
    """A warning when members of control.group cannot get to the control socket; its folder is looked at where it exists."""
    if not config.control.group:
        return []
    gid, path = privileges.group(config.control.group), config.control_path
    for folder in reversed(path.absolute().parents):
        try:
            found = folder.stat()
        except OSError:
            break
        if not found.st_mode & (stat.S_IXGRP if found.st_gid == gid else stat.S_IXOTH):
            what = f"its members cannot get to {path}: {folder} is closed to them (mode {stat.S_IMODE(found.st_mode):04o})"
            return [config.at("control.group", f"{what}; set control.socket, such as /run/relaymta/control.sock")]
    return []


def why_not_here(address: str) -> str:
    """Why this machine does not have an address, "" if it has. Which program listens on the port is not looked at: it may be the
    relay itself."""
    host, _ = parse_hostport(address)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.bind((host, 0))
    except OSError as error:
        return f"{address}: {reason(error)}"
    return ""
