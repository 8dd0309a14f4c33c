"""A gateway in the test's own event loop, on a free port, with everything real behind it."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from pipeline import admin, deadletters, events
from pipeline.broker import Publisher
from pipeline.errors import MillraceError
from pipeline.events import ImageEvent, ModelResult, Prediction, Receipt, Record, prediction_id
from pipeline.readers import LiveReader
from pipeline.settings import Settings, load
from pipeline.topics import DEAD_LETTERS, LANES, PREDICTIONS

#: The first bytes of a JPEG, and enough for whoever never decodes it.
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01" + b"\x00" * 100
PNG = b"\x89PNG\r\n\x1a\n" + b"\x00" * 100


@dataclass(frozen=True)
class Gateway:
    """A running gateway: a client of it, its application and its server."""

    http: httpx.AsyncClient
    app: FastAPI
    server: uvicorn.Server

    @property
    def url(self) -> str:
        """Base URL."""
        return str(self.http.base_url)


async def installed(
    bootstrap_servers: str, topic_prefix: str, database: str, folder: Path, **values: object
) -> Settings:
    """Return the settings of an installation of a test's own, with its topics, one partition each."""
    settings = load(
        kafka_bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix, topic_partitions=1,
        database_url=database, object_store_url=str(folder / "objects"), **values,
    )  # fmt: skip
    await admin.apply_topics(settings)
    return settings


@asynccontextmanager
async def serving(settings: Settings, **client: object) -> AsyncIterator[Gateway]:
    """Run a gateway with these settings until the block ends."""
    app = create_app(settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the gateway's own
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=5)
        )
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            assert not task.done()
            await asyncio.sleep(0.01)
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=base_url, timeout=30.0, **client) as http:  # type: ignore[arg-type]
            yield Gateway(http, app, server)
        server.should_exit = True
        app.state.live.stopping.set()
        await task


class Workers:
    """Stands in for `predict`: reads what the gateway publishes, and publishes what a test says."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        lanes = [settings.topic(topic.name) for topic in LANES.values()]
        self._reader = LiveReader(settings, lanes, start="earliest")
        self._publisher = Publisher(settings, client_id="test")

    async def start(self) -> None:
        """Connect."""
        await self._publisher.start()
        await self._reader.start()

    async def stop(self) -> None:
        """Release the connections."""
        await self._reader.stop()
        await self._publisher.stop()

    async def next(self, timeout_seconds: float = 20.0) -> tuple[Record, ImageEvent]:
        """Return the next image that was published."""
        async with asyncio.timeout(timeout_seconds):
            async for record in self._reader:
                return record, events.decode_image(record)
        raise AssertionError("the reader ended")

    async def predict(
        self,
        record: Record,
        outcome: events.Outcome = "predicted",
        deployment: str = "default",
        models: tuple[ModelResult, ...] | None = None,
    ) -> Prediction:
        """Publish a prediction for an image, by default with one model that has a vector of zeros."""
        event = events.decode_image(record)
        model = ModelResult(
            model="builtin:quality", version="1", digest="d", task="classify", label="sharp", score=0.9,
            embedding=events.encode_embedding(b"\x00" * 8), dimension=2,
        )  # fmt: skip
        prediction = Prediction(
            id=prediction_id(event.id, deployment, (("builtin:quality", "1"),)),
            image_id=event.id,
            deployment=deployment,
            lane="realtime",
            outcome=outcome,
            time=datetime.now(UTC),
            receipt=Receipt(topic=record.topic, partition=record.partition, offset=record.offset),
            models=((model,) if models is None else models) if outcome == "predicted" else (),
            purpose=event.purpose,
            reason="the deadline has passed" if outcome == "expired" else None,
        )
        await self._publisher.publish(
            self._settings.topic(PREDICTIONS.name), events.encode_prediction(prediction)
        )
        return prediction

    async def dead_letter(self, record: Record, error: MillraceError) -> deadletters.DeadLetter:
        """Publish a dead letter for an image."""
        letter = deadletters.from_error(self._settings.group("predict"), record, error, datetime.now(UTC))
        topic = self._settings.topic(DEAD_LETTERS.name)
        await self._publisher.publish(topic, deadletters.encode_dead_letter(letter))
        return letter
