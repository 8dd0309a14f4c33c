"""What the engine is measured beside: the loops people write by hand, with Pillow, torch and aiokafka alone.

`python -m loadtest.engine_loops serve MODEL FOLDER` runs loops over the files of a folder as it is asked to (see
`serve`); `kafka MODEL FOLDER TUNING PREFIX` consumes and produces until SIGTERM. The model is torchvision's, with
weights drawn from a seed. Nothing here uses the engine, its decoder or its models: only the contract of the
records.

naive: one process, full decode, resize and crop of each picture, batches of 32 in float32.
best: draft decode straight to the crop in threads, overlapped with the forward pass: channels-last, bfloat16
and one torch thread where that is faster, malloc told to keep what is freed, as the worker tells it.
kafka: the best loop behind a consumer, with results awaited from the broker before offsets are committed.
"""

import asyncio
import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import torch
import torchvision
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from numpy.typing import NDArray
from PIL import Image

from loadtest.drive import arrivals
from loadtest.report import Timing
from pipeline import allocator, events
from pipeline.broker import MAX_REQUEST_BYTES
from pipeline.connections import client_options
from pipeline.settings import Settings, load
from pipeline.topics import IMAGES_BULK, IMAGES_REALTIME, PREDICTIONS

BATCH = 32
CROP, SHORTER_SIDE = 224, 256  # as torchvision's classification presets
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 7
WARM_UP_IMAGES = 64
DECODE_AHEAD_BATCHES = 2
# For each client, when the loop ends; whoever measures waits for it.
STOP_SECONDS = 2.0

Top = list[tuple[int, float]]


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0))


class Tuning(msgspec.Struct, frozen=True):
    """What suits the best loop here, found by trial: bfloat16, and torch's threads on the CPU."""

    half: bool
    threads: int


class Net:
    """A torchvision classifier with seeded weights; uint8 pixels in, the top five out."""

    def __init__(self, name: str, tuning: Tuning | None = None) -> None:
        """Take what is tuned, or a network as it comes."""
        torch.manual_seed(SEED)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net = torchvision.models.get_model(name, weights=None).eval().to(self.device)
        self.mean = torch.tensor(MEAN, device=self.device).view(3, 1, 1) * 255
        self.std = torch.tensor(STD, device=self.device).view(3, 1, 1) * 255
        self.half = tuning is not None and tuning.half
        if tuning is not None:
            self.net = self.net.to(memory_format=torch.channels_last)
        torch.set_num_threads(tuning.threads if tuning is not None else cores())

    def forward(self, pixels: Sequence[NDArray[np.uint8]]) -> list[Top]:
        """Classify (H, W, 3) pictures."""
        batch = torch.from_numpy(np.stack(pixels))
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        dtype = torch.bfloat16 if self.half else None
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=self.half):
            inputs = (batch.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (N, 3, 224, 224) float32
            scores, classes = self.net(inputs).float().softmax(1).topk(5)
        return [list(zip(*row, strict=True)) for row in zip(classes.tolist(), scores.tolist(), strict=True)]


def decode_fully(data: bytes) -> NDArray[np.uint8]:
    """Decode, resize and crop as torchvision's presets do."""
    image: Image.Image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SHORTER_SIDE / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - CROP) / 2), round((image.height - CROP) / 2)
    return np.asarray(image.crop((left, top, left + CROP, top + CROP)))


