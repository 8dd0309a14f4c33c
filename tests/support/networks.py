"""Tiny networks with random weights, made and saved by the libraries that people make and save theirs with.

Random networks answer nearly the same to everything; `calibrate` and `sharpen` make one that tells pictures apart,
so that a difference in its input shows in its output.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline import imaging
from pipeline.imaging import Picture
from pipeline.inference.model_results import in_picture
from pipeline.models import LoadOptions, Model, Output, load_models
from tests.support import pictures

CPU = torch.device("cpu")
#: Label, score and corners of each box.
Found = list[tuple[str, float, list[float]]]


def options(cache: Path, **more: Any) -> LoadOptions:
    """Return how tests load: in float32, so that outputs can be compared, and in small batches."""
    given: dict[str, Any] = {"precision": "fp32", "max_batch_size": 4}
    return LoadOptions(cache=cache, **{**given, **more})


def load(specification: str, cache: Path, **more: Any) -> Any:
    """Load and warm up one model."""
    (model,) = load_models(specification, CPU, options(cache, **more))
    model.warm_up()
    return model


def photographs() -> list[Image.Image]:
    """Draw pictures wider and higher than long, with detail."""
    drawn = []
    for seed, size in enumerate([(640, 400), (300, 520), (420, 420)]):
        image = pictures.scene(*size, seed=seed)
        detail = np.random.default_rng(seed).integers(-25, 26, (size[1] // 4, size[0] // 4, 3))
        detail = np.kron(detail, np.ones((4, 4, 1), int))
        drawn.append(Image.fromarray((np.asarray(image) + detail).clip(0, 255).astype(np.uint8)))
    return drawn


def encoded(image: Image.Image) -> bytes:
    """Encode without loss: what a library sees of a file and what we see of it are the same pixels."""
    return pictures.encode(image, "PNG")


def predict(
    model: Model, images: Sequence[Image.Image], encode: Callable[[Image.Image], bytes] = encoded
) -> list[Output]:
    """Predict pictures as the engine does: decoded in the model's view, in one batch."""
    decoded = [imaging.decode(encode(image), [model.view]) for image in images]
    if model.view.fit == "inside":
        batch: Any = [_tensor(picture) for picture in decoded]
    else:
        batch = torch.stack([_tensor(picture) for picture in decoded])
    return model.forward(batch)


def in_original(model: Model, output: Output, image: Image.Image) -> Found:
    """Return the boxes of an output in pixels of the picture, as the engine publishes them."""
    picture = Picture((), image.width, image.height)
    boxes = in_picture(output.boxes, model.view, picture)
    return [(box.label, box.score, [box.x_min, box.y_min, box.x_max, box.y_max]) for box in boxes]


def matched(ours: Found, wanted: Found, *, pixels: float, score: float) -> int:
    """Count the wanted boxes that are among ours: same label, and about the same score and corners."""
    return sum(
        any(
            label == other and abs(one - two) <= score and max(map(abs, np.subtract(corners, box))) <= pixels
            for other, two, box in ours
        )
        for label, one, corners in wanted
    )


def calibrate(run: Callable[[], object], network: nn.Module) -> None:
    """Set batch norms to what they see in `run`: else the layers of a random network fade out."""
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        run()
    network.eval()


def sharpen(run: Callable[[], object], *heads: nn.Module, spread: float = 1.5) -> None:
    """Scale and centre last layers so that what they give in `run` differs by about `spread`."""
    heard: dict[nn.Module, list[Tensor]] = {head: [] for head in heads}
    hooks = [
        head.register_forward_hook(lambda layer, _, output: heard[layer].append(output)) for head in heads
    ]
    with torch.inference_mode():
        run()
    for hook in hooks:
        hook.remove()
    for head, outputs in heard.items():
        assert isinstance(head, nn.Linear | nn.Conv2d)
        assert head.bias is not None
        channel = 1 if isinstance(head, nn.Conv2d) else -1
        flat = torch.cat([output.movedim(channel, -1).flatten(0, -2) for output in outputs])  # (K, C)
        scale = float(spread / flat.std(0).mean().clamp_min(1e-9))
        with torch.no_grad():
            head.weight *= scale
            head.bias.copy_((head.bias - flat.mean(0)) * scale)


def close(output: Output, scores: dict[str, float], tolerance: float) -> bool:
    """Whether an output has these scores, those of its best labels."""
    return bool(output.scores) and all(
        abs(score - scores[label]) <= tolerance for label, score in output.scores.items()
    )


def jpeg(image: Image.Image) -> bytes:
    """Encode as cameras do."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _tensor(picture: Picture) -> Tensor:
    return torch.from_numpy(picture.pixels[0].copy()).permute(2, 0, 1)  # (3, H, W) uint8
