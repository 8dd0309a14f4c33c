"""`file:` loads weights of one's own: safetensors of an architecture, and exported programs where allowed."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import ConfigurationError
from tests.support import networks
from tests.support.networks import load, photographs, predict

LABELS = ["oak", "ash", "elm"]


def trained(outputs: int = 3) -> Any:
    torch.manual_seed(11)
    network: Any = torchvision.models.get_model("resnet18", weights=None, num_classes=outputs).eval()
    inputs = expected_inputs()
    networks.calibrate(lambda: network(inputs), network)
    networks.sharpen(lambda: network(inputs), network.fc)
    return network


def expected_inputs() -> torch.Tensor:
    transforms = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    return torch.stack([transforms(image) for image in photographs()])


@pytest.mark.parametrize("where", ["header", "beside"])
def test_weights_and_labels_of_ones_own(where: str, tmp_path: Path) -> None:
    """Labels come from the file's header or from the file beside it; the rest is as the architecture has it."""
    network, path = trained(), tmp_path / "weights.safetensors"
    card = json.dumps({"labels": LABELS})
    save_file(network.state_dict(), path, metadata={"millrace": card} if where == "header" else None)
    if where == "beside":
        path.with_name("weights.safetensors.json").write_text(card)
    model = load(f"file:{path}#torchvision:resnet18", tmp_path)
    with torch.inference_mode():
        expected = network(expected_inputs()).softmax(1)
    for output, row in zip(predict(model, photographs()), expected, strict=True):
        assert networks.close(output, dict(zip(LABELS, row.tolist(), strict=True)), 0.03)
    embedding = load(f"file:{path}#torchvision:resnet18?task=embed", tmp_path)
    assert predict(embedding, photographs())[0].embedding.shape == (512,)  # type: ignore[union-attr]
    assert embedding.digest != model.digest


def test_labels_are_part_of_the_version(tmp_path: Path) -> None:
    """Another label, view or mean is another version, though the tensors are the same."""
    path = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), path)
    digests = set()
    for card in (
        {"outputs": 3},
        {"labels": LABELS},
        {"labels": ["a", "b", "c"]},
        {"labels": LABELS, "mean": [0.5, 0.5, 0.5]},
        {"labels": LABELS, "view": {"width": 160, "height": 160}},
        {"labels": LABELS, "activation": "sigmoid"},
    ):
        path.with_name(f"{path.name}.json").write_text(json.dumps(card))
        digests.add(load(f"file:{path}#torchvision:resnet18", tmp_path).digest)
    assert len(digests) == 6


def test_a_regression_head_and_a_headless_backbone(tmp_path: Path) -> None:
    """One output is a score; a timm network saved without a head embeds."""
    save_file(
        trained(1).state_dict(), tmp_path / "score.safetensors", metadata={"millrace": '{"outputs": 1}'}
    )
    score = load(f"file:{tmp_path}/score.safetensors#torchvision:resnet18", tmp_path)
    with torch.inference_mode():
        expected = trained(1)(expected_inputs()).flatten().tolist()
    assert [output.score for output in predict(score, photographs())] == pytest.approx(expected, abs=0.1)
    assert score.task == "score"

    backbone: Any = timm.create_model("test_vit", num_classes=0)
    card = {"outputs": 0, "task": "embed"}
    save_file(backbone.state_dict(), tmp_path / "b.safetensors", metadata={"millrace": json.dumps(card)})
    embed = load(f"file:{tmp_path}/b.safetensors#timm:test_vit", tmp_path)
    assert embed.task == "embed"
    assert predict(embed, photographs())[0].embedding is not None


