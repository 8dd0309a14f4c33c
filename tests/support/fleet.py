"""A fleet of GPUs for end-to-end tests of telemetry: what it sent, and the accounting of what was kept of it.

Each host sends its GPUs' samples, and the closed windows that a detector would make of them; in the windows each
GPU has one condition after the other, so which steps alerts must make is known.
"""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from pipeline import readers, telemetry
from pipeline.telemetry import Condition, GpuWindow, Sample, Samples, Windows
from pipeline.topics import GPU_ALERTS, GPU_SAMPLES, GPU_WINDOWS
from tests.support.eventually import eventually
from tests.support.spine import Spine

SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
# Of each condition: it begins, it fires, it is over.
LIFE: tuple[Any, ...] = ("pending", "firing", None)
FIELDS = ("temperature_celsius", "power_watts", "utilization_percent")


class Fleet:
    """Hosts with GPUs, their clock, and the journal of what they sent."""

    def __init__(self, spine: Spine, name: str, *, hosts: int = 4, gpus: int = 8) -> None:
        self._spine = spine
        self._hosts = {
            f"{name}-{host}": [f"GPU-{name}-{host}-{gpu}" for gpu in range(gpus)] for host in range(hosts)
        }
        now = datetime.now(UTC).replace(second=0, microsecond=0)
        self._start = now - timedelta(hours=2)
        self._ticks = 0
        self._minutes = 0
        self.samples: dict[tuple[str, datetime], tuple[float, ...]] = {}
        self.steps: Counter[tuple[str, str]] = Counter()

    async def tick(self, count: int = 1, *, key: str | None = None) -> None:
        """Send one record per host, so many times, with a second in between on the fleet's own clock."""
        for _ in range(count):
            time = self._start + self._ticks * SECOND
            self._ticks += 1
            await asyncio.gather(
                *(self._send_samples(host, uuids, time, key) for host, uuids in self._hosts.items())
            )

    async def close_window(self) -> None:
        """Send the next window of each host; every third one ends a condition of each of its GPUs."""
        start = self._start + self._minutes * MINUTE
        state = LIFE[self._minutes % len(LIFE)]
        since = start - (self._minutes % len(LIFE)) * MINUTE
        self._minutes += 1
        for host, uuids in self._hosts.items():
            held = (
                ()
                if state is None
                else (Condition(rule="hot", severity="warning", state=state, since=since),)
            )
            gpus = tuple(GpuWindow(gpu_uuid=uuid, host=host, samples=60, conditions=held) for uuid in uuids)
            windows = Windows(key=host, start=start, end=start + MINUTE, gpus=gpus)
            for uuid in uuids:
                self.steps[telemetry.alert_id(uuid, "hot", since), state or "resolved"] += 1
            await self._publish(GPU_WINDOWS.name, telemetry.encode_windows(windows))

    async def _send_samples(self, host: str, uuids: list[str], time: datetime, key: str | None) -> None:
        samples = []
        for number, uuid in enumerate(uuids):
            values = (40.0 + number, 300.0 + time.second, float(time.minute))
            self.samples[uuid, time] = values
            samples.append(Sample(gpu_uuid=uuid, time=time, values=dict(zip(FIELDS, values, strict=True))))
        await self._publish(
            GPU_SAMPLES.name, telemetry.encode_samples(Samples(host=host, samples=tuple(samples)), key)
        )

    async def _publish(self, topic: str, outgoing: Any) -> None:
        await self._spine.publisher.publish_forever(self._spine.settings.topic(topic), outgoing, step="test")

    async def peer_keys(self) -> set[str]:
        """Return by which keys the GPUs are stored."""
        return {row["peer_key"] for row in await self._fetch("SELECT peer_key FROM gpus")}

    async def wait_stored(self, count: int, timeout_seconds: float = 60.0) -> None:
        """Wait until so many samples are stored."""

        async def enough() -> bool:
            return len(await self._fetch("SELECT 1 FROM gpu_samples")) >= count

        await eventually(enough, timeout_seconds)

    async def settled(self, *, max_repeated_steps: int = 0) -> None:
        """Wait until `record` has kept everything, and check that it is all there, once and as it was sent."""
        await self._spine.wait_caught_up("record")
        rows = await self._fetch(
            f"SELECT gpu_uuid, time, {', '.join(FIELDS)} FROM gpu_samples JOIN gpus USING (gpu_id)"
        )
        assert {(row[0], row[1]): tuple(row[2:]) for row in rows} == self.samples
        assert len(rows) == len(self.samples)
        alerts = await self._fetch("SELECT alert_id, state FROM gpu_alerts")
        assert dict(alerts) == self._last_states()
        windows = await self._fetch("SELECT count(*), count(DISTINCT (gpu_id, start_time)) FROM gpu_windows")
        count = self._minutes * sum(map(len, self._hosts.values()))
        assert [tuple(row) for row in windows] == [(count, count)]

        async def published() -> bool:
            return not await self._fetch("SELECT 1 FROM gpu_alert_outbox")

        await eventually(published, 30)
        await self._check_steps(max_repeated_steps)

    async def _check_steps(self, max_repeated: int) -> None:
        """Check that the topic has every step, in order; a crash between publishing and noting it repeats some."""
        settings = self._spine.settings
        records = await readers.read_all(settings, settings.topic(GPU_ALERTS.name))
        alerts = [telemetry.decode_alert(record) for record in records]
        assert {(alert.id, alert.state) for alert in alerts} == set(self.steps)
        assert len(alerts) - len(self.steps) <= max_repeated
        first: dict[str, list[str]] = {}
        for alert in alerts:
            seen = first.setdefault(alert.id, [])
            if alert.state not in seen:
                seen.append(alert.state)
        expected = ["pending", "firing", "resolved"]
        assert all(seen == expected[: len(seen)] for seen in first.values())

    def _last_states(self) -> dict[str, str]:
        order = ["pending", "firing", "resolved"]
        states: dict[str, str] = {}
        for alert_id, state in self.steps:
            states[alert_id] = max(states.get(alert_id, "pending"), state, key=order.index)
        return states

    async def _fetch(self, statement: str) -> list[Any]:
        connection = await asyncpg.connect(self._spine.settings.resolved_database)
        try:
            return list(await connection.fetch(statement))
        finally:
            await connection.close()
