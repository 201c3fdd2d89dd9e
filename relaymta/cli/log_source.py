"""Where the log of a configuration is read: its file, systemd's journal, or the history."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from relaymta.cli.console import say
from relaymta.cli.options import absolute, fail
from relaymta.cli.peer import process_of
from relaymta.cli.tail import Files
from relaymta.log import USERS
from relaymta.log_forms import syslog_heads

if TYPE_CHECKING:
    from relaymta.config import Config

__all__ = ["Journal", "Source", "source_of"]

UNIT = "relaymta.service"


class Source(Protocol):
    """Where the log is read."""

    def last(self, count: int, wanted: Callable[[bytes], float | None]) -> list[bytes]:
        """The last lines that are wanted, the newest last. `wanted(line)`: its time, or None."""

    def follow(self) -> Iterator[Iterable[bytes]]:
        """What is added after that, look by look."""


def source_of(config: "Config", unit: str) -> tuple[Source, bool]:
    """The log of this configuration, or (`unit`) the journal of a unit, and whether it is the history instead; ends the program
    where there is none. OSError."""
    if not unit and config.log.file != "-":
        path = Path(config.log.file)
        if not path.exists():
            say(f"there is no {absolute(path)} yet", err=True)
        return Files(lambda: [[path]]), False
    unit = unit or _unit(config.control_path)
    if unit:
        if shutil.which("journalctl") is None:
            fail(69, "journalctl is not installed")
        return Journal(unit), False
    folder = Path(config.spool) / "history"
    if not folder.is_dir():
        fail(1, f"no log to read: log.file is standard error, that is no journal, and there is no {absolute(folder)}")
    say("the log is on standard error: these are the events of the history", err=True)
    return Files(lambda: _history(folder)), True


def _history(folder: Path) -> list[list[Path]]:
    """The files of each process, in their order."""
    found: dict[tuple[Path, str], list[tuple[int, Path]]] = {}
    for place in (folder, folder / USERS):
        for name in os.listdir(place) if place.is_dir() else ():
            if match := re.fullmatch(r"(\d+)\.(\d+)\.jsonl", name):
                found.setdefault((place, match[1]), []).append((int(match[2]), place / name))
    return [[path for _, path in sorted(paths)] for paths in found.values()]


def _unit(control: Path) -> str:
    """The unit in whose journal the log is: that of the running daemon, or, without one, UNIT where there is such a unit; "": it
    is in none."""
    if shutil.which("journalctl") is None:
        return ""
    pid = process_of(control)
    if not pid:
        if shutil.which("systemctl") is None or not os.path.isdir("/run/systemd/system"):
            return ""
        done = subprocess.run(
            ["systemctl", "show", "--property=LoadState", "--value", UNIT], capture_output=True, text=True, check=False
        )
        return UNIT if done.stdout.strip() == "loaded" else ""
    try:
        if not os.readlink(f"/proc/{pid}/fd/2").startswith("socket:"):
            return ""
    except OSError:  # it is not ours to see
        pass
    try:
        group = Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
    except (OSError, IndexError):
        return ""
    name = group.rpartition("/")[2]
    return name if name.endswith(".service") else ""


class Journal:
    """The lines of a unit of systemd in its journal; those in the form of Postfix with the time and host that a file has."""

    def __init__(self, unit: str) -> None:
        self._command = [
            "journalctl",
            "--unit",
            unit,
            "--output=json",
            "--output-fields=MESSAGE",
            "--all",
            "--quiet",
            "--no-pager",
        ]
        self._cursor = ""
        self._head = syslog_heads()

    def last(self, count: int, wanted: Callable[[bytes], float | None]) -> list[bytes]:
        """As of Source."""
        found: list[bytes] = []
        for cursor, line in self._entries("--reverse", *(() if count else ("--lines=1",))):
            self._cursor = self._cursor or cursor
            if len(found) == count:
                break
            if wanted(line) is not None:
                found.append(line)
        return found[::-1]

    def follow(self) -> Iterator[Iterable[bytes]]:
        """As of Source."""
        since = ["--lines=0"] if not self._cursor else [f"--after-cursor={self._cursor}", "--no-tail"]
        for _, line in self._entries("--follow", *since):
            yield [line]

    def _entries(self, *options: str) -> Iterator[tuple[str, bytes]]:
        """Of each entry the place and the line."""
        process = subprocess.Popen([*self._command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            for text in process.stdout:
                try:
                    entry = json.loads(text)
                except ValueError:
                    continue
                message = entry.get("MESSAGE", "")
                line = message.encode() if isinstance(message, str) else bytes(message or b"")
                if line.startswith(b"postfix/"):
                    line = self._head(int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6).encode() + line
                yield entry.get("__CURSOR", ""), line
            if process.wait():
                fail(74, f"journalctl has ended with status {process.returncode}")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
