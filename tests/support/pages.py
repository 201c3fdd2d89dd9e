"""What a page of docs/ has in its indented blocks: tables of a configuration, and sessions of a shell, which are run."""

import contextlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.daemon import wait_for

__all__ = ["Said", "Shell", "blocks", "commands", "is_said", "section", "shell", "tables"]

DOCS = Path(__file__).parents[2] / "docs"
ID = re.compile(r"\b1[0-9A-HJKMNP-TV-Z]{12}\b")
END = "\x01end\n"  # behind the output of a command
# What another run has otherwise: how long ago, how long it took, sizes, points in time, space between columns.
OTHERWISE = re.compile(
    r"(?:\d+m)?\d+s ago|just now|>?\d+(?:\.\d+)? m?s\b|\d+ B|\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ|(?<=number )\d+|b=\w+| +"
)


class Said(NamedTuple):
    """A command of a page, and what it says there."""

    command: str
    output: str


def section(page: str, title: str) -> str:
    """The text of a section of a page, up to the next one."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, f"{page} has no section {title!r}"
    return found[1]


def blocks(text: str) -> list[str]:
    """The indented blocks without their indent; an empty line does not end one."""
    found, block = list[str](), list[str]()
    for line in [*text.split("\n"), "x"]:
        if line.startswith("    ") or (not line and block):
            block.append(line[4:])
        elif block:
            found.append("\n".join(block).rstrip() + "\n")
            block = []
    return found


def tables(text: str) -> str:
    """All [[filter]] tables of a section, as a configuration has them. A session that follows in a block is none of it."""
    every = (re.search(r"^\[\[filter\]\]\n.*?(?=^\$ |\Z)", block, re.M | re.S) for block in blocks(text))
    found = "\n".join(block[0] for block in every if block is not None)
    tomllib.loads(found)
    return found


def commands(text: str) -> list[Said]:
    """The commands of a section, in their order: lines that begin with "$ " in its blocks, a here document with what is in it."""
    found = []
    for block in blocks(text):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            if here := re.search(r"<<'(\w+)'$", command):
                body, _, output = output.partition(f"\n{here[1]}\n")
                command = f"{command}\n{body}\n{here[1]}"
            found.append(Said(command, output.rstrip("\n")))
    return found


class Shell:
    """bash, which has `relaymta`. `known`: the ids of a page, and those that they are here."""

    def __init__(self, process: subprocess.Popen[str], here: Mapping[str, str]) -> None:
        self.known: dict[str, str] = {}
        self._process = process
        self._here = here

    def run(self, said: Said) -> None:
        """Run a command of a page with what this machine has in place of what the page has (`here`), until it says what the page
        says: one that only looks may be too early, and is run again."""
        command = said.command
        for there, here in {**self._here, **self.known}.items():
            command = command.replace(there, here)
        looks = " list" in command or command.startswith(("jq ", "curl ", "grep ", "relaymta message history"))
        output = ""

        def matches() -> bool:
            nonlocal output
            output = self._output(command)
            return is_said(said.output, output)

        if looks:
            with contextlib.suppress(AssertionError):
                wait_for(matches, what=command)
        else:
            matches()
        assert is_said(said.output, output), f"$ {said.command}\n{output}\nbut the page has\n{said.output}"
        self.known |= dict(zip(ID.findall(said.output), ID.findall(output), strict=True))

    def _output(self, command: str) -> str:
        """What a command says, on both outputs, as it would be said there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{{ {command}\n}} 2>&1\necho $'{END[:-1]}'\n")
        self._process.stdin.flush()
        lines = list[str]()
        for line in iter(self._process.stdout.readline, END):
            assert line, "the shell has ended"
            lines.append(line)
        text = "".join(lines)
        for there, here in self._here.items():
            text = text.replace(here, there)
        return text.rstrip("\n")


def is_said(page: str, here: str) -> bool:
    """Whether what is said here is what the page has; "..." there stands for anything."""
    expression = re.escape(_plain(page)).replace(r"\.\.\.", ".*")
    return re.fullmatch(expression, _plain(here), re.S) is not None


def _plain(text: str) -> str:
    """Without what is otherwise each time."""
    return OTHERWISE.sub(lambda found: " " if found[0].isspace() else "#", ID.sub("ID", text))


@contextlib.contextmanager
def shell(folder: Path, config: Path, here: Mapping[str, str]) -> Iterator[Shell]:
    """One in `folder`, where this is the configuration, with what is `here` for what a page has (of which none is in another)."""
    program = folder / "bin/relaymta"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom relaymta.cli import main\nmain()\n")
    program.chmod(0o755)
    root = Path(__file__).parents[2]
    variables = {"PATH": f"{program.parent}:{os.environ['PATH']}", "RELAYMTA_CONFIG": str(config), "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        ["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | variables
    )
    try:
        yield Shell(process, here)
    finally:
        process.kill()
        process.communicate()
