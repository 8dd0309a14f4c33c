"""The gateway over HTTP: uploads, results and pictures, with a real broker, database and object store."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import intake
from pipeline import admin
from pipeline.database import Database
from pipeline.errors import ModelError, UndecodableImageError
from pipeline.events import SHA256_HEX
from pipeline.objects import ObjectStore
from pipeline.settings import Settings
from pipeline.topics import IMAGES_BULK, IMAGES_REALTIME
from tests.support import queries
from tests.support.eventually import eventually
from tests.support.gateway import JPEG, PNG, Gateway, Workers, installed, serving

HOSTILE_IDS = [
    "a/b/content",
    "/v1/images/x/predictions",
    "with space + plus",
    "quote\" and 'apostrophe'",
    "100%25 %2F percent",
    "日本語 🐈 ümlaut",
    "../../etc/passwd",
    "?query=1&x#fragment;semi",
    "' OR 1=1; --",
    "x" * 512,
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have uploads wait for a database that is slow because the machine is busy: else they do without it."""
    monkeypatch.setattr(intake, "ROW_SECONDS", 60.0)
    monkeypatch.setattr(intake, "LOOKUP_SECONDS", 60.0)


@pytest.fixture
async def settings(kafka: str, topic_prefix: str, database: str, tmp_path: Path) -> Settings:
    """Settings of an installation of its own, with its topics."""
    return await installed(kafka, topic_prefix, database, tmp_path, max_image_bytes=2_000_000)


@pytest.fixture
async def gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Yield a running gateway."""
    async with serving(settings) as gateway:
        yield gateway


@pytest.fixture
async def workers(settings: Settings) -> AsyncIterator[Workers]:
    """Yield what stands in for the steps."""
    workers = Workers(settings)
    await workers.start()
    yield workers
    await workers.stop()


def problem(response: httpx.Response, status: int, code: str) -> dict[str, object]:
    """Check that an answer is this problem, and return it."""
    assert (status, "application/problem+json") == (response.status_code, response.headers["content-type"])
    document: dict[str, object] = response.json()
    assert (status, code) == (document["status"], document["code"])
    assert {"type", "title", "detail"} <= document.keys()
    return document


def form(picture: bytes) -> dict[str, tuple[str, bytes]]:
    """Return a form with one picture."""
    return {"file": ("cat.jpg", picture)}


async def chunked(data: bytes) -> AsyncIterator[bytes]:
    """Give a body whose length nobody announces."""
    for start in range(0, len(data), 65_536):
        yield data[start : start + 65_536]


async def test_an_uploaded_form_is_an_event_and_can_be_looked_up(gateway: Gateway, workers: Workers) -> None:
    """`curl -F file=@cat.jpg` is answered 202 when Kafka has it, and its Location knows it at once."""
    response = await gateway.http.post("/v1/images", files={"file": ("cat.jpg", JPEG, "text/plain")})
    assert response.status_code == 202
    body = response.json()
    assert (body["state"], body["lane"], body["content_type"]) == ("accepted", "realtime", "image/jpeg")
    assert hashlib.sha256(JPEG).hexdigest() == body["sha256"]
    assert response.headers["location"] == body["links"]["self"] == "/v1/images/" + body["id"]

    record, event = await workers.next()
    assert (body["id"], JPEG, "image/jpeg") == (event.id, event.data, event.content_type)
    assert (body["sha256"], "millrace/gateway", None) == (event.sha256, event.source, event.expires_at)
    assert body["id"].encode() == record.key
    assert record.topic.endswith(IMAGES_REALTIME.name)

    looked_up = await gateway.http.get(response.headers["location"])
    assert (200, "accepted", body["id"]) == (
        looked_up.status_code,
        looked_up.json()["state"],
        looked_up.json()["id"],
    )
    predictions = await gateway.http.get(body["links"]["predictions"])
    assert {"id": body["id"], "predictions": []} == predictions.json()


async def test_the_gateway_shows_what_dashboards_ask_for(gateway: Gateway) -> None:
    """Requests and uploads are there under the names and with the labels that dashboards and alerts ask for."""
    assert (await gateway.http.post("/v1/images", files=form(JPEG))).status_code == 202
    text = (await gateway.http.get("/metrics")).text
    shown = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    asked = {
        selector.name or ""
        for query in queries.queries()
        for selector in queries.selectors(queries.parse(query.text))
    }
    expected = {
        name: queries.known()[name]
        for name in asked
        if name.startswith(("millrace_uploads", "millrace_request"))
    }
    assert len(expected) == 3
    assert {name: shown.get(name, set()) | {"le"} & labels for name, labels in expected.items()} == expected


async def test_a_raw_body_and_its_parameters_reach_the_event(gateway: Gateway, workers: Workers) -> None:
    """A picture sent as the body keeps its id, lane, deadline and trace context."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = await gateway.http.post(
        "/v1/images", params={"id": "cat 1", "lane": "bulk", "deadline": 30}, content=PNG,
        headers={"content-type": "image/png", "traceparent": trace},
    )  # fmt: skip
    assert (response.status_code, response.json()["id"], response.json()["lane"]) == (202, "cat 1", "bulk")
    record, event = await workers.next()
    assert ("cat 1", PNG, trace) == (event.id, event.data, event.traceparent)
    assert record.topic.endswith(IMAGES_BULK.name)
    assert event.expires_at is not None
    assert event.time is not None
    assert 29.0 < (event.expires_at - event.time).total_seconds() <= 30.0

    typeless = await gateway.http.post("/v1/images", content=PNG, headers={"content-type": ""})
    assert typeless.status_code == 202
    octets = {"content-type": "application/octet-stream"}
    stream = await gateway.http.post("/v1/images", content=chunked(PNG), headers=octets)
    assert stream.status_code == 202


