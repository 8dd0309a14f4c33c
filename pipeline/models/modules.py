"""The one class for every model that is a torch module, whatever source it came from.

A source brings the network, its preprocessing and what its output means; this class runs them: eval mode,
channels last, inference mode, the precision that is best here, one transfer off the device.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import logs
from pipeline.imaging import View
from pipeline.models import packing, precision
from pipeline.models.disagreement import structured_pictures
from pipeline.models.fusion import folded
from pipeline.models.preprocessing import Normaliser, Preprocessing
from pipeline.models.protocol import Output, Task
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.tasks import Reader
from pipeline.models.ways import Course, Way, fastest
from pipeline.models.weights import digest_of

_VERSION_DIGITS = 12
# A network with fewer parameters, at the usual 224 x 224 pixels, gives one picture too little work to share.
_SMALL_PARAMETERS = 8_000_000
_SMALL_PIXELS = 224 * 224

_log = logs.get(__name__)


class ModuleModel:
    """A network with what belongs to it; `architecture` is everything that made the network but its tensors."""

    def __init__(
        self,
        specification: Specification,
        network: nn.Module,
        preprocessing: Preprocessing,
        reader: Reader,
        architecture: Mapping[str, Any],
        device: torch.device,
        options: LoadOptions,
        *,
        is_program: bool = False,
    ) -> None:
        self.name = specification.text
        facts = {"architecture": architecture, "preprocessing": preprocessing, "reader": reader.facts()}
        self.digest = digest_of(network, facts)
        self.version = self.digest[:_VERSION_DIGITS]
        self.task: Task = reader.task
        self.view: View = preprocessing.view
        # A program runs as it was exported: its own memory format, its own numbers, its own device.
        self._network = network.eval().requires_grad_(False)
        if not is_program:
            self._network = network.to(device).to(memory_format=torch.channels_last)
        self._normalise = Normaliser(preprocessing, device)
        self._read = reader
        self._device = device
        self._options = options
        self._is_program = is_program
        self._dtype: torch.dtype | None = None
        self._is_warm = False

    @property
    def is_small(self) -> bool:
        """Whether a forward pass of one picture is too little work for several CPU threads."""
        parameters = sum(parameter.numel() for parameter in self._network.parameters())
        pixels = self.view.width * self.view.height
        return parameters * pixels <= _SMALL_PARAMETERS * _SMALL_PIXELS

    @property
    def precision(self) -> str:
        """What matrix products and convolutions run in, once warm."""
        return str(self._dtype or torch.float32).removeprefix("torch.")

    def warm_up(self) -> None:
        """Fold, take the fastest way to run, or compile, then run one picture and the largest batch."""
        if not self._is_warm:
            if not self._is_program and self.view.fit != "inside":
                self._network = folded(self._network, self._normalise(self._pictures(1)))
            self._take_fastest_way()
            if self._options.compile and self.view.fit == "inside":
                _log.warning("not compiled: its pictures vary in size", model=self.name)
            elif self._options.compile:
                # One compilation for all batch sizes but one.
                self._network = torch.compile(self._network, dynamic=True)  # type: ignore[assignment]
            self._is_warm = True
        self.forward(self._pictures(1))
        size = self._options.max_batch_size
        while size > 1:
            try:
                self.forward(self._pictures(size))
            except torch.OutOfMemoryError:
                _log.warning("the largest batch does not fit into memory", model=self.name, size=size)
                torch.cuda.empty_cache()
                size //= 2
            else:
                break

    def forward(self, batch: Any) -> list[Output]:
        """Evaluate (N, 3, H, W) uint8, or a list of (3, H, W) where sizes vary."""
        return self._run(self._network, self._dtype, batch)

    def _run(self, network: nn.Module, dtype: torch.dtype | None, batch: Any) -> list[Output]:
        with torch.inference_mode():
            pixels = self._normalised(batch)
            with torch.autocast(self._device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                raw = network(pixels)
            return self._read(raw)

    def _normalised(self, batch: Any) -> Tensor | list[Tensor]:
        if isinstance(batch, Tensor):
            # Nothing of the batch before is needed any more: a pass ends with numbers of its own.
            return self._normalise(batch, in_place_of_last=self._device.type == "cpu")  # (N, 3, H, W) float32
        return [self._normalise(picture[None])[0] for picture in batch]

    def _take_fastest_way(self) -> None:
        full = self._network
        ways = self._ways(full)
        course = Course(
            self.name,
            full,
            self._run,
            self._pictures,
            self._device,
            most=self._options.max_batch_size,
            alike=(repr(full), self.view, str(self._device), tuple(way.name for way in ways)),
        )
        way = fastest(ways, course)
        self._network, self._dtype = way.network, way.dtype

    def _ways(self, full: nn.Module) -> list[Way]:
        """Return how the network may run here, plainer ways first."""
        if self._is_program:
            return [Way("float32", lambda: full)]
        wanted = self._options.precision
        dtype = precision.dtype_of(wanted, self._device)
        if wanted == "auto" and self.task == "detect":  # 8 bits of a coordinate are 3 pixels of 800
            dtype = None
        # Pictures that vary in size need layouts that vary; what is compiled is packed by the compiler.
        is_packable = self.view.fit != "inside" and not self._options.compile
        is_packable = is_packable and packing.is_possible(full, self._device)
        packed = cache(lambda: packing.packed_alike(full, self._normalise(self._pictures(1))))
        ways = []
        if dtype is None or wanted == "auto":
            ways.append(Way("float32", lambda: full))
            if is_packable:
                ways.append(Way("float32 packed", lambda: packed()[0], None, packing.TOLERANCE))
        if dtype is not None:
            name, fewer = str(dtype).removeprefix("torch."), cache(partial(precision.converted, full, dtype))
            ways.append(Way(name, fewer, dtype))
            if is_packable and dtype in packing.PACKABLE:
                ways.append(Way(f"{name} packed", lambda: packing.packed(fewer(), packed()[1]), dtype))
        return ways

    def _pictures(self, count: int) -> Any:
        return structured_pictures(self.view, count, self._device)
