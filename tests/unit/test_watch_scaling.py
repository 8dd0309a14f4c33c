"""How many records the open windows of `watch` hold, and that its ScaledObject allows for them.

Samples go through the windows and the ledger that the step uses; no clock and no Kafka take part.
"""

import functools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtest.autoscale import hpa, keda
from loadtest.autoscale.objects import KafkaTrigger, ScaledObject
from pipeline.detection import Watch, load_rules
from pipeline.ledger import PartitionLedger
from pipeline.telemetry import Sample, Samples
from tests.support import scaling

BASE = Path(__file__).parents[2] / "k8s/strimzi/base"
START = datetime(2026, 3, 1, tzinfo=UTC)
INTERVAL_SECONDS = 10
HOSTS = 8
#: What one replica is for: 1,250 hosts with a record in 10 s each.
RECORDS_PER_SECOND = 125


@functools.cache
def shipped() -> ScaledObject:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all((BASE / "scaled-objects.yaml").read_text()))
    (found,) = (each for each in documents if each["metadata"]["name"] == "watch")
    return scaling.read(found)


def trigger() -> KafkaTrigger:
    (found,) = shipped().triggers
    assert isinstance(found, KafkaTrigger)
    return found


class Fleet:
    """Hosts that share a partition, and what `watch` has not finished of it."""

    def __init__(self) -> None:
        self._watch = Watch(load_rules())
        self._ledger = PartitionLedger()
        self._unpublished: dict[int, int] = {}

    def publish(self, second: int, host: int) -> None:
        time = START + timedelta(seconds=second)
        samples = Samples(
            host=f"node-{host}",
            source="test",
            samples=(Sample(gpu_uuid=f"GPU-{host}", time=time, values={"power_watts": 300.0}),),
        )
        offset = self._ledger.next_offset
        self._ledger.open(offset, 100)
        fed = self._watch.feed(offset, samples.host, samples, int(time.timestamp() * 1000))
        closed = [closing.window.tokens for closing in fed.closings]
        self._unpublished[offset] = fed.windows + sum(offset in tokens for tokens in closed)
        for tokens in closed:
            for token in tokens:
                assert isinstance(token, int)
                self._unpublished[token] -= 1
                if not self._unpublished[token]:
                    self._ledger.finish(token)

    @property
    def lag(self) -> int:
        committed = self._ledger.committable
        return keda.lag_of(keda.Partition(committed or 0, self._ledger.next_offset), trigger())


def lags(silent_from: int | None, seconds: int = 600) -> list[int]:
    """Return the lag after each second from the third minute on; the first host may fall silent."""
    fleet, found = Fleet(), []
    for second in range(seconds):
        for host in range(HOSTS):
            is_silent = host == 0 and silent_from is not None and second >= silent_from
            if second % INTERVAL_SECONDS == host and not is_silent:
                fleet.publish(second, host)
        found.append(fleet.lag)
    return found[180:]


def replicas_for(held_seconds: float, records_per_second: float, pods: int) -> int:
    """Return what the HPA wants when open windows hold so many seconds of a fleet's records."""
    metric = hpa.Metric(held_seconds * records_per_second, trigger().lag_threshold)
    return hpa.wanted_by(metric, pods, shipped().behavior)


# In windows of 60 s: at each place of one a host may fall silent.
@pytest.mark.parametrize("silent_from", [None, *range(300, 360, INTERVAL_SECONDS)])
def test_open_windows_alone_order_no_replica(silent_from: int | None) -> None:
    """A fleet of one replica's size has one replica, even while every partition waits for a host that died."""
    held_seconds = max(lags(silent_from)) * INTERVAL_SECONDS / HOSTS
    assert held_seconds >= (80 if silent_from is None else 120)
    assert replicas_for(held_seconds, RECORDS_PER_SECOND, 1) == 1
    # Nor do four times as many GPUs have more than four.
    assert replicas_for(held_seconds, 4 * RECORDS_PER_SECOND, 4) <= 4


def test_real_backlog_orders_replicas() -> None:
    """Five minutes behind, all of them are ordered that the fleet is worth."""
    assert replicas_for(80 + 300, RECORDS_PER_SECOND, 1) == 2


def test_who_is_published_for_never_sleeps() -> None:
    """As long as one host publishes a window is open, and what is open is lag: KEDA keeps `watch` awake."""
    assert shipped().min_replicas == 0
    assert min(lags(None)) > trigger().activation_lag_threshold


def test_windows_of_a_silent_host_are_closed_before_watch_may_sleep() -> None:
    """Until the window of a host that fell silent is closed, its records are lag."""
    fleet = Fleet()
    for second in range(0, 120, INTERVAL_SECONDS):
        fleet.publish(second, 0)
    assert fleet.lag > trigger().activation_lag_threshold
