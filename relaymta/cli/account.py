"""`relaymta user` and `relaymta app`: edit the file of accounts, which the running daemon reads again within seconds."""

import contextlib
import itertools
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import say, say_json, table
from relaymta.cli.editing import locked, replace_file
from relaymta.cli.options import ANY_LISTENER, Configuration, absolute, configured, fail, group, loaded, readable
from relaymta.cli.peer import as_json, asked, connect, seconds_of, when
from relaymta.errors import ConfigError, NoSuch
from relaymta.files import read_text
from relaymta.toml import written

if TYPE_CHECKING:  # `app usage` starts without it
    from relaymta.config import Account, Config, Secret

__all__ = ["app", "user"]

KEY_OCTETS = 20  # of an application's key: 160 bits resist brute force, whatever the hash
_NAME = r"""\s*(?:account|"account"|'account')\s*"""
_KEY_OF_SECRETS = r"""\s*(?:secrets|"secrets"|'secrets')\s*"""
_HEAD = re.compile(rf"\s*\[\[{_NAME}\]\]")
_TABLE = re.compile(r"\s*\[")
_BELOW = re.compile(rf"\s*\[\[?{_NAME}\.")
_SECRETS = re.compile(rf"{_KEY_OF_SECRETS}=")
_SECRETS_TABLE = re.compile(rf"\s*\[\[{_NAME}\.{_KEY_OF_SECRETS}\]\]")
# Strings of four kinds, and comments: brackets and line ends in them have no meaning.
_STRING = re.compile(r'''"""(?:[^\\]|\\.)*?"{3,5}|"(?:[^"\\\n]|\\.)*"|#[^\n]*|''' + r"""'''.*?'{3,5}|'[^'\n]*'""", re.DOTALL)
_STRUCTURE = re.compile(r"[\[\]{}\n]")


class _File:
    """The file of accounts, edited line by line, so that comments and layout are kept. The new text is parsed before it replaces
    the file, so that no other accounts can change."""

    def __init__(self, read: Configuration) -> None:
        from relaymta.config import load_accounts

        config = loaded(read, ANY_LISTENER)
        path, self.user = config.accounts.file, config.user
        if not path:
            fail(78, "accounts.file is not set: it is the file with the accounts")
        self.path = Path(absolute(path))
        self.accounts: list[Account] = []
        self.lines: list[str] = []
        if readable(self.path):
            try:
                self.accounts = load_accounts(self.path)
                self.lines = read_text(self.path).split("\n")
            except ConfigError as error:
                fail(78, str(error))

    def get(self, name: str, kind: str) -> "Account":
        """The account with this name; ends the program (1) if there is no such `kind` of account."""
        found = next((account for account in self.accounts if account.name == name), None)
        if found is None:
            fail(1, str(NoSuch(kind, name, [account.name for account in self.accounts])))
        if kind == "application" and not found.application and not any(map(_is_key, found.secrets)):
            fail(1, f"{name} is a user: see `relaymta user --help`")
        return found

    def add(self, account: "Account") -> None:
        """Append a new account."""
        if any(other.name == account.name for other in self.accounts):
            fail(1, f"there is an account {account.name!r} already")
        while self.lines and not self.lines[-1].strip():
            self.lines.pop()
        self.lines += ["", "[[account]]"] if self.lines else ["[[account]]"]
        self.lines += [f"name = {written(account.name)}", _secrets(account)]
        self.lines += [f"{key} = {written(value)}" for key in ("application", "senders") if (value := getattr(account, key))]
        self.write([*self.accounts, account])

    def remove(self, name: str) -> None:
        """Remove an account."""
        start, end = self._block(name)
        del self.lines[start:end]
        self.write([account for account in self.accounts if account.name != name])

    def set_secrets(self, name: str, kept: "list[Secret]") -> None:
        """Replace the secrets of an account."""
        start, end = self._block(name)
        account = next(one for one in self.accounts if one.name == name).model_copy(update={"secrets": kept})
        for first, behind in reversed(self._secret_lines(start, end)):
            del self.lines[first:behind]
        self.lines.insert(start + 1, _secrets(account))
        self.write([account if other.name == name else other for other in self.accounts])

    def _block(self, name: str) -> tuple[int, int]:
        """The lines (start, end) of an account: from its [[account]] to the next table that is not below it."""
        number = next(n for n, account in enumerate(self.accounts) if account.name == name)
        tops = _tops(self.lines)
        heads = [n for n in tops if _HEAD.match(self.lines[n])]
        if len(heads) != len(self.accounts):
            fail(1, f"{self.path}: not every account has an [[account]] of its own: edit it by hand")
        start = heads[number]
        end = next((n for n in tops if n > start and _TABLE.match(self.lines[n]) and not _BELOW.match(self.lines[n])), None)
        return start, self._without_comments(start, len(self.lines) if end is None else end, tops)

    def _secret_lines(self, start: int, end: int) -> list[tuple[int, int]]:
        """The lines (start, end) of an account's secrets: a key, whose value may have several lines, or tables."""
        tops = [*(n for n in _tops(self.lines) if start < n < end), end]
        found = [(n, behind) for n, behind in itertools.pairwise(tops) if _SECRETS.match(self.lines[n])]
        tables = [*(n for n in tops[:-1] if _TABLE.match(self.lines[n])), end]
        below = [(n, behind) for n, behind in itertools.pairwise(tables) if _SECRETS_TABLE.match(self.lines[n])]
        return found[:1] if not below else [(n, self._without_comments(n, behind, tops)) for n, behind in below]

    def _without_comments(self, start: int, end: int, tops: list[int]) -> int:
        """The end of a table, without the blank lines and comments after it, which belong to the next one."""
        whole = set(tops)
        while end - 1 > start and end - 1 in whole and self.lines[end - 1].lstrip()[:1] in ("", "#"):
            end -= 1
        return end

    def write(self, meant: "list[Account]") -> None:
        """Write the lines to the file, if they mean exactly these accounts."""
        from relaymta.config import load_accounts

        def check(fresh: Path) -> None:
            if load_accounts(fresh) != meant:
                raise ConfigError(["the edited file would have other accounts than intended: edit it by hand"])

        replace_file(self.path, "\n".join(self.lines).strip("\n") + "\n", self.user, check)