async def test_a_form_may_name_the_picture_after_it(gateway: Gateway) -> None:
    """The form field `id` counts wherever it stands in the form."""
    picture = ("file", ("cat.jpg", JPEG))
    first = await gateway.http.post("/v1/images", files=[("id", (None, b"first")), picture])
    last = await gateway.http.post("/v1/images", files=[picture, ("id", (None, b"last"))])
    assert (first.json()["id"], last.json()["id"]) == ("first", "last")


async def test_a_large_picture_goes_through_the_object_store(
    gateway: Gateway, workers: Workers, settings: Settings
) -> None:
    """A picture above the inline limit is in the object store before its record names it."""
    large = JPEG + b"\x01" * 1_000_000
    response = await gateway.http.post("/v1/images", files=form(large), params={"id": "large"})
    assert response.status_code == 202
    _, event = await workers.next()
    assert event.data == b""
    assert event.dataref is not None
    store = ObjectStore.open(settings)
    assert large == await store.get(event.dataref, len(large))
    content = await gateway.http.get("/v1/images/large/content")
    assert (200, large) == (content.status_code, content.content)


async def test_an_id_is_one_segment_of_a_path_whatever_it_contains(gateway: Gateway) -> None:
    """Slashes, quotes, percent signs and other scripts in an id reach every one of its resources."""
    for image_id in HOSTILE_IDS:
        response = await gateway.http.post("/v1/images", params={"id": image_id}, files=form(JPEG))
        assert (response.status_code, response.json()["id"]) == (202, image_id)
        location = response.headers["location"]
        assert location == "/v1/images/" + quote(image_id, safe="")
        assert (await gateway.http.get(location)).json()["id"] == image_id
        assert (await gateway.http.get(location + "/predictions")).json()["id"] == image_id
        assert (await gateway.http.get(location + "/content")).content == JPEG
        assert (await gateway.http.delete(location)).status_code == 204
        problem(await gateway.http.get(location), 404, "not_found")


async def test_what_cannot_be_found_is_a_problem(gateway: Gateway) -> None:
    """Every path that names nothing is answered with a problem, never a bare error."""
    unknown = ("/v1/images/nobody", "/v1/images/%00", "/v1/images/%ff", "/v1/images/" + "x" * 513)
    for path in (*unknown, "/v1/images/", "/v1/images/a/b/c", "/nothing", "/docs/secret"):
        problem(await gateway.http.get(path), 404, "not_found")
    for path in unknown:
        problem(await gateway.http.get(path + "/content"), 404, "not_found")
        problem(await gateway.http.get(path + "/predictions"), 404, "not_found")
        problem(await gateway.http.delete(path), 404, "not_found")
    problem(await gateway.http.get("/v1/images/x?y=%ff"), 400, "malformed_request")
    response = await gateway.http.put("/v1/images/x")
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, HEAD"


