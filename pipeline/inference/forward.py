"""The forward pass: all models on one batch, and what to do when it fails; runs in one thread.

A failing batch is halved until the guilty record is alone; one whose outputs make no sense even then is at fault
itself if a reference picture comes out well, else the model is. Out of memory halves too, and is reported, so that
the next batches are smaller. An error that leaves the device unusable is fatal: halving it would blame
innocent records.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.batching import CutReason
from pipeline.energy import Energy, EnergyMeter
from pipeline.errors import ConfigurationError, FatalError, ImageError, MillraceError, ModelError
from pipeline.events import ImageEvent, ModelResult, Receipt, Record
from pipeline.imaging import Picture, View
from pipeline.inference.model_results import result_of
from pipeline.inference.outcomes import Failed, Outcome, Predicted, Request, Work
from pipeline.models import Model, WrongOutputError
from pipeline.topics import LANES

MAX_REASON_CHARACTERS = 500

_NOT_FINITE = "its output is not a finite number"

# What torch says when the allocator fails without raising its own class (CPU; CUDA's driver).
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_DEVICE_LOST = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuBLAS", "cuDNN error", "NCCL error")
_ACCELERATOR_ERROR: type[BaseException] | tuple[()] = getattr(torch, "AcceleratorError", ())  # torch 2.8


@dataclass(slots=True)
class Batch:
    """Claimed records that ride together."""

    id: str
    works: list[Work]
    cut: CutReason


@dataclass(slots=True)
class Report:
    """What became of a batch.

    `seconds` is what the pass took, if it was one whole pass; `out_of_memory_at` is the smallest number of records
    that did not fit.
    """

    batch: Batch
    outcomes: list[tuple[Work, Outcome]] = field(default_factory=list)
    seconds: float | None = None
    out_of_memory_at: int | None = None
    fatal: FatalError | None = None
    _parts: int = 0

    def pass_id(self, works: Sequence[Work]) -> str:
        """Name the next pass: as the batch if it is all of it, else one of its parts, `BATCH.N`."""
        if len(works) == len(self.batch.works):
            return self.batch.id
        self._parts += 1
        return f"{self.batch.id}.{self._parts}"


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why a pass failed; not the error itself, whose traceback would hold what is to be freed."""

    reason: str
    is_memory: bool
    is_output: bool


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass that went well; `size` is the number of records in it."""

    batch_id: str
    size: int
    cut: CutReason
    started_at: float
    seconds: float
    energy: Energy

    def share(self, joules: float | None) -> float | None:
        """Return a record's part."""
        return None if joules is None else round(joules / self.size, 6)


