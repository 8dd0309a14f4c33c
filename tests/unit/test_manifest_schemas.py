"""The validator of manifests refuses what an API server would refuse."""

from pathlib import Path

import pytest
import yaml

from tests.support import schemas

DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "store"},
    "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "millrace"}]}},
    },
}
DEFINITION = {
    "kind": "CustomResourceDefinition",
    "spec": {
        "group": "example.org",
        "names": {"kind": "Otter"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": {"type": "string"},
                            "kind": {"type": "string"},
                            "metadata": {"type": "object"},
                            "spec": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "depth": {
                                        "x-kubernetes-int-or-string": True,
                                        "anyOf": [{"type": "integer"}],
                                    },
                                    "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                                    "fish": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "properties": {"kind": {"type": "string"}},
                                        },
                                    },
                                },
                            },
                        },
                    }
                },
            }
        ],
    },
}


def otter(**spec: object) -> dict[str, object]:
    return {"apiVersion": "example.org/v1", "kind": "Otter", "metadata": {"name": "lutra"}, "spec": spec}


@pytest.fixture
def definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "otters.yaml").write_text(yaml.safe_dump(DEFINITION))
    monkeypatch.setenv("MILLRACE_SCHEMAS", str(tmp_path))
    schemas._validator.cache_clear()


def test_a_valid_object_has_no_faults() -> None:
    """A Deployment with what it must have passes."""
    assert schemas.faults(DEPLOYMENT) == []


def test_an_unknown_field_of_a_known_kind_is_a_fault() -> None:
    """A field that Kubernetes does not know is named, also deep inside."""
    wrong = {**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], "replica": 2}}  # type: ignore[dict-item]
    assert ["replica" in fault for fault in schemas.faults(wrong)] == [True]


def test_a_kind_that_is_not_there_yet_is_refused() -> None:
    """A version of Kubernetes that lacks a kind is told."""
    claim = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaimTemplate", "metadata": {"name": "gpu"}}
    with pytest.raises(AssertionError, match=r"1\.33 does not know"):
        schemas.faults(claim)


@pytest.mark.usefixtures("definitions")
def test_custom_kinds_are_checked_strictly() -> None:
    """Unknown fields, wrong types and missing fields of a custom kind are faults; free parts are free."""
    assert schemas.faults(otter(name="x", depth="3m", free={"any": 1}, fish=[{"kind": "trout"}])) == []
    assert schemas.faults(otter(name="x", depth=3)) == []
    for wrong in (
        otter(name="x", dept=3),
        otter(depth=3),
        otter(name=1),
        otter(name="x", fish=[{"sort": "trout"}]),
        otter(name="x", depth=[]),
    ):
        assert schemas.faults(wrong), wrong


@pytest.mark.usefixtures("definitions")
def test_a_custom_kind_that_nobody_defined_is_refused() -> None:
    """With a folder of definitions, a kind that is not among them is an error, not a pass."""
    with pytest.raises(AssertionError, match="does not define"):
        schemas.faults({**otter(name="x"), "kind": "Beaver"})
