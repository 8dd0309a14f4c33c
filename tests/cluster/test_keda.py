"""Real KEDA and a real HPA on real lag order what the simulator says. Left out unless MILLRACE_TEST_KEDA is set."""

import asyncio
import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from loadtest.autoscale import hpa, policies
from loadtest.autoscale.expression import compile_formula
from millrace.local import local_services
from millrace.ports import find_free
from pipeline import admin
from pipeline.broker import Publisher
from pipeline.events import ImageEvent, encode_image
from pipeline.settings import Settings, load
from pipeline.topics import IMAGES_BULK
from tests.cluster import keda, programs
from tests.cluster.control_plane import ControlPlane, install
from tests.integration.test_secure_broker import Secure, secure  # noqa: F401
from tests.support import manifests, operators, scaling
from tests.support.certificates import Identity
from tests.support.eventually import eventually
from tests.support.manifests import Manifest

pytestmark = [
    pytest.mark.skipif("MILLRACE_TEST_KEDA" not in os.environ, reason="MILLRACE_TEST_KEDA is not set"),
    pytest.mark.timeout(900),
]
RECORDS = 45_000
#: KEDA polls every 30 s, the HPA syncs every 15 s; on a busy machine both are late.
PATIENCE_SECONDS = 300.0
WILDLIFE = policies.Facts(pod_images_per_second=227.0, deployment="wildlife")
APPLIED = {"ConfigMap", "Deployment", "HorizontalPodAutoscaler", "ScaledObject", "Secret", "ServiceAccount"}


class Prometheus:
    """Answers the queries of the deadline policy with numbers that a test sets."""

    def __init__(self) -> None:
        self.values = {"arrival": 500.0, "skew": 1 / 12, "waited": 0.0, "ready": 0.0, "speed": 227.0}
        names = {query: name for name, query in policies.queries(WILDLIFE).items()}
        values = self.values

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                (query,) = parse_qs(urlsplit(self.path).query)["query"]
                result = [{"metric": {}, "value": [0, str(values[names[query]])]}]
                answer = {"status": "success", "data": {"resultType": "vector", "result": result}}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[ControlPlane]:
    """Run a control plane with its controllers, KEDA's kinds and KEDA."""
    proxy = Identity(tmp_path / "proxy", "front-proxy")
    plane = ControlPlane(tmp_path, programs.folder())
    try:
        plane.start(controllers=True, proxy=proxy)
        install(plane, keda.definitions())
        keda.start(plane, proxy)
        plane.kubectl("create", "namespace", "millrace")
        yield plane
    finally:
        plane.stop()


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[Settings]:
    """Run a broker with all topics."""
    settings = load(
        data_dir=tmp_path / "data",
        kafka_port=find_free(),
        kafka_controller_port=find_free(),
        database_url="postgresql://127.0.0.1:1/none",
    )
    with local_services(settings):
        own = settings.model_copy(update={"kafka_bootstrap_servers": settings.resolved_kafka})
        asyncio.run(admin.apply_topics(own))
        yield own


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    """Answer for Prometheus."""
    found = Prometheus()
    yield found
    found.server.shutdown()
    found.server.server_close()


def millrace(*arguments: str) -> list[Manifest]:
    """Return the manifests that a command prints."""
    ran = subprocess.run(
        [sys.executable, "-m", "millrace", *arguments], capture_output=True, text=True, check=True
    )
    return [each for each in yaml.safe_load_all(ran.stdout) if each]


async def publish(settings: Settings, records: int = RECORDS) -> None:
    publisher = Publisher(settings, client_id="test")
    await publisher.start()
    try:
        topic = settings.topic(IMAGES_BULK.name)
        for first in range(0, records, 1000):
            pictures = (ImageEvent(id=f"image-{first + n}", data=b"x") for n in range(1000))
            await asyncio.gather(
                *(publisher.publish_forever(topic, encode_image(each), step="test") for each in pictures)
            )
    finally:
        await publisher.stop()


