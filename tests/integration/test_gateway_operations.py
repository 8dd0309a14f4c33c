"""The gateway as something to run: health, keys, dependencies that are down, signals, wrong settings."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.server import listen
from millrace import ports
from millrace.kafka import EmbeddedKafka
from millrace.postgres import EmbeddedPostgres
from pipeline import admin, rotation
from pipeline.database import migrate
from pipeline.settings import Settings, load
from tests.support.eventually import eventually, eventually_sync
from tests.support.gateway import JPEG, serving
from tests.support.logged import capture
from tests.support.mounts import MountedSecret
from tests.support.workers import WorkerProcess

FORM = {"file": ("cat.jpg", JPEG)}


def settings_for(tmp_path: Path, **others: object) -> Settings:
    """Return settings of an installation without a broker or a database, unless told."""
    nobody = f"127.0.0.1:{ports.find_free()}"
    defaults: dict[str, object] = {
        "kafka_bootstrap_servers": nobody,
        "database_url": f"postgresql://postgres@{nobody}/none",
        "object_store_url": str(tmp_path / "objects"),
        "topic_partitions": 1,
    }
    return load(**(defaults | others))


@contextmanager
def gateway_process(tmp_path: Path, settings: Settings) -> Iterator[WorkerProcess]:
    """Yield `python -m gateway` as a process of its own."""
    port = ports.find_free()
    given = {"kafka_bootstrap_servers", "database_url", "object_store_url", "topic_prefix"}
    environment = {f"MILLRACE_{name.upper()}": str(getattr(settings, name)) for name in given}
    process = WorkerProcess(
        ["-m", "gateway"], environment | {"MILLRACE_GATEWAY_PORT": str(port)}, tmp_path / "gateway.log"
    )
    process.port = port
    process.start()
    try:
        yield process
    finally:
        process.kill()


async def test_keys_are_asked_for_and_follow_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a keys file every route of the API needs a key, health does not, and a rotated file counts."""
    mounted = MountedSecret(tmp_path / "mounted", {"keys": "# operators\nfirst-key\n\n  schlüssel  \n"})
    keys = mounted / "keys"
    logged = capture(monkeypatch, rotation)
    async with serving(settings_for(tmp_path, api_keys_file=keys)) as gateway:
        get = gateway.http.get

        async def status(headers: dict[str, str] | list[tuple[bytes, bytes]]) -> int:
            return (await get("/v1/images/x", headers=headers)).status_code

        refused = await get("/v1/images/x")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        assert refused.headers["www-authenticate"].startswith("Bearer")
        for wrong in ("", "second-key", "# operators", "first-key!", "first-ke"):
            assert await status({"x-api-key": wrong}) == 401
        assert await status({"authorization": "Basic first-key"}) == 401
        assert await status({"authorization": "Bearer second-key", "x-api-key": "first-key"}) == 401
        upload = await gateway.http.post("/v1/images", files=FORM)
        assert upload.status_code == 401

        # 503, not 401: the key is right, and there is no database.
        assert await status({"authorization": "Bearer first-key"}) == 503
        assert await status({"x-api-key": "first-key"}) == 503
        assert await status([(b"x-api-key", "schlüssel".encode())]) == 503
        for path in ("/livez", "/metrics", "/docs", "/openapi.json"):
            assert (await get(path)).status_code == 200
        ready = await get("/readyz")
        assert ready.status_code == 503
        assert "127.0.0.1" not in ready.text

        async def answers(key: str, expected: int) -> None:
            async def check() -> bool:
                return await status({"x-api-key": key}) == expected

            await eventually(check, 10.0)

        async def is_passed_over() -> bool:
            assert await status({"x-api-key": "first-key"}) == 503
            return any("changed secret cannot be used" in entry["event"] for entry in logged.entries)

        mounted.replace({"keys": b"second-key\n\xff"})  # half-written
        await eventually(is_passed_over, 10.0)
        mounted.replace({"keys": "second-key\n"})
        await answers("second-key", 503)
        assert await status({"x-api-key": "first-key"}) == 401
        mounted.replace({"keys": "# nobody\n"})
        await answers("second-key", 401)


def test_small_answers_do_not_wait_for_an_acknowledgement() -> None:
    """The gateway's sockets send at once; else each small answer on an open connection takes 40 ms more."""
    listeners = listen(load(gateway_port=ports.find_free()))
    waiting = [each for each in listeners if not each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)]
    for each in listeners:
        each.close()
    assert listeners
    assert waiting == []


