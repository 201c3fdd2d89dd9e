"""The HTTP server for monitoring: /metrics (Prometheus), /health, /livez and /readyz, on one address, by aiohttp."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

from aiohttp import web
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from relaymta import __version__
from relaymta.control import Refused
from relaymta.errors import RelayError
from relaymta.metrics import (
    Cells,
    FilterTotals,
    Own,
    RuleTotals,
    WebhookTotals,
    abuse_families,
    down_families,
    families,
    filter_families,
    list_families,
    own_families,
    row_families,
    rule_families,
    webhook_families,
)

__all__ = ["exposed", "serve_http"]

ROWS_SECONDS = 2.0  # to wait for the workers' answers
ROWS_EVERY = 5.0  # seconds for which the rows of sites and quotas are cached


Rows = list[dict[str, Any]]


@web.middleware
async def _in_words(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Say what is wrong with a request in a line."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        paths = sorted(resource.canonical for resource in request.app.router.resources())
        return web.Response(text=f"there is no {request.path!a} here, but: {', '.join(paths)}\n", status=404)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return web.Response(text=f"this path is for {allowed}\n", status=405, headers={"Allow": allowed})


async def _rows(asked: Awaitable[Rows]) -> Rows:
    try:
        async with asyncio.timeout(ROWS_SECONDS):
            return await asked
    except (TimeoutError, ConnectionError, RelayError, Refused):  # the counters are exposed even if a worker does not answer
        return []


class _Collector:
    """All metrics. `collect` reads shared memory and what the supervisor knows, on the loop; what it returns is rendered on a
    thread."""

    def __init__(
        self,
        blocks: Callable[[], Iterable[Cells]],
        down: Callable[[], tuple[int, Rows]],
        filters: Callable[[], dict[str, FilterTotals]],
        zones: Callable[[], dict[str, list[list[int]]]],
        rules: Callable[[], dict[str, RuleTotals]],
        abuse: Callable[[], dict[str, tuple[int, int, int]]],
        attempts: Callable[[], dict[str, tuple[int, ...]]],
        own: Callable[[], Own] | None,
        webhooks: Callable[[], dict[str, WebhookTotals]],
    ) -> None:
        self._blocks = blocks
        self._down = down
        self._filters = filters
        self._zones = zones
        self._rules = rules
        self._abuse = abuse
        self._attempts = attempts
        self._own = own
        self._webhooks = webhooks
        self.sites: Rows = []
        self.quotas: Rows = []
        self.until = 0.0

    def collect(self) -> list[object]:
        own = self._own() if self._own is not None else None
        return exposed(
            self._blocks(), self.sites, self.quotas, self._attempts(), self._down(), self._filters(), self._zones(),
            self._rules(), self._abuse(), own, self._webhooks(),
        )  # fmt: skip


def exposed(
    blocks: Iterable[Cells],
    sites: Rows,
    quotas: Rows,
    attempts: dict[str, tuple[int, ...]],
    down: tuple[int, Rows],
    filters: dict[str, FilterTotals],
    zones: dict[str, list[list[int]]],
    rules: dict[str, RuleTotals],
    abuse: dict[str, tuple[int, int, int]],
    own: Own | None,
    webhooks: dict[str, WebhookTotals],
) -> list[object]:
    """All metrics as prometheus_client metric families."""
    return [
        InfoMetricFamily("relaymta_build", "The running program", value={"version": __version__}),
        *families(blocks),
        *row_families(sites, quotas, attempts),
        *down_families(*down),
        *filter_families(filters),
        *list_families(zones),
        *rule_families(rules),
        *abuse_families(abuse),
        *webhook_families(webhooks),
        *(own_families(own, time.time()) if own is not None else ()),
    ]


class _Collected(NamedTuple):
    """What an encoder of prometheus_client takes for a registry."""

    families: list[object]

    def collect(self) -> list[object]:
        return self.families


async def serve_http(
    sockets: list[socket.socket],
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
    attempts: Callable[[], dict[str, tuple[int, ...]]] = dict,
    own: Callable[[], Own] | None = None,
    webhooks: Callable[[], dict[str, WebhookTotals]] = dict,
) -> web.AppRunner:
    """Serve on listening sockets, which are the server's from now on, until `cleanup()` of the returned runner is called.
    `blocks()`: the workers' counters; `sites()`: rows
    of the busiest sites; `quotas()`: rows of accounts' quotas; `healthy()`: "" or what is wrong; `reasons()`: why the
    relay is not ready, as of `supervisor.readiness`; `down()`: the sites that are down, as `supervisor.outages` counts them;
    `filters()`: of each configured filter; `zones()`: the counters of each list in the DNS; `rules()`: of each rule about
    mail; `abuse()`: as of `Accounts.counts`; `attempts()`: those at sites; `own()`: what the supervisor knows of itself;
    `webhooks()`: what was counted of each."""
    collector = _Collector(blocks, down, filters, zones, rules, abuse, attempts, own, webhooks)

    async def metrics(request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        if now > collector.until:
            collector.until = now + ROWS_EVERY
            collector.sites, collector.quotas = await asyncio.gather(_rows(sites()), _rows(quotas()))
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        collected = _Collected(collector.collect())
        body = await asyncio.to_thread(encode, collected)  # type: ignore[arg-type]
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def health(request: web.Request) -> web.Response:
        wrong = healthy()
        return web.Response(text=(wrong or "ok") + "\n", status=503 if wrong else 200)

    async def livez(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # whoever reads this has been answered: the event loop runs

    async def readyz(request: web.Request) -> web.Response:
        why = reasons()
        body = json.dumps({"ready": not why, "reasons": why}) + "\n"
        return web.Response(text=body, content_type="application/json", status=503 if why else 200)

    app = web.Application(middlewares=[_in_words])
    answers = {"/metrics": metrics, "/health": health, "/livez": livez, "/readyz": readyz}
    app.add_routes([web.get(path, answer) for path, answer in answers.items()])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    for sock in sockets:
        await web.SockSite(runner, sock).start()
    return runner
