"""`timm:NAME` and `timm:ORGANISATION/REPOSITORY`: classifiers, scores and, without their head, embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.imaging import View
from pipeline.models import hub, weights
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing, check_against, resampling_of
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.tasks import Activation, Embed, distinct, numbered, reader_of

#: Folder in the model cache.
FOLDER = "timm"


def load(specification: Specification, device: torch.device, options: LoadOptions) -> ModuleModel:
    """Load a model by its name in timm, or by a repository of the hub that timm has written.

    Raises:
        ConfigurationError: there is no such model, or no weights of it.
    """
    import timm

    specification.check_options("task", "weights", "seed", "classes", "revision")
    name = specification.name
    is_random = specification.options.get("weights") == "random"
    if "weights" in specification.options and not is_random:
        raise specification.error("`weights` can only be random; others are named NAME.TAG")
    if is_random:
        classes = specification.options.get("classes")
        outputs = None if classes is None else int(specification.number("classes", 0, 1, 1e6))
        with specification.seeded():
            network, preprocessing = build(specification, name, outputs)
    elif "/" in name:
        folder = hub.find(specification, name, options.cache, _weights)
        network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        network = _pretrained(specification, options.cache)
    if is_random:
        labels = numbered(network.num_classes)
    else:
        preprocessing, labels = _preprocessing(specification, network), _labels(specification, network)
    architecture = {"source": "timm", "name": network.pretrained_cfg["architecture"]}
    return finish(specification, network, preprocessing, labels, architecture, device, options)


def build(specification: Specification, name: str, outputs: int | None) -> tuple[Any, Preprocessing]:
    """Build an architecture with untrained weights and so many outputs, and what its weights usually want.

    Raises:
        ConfigurationError: there is no such architecture.
    """
    import timm

    if not timm.is_model(name):
        raise specification.unknown(name, timm.list_models())
    network = timm.create_model(name, pretrained=False, num_classes=outputs)
    return network, _preprocessing(specification, network)


def usual_outputs(network: Any) -> int:
    """Return how many outputs a network has."""
    return int(network.num_classes)


def _preprocessing(specification: Specification, network: Any) -> Preprocessing:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise specification.error(f"it wants {channels} channels, and pictures have 3")
    resampling = resampling_of(specification, config["interpolation"])
    if config["crop_mode"] == "squash":
        view = View(width, height, "stretch", None, resampling)
    else:
        view = View(width, height, "crop", int(min(width, height) / config["crop_pct"]), resampling)
    found = Preprocessing(view, mean=tuple(config["mean"]), std=tuple(config["std"]))
    check_against(specification, found, create_transform(**config, is_training=False))
    return found


def _labels(specification: Specification, network: Any) -> tuple[str, ...]:
    """Return what the classes of a network are called: by itself, by ImageNet, else by number."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = network.num_classes
    config = network.pretrained_cfg
    names = config.get("label_names")
    if names:
        described = config.get("label_descriptions") or {}
        if isinstance(names, dict):
            names = [names.get(str(index), names.get(index, str(index))) for index in range(count)]
        return tuple(described.get(name, name) for name in names)
    subset = infer_imagenet_subset(network)
    if subset is not None:
        info = ImageNetInfo(subset)
        return tuple(info.index_to_description(index) for index in range(count))
    if count > 1 and "/" not in specification.name and "task" not in specification.options:
        # CLIP's, for one: they are a space shared with texts.
        raise specification.error(f"nothing says what its {count} outputs are; ?task=embed leaves them out")
    return numbered(count)


def finish(
    specification: Specification,
    network: Any,
    preprocessing: Preprocessing,
    labels: Sequence[str],
    architecture: dict[str, Any],
    device: torch.device,
    options: LoadOptions,
    activation: Activation = "softmax",
) -> ModuleModel:
    """Make a model of a network that has its tensors.

    Raises:
        ConfigurationError: It cannot do the task that is asked for.
    """
    if network.num_classes == 0 and specification.options.get("task", "embed") == "embed":
        reader: Any = Embed()
    else:
        reader = reader_of(specification, distinct(labels), activation)
    if isinstance(reader, Embed) and network.num_classes:
        network.reset_classifier(0)
    return ModuleModel(specification, network, preprocessing, reader, architecture, device, options)


def _pretrained(specification: Specification, cache: Path) -> nn.Module:
    """Build a network by its name, with the weights that timm names for it."""
    import timm
    from timm.models import get_pretrained_cfg

    name = specification.name
    config = get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None:
        raise specification.unknown(name, timm.list_pretrained())
    own = cache / FOLDER / f"{name}.safetensors"
    if own.is_file():
        path = own
    elif config.hf_hub_id is None:
        raise specification.error(
            f"no weights: {own} (MILLRACE_MODEL_CACHE) is not there, and the hub has none"
        )
    else:
        choose = _weights if config.hf_hub_filename is None else _only(config.hf_hub_filename)
        folder = hub.find(specification, config.hf_hub_id, cache, choose, f"{FOLDER}/{own.name}")
        path = folder / choose([path.name for path in folder.iterdir()])[0]
    tensors = weights.read_tensors(specification, path)
    network: nn.Module = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors, "source": None}
    )
    network.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    return network


def _weights(names: Sequence[str]) -> Sequence[str]:
    return [name for name in ("model.safetensors", "pytorch_model.bin") if name in names][:1]


def _only(wanted: str) -> hub.Choose:
    """Choose a file that timm names, or its safetensors."""
    safe = wanted.replace("pytorch_model.bin", "model.safetensors")

    def choose(names: Sequence[str]) -> Sequence[str]:
        return [name for name in (safe, wanted) if name in names][:1]

    return choose
