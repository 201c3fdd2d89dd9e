"""The HTTP server for monitoring: /metrics (Prometheus), /health, /livez and /readyz, on one address, by aiohttp."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from relaymta import __version__
from relaymta.control import Refused
from relaymta.errors import RelayError
from relaymta.metrics import (
    Cells,
    FilterTotals,
    RuleTotals,
    abuse_families,
    down_families,
    families,
    filter_families,
    list_families,
    row_families,
    rule_families,
)

__all__ = ["serve_http"]

ROWS_SECONDS = 2.0  # to wait for the workers' answers
ROWS_EVERY = 5.0  # seconds for which the rows of sites and quotas are cached


Rows = list[dict[str, Any]]


async def _rows(asked: Awaitable[Rows]) -> Rows:
    try:
        async with asyncio.timeout(ROWS_SECONDS):
            return await asked
    except (TimeoutError, ConnectionError, RelayError, Refused):  # the counters are exposed even if a worker does not answer
        return []


class _Collector:
    """Collects all metrics from shared memory at each scrape."""

    def __init__(
        self,
        blocks: Callable[[], Iterable[Cells]],
        down: Callable[[], tuple[int, Rows]],
        filters: Callable[[], dict[str, FilterTotals]],
        zones: Callable[[], dict[str, list[list[int]]]],
        rules: Callable[[], dict[str, RuleTotals]],
        abuse: Callable[[], dict[str, tuple[int, int, int]]],
    ) -> None:
        self._blocks = blocks
        self._down = down
        self._filters = filters
        self._zones = zones
        self._rules = rules
        self._abuse = abuse
        self.sites: Rows = []
        self.quotas: Rows = []
        self.until = 0.0

    def collect(self) -> Iterable[object]:
        yield InfoMetricFamily("relaymta_build", "The running program", value={"version": __version__})
        yield from families(self._blocks())
        yield from row_families(self.sites, self.quotas)
        yield from down_families(*self._down())
        yield from filter_families(self._filters())
        yield from list_families(self._zones())
        yield from rule_families(self._rules())
        yield from abuse_families(self._abuse())


async def serve_http(
    host: str,
    port: int,
    blocks: Callable[[], Iterable[Cells]],
    sites: Callable[[], Awaitable[Rows]],
    quotas: Callable[[], Awaitable[Rows]],
    healthy: Callable[[], str],
    reasons: Callable[[], list[dict[str, str]]],
    down: Callable[[], tuple[int, Rows]] = lambda: (0, []),
    filters: Callable[[], dict[str, FilterTotals]] = dict,
    zones: Callable[[], dict[str, list[list[int]]]] = dict,
    rules: Callable[[], dict[str, RuleTotals]] = dict,
    abuse: Callable[[], dict[str, tuple[int, int, int]]] = dict,
) -> web.AppRunner:
    """Serve on host:port until `cleanup()` of the returned runner is called. `blocks()`: the workers' counters; `sites()`: rows
    of the busiest sites; `quotas()`: rows of accounts' quotas; `healthy()`: "" or what is wrong; `reasons()`: why the
    relay is not ready, as of `supervisor.readiness`; `down()`: the sites that are down, as `supervisor.outages` counts them;
    `filters()`: of each configured filter; `zones()`: the counters of each list in the DNS; `rules()`: of each rule about
    mail; `abuse()`: as of `Accounts.counts`. OSError when the address is in use."""
    registry = CollectorRegistry(auto_describe=False)
    collector = _Collector(blocks, down, filters, zones, rules, abuse)
    registry.register(collector)  # type: ignore[arg-type]

    async def metrics(request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        if now > collector.until:
            collector.until = now + ROWS_EVERY
            collector.sites, collector.quotas = await asyncio.gather(_rows(sites()), _rows(quotas()))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def health(request: web.Request) -> web.Response:
        wrong = healthy()
        return web.Response(text=(wrong or "ok") + "\n", status=503 if wrong else 200)

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # whoever reads this has been answered: the event loop runs

    async def readyz(request: web.Request) -> web.Response:
        why = reasons()
        return web.json_response({"ready": not why, "reasons": why}, status=503 if why else 200)

    app = web.Application()
    answers = {"/metrics": metrics, "/health": health, "/livez": livez, "/readyz": readyz}
    app.add_routes([web.get(path, answer) for path, answer in answers.items()])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
