"""`relaymta filter`: the programs that judge mail."""

import ipaddress
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from relaymta.cli.console import say, say_json, table
from relaymta.cli.options import ANY_LISTENER, Configuration, configured, fail, group, loaded
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
)
from relaymta.errors import ConfigError
from relaymta.ident import parse_id

if TYPE_CHECKING:
    import asyncio

    from relaymta.config import Config
    from relaymta.config import Filter as Settings
    from relaymta.filter.chain import Chain, Chains, Outcome
    from relaymta.filter.guard import Finding
    from relaymta.filter.judgement import Filter, Mail, NewBody
    from relaymta.filter.revision import Revision

__all__ = ["filter", "silent"]

T = TypeVar("T")

_HEAD = ["filter", "type", "state", "waiting", "asked", "p50", "p99", "failed", "verdicts"]
_BARE_LF = re.compile(rb"(?<!\r)\n")
MOST = 64 << 20  # octets of a message to test
# Exit statuses of `test`.
DONE, MARKED, REFUSED, FAILED = 0, 1, 2, 75
_STATUS = {"accept": DONE, "tag": MARKED, "hold": MARKED, "discard": REFUSED, "tempfail": REFUSED, "reject": REFUSED}


@group
def filter() -> None:
    """The programs that judge mail: their state, and what they say about a message."""


@filter.command(name="list")
@as_json
@configured
def list_filters(read: Configuration, as_json: bool) -> None:
    """List the filters of the running relay: whether each is up, how many messages wait for a place, and what was counted since
    the start.

    p50, p99: within what time half, and 99 of 100, of its answers came."""
    rows = asked(daemon(read), "filters")
    if as_json:
        for row in rows:
            say_json(row)
    elif rows:
        table("", _HEAD, [_cells(row) for row in rows])
    else:
        say("there are no filters", err=True)


