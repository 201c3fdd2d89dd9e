"""`relaymta user` and `relaymta app`: the file of accounts. The running daemon reads it again within seconds."""

import json
import os
import pwd
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from relaymta.cli.peer import as_json, asked, connect, table
from relaymta.cli.serve import configured, fail, loaded
from relaymta.config import Account, Config, Secret, load_accounts, near, parse_duration
from relaymta.errors import ConfigError

__all__ = ["DEMO", "app", "give_to", "replace_file", "user"]

DEMO = {"listener": [{"address": "127.0.0.1:2525"}]}
KEY_OCTETS = 20  # of an application's key: nobody guesses 160 bits, however fast a guess is
_HEAD = re.compile(r"\[\[?\s*account\s*\]\]?\s*(#.*)?$")
_SECRETS = re.compile(r"secrets\s*=\s*\[.*\]\s*(#.*)?$")


class _File:
    """The file of accounts, edited by the line, so that everything else in it stays as it is."""

    def __init__(self, read: Callable[..., Config]) -> None:
        config = loaded(read, DEMO)
        path, self._user = config.accounts.file, config.user
        if not path:
            fail(78, "accounts.file is not set: it says where accounts are kept")
        self.path = Path(path)
        self.accounts: list[Account] = []
        self.lines: list[str] = []
        if self.path.exists():
            try:
                self.accounts = load_accounts(self.path)
                self.lines = self.path.read_text(encoding="utf-8").splitlines()
            except ConfigError as error:
                fail(78, str(error))

    def get(self, name: str) -> Account:
        """The account of this name, or the end of the program."""
        found = next((account for account in self.accounts if account.name == name), None)
        if found is None:
            fail(1, f"no account is called {name!r}{near(name, [account.name for account in self.accounts])}")
        return found

    def add(self, name: str, secret: str, **keys: Any) -> None:
        """A new account at the end."""
        if any(account.name == name for account in self.accounts):
            fail(1, f"there is an account called {name!r} already")
        self.lines += ["", "[[account]]"] if self.lines else ["[[account]]"]
        self.lines += [f"name = {_toml(name)}", f"secrets = [{_secret(secret, None)}]"]
        self.lines += [f"{key} = {_toml(value)}" for key, value in keys.items() if value]
        self.write()

    def remove(self, name: str) -> None:
        """Without this account."""
        start, end = self._block(name)
        del self.lines[start:end]
        self.write()

    def set_secrets(self, name: str, kept: list[tuple[str, datetime | None]]) -> None:
        """What opens an account from now on."""
        start, end = self._block(name)
        line = f"secrets = [{', '.join(_secret(*one) for one in kept)}]"
        place = next((n for n in range(start, end) if _SECRETS.match(self.lines[n])), None)
        if place is None and any(self.lines[n].lstrip().startswith("secrets") for n in range(start, end)):
            fail(1, f"{self.path}: the secrets of {name!r} are not on one line: edit them by hand")
        if place is None:
            self.lines.insert(start + 1, line)
        else:
            self.lines[place] = line
        self.write()

    def _block(self, name: str) -> tuple[int, int]:
        """The lines of an account: from its [[account]] to the next table."""
        number = next(n for n, account in enumerate(self.accounts) if account.name == name)
        heads = [n for n, line in enumerate(self.lines) if _HEAD.match(line.strip())]
        start = heads[number]
        following = (n for n in range(start + 1, len(self.lines)) if self.lines[n].startswith("["))
        return start, next(following, len(self.lines))

    def write(self) -> None:
        """Put the lines into the file."""
        replace_file(self.path, "\n".join(self.lines).strip("\n") + "\n", self._user, load_accounts)


