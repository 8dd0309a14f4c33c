"""What `archive` makes of an event before anything is stored."""

import hashlib
from datetime import UTC, datetime

from agents.archive import image_row
from pipeline.events import ImageEvent, Record

RECORD = Record(topic="images.realtime.v1", partition=3, offset=9, timestamp_ms=1_700_000_000_500)


def test_the_digest_is_of_the_bytes_that_are_there() -> None:
    """A promised digest is not believed; the bytes are not there yet, so the row has no object."""
    row = image_row(ImageEvent(id="a", data=b"bytes", sha256="0" * 64), RECORD, "realtime")
    assert (row.sha256, row.size_bytes) == (hashlib.sha256(b"bytes").hexdigest(), 5)
    assert row.object_key is None
    assert (row.topic, row.partition, row.offset) == ("images.realtime.v1", 3, 9)
    assert row.published_at == datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC)


def test_a_reference_is_the_object() -> None:
    """A picture by reference is where the reference says, its size unknown."""
    row = image_row(ImageEvent(id="a", dataref="uploads/a.jpg", sha256="0" * 64), RECORD, "bulk")
    assert (row.object_key, row.sha256, row.size_bytes) == ("uploads/a.jpg", "0" * 64, None)


def test_headers_that_the_table_would_refuse_are_cut() -> None:
    """Endless or unprintable headers never cost a picture its row."""
    event = ImageEvent(id="a", data=b"x", source="s\x00" * 5000, content_type="c\x00" * 500)
    row = image_row(event, RECORD, "bulk")
    assert (row.source, row.content_type) == ("s" * 2048, "c" * 255)
