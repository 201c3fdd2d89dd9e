"""`relaymta manual`: the manual pages, made of the help of all verbs and of the reference of the configuration."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from relaymta import __version__
from relaymta.cli import main
from relaymta.cli.console import say
from relaymta.cli.options import CONFIG_PATH, Configuration, absolute, configured, fail, folders

__all__ = ["STATUSES", "manual", "pages"]

PROGRAM, FILE = "relaymta", "relaymta.toml"

# As docs/cli.md has them.
STATUSES = {
    0: "done; also when nothing matched a filter",
    1: "what was named does not exist, or exists already; or a check has found something wrong; or mail was lost (`bench`); or "
    "there was no upgrade",
    64: "wrong usage: an unknown verb or option, a malformed id, address or duration, an empty filter",
    65: "data that is wrong",
    69: "the relay is not running or does not answer, or it refuses; a program that `bench --peer` needs is not installed",
    70: "the relay has ended because of an error of its own (`serve`), or does not start (`bench`)",
    73: "a file or directory cannot be created",
    74: "a file, or the output, cannot be read or written",
    75: "try again: a worker did not answer, or another process has the spool",
    77: "no permission to open the control socket or the spool; `bench --peer` needs root",
    78: "the configuration is invalid or its file is missing, or a reload was refused",
    129: "`bench` has ended with its terminal",
    130: "Ctrl-C has ended `bench`",
    141: "who reads the output has gone",
    143: "SIGTERM has ended `bench`, or the first process of a container (`serve`: before it had started)",
}
FILES = {
    CONFIG_PATH: "the configuration, where neither `-c` nor RELAYMTA_CONFIG names another file",
    f"{Path(CONFIG_PATH).parent}/conf.d/*.toml": "further files of the configuration, read after it in the order of their names",
    "/var/lib/relaymta": "the spool: the queue, mailboxes, what was learned",
    "/var/lib/relaymta/control.sock": "the socket by which verbs ask the running relay (`control.socket`)",
}
ENVIRONMENT = {"RELAYMTA_CONFIG": "the configuration file, where `-c` does not name another one"}
OF_FILES = [
    f"The file {CONFIG_PATH} is written in TOML 1.0. It may be empty, but for one [[listener]]. Files `conf.d/*.toml` beside it "
    "are read after it, in the order of the octets of their names; those that begin with a dot are not read.",
    "A key has the value of the last file that gives it; a list of values is one value, and lists of several files are not "
    "joined. Keys of a table in [single brackets] may be in several files. Tables in [[double brackets]], of which there can be "
    "several, follow each other in the order of the files. `--set KEY=VALUE` of the command line wins over all of them.",
    "`relaymta config check` names every mistake with its file and line. `relaymta config show` prints what is in effect, with "
    "`--origin` where each key was given. `relaymta reload` applies what has changed, except for keys marked (restart).",
    "A duration is written as 30 (seconds), \"90s\", \"10m\", \"2h\" or \"5d\", a size as 1000 (octets), \"50MB\" or \"1G\".",
]  # fmt: skip

_SPECIAL = {"\\": "\\(rs", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", '"': "\\(dq"}
_LITERAL = re.compile(r"`([^`]+)`")
_OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][\w-]*)")
_PLACEHOLDER = re.compile(r"\b([A-Z][A-Z0-9_]+)\b")


def roff(text: str, marked: re.Pattern[str] = _LITERAL, font: str = "B") -> str:
    """A text in one line, in which every character means itself; what `marked` finds (its group) is in another font."""
    parts = marked.split(" ".join(text.split()))
    line = "".join(f"\\f{font}{_escaped(part)}\\fP" if number % 2 else _escaped(part) for number, part in enumerate(parts))
    return f"\\&{line}" if line.startswith(".") else line


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(one) or (one if " " <= one <= "~" else f"\\[u{ord(one):04X}]") for one in text)


def _paragraphs(text: str) -> list[str]:
    """The lines of a text whose paragraphs are separated by empty lines."""
    return [line for part in re.split(r"\n\s*\n", text.strip()) for line in (".PP", roff(part))]


def _terms(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Terms, written for roff already, each with a text below it."""
    return [line for term, text in rows for line in (".TP", term, roff(text))]


