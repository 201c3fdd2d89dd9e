"""The options that every verb has, and how a verb ends (the statuses: docs/cli.md).

Nothing large is imported here: a verb that asks the daemon needs no more than the place of its socket.
"""

import functools
import os
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from relaymta.cli.console import say
from relaymta.errors import ConfigError
from relaymta.toml import read_all

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from relaymta.config import Config

__all__ = [
    "ANY_LISTENER", "Configuration", "absolute", "config_path", "config_with", "configured", "fail", "files", "folders",
    "for_all_verbs", "group", "home", "incomplete", "loaded", "missing", "named_path", "note_given", "note_missing", "usual_path",
]  # fmt: skip

_FILE, _NAMED, _MISSING, _INCOMPLETE, _GIVEN = (
    f"relaymta.{name}" for name in ("config_path", "named_path", "missing", "incomplete", "given")
)  # keys of click's context
CONFIG_PATH = "/etc/relaymta/relaymta.toml"
ANY_LISTENER = {"listener": [{"address": "127.0.0.1:2525"}]}  # for verbs that do not listen: a configuration needs one


class Configuration:
    """The configuration that the options of a verb mean: `path`, a file (None: there is none), overridden by `overrides` (dotted
    key -> value). A call loads it. `options`: the options themselves, as they were given, to follow another verb in a shell."""

    def __init__(self, path: Path | None, overrides: dict[str, Any], options: str = "") -> None:
        self._path = path
        self._overrides = overrides
        self.options = options

    @property
    def overrides(self) -> dict[str, Any]:
        """The values of --set and --spool: dotted key -> value."""
        return dict(self._overrides)

    def __call__(self, extra: dict[str, Any] | None = None, found: list[str] | None = None) -> "Config":
        """The valid configuration, overridden by `extra`, too. ConfigError with every problem. With a list `found`, those that
        leave something to look at are put there, and not raised."""
        from relaymta.config import load
        from relaymta.route.table import RouteTable

        config = load(self._path, self._overrides | (extra or {}), found)
        try:
            RouteTable(config)  # reads the route map
        except ConfigError as error:
            problems = config.located(error.problems)
            if found is None:
                raise ConfigError(problems) from None
            found += problems
        return config

    def control_path(self) -> Path | None:
        """Where the control socket is, read without a look at anything else; None when that takes the whole configuration (as for
        a file that begins with a byte order mark)."""
        if self._overrides.keys() - {"spool", "control.socket"}:
            return None
        parts: list[dict[str, Any]] = []
        try:
            if self._path is not None:
                if not self._path.is_file():  # a pipe can be read once only
                    return None
                parts += [source.data for source in read_all(self._path)]
        except (OSError, ConfigError):
            return None
        tables = [part.get("control", {}) for part in parts]
        if not all(isinstance(table, dict) for table in tables):
            return None
        socket = self._overrides.get("control.socket", _last("socket", tables))
        spool = self._overrides.get("spool", _last("spool", parts))
        if not all(value is None or isinstance(value, str) for value in (socket, spool)):
            return None
        if socket:
            return Path(socket)
        return Path(spool) / "control.sock" if spool else None


def _last(key: str, tables: list[dict[str, Any]]) -> Any:
    """The value of a key in the last table that has it; None: none has."""
    return next((table[key] for table in reversed(tables) if key in table), None)


def fail(status: int, text: str) -> NoReturn:
    """End the program with a message of one or several lines on standard error; while a shell completes a word, only what was
    given is taken as missing."""
    context = click.get_current_context(silent=True)
    if context is not None and context.resilient_parsing:
        raise click.UsageError(text)
    say(*text.split("\n"), err=True)
    sys.exit(status)


def readable(path: Path) -> bool:
    """Whether a file can be read; False: there is none. Ends the program (74) when it may not be."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        fail(74, f"{path}: {error.strerror or error}")
    return True


def home(variable: str, otherwise: str) -> Path:
    """The folder that a variable of the XDG Base Directory Specification names, such as XDG_CONFIG_HOME; by default the folder
    `otherwise` below the user's home. A path that is not absolute is ignored, as it says."""
    given = os.environ.get(variable, "")
    return Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~"), otherwise)


def usual_path() -> Path:
    """Where the configuration of the current user is when nobody names it: root's is that of the machine."""
    return Path(CONFIG_PATH) if os.geteuid() == 0 else home("XDG_CONFIG_HOME", ".config") / "relaymta" / "relaymta.toml"


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """For a shell that completes an option or argument which is a folder."""
    return _paths(incomplete, "dir")


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """For a shell that completes an option or argument which may be a file."""
    return _paths(incomplete, "file")


def _paths(incomplete: str, kind: str) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]


