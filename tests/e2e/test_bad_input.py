"""Pictures and envelopes as they come: each ends as a result or as exactly one dead letter that says why.

All tests share one spine with one partition a lane, so that a record that stopped its partition, or harmed
its neighbours, would show in every test after it.
"""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from pipeline import events
from pipeline.events import ImageEvent, Outgoing
from pipeline.objects import ObjectStore
from pipeline.trace import trace
from tests.support import pictures
from tests.support.spine import Spine, picture

STEPS = ("predict", "store", "archive")
ENVIRONMENT = {"MILLRACE_TOPIC_PARTITIONS": "1"}

pytestmark = pytest.mark.timeout(120)

JPEG = pictures.jpeg()


def envelope(image_id: str, *headers: tuple[str, bytes | None], value: bytes | None = JPEG) -> Outgoing:
    """Return a record with a valid id and these headers besides."""
    return Outgoing(b"key", value, (("ce_id", image_id.encode()), *headers))  # type: ignore[arg-type]


async def send_between(spine: Spine, records: dict[str, Outgoing]) -> None:
    """Publish records under the ids they must be accounted by, each between two good pictures."""
    for number, (image_id, outgoing) in enumerate(records.items()):
        await spine.send(picture(f"{image_id[:40]}-good-{number}", number))
        await spine.send_raw(outgoing, image_id)
    await spine.send(picture(f"{next(iter(records))[:40]}-good-last"))


async def check_reasons(spine: Spine, expected: dict[str, tuple[str, str]]) -> None:
    """Check code and reason of each dead letter."""
    for image_id, (code, reason) in expected.items():
        (stored,) = await spine.database.dead_letters(image_id=image_id)
        assert stored.letter.code == code, stored
        assert reason in stored.letter.reason, stored
        assert stored.letter.group == spine.settings.group("predict")


async def test_pictures_that_are_broken(shared_spine: Spine) -> None:
    """Text, half a JPEG, bombs and nothing at all are dead-lettered with the reason, their neighbours predicted."""
    broken = {
        "broken-text": (pictures.TEXT, "undecodable_image", "not a picture"),
        "broken-truncated": (pictures.truncated_jpeg(), "undecodable_image", "image/jpeg"),
        "broken-bomb": (pictures.bomb_png(), "image_too_large", "20,000 x 20,000 pixels"),
        "broken-webp-canvas": (pictures.huge_webp_header(), "image_too_large", "16,383 x 16,383 pixels"),
        "broken-empty": (b"", "contract", "the value is empty"),
        "broken-null": (None, "contract", "the value is empty"),
        "broken-header-only": (JPEG[:20], "undecodable_image", "image/jpeg"),
    }
    await send_between(
        shared_spine, {image_id: envelope(image_id, value=data) for image_id, (data, _, _) in broken.items()}
    )
    await shared_spine.settled(dead_letters=broken)
    await check_reasons(shared_spine, {image_id: case[1:] for image_id, case in broken.items()})


async def test_pictures_that_are_odd(shared_spine: Spine) -> None:
    """GIF, WebP, AVIF, CMYK, 16 bits, palettes with alpha and rotated pictures are predicted, upright."""
    ramp = np.linspace(0, 65535, 64 * 32, dtype=np.uint16).reshape(32, 64)
    odd = {
        "odd-gif": pictures.animated("GIF"),
        "odd-webp": pictures.animated("WEBP"),
        "odd-apng": pictures.animated("PNG"),
        "odd-avif": pictures.encode(pictures.halves(), "AVIF"),
        "odd-cmyk": pictures.cmyk_jpeg(),
        "odd-16-bit": pictures.sixteen_bit_png(ramp),
        "odd-palette": pictures.palette_png_with_alpha(),
        "odd-rotated": pictures.rotated_jpeg(6),
        "odd-one-pixel": pictures.solid((1, 2, 3), side=1),
    }
    for image_id, data in odd.items():
        await shared_spine.send(ImageEvent(id=image_id, data=data))
    await shared_spine.settled()
    for image_id in odd:
        (stored,) = await shared_spine.database.predictions(image_id)
        receipt = stored.prediction.receipt
        assert len(stored.prediction.models) == 2
        expected = (1, 1) if image_id == "odd-one-pixel" else (64, 32)
        assert (receipt.width, receipt.height) == expected, image_id


