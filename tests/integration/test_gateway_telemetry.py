"""Telemetry, alerts and silences over HTTP, from a real PostgreSQL that `record`'s own code has written to."""

import csv
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from millrace import ports
from pipeline import notifications
from pipeline.notifications import Transition
from pipeline.receivers import Receiver
from pipeline.settings import load
from pipeline.telemetry import Condition, Gpu, GpuWindow, Sample, Samples, Windows, alert_id
from pipeline.telemetry_database import TelemetryDatabase
from tests.support.gateway import Gateway, serving
from tests.support.receivers import alert

START = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
MIG = "MIG-GPU-5fd4f087/7/0"
MINUTE = timedelta(minutes=1)


@pytest.fixture
async def database_of_gpus(database: str) -> AsyncIterator[TelemetryDatabase]:
    opened = await TelemetryDatabase.open(load(database_url=database))
    yield opened
    await opened.close()


@pytest.fixture
async def gateway(database: str, tmp_path: Path) -> AsyncIterator[Gateway]:
    settings = load(
        kafka_bootstrap_servers=f"127.0.0.1:{ports.find_free()}", database_url=database,
        object_store_url=str(tmp_path / "objects"), energy_price_per_kwh=0.3, gpu_hour_price=2.0, currency="EUR",
    )  # fmt: skip
    async with serving(settings) as made:
        yield made


def sample(uuid: str, seconds: float, **more: Any) -> Sample:
    values = more.pop("values", {"temperature_celsius": 50.0 + seconds, "power_watts": 300.0})
    return Sample(gpu_uuid=uuid, time=START + timedelta(seconds=seconds), values=values, **more)


async def save(database: TelemetryDatabase, host: str, *samples: Sample, gpus: tuple[Gpu, ...] = ()) -> None:
    await database.save_samples([(host, Samples(host=host, samples=samples, gpus=gpus))])


async def fleet(database: TelemetryDatabase) -> None:
    """Three hosts with two GPUs each; one GPU is lost, one a MIG instance."""
    for number in range(3):
        uuids = [f"GPU-{number}a", MIG if number == 2 else f"GPU-{number}b"]
        gpus = tuple(Gpu(gpu_uuid=uuid, index=index, model="H100") for index, uuid in enumerate(uuids))
        lost = sample(uuids[1], 20, state="lost") if number == 1 else sample(uuids[1], 20)
        await save(
            database, f"node-{number}", *(sample(uuids[0], each) for each in (0, 10, 20)), lost, gpus=gpus
        )


async def holds(
    database: TelemetryDatabase,
    uuid: str,
    host: str,
    rule: str,
    severity: str,
    minute: int,
    state: str = "firing",
) -> str:
    """Have a condition hold from a minute on; return the alert's id."""
    since = START + minute * MINUTE
    condition = Condition(rule=rule, severity=severity, state=state, since=since, message="hot")  # type: ignore[arg-type]
    window = GpuWindow(gpu_uuid=uuid, host=host, model="H100", samples=6, conditions=(condition,))
    await database.save_windows([Windows(key=host, start=since, end=since + MINUTE, gpus=(window,))])
    return alert_id(uuid, rule, since)


async def pages(http: httpx.AsyncClient, path: str, rows: str, **parameters: Any) -> list[list[Any]]:
    """Follow the links from page to page."""
    found, following = [], httpx.URL(path, params=parameters)
    while True:
        answer = await http.get(following)
        assert answer.status_code == 200, answer.text
        found.append(answer.json()[rows])
        link = answer.headers.get("link")
        assert (link is None) == ("next_cursor" not in answer.json())
        if link is None:
            return found
        following = httpx.URL(link.partition("<")[2].partition(">")[0])


def rows_of(answer: httpx.Response) -> list[dict[str, str]]:
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(answer.text)))


