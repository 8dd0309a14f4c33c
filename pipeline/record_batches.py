r"""How fetched batches of records are read: by aiokafka's parser, but for two things that it does badly.

Kafka keeps records whose header names are not UTF-8, and aiokafka cannot read them: its parser raises
`UnicodeDecodeError` in the middle of a fetch, the records before the bad one are skipped, and the consumer can
never get past it. `install` puts a reader into aiokafka that parses such a batch again with the unreadable bytes
of a name escaped (`\xff`). Everything else stays with aiokafka's own parser, which is a hundred times faster.

Checksums are made by the processor's instruction for them: aiokafka's tables take 0.1 ms for a picture of 150 kB,
in which no other Python code runs; this takes 0.015 ms.
"""

import struct
from collections.abc import Iterator
from itertools import islice
from typing import Any

import google_crc32c
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy, _DefaultRecordPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c, decode_varint

from pipeline import logs

_log = logs.get(__name__)

# Of any batch: base offset (8 bytes), then the length of what follows (4); the magic byte is at 16.
_BATCH_START = struct.Struct(">qi")
_MAGIC_AT = 16
# From version 2 on: the checksum (4 bytes), and right after it what it is of.
_CHECKSUM = struct.Struct(">I")
_CHECKSUM_AT = 17

# Where the library has no compiled code it is slower than aiokafka's.
_checksum_of = google_crc32c.value if google_crc32c.implementation == "c" else calc_crc32c


def install() -> None:
    """Have every aiokafka consumer of this process read through `TolerantRecords`; idempotent."""
    fetcher.MemoryRecords = TolerantRecords


class TolerantRecords:
    """What one fetch brought for one partition; stands in for aiokafka's `MemoryRecords`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._records = MemoryRecords(data)
        self._position = 0

    def has_next(self) -> bool:
        """Whether another whole batch is here."""
        return bool(self._records.has_next())

    def size_in_bytes(self) -> int:
        """Size of everything, a batch that was cut off included."""
        return len(self._data)

    def next_batch(self) -> Any:
        """Return the next batch."""
        start = self._position
        _, length = _BATCH_START.unpack_from(self._data, start)
        self._position = start + _BATCH_START.size + length
        batch = self._records.next_batch()
        if self._data[start + _MAGIC_AT] < 2 or batch.is_control_batch:
            return batch  # no headers, or Kafka's own
        return _Batch(batch, memoryview(self._data)[start : self._position])


class _Batch:
    """One batch, read by aiokafka as far as it gets."""

    def __init__(self, batch: DefaultRecordBatch, data: memoryview) -> None:
        self._batch = batch
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def validate_crc(self) -> bool:
        """Whether the batch is as it was written."""
        (checksum,) = _CHECKSUM.unpack_from(self._data, _CHECKSUM_AT)
        return bool(_checksum_of(bytes(self._data[_CHECKSUM_AT + _CHECKSUM.size :])) == checksum)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        try:
            for record in self._batch:
                yield record
                read += 1
        except UnicodeDecodeError:
            _log.debug("escaping header names that are not UTF-8", base_offset=self._batch.base_offset)
        else:
            return
        yield from islice(_EscapingBatch(self._data), read, None)


class _EscapingBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    """aiokafka's parser in Python, lenient about names; a copy of its `_read_msg` but for that."""

    _pos: int

    def _read_msg(self) -> Any:
        buffer = self._buffer
        length, position = decode_varint(buffer, self._pos)
        end = position + length
        _, position = decode_varint(buffer, position)  # attributes: none are in use
        delta, position = decode_varint(buffer, position)
        is_stamped_by_broker = self.timestamp_type == self.LOG_APPEND_TIME
        timestamp_ms = self.max_timestamp if is_stamped_by_broker else self.first_timestamp + delta
        offset_delta, position = decode_varint(buffer, position)
        key, position = _nullable_bytes(buffer, position)
        value, position = _nullable_bytes(buffer, position)
        count, position = decode_varint(buffer, position)
        headers = []
        for _ in range(count):
            name, position = _nullable_bytes(buffer, position)
            header_value, position = _nullable_bytes(buffer, position)
            headers.append(((name or b"").decode("utf-8", "backslashreplace"), header_value))
        if position != end:
            raise CorruptRecordException(f"a record of {length} bytes ends {position - end} bytes off")
        self._pos = position
        return _DefaultRecordPy(
            self.base_offset + offset_delta, timestamp_ms, self.timestamp_type, key, value, headers
        )


def _nullable_bytes(buffer: bytearray, position: int) -> tuple[bytes | None, int]:
    length, position = decode_varint(buffer, position)
    if length < 0:
        return None, position
    return bytes(buffer[position : position + length]), position + length
