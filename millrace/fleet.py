"""The sample fleet of `millrace up`: two hosts of made-up GPUs, one of which gets too hot, and its alert.

It lives twenty minutes in the first seconds, so that the fault and its alert are there at once, and then goes on at
the pace of the clock on the wall. Fleet and fault are always the same; GPUs and hosts are new in each run, so that
what was detected before stays.
"""

import asyncio
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from loadtest.fleet import Fleet, Plan
from loadtest.fleet_models import MODELS
from millrace.feed import PUBLISH_SECONDS, Feed, Tick
from millrace.progress import Progress
from pipeline.broker import Publisher
from pipeline.settings import Settings
from pipeline.telemetry import Alert

GPUS = 16
_BEFORE_SECONDS = 1200.0
# The past passes in twelve seconds: a hundred samples of each GPU, as fast as a person can follow.
_SPEED = 100.0
_FAULT_AT_SECONDS = 600.0
_LIFE_SECONDS = 7 * 86_400.0


class SampleFleet:
    """One run's fleet, and whether the alert came that it must raise."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self._settings = settings
        now = datetime.now(UTC).replace(microsecond=0)
        # One kind of GPU, which tells its margin to the slowdown.
        self._fleet = Fleet(
            Plan(
                begin=now - timedelta(seconds=_BEFORE_SECONDS), seconds=_LIFE_SECONDS, gpus=GPUS, seed=seed,
                faults=("thermal",), fault_window=(_FAULT_AT_SECONDS, _FAULT_AT_SECONDS), models=MODELS[:1],
                identity=secrets.token_hex(3),
            )
        )  # fmt: skip
        (self.fault,) = self._fleet.injected
        self._alerted = asyncio.Event()

    @property
    def raised(self) -> bool:
        """Whether the alert fired."""
        return self._alerted.is_set()

    def see(self, alert: Alert) -> None:
        """Note an alert."""
        if alert.gpu_uuid == self.fault.gpu_uuid and alert.state == "firing":
            self._alerted.set()

    async def publish(self) -> None:
        """Publish until cancelled.

        Raises:
            DependencyError: the broker does not take it.
        """
        publisher = Publisher(self._settings, client_id="millrace-up-fleet", timeout_seconds=PUBLISH_SECONDS)
        await publisher.start()
        feed = Feed(self._settings, publisher, peers="host", as_json=False)
        try:
            await feed.run(self._ticks(), Progress("", None), is_paced=True)
        finally:
            await publisher.stop()

    async def wait(self, seconds: float) -> bool:
        """Return whether the alert fired, when it did or when so much time has passed."""
        try:
            async with asyncio.timeout(seconds):
                await self._alerted.wait()
        except TimeoutError:
            pass
        return self.raised

    def _ticks(self) -> Iterator[Tick]:
        begin = self._fleet.plan.begin
        for step in self._fleet:
            lived = (step.time - begin).total_seconds()
            yield Tick(max(lived / _SPEED, lived - _BEFORE_SECONDS), step.records, 1)