async def test_envelopes_that_break_the_contract(shared_spine: Spine) -> None:
    """Unknown types and versions, wrong digests and unreadable attributes are each one dead letter."""
    wrong = {
        "contract-type": (("ce_type", b"com.example.picture"), "unknown type"),
        "contract-version": (("ce_type", b"millrace.image.v2"), "unknown version"),
        "contract-specversion": (("ce_specversion", b"0.3"), "ce_specversion"),
        "contract-type-nul": (("ce_type", b"millrace\x00.image"), "unknown type"),
        "contract-digest": (("ce_datasha256", b"0" * 64), "ce_datasha256 says"),
        "contract-no-digest": (("ce_datasha256", b"md5:1234"), "64 lower-case hexadecimal digits"),
        "contract-source": (("ce_source", b"caf\xe9"), "header ce_source is not UTF-8"),
        "contract-surrogate": (("content-type", b"\xed\xa0\x80"), "header content-type is not UTF-8"),
        "contract-expiry": (("ce_expirytime", b"tomorrow"), "ce_expirytime is not an RFC 3339 time"),
        "contract-zone": (("ce_expirytime", b"2030-01-01T00:00:00"), "ce_expirytime has no time zone"),
        "contract-time": (("ce_time", b"\x00"), "ce_time is not an RFC 3339 time"),
    }
    records = {image_id: envelope(image_id, header) for image_id, (header, _) in wrong.items()}
    tricks = (b"../../etc/passwd", b"/etc/passwd", b"images/../../x", b"a\x00b", b"", b"file:///etc/passwd")
    for number, trick in enumerate(tricks):
        image_id = f"contract-dataref-{number}"
        records[image_id] = envelope(image_id, ("ce_dataref", trick), value=None)
    await send_between(shared_spine, records)
    await shared_spine.settled(dead_letters=records)
    reasons = {image_id: ("contract", reason) for image_id, (_, reason) in wrong.items()}
    await check_reasons(
        shared_spine, reasons | {f"contract-dataref-{n}": ("contract", "ce_dataref") for n in range(6)}
    )


async def test_envelopes_that_are_odd(shared_spine: Spine) -> None:
    """What the contract does not speak of, or forgives, is predicted: foreign headers, nulls, NULs, unread keys."""
    odd = {
        "odd-foreign-header": envelope("odd-foreign-header", ("x-camera", b"\xff\xfe\x00")),
        "odd-null-header": envelope("odd-null-header", ("x-camera", None), ("ce_source", None)),
        "odd-nul-content-type": envelope("odd-nul-content-type", ("content-type", b"image/\x00jpeg")),
        "odd-nul-source": envelope("odd-nul-source", ("ce_source", b"a\x00b")),
        "odd-long-source": envelope("odd-long-source", ("ce_source", b"s" * 20_000)),
        "odd-traceparent": envelope("odd-traceparent", ("traceparent", b"\xff\x00")),
        "odd-two-types": envelope(
            "odd-two-types", ("ce_type", b"nonsense"), ("ce_type", events.IMAGE_TYPE.encode())
        ),
        "odd-wrong-content-type": envelope("odd-wrong-content-type", ("content-type", b"text/plain")),
        "odd-key": Outgoing(b"\xff\xfe\x00", JPEG, (("ce_id", b"odd-key"),)),
        "odd-no-key": Outgoing(None, JPEG, (("ce_id", b"odd-no-key"),)),
        "odd-empty-key": Outgoing(b"", JPEG, (("ce_id", b"odd-empty-key"),)),
        "odd-many-headers": envelope("odd-many-headers", *((f"x-{n}", b"v") for n in range(1_000))),
    }
    await send_between(shared_spine, odd)
    await shared_spine.settled()
    for image_id in odd:
        row = await shared_spine.database.image(image_id)
        assert row is not None
        assert row.object_key is not None
        assert "\x00" not in row.source


async def test_headers_that_a_dead_letter_must_carry(shared_spine: Spine) -> None:
    """A dead letter keeps NULs in names and values of headers and any key, and leaves out what is too long."""
    headers = (("name\x00", b"\x00\xff"), ("long", b"x" * 40_000), ("short", b"kept"), ("ce_id", b"carried"))
    await shared_spine.send_raw(Outgoing(b"\xff\x00", pictures.TEXT, headers), "carried")
    await shared_spine.settled(dead_letters=["carried"])
    (listed,) = await shared_spine.database.dead_letters(image_id="carried")
    stored = await shared_spine.database.dead_letter(listed.id)
    assert stored is not None
    record = stored.letter.record
    assert (record.key, record.value) == (b"\xff\x00", pictures.TEXT)
    assert record.headers == (("name\x00", b"\x00\xff"), ("short", b"kept"), ("ce_id", b"carried"))


