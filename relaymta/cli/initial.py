"""The files that `relaymta init` writes: a configuration, the password of the smart host, a DKIM key. All are there, or none."""

import contextlib
import os
import pwd
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from relaymta.cli.answers import USER, Answers
from relaymta.toml import written

__all__ = ["Exists", "NewFile", "Places", "configuration", "write"]

HEAD = """\
# Written by `relaymta init`. `relaymta config describe` shows every key with its meaning and default.
# After a change: `relaymta config check`, then `relaymta reload`.
"""
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Places(NamedTuple):
    """Where the files are, as absolute paths. `password`, `key`: "" where there is none."""

    config: Path
    password: str
    key: str


class Entry(NamedTuple):
    """A key of the configuration, and a comment of a line ("": none). `shown`: it is an example, which is a comment, too."""

    key: str
    value: Any
    comment: str = ""
    shown: bool = False


Tables = list[tuple[str, list[Entry]]]  # each with its head, "" for the keys before the first one


def configuration(found: Answers, places: Places, settings: dict[str, Any]) -> str:
    """The text of the configuration. `settings`: further keys, dotted. ValueError, a sentence, for one that cannot be set in this
    way, or is not Unicode."""
    tables = list(_tables(found, places))
    for key, value in settings.items():
        _lay_in(tables, key, value)
    return "\n".join([HEAD, *(_text(head, entries) for head, entries in tables)])


def _tables(found: Answers, places: Places) -> Iterator[tuple[str, list[Entry]]]:
    from relaymta.proto.address import domain_of_host, in_a_labels

    yield "", list(_of_host(found))
    for number, address in enumerate(found.listen):
        comment = "where applications and other servers hand in their mail" if not number else ""
        yield "[[listener]]", [Entry("address", address, comment)]
    if found.smarthosts:
        yield "[[route]]", list(_of_route(found, places))
    if found.dkim:
        yield "[[dkim]]", list(_of_key(found, places))
    networks = list(dict.fromkeys(["127.0.0.0/8", "::1/128", *found.networks]))
    yield "[relay]", [Entry("networks", networks, "clients that may send to any domain")]
    if domain_of_host(found.hostname) != in_a_labels(found.domain):
        comment = "for addresses without a domain, such as those of cron's mail"
        yield "[intake]", [Entry("complete_domain", found.domain, comment)]


def _of_host(found: Answers) -> Iterator[Entry]:
    yield Entry("hostname", found.hostname, "our name in EHLO and Received:")
    if found.user:
        yield Entry("user", found.user, "who the relay becomes when root has started it")
    elif os.geteuid() == 0:
        made = f"useradd --system --shell /usr/sbin/nologin {USER}"
        yield Entry("user", USER, f"who the relay becomes when root has started it ({made})", shown=True)
    yield Entry("spool", found.spool, "the queue")


def _of_route(found: Answers, places: Places) -> Iterator[Entry]:
    yield Entry("name", "smarthost", "its name in the log and on the command line")
    yield Entry("hosts", found.smarthosts, "all mail goes there; further ones are used when the first cannot be reached")
    tls = {
        "verify": "with a valid certificate only",
        "encrypt": "with any certificate",
        "may": "if it is offered",
        "off": "never",
    }
    yield Entry("tls", found.tls, f"TLS: {tls[found.tls]}")
    if found.ca_file:
        yield Entry("ca_file", found.ca_file, "the CA of that certificate")
    if found.username:
        yield Entry("username", found.username, "the login there")
        yield Entry("password_file", places.password)


def _of_key(found: Answers, places: Places) -> Iterator[Entry]:
    yield Entry("domain", found.domain, "mail with a From: of this domain is signed")
    yield Entry("selector", found.selector, "the public key is in the DNS, at SELECTOR._domainkey.DOMAIN")
    yield Entry("key", places.key)


def _text(head: str, entries: list[Entry]) -> str:
    lines = [head] if head else []
    for entry in entries:
        lines += [f"# {entry.comment}"] if entry.comment else []
        lines.append(f"{'#' if entry.shown else ''}{entry.key} = {written(entry.value)}")
    return "\n".join(lines) + "\n"


