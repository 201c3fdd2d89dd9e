"""How old the messages of a queue are, counted as they come and go, so that the whole queue need not be read to say so.

Messages are counted by when they arrived, in spans of five minutes. Of more than KEPT spans the two that look most alike
from today (the smallest part of their age apart) become one: old mail is told by the day, new mail by the minute.
"""

__all__ = ["COLUMNS", "add", "columns", "remove"]

SPAN_MS = 300_000
KEPT = 24
COLUMNS = (5, 10, 20, 40, 80, 160, 320, 640, 1280)  # minutes; one more column for what is older

# A queue's ages: [first span, last span, messages] by age, the oldest first.
Ages = list[list[int]]


def add(ages: Ages, arrived: int) -> None:
    """A message that arrived then (wall clock, ms) is in the queue."""
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
    newest = ages[-1][1]

    def apart(position: int) -> float:
        start = ages[position][0]
        return (ages[position + 1][1] - start + 1) / (newest - start + 1)

    position = min(range(len(ages) - 1), key=apart)
    one, other = ages[position : position + 2]
    ages[position : position + 2] = [[one[0], other[1], one[2] + other[2]]]


def remove(ages: Ages, arrived: int) -> None:
    """A message that arrived then is in the queue no longer. One that was never counted (it is older than the counting) is
    nothing to it."""
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
    """How many of a queue's messages are at most so many minutes old (COLUMNS), the last number: older, and those that were
    never counted. `now`: wall clock, ms. A span counts where its middle is."""
    found = [0] * (len(COLUMNS) + 1)
    for first, last, count in ages:
        minutes = max(0.0, (now - (first + last + 1) * SPAN_MS / 2) / 60_000)
        found[next((n for n, limit in enumerate(COLUMNS) if minutes <= limit), len(COLUMNS))] += count
    found[-1] += max(0, messages - sum(found))
    return found
