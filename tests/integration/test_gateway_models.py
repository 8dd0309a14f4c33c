"""Models over HTTP: what runs where, activation, the history, on a real broker and database."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline import deployments
from pipeline.broker import Publisher
from pipeline.database import Database
from pipeline.deployments import Desired, Refusal, Status
from pipeline.registry import activate
from pipeline.settings import Settings
from pipeline.topics import MODELS
from tests.support.eventually import eventually
from tests.support.gateway import Gateway, installed, serving
from tests.support.samples import prediction


@pytest.fixture
async def settings(kafka: str, topic_prefix: str, database: str, tmp_path: Path) -> Settings:
    """Settings of an installation of its own, with its topics."""
    return await installed(kafka, topic_prefix, database, tmp_path)


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Yield a running gateway that has read the topic."""
    async with serving(settings) as gateway:
        await eventually(lambda: gateway.app.state.following.is_caught_up, 20.0)
        yield gateway


async def report(settings: Settings, **values: Any) -> Status:
    """Stand in for a replica of `default`."""
    defaults: dict[str, Any] = {"deployment": "default", "replica": "r-0", "time": datetime.now(UTC)}
    status = Status(**defaults | values)
    publisher = Publisher(settings, client_id="test")
    await publisher.start(wait=False)
    await publisher.publish(settings.topic(MODELS.name), deployments.encode(status))
    await publisher.stop()
    return status


async def put(gateway: Gateway, *models: str, deployment: str = "default", wait: int = 0, **more: Any) -> Any:
    headers = {"Prefer": f"wait={wait}"} if wait else {}
    return await gateway.http.put(f"/v1/models/{deployment}", json={"models": models} | more, headers=headers)


async def test_an_activation_is_seen_at_once(gateway: Gateway, settings: Settings) -> None:
    """After a 202 this gateway shows the version, whoever asks, and who made it."""
    assert (await gateway.http.get("/v1/models")).json() == {"deployments": []}
    assert (await gateway.http.get("/v1/models/default")).status_code == 404
    answer = await put(gateway, "hf:google/vit-base-patch16-224", "builtin:fingerprint", note="try it")
    assert (answer.status_code, answer.headers["location"]) == (202, "/v1/models/default")
    shown = (await gateway.http.get("/v1/models/default")).json()
    assert shown == answer.json()
    assert (shown["revision"], shown["desired"]["activated_by"], shown["desired"]["note"]) == (
        1,
        "gateway",
        "try it",
    )
    assert shown["desired"]["version"]["models"] == ["hf:google/vit-base-patch16-224", "builtin:fingerprint"]
    assert (await gateway.http.get("/v1/models")).json() == {"deployments": [shown]}


async def test_an_answer_waits_for_the_replicas(gateway: Gateway, settings: Settings) -> None:
    """With `Prefer: wait` the answer is 200 when every replica runs or refused the version, else 202."""
    await report(settings, revision=0)
    late = await put(gateway, "builtin:a", wait=1)
    assert (late.status_code, late.json()["is_settled"]) == (202, False)
    assert [replica["state"] for replica in late.json()["replicas"]] == ["waits"]
    waiting = asyncio.create_task(put(gateway, "builtin:b", wait=30))
    await eventually(lambda: gateway.app.state.following.registry["default"].revision == 2, 20.0)
    await report(settings, revision=0, refused=Refusal(2, "it does not load", datetime.now(UTC)))
    answer = await waiting
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=30")
    (replica,) = answer.json()["replicas"]
    assert (replica["state"], replica["status"]["refused"]["reason"]) == ("refused", "it does not load")


async def test_somebody_elses_activation_is_a_conflict(gateway: Gateway, settings: Settings) -> None:
    """An activation that expects another revision is answered 409 and changes nothing."""
    await activate(settings, "default", ["builtin:a"], activated_by="ann")
    answer = await put(gateway, "builtin:b", expected_revision=0)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert "ann activated builtin:a" in answer.json()["detail"]
    assert (await put(gateway, "builtin:b", expected_revision=1)).json()["revision"] == 2