def decode_fast(data: bytes) -> NDArray[np.uint8]:
    """Decode at the smallest fraction that has the pixels, and resize only what is kept."""
    image: Image.Image = Image.open(io.BytesIO(data))
    scale = SHORTER_SIDE / min(image.size)
    image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
    image = image.convert("RGB")
    side = CROP / SHORTER_SIDE * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.asarray(
        image.resize((CROP, CROP), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    )


def naive(net: Net, pictures: Iterator[bytes]) -> int:
    """Decode a batch, then predict it, in one thread after the other."""
    done = 0
    while batch := [decode_fully(data) for data in itertools.islice(pictures, BATCH)]:
        done += len(net.forward(batch))
    return done


def best(net: Net, pictures: Iterator[bytes]) -> int:
    """Decode in threads while the forward pass of the batch before runs."""
    done = 0
    with ThreadPoolExecutor(cores()) as pool:
        cut = iter(lambda: list(itertools.islice(pictures, BATCH)), [])
        batches: Iterator[list[Future[NDArray[np.uint8]]]] = (
            [pool.submit(decode_fast, data) for data in batch] for batch in cut
        )
        ahead = deque(itertools.islice(batches, DECODE_AHEAD_BATCHES))
        while ahead:
            decoded = [future.result() for future in ahead.popleft()]
            ahead.extend(itertools.islice(batches, 1))
            done += len(net.forward(decoded))
    return done


class Overlap:
    """The best loop for pictures that arrive one by one: the device takes what is decoded when it is free."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._decoders = ThreadPoolExecutor(cores())
        self._device = ThreadPoolExecutor(1)
        self._ready: deque[tuple[asyncio.Future[Top], NDArray[np.uint8]]] = deque()
        self._decoding = 0
        self._running = False
        self._loop = asyncio.get_running_loop()

    def submit(self, data: bytes) -> "asyncio.Future[Top]":
        """Return the top five of a picture, later."""
        answer: asyncio.Future[Top] = self._loop.create_future()
        self._decoding += 1
        decoded = self._loop.run_in_executor(self._decoders, decode_fast, data)
        decoded.add_done_callback(lambda done: self._take(answer, done.result()))
        return answer

    def _take(self, answer: "asyncio.Future[Top]", pixels: NDArray[np.uint8]) -> None:
        self._decoding -= 1
        self._ready.append((answer, pixels))
        self._go()

    def _go(self) -> None:
        # Under a backlog a full batch is worth waiting for.
        if self._running or not self._ready or len(self._ready) < BATCH <= len(self._ready) + self._decoding:
            return
        batch = [self._ready.popleft() for _ in range(min(BATCH, len(self._ready)))]
        self._running = True
        run = self._loop.run_in_executor(self._device, self._net.forward, [pixels for _, pixels in batch])
        run.add_done_callback(lambda done: self._done([answer for answer, _ in batch], done.result()))

    def _done(self, answers: "Sequence[asyncio.Future[Top]]", tops: Sequence[Top]) -> None:
        self._running = False
        self._go()
        for answer, top in zip(answers, tops, strict=True):
            if not answer.done():  # cancelled with whoever waited for it
                answer.set_result(top)


async def online(net: Net, pictures: Sequence[bytes], rate: float, seconds: float, seed: int) -> list[float]:
    """Return latencies of the best loop under Poisson arrivals, without Kafka."""
    overlap = Overlap(net)
    latencies: list[float] = []
    started = time.monotonic()
    pending = set()
    for number, moment in enumerate(itertools.takewhile(lambda at: at < seconds, arrivals(rate, seed))):
        if (wait := started + moment - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        arrived = time.monotonic()
        answer = overlap.submit(pictures[number % len(pictures)])
        answer.add_done_callback(lambda _, at=arrived: latencies.append(time.monotonic() - at))  # type: ignore[misc]
        pending.add(answer)
        answer.add_done_callback(pending.discard)
    if pending:
        await asyncio.wait(pending)
    return latencies


async def kafka(net: Net, name: str, settings: Settings) -> None:
    """Consume both lanes and produce predictions until SIGTERM, which drops what is open."""
    consumer = AIOKafkaConsumer(
        settings.topic(IMAGES_REALTIME.name),
        settings.topic(IMAGES_BULK.name),
        **client_options(settings),
        group_id=settings.topic_prefix + "loop",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=8 * 1024 * 1024,
        fetch_max_wait_ms=500,
    )
    producer = AIOKafkaProducer(
        **client_options(settings), acks="all", enable_idempotence=True, max_request_size=MAX_REQUEST_BYTES
    )
    working = asyncio.create_task(_work(net, name, settings, consumer, producer))
    # Cancelled, not asked: without a broker a commit is tried for ever, and so is a flush.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, working.cancel)
    try:
        await asyncio.wait({working})
    finally:
        for client in (producer, consumer):
            # A consumer that is stopped while it waits for a broker raises the cancellation of its own tasks.
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(client.stop(), STOP_SECONDS)
    if not working.cancelled():
        working.result()


async def _work(
    net: Net, name: str, settings: Settings, consumer: AIOKafkaConsumer, producer: AIOKafkaProducer
) -> None:
    await consumer.start()
    await producer.start()
    overlap = Overlap(net)
    room = asyncio.Semaphore((DECODE_AHEAD_BATCHES + 1) * BATCH)
    topic = settings.topic(PREDICTIONS.name)
    open_ones: set[asyncio.Task[None]] = set()

    async def predict(record: events.Record) -> None:
        event = events.decode_image(record)
        top = await overlap.submit(event.data)
        room.release()
        out = events.encode_prediction(_prediction(event, record, name, top))
        await (await producer.send(topic, out.value, out.key, headers=list(out.headers)))

    while True:
        fetched = await consumer.getmany(timeout_ms=200, max_records=4 * BATCH)
        for raw in itertools.chain.from_iterable(fetched.values()):
            await room.acquire()
            record = events.Record(
                topic=raw.topic, partition=raw.partition, offset=raw.offset, timestamp_ms=raw.timestamp,
                key=raw.key, value=raw.value, headers=tuple(raw.headers),
            )  # fmt: skip
            task = asyncio.create_task(predict(record))
            open_ones.add(task)
            task.add_done_callback(open_ones.discard)
        if not open_ones and fetched:
            await consumer.commit()


def _prediction(event: events.ImageEvent, record: events.Record, name: str, top: Top) -> events.Prediction:
    result = events.ModelResult(
        model=name, version="1", digest="0" * 64, task="classify", label=str(top[0][0]), score=top[0][1],
        scores={str(index): score for index, score in top},
    )  # fmt: skip
    return events.Prediction(
        id=events.prediction_id(event.id, "loop", ((name, "1"),)),
        image_id=event.id,
        deployment="loop",
        lane="bulk",
        outcome="predicted",
        time=datetime.now(UTC),
        receipt=events.Receipt(topic=record.topic, partition=record.partition, offset=record.offset),
        models=(result,),
    )


def tune(name: str, pictures: Sequence[bytes]) -> Tuning:
    """Find what gets the best loop through the same pictures soonest: bfloat16 or not, one torch thread or all."""
    candidates = [Tuning(half, threads) for threads in dict.fromkeys((1, cores())) for half in (False, True)]
    spent = {}
    for tuning in candidates:
        net = Net(name, tuning)
        best(net, itertools.islice(itertools.cycle(pictures), BATCH))
        timings = []
        for _ in range(2):  # a hiccup must not decide
            started = time.perf_counter()
            best(net, itertools.islice(itertools.cycle(pictures), WARM_UP_IMAGES))
            timings.append(time.perf_counter() - started)
        spent[tuning] = min(timings)
    return min(candidates, key=lambda tuning: spent[tuning])


def serve(name: str, pictures: Sequence[bytes]) -> None:
    """Run the loops that are asked for on standard input, one after the other."""
    for line in sys.stdin.buffer:
        kind, *rest = msgspec.json.decode(line, type=list[str])
        if kind != "naive":  # which a process of its own runs, for this stays
            allocator.keep_freed()
        if kind == "tune":
            answer: object = tune(name, pictures)
        elif kind == "naive":
            answer = _timed(naive, Net(name), pictures, int(rest[0]))
        elif kind == "best":
            answer = _timed(best, _tuned(name, rest[0]), pictures, int(rest[1]))
        else:
            net = _tuned(name, rest[0])
            best(net, itertools.islice(itertools.cycle(pictures), WARM_UP_IMAGES))
            answer = asyncio.run(online(net, pictures, float(rest[1]), float(rest[2]), int(rest[3])))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


def main(kind: str, name: str, folder: str, *rest: str) -> None:
    """Run what the command line names."""
    pictures = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    if kind == "serve":
        serve(name, pictures)
        return
    allocator.keep_freed()
    net = _tuned(name, rest[0])
    best(net, itertools.islice(itertools.cycle(pictures), WARM_UP_IMAGES))
    asyncio.run(kafka(net, name, load(topic_prefix=rest[1])))


def _tuned(name: str, tuning: str) -> Net:
    return Net(name, msgspec.json.decode(tuning, type=Tuning))


def _timed(
    body: Callable[[Net, Iterator[bytes]], int], net: Net, pictures: Sequence[bytes], count: int
) -> Timing:
    body(net, itertools.islice(itertools.cycle(pictures), WARM_UP_IMAGES))
    started, cpu_started = time.monotonic(), time.process_time()
    done = body(net, itertools.islice(itertools.cycle(pictures), count))
    return Timing(done, time.monotonic() - started, time.process_time() - cpu_started)


if __name__ == "__main__":
    main(*sys.argv[1:])
