"""ScaledObjects as they stand in a manifest, for the simulator and for KEDA's own schemas."""

import json
import os
from pathlib import Path
from typing import cast

import pytest

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
    Trigger,
    WorkloadTrigger,
)
from tests.support.manifests import Manifest
from tests.support.schemas import faults


def read(manifest: Manifest) -> ScaledObject:
    """Return what the simulator runs; a field that it knows nothing of is an error, not left out."""
    spec = manifest["spec"]
    known = {
        "scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "advanced",
        "triggers", "fallback",
    }  # fmt: skip
    assert set(spec) <= known
    assert set(spec["advanced"]) <= {"horizontalPodAutoscalerConfig", "scalingModifiers"}
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    modifiers, fallback = spec["advanced"].get("scalingModifiers"), spec.get("fallback")
    return ScaledObject(
        triggers=tuple(_trigger(lane, each) for lane, each in enumerate(spec["triggers"])),
        min_replicas=spec["minReplicaCount"],
        max_replicas=spec["maxReplicaCount"],
        behavior=Behavior(up=_rules(behavior["scaleUp"]), down=_rules(behavior["scaleDown"])),
        modifiers=modifiers
        and Modifiers(modifiers["formula"], int(modifiers["target"]), float(modifiers["activationTarget"])),
        fallback=fallback
        and Fallback(fallback["failureThreshold"], fallback["replicas"], fallback["behavior"]),
        polling_seconds=spec["pollingInterval"],
        cooldown_seconds=spec["cooldownPeriod"],
        name=spec["scaleTargetRef"]["name"],
    )


def _rules(found: Manifest) -> Rules:
    steps = tuple(Step(each["type"], each["value"], each["periodSeconds"]) for each in found["policies"])
    return Rules(
        found["stabilizationWindowSeconds"], steps, found["selectPolicy"], float(found.get("tolerance", 0.1))
    )


def _trigger(lane: int, found: Manifest) -> Trigger:
    """Return a trigger; the first one of Kafka is the real-time lane, the second one is bulk."""
    metadata, name = found["metadata"], found["name"]
    match found["type"]:
        case "kafka":
            assert "excludePersistentLag" not in metadata
            return KafkaTrigger(
                name,
                metadata["topic"],
                lane,
                int(metadata["lagThreshold"]),
                int(metadata["activationLagThreshold"]),
                metadata["offsetResetPolicy"],
                metadata["allowIdleConsumers"] == "true",
                bootstrap_servers=metadata["bootstrapServers"],
                consumer_group=metadata["consumerGroup"],
            )
        case "prometheus":
            return PrometheusTrigger(name, cast(Signal, name), metadata["query"], metadata["serverAddress"])
        case "kubernetes-workload":
            return WorkloadTrigger(name, metadata["podSelector"])
    raise AssertionError(f"the simulator has no trigger {found['type']}")


def schemas() -> Path:
    """Return the folder with KEDA's schemas, or skip."""
    folder = os.environ.get("MILLRACE_SCHEMAS")
    if not folder:
        pytest.skip("MILLRACE_SCHEMAS is not set: KEDA's schemas are not checked against")
    return Path(folder)


def check(manifest: Manifest) -> None:
    """Check a manifest against KEDA's CRD, strictly, and its triggers against KEDA's catalogue of them."""
    schemas()
    assert faults(manifest) == []
    for trigger in manifest["spec"].get("triggers", ()):
        check_trigger(trigger)


def parameters(trigger_type: str) -> dict[str, Manifest]:
    """Return what KEDA's catalogue says of a type's parameters, by name."""
    catalogue = json.loads((schemas() / "keda-scalers.json").read_bytes())["scalers"]
    (found,) = (each for each in catalogue if each["type"] == trigger_type)
    return {parameter["name"]: parameter for parameter in found["parameters"]}


def check_trigger(trigger: Manifest) -> None:
    """Check that KEDA's catalogue knows each parameter of a trigger, and that those it needs are there."""
    known, metadata = parameters(trigger["type"]), trigger["metadata"]
    assert set(metadata) <= {name for name, each in known.items() if each.get("metadataVariableReadable")}
    needed = {n for n, each in known.items() if not each.get("optional") and "default" not in each}
    assert needed <= set(metadata)
    for name, value in metadata.items():
        assert isinstance(value, str), name
        assert value in known[name].get("allowedValue", [value])
        assert "deprecated" not in known[name]
