"""A copy of the kustomize tree, changed to other names, images and deployments; the tree itself is never touched.

One convention carries all of it: what is called `predict-default`, a folder, a file, an object or the target of a
patch, belongs to the deployment `default` of models, so another deployment is the same once more under its name.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from millrace.plan import Policy
from pipeline.errors import ConfigurationError

#: In the checkout a link to k8s/strimzi, in an installed wheel a folder.
SOURCE = Path(__file__).with_name("manifests")
_KUSTOMIZATION = "kustomization.yaml"
_DEFAULT = "default"
_LITERAL_MODELS = "MILLRACE_MODELS="
_GPU = "components/gpu"

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
        return sorted(
            file.parent.name.removeprefix("predict-")
            for file in self.overlay.glob(f"predict-*/{_KUSTOMIZATION}")
        )

    def set_deployment(self, name: str, models: str) -> None:
        """Have a deployment evaluate these models; made after `default` if it is not there."""
        if name not in self.deployments():
            self._add(name)

        def change(kustomization: Mapping) -> None:
            for generator in kustomization["configMapGenerator"]:
                kept = [each for each in generator["literals"] if not each.startswith(_LITERAL_MODELS)]
                generator["literals"] = [*kept, f"{_LITERAL_MODELS}{models}"]

        _edit(self.overlay / f"predict-{name}" / _KUSTOMIZATION, change)

    def _add(self, name: str) -> None:
        old, new = f"predict-{_DEFAULT}", f"predict-{name}"

        def renamed(text: str) -> str:
            literal = re.sub(r"(?m)^(\s*- MILLRACE_DEPLOYMENT=)default$", rf"\g<1>{name}", text)
            return literal.replace(old, new).replace(f"predict.{_DEFAULT}", f"predict.{name}")

        own = yaml.safe_load((self.overlay / old / _KUSTOMIZATION).read_text())["components"]
        templates = [(self.overlay / old / path).resolve() for path in own]
        for path in self._files():
            if any(path.resolve().is_relative_to(template) for template in templates):
                continue  # made for each deployment in its own folder, and named by it there
            if path.name == _KUSTOMIZATION:
                _edit(path, lambda kustomization: _repeat_in(kustomization, old, renamed))
            elif path.suffix == ".yaml" and old in path.read_text():
                _repeat_documents(path, old, renamed)
        for path in [*self.folder.rglob(old), *self.folder.rglob(f"{old}.*")]:
            target = path.with_name(path.name.replace(old, new))
            if path.is_dir():
                shutil.copytree(path, target)
            else:
                shutil.copy(path, target)
            for file in [target] if target.is_file() else target.rglob("*.yaml"):
                file.write_text(renamed(file.read_text()))

    def set_scaled_object(self, name: str, manifest: Mapping) -> None:
        """Put another ScaledObject in the place of a deployment's, in every policy."""
        for path in self.folder.glob(f"components/scaling-*/predict-{name}.yaml"):
            path.write_text(yaml.safe_dump(manifest, sort_keys=False, width=10_000))

    def policy(self) -> Policy:
        """Return the policy that the overlay scales by."""
        paths = yaml.safe_load((self.overlay / _KUSTOMIZATION).read_text()).get("components", [])
        return "deadline" if any(path.endswith("components/scaling-deadline") for path in paths) else "lag"

    def set_policy(self, policy: str) -> None:
        """Scale by the component `scaling-POLICY` in place of the overlay's."""

        def changed(path: str) -> str:
            return re.sub(r"components/scaling-(lag|deadline)$", f"components/scaling-{policy}", path)

        self._edit_components(changed)

    def set_gpu(self, wanted: bool) -> None:
        """Give every deployment of models a whole GPU, or none."""

        def change(kustomization: Mapping) -> None:
            kept = [path for path in kustomization["components"] if _GPU not in path]
            up = next(path for path in kept if path.endswith("components/deployment"))
            kustomization["components"] = (
                [*kept, up.replace("components/deployment", _GPU)] if wanted else kept
            )

        for name in self.deployments():
            _edit(self.overlay / f"predict-{name}" / _KUSTOMIZATION, change)
        if not wanted:
            self._edit_components(lambda path: None if _GPU in path else path)

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

    def set_partitions(self, partitions: int) -> None:
        """Give both lanes so many partitions."""
        patch = f"- {{op: replace, path: /spec/partitions, value: {partitions}}}"
        target = {"kind": "KafkaTopic", "name": "images-.*|images\\..*"}

        def change(kustomization: Mapping) -> None:
            kustomization.setdefault("patches", []).append({"target": target, "patch": patch})

        self._edit_overlay(change)

    def _edit_overlay(self, change: Callable[[Mapping], None]) -> None:
        _edit(self.overlay / _KUSTOMIZATION, change)

    def _edit_components(self, changed: Callable[[str], str | None]) -> None:
        def change(kustomization: Mapping) -> None:
            paths = (changed(path) for path in kustomization.get("components", []))
            kustomization["components"] = [path for path in paths if path is not None]

        self._edit_overlay(change)

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


def _repeat_in(kustomization: Mapping, old: str, renamed: Callable[[str], str]) -> None:
    """Add, beside each entry about `old`, the same entry renamed."""
    for field in ("resources", "components", "patches"):
        entries = kustomization.get(field, [])
        if entries:
            kustomization[field] = list(_doubled(entries, old, renamed))
    for replacement in kustomization.get("replacements", []):
        replacement["targets"] = list(_doubled(replacement["targets"], old, renamed))


def _doubled(entries: list[Any], old: str, renamed: Callable[[str], str]) -> Iterator[Any]:
    for entry in entries:
        yield entry
        about = (
            entry
            if isinstance(entry, str)
            else (entry.get("target") or entry.get("select") or {}).get("name", "")
        )
        if Path(str(about)).stem == old:
            yield yaml.safe_load(renamed(yaml.safe_dump(entry, width=10_000)))


def _repeat_documents(path: Path, old: str, renamed: Callable[[str], str]) -> None:
    """Add, behind the documents of a file, those called `old`, renamed."""
    if path.stem == old or path.parent.name == old:
        return  # copied as a whole
    parts = re.split(r"(?m)^---$\n?", path.read_text())
    own = [part for part in parts if re.search(rf"(?m)^  name: {re.escape(old)}$", part)]
    path.write_text("---\n".join([*parts, *(renamed(part) for part in own)]))
