"""How fast samples become windows, and how fast windows are scored: `watch` without Kafka, on one core.

A worker does the same with what Kafka delivers: decode, hold as columns, aggregate, score, describe and encode.
"""

import time
from collections.abc import Sequence

import msgspec
import torch

from loadtest.report import median, rounded
from pipeline import telemetry
from pipeline.detection import Watch, close_all, load_rules
from pipeline.events import Record
from pipeline.telemetry import Samples

# As `agents/watch.py` takes them.
_BATCH_RECORDS = 256


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """Samples to published windows: medians over the repeats, processor time of one core."""

    samples_per_second: float
    values_per_second: float
    #: Without scoring and writing windows: decoded and held as columns.
    held_samples_per_second: float
    windows: int


class ScoreTime(msgspec.Struct, frozen=True, kw_only=True):
    """One window of 10,000 GPUs: processor time of one core."""

    #: The scoring pass: peers, history, all rules.
    seconds_per_10000_gpus: float
    #: With aggregating samples before and describing windows after it.
    whole_seconds_per_10000_gpus: float


def measure_watch(records: Sequence[Samples], repeats: int) -> Watched:
    """Time the way of samples to windows; `records` hold the samples of some minutes."""
    raw = [_encoded(number, samples) for number, samples in enumerate(records)]
    count = sum(len(samples.samples) for samples in records)
    values = sum(len(sample.values) for samples in records for sample in samples.samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = [_run(raw, score=True) for _ in range(repeats)]
        held = [_run(raw, score=False) for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    seconds = median(taken for taken, _ in whole)
    return Watched(
        samples_per_second=rounded(count / seconds),
        values_per_second=rounded(values / seconds),
        held_samples_per_second=rounded(count / median(taken for taken, _ in held)),
        windows=whole[0][1],
    )


def measure_score(hosts: Sequence[Samples], repeats: int) -> ScoreTime:
    """Time a window of all GPUs of these hosts, scaled to 10,000."""
    count = sum(len({sample.gpu_uuid for sample in samples.samples}) for samples in hosts)
    book, passes, whole = load_rules(), [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats):
            watch = Watch(book)
            for number, samples in enumerate(hosts):
                watch.feed(number, samples.host, samples, 0)
            closings = watch.close_silent(samples.host for samples in hosts)
            begun = time.thread_time()
            (closed,) = close_all(closings)
            whole.append(time.thread_time() - begun)
            passes.append(closed[0].score_seconds)
    finally:
        torch.set_num_threads(threads)
    return ScoreTime(
        seconds_per_10000_gpus=rounded(median(passes) * 10_000 / count),
        whole_seconds_per_10000_gpus=rounded(median(whole) * 10_000 / count),
    )


def _encoded(number: int, samples: Samples) -> Record:
    outgoing = telemetry.encode_samples(samples)
    published_ms = int(samples.samples[-1].time.timestamp() * 1000)
    return Record(
        topic="gpu.samples.v1", partition=0, offset=number, timestamp_ms=published_ms, key=outgoing.key,
        value=outgoing.value, headers=outgoing.headers,
    )  # fmt: skip


def _run(records: Sequence[Record], *, score: bool) -> tuple[float, int]:
    """Return processor seconds and the number of windows."""
    watch, windows = Watch(load_rules()), 0
    begun = time.process_time()
    for first in range(0, len(records), _BATCH_RECORDS):
        closings = []
        for record in records[first : first + _BATCH_RECORDS]:
            samples, _ = telemetry.decode_samples(record)
            closings += watch.feed(record.offset, samples.host, samples, record.timestamp_ms).closings
        if score:
            for together in close_all(closings):
                for closed in together:
                    telemetry.encode_windows(closed.windows)
                    windows += 1
    return time.process_time() - begun, windows
