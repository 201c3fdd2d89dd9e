"""What operators change, in the log: who, from where, what, how many, and what came of it. Every request that changes something
passes here, whoever makes it; also one that fails, is refused, or whose asker has gone."""

import asyncio
import os
import pwd
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from relaymta.control import Answer, sentence
from relaymta.control.requests import REQUESTS
from relaymta.errors import RelayError
from relaymta.ident import format_id
from relaymta.log import Log

__all__ = ["Audit"]

ROWS_TOLD = 20  # rows of a request that are told
LONGEST = 2000  # characters of what a request is about
NAME_SECONDS = 2.0  # for the name of a user, which may come over the network
# Not told: secrets, and what has its own place in the record or is too long for it.
HIDDEN = {
    "password",
    "secret",
    "text",
    "messages",
    "part",
    "data",
    "record",
    "user",
    "key",
    "idents",
    "shard",
    "changes",
    "verb",
    "dry_run",
    "rows",
}
# The verbs of the command line behind requests whose name is another.
NAMES = {
    "move": "queue reroute", "suspend": "site suspend", "policy": "policy set", "clear": "shaping clear",
    "learned": "filter learn", "exported": "queue export", "import_message": "queue import",
    "abuse_clear": "abuse clear", "disconnect": "view disconnect", "suppression_put": "suppression add",
}  # fmt: skip
PARTS = {"import_data"}  # of a change that is told by another request


class Audit:
    """The changes that are under way."""

    def __init__(self, log: Callable[[], Log]) -> None:
        self._log = log
        self._running: set[asyncio.Task[Any]] = set()

    async def __call__(
        self, ask: Callable[[str, dict[str, Any]], Awaitable[Answer]], uid: int, op: str, args: dict[str, Any], by: list[str]
    ) -> Answer:
        """The answer of `ask` to a request. `by`: who it is made for, and from where, which only the relay itself may say
        ([]: the user `uid` at the control socket). Errors as of `ask`."""
        row = REQUESTS.get(op)
        if row is None or not row.changes or op in PARTS or args.get("dry_run") is True:
            return await ask(op, args)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        who, where, result, value = await _named(uid), "control socket", "interrupted", None
        try:
            if by:
                if len(by) != 2 or uid not in (0, os.geteuid()):
                    raise RelayError("only the relay itself may ask on behalf of others")
                who, where = by
            found = await ask(op, args)
            value, result = found.value, _missing(found.missing)
            return found
        except asyncio.CancelledError:
            raise
        except Exception as error:
            result = sentence(error)
            raise
        finally:
            self._running.discard(task)
            self._note(who, where, op, args, value, result)

    def _note(self, who: str, where: str, op: str, args: dict[str, Any], value: Any, result: str) -> None:
        listed = [format_id(one) for one in _idents(op, args) if isinstance(one, int) and 0 <= one < 1 << 63]
        more = {"ids": listed} if listed else {}
        self._log().event(
            "audit",
            who=who,
            where=where,
            action=_action(op, args),
            about=_about(args),
            count=_count(op, value),
            result=result,
            **more,
        )

    async def end(self) -> None:
        """Cancel what is under way, so that it is told."""
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@cache
def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


async def _named(uid: int) -> str:
    try:
        async with asyncio.timeout(NAME_SECONDS):
            return await asyncio.to_thread(_name, uid)
    except TimeoutError:
        return f"uid {uid}"


def _missing(workers: list[int]) -> str:
    if not workers:
        return "done"
    numbers = ", ".join(map(str, sorted(workers)))
    return f"worker {numbers} does not answer" if len(workers) == 1 else f"workers {numbers} do not answer"


def _action(op: str, args: dict[str, Any]) -> str:
    if op == "change":
        verb, _, where = str(args.get("verb"))[:50].partition(" ")
        return f"quarantine {verb}" if where else f"queue {verb}"
    if op == "clear" and args.get("resume") is True:
        return "site resume"
    return NAMES.get(op, op.replace("_", " "))


def _idents(op: str, args: dict[str, Any]) -> list[Any]:
    """What a request calls the ids of messages."""
    found = args.get("messages" if op == "exported" else "idents")
    if not isinstance(found, list):
        return []
    return [one[0] for one in found if isinstance(one, (list, tuple)) and one] if op == "exported" else found


def _about(args: dict[str, Any]) -> str:
    """The arguments as `name=value`, those of a filter among them."""
    chosen = args.get("chosen")
    flat = {**(chosen if isinstance(chosen, dict) else {}), **args}
    if isinstance(rows := args.get("rows"), list):  # of the suppression list
        flat["addresses"] = [one.get("address") for one in rows[:ROWS_TOLD] if isinstance(one, dict)]
    shown = [
        f"{name}={value}" for name, value in flat.items()
        if name not in HIDDEN | {"chosen"} and value not in ("", 0, [], None) and not isinstance(value, bytes)
    ]  # fmt: skip
    return " ".join(shown)[:LONGEST]


def _count(op: str, value: Any) -> int:
    """How many messages, sites, sessions ... were changed."""
    if op in ("change", "move") and isinstance(value, (list, tuple)) and len(value) == 2:
        return int(value[0]) if op == "change" else int(value[0]) - int(value[1])
    if op == "suppression_put" and isinstance(value, dict):
        return int(value["added"]) + int(value["replaced"])
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return len(value) if isinstance(value, list) else 1 if value is not None else 0