class Forward:
    """Runs batches through the models; not thread-safe."""

    def __init__(
        self,
        models: Sequence[Model],
        device: torch.device,
        torch_threads: int = 0,
        meter: EnergyMeter | None = None,
    ) -> None:
        self.views: tuple[View, ...] = tuple(dict.fromkeys(model.view for model in models))
        #: The CPU threads of a pass; 0: as many as torch uses by itself.
        self.torch_threads = torch_threads
        self._models = tuple(models)
        self._meter = meter
        self._device = device
        self._device_name = str(device)
        self._at_work = ""
        self._queue_seconds = {lane: metrics.QUEUE_SECONDS.labels(lane=lane) for lane in LANES}
        #: When the latest pass began, on the monotonic clock; read by another thread.
        self.pass_started_at = 0.0

    def warm_up(self) -> None:
        """Warm every model up, with as many threads as it will run with, and see what it says of a picture.

        Raises:
            ConfigurationError: a model fails, or its numbers for a reference picture are not finite.
        """
        if self.torch_threads:
            torch.set_num_threads(self.torch_threads)
        for model in self._models:
            try:
                with torch.inference_mode():
                    model.warm_up()
            except Exception as error:  # models raise anything
                raise _cannot_start(model.name, f"{type(error).__name__}: {error}") from error
        try:
            results = self._pass([_reference(self.views)])
        except Exception as error:
            raise _cannot_start(self._at_work, f"{type(error).__name__}: {error}") from error
        if None in results:
            raise _cannot_start(self._at_work, f"{_NOT_FINITE} for a reference picture")
        for result in results[0] or ():
            try:
                msgspec.json.decode(msgspec.json.encode(result), type=ModelResult)
            except (TypeError, msgspec.MsgspecError) as error:
                raise _cannot_start(result.model, f"its output cannot be published: {error}") from None

    def can_take(self, work: Work) -> bool:
        """Whether a record was decoded for these models, or is not decoded yet."""
        return not work.views or set(self.views) <= set(work.views)

    def run(self, batch: Batch) -> Report:
        """Return one outcome for each record of a batch, or a report of a device that is lost."""
        report = Report(batch)
        try:
            self._evaluate(batch.works, batch.cut, report)
        except FatalError as error:
            report.fatal = error
        return report

    def _evaluate(self, works: list[Work], cut: CutReason, report: Report) -> None:
        batch_id = report.pass_id(works)
        started_at = self.pass_started_at = time.monotonic()
        fault: _Fault | None = None
        results: list[tuple[ModelResult, ...] | None] = []
        energy = Energy()
        try:
            if self._meter is not None:
                self._at_work = ""
                self._meter.begin()
            results = self._pass(works)
            if self._meter is not None:
                energy = self._meter.end()
                metrics.FORWARD_JOULES.inc(energy.joules or 0.0)
        except Exception as error:  # a model may raise anything
            is_output = isinstance(error, WrongOutputError)
            fault = _Fault(self._reason(error), _is_out_of_memory(error), is_output)
            if not fault.is_memory and _is_device_lost(error):
                raise FatalError(f"the device is lost: {fault.reason}") from error
        seconds = time.monotonic() - started_at
        metrics.FORWARD_SECONDS.observe(seconds)
        if fault is not None:
            self._divide(works, cut, fault, report)
            return
        if len(works) == len(report.batch.works):
            report.seconds = seconds
        self._note_results(
            works, results, report, _Pass(batch_id, len(works), cut, started_at, seconds, energy)
        )

    def _divide(self, works: list[Work], cut: CutReason, fault: _Fault, report: Report) -> None:
        """Run the halves of a pass that failed; a record that was alone in it has failed."""
        if fault.is_memory:
            cut = "memory"
            report.out_of_memory_at = len(works)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if len(works) == 1:
            error = self._blame(fault.reason) if fault.is_output else ModelError(fault.reason)
            report.outcomes.append((works[0], Failed(error)))
            return
        middle = len(works) // 2
        self._evaluate(works[:middle], cut, report)
        self._evaluate(works[middle:], cut, report)

    def _note_results(
        self,
        works: list[Work],
        results: list[tuple[ModelResult, ...] | None],
        report: Report,
        done: _Pass,
    ) -> None:
        suspects = []
        for work, result in zip(works, results, strict=True):
            if result is not None:
                receipt = self._receipt(work, done)
                report.outcomes.append((work, Predicted(result, receipt)))
            elif len(works) > 1:
                suspects.append(work)
            else:
                reason = f"{self._at_work}: {_NOT_FINITE}"
                report.outcomes.append((work, Failed(self._blame(reason))))
        for work in suspects:  # alone, because a neighbour's overflow may have spoiled it
            self._evaluate([work], done.cut, report)

    def _blame(self, reason: str) -> MillraceError:
        """Say whose fault outputs are that make no sense for a record alone: its own, or the models'."""
        try:
            is_clean = None not in self._pass([_reference(self.views)])
        except Exception as error:  # a model may raise anything
            if _is_device_lost(error):
                raise FatalError(f"the device is lost: {self._reason(error)}") from error
            is_clean = False
        if is_clean:
            return ImageError(
                f"{reason}; for a reference picture it is as it should be"[:MAX_REASON_CHARACTERS]
            )
        return ModelError(reason)

    def _pass(self, works: list[Work]) -> list[tuple[ModelResult, ...] | None]:
        """Return one list of results per record, None where a number is not finite."""
        batches = {view: self._gather(works, view) for view in self.views}
        columns = []
        suspect = ""
        with torch.inference_mode():
            for model in self._models:
                self._at_work = model.name
                outputs = model.forward(batches[model.view])
                if len(outputs) != len(works):
                    raise WrongOutputError(f"{len(outputs)} outputs for {len(works)} pictures")
                pictures = [work.picture for work in works if work.picture is not None]
                column = list(map(partial(result_of, model), outputs, pictures))
                suspect = model.name if None in column else suspect
                columns.append(column)
        self._at_work = suspect
        return [
            None if None in row else tuple(result for result in row if result is not None)
            for row in zip(*columns, strict=True)
        ]

    def _gather(self, works: list[Work], view: View) -> torch.Tensor | list[torch.Tensor]:
        """Put what the pictures look like in one view onto the device."""
        pictures = [work.picture.pixels[work.views.index(view)] for work in works if work.picture is not None]
        if view.fit == "inside":  # of different sizes
            return [self._to_device([pixels])[0] for pixels in pictures]
        return self._to_device(pictures)

    def _to_device(self, pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        batch = _stacked(pictures, pinned=self._device.type == "cuda").to(self._device, non_blocking=True)
        return batch.permute(0, 3, 1, 2)  # (N, 3, H, W) uint8, channels last in memory

    def _receipt(self, work: Work, done: _Pass) -> Receipt:
        request, picture = work.request, work.picture
        assert picture is not None
        queue_seconds = max(
            0.0, work.decode_started_at - request.received_at + done.started_at - work.decode_ended_at
        )
        self._queue_seconds[request.lane].observe(queue_seconds)
        return Receipt(
            topic=request.record.topic,
            partition=request.record.partition,
            offset=request.record.offset,
            input_sha256=work.sha256,
            input_bytes=work.input_bytes,
            width=picture.width,
            height=picture.height,
            batch_id=done.batch_id,
            batch_size=done.size,
            batch_cut=done.cut,
            device=self._device_name,
            queue_seconds=round(queue_seconds, 6),
            batch_wait_seconds=round(max(0.0, done.started_at - work.decode_ended_at), 6),
            decode_seconds=round(work.decode_ended_at - work.decode_started_at, 6),
            forward_seconds=round(done.seconds, 6),
            gpu_uuid=done.energy.gpu_uuid,
            joules=done.share(done.energy.joules),
            idle_joules=done.share(done.energy.idle_joules),
        )

    def _reason(self, error: Exception) -> str:
        kind = "" if isinstance(error, WrongOutputError) else f"{type(error).__name__}: "
        text = " ".join(str(error).split())
        where = f"{self._at_work}: " if self._at_work else ""
        return f"{where}{kind}{text}"[:MAX_REASON_CHARACTERS]


def _reference(views: Sequence[View]) -> Work:
    """Return a picture that no model can object to: a ramp from black to white across, and back down."""
    pixels = []
    for view in views:
        across, down = np.linspace(0, 255, view.width), np.linspace(255, 0, view.height)
        grey = (across[None, :] + down[:, None]) / 2  # (H, W) float64
        pixels.append(np.repeat(grey[..., None], 3, 2).astype(np.uint8))  # (H, W, 3) uint8
    record = Record(topic="reference", partition=0, offset=0, timestamp_ms=0)
    request = Request(ImageEvent(id="reference"), record, "bulk", 0.0, claim=lambda: True)
    picture = Picture(tuple(pixels), views[0].width, views[0].height)
    return Work(request, b"", picture=picture, views=tuple(views))


def _stacked(pictures: Sequence[NDArray[np.uint8]], *, pinned: bool) -> torch.Tensor:
    """Copy pictures of one size, each (H, W, 3), into one batch (N, H, W, 3).

    A copy to a GPU from pinned memory is only queued, so that this thread stacks the next pictures meanwhile; it
    does not run beside another batch's pass, as one thread does both. torch keeps pinned memory to use it
    again, and gives none out before the copy from it is done.
    """
    if not pinned:
        return torch.from_numpy(np.stack(pictures))
    batch = torch.empty((len(pictures), *pictures[0].shape), dtype=torch.uint8, pin_memory=True)
    np.stack(pictures, out=batch.numpy())
    return batch


def _cannot_start(name: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"MILLRACE_MODELS: {name!r} fails its warm-up: {' '.join(reason.split())}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _is_device_lost(error: Exception) -> bool:
    if _ACCELERATOR_ERROR and isinstance(error, _ACCELERATOR_ERROR):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE_LOST)
