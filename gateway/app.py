"""The gateway's application: opens the clients, puts the routes together, describes them.

Everything it needs may be down when it starts, and may go down later: it connects in the background, says so
in `/readyz`, and answers 503 to what cannot be done meanwhile. Only wrong settings end it. No state is kept
here that another replica would miss.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import metadata, resources
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, Response

from gateway import alerts, images, models, operations, predictions, problems, search, telemetry, views
from gateway.auth import Keys
from gateway.boundary import Boundary
from gateway.intake import PUBLISH_SECONDS, Intake, RowWriter
from gateway.live import Live
from gateway.operations import Checks
from gateway.uploads import Memory
from pipeline.broker import Publisher
from pipeline.connections import client_options, ping
from pipeline.database import Database
from pipeline.objects import ObjectStore
from pipeline.registry import Follower
from pipeline.settings import Settings

# Swagger UI's files come from a package, not from a CDN: the page works without internet, and nobody else's
# script runs beside an API key.
_DOCS_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
# For reading a small topic to its end: cancelled half-way, aiokafka leaves a connection open.
READ_SECONDS = 1.0
_DESCRIPTION = """Pictures in, predictions out, by way of Kafka.

`202` means that Kafka has the picture: nothing accepted is lost. The result is there by `GET`, or in the same
answer with `Prefer: wait=10`. Every error is an RFC 9457 problem with a stable `code`."""


def create_app(settings: Settings) -> FastAPI:
    """Make the application; its clients are opened when it starts serving.

    Raises:
        ConfigurationError: a setting is wrong, before anything is opened.
    """
    client_options(settings)  # reads the TLS and SASL files
    app = FastAPI(
        title="Millrace gateway",
        version=metadata.version("millrace"),
        description=_DESCRIPTION,
        # Served by `_add_docs`.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_serve,
    )
    app.state.settings = settings
    app.state.keys = Keys(settings.api_keys_file) if settings.api_keys_file else None
    app.state.objects = ObjectStore.open(settings)
    app.state.memory = Memory(settings.max_image_bytes)
    routers = (
        images.router, predictions.router, search.router, models.router, telemetry.router, alerts.router,
        operations.router,
    )  # fmt: skip
    for router in routers:
        app.include_router(router)
    _add_docs(app)
    problems.install(app, routers)
    app.add_middleware(Boundary, settings=settings)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _serve(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        stack.callback(app.state.objects.close)
        database = await Database.open(settings, check=False)
        stack.push_async_callback(database.close)
        publisher = Publisher(settings, client_id="millrace-gateway", timeout_seconds=PUBLISH_SECONDS)
        stack.push_async_callback(publisher.stop)
        connecting = asyncio.create_task(publisher.start(), name="connect the publisher")
        stack.push_async_callback(_cancel, connecting)
        rows = RowWriter(database)
        rows.start()
        stack.push_async_callback(rows.stop)
        live = Live(settings)
        live.start()
        stack.push_async_callback(live.stop)
        following = Follower(settings, client_id="millrace-gateway")
        stack.push_async_callback(following.stop)
        reading = asyncio.create_task(following.start(), name="follow the models")
        stack.push_async_callback(_cancel, reading, READ_SECONDS)
        app.state.database = database
        app.state.following = following
        app.state.live = live
        app.state.intake = Intake(settings, publisher, app.state.objects, rows, database)
        app.state.checks = Checks(
            {
                "kafka": lambda seconds: ping(settings, seconds),
                "database": lambda _: database.check(),
                "object_store": lambda _: app.state.objects.ping(),
            },
            tell_why=settings.api_keys_file is None,
        )
        yield


async def _cancel(task: "asyncio.Task[None]", after_seconds: float = 0.0) -> None:
    if after_seconds:
        await asyncio.wait({task}, timeout=after_seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _add_docs(app: FastAPI) -> None:
    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return Response(msgspec.json.encode(app.openapi()), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
        )

    @app.get("/docs/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in _DOCS_ASSETS:
            raise problems.Problem("not_found", "There is nothing at this path.")
        data = resources.files("fastapi_swagger.resources").joinpath(name).read_bytes()
        return Response(data, media_type=_DOCS_ASSETS[name], headers={"Cache-Control": "max-age=86400"})


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Describe the routes, with the schemas of our structs and problems in place of FastAPI's own."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas |= views.schemas() | {"Problem": problems.SCHEMA}
        for operations_at_path in document["paths"].values():
            for operation in operations_at_path.values():
                unprocessable = operation["responses"].get("422", {})
                if "HTTPValidationError" in str(unprocessable):
                    operation["responses"] |= {
                        str(status): entry for status, entry in problems.responses("invalid_request").items()
                    }
        app.openapi_schema = document
    return app.openapi_schema
