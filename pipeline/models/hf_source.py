"""`hf:REPOSITORY`: image classifiers, scores, detectors and embeddings of transformers.

Code that a repository brings is never run. Weights that lack tensors are refused, where transformers would warn
and go on with random ones.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipeline.imaging import View
from pipeline.models import hub
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing, check_against, resampling_of
from pipeline.models.protocol import Task, WrongOutputError
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.tasks import Detect, Embed, Reader, distinct, reader_of

# A configuration says for what the weights were saved: ViTForImageClassification.
_TASKS: dict[str, Task] = {"ForImageClassification": "classify", "ForObjectDetection": "detect"}
# Of a configuration, what says nothing about outputs.
_IRRELEVANT = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id"}
)


def load(specification: Specification, device: torch.device, options: LoadOptions) -> ModuleModel:
    """Load a repository of the hub, from the cache or else from the hub.

    Raises:
        ConfigurationError: It is not there, or its task or preprocessing is not supported.
    """
    specification.check_options("task", "revision", "threshold")
    folder = hub.find(specification, specification.name, options.cache, hub.transformers_weights)
    return load_folder(specification, folder, device, options)


def load_folder(
    specification: Specification, folder: Path, device: torch.device, options: LoadOptions
) -> ModuleModel:
    """Load what `save_pretrained` has written.

    Raises:
        ConfigurationError: Its task or preprocessing is not supported, or tensors are missing.
    """
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its reports of missing tensors become our errors
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    preprocessing = _preprocessing(specification, processor)
    task = specification.options.get("task") or _usual_task(config)
    labels = [str(config.id2label.get(index, index)) for index in range(config.num_labels)]
    network: nn.Module
    reader: Reader
    if task == "detect":
        threshold = specification.threshold()
        network = _Detector(_pretrained(specification, folder, "ObjectDetection"), processor, threshold)
        reader = Detect(dict(config.id2label), threshold)
    elif preprocessing.view.fit == "inside":
        raise specification.error("its pictures vary in size, which is supported for detection only")
    elif task == "embed":
        network, reader = _Backbone(_backbone(specification, folder)), Embed()
    else:
        network = _Classifier(_pretrained(specification, folder, "ImageClassification"))
        many = config.problem_type == "multi_label_classification"
        reader = reader_of(specification, distinct(labels), "sigmoid" if many else "softmax")
    facts = {name: value for name, value in config.to_diff_dict().items() if name not in _IRRELEVANT}
    architecture = {"source": "hf", "config": facts}
    return ModuleModel(specification, network, preprocessing, reader, architecture, device, options)


class _Classifier(nn.Module):
    """Returns the (N, C) logits alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=pixels).logits
        return logits


class _Backbone(nn.Module):
    """Returns one vector per picture: as pooled by the network, else its first token or the mean of its map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.of_images = getattr(network, "get_image_features", None) is not None  # CLIP and its like

    def forward(self, pixels: Tensor) -> Tensor:
        output = (
            self.network.get_image_features(pixel_values=pixels)
            if self.of_images
            else self.network(pixel_values=pixels)
        )
        if isinstance(output, Tensor):
            return output
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last: Tensor = output.last_hidden_state
        return last[:, 0] if last.ndim == 3 else last.mean((2, 3))


class _Detector(nn.Module):
    """Pads pictures of different sizes, and has the network's own post-processing find the boxes."""

    def __init__(self, network: nn.Module, processor: Any, threshold: float) -> None:
        super().__init__()
        self._threshold = threshold
        self.network = network
        self._post_process = processor.post_process_object_detection

    def forward(self, pictures: Tensor | list[Tensor]) -> list[dict[str, Tensor]]:
        sizes = [(int(picture.shape[-2]), int(picture.shape[-1])) for picture in pictures]
        if isinstance(pictures, Tensor):
            output = self.network(pixel_values=pictures)
        else:
            batch, mask = _pad(pictures)
            output = self.network(pixel_values=batch, pixel_mask=mask)
        raw = output.logits, output.pred_boxes
        if any(len(numbers) != len(sizes) for numbers in raw):
            shapes = ", ".join(str(tuple(numbers.shape)) for numbers in raw)
            raise WrongOutputError(f"outputs of shapes {shapes} for {len(sizes)} pictures")
        # No threshold lets a NaN through: what is seen of it behind them is a picture without boxes.
        logits, boxes = (numbers.flatten(1).isfinite().all(1) for numbers in raw)  # (N,) bool
        found = self._post_process(output, threshold=self._threshold, target_sizes=sizes)
        return [{**each, "is_finite": finite} for each, finite in zip(found, logits & boxes, strict=True)]