async def test_a_picture_that_cannot_be_accepted_is_refused(gateway: Gateway, settings: Settings) -> None:
    """Raw or in a form, what cannot become an event is refused, and nothing of it is published or kept."""
    refused: list[tuple[bytes, dict[str, str], int, str]] = [
        (b"", {}, 422, "invalid_request"),
        (b"just text", {}, 415, "undecodable_image"),
        (b"%PDF-1.7", {}, 415, "undecodable_image"),
        (JPEG, {"lane": "fast"}, 422, "invalid_request"),
        (JPEG, {"deadline": "-1"}, 422, "invalid_request"),
        (JPEG, {"deadline": "nan"}, 422, "invalid_request"),
        (JPEG, {"deadline": "1e9"}, 422, "invalid_request"),
        (JPEG, {"id": ""}, 422, "invalid_request"),
        (JPEG, {"id": "nul\x00"}, 422, "invalid_request"),
        (JPEG, {"id": "x" * 10_000}, 422, "invalid_request"),
        (JPEG, {"id": ".."}, 422, "invalid_request"),
        (JPEG + bytes(2_000_000), {}, 413, "image_too_large"),
    ]
    jpeg = {"content-type": "image/jpeg"}
    for body, params, status, code in refused:
        raw = await gateway.http.post("/v1/images", content=body, params=params, headers=jpeg)
        problem(raw, status, code)
        problem(await gateway.http.post("/v1/images", files=form(body), params=params), status, code)
        metrics = (await gateway.http.get("/metrics")).text
        assert f'route="/v1/images",status="{status}"' in metrics
    assert gateway.app.state.memory.held_bytes == 0
    lags = await admin.lag(settings, [settings.group("archive")])
    assert [lag.end for lag in lags] == [0, 0]


async def test_an_unannounced_body_is_cut_off_at_the_limit(gateway: Gateway) -> None:
    """A chunked upload without a length is answered 413 once it exceeds the limit, however long it is."""
    jpeg = {"content-type": "image/jpeg"}
    longer = await gateway.http.post("/v1/images", content=chunked(JPEG + bytes(8_000_000)), headers=jpeg)
    assert problem(longer, 413, "image_too_large")["max_image_bytes"] == 2_000_000

    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http.base_url.port)
    writer.write(b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n")
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")

    async def send_for_ever() -> None:
        while True:
            writer.write(b"10000\r\n" + JPEG.ljust(0x10000, b"\x00") + b"\r\n")
            await writer.drain()

    sending = asyncio.create_task(send_for_ever())
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20.0)
    assert answer.startswith(b"HTTP/1.1 413")
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(sending, 20.0)
    writer.close()
    assert gateway.app.state.memory.held_bytes == 0


async def test_a_body_that_is_no_upload_is_refused(gateway: Gateway) -> None:
    """Other media types and broken or unknown forms are problems that say what to send."""
    multipart = "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n'
    field = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--b--\r\n'
    refused = [
        ("application/x-www-form-urlencoded", JPEG, 415, "unsupported_media_type"),
        ("application/json", b"{}", 415, "unsupported_media_type"),
        ("multipart/form-data", b"x", 400, "malformed_request"),
        (multipart, b"--b\r\nnonsense", 400, "malformed_request"),
        (multipart, b"--b--\r\n", 422, "invalid_request"),
        (multipart, part % b"file" + JPEG, 400, "malformed_request"),
        (multipart, part % b"image" + JPEG + b"\r\n--b--\r\n", 422, "invalid_request"),
        (multipart, field % (b"lane", b"bulk"), 422, "invalid_request"),
        (multipart, field % (b"id", b"x" * 5_000), 422, "invalid_request"),
    ]
    for content_type, body, status, code in refused:
        headers = {"content-type": content_type}
        problem(await gateway.http.post("/v1/images", content=body, headers=headers), status, code)
        assert gateway.app.state.memory.held_bytes == 0
    gzipped = {"content-type": "image/jpeg", "content-encoding": "gzip"}
    answer = await gateway.http.post("/v1/images", content=JPEG, headers=gzipped)
    problem(answer, 415, "unsupported_media_type")


