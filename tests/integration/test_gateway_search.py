"""Search over HTTP: with a known image, with an uploaded one, page by page, and everything that can be wrong."""

import asyncio
import base64
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from gateway import live
from pipeline import events
from pipeline.database import Database
from pipeline.errors import ModelError, UndecodableImageError
from pipeline.events import Record
from pipeline.objects import ObjectStore
from pipeline.settings import Settings
from pipeline.topics import IMAGES_REALTIME
from tests.support.gateway import JPEG, Gateway, Workers, installed, serving
from tests.support.samples import NOW, dead_letter, image_row, prediction
from tests.support.vectors import MODEL, clustered, embedded, fill

TEXT = {"content-type": "application/json"}


@pytest.fixture
async def settings(kafka: str, topic_prefix: str, database: str, tmp_path: Path) -> Settings:
    return await installed(
        kafka, topic_prefix, database, tmp_path, max_image_bytes=2_000_000, search_timeout_seconds=20
    )


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    opened = await Database.open(settings)
    yield opened
    await opened.close()


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    async with serving(settings) as gateway:
        yield gateway


@pytest.fixture
async def workers(settings: Settings) -> AsyncIterator[Workers]:
    workers = Workers(settings)
    await workers.start()
    yield workers
    await workers.stop()


def problem(response: httpx.Response, status: int, code: str, said: str = "") -> dict[str, Any]:
    """Check that an answer is this problem with these words, and return it."""
    document: dict[str, Any] = response.json()
    assert (status, status, code) == (response.status_code, document["status"], document["code"]), document
    assert said in document["detail"]
    return document


def found(response: httpx.Response) -> list[tuple[str, float]]:
    """Return the images of a page with their scores."""
    assert response.status_code == 200, response.text
    return [(image["id"], image["score"]) for image in response.json()["images"]]


def vector(*numbers: float) -> tuple[events.ModelResult, ...]:
    return embedded("any", numbers).models


async def ask(
    gateway: Gateway, workers: Workers, models: Sequence[events.ModelResult], **parameters: Any
) -> tuple[httpx.Response, Record]:
    """Search with an uploaded picture whose prediction is this."""
    asking = asyncio.create_task(
        gateway.http.post("/v1/search", params=parameters, files={"file": ("cat.jpg", JPEG)})
    )
    record, _ = await workers.next()
    await workers.predict(record, models=tuple(models))
    return await asking, record


async def test_similar_images_of_a_known_one(gateway: Gateway, db: Database) -> None:
    """The image itself comes first with a score of 1, then the others by cosine similarity, with what is known."""
    await db.save([
        embedded("cat", [1.0, 0.0], label="keep"), embedded("kitten", [3.0, 0.3]), embedded("dog", [0.0, 1.0]),
    ], [])  # fmt: skip
    await db.save_images([image_row("cat", source="camera-1")])
    response = await gateway.http.get("/v1/images/cat/similar")
    assert found(response) == [("cat", 1.0), ("kitten", 0.995037), ("dog", 0.0)]
    document = response.json()
    assert document["query"] == {
        "deployment": "default", "model": MODEL, "version": "1", "dimension": 2, "image_id": "cat"
    }  # fmt: skip
    assert document["mode"] == "exact"
    assert "next_cursor" not in document
    assert document["images"][0]["links"]["content"] == "/v1/images/cat/content"
    assert document["images"][0]["labels"] == {"test:labeller": "keep"}
    assert document["images"][0]["source"] == "camera-1"
    posted = await gateway.http.post("/v1/search", json={"image_id": "cat"})
    assert posted.json() == document
    hostile = "a/b ?#%25'"
    await db.save([embedded(hostile, [1.0, 0.01])], [])
    assert found(await gateway.http.get(f"/v1/images/{quote(hostile, safe='')}/similar"))[0] == (hostile, 1.0)


async def test_search_with_an_uploaded_picture(gateway: Gateway, workers: Workers, db: Database) -> None:
    """The picture goes to the workers of one deployment as a query with a deadline, and its vector is searched."""
    await db.save([embedded("cat", [1.0, 0.0]), embedded("dog", [0.0, 1.0])], [])
    response, record = await ask(gateway, workers, vector(2.0, 0.2), limit=1)
    assert found(response) == [("cat", 0.995037)]
    assert "image_id" not in response.json()["query"]
    event = events.decode_image(record)
    assert record.topic.endswith(IMAGES_REALTIME.name)
    assert (event.purpose, event.only_group, event.data) == (
        "query", record.topic.removesuffix(IMAGES_REALTIME.name) + "predict.default", JPEG,
    )  # fmt: skip
    assert event.expires_at is not None
    assert event.time is not None
    assert timedelta(0) < event.expires_at - event.time <= timedelta(seconds=20)
    # Nothing of it is left.
    assert await db.image(event.id) is None
    assert (await gateway.http.get(f"/v1/images/{event.id}")).status_code == 404