def replicas(cluster: ControlPlane) -> dict[str, int]:
    return {
        each["metadata"]["name"]: each["spec"]["replicas"]
        for each in cluster.items("deployments", "--namespace=millrace")
    }


def test_they_order_what_the_simulator_says(
    cluster: ControlPlane, kafka: Settings, prometheus: Prometheus
) -> None:
    """45,000 waiting records become as many replicas, from none on, as the simulator makes of the ScaledObjects."""
    rendered = millrace(
        "k8s", "render", "--kafka", kafka.resolved_kafka, "--policy", "lag",
        "--deployment", "default=builtin:quality", "--deployment", "wildlife=builtin:quality",
    )  # fmt: skip
    planned = policies.deadline(
        policies.Facts(
            pod_images_per_second=WILDLIFE.pod_images_per_second,
            deployment=WILDLIFE.deployment,
            bootstrap_servers=kafka.resolved_kafka,
            prometheus=prometheus.address,
        )
    )
    wildlife = planned.manifest()
    wildlife["metadata"]["namespace"] = "millrace"
    chosen = {
        (each["kind"], each["metadata"]["name"]): each for each in rendered if each["kind"] in APPLIED
    } | {("ScaledObject", wildlife["metadata"]["name"]): wildlife}
    cluster.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(chosen.values()))

    def lie_still() -> bool:
        found = replicas(cluster)
        return found["archive"] == found["predict-default"] == found["watch"] == 0 and found["store"] == 1

    asyncio.run(eventually(lie_still, PATIENCE_SECONDS))
    asyncio.run(publish(kafka))
    expected = {
        name: hpa.wanted_by(
            hpa.Metric(RECORDS, int(each["spec"]["triggers"][1]["metadata"]["lagThreshold"])),
            1,
            scaling.read(each).behavior,
        )
        for name, each in ((name, chosen["ScaledObject", name]) for name in ("archive", "predict-default"))
    }
    assert expected == {"archive": 3, "predict-default": 2}
    compute = compile_formula(policies.formula(WILDLIFE))

    def told(waited: float) -> int:
        pods = float(replicas(cluster)["predict-wildlife"])
        lag = {"realtime": 0.0, "bulk": float(RECORDS), "pods": pods}
        return round(compute(prometheus.values | lag | {"waited": waited}))

    def follow() -> bool:
        found = replicas(cluster)
        wanted = expected | {"predict-wildlife": told(prometheus.values["waited"])}
        return {name: found[name] for name in wanted} == wanted and found["store"] == found["record"] == 1

    asyncio.run(eventually(follow, PATIENCE_SECONDS))
    before = replicas(cluster)["predict-wildlife"]
    prometheus.values["waited"] = 200.0  # past HIGH of the deadline
    asyncio.run(eventually(lambda: replicas(cluster)["predict-wildlife"] > before, PATIENCE_SECONDS))
    asyncio.run(eventually(follow, PATIENCE_SECONDS))
    assert (before, replicas(cluster)["predict-wildlife"]) == (2, 3)


def test_what_comes_while_paused_is_worked_off_by_many(cluster: ControlPlane, kafka: Settings) -> None:
    """docs/kubernetes.md, step 6: paused at 0 nothing starts; then the backlog is asked about at once."""
    rendered = millrace(
        "k8s", "render", "--kafka", kafka.resolved_kafka, "--rate", "20/s", "--deadline", "2m",
        "--pod-rate", "10/s", "--start", "20s",
    )  # fmt: skip
    # KEDA reads the variables of the containers that it scales, so their ConfigMaps must be there.
    chosen = [
        each
        for each in rendered
        if each["kind"] == "ConfigMap"
        or (each["kind"] in APPLIED and each["metadata"]["name"] == "predict-default")
    ]
    cluster.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(chosen))
    annotate = ("annotate", "scaledobject", "predict-default", "--namespace=millrace")
    cluster.kubectl(*annotate, "autoscaling.keda.sh/paused-replicas=0")
    asyncio.run(eventually(lambda: replicas(cluster) == {"predict-default": 0}, PATIENCE_SECONDS))
    asyncio.run(publish(kafka, 2000))
    (scaled,) = cluster.items("scaledobjects", "--namespace=millrace")
    paused = {each["type"]: each["status"] for each in scaled["status"]["conditions"]}["Paused"]
    assert (paused, replicas(cluster)) == ("True", {"predict-default": 0})
    cluster.kubectl(*annotate, "autoscaling.keda.sh/paused-replicas-")
    asyncio.run(eventually(lambda: replicas(cluster) == {"predict-default": 4}, PATIENCE_SECONDS))