async def test_gpus_and_hosts(gateway: Gateway, database_of_gpus: TelemetryDatabase) -> None:
    """GPUs and hosts come in order, page by page, filtered, with latest values and what fires; as CSV too."""
    await fleet(database_of_gpus)
    await holds(database_of_gpus, "GPU-0a", "node-0", "thermal", "critical", 1)
    http = gateway.http
    found = await pages(http, "/v1/gpus", "gpus", limit=4)
    assert [[gpu["gpu_uuid"] for gpu in page] for page in found] == [
        ["GPU-0a", "GPU-0b", "GPU-1a", "GPU-1b"], ["GPU-2a", MIG],
    ]  # fmt: skip
    first = found[0][0]
    assert first["firing"] == {"critical": 1, "warning": 0, "info": 0}
    assert first["latest"]["values"] == {"temperature_celsius": 70.0, "power_watts": 300.0}
    assert [gpu["gpu_uuid"] for gpu in (await http.get("/v1/gpus?state=lost")).json()["gpus"]] == ["GPU-1b"]
    assert (await http.get("/v1/gpus?host=node-9")).json() == {"gpus": []}
    assert (await http.get(f"/v1/gpus/{quote(MIG, safe='')}")).json()["host"] == "node-2"
    as_csv = rows_of(await http.get("/v1/gpus?host=node-1", headers={"accept": "text/csv"}))
    assert [(row["gpu_uuid"], row["state"], row["latest.values.power_watts"]) for row in as_csv] == [
        ("GPU-1a", "ok", "300.0"), ("GPU-1b", "lost", "300.0"),
    ]  # fmt: skip
    hosts = await pages(http, "/v1/hosts", "hosts", limit=2)
    assert [[(host["host"], host["gpus"], host["lost"]) for host in page] for page in hosts] == [
        [("node-0", 2, 0), ("node-1", 2, 1)], [("node-2", 2, 0)],
    ]  # fmt: skip
    assert hosts[0][0]["firing"]["critical"] == 1


async def test_latest_values_of_fields_that_come_apart(
    gateway: Gateway, database_of_gpus: TelemetryDatabase
) -> None:
    """Each field's newest value within two minutes is shown, whatever sample has it; none of a lost GPU."""

    def apart(uuid: str) -> list[Sample]:
        return [
            sample(uuid, 0, values={"power_limit_watts": 700}),
            sample(uuid, 10, values={"temperature_celsius": 40}),
            sample(uuid, 100, values={"utilization_percent": 0, "power_watts": 1}),
            sample(uuid, 115, values={"utilization_percent": 95}),
            sample(uuid, 116.3, values={"temperature_celsius": 61}),
            sample(uuid, 117.7, values={"power_watts": 301.5}),
            sample(uuid, 119, values={"memory_used_mebibytes": 7}),
        ]

    await save(database_of_gpus, "node-1", *apart("GPU-1"), sample("GPU-1", 121, values={}, xids=(13,)))
    await save(database_of_gpus, "node-1", *apart("GPU-2"), sample("GPU-2", 121, values={}, state="lost"))
    values = {
        "utilization_percent": 95.0, "memory_used_mebibytes": 7.0, "temperature_celsius": 61.0,
        "power_watts": 301.5,
    }  # fmt: skip
    for path, latest in (("GPU-1", values), ("GPU-2", {})):
        found = (await gateway.http.get(f"/v1/gpus/{path}")).json()["latest"]
        assert found["values"] == latest
        assert datetime.fromisoformat(found["time"]) == START + timedelta(seconds=121)
    as_csv = rows_of(await gateway.http.get("/v1/gpus?format=csv"))
    assert [row["latest.values.power_watts"] for row in as_csv] == ["301.5", ""]


