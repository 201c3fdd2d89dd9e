"""`relaymta suppression`: recipients to whom no mail is to be sent any more (docs/suppression.md)."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import click

from relaymta.cli.console import record, say, say_json, say_json_lines, say_message, table
from relaymta.cli.options import Configuration, configured, fail, files, group
from relaymta.cli.peer import (
    Daemon,
    GivenPath,
    Offline,
    absent,
    as_json,
    asked,
    connect,
    counted,
    given,
    given_address,
    no_such,
    read_file,
    seconds_of,
    size,
    until,
    when,
)
from relaymta.control.requests import SUPPRESSIONS
from relaymta.proto.suppression import REASONS

__all__ = ["entries", "put", "suppression"]

PROBLEMS_SHOWN = 20
REPORT_MOST = 1 << 20  # octets of a report that are read
NOBODY = "nobody is in the suppression list"

_address = click.argument("address", callback=given_address)
_app = click.option("--app", "--application", "application", default="", callback=given, metavar="APP",
                    help="Of mail of this application alone; default: of all mail.")  # fmt: skip
_which_app = click.option("--app", "--application", "application", default="", callback=given, metavar="APP",
                          help="Only entries of this application.")  # fmt: skip
_all_mail = click.option("--all-mail", is_flag=True, help="Only entries about all mail, of whatever application.")
_reason = click.option("--reason", type=click.Choice(REASONS), help="Only entries with this reason.")
_expires = click.option("--expires", "duration", default="", callback=given, metavar="DURATION",
                        help="For how long, such as 30d; default: as configured for the reason, else for ever.")  # fmt: skip

Peer = Daemon | Offline


@group
def suppression() -> None:
    """Recipients to whom no mail is to be sent any more, who are refused at RCPT."""


def _application(application: str, all_mail: bool) -> str | None:
    if application and all_mail:
        fail(64, "--app and --all-mail do not go together")
    return application if application else "" if all_mail else None


def entries(
    peer: Peer, application: str | None = None, reason: str | None = None, prefix: str = ""
) -> Iterator[list[dict[str, Any]]]:
    """The entries that match, a page at a time."""
    after = b""
    while True:
        chosen = {"application": application, "reason": reason or "", "prefix": prefix.lower()}
        found = asked(peer, "suppression_page", after=after, **chosen)
        if found["rows"]:
            yield found["rows"]
        after = found["after"]
        if not after:
            return


@suppression.command(name="list")
@_which_app
@_all_mail
@_reason
@click.option("--prefix", default="", callback=given, metavar="TEXT", help="Only addresses that begin so.")
@as_json
@configured
def list_entries(read: Configuration, application: str, all_mail: bool, reason: str | None, prefix: str, as_json: bool) -> None:
    """List the entries, one a line: those about all mail first, then by application, each by address."""
    import json

    some = False
    for rows in entries(connect(read), _application(application, all_mail), reason, prefix):
        some = True
        if as_json:
            say_json_lines(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        else:
            for row in rows:
                _show(row)
    if not some and not as_json:
        say(NOBODY + (" that matches" if application or all_mail or reason or prefix else ""), err=True)


def _show(row: dict[str, Any]) -> None:
    whose = f"mail of {row['application']}" if row["application"] else "all mail"
    ends = "" if not row["until"] else f", {until(row['until'])}" if row["until"] > time.time() else ", has expired"
    record(f"{row['address']}  {whose}  {row['reason']}  since {when(row['since'])}{ends}", row["text"], f"by {row['by']}")


@suppression.command()
@_address
@as_json
@configured
def show(read: Configuration, address: str, as_json: bool) -> None:
    """Show the entries of an address: about all mail, and of each application."""
    rows = asked(connect(read), "suppression_find", address=address)
    if not rows:
        absent(no_such("address in the suppression list", address))
    for row in rows:
        if as_json:
            say_json(row)
        else:
            _show(row)


def put(peer: Peer, rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Add entries (arguments of the request `suppression_put`), or replace them; how many were `added`,
    `replaced`, `left_out`."""
    done = {"added": 0, "replaced": 0, "left_out": 0}
    source = iter(rows)
    while part := list(islice(source, SUPPRESSIONS)):
        found = asked(peer, "suppression_put", rows=part)
        for name in done:
            done[name] += found[name]
    return done


def _told(done: dict[str, int], as_json: bool) -> None:
    """Say what has come of entries; where the list is full, end the program."""
    if as_json:
        say_json(done)
    else:
        say(f"{counted(done['added'], 'entry was', 'entries were')} added, {done['replaced']} replaced")
    if done["left_out"]:
        what = counted(done["left_out"], "entry was", "entries were")
        fail(69, f"{what} left out: the suppression list is full (suppression.entries)")


def _until(duration: str) -> int | None:
    """The end that --expires means; None: it was not given."""
    return int(time.time() + seconds_of("--expires", duration, least=1)) if duration else None


@suppression.command()
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...", callback=given_address)
@_app
@click.option("--reason", type=click.Choice(REASONS), default="manual", show_default=True, help="Why.")
@_expires
@click.option("--note", default="", metavar="TEXT", help="Shown in the reply to RCPT, and here.")
@as_json
@configured
def add(
    read: Configuration, addresses: tuple[str, ...], application: str, reason: str, duration: str, note: str, as_json: bool
) -> None:
    """Add addresses, or replace their entries. All workers know it at once."""
    common = {"application": application, "reason": reason, "until": _until(duration), "text": note}
    _told(put(connect(read), ({"address": address, **common} for address in dict.fromkeys(addresses))), as_json)


