"""A dcgm-exporter as far as a scraper can tell: a real HTTP server, and pages in the format of its releases."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

UUIDS = ("GPU-604ac76c-d9cf-fef3-62e9-d92044ab6e52", "GPU-71b65b2c-5b3f-4ae1-9a4e-4a0c6a8f0f2d")
# As 3.x and 4.x write them; 4.6 and later write `hostname`.
PAGE = """\
# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{{{gpu0}}} 1980
DCGM_FI_DEV_SM_CLOCK{{{gpu1}}} 1965
# HELP DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION Total energy consumption since boot (in mJ).
# TYPE DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION counter
DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION{{{gpu0}}} 15812034129
# HELP DCGM_FI_DEV_POWER_USAGE Power draw (in W).
# TYPE DCGM_FI_DEV_POWER_USAGE gauge
DCGM_FI_DEV_POWER_USAGE{{{gpu0}}} 71.456000
DCGM_FI_DEV_POWER_USAGE{{{gpu1}}} 9223372036854775794
# HELP DCGM_FI_DEV_XID_ERRORS Value of the last XID error encountered.
# TYPE DCGM_FI_DEV_XID_ERRORS gauge
DCGM_FI_DEV_XID_ERRORS{{{gpu0},err_code="31",err_msg="GPU memory page fault"}} 31
# HELP DCGM_EXP_XID_ERRORS_COUNT Count of XID Errors within user-specified time window.
# TYPE DCGM_EXP_XID_ERRORS_COUNT gauge
{xids}
# HELP DCGM_EXP_CLOCK_EVENTS_COUNT Count of clock events within the user-specified time window.
# TYPE DCGM_EXP_CLOCK_EVENTS_COUNT gauge
DCGM_EXP_CLOCK_EVENTS_COUNT{{{gpu0},clock_event="hw_thermal",window_size_in_ms="300000"}} 4
DCGM_EXP_CLOCK_EVENTS_COUNT{{{gpu0},clock_event="power_cap",window_size_in_ms="300000"}} 2
# HELP DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL Total number of NVLink flow-control CRC errors.
# TYPE DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL counter
DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL{{gpu="0",gpu_uuid="{uuid0}",nvlink="0",{nvlink}}} 3
DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL{{gpu="0",gpu_uuid="{uuid0}",nvlink="1",{nvlink}}} 4
# HELP DCGM_FI_PROF_SM_ACTIVE The ratio of cycles an SM has at least 1 warp assigned.
# TYPE DCGM_FI_PROF_SM_ACTIVE gauge
DCGM_FI_PROF_SM_ACTIVE{{{gpu0},GPU_I_PROFILE="1g.10gb",GPU_I_ID="7"}} 0.5
# HELP DCGM_FI_DEV_FANTASY_COUNT A field of tomorrow.
# TYPE DCGM_FI_DEV_FANTASY_COUNT gauge
DCGM_FI_DEV_FANTASY_COUNT{{{gpu1}}} NaN
DCGM_FI_DEV_FANTASY_COUNT{{{gpu0}}} 42
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 12.5
"""


def page(host_label: str = "Hostname", uuid_label: str = "UUID", xids: dict[int, int] | None = None) -> str:
    """Return a page of two GPUs of node-7; `xids` are counts of GPU 0 by code."""
    labels = [
        f'gpu="{index}",{uuid_label}="{uuid}",pci_bus_id="00000000:{index}B:00.0",device="nvidia{index}",'
        f'modelName="NVIDIA H100 80GB HBM3",{host_label}="node-7",DCGM_FI_DRIVER_VERSION="550.54.15",'
        f'container="train",namespace="ml",pod="job-{index}"'
        for index, uuid in enumerate(UUIDS)
    ]
    counts = [
        f'DCGM_EXP_XID_ERRORS_COUNT{{{labels[0]},window_size_in_ms="300000",xid="{code}"}} {count}'
        for code, count in (xids or {}).items()
    ]
    nvlink = 'model_name="NVIDIA H100 80GB HBM3",Hostname="node-7"'
    return PAGE.format(gpu0=labels[0], gpu1=labels[1], uuid0=UUIDS[0], nvlink=nvlink, xids="\n".join(counts))


@dataclass
class Exporter:
    """A running server; what it answers may be changed."""

    url: str
    body: str
    status: int = 200


@contextmanager
def serving(body: str) -> Iterator[Exporter]:
    """Serve a page on a free port of the loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = exporter.body.encode()
            self.send_response(exporter.status)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        exporter = Exporter(f"http://127.0.0.1:{server.server_address[1]}/metrics", body)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield exporter
        finally:
            server.shutdown()
            thread.join()