async def test_samples_come_back_value_for_value(
    gateway: Gateway, database_of_gpus: TelemetryDatabase
) -> None:
    """Raw samples are what was published, inclusive at both ends, by any field's name, page by page, as CSV too."""
    given = [
        sample(
            "GPU-1", 0, values={"temperature_celsius": 41.25, "energy_millijoules": 2.0**52 + 1, "acme:rpm": 7.5}
        ),
        sample("GPU-1", 0.1, values={"power_watts": 0.1}, xids=(79, 13), source_time=START - timedelta(days=99)),
        sample("GPU-1", 60, values={}, state="lost"),
    ]  # fmt: skip
    await save(database_of_gpus, "node-1", *given)
    where = "/v1/gpus/GPU-1/telemetry"
    span = {"start": START.isoformat(), "end": (START + MINUTE).isoformat()}
    for limit in (1, 2, 1000):
        found = [
            each for page in await pages(gateway.http, where, "samples", **span, limit=limit) for each in page
        ]
        assert [each["values"] for each in found] == [one.values for one in given]
        assert [each.get("xids", []) for each in found] == [list(one.xids) for one in given]
        assert [each.get("lost", False) for each in found] == [False, False, True]
        assert [datetime.fromisoformat(each["time"]) for each in found] == [one.time for one in given]
    assert datetime.fromisoformat(found[1]["source_time"]) == given[1].source_time
    named = {"fields": "DCGM_FI_DEV_GPU_TEMP, acme:rpm,DCGM_FI_DEV_BOARD_POWER_WATTS"}
    chosen = (await gateway.http.get(where, params=span | named)).json()["samples"]
    assert [each["values"] for each in chosen] == [
        {"temperature_celsius": 41.25, "acme:rpm": 7.5}, {"power_watts": 0.1}, {},
    ]  # fmt: skip
    as_csv = rows_of(await gateway.http.get(where, params=span | {"format": "csv"}))
    assert [float(row["temperature_celsius"] or "nan") for row in as_csv[:1]] == [41.25]
    assert [float(row["energy_millijoules"]) for row in as_csv[:1]] == [2.0**52 + 1]
    assert [row["xids"] for row in as_csv] == ["", "79 13", ""]
    assert (await gateway.http.get(where)).json()["samples"] == []  # the last hour


@pytest.mark.parametrize("late", [{}, {"fan_speed_percent": 31.0}], ids=["as-before", "another-field"])
async def test_a_field_that_only_a_late_sample_has(
    gateway: Gateway, database_of_gpus: TelemetryDatabase, late: dict[str, float]
) -> None:
    """Of very many samples each comes with all its fields, those that no earlier one has too."""
    given = [sample("GPU-1", at / 10, values={"power_watts": float(at)}) for at in range(120)]
    given += [sample("GPU-1", 13, values={"power_watts": 1.0} | late), sample("GPU-1", 14, values={})]
    given += [sample("GPU-1", 15, values={"acme:rpm": 7.5, "power_watts": 2.0})]
    await save(database_of_gpus, "node-1", *given)
    span = {"start": START.isoformat(), "end": (START + MINUTE).isoformat()}
    for limit in (50, 1000):
        found = await pages(gateway.http, "/v1/gpus/GPU-1/telemetry", "samples", **span, limit=limit)
        assert [each["values"] for page in found for each in page] == [one.values for one in given]


async def test_samples_are_rolled_up(gateway: Gateway, database_of_gpus: TelemetryDatabase) -> None:
    """A step below a minute is made from the samples, from the moment that `start` falls into on."""
    await save(database_of_gpus, "node-1", *(sample("GPU-1", each, xids=(31,)) for each in range(0, 60, 5)))
    span = {
        "start": (START + timedelta(seconds=20)).isoformat(),
        "end": (START + MINUTE).isoformat(),
        "step": "15s",
    }
    found = await pages(gateway.http, "/v1/gpus/GPU-1/telemetry", "samples", **span, limit=2)
    points = [point for page in found for point in page]
    assert [len(page) for page in found] == [2, 1]
    assert [point["values"]["temperature_celsius"] for point in points] == [
        {"count": 3, "min": 50.0 + at, "max": 60.0 + at, "mean": 55.0 + at} for at in (15, 30, 45)
    ]
    assert points[0]["xids"] == [31, 31, 31]
    assert [datetime.fromisoformat(point["time"]) - START for point in points] == [
        timedelta(seconds=each) for each in (15, 30, 45)
    ]


