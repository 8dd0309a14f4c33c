"""Records as other clients and other producers' settings make them, down to bytes that no client library sends.

All tests share one spine with one partition a lane, as those of `test_bad_input` do.
"""

import asyncio
import re

import pytest
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import RecordTooLargeError
from pipeline.events import Outgoing
from pipeline.objects import ObjectStore
from pipeline.topics import MAX_IMAGE_RECORD_BYTES
from tests.support import pictures, queries
from tests.support.raw_batches import RawRecord, produce, record_batch
from tests.support.spine import Spine, picture

STEPS = ("predict", "store", "archive")
ENVIRONMENT = {"MILLRACE_TOPIC_PARTITIONS": "1"}
MEBIBYTE = 1024 * 1024

pytestmark = pytest.mark.timeout(120)

JPEG = pictures.jpeg()


def topic_of(spine: Spine) -> str:
    return spine.settings.topic("images.bulk.v1")


async def send_batch(
    spine: Spine, records: dict[str, RawRecord], codec: str = "none", timestamp_ms: int | None = None
) -> None:
    """Send records in one batch and journal them under the ids they must be accounted by."""
    batch = record_batch(list(records.values()), codec=codec, timestamp_ms=timestamp_ms or 1_700_000_000_000)
    first = await produce(spine.settings.resolved_kafka, topic_of(spine), 0, batch)
    for number, image_id in enumerate(records):
        spine.journal.places[image_id] = [(topic_of(spine), 0, first + number)]


def good(image_id: str, *headers: tuple[bytes, bytes | None]) -> RawRecord:
    return RawRecord(b"key", JPEG, ((b"ce_id", image_id.encode()), *headers))


async def test_a_bare_record(shared_spine: Spine) -> None:
    """A picture without key and headers is predicted under its place, and found in the database by it."""
    place = await shared_spine.send_raw(Outgoing(None, JPEG, ()))
    await shared_spine.settled()
    image_id = f"{place.topic}:{place.partition}:{place.offset}:{place.timestamp_ms}"
    state = await shared_spine.database.state(image_id)
    assert state is not None
    assert state.state == "predicted"
    row = await shared_spine.database.image(image_id)
    assert row is not None
    assert (row.partition, row.offset, row.size_bytes) == (place.partition, place.offset, len(JPEG))


async def test_header_names_that_are_not_utf8(shared_spine: Spine) -> None:
    """Records whose header names are not UTF-8 are read like others, in the middle of a batch of good ones."""
    records = {f"name-{n}": good(f"name-{n}") for n in range(9)}
    records["name-2"] = good("name-2", (b"caf\xe9", b"x"), (b"", None))
    records["name-5"] = RawRecord(b"key", pictures.TEXT, ((b"ce_id", b"name-5"), (b"\xff\xfe", b"\xff")))
    records["name-8"] = good("name-8", (b"\xed\xa0\x80", b""))
    await send_batch(shared_spine, records)
    await shared_spine.send(picture("name-after"))
    await shared_spine.settled(dead_letters=["name-5"])
    (listed,) = await shared_spine.database.dead_letters(image_id="name-5")
    assert listed.letter.code == "undecodable_image"
    assert ("\\xff\\xfe", b"\xff") in listed.letter.record.headers


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_compressed_records(codec: str, shared_spine: Spine) -> None:
    """Batches compressed by any codec are read, with and without header names that are not UTF-8."""
    producer = AIOKafkaProducer(
        bootstrap_servers=shared_spine.settings.resolved_kafka, compression_type=codec, linger_ms=50
    )
    await producer.start()
    sending = {}
    try:
        for number in range(5):
            image_id = f"{codec}-{number}"
            topic, headers = topic_of(shared_spine), [("ce_id", image_id.encode())]
            sending[image_id] = await producer.send(topic, JPEG, headers=headers)
        for image_id, future in sending.items():
            sent = await future
            shared_spine.journal.places[image_id] = [(sent.topic, sent.partition, sent.offset)]
    finally:
        await producer.stop()
    names = [f"{codec}-raw-{n}" for n in range(3)]
    await send_batch(shared_spine, {name: good(name, (b"\xff", codec.encode())) for name in names}, codec)
    await shared_spine.settled()


async def test_times_that_are_odd(shared_spine: Spine) -> None:
    """Records without a time, and from 1970, are predicted; what they name themselves does not matter."""
    no_time = {
        "time-none": good("time-none"),
        "time-odd": good("time-odd", (b"ce_time", b"0001-01-01T00:00:00Z")),
    }
    await send_batch(shared_spine, no_time, timestamp_ms=-1)
    await send_batch(shared_spine, {"time-1970": good("time-1970")}, timestamp_ms=1)
    await send_batch(
        shared_spine, {"time-future": good("time-future", (b"ce_time", b"9999-12-31T23:59:59Z"))}
    )
    await shared_spine.settled()
    for image_id in shared_spine.journal.places:
        assert await shared_spine.database.image(image_id) is not None


