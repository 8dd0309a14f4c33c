"""Record batches made by hand, for what no client library lets through: header names of any bytes.

The format is Kafka's own, version 2 (KIP-98); `produce` sends one over a plain aiokafka connection.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition
from aiokafka import codec as codecs
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import for_code
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.util import calc_crc32c, encode_varint

_CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
_ENCODE = {
    "none": bytes,
    "gzip": codecs.gzip_encode,
    "snappy": codecs.snappy_encode,
    "lz4": codecs.lz4_encode,
    "zstd": codecs.zstd_encode,
}


@dataclass(frozen=True)
class RawRecord:
    """A record as bytes, names of headers too."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[bytes, bytes | None], ...] = ()


def record_batch(
    records: Sequence[RawRecord], *, base_offset: int = 0, codec: str = "none", timestamp_ms: int = 0
) -> bytes:
    """Return one batch as it travels."""
    body = bytes(_ENCODE[codec](b"".join(_record(record, delta) for delta, record in enumerate(records))))
    last = len(records) - 1
    # Attributes, last offset delta, first and last timestamp, producer (id, epoch, sequence: none), count.
    numbers = (_CODECS[codec], last, timestamp_ms, timestamp_ms, -1, -1, -1, len(records))
    checked = struct.pack(">hiqqqhii", *numbers) + body
    crc = calc_crc32c(checked)
    after_length = struct.pack(">ibI", -1, 2, crc) + checked
    return struct.pack(">qi", base_offset, len(after_length)) + after_length


async def produce(bootstrap_servers: str, topic: str, partition: int, batch: bytes) -> int:
    """Send a batch; return the offset of its first record."""
    client = AIOKafkaClient(bootstrap_servers=bootstrap_servers)
    await client.bootstrap()
    try:
        await client.set_topics([topic])
        leader = client.cluster.leader_for_partition(TopicPartition(topic, partition))
        request = ProduceRequest(
            transactional_id=None, required_acks=-1, timeout=10_000, topics=[(topic, [(partition, batch)])]
        )
        response = await client.send(leader, request)
        ((_, ((_, code, offset, *_),)),) = response.topics
        if code:
            raise for_code(code)(topic)
        return int(offset)
    finally:
        await client.close()


def _record(record: RawRecord, delta: int) -> bytes:
    parts = [b"\x00", _varint(0), _varint(delta), _nullable(record.key), _nullable(record.value)]
    parts.append(_varint(len(record.headers)))
    for name, value in record.headers:
        parts += [_varint(len(name)), name, _nullable(value)]
    body = b"".join(parts)
    return _varint(len(body)) + body


def _nullable(value: bytes | None) -> bytes:
    return _varint(-1) if value is None else _varint(len(value)) + value


def _varint(number: int) -> bytes:
    written = bytearray()
    encode_varint(number, written.append)
    return bytes(written)
