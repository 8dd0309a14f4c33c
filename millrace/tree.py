"""A copy of the kustomize tree, changed to other names, images and deployments; the tree itself is never touched.

A deployment of models is one folder of an overlay, which names everything in it, so another one is a copy of
`predict-default` under another name.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from millrace.plan import Policy
from pipeline.errors import ConfigurationError

#: In the checkout a link to k8s/strimzi, in an installed wheel a folder.
SOURCE = Path(__file__).with_name("manifests")
_KUSTOMIZATION = "kustomization.yaml"
_DEFAULT = "default"
_NAME, _MODELS = "MILLRACE_DEPLOYMENT=", "MILLRACE_MODELS="
_DEPLOYMENT = "components/deployment"
_GPU = "components/gpu"
_SCALING = "components/scaling-"
_SCALED_OBJECT = "scaled-object.yaml"

Mapping = dict[str, Any]


def overlays() -> list[str]:
    """Return the names of the overlays that there are."""
    return sorted(file.parent.name for file in (SOURCE / "overlays").glob(f"*/{_KUSTOMIZATION}"))


class Tree:
    """A copy in a folder, and one of its overlays."""

    def __init__(self, folder: Path, overlay: str) -> None:
        """Copy the tree.

        Raises:
            ConfigurationError: the folder is there already, or cannot be written, or there is no such overlay.
        """
        if overlay not in overlays():
            raise ConfigurationError(f"there is no overlay {overlay!r}: one of {', '.join(overlays())}")
        try:
            shutil.copytree(SOURCE, folder)
        except FileExistsError:
            raise ConfigurationError(f"{folder} is there already: name a folder that is not") from None
        except OSError as error:
            raise ConfigurationError(f"cannot write {folder} ({error.strerror})") from None
        self.folder = folder
        self.overlay = folder / "overlays" / overlay

    def deployments(self) -> list[str]:
        """Return the names of the deployments of models in the overlay."""
        found = self.overlay.glob(f"predict-*/{_KUSTOMIZATION}")
        return sorted(file.parent.name.removeprefix("predict-") for file in found)

    def set_deployment(self, name: str, models: str) -> None:
        """Have a deployment evaluate these models; it is made after `default` if it is not there."""
        if name not in self.deployments():
            shutil.copytree(self._folder(_DEFAULT), self._folder(name))
            self._edit_overlay(lambda kustomization: kustomization["resources"].append(f"predict-{name}"))

        def change(kustomization: Mapping) -> None:
            (generator,) = kustomization["configMapGenerator"]
            kept = [each for each in generator["literals"] if not each.startswith((_NAME, _MODELS))]
            generator["name"] = f"predict-{name}"
            generator["literals"] = [f"{_NAME}{name}", f"{_MODELS}{models}", *kept]

        _edit(self._folder(name) / _KUSTOMIZATION, change)

    def set_scaled_object(self, name: str, manifest: Mapping) -> None:
        """Scale a deployment by a ScaledObject of its own in place of a policy's."""
        text = yaml.safe_dump(manifest, sort_keys=False, width=10_000)
        (self._folder(name) / _SCALED_OBJECT).write_text(text)

        def change(kustomization: Mapping) -> None:
            others = [each for each in kustomization.get("resources", []) if each != _SCALED_OBJECT]
            kustomization["resources"] = [*others, _SCALED_OBJECT]
            kustomization["components"] = [
                each for each in kustomization["components"] if _SCALING not in each
            ]

        _edit(self._folder(name) / _KUSTOMIZATION, change)

    def policy(self) -> Policy:
        """Return the policy that `default` is scaled by."""
        paths = yaml.safe_load((self._folder(_DEFAULT) / _KUSTOMIZATION).read_text())["components"]
        return "deadline" if any(path.endswith(f"{_SCALING}deadline") for path in paths) else "lag"

    def set_policy(self, policy: Policy) -> None:
        """Scale every deployment of models by this policy."""
        self._set_component(_SCALING, f"{_SCALING}{policy}")

    def set_gpu(self, wanted: bool) -> None:
        """Give every deployment of models a whole GPU, or none."""
        self._set_component(_GPU, _GPU if wanted else None)

    def _set_component(self, kind: str, wanted: str | None) -> None:
        """Put one component in the place of all of a kind, in each deployment's folder."""

        def change(kustomization: Mapping) -> None:
            paths = [each for each in kustomization["components"] if kind not in each]
            first = next(number for number, each in enumerate(paths) if each.endswith(_DEPLOYMENT))
            if wanted is not None:
                paths.insert(first + 1, paths[first].replace(_DEPLOYMENT, wanted))
            kustomization["components"] = paths

        for name in self.deployments():
            _edit(self._folder(name) / _KUSTOMIZATION, change)

    def _folder(self, name: str) -> Path:
        return self.overlay / f"predict-{name}"

    def set_namespace(self, namespace: str) -> None:
        """Move everything to another namespace, addresses and policies included."""
        self._edit_overlay(lambda kustomization: kustomization.update(namespace=namespace))
        self._substitute(r"^(kind: Namespace\nmetadata:\n  name: )millrace$", namespace)
        self._substitute(r"(kubernetes\.io/metadata\.name: )millrace\b", namespace)
        self._substitute(r"(\.)millrace(?=\.svc\b)", namespace)
        self._substitute(r'(namespace=~?\\?")millrace(?=\\?")', namespace)

    def set_image(self, image: str, reference: str) -> None:
        """Take `millrace/IMAGE` from somewhere else: a name with a tag, a digest or both."""
        match = re.fullmatch(
            r"(?P<name>[^@\s]+?)(?::(?P<tag>[\w.-]+))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?", reference
        )
        if match is None:
            raise ConfigurationError(
                f"{reference!r} is no image such as registry.example.org/millrace/worker:1.0"
            )
        entry = {"name": f"millrace/{image}", "newName": match["name"]}
        if match["tag"]:
            entry["newTag"] = match["tag"]
        if match["digest"]:
            entry["digest"] = match["digest"]

        def change(kustomization: Mapping) -> None:
            others = [each for each in kustomization.get("images", []) if each["name"] != entry["name"]]
            kustomization["images"] = [*others, entry]

        self._edit_overlay(change)

    def images(self) -> set[str]:
        """Return the images that the tree names, without `millrace/`."""
        texts = (path.read_text() for path in self._files())
        return {name for text in texts for name in re.findall(r"image: millrace/([\w-]+):", text)}

    def set_kafka_cluster(self, name: str) -> None:
        """Name the Strimzi cluster: its resources, what Strimzi derives from its name, and the labels."""
        self._substitute(r"(strimzi\.io/cluster: )millrace\b", name)
        self._substitute(r'(strimzi_io_cluster=~?\\?")millrace(?=\\?")', name)
        self._substitute(
            r"(\b)millrace(?=-(?:kafka|cluster|clients|entity|broker|controller|dual|kafka-exporter)\b)", name
        )
        self._substitute(r"^(kind: Kafka\nmetadata:\n  name: )millrace$", name)

    def set_kafka_address(self, servers: str) -> None:
        """Use brokers that somebody else runs; nothing of Strimzi's is left."""
        self._substitute(r'(MILLRACE_KAFKA_BOOTSTRAP_SERVERS(?:=|, value: "?))[^\s"}]+', servers)
        self._substitute(r"(bootstrapServers: )\S+", servers)
        ports = sorted({int(server.rpartition(":")[2]) for server in servers.split(",")})
        egress = [{"ports": [{"protocol": "TCP", "port": port} for port in ports]}]
        anything = {"$patch": "delete", "apiVersion": "any/v1", "kind": "Any", "metadata": {"name": "any"}}
        patches = [
            {"target": {"group": "kafka.strimzi.io"}, "patch": yaml.safe_dump(anything)},
            {
                "target": {"kind": "NetworkPolicy", "name": "kafka"},
                "patch": yaml.safe_dump([{"op": "replace", "path": "/spec/egress", "value": egress}]),
            },
        ]
        self._edit_overlay(lambda kustomization: kustomization.setdefault("patches", []).extend(patches))

    def set_runbook(self, address: str) -> None:
        """Have alerts lead to a copy of docs/runbook.md that can be opened from where they are read."""
        self._substitute(r"(runbook_url: )docs/runbook\.md(?=#)", address)

    def set_partitions(self, partitions: int) -> None:
        """Give both lanes so many partitions."""
        patch = f"- {{op: replace, path: /spec/partitions, value: {partitions}}}"
        target = {"kind": "KafkaTopic", "name": "images-.*|images\\..*"}

        def change(kustomization: Mapping) -> None:
            kustomization.setdefault("patches", []).append({"target": target, "patch": patch})

        self._edit_overlay(change)

    def _edit_overlay(self, change: Callable[[Mapping], None]) -> None:
        _edit(self.overlay / _KUSTOMIZATION, change)

    def _substitute(self, pattern: str, value: str) -> None:
        for path in self._files():
            text = path.read_text()
            changed = re.sub(pattern, lambda match: match[1] + value, text, flags=re.MULTILINE)
            if changed != text:
                path.write_text(changed)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.suffix in {".yaml", ".env", ".json"})


def _edit(path: Path, change: Callable[[Mapping], None]) -> None:
    """Change a kustomization; one that stays the same keeps its comments."""
    text = path.read_text()
    before, after = yaml.safe_load(text), yaml.safe_load(text)
    change(after)
    if after != before:
        path.write_text(yaml.safe_dump(after, sort_keys=False, width=10_000))