async def test_a_batch_accepts_or_refuses_each_picture(gateway: Gateway, workers: Workers) -> None:
    """One bad picture of a batch never harms its neighbours, and the answer lists each in order."""
    pictures = [("a.jpg", JPEG), ("b.txt", b"text"), ("big.jpg", JPEG + b"\x00" * 2_000_000), ("c.png", PNG)]
    response = await gateway.http.post("/v1/images", files=[("file", picture) for picture in pictures])
    body = response.json()
    assert (response.status_code, body["accepted"], body["refused"]) == (207, 2, 2)
    assert [item["status"] for item in body["images"]] == [202, 415, 413, 202]
    assert [item["index"] for item in body["images"]] == [0, 1, 2, 3]
    assert [item["file"] for item in body["images"]] == ["a.jpg", "b.txt", "big.jpg", "c.png"]
    assert body["images"][1]["problem"]["code"] == "undecodable_image"
    published = {(await workers.next())[1].id for _ in range(2)}
    assert {body["images"][0]["image"]["id"], body["images"][3]["image"]["id"]} == published

    good = await gateway.http.post("/v1/images", files=[("file", ("a", JPEG)), ("file", ("b", PNG))])
    assert (good.status_code, good.json()["accepted"]) == (202, 2)
    bad = await gateway.http.post("/v1/images", files=[("file", ("a", b"x")), ("file", ("b", b"y"))])
    assert problem(bad, 415, "batch_refused")["refused"] == 2
    mixed = await gateway.http.post("/v1/images", files=[("file", ("a", b"x")), ("file", ("b", b""))])
    problem(mixed, 422, "batch_refused")
    named = await gateway.http.post(
        "/v1/images", params={"id": "one"}, files=[("file", ("a", JPEG)), ("file", ("b", PNG))]
    )
    problem(named, 422, "invalid_request")


async def test_waiting_brings_the_predictions_in_the_same_answer(gateway: Gateway, workers: Workers) -> None:
    """`Prefer: wait` answers 200 with the predictions as soon as they are published, stored or not."""
    await eventually(lambda: gateway.app.state.live._reader._consumer is not None, 10.0)
    upload = asyncio.create_task(
        gateway.http.post("/v1/images", files=form(JPEG), headers={"prefer": "wait=20"})
    )
    record, _ = await workers.next()
    await workers.predict(record, deployment="wildlife")
    prediction = await workers.predict(record)
    response = await upload
    body = response.json()
    assert (response.status_code, body["state"]) == (200, "predicted")
    assert response.headers["preference-applied"] == "wait=20"
    assert response.headers["location"] == body["links"]["self"]
    assert [prediction.id] == [found["id"] for found in body["predictions"]]
    (model,) = body["predictions"][0]["models"]
    assert (model["label"], model["score"], "embedding" in model) == ("sharp", 0.9, False)
    assert record.offset == body["predictions"][0]["receipt"]["offset"]


async def test_waiting_tells_undecodable_from_expired(gateway: Gateway, workers: Workers) -> None:
    """Under `Prefer: wait` an undecodable picture is a 422, a model's fault a 500, expired is a state."""

    async def upload() -> httpx.Response:
        return await gateway.http.post("/v1/images", files=form(JPEG), headers={"prefer": "wait=20"})

    undecodable = asyncio.create_task(upload())
    record, event = await workers.next()
    await workers.dead_letter(record, UndecodableImageError("the JPEG is truncated"))
    document = problem(await undecodable, 422, "undecodable_image")
    assert ("the JPEG is truncated", event.id) == (document["detail"], document["id"])
    assert "/v1/images/" + event.id == (await undecodable).headers["location"]

    faulty = asyncio.create_task(upload())
    record, _ = await workers.next()
    await workers.dead_letter(record, ModelError("shape mismatch"))
    problem(await faulty, 500, "model")

    expired = asyncio.create_task(upload())
    record, _ = await workers.next()
    await workers.predict(record, outcome="expired")
    answer = (await expired).json()
    assert ((await expired).status_code, answer["state"]) == (200, "expired")
    assert answer["failure"] == {"code": "expired", "reason": "the deadline has passed"}