def replace_file(path: Path, text: str, user: str = "", check: Callable[[Path], object] = lambda path: None) -> None:
    """Replace a file at once, readable as before; a new one by its owner alone, `user` where root makes it. `check` looks at it
    before it is put there; ConfigError, as OSError, ends the program."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        before = path.stat() if path.exists() else None
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
            _hand_over(descriptor, before, user)
        check(fresh)
        fresh.replace(path)
    except (OSError, ConfigError) as error:
        fresh.unlink(missing_ok=True)
        fail(74, f"{path}: {getattr(error, 'strerror', None) or error}")


def _hand_over(descriptor: int, before: os.stat_result | None, user: str) -> None:
    """Who may read a file: as before, or whom the relay runs as."""
    if before is not None:
        os.fchmod(descriptor, before.st_mode & 0o777)
    if os.geteuid() == 0 and before is not None:
        os.fchown(descriptor, before.st_uid, before.st_gid)
    elif os.geteuid() == 0 and user:
        give_to(descriptor, user)


def give_to(descriptor: int, user: str) -> None:
    """Root gives a file to whom the relay runs as."""
    if user and os.geteuid() == 0:
        try:
            os.fchown(descriptor, pwd.getpwnam(user).pw_uid, -1)
        except KeyError:
            fail(78, f"user: there is no user {user!r}")


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings and lists of strings are written alike


def _secret(kept: str, expires: datetime | None) -> str:
    until = f", expires = {expires.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}" if expires is not None else ""
    return f"{{ hash = {_toml(kept)}{until} }}"


def _alive(account: Account) -> list[tuple[str, datetime | None]]:
    now = datetime.now(UTC)
    return [(secret.hash, secret.expires) for secret in account.secrets if secret.expires is None or secret.expires > now]


def _key() -> str:
    """A new key for an application: 32 characters."""
    import base64

    return base64.b32encode(secrets.token_bytes(KEY_OCTETS)).decode().lower()


def _senders(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--sender", "senders", multiple=True, metavar="ADDRESS",
        help="An address it may send as, or @domain, or @.domain for those below; repeatable. None: any.",
    )(function)  # fmt: skip


def _listing(read: Callable[..., Config], as_json: bool) -> None:
    accounts = _File(read).accounts
    if as_json:
        click.echo(json.dumps([_row(account) for account in accounts]))
        return
    shown = [
        [a.name, a.application, ", ".join(_told(secret) for secret in a.secrets) or "nothing", ", ".join(a.senders) or "any"]
        for a in accounts
    ]
    table("", ["name", "application", "opened by", "sends as"], shown)


def _row(account: Account) -> dict[str, Any]:
    secrets = [{"kind": _kind(s), "expires": s.expires.isoformat() if s.expires else ""} for s in account.secrets]
    return {"name": account.name, "application": account.application, "secrets": secrets, "senders": account.senders}


def _kind(secret: Secret) -> str:
    return secret.hash.lstrip("$").partition("$")[0]


def _told(secret: Secret) -> str:
    return _kind(secret) + (f" until {secret.expires:%Y-%m-%d %H:%M:%S%z}" if secret.expires else "")


def _asked_for() -> str:
    """A password: typed twice, or the first line of an input that is no terminal."""
    if sys.stdin.isatty():
        typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
        return typed
    return sys.stdin.readline().rstrip("\r\n") or fail(64, "no password: give it as the first line of the input")


def _with_password(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verb that sets a password."""
    kept = click.option(
        "--scram", "with_scram", is_flag=True, help="Keep it so that SCRAM-SHA-256 works, instead of as argon2id."
    )
    text = "Without it it is asked for, or, where the input is no terminal, its first line (others see what stands here)."
    return click.option("--password", default=_asked_for, help=text)(kept(function))


@click.group()
def user() -> None:
    """People who log in to send mail."""


@user.command(name="add")
@click.argument("name")
@_with_password
@_senders
@configured
def add_user(read: Callable[..., Config], name: str, password: str, with_scram: bool, senders: tuple[str, ...]) -> None:
    """Let somebody log in."""
    file = _File(read)
    file.add(name, _kept(password, with_scram), senders=list(senders))
    click.echo(f"{name} may log in")
    _note_scram(file, with_scram)


def _note_scram(file: _File, with_scram: bool) -> None:
    """Say that SCRAM is not offered any more, where it was."""
    if not with_scram and any(_kind(secret) == "SCRAM-SHA-256" for account in file.accounts for secret in account.secrets):
        click.echo("note: SCRAM-SHA-256 is offered only while all passwords are kept for it; this one is not (--scram)", err=True)