def _page(name: str, section: int, summary: str, lines: Iterable[str]) -> str:
    """A whole page. `name`: as of its file."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    head = f'.TH "{_escaped(name.upper())}" "{section}" "{day}" "{PROGRAM} {__version__}" "{PROGRAM}"'
    plain = [".nh", ".ad l"]  # paths and commands are not hyphenated
    return "\n".join([head, *plain, ".SH NAME", f"{roff(name)} \\- {roff(summary)}", *lines, ""])


def pages() -> Iterator[tuple[str, str]]:
    """(path below a folder such as /usr/share/man, text) of every page."""
    yield from _of_command(main, click.Context(main, info_name=PROGRAM, resilient_parsing=True, **main.context_settings))
    yield f"man5/{FILE}.5", _of_file()


def _of_command(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """The pages of a verb, and those of its verbs."""
    verbs = dict(_verbs(command, context))
    name = context.command_path.replace(" ", "-")
    yield f"man1/{name}.1", _page(name, 1, _summary(command), _lines(command, context, name, verbs))
    for verb, below in verbs.items():
        yield from _of_command(below, click.Context(below, info_name=verb, parent=context, resilient_parsing=True))


def _verbs(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        if found is not None and not found.hidden:
            yield name, found


def _summary(command: click.Command) -> str:
    """What a verb does, in a line."""
    paragraph = re.split(r"\n\s*\n", command.help or "")[0]
    return re.split(r"\.(?:\s|$)", " ".join(paragraph.split()))[0]


def _lines(command: click.Command, context: click.Context, name: str, verbs: dict[str, click.Command]) -> Iterator[str]:
    yield ".SH SYNOPSIS"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"\\fB{roff(context.command_path)}\\fP {roff(usage, _PLACEHOLDER, 'I')}"
    yield ".SH DESCRIPTION"
    yield from _paragraphs(command.help or "")
    yield ".SH OPTIONS"
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield from _terms((roff(names, _OPTION), text) for names, text in filter(None, records) if text)
    if verbs:
        yield ".SH VERBS"
        yield from _terms((f"\\fB{roff(f'{name}-{verb}')}\\fP(1)", _summary(below)) for verb, below in verbs.items())
    if name == PROGRAM:
        yield ".SH EXIT STATUS"
        yield from _terms((str(status), meaning) for status, meaning in STATUSES.items())
        yield ".SH ENVIRONMENT"
        yield from _terms((f"\\fB{roff(name)}\\fP", text) for name, text in ENVIRONMENT.items())
        yield ".SH FILES"
        yield from _terms((f"\\fI{roff(path)}\\fP", text) for path, text in FILES.items())
    yield ".SH SEE ALSO"
    above = name.rpartition("-")[0] if context.parent is not None else ""
    others = dict.fromkeys(
        [f"{FILE}(5)", *([f"{above}(1)"] if above else []), *([] if above in ("", PROGRAM) else [f"{PROGRAM}(1)"])]
    )
    yield ", ".join(f"\\fB{roff(one.partition('(')[0])}\\fP({one[-2]})" for one in others)


def _of_file() -> str:
    """The page about the configuration."""
    from relaymta.config import reference

    lines = [".SH DESCRIPTION", *_paragraphs("\n\n".join(OF_FILES)), ".SH KEYS IN FRONT OF THE FIRST TABLE"]
    for number, table in enumerate(reference()):
        if number == 1:
            lines.append(".SH TABLES")
        if table.head:
            lines += [f".SS {roff(table.head)}", *_paragraphs(table.text)]
        for key in table.keys:
            default = f" = {roff(key.default)}" if key.default else ""
            lines += _terms([(f"\\fB{roff(key.name)}\\fP{default}", key.text + " (restart)" * key.restart)])
    lines += [".SH FILES", *_terms((f"\\fI{roff(path)}\\fP", text) for path, text in FILES.items())]
    return _page(FILE, 5, "the configuration of the relay MTA", [*lines, ".SH SEE ALSO", f"\\fB{PROGRAM}\\fP(1)"])


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path), shell_complete=folders)
@configured
def manual(read: Configuration, folder: Path) -> None:
    """Write the manual pages of all verbs and of the configuration, to man1/ and man5/ of a folder. Pages that are there are
    overwritten."""
    try:
        for name, text in pages():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")
            say(absolute(path))
    except OSError as error:
        fail(73, f"{absolute(error.filename or folder)}: {error.strerror or error}")
