"""`relaymta dkim`: keys that sign mail: made, published, checked against the DNS, replaced."""

import asyncio
import itertools
import json
import os
import re
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from relaymta.cli.account import DEMO, give_to, locked, replace_file
from relaymta.cli.console import say, say_json, table
from relaymta.cli.peer import as_json
from relaymta.cli.serve import config_path, configured, fail, loaded
from relaymta.config import Config, Dkim, parse_duration
from relaymta.errors import ConfigError

__all__ = ["checked", "dkim"]


@click.group()
def dkim() -> None:
    """Keys that sign mail."""


@dkim.command()
@click.argument("domain")
@click.option("--selector", required=True, help="Under which its record will be: SELECTOR._domainkey.DOMAIN.")
@click.option("--type", "kind", type=click.Choice(["rsa", "ed25519"]), default="rsa", help="rsa: 2048 bits.")
@click.option("--out", "out", required=True, type=click.Path(path_type=Path), help="File to write the private key to.")
@configured
def keygen(read: Callable[..., Config], domain: str, selector: str, kind: str, out: Path) -> None:
    """Make a key; say what to put into the DNS and into the configuration."""
    settings = _settings({"domain": domain, "selector": selector, "key": str(out)})
    _make(out, kind, loaded(read, DEMO).user)
    _show_record(settings)
    say("", "[[dkim]]", f'domain = "{settings.domain}"', f'selector = "{settings.selector}"', f'key = "{out}"')


def _settings(values: dict[str, object]) -> Dkim:
    """A [[dkim]] table of these values; the command ends where one is wrong."""
    try:
        return Dkim.model_validate(values)
    except ValidationError as error:
        fail(64, "\n".join(f"{entry['loc'][0]}: {entry['msg'].removeprefix('Value error, ')}" for entry in error.errors()))


def _make(path: Path, kind: str, user: str) -> None:
    """Write a new private key, for the relay's user alone."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    private = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ed25519.Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8
    pem = private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        fail(73, f"{path}: {error.strerror}")
    with open(descriptor, "wb") as file:
        file.write(pem)
        give_to(descriptor, user)


def _show_record(settings: Dkim) -> None:
    from relaymta.filter.keys import load_key, record, zone_line

    say(zone_line(f"{settings.selector}._domainkey.{settings.domain}", record(load_key(settings))))


@dkim.command()
@click.argument("domain")
@click.option("--selector", required=True, help="The new key's selector.")
@click.option("--out", "out", required=True, type=click.Path(path_type=Path), help="Its file; made when it is not there.")
@click.option("--type", "kind", type=click.Choice(["rsa", "ed25519"]), default="rsa", help="What to make.")
@click.option("--wait", "patience", default="0s", metavar="DURATION", help="For so long, wait until the DNS has its record.")
@configured
def rotate(read: Callable[..., Config], domain: str, selector: str, out: Path, kind: str, patience: str) -> None:
    """Replace the key of a domain: make one, say its record, and once the DNS has that, put it into the configuration file in the
    old one's place. Call it again until it has; then `relaymta reload`, and keep the old record for a week."""
    config, file = loaded(read, DEMO), config_path()
    wanted = _settings({"domain": domain, "selector": selector, "key": str(out)})
    domain, selector = wanted.domain, wanted.selector
    olds = [one for one in config.dkim if one.domain == domain and one.selector != selector]
    if file is None or len(olds) != 1:
        fail(1, f"there must be a configuration file with one other [[dkim]] of {domain} (there are {len(olds)})")
    try:
        seconds = parse_duration(patience)
    except ValueError as error:
        fail(64, f"--wait {patience}: expected {error}")
    if not out.exists():
        _make(out, kind, config.user)
    fresh = olds[0].model_copy(update={"selector": selector, "key": str(out)})
    _show_record(fresh)
    state = asyncio.run(_published(config, fresh, seconds))
    if state != "ok":
        fail(1, f"the old key goes on: {state}; call this again once the record is there (or use --wait)")
    _put_in_place(file, olds[0], fresh)
    say(f"{file}: {domain} has {selector} now: `relaymta reload`")
    say(f"remove {olds[0].selector}._domainkey.{domain} from the DNS in a week, when all that it signed has arrived")


