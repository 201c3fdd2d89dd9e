"""`relaymta policy test`: hooks in Python are called as a worker calls them, with cases from files."""

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from relaymta.cli.console import say, say_json
from relaymta.cli.filter import as_user
from relaymta.cli.options import Configuration, config_with, fail
from relaymta.cli.peer import no_such
from relaymta.config.loading import load_cases
from relaymta.errors import ConfigError
from relaymta.filter.hookframes import AFTERWARDS, CLIENT, ENVELOPE, Reply
from relaymta.filter.hooks import Hooks, lent
from relaymta.filter.judgement import FilterFailure, Mail, Text
from relaymta.filter.means import HookMeans
from relaymta.proto.header import header_end
from relaymta.proto.printable import printable

if TYPE_CHECKING:
    from collections.abc import Collection

    from relaymta.config import Filter as Settings
    from relaymta.config.cases import Case

__all__ = ["Chosen", "chosen", "run"]

MOST = 64 << 20  # octets of a message
FAILED = 1
BROKEN = 78
_BARE_LF = re.compile(rb"(?<!\r)\n")


class Chosen(NamedTuple):
    """What is tested: a file of hooks, and what a call of it may take. `routes`: that there are, None: any."""

    file: str
    seconds: float
    memory: int
    routes: "Collection[str] | None"


class _Any:
    """Every name of a route."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Got(NamedTuple):
    """What a hook has answered."""

    word: str
    reason: str = ""
    reply: str = ""
    changes: list[Any] = []  # noqa: RUF012 (never changed)


def chosen(read: Configuration, file: Path | None, only: str) -> Chosen:
    """What is meant: a file, or a filter of the configuration. Ends the program where that is not clear."""
    if file is not None:
        return Chosen(str(file.absolute()), 1.0, 512 << 20, None)
    config = config_with(read, "filter")
    there: dict[str, Settings] = {one.name: one for one in config.filter if one.type == "python"}
    if not there:
        fail(BROKEN, 'there is no [[filter]] of type "python" in the configuration: add one, or give --file')
    if only and only not in there:
        fail(64, f"--only: {no_such('filter', only, there)}")
    if not only and len(there) > 1:
        fail(64, f"which filter? Give --only: {', '.join(there)}")
    one = there[only] if only else next(iter(there.values()))
    as_user(config)
    return Chosen(one.file, one.seconds, one.memory, {route.label for route in config.route})


def run(what: Chosen, folder: Path, as_json: bool) -> None:
    """Call the hooks with all cases of a folder, and say what does not answer as it should. Ends the program: 0, 1, or 78 where
    the hooks, or the cases, cannot be read."""
    cases = _cases(folder)
    if not cases:
        fail(BROKEN, f"{folder}: there are no cases in it: no *.toml with a [[case]]")
    rows = asyncio.run(_tested(what, cases))
    wrong = 0
    for row in rows:
        wrong += not row["passed"]
        if as_json:
            say_json(row)
        elif not row["passed"]:
            say(f"{row['file']}: {row['case']}: {row['why']}")
            for line in row["log"]:
                say(f"  {line}")
    if not as_json:
        good, some = len(rows) - wrong, "case" if len(rows) == 1 else "cases"
        say(f"{len(rows)} {some}: {good} {'passes' if good == 1 else 'pass'}, {wrong} {'fails' if wrong == 1 else 'fail'}")
    if wrong:
        sys.exit(FAILED)


def _cases(folder: Path) -> "list[tuple[Path, Case]]":
    """All cases, in the order of the files' names."""
    found, problems = [], []
    for path in sorted(folder.rglob("*.toml")):
        try:
            found += [(path, case) for case in load_cases(path)]
        except ConfigError as error:
            problems += error.problems
    if problems:
        fail(BROKEN, "\n".join(problems))
    return found


