"""The best loop that one would write by hand for samples: aiokafka, msgspec, `COPY`, commit. A process of its own.

It does nothing that `record` promises beyond that: no dead letters, no repeats, no order at a hand-over, no
description of GPUs, no roll-ups. `python -m loadtest.telemetry_loop PLAN` prints how long it took.
"""

import asyncio
import sys
import time

import asyncpg
import msgspec
from aiokafka import AIOKafkaConsumer

from pipeline.telemetry import Samples

_BATCH_RECORDS = 500


class LoopPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to read, and where to put it."""

    bootstrap_servers: str
    topic: str
    dsn: str
    table: str
    fields: tuple[str, ...]
    samples: int


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """From the end of the first batch to the end of the last."""

    samples: int
    seconds: float
    cpu_seconds: float


async def loop(plan: LoopPlan) -> Done:
    """Read everything and write it."""
    decoder = msgspec.json.Decoder(Samples)
    columns = ("gpu_id", "time", "lost", "source_time", "xids", "other", *plan.fields)
    ids: dict[str, int] = {}
    connection = await asyncpg.connect(plan.dsn)
    consumer = AIOKafkaConsumer(
        plan.topic, bootstrap_servers=plan.bootstrap_servers, group_id=f"{plan.topic}-bare",
        auto_offset_reset="earliest", enable_auto_commit=False, isolation_level="read_committed",
    )  # fmt: skip
    await consumer.start()
    done, started = 0, (0, time.monotonic(), time.process_time())
    first: tuple[int, float, float] | None = None
    try:
        while done < plan.samples:
            fetched = await consumer.getmany(timeout_ms=200, max_records=_BATCH_RECORDS)
            rows = [
                (
                    ids.setdefault(sample.gpu_uuid, len(ids)), sample.time, sample.state == "lost",
                    sample.source_time, sample.xids or None, None, *map(sample.values.get, plan.fields),
                )
                for records in fetched.values()
                for record in records
                for sample in decoder.decode(record.value).samples
            ]  # fmt: skip
            if not rows:
                continue
            await connection.copy_records_to_table(plan.table, records=rows, columns=columns)
            await consumer.commit()
            done += len(rows)
            if first is None and done < plan.samples:
                first = (done, time.monotonic(), time.process_time())
    finally:
        await consumer.stop()
        await connection.close()
    first = first or started  # there was one batch
    return Done(
        samples=done - first[0],
        seconds=time.monotonic() - first[1],
        cpu_seconds=time.process_time() - first[2],
    )


if __name__ == "__main__":
    print(msgspec.json.encode(asyncio.run(loop(msgspec.json.decode(sys.argv[1], type=LoopPlan)))).decode())