async def test_it_starts_and_answers_with_everything_down(tmp_path: Path) -> None:
    """Without broker and database it is alive, unready with a reason each, and answers 503 within seconds."""
    async with serving(settings_for(tmp_path)) as gateway:
        assert (await gateway.http.get("/livez")).json() == {"alive": True}
        ready = await gateway.http.get("/readyz")
        assert ready.status_code == 503
        found = ready.json()["dependencies"]
        states = {name: dependency["ready"] for name, dependency in found.items()}
        assert states == {"kafka": False, "database": False, "object_store": True}
        assert found["kafka"]["reason"]
        assert found["database"]["reason"]
        started_at = time.monotonic()
        answers = await asyncio.gather(
            gateway.http.post("/v1/images", files=FORM),
            gateway.http.post("/v1/images", files=FORM, headers={"prefer": "wait=60"}),
            gateway.http.get("/v1/images/x"),
            gateway.http.get("/v1/images/x/content"),
            gateway.http.delete("/v1/images/x"),
        )
        assert time.monotonic() - started_at < 8.0
        assert [answer.status_code for answer in answers] == [503] * 5
        assert [answer.json()["code"] for answer in answers] == ["dependency"] * 5
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
        assert "127.0.0.1" not in "".join(answer.text for answer in answers)


async def test_uploads_outlive_the_broker(tmp_path: Path, own_kafka: EmbeddedKafka, database: str) -> None:
    """While the broker is down uploads are 503 within seconds, and go on when it is back."""
    settings = settings_for(
        tmp_path, kafka_bootstrap_servers=own_kafka.bootstrap_servers, database_url=database
    )
    await admin.apply_topics(settings)
    async with serving(settings) as gateway:

        async def upload() -> httpx.Response:
            return await gateway.http.post("/v1/images", files=FORM, headers={"idempotency-key": "k"})

        async def uploads_work() -> bool:
            return (await upload()).status_code == 202

        await eventually(uploads_work, 20.0)
        await asyncio.to_thread(own_kafka.kill)
        started_at = time.monotonic()
        response = await gateway.http.post("/v1/images", files=[("file", FORM["file"])] * 3)
        assert time.monotonic() - started_at < 8.0
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert [item["status"] for item in response.json()["images"]] == [503] * 3
        assert (await gateway.http.get("/readyz")).json()["dependencies"]["kafka"]["ready"] is False
        await asyncio.to_thread(own_kafka.start)
        await eventually(uploads_work, 40.0)


async def test_uploads_need_no_database(
    tmp_path: Path, kafka: str, topic_prefix: str, own_postgres: EmbeddedPostgres
) -> None:
    """A database that is down fails no upload, only what must be read from it, and only as long."""
    await migrate(own_postgres.dsn)
    settings = settings_for(
        tmp_path, kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, database_url=own_postgres.dsn
    )
    await admin.apply_topics(settings)
    async with serving(settings) as gateway:
        before = await gateway.http.post("/v1/images", files=FORM)
        assert before.status_code == 202
        await asyncio.to_thread(own_postgres.kill)
        started_at = time.monotonic()
        for headers in ({}, {"idempotency-key": "k"}, {"prefer": "wait=1"}):
            during = await gateway.http.post("/v1/images", files=FORM, headers=headers)
            assert during.status_code == 202
        assert time.monotonic() - started_at < 8.0
        assert (await gateway.http.get(before.headers["location"])).status_code == 503
        await asyncio.to_thread(own_postgres.start)

        async def is_there() -> bool:
            return (await gateway.http.get(before.headers["location"])).status_code == 200

        await eventually(is_there, 20.0)


