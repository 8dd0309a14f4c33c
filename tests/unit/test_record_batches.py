"""Header names that are not UTF-8 are read, whatever else is in the batch, and nothing else changes."""

import google_crc32c
import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st

import pipeline.readers  # noqa: F401 (installs it)
from pipeline.record_batches import TolerantRecords
from tests.support.raw_batches import RawRecord, record_batch

_names = st.one_of(
    st.binary(max_size=8), st.sampled_from([b"ce_id", b"\xff", b"caf\xc3\xa9", b"\xed\xa0\x80"])
)
_codecs = st.sampled_from(["none", "gzip", "snappy", "lz4", "zstd"])
_optional = st.one_of(st.none(), st.binary(max_size=12))
_records = st.lists(
    st.builds(RawRecord, _optional, _optional, st.lists(st.tuples(_names, _optional), max_size=3).map(tuple)),
    min_size=1,
    max_size=6,
)


def test_aiokafka_reads_through_it() -> None:
    """Who imports our readers has aiokafka's fetcher use ours; an aiokafka that looks elsewhere fails here."""
    assert fetcher.MemoryRecords is TolerantRecords
    assert "MemoryRecords" in fetcher.Fetcher._proc_fetch_request.__code__.co_names


@given(batches=st.lists(_records, min_size=1, max_size=3), codec=_codecs)
def test_any_header_name_is_read(batches: list[list[RawRecord]], codec: str) -> None:
    """Every record of every batch comes, in order and once, unreadable bytes of a name escaped."""
    data, offset = b"", 7
    for records in batches:
        data += record_batch(records, base_offset=offset, codec=codec, timestamp_ms=1_000)
        offset += len(records)
    read = TolerantRecords(data)
    found = []
    while read.has_next():
        batch = read.next_batch()
        assert batch.validate_crc()
        assert not batch.is_control_batch
        found += list(batch)
    assert not read.has_next()
    sent = [record for records in batches for record in records]
    assert [record.offset for record in found] == list(range(7, 7 + len(sent)))
    assert [(record.key, record.value, record.timestamp) for record in found] == [
        (record.key, record.value, 1_000) for record in sent
    ]
    assert [tuple(record.headers) for record in found] == [
        tuple((name.decode("utf-8", "backslashreplace"), value) for name, value in record.headers)
        for record in sent
    ]


@pytest.mark.parametrize("cut", [1, 12, 30, 60])
def test_a_batch_that_was_cut_off_waits(cut: int) -> None:
    """The end of a fetch may cut a batch off; what is whole is read, the rest is for the next fetch."""
    whole = record_batch([RawRecord(b"k", b"v" * 50, ((b"\xff", b""),))], base_offset=0)
    read = TolerantRecords(whole + whole[:-cut])
    assert len(list(read.next_batch())) == 1
    assert not read.has_next()
    assert read.size_in_bytes() == 2 * len(whole) - cut


def test_the_same_as_aiokafka_for_its_own_batches() -> None:
    """What aiokafka wrote is read as aiokafka reads it."""
    builder = DefaultRecordBatchBuilder(2, 0, 1, 5, 0, 0, 10_000)
    builder.append(0, 5, b"key", None, [("name", None), ("caf\u00e9", b"x")])
    batch = TolerantRecords(bytes(builder.build())).next_batch()
    assert (batch.is_transactional, batch.producer_id, batch.next_offset) == (True, 5, 1)
    (record,) = batch
    assert (record.key, record.value, record.headers) == (b"key", None, [("name", None), ("caf\u00e9", b"x")])


@pytest.mark.parametrize("place", [21, 40, 61, -1])
def test_a_batch_with_a_wrong_bit_is_told(place: int) -> None:
    """The fetch is refused then: what a disk or a network spoiled is read by nobody."""
    whole = bytearray(record_batch([RawRecord(b"k", b"v" * 50, ((b"name", b"x"),))], base_offset=0))
    assert TolerantRecords(bytes(whole)).next_batch().validate_crc()
    whole[place] ^= 4
    assert not TolerantRecords(bytes(whole)).next_batch().validate_crc()


def test_checksums_are_made_by_the_processor() -> None:
    """Where a wheel brings compiled code; aiokafka's own sums are the same."""
    assert google_crc32c.implementation == "c"
    data = bytes(range(256)) * 40
    assert google_crc32c.value(data) == calc_crc32c(data)
