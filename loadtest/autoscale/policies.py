"""The two policies for `predict`, lag alone and the deadline, with every number worked out from a few facts.

Deadline: waiting is cheap until it endangers the deadline. So of the replica counts that share the partitions
evenly the one below what arrivals need is kept until the oldest records have waited `HIGH` of the deadline, then
the one above until they wait less than `LOW`.
"""

from dataclasses import dataclass

from loadtest.autoscale.objects import (
    Behavior,
    Fallback,
    KafkaTrigger,
    Modifiers,
    PrometheusTrigger,
    Rules,
    ScaledObject,
    Signal,
    Step,
    WorkloadTrigger,
    labels_of,
)
from pipeline.topics import IMAGES_BULK, IMAGES_REALTIME

LANES = ("realtime", "bulk")
# Shares of the deadline, found with `millrace bench-autoscale` (docs/autoscaling.md says what others cost).
LOW = 0.4
HIGH = 0.55
#: Here one count more is taken, if all replicas work: partitions are shared worse than their sizes let expect.
CRITICAL = 0.8
#: Replicas that are there stay until what waits can be worked off in this.
KEEP = 0.65
#: Without time to start pods, so much more than arrivals need is kept.
HEADROOM = 1.3
#: Scrape, HPA sync, the group's pause, and a pod that takes a tenth longer than others.
_OVERHEAD_SECONDS = 40.0
_SLOWER_START = 1.1
#: So long waiting says nothing of the number of replicas: the group's pauses make it.
_PAUSES_SECONDS = 30.0
#: While Prometheus does not answer, lag alone decides, more generously.
_BLIND = 0.2
# Matches nothing. Between two of them k8s/strimzi/components/scaling-deadline puts the name of another deployment.
_MARK = "(?:)"


@dataclass(frozen=True)
class Facts:
    """What the numbers are worked out from."""

    pod_images_per_second: float = 120.0
    start_seconds: float = 90.0
    deadline_seconds: float = 300.0
    partitions: int = IMAGES_BULK.partitions
    topic_prefix: str = ""
    deployment: str = "default"
    #: With its namespace: KEDA's operator runs in another one.
    bootstrap_servers: str = "millrace-kafka-bootstrap.millrace.svc:9092"
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"

    @property
    def dead_seconds(self) -> float:
        """Return what passes at most between a rise of arrivals and the work of new pods."""
        return self.start_seconds * _SLOWER_START + _OVERHEAD_SECONDS

    @property
    def can_wait(self) -> bool:
        """Say whether pods that are ordered when work arrives can do it in time."""
        return self.deadline_seconds > self.dead_seconds

    @property
    def min_replicas(self) -> int:
        """Return 0 where a pod can be started for the first record, else 1."""
        return 0 if self.can_wait else 1

    @property
    def lag_threshold(self) -> int:
        """Return how many records one replica may have waiting: what it works off in half the deadline."""
        return max(1, int(self.pod_images_per_second * self.deadline_seconds / 2))

    @property
    def workload(self) -> str:
        """Return the Deployment's name."""
        return f"predict-{self.deployment}"

    @property
    def group(self) -> str:
        """Return the consumer group's name."""
        return f"{self.topic_prefix}predict.{self.deployment}"


def lag(facts: Facts, threshold: int | None = None) -> ScaledObject:
    """Return the policy that looks at lag alone: a threshold for each lane, and quicker up than down."""
    return ScaledObject(
        triggers=_lanes(facts, threshold or facts.lag_threshold),
        min_replicas=facts.min_replicas,
        max_replicas=facts.partitions,
        name=facts.workload,
        behavior=Behavior(
            # A tenth less than what is wanted is too few near the most.
            up=Rules(0, (Step("Pods", 4, 15), Step("Percent", 100, 15)), tolerance=0.0),
            # Each change stops the group for some seconds: at most one a minute on the way down.
            down=Rules(300, (Step("Percent", 50, 60),)),
        ),
        # Who cannot see Kafka leaves the pods as they are. Not 0 replicas: with those KEDA would not wait.
        fallback=Fallback(failure_threshold=3, replicas=1, behavior="currentReplicas"),
    )


def deadline(facts: Facts) -> ScaledObject:
    """Return the policy that keeps the deadline: replicas by a formula over arrivals, waiting and speed."""
    return ScaledObject(
        triggers=(
            *_lanes(facts, facts.lag_threshold),
            *(
                PrometheusTrigger(name, name, query, facts.prometheus)
                for name, query in queries(facts).items()
            ),
            WorkloadTrigger("pods", _selector(facts)),
        ),
        min_replicas=facts.min_replicas,
        max_replicas=facts.partitions,
        name=facts.workload,
        behavior=Behavior(
            # The formula says how many: all at once, and exactly so many.
            up=Rules(0, (Step("Pods", facts.partitions, 15),), tolerance=0.0),
            down=Rules(60 if facts.can_wait else 300, (Step("Percent", 100, 15),), tolerance=0.0),
        ),
        modifiers=Modifiers(formula(facts)),
        fallback=Fallback(failure_threshold=3, replicas=facts.partitions, behavior="scalingModifiers"),
        cooldown_seconds=60,
    )