def _lay_in(tables: Tables, key: str, value: Any) -> None:
    """Add a dotted key, in place of the same one."""
    table, _, name = key.rpartition(".")
    if key.partition(".")[0] in ("listener", "route", "dkim"):
        raise ValueError(f"--set {key}: change it in the file that is written")
    if any(other == f"[{key}]" for other, _ in tables):
        raise ValueError(f"--set {key}: this table is in the file already: set each key by itself, as --set {key}.KEY=VALUE")
    values = (".".join(filter(None, (other.strip("[]"), entry.key))) for other, entries in tables for entry in entries)
    if above := next((one for one in values if key.startswith(f"{one}.")), ""):
        raise ValueError(f"--set {key}: {above} has a value already")
    head = f"[{table}]" if table else ""
    entries = next((entries for other, entries in tables if other == head), None)
    if entries is None:
        tables.append((head, entries := []))
    at = next((number for number, entry in enumerate(entries) if entry.key == name), len(entries))
    entries[at:] = [Entry(name, value, entries[at].comment if at < len(entries) else ""), *entries[at + 1 :]]


# Writing


class NewFile(NamedTuple):
    """A file to write. `group`: it is root's, and the group of the relay's user may read it; else it is that user's alone.
    `never_replaces`: also with `force` it is not put in the place of another one."""

    path: Path
    content: bytes
    group: bool = False
    never_replaces: bool = False

    @property
    def mode(self) -> int:
        """Its permissions."""
        return 0o640 if self.group else 0o600


class Exists(OSError):
    """A file is there already; `filename`: which."""


def write(files: list[NewFile], user: str, force: bool) -> None:
    """Write all files and the folders that they need, or, with an exception, none: Exists without `force` where one is there;
    OSError. `user`: whom root gives them to, "" for root. A signal that would end the program does so behind that."""
    with _undisturbed():
        _write(files, pwd.getpwnam(user) if user and os.geteuid() == 0 else None, force)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What a signal would do meanwhile is done at the end. (Blocked, another thread would get it.)"""
    came: list[int] = []
    before = {number: signal.signal(number, lambda one, frame: came.append(one)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in came[:1]:
            signal.raise_signal(one)


def _write(files: list[NewFile], owner: pwd.struct_passwd | None, force: bool) -> None:
    made: list[Path] = []  # folders
    fresh: list[tuple[Path, Path, bool]] = []  # (temporary file, its place, whether another one there is replaced)
    try:
        for file in files:
            place = file.path.resolve()
            _make_folders(place.parent, made, owner)
            fresh.append((_fresh(place, file, owner), place, force and not file.never_replaces))
        _put(fresh)
    except BaseException:
        for path, _, _ in fresh:
            path.unlink(missing_ok=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _make_folders(folder: Path, made: list[Path], owner: pwd.struct_passwd | None) -> None:
    """Make a folder and those above it: for everybody to enter, as /etc is, or, for others than root, for their owner alone."""
    if folder.is_dir():
        return
    _make_folders(folder.parent, made, owner)
    folder.mkdir()
    made.append(folder)
    folder.chmod(0o755 if os.geteuid() == 0 else 0o700)
    if owner is not None and folder.name == "dkim":
        os.chown(folder, 0, owner.pw_gid)
        folder.chmod(0o750)


def _fresh(place: Path, file: NewFile, owner: pwd.struct_passwd | None) -> Path:
    """A temporary file beside its place, safe on disk."""
    descriptor, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    try:
        with open(descriptor, "wb") as opened:
            if owner is not None:
                os.fchown(descriptor, 0 if file.group else owner.pw_uid, owner.pw_gid)
            os.fchmod(descriptor, file.mode)
            opened.write(file.content)
            opened.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _put(fresh: list[tuple[Path, Path, bool]]) -> None:
    """Move all files to their places. What fails half-way is undone, but for files that were replaced."""
    new: list[Path] = []
    try:
        for path, place, replaces in fresh:
            try:
                os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # who comes later sees it
                new.append(place)
            except FileExistsError:
                if not replaces:
                    raise Exists(0, "it exists already", str(place)) from None
            path.replace(place)
        for folder in {place.parent for _, place, _ in fresh}:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(descriptor)
            os.close(descriptor)
    except BaseException:
        for place in new:
            place.unlink(missing_ok=True)
        raise
