"""`relaymta filter`: what judges mail."""

import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from relaymta.auth.identity import plain_address
from relaymta.cli.console import say, say_json, table
from relaymta.cli.lessons import again as also_again
from relaymta.cli.lessons import learning, taught
from relaymta.cli.options import Configuration, config_with, configured, fail, files, group
from relaymta.cli.peer import (
    GivenPath,
    absent,
    as_json,
    asked,
    connect,
    daemon,
    given,
    given_address,
    given_sender,
    lasting,
    no_such,
    read_file,
    read_pieces,
    running,
)
from relaymta.errors import ConfigError
from relaymta.ident import parse_id
from relaymta.privileges import account, become

if TYPE_CHECKING:
    from relaymta.config import Config
    from relaymta.config import Filter as Settings
    from relaymta.filter.judgement import Filter

__all__ = ["as_user", "filter", "message_text", "show_rows", "silent"]

T = TypeVar("T")

_HEAD = ["filter", "type", "state", "waiting", "asked", "p50", "p99", "failed", "verdicts"]
_BARE_LF = re.compile(rb"(?<!\r)\n")
MOST = 64 << 20  # octets of a message to test
FAILED = 75
_SAYS = {"milter": "is", "policy": "is", "http": "is", "dnsbl": "has", "greylist": "is", "python": "has"}  # of others: "finds"


@group
def filter() -> None:
    """What judges mail: its state, and what it says about a message."""


@filter.command(name="list")
@as_json
@configured
def list_filters(read: Configuration, as_json: bool) -> None:
    """List the filters of the running relay: whether each is up, how many messages wait for a place, and what was counted since
    the start.

    p50, p99: within what time half, and 99 of 100, of its answers came."""
    show_rows(asked(daemon(read), "filters"), as_json, _HEAD, _cells, "filters")


def show_rows(
    rows: list[dict[str, Any]], as_json: bool, head: list[str], cells: Callable[[dict[str, Any]], list[str]], what: str
) -> None:
    """Rows as JSON, or as a table of their `cells`; or that there are none of `what`."""
    if as_json:
        for row in rows:
            say_json(row)
    elif rows:
        table("", head, [cells(row) for row in rows])
    else:
        say(f"there are no {what}", err=True)


def _cells(row: dict[str, Any]) -> list[str]:
    state = "up" if row["up"] else f"down for {lasting(row['down for'])}: {row['why']}"
    state += "" if row.get("enforce", True) else ", enforce = false"
    verdicts = " ".join(f"{word} {count}" for word, count in row["verdicts"].items() if count)
    failures = " ".join(f"{word} {count}" for word, count in row["failures"].items() if count)
    within = [_within(row[key], row["asked"]) for key in ("p50", "p99")]
    return [row["name"], row["type"], state, str(row["waiting"]), str(row["asked"]), *within, failures or "0", verdicts or "-"]


def _within(seconds: float | None, count: int) -> str:
    if seconds is None:
        return "-" if not count else ">10 s"
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


@filter.command()
@as_json
@configured
def check(read: Configuration, as_json: bool) -> None:
    """Show each filter what it must find (a virus scanner: EICAR), at each of its addresses, and say what it answers.

    The relay need not run. root asks with the rights of the relay's user (`user`). Exit status 75 when one does not answer, or
    does not find it."""
    import asyncio  # here and below: `list` does without

    config = config_with(read, "filter")
    as_user(config)
    rows = asyncio.run(_proved(config))
    for row in rows:
        if as_json:
            say_json(row)
        else:
            where = f" at {row['address']}" if row["address"] else ""
            says = _SAYS.get(row["type"], "finds")
            say(f"{row['filter']}{where}: " + (f"{says} {row['found']}" if row["found"] else row["error"]))
    if any(row["error"] for row in rows):
        sys.exit(FAILED)


def as_user(config: "Config") -> None:
    """As root, become the user that the relay runs as: it is that user who has to be able to open the filters' sockets."""
    if config.user and os.geteuid() == 0:
        from relaymta.cli import judged  # noqa: F401  # that user may not be able to read our files

        try:
            become(account(config.user))
        except ConfigError as error:
            fail(78, "\n".join(config.located(error.problems)))


async def _proved(config: "Config") -> list[dict[str, str]]:
    import asyncio

    async def prove(settings: "Settings", address: str) -> dict[str, str]:
        found, error = await _asked(config, settings, address, lambda one: one.prove())
        return {"filter": settings.name, "type": settings.type, "address": address, "found": found or "", "error": error}

    every = [(settings, address) for settings in config.filter for address in settings.address or [""]]
    return list(await asyncio.gather(*(prove(*one) for one in every)))


async def _asked(
    config: "Config", settings: "Settings", address: str, ask: Callable[["Filter"], Awaitable[T]]
) -> tuple[T | None, str]:
    """Ask a filter at one of its addresses (""; it has none): the answer; and what is wrong, or ""."""
    import asyncio

    from relaymta.cli.judged import means
    from relaymta.filter.chain import made
    from relaymta.filter.judgement import FilterFailure

    async with means(config) as given:
        one = made(settings.model_copy(update={"address": [address] if address else []}), given)
        try:
            async with asyncio.timeout(settings.timeout if address else None):  # else it knows itself who is late
                return await ask(one), ""
        except TimeoutError:
            return None, f"no answer in {lasting(settings.timeout)}"
        except FilterFailure as failure:
            return None, str(failure).removeprefix(f"{address}: ")
        finally:
            one.close()


