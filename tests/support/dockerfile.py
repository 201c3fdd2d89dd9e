"""The Dockerfile, read as it is."""

import json
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Stage", "health_check", "stages"]

ROOT = Path(__file__).parents[2]


class Stage(NamedTuple):
    """A stage: its instructions in their order, (word, the rest)."""

    rows: list[tuple[str, str]]

    def every(self, word: str) -> list[str]:
        """What follows each instruction of this name."""
        return [rest for found, rest in self.rows if found == word]

    def one(self, word: str) -> str:
        """What follows the only instruction of this name."""
        (found,) = self.every(word)
        return found


def stages() -> list[Stage]:
    """The stages; the last one is the image."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append(Stage([]))
        found[-1].rows.append((word, " ".join(rest.split()) if word != "HEALTHCHECK" else rest))
    return found


def health_check(image: Stage) -> list[str]:
    """The command of the health check."""
    options, _, command = image.one("HEALTHCHECK").partition("CMD ")
    assert all(option.startswith("--") for option in options.split())
    found: list[str] = json.loads(command)
    return found
