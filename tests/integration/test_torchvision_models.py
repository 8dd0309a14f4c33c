"""`torchvision:NAME` does what torchvision itself does with the same weights and the same picture."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import ConfigurationError
from pipeline.inference.forward import Forward
from tests.support import networks
from tests.support.networks import load, photographs, predict

# Another resize code and a crop that is not rounded to whole pixels move a probability by so much at most.
TOLERANCE = 0.03
NAME = "mobilenet_v3_small"
WEIGHTS = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
PUBLISHED = "mobilenet_v3_small-047dcff4.pth"  # the end of its URL


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    made: Any = torchvision.models.get_model(NAME, weights=None).eval()
    inputs = torch.stack([WEIGHTS.transforms()(image) for image in photographs()])
    networks.calibrate(lambda: made(inputs), made)
    networks.sharpen(lambda: made(inputs), made.classifier[-1])
    return cast(nn.Module, made)


@pytest.fixture(scope="module")
def cache(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "torchvision").mkdir()
    torch.save(network.state_dict(), folder / "torchvision" / PUBLISHED)
    return folder


@pytest.mark.parametrize("encode", [networks.encoded, networks.jpeg])
def test_a_classifier_agrees_with_torchvision(network: nn.Module, cache: Path, encode: Any) -> None:
    """Labels, scores and preprocessing are those of the weights, whichever way round the picture is."""
    model = load(f"torchvision:{NAME}", cache)
    transforms = WEIGHTS.transforms()
    with torch.inference_mode():
        files = [Image.open(BytesIO(encode(image))) for image in photographs()]
        expected = network(torch.stack([transforms(image) for image in files])).softmax(1)
    outputs = predict(model, photographs(), encode)
    labels = WEIGHTS.meta["categories"]
    assert len({output.label for output in outputs}) > 1, "a network that sees no difference proves nothing"
    for output, row in zip(outputs, expected, strict=True):
        assert networks.close(output, dict(zip(labels, row.tolist(), strict=True)), TOLERANCE)
        assert output.score == max(output.scores.values()) == output.scores[output.label or ""]
        assert len(output.scores) == 5
    assert (model.task, len(model.digest), model.version) == ("classify", 64, model.digest[:12])


def test_the_format_of_weights_does_not_change_their_digest(
    network: nn.Module, cache: Path, tmp_path: Path
) -> None:
    """The same tensors as safetensors are the same version; one other number is another."""
    (tmp_path / "torchvision").mkdir()
    state = network.state_dict()
    save_file(state, tmp_path / "torchvision" / f"{NAME}.safetensors")
    before = load(f"torchvision:{NAME}", cache)
    same = load(f"torchvision:{NAME}", tmp_path)
    assert (same.digest, same.version) == (before.digest, before.version)
    state["features.0.0.weight"] = state["features.0.0.weight"].clone()
    state["features.0.0.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, tmp_path / "torchvision" / f"{NAME}.safetensors")
    assert load(f"torchvision:{NAME}", tmp_path).digest != before.digest


def test_an_embedding_is_what_the_head_would_get(network: nn.Module, cache: Path) -> None:
    """With ?task=embed the head is off, and vectors have length one."""
    model = load(f"torchvision:{NAME}?task=embed", cache)
    heard: list[torch.Tensor] = []
    head: Any = network.get_submodule("classifier.3")
    handle = head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    with torch.inference_mode():
        network(torch.stack([WEIGHTS.transforms()(image) for image in photographs()]))
    handle.remove()
    expected = nn.functional.normalize(heard[0])
    for output, row in zip(predict(model, photographs()), expected, strict=True):
        assert output.embedding is not None
        assert output.embedding.shape == (1024,)
        assert output.embedding.dtype.name == "float32"
        assert abs(float(output.embedding @ output.embedding) - 1) < 1e-5
        assert float(torch.from_numpy(output.embedding) @ row) > 0.995
    assert model.task == "embed"
    assert model.digest != load(f"torchvision:{NAME}", cache).digest


def test_seeded_random_weights_are_the_same_everywhere(tmp_path: Path) -> None:
    """A seed names weights; labels are class indices, and torch's own generator is left alone."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = load(f"torchvision:{NAME}?weights=random&seed=7", tmp_path)
    two = load(f"torchvision:{NAME}?weights=random&seed=7", tmp_path)
    other = load(f"torchvision:{NAME}?weights=random&seed=8&classes=3", tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert one.digest == two.digest != other.digest
    assert set(predict(other, photographs())[0].scores) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("name", "published", "heads"),
    [
        (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
            ["roi_heads.box_predictor.cls_score"],
        ),
        (
            "ssdlite320_mobilenet_v3_large",
            "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
            [f"head.classification_head.module_list.{level}.1" for level in range(6)],
        ),
    ],
)
def test_a_detector_agrees_with_torchvision(
    name: str, published: str, heads: list[str], tmp_path: Path
) -> None:
    """Boxes, labels and scores are torchvision's, also of pictures of different sizes in one batch."""
    torch.manual_seed(5)
    network: Any = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    # In the size that the detector wants, so that no resize, which it does without antialiasing, differs.
    sizes = [(320, 320)] * 2 if "320_mobilenet" in name else [(480, 320), (320, 416)]
    images = [image.resize(size) for image, size in zip(photographs(), sizes, strict=False)]
    inputs = [torchvision.transforms.functional.to_tensor(image) for image in images]
    networks.calibrate(lambda: network(inputs), network)
    networks.sharpen(lambda: network(inputs), *map(network.get_submodule, heads), spread=4.0)
    (tmp_path / "torchvision").mkdir()
    torch.save(network.state_dict(), tmp_path / "torchvision" / published)
    model = load(f"torchvision:{name}?threshold=0.3", tmp_path)
    with torch.inference_mode():
        expected = network(inputs)
    categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    found = 0
    for output, image, theirs in zip(predict(model, images), images, expected, strict=True):
        kept = (theirs["scores"] >= 0.3).nonzero().flatten()[:100]
        rows = zip(theirs["labels"][kept], theirs["scores"][kept], theirs["boxes"][kept], strict=True)
        wanted = [(categories[int(label)], float(score), box.tolist()) for label, score, box in rows]
        ours = networks.in_original(model, output, image)
        # A last bit may decide which of two boxes that overlap is kept.
        assert networks.matched(ours, wanted, pixels=0.05, score=0.001) >= 0.95 * len(wanted)
        assert len(ours) == len(wanted)
        found += len(ours)
    assert found > 5, "a detector that finds nothing proves nothing"
    assert model.task == "detect"
    assert all(output.is_finite for output in predict(model, images))
    for head in heads:
        model._network.network.get_submodule(head).weight.fill_(torch.nan)
    assert not predict(model, images[:1])[0].is_finite
    with pytest.raises(ConfigurationError, match="not a finite number for a reference picture"):
        Forward([model], networks.CPU).warm_up()


