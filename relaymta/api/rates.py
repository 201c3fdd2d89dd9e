"""Rates and latencies for the page: samples of the relay's counters, taken while somebody looks, and pictures of them (SVG)."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = ["Chart", "Rates", "bars", "chart", "quantile"]

EVERY = 5.0  # seconds
KEPT = 120  # samples: ten minutes
SHOWN_LEAST = 24  # values that fill a chart: two minutes
LOOKED = 900.0  # seconds after the last look at which sampling ends
WIDTH, HEIGHT = 240, 48

Sample = dict[str, Any]


class Chart(NamedTuple):
    """A line of values over time. `line`, `area`: points of SVG in a box of WIDTH by HEIGHT; `now`, `most`: values."""

    line: str
    area: str
    now: float
    most: float


def chart(values: list[float]) -> Chart:
    """The chart of values, the latest at the right. None: an empty one."""
    most = max(values, default=0.0)
    step = WIDTH / (max(SHOWN_LEAST, len(values)) - 1)
    left = WIDTH - step * max(0, len(values) - 1)
    tall = HEIGHT - 4
    points = [
        f"{left + step * at:.1f},{HEIGHT - 1 - (tall * value / most if most else 0):.1f}" for at, value in enumerate(values)
    ]
    area = [f"{left:.1f},{HEIGHT}", *points, f"{WIDTH},{HEIGHT}"] if points else []
    return Chart(" ".join(points), " ".join(area), values[-1] if values else 0.0, most)


def bars(counts: list[int]) -> list[tuple[float, float, float, float]]:
    """Bars of a distribution: (x, y, width, height) of each, in a box of WIDTH by HEIGHT."""
    most, wide = max(counts, default=0), WIDTH / max(1, len(counts))
    tall = [(HEIGHT - 2) * count / most if most else 0.0 for count in counts]
    return [
        (round(at * wide + 1, 1), round(HEIGHT - high, 1), round(wide - 2, 1), round(high, 1)) for at, high in enumerate(tall)
    ]


def quantile(bounds: list[float], counts: list[int], part: float) -> float | None:
    """The bound below which `part` of what was counted is; None: there is none, or it is above the last."""
    total, seen = sum(counts), 0
    for bound, count in zip(bounds, counts, strict=False):
        seen += count
        if total and seen >= part * total:
            return bound
    return None


class Rates:
    """`read()`: the relay's readings (api.models.Readings), or an exception."""

    def __init__(self, read: Callable[[], Awaitable[Sample]]) -> None:
        self._read = read
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._task: asyncio.Task[None] | None = None
        self._looked = 0.0

    async def look(self) -> "deque[Sample]":
        """The samples, the latest last; more are taken from now on, for some time. Errors as of `read` where there is none."""
        loop = asyncio.get_running_loop()
        self._looked = loop.time()
        if self._task is None or self._task.done():
            self._samples.clear()
            self._samples.append(await self._read())
            self._task = loop.create_task(self._go_on())
        return self._samples

    async def _go_on(self) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() - self._looked < LOOKED:
            await asyncio.sleep(EVERY)
            try:
                self._samples.append(await self._read())
            except Exception:  # the relay does not answer now; the page says so by itself
                self._samples.clear()

    def close(self) -> None:
        """Take no more."""
        if self._task is not None:
            self._task.cancel()


def per_second(samples: "deque[Sample]", name: str) -> list[float]:
    """The rate of a counter between each two samples."""
    found = list(samples)
    return [
        max(0.0, after["totals"][name] - before["totals"][name]) / max(0.1, after["time"] - before["time"])
        for before, after in pairwise(found)
    ]


def lately(samples: "deque[Sample]", name: str) -> tuple[list[float], list[int], bool]:
    """(bounds, counts, whether they are of the time of the samples) of a distribution; where nothing was counted in that time,
    all since the start."""
    first, last = samples[0]["histograms"][name], samples[-1]["histograms"][name]
    new = [max(0, now - before) for before, now in zip(first["counts"], last["counts"], strict=True)]
    return (last["bounds"], new, True) if any(new) else (last["bounds"], last["counts"], False)