async def test_pictures_behind_a_dataref(shared_spine: Spine) -> None:
    """An object is fetched and predicted, also one that comes late; a missing or wrong one is a dead letter."""
    objects = ObjectStore.open(shared_spine.settings)
    await objects.put("given/there.jpg", JPEG)
    digest = "0" * 64
    records = {
        "dataref-there": ImageEvent(id="dataref-there", dataref="given/there.jpg"),
        "dataref-late": ImageEvent(id="dataref-late", dataref="given/late.jpg"),
        "dataref-missing": ImageEvent(id="dataref-missing", dataref="given/missing.jpg"),
        "dataref-wrong": ImageEvent(id="dataref-wrong", dataref="given/there.jpg", sha256=digest),
    }
    await send_between(shared_spine, {name: events.encode_image(event) for name, event in records.items()})
    await objects.put("given/late.jpg", JPEG)
    await shared_spine.settled(dead_letters=["dataref-missing", "dataref-wrong"])
    objects.close()
    await check_reasons(
        shared_spine,
        {
            "dataref-missing": ("missing_image", "there is no object given/missing.jpg"),
            "dataref-wrong": ("missing_image", f"not {digest}"),
        },
    )


async def test_ids_that_are_odd(shared_spine: Spine) -> None:
    """Quotes, path tricks and any script are ids like others; control characters and 10,000 characters are not."""
    good = (
        'it\'s "quoted"; DROP TABLE predictions; --',
        "../../../etc/passwd",
        "a/b?c=d&e=%00#f",
        " spaces ",
        "кошка-猫-🐈‍⬛-\u202etac\ufeff",
        "\uffff\U0010ffff",
        "é" * 512,
        "%s %d {0} $1 \\x00 \\",
    )
    bad = ("with\x00nul", "line\nfeed", "", "x" * 10_000, "x" * 513)
    for number, image_id in enumerate(good):
        await shared_spine.send(picture(image_id, number))
    places = [await shared_spine.send_raw(events.encode_image(picture(image_id))) for image_id in bad]
    unreadable = await shared_spine.send_raw(Outgoing(b"k", JPEG, (("ce_id", b"\xff"),)))
    letters = list(shared_spine.journal.places)[len(good) :]
    assert len(letters) == len(places) + 1
    await shared_spine.settled(dead_letters=letters)
    assert set((await shared_spine.codes()).values()) == {"contract"}
    assert unreadable.offset == places[-1].offset + 1
    for image_id in good:
        state = await shared_spine.database.state(image_id)
        assert state is not None
        assert state.state == "predicted"


async def test_the_same_id_with_another_picture(shared_spine: Spine) -> None:
    """Publishing an id again repeats nothing; with another picture, the first stays and the conflict is counted."""

    def conflicts() -> float:
        workers = shared_spine.running("store", "archive")
        return sum(worker.metric("millrace_duplicates_total", kind="conflict") for worker in workers)

    before = conflicts()
    await shared_spine.send(ImageEvent(id="twice", data=pictures.jpeg(1)))
    await shared_spine.settled()
    await shared_spine.send(ImageEvent(id="twice", data=pictures.jpeg(1)))
    await shared_spine.settled()
    first = await shared_spine.database.predictions("twice")
    assert conflicts() == before
    await shared_spine.send(ImageEvent(id="twice", data=pictures.jpeg(2)))
    await shared_spine.settled()
    assert await shared_spine.database.predictions("twice") == first
    # One at the results, one at the pictures.
    assert conflicts() == before + 2


async def test_deadlines_that_have_passed(shared_spine: Spine) -> None:
    """A picture past its deadline is not computed but has an outcome, `expired`, that says when it was."""
    past, future = (datetime.now(UTC) + timedelta(hours=hours) for hours in (-1, 1))
    await shared_spine.send(ImageEvent(id="past", data=JPEG, expires_at=past))
    await shared_spine.send(ImageEvent(id="future", data=JPEG, expires_at=future))
    await shared_spine.settled()
    (stored,) = await shared_spine.database.predictions("past")
    assert stored.prediction.outcome == "expired"
    assert f"past its deadline, {past:%Y-%m-%dT%H:%M}" in (stored.prediction.reason or "")
    found = await trace(shared_spine.settings, shared_spine.database, "past")
    assert found is not None
    (deployment,) = found.deployments
    way = [step.step for step in deployment.steps]
    assert way == ["received", "queued", "expired", "published", "stored"]
    (stored,) = await shared_spine.database.predictions("future")
    assert stored.prediction.outcome == "predicted"


async def test_records_for_another_group(shared_spine: Spine) -> None:
    """A record for another group is passed by; one for `predict` is predicted and not archived."""
    other = events.encode_image(ImageEvent(id="for-another", data=JPEG, only_group="another"))
    await shared_spine.publisher.publish(shared_spine.settings.topic("images.bulk.v1"), other)
    ours = shared_spine.settings.group("predict")
    await shared_spine.send(ImageEvent(id="for-us", data=JPEG, only_group=ours))
    await shared_spine.settled()
    assert await shared_spine.database.state("for-another") is None
    assert await shared_spine.database.image("for-us") is None
