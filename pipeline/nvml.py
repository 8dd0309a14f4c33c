"""The GPUs of this machine by NVML: what there is, samples of all, XID errors as they happen.

Calls block, each for as long as the driver pleases: `Nvml` belongs to one thread that is not the event loop's, XID
errors come in another. What goes wrong with a GPU is a sample that says `lost`, never an exception; a driver that
was reloaded, or replaced by another version, is begun anew. Instances of MIG are GPUs of their own.
"""

import _ctypes
import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import datetime

import pynvml

from pipeline import logs
from pipeline.errors import DependencyError
from pipeline.nvml_values import Handle, Reader
from pipeline.nvml_xids import Device, OnXid, XidWatch, address
from pipeline.telemetry import Gpu, Sample

# The driver was reloaded, unloaded or replaced: nothing works before the library is initialised again.
_SESSION_OVER = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
_GPU_LOST = frozenset(
    {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND}
)
# Instances come and go with MIG, and GPUs come back.
_LOOK_AGAIN_SECONDS = 60.0
_FIRST_WAIT_SECONDS = 1.0

_log = logs.get(__name__)


class Nvml:
    """Reads the GPUs of this machine; not thread-safe."""

    def __init__(self, on_xid: OnXid | None = None) -> None:
        self._on_xid = on_xid
        self._devices: dict[str, Device] = {}
        #: Seen before and not answering now; for ever, as only a person knows that one was taken out.
        self._lost: dict[str, Gpu] = {}
        #: How many GPUs have not answered once, so that nobody knows their UUID.
        self.nameless = 0
        self._is_open = False
        self._watch: XidWatch | None = None
        self._retry_at = self._looked_at = 0.0
        self._waits = _waits()
        self._driver_version: str | None = None

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """What is known of every GPU, lost ones included."""
        return (*(device.gpu for device in self._devices.values()), *self._lost.values())

    @property
    def lost(self) -> frozenset[str]:
        """UUIDs of the GPUs that do not answer."""
        return frozenset(self._lost)

    def open(self) -> None:
        """Initialise NVML and find the GPUs.

        Raises:
            DependencyError: no NVML, or no GPU.
        """
        try:
            self._begin()
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                raise DependencyError(
                    "there is no NVML here: libnvidia-ml.so.1, which comes with NVIDIA's driver, was not found "
                    "(in a container: run it with the NVIDIA runtime)"
                ) from None
            raise DependencyError(f"NVML does not start: {error}") from None
        if not self._devices:
            self.close()
            raise DependencyError("NVML knows no GPU on this machine that answers")

    def close(self) -> None:
        """Release NVML; may be opened again."""
        self._end_watch()
        if self._is_open:
            self._is_open = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def sample(self, moment: datetime) -> list[Sample]:
        """Return a sample of every GPU that was ever seen, all of one moment; `lost` where it does not answer."""
        now = time.monotonic()
        watch_has_ended = self._watch is not None and self._watch.has_ended
        if now >= self._retry_at or (watch_has_ended and now >= self._looked_at + _FIRST_WAIT_SECONDS):
            self._look_again()
        samples = self._read(moment)
        if samples is None:  # the session was over; with the new one, once more
            samples = self._read(moment) or []
        return samples + [Sample(gpu_uuid=uuid, time=moment, state="lost") for uuid in self._lost]

    def _read(self, moment: datetime) -> list[Sample] | None:
        """Return samples of the GPUs that answer; None after the driver has gone."""
        samples = []
        lost_before = len(self._lost)
        for uuid, device in list(self._devices.items()):
            try:
                values = device.reader.read()
                trouble = device.reader.trouble
            except pynvml.NVMLError as error:
                values, trouble = {}, error
            if trouble is not None and trouble.value in _SESSION_OVER:
                self._begin_anew(trouble)
                return None
            if trouble is not None and (trouble.value in _GPU_LOST or not values):
                _log.warning("a GPU does not answer", gpu_uuid=uuid, error=str(trouble))
                self._lost[uuid] = self._devices.pop(uuid).gpu
                self._retry_soon(begin=True)
                continue
            samples.append(Sample(gpu_uuid=uuid, time=moment, values=values))
        if len(self._lost) > lost_before and self._watch is not None:
            self._begin_watch()  # one lost GPU spoils the waiting for all
        return samples

    def _look_again(self) -> None:
        """Find what has come back, is new or is gone."""
        self._looked_at = time.monotonic()
        try:
            if self._is_open:
                self._find()
            else:
                self._begin()
        except pynvml.NVMLError as error:
            if self._is_open and error.value in _SESSION_OVER:
                self._begin_anew(error)
                return
            _log.warning("NVML does not answer", error=str(error))
        self._retry_soon()

    def _begin_anew(self, error: pynvml.NVMLError) -> None:
        """End the session that the driver has ended, and try another at once."""
        _log.warning("the driver has gone, beginning anew", error=str(error))
        self.close()
        self._lost |= {uuid: device.gpu for uuid, device in self._devices.items()}
        self._devices.clear()
        if error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            _unload_library()
        self._retry_soon(begin=True)
        try:
            self._begin()
        except pynvml.NVMLError as again:
            _log.warning("NVML does not start", error=str(again))
            if again.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                _unload_library()  # the library on disk may be replaced after the driver

    def _begin(self) -> None:
        pynvml.nvmlInit()
        self._is_open = True
        try:
            self._driver_version = pynvml.nvmlSystemGetDriverVersion()
            self._find()
        except pynvml.NVMLError:
            self.close()
            raise
        self._retry_soon(begin=True)

    def _find(self) -> None:
        """Bring devices up to date with what the driver knows."""
        found: dict[str, Device] = {}
        silent = 0
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                for device in self._describe(index):
                    found[device.gpu.gpu_uuid] = device
            except pynvml.NVMLError as error:
                if error.value in _SESSION_OVER:
                    raise
                silent += 1
                _log.warning("a GPU does not answer", index=index, error=str(error))
        for uuid, device in found.items():
            known = self._devices.get(uuid)
            if (
                known is not None
                and known.is_divided == device.is_divided
                and address(known.reader.handle) == address(device.reader.handle)
            ):
                device.reader = known.reader
            if self._lost.pop(uuid, None) is not None:
                _log.info("a GPU answers again", gpu_uuid=uuid)
        for uuid, device in self._devices.items():
            parent = device.gpu.parent_uuid
            if uuid not in found and parent not in found:  # an instance may be deleted, a GPU may not
                self._lost[uuid] = device.gpu
        present = {uuid: address(device.reader.handle) for uuid, device in found.items()}
        before = {uuid: address(device.reader.handle) for uuid, device in self._devices.items()}
        self._devices = found
        # Instances of a lost GPU that has come back without them are gone with it.
        for uuid, gpu in list(self._lost.items()):
            if gpu.parent_uuid in found:
                del self._lost[uuid]
        self.nameless = max(0, silent - sum(gpu.parent_uuid is None for gpu in self._lost.values()))
        if self._on_xid is not None and (
            self._watch is None or self._watch.has_ended or present.keys() != before.keys()
        ):
            self._begin_watch()

    def _describe(self, index: int) -> Iterator[Device]:
        """Yield a GPU and its MIG instances."""
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        try:
            is_divided = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        except pynvml.NVMLError as error:
            if error.value in _GPU_LOST | _SESSION_OVER:
                raise
            is_divided = False
        gpu = Gpu(
            gpu_uuid=uuid,
            index=index,
            model=_optional(pynvml.nvmlDeviceGetName, handle),
            device=_prefixed("nvidia", _optional(pynvml.nvmlDeviceGetMinorNumber, handle)),
            pci_bus_id=_optional(lambda it: pynvml.nvmlDeviceGetPciInfo(it).busId, handle),
            driver_version=self._driver_version,
        )
        yield Device(gpu, Reader(handle), is_divided)
        if is_divided:
            for position in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
                    yield _instance(gpu, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, position))

    def _begin_watch(self) -> None:
        self._end_watch()
        if self._on_xid is None:
            return
        try:
            self._watch = XidWatch(list(self._devices.values()), self._on_xid)
        except pynvml.NVMLError as error:  # the next sample finds out if the driver has gone
            _log.warning("XID errors will not be seen", error=str(error))

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _retry_soon(self, *, begin: bool = False) -> None:
        """Plan the next look: soon after something went, then less and less often."""
        if begin:
            self._waits = _waits()
        is_well = self._is_open and not self._lost and not self.nameless
        self._retry_at = time.monotonic() + (_LOOK_AGAIN_SECONDS if is_well else next(self._waits))