def test_kedas_pods_are_labelled_as_policies_say() -> None:
    """What policies and monitors look for is in the file that KEDA's release is made of."""
    documents = yaml.safe_load_all((keda.folder() / "config/manager/manager.yaml").read_text())
    made = manifests.pod_template(manifests.find(list(documents), "Deployment", "keda-operator"))
    assert made is not None
    assert made["metadata"]["labels"] == operators.KEDA["release"]


def read(path: str, kind: str, name: str) -> Manifest:
    """Return one object of a file under k8s/strimzi."""
    return manifests.find(list(yaml.safe_load_all((manifests.TREE / path).read_text())), kind, name)


def secured(way: str, port: int) -> list[Manifest]:
    """Return a Deployment and how `archive` would be scaled if Kafka wanted keys, as components/keda-* have it."""
    component = f"components/keda-{way}"
    authentication = read(f"{component}/trigger-authentication.yaml", "TriggerAuthentication", "kafka")
    authentication["metadata"]["name"] = way
    for reference in authentication["spec"]["secretTargetRef"]:
        reference["name"] = reference["name"].replace("keda", f"keda-{way}")
    scaled = copy.deepcopy(read("base/scaled-objects.yaml", "ScaledObject", "archive"))
    scaled["metadata"]["name"] = scaled["spec"]["scaleTargetRef"]["name"] = way
    for number, trigger in enumerate(scaled["spec"]["triggers"]):
        for patch in yaml.safe_load((manifests.TREE / component / f"trigger-{number}.yaml").read_text()):
            *_, parent, field = patch["path"].split("/")
            (trigger["metadata"] if parent == "metadata" else trigger)[field] = patch["value"]
        trigger["authenticationRef"]["name"] = way
        trigger["metadata"]["bootstrapServers"] = f"localhost:{port}"
    labels = {"app.kubernetes.io/name": way}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "none", "image": "none"}]}}
    target = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": way},
        "spec": {"selector": {"matchLabels": labels}, "template": template},
    }
    return [authentication, scaled, target]


def secret(name: str, **values: str) -> Manifest:
    data = {key.replace("_", "."): value for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def test_keda_sees_lag_where_kafka_wants_keys(cluster: ControlPlane, secure: Secure) -> None:  # noqa: F811
    """With the password or the certificate of Strimzi's secrets KEDA sees over TLS how much waits."""
    settings = secure.by_password()
    asyncio.run(admin.apply_topics(settings))
    asyncio.run(publish(settings))
    user = read("components/keda-scram/trigger-authentication.yaml", "ConfigMap", "keda-kafka")
    user["data"]["username"] = "alice"
    keys = {"user_crt": secure.client.certificate.read_text(), "user_key": secure.client.key.read_text()}
    objects = [
        user,
        secret("keda-scram", password="first"),
        secret("keda-mtls", **keys),
        secret("millrace-cluster-ca-cert", ca_crt=secure.server.authority.read_text()),
        *secured("scram", secure.sasl_port),
        *secured("mtls", secure.mutual_port),
    ]
    cluster.kubectl("apply", "--namespace=millrace", "--filename=-", stdin=yaml.safe_dump_all(objects))
    asyncio.run(eventually(lambda: replicas(cluster) == {"scram": 3, "mtls": 3}, PATIENCE_SECONDS))
