"""The monitoring component beside the workloads: everything is scraped once, and everything finds its reader."""

import functools
import json
from pathlib import Path

import pytest

from millrace import dashboards
from tests.support import manifests
from tests.support.manifests import Manifest

pytestmark = manifests.MAY_BUILD
LABEL = "grafana_dashboard"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, ...]:
    """Everything that may be scraped, with the component on top, in namespace `millrace`."""
    return _render(tmp_path_factory.mktemp("monitoring"))


@functools.cache
def _render(folder: Path) -> tuple[Manifest, ...]:
    components = [manifests.COMPONENTS / name for name in ("collector", "monitoring", "alert-routes")]
    return manifests.render_with(
        folder, components, [manifests.BASE, manifests.OVERLAYS / "dev" / "predict-default"]
    )


def test_every_pod_is_scraped_once(rendered: tuple[Manifest, ...]) -> None:
    """A workload that serves metrics is selected by exactly one PodMonitor, on a port that it has."""
    monitors = manifests.of_kind(rendered, "PodMonitor")
    scraped = {}
    for workload, template in manifests.workloads(rendered):
        if workload["kind"] == "CronJob":
            continue
        ports = {port["name"] for each in manifests.containers(template) for port in each.get("ports", [])}
        scraped[workload["metadata"]["name"]] = [
            endpoint["port"] in ports
            for monitor in monitors
            if "namespaceSelector" not in monitor["spec"]
            and manifests.selects(monitor["spec"]["selector"], template["metadata"]["labels"])
            for endpoint in monitor["spec"]["podMetricsEndpoints"]
        ]
    assert scraped == {name: [True] for name in scraped}
    assert {"gateway", "store", "predict-default", "collect"} <= set(scraped)


def test_dashboards_come_as_the_sidecar_wants_them(rendered: tuple[Manifest, ...]) -> None:
    """There is one ConfigMap for each dashboard, with the sidecar's label and JSON that Grafana can import."""
    carried = [
        each
        for each in manifests.of_kind(rendered, "ConfigMap")
        if each["metadata"].get("labels", {}).get(LABEL)
    ]
    found = {name: json.loads(text) for each in carried for name, text in each["data"].items()}
    assert set(found) == {f"{source.stem}.json" for source in dashboards.sources()}
    assert all(each["metadata"]["labels"][LABEL] == "1" for each in carried)
    assert len({each["uid"] for each in found.values()}) == len(found)


def test_receivers_and_secrets_of_the_routes(rendered: tuple[Manifest, ...]) -> None:
    """Each route leads to a receiver that there is, and no address stands in the manifest."""
    spec = manifests.find(rendered, "AlertmanagerConfig", "millrace")["spec"]
    receivers = {each["name"]: each for each in spec["receivers"]}
    assert {spec["route"]["receiver"], *(route["receiver"] for route in spec["route"]["routes"])} == set(
        receivers
    )
    assert receivers["slack"]["slackConfigs"][0]["apiURL"] == {
        "name": "millrace-alertmanager", "key": "slack-url"
    }  # fmt: skip
    assert receivers["pagerduty"]["pagerdutyConfigs"][0]["routingKey"] == {
        "name": "millrace-alertmanager", "key": "pagerduty-key"
    }  # fmt: skip


def test_rules_come_along(rendered: tuple[Manifest, ...]) -> None:
    """Every file of rules is in what is applied, in the namespace of the installation."""
    made = manifests.of_kind(rendered, "PrometheusRule")
    files = {file.stem for file in (manifests.TREE / "alerts").glob("*.yaml")} - {"kustomization"}
    assert {each["metadata"]["name"] for each in made} == {f"millrace-{name}" for name in files}
    assert {each["metadata"]["namespace"] for each in made} == {"millrace"}