def _instance(parent: Gpu, handle: Handle) -> Device:
    instance = (pynvml.nvmlDeviceGetGpuInstanceId(handle), pynvml.nvmlDeviceGetComputeInstanceId(handle))
    name = str(_optional(pynvml.nvmlDeviceGetName, handle) or "")
    gpu = Gpu(
        gpu_uuid=pynvml.nvmlDeviceGetUUID(handle),
        index=parent.index,
        model=parent.model,
        device=name.partition(" MIG ")[2] or None,  # NVIDIA A100-SXM4-40GB MIG 1g.5gb
        pci_bus_id=parent.pci_bus_id,
        parent_uuid=parent.gpu_uuid,
        driver_version=parent.driver_version,
        labels={"gpu_instance": str(instance[0]), "compute_instance": str(instance[1])},
    )
    return Device(gpu, Reader(handle, is_instance=True), instance=instance)


def _optional(call: Callable[[Handle], object], handle: Handle) -> str | None:
    try:
        return str(call(handle)) or None
    except pynvml.NVMLError as error:
        if error.value in _GPU_LOST | _SESSION_OVER:
            raise
        return None


def _prefixed(prefix: str, text: str | None) -> str | None:
    return None if text is None else prefix + text


def _waits() -> Iterator[float]:
    wait = _FIRST_WAIT_SECONDS
    while True:
        yield wait
        wait = min(wait * 2, _LOOK_AGAIN_SECONDS)


def _unload_library() -> None:
    """Let go of the library, so that the one of the new driver is loaded; pynvml keeps it for ever."""
    library, pynvml.nvmlLib = pynvml.nvmlLib, None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    if library is not None:
        _ctypes.dlclose(library._handle)
