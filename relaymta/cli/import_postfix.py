"""`relaymta import`: configurations of other mail servers as one of ours."""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import click

from relaymta.cli.console import say, say_json
from relaymta.cli.options import ANY_LISTENER, Configuration, absolute, configured, fail, group, loaded
from relaymta.cli.peer import GivenPath, as_json
from relaymta.cli.postfix.beside import Beside
from relaymta.cli.postfix.carry import Carried, carry
from relaymta.cli.postfix.files import Files
from relaymta.errors import ConfigError

__all__ = ["import_"]

HEADS = {"way": "These change the way of mail:", "gap": "These are not carried:", "note": "To know:"}
_folder = GivenPath(path_type=Path, file_okay=False)


@group
def import_() -> None:
    """Read the configuration of another mail server."""


@import_.command()
@click.argument("folder", metavar="DIR", type=GivenPath(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o", "--output", type=GivenPath(path_type=Path, dir_okay=False), metavar="FILE", help="Write the configuration there."
)
@click.option("--secrets", type=_folder, metavar="DIR", help="Write passwords there, each into a file for its owner alone.")
@click.option("--files", "beside", type=_folder, metavar="DIR", help="Write the maps and scripts there that belong to it.")
@click.option("--root", type=_folder, metavar="DIR", help="Where the other files of its machine are, if DIR is a copy.")
@click.option(
    "--hostname", default="", metavar="NAME", help="The machine's name, where myhostname is not given; default: this one's."
)
@click.option("--mx", is_flag=True, help="Ask the DNS for the MX of hosts that are named without [ ].")
@click.option("--force", is_flag=True, help="Overwrite files.")
@as_json
@configured
def postfix(
    read: Configuration, folder: Path, output: Path | None, secrets: Path | None, beside: Path | None, root: Path | None,
    hostname: str, mx: bool, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print the configuration of Postfix in DIR (main.cf, master.cf, and the tables that they name) as one of ours, with the line
    that each value comes from, and what could not be carried, with what to do instead.

    Nothing is started or changed. With --json the list is written as JSON, and the configuration into FILE alone. Exit status 0:
    all is carried; 1: something is not; 65: Postfix itself would refuse the files."""
    try:
        place = Beside(absolute(secrets) if secrets else "", absolute(beside) if beside else "")
        carried = carry(Files(folder, root), place, partial(_by_dns, _nameservers(read)) if mx else _unknown, hostname)
    except ConfigError as error:
        fail(65, "\n".join(error.problems))
    except OSError as error:
        fail(74, f"{error.filename}: {error.strerror}")
    text = _with_list(carried, folder)
    _write(carried, output, text, force)
    if as_json:
        for finding in carried.findings.ordered:
            say_json(finding.as_json())
    elif output is None:
        say(*text.removesuffix("\n").split("\n"))
    else:
        say(*_list(carried), err=True)
    sys.exit(0 if carried.findings.complete else 1)


def _with_list(carried: Carried, folder: Path) -> str:
    """The configuration, with the list as a comment at its end."""
    lines = [f"# {line}".rstrip() for line in _list(carried)]
    return f"# From the Postfix configuration in {absolute(folder)}\n\n{carried.text}\n" + "\n".join(lines) + "\n"


def _list(carried: Carried) -> list[str]:
    lines = list[str]()
    for kind, head in HEADS.items():
        found = carried.findings.of(kind)  # type: ignore[arg-type]
        lines += [head, *(f"- {finding}" for finding in found), ""] if found else []
    return lines[:-1] or ["All is carried."]


def _unknown(name: str) -> None:
    """What is known of the MX of a host without the DNS."""


def _nameservers(read: Configuration) -> list[str]:
    return loaded(read, ANY_LISTENER).delivery.nameservers


def _by_dns(nameservers: list[str], name: str) -> list[str] | None:
    """The MX of a name, [] where it has none; None where the DNS does not answer, or says that it takes no mail."""
    import asyncio

    from relaymta.dns import DnsFailure, NoData, NoSuchName, Resolver

    async def ask() -> list[str] | None:
        resolver = Resolver(nameservers)
        try:
            found, _ = await resolver.mx(name)
            return [host for _, host in sorted(found) if host.strip(".")] or None
        except (NoData, NoSuchName):
            return []
        except DnsFailure:
            return None
        finally:
            await resolver.close()

    return asyncio.run(ask())


def _write(carried: Carried, output: Path | None, text: str, force: bool) -> None:
    """Write the files: all of them, or none where one is there already."""
    beside = carried.beside
    files = [(Path(path), content, 0o644) for path, content in beside.files.items() if beside.has_folder]
    files += [(Path(path), f"{password}\n", 0o600) for path, password in beside.passwords.items() if beside.has_secrets]
    files += [(output.absolute(), text, 0o644)] if output is not None else []
    there = [path for path, _, _ in files if os.path.lexists(path)]
    if there and not force:
        fail(73, "\n".join(f"{path} exists: --force overwrites it" for path in there))
    for path, content, mode in files:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if mode == 0o600 else 0o755)
            _replace(path, content, mode | 0o111 * content.startswith("#!"))
        except OSError as error:
            fail(73, f"{path}: {error.strerror}")


def _replace(path: Path, content: str, mode: int) -> None:
    """Write a file under another name, and give it its own when it is complete."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
