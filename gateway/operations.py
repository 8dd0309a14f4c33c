"""Health and metrics: what probes and Prometheus ask. Open without an API key: it is nobody's data.

`/livez` says that the event loop turns, whatever the dependencies do: restarting the gateway mends no broker.
`/readyz` asks every dependency, in parallel and briefly, and says which one does not answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from gateway.views import JSONResponse, describe
from pipeline import logs
from pipeline.errors import MillraceError

# Below the default timeout of a Kubernetes probe (1 s is its default, 3 s is what our manifests set).
CHECK_SECONDS = 2.0
# Probes of several watchers share one answer; each check opens connections.
REUSE_SECONDS = 1.0

log = logs.get(__name__)
router = APIRouter(tags=["operations"])


class Dependency(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whether one service answers."""

    ready: bool
    seconds: float
    reason: str | None = None


class Readiness(msgspec.Struct, frozen=True):
    """Whether everything an upload and its result need answers."""

    ready: bool
    dependencies: dict[str, Dependency]


class Liveness(msgspec.Struct, frozen=True):
    """The event loop turns."""

    alive: bool = True


class Checks:
    """Asks dependencies whether they answer; concurrent and frequent questions share one answer.

    Args:
        checks: by name; each gets the seconds it has.
        tell_why: give the whole reason, which may name hosts and accounts; else only the log has it.
    """

    def __init__(self, checks: Mapping[str, Callable[[float], Awaitable[object]]], *, tell_why: bool) -> None:
        self._checks = checks
        self._tell_why = tell_why
        self._lock = asyncio.Lock()
        self._latest: tuple[float, dict[str, Dependency]] | None = None

    async def dependencies(self) -> dict[str, Dependency]:
        """Return each dependency's answer, at most `REUSE_SECONDS` old."""
        async with self._lock:
            if self._latest is None or time.monotonic() - self._latest[0] > REUSE_SECONDS:
                answers = await asyncio.gather(
                    *(self._ask(name, check) for name, check in self._checks.items())
                )
                self._latest = time.monotonic(), dict(zip(self._checks, answers, strict=True))
            return self._latest[1]

    async def _ask(self, name: str, check: Callable[[float], Awaitable[object]]) -> Dependency:
        started_at = time.monotonic()
        reason = None
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await check(CHECK_SECONDS)
        except TimeoutError:
            reason = f"did not answer within {CHECK_SECONDS:g} s"
        except MillraceError as error:
            reason = error.message if self._tell_why else "does not answer"
            log.warning("dependency is not ready", dependency=name, error=error.message)
        except Exception as error:
            reason = f"the check failed ({type(error).__name__})"
            log.exception("readiness check failed", dependency=name)
        seconds = round(time.monotonic() - started_at, 4)
        return Dependency(ready=reason is None, seconds=seconds, reason=reason)


@router.get(
    "/livez", responses=describe(200, Liveness, "The event loop turns."), summary="Is the process alive?"
)
async def livez() -> Response:
    """Answer whenever the event loop turns."""
    return JSONResponse(Liveness())


@router.get(
    "/readyz",
    responses=describe(200, Readiness, "Every dependency answers.")
    | describe(503, Readiness, "A dependency does not answer, or the gateway is shutting down."),
    summary="Does everything it needs answer?",
)
async def readyz(request: Request) -> Response:
    """Ask Kafka, the database and the object store, each for at most two seconds."""
    dependencies = await request.app.state.checks.dependencies()
    ready = all(dependency.ready for dependency in dependencies.values())
    if request.app.state.live.stopping.is_set():
        ready = False
    return JSONResponse(Readiness(ready, dependencies), status=200 if ready else 503)


@router.get(
    "/metrics",
    responses={200: {"description": "Prometheus text format.", "content": {"text/plain": {}}}},
    summary="Prometheus metrics",
)
async def metrics() -> Response:
    """Return this process's metrics."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