async def test_waiting_ends_in_time_with_what_is_true(gateway: Gateway) -> None:
    """Without a result in time the answer is 202 after the seconds asked for, with the wait acknowledged."""
    started_at = asyncio.get_running_loop().time()
    response = await gateway.http.post(
        "/v1/images", files=form(JPEG), headers={"prefer": "respond-async, wait=1"}
    )
    assert 1.0 <= asyncio.get_running_loop().time() - started_at < 5.0
    assert (response.status_code, response.json()["state"]) == (202, "accepted")
    assert response.headers["preference-applied"] == "wait=1"


async def test_waiting_falls_back_to_the_database(
    gateway: Gateway, workers: Workers, settings: Settings
) -> None:
    """A result that the live reader missed is found in the database while the request waits."""
    await gateway.app.state.live.stop()
    gateway.app.state.live.stopping.clear()
    upload = asyncio.create_task(
        gateway.http.post("/v1/images", files=form(JPEG), headers={"prefer": "wait=20"})
    )
    record, _ = await workers.next()
    prediction = await workers.predict(record)
    database = await Database.open(settings)
    await database.save([prediction], [])
    await database.close()
    response = await upload
    assert (response.status_code, response.json()["state"]) == (200, "predicted")


async def test_a_get_can_wait_too(gateway: Gateway, workers: Workers) -> None:
    """`Prefer: wait` on a GET holds the answer back until there is a result."""
    location = (await gateway.http.post("/v1/images", files=form(JPEG))).headers["location"]
    looking = asyncio.create_task(gateway.http.get(location, headers={"prefer": "wait=20"}))
    await eventually(lambda: gateway.app.state.live._watches, 10.0)
    record, _ = await workers.next()
    await workers.predict(record)
    response = await looking
    assert (response.status_code, response.json()["state"], len(response.json()["predictions"])) == (
        200,
        "predicted",
        1,
    )
    assert response.headers["preference-applied"] == "wait=20"


async def test_states_are_told_per_deployment(gateway: Gateway, workers: Workers, settings: Settings) -> None:
    """An image's state is that of the default deployment, and every other deployment has its own."""
    location = (await gateway.http.post("/v1/images", files=form(JPEG))).headers["location"]
    record, _ = await workers.next()
    wild = await workers.predict(record, deployment="wildlife")
    letter = await workers.dead_letter(record, UndecodableImageError("truncated"))
    database = await Database.open(settings)
    await database.save([wild], [letter])
    await database.close()
    body = (await gateway.http.get(location)).json()
    assert body["state"] == "dead_lettered"
    assert body["failure"] == {"code": "undecodable_image", "reason": "truncated"}
    assert {name: found["state"] for name, found in body["deployments"].items()} == {
        "default": "dead_lettered",
        "wildlife": "predicted",
    }
    assert [found["deployment"] for found in body["predictions"]] == ["wildlife"]


async def test_an_idempotency_key_makes_repeating_safe(gateway: Gateway, workers: Workers) -> None:
    """The same key and picture are one event; the same key with another picture is refused."""

    async def upload(picture: bytes, key: str) -> httpx.Response:
        return await gateway.http.post("/v1/images", files=form(picture), headers={"idempotency-key": key})

    first, again, bare = await upload(JPEG, '"k-1"'), await upload(JPEG, '"k-1"'), await upload(JPEG, "k-1")
    assert [answer.status_code for answer in (first, again, bare)] == [202, 202, 202]
    assert len({answer.json()["id"] for answer in (first, again, bare)}) == 1
    assert [a.headers.get("idempotent-replayed") for a in (first, again, bare)] == [None, "true", "true"]
    problem(await upload(PNG, "k-1"), 422, "idempotency_key_reused")
    problem(await upload(JPEG, ""), 422, "invalid_request")
    problem(await upload(JPEG, "x" * 256), 422, "invalid_request")
    both = await gateway.http.post(
        "/v1/images", params={"id": "x"}, files=form(JPEG), headers={"idempotency-key": "k"}
    )
    problem(both, 422, "invalid_request")
    other = await upload(JPEG, "k-2")
    published = [(await workers.next())[1].id for _ in range(2)]
    assert [first.json()["id"], other.json()["id"]] == published


