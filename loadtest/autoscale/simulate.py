"""One run: a trace, a ScaledObject, and what came of it."""

import math
from dataclasses import dataclass, field

from loadtest.autoscale.cluster import Cluster, Pods
from loadtest.autoscale.hpa import SYNC_SECONDS, Autoscaler
from loadtest.autoscale.keda import Keda
from loadtest.autoscale.objects import ScaledObject
from loadtest.autoscale.traces import Trace

# The HPA and the poll loop have clocks of their own; between them lies some of the dead time.
_HPA_PHASE = 7
_POLL_PHASE = 3


@dataclass(frozen=True)
class Run:
    """What one policy did on one trace."""

    violations_ratio: float
    gpu_seconds: float
    replica_changes: int
    rebalances: int
    most_replicas: int
    #: Every quarter of a minute: replicas ordered, records waiting, and for how many seconds the oldest of them.
    replicas: tuple[int, ...]
    backlog: tuple[int, ...] = field(repr=False)
    waited: tuple[float, ...] = field(repr=False)


def run(
    trace: Trace,
    scaled: ScaledObject,
    deadline_seconds: float,
    *,
    pods: Pods | None = None,
    seed: int = 7,
    outages: dict[str, tuple[int, int]] | None = None,
) -> Run:
    """Run a trace under a ScaledObject, which begins with as many pods as the first minute needs."""
    kind = pods or Pods()
    cluster = Cluster(trace, kind, seed)
    cluster.outages = outages or {}
    first = math.ceil(trace.rates[:60].mean() / kind.images_per_second)
    cluster.scale(min(scaled.max_replicas, max(first, scaled.min_replicas)), ready=True)
    cluster.changes = 0
    keda = Keda(scaled)
    hpa = Autoscaler(max(1, scaled.min_replicas), scaled.max_replicas, scaled.behavior)
    replicas, backlog, times = [], [], []
    for second in range(trace.seconds):
        if second % scaled.polling_seconds == _POLL_PHASE:
            cluster.scale(keda.poll(second, cluster.replicas, cluster))
        if second % SYNC_SECONDS == _HPA_PHASE:
            # An HPA at zero asks nothing.
            if cluster.replicas:
                cluster.scale(hpa.sync(second, cluster.replicas, keda.metrics(cluster)))
            times.append(second)
            replicas.append(cluster.replicas)
            backlog.append(int((cluster.arrived[second] - cluster.served[second]).sum()))
        cluster.step()
    return Run(
        violations_ratio=cluster.late(deadline_seconds) / max(1.0, cluster.judged(deadline_seconds)),
        gpu_seconds=cluster.pod_seconds,
        replica_changes=cluster.changes,
        rebalances=cluster.rebalances,
        most_replicas=max(replicas),
        replicas=tuple(replicas),
        backlog=tuple(backlog),
        waited=tuple(cluster.oldest(times).tolist()),
    )
