"""XID errors as the driver reports them, in a thread that waits for nothing else."""

import contextlib
import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pynvml

from pipeline import logs
from pipeline.nvml_values import Handle, Reader
from pipeline.telemetry import Gpu

#: GPU UUID and code; called from a thread of its own.
OnXid = Callable[[str, int], None]

_NO_INSTANCE = 0xFFFFFFFF
# A thread that waits ends within this.
_WAIT_MILLISECONDS = 100

_log = logs.get(__name__)


@dataclass(slots=True)
class Device:
    """A GPU or an instance of one, as NVML has it."""

    gpu: Gpu
    reader: Reader
    #: Whether MIG is on: what is supported depends on it.
    is_divided: bool = False
    #: Of a MIG instance: its GPU instance and compute instance.
    instance: tuple[int, int] | None = None


class XidWatch:
    """A thread that waits for XID errors of some GPUs; it ends itself when the driver no longer answers."""

    def __init__(self, devices: list[Device], on_xid: OnXid) -> None:
        self._on_xid = on_xid
        self._uuids = {address(device.reader.handle): device.gpu.gpu_uuid for device in devices}
        self._instances = {
            (device.gpu.parent_uuid, device.instance): device.gpu.gpu_uuid
            for device in devices
            if device.instance is not None
        }
        self._stopping = threading.Event()
        self._events = pynvml.nvmlEventSetCreate()
        for device in devices:
            # An instance's errors come as its GPU's; some GPUs report no events.
            if device.instance is None:
                with contextlib.suppress(pynvml.NVMLError):
                    pynvml.nvmlDeviceRegisterEvents(
                        device.reader.handle, pynvml.nvmlEventTypeXidCriticalError, self._events
                    )
        self._thread = threading.Thread(target=self._run, name="xid", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether nobody waits any more."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End it; blocks until nobody is in the library."""
        self._stopping.set()
        self._thread.join()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlEventSetFree(self._events)

    def _run(self) -> None:
        while True:
            is_last = self._stopping.is_set()  # what has happened already is told
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0 if is_last else _WAIT_MILLISECONDS)
            except pynvml.NVMLError_Timeout:
                if is_last:
                    return
                continue
            except pynvml.NVMLError as error:
                _log.warning("waiting for XID errors failed", error=str(error))
                return  # the next look makes another set, of the GPUs that answer
            uuid = self._uuid_of(event)
            if uuid is not None and event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                self._on_xid(uuid, int(event.eventData))

    def _uuid_of(self, event: "pynvml.c_nvmlEventData_t") -> str | None:
        uuid = self._uuids.get(address(event.device))
        if event.gpuInstanceId == _NO_INSTANCE:
            return uuid
        return self._instances.get((uuid, (event.gpuInstanceId, event.computeInstanceId)), uuid)


def address(handle: Handle) -> int:
    """Return what makes two handles the same."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