async def _tested(what: Chosen, cases: "list[tuple[Path, Case]]") -> list[dict[str, Any]]:
    told: list[str] = []
    routes: Any = _Any() if what.routes is None else what.routes
    means = HookMeans(routes=lambda: routes, log=told.append)
    hooks = Hooks(what.file, what.seconds, what.memory, False, means, "test", told.append)
    try:
        try:
            await hooks.probe()
        except FilterFailure as failure:
            fail(BROKEN, str(failure))
        rows = []
        for path, case in cases:
            told.clear()
            hooks.told_at.clear()
            got = await _got(hooks, path, case)
            why = _wrong(case, got)
            about = {"file": str(path), "case": case.name, "event": case.event, "passed": not why, "why": why}
            rows.append(about | {"log": [] if not why else [printable(line) for text in told for line in text.split("\\n")]})
        return rows
    finally:
        hooks.stop()
        await asyncio.sleep(0.05)  # for the end of its processes to be noticed


async def _got(hooks: Hooks, path: Path, case: "Case") -> _Got:
    """Call a hook."""
    version = hooks.pool.version
    if case.event not in version.hooks:
        return _Got("failed", f"there is no {case.event} in {hooks.path}")
    descriptor = -1
    arguments, mail = _arguments(path, case)
    try:
        if mail is not None and case.event in version.bodies:
            descriptor, part = await lent(mail)
            arguments = [*arguments, part]
        found = await hooks.call(version, case.event, arguments, descriptor)
        return _of(hooks, case.event, found, b"" if mail is None else mail.text.head)
    except FilterFailure as failure:
        return _Got("failed", str(failure))
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _of(hooks: Hooks, event: str, found: Reply, header: bytes) -> _Got:
    if found.word == "route":
        return _Got("route", hooks.route(found))
    if found.word in ("none", "raised"):
        return _Got(found.word, printable(found.place))
    answer = hooks.answer(event, found, header)
    changes = [
        {key: value for key, value in msgspec.to_builtins(one).items() if value not in (None, False) or key == "address"}
        for one in found.changes
    ]
    return _Got(answer.word, answer.reason, answer.reply.decode().strip() if answer.reply else answer.note, changes)


def _arguments(path: Path, case: "Case") -> tuple[list[Any], Mail | None]:
    """What the hook is called with, and the message, where it is shown one."""
    if case.event in AFTERWARDS:
        return [case.attempt.model_dump()], None
    client = tuple(case.client.model_dump().values())
    if case.event in CLIENT:
        return [client], None
    one = case.envelope
    arguments: list[Any] = [client, (one.sender, one.recipients, one.parameters, one.size)]
    if case.event in ENVELOPE:
        return [*arguments, *([case.recipient] if case.event == "on_rcpt" else [])], None
    data = _message(path, case)
    end = header_end(data)
    text = Text(data[:end] or b"\r\n", data[end:])
    mail = Mail("test", one.sender, one.recipients, case.client.address, case.client.helo, "", "", text)
    return [*arguments, ("test", case.dmarc, text.head, text.size)], mail


def _message(path: Path, case: "Case") -> bytes:
    if not case.message:
        header = "".join(f"{field}\n" for field in case.header)
        return _BARE_LF.sub(b"\r\n", f"{header}\n{case.body}".encode())
    file = path.parent / case.message
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST + 1)
    except OSError as error:
        fail(BROKEN, f"{path}: message: {file}: {error.strerror}")
    if len(data) > MOST:
        fail(BROKEN, f"{path}: message: {file}: it has more than {MOST >> 20} MB")
    return _BARE_LF.sub(b"\r\n", data)


def _wrong(case: "Case", got: _Got) -> str:
    """What is not as it should be, or ""."""
    if got.word != case.expect:
        return f"expected {case.expect}, got {got.word}" + (f" ({got.reason})" if got.reason else "")
    wanted = {"reason": case.reason, "route": case.route, "reply": case.reply, "changes": case.changes}
    there = {"reason": got.reason, "route": got.reason, "reply": got.reply, "changes": got.changes}
    for key, value in wanted.items():
        if value is not None and value != there[key]:
            return f"expected {key} {value!r}, got {there[key]!r}"
    return ""