@pytest.mark.parametrize(
    ("models", "code"),
    [
        (["python:os:system"], "models_refused"),
        (["builtin:quality", "file:/models/model.pt2"], "models_refused"),
        (["file:weights.bin#torchvision:resnet18"], "models_refused"),
        ([], "invalid_request"),
        (["builtin:a,python:os:system"], "invalid_request"),
        (["nothing"], "invalid_request"),
        (["builtin:" + "x" * 2000], "contract"),
        ("builtin:a", "invalid_request"),
    ],
)
async def test_what_may_not_be_activated(gateway: Gateway, models: object, code: str) -> None:
    """Models that run code, and what is no specification, are a problem that says why; nothing is published."""
    answer = await gateway.http.put("/v1/models/default", json={"models": models})
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    if code == "models_refused":
        assert "runs code" in answer.json()["detail"]
        assert "millrace models activate" in answer.json()["detail"]
    assert (await gateway.http.get("/v1/models/default")).status_code == 404


async def test_bodies_that_are_no_activation(gateway: Gateway) -> None:
    """A body of another kind, not JSON, too long, or with unknown members is refused in words."""
    for body, media_type, status in (
        (b'{"models":["builtin:a"]}', "text/plain", 415),
        (b"{", "application/json", 400),
        (b'{"models":["builtin:a"],"modles":[]}', "application/json", 422),
        (b'"' + b"x" * 70_000 + b'"', "application/json", 400),
    ):
        headers = {"content-type": media_type}
        answer = await gateway.http.put("/v1/models/default", content=body, headers=headers)
        assert answer.status_code == status, answer.text
    assert (await put(gateway, "builtin:a", deployment="Not%20One")).status_code == 422


async def test_keys_protect_models(settings: Settings, tmp_path: Path) -> None:
    """Without a key nothing is shown and nothing is activated."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    async with serving(settings.model_copy(update={"api_keys_file": keys})) as gateway:
        paths = ("/v1/models", "/v1/models/default", "/v1/models/default/history")
        assert {(await gateway.http.get(path)).status_code for path in paths} == {401}
        assert (await put(gateway, "builtin:a")).status_code == 401
        gateway.http.headers["x-api-key"] = "secret"
        assert (await put(gateway, "builtin:a")).status_code == 202


async def test_the_history_comes_from_the_database(gateway: Gateway, settings: Settings) -> None:
    """What was activated and what came of it is shown newest first, by pages."""
    made: list[Desired] = [
        await activate(settings, "default", [f"builtin:{name}"], activated_by="ann") for name in "abc"
    ]
    status = await report(settings, revision=3, since=datetime.now(UTC))
    database = await Database.open(settings)
    await database.save_models([*made, status])
    await database.close()
    path = "/v1/models/default/history"
    versions = (await gateway.http.get(path, params={"limit": 2})).json()["versions"]
    assert [version["revision"] for version in versions] == [3, 2]
    assert versions[0]["reports"][0]["replica"] == "r-0"
    (oldest,) = (await gateway.http.get(path, params={"before": 2})).json()["versions"]
    assert (oldest["models"], oldest["activated_by"]) == (["builtin:a"], "ann")
    assert (await gateway.http.get("/v1/models/nobody/history")).status_code == 404


async def test_results_of_older_models_are_shown_when_asked_for(gateway: Gateway, settings: Settings) -> None:
    """An image shows what the newest models say; `all=true` shows what older ones said, too."""
    database = await Database.open(settings)
    await database.save([prediction("cat"), prediction("cat", id="cat-2", revision=4)], [])
    await database.close()
    for path in ("/v1/images/cat", "/v1/images/cat/predictions"):
        (shown,) = (await gateway.http.get(path)).json()["predictions"]
        assert (shown["id"], shown["revision"]) == ("cat-2", 4)
        every = (await gateway.http.get(path, params={"all": "true"})).json()["predictions"]
        assert [each.get("revision", 0) for each in every] == [0, 4]


async def test_two_deployments_side_by_side(gateway: Gateway, settings: Settings) -> None:
    """The comparison of the command line is there over HTTP; what cannot be compared is refused."""
    database = await Database.open(settings)
    await database.save([prediction("a"), prediction("a", deployment="other"), prediction("b")], [])
    await database.close()
    found = (await gateway.http.get("/v1/compare", params={"a": "default", "b": "other"})).json()
    assert (found["both"], found["a"]["images"], found["a"]["alone"]) == (1, 2, 1)
    (embedder,) = found["models"]
    assert (embedder["task"], embedder["cosine"]) == ("embed", 1.0)
    nothing = (await gateway.http.get("/v1/compare", params={"a": "default", "b": "default@7"})).json()
    assert (nothing["both"], nothing["b"]["images"]) == (0, 0)
    for wrong in ({"a": "default", "b": "default"}, {"a": "De fault", "b": "other"}, {"a": "default"}):
        answer = await gateway.http.get("/v1/compare", params=wrong)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