def test_a_signal_lets_requests_finish(tmp_path: Path, kafka: str, topic_prefix: str, database: str) -> None:
    """SIGTERM answers waiting requests with what there is, finishes an upload under way, and exits 0."""
    settings = settings_for(
        tmp_path, kafka_bootstrap_servers=kafka, topic_prefix=topic_prefix, database_url=database
    )
    asyncio.run(admin.apply_topics(settings))
    with gateway_process(tmp_path, settings) as process:
        process.wait_ready()
        url = f"http://127.0.0.1:{process.port}/v1/images"
        curl = ["curl", "-sS", "-o", "-", "-w", "\n%{http_code}", "-F", f"file=@{tmp_path}/cat.jpg"]
        (tmp_path / "cat.jpg").write_bytes(JPEG.ljust(400_000, b"\x00"))
        slow = subprocess.Popen([*curl, "--limit-rate", "200k", url], stdout=subprocess.PIPE, text=True)
        waiting = subprocess.Popen([*curl, "-H", "Prefer: wait=60", url], stdout=subprocess.PIPE, text=True)
        accepted = 'millrace_uploads_total{lane="realtime",status="202"} 1.0'
        eventually_sync(lambda: accepted in process.get("/metrics")[1], 20.0)
        exit_code, seconds = process.terminate()
        answers = [client.communicate(timeout=20)[0] for client in (waiting, slow)]
    assert [answer.rpartition("\n")[2] for answer in answers] == ["202", "202"]
    assert json.loads(answers[0].rpartition("\n")[0])["state"] == "accepted"
    assert (exit_code, process.log().count("Traceback")) == (0, 0)
    assert seconds < 15.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_imported(number: signal.Signals) -> None:
    """A signal is heard from the start, also by the first process of a container, and nothing was begun."""
    program = f"""
import os, runpy, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "uvicorn":
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Finder)
runpy.run_module("gateway", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MILLRACE_GATEWAY_PORT", "none"),
        ("MILLRACE_GATEWAY_HOST", "0.0.0.0"),
        ("MILLRACE_DATABASE_URL", "mysql://x"),
        ("MILLRACE_OBJECT_STORE_URL", "ftp://x"),
        ("MILLRACE_API_KEYS_FILE", "/nowhere/keys"),
    ],
)
def test_a_wrong_setting_ends_it_with_one_line(variable: str, value: str) -> None:
    """A wrong setting is exit code 78 and one line that names it."""
    check_refusal(variable, **{variable: value})


def test_a_taken_port_or_empty_keys_end_it_with_one_line(tmp_path: Path) -> None:
    """A port that another process uses, and a keys file without keys, are wrong settings too."""
    (tmp_path / "keys").write_text("# nobody\n")
    check_refusal("MILLRACE_API_KEYS_FILE", MILLRACE_API_KEYS_FILE=str(tmp_path / "keys"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        check_refusal("MILLRACE_GATEWAY_PORT", MILLRACE_GATEWAY_PORT=port)


def check_refusal(variable: str, **environment: str) -> None:
    port = {"MILLRACE_GATEWAY_PORT": str(ports.find_free())}
    ended = subprocess.run(
        [sys.executable, "-m", "gateway"], env={**os.environ, **port, **environment}, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in ended.stderr.splitlines() if line]
    assert (ended.returncode, len(lines)) == (78, 1)
    assert variable in lines[0]


async def test_the_api_describes_itself_without_internet(tmp_path: Path) -> None:
    """`/docs` loads nothing from elsewhere, and every operation is described with its problems."""
    async with serving(settings_for(tmp_path)) as gateway:
        page = (await gateway.http.get("/docs")).text
        assert "//" not in page.replace("// ", "").split("<script>")[0]
        for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
            assert asset in page
            assert (await gateway.http.get("/docs/" + asset)).status_code == 200
        document = (await gateway.http.get("/openapi.json")).json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {
        "POST /v1/images", "GET /v1/images/{id}", "DELETE /v1/images/{id}", "GET /v1/images/{id}/content",
        "GET /v1/images/{id}/predictions", "GET /v1/images/{id}/similar", "GET /v1/images/{id}/trace",
        "POST /v1/search", "GET /v1/models", "GET /v1/models/{deployment}", "PUT /v1/models/{deployment}",
        "GET /v1/models/{deployment}/history", "GET /v1/compare", "GET /v1/gpus", "GET /v1/gpus/{uuid}",
        "GET /v1/gpus/{uuid}/telemetry", "GET /v1/gpus/{uuid}/alerts", "GET /v1/hosts", "GET /v1/energy",
        "GET /v1/alerts", "GET /v1/alerts/{id}", "GET /v1/silences", "POST /v1/silences",
        "DELETE /v1/silences/{id}", "GET /livez", "GET /readyz", "GET /metrics",
    }  # fmt: skip
    schemas = document["components"]["schemas"]
    assert {"Problem", "ImageView", "Batch", "PredictionView", "ModelResult"} <= schemas.keys()
    assert not {"HTTPValidationError", "ValidationError"} & schemas.keys()
    for name, operation in operations.items():
        for status, response in operation["responses"].items():
            if int(status) >= 400 and "readyz" not in name:
                assert list(response["content"]) == ["application/problem+json"]
        assert ("/v1/" in name) == ("security" in operation)
    upload = operations["POST /v1/images"]
    assert {"202", "200", "207", "401", "413", "415", "422", "503"} <= upload["responses"].keys()
    assert "multipart/form-data" in upload["requestBody"]["content"]
    # Every reference leads somewhere.
    for reference in set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document))):
        assert reference in schemas
