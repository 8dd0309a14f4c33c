"""Keeps what kubectl tells of a sound installation, for tests that have no API server.

`MILLRACE_SCHEMAS=… python -m tests.cluster.record` writes `tests/support/cluster.json.gz` anew.
"""

import gzip
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from millrace.cluster import read
from millrace.kubectl import Kubectl
from tests.cluster import external_metrics, sound
from tests.cluster.control_plane import installed

RECORDING = Path(__file__).parents[1] / "support" / "cluster.json.gz"
# Different in every run, and nothing looks at it.
_UNSTABLE = frozenset({"uid", "resourceVersion", "creationTimestamp", "clusterIP", "clusterIPs"})


def stable(value: Any) -> Any:
    """Return a value without what differs from run to run."""
    if isinstance(value, dict):
        return {key: stable(each) for key, each in value.items() if key not in _UNSTABLE}
    return [stable(each) for each in value] if isinstance(value, list) else value


def main() -> None:
    """Record one."""
    with tempfile.TemporaryDirectory() as folder, installed(Path(folder)) as plane:
        sound.install(plane, "millrace")
        os.environ |= plane.environment()
        with external_metrics.serving(plane, Path(folder) / "adapter"):
            cluster = msgspec.to_builtins(read(Kubectl(), "millrace"))
    content = msgspec.json.format(msgspec.json.encode(stable(cluster)), indent=1)
    RECORDING.write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    main()