def _kept(password: str, with_scram: bool) -> str:
    from relaymta.accept.passwords import PEOPLE_ITERATIONS, argon2id, scram

    return scram(password, PEOPLE_ITERATIONS) if with_scram else argon2id(password)


@user.command()
@click.argument("name")
@_with_password
@configured
def password(read: Callable[..., Config], name: str, password: str, with_scram: bool) -> None:
    """Give somebody another password; the old one ends."""
    file = _File(read)
    file.get(name)
    file.set_secrets(name, [(_kept(password, with_scram), None)])
    click.echo(f"{name} has a new password")
    _note_scram(file, with_scram)


@user.command(name="remove")
@click.argument("name")
@configured
def remove_user(read: Callable[..., Config], name: str) -> None:
    """Let somebody log in no longer."""
    file = _File(read)
    file.get(name)
    file.remove(name)
    click.echo(f"{name} is removed")


@user.command(name="list")
@as_json
@configured
def list_users(read: Callable[..., Config], as_json: bool) -> None:
    """All accounts."""
    _listing(read, as_json)


@click.group()
def app() -> None:
    """Applications that log in with a key to send mail."""


@app.command()
@click.argument("name")
@_senders
@configured
def create(read: Callable[..., Config], name: str, senders: tuple[str, ...]) -> None:
    """Make an application and its key, which is shown once."""
    from relaymta.accept.passwords import scram

    file, key = _File(read), _key()
    file.add(name, scram(key), application=name, senders=list(senders))
    click.echo(f"user:   {name}\nsecret: {key}")
    domains = sorted({sender.rpartition("@")[2].lstrip(".") for sender in senders})
    for line in _records(loaded(read, DEMO), domains):
        click.echo(f"DNS:    {line}")


def _records(config: Config, domains: list[str]) -> Iterator[str]:
    """What the DNS should say of domains whose mail leaves from here."""
    from relaymta.filter.keys import load_key, record, zone_line

    for domain in domains:
        yield f'{domain}. TXT "v=spf1 a:{config.hostname} -all"  (or add a:{config.hostname} to the record that is there)'
        keys = [one for one in config.dkim if one.domain == domain.lower().rstrip(".")]
        for one in keys:
            try:
                yield zone_line(f"{one.selector}._domainkey.{domain}", record(load_key(one)))
            except ConfigError as error:
                yield f"... and a key that cannot be read: {error}"
        if not keys:
            yield f"... and a key that signs: relaymta dkim keygen {domain} --selector s1 --out FILE"


@app.command()
@click.argument("name")
@click.option("--overlap", default="24h", metavar="DURATION", help="For so long the keys it has go on working.")
@configured
def rotate(read: Callable[..., Config], name: str, overlap: str) -> None:
    """Give an application another key, which is shown once; those it has end after --overlap."""
    from relaymta.accept.passwords import scram

    try:
        until = datetime.now(UTC) + timedelta(seconds=parse_duration(overlap))
    except ValueError as error:
        fail(64, f"--overlap {overlap}: expected {error}")
    file, key = _File(read), _key()
    before = [(kept, min(expires or until, until)) for kept, expires in _alive(file.get(name))]
    file.set_secrets(name, [(scram(key), None), *before])
    click.echo(f"user:   {name}\nsecret: {key}")
    if before:
        click.echo(f"the key before this one works until {until.strftime('%Y-%m-%d %H:%M:%SZ')}")


@app.command()
@click.argument("name")
@configured
def expire(read: Callable[..., Config], name: str) -> None:
    """Let no key of an application work any longer."""
    file = _File(read)
    file.get(name)
    file.set_secrets(name, [])
    click.echo(f"{name} cannot log in until it gets a key (`relaymta app rotate {name}`)")


@app.command()
@as_json
@configured
def usage(read: Callable[..., Config], as_json: bool) -> None:
    """How much of their quotas accounts have used. A quota comes back little by little."""
    rows = asked(connect(read), "usage")
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo("no account has a quota")
        return
    table("", ["name", "what", "quota", "used"], [[r["name"], r["what"], r["quota"], str(r["used"])] for r in rows])


@app.command(name="list")
@as_json
@configured
def list_apps(read: Callable[..., Config], as_json: bool) -> None:
    """All accounts."""
    _listing(read, as_json)