def test_weights_are_looked_for_and_the_error_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights and network the error is one line: the setting, the names, the folder and the reason."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError) as refused:
        load("torchvision:resnet18", tmp_path)
    message = refused.value.message
    assert "\n" not in message
    for said in ("MILLRACE_MODELS", "resnet18.safetensors", "resnet18-f37072fd.pth", str(tmp_path),
                 "MILLRACE_MODEL_CACHE", "HF_HUB_OFFLINE"):  # fmt: skip
        assert said in message


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve a folder over HTTP on this machine."""
    (tmp_path / "served").mkdir()
    handler = partial(_QuietHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def test_weights_are_downloaded_once_and_checked(
    network: nn.Module, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchvision publishes is fetched, compared with the digest in its name, and kept for the next start."""
    torch.save(network.state_dict(), tmp_path / "weights")
    data = (tmp_path / "weights").read_bytes()
    good = f"good-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    (tmp_path / "served" / good).write_bytes(data)
    (tmp_path / "served" / "bad-00000000.pth").write_bytes(data)

    monkeypatch.setattr(WEIGHTS.value, "url", f"{server}/bad-00000000.pth")
    with pytest.raises(ConfigurationError, match="its name says 00000000"):
        load(f"torchvision:{NAME}", tmp_path / "cache")
    assert list((tmp_path / "cache" / "torchvision").iterdir()) == []

    monkeypatch.setattr(WEIGHTS.value, "url", f"{server}/{good}")
    first = load(f"torchvision:{NAME}", tmp_path / "cache")
    (tmp_path / "served" / good).unlink()
    assert load(f"torchvision:{NAME}", tmp_path / "cache").digest == first.digest

    monkeypatch.setattr(WEIGHTS.value, "url", f"{server}/gone-12345678.pth")
    with pytest.raises(ConfigurationError, match=r"127\.0\.0\.1:\d+ does not give it: HTTP Error 404"):
        load(f"torchvision:{NAME}", tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("specification", "reason"),
    [
        ("torchvision:resnet81", "meant is perhaps resnet18"),
        ("torchvision:fcn_resnet50", "has no model 'fcn_resnet50'"),  # segments; fetches pickles when built
        ("torchvision:resnet18?weights=BEST", "known: IMAGENET1K_V1, random"),
        ("torchvision:resnet18?wieghts=random", "there is no option 'wieghts'"),
        ("torchvision:resnet18?weights=random&seed=x", "seed=x is not a number"),
        ("torchvision:squeezenet1_1?weights=random&task=embed", "no last linear layer"),
        ("torchvision:mobilenet_v2?weights=random&task=detect", "it can classify, or embed"),
        ("torchvision:ssdlite320_mobilenet_v3_large?weights=random&task=embed", "a detector can only detect"),
    ],
)
def test_what_is_not_there_is_one_line(specification: str, reason: str, tmp_path: Path) -> None:
    """A wrong name, option or task names the setting, and says what would do."""
    with pytest.raises(ConfigurationError) as refused:
        load(specification, tmp_path)
    assert refused.value.message.startswith("MILLRACE_MODELS: ")
    assert reason in refused.value.message
    assert "\n" not in refused.value.message
