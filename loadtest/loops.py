"""The bare loops that a benchmark sets the spine beside: the same pictures, decoder and models, no Kafka.

Those that the engine is set beside, which use none of it, are in `engine_loops.py`.

`python -m loadtest.loops naive|best FOLDER IMAGES BATCH` prints one line of JSON; it is a process of its own,
so that nothing but the loop runs in it. Imports, reading the files and warm-up are outside the clock. The
loops throw their results away: no digest, no receipt, no JSON, which the spine makes for each picture.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import torch

from loadtest.report import Timing
from pipeline import imaging
from pipeline.imaging import Limits, Picture, View
from pipeline.inference.proof import load_where_proved
from pipeline.models import LoadOptions, Model, load_models, resolve_device, torch_threads
from pipeline.settings import Settings, load

WARM_UP_IMAGES = 64
# As the engine decodes ahead (`pipeline/inference/engine.py`).
DECODE_AHEAD_BATCHES = 2


class Loop:
    """The models and how pictures get to them."""

    def __init__(self, models: Sequence[Model], settings: Settings, device: torch.device) -> None:
        self._views: tuple[View, ...] = tuple(dict.fromkeys(model.view for model in models))
        self._models = [(model, self._views.index(model.view)) for model in models]
        self._limits = Limits(settings.max_image_bytes, settings.max_image_pixels)
        self._decode_threads = settings.decode_threads or len(os.sched_getaffinity(0))
        self._device = device

    def naive(self, pictures: Iterator[bytes], batch_size: int) -> int:
        """Decode one, forward one, and so on: what a first script does."""
        return sum(self._forward([self._decode(data)]) for data in pictures)

    def best(self, pictures: Iterator[bytes], batch_size: int) -> int:
        """Decode in threads, two batches ahead of the forward pass, and forward whole batches."""
        done = 0
        with ThreadPoolExecutor(self._decode_threads) as pool:
            batches = (
                [pool.submit(self._decode, data) for data in batch] for batch in _cut(pictures, batch_size)
            )
            ahead = list(itertools.islice(batches, DECODE_AHEAD_BATCHES))
            while ahead:
                decoded = [future.result() for future in ahead.pop(0)]
                ahead.extend(itertools.islice(batches, 1))
                done += self._forward(decoded)
        return done

    def _decode(self, data: bytes) -> Picture:
        return imaging.decode(data, self._views, self._limits)

    def _forward(self, pictures: Sequence[Picture]) -> int:
        batches = []
        for index in range(len(self._views)):
            pixels = torch.from_numpy(np.stack([picture.pixels[index] for picture in pictures]))
            if self._device.type == "cuda":
                pixels = pixels.pin_memory().to(self._device, non_blocking=True)
            batches.append(pixels.permute(0, 3, 1, 2))  # (N, 3, H, W) uint8, channels last in memory
        with torch.inference_mode():
            for model, index in self._models:
                outputs = model.forward(batches[index])
        return len(outputs)


def run(kind: str, folder: Path, images: int, batch_size: int) -> Timing:
    """Time one loop over the files of a folder, repeated until `images` are done."""
    settings = load()
    device, options = resolve_device(settings.device), LoadOptions.from_settings(settings)
    if settings.device == "auto" and device.type == "cuda":  # as the worker decides
        placed = load_where_proved(settings.models, device, options)
        device, models = placed.device, placed.models
    else:
        models = load_models(settings.models, device, options)
    threads = torch_threads(models, settings.torch_threads)  # as the engine does
    if threads and device.type == "cpu":
        torch.set_num_threads(threads)
    for model in models:
        model.warm_up()
    pictures = [path.read_bytes() for path in sorted(folder.iterdir())]
    loop = Loop(models, settings, device)
    body = {"naive": loop.naive, "best": loop.best}[kind]
    body(itertools.islice(itertools.cycle(pictures), WARM_UP_IMAGES), batch_size)
    started, cpu_started = time.monotonic(), time.process_time()
    done = body(itertools.islice(itertools.cycle(pictures), images), batch_size)
    return Timing(done, time.monotonic() - started, time.process_time() - cpu_started)


def _cut(pictures: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while batch := list(itertools.islice(pictures, size)):
        yield batch


if __name__ == "__main__":
    _, kind, folder, images, batch_size = sys.argv
    sys.stdout.buffer.write(
        msgspec.json.encode(run(kind, Path(folder), int(images), int(batch_size))) + b"\n"
    )