async def test_the_picture_may_be_the_body(gateway: Gateway, workers: Workers, db: Database) -> None:
    """A raw body is searched with as a form is."""
    await db.save([embedded("cat", [1.0, 0.0])], [])
    asking = asyncio.create_task(
        gateway.http.post("/v1/search", content=JPEG, headers={"content-type": "image/jpeg"})
    )
    record, _ = await workers.next()
    await workers.predict(record, models=vector(1.0, 0.0))
    assert found(await asking) == [("cat", 1.0)]


async def test_a_large_query_leaves_no_object(
    gateway: Gateway, workers: Workers, db: Database, settings: Settings
) -> None:
    """A picture too large for a record lies in the object store only until it is answered."""
    large = JPEG + b"\x01" * 1_000_000
    asking = asyncio.create_task(gateway.http.post("/v1/search", files={"file": ("cat.jpg", large)}))
    record, event = await workers.next()
    objects = ObjectStore.open(settings)
    assert event.dataref is not None
    assert large == await objects.get(event.dataref, len(large))
    await workers.predict(record, models=vector(1.0, 0.0))
    assert found(await asking) == []
    assert [item.key async for page in objects.list("images") for item in page] == []
    objects.close()


@pytest.mark.parametrize("uploaded", [False, True])
async def test_pages_follow_each_other(
    gateway: Gateway, workers: Workers, db: Database, uploaded: bool
) -> None:
    """Cursors lead through all images once and in order, in either route, without the picture being sent again."""
    vectors = clustered(25, 6)
    names = await fill(db, vectors)
    if uploaded:
        response, _ = await ask(gateway, workers, vector(*vectors[3].tolist()), limit=10, mode="exact")
    else:
        response = await gateway.http.get(f"/v1/images/{names[3]}/similar", params={"limit": 10})
    pages = [found(response)]
    while cursor := response.json().get("next_cursor"):
        if uploaded or len(pages) == 1:
            response = await gateway.http.post("/v1/search", params={"limit": 9}, json={"cursor": cursor})
        else:
            response = await gateway.http.get(f"/v1/images/{names[3]}/similar", params={"cursor": cursor})
        pages.append(found(response))
    assert [len(page) for page in pages] == [10, 9, 6]
    all_found = [image_id for page in pages for image_id, _ in page]
    scores = [score for page in pages for _, score in page]
    assert sorted(all_found) == names
    assert all_found[0] == names[3]
    assert scores == sorted(scores, reverse=True)


async def test_parameters_reach_the_search(gateway: Gateway, db: Database) -> None:
    """Filters, deployment and model are those that were asked for, also on the next page."""
    await db.save([
        embedded("a", [1.0, 0.0], label="keep"), embedded("b", [1.0, 0.1], label="keep"),
        embedded("c", [1.0, 0.2], label="dark"), embedded("d", [1.0, 0.3], label="keep"),
        embedded("a", [0.0, 1.0], deployment="wildlife"),
    ], [])  # fmt: skip
    await db.save_images([
        image_row("b", source="camera", published_at=NOW - timedelta(days=2)),
        image_row("d", source="camera", published_at=NOW - timedelta(days=1)),
    ])  # fmt: skip

    async def search(**parameters: Any) -> list[str]:
        response = await gateway.http.get("/v1/images/a/similar", params=parameters)
        return [image_id for image_id, _ in found(response)]

    assert await search(label="keep") == ["a", "b", "d"]
    assert await search(source="camera") == ["b", "d"]
    assert await search(**{"from": NOW.isoformat()}) == ["a", "c"]
    assert await search(to="2026-11-20T00:00:00+02:00") == ["b"]
    assert await search(deployment="wildlife") == ["a"]
    assert await search(model=MODEL, mode="exact", limit=2) == ["a", "b"]
    first = await gateway.http.get("/v1/images/a/similar", params={"label": "keep", "limit": 2})
    cursor = {"cursor": first.json()["next_cursor"]}
    assert found(await gateway.http.get("/v1/images/a/similar", params=cursor))[0][0] == "d"


