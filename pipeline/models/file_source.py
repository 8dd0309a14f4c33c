"""Weights of one's own: `file:PATH#ARCHITECTURE` (safetensors), and `file:PATH.pt2` (exported programs).

An exported program runs code when it is loaded, and needs a setting of its own. An architecture is one of
torchvision or timm.
What the tensors do not say (labels, task, preprocessing) is JSON, a `Card`: in the header of the safetensors
file under the key `millrace`, or beside any file as PATH.json, which goes first.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from pipeline.imaging import View
from pipeline.models import timm_source, torchvision_source, weights
from pipeline.models.modules import ModuleModel
from pipeline.models.preprocessing import Preprocessing
from pipeline.models.protocol import Task
from pipeline.models.specification import LoadOptions, Specification
from pipeline.models.tasks import Activation, distinct, numbered, reader_of

_METADATA_KEY = "millrace"
_EXPORTED = ".pt2"
_ARCHITECTURES: dict[str, Any] = {"torchvision": torchvision_source, "timm": timm_source}


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What tensors do not say about themselves; all of it may be left out but for exported programs."""

    task: Task | None = None
    labels: tuple[str, ...] = ()
    #: How many numbers the network gives, where labels do not say it.
    outputs: int | None = None
    view: View | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    #: What makes scores of the outputs of a classifier.
    activation: Activation = "softmax"


def load(specification: Specification, device: torch.device, options: LoadOptions) -> ModuleModel:
    """Load weights of one's own.

    Raises:
        ConfigurationError: there is no such file, or it is not what the specification and the card say.
    """
    specification.check_options("task", "threshold")
    path = Path(specification.name).expanduser()
    if not path.is_file():
        raise specification.error(f"there is no file {path.absolute()}")
    if path.suffix == _EXPORTED:
        return _load_exported(specification, path, device, options)
    if path.suffix != ".safetensors":
        raise specification.error(
            f"{path.name} is neither .safetensors nor {_EXPORTED}; nothing else is read"
        )
    source, _, name = specification.architecture.partition(":")
    if source not in _ARCHITECTURES or not name:
        raise specification.error("say the architecture: #torchvision:NAME or #timm:NAME")
    card = read_card(specification, path)
    return _load_safetensors(specification, path, card, source, name, device, options)


def read_card(specification: Specification, path: Path) -> Card:
    """Return what is said about a file: by PATH.json, else by the header of safetensors, else nothing.

    Raises:
        ConfigurationError: It is not a `Card` in JSON.
    """
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        where, text = str(beside), beside.read_bytes()
    elif path.suffix == ".safetensors":
        where = f"{path}, {_METADATA_KEY!r} in its header"
        text = weights.read_metadata(specification, path).get(_METADATA_KEY, "{}").encode()
    else:
        raise specification.error(f"{beside} must say task, view and labels of an exported program")
    try:
        return msgspec.json.decode(text, type=Card)
    except (msgspec.DecodeError, ValueError) as error:
        raise specification.error(f"{where}: {weights.one_line(error)}") from None


def _load_safetensors(
    specification: Specification,
    path: Path,
    card: Card,
    source: str,
    name: str,
    device: torch.device,
    options: LoadOptions,
) -> ModuleModel:
    specification = specification.with_task(card.task)
    outputs = len(card.labels) or card.outputs
    library = _ARCHITECTURES[source]
    network, usual = library.build(specification, name, outputs)
    weights.load_tensors(specification, network, weights.read_tensors(specification, path))
    preprocessing = Preprocessing(card.view or usual.view, card.mean or usual.mean, card.std or usual.std)
    if torchvision_source.is_detector(network) and preprocessing != usual:
        raise specification.error("a detector has its own view, mean and deviation; leave them out")
    labels = card.labels or numbered(outputs or library.usual_outputs(network))
    architecture = {"source": source, "name": name, "outputs": len(labels)}
    model: ModuleModel = library.finish(
        specification, network, preprocessing, labels, architecture, device, options, card.activation
    )
    return model


def _load_exported(
    specification: Specification, path: Path, device: torch.device, options: LoadOptions
) -> ModuleModel:
    if not options.allow_exported:
        raise specification.error(
            "an exported program runs code when it is loaded; MILLRACE_ALLOW_EXPORTED_MODELS=true allows it"
        )
    if specification.architecture:
        raise specification.error("an exported program has its architecture in it; leave #… out")
    card = read_card(specification, path)
    if card.view is None or card.view.fit == "inside":
        raise specification.error(f"{path.name}.json must say a view that stretches or crops")
    if card.task is None or card.task == "detect":
        raise specification.error(f"{path.name}.json must say a task of classify, embed or score")
    program = torch.export.load(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    labels = card.labels or numbered(card.outputs or 1)
    asked = replace(specification, options={"task": card.task})
    reader = reader_of(asked, distinct(labels), card.activation)
    preprocessing = Preprocessing(card.view, card.mean or (0.0, 0.0, 0.0), card.std or (1.0, 1.0, 1.0))
    architecture = {"source": "export", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return ModuleModel(
        specification,
        _Program(program.module()),
        preprocessing,
        reader,
        architecture,
        device,
        options,
        is_program=True,
    )


class _Program(nn.Module):
    """An exported program: made for one memory format, and without modes."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> "_Program":
        """Do nothing: a program is as it was exported, and refuses to be asked."""
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.program(pixels.contiguous())
        if not isinstance(output, Tensor):
            raise TypeError(f"the program returns {type(output).__name__}, not one tensor")
        return output
