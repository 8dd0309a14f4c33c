"""`torchvision:NAME`: classifiers, detectors and, with the head taken off, embeddings.

The library builds the network itself, because it knows what each architecture's weights need, but it never
reads the weights: it would unpickle whatever their file holds.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from pipeline.imaging import View
from pipeline.models import weights
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing, check_against, resampling_of
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.tasks import Activation, Detect, Embed, distinct, numbered, reader_of

#: Folder in the model cache.
FOLDER = "torchvision"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# They would initialise themselves with scipy for minutes, and warn that they will stop doing so.
_ARGUMENTS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
# What finds boxes: of detectors in one stage, or in two.
_HEADS = ("head", "rpn.head", "roi_heads.box_predictor")
_IMAGENET_CLASSES = 1000
_COCO_CLASSES = 91
_building = threading.Lock()


def load(specification: Specification, device: torch.device, options: LoadOptions) -> ModuleModel:
    """Load a model by its name in `torchvision.models`, with its weights or with random ones.

    Raises:
        ConfigurationError: there is no such model, or no weights of it.
    """
    from torchvision.models import get_model

    specification.check_options("task", "weights", "seed", "threshold", "classes")
    if specification.options.get("weights") == "random":
        classes = specification.options.get("classes")
        outputs = None if classes is None else int(specification.number("classes", 0, 1, 1e6))
        with specification.seeded():
            network, preprocessing = build(specification, specification.name, outputs)
        labels, chosen = numbered(outputs or usual_outputs(network)), "random"
    else:
        entry = _entry(specification)
        with _reading(entry, specification, options.cache):
            network = get_model(specification.name, weights=entry)
        labels, chosen = tuple(entry.meta["categories"]), entry.name
        preprocessing = _preprocessing(specification, specification.name, network, entry)
    architecture = {"source": "torchvision", "name": specification.name, "weights": chosen}
    return finish(specification, network, preprocessing, labels, architecture, device, options)


def build(specification: Specification, name: str, outputs: int | None) -> tuple[nn.Module, Preprocessing]:
    """Build an architecture with untrained weights and so many outputs, and what its weights usually want.

    Raises:
        ConfigurationError: there is no such architecture.
    """
    from torchvision.models import get_model

    _entries(specification, name)
    arguments: dict[str, Any] = dict(_ARGUMENTS.get(name, {}))
    if outputs is not None:
        arguments["num_classes"] = outputs
    if _is_detection(name):
        arguments["weights_backbone"] = None
    network: nn.Module = get_model(name, weights=None, **arguments)
    return network, _preprocessing(specification, name, network)


def usual_outputs(network: nn.Module) -> int:
    """Return how many outputs an architecture has if nobody says."""
    return _COCO_CLASSES if is_detector(network) else _IMAGENET_CLASSES


def _preprocessing(
    specification: Specification, name: str, network: nn.Module, entry: Any = None
) -> Preprocessing:
    """Return the preprocessing of weights, or what weights of an architecture usually want.

    Raises:
        ConfigurationError: It cannot be had, or belongs to a task that is not supported.
    """
    if is_detector(network):
        return _detector_preprocessing(network)
    usual = entry or getattr(_entries(specification, name), "DEFAULT", None)
    if usual is None:
        return Preprocessing(View(224, 224, "crop", 256), **_IMAGENET)
    preset = usual.transforms()
    if type(preset).__name__ != "ImageClassification":
        raise specification.error(f"{name} neither classifies nor detects")
    side, shorter = preset.crop_size[0], preset.resize_size[0]
    if entry is None and getattr(network, "image_size", side) != side:  # transformers of a fixed size
        side = shorter = int(network.image_size)  # type: ignore[arg-type]
    found = Preprocessing(
        View(side, side, "crop", shorter, resampling_of(specification, preset.interpolation.value)),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    if entry is not None:
        check_against(specification, found, preset)
    return found


def finish(
    specification: Specification,
    network: nn.Module,
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
    if is_detector(network):
        if specification.options.get("task", "detect") != "detect":
            raise specification.error("a detector can only detect")
        detect = Detect(dict(enumerate(labels)), specification.threshold())
        return ModuleModel(
            specification, _Detector(network), preprocessing, detect, architecture, device, options
        )
    reader = reader_of(specification, distinct(labels), activation)
    if isinstance(reader, Embed):
        _take_head_off(specification, network, len(labels))
    return ModuleModel(specification, network, preprocessing, reader, architecture, device, options)


def is_detector(network: nn.Module) -> bool:
    """Whether a network of torchvision returns boxes."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    return isinstance(getattr(network, "transform", None), GeneralizedRCNNTransform)


