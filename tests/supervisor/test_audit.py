"""The log of changes: each is told once, whatever becomes of it, without secrets."""

import asyncio
import json
from typing import Any

import pytest

from relaymta.control import Answer
from relaymta.control.requests import REQUESTS
from relaymta.errors import NoSuch, RelayError
from relaymta.ident import format_id
from relaymta.log import EVENTS
from relaymta.supervisor.audit import PARTS, Audit


class Noted:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def event(self, name: str, **fields: Any) -> None:
        assert name == "audit" and set(EVENTS["audit"]) - {"ids"} <= fields.keys() <= set(EVENTS["audit"])
        self.records.append(fields)


def answering(value: Any = None, missing: tuple[int, ...] = (), error: Exception | None = None):
    async def ask(op: str, args: dict[str, Any]) -> Answer:
        if error is not None:
            raise error
        return Answer(value, list(missing))

    return ask


async def told(ask, op: str, args: dict[str, Any], by=(), uid: int = 0) -> list[dict[str, Any]]:
    noted = Noted()
    try:
        await Audit(lambda: noted)(ask, uid, op, args, list(by))  # type: ignore[arg-type,return-value]
    except RelayError:
        pass
    return noted.records


CHANGE = {"shard": 0, "verb": "hold", "idents": [5, 6, 7], "word": ""}


async def test_a_change_is_told_with_what_and_how_many():
    (row,) = await told(answering([2, 1]), "change", CHANGE)
    assert row == {"who": "root (uid 0)", "where": "control socket", "action": "queue hold", "about": "", "count": 2,
                   "result": "done", "ids": [format_id(one) for one in (5, 6, 7)]}  # fmt: skip
    (row,) = await told(answering([9, 2]), "move", {"chosen": {"route": "a", "held": False}, "word": "b", "dry_run": False})
    assert (row["action"], row["about"], row["count"]) == ("queue reroute", "route=a word=b", 7)
    (row,) = await told(answering(None, (1, 3)), "change", CHANGE | {"verb": "release quarantined"})
    assert (row["action"], row["count"], row["result"]) == ("quarantine release", 0, "workers 1, 3 do not answer")
    (row,) = await told(answering(error=NoSuch("site", "x")), "suspend", {"site": "x", "about": "", "seconds": 5, "reason": "r"})
    assert (row["action"], row["about"], row["result"]) == ("site suspend", "site=x seconds=5 reason=r", "no such site: x")


async def test_what_reads_and_a_dry_run_are_not_told():
    assert await told(answering([]), "summary", {}) == await told(answering([1, 0]), "move", {"dry_run": True}) == []
    assert await told(answering(error=RelayError("x")), "nonsense", {}) == []


@pytest.mark.parametrize("op", [name for name, row in REQUESTS.items() if row.changes and name not in PARTS])
async def test_no_secret_and_no_mail_is_told_and_any_arguments_are(op):
    args = {"address": "a@b.example", "password": "S3CRET", "changes": {"secret": "S3CRET"}, "messages": [[[], [], 0, b"S3CRET"]],
            "part": "S3CRET", "text": b"S3CRET", "user": {"secret": "S3CRET"}, "key": b"S3CRET", "idents": ["x", -1, None],
            "chosen": 5, "verb": 7}  # fmt: skip
    (row,) = await told(answering(), op, args)
    assert "S3CRET" not in json.dumps(row) and "address=a@b.example" in row["about"] and row["action"]


async def test_only_the_relay_and_root_say_who_asks_them():
    (row,) = await told(answering([1, 0]), "change", CHANGE, ("token n", "192.0.2.1"))
    assert (row["who"], row["where"], row["result"]) == ("token n", "192.0.2.1", "done")
    for by, uid in ((("root", "here"), 65534), (("root",), 0), (("a", "b", "c"), 0)):
        (row,) = await told(answering([1, 0]), "change", CHANGE, by, uid)
        assert row["who"] != "root" and "only the relay itself" in row["result"] and row["count"] == 0


async def test_what_is_under_way_at_the_end_is_told_as_interrupted():
    noted, begun = Noted(), asyncio.Event()

    async def ask(op: str, args: dict[str, Any]) -> Answer:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    audit = Audit(lambda: noted)  # type: ignore[arg-type,return-value]
    task = asyncio.create_task(audit(ask, 0, "change", CHANGE, []))
    await begun.wait()
    await audit.end()
    assert task.cancelled() and [row["result"] for row in noted.records] == ["interrupted"]
