"""A receiver of alerts: a real HTTP server in the test's own loop, that fails as often as a test says."""

import asyncio
import base64
import hmac
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from aiohttp import web

from pipeline import examples, telemetry
from pipeline.telemetry import Alert

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)

#: Given a request's number, the status to answer; -1: cut the connection; -2: take the message, then cut it.
Behaviour = Callable[[int], int]


def alert(number: int, state: str = "firing", **changed: Any) -> Alert:
    """Return a step in the life of one of many alerts."""
    of_condition = {name: changed.pop(name) for name in ("rule", "severity", "labels") if name in changed}
    condition = msgspec.structs.replace(examples.condition(), **of_condition)
    since = NOW + timedelta(seconds=number)
    uuid = f"GPU-{number}"
    values: dict[str, Any] = {
        "id": telemetry.alert_id(uuid, condition.rule, since), "state": state, "gpu_uuid": uuid, "host": "node-7",
        "since": since, "time": since + timedelta(minutes=2 if state == "firing" else 9), "condition": condition,
        "model": "NVIDIA H100 80GB HBM3",
    }  # fmt: skip
    return Alert(**(values | changed))


def at_random(seed: int, share: float) -> Behaviour:
    """Fail in every way, and take the rest."""
    chance = random.Random(seed)
    return lambda _: chance.choice((500, 503, 429, -1, -2)) if chance.random() < share else 200


@dataclass(frozen=True)
class Request:
    """What was posted, and what was answered."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def is_taken(self) -> bool:
        return self.status in {200, -2}

    @property
    def alerts(self) -> list[Alert]:
        return msgspec.convert(msgspec.json.decode(self.body)["data"]["alerts"], list[Alert])

    def is_signed(self, secret: str = SECRET) -> bool:
        """Whether one of the signatures is right, as a receiver checks it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        right = "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
        return right in self.headers["webhook-signature"].split()


@dataclass
class ReceiverServer:
    """What was received, in order."""

    url: str = ""
    behaviour: Behaviour = lambda _: 200
    requests: list[Request] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> list[Request]:
        return [request for request in self.requests if request.is_taken]

    def told(self) -> list[tuple[str, str]]:
        """Return (alert, state) of all that was taken, repeats of a message left out, in order."""
        first = {request.id: request for request in reversed(self.taken)}
        ids = list(dict.fromkeys(request.id for request in self.taken))
        return [(each.id, each.state) for one in ids for each in first[one].alerts]

    def repeats(self) -> int:
        """Return how many messages came again after they had been taken."""
        return sum(count - 1 for count in Counter(request.id for request in self.taken).values())

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        status = self.behaviour(len(self.requests))
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append(Request(request.path, headers, body, status))
        if status < 0:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return web.Response(status=status, text="answered", headers=self.headers)


@asynccontextmanager
async def receiving(behaviour: Behaviour = lambda _: 200) -> AsyncIterator[ReceiverServer]:
    """Serve until the block ends."""
    server = ReceiverServer(behaviour=behaviour)
    app = web.Application()
    app.router.add_post("/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()
        await asyncio.sleep(0)
