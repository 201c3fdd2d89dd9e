"""The requests about the list (control/requests.py) in its terms, and the answers as they are sent: whoever answers them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from relaymta.control.requests import Suppression
from relaymta.errors import RelayError
from relaymta.proto.suppression import listed, listed_application
from relaymta.suppression.entries import Changed, Counts, Entry, Page, row_of

__all__ = ["address_of", "counted", "done", "entries_of", "rows_of"]


def address_of(text: str) -> str:
    """An address of a request as it is in the list. RelayError: it is none."""
    try:
        return listed(text)
    except ValueError as error:
        raise RelayError(str(error)) from None


def _application_of(text: str) -> str:
    try:
        return listed_application(text)
    except ValueError as error:
        raise RelayError(str(error)) from None


def entries_of(rows: Sequence[Suppression], by: str, lasting: Mapping[str, int]) -> list[Entry]:
    """The entries that a request of `by` wants to add. `lasting`: for how many seconds, by reason, where it does not say that; 0,
    or none: for ever. RelayError: an address is none, or the name of an application too long."""
    now = int(time.time())
    found = []
    for row in rows:
        since, seconds = row.since or now, lasting.get(row.reason, 0)
        until = row.until if row.until is not None else since + seconds if seconds else 0
        found.append(
            Entry(_application_of(row.application), address_of(row.address), row.reason, row.text, since, until, row.by or by)
        )
    return found


def done(changed: Changed) -> dict[str, int]:
    """What has come of entries."""
    return changed._asdict()


def rows_of(page: Page) -> dict[str, Any]:
    """A page."""
    return {"rows": [row_of(entry) for entry in page.entries], "after": page.after}


def counted(counts: Counts) -> dict[str, Any]:
    """How many entries there are."""
    each = [{"application": name, "reason": reason, "entries": n} for (name, reason), n in sorted(counts.each.items())]
    return {"entries": counts.entries, "most": counts.most, "octets": counts.octets, "each": each}