def _pad(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Put pictures into the upper left corner of a common size; the mask says where they are."""
    height = max(picture.shape[1] for picture in pictures)
    width = max(picture.shape[2] for picture in pictures)
    batch = torch.stack(
        [
            functional.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]))
            for picture in pictures
        ]
    )  # (N, 3, H, W) float32
    mask = torch.zeros((len(pictures), height, width), dtype=torch.int64, device=batch.device)
    for index, picture in enumerate(pictures):
        mask[index, : picture.shape[1], : picture.shape[2]] = 1
    return batch, mask


def _usual_task(config: Any) -> Task:
    for name in config.architectures or ():
        for ending, task in _TASKS.items():
            if ending in name:
                return task
    return "embed"


def _pretrained(specification: Specification, folder: Path, kind: str, **arguments: Any) -> Any:
    """Load a network with `AutoModelFor…`, in float32 and with every tensor it has.

    Raises:
        ConfigurationError: The weights lack some.
    """
    network, missing = _from_folder(folder, kind, **arguments)
    if missing:
        raise specification.error(f"its weights lack {', '.join(missing[:3])}: they are not for this task")
    return network


def _from_folder(folder: Path, kind: str, **arguments: Any) -> tuple[Any, list[str]]:
    import transformers

    loader = transformers.AutoModel if kind == "" else getattr(transformers, f"AutoModelFor{kind}")
    names = [path.name for path in folder.iterdir()]
    network, info = loader.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=hub.transformers_weights(names)[0].startswith("model."),
        weights_only=True,
        output_loading_info=True,
        **arguments,
    )
    return network, sorted(info["missing_keys"])


def _backbone(specification: Specification, folder: Path) -> Any:
    """Load a network without its head, and without a pooler that was never trained."""
    network, missing = _from_folder(folder, "")
    if missing and all(name.startswith("pooler.") for name in missing):
        return _pretrained(specification, folder, "", add_pooling_layer=False)
    if missing:
        raise specification.error(f"its weights lack {', '.join(missing[:3])}")
    return network


def _preprocessing(specification: Specification, processor: Any) -> Preprocessing:
    view = _view(specification, processor)
    mean = tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)
    found = Preprocessing(view, mean, std)

    def theirs(picture: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        return pixels

    check_against(specification, found, theirs)
    return found


def _view(specification: Specification, processor: Any) -> View:
    """Return the view that an image processor's configuration describes; `check_against` sees what it misses."""
    size, crop = _Sides(processor.size), _Sides(getattr(processor, "crop_size", None))
    resampling = resampling_of(specification, int(processor.resample))
    crop_ratio = getattr(processor, "crop_pct", None)
    if size.shortest_edge and crop_ratio:  # ConvNeXt: larger pictures are stretched
        side = size.shortest_edge
        if side >= 384:
            return View(side, side, "stretch", None, resampling)
        return View(side, side, "crop", int(side / crop_ratio), resampling)
    if size.shortest_edge and processor.do_center_crop and crop.width and crop.height:
        return View(crop.width, crop.height, "crop", size.shortest_edge, resampling)
    if size.shortest_edge and size.longest_edge:
        return View(size.longest_edge, size.shortest_edge, "inside", None, resampling)
    if size.width and size.height:
        return View(size.width, size.height, "stretch", None, resampling)
    raise specification.error(f"its pictures are resized to {processor.size}, which is not supported")


class _Sides:
    """The sides that a size of transformers names, a dictionary or an object."""

    def __init__(self, size: Any) -> None:
        def side(name: str) -> int | None:
            value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
            return None if value is None else int(value)

        self.width, self.height = side("width"), side("height")
        self.shortest_edge, self.longest_edge = side("shortest_edge"), side("longest_edge")
