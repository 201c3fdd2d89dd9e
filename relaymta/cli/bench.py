"""`relaymta bench`: a load test, with a sink that can be faulty, and a ledger of every message."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from relaymta.bench.load import AUTHS, TLS, Load
from relaymta.cli.console import is_screen, say, say_json, table
from relaymta.cli.options import Configuration, absolute, configured, fail, files, folders
from relaymta.duration import parse_duration
from relaymta.errors import ConfigError, NoSuch, RelayError

if TYPE_CHECKING:
    from relaymta.bench.generator import Login
    from relaymta.bench.ledger import Account, Sent
    from relaymta.bench.trial import Progress, Run, Setup

__all__ = ["bench"]

INTERRUPTED = 130  # as a shell has it for SIGINT
SINK = "127.0.0.1:2526"
MOST_CONNECTIONS, MOST_MESSAGES, MOST_SECONDS = 5000, 10_000_000, 86400.0
ADDRESS = 320  # characters of a recipient
PEERS = ("postfix", "exim")


def _folder() -> str:
    """Where the queue is by default: not in /tmp, which is in memory on many machines."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


def _loading(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options about the load."""
    for option in reversed((
        click.option("--connections", type=click.IntRange(1, MOST_CONNECTIONS), default=50, show_default=True, metavar="N",
                     help="Connections at a time."),
        click.option("--messages", type=click.IntRange(1, MOST_MESSAGES), metavar="N",
                     help="End after so many messages. Default: 1,000,000, and --duration."),
        click.option("--duration", metavar="DURATION", help="End after this time. Default: 30s; with --messages: 10m."),
        click.option("--rate", metavar="RATE", default="",
                     help="Send so many, such as 500/s, whatever the relay takes (open loop). "
                     "Default: as many as it takes."),
        click.option("--ramp", metavar="DURATION", default="1s", show_default=True,
                     help="Time in which connections and rate rise."),
        click.option("--per-connection", type=click.IntRange(0), default=0, metavar="N",
                     help="Messages on a connection; 1: a connection for each. Default: any number."),
        click.option("--no-pipelining", is_flag=True, help="Wait for each reply."),
        click.option("--size", default="4k", show_default=True, metavar="SIZES",
                     help="Size of the bodies: 4k, 1k-100k, or 4k:80%,1M:20%."),
        click.option("--recipients", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="N",
                     help="Recipients of each message."),
        click.option("--domains", type=click.IntRange(1, 100_000), default=1, show_default=True, metavar="N",
                     help="Domains of the recipients, below bench.invalid."),
        click.option("--recipients-file", type=click.Path(path_type=Path), metavar="FILE", shell_complete=files,
                     help="Recipients, an address a line, in turn; instead of --domains."),
        click.option("--tls", type=click.Choice(TLS), default="off", show_default=True, help="TLS to the relay."),
        click.option("--auth", type=click.Choice(AUTHS), default="off", show_default=True, help="Log in, by this mechanism."),
        click.option("--seed", type=click.IntRange(0), default=1, show_default=True, metavar="N",
                     help="Of the messages, their sizes, and the faults of the sink."),
    )):  # fmt: skip
        function = option(function)
    return function


_profile = click.option(
    "--profile", default="", metavar="NAME|FILE", shell_complete=files, help="Faults of the sink (`relaymta bench sink --list`)."
)


@click.group(invoke_without_command=True)
@click.option(
    "--target", default="", metavar="HOST:PORT", help="Load a relay that runs already, and routes everything to --sink."
)
@click.option(
    "--sink", "sink_at", default=SINK, show_default=True, metavar="HOST:PORT", help="With --target: where the sink listens."
)
@click.option("--no-sink", is_flag=True, help="With --target: without a sink here; nothing is compared.")
@click.option("--yes-load-this-host", is_flag=True, help="With --target: it may be another machine.")
@click.option(
    "--user", default="", metavar="NAME", help="With --target and --auth: the login; its password is read from standard input."
)
@click.option("--insecure", is_flag=True, help="With --target and --tls: accept any certificate.")
@click.option("--peer", "peers", type=click.Choice(PEERS), multiple=True, help="The same load through this one, too. Repeatable.")
@_loading
@_profile
@click.option("--grace", metavar="DURATION", help="Time without an arrival after which the rest counts as lost. Default: 20s, "
              "with --profile 90s.")  # fmt: skip
@click.option("--spool-dir", default=_folder, show_default="/var/tmp", metavar="DIR", shell_complete=folders,
              help="Folder on the disk that the queue is to be on.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, metavar="N", help="Workers of the relay.")
@click.option(
    "--json", "json_file", default="", metavar="FILE", shell_complete=files, help="Write the figures there; -: print them."
)
@click.option("--html", "html_file", default="", metavar="FILE", shell_complete=files, help="Write a report with plots there.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="FILE", shell_complete=files,
              help="Show the figures beside those of an earlier --json.")  # fmt: skip
@click.option("--ledger", type=click.Path(path_type=Path), metavar="FILE", shell_complete=files,
              help="Keep what was sent, for `relaymta bench account`.")  # fmt: skip
@configured
def bench(read: Configuration, **given: Any) -> None:
    """Measure a relay: a load, a faulty sink, and a ledger of what was lost.

    Without --target a relay of this installation is started, with its queue in a temporary folder; --set KEY=VALUE sets its keys.
    The sink is only faulty with --profile. Exit status 1 when something was lost, altered or duplicated.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return
    try:
        _bench(read, given)
    except KeyboardInterrupt:  # before there is anything to clean up
        sys.exit(INTERRUPTED)


def _bench(read: Configuration, given: dict[str, Any]) -> None:
    options = _Options(**{name: given[name] for name in _Options._fields})
    old = None
    if options.compare is not None:
        old = _read(options.compare)
    for path in (options.json_file, options.html_file):
        _writable(path)
    setups = _setups(read, options)
    _warn(setups[0])
    _finish(options, old, *_measured(setups))


class _Options(NamedTuple):
    """The options, as they were given."""

    target: str
    sink_at: str
    no_sink: bool
    yes_load_this_host: bool
    user: str
    insecure: bool
    peers: tuple[str, ...]
    connections: int
    messages: int | None
    duration: str | None
    rate: str
    ramp: str
    per_connection: int
    no_pipelining: bool
    size: str
    recipients: int
    domains: int
    recipients_file: Path | None
    tls: Any
    auth: Any
    seed: int
    profile: str
    grace: str | None
    spool_dir: str
    workers: int
    json_file: str
    html_file: str
    compare: Path | None
    ledger: Path | None


# What is asked for


def _duration(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        fail(64, f"{option} {text}: {error}")


def _load(given: _Options) -> Load:
    from pydantic import TypeAdapter, ValidationError

    from relaymta.bench.messages import Sizes
    from relaymta.config.values import Rate

    try:
        Sizes(given.size)
    except ValueError as error:
        fail(64, f"--size {error}")
    rate = 0.0
    if given.rate:
        try:
            rate = TypeAdapter(Rate).validate_python(
                float(given.rate) if given.rate.replace(".", "", 1).isdigit() else given.rate
            )
        except ValidationError:
            rate = 0.0
        if not 0.01 <= rate <= 1_000_000:
            fail(64, f"--rate {given.rate}: a rate such as 500/s, from 0.01 to 1,000,000 messages a second")
    seconds = _duration("--duration", given.duration) if given.duration else 30.0 if given.messages is None else 600.0
    if not 0 < seconds <= MOST_SECONDS:
        fail(64, f"--duration {given.duration}: longer than 0, and a day at most")
    ramp = _duration("--ramp", given.ramp)
    if ramp > seconds:
        fail(64, f"--ramp {given.ramp}: not longer than --duration")
    return Load(
        given.connections, given.messages or 1_000_000, seconds, rate, ramp, given.per_connection, not given.no_pipelining,
        given.size, given.recipients, given.domains, given.tls, given.auth, given.seed,
    )  # fmt: skip


def _recipients(given: _Options) -> tuple[str, ...]:
    path = given.recipients_file
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(74, f"--recipients-file {absolute(path)}: {error.strerror}")
    except UnicodeDecodeError:
        fail(65, f"--recipients-file {absolute(path)}: not UTF-8")
    found = []
    for number, line in enumerate(lines, 1):
        address = line.strip().removeprefix("<").removesuffix(">")
        if not address or address.startswith("#"):
            continue
        local, at, domain = address.rpartition("@")
        if (
            not (local and at and domain and address.isascii() and address.isprintable())
            or set(address) & set("<> ")
            or (len(address) > ADDRESS)
        ):
            fail(65, f"{absolute(path)}:{number}: {address[:60]!r} is not an address")
        found.append(address)
    if not found:
        fail(65, f"--recipients-file {absolute(path)}: there is no address in it")
    return tuple(found)


def _profile_path(name: str) -> Path | None:
    """The file of a valid profile; None: none was named."""
    if not name:
        return None
    from relaymta.bench.profile import load_profile, profile_named

    try:
        path = profile_named(name)
        load_profile(path)
    except NoSuch as error:
        fail(64, f"{error} (`relaymta bench sink --list` shows them)")
    except ConfigError as error:
        fail(78, str(error))
    return path


def _setups(read: Configuration, given: _Options) -> "list[Setup]":
    """What is to be run, one after the other."""
    from relaymta.bench.trial import Setup

    load, profile = _load(given), _profile_path(given.profile)
    grace = _duration("--grace", given.grace) if given.grace else 90.0 if profile else 20.0
    spool = Path(given.spool_dir).absolute()
    if not spool.is_dir() or not os.access(spool, os.W_OK | os.X_OK):
        fail(73, f"--spool-dir {spool}: {'it is not writable' if spool.is_dir() else 'there is no such folder'}")
    setup = Setup(
        load, profile=profile, recipients=_recipients(given), folder=spool, grace=grace, workers=given.workers, keep=given.ledger
    )
    if given.ledger is not None:
        _writable(str(given.ledger))
    if given.target:
        return [_of_target(read, given, setup)]
    only = {"--no-sink": given.no_sink, "--user": given.user, "--insecure": given.insecure, "--sink": given.sink_at != SINK}
    for option, value in only.items():
        if value:
            fail(64, f"{option} is for --target")
    settings = {key: value for key, value in read.overrides.items() if key != "spool"}
    if "spool" in read.overrides:
        fail(64, "--spool: the queue of a relay that is measured is in a folder of its own: --spool-dir says on which disk")
    from dataclasses import replace

    from relaymta.bench.peers import POSSIBLE, Cannot

    names = ["relaymta", *dict.fromkeys(given.peers)]
    for name in names[1:]:
        try:
            POSSIBLE[name](load)
        except Cannot as error:
            fail(error.status, str(error))

    return [replace(setup, peer=name, settings=settings, keep=given.ledger if name == "relaymta" else None) for name in names]


def _of_target(read: Configuration, given: _Options, setup: "Setup") -> "Setup":
    from dataclasses import replace

    from relaymta.bench.generator import Target
    from relaymta.config import parse_hostport

    if given.peers:
        fail(64, "--peer and --target: one of both")
    try:
        host, port = parse_hostport(given.target)
    except ValueError as error:
        fail(64, f"--target {error}")
    try:
        listen = parse_hostport(given.sink_at)
    except ValueError as error:
        fail(64, f"--sink {error}")
    local = _is_here(host)
    if not local and not given.yes_load_this_host:
        fail(
            64,
            f"--target {given.target} is not this machine: a load may stop its service. If it is yours, add --yes-load-this-host",
        )
    if given.no_sink and given.profile:
        fail(64, "--profile is for the sink: not with --no-sink")
    login = _login(given)
    return replace(
        setup, peer="", target=Target(host, port, not (local or given.insecure)), login=login, listen=[listen],
        sink=not given.no_sink, queued=lambda: _queued(read),
    )  # fmt: skip


def _is_here(host: str) -> bool:
    """Whether all addresses of a host are loopback addresses."""
    import socket

    from relaymta.config.values import is_loopback

    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        fail(69, f"--target {host}: {error.strerror}")
    return all(is_loopback(str(address)) for address in found)


def _login(given: _Options) -> "Login | None":
    from relaymta.bench.generator import Login

    if (given.auth == "off") != (given.user == ""):
        fail(64, "--auth and --user: both, or none")
    if not given.user:
        return None
    password = click.prompt("Password", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    return Login(given.user, password)


def _queued(read: Configuration) -> set[bytes] | None:
    """The ids in the queue of the relay that the configuration means, where one answers; None: it is not known."""
    import json
    import subprocess

    from relaymta.control import program

    path = read.control_path()
    if path is None or not path.exists():
        return None
    command = program(
        "relaymta.cli", "queue", "list", "--json", "--set", f"control.socket={path}", "--set", f"spool={path.parent}"
    )
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    if done.returncode:
        return None
    return {json.loads(line)["id"].encode() for line in done.stdout.splitlines()}


def _warn(setup: "Setup") -> None:
    from relaymta.disk.mounts import IN_MEMORY, mount_of

    mount = mount_of(setup.folder)
    if setup.peer and mount is not None and mount.kind in IN_MEMORY:
        say(f"note: {setup.folder} is in memory ({mount.kind}): a sync costs nothing there, so the figures are not those of a "
            "disk (--spool-dir)", err=True)  # fmt: skip


# The runs


class _Terminated(KeyboardInterrupt):
    """Another signal than SIGINT: `number`."""

    def __init__(self, number: int) -> None:
        self.number = number


def _terminated(number: int, _: object) -> NoReturn:
    raise _Terminated(number)


def _measured(setups: "list[Setup]") -> "tuple[list[Run], int]":
    """(the runs, the status of a signal that has ended them, else 0)."""
    from relaymta.bench.peers import Cannot
    from relaymta.bench.report import figures, first_figures
    from relaymta.bench.trial import SIGNALS, Interrupted, Unreachable, run

    interrupted, runs = Interrupted(), []
    old = {number: signal.getsignal(number) for number in SIGNALS}
    for number in old:
        signal.signal(number, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` makes it ignored
    try:
        with _progress() as watch:
            for setup in setups:
                runs.append(run(setup, watch, interrupted))
                if len(setups) > 1:
                    say(first_figures(figures(runs[-1])), err=True)
                if interrupted.is_set():
                    break
    except KeyboardInterrupt as error:
        interrupted.number = interrupted.number or (error.number if isinstance(error, _Terminated) else signal.SIGINT)
    except Cannot as error:
        fail(error.status, str(error))
    except Unreachable as error:
        fail(69, str(error))
    except OSError as error:
        fail(74, f"{error.filename or 'bench'}: {error.strerror or error}")
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return runs, interrupted.number and 128 + interrupted.number


@contextlib.contextmanager
def _progress() -> "Iterator[Callable[[Progress], None]]":
    """What shows the progress on standard error: a bar on a terminal, else a line every few seconds."""
    if not is_screen(err=True):
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=1.0, said="")

        def watch(now: "Progress") -> None:
            said = f"{now.sent:,} sent, {now.arrived:,} at the sink, {_left(now)}" if now.phase in ("load", "waiting") else ""
            bar.update(task, description=f"{now.name}: {now.phase}", completed=now.done, said=said)
            bar.refresh()

        yield watch


class _Lines:
    """Progress as lines."""

    SECONDS = 5.0

    def __init__(self) -> None:
        self._next, self._phase = 0.0, ""

    def __call__(self, now: "Progress") -> None:
        import time

        at = time.monotonic()
        if at < self._next and now.phase == self._phase:
            return
        self._next, self._phase = at + self.SECONDS, now.phase
        if now.phase in ("load", "waiting"):
            say(f"{now.name}: {now.phase}: {now.sent:,} sent, {now.arrived:,} at the sink, {_left(now)}", err=True)
        else:
            say(f"{now.name}: {now.phase}", err=True)


def _left(now: "Progress") -> str:
    return f"{max(0.0, now.left):.0f} s left" if now.phase == "load" else f"{max(0.0, now.left):.0f} s left without an arrival"


# What has come of it


def _read(path: Path) -> dict[str, Any]:
    from relaymta.bench.report import ReportError, read

    try:
        return read(path)
    except OSError as error:
        fail(74, f"--compare {absolute(path)}: {error.strerror}")
    except ReportError as error:
        fail(65, f"--compare {error}")


def _writable(path: str) -> None:
    """End the program where a file cannot be written, before all the work. It is left as it is."""
    if path in ("", "-"):
        return
    there = os.path.exists(path)
    try:
        with open(path, "ab"):
            pass
        if not there:
            os.unlink(path)
    except OSError as error:
        fail(73, f"{absolute(path)}: {error.strerror}")


def _finish(given: _Options, old: dict[str, Any] | None, runs: "list[Run]", status: int) -> NoReturn:
    from relaymta.bench.html import page
    from relaymta.bench.report import figures, report

    shown = [figures(one) for one in runs]
    whole = report(shown, bool(status))
    if not shown:
        say("interrupted before anything was sent", err=True)
        sys.exit(status)
    if status:
        say("interrupted: these are the figures until then", err=True)
    if given.json_file == "-":
        say_json(whole)
    else:
        _show(shown, old)
    for path, text in ((given.json_file, None), (given.html_file, page)):
        if path and path != "-":
            _write(path, text(whole) if text is not None else _as_text(whole))
    sound = all(run["ledger"]["sound"] for run in shown)
    sys.exit(status or (0 if sound else 1))


def _as_text(value: Any) -> str:
    import json

    return json.dumps(value, indent=1) + "\n"


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        fail(74, f"{absolute(path)}: {error.strerror}")
    say(f"written: {absolute(path)}", err=True)


def _show(shown: list[dict[str, Any]], old: dict[str, Any] | None) -> None:
    from relaymta.bench.report import compared

    names = [run["name"] for run in shown]
    if old is not None:
        earlier = [next((one for one in old["runs"] if one["name"] == run["name"]), None) for run in shown]
        for run, before in zip(shown, earlier, strict=True):
            if before is None:
                say(f"--compare: there is no run of {run['name']} in the earlier report", err=True)
            elif before.get("load") != run["load"] or before.get("profile") != run["profile"]:
                say(f"--compare: the earlier load of {run['name']} was another one: {before.get('load_in_words', '?')}", err=True)
        pairs = [(before, run) for before, run in zip(earlier, shown, strict=True) if before is not None]
        if pairs:
            names = [word for before, run in pairs for word in (f"{run['name']} before", run["name"])]
            shown_here = [one for pair in pairs for one in pair]
            columns, rows = compared(shown_here, names)
            _print(shown, columns, rows)
            return
    _print(shown, *compared(shown, names))


def _print(shown: list[dict[str, Any]], columns: list[str], rows: list[list[str]]) -> None:
    from relaymta.bench.report import verdict

    table(shown[0]["load_in_words"] + (f"; sink: {shown[0]['profile']}" if shown[0]["profile"] else ""), columns, rows)
    for run in shown:
        about = (
            f"{run['name']} {run['version']}".strip()
            + f": {run['durability']}"
            + (f"; spool on {run['disk']}" if run["disk"] else "")
        )
        say(about, *verdict(run), *(f"{run['name']}: {one}" for one in run["limits"]))
        if run["profile"]:
            say("sink: " + ", ".join(f"{what} {count:,}" for what, count in run["sink"].items()))
        for title, counts in (("refused by", run["replies"]), ("connection failed", run["failures"])):
            say(*(f"{run['name']}: {count:,} x {title}: {what}" for what, count in itertools.islice(counts.items(), 5)))


# The parts by themselves


@bench.command()
@click.option(
    "--listen",
    multiple=True,
    default=(SINK,),
    show_default=True,
    metavar="HOST:PORT",
    help="Address to accept mail on. Repeatable.",
)
@_profile
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="Of the faults.")
@click.option("--ledger", type=click.Path(path_type=Path), metavar="FILE", shell_complete=files,
              help="Keep what has arrived, for `relaymta bench account`.")  # fmt: skip
@click.option("--list", "listing", is_flag=True, help="Show the profiles that come with relaymta.")
@click.option("--show", is_flag=True, help="Print the profile, to make one of your own of it.")
@configured
def sink(
    read: Configuration, listen: tuple[str, ...], profile: str, seed: int, ledger: Path | None, listing: bool, show: bool
) -> None:
    """Run the sink alone, until Ctrl-C: it accepts all mail and throws it away, with the faults of its profile. Then it says what
    has happened."""
    from relaymta.bench.profile import SHIPPED, load_profile
    from relaymta.config import parse_hostport

    if listing:
        rows = [[path.stem, load_profile(path).description] for path in sorted(SHIPPED.glob("*.toml"))]
        table("", ["profile", "what it does"], rows)
        return
    path = _profile_path(profile)
    if show:
        if path is None:
            fail(64, "--show needs --profile")
        say(*path.read_text(encoding="utf-8").splitlines())
        return
    addresses = []
    for address in listen:
        try:
            addresses.append(parse_hostport(address))
        except ValueError as error:
            fail(64, f"--listen {error}")
    if ledger is not None:
        _writable(str(ledger))
    try:
        seen = _serve(path, seed, ledger, addresses)
    except OSError as error:
        fail(78, f"--listen {', '.join(listen)}: {os.strerror(error.errno) if error.errno else error}")
    table("", ["what", "times"], [[name, f"{count:,}"] for name, count in seen.items()])


def _serve(path: Path | None, seed: int, ledger: Path | None, addresses: list[tuple[str, int]]) -> dict[str, Any]:
    """Run a sink until SIGINT or SIGTERM; what has happened. OSError."""
    import uvloop

    from relaymta.bench.ledger import Arrivals
    from relaymta.bench.profile import Profile, load_profile
    from relaymta.bench.sink import Server, serve

    profile = load_profile(path) if path is not None else Profile()

    async def until_stopped(folder: Path) -> dict[str, Any]:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        server = Server(profile, seed, Arrivals(ledger) if ledger is not None else None, folder)
        about = f" ({path.stem}: {profile.description})" if path is not None else ""
        await serve(
            server, addresses, lambda found: say(*(f"sink: accepting mail on {host}:{port}{about}" for host, port in found)), stop
        )
        return server.report()

    with tempfile.TemporaryDirectory(prefix="relaymta-bench-") as folder:
        return uvloop.run(until_stopped(Path(folder)))


@bench.command()
@click.argument("sent", type=click.Path(path_type=Path), metavar="SENT", shell_complete=files)
@click.argument("arrived", type=click.Path(path_type=Path), metavar="ARRIVED", shell_complete=files)
@configured
def account(read: Configuration, sent: Path, arrived: Path) -> None:
    """Compare two ledgers: what `relaymta bench --ledger SENT` has sent, and what `relaymta bench sink --ledger ARRIVED` has
    taken, here or on another machine. Exit status 1 when something was lost, altered or duplicated."""
    from relaymta.bench.report import verdict

    try:
        found, run = _accounted(sent, arrived)
    except OSError as error:
        fail(74, f"{absolute(error.filename)}: {error.strerror}")
    except RelayError as error:
        fail(65, str(error))
    say(*verdict({"name": f"{run.run:016x}", "ledger": found.as_json()}))
    say(f"{found.accepted:,} accepted, {found.repeated:,} repeated since the sink did not answer, {found.in_doubt:,} in doubt, "
        f"of which {found.arrived_in_doubt:,} have arrived, {found.foreign:,} copies of other runs")  # fmt: skip
    sys.exit(0 if found.sound else 1)


def _accounted(sent_path: Path, arrived_path: Path) -> "tuple[Account, Sent]":
    from relaymta.bench.ledger import Sent, arrivals_of
    from relaymta.bench.ledger import account as compare

    sent, head = Sent.read(sent_path)
    rows, other = arrivals_of(arrived_path)
    same = head.get("boot") and head.get("boot") == other.get("boot")
    shift = 0.0 if same else float(other.get("offset", 0.0)) - float(head.get("offset", 0.0))
    return compare(sent, rows, None, shift), sent
