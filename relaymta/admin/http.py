"""HTTP for machines: /metrics (Prometheus) and /health, on one address, by aiohttp."""

from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import InfoMetricFamily
from prometheus_client.exposition import choose_encoder

from relaymta import __version__
from relaymta.metrics import Cells, families

__all__ = ["serve_http"]


class _Collector:
    """All metrics, read from shared memory when Prometheus asks."""

    def __init__(self, blocks: Callable[[], Iterable[Cells]]) -> None:
        self._blocks = blocks

    def collect(self) -> Iterable[object]:
        yield InfoMetricFamily("relaymta_build", "The running program", value={"version": __version__})
        yield from families(self._blocks())


async def serve_http(host: str, port: int, blocks: Callable[[], Iterable[Cells]], healthy: Callable[[], str]) -> web.AppRunner:
    """Serve on host:port until `cleanup()` of what is returned. `healthy()`: "" or what is wrong. OSError when busy."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(blocks))  # type: ignore[arg-type]

    async def metrics(request: web.Request) -> web.Response:
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
