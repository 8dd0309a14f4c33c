"""A worker's small HTTP site: /livez, /readyz, /metrics.

It runs on the worker's own event loop, so a loop that is stuck answers nothing and liveness fails.
Waiting for a dependency is not stuck.
"""

import json
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from pipeline import logs
from pipeline.errors import ConfigurationError
from pipeline.settings import PREFIX, Settings

log = logs.get(__name__)

# Each returns None when all is well, else the reason in one line.
Check = Callable[[], str | None]


class Site:
    """Serves health and metrics until `stop`."""

    def __init__(self, settings: Settings, *, live: Check, ready: Check) -> None:
        self._settings = settings
        self._live = live
        self._ready = ready
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigurationError: the port is taken or the address is not ours.
        """
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", _metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, port = self._settings.worker_host, self._settings.worker_port
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise ConfigurationError(
                f"{PREFIX}WORKER_HOST, {PREFIX}WORKER_PORT: cannot listen on {host}:{port} ({error.strerror})"
            ) from None
        self.port = self._runner.addresses[0][1]
        log.info("serving health and metrics", url=f"http://{host}:{self.port}")

    async def stop(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _livez(self, request: web.Request) -> web.Response:
        return _answer(self._live())

    async def _readyz(self, request: web.Request) -> web.Response:
        return _answer(self._ready())


def _answer(reason: str | None) -> web.Response:
    body = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
    return web.Response(
        text=json.dumps(body), status=200 if reason is None else 503, content_type="application/json"
    )


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
