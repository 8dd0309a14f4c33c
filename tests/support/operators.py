"""Pods that are not in the manifests: those that Strimzi makes of its resources, and KEDA's operator.

Strimzi's are as far as pod security and selectors see them: names, labels and security contexts, as version 1.2
makes them with its default provider. That says nothing of containers that no template speaks of, and gives a
broker's volumes to group 0 unless a template has a security context for the whole pod.
"""

from collections.abc import Iterator, Mapping, Sequence

from tests.support.manifests import Manifest, of_kind

#: Labels of the pods of KEDA's operator: config/manager/manager.yaml of KEDA 2.21, which its release is made of,
#: and keda/templates/manager/deployment.yaml of its chart.
KEDA: Mapping[str, Mapping[str, str]] = {
    "release": {"app": "keda-operator", "name": "keda-operator"},
    "chart": {
        "app": "keda-operator",
        "name": "keda-operator",
        "app.kubernetes.io/name": "keda-operator",
        "app.kubernetes.io/component": "operator",
        "app.kubernetes.io/part-of": "keda-operator",
    },
}


def strimzi_pods(rendered: Sequence[Manifest]) -> Iterator[Manifest]:
    """Yield a template of each kind of pod that Strimzi makes of rendered manifests."""
    for kafka in of_kind(rendered, "Kafka"):
        cluster, spec = kafka["metadata"]["name"], kafka["spec"]
        for pool in of_kind(rendered, "KafkaNodePool"):
            template = pool["spec"].get("template", {})
            # The init container reads the node's zone, so there is one where brokers have racks.
            init = ["initContainer"] if "rack" in spec["kafka"] else []
            pod = _pod(cluster, "kafka", template, ["kafkaContainer"], init)
            pod["metadata"]["labels"]["strimzi.io/pool-name"] = pool["metadata"]["name"]
            pod["spec"]["securityContext"] = template.get("pod", {}).get("securityContext", {"fsGroup": 0})
            yield pod
        if operator := spec.get("entityOperator"):
            names = [f"{name}Container" for name in ("topicOperator", "userOperator") if name in operator]
            yield _pod(cluster, "entity-operator", operator.get("template", {}), names)
        if exporter := spec.get("kafkaExporter"):
            yield _pod(cluster, "kafka-exporter", exporter.get("template", {}), ["container"])


def _pod(
    cluster: str, component: str, template: Manifest, containers: Sequence[str], init: Sequence[str] = ()
) -> Manifest:
    labels = {
        "strimzi.io/cluster": cluster,
        "strimzi.io/kind": "Kafka",
        "strimzi.io/component-type": component,
        "strimzi.io/name": f"{cluster}-{component}",
        "app.kubernetes.io/name": component,
        "app.kubernetes.io/instance": cluster,
    }
    made = {name: _container(name, template.get(name, {})) for name in (*containers, *init)}
    spec = {
        "securityContext": template.get("pod", {}).get("securityContext", {}),
        "containers": [made[name] for name in containers],
        "initContainers": [made[name] for name in init],
    }
    return {"metadata": {"labels": labels}, "spec": spec}


def _container(name: str, template: Manifest) -> Manifest:
    image = "quay.io/strimzi/any:1.2.0"
    return {"name": name.lower(), "image": image, "securityContext": template.get("securityContext", {})}