async def test_large_records(shared_spine: Spine) -> None:
    """Five megabytes inline are predicted; what the topic does not take is told to the publisher."""
    await shared_spine.send_raw(
        Outgoing(b"large", pictures.incompressible(5 * MEBIBYTE), (("ce_id", b"large"),)), "large"
    )
    for size in (MAX_IMAGE_RECORD_BYTES + 32 * 1024, 2 * MAX_IMAGE_RECORD_BYTES):
        refused = Outgoing(b"larger", b"\x00" * size, (("ce_id", b"larger"),))
        with pytest.raises(RecordTooLargeError, match="bytes"):
            await shared_spine.publisher.publish(topic_of(shared_spine), refused)
    await shared_spine.send(picture("large-after"))
    await shared_spine.settled()
    (stored,) = await shared_spine.database.predictions("large")
    assert (stored.prediction.receipt.input_bytes or 0) >= 5 * MEBIBYTE


async def test_a_record_that_expands(shared_spine: Spine) -> None:
    """A batch of kilobytes that holds 40 MiB becomes a dead letter whose value is in the object store."""
    expanding = RawRecord(b"key", b"\x00" * (40 * MEBIBYTE), ((b"ce_id", b"expanding"),))
    await send_batch(shared_spine, {"expanding": expanding, "expanding-next": good("expanding-next")}, "gzip")
    await shared_spine.settled(dead_letters=["expanding"])
    (listed,) = await shared_spine.database.dead_letters(image_id="expanding")
    assert listed.letter.code == "image_too_large"
    assert "41,943,040 bytes, the limit is 33,554,432" in listed.letter.reason
    objects = ObjectStore.open(shared_spine.settings)
    assert listed.letter.value_ref is not None
    assert len(await objects.get(listed.letter.value_ref, 64 * MEBIBYTE)) == 40 * MEBIBYTE
    objects.close()


async def test_garbage_on_the_output_topics(shared_spine: Spine) -> None:
    """What others write to the topics that `store` reads never stops it: it ends as dead letters, cut to size."""
    publisher, settings = shared_spine.publisher, shared_spine.settings
    garbage = Outgoing(b"garbage", b"\xff not json", (("ce_type", b"\xff"),))
    for topic in ("predictions.v1", "dead-letters.v1"):
        place = await publisher.publish(settings.topic(topic), garbage)
        if topic == "predictions.v1":
            shared_spine.journal.add("garbage", place)
    for headers in (
        (("millrace-group", b"\x00" * 400), ("millrace-partition", b"-5"), ("millrace-attempts", b"9" * 30)),
        (
            ("millrace-reason", b"\x00" * 20_000),
            ("millrace-image-id", b"\x00\xff"),
            ("millrace-code", b"c" * 9_000),
        ),
        (("millrace-failed-at", b"0001-01-01T00:00:00+14:00"), ("millrace-value-ref", b"../../x")),
    ):
        await publisher.publish(settings.topic("dead-letters.v1"), Outgoing(None, None, headers))
    await shared_spine.send(picture("garbage-after"))
    await shared_spine.settled(dead_letters=["garbage"])
    (listed,) = await shared_spine.database.dead_letters(image_id="garbage")
    assert (listed.letter.code, listed.letter.group) == ("contract", settings.group("store"))


# What dashboards and alerts ask for that only other processes show, and what has not happened here.
ELSEWHERE = (
    r"millrace_(uploads|request|samples_dropped|windows|alert_steps|collected|collect_seconds|receiver|notifications)"
    r"|millrace_(retries|limiter_open|handover|queue|batches)"
)


async def test_workers_show_what_dashboards_ask_for(shared_spine: Spine) -> None:
    """What dashboards and alerts ask workers for is there, by name and with its labels, once they have worked."""
    await shared_spine.send_raw(Outgoing(None, JPEG, ()))
    await shared_spine.settled()
    shown: dict[str, set[str]] = {}
    for worker in shared_spine.crew.running:
        for family in text_string_to_metric_families((await asyncio.to_thread(worker.get, "/metrics"))[1]):
            for sample in family.samples:
                shown.setdefault(sample.name, set()).update(sample.labels)
    asked = {
        selector.name or ""
        for query in queries.queries()
        for selector in queries.selectors(queries.parse(query.text))
    }
    own = {name for name in asked if re.match(r"millrace_|process_", name)}
    expected = {name: queries.known()[name] for name in own if not re.match(ELSEWHERE, name)}
    assert {name: shown.get(name) for name in expected} == expected