async def test_alerts_and_who_was_told(gateway: Gateway, database_of_gpus: TelemetryDatabase) -> None:
    """Alerts come latest first, filtered, page by page, without those that never fired; one says who was told."""
    await fleet(database_of_gpus)
    fleeting = await holds(database_of_gpus, "GPU-1a", "node-1", "idle", "info", 1, state="pending")
    hot = await holds(database_of_gpus, "GPU-0a", "node-0", "thermal", "critical", 1)
    slow = await holds(database_of_gpus, "GPU-1a", "node-1", "straggler", "warning", 2)
    torn = await holds(database_of_gpus, "GPU-0a", "node-0", "nvlink", "warning", 3)
    http = gateway.http
    found = await pages(http, "/v1/alerts", "alerts", limit=1)
    assert [alert["id"] for page in found for alert in page] == [torn, slow, hot]

    async def ids(path: str) -> list[str]:
        return [each["id"] for each in (await http.get(path)).json()["alerts"]]

    assert await ids("/v1/alerts?severity=warning&host=node-0") == [torn]
    assert await ids("/v1/alerts?rule=thermal&state=resolved&state=pending") == [hot]
    assert await ids(f"/v1/alerts?since={quote((START + 2 * MINUTE).isoformat())}") == [torn, slow]
    assert await ids("/v1/gpus/GPU-1a/alerts") == [slow]
    to = Receiver(name="on-call", kind="webhook", url="http://127.0.0.1:9")
    told = msgspec.structs.replace(alert(1), id=slow)
    await notifications.save(database_of_gpus.pool, [Transition(to, told, datetime.now(UTC))])
    assert (await http.get(f"/v1/alerts/{fleeting}")).json()["alert"]["state"] == "resolved"
    detail = (await http.get(f"/v1/alerts/{slow}")).json()
    assert detail["alert"]["condition"]["message"] == "hot"
    assert [(each["receiver"], each["status"]) for each in detail["notifications"]] == [
        ("on-call", "waiting")
    ]
    as_csv = rows_of(await http.get("/v1/alerts?format=csv&rule=nvlink"))
    assert [(row["id"], row["condition.message"]) for row in as_csv] == [(torn, "hot")]


async def test_energy(gateway: Gateway, database_of_gpus: TelemetryDatabase) -> None:
    """Joules, kilowatt-hours, idle hours and costs, of minutes and whole hours, of GPUs and hosts."""
    await fleet(database_of_gpus)
    pool = database_of_gpus.pool
    async with pool.transaction() as connection:
        for table, step in (("gpu_minutes", MINUTE), ("gpu_hours", 60 * MINUTE)):
            await connection.execute(f"CREATE TABLE {table}_test PARTITION OF {table} DEFAULT")
            await connection.execute(
                f"INSERT INTO {table} (gpu_id, time, samples, seconds, idle_seconds, joules) "
                "SELECT gpu_id, moment, 6, $3::float8, $3 / 2, $3 * 1000 FROM gpus, "
                "generate_series($1::timestamptz, $1 + interval '4 hours' - $2::interval, $2) "
                "AS moment WHERE gpu_uuid IN ('GPU-0a', 'GPU-0b', 'GPU-1a')",
                START, step, step.total_seconds(),
            )  # fmt: skip
    # From 12:30 to 15:10: half an hour, two whole hours and ten minutes.
    span = {"start": (START + 30 * MINUTE).isoformat(), "end": (START + 190 * MINUTE).isoformat()}
    answer = (await gateway.http.get("/v1/energy", params=span | {"by": "gpu"})).json()
    hours = 160 / 60
    assert len(answer["rows"]) == 3
    for row in answer["rows"]:
        assert row["joules"] == pytest.approx(hours * 3600 * 1000)
        assert row["kilowatt_hours"] == pytest.approx(hours)
        assert (row["gpu_hours"], row["idle_gpu_hours"]) == pytest.approx((hours, hours / 2))
        assert (row["energy_cost"], row["idle_cost"]) == pytest.approx((hours * 0.3, hours))
    assert answer["total"]["kilowatt_hours"] == pytest.approx(3 * hours)
    assert answer["currency"] == "EUR"
    by_host = (await gateway.http.get("/v1/energy", params=span)).json()["rows"]
    assert [(row["host"], round(row["gpu_hours"], 6)) for row in by_host] == [
        ("node-0", round(2 * hours, 6)), ("node-1", round(hours, 6)),
    ]  # fmt: skip
    where = "/v1/gpus/GPU-0a/telemetry"
    rolled = (await gateway.http.get(where, params=span | {"step": "1h"})).json()["samples"]
    assert [point["samples"] for point in rolled] == [6, 6, 6, 6]
    rolled = (await gateway.http.get(where, params=span | {"step": "5m"})).json()["samples"]
    assert [point["samples"] for point in rolled] == [30] * 32 + [6]