async def test_what_cannot_be_searched_with(gateway: Gateway, db: Database, settings: Settings) -> None:
    """An unknown image is 404; one without an embedding 409 with its state; wrong parameters are 422."""
    similar = "/v1/images/{}/similar".format
    await db.save([
        embedded("zero", [0.0, 0.0]), embedded("cat", [1.0, 0.0]),
        prediction("labelled", models=(events.ModelResult(model="m", version="1", digest="d", task="score"),)),
        prediction("late", outcome="expired", reason="too late"),
    ], [dead_letter("broken", group=settings.group("predict"))])  # fmt: skip
    await db.save_images([image_row("waiting")])
    problem(await gateway.http.get(similar("nobody")), 404, "not_found")
    problem(await gateway.http.get(similar("%00")), 404, "not_found")
    problem(await gateway.http.post("/v1/search", json={"image_id": "nobody"}), 404, "not_found")
    problem(await gateway.http.post("/v1/search", json={"image_id": "\x00"}), 404, "not_found")
    for image_id, state, said in (
        ("waiting", "accepted", "no prediction of it yet"),
        ("labelled", "predicted", "No model of the deployment embeds"),
        ("late", "expired", "deadline had passed"),
        ("broken", "dead_lettered", "it is text"),
    ):
        document = problem(await gateway.http.get(similar(image_id)), 409, "no_embedding", said)
        assert (document["id"], document["state"]) == (image_id, state)
    problem(await gateway.http.get(similar("cat"), params={"deployment": "no"}), 409, "no_embedding")
    problem(await gateway.http.get(similar("zero")), 422, "no_embedding", "nothing but zeros")
    for parameters in (
        {"model": "builtin:nothing"}, {"limit": "0"}, {"limit": "101"}, {"limit": "1e9"}, {"mode": "quick"},
        {"from": "yesterday"}, {"from": "2026-01-01T00:00:00"}, {"to": "0001-01-01T00:00:00+14:00"},
        {"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, {"label": "\x00"}, {"label": ""},
        {"source": "x" * 3000}, {"deployment": "\x00"},
    ):  # fmt: skip
        problem(await gateway.http.get(similar("cat"), params=parameters), 422, "invalid_request")
    unknown = await gateway.http.get(similar("cat"), params={"model": "builtin:nothing"})
    assert MODEL in unknown.json()["detail"]


async def test_garbage_for_a_body_or_cursor(gateway: Gateway, db: Database) -> None:
    """No body and no cursor, however odd, is more than a problem; and none of them is published."""
    await db.save([embedded("cat", [1.0, 0.0]), embedded("dog", [1.0, 0.1])], [])
    post = gateway.http.post
    for body, status, code in (
        (b"", 400, "malformed_request"), (b"{", 400, "malformed_request"), (b"[]", 400, "malformed_request"),
        (b'{"image_id": 5}', 400, "malformed_request"), (b'{"id": "cat"}', 400, "malformed_request"),
        (b"\xff", 400, "malformed_request"), (b"[" * 90_000, 400, "malformed_request"),
        (b" " * 200_000, 413, "malformed_request"), (b"{}", 422, "invalid_request"),
        (b'{"image_id": "cat", "cursor": "x"}', 422, "invalid_request"),
    ):  # fmt: skip
        problem(await post("/v1/search", content=body, headers=TEXT), status, code)
    problem(
        await post("/v1/search", content=b"text", headers={"content-type": "image/png"}),
        415,
        "undecodable_image",
    )
    problem(
        await post("/v1/search", content=b"a", headers={"content-type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    problem(
        await post("/v1/search", content=b"", headers={"content-type": "image/png"}), 422, "invalid_request"
    )
    two = [("file", ("a.jpg", JPEG)), ("file", ("b.jpg", JPEG))]
    problem(await post("/v1/search", files=two), 422, "invalid_request", "one picture")
    field = {"files": {"file": ("a.jpg", JPEG)}, "data": {"limit": "3"}}
    problem(await post("/v1/search", **field), 422, "invalid_request", "query parameters")  # type: ignore[arg-type]
    problem(
        await post("/v1/search", files={"file": ("a.jpg", JPEG + bytes(2_000_000))}), 413, "image_too_large"
    )

    page = (await gateway.http.get("/v1/images/cat/similar", params={"limit": 1})).json()
    good = page["next_cursor"]
    fields = msgspec.msgpack.decode(base64.urlsafe_b64decode(good + "=="))

    def forged(**changes: Any) -> str:
        return base64.urlsafe_b64encode(msgspec.msgpack.encode(fields | changes)).decode().rstrip("=")

    assert (await post("/v1/search", json={"cursor": forged()})).json()["images"][0]["id"] == "dog"
    nan, inf = float("nan"), float("inf")
    for cursor in (
        "", "x", "=", "💥", good[:-3], good + "AAAA", "A" * 5000, forged(format=2), forged(more=1),
        forged(after={"distance": nan, "image_id": "a"}), forged(after={"distance": inf, "image_id": "a"}),
        forged(after={"distance": 0.1, "image_id": "\x00"}), forged(after=None), forged(prediction_id=None),
        forged(vector=b"1234"), forged(prediction_id=None, vector=b"123"),
        forged(prediction_id=None, vector=bytes(8)), forged(prediction_id=None, vector=b"\xff\xff\xff\x7f" * 2),
        forged(filters={"label": "\x00"}), forged(filters={"since": "2026-01-01T00:00:00"}),
        forged(filters={"since": "0001-01-01T00:00:00+14:00"}),
        forged(space={"model": "m\x00", "version": "1", "dimension": 2}), forged(mode="none"),
    ):  # fmt: skip
        problem(await post("/v1/search", json={"cursor": cursor}), 422, "invalid_request")
        similar = await gateway.http.get("/v1/images/cat/similar", params={"cursor": cursor})
        problem(similar, 422, "invalid_request")
    for missing in (
        forged(prediction_id="no"), forged(space={"model": "no", "version": "1", "dimension": 2}),
        forged(space={"model": MODEL, "version": "1", "dimension": 3}), forged(image_id="dog"),
    ):  # fmt: skip
        problem(await post("/v1/search", json={"cursor": missing}), 404, "not_found")
    beside = {"cursor": good, "label": "keep"}
    problem(await gateway.http.get("/v1/images/cat/similar", params=beside), 422, "invalid_request", "label")
    other = await gateway.http.get("/v1/images/dog/similar", params={"cursor": good})
    problem(other, 422, "invalid_request", "another search")
    await db.delete_image("cat")
    problem(await post("/v1/search", json={"cursor": good}), 404, "not_found")


async def test_a_query_that_cannot_be_predicted_is_answered_at_once(
    gateway: Gateway, workers: Workers
) -> None:
    """A dead letter of the query is its answer: the picture's fault as 422, the model's as 500."""
    for error, status in ((UndecodableImageError("it is truncated"), 422), (ModelError("it failed"), 500)):
        asking = asyncio.create_task(gateway.http.post("/v1/search", files={"file": ("cat.jpg", JPEG)}))
        record, _ = await workers.next()
        await workers.dead_letter(record, error)
        async with asyncio.timeout(10):
            problem(await asking, status, error.code, error.message)


async def test_a_deployment_that_embeds_nothing(gateway: Gateway, workers: Workers, db: Database) -> None:
    """An upload to a deployment without an embedding model, or without the wanted one, says so."""
    score = events.ModelResult(model="m", version="1", digest="d", task="score", score=1.0)
    response, _ = await ask(gateway, workers, [score])
    problem(response, 409, "no_embedding", "No model of deployment default embeds")
    response, _ = await ask(gateway, workers, vector(1.0, 0.0), model="other")
    problem(response, 422, "invalid_request", MODEL)
    response, _ = await ask(gateway, workers, vector(0.0, 0.0))
    problem(response, 422, "no_embedding", "nothing but zeros")


async def test_nobody_answers(settings: Settings, workers: Workers) -> None:
    """Without a worker a search ends in time with 504, and so does one whose query expired before its turn."""
    impatient = settings.model_copy(update={"search_timeout_seconds": 1.5})
    async with serving(impatient) as gateway:
        await gateway.app.state.live.reading.wait()
        began = datetime.now(UTC)
        response = await gateway.http.post("/v1/search", files={"file": ("cat.jpg", JPEG)})
        problem(response, 504, "search_timeout", "within 1.5 s")
        assert datetime.now(UTC) - began < timedelta(seconds=5)
        await workers.next()
    async with serving(settings) as gateway:
        asking = asyncio.create_task(gateway.http.post("/v1/search", files={"file": ("cat.jpg", JPEG)}))
        record, _ = await workers.next()
        await workers.predict(record, "expired")
        problem(await asking, 504, "search_timeout", "busy")


async def test_too_many_wait(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that cannot be watched is refused before anything is published."""
    monkeypatch.setattr(live, "MAX_WATCHES", 0)
    response = await gateway.http.post("/v1/search", files={"file": ("cat.jpg", JPEG)})
    problem(response, 503, "overloaded")
    assert response.headers["retry-after"]


async def test_search_is_described(gateway: Gateway) -> None:
    """OpenAPI has both routes with their parameters, problems and an example that is a real answer."""
    document = (await gateway.http.get("/openapi.json")).json()
    for path, method in (("/v1/images/{id}/similar", "get"), ("/v1/search", "post")):
        operation = document["paths"][path][method]
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert {"limit", "mode", "deployment", "model", "label", "source", "from", "to"} <= names
        assert {"200", "401", "404", "409", "422", "503"} <= operation["responses"].keys()
        example = operation["responses"]["200"]["content"]["application/json"]["example"]
        assert example["images"][0]["score"] == 1.0
    assert "504" in document["paths"]["/v1/search"]["post"]["responses"]
    assert "Similar" in document["components"]["schemas"]
