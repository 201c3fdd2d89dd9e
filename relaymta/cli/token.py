"""`relaymta token`: tokens of the HTTP API and of the page (docs/admin.md). They are in a file, which is read again when it
changes."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import record, say, say_json
from relaymta.cli.editing import locked, replace_file
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
from relaymta.cli.peer import absent, as_json, given, no_such, seconds_of, when
from relaymta.errors import ConfigError

if TYPE_CHECKING:
    from relaymta.admin.tokens import Token

__all__ = ["token"]

_name = click.argument("name", callback=given, metavar="NAME")


@group
def token() -> None:
    """Manage tokens of the HTTP API."""


class _File:
    """The file of tokens of a configuration, and whose it is. Root touches it with the rights of its folder's owner: what the
    relay's user can write, such as links, must not lead root elsewhere."""

    def __init__(self, read: Configuration) -> None:
        # All of it before root is dropped: that user may not be able to read our files.
        import difflib  # noqa: F401

        import relaymta.admin.tokens  # noqa: F401
        from relaymta.privileges import owner_of

        config = loaded(read, ANY_LISTENER)
        self.path = Path(config.tokens_path).absolute()
        self.user = config.user
        if not self.user and os.geteuid() == 0:
            with contextlib.suppress(OSError):
                self.user = owner_of(self.path.parent).pw_name

    @property
    def tokens(self) -> "list[Token]":
        """The tokens in it; ends the program (74) where it cannot be read."""
        from relaymta.admin.tokens import read_tokens

        try:
            with self._as_owner():
                return read_tokens(self.path)
        except ConfigError as error:
            fail(74, str(error))

    def write(self, tokens: "list[Token]") -> None:
        """Replace them."""
        from relaymta.admin.tokens import written

        replace_file(self.path, written(tokens), self.user)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """While they are changed."""
        if not self.path.parent.is_dir():
            fail(73, f"{self.path.parent}: there is no such folder: start the relay once, or set admin.tokens")
        with self._as_owner(), locked(self.path, self.user):
            yield

    def _as_owner(self) -> contextlib.AbstractContextManager[None]:
        from relaymta.privileges import acting_as_owner

        there = self.path.parent.is_dir()
        return acting_as_owner(self.path.parent) if there else contextlib.nullcontext()


@token.command()
@click.option("--name", required=True, callback=given, metavar="NAME", help="Who or what has it, as the log names it.")
@click.option("--scope", "scopes", multiple=True, required=True, callback=given, metavar="SCOPE",
              help='What it allows, such as queue:read; "read": all that ends so; "all"; repeatable.')  # fmt: skip
@click.option(
    "--expires", "duration", default="", callback=given, metavar="DURATION", help="Until when, such as 90d; default: never."
)
@as_json
@configured
def create(read: Configuration, name: str, scopes: tuple[str, ...], duration: str, as_json: bool) -> None:
    """Create a token, and print it: it is shown this once. Its hash is kept."""
    import msgspec

    from relaymta.admin.tokens import SCOPES, Token, expanded, fresh, hashed
    from relaymta.errors import near

    for scope in scopes:
        if scope not in {*SCOPES, "read", "all"}:
            fail(64, f"--scope {scope}: there is no such scope{near(scope, SCOPES)}: {', '.join(SCOPES)}, read, all")
    expires = time.time() + seconds_of("--expires", duration, least=1) if duration else 0.0
    made = fresh()
    try:
        row = Token(name=name, hash=hashed(made), scopes=expanded(list(scopes)), created=float(int(time.time())), expires=expires)
        msgspec.convert(msgspec.to_builtins(row), Token)
    except msgspec.ValidationError:
        fail(64, f"--name {name}: letters, digits, blanks and _ . @ - are allowed, 64 of them")
    file = _File(read)
    with file.changing():
        known = file.tokens
        if any(one.name == name for one in known):
            fail(1, f"there is a token {name} already (`relaymta token revoke`)")
        file.write([*known, row])
    if as_json:
        say_json({"name": name, "token": made, "scopes": row.scopes, "expires": expires})
        return
    say(made)
    until = f", until {when(expires)}" if expires else ""
    say(f"this is shown once. {name} may: {', '.join(row.scopes)}{until}", err=True)


@token.command(name="list")
@as_json
@configured
def list_tokens(read: Configuration, as_json: bool) -> None:
    """List the tokens: name, until when, and what each allows."""
    tokens = _File(read).tokens
    for one in tokens:
        if as_json:
            say_json(_row(one))
        else:
            ends = "never expires" if not one.expires else f"until {when(one.expires)}" if one.valid else "has expired"
            record(f"{one.name}  {ends}", ", ".join(one.scopes))
    if not tokens and not as_json:
        say("there are no tokens", err=True)


def _row(one: "Token") -> dict[str, Any]:
    return {"name": one.name, "scopes": one.scopes, "created": one.created, "expires": one.expires, "valid": one.valid}


@token.command()
@_name
@configured
def revoke(read: Configuration, name: str) -> None:
    """Revoke a token. Logins on the page that were made with it end."""
    file = _File(read)
    if not file.path.exists():
        absent(no_such("token", name))
    with file.changing():
        known = file.tokens
        if all(one.name != name for one in known):
            absent(no_such("token", name, [one.name for one in known]))
        file.write([one for one in known if one.name != name])
    say(f"{name} is revoked")
