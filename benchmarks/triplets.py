"""The table of greylisting: `python -m benchmarks.triplets [--count N]`: time of a get and a put, octets of each, its file."""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from relaymta.node import keep_triplets, kept_triplets
from relaymta.shm import Shared
from relaymta.triplets import ROWS, Triplets

DAY = 86_400


def table() -> tuple[Shared, Triplets]:
    """An empty one, in memory of its own."""
    shared = Shared.create()
    return shared, shared.triplets(b"secret", lambda first, last, wall: last < wall - (DAY if first == last else 36 * DAY))


def each(what: Callable[[int], object], keys: Iterable[int]) -> float:
    """The microseconds of a call."""
    count, began = 0, time.perf_counter()
    for key in keys:
        what(key)
        count += 1
    return (time.perf_counter() - began) * 1e6 / count


def longest_pause(work: Callable[[], object]) -> float:
    """The longest time, in ms, for which another thread did not run, while `work` did."""
    done = threading.Event()
    worst = [0.0]

    def watch() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.0005)
            now = time.perf_counter()
            worst[0] = max(worst[0], now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.05)
    work()
    done.set()
    watcher.join()
    return worst[0] * 1000


def run(count: int) -> dict[str, float]:
    """Fill a table, use it, write it to a file and read that."""
    shared, triplets = table()
    found: dict[str, float] = {"octets_untouched": 512 * os.fstat(shared.descriptor).st_blocks}
    now = int(time.time())
    keys = [
        triplets.key(f"192.0.{n >> 8}.0/24", f"sender{n}@example.com", "recipient@example.net") for n in range(count + 10_000)
    ]
    keys, others = keys[:count], keys[count:]
    some = keys[:: max(1, count // 100_000)]
    found["fill_us"] = each(lambda key: triplets.put(key, (0, 0), (now, now)), keys)
    found["rows_used"] = triplets.rows_used()
    found["forgotten"] = triplets.evicted
    found["octets_each"] = 512 * os.fstat(shared.descriptor).st_blocks / count
    found["key_us"] = each(lambda n: triplets.key("192.0.2.0/24", "sender@example.com", "recipient@example.net"), range(100_000))
    found["get_us"] = each(triplets.get, some)
    found["get_unknown_us"] = each(triplets.get, others)
    found["update_us"] = each(lambda key: triplets.put(key, (now, now), (now, now + 300)), some)
    found["insert_us"] = each(lambda key: triplets.put(key, (0, 0), (now, now)), others)
    began = time.perf_counter()
    octets = triplets.dump()
    found["dump_ms"] = (time.perf_counter() - began) * 1000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        found["dump_and_keep_pause_ms"] = longest_pause(lambda: keep_triplets(path, triplets.dump()))
        found["keep_ms"] = each(lambda n: keep_triplets(path, octets), [0]) / 1000
        found["kept_ms"] = each(lambda n: kept_triplets(path), [0]) / 1000
    _, again = table()
    found["restore_ms"] = each(lambda n: again.restore(octets), [0]) / 1000
    found["not_restored"] = triplets.rows_used() - again.rows_used()
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help=f"triplets; the table has {ROWS} rows")
    print(json.dumps(run(parser.parse_args().count), indent=1))