@contextlib.contextmanager
def _edited(read: Configuration, new: bool = False) -> Iterator[_File]:
    """The file of accounts, locked against other editors. `new`: it is created if it is missing."""
    file = _File(read)
    with locked(file.path, file.user) if new or file.path.exists() else contextlib.nullcontext():
        yield _File(read)


def _tops(lines: list[str]) -> list[int]:
    """The numbers of a TOML file's lines that do not begin within a value."""
    text = "\n".join(lines)
    inside = [(found.start(), found.end()) for found in _STRING.finditer(text)]
    depth, at, number, found = 0, 0, 0, [0]
    for start, end in [*inside, (len(text), len(text))]:
        for char in _STRUCTURE.findall(text[at:start]):
            if char == "\n":
                number += 1
                if not depth:
                    found.append(number)
            else:
                depth += 1 if char in "[{" else -1
        number += text.count("\n", start, end)
        at = end
    return found


def _secrets(account: "Account") -> str:
    """The line of an account's secrets."""
    found = []
    for secret in account.secrets:
        until = f", expires = {secret.expires.astimezone(UTC).isoformat().replace('+00:00', 'Z')}" if secret.expires else ""
        found.append(f"{{ hash = {written(secret.hash)}{until} }}")
    return f"secrets = [{', '.join(found)}]"


def _until(secret: "Secret", until: datetime) -> "Secret":
    """A secret that expires at `until`, or earlier if it did."""
    return secret.model_copy(update={"expires": min(secret.expires or until, until)})


