"""What the pods of rendered manifests would see: their environment, as settings, and what they may reach."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import settings
from pipeline.settings import PREFIX, Settings
from tests.support.manifests import Manifest, containers, find, name_of, workloads

#: Settings that name a file which must be there at start.
_FILES = ("API_KEYS_FILE", "DATABASE_PASSWORD_FILE", "KAFKA_SASL_PASSWORD_FILE", "KAFKA_TLS_CA_FILE",
          "KAFKA_TLS_CERTIFICATE_FILE", "KAFKA_TLS_KEY_FILE", "RECEIVERS_FILE")  # fmt: skip


def of_ours(manifests: Sequence[Manifest]) -> list[tuple[Manifest, Manifest]]:
    """Return the workloads that run Millrace, each with its pod template."""
    return [
        each for each in workloads(manifests) if labels(each[1]).get("app.kubernetes.io/name") == "millrace"
    ]


def labels(template: Manifest) -> Mapping[str, str]:
    """Return the labels of a pod template."""
    found: Mapping[str, str] = template["metadata"].get("labels", {})
    return found


def component(template: Manifest) -> str:
    """Return which part of Millrace a pod is."""
    return labels(template)["app.kubernetes.io/component"]


def main_container(template: Manifest) -> Manifest:
    """Return the container that does the work."""
    found: Manifest = template["spec"]["containers"][0]
    return found


def environment(container: Manifest, manifests: Sequence[Manifest]) -> dict[str, str]:
    """Return a container's variables; what comes from elsewhere than ConfigMaps is a word for it."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= find(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        origin = variable.get("valueFrom", {})
        if "configMapKeyRef" in origin:
            reference = origin["configMapKeyRef"]
            found[variable["name"]] = find(manifests, "ConfigMap", reference["name"])["data"][
                reference["key"]
            ]
        else:
            found[variable["name"]] = variable.get("value", "from-elsewhere")
    return found


def settings_of(
    container: Manifest, manifests: Sequence[Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Settings:
    """Read a container's settings as the process in it would.

    Raises:
        ConfigurationError: it would end with code 78.
    """
    present = tmp_path / "a-file"
    present.write_text("something")
    values = environment(container, manifests)
    for name in _FILES:
        if PREFIX + name in values:
            values[PREFIX + name] = str(present)
    if values.get(f"{PREFIX}DATABASE_URL") == "from-elsewhere":
        values[f"{PREFIX}DATABASE_URL"] = "postgresql://millrace@db/millrace"
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return settings.load()


def references(workload: Manifest, template: Manifest) -> Iterator[tuple[str, str, str | None]]:
    """Yield what a pod cannot start without: kind, name, key or None."""
    spec = template["spec"]
    if account := spec.get("serviceAccountName"):
        yield "ServiceAccount", account, None
    for volume in spec.get("volumes", []):
        yield from _volume(volume)
    for each in containers(template):
        yield from _container(each)
    for claim in spec.get("resourceClaims", []):
        yield "ResourceClaimTemplate", claim["resourceClaimTemplateName"], None
    mounted = {mount["name"] for each in containers(template) for mount in each.get("volumeMounts", [])}
    declared = {volume["name"] for volume in spec.get("volumes", [])}
    declared |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    assert mounted == declared, f"{name_of(workload)}: volumes and mounts differ: {mounted ^ declared}"


def _volume(volume: Manifest) -> Iterator[tuple[str, str, str | None]]:
    if "persistentVolumeClaim" in volume:
        yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
    sources: list[dict[str, Any]] = [volume, *volume.get("projected", {}).get("sources", [])]
    for source in sources:
        for field, kind, key in (("secret", "Secret", "secretName"), ("configMap", "ConfigMap", "name")):
            if (named := source.get(field)) is not None and not named.get("optional"):
                name = named.get(key) or named["name"]
                items = [item["key"] for item in named.get("items", [])] or [None]
                yield from ((kind, name, item) for item in items)


def _container(container: Manifest) -> Iterator[tuple[str, str, str | None]]:
    for source in container.get("envFrom", []):
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in source and not source[field].get("optional"):
                yield kind, source[field]["name"], None
    for variable in container.get("env", []):
        for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            reference = variable.get("valueFrom", {}).get(field)
            if reference is not None and not reference.get("optional"):
                yield kind, reference["name"], reference["key"]
