"""What of a configuration could not be carried, and what to do instead."""

import re
from typing import Any, Literal, NamedTuple

from relaymta.cli.postfix.lines import Place

__all__ = ["Finding", "Findings", "Kind"]

# way: mail would go, or be changed, otherwise; gap: not carried; note: nothing is missing, but it is otherwise here.
Kind = Literal["way", "gap", "note"]
KINDS: tuple[Kind, ...] = ("way", "gap", "note")


_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # no comment of TOML may have these


class Finding(NamedTuple):
    """Something that could not be carried. `what`: as it is written there; `instead`: what to do."""

    kind: Kind
    place: Place
    what: str
    instead: str

    def __str__(self) -> str:
        return _UNSHOWN.sub(" ", f"{self.place}: {self.what}: {self.instead}")

    def as_json(self) -> dict[str, Any]:
        """As `--json` writes it."""
        return {
            "kind": self.kind, "file": self.place.path, "line": self.place.line, "what": self.what, "instead": self.instead
        }  # fmt: skip


class Findings:
    """All of them, each once."""

    def __init__(self) -> None:
        self._found: dict[Finding, None] = {}

    def add(self, kind: Kind, place: Place, what: str, instead: str) -> None:
        """Add one."""
        self._found[Finding(kind, place, " ".join(what.split()), instead)] = None

    def way(self, place: Place, what: str, instead: str) -> None:
        """Add what changes the way of mail."""
        self.add("way", place, what, instead)

    def gap(self, place: Place, what: str, instead: str) -> None:
        """Add what is not carried."""
        self.add("gap", place, what, instead)

    def note(self, place: Place, what: str, instead: str) -> None:
        """Add what is otherwise here, and needs nothing."""
        self.add("note", place, what, instead)

    def of(self, kind: Kind) -> list[Finding]:
        """Those of a kind, by file and line."""
        return sorted((one for one in self._found if one.kind == kind), key=lambda one: (one.place, one.what))

    @property
    def ordered(self) -> list[Finding]:
        """All, those that matter most first."""
        return [one for kind in KINDS for one in self.of(kind)]

    @property
    def complete(self) -> bool:
        """Whether all was carried."""
        return not self.of("way") and not self.of("gap")
