"""`timm:NAME` does what timm does with the same weights and the same picture."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from pipeline.errors import ConfigurationError
from tests.support import networks
from tests.support.networks import load, photographs, predict

TOLERANCE = 0.03  # of a probability, as in test_torchvision_models.py
NAME = "test_resnet"  # a tiny one that timm publishes for tests


def network(name: str = NAME, **more: Any) -> tuple[Any, torch.Tensor]:
    """Make a network that tells the test's pictures apart, and its inputs of them."""
    torch.manual_seed(9)
    made: Any = timm.create_model(name, pretrained=False, **more).eval()
    transform = create_transform(**resolve_model_data_config(made), is_training=False)
    inputs = torch.stack([transform(image) for image in photographs()])
    networks.calibrate(lambda: made(inputs), made)
    networks.sharpen(lambda: made(inputs), made.get_classifier())
    return made, inputs


def keep(made: Any, cache: Path, name: str = NAME) -> None:
    (cache / "timm").mkdir(exist_ok=True)
    save_file(made.state_dict(), cache / "timm" / f"{name}.safetensors")


def test_a_classifier_agrees_with_timm(tmp_path: Path) -> None:
    """Scores, preprocessing and ImageNet's labels are timm's own."""
    made, inputs = network()
    keep(made, tmp_path)
    model = load(f"timm:{NAME}", tmp_path)
    with torch.inference_mode():
        expected = made(inputs).softmax(1)
    outputs = predict(model, photographs())
    assert len({output.label for output in outputs}) > 1
    for output, row in zip(outputs, expected, strict=True):
        best = row.topk(5).values.tolist()
        assert list(output.scores.values()) == pytest.approx(best, abs=TOLERANCE)
    all_labels = model._read.labels
    assert (len(all_labels), all_labels[0]) == (1000, "tench, Tinca tinca")


def test_an_embedding_is_timms_without_a_head(tmp_path: Path) -> None:
    """With ?task=embed the pooled features come out, of length one."""
    made, inputs = network()
    keep(made, tmp_path)
    model = load(f"timm:{NAME}?task=embed", tmp_path)
    made.reset_classifier(0)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(made(inputs))
    for output, row in zip(predict(model, photographs()), expected, strict=True):
        assert output.embedding is not None
        assert float(torch.from_numpy(output.embedding) @ row) > 0.995
    assert model.task == "embed"


def test_a_repository_written_by_timm_is_loaded(tmp_path: Path) -> None:
    """A network of one's own, saved as timm saves for the hub, keeps its labels and its preprocessing."""
    made, inputs = network("test_vit", num_classes=3)
    names = ["heron", "egret", "stork"]
    timm.models.save_for_hf(
        made, tmp_path / "org" / "birds", model_config={"label_names": names}, safe_serialization=True
    )
    model = load("timm:org/birds", tmp_path)
    with torch.inference_mode():
        expected = made(inputs).softmax(1)
    for output, row in zip(predict(model, photographs()), expected, strict=True):
        assert networks.close(output, dict(zip(names, row.tolist(), strict=True)), TOLERANCE)


def test_random_weights_and_regression(tmp_path: Path) -> None:
    """Seeded weights need no file; one output is a score, labels are numbers."""
    score = load(f"timm:{NAME}?weights=random&seed=3&classes=1", tmp_path)
    assert score.task == "score"
    assert predict(score, photographs())[0].score is not None
    three = load(f"timm:{NAME}?weights=random&seed=3&classes=3", tmp_path)
    assert set(predict(three, photographs())[0].scores) == {"0", "1", "2"}
    assert three.digest == load(f"timm:{NAME}?weights=random&seed=3&classes=3", tmp_path).digest


@pytest.mark.parametrize(
    ("specification", "reason"),
    [
        ("timm:resnet81", "timm has no model 'resnet81'"),
        ("timm:org/nothing", "in org/nothing and models--org--nothing of"),
        (f"timm:{NAME}", f"timm/{NAME}.safetensors"),
        (f"timm:{NAME}?weights=mine", "`weights` can only be random"),
        ("timm:../escape", "is not the name of a repository"),
        (f"timm:{NAME}?weights=random&classes=0", "classes=0 is not a number"),
    ],
)
def test_what_is_not_there_is_one_line(
    specification: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong name, option or missing weights name the setting and what was looked for."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError) as refused:
        load(specification, tmp_path)
    assert refused.value.message.startswith("MILLRACE_MODELS: ")
    assert reason in refused.value.message
    assert "\n" not in refused.value.message