class _Detector(nn.Module):
    """A detector that gets its pictures in the size it wants, 0..1; it takes out mean and deviation itself.

    It leaves out what is below its own thresholds, which every NaN is, so that its heads are listened to. They
    mix the pictures of a batch: one that is not finite makes all of them suspects.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._heard: list[Tensor] = []
        network.transform.resize = _as_it_is
        for name, module in network.named_modules():
            if name in _HEADS:
                # Not a method: a network that refers to what holds it is not freed when another takes over.
                module.register_forward_hook(partial(_hear, self._heard))

    def forward(self, pictures: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        self._heard.clear()
        found: list[dict[str, Tensor]] = self.network(list(pictures))
        is_finite = torch.stack(self._heard).all()  # () bool
        return [{**each, "is_finite": is_finite} for each in found]


def _hear(heard: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    heard += [numbers.isfinite().all() for numbers in _tensors(output)]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Find the tensors in what a head returns: one, or any number by name or in a row."""
    if isinstance(output, Tensor):
        yield output
        return
    for part in output.values() if isinstance(output, dict) else output:
        yield from _tensors(part)


def _as_it_is(image: Tensor, target: None = None) -> tuple[Tensor, None]:
    return image, target


def _detector_preprocessing(network: Any) -> Preprocessing:
    transform = network.transform
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return Preprocessing(View(int(width), int(height)))
    return Preprocessing(View(int(transform.max_size), int(transform.min_size[-1]), "inside"))


def _take_head_off(specification: Specification, network: nn.Module, outputs: int) -> None:
    """Replace the last layer, which turns a vector into scores, by nothing."""
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    head = network.get_submodule(linear[-1]) if linear else None
    if head is None or getattr(head, "out_features", None) != outputs:
        raise specification.error("it has no last linear layer that could be taken off for an embedding")
    parent, _, name = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())


def _entries(specification: Specification, name: str) -> Any:
    """Return the enumeration of an architecture's weights."""
    from torchvision import models

    # Only those: a segmentation network, for one, fetches and unpickles a backbone when it is built.
    known = models.list_models(module=models) + models.list_models(module=models.detection)
    if name not in known:
        raise specification.unknown(name, known)
    return models.get_model_weights(name)


def _entry(specification: Specification) -> Any:
    """Return the weights that a specification chooses, or those that torchvision calls the best."""
    entries = _entries(specification, specification.name)
    wanted = specification.options.get("weights", "DEFAULT")
    if wanted not in entries.__members__:
        known = ", ".join([*(entry.name for entry in entries), "random"])
        raise specification.error(f"torchvision has no weights {wanted!r} of it; known: {known}")
    return entries[wanted]


@contextmanager
def _reading(entry: Any, specification: Specification, cache: Path) -> Iterator[None]:
    """Have torchvision take tensors from us while it builds a network."""

    def read(_: Any, *_arguments: Any, **_more: Any) -> dict[str, Tensor]:
        return weights.read_tensors(specification, _find(entry, specification, cache))

    kind = type(entry)
    with _building:
        kind.get_state_dict = read
        try:
            yield
        finally:
            del kind.get_state_dict


def _find(entry: Any, specification: Specification, cache: Path) -> Path:
    """Return a file with the weights, from the cache or else from where torchvision publishes them."""
    folder = cache / FOLDER
    published = PurePosixPath(urlsplit(entry.url).path).name
    is_default = "weights" not in specification.options
    own = f"{specification.name}{'' if is_default else f'-{entry.name}'}.safetensors"
    for name in (own, published):
        if (folder / name).is_file():
            return folder / name
    target = folder / published
    reason = "HF_HUB_OFFLINE is set"
    if not weights.is_offline():
        try:
            weights.download(specification, entry.url, target)
        except OSError as error:
            reason = f"{urlsplit(entry.url).netloc} does not give it: {weights.one_line(error)}"
        else:
            return target
    raise specification.error(
        f"no weights: neither {own} nor {published} is in {folder} (MILLRACE_MODEL_CACHE), and {reason}"
    )


def _is_detection(name: str) -> bool:
    from torchvision import models

    return name in models.list_models(module=models.detection)
