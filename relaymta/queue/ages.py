"""The age distribution of a queue's messages, kept as they are added and removed, so that it is known without reading the queue.

Messages are counted by arrival time in spans of five minutes. When there are more than KEPT spans, the two adjacent ones that
differ least in relation to their age are joined: the resolution is minutes for new mail and days for old mail.
"""

from relaymta.control.requests import AGES as COLUMNS

__all__ = ["COLUMNS", "add", "columns", "remove"]

SPAN_MS = 300_000
KEPT = 24

# A queue's ages: [first span, last span, messages] by age, the oldest first.
Ages = list[list[int]]


def add(ages: Ages, arrived: int) -> None:
    """Count a message that `arrived` then (wall clock, ms)."""
    span = arrived // SPAN_MS
    position = len(ages)
    while position and ages[position - 1][0] > span:  # nearly always the last
        position -= 1
    if position and span <= ages[position - 1][1]:
        ages[position - 1][2] += 1
        return
    ages.insert(position, [span, span, 1])
    if len(ages) > KEPT:
        _join(ages)


def _join(ages: Ages) -> None:
    """Join the two adjacent spans whose ages differ least, as a share of the older one's."""
    newest = ages[-1][1]

    def apart(position: int) -> float:
        start = ages[position][0]
        return (ages[position + 1][1] - start + 1) / (newest - start + 1)

    position = min(range(len(ages) - 1), key=apart)
    one, other = ages[position : position + 2]
    ages[position : position + 2] = [[one[0], other[1], one[2] + other[2]]]


def remove(ages: Ages, arrived: int) -> None:
    """Remove a message that `arrived` then. One that was not counted (accepted by a version without these counts) is ignored."""
    span = arrived // SPAN_MS
    for position in range(len(ages) - 1, -1, -1):
        first, last, count = ages[position]
        if first <= span <= last:
            if count > 1:
                ages[position][2] -= 1
            else:
                del ages[position]
            return
        if last < span:
            return


def columns(ages: Ages, now: int, messages: int) -> list[int]:
    """The number of a queue's messages by age: for each limit of COLUMNS those at most so many minutes old and above the limit
    before, and last the older ones and those not counted. `now`: wall clock, ms. A span belongs where its middle is."""
    found = [0] * (len(COLUMNS) + 1)
    for first, last, count in ages:
        minutes = max(0.0, (now - (first + last + 1) * SPAN_MS / 2) / 60_000)
        found[next((n for n, limit in enumerate(COLUMNS) if minutes <= limit), len(COLUMNS))] += count
    found[-1] += max(0, messages - sum(found))
    return found
