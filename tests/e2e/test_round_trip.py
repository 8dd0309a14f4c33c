"""From a dump to the API: what `millrace replay` publishes comes back value for value."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace.replay import Wishes, replay
from pipeline.partitions import Partitions
from pipeline.rollups import Rollups
from pipeline.telemetry_reads import SHOWN
from tests.support.dumps import values, write
from tests.support.gateway import serving
from tests.support.spine import Spine


async def test_a_replayed_dump_comes_back_from_the_api(spine: Spine, tmp_path: Path) -> None:
    """Every value of a dump is in the API, under its GPU and with its time, and nothing else is.

    A dump has each metric at a second of its own: a GPU is shown with the last value of each, and with its energy.
    """
    rows = values(gpus=41, seed=15, rounds=2)
    odd = rows[0].row() | {"metric_name": "acme_fan_rpm", "value": "1200.5"}
    path = write(tmp_path / "dump.csv", [*(row.row() for row in rows), odd])
    workers = await spine.start("record")
    assert await replay(spine.settings, path, Wishes(interval_seconds=0.1, speed=30.0, strict=True)) == 0
    await spine.wait_caught_up("record")
    expected = {(row.host, row.gpu_uuid, row.time, row.name, row.value) for row in rows}
    expected.add((rows[0].host, rows[0].gpu_uuid, rows[0].time, "acme_fan_rpm", 1200.5))
    found = set()
    async with serving(spine.settings) as gateway:
        gpus = (await _get(gateway.http, "/v1/gpus", limit=1000))["gpus"]
        mine = [gpu for gpu in gpus if gpu["host"] in {row.host for row in rows}]
        assert {gpu["model"] for gpu in mine} == {"NVIDIA H100 80GB HBM3"}
        last = {(row.gpu_uuid, row.name): row.value for row in rows if row.name in SHOWN}
        assert last == {
            (gpu["gpu_uuid"], name): value for gpu in mine for name, value in gpu["latest"]["values"].items()
        }
        joules, idle = {}, {}
        for gpu in mine:
            where = f"/v1/gpus/{gpu['gpu_uuid']}/telemetry"
            samples = (await _get(gateway.http, where, start="now-15m", end="now"))["samples"]
            times = [datetime.fromisoformat(sample["time"]) for sample in samples]
            assert times == sorted(set(times))
            found |= {
                (gpu["host"], gpu["gpu_uuid"], datetime.fromisoformat(sample["source_time"]), name, value)
                for sample in samples
                for name, value in sample["values"].items()
            }
            joules[gpu["gpu_uuid"]], idle[gpu["gpu_uuid"]] = _taken(times, samples)
        assert found == expected
        await spine.stop(*workers)
        pool = spine.database.pool
        await Rollups(pool, Partitions(pool)).advance(datetime.now(UTC) + timedelta(hours=1))
        energy = await _get(gateway.http, "/v1/energy", start="now-15m", end="now", by="gpu")
    of_gpus = {row["gpu_uuid"]: row for row in energy["rows"] if row["gpu_uuid"] in joules}
    assert {uuid: row["joules"] for uuid, row in of_gpus.items()} == pytest.approx(joules)
    assert {uuid: row["idle_gpu_hours"] * 3600 for uuid, row in of_gpus.items()} == pytest.approx(
        idle, abs=1e-9
    )
    assert sum(idle.values()) > 0


def _taken(times: list[datetime], samples: list[dict[str, Any]]) -> tuple[float, float]:
    """Return joules and idle seconds, of power and of utilization each by itself."""
    series = {
        name: [
            (time, sample["values"][name])
            for time, sample in zip(times, samples, strict=True)
            if name in sample["values"]
        ]
        for name in ("power_watts", "utilization_percent")
    }
    joules = sum(
        (watts + before) / 2 * (time - earlier).total_seconds()
        for (earlier, before), (time, watts) in itertools.pairwise(series["power_watts"])
    )
    idle = sum(
        (time - earlier).total_seconds()
        for (earlier, _), (time, percent) in itertools.pairwise(series["utilization_percent"])
        if percent < 5
    )
    return joules, idle


async def _get(http: httpx.AsyncClient, path: str, **parameters: object) -> Any:
    answer = await http.get(path, params=httpx.QueryParams({k: str(v) for k, v in parameters.items()}))
    assert answer.status_code == 200, answer.text
    return answer.json()
