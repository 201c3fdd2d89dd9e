"""`relaymta assets`: writes the files for operators that come with the program."""

import os
import sys
from pathlib import Path

import click

import relaymta
from relaymta.cli.console import say
from relaymta.cli.options import Configuration, absolute, configured, fail, folders

__all__ = ["assets"]

FOLDERS = ("config", "grafana")  # as in setup.py
PROGRAM = "/usr/bin/relaymta"  # as the units name it


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path), shell_complete=folders)
@click.option("--force", is_flag=True, help="Overwrite files that are there and are different.")
@configured
def assets(read: Configuration, folder: Path, force: bool) -> None:
    """Write the units, the reference configuration and the dashboard to a folder. The units start the program that this command
    is of. Files that are there already, and are different, are named, and nothing is written (exit status 73)."""
    found = {folder / name: content for name, content in _contents().items()}
    try:
        different = [path for path, content in found.items() if path.exists() and path.read_bytes() != content]
        if different and not force:
            fail(73, "\n".join(f"{absolute(path)} exists and is different: --force overwrites it" for path in different))
        for path, content in found.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            say(absolute(path))
    except OSError as error:
        fail(73, f"{absolute(error.filename or folder)}: {error.strerror or error}")


def _contents() -> dict[str, bytes]:
    """The files, by their path below the folder."""
    package = Path(relaymta.__file__).parent
    here = package / "assets" if (package / "assets").is_dir() else package.parent  # a source tree has them beside the package
    paths = sorted(path for name in FOLDERS for path in (here / name).rglob("*") if path.is_file())
    program = _program().encode()
    return {
        str(path.relative_to(here)): path.read_bytes().replace(f"={PROGRAM} ".encode(), b"=" + program + b" ")
        if path.suffix == ".service"
        else path.read_bytes()
        for path in paths
    }


def _program() -> str:
    """The command that starts this program, for systemd."""
    script = Path(sys.argv[0]).absolute()
    words = (
        [str(script)] if script.name == "relaymta" and os.access(script, os.X_OK) else [sys.executable, "-I", "-m", "relaymta"]
    )
    return " ".join('"' + word.replace("%", "%%") + '"' if set(word) & set(" %'") else word for word in words)
