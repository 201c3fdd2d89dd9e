"""Where consumers are in the journals: a small file for each consumer and shard."""

import json
import os
from pathlib import Path
from typing import Any

from relaymta.disk.folders import make_folder
from relaymta.disk.journal import End

__all__ = ["load", "load_json", "save", "save_json"]


def load(path: Path) -> End | None:
    """The place in a file; None: there is none yet, or (after a power cut) none that can be read: `path.exists()` tells."""
    found = load_json(path)
    try:
        return End(*map(int, found["place"])) if found is not None else None
    except (KeyError, TypeError, ValueError):
        return None


def save(path: Path, place: End) -> None:
    """Write a place: another process sees the one before or this one. It may be lost in a power cut, and events are sent again
    then; a sync for each would cost mail its own. OSError."""
    save_json(path, {"place": list(place)})


def load_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None: there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def save_json(path: Path, found: dict[str, Any]) -> None:
    """As of `save`."""
    make_folder(path.parent)
    other = path.with_name(f".{path.name}.new")
    other.write_text(json.dumps(found))
    os.replace(other, path)