def formula(facts: Facts) -> str:
    """Return how many replicas there should be, from what the triggers say.

    `share` is how many partitions one replica can carry when one of them may be the hottest: that one and so many
    average ones fit into its speed. Nothing is divided by what may be 0, and the result is never negative: the HPA
    would read either as "all".
    """
    partitions, within = facts.partitions, facts.deadline_seconds
    speed = f"max(speed, {facts.pod_images_per_second / 4:g})"
    expected = "arrival" if facts.can_wait else f"arrival * {HEADROOM:g}"
    share = f"floor(1 + {partitions} * max(0, {speed} / max({expected}, 0.01) - skew))"
    more = f"(waited > {max(CRITICAL * within, _PAUSES_SECONDS):g} && ready >= pods ? 1 : 0)"
    fewer = f"(waited > (pods < ceil({partitions} / {share}) ? {HIGH * within:g} : {LOW * within:g}) ? 0 : 1)"
    spread = f"{share} - {more}" + (f" + {fewer}" if facts.can_wait else "")
    needed = f"ceil({partitions} / max(1, {spread}))"
    kept = f"min(pods, (realtime + bulk) / ({speed} * {KEEP * within:g}))"
    seeing = f"realtime + bulk + arrival > 0.1 ? max(1, {needed}, {kept}) : 0"
    each = max(1, int(facts.pod_images_per_second * within * _BLIND))
    blind = f"ceil((realtime + bulk) / {each})"
    without = " , ".join(f"{name} ?? -1" for name in queries(facts)).replace(" ,", ",")
    return f"min(realtime ?? -1, bulk ?? -1) < 0 ? pods : min({without}) < 0 ? {blind} : {seeing}"


def queries(facts: Facts) -> dict[Signal, str]:
    """Return the Prometheus queries by trigger name: Strimzi's Kafka exporter and the workers' own metrics."""
    topics = "|".join(_topic(facts, lane) for lane in LANES).replace(".", "\\\\.")
    ends = f'kafka_topic_partition_current_offset{{topic=~"{topics}"}}'
    group = f"{facts.topic_prefix}predict.{_MARK}{facts.deployment}{_MARK}".replace(".", "\\\\.")
    waiting = f'kafka_consumergroup_lag{{consumergroup=~"{group}", topic=~"{topics}"}}'
    by_partition = f"sum by (partition) (rate({ends}[15m]))"
    by_lane = f"sum by (topic, partition) (rate({ends}[1m]))"
    # What a PodMonitor calls the pods of this Deployment alone: predict-default-5d9c7bdb8b-x2x7q.
    pods = f'pod=~"predict-{_MARK}{facts.deployment}{_MARK}-[^-]+-[^-]+"'
    done, busy = (
        f"sum(rate({name}{{{pods}}}[5m]))"
        for name in ("millrace_batch_size_sum", "millrace_forward_seconds_sum")
    )
    return {
        # Of the last two scrapes: a mean over a minute would see a rise a minute late.
        "arrival": f"sum(irate({ends}[1m]))",
        "skew": f"(max({by_partition}) / (sum({by_partition}) > 0)) or vector({1 / facts.partitions:.4f})",
        "waited": f"max(sum by (topic, partition) ({waiting}) / clamp_min({by_lane}, 0.1))",
        "ready": f'sum(millrace_ready{{step="predict", {pods}}}) or vector(0)',
        # Pictures per busy second, not per second: an idle pod is not a slow one.
        "speed": f"({done} / ({busy} > 0)) or vector({facts.pod_images_per_second:g})",
    }


def _lanes(facts: Facts, threshold: int) -> tuple[KafkaTrigger, ...]:
    return tuple(
        KafkaTrigger(
            lane,
            _topic(facts, lane),
            number,
            threshold,
            bootstrap_servers=facts.bootstrap_servers,
            consumer_group=facts.group,
        )
        for number, lane in enumerate(LANES)
    )


def _selector(facts: Facts) -> str:
    """Return what selects the pods of the Deployment, and those of no other."""
    wanted = {
        name: value for name, value in labels_of(facts.workload).items() if not name.endswith("part-of")
    }
    return ",".join(f"{name}={value}" for name, value in wanted.items())


def _topic(facts: Facts, lane: str) -> str:
    return facts.topic_prefix + (IMAGES_REALTIME if lane == "realtime" else IMAGES_BULK).name