def _cells(row: dict[str, Any]) -> list[str]:
    state = "up" if row["up"] else f"down for {lasting(row['down for'])}: {row['why']}"
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

    The relay need not run. Exit status 75 when one does not answer, or does not find it."""
    import asyncio  # here and below: `list` does without

    config = _with_filters(read)
    rows = asyncio.run(_proved(config))
    for row in rows:
        if as_json:
            say_json(row)
        else:
            says = "is" if row["type"] == "milter" else "finds"
            say(f"{row['filter']} at {row['address']}: " + (f"{says} {row['found']}" if row["found"] else row["error"]))
    if any(row["error"] for row in rows):
        sys.exit(FAILED)


async def _proved(config: "Config") -> list[dict[str, str]]:
    import asyncio

    async def prove(settings: "Settings", address: str) -> dict[str, str]:
        found, error = await _asked(settings, address, config.hostname, lambda one: one.prove())
        return {"filter": settings.name, "type": settings.type, "address": address, "found": found or "", "error": error}

    every = [(settings, address) for settings in config.filter for address in settings.address]
    return list(await asyncio.gather(*(prove(*one) for one in every)))


async def _asked(
    settings: "Settings", address: str, hostname: str, ask: Callable[["Filter"], Awaitable[T]]
) -> tuple[T | None, str]:
    """Ask a filter at one of its addresses: the answer; and what is wrong, or ""."""
    import asyncio

    from relaymta.filter.chain import made
    from relaymta.filter.judgement import FilterFailure

    one = made(settings.model_copy(update={"address": [address]}), hostname)
    try:
        async with asyncio.timeout(settings.timeout):
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
        answers = await asyncio.gather(*(_asked(one, one.address[at], config.hostname, _remark(one)) for _, at, one in places))
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
@click.argument("file", type=GivenPath(path_type=Path, dir_okay=False, allow_dash=True))
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
    read: Configuration, file: Path, sender: str, recipients: tuple[str, ...], client: str, helo: str, application: str,
    listener: str, only: str, as_json: bool,
) -> None:  # fmt: skip
    """Ask the filters about a message (a file; "-": standard input), and show what would be done with it.

    Nothing is sent, and the relay need not run. Exit status: 0: it is accepted, 1: tagged or held, 2: refused or discarded, 75: a
    filter has failed."""
    config = _with_filters(read)
    if only:
        config = _with_only(config, only)
    known = [one.name for one in config.filter]
    address = _ip(client or "192.0.2.1")
    data = _BARE_LF.sub(b"\r\n", _text(file))
    with _chains(config) as (loop, chains):
        at = listener or config.listener[0].address
        chain = _chain(config, chains, listener, address, application)
        mail, header = _mail(
            chain, data, sender, recipients or ("postmaster@" + config.hostname,), address, helo, application, at
        )
        revision = _revision(mail)
        findings = loop.run_until_complete(chain.ask(revision)) if chain is not None else []
        outcome = chain.outcome(findings, revision) if chain is not None else None
    changes = _changes(outcome, header, mail, revision)
    if as_json:
        say_json(_shown(findings, outcome, changes))
    else:
        _print(findings, outcome, changes, known)
    sys.exit(_status(findings, outcome))


def _status(findings: list["Finding"], outcome: "Outcome | None") -> int:
    if outcome is None:
        return DONE
    decides = max(findings, key=lambda one: one.action, default=None)
    failed = any(one.word == "failed" and one.guard.settings.enforce for one in findings)
    refused = decides is not None and decides.word != "failed" and _STATUS[outcome.verdict.word] == REFUSED
    return FAILED if failed and not refused else _STATUS[outcome.verdict.word]


@filter.command()
@click.argument("what", type=click.Choice(["spam", "ham"]))
@click.argument("messages", nargs=-1, required=True, callback=given, metavar="FILE|ID...")
@click.option("--only", default="", callback=given, metavar="FILTER", help="Teach this filter alone.")
@as_json
@configured
def learn(read: Configuration, what: str, messages: tuple[str, ...], only: str, as_json: bool) -> None:
    """Teach filters by messages that are spam, or that are none (ham): files ("-": standard input), or ids of messages in the
    queue, such as held ones.

    rspamd learns by its controller (filter.controller), spamd if it was started with --allow-tell. Exit status 75 when a message
    was not learned."""
    import asyncio

    from relaymta.filter.chain import made

    config = _with_filters(read)
    learners = [one for one in config.filter if hasattr(made(one), "learn") and only in ("", one.name)]
    if not learners:
        fail(64 if only else 78, f"--only: {only} does not learn" if only else "no [[filter]] learns: rspamd and spamd do")
    failed = False
    for message in messages:
        text = _message(read, message)
        for settings, (done, error) in zip(learners, asyncio.run(_taught(learners, text, what == "spam")), strict=True):
            row = {"message": message, "filter": settings.name, "done": done or "", "error": error}
            failed = failed or bool(error)
            if as_json:
                say_json(row)
            else:
                say(f"{message}: {settings.name}: {error or done}")
    if failed:
        sys.exit(FAILED)


async def _taught(learners: "list[Settings]", text: bytes, spam: bool) -> list[tuple[str | None, str]]:
    import asyncio

    from relaymta.filter.judgement import Text

    async def one(settings: "Settings") -> tuple[str | None, str]:
        return await _asked(settings, settings.address[0], "", lambda made: made.learn(Text(text), spam))  # type: ignore[attr-defined]

    return list(await asyncio.gather(*map(one, learners)))


def _message(read: Configuration, message: str) -> bytes:
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


def _with_filters(read: Configuration) -> "Config":
    try:
        config = read()
    except ConfigError:
        config = loaded(read, ANY_LISTENER)
    if not config.filter:
        fail(78, "there is no [[filter]] in the configuration")
    return config


def _with_only(config: "Config", name: str) -> "Config":
    """The configuration with one filter alone, which looks at all mail."""
    known = {one.name: one for one in config.filter}
    if name not in known:
        fail(64, f"--only: {no_such('filter', name, known)}")
    everything = {"clients": "all", "listener": [], "application": [], "networks": [], "recipient_domain": []}
    return config.model_copy(update={"filter": [known[name].model_copy(update=everything)]})


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        fail(64, f"--client {text}: expected an IP address")


def _text(file: Path) -> bytes:
    data = read_file(file, MOST + 1)
    if len(data) > MOST:
        fail(65, f"{file}: it has more than {MOST >> 20} MB")
    return data


@contextmanager
def _chains(config: "Config") -> Iterator[tuple["asyncio.AbstractEventLoop", "Chains"]]:
    """The filters as a relay of one worker has them, which logs nothing."""
    import asyncio

    from relaymta.filter.chain import Chains
    from relaymta.shm import Shared

    shared, loop = Shared.create(), asyncio.new_event_loop()
    chains = Chains(config, shared.limits(0, 1), shared.named(0), _Silent(), loop, None)  # type: ignore[arg-type]
    try:
        yield loop, chains
        chains.close()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


class _Silent:
    """A log that nobody reads."""

    def event(self, name: str, **fields: object) -> None:
        """As of Log."""


def _chain(config: "Config", chains: "Chains", listener: str, address: str, application: str) -> "Chain | None":
    listeners = {one.address: one for one in config.listener}
    if listener and listener not in listeners:
        fail(64, f"--listener: {no_such('listener', listener, listeners)}")
    at = listeners[listener] if listener else config.listener[0]
    networks = [ipaddress.ip_network(text) for text in config.relay.networks]
    trusted = bool(application) or any(ipaddress.ip_address(address) in network for network in networks)
    return chains.chain_for(at, address, application, trusted)


def _mail(
    chain: "Chain | None",
    data: bytes,
    sender: str,
    recipients: tuple[str, ...],
    address: str,
    helo: str,
    application: str,
    listener: str,
) -> tuple["Mail", bytes]:
    """The message as filters are shown it, without what passes for our tags; and its header as it came."""
    from relaymta.filter.judgement import Mail, Text
    from relaymta.proto.edits import without
    from relaymta.proto.header import header_end

    end = header_end(data)
    head = without(data[:end], chain.forged) if chain is not None else data[:end]
    text = Text(head or b"\r\n", data[end:])
    mail = Mail("test", sender, recipients, address, helo, application, "", text, listener=listener, rewritten=_new_body)
    return mail, data[:end]


def _new_body() -> "NewBody":
    """It is kept in memory, whatever its size."""
    from relaymta.accept.rewritten import Rewritten
    from relaymta.reservation import Reservation

    def nothing(*arguments: object) -> None:
        raise AssertionError("it is in no file")

    return Rewritten(nothing, MOST, MOST, nothing, Reservation(lambda: None))  # type: ignore[arg-type]


def _revision(mail: "Mail") -> "Revision":
    from relaymta.filter.revision import Revision

    return Revision(mail)


def _changes(outcome: "Outcome | None", header: bytes, mail: "Mail", revision: "Revision") -> list[str]:
    """What would be changed in a message, as lines of a diff: those that go, then those that come; and in its envelope."""
    if outcome is None or outcome.verdict.word not in ("accept", "tag", "hold"):
        return []
    before, after = (text.decode("utf-8", "replace").split("\r\n") for text in (header, revision.above + revision.header))
    gone, new = Counter(before), Counter(after)
    gone, new = gone - new, new - gone
    found = [*(f"- {line}" for line in _of(gone, before)), *(f"+ {line}" for line in _of(new, after))]
    if revision.body is not None:
        found.append(f"+ another body, of {revision.body.octets} octets")
    if revision.sender is not None and revision.sender != mail.sender:
        found += [f"- sender <{mail.sender}>", f"+ sender <{revision.sender}>"]
    if revision.recipients is not None:
        found += [f"- recipient <{one}>" for one in mail.recipients if one not in revision.recipients]
        found += [f"+ recipient <{one}>" for one in revision.recipients if one not in mail.recipients]
    return found


def _of(counts: Counter[str], lines: list[str]) -> Iterator[str]:
    """So many of each of these lines, in their order."""
    for line in lines:
        if line and counts[line] > 0:
            counts[line] -= 1
            yield line


def _shown(findings: list["Finding"], outcome: "Outcome | None", changes: list[str]) -> dict[str, Any]:
    return {
        "filters": [
            {
                "filter": one.guard.name, "verdict": one.word, "action": one.action.word, "score": one.score,
                "reason": one.reason, "failure": one.failure, "seconds": round(one.seconds, 4),
            }
            for one in findings
        ],
        "verdict": outcome.verdict.word if outcome is not None else "accept",
        "reply": outcome.reply.decode().strip() if outcome is not None else "",
        "held for": outcome.held if outcome is not None else "",
        "changes": changes,
    }  # fmt: skip


def _print(findings: list["Finding"], outcome: "Outcome | None", changes: list[str], known: list[str]) -> None:
    rows = []
    for one in findings:
        enforced = "" if one.guard.settings.enforce else " (enforce = false)"
        score = "-" if one.score is None else f"{one.score:g}"
        why = f"{one.failure}: {one.reason}" if one.failure else one.reason
        rows.append([one.guard.name, one.word + enforced, one.action.word, score, f"{one.seconds * 1000:.1f} ms", why or "-"])
    if rows:
        table("", ["filter", "verdict", "done", "score", "time", "reason"], rows)
    skipped = [name for name in known if name not in {one.guard.name for one in findings}]
    if skipped:
        say(f"not asked, since it does not look at such mail or another one has decided: {', '.join(skipped)}")
    if outcome is None:
        say("accepted: no filter looks at mail of this client")
        return
    for line in changes:
        say(line)
    words = {"accept": "accepted", "tag": "accepted, and tagged", "hold": f"held ({outcome.held})", "discard": "discarded"}
    say(words.get(outcome.verdict.word) or f"refused: {outcome.reply.decode().strip()}")