def _named(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """Check the name of a new account: it has only printable characters and no white space around it."""
    if not name.isprintable() or name != name.strip() or not name:
        raise click.BadParameter(f"{name!r} is not a valid name: use printable characters, with no white space around them")
    return name


def _key() -> str:
    """A random key for an application: 32 characters."""
    import base64

    return base64.b32encode(secrets.token_bytes(KEY_OCTETS)).decode().lower()


def _senders(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--sender", "senders", multiple=True, metavar="ADDRESS",
        help="An address it may send as, or @domain, or @.domain for subdomains; repeatable. Default: any.",
    )(function)  # fmt: skip


def _listing(read: Configuration, as_json: bool) -> None:
    accounts = _File(read).accounts
    if as_json:
        for account in accounts:
            say_json(_row(account))
        return
    if not accounts:
        say("there are no accounts", err=True)
        return
    shown = [
        [a.name, a.application, ", ".join(_shown(secret) for secret in a.secrets) or "none", ", ".join(a.senders) or "any"]
        for a in accounts
    ]
    table("", ["name", "application", "secrets", "senders"], shown)


def _row(account: "Account") -> dict[str, Any]:
    """An account as --json shows it. `expires`: seconds since 1970 UTC, 0: never."""
    secrets = [{"kind": _kind(s), "expires": _expires(s)} for s in account.secrets]
    return {"name": account.name, "application": account.application, "secrets": secrets, "senders": account.senders}


def _expires(secret: "Secret") -> float:
    return secret.expires.timestamp() if secret.expires else 0


def _kind(secret: "Secret") -> str:
    return secret.hash.lstrip("$").partition("$")[0]


def _is_key(secret: "Secret") -> bool:
    """Whether a secret is a key of an application, as `app create` stores it, and no password that a person has chosen."""
    from relaymta.auth.passwords import KEY_ITERATIONS, scram_keys

    keys = scram_keys(secret.hash) if _kind(secret) == "SCRAM-SHA-256" else None
    return keys is not None and keys.iterations == KEY_ITERATIONS


def _shown(secret: "Secret") -> str:
    expires = _expires(secret)
    return _kind(secret) + (f" ({'expired' if expires <= time.time() else 'expires'} {when(expires)})" if expires else "")


def _asked_for() -> str:
    """The password: typed twice, or the first line of standard input if that is not a terminal."""
    if sys.stdin.isatty():
        typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
        return typed
    return sys.stdin.readline().rstrip("\r\n") or fail(64, "no password: give it as the first line of standard input")


def _with_password(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a verb that sets a password."""
    kept = click.option("--scram", "with_scram", is_flag=True, help="Store it for SCRAM-SHA-256, instead of as argon2id.")
    text = "Default: prompt, or the first line of standard input (other users can see command lines)."
    return click.option("--password", default=_asked_for, help=text)(kept(function))


@group
def user() -> None:
    """Manage people who log in to send mail."""


@user.command(name="add")
@click.argument("name", callback=_named)
@_with_password
@_senders
@configured
def add_user(read: Configuration, name: str, password: str, with_scram: bool, senders: tuple[str, ...]) -> None:
    """Add a user."""
    from relaymta.config import Account

    account = Account(name=name, secrets=[_kept(password, with_scram)], senders=_checked_senders(senders))
    with _edited(read, new=True) as file:
        file.add(account)
    say(f"{name} may log in")
    _note_scram(file, with_scram)


def _note_scram(file: _File, with_scram: bool) -> None:
    """Print a note if SCRAM is no longer offered because of this password."""
    if not with_scram and any(_kind(secret) == "SCRAM-SHA-256" for account in file.accounts for secret in account.secrets):
        say("note: SCRAM-SHA-256 is offered only while all passwords are stored for it; this one is not (--scram)", err=True)


def _kept(password: str, with_scram: bool) -> "Secret":
    from relaymta.auth.passwords import PEOPLE_ITERATIONS, argon2id, scram
    from relaymta.config import Secret

    if not password:
        fail(64, "the password is empty")
    try:
        return Secret(hash=scram(password, PEOPLE_ITERATIONS) if with_scram else argon2id(password))
    except ValueError as error:
        fail(64, f"this password cannot be stored: {error}")


def _checked_senders(senders: tuple[str, ...]) -> list[str]:
    from relaymta.proto.address import DomainError, normalize_domain, plain

    for sender in senders:
        local, at, domain = sender.rpartition("@")
        try:
            good = bool(normalize_domain(domain)) if at and not local else plain(sender) is not None
        except (DomainError, UnicodeError):
            good = False
        if not good:
            fail(64, f'--sender {sender}: neither an address nor "@domain"')
    return list(senders)


@user.command()
@click.argument("name")
@_with_password
@configured
def password(read: Configuration, name: str, password: str, with_scram: bool) -> None:
    """Change a user's password."""
    secret = _kept(password, with_scram)
    with _edited(read) as file:
        file.get(name, "user")
        file.set_secrets(name, [secret])
    say(f"{name} has a new password")
    _note_scram(file, with_scram)


@user.command(name="remove")
@click.argument("name")
@configured
def remove_user(read: Configuration, name: str) -> None:
    """Remove a user."""
    with _edited(read) as file:
        file.get(name, "user")
        file.remove(name)
    say(f"{name} is removed")


@user.command(name="list")
@as_json
@configured
def list_users(read: Configuration, as_json: bool) -> None:
    """List all accounts."""
    _listing(read, as_json)


@group
def app() -> None:
    """Manage applications that log in with a key to send mail."""


@app.command()
@click.argument("name", callback=_named)
@_senders
@as_json
@configured
def create(read: Configuration, name: str, senders: tuple[str, ...], as_json: bool) -> None:
    """Create an application and its key, which is shown once."""
    from relaymta.auth.passwords import scram
    from relaymta.config import Account, Secret

    key = _key()
    account = Account(name=name, secrets=[Secret(hash=scram(key))], application=name, senders=_checked_senders(senders))
    with _edited(read, new=True) as file:
        file.add(account)
    domains = sorted({sender.rpartition("@")[2].lstrip(".") for sender in senders})
    records = list(_records(loaded(read, ANY_LISTENER), domains, name))
    if as_json:
        say_json({"user": name, "secret": key, "dns": records})
        return
    say(f"user:   {name}", f"secret: {key}")
    for line in records:
        say(f"DNS:    {line}")


def _records(config: "Config", domains: list[str], application: str) -> Iterator[str]:
    """Lines with the DNS records (SPF, DKIM) for domains whose mail an application sends from here."""
    from relaymta.cli import spf
    from relaymta.filter.keys import load_key, record, zone_line
    from relaymta.proto.address import in_a_labels

    for domain in domains:
        yield from spf.record(config, domain, application)
        keys = [one for one in config.dkim if in_a_labels(one.domain) == in_a_labels(domain.rstrip("."))]
        for one in keys:
            try:
                yield zone_line(f"{one.selector}._domainkey.{domain}", record(load_key(one)))
            except ConfigError as error:
                yield f"... and a DKIM key that cannot be read: {error}"
        if not keys:
            yield f"... and a DKIM key: relaymta dkim keygen {domain} --selector s1 --out FILE"


@app.command()
@click.argument("name")
@click.option("--overlap", default="24h", metavar="DURATION", help="Time for which the old keys stay valid.")
@as_json
@configured
def rotate(read: Configuration, name: str, overlap: str, as_json: bool) -> None:
    """Give an application a new key, which is shown once; its old keys expire after --overlap."""
    from relaymta.auth.passwords import scram, scram_keys
    from relaymta.config import Secret

    until = datetime.now(UTC) + timedelta(seconds=seconds_of("--overlap", overlap))
    key = _key()
    with _edited(read) as file:
        now = datetime.now(UTC)
        before = [_until(one, until) for one in file.get(name, "application").secrets if one.expires is None or one.expires > now]
        # With the salt of the old key: a SCRAM server sends one salt, before it can know which key the client has (RFC 5802 5).
        beside = next(filter(None, (scram_keys(one.hash) for one in before)), None)
        try:
            hashed = scram(key, beside.iterations, beside.salt) if beside is not None else scram(key)
        except ValueError:  # salt or iteration count come from another program and are not accepted here
            hashed = scram(key)
        file.set_secrets(name, [Secret(hash=hashed), *before])
    if as_json:
        say_json({"user": name, "secret": key, "old keys expire": until.timestamp() if before else 0})
        return
    say(f"user:   {name}", f"secret: {key}")
    if before:
        say(f"the old key is valid until {when(until.timestamp())}")


@app.command()
@click.argument("name")
@configured
def expire(read: Configuration, name: str) -> None:
    """Expire all keys of an application, now."""
    now = datetime.now(UTC)
    with _edited(read) as file:
        account = file.get(name, "application")
        if not account.secrets:
            fail(1, f"{name} has no key that could expire")
        # Expired keys are kept: an account without any secret is checked by the authentication back end.
        file.set_secrets(name, [_until(secret, now) for secret in account.secrets])
    say(f"{name} cannot log in until it gets a key (`relaymta app rotate {shlex.quote(name)}`)")


@app.command(name="remove")
@click.argument("name")
@configured
def remove_app(read: Configuration, name: str) -> None:
    """Remove an application: its account, with all of its keys. What it has in the queue is still delivered."""
    with _edited(read) as file:
        application = file.get(name, "application").application
        file.remove(name)
        alone = not any(other.application == application for other in file.accounts if other.name != name)
    say(f"{name} is removed: it cannot log in any more")
    if application:
        say(f"its mail in the queue is still delivered (`relaymta queue list --app {shlex.quote(application)}`; delete, bounce)")
    for key in loaded(read, ANY_LISTENER).dkim:
        if alone and key.application == [application]:
            say(f"the [[dkim]] of {key.selector}._domainkey.{key.domain} signs nothing else: remove it and its DNS record")


@app.command()
@as_json
@configured
def usage(read: Configuration, as_json: bool) -> None:
    """Show how much of their quotas accounts have used. Used quota becomes available again continuously."""
    rows = asked(connect(read), "usage")
    if as_json:
        for row in rows:
            say_json(row)
        return
    if not rows:
        say("no account has a quota", err=True)
        return
    table("", ["name", "what", "quota", "used"], [[r["name"], r["what"], r["quota"], str(r["used"])] for r in rows])


@app.command(name="list")
@as_json
@configured
def list_apps(read: Configuration, as_json: bool) -> None:
    """List all accounts."""
    _listing(read, as_json)