async def test_an_id_names_one_picture(gateway: Gateway, settings: Settings) -> None:
    """Another picture under a used id is a conflict, for this replica and for any other."""

    async def upload(to: Gateway, picture: bytes) -> httpx.Response:
        return await to.http.post("/v1/images", params={"id": "cat"}, files=form(picture))

    assert (await upload(gateway, JPEG)).status_code == 202
    problem(await upload(gateway, PNG), 409, "id_conflict")
    async with serving(settings) as replica:
        problem(await upload(replica, PNG), 409, "id_conflict")
        assert (await upload(replica, JPEG)).headers["idempotent-replayed"] == "true"
    assert (await gateway.http.delete("/v1/images/cat")).status_code == 204
    assert (await upload(gateway, PNG)).status_code == 202


async def test_content_comes_from_kafka_until_it_is_archived(
    gateway: Gateway, workers: Workers, settings: Settings
) -> None:
    """A picture can be fetched before and after archiving, and 410 tells when nobody keeps it any more."""
    upload = await gateway.http.post("/v1/images", params={"id": "cat"}, files=form(JPEG))
    sha256 = upload.json()["sha256"]
    assert SHA256_HEX.fullmatch(sha256)
    content = await gateway.http.get("/v1/images/cat/content")
    assert (content.status_code, content.content, content.headers["content-type"]) == (
        200,
        JPEG,
        "image/jpeg",
    )
    assert content.headers["x-content-type-options"] == "nosniff"
    assert content.headers["content-disposition"].startswith('inline; filename="cat.jpg"')
    assert f'"{sha256}"' == content.headers["etag"]
    fresh = await gateway.http.get(
        "/v1/images/cat/content", headers={"if-none-match": content.headers["etag"]}
    )
    assert (fresh.status_code, fresh.content) == (304, b"")
    head = await gateway.http.head("/v1/images/cat/content")
    assert (200, b"", str(len(JPEG))) == (head.status_code, head.content, head.headers["content-length"])

    database = await Database.open(settings)
    row = await database.image("cat")
    assert row is not None
    async with database._pool.transaction() as connection:
        await connection.execute('UPDATE images SET "offset" = 999')
    problem(await gateway.http.get("/v1/images/cat/content"), 410, "gone")
    store = ObjectStore.open(settings)
    await store.put("images/cat", JPEG)
    async with database._pool.transaction() as connection:
        await connection.execute("UPDATE images SET object_key = 'images/cat'")
    await database.close()
    archived = await gateway.http.get("/v1/images/cat/content")
    assert (archived.status_code, archived.content) == (200, JPEG)


async def test_deleting_removes_rows_and_objects(
    gateway: Gateway, workers: Workers, settings: Settings
) -> None:
    """A deleted image is gone with its predictions and its object, and a second delete is 404."""
    large = JPEG + b"\x01" * 1_000_000
    await gateway.http.post("/v1/images", params={"id": "cat"}, files=form(large))
    record, event = await workers.next()
    database = await Database.open(settings)
    await database.save([await workers.predict(record)], [])
    assert (await gateway.http.delete("/v1/images/cat")).status_code == 204
    for path in ("", "/content", "/predictions"):
        problem(await gateway.http.get("/v1/images/cat" + path), 404, "not_found")
    problem(await gateway.http.delete("/v1/images/cat"), 404, "not_found")
    assert event.dataref is not None
    assert [item async for page in ObjectStore.open(settings).list("images") for item in page] == []
    await database.close()


async def test_foreign_pages_cannot_use_a_loopback_gateway(gateway: Gateway) -> None:
    """Without API keys a rebound host name or a page of another site is refused."""
    problem(await gateway.http.get("/v1/images/x", headers={"host": "evil.example"}), 403, "forbidden_host")
    response = await gateway.http.post(
        "/v1/images", files=form(JPEG), headers={"origin": "https://evil.example"}
    )
    problem(response, 403, "forbidden_origin")
    page = await gateway.http.get(
        "/livez", headers={"origin": "http://localhost:8080", "host": "localhost:8040"}
    )
    assert page.status_code == 200
