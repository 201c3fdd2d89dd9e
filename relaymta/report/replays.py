"""Replays: events of before, sent to a webhook once more, beside what happens now. One is a file that says of what it is, and the
places of its streams; it goes on after a restart, and is removed at its end."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from relaymta.disk.journal import End
from relaymta.queue.journal import stamp
from relaymta.report import places

__all__ = ["Replay", "begun", "load_all", "new"]

FOLDER = "replays"


class Replay(NamedTuple):
    """`since`, `until`: when events happened, ms UTC, `until` 0: up to its beginning; `kinds`: which, none: all that the webhook
    wants; `shards`: by number, where it begins and ends; `began`: when, ms UTC: from then on the time counts after which
    events are dropped that are not taken."""

    name: str
    since: int
    until: int
    kinds: tuple[str, ...]
    shards: dict[int, tuple[End, End]]
    began: int

    def only(self) -> Callable[[dict[str, Any]], bool]:
        """Whether an event belongs to it."""
        since, until, kinds = stamp(self.since), stamp(self.until) if self.until else "", frozenset(self.kinds)

        def belongs(event: dict[str, Any]) -> bool:
            moment: str = event["time"]
            return since <= moment and (not until or moment < until) and (not kinds or event["event"] in kinds)

        return belongs

    def place_file(self, folder: Path, shard: int) -> Path:
        """The file of the place of its stream."""
        return folder / FOLDER / self.name / f"shard-{shard}"

    def remove(self, folder: Path) -> None:
        """It has ended."""
        own = folder / FOLDER / self.name
        for path in own.glob("*"):
            path.unlink(missing_ok=True)
        own.rmdir()


def new(since: int, until: int, kinds: tuple[str, ...], shards: dict[int, tuple[End, End]]) -> Replay:
    """A replay that begins now; its name sorts by time."""
    now = time.time_ns() // 1_000_000
    return Replay(f"{now:d}", since, until, kinds, shards, now)


def begun(folder: Path, replay: Replay) -> None:
    """Keep a replay of the webhook with this folder. OSError."""
    for shard, (first, _) in replay.shards.items():
        places.save(replay.place_file(folder, shard), first)
    shards = {str(shard): [list(first), list(last)] for shard, (first, last) in replay.shards.items()}
    found = {"since": replay.since, "until": replay.until, "kinds": list(replay.kinds), "shards": shards, "began": replay.began}
    places.save_json(folder / FOLDER / replay.name / "replay", found)


def load_all(folder: Path) -> list[Replay]:
    """The replays of a webhook that have not ended."""
    found = []
    for path in sorted((folder / FOLDER).glob("*/replay")):
        kept = places.load_json(path)
        if kept is not None:
            shards = {int(shard): (End(*first), End(*last)) for shard, (first, last) in kept["shards"].items()}
            found.append(
                Replay(path.parent.name, kept["since"], kept["until"], tuple(kept["kinds"]), shards, kept.get("began", 0))
            )
    return found
