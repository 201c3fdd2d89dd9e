"""HTTP for machines: /metrics (Prometheus) and /health, on one address, by aiohttp."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from relaymta import __version__
from relaymta.control import Refused
from relaymta.metrics import Cells, families, site_families

__all__ = ["serve_http"]

SITES_SECONDS = 2.0  # waited for the workers' answers
SITES_EVERY = 5.0  # asked at most; between two times the same is shown


class _Collector:
    """All metrics, read from shared memory when Prometheus asks."""

    def __init__(self, blocks: Callable[[], Iterable[Cells]]) -> None:
        self._blocks = blocks
        self.sites: list[dict[str, Any]] = []
        self.sites_until = 0.0

    def collect(self) -> Iterable[object]:
        yield InfoMetricFamily("relaymta_build", "The running program", value={"version": __version__})
        yield from families(self._blocks())
        yield from site_families(self.sites)


async def serve_http(
    host: str,
    port: int,
    blocks: Callable[[], Iterable[Cells]],
    sites: Callable[[], Awaitable[list[dict[str, Any]]]],
    healthy: Callable[[], str],
) -> web.AppRunner:
    """Serve on host:port until `cleanup()` of what is returned. `sites()`: rows of the busiest sites. `healthy()`: "" or what
    is wrong. OSError when busy."""
    registry = CollectorRegistry(auto_describe=False)
    collector = _Collector(blocks)
    registry.register(collector)  # type: ignore[arg-type]

    async def metrics(request: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        if now > collector.sites_until:
            collector.sites_until = now + SITES_EVERY
            try:
                async with asyncio.timeout(SITES_SECONDS):
                    collector.sites = await sites()
            except (TimeoutError, ConnectionError, Refused):  # a worker that does not answer must not hide the counters
                collector.sites = []
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def health(request: web.Request) -> web.Response:
        wrong = healthy()
        return web.Response(text=(wrong or "ok") + "\n", status=503 if wrong else 200)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/health", health)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