@suppression.command()
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...", callback=given_address)
@_which_app
@_all_mail
@as_json
@configured
def remove(read: Configuration, addresses: tuple[str, ...], application: str, all_mail: bool, as_json: bool) -> None:
    """Remove addresses: all of their entries, or those of one application, or about all mail."""
    chosen, peer, removed = _application(application, all_mail), connect(read), 0
    for start in range(0, len(addresses), SUPPRESSIONS):
        part = list(addresses[start : start + SUPPRESSIONS])
        removed += asked(peer, "suppression_remove", addresses=part, application=chosen)
    if as_json:
        say_json({"removed": removed})
    elif removed:
        say(f"{counted(removed, 'entry was', 'entries were')} removed")
    if not removed:
        absent(no_such("address in the suppression list", addresses[0] if len(addresses) == 1 else "any of these"))


@suppression.command(name="import")
@click.argument("file", type=GivenPath(path_type=Path, allow_dash=True), shell_complete=files)
@_app
@click.option("--reason", type=click.Choice(REASONS), default="manual", show_default=True, help="Of lines without one.")
@click.option("--expires", "duration", default="", callback=given, metavar="DURATION",
              help="For how long, such as 30d: of lines without `until`; default: for ever.")  # fmt: skip
@as_json
@configured
def import_(read: Configuration, file: Path, application: str, reason: str, duration: str, as_json: bool) -> None:
    """Add the entries of a CSV file ("-": standard input): columns address, application, reason, text, since, until, by, as
    `export` writes them, or addresses alone. What a line lacks is said by the options. Lines that are wrong are named and left
    out (then the status is 65)."""
    from relaymta.cli.suppression_csv import read_rows

    default = {"application": application, "reason": reason, "until": _until(duration) or 0}
    problems = _Problems()
    with _opened(file) as opened:
        peer = connect(read)
        done = put(peer, read_rows(opened, str(file), default, problems))
    if as_json:
        done["wrong"] = problems.count
    if problems.count > PROBLEMS_SHOWN:
        say(f"... and {problems.count - PROBLEMS_SHOWN} more lines that are wrong", err=True)
    _told(done, as_json)
    if problems.count:
        sys.exit(65)


class _Problems:
    """Lines that are wrong: shown as they are found, the first ones."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, text: str) -> None:
        self.count += 1
        if self.count <= PROBLEMS_SHOWN:
            say(text, err=True)


def _opened(file: Path) -> AbstractContextManager[BinaryIO]:
    if str(file) == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return file.open("rb")
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 74, f"{file}: {error.strerror}")


@suppression.command()
@click.argument("file", type=GivenPath(path_type=Path, allow_dash=True), default="-", shell_complete=files)
@_which_app
@_all_mail
@_reason
@configured
def export(read: Configuration, file: Path, application: str, all_mail: bool, reason: str | None) -> None:
    """Write the entries as CSV, to FILE or to standard output. `import` reads it again."""
    from relaymta.cli.suppression_csv import written

    chosen = _application(application, all_mail)

    def lines(peer: Peer) -> Iterator[bytes]:
        yield written([])
        for rows in entries(peer, chosen, reason):
            yield written(rows, head=False)

    if str(file) == "-":
        say_message(lines(connect(read)))
        return
    try:
        with file.open("wb") as opened:
            for piece in lines(connect(read)):
                opened.write(piece)
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 73, f"{file}: {error.strerror}")


@suppression.command()
@as_json
@configured
def stats(read: Configuration, as_json: bool) -> None:
    """Show how many entries there are, by application and reason, and how much room they take."""
    found = asked(connect(read), "suppression_counts")
    if as_json:
        say_json(found)
        return
    say(f"{found['entries']} of {found['most']} entries, {size(found['octets'])}")
    if found["each"]:
        rows = [[row["application"] or "(all mail)", row["reason"], str(row["entries"])] for row in found["each"]]
        table("", ["application", "reason", "entries"], rows)


@suppression.command()
@click.argument("address", default="", callback=given)
@click.option("--arf", "file", type=GivenPath(path_type=Path, allow_dash=True), shell_complete=files,
              help='A report (RFC 5965) as it was received; "-": standard input.')  # fmt: skip
@_app
@_expires
@as_json
@configured
def complaint(read: Configuration, address: str, file: Path | None, application: str, duration: str, as_json: bool) -> None:
    """Add a recipient who has complained: by ADDRESS, or by the report of a provider."""
    if bool(address) == (file is not None):
        fail(64, "who has complained? Give the address, or the report (--arf FILE)")
    found, text = ([address], "") if file is None else _complained(file)
    for one in found:
        given_address(click.get_current_context(), _ARGUMENT, one)
    common = {"application": application, "reason": "complaint", "text": text, "until": _until(duration)}
    _told(put(connect(read), [{"address": one, **common} for one in found]), as_json)


_ARGUMENT = click.Argument(["address"])


def _complained(file: Path) -> tuple[list[str], str]:
    """Who has complained in a report, and what is noted of it; ends the program (65) where nobody has, or it does not say who."""
    from relaymta.proto.arf import NOT_SPAM, NotAReport, parse

    try:
        report = parse(read_file(file, REPORT_MOST))
    except NotAReport as error:
        fail(65, f"{file}: {error}")
    if report.kind == NOT_SPAM:
        fail(65, f"{file}: its Feedback-Type is {NOT_SPAM}: nobody has complained")
    if not report.recipients:
        fail(65, f"{file}: it does not say who has complained: give the address")
    return report.recipients, f"{report.kind}{f', by {report.agent}' if report.agent else ''}"
