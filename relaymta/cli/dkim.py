"""`relaymta dkim`: creates, checks and rotates the keys that sign mail."""

import itertools
import os
import re
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relaymta.cli.console import say, say_json, table
from relaymta.cli.editing import give_to, locked, replace_file
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
from relaymta.cli.peer import as_json, seconds_of
from relaymta.errors import ConfigError
from relaymta.files import read_text
from relaymta.toml import written

if TYPE_CHECKING:
    from relaymta.config import Config, Dkim

__all__ = ["checked", "dkim", "new_key", "record_of"]


@group
def dkim() -> None:
    """Create, check and rotate DKIM keys."""


def _absolute(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        fail(64, f"{parameter.opts[0]}: the path is not UTF-8, so no configuration could name it")
    return path.absolute()  # it goes into the configuration, which is read in another folder


@dkim.command()
@click.argument("domain")
@click.option("--selector", required=True, help="Selector of its DNS record, SELECTOR._domainkey.DOMAIN.")
@click.option("--type", "kind", type=click.Choice(["rsa", "ed25519"]), default="rsa", help="rsa: 2048 bits.")
@click.option(
    "--out", "out", required=True, type=click.Path(path_type=Path), callback=_absolute, help="File to write the private key to."
)
@as_json
@configured
def keygen(read: Configuration, domain: str, selector: str, kind: str, out: Path, as_json: bool) -> None:
    """Create a key; print the DNS record and the [[dkim]] table for it."""
    settings = _settings({"domain": domain, "selector": selector, "key": str(out)})
    _make(out, kind, loaded(read, ANY_LISTENER).user)
    if as_json:
        name, value = record_of(settings)
        say_json({"name": name, "type": "TXT", "value": value, "key": str(out)})
        return
    _show_record(settings)
    values = {"domain": settings.domain, "selector": settings.selector, "key": str(out)}
    say("", "[[dkim]]", *(f"{key} = {written(value)}" for key, value in values.items()))


def _settings(values: dict[str, object]) -> "Dkim":
    """A [[dkim]] table of these values; ends the program (64) if one is invalid."""
    from pydantic import ValidationError  # imported here: a shell that completes options need not wait for it

    from relaymta.config import Dkim

    try:
        return Dkim.model_validate(values)
    except ValidationError as error:
        fail(64, "\n".join(f"{entry['loc'][0]}: {entry['msg'].removeprefix('Value error, ')}" for entry in error.errors()))


def new_key(kind: str) -> bytes:
    """A new private key, "rsa" or "ed25519", in PEM form."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    private = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _make(path: Path, kind: str, user: str) -> None:
    """Create a private key in a new file that only the relay's user can read."""
    pem = new_key(kind)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        fail(73, f"{path}: {error.strerror}")
    with open(descriptor, "wb") as file:
        file.write(pem)
        give_to(descriptor, user)


def record_of(settings: "Dkim") -> tuple[str, str]:
    """The name and value of a key's DNS record. ConfigError when its file cannot be used."""
    from relaymta.filter.keys import load_key, record

    return f"{settings.selector}._domainkey.{settings.domain}", record(load_key(settings))


def _show_record(settings: "Dkim") -> None:
    from relaymta.filter.keys import zone_line

    say(zone_line(*record_of(settings)))


@dkim.command()
@click.argument("domain")
@click.option("--selector", required=True, help="The new key's selector.")
@click.option(
    "--out", "out", required=True, type=click.Path(path_type=Path), callback=_absolute, help="Its file; created if it is missing."
)
@click.option("--type", "kind", type=click.Choice(["rsa", "ed25519"]), default="rsa", help="Type of a key that is created.")
@click.option("--wait", "patience", default="0s", metavar="DURATION", help="Time to wait for the DNS record.")
@configured
def rotate(read: Configuration, domain: str, selector: str, out: Path, kind: str, patience: str) -> None:
    """Rotate the key of a domain: create one, print its record, and once the DNS has that, replace the old key in the file of the
    configuration that has it. Repeat the command until it succeeds; then run `relaymta reload`, and keep the old record for a
    week."""
    import asyncio

    config = loaded(read, ANY_LISTENER)
    wanted = _settings({"domain": domain, "selector": selector, "key": str(out)})
    domain, selector = wanted.domain, wanted.selector
    olds = [one for one in config.dkim if one.domain == domain and one.selector != selector]
    file = config.file_of(f"dkim.{config.dkim.index(olds[0])}") if olds else None
    if file is None or len(olds) != 1:
        fail(1, f"there must be a configuration file with exactly one other [[dkim]] of {domain} (there are {len(olds)})")
    seconds = seconds_of("--wait", patience)
    if not out.exists():
        _make(out, kind, config.user)
    fresh = olds[0].model_copy(update={"selector": selector, "key": str(out)})
    _show_record(fresh)
    state = asyncio.run(_published(config, fresh, seconds))
    if state != "ok":
        fail(1, f"the old key stays in use: {state}; repeat this once the record is published (or use --wait)")
    _put_in_place(file, olds[0], fresh)
    say(f"{file}: {domain} uses the selector {selector} now: run `relaymta reload`")
    say(f"remove {olds[0].selector}._domainkey.{domain} from the DNS in a week, when all mail signed with it has been delivered")


async def _published(config: "Config", settings: "Dkim", seconds: float) -> str:
    import asyncio

    until = time.monotonic() + seconds
    while True:
        (row,) = await checked(config.model_copy(update={"dkim": [settings]}))
        if row["state"] == "ok" or time.monotonic() > until:
            return row["state"]
        await asyncio.sleep(min(10.0, max(0.1, until - time.monotonic())))


def _put_in_place(file: Path, old: "Dkim", new: "Dkim") -> None:
    """Replace selector and key in the lines of a [[dkim]] table. The new text is parsed before it replaces the file, so that
    nothing but these two values can change."""
    with locked(file, ""):
        text = read_text(file)
        meant = _tables(text)
        tables = meant.get("dkim", [])
        found = [one for one in tables if (had := _settings(one)).domain == old.domain and had.selector == old.selector]
        for one in found:
            one.update(selector=new.selector, key=new.key)

        def check(fresh: Path) -> None:
            if not found or _tables(fresh.read_text(encoding="utf-8")) != meant:
                raise ConfigError([f"the table of {old.selector} was not found: edit the file by hand"])

        replace_file(file, _with(text, old, new), check=check)


def _tables(text: str) -> dict[str, Any]:
    """The parsed TOML; {} if it is invalid."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _with(text: str, old: "Dkim", new: "Dkim") -> str:
    """The text of a configuration file with a key's selector and key replaced; unchanged if its table is not found."""
    lines = text.splitlines(keepends=True)
    heads = [n for n, line in enumerate(lines) if line.strip().startswith("[")] + [len(lines)]
    for start, end in itertools.pairwise(heads):
        block = "".join(lines[start:end])
        found = _tables(block).get("dkim", [{}]) if lines[start].strip().startswith("[[dkim]]") else [{}]
        if "key" in found[0] and (one := _settings(found[0])).domain == old.domain and one.selector == old.selector:
            for key, value in (("selector", new.selector), ("key", new.key)):
                block = re.sub(rf"(?m)^(\s*{key}\s*=\s*).*$", lambda m, value=value: m[1] + written(value), block)  # type: ignore[misc]
            return "".join([*lines[:start], block, *lines[end:]])
    return text


@dkim.command(name="check")
@as_json
@configured
def check_keys(read: Configuration, as_json: bool) -> None:
    """Check that the DNS has the record of each key, and that a sample signed with the key is verified with it (by dkimpy). Exit
    status 1 when a record is missing, belongs to another key, or lets no signature be verified."""
    import asyncio

    config = loaded(read, ANY_LISTENER)
    rows = asyncio.run(checked(config))
    if as_json:
        for row in rows:
            say_json(row)
    elif rows:
        table("", ["record", "key", "state"], [[row["record"], row["key"], row["state"]] for row in rows])
    else:
        say("there is no [[dkim]]", err=True)
    if any(row["state"] != "ok" for row in rows):
        raise SystemExit(1)


async def checked(config: "Config") -> list[dict[str, str]]:
    """The DNS record of each key: `record` (its name), `key` (the file), `state` ("ok", or what is wrong)."""
    from relaymta.dns import Resolver

    resolver = Resolver(config.delivery.nameservers, lambda what: None)
    try:
        return [await _check_one(resolver, settings) for settings in config.dkim]
    finally:
        await resolver.close()


async def _check_one(resolver: object, settings: "Dkim") -> dict[str, str]:
    from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
    from relaymta.filter.keys import load_key, record
    from relaymta.filter.opinion import trouble

    assert isinstance(resolver, Resolver)
    name = f"{settings.selector}._domainkey.{settings.domain}"
    row = {"record": name, "key": settings.key, "state": "ok"}
    try:
        key = load_key(settings)
        found = await resolver.txt(name)
    except ConfigError as error:
        return row | {"state": str(error)}
    except (NoData, NoSuchName):
        return row | {"state": "no record"}
    except DnsFailure as error:
        return row | {"state": f"the DNS look-up failed: {error}"}
    published = [_public(text) for text in found]
    if "" in published:
        return row | {"state": "revoked: the record has an empty p="}
    texts = [text for text in found if _public(text) == _public(record(key))]
    if not texts:
        return row | {"state": "the record is another key's"}
    why = trouble(key, texts[0], int(time.time()))
    return row | {"state": f"the record lets no signature be verified: {why}"} if why else row


def _public(text: str) -> str:
    """The value of p= in a record."""
    tags = dict(part.strip().partition("=")[::2] for part in text.split(";"))
    return "".join(tags.get("p", "?").split())