def for_all_verbs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that may stand before a verb as well as behind it."""
    for option in reversed((
        click.option("-c", "--config", "path", type=click.Path(path_type=Path, readable=False),
                     help="Configuration file (default: $RELAYMTA_CONFIG, then the first that exists of, not as root, "
                     f"$XDG_CONFIG_HOME/relaymta/relaymta.toml, and {CONFIG_PATH})."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key; overrides the file. Repeatable."),
        click.option("--spool", metavar="DIR", shell_complete=folders, help="Directory of the queue."),
    )):  # fmt: skip
        function = option(function)
    return function


def note_given(
    path: Path | None, settings: tuple[str, ...], spool: str | None
) -> tuple[Path | None, tuple[str, ...], str | None]:
    """Note the options that stood before a verb, between two or behind all; returns them with those that stood before them."""
    meta = click.get_current_context().meta
    before = meta.get(_GIVEN, (None, (), None))
    meta[_GIVEN] = given = path or before[0], (*before[1], *settings), before[2] if spool is None else spool
    return given


def group(function: Callable[[], None]) -> click.Group:
    """A verb that has verbs, which the options for all verbs may follow, too. It is called as the function, but for a `_` at the
    end."""

    @click.group(name=function.__name__.removesuffix("_"), help=function.__doc__)
    @for_all_verbs
    def made(path: Path | None, settings: tuple[str, ...], spool: str | None) -> None:
        note_given(path, settings, spool)

    return made


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --config, --set and --spool to a verb, and pass it the configuration that they mean, as `read`."""

    @for_all_verbs
    @functools.wraps(function)
    def wrapper(path: Path | None, settings: tuple[str, ...], spool: str | None, **others: Any) -> Any:
        path, every, spool = note_given(path, settings, spool)
        if path is None and (named := os.environ.get("RELAYMTA_CONFIG")):
            path = Path(named)
        overrides: dict[str, Any] = {}
        given = [("-c", str(path) if path is not None else None), ("--spool", spool), *(("--set", one) for one in every)]
        options = "".join(f" {option} {shlex.quote(value)}" for option, value in given if value is not None)
        for setting in every:
            key, equals, value = setting.partition("=")
            if not equals or not key:
                fail(64, f"--set {setting}: expected KEY=VALUE")
            overrides[key.strip()] = _parsed(value.strip())
        if spool is not None:
            overrides["spool"] = absolute(spool) if spool else spool
        click.get_current_context().meta[_NAMED] = path and path.absolute()
        if path is None:
            path = next((one for one in (usual_path(), Path(CONFIG_PATH)) if os.path.exists(one)), None)
        path = path and path.absolute()
        if path is not None:
            readable(path)
        click.get_current_context().meta[_FILE] = path

        try:
            result = function(read=Configuration(path, overrides, options), **others)
        finally:
            _report_missing()
        if click.get_current_context().meta.get(_INCOMPLETE):
            sys.exit(75)
        return result

    return wrapper


def _parsed(text: str) -> Any:
    """The value of `--set KEY=VALUE`: as TOML where possible, else the text itself."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def absolute(path: str | Path) -> str:
    """A path as it is printed: it means the same in any folder."""
    return str(Path(path).absolute())


def missing() -> set[int]:
    """The workers whose parts of this command's answers are not there."""
    found: set[int] = click.get_current_context().meta.setdefault(_MISSING, set())
    return found


def note_missing(workers: list[int], matters: bool = False) -> None:
    """Note workers whose part of an answer is not there. `matters`: the command then ends with status 75."""
    missing().update(workers)
    if workers and matters:
        incomplete()


def incomplete() -> None:
    """End the command with status 75 if a worker is missing in its answers: it changes something, and has not changed all."""
    if missing():
        click.get_current_context().meta[_INCOMPLETE] = True


def _report_missing() -> None:
    if numbers := sorted(missing()):
        one = len(numbers) == 1
        who = f"worker {numbers[0]} does" if one else f"workers {', '.join(map(str, numbers))} do"
        say(f"{who} not answer: what {'it has' if one else 'they have'} is missing here (`relaymta status`)", err=True)


def config_path() -> Path | None:
    """The configuration file of the current command; None when it has none."""
    found: Path | None = click.get_current_context().meta[_FILE]
    return found


def named_path() -> Path | None:
    """The configuration file that the options of the current command, or $RELAYMTA_CONFIG, name; it need not exist."""
    found: Path | None = click.get_current_context().meta[_NAMED]
    return found


def config_with(read: Configuration, key: Literal["filter", "mail_rule"]) -> "Config":
    """The configuration, which must have such a table. It need not be one that a relay could run with here."""
    try:
        config = read()
    except ConfigError:
        config = loaded(read, ANY_LISTENER)
    if not getattr(config, key):
        fail(78, f"there is no [[{key}]] in the configuration")
    return config


def loaded(read: Configuration, extra: dict[str, Any] | None = None, found: list[str] | None = None) -> "Config":
    """The configuration; ends the program (78) with every problem when it is invalid. `found`: as of Configuration."""
    try:
        return read(extra, found)
    except ConfigError as error:
        fail(78, str(error))
