"""From a dump to the API: what `millrace replay` publishes comes back value for value."""

from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from millrace.replay import Wishes, replay
from tests.support.dumps import values, write
from tests.support.gateway import serving
from tests.support.spine import Spine


async def test_a_replayed_dump_comes_back_from_the_api(spine: Spine, tmp_path: Path) -> None:
    """Every value of a dump is in the API, under its GPU and with its time, and nothing else is."""
    rows = values(gpus=41, seed=11)
    odd = rows[0].row() | {"metric_name": "acme_fan_rpm", "value": "1200.5"}
    path = write(tmp_path / "dump.csv", [*(row.row() for row in rows), odd])
    await spine.start("record")
    assert await replay(spine.settings, path, Wishes(interval_seconds=0.1, speed=10.0, strict=True)) == 0
    await spine.wait_caught_up("record")
    expected = {(row.host, row.gpu_uuid, row.time, row.name, row.value) for row in rows}
    expected.add((rows[0].host, rows[0].gpu_uuid, rows[0].time, "acme_fan_rpm", 1200.5))
    found = set()
    async with serving(spine.settings) as gateway:
        gpus = (await _get(gateway.http, "/v1/gpus", limit=1000))["gpus"]
        mine = [gpu for gpu in gpus if gpu["host"] in {row.host for row in rows}]
        assert {gpu["model"] for gpu in mine} == {"NVIDIA H100 80GB HBM3"}
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
    assert found == expected


async def _get(http: httpx.AsyncClient, path: str, **parameters: object) -> Any:
    answer = await http.get(path, params=httpx.QueryParams({k: str(v) for k, v in parameters.items()}))
    assert answer.status_code == 200, answer.text
    return answer.json()