async def test_silences_over_http(gateway: Gateway) -> None:
    """A silence begins, is listed, ends; one that would hold for ever or fit everything is refused."""
    http, ends_at = gateway.http, (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    made = await http.post(
        "/v1/silences", json={"match": {"host": "node-7"}, "ends_at": ends_at, "comment": "fans"}
    )
    assert made.status_code == 201, made.text
    where = made.headers["location"]
    assert [each["match"] for each in (await http.get("/v1/silences")).json()["silences"]] == [
        {"host": "node-7"}
    ]
    assert (await http.delete(where)).status_code == 200
    assert (await http.delete(where)).status_code == 404
    assert (await http.get("/v1/silences")).json()["silences"] == []
    assert len((await http.get("/v1/silences?all=true")).json()["silences"]) == 1
    for wrong in (
        {"ends_at": ends_at}, {"match": {}, "ends_at": ends_at}, {"match": {"a b": "c"}, "ends_at": ends_at},
        {"match": {"host": []}, "ends_at": ends_at}, {"match": {"host": "a"}, "ends_at": "2020-01-01T00:00:00Z"},
        {"match": {"host": "a"}, "ends_at": "2099-01-01T00:00:00"},
        {"match": {"host": "a\x00"}, "ends_at": ends_at},
        {"match": {"host": "a"}, "ends_at": "2099-01-01T00:00:00Z"},
    ):  # fmt: skip
        refused = await http.post("/v1/silences", json=wrong)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), wrong
    assert (
        await http.post("/v1/silences", content=b"{", headers={"content-type": "application/json"})
    ).status_code == 400
    assert (await http.post("/v1/silences", content=b"{}")).status_code == 415


async def test_what_cannot_be_asked_says_so(gateway: Gateway, database_of_gpus: TelemetryDatabase) -> None:
    """A wrong UUID, time, field, step or cursor is a problem that names the parameter, never a failure."""
    await fleet(database_of_gpus)
    where = "/v1/gpus/GPU-0a/telemetry"
    wrong = [
        ("/v1/gpus/GPU%200a", 422, "uuid"), ("/v1/gpus/%FF", 422, "uuid"), ("/v1/gpus/GPU-9", 404, "UUID"),
        ("/v1/gpus/GPU-9/telemetry", 404, "UUID"), ("/v1/gpus/GPU-9/alerts", 404, "UUID"),
        ("/v1/alerts/none", 404, "id"), (f"{where}?start=yesterday", 422, "start"),
        (f"{where}?start=2026-01-01T00:00:00", 422, "start"), (f"{where}?start=now&end=now-5m", 422, "end"),
        (f"{where}?start=now-999999999w", 422, "start"), (f"{where}?end=9999-12-31T23:59:59Z", 422, "end"),
        (f"{where}?start=0001-01-01T00:00:00%2B14:00", 422, "start"), (f"{where}?step=0s", 422, "step"),
        (f"{where}?step=1y", 422, "step"), (f"{where}?step=90s&start=now-2d", 422, "step"),
        (f"{where}?fields=temperture_celsius", 422, "Is temperature_celsius meant?"),
        (f"{where}?fields=acme:rpm&step=1m", 422, "only fields of the table"),
        (f"{where}?start_time=now-5m", 422, "'start_time': there is no such parameter here. Is start"),
        ("/v1/alerts?gpu=GPU-0a", 422, "'gpu'"), ("/v1/energy?step=1h&x=", 422, "'step', 'x'"),
        (f"{where}?fields=a%20b", 422, "fields"), (f"{where}?fields=", 422, "fields"),
        (f"{where}?cursor=x", 422, "cursor"), (f"{where}?cursor=bnVsbA", 422, "cursor"),
        (f"{where}?limit=0", 422, "limit"), ("/v1/gpus?cursor=WyJhIiwiXHUwMDAwIl0", 422, "cursor"),
        ("/v1/gpus?state=broken", 422, "state"), ("/v1/gpus?host=%00", 422, "host"),
        ("/v1/alerts?severity=bad", 422, "severity"), ("/v1/energy?by=rack", 422, "by"),
        ("/v1/energy?format=xml", 422, "format"), ("/v1/silences?cursor=LTE", 422, "cursor"),
    ]  # fmt: skip
    for path, status, named in wrong:
        answer = await gateway.http.get(path)
        assert (answer.status_code, named in answer.json()["detail"]) == (status, True), (path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