class Small(nn.Module):
    """Two layers; the mean colour of a picture decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = self.convolution(pixels).mean((2, 3))  # (N, 3)
        logits: torch.Tensor = self.layer(pooled.view(-1, 3)) * 4
        return logits


CARD = {
    "task": "classify",
    "labels": LABELS,
    "view": {"width": 48, "height": 32, "fit": "stretch"},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


def export(folder: Path, card: object = CARD) -> tuple[nn.Module, Path]:
    torch.manual_seed(12)
    network, path = Small().eval(), folder / "model.pt2"
    example = (torch.rand(2, 3, 32, 48),)
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.export.save(torch.export.export(network, example, dynamic_shapes={"pixels": {0: batch}}), path)
    if card is not None:
        path.with_name("model.pt2.json").write_text(json.dumps(card))
    return network, path


def test_exported_programs_run_where_they_are_allowed(tmp_path: Path) -> None:
    """A program gets what its card says, and gives what it gave where it was exported."""
    network, path = export(tmp_path)
    with pytest.raises(ConfigurationError, match="MILLRACE_ALLOW_EXPORTED_MODELS=true"):
        load(f"file:{path}", tmp_path)
    model = load(f"file:{path}", tmp_path, allow_exported=True)
    images = [image.resize((48, 32)) for image in photographs()]
    pixels = torch.stack([torchvision.transforms.functional.to_tensor(image) for image in images])
    with torch.inference_mode():
        expected = network((pixels - 0.5) / 0.5).softmax(1)
    for output, row in zip(predict(model, images), expected, strict=True):
        assert networks.close(output, dict(zip(LABELS, row.tolist(), strict=True)), 1e-4)
    before = model.digest
    path.with_name("model.pt2.json").write_text(json.dumps({**CARD, "labels": ["x", "y", "z"]}))
    assert load(f"file:{path}", tmp_path, allow_exported=True).digest != before


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (None, "must say task, view and labels"),
        ({}, "must say a view"),
        ({**CARD, "task": "detect"}, "must say a task of classify, embed or score"),
        ({**CARD, "labels": ["a"]}, "with 1 outputs it cannot classify"),
        ({**CARD, "veiw": 1}, "unknown field `veiw`"),
        ({**CARD, "view": {"width": 48, "height": 32, "fit": "crop"}}, "`shorter_side` belongs to crop"),
        ({**CARD, "std": [0, 1, 1]}, "`std` three numbers above 0"),
    ],
)
def test_a_wrong_card_is_one_line(card: object, reason: str, tmp_path: Path) -> None:
    """What is said wrongly about an exported program is named."""
    _, path = export(tmp_path, card)
    with pytest.raises(ConfigurationError) as refused:
        load(f"file:{path}", tmp_path, allow_exported=True)
    assert reason in refused.value.message
    assert "\n" not in refused.value.message


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    """Files that are missing, broken, of another architecture or of another kind are told apart."""
    weights = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), weights)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    detector = tmp_path / "detector.safetensors"
    name = "ssdlite320_mobilenet_v3_large"
    state = torchvision.models.get_model(name, weights=None, weights_backbone=None).state_dict()
    save_file(state, detector, metadata={"millrace": '{"mean": [0.5, 0.5, 0.5]}'})
    for specification, reason in (
        (f"file:{tmp_path}/none.safetensors#torchvision:resnet18", "there is no file"),
        (f"file:{weights}", "say the architecture: #torchvision:NAME or #timm:NAME"),
        (f"file:{weights}#keras:resnet18", "say the architecture"),
        (f"file:{weights}#torchvision:resnet81", "has no model 'resnet81'"),
        (f"file:{weights}#torchvision:resnet18", "of another shape: fc.weight (3, 512 for 1000, 512)"),
        (f"file:{weights}#torchvision:mobilenet_v2", "missing: features.0.0.weight"),
        (f"file:{tmp_path}/broken.safetensors#timm:resnet18", "cannot be read"),
        (f"file:{tmp_path}/model.pt#timm:resnet18", "nothing else is read"),
        (f"file:{detector}#torchvision:{name}", "a detector has its own view"),
    ):
        with pytest.raises(ConfigurationError) as refused:
            load(specification, tmp_path)
        assert reason in refused.value.message, refused.value.message
        assert "\n" not in refused.value.message
