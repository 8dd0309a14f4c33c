"""Validates manifests as an API server would that refuses unknown fields.

Schemas of Kubernetes' own kinds come with the package kubernetes-validate, those of custom kinds from the folder
that `MILLRACE_SCHEMAS` names: custom resource definitions, as published. What is not there comes from the Go module
that publishes it. Rules in CEL are not evaluated here.
"""

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate import utils
from referencing import Registry, Resource

from tests.support.manifests import Manifest, module


class _Loader(yaml.CSafeLoader):
    """YAML 1.1 has a type of its own for a lone `=`, which definitions mean as text."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)

# The oldest that the manifests are for, see docs/kubernetes.md.
OLDEST_KUBERNETES = "1.33"
_VARIABLE = "MILLRACE_SCHEMAS"
#: Custom kinds whose definition is a file of a Go module.
_OF_MODULES = {
    "AlertmanagerConfig": (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0",
        "example/prometheus-operator-crd/monitoring.coreos.com_alertmanagerconfigs.yaml",
    )
}


def of_modules() -> list[Path]:
    """Return the files of custom resource definitions that come from Go modules."""
    return [module(name) / file for name, file in _OF_MODULES.values()]


class NoSchemaError(LookupError):
    """There is no schema for the kind at hand; the text says how to get one."""


def faults(manifest: Manifest, version: str = OLDEST_KUBERNETES) -> list[str]:
    """Return what is wrong with an object, one line each; nothing: it is valid.

    Raises:
        NoSchemaError: the kind is a custom one and there is no folder of definitions.
        AssertionError: there is a folder, or the kind is Kubernetes' own, and the kind is not known.
    """
    validator = _validator(manifest["apiVersion"], manifest["kind"], version)
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    return [f"{name}: {error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def is_custom(manifest: Manifest) -> bool:
    """Say whether an object's kind comes from a custom resource definition."""
    group = manifest["apiVersion"].partition("/")[0]
    return "." in group and not group.endswith(".k8s.io")


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> Any:
    if is_custom({"apiVersion": api_version}):
        return jsonschema.Draft202012Validator(_strict(_definition(api_version, kind)))
    group, _, rest = api_version.rpartition("/")
    file = f"{kind.lower()}-{group.partition('.')[0]}-{rest}.json" if group else f"{kind.lower()}-{rest}.json"
    folder = f"kubernetes-json-schema/v{version}.0-local-strict"
    try:
        schema = utils.schema_contents(f"{folder}/{file}", version)
    except FileNotFoundError:
        raise AssertionError(f"Kubernetes {version} does not know {api_version} {kind}") from None
    return jsonschema.Draft202012Validator(schema, registry=_kubernetes(folder, version))


@functools.cache
def _kubernetes(folder: str, version: str) -> Registry[Any]:
    definitions = Resource.from_contents(utils.schema_contents(f"{folder}/_definitions.json", version))
    registry: Registry[Any] = definitions @ Registry()
    return registry


def _definition(api_version: str, kind: str) -> dict[str, Any]:
    named = os.environ.get(_VARIABLE)
    if kind in _OF_MODULES:
        name, file = _OF_MODULES[kind]
        named = str(module(name) / file)
    if not named:
        raise NoSchemaError(
            f"{_VARIABLE} names no folder with custom resource definitions: {kind} is not checked"
        )
    for definition in _definitions(Path(named)):
        spec = definition["spec"]
        if spec["names"]["kind"] == kind and spec["group"] == api_version.partition("/")[0]:
            for each in spec["versions"]:
                if each["name"] == api_version.partition("/")[2] and each["served"]:
                    schema: dict[str, Any] = each["schema"]["openAPIV3Schema"]
                    return schema
    raise AssertionError(f"{named} does not define {api_version} {kind}")


@functools.cache
def _definitions(folder: Path) -> Sequence[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for file in [folder] if folder.is_file() else sorted(folder.glob("*.yaml")):
        documents = yaml.load_all(file.read_text("utf-8"), Loader=_Loader)
        found.extend(each for each in documents if each and each.get("kind") == "CustomResourceDefinition")
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Turn a structural OpenAPI schema into a JSON schema that refuses unknown fields."""
    schema = copy.copy(schema)
    properties = {name: _strict(each) for name, each in schema.get("properties", {}).items()}
    if properties:
        schema["properties"] = properties
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(schema["additionalProperties"])
    elif properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        schema["items"] = _strict(schema["items"])
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema
