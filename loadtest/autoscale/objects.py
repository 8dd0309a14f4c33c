"""What KEDA and the HPA are told: a ScaledObject with its triggers and behaviour, and the manifest it makes."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Signal = Literal["arrival", "skew", "waited", "ready", "speed", "pods"]
MAX_REPLICAS = 2**31 - 1


@dataclass(frozen=True)
class KafkaTrigger:
    """KEDA's `kafka` trigger on one lane."""

    name: str
    topic: str
    lane: int
    lag_threshold: int
    activation_lag_threshold: int = 0
    offset_reset_policy: Literal["latest", "earliest"] = "earliest"
    allow_idle_consumers: bool = True
    limit_to_partitions_with_lag: bool = False
    bootstrap_servers: str = "millrace-kafka-bootstrap.millrace.svc:9092"
    consumer_group: str = "predict.default"

    def metadata(self) -> dict[str, str]:
        """Return the trigger's metadata; KEDA wants strings."""
        found = {
            "bootstrapServers": self.bootstrap_servers,
            "consumerGroup": self.consumer_group,
            "topic": self.topic,
            "lagThreshold": str(self.lag_threshold),
            "activationLagThreshold": str(self.activation_lag_threshold),
            "offsetResetPolicy": self.offset_reset_policy,
            "allowIdleConsumers": str(self.allow_idle_consumers).lower(),
        }
        return found | ({"limitToPartitionsWithLag": "true"} if self.limit_to_partitions_with_lag else {})


@dataclass(frozen=True)
class PrometheusTrigger:
    """KEDA's `prometheus` trigger; the simulator computes `signal`, a cluster evaluates `query`."""

    name: str
    signal: Signal
    query: str
    server_address: str = "http://prometheus-operated.monitoring.svc:9090"

    def metadata(self) -> dict[str, str]:
        """Return the trigger's metadata; a result that is missing must be a failure, not no load."""
        return {
            "serverAddress": self.server_address,
            "query": self.query,
            "threshold": "1",
            "ignoreNullValues": "false",
        }


@dataclass(frozen=True)
class WorkloadTrigger:
    """KEDA's `kubernetes-workload` trigger: how many pods there are, started or not."""

    name: str
    pod_selector: str

    def metadata(self) -> dict[str, str]:
        """Return the trigger's metadata."""
        return {"podSelector": self.pod_selector, "value": "1"}


def labels_of(workload: str) -> dict[str, str]:
    """Return the labels of a deployment of models, of its pods and of what belongs to it."""
    return {
        "app.kubernetes.io/name": "millrace",
        "app.kubernetes.io/part-of": "millrace",
        "app.kubernetes.io/component": "predict",
        "app.kubernetes.io/instance": workload,
    }


Trigger = KafkaTrigger | PrometheusTrigger | WorkloadTrigger
_TYPES = {KafkaTrigger: "kafka", PrometheusTrigger: "prometheus", WorkloadTrigger: "kubernetes-workload"}


@dataclass(frozen=True)
class Step:
    """One policy of an HPA's scaling rules: so many pods, or percent, in each period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_seconds: int


@dataclass(frozen=True)
class Rules:
    """An HPA's rules for one direction; the tolerance is its own only from Kubernetes 1.35 on."""

    window_seconds: int
    steps: tuple[Step, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float = 0.1

    def manifest(self) -> dict[str, Any]:
        """Return the rules as the HPA's API has them."""
        policies = [
            {"type": step.kind, "value": step.value, "periodSeconds": step.period_seconds}
            for step in self.steps
        ]
        found = {
            "stabilizationWindowSeconds": self.window_seconds,
            "selectPolicy": self.select,
            "policies": policies,
        }
        return found if self.tolerance == 0.1 else found | {"tolerance": f"{self.tolerance:g}"}


@dataclass(frozen=True)
class Behavior:
    """Rules for both directions."""

    up: Rules = Rules(0, (Step("Pods", 4, 15), Step("Percent", 100, 15)))
    down: Rules = Rules(300, (Step("Percent", 100, 15),))


@dataclass(frozen=True)
class Modifiers:
    """A formula over the triggers' values, which becomes the HPA's only external metric."""

    formula: str
    target: int = 1
    activation_target: float = 0.0


@dataclass(frozen=True)
class Fallback:
    """What to go by after a trigger has failed more often than `failure_threshold` in a row."""

    failure_threshold: int
    replicas: int
    behavior: Literal["static", "currentReplicas", "scalingModifiers"] = "static"


@dataclass(frozen=True)
class ScaledObject:
    """How one Deployment is scaled."""

    triggers: tuple[Trigger, ...]
    min_replicas: int
    max_replicas: int
    behavior: Behavior = field(default_factory=Behavior)
    modifiers: Modifiers | None = None
    fallback: Fallback | None = None
    polling_seconds: int = 30
    cooldown_seconds: int = 300
    name: str = "predict-default"

    def __post_init__(self) -> None:
        """Refuse what KEDA would take for something else.

        KEDA gives a trigger whose name begins another's a number behind it, and the formula then misses it.
        """
        names = [trigger.name for trigger in self.triggers]
        for name in names:
            if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
                raise ValueError(f"{name!r} cannot be used in a formula")
            if self.modifiers and sum(other.startswith(name) for other in names) > 1:
                raise ValueError(f"the name of trigger {name} begins another's")

    @property
    def _asked(self) -> dict[str, str]:
        """Return a label by which kustomize finds those that ask Prometheus, to put its address in."""
        is_asked = any(isinstance(trigger, PrometheusTrigger) for trigger in self.triggers)
        return {"millrace/asks": "prometheus"} if is_asked else {}

    def manifest(self) -> dict[str, Any]:
        """Return the ScaledObject as Kubernetes has it."""
        advanced: dict[str, Any] = {
            "horizontalPodAutoscalerConfig": {
                "behavior": {
                    "scaleUp": self.behavior.up.manifest(),
                    "scaleDown": self.behavior.down.manifest(),
                }
            }
        }
        if self.modifiers:
            advanced["scalingModifiers"] = {
                "formula": self.modifiers.formula,
                "target": str(self.modifiers.target),
                "activationTarget": f"{self.modifiers.activation_target:g}",
                "metricType": "AverageValue",
            }
        spec: dict[str, Any] = {
            "scaleTargetRef": {"name": self.name},
            "minReplicaCount": self.min_replicas,
            "maxReplicaCount": self.max_replicas,
            "pollingInterval": self.polling_seconds,
            "cooldownPeriod": self.cooldown_seconds,
            "advanced": advanced,
            "triggers": [
                {"type": _TYPES[type(trigger)], "name": trigger.name, "metadata": trigger.metadata()}
                for trigger in self.triggers
            ],
        }
        if self.fallback:
            spec["fallback"] = {
                "failureThreshold": self.fallback.failure_threshold,
                "replicas": self.fallback.replicas,
                "behavior": self.fallback.behavior,
            }
        return {
            "apiVersion": "keda.sh/v1alpha1",
            "kind": "ScaledObject",
            "metadata": {"name": self.name, "labels": labels_of(self.name) | self._asked},
            "spec": spec,
        }