async def _published(config: Config, settings: Dkim, seconds: float) -> str:
    until = time.monotonic() + seconds
    while True:
        (row,) = await checked(config.model_copy(update={"dkim": [settings]}))
        if row["state"] == "ok" or time.monotonic() > until:
            return row["state"]
        await asyncio.sleep(min(10.0, max(0.1, until - time.monotonic())))


def _put_in_place(file: Path, old: Dkim, new: Dkim) -> None:
    """Write another selector and key into the lines of a [[dkim]] table. What was written is read again before it is put there:
    another configuration than was meant never is."""
    with locked(file, ""):
        text = file.read_text(encoding="utf-8")
        meant = _tables(text)
        tables = meant.get("dkim", [])
        found = [one for one in tables if (had := _settings(one)).domain == old.domain and had.selector == old.selector]
        for one in found:
            one.update(selector=new.selector, key=new.key)

        def check(fresh: Path) -> None:
            if not found or _tables(fresh.read_text(encoding="utf-8")) != meant:
                raise ConfigError([f"the table of {old.selector} is not where it was looked for: edit it by hand"])

        replace_file(file, _with(text, old, new), check=check)


def _tables(text: str) -> dict[str, Any]:
    """A file's TOML; {} for what is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _with(text: str, old: Dkim, new: Dkim) -> str:
    """A configuration file with the lines of a key replaced, as far as they are where they are looked for."""
    lines = text.splitlines(keepends=True)
    heads = [n for n, line in enumerate(lines) if line.strip().startswith("[")] + [len(lines)]
    for start, end in itertools.pairwise(heads):
        block = "".join(lines[start:end])
        found = _tables(block).get("dkim", [{}]) if lines[start].strip().startswith("[[dkim]]") else [{}]
        if "key" in found[0] and (one := _settings(found[0])).domain == old.domain and one.selector == old.selector:
            for key, value in (("selector", new.selector), ("key", new.key)):
                block = re.sub(rf"(?m)^(\s*{key}\s*=\s*).*$", lambda m, value=value: m[1] + json.dumps(value), block)  # type: ignore[misc]
            return "".join([*lines[:start], block, *lines[end:]])
    return text


@dkim.command(name="check")
@as_json
@configured
def check_keys(read: Callable[..., Config], as_json: bool) -> None:
    """Whether the DNS has each key's record, and it is this key's. Exit status 1 when one is missing or another's."""
    config = loaded(read, DEMO)
    rows = asyncio.run(checked(config))
    if as_json:
        say_json(rows)
    elif rows:
        table("", ["record", "key", "state"], [[row["record"], row["key"], row["state"]] for row in rows])
    else:
        say("there is no [[dkim]]")
    if any(row["state"] != "ok" for row in rows):
        raise SystemExit(1)


async def checked(config: Config) -> list[dict[str, str]]:
    """What the DNS has of each key: `record` (its name), `key` (the file), `state` (ok, or what is wrong)."""
    from relaymta.dns import Resolver

    resolver = Resolver(config.delivery.nameservers, lambda what: None)
    try:
        return [await _check_one(resolver, settings) for settings in config.dkim]
    finally:
        await resolver.close()


async def _check_one(resolver: object, settings: Dkim) -> dict[str, str]:
    from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver
    from relaymta.filter.keys import load_key, record

    assert isinstance(resolver, Resolver)
    name = f"{settings.selector}._domainkey.{settings.domain}"
    row = {"record": name, "key": settings.key, "state": "ok"}
    try:
        wanted = _public(record(load_key(settings)))
        found = await resolver.txt(name)
    except ConfigError as error:
        return row | {"state": str(error)}
    except (NoData, NoSuchName):
        return row | {"state": "no record"}
    except DnsFailure as error:
        return row | {"state": f"the DNS does not say: {error}"}
    published = [_public(text) for text in found]
    if "" in published:
        return row | {"state": "revoked: the record has an empty p="}
    return row if wanted in published else row | {"state": "the record is another key's"}


def _public(text: str) -> str:
    """p= of a record."""
    tags = dict(part.strip().partition("=")[::2] for part in text.split(";"))
    return "".join(tags.get("p", "?").split())
