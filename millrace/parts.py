"""The processes of `millrace up`: which, with what environment and ports, and when they are ready."""

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agents.devices import listed, share_of_cores
from millrace import ports
from millrace.output import say
from millrace.supervisor import ChildSpec
from pipeline.deployments import replica_name
from pipeline.errors import ConfigurationError, DependencyError
from pipeline.settings import PREFIX, Settings

if TYPE_CHECKING:
    import httpx

STEPS = ("predict", "store", "archive")
#: Started when the steps of images are ready, which they must not slow down.
TELEMETRY_STEPS = ("watch", "record", "notify")
FIRST_WORKER_PORT = 8041
# Importing torch and warming up take seconds; fetching a model for the first time may take minutes.
_READY_SECONDS = 600.0
_READY_NEWS_SECONDS = 15.0
_POLL_SECONDS = 0.1
# Beyond the grace period, within which a child ends itself.
_STOP_MARGIN_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """A process of the stack, and where it says whether it is ready."""

    spec: ChildSpec
    ready_url: str
    #: Nothing about images needs it.
    is_telemetry: bool = False


def parse_replicas(text: str) -> dict[str, int]:
    """Read `predict=3,store=2`.

    Raises:
        ValueError: It is not that.
    """
    counts: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        step, _, number = item.partition("=")
        if step not in (*STEPS, *TELEMETRY_STEPS) or not number.isdigit() or int(number) > 100:
            raise ValueError(
                f"{item!r} is not STEP=N with a step of {', '.join((*STEPS, *TELEMETRY_STEPS))} and N up to 100"
            )
        counts[step] = int(number)
    return counts


def describe_parts(settings: Settings, replicas: dict[str, int]) -> list[Part]:
    """Choose the processes to run, their environment and ports; the settings must have addresses.

    Raises:
        ConfigurationError: several devices are named, and not rightly.
    """
    logs = settings.data_dir / "logs"
    stop_seconds = settings.shutdown_grace_seconds + _STOP_MARGIN_SECONDS
    env = {
        f"{PREFIX}KAFKA_BOOTSTRAP_SERVERS": settings.resolved_kafka,
        f"{PREFIX}DATABASE_URL": settings.resolved_database,
        f"{PREFIX}OBJECT_STORE_URL": settings.resolved_object_store,
        f"{PREFIX}DATA_DIR": str(settings.data_dir),
        f"{PREFIX}DEPLOYMENT": settings.deployment,
        f"{PREFIX}MODELS": settings.models,
    }
    gateway = [sys.executable, "-m", "gateway"]
    parts = [
        Part(
            ChildSpec("gateway", gateway, logs / "gateway.log", env, stop_seconds),
            f"{_loopback(settings.gateway_host, settings.gateway_port)}/readyz",
        )
    ]
    devices = listed(settings.device)
    counts = dict.fromkeys((*STEPS, *TELEMETRY_STEPS), 1) | {"predict": len(devices)} | replicas
    free = iter(_worker_ports(settings.worker_host, sum(counts.values())))
    for step, count in counts.items():
        for number in range(1, count + 1):
            name = step if count == 1 else f"{step}-{number}"
            port = next(free)
            own = env | {f"{PREFIX}WORKER_PORT": str(port)} | _threads(settings, step, count)
            if step in ("predict", "watch") and devices != (settings.device,):
                own[f"{PREFIX}DEVICE"] = devices[(number - 1) % len(devices)]
            if step == "predict" and settings.replica is None:
                # The same after a restart, so that a version of models that kills it is given up in the end.
                own[f"{PREFIX}REPLICA"] = replica_name(name)
            argv = [sys.executable, "-m", "agents", step]
            spec = ChildSpec(name, argv, logs / f"{name}.log", own, stop_seconds)
            ready_url = f"{_loopback(settings.worker_host, port)}/readyz"
            parts.append(Part(spec, ready_url, step in TELEMETRY_STEPS))
    return parts


def _threads(settings: Settings, step: str, count: int) -> dict[str, str]:
    """Share the cores between replicas: each would else use all of them."""
    if step != "predict" or count == 1:
        return {}
    return {f"{PREFIX}{name.upper()}": str(value) for name, value in share_of_cores(settings, count).items()}


def _worker_ports(host: str, count: int) -> Sequence[int]:
    found: list[int] = []
    for port in range(FIRST_WORKER_PORT, FIRST_WORKER_PORT + 10 * count + 10):
        if len(found) == count:
            break
        with suppress(ConfigurationError):
            ports.require_free(host, port, "")
            found.append(port)
    return found + [ports.find_free(host) for _ in range(count - len(found))]


def _loopback(host: str, port: int) -> str:
    """Return the URL by which this machine reaches what binds to `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{reached}:{port}"


async def wait_until_ready(parts: Sequence[Part]) -> None:
    """Return when every part says that it is ready; tell now and then who does not.

    Raises:
        DependencyError: one takes too long.
    """
    import httpx

    waiting = {part.spec.name: part for part in parts}
    deadline = time.monotonic() + _READY_SECONDS
    news_at = time.monotonic() + _READY_NEWS_SECONDS
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
        while waiting:
            reasons = {}
            for name, part in list(waiting.items()):
                reason = await _unready(client, part.ready_url)
                if reason is None:
                    del waiting[name]
                else:
                    reasons[name] = reason
            if time.monotonic() > deadline:
                name, reason = next(iter(reasons.items()))
                raise DependencyError(f"{name} is not ready ({reason}); see {waiting[name].spec.log_path}")
            if reasons and time.monotonic() > news_at:
                news_at += _READY_NEWS_SECONDS
                say("waiting for " + ", ".join(f"{name} ({reason})" for name, reason in reasons.items()))
            await asyncio.sleep(_POLL_SECONDS)


async def _unready(client: "httpx.AsyncClient", url: str) -> str | None:
    import httpx

    try:
        response = await client.get(url)
    except httpx.HTTPError:
        return "starting"
    if response.is_success:
        return None
    try:
        return str(response.json().get("reason", "starting"))
    except (ValueError, AttributeError):
        return f"HTTP {response.status_code}"