def silent(config: "Config") -> list[str]:
    """A sentence for each address at which no such filter answers now: `filter.0.address.0: ...`."""
    import asyncio

    async def ask() -> list[str]:
        places = [(n, at, one) for n, one in enumerate(config.filter) for at in range(len(one.address))]
        answers = await asyncio.gather(*(_asked(config, one, one.address[at], _remark(one)) for _, at, one in places))
        return [
            f"filter.{n}.address.{at}: {one.address[at]}: {what or remark}"
            for (n, at, one), (remark, what) in zip(places, answers, strict=True)
            if what or remark
        ]

    return asyncio.run(ask()) if config.filter else []


def _remark(settings: "Settings") -> Callable[["Filter"], Awaitable[str]]:
    """Asks whether a filter answers: what is to be known of it, or ""."""

    async def ask(one: "Filter") -> str:
        if not hasattr(one, "wants"):
            await one.probe()
            return ""
        others = [word for word in await one.wants() if word not in settings.may]
        return f"may want to change: {', '.join(others)}, which `may` does not allow; that is left out" if others else ""

    return ask


@filter.command()
@click.argument("file", required=False, type=GivenPath(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--from", "sender", default="", callback=given_sender, metavar="ADDRESS", help="The envelope sender.")
@click.option("--to", "recipients", multiple=True, callback=given_address, metavar="ADDRESS", help="A recipient; repeatable.")
@click.option("--client", default="", callback=given, metavar="IP", help="The client's address; default: 192.0.2.1.")
@click.option("--helo", default="client.example", callback=given, metavar="NAME", help="What the client calls itself.")
@click.option("--as", "application", default="", callback=given, metavar="APP", help="It has logged in, for this application.")
@click.option("--listener", default="", callback=given, metavar="HOST:PORT", help="The listener; default: the first one.")
@click.option("--only", default="", callback=given, metavar="FILTER", help="Ask this filter alone, whatever it looks at.")
@as_json
@configured
def test(
    read: Configuration, file: Path | None, sender: str, recipients: tuple[str, ...], client: str, helo: str, application: str,
    listener: str, only: str, as_json: bool,
) -> None:  # fmt: skip
    """Ask the filters about a message (FILE; "-": standard input), as a client would send it, and show what would be done.

    Without FILE those are asked that judge before the message data: lists in the DNS and policy services. Nothing is sent, and
    the relay need not run; greylisting, which knows what that has seen, is asked by --only alone. Exit status: 0: it is accepted,
    1: tagged or held, 2: refused or discarded, 75: a filter has failed."""
    from relaymta.cli.judged import Judged, Sending, of_envelope

    config = config_with(read, "filter")
    config = _with_only(config, only) if only else config
    asked = [one for one in config.filter if only or one.type != "greylist"]
    if file is None:
        asked = [one for one in asked if of_envelope(one)]
        if not asked:
            fail(64, "no filter is asked before the message data: give a FILE")
    data = None if file is None else _BARE_LF.sub(b"\r\n", _text(file))
    address = _ip(client or "192.0.2.1")
    to = recipients or ("recipient@" + config.hostname,)
    sending = Sending(data, sender, to, address, helo, application, listener)
    rules = [] if only or file is None else config.mail_rule
    as_user(config)
    judged = Judged(config.model_copy(update={"filter": asked, "mail_rule": rules}), sending)
    if as_json:
        say_json(judged.row())
    else:
        judged.show([one.name for one in config.filter])
    sys.exit(judged.status())


@filter.command()
@click.argument("what", type=click.Choice(["spam", "ham"]))
@click.argument("messages", nargs=-1, required=True, callback=given, metavar="FILE|ID...", shell_complete=files)
@click.option("--only", default="", callback=given, metavar="FILTER", help="Teach this filter alone.")
@also_again
@as_json
@configured
def learn(read: Configuration, what: str, messages: tuple[str, ...], only: str, again: bool, as_json: bool) -> None:
    """Teach filters by messages that are spam, or that are none (ham): files ("-": standard input), or ids of messages in the
    queue, such as held ones.

    rspamd learns by its controller (filter.controller), spamd if it was started with --allow-tell. Five texts a second are
    learned, and each once: while the relay runs, it remembers which. Exit status 75 when a message was not learned."""
    of = learning(read, only)
    texts = ((message, message_text(read, message)) for message in messages)
    if not taught(running(read), of, texts, what == "spam", as_json, again):
        sys.exit(FAILED)


def message_text(read: Configuration, message: str) -> bytes:
    """The octets of a file, or of a message in the queue as it would be sent."""
    if message == "-" or Path(message).exists():
        return _BARE_LF.sub(b"\r\n", _text(Path(message)))
    try:
        parse_id(message)
    except ValueError:
        fail(74, f"{message}: neither a file nor the id of a message")
    octets = b"".join(read_pieces(connect(read), "raw", ident=message))
    if not octets:
        absent(no_such("message", message))
    return octets


def _with_only(config: "Config", name: str) -> "Config":
    """The configuration with one filter alone, which looks at all mail."""
    from relaymta.config.filters import BUILT_IN

    known = {one.name: one for one in config.filter}
    if name not in known:
        fail(64, f"--only: {no_such('filter', name, known)}")
    everything = {"clients": "all", "listener": [], "application": [], "networks": [], "recipient_domain": []}
    changes: dict[str, object] = {"filter": [known[name].model_copy(update=everything)]}
    if known[name].type in BUILT_IN:  # it looks at nobody who may relay
        changes["relay"] = config.relay.model_copy(update={"networks": []})
    return config.model_copy(update=changes)


def _ip(text: str) -> str:
    try:
        return str(plain_address(text))
    except ValueError:
        fail(64, f"--client {text}: expected an IP address")


def _text(file: Path) -> bytes:
    data = read_file(file, MOST + 1)
    if len(data) > MOST:
        fail(65, f"{file}: it has more than {MOST >> 20} MB")
    return data
