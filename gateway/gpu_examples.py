"""Examples for the API's description of telemetry and alerts: real shapes, made-up values."""

from datetime import timedelta
from typing import Any

from pipeline import examples
from pipeline.gpu_views import AlertView, Firing, GpuView, HostView, Latest, Point
from pipeline.notifications import Notification, Silence

_TIME = examples.TIME
_GPU = "GPU-5fd4f087-86f3-7a43-b711-4771313afc50"
_VALUES: dict[str, float] = {"utilization_percent": 98.0, "temperature_celsius": 67.0, "power_watts": 612.5}
_MODEL = "NVIDIA H100 80GB HBM3"
_FIRING, _RESOLVED = examples.alerts()

GPU = GpuView(
    gpu_uuid=_GPU, host="node-7", peer_key="node-7", state="ok", first_seen=_TIME - timedelta(days=9),
    last_seen=_TIME, firing=Firing(critical=1), latest=Latest(_TIME, _VALUES), index=0, model=_MODEL,
    device="nvidia0", pci_bus_id="00000000:1B:00.0", driver_version="580.65.06", labels={"namespace": "training"},
)  # fmt: skip
HOST = HostView(
    host="node-7",
    gpus=8,
    lost=0,
    models=(_MODEL,),
    peer_keys=("node-7",),
    last_seen=_TIME,
    firing=Firing(critical=1),
)
TELEMETRY: dict[str, Any] = {
    "gpu_uuid": _GPU,
    "start": _TIME - timedelta(minutes=15),
    "end": _TIME,
    "samples": (Point(time=_TIME, values=dict(_VALUES)),),
}
ALERT = AlertView(
    id=_FIRING.id, state="firing", severity="critical", rule=_FIRING.condition.rule, gpu_uuid=_GPU, host="node-7",
    since=_FIRING.since, seen_at=_TIME, condition=_FIRING.condition, model=_MODEL, fired_at=_FIRING.time,
)  # fmt: skip
NOTIFICATION = Notification(
    receiver="on-call", alert_id=_FIRING.id, state="firing", status="delivered", attempts=1, since=_FIRING.time,
    settled_at=_FIRING.time + timedelta(seconds=1),
)  # fmt: skip
SILENCE_BODY: dict[str, Any] = {
    "match": {"host": "node-7", "rule": ("thermal_margin", "power_cap")},
    "ends_at": _TIME + timedelta(hours=2),
    "comment": "fans are being replaced",
    "created_by": "ada",
}
SILENCE = Silence(
    id=7, match=SILENCE_BODY["match"], starts_at=_TIME, ends_at=SILENCE_BODY["ends_at"],
    comment=SILENCE_BODY["comment"], created_by="ada", created_at=_TIME,
)  # fmt: skip
