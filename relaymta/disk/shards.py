"""The folders of shards, `shard-N`: in the spool those of the queue, in its `mail` those of the mailboxes."""

from pathlib import Path

__all__ = ["MAIL", "shard_numbers"]

MAIL = "mail"  # the mailboxes' folder in the spool


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards that have a folder here, in order."""
    found = (path.name.removeprefix("shard-") for path in folder.glob("shard-*"))
    return sorted(int(text) for text in found if text.isdigit())
