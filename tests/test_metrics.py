"""Histograms and labels of /metrics."""

import math
import random
import subprocess
import time
from bisect import bisect_left

import pytest
from prometheus_client.parser import text_string_to_metric_families

from relaymta import metrics
from relaymta.admin.http import serve_http
from relaymta.metrics import LABEL_MOST, Counters, Own, shown
from relaymta.shm import COUNTERS, Shared
from relaymta.sockets import http_sockets
from relaymta.supervisor.activity import Activity
from tests.support.daemon import free_port
from tests.support.programs import need

HOSTILE = ['a"b', "back\\slash", "new\nline", "\udc80lone", "x" * 5000, "x" * 5000 + "y", "\x1b[31m", "ü.example", ""]


def test_the_cells_of_a_worker_suffice():
    assert metrics.CELLS <= COUNTERS


def test_observations_are_in_the_first_bucket_that_holds_them():
    draw, cells = random.Random(3), Shared.create().counters(0)
    name = "relaymta_accept_seconds"
    bounds = metrics.HISTOGRAMS[name].bounds
    observe = Counters(cells).histogram(name)
    values = [draw.choice([draw.expovariate(10), draw.choice(bounds)]) for _ in range(1000)]
    for value in values:
        observe(value)
    wanted = [0] * (len(bounds) + 1)
    for value in values:
        wanted[bisect_left(bounds, value)] += 1
    (family,) = (one for one in metrics.families([cells]) if one.name == name)  # type: ignore[attr-defined]
    buckets = [sample.value for sample in family.samples if sample.name.endswith("_bucket")]
    assert buckets == [sum(wanted[: number + 1]) for number in range(len(wanted))]
    (total,) = (sample.value for sample in family.samples if sample.name.endswith("_sum"))
    assert math.isclose(total, sum(values), abs_tol=0.001)


@pytest.mark.parametrize("value", [-0.001, -1e12, math.nan, math.inf, -math.inf, 1e10])
def test_a_duration_that_a_clock_step_has_made_is_left_out(value):
    cells = Shared.create().counters(0)
    Counters(cells).histogram("relaymta_accept_seconds")(value)
    assert not any(cells.values())


def test_values_of_labels_are_bounded_printable_and_differ_where_the_text_does():
    found = [shown(text) for text in HOSTILE]
    assert len(set(found)) == len(HOSTILE)
    assert all(len(text) <= LABEL_MOST and text.isprintable() for text in found)
    assert shown("mx/ü.example") == "mx/ü.example"


async def served(domains: int) -> tuple[bytes, list[float]]:
    """/metrics of a relay that has seen so many domains, with 16 workers and all that is bounded filled up; seconds of
    scrapes."""
    shared, activity = Shared.create(), Activity()
    for first in range(0, domains, 1000):
        names = [f"mx/d{number}.{'x' * 40}.example" for number in range(first, min(first + 1000, domains))]
        await activity.note([(name, [1, 1, 1]) for name in [*HOSTILE, *names]])
    rows = [dict.fromkeys(("waiting", "connections", "window", "rate"), 1) | {"pool": site} for site in activity.shown]
    quotas = [{"name": f"account {n}", "what": "messages", "share": 0.5} for n in range(5000)]
    down = [{"site": site, "hosts": "mx", "cause": 'a "reply"\n'} for site in activity.shown]

    async def sites():
        return rows

    async def used():
        return quotas

    port = free_port()
    own = Own(
        1,
        False,
        0,
        {"exit": 1},
        {"ready": 16},
        {f"/etc/ssl/{n}.pem": 2_000_000_000 for n in range(50)},
        {"manual": 5},
        9,
        1,
        {"/p.py:1": 2},
    )
    runner = await serve_http(
        http_sockets("127.0.0.1", port), lambda: [shared.counters(slot) for slot in range(16)],
        sites, used, lambda: "", list, lambda: (9, down),
        rules=lambda: {f"rule {n}": metrics.RuleTotals(1, 2, 3, 4) for n in range(100)}, attempts=activity.totals,
        own=lambda: own,
    )  # fmt: skip
    import aiohttp

    try:
        seconds = []
        async with aiohttp.ClientSession() as client:
            for _ in range(10):
                began = time.monotonic()
                async with client.get(f"http://127.0.0.1:{port}/metrics") as answer:
                    text = await answer.read()
                seconds.append(time.monotonic() - began)
    finally:
        await runner.cleanup()
    return text, seconds


def promtool(text: bytes) -> tuple[int, bytes]:
    """The exit status of `promtool check metrics`, and what it says."""
    done = subprocess.run([need("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    return done.returncode, done.stdout + done.stderr


async def test_metrics_are_small_and_valid_with_200_000_domains():
    text, _ = await served(200_000)
    assert len(text) < 2_000_000
    assert sum(1 for _ in text_string_to_metric_families(text.decode())) > 80
    assert promtool(text) == (0, b"")


@pytest.mark.prove
async def test_metrics_take_less_than_50_ms_with_200_000_domains():
    _, seconds = await served(200_000)
    assert min(seconds) < 0.05, seconds


async def test_other_paths_and_methods_are_told_what_there_is():
    import aiohttp

    port = free_port()

    async def none():
        return []

    sockets = http_sockets("127.0.0.1", port)
    runner = await serve_http(sockets, list, none, none, lambda: "", lambda: [{"what": "disk", "text": "full"}])
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
            said = {}
            for method, path in (
                ("GET", "/"),
                ("GET", "/x%0a<b>"),
                ("POST", "/metrics"),
                ("HEAD", "/metrics"),
                ("GET", "/readyz"),
            ):
                async with client.request(method, path) as answer:
                    said[method, path] = answer.status, await answer.text()
                    if answer.status == 405:
                        assert answer.headers["Allow"] == "GET, HEAD"
    finally:
        await runner.cleanup()
    assert said["GET", "/"] == (404, "there is no '/' here, but: /health, /livez, /metrics, /readyz\n")
    assert said["GET", "/x%0a<b>"][0] == 404 and "\n" not in said["GET", "/x%0a<b>"][1][:-1]
    assert said["POST", "/metrics"] == (405, "this path is for GET, HEAD\n")
    assert said["HEAD", "/metrics"] == (200, "")
    assert said["GET", "/readyz"] == (503, '{"ready": false, "reasons": [{"what": "disk", "text": "full"}]}\n')


def test_the_layout_says_what_every_cell_means():
    for words in (metrics.FILTER_VERDICTS, metrics.FILTER_FAILURES, metrics.DNSBL_RESULTS, metrics.FILTER_BOUNDS):
        assert repr(words) in metrics.LAYOUT
