"""What a start needs beside the configuration itself: files, folders, addresses. A start and a reload refuse what `check_files`
finds; `relaymta config check` reports all that is here, before a start finds it."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from relaymta import privileges
from relaymta.config import Config, given_values, parse_hostport
from relaymta.errors import ConfigError
from relaymta.files import read_secret
from relaymta.sockets import reason

__all__ = ["check_files", "import_all", "made_by_root", "missing_variables", "unreadable_secrets", "unusable_places"]

SOCKET_PATH = 107  # octets (unix(7))


def import_all(config: Config) -> None:
    """Import what `check_files` needs, before root is dropped: the relay's user may not be able to read the interpreter."""
    import encodings.idna  # for host names
    import encodings.punycode  # noqa: F401

    if _has_files(config):
        from relaymta.accept import endpoint  # noqa: F401


def _has_files(config: Config) -> bool:
    return bool(config.certificate or config.accounts or config.dkim or config.relay.recipients)


def check_files(config: Config) -> None:
    """ConfigError when certificates, keys, accounts or recipients cannot be read or used by the current user."""
    if _has_files(config):
        from relaymta.accept import endpoint  # imports cryptography and argon2

        try:
            endpoint.check(config)
        except ConfigError as error:
            accounts = config.accounts.file
            problems = [f"accounts.file: {one}" if one.startswith(f"{accounts}: ") else one for one in error.problems]
            raise ConfigError(config.located(problems)) from None


def unreadable_secrets(config: Config) -> list[str]:
    """Files with passwords and tokens (keys that end in `_file`) that cannot be read now. They are read when they are needed, and
    only what needs them fails, so that a start only warns."""
    found = []
    for key, path in given_values(config):
        if key.endswith("_file") and path:
            try:
                read_secret(path)
            except OSError as error:
                found.append((key, f"{path}: {error.strerror or error}"))
    return _placed(config, found)


def _placed(config: Config, found: list[tuple[str, str]]) -> list[str]:
    """(key, what is wrong), each with its place, in the order of the file."""
    return [config.at(key, what) for key, what in sorted(found, key=lambda pair: config.line(pair[0]))]


def missing_variables(config: Config) -> list[str]:
    """Passwords that are expected in environment variables and not there."""
    return [
        config.at(f"route.{number}.password_env", f"{route.password_env} is not set in this environment")
        for number, route in enumerate(config.route)
        if route.password_env and not route.password_file and not os.environ.get(route.password_env)
    ]


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
    return {key for key, folder in folders.items() if privileges.roots_alone(folder, user)}


def unusable_places(config: Config, made_by_root: set[str]) -> list[str]:
    """Folders, files and addresses that a start with this configuration would refuse, as the current user."""
    checks: list[tuple[str, Callable[[bool], str]]] = [
        ("spool", lambda by_root: _folder(Path(config.spool), by_root)),
        ("log.file", lambda by_root: _log_file(Path(config.log.file), by_root)),
        ("control.socket", lambda by_root: _socket(config.control_path, by_root or not config.control.socket)),
    ]
    found = []
    for key, check in checks:
        try:
            found.append((key, check(key in made_by_root)))
        except PermissionError as error:  # a folder on the way
            found.append((key, f"{error.filename}: {error.strerror}"))
    addresses = [(f"listener.{number}.address", listener.address) for number, listener in enumerate(config.listener)]
    if config.metrics.listen != "off":
        addresses.append(("metrics.listen", config.metrics.listen))
    found += [(key, _address(address)) for key, address in addresses]
    return [config.at(key, why) for key, why in found if why]


def _folder(path: Path, by_root: bool) -> str:
    """Why a folder cannot be used or made, "" if it can. `by_root`: root makes it and gives it away."""
    parents = path.absolute().parents
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


def _address(address: str) -> str:
    """Why this machine does not have an address, "" if it has. Which program listens on the port is not looked at: it may be the
    relay itself."""
    host, _ = parse_hostport(address)
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.bind((host, 0))
    except OSError as error:
        return f"{address}: {reason(error)}"
    return ""
